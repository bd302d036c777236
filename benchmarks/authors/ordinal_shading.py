"""OrdinalShading beside its authors' code: networks, pipeline, losses and metrics with random weights; speed.

Their code is for academic use and is only run here: no file of theirs, and nothing derived from their trained weights,
is kept. Beside the checkout of compphoto/Intrinsic, called DIR, the script expects clones of CCareaga/MiDaS as
DIR_midas and of CCareaga/chrislib as DIR_chrislib, and what they import:

    pip install --no-deps --target DIR_deps kornia kornia_rs opencv-python-headless geffnet antialiased-cnns
"""

import contextlib
import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.measure import error, float64, in_turns
from zoo.nn import intrinsic_metrics
from zoo.vision.restoration import ordinal_shading as ours
from zoo.vision.restoration.ordinal_shading import OrdinalShading
from zoo.vision.restoration.photos import embedded_photos
from zoo.vision.restoration.working_size import optimal_size, resize, rounded_size

ABSENT = ("bs4", "matplotlib", "matplotlib.pyplot", "requests", "cv2", "kornia", "antialiased_cnns")
"""Imported by their files, but not by what is run here; those that are missing get an empty stand-in."""


def _hub(repository: str, name: str, pretrained: bool = False, **options: Any) -> nn.Module:
    """What they fetch through torch.hub, from installed packages: the same networks, with random weights."""
    if "efficientnet" in repository:
        geffnet = importlib.import_module("geffnet")
        return geffnet.create_model(name, pretrained=False, exportable=options.get("exportable", False))
    from torchvision.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, [3, 4, 23, 3], groups=32, width_per_group=8)


@functools.cache
def authors(checkout: Path) -> types.SimpleNamespace:
    """Their modules."""
    beside = [checkout.with_name(f"{checkout.name}_{part}") for part in ("chrislib", "midas", "deps")]
    sys.path[:0] = [str(checkout), *map(str, beside[:2])]
    sys.path.append(str(beside[2]))
    for name in ABSENT:
        if importlib.util.find_spec(name.partition(".")[0]) is None:
            sys.modules.setdefault(name, mock.MagicMock())
    names = {
        "midas": "altered_midas.midas_net",
        "small": "altered_midas.midas_net_custom",
        "pipeline": "intrinsic.pipeline",
        "ordinal": "intrinsic.ordinal_util",
        "loss": "chrislib.loss",
        "general": "chrislib.general",
        "metrics": "chrislib.metrics",
        "resolution": "chrislib.resolution_util",
    }
    return types.SimpleNamespace(**{key: importlib.import_module(name) for key, name in names.items()})


def networks(checkout: Path) -> tuple[OrdinalShading, dict[str, nn.Module]]:
    """Ours and theirs at the paper's size with the same random weights, through `convert_state_dict`; eval mode.

    A fresh sigmoid output hardly varies: the last layers are scaled and moved, so that the maps are centred on 0.5 and
    have contrast, and shading is neither near 0 nor infinite.
    """
    code = authors(checkout)
    torch.manual_seed(0)
    with mock.patch.object(torch.hub, "load", _hub):
        theirs: dict[str, nn.Module] = {
            "ord_model": code.midas.MidasNet(),
            "iid_model": code.small.MidasNet_small(exportable=False, input_channels=5, output_channels=1),
        }
    with torch.no_grad():
        for net in theirs.values():
            for module in net.modules():
                if isinstance(module, nn.BatchNorm2d):  # as after training: nothing at its first value
                    module.running_mean.uniform_(-0.1, 0.1)
                    module.running_var.uniform_(0.8, 1.2)
                    module.weight.uniform_(0.8, 1.2)
                    module.bias.uniform_(-0.1, 0.1)
    x = torch.rand(1, 5, 64, 64)
    for name, net in theirs.items():
        net.eval()
        last = net.scratch.output_conv[4]  # type: ignore[union-attr,index]
        with torch.no_grad():
            logits = torch.logit(net(x[:, : 3 if name == "ord_model" else 5]).double().clamp(1e-12, 1 - 1e-7))
            gain = float(0.4 / logits.std().clamp_min(1e-3))
            last.weight.mul_(gain)
            last.bias.sub_(logits.mean().float()).mul_(gain)
    hyper, state = OrdinalShading.convert_state_dict(
        {"ord_state_dict": theirs["ord_model"].state_dict(), "iid_state_dict": theirs["iid_model"].state_dict()}
    )
    model = OrdinalShading(**hyper)
    model.load_state_dict(state)
    return model.eval(), theirs


