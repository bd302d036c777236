"""CameraSR beside its authors' TensorFlow code: outputs, losses, gradients, a step; speed; the recorded tensors.

Their code runs in another interpreter, which the environment variable ``ZOO_TENSORFLOW`` names (a Python with
``tensorflow``, ``tf_keras`` and ``tf_slim``); see `camera_sr_tensorflow`. Weights are drawn by variable name on both
sides. Their trained VDSR is compared as well where the checkout has its values (they are large, and some mirrors leave
them out): its pictures against those in ``Models/VDSR/results``.
"""

import functools
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.authors import camera_sr_tensorflow as recorded
from benchmarks.measure import error
from zoo.core import ZooError
from zoo.core.memory import hold_memory
from zoo.core.tensor_bundle import read_bundle, read_index
from zoo.nn.vgg import VGG, VGG19
from zoo.vision.restoration.camera_sr import (
    CameraSR,
    Discriminator,
    adversarial_loss,
    content_loss,
    discriminator_loss,
    rename,
)


def tensorflow(checkout: Path, *arguments: str) -> str:
    """Run the authors' side; what it printed."""
    python = os.environ.get("ZOO_TENSORFLOW", sys.executable)
    script = str(Path(recorded.__file__).resolve())
    done = subprocess.run([python, script, str(checkout.resolve()), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise ZooError(
            f"The authors' code did not run under {python}: {done.stderr.strip().splitlines()[-1]} Set ZOO_TENSORFLOW "
            "to a Python with tensorflow, tf_keras and tf_slim."
        )
    return done.stdout


def drawn(model: CameraSR) -> CameraSR:
    """The model with the values that `camera_sr_tensorflow.draw` gives the authors' variables."""
    theirs = {name: torch.from_numpy(recorded.draw(name, shape)) for name, shape in variables(model).items()}
    state = model.state_dict()
    state.update(rename(theirs))
    model.load_state_dict(state)
    return model


def variables(model: CameraSR) -> dict[str, tuple[int, ...]]:
    """The authors' variables of a model of ours: names and shapes."""
    hp = model.hparams
    if hp.net == "vdsr":
        widths = [1, *[hp.width] * (hp.depth - 1), 1]
        found: dict[str, tuple[int, ...]] = {}
        for k, (a, b) in enumerate(itertools.pairwise(widths), 1):
            found |= {f"vdsr20/conv{k}/kernel": (3, 3, a, b), f"vdsr20/conv{k}/bias": (b,)}
        return found
    found, g, w = {}, "generator/generator_unit", hp.width

    def conv(name: str, size: int, a: int, b: int, bias: bool, kind: str = "conv/Conv") -> None:
        found[f"{name}/{kind}/weights"] = (size, size, a, b)
        if bias:
            found[f"{name}/{kind}/biases"] = (b,)

    def norm(name: str, width: int) -> None:
        found.update({f"{name}/{part}": (width,) for part in ("beta", "moving_mean", "moving_variance")})

    conv(f"{g}/input_stage", 9, 3, w, True)
    found[f"{g}/input_stage/Prelu/alpha"] = (w,)
    for k in range(1, hp.blocks + 1):
        conv(f"{g}/resblock_{k}", 3, w, w, False, "conv_1/Conv")
        conv(f"{g}/resblock_{k}", 3, w, w, False, "conv_2/Conv")
        norm(f"{g}/resblock_{k}/BatchNorm", w)
        norm(f"{g}/resblock_{k}/BatchNorm_1", w)
        found[f"{g}/resblock_{k}/Prelu/alpha"] = (w,)
    conv(f"{g}/resblock_output", 3, w, w, False)
    norm(f"{g}/resblock_output/BatchNorm", w)
    conv(f"{g}/subpixelconv_stage1", 3, w, hp.tail * hp.scale**2, True)
    found[f"{g}/subpixelconv_stage1/Prelu/alpha"] = (hp.tail,)
    conv(f"{g}/output_stage", 9, hp.tail, 3, True)
    if isinstance(model.discriminator, Discriminator):
        d, widths = "discriminator/discriminator_unit", [w * k for k in (1, 1, 2, 2, 4, 4, 8, 8)]
        conv(f"{d}/input_stage", 3, 3, w, True)
        for k, (a, b) in enumerate(itertools.pairwise(widths), 1):
            conv(f"{d}/disblock_{k}", 3, a, b, False, "conv1/Conv")
            norm(f"{d}/disblock_{k}/BatchNorm", b)
        hidden, inputs = model.discriminator.dense.weight.shape
        found |= {f"{d}/dense_layer_1/dense/kernel": (inputs, hidden), f"{d}/dense_layer_1/dense/bias": (hidden,)}
        found |= {f"{d}/dense_layer_2/dense/kernel": (hidden, 1), f"{d}/dense_layer_2/dense/bias": (1,)}
    return found


def chw(values: np.ndarray) -> Tensor:
    """(b, h, w, c) -> (b, c, h, w)."""
    return torch.from_numpy(np.ascontiguousarray(values.transpose(0, 3, 1, 2)))


def picture(name: str, *shape: int) -> Tensor:
    """The pictures that both sides draw: (b, c, h, w) in [0, 1]."""
    b, c, h, w = shape
    return chw(recorded.pictures(name, (b, h, w, c)))


def srgan(**changes: Any) -> CameraSR:
    """Ours as `camera_sr_tensorflow.flags` sets theirs, with the drawn weights."""
    return drawn(CameraSR(net="srgan", blocks=2, patch=36, content="mse", **changes))


def vgg(layer: str) -> VGG:
    """VGG19 with the drawn weights, fed with [-1, 1]."""
    kept = 2 if layer == "vgg22" else 5
    model = VGG(VGG19["blocks"][:kept], VGG19["widths"][:kept], normalise=False)
    block, index, state = 1, 1, {}
    for k, part in enumerate(model.features):
        if isinstance(part, torch.nn.MaxPool2d):
            block, index = block + 1, 1
        elif isinstance(part, torch.nn.Conv2d):
            name = f"vgg_19/conv{block}/conv{block}_{index}"
            o, i, h, w = part.weight.shape
            state[f"{k}.weight"] = torch.from_numpy(recorded.draw(f"{name}/weights", (h, w, i, o))).permute(3, 2, 0, 1)
            state[f"{k}.bias"] = torch.from_numpy(recorded.draw(f"{name}/biases", (o,)))
            index += 1
    model.features.load_state_dict(state)
    return model


def losses(model: CameraSR, mode: str) -> dict[str, Tensor]:
    """What their graph computes at once for one batch, by ours, in the model's precision; gradients are left in
    ``.grad``."""
    kind = next(model.parameters()).dtype
    low, high = picture("low", 2, 3, 12, 12).to(kind), 2 * picture("high", 2, 3, 36, 36).to(kind) - 1
    assert model.discriminator is not None
    made = model.net(low)
    fake, real = model.discriminator(made), model.discriminator(high)
    if mode in ("float32", "MSE"):
        content = content_loss(made, high, 1.0)
    else:
        features = vgg(mode.lower()).to(kind)
        content = content_loss(features(made), features(high))
    adversarial, discriminator = adversarial_loss(fake), discriminator_loss(real, fake)
    own, other = list(model.net.parameters()), list(model.discriminator.parameters())
    for group, loss in ((own, content + 1e-3 * adversarial), (other, discriminator)):
        for p, slope in zip(group, torch.autograd.grad(loss, group, retain_graph=True), strict=True):
            p.grad = slope
    values = {"made": made.permute(0, 2, 3, 1), "fake": fake.sigmoid()[:, None], "real": real.sigmoid()[:, None]}
    return {**values, "content": content, "adversarial": adversarial, "discriminator": discriminator}


@functools.cache
def record(checkout: Path) -> tuple[dict[str, Tensor], dict[str, bytes]]:
    """What their code gave, and the files of the small checkpoint that it saved."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tensorflow(checkout, "record", str(folder / "record.npz"))
        with np.load(folder / "record.npz") as content:
            found = {key: torch.from_numpy(content[key]) for key in content.files}
        files = {p.name.removeprefix("record-bundle."): p.read_bytes() for p in folder.glob("record-bundle.*")}
    return found, files


def saved_bundle(files: dict[str, bytes], folder: Path) -> dict[str, Tensor]:
    """That checkpoint, read by ours."""
    for name, content in files.items():
        (folder / f"model.ckpt.{name}").write_bytes(content)
    return read_bundle(folder / "model.ckpt")


def compare(checkout: Path) -> dict[str, float]:
    """Largest relative errors of networks, losses, gradients (worst tensor), running averages and a step."""
    checkout = Path(checkout)
    theirs, files = record(checkout)
    with tempfile.TemporaryDirectory() as folder:
        bundle = saved_bundle(files, Path(folder))
    figures: dict[str, float] = {}
    with torch.no_grad():
        vdsr = drawn(CameraSR())
        figures["vdsr_forward"] = error(vdsr.net(picture("luma", 1, 1, 20, 24)).permute(0, 2, 3, 1), theirs["vdsr"])
        generator = srgan(adversarial=0.0).eval()
        made = generator.net(picture("small", 1, 3, 7, 9)).permute(0, 2, 3, 1)
        figures["generator_forward"] = error(made, theirs["generator"])
    for mode in ("float32", "VGG22", "VGG54", "MSE"):
        model = srgan() if mode == "float32" else srgan().double()
        for key, value in losses(model, mode).items():
            name = {"made": "generator_train", "fake": "discriminator", "real": "discriminator"}.get(key, f"{key}_loss")
            figures[name] = max(figures.get(name, 0.0), error(value, theirs[f"{mode}.{key}"]))
        if mode != "float32":
            slopes = rename(under(theirs, f"{mode}.gradient."))
            worst = max(error(p.grad, slopes[name]) for name, p in model.named_parameters() if p.grad is not None)
            figures["gradients"] = max(figures.get("gradients", 0.0), worst)
        if mode == "MSE":
            optimizers, _ = model.configure_optimizers()
            # TensorFlow's Adam adds its epsilon before the bias correction: here, at the first step, as much after it
            optimizers[1].param_groups[0]["eps"] = 1e-8 / (1 - 0.999) ** 0.5
            optimizers[1].step()
        if mode in ("float32", "MSE"):
            after, state = rename(under(theirs, f"{mode}.after.")), model.state_dict()
            name = "running_averages" if mode == "float32" else "discriminator_step"
            figures[name] = max(error(state[key], value) for key, value in after.items())
    drawn_again = {k: torch.from_numpy(recorded.draw(k, tuple(v.shape))) for k, v in bundle.items()}
    figures["checkpoint_reader"] = max(error(value, drawn_again[name]) for name, value in bundle.items())
    figures |= released(checkout)
    return figures


def under(theirs: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries below a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in theirs.items() if key.startswith(prefix)}


def released(checkout: Path) -> dict[str, float]:
    """The authors' trained VDSR on their five pictures: largest difference to their results, in grey levels; {} where
    the checkout lacks its values. That its index names exactly our variables is checked either way."""
    prefix = checkout / "Models/VDSR/model/model.ckpt"
    for index in (prefix, checkout / "Models/SRGAN/model/model"):
        named, _ = read_index(index.with_name(index.name + ".index"))
        hyper, state = CameraSR.convert_state_dict({k: torch.zeros(v.shape) for k, v in named.items()})
        CameraSR(**hyper).load_state_dict(state)
    if not prefix.with_name("model.ckpt.data-00000-of-00001").is_file():
        return {}
    from PIL import Image

    hyper, state = CameraSR.convert_state_dict(read_bundle(prefix))
    model = CameraSR(**hyper)
    model.load_state_dict(state)
    worst = 0.0
    for path in sorted((checkout / "Models/VDSR/results").glob("*R.PNG")):
        low = np.array(Image.open(checkout / "Models/VDSR/testset" / path.name.replace("R", "L")))
        with torch.no_grad():
            made = model.net(torch.from_numpy(low)[None, None].float() / 255)[0, 0]
        levels = (made * 255).clamp(0, 255).byte().int() - torch.from_numpy(np.array(Image.open(path))).int()
        worst = max(worst, float(levels.abs().max()))
    return {"released_vdsr_grey_levels": worst}


def golden(checkout: Path) -> dict[str, Tensor]:
    """Their outputs, losses and small gradients for weights and pictures drawn by name, and a small checkpoint."""
    theirs, raw = record(Path(checkout))
    files = {f"bundle.{name}": torch.frombuffer(bytearray(content), dtype=torch.uint8) for name, content in raw.items()}
    kept = {
        key: value.float()
        for key, value in theirs.items()
        if not key.startswith("VGG54.") and ".after." not in key and (".gradient." not in key or value.numel() <= 600)
    }
    return {**kept, **files}


def speed(checkout: Path | None, device: str = "cpu") -> dict[str, dict[str, float]]:
    """VDSR and SRGAN's generator on 256 pixels, SRGAN's training step (4 patches of 72, VGG54): each side in a process
    of its own, theirs first, ours, theirs again (the mean of both); medians of CPU milliseconds, MiB of peak growth."""
    found: dict[str, dict[str, float]] = {}
    for what in ("vdsr", "generator", "train_step"):
        turns = []
        if checkout is not None and device == "cpu":
            turns.append(json.loads(tensorflow(Path(checkout), "speed", what).splitlines()[-1]))
        call = [sys.executable, "-m", "benchmarks.authors.camera_sr", what, device]
        done = subprocess.run(call, capture_output=True, text=True, check=True)
        found[what] = {f"ours_{k}": v for k, v in json.loads(done.stdout.splitlines()[-1]).items()}
        if turns:
            turns.append(json.loads(tensorflow(Path(checkout or "."), "speed", what).splitlines()[-1]))
            found[what] |= {f"authors_{k}": float(np.mean([t[k] for t in turns])) for k in turns[0]}
    return found


def alone(what: str, device: str, rounds: int = 3) -> dict[str, float]:
    """One of our programs in this process."""
    torch.manual_seed(0)
    run: Callable[[], Any]
    if what == "vdsr":
        model = CameraSR().to(device).eval()
        y = torch.rand(1, 1, 256, 256, device=device)

        @torch.no_grad()
        def run() -> Any:
            return model.net(y)

    elif what == "generator":
        model = CameraSR(net="srgan", adversarial=0.0, content="mse").to(device).eval()
        small = torch.rand(1, 3, 85, 85, device=device)

        @torch.no_grad()
        def run() -> Any:
            return model.net(small)

    else:
        from zoo.testing.contract.case import attach

        model = attach(CameraSR(net="srgan", backbone=VGG19).to(device).train())
        (first, second), _ = model.configure_optimizers()
        model.optimizers = lambda *a, **k: (first, second)  # type: ignore[method-assign]
        model.lr_schedulers = lambda: None  # type: ignore[method-assign]
        model.manual_backward = lambda loss, *a, **k: loss.backward()  # type: ignore[method-assign]

        def toggle(optimizer: Any) -> None:
            for net, owner in ((model.net, first), (model.discriminator, second)):
                net.requires_grad_(optimizer in (owner, None))

        model.toggle_optimizer = toggle  # type: ignore[method-assign]
        model.untoggle_optimizer = lambda optimizer: toggle(None)  # type: ignore[method-assign]
        low = F.interpolate(torch.rand(4, 3, 24, 24), scale_factor=3.0, mode="bicubic").clamp(0, 1).to(device)
        batch = {"low": low, "high": torch.rand(4, 3, 72, 72, device=device)}

        def run() -> Any:
            return model.training_step(batch, 0)

    if device != "cpu":
        from benchmarks.measure import in_turns

        return {k.removeprefix("net_"): v for k, v in in_turns({"net": run}, device, rounds).items()}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for turn in range(rounds + 1):
        start = time.process_time()
        run()
        if turn:
            times.append(1e3 * (time.process_time() - start))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"ms": float(np.median(times)), "mib": grown / 2**10}


if __name__ == "__main__":
    hold_memory()
    print(json.dumps(alone(sys.argv[1], sys.argv[2])))
