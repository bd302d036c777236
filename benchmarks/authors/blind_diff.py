"""BlindDiff beside its authors' code: network, losses, gradients, steps, degradations; speed; the recorded tensors."""

import importlib
import importlib.util
import io
import json
import os
import resource
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.authors import regformer
from benchmarks.authors.regformer import _rearrange
from benchmarks.measure import error, in_turns, peak, without
from zoo.vision.restoration import blind_diff
from zoo.vision.restoration.blind_diff import BlindDiff, _fixed, rename
from zoo.vision.restoration.degradations import blur, degrade, gaussian_kernels, resize_bicubic

# their options/*.yml; dim 8 keeps the heads' sizes even
PAPER = {"dim": 48, "num_blocks": [2, 3, 6, 8], "num_refinement_blocks": 2, "heads": [1, 2, 4, 8], "scale": 4}
TINY = {**PAPER, "dim": 8, "num_blocks": [1, 2, 1, 1], "num_refinement_blocks": 1}


def authors(checkout: Path) -> types.SimpleNamespace:
    """The authors' network, diffusion, imresize and degradation, without what their packages import beside.

    OpenCV, einops and lpips are only needed around what runs here; a stub stands in. Their diffusion calls ``.cuda()``
    on a loss that it never uses.
    """
    root = Path(checkout) / "basicsr"

    def stub(name: str, **content: Any) -> types.ModuleType:
        module = types.ModuleType(name)
        vars(module).update(content)
        return sys.modules.setdefault(name, module)

    for name in ("cv2", "einops"):
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            stub(name, rearrange=_rearrange)
    stub("basicsr", __path__=[str(root)])
    registry = types.SimpleNamespace(register=lambda: lambda cls: cls)
    utils = stub("basicsr.utils", __path__=[str(root / "utils")])
    stub("basicsr.utils.registry", ARCH_REGISTRY=registry)
    deg_util = importlib.import_module("basicsr.utils.deg_util")
    for name in ("get_root_logger", "imwrite", "tensor2img"):
        setattr(utils, name, None)
    utils.SRMDPreprocessing, utils.stable_batch_kernel = deg_util.SRMDPreprocessing, deg_util.stable_batch_kernel
    spec = importlib.util.spec_from_file_location("authors_blinddiff", root / "archs/blinddiff_arch.py")
    assert spec is not None and spec.loader is not None
    arch = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(arch)
    diffusion = importlib.import_module("basicsr.diffusion")
    matlab = importlib.import_module("basicsr.utils.matlab_functions")

    def create(steps: int) -> Any:
        move, nn.Module.cuda = nn.Module.cuda, lambda self, *a: self  # type: ignore[method-assign,assignment]
        try:
            with redirect_stdout(io.StringIO()):  # it prints a setting
                return diffusion.create_diffusion(str(steps))
        finally:
            nn.Module.cuda = move  # type: ignore[method-assign]

    return types.SimpleNamespace(
        net=arch.BlindDiff, diffusion=create, deg_util=deg_util, imresize=matlab.imresize, gaussian=diffusion.gd
    )


def pair(checkout: Path, config: dict[str, Any]) -> tuple[BlindDiff, nn.Module, types.SimpleNamespace]:
    """Ours and theirs with the same weights, through `convert_state_dict`, and their other code."""
    torch.manual_seed(0)
    code = authors(checkout)
    theirs = code.net(**config)
    with torch.no_grad():  # their norms start at one and zero, temperatures at one: as after training, they should not
        for name, p in theirs.named_parameters():
            if name.endswith(("body.weight", "body.bias", "temperature")):
                p.add_(0.2 * torch.randn_like(p))
            if name.startswith("predictor.13"):
                p.mul_(10)  # a kernel that is not flat
    hyper, state = BlindDiff.convert_state_dict({"params": None, "params_ema": theirs.state_dict()})
    ours = BlindDiff(**hyper)
    ours.load_state_dict(state)
    return ours, theirs, code


def their_losses(code: Any, net: nn.Module, high: Tensor, low: Tensor, kernel: Tensor, t: Tensor, noise: Tensor) -> Any:
    """Their ``training_losses``, given the picture alone of what their network returns (it takes the pair for one
    tensor and fails), and the kernel term as their file has it in a comment."""
    estimate: list[Tensor] = []

    def picture_only(*args: Any, **kwargs: Any) -> Tensor:
        out, k = net(*args, **kwargs)
        estimate.append(k)
        return out

    terms = code.diffusion(500).training_losses(picture_only, high, t, {"cond": low}, noise)
    terms["kernel"] = code.gaussian.mean_flat((kernel.flatten(1) - estimate[0]) ** 2)
    return terms