@contextlib.contextmanager
def all_pixels() -> Any:
    """Their equalisation draws a random half of the pixels; here it takes all, as ours does."""
    with mock.patch.object(np.random, "randn", lambda *shape: np.ones(shape)):
        yield


def picture(longer: int) -> np.ndarray:
    """A bundled photograph (h, w, 3) in [0, 1], float32, its longer side resized."""
    photo = embedded_photos("test")[0]
    h, w = photo.shape[-2:]
    small = resize(photo, (round(h * longer / max(h, w)), round(w * longer / max(h, w))))
    return small.clamp(0, 1).permute(1, 2, 0).numpy().astype(np.float32)


def compare(checkout: Path) -> dict[str, float]:
    """Largest relative errors, by piece."""
    figures: dict[str, float] = {}
    figures |= compare_networks(checkout)
    figures |= compare_pieces(checkout)
    figures |= compare_losses(checkout)
    figures |= compare_metrics(checkout)
    return figures


def compare_networks(checkout: Path) -> dict[str, float]:
    """Both networks forward and backward, and the whole pipeline at two working sizes."""
    code = authors(checkout)
    model, theirs = networks(checkout)
    torch.manual_seed(1)
    figures = {}
    pairs = {"ordinal": (model.ordinal, theirs["ord_model"], 3), "merge": (model.merge, theirs["iid_model"], 5)}
    for name, (mine, their, channels) in pairs.items():
        x = torch.rand(1, channels, 96, 160)
        with torch.no_grad():
            figures[f"{name}_forward"] = error(mine(x), their(x))
        weights = torch.rand(1, 1, 96, 160)
        with float64():  # 104 million weights: float32 gradients differ by the order of sums alone
            mine.double(), their.double()
            (mine(x.double()) * weights).sum().backward()
            (their(x.double()) * weights).sum().backward()
        expected = ours.rename({k: p.grad for k, p in their.named_parameters() if p.grad is not None}, name)
        found = {k: p.grad for k, p in mine.named_parameters()}
        assert found.keys() == expected.keys()
        figures[f"{name}_gradients_float64"] = max(error(found[k], expected[k]) for k in found)
        for net in (mine, their):
            net.float().zero_grad()
    for conf, size, label in ((0.0, 160, "optimal"), (None, 160, "own")):
        photo = picture(size)
        with all_pixels():
            wanted = code.pipeline.run_gray_pipeline(theirs, photo, resize_conf=conf, device="cpu")
        with torch.no_grad():
            image = torch.from_numpy(photo).permute(2, 0, 1)[None] ** 2.2
            got = model.at_working_size(image, "own" if conf is None else "optimal")
        keys = {"ord_base": "ord_base", "ord_full": "ord_full", "albedo": "gry_alb", "image": "lin_img"}
        for mine_key, their_key in keys.items():
            value = torch.from_numpy(wanted[their_key]).permute(2, 0, 1)[None]
            figures[f"pipeline_{label}_{mine_key}"] = error(got[mine_key], value)
        inverse = torch.from_numpy(wanted["gry_shd"])[None, None]
        figures[f"pipeline_{label}_inverse_shading"] = error(ours.invert(got["shading"]), inverse)
    return figures


