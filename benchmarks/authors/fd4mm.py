"""FD4MM beside its authors' network: equal outputs, loss, gradients and step; speed; the recorded tensors."""

import contextlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.authors.regformer import _rearrange, plain_attention, plain_conv
from benchmarks.measure import error, float64, in_turns, without
from zoo.nn.vgg import VGG
from zoo.vision.video import fd4mm
from zoo.vision.video.fd4mm import FD4MM, rename

RELU3_1 = (2, 2, 1), (64, 128, 256)  # VGG19 up to there
PAPER = {"widths": [24, 48, 96], "heads": [4, 4, 8]}
TINY = {"widths": [4, 8, 16], "heads": [2, 2, 8]}  # their manipulator has eight heads whatever the rest has


@contextlib.contextmanager
def stubs(vgg: nn.Module) -> Iterator[None]:
    """What their files import and never use or that needs a GPU or a download, for as long as they are loaded."""
    einops = types.ModuleType("einops")
    einops.rearrange = _rearrange  # type: ignore[attr-defined]
    turtle, imp = types.ModuleType("turtle"), types.ModuleType("imp")
    turtle.forward = None  # type: ignore[attr-defined]
    import torchvision

    network = types.SimpleNamespace(features=vgg)
    with (
        mock.patch.dict(sys.modules, {"einops": einops, "turtle": turtle, "imp": imp}),
        mock.patch.object(torchvision.models, "vgg19", lambda **_: network),
        mock.patch.object(nn.Module, "cuda", lambda self, device=None: self),
        mock.patch.object(torch.cuda, "is_available", lambda: False),
    ):
        yield