@contextmanager
def injected(code: Any, noise: Callable[[], Tensor]) -> Iterator[None]:
    """Their sampler draws what we give it."""
    real = code.gaussian.th
    fake = types.SimpleNamespace(**{name: getattr(torch, name) for name in ("tensor", "exp", "split", "zeros")})
    fake.from_numpy, fake.randn_like = torch.from_numpy, lambda x: noise()
    code.gaussian.th = fake
    try:
        yield
    finally:
        code.gaussian.th = real


@contextmanager
def recorded() -> Iterator[list[Tensor]]:
    """What ``torch.autograd.grad`` returns meanwhile: the sampler's pull, which is small beside the picture."""
    found: list[Tensor] = []
    real = torch.autograd.grad

    def grad(*args: Any, **kwargs: Any) -> Any:
        found.append(real(*args, **kwargs)[0])
        return (found[-1],)

    torch.autograd.grad = grad
    try:
        yield found
    finally:
        torch.autograd.grad = real


def their_step(code: Any, net: nn.Module, x: Tensor, step: int, low: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """One step of their sampling loop, the gradient included: x_(t-1) and the kernel."""
    diffusion = code.diffusion(500)
    diffusion.num_timesteps = step + 1  # their loop begins at the last
    with injected(code, lambda: noise):
        loop = diffusion.p_sample_loop_progressive(
            net, x.shape, x.clone(), clip_denoised=False, model_kwargs={"cond": low}, device=x.device
        )
        out = next(loop)
    return out["sample"].detach(), out["extra"].detach().view(1, 21, 21)


def compare(checkout: Path) -> dict[str, float]:
    """Largest relative errors of all that is computed, in float32."""
    ours, theirs, code = pair(checkout, TINY)
    generator = torch.Generator().manual_seed(1)
    figures: dict[str, float] = {}

    # degradations
    np.random.seed(0)
    sigmas = np.random.uniform(0.6, 5, (4, 1, 1)), np.random.uniform(0.6, 5, (4, 1, 1))
    angles = np.random.uniform(-np.pi, np.pi, 4)
    np.random.seed(0)
    kernels = code.deg_util.random_batch_kernel(4, 21, 0.6, 5, rate_iso=0)
    values = (torch.from_numpy(v.reshape(4)) for v in (*sigmas, angles))
    figures["anisotropic_kernels"] = error(gaussian_kernels(21, *values).float(), kernels)
    np.random.seed(1)
    sigma = torch.from_numpy(np.random.uniform(0.2, 4, 4))
    np.random.seed(1)
    round_ones = code.deg_util.random_batch_kernel(4, 21, 0.2, 4, rate_iso=1)
    figures["isotropic_kernels"] = error(gaussian_kernels(21, sigma, sigma, 0 * sigma).float(), round_ones)
    picture = torch.rand(4, 3, 64, 80, generator=generator)
    figures["blur"] = error(blur(picture, kernels), code.deg_util.BatchBlur(21)(picture, kernels))
    for name, scale in (("quarter", 1 / 4), ("third", 1 / 3), ("half", 1 / 2), ("seventenths", 0.7), ("fourfold", 4)):
        wanted = torch.stack([code.imresize(p, scale) for p in picture])
        figures[f"imresize_{name}"] = float((resize_bicubic(picture, scale) - wanted).abs().max())
    figures["imresize_guidance"] = error(resize_bicubic(picture, 1 / 4), code.deg_util.b_Bicubic(picture, 4))
    prepare = code.deg_util.SRMDPreprocessing(
        4, ksize=21, sig_min=0.6, sig_max=5, rate_iso=0, random_disturb=True, random_kernel=True
    )
    given = prepare(picture, kernel=True)
    figures["degradation"] = error(degrade(picture, given[2], 4, round8=False), given[0])

    # the network and the losses, of steps that include the last, whose loss is another
    high, noise = torch.rand(4, 3, 40, 56, generator=generator), torch.randn(4, 3, 40, 56, generator=generator)
    low, t = degrade(high, kernels, 4), torch.tensor([0, 3, 250, 499])
    x = ours.schedule.diffuse(high, t, noise)
    (a, ka), (b, kb) = ours(low, x, ours.schedule.times[t]), theirs(x, ours.schedule.times[t], low)
    both = torch.cat((x, x), 1)  # what the network adds to its input, which is the larger
    figures["forward"], figures["forward_kernel"] = error(a - both, b - both), error(ka.flatten(1), kb)
    terms = ours.losses({"high": high, "low": low, "kernel": kernels}, t, noise)
    expected = their_losses(code, theirs, high, low, kernels, t, noise)
    for name in ("mse", "vb", "kernel"):
        figures[f"loss_{name}"] = max(map(error, terms[name], expected[name]))  # each picture's: they differ in size
    weight = ours.hparams.kernel_weight
    figures["loss"] = max(map(error, terms["loss"], expected["loss"] + weight * expected["kernel"]))

    # gradients and a step of their Adam
    terms["loss"].mean().backward()
    (expected["loss"] + weight * expected["kernel"]).mean().backward()
    gradients = rename({n: p.grad for n, p in theirs.named_parameters()})
    figures["gradients"] = max(error(p.grad, gradients[n]) for n, p in ours.named_parameters())
    optimizer = ours.configure_optimizers()["optimizer"]
    optimizer.step()
    torch.optim.Adam(theirs.parameters(), lr=5e-5, weight_decay=0, betas=(0.9, 0.99)).step()
    after = rename(theirs.state_dict())
    figures["step"] = max(error(p, after[n]) for n, p in ours.named_parameters())

    # sampling: a step with its gradient at three places of the chain, a chain, and DDIM without guidance
    ours, theirs, code = pair(checkout, TINY)
    for step in (499, 250, 0):
        where = torch.tensor([step])
        state = ours.schedule.diffuse(high[:1], where, noise[:1])
        with recorded() as pulls:
            wanted, kernel = their_step(code, theirs, state, step, low[:1], noise[1:2])
            found, estimate = ours.step(ours.schedule, state, step, low[:1], noise[1:2] if step else None)
        figures[f"sampler_step_{step}"] = error(found, wanted)
        figures[f"sampler_kernel_{step}"] = error(estimate, kernel)
        figures[f"sampler_gradient_{step}"] = error(*pulls[::-1])
    where = torch.tensor([250])
    state = ours.schedule.diffuse(high[:1], where, noise[:1])
    with torch.no_grad():
        wanted = code.diffusion(500).ddim_sample(theirs, state, where, False, model_kwargs={"cond": low[:1]})["sample"]
    found, _ = ours.step(ours.schedule, state, 250, low[:1], None, guidance=0.0, sampler="ddim")
    figures["ddim_step"] = error(found, wanted)
    return figures


def golden(checkout: Path) -> dict[str, Tensor]:
    """Inputs, the authors' weights (``authors.*``) and what they give: the network, the losses, small gradients
    (``gradient.*``), a step of the sampler.

    The weights are rounded to float16 before they are used, so that half the bytes hold them exactly.
    """
    config = {**TINY, "dim": 4, "num_blocks": [1, 1, 1, 1], "heads": [1, 2, 2, 4]}
    _, theirs, code = pair(checkout, config)
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(p.half())
    generator = torch.Generator().manual_seed(2)
    high, noise = torch.rand(2, 3, 32, 24, generator=generator), torch.randn(2, 3, 32, 24, generator=generator)
    np.random.seed(0)
    kernels = code.deg_util.random_batch_kernel(2, 21, 0.6, 5, rate_iso=0)
    low = code.deg_util.b_Bicubic(code.deg_util.BatchBlur(21)(high, kernels), 4)
    t = torch.tensor([0, 300])
    given = {"high": high, "low": low, "kernels": kernels, "noise": noise, "t": t}
    terms = their_losses(code, theirs, high, low, kernels, t, noise)
    (terms["loss"] + 441 * terms["kernel"]).mean().backward()
    named = {n: p for n, p in theirs.named_parameters() if p.numel() <= 64}
    gradients = {f"gradient.{n}": p.grad for n, p in named.items()}
    x = code.diffusion(500).q_sample(high, t, noise)
    with torch.no_grad():
        out, kernel = theirs(x, torch.tensor(code.diffusion(500).timestep_map)[t], low)
    after, estimate = their_step(code, theirs, x[1:], 300, low[1:], noise[:1])
    wanted = {"x": x, "out": out, "kernel": kernel, "after": after, "after_kernel": estimate}
    wanted |= {f"loss_{name}": terms[name].detach() for name in ("mse", "vb", "kernel")}
    weights = {f"authors.{n}": p.detach().half() for n, p in theirs.state_dict().items()}
    return {**given, **wanted, **gradients, **weights}


# ---- speed ----------------------------------------------------------------------------------------------------------


def _linear(y: Tensor, weight: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """The modulated y is formed."""
    return F.linear(y * (1 + scale[:, None, None]) + shift[:, None, None], weight)


def _depthwise(x: Tensor, weight: Tensor) -> Tensor:
    """On pictures that lie channel by channel, as the authors' do."""
    return regformer.plain_conv(x, weight, groups=len(weight))


def _attention(self: blind_diff.Attention, x: Tensor, y: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    modulated = blind_diff.modulated_linear(y, self.qkv.weight, shift, scale)
    qkv = blind_diff.depthwise(modulated, self.qkv_conv.weight)
    return regformer.plain_attention(self, x, *qkv.flatten(1, 2).chunk(3, -1))


def _gate(self: blind_diff.Gate, x: Tensor, y: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Both halves at once, and everything kept for the gradient."""
    u = blind_diff.modulated_linear(y, self.expand.weight, shift, scale)
    u1, u2 = blind_diff.depthwise(u, self.conv.weight).chunk(2, -1)
    return x + self.project(F.gelu(u1) * u2)


CHANGES = {
    "channels_last": (blind_diff, "depthwise", _depthwise),
    "folded_attention": (blind_diff.Attention, "forward", _attention),
    "folded_modulation": (blind_diff, "modulated_linear", _linear),
    "lean_gate": (blind_diff.Gate, "forward", _gate),
}
"""What makes ours fast, each with the plain form that it replaced."""


def calls(who: str, net: nn.Module, code: Any, device: str, size: int) -> dict[str, Callable[[], Any]]:
    """A network pass, a training step and a sampler step on one picture of size x size."""
    generator = torch.Generator().manual_seed(0)
    high, noise = (draw(1, 3, size, size, generator=generator).to(device) for draw in (torch.rand, torch.randn))
    kernel = gaussian_kernels(21, *torch.full((3, 1), 1.5)).to(device)
    low, t = degrade(high, kernel, 4), torch.tensor([250], device=device)
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-5, betas=(0.9, 0.99))

    def forward() -> None:
        with torch.no_grad():
            net(*((low, noise, 2 * t) if who == "ours" else (noise, 2 * t, low)))

    def train_step() -> None:
        optimizer.zero_grad()
        if who == "ours":
            loss = net.losses({"high": high, "low": low}, t, noise)["loss"]
        else:
            loss = their_losses(code, net, high, low, kernel, t, noise)["loss"]
        loss.mean().backward()
        optimizer.step()

    def sampler_step() -> None:
        net.zero_grad()
        if who == "ours":
            with _fixed(net):
                net.step(net.schedule, noise, 250, low, high)
        else:
            their_step(code, net, noise, 250, low, high)

    return {"forward": forward, "train_step": train_step, "sampler_step": sampler_step}


def speed(
    checkout: Path | None, device: str = "cpu", size: int = 256, patch: int = 128, rounds: int = 2
) -> dict[str, dict[str, float]]:
    """A network pass at size x size, a training step and a sampler step at patch x patch: median ms and peak MiB.

    The patch is that of the paper's training; on a GPU all are of the size. What keeps activations runs in a process of
    its own for each network, as the authors' takes several GiB: the second of two calls, and the process's peak over
    what it held before, Adam's moments and gradients included. Beside them ours with each of `CHANGES` taken back.
    """
    patch = patch if device == "cpu" else size
    nets: dict[str, Any] = {"ours": BlindDiff()} if checkout is None else {}
    code = None
    if checkout is not None:
        nets["ours"], nets["authors"], code = pair(checkout, PAPER)
    figures: dict[str, dict[str, float]] = {}
    for what in ("train_step", "sampler_step"):
        figures[what] = row = {}
        for who in [*nets, *(f"without_{name}" for name in CHANGES)]:
            call = [sys.executable, "-m", "benchmarks.authors.blind_diff", str(checkout), who, what, str(patch), device]
            # large tensors go back to the system at once: without, what glibc keeps of them would count as well
            env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
            done = subprocess.run(call, capture_output=True, text=True, check=True, env=env)
            row |= {f"{who}_{key}": value for key, value in json.loads(done.stdout.splitlines()[-1]).items()}
    runs = {who: calls(who, net.to(device), code, device, size)["forward"] for who, net in nets.items()}
    figures["forward"] = in_turns({**runs, **without(runs["ours"], CHANGES)}, device, rounds)
    return figures


def alone(checkout: str, who: str, what: str, size: int, device: str) -> dict[str, float]:
    """Two calls in this process: milliseconds of the second, peak MiB over what was held before."""
    ours, theirs, code = (BlindDiff(), None, None) if checkout == "None" else pair(Path(checkout), PAPER)
    side = "ours" if who.startswith("without_") else who
    net = ours if side == "ours" else theirs
    assert net is not None
    run = calls(side, net.to(device), code, device, size)[what]
    run = {side: run, **without(run, CHANGES)}[who]
    if device != "cpu":
        run()
        return {"mib": peak(run, device), "ms": in_turns({"net": run}, device)["net_ms"]}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    run()
    end = clock()
    return {"mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10, "ms": 1e3 * (end - start)}


if __name__ == "__main__":
    print(json.dumps(alone(*sys.argv[1:4], int(sys.argv[4]), sys.argv[5])))