def compare_pieces(checkout: Path) -> dict[str, float]:
    """The pieces of the pipeline on their own."""
    code = authors(checkout)
    generator = np.random.default_rng(0)
    figures = {}
    shading = generator.random((40, 56, 1)) * 5 + 1e-3
    figures["invert"] = error(ours.invert(torch.from_numpy(shading)), torch.from_numpy(code.general.invert(shading)))
    inverse = generator.random((40, 56, 1)) * 1.2
    figures["uninvert"] = error(
        ours.uninvert(torch.from_numpy(inverse)), torch.from_numpy(code.general.uninvert(inverse))
    )
    image = generator.random((40, 56, 3))
    wanted = torch.from_numpy(code.general.get_brightness(image))
    figures["luminance"] = error(ours.luminance(torch.from_numpy(image).permute(2, 0, 1))[0], wanted[..., 0])
    base, full = generator.random((2, 40, 56, 1))
    with all_pixels():
        _, equal = code.ordinal.equalize_predictions(image, base, full, p=0.0)
    tensors = [torch.from_numpy(a).permute(2, 0, 1)[None] for a in (image, base, full)]
    figures["equalise"] = error(ours.equalise(*tensors), torch.from_numpy(equal).permute(2, 0, 1)[None])
    resized = code.ordinal.base_resize(image, 32)
    mine = resize(tensors[0][0], rounded_size(40, 56, 32)).permute(1, 2, 0)
    figures["resize"] = error(mine, torch.from_numpy(resized))
    worst = 0.0
    for photo in (*embedded_photos("train"), *embedded_photos("test")):
        for longer in (256, 600):
            small = resize(photo.double(), rounded_size(*photo.shape[-2:], longer)).clamp(0, 1)
            for confidence in (0.0, 0.01, 0.2):
                wanted_size = code.resolution.calculateprocessingres(
                    small.permute(1, 2, 0).numpy(), 384, confidence=confidence
                )[0]
                worst = max(worst, abs(optimal_size(small, confidence=confidence) - wanted_size) / wanted_size)
    figures["optimal_size"] = worst
    return figures


def compare_losses(checkout: Path) -> dict[str, float]:
    """Losses and their gradients, with a mask that differs between pictures; one scale is negative."""
    code = authors(checkout)
    figures = {}
    for label, dtype in (("", torch.float32), ("_float64", torch.float64)):
        torch.manual_seed(2)
        target = torch.rand(3, 1, 64, 80, dtype=dtype)
        o = (0.4 * target + 0.2 + 0.1 * torch.rand_like(target)).clamp(0, 1)
        o[2] = 1 - o[2]  # its scale is cut
        mask = (torch.rand(3, 1, 64, 80) > torch.tensor([0.02, 0.3, 0.1]).view(3, 1, 1, 1)).to(dtype)
        mine, theirs = o.clone().requires_grad_(), o.clone().requires_grad_()
        aligned = code.loss.compute_ssi_pred(theirs[:, 0], target[:, 0], mask[:, 0])[:, None]
        gradients = code.loss.MSGLoss()
        gradients.imgDerivative.kernels = [k.to(dtype) for k in gradients.imgDerivative.kernels]
        gradients.erod_kernels = [k.to(dtype) for k in gradients.erod_kernels]
        wanted = code.loss.lp_loss(aligned, target, mask) + gradients(aligned, target, mask)
        got = ours.ordinal_loss(mine, target, mask, authors_shift=True)
        scale, shift = ours.scale_and_shift(mine, target, mask, authors_shift=True)
        figures[f"ssi_aligned{label}"] = error(scale * mine + shift, aligned)
        figures[f"ordinal_loss{label}"] = error(got, wanted)
        got.backward(), wanted.backward()
        figures[f"ordinal_loss_gradient{label}"] = error(mine.grad, theirs.grad)

        colour, true = torch.rand(2, 3, 3, 64, 80, dtype=dtype)
        figures[f"gradient_loss{label}"] = error(ours.gradient_loss(colour, true, mask), gradients(colour, true, mask))
        figures[f"masked_mse{label}"] = error(
            ours.masked_mse(colour, true, mask), code.loss.lp_loss(colour, true, mask)
        )
    return figures