def _load(path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"authors_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pair(checkout: Path, config: dict, vgg: VGG) -> tuple[FD4MM, nn.Module, Callable[..., Tensor]]:
    """Ours and theirs with the same weights, through `convert_state_dict`, and their loss with our VGG."""
    torch.manual_seed(0)
    with stubs(vgg.features):
        parts = _load(Path(checkout) / "magnet_FD4MM.py")
        losses = _load(Path(checkout) / "utils/utils.py")
        theirs = parts.MagNet()
        if config != PAPER:  # their class has the paper's sizes written into it; its parts take others
            sizes = {"dim": config["widths"], "num_heads": config["heads"]}
            theirs.freq_pyramid = parts.Freq_Pyramid(inp_channels=3, **sizes)
            theirs.manipulator = parts.Manipulator(dim=config["widths"])
            theirs.pyramid_recons = parts.Pyramid_recons(out_channels=3, **sizes)
        pixel, edge, contrast = losses.CharbonnierLoss(), losses.EdgeLoss(), losses.ContrastLoss_Ori()

    def loss(magnified: Tensor, amplified: Tensor, frame_b: Tensor) -> Tensor:
        terms = pixel(magnified, amplified), edge(magnified, amplified)
        return terms[0] + terms[1] + 0.5 * contrast(magnified, amplified, frame_b)

    with torch.no_grad():  # their norms start at one and zero, temperatures at one: as after training, they should not
        for name, p in theirs.named_parameters():
            if "norm" in name or name.endswith("temperature"):
                p.add_(0.2 * torch.randn_like(p))
    hyper, state = FD4MM.convert_state_dict(theirs.state_dict())
    ours = FD4MM(**hyper, backbone={"blocks": [2, 1], "widths": [4, 8]})
    ours.backbone = vgg
    ours.net.load_state_dict({key.removeprefix("net."): value for key, value in state.items()})
    return ours, theirs, loss


def example(size: tuple[int, int], batch: int = 2) -> dict[str, Tensor]:
    """A batch of random pictures in [0, 1] and factors."""
    frames = torch.rand(3, batch, 3, *size)
    factor = torch.linspace(3, 20, batch)
    return {"frame_a": frames[0], "frame_b": frames[1], "amplified": frames[2], "factor": factor}


def forward(theirs: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Their output for our batch, in [-1, 1]."""
    a, b = (2 * batch[key] - 1 for key in ("frame_a", "frame_b"))
    return theirs(a, b, batch["factor"].view(-1, 1, 1, 1), mode="train")


def compare(checkout: Path) -> dict[str, float]:
    """Largest relative errors at the paper's size: forward, loss and a clip in single precision; forward, loss,
    gradients (worst tensor) and weights after one step in double, where rounding does not hide a difference."""
    figures = {}
    for kind in ("", "_float64"):
        with float64(bool(kind)):
            torch.manual_seed(1)
            ours, theirs, their_loss = pair(checkout, PAPER, VGG(*RELU3_1, normalise=False))
            batch = example((48, 72))
            magnified, expected = ours(batch["frame_a"], batch["frame_b"], batch["factor"]), forward(theirs, batch)
            figures[f"forward{kind}"] = error(2 * magnified - 1, expected)
            loss = ours.loss(batch)["loss"]
            other = their_loss(expected, 2 * batch["amplified"] - 1, 2 * batch["frame_b"] - 1)
            figures[f"loss{kind}"] = error(loss, other)
            if kind:
                figures |= _step(ours, theirs, loss, other)
            else:
                figures["clip_static"] = _clip(ours, theirs)
    return figures


def _step(ours: FD4MM, theirs: nn.Module, loss: Tensor, other: Tensor) -> dict[str, float]:
    """Gradients, and weights after Adam's first step, which is the gradients' signs: seldom one at zero differs."""
    optimizer = ours.configure_optimizers()
    their_optimizer = torch.optim.Adam(theirs.parameters(), lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0)
    loss.backward()
    other.backward()
    gradients = rename({n: p.grad for n, p in theirs.named_parameters()})  # type: ignore[misc]
    named = {n: p for n, p in ours.named_parameters() if n.startswith("net.")}
    assert named.keys() == gradients.keys()
    worst = max(error(p.grad, gradients[n]) for n, p in named.items())  # type: ignore[arg-type]
    optimizer.step()
    their_optimizer.step()
    after = rename(dict(theirs.named_parameters()))
    return {"gradients_float64": worst, "step_float64": max(error(p, after[n]) for n, p in named.items())}


def _clip(ours: FD4MM, theirs: nn.Module) -> float:
    """A clip as their test script makes it: its first frame is every frame's reference."""
    clip = torch.rand(1, 3, 48, 72) + 0.02 * torch.rand(4, 3, 48, 72)
    clip = (clip - clip.min()) / (clip.max() - clip.min())
    made = torch.stack(list(ours.magnify(clip, factor=2)))[1:]
    fixed = {"frame_a": clip[:1], "factor": torch.tensor([2.0])}
    with torch.no_grad():
        static = torch.cat([forward(theirs, {**fixed, "frame_b": x[None]}) for x in clip[1:]])
    inside = static.abs() <= 1
    assert inside.float().mean() > 0.1
    return error(made[inside], ((static + 1) / 2)[inside])


def golden(checkout: Path) -> dict[str, Tensor]:
    """Input, the authors' weights (``authors.*``), a small VGG (``vgg.*``), output, loss, small gradients.

    The weights are rounded to float16 before they are used, so that half the bytes hold them exactly; the authors'
    code then runs in double precision.
    """
    with float64():
        torch.manual_seed(1)
        vgg = VGG((2, 2, 1), (4, 8, 8), normalise=False)
        _, theirs, their_loss = pair(checkout, TINY, vgg)
        with torch.no_grad():
            for p in (*theirs.parameters(), *vgg.parameters()):
                p.copy_(p.half())
        batch = {key: value.half().double() for key, value in example((24, 32)).items()}
        magnified = forward(theirs, batch)
        loss = their_loss(magnified, 2 * batch["amplified"] - 1, 2 * batch["frame_b"] - 1)
        loss.backward()
    small = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None and p.numel() <= 32}
    return {
        **{key: value.half() for key, value in batch.items()},
        "magnified": magnified.detach().float(),
        "loss": loss.detach(),
        **{f"gradient.{n}": g.float() for n, g in small.items()},
        **{f"authors.{n}": p.detach().half() for n, p in theirs.state_dict().items()},
        **{f"vgg.{n}": p.detach().half() for n, p in vgg.features.state_dict().items()},
    }


def _attention(self: fd4mm.SparseAttention, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return plain_attention(self, x, *(t.flatten(1, 2) for t in (q, k, v)), act=F.relu)


def _far(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return fd4mm.depthwise(x, weight, bias, dilation=2)


def _split(self: fd4mm.Split, x: Tensor) -> tuple[Tensor, Tensor]:
    """Both halves from one product and one convolution."""
    u1, u2 = fd4mm.depthwise(self.expand(x), self.conv.weight, self.conv.bias).chunk(2, -1)
    lo = fd4mm.far(u1, self.far.weight, self.far.bias)
    return F.gelu(fd4mm.depthwise(u2, self.near.weight, self.near.bias) - lo), F.gelu(lo)


def _low(self: fd4mm.FD4MMNet, picture: Tensor) -> Tensor:
    """The reference through the whole pyramid, whose detail nobody looks at."""
    return self.encode(picture).low


def _depthwise(x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1) -> Tensor:
    """On pictures that lie channel by channel, as the authors' do."""
    return plain_conv(x, weight, len(weight), bias, dilation)


CHANGES = {
    "channels_last": (fd4mm, "depthwise", _depthwise),
    "folded_attention": (fd4mm.SparseAttention, "forward", _attention),
    "split_by_halves": (fd4mm.Split, "forward", _split),
    "lean_reference": (fd4mm.FD4MMNet, "low", _low),
}
"""What makes ours fast, each with the plain form that it replaced."""
IN_TRAINING = {"sorted_dilation": (fd4mm, "far", _far), "recomputing": (fd4mm, "checkpoint", lambda f, x, **_: f(x))}
"""What does so in a training step alone."""


def speed(checkout: Path | None, device: str = "cpu", size: int = 256, rounds: int = 3) -> dict[str, dict[str, float]]:
    """Median ms and peak MiB at size x size and the paper's widths, VGG19's sizes in the loss.

    ``forward``: one pair. ``clip_frame``: a further frame of a clip with its first frame as reference (theirs encodes
    the reference each time). ``train_step``: forward, loss, backward and Adam on one pair. ``vgg``: of that step, the
    part that is VGG19's in the loss. Beside them ours with each of `CHANGES` taken back, and `IN_TRAINING` for a step.
    """
    torch.manual_seed(0)
    vgg = VGG(*RELU3_1, normalise=False)
    if checkout is None:
        ours, theirs, their_loss = FD4MM(backbone={"blocks": [2, 1], "widths": [4, 8]}), None, None
        ours.backbone = vgg
    else:
        ours, theirs, their_loss = pair(checkout, PAPER, vgg)
    ours.to(device)
    batch = {key: value.to(device) for key, value in example((size, size), batch=1).items()}
    target, given = 2 * batch["amplified"] - 1, 2 * batch["frame_b"] - 1
    optimizer = ours.configure_optimizers()
    low = ours.net.low(2 * batch["frame_a"] - 1).detach()

    @torch.no_grad()
    def infer() -> None:
        ours(batch["frame_a"], batch["frame_b"], batch["factor"])

    @torch.no_grad()
    def frame() -> None:
        code = ours.net.encode(2 * batch["frame_b"] - 1)
        ours.net.render(code, code.low - low, batch["factor"])

    def step() -> None:
        optimizer.zero_grad()
        ours.loss(batch)["loss"].backward()
        optimizer.step()

    def features() -> None:
        with torch.no_grad():
            wanted, unwanted = ours.perceive(target), ours.perceive(given)
        found = ours.perceive(given.clone().requires_grad_())
        ((found - wanted).abs().mean() / (found - unwanted).abs().mean().clamp_min(1)).backward()

    calls: dict[str, dict[str, Callable[[], None]]] = {
        "forward": {"ours": infer, **without(infer, CHANGES)},
        "clip_frame": {"ours": frame},
        "train_step": {"ours": step, **without(step, CHANGES | IN_TRAINING)},
    }
    if theirs is not None and their_loss is not None:
        theirs.to(device)
        adam = torch.optim.Adam(theirs.parameters(), lr=1e-4)

        @torch.no_grad()
        def their_infer() -> None:
            forward(theirs, batch)

        def their_step() -> None:
            loss = their_loss(forward(theirs, batch), target, given)
            adam.zero_grad()
            loss.backward()
            adam.step()

        calls["forward"]["authors"] = calls["clip_frame"]["authors"] = their_infer
        calls["train_step"]["authors"] = their_step
    figures = {name: in_turns(runs, device, rounds) for name, runs in calls.items()}
    figures["vgg"] = in_turns({"ours": features}, device, rounds)
    return figures