def compare_metrics(checkout: Path) -> dict[str, float]:
    """WHDR, LMSE, and the scale that the scale-invariant error starts from."""
    code = authors(checkout)
    generator = np.random.default_rng(3)
    correct, estimate = generator.random((2, 64, 75, 3))
    mask = (generator.random((64, 75)) > 0.2).astype(float)
    tensors = [torch.from_numpy(a).permute(2, 0, 1)[None] for a in (estimate, correct)]
    kept = torch.from_numpy(mask)[None, None]
    figures = {}
    for name, channels in (("colour", slice(0, 3)), ("grey", slice(0, 1))):
        a, b = (t[..., channels] if name == "colour" else t[..., 0] for t in (correct, estimate))
        wanted = code.metrics.lmse(a, b, mask, 20, 10)
        got = intrinsic_metrics.lmse(tensors[0][:, channels], tensors[1][:, channels], kept)
        figures[f"lmse_{name}"] = error(got, torch.tensor(wanted, dtype=torch.float64))
    scaled = code.general.match_scale(estimate, correct)
    matched = intrinsic_metrics.match_scale(*tensors)[0].permute(1, 2, 0)
    figures["match_scale"] = error(matched, torch.from_numpy(scaled))

    points = [{"id": i, "x": x, "y": y, "opaque": bool(i % 7)} for i, (x, y) in enumerate(generator.random((40, 2)))]
    pairs = generator.integers(0, 40, (200, 2))
    judged = [
        {
            "point1": int(a), "point2": int(b), "darker": ("1", "2", "E")[i % 3],
            "darker_score": float(generator.random() - 0.1),
        }
        for i, (a, b) in enumerate(pairs)
    ]  # fmt: skip
    judgements = {"intrinsic_points": points, "intrinsic_comparisons": judged}
    from zoo.vision.restoration.data_intrinsic import comparisons

    for delta in (0.1, 0.3):
        wanted = code.metrics.compute_whdr(correct, judgements, delta)
        got = intrinsic_metrics.whdr(torch.from_numpy(correct).permute(2, 0, 1), comparisons(judgements), delta)
        figures[f"whdr_{delta}"] = error(got, torch.tensor(wanted, dtype=torch.float64))
    return figures


def golden(checkout: Path) -> dict[str, Tensor]:
    """What their functions make of random tensors, and their two fusion blocks with random weights. No trained weight
    of theirs is involved."""
    code = authors(checkout)
    blocks = importlib.import_module("altered_midas.blocks")
    torch.manual_seed(0)
    kept: dict[str, Tensor] = {}
    for name, block in (
        ("plain", blocks.FeatureFusionBlock(6)),
        ("custom", blocks.FeatureFusionBlock_custom(6, nn.ReLU(False), expand=True)),
    ):
        above, skip = torch.randn(2, 1, 6, 5, 7)
        kept |= {f"{name}.above": above.clone(), f"{name}.skip": skip.clone()}
        kept |= {f"{name}.weights.{key}": value for key, value in block.state_dict().items()}
        with torch.no_grad():
            kept[f"{name}.out"] = block(above, skip)  # works in place on what it is given

    generator = np.random.default_rng(0)
    image, base, full = (generator.random((16, 20, c)).astype(np.float32) for c in (3, 1, 1))
    with all_pixels():
        _, equal = code.ordinal.equalize_predictions(image, base, full, p=0.0)
    resized = code.ordinal.base_resize(image, 32)
    arrays = {"image": image, "base": base, "full": full, "equal": equal, "resized": resized}
    kept |= {f"pipeline.{key}": torch.from_numpy(value).permute(2, 0, 1)[None].float() for key, value in arrays.items()}
    target, o = torch.rand(2, 3, 1, 32, 40)
    o = 0.4 * target + 0.3 * o
    o[2] = 1 - o[2]
    mask = (torch.rand(3, 1, 32, 40) > 0.1).float()
    kept |= {"loss.o": o, "loss.target": target, "loss.mask": mask}
    o, target, mask = o.double().requires_grad_(), target.double(), mask.double()  # their sums lose digits in float32
    gradients = code.loss.MSGLoss()
    gradients.imgDerivative.kernels = [k.double() for k in gradients.imgDerivative.kernels]
    gradients.erod_kernels = [k.double() for k in gradients.erod_kernels]
    aligned = code.loss.compute_ssi_pred(o[:, 0], target[:, 0], mask[:, 0])[:, None]
    loss = code.loss.lp_loss(aligned, target, mask) + gradients(aligned, target, mask)
    loss.backward()
    assert o.grad is not None
    kept |= {"loss.aligned": aligned.detach().float(), "loss.value": loss.detach(), "loss.gradient": o.grad.float()}

    correct, estimate = generator.random((2, 40, 44, 3)).astype(np.float32)
    kept_pixels = (generator.random((40, 44)) > 0.2).astype(np.float32)
    value = code.metrics.lmse(correct.astype(float), estimate.astype(float), kept_pixels.astype(float), 20, 10)
    kept |= {
        "metric.correct": torch.from_numpy(correct).permute(2, 0, 1)[None].contiguous(),
        "metric.estimate": torch.from_numpy(estimate).permute(2, 0, 1)[None].contiguous(),
        "metric.kept": torch.from_numpy(kept_pixels)[None, None],
        "metric.lmse": torch.tensor(value),
    }
    return {key: tensor.contiguous() for key, tensor in kept.items()}


def speed(checkout: Path | None, device: str = "cpu", rounds: int = 2) -> dict[str, dict[str, float]]:
    """The pipeline on pictures of 256 and 384 pixels at their own size (with the base pass at 384), and a training step
    of the ordinal and of the merge network on a crop of 256. Median ms and MiB."""
    nets: dict[str, nn.Module] = {}
    if checkout is None:
        model, theirs = OrdinalShading().eval(), {}
    else:
        model, theirs = networks(checkout)
    figures: dict[str, dict[str, float]] = {}
    model.to(device)
    for net in theirs.values():
        net.to(device)

    for size in (256, 384):
        photo = np.ascontiguousarray(picture(2 * size)[:size, :size])
        image = torch.from_numpy(photo).permute(2, 0, 1)[None].to(device) ** 2.2
        runs: dict[str, Callable[[], Any]] = {"ours": functools.partial(model.predict, image, "own")}
        if checkout is not None:
            options = {"resize_conf": None, "maintain_size": True, "device": device}
            runs["authors"] = functools.partial(authors(checkout).pipeline.run_gray_pipeline, theirs, photo, **options)
        figures[f"pipeline_{size}"] = in_turns(runs, device, rounds)

    torch.manual_seed(0)
    image = torch.rand(1, 3, 256, 256, device=device)
    with torch.no_grad():
        seen = model.ordinal(image)
    # A truth that goes along with the output: a scale cut at 0 leaves gradients of rounding alone, whose squares in
    # Adam are denormal numbers, which processors are slow with.
    shading = ours.uninvert(0.5 * seen + 0.2 + 0.2 * torch.rand_like(seen))
    batch = {"image": image, "shading": shading, "albedo": image / shading, "mask": torch.ones_like(shading)}
    for label in ("ordinal", "merge"):
        mine = getattr(model, label)
        nets = {"ours": mine}
        if theirs:
            nets["authors"] = theirs["ord_model" if label == "ordinal" else "iid_model"]
        steps = {who: _step(net, label, batch, None if who == "ours" else checkout) for who, net in nets.items()}
        figures[f"train_step_{label}"] = in_turns(steps, device, rounds)
    return figures


def _step(net: nn.Module, label: str, batch: dict[str, Tensor], checkout: Path | None) -> Callable[[], None]:
    """A step on one crop: the network, its loss (ours, or one put together from their pieces), Adam."""
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-5)
    image, shading, albedo, mask = (batch[key] for key in ("image", "shading", "albedo", "mask"))
    target, x = ours.invert(shading), image
    if label == "merge":
        x = torch.cat((image, target, target), 1)
    if checkout is not None:
        code = authors(checkout)
        gradients = code.loss.MSGLoss(device=image.device)

    def loss(out: Tensor) -> Tensor:
        if checkout is None:
            if label == "ordinal":
                return ours.ordinal_loss(out, target, mask)
            return ours.merge_loss(out, image, target, albedo, mask)
        if label == "ordinal":
            out = code.loss.compute_ssi_pred(out[:, 0], target[:, 0], mask[:, 0])[:, None]
            return code.loss.lp_loss(out, target, mask) + gradients(out, target, mask)
        implied = image / (1 / out.clip(1e-3, 1) - 1).clip(1e-3)
        pairs = ((out, target), (implied, albedo))
        return sum(code.loss.lp_loss(a, b, mask) + gradients(a, b, mask) for a, b in pairs)  # type: ignore[return-value]

    def run() -> None:
        net.train()
        optimizer.zero_grad()
        loss(net(x)).backward()
        optimizer.step()
        net.eval()

    return run


if __name__ == "__main__":
    for name, value in compare(Path(sys.argv[1])).items():
        print(f"{name:40s} {value:.2e}")
