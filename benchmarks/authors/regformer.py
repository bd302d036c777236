"""Regformer beside its authors' network: equal outputs, loss, gradients and step; speed; the recorded tensors."""

import importlib.util
import json
import os
import resource
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import in_turns, peak, without
from zoo.vision.restoration import regformer
from zoo.vision.restoration.regformer import Regformer, derain_loss, rename

TINY = {"dim": 8, "num_blocks": [1, 2, 1, 1], "heads": [2, 2, 2, 2], "num_refinement_blocks": 1}
PAPER = {"dim": 48, "num_blocks": [4, 4, 4, 4], "heads": [6, 6, 6, 6]}  # their Options/Deraining.yml


def _rearrange(x: Tensor, pattern: str, **sizes: int) -> Tensor:
    """The four patterns that the authors' file asks of einops, by the same reshape and permute that einops makes."""
    if pattern == "b c h w -> b (h w) c":
        return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, x.shape[1])
    if pattern == "b (h w) c -> b c h w":
        return x.reshape(x.shape[0], sizes["h"], sizes["w"], -1).permute(0, 3, 1, 2)
    if pattern == "b (head c) h w -> b head c (h w)":
        return x.reshape(x.shape[0], sizes["head"], x.shape[1] // sizes["head"], -1)
    if pattern == "b head c (h w) -> b (head c) h w":
        return x.reshape(x.shape[0], -1, sizes["h"], sizes["w"])
    raise NotImplementedError(pattern)


def authors_class(checkout: Path) -> type[nn.Module]:
    """The authors' `Regformer`, from their own file, without the training code around it."""
    if "einops" not in sys.modules and importlib.util.find_spec("einops") is None:
        einops = types.ModuleType("einops")
        einops.rearrange = _rearrange  # type: ignore[attr-defined]
        sys.modules["einops"] = einops
    path = Path(checkout) / "basicsr/models/archs/Regformer_arch.py"
    spec = importlib.util.spec_from_file_location("authors_regformer", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Regformer


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)).item()


def pair(checkout: Path, config: dict) -> tuple[Regformer, nn.Module]:
    """Ours and theirs with the same weights, through `convert_state_dict`."""
    torch.manual_seed(0)
    theirs = authors_class(checkout)(**config)
    with torch.no_grad():  # their norms start at one and zero, temperatures at one: as after training, they should not
        for name, p in theirs.named_parameters():
            if name.endswith(("body.weight", "body.bias", "temperature")):
                p.add_(0.2 * torch.randn_like(p))
    hyper, state = Regformer.convert_state_dict({"params": theirs.state_dict()})
    ours = Regformer(**hyper)
    ours.load_state_dict(state)
    return ours, theirs


def compare(checkout: Path) -> dict[str, float]:
    """Largest relative errors of forward, loss, gradients (worst tensor) and weights after one optimiser step."""
    ours, theirs = pair(checkout, TINY)
    rainy, clean = torch.rand(2, 3, 40, 56), torch.rand(2, 3, 40, 56)
    a, b = ours(rainy), theirs(rainy)
    figures = {"forward": relative(a, b)}
    loss, their_loss = derain_loss(a, clean), F.l1_loss(b, clean)
    figures["loss"] = relative(loss, their_loss)
    loss.backward()
    their_loss.backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in theirs.named_parameters()}
    expected = rename(gradients)
    figures["gradients"] = max(relative(p.grad, expected[n]) for n, p in ours.named_parameters() if p.grad is not None)
    assert all(p.grad is not None for p in ours.parameters())

    # One step as their trainer makes it: gradients clipped to 0.01, then AdamW.
    ours.trainer = types.SimpleNamespace(  # type: ignore[assignment]
        estimated_stepping_batches=300_000, gradient_clip_val=None, gradient_clip_algorithm=None
    )
    optimizer = ours.configure_optimizers()["optimizer"]
    their_optimizer = torch.optim.AdamW(theirs.parameters(), lr=3e-4, betas=(0.9, 0.999), weight_decay=1e-4)
    torch.nn.utils.clip_grad_norm_(ours.parameters(), ours.hparams.clip)
    torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.01)
    optimizer.step()
    their_optimizer.step()
    after = rename(theirs.state_dict())
    figures["step"] = max(relative(p, after[n]) for n, p in ours.named_parameters())
    return figures


def golden(checkout: Path) -> dict[str, Tensor]:
    """Input, the authors' weights (``authors.*``), output, loss, small gradients (``gradient.*``), of a tiny network.

    The weights are rounded to float16 before they are used, so that half the bytes hold them exactly.
    """
    _, theirs = pair(checkout, {**TINY, "dim": 4, "num_blocks": [1, 1, 1, 1]})
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(p.half())
    rainy, clean = torch.rand(2, 3, 24, 16), torch.rand(2, 3, 24, 16)
    derained = theirs(rainy)
    loss = F.l1_loss(derained, clean)
    loss.backward()
    named = {n: p for n, p in theirs.named_parameters() if p.grad is not None and p.numel() <= 150}
    gradients = {f"gradient.{n}": p.grad for n, p in named.items()}
    weights = {f"authors.{n}": p.detach().half() for n, p in theirs.state_dict().items()}
    outputs = {"rainy": rainy, "clean": clean, "derained": derained.detach(), "loss": loss.detach()}
    return {**outputs, **gradients, **weights}


# ---- speed ----------------------------------------------------------------------------------------------------------


def plain_conv(x: Tensor, weight: Tensor, groups: int = 1, bias: Tensor | None = None, dilation: int = 1) -> Tensor:
    """A convolution on pictures that lie channel by channel, as the authors' do."""
    x, padding = x.permute(0, 3, 1, 2).contiguous(), dilation * (weight.shape[-1] // 2)
    y = F.conv2d(x, weight, bias, padding=padding, dilation=dilation, groups=groups)
    return y.permute(0, 2, 3, 1).contiguous()


def plain_attention(self: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor, act: Any = None) -> Tensor:
    """Unit vectors formed, heads in one batch, the projection after the values; softmax unless another ``act``.

    Shapes:
        x: (b, h, w, c); q, k, v: (b, n, c)
    """
    heads = len(self.temperature)
    q, k, v = (t.unflatten(-1, (heads, -1)).permute(0, 2, 3, 1) for t in (q, k, v))
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    products = q @ k.transpose(-2, -1) * self.temperature.view(-1, 1, 1)
    out = (products.softmax(-1) if act is None else act(products)) @ v
    return x + self.project(out.flatten(1, 2).transpose(1, 2)).view_as(x)


def _attention(self: regformer.Attention, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = self.qkv_conv(self.qkv(y)).flatten(1, 2).chunk(3, -1)
    if mask is not None:
        q, k = q * mask.flatten(1, 2), k * mask.flatten(1, 2)
    return plain_attention(self, x, q, k, v)


def _gate(self: regformer.MixedGate, x: Tensor, y: Tensor) -> Tensor:
    """Both halves at once, and sums of their own for what the convolutions add."""
    u1, u2 = self.conv(self.expand(y)).chunk(2, -1)
    u1 = u1 + regformer.conv(u1, self.conv3.weight, groups=u1.shape[-1])
    u2 = u2 + regformer.conv(u2, self.conv5.weight, groups=u2.shape[-1])
    return x + self.project(F.gelu(u1) * u2)


def _fuse(self: regformer.Fuse, *features: Tensor) -> Tensor:
    return F.linear(torch.cat(features, -1), self.weight)


CHANGES = {
    "channels_last": (regformer, "conv", plain_conv),
    "folded_attention": (regformer.Attention, "forward", _attention),
    "gate_by_halves": (regformer.MixedGate, "forward", _gate),
    "fusing_in_parts": (regformer.Fuse, "forward", _fuse),
}
"""What makes ours fast, each with the plain form that it replaced."""


def speed(
    checkout: Path | None, device: str = "cpu", size: int = 256, patch: int = 128, rounds: int = 3
) -> dict[str, dict[str, float]]:
    """Inference on one picture of size x size, a training step on one patch, at the paper's width: median ms and MiB.

    Beside them ours with each of `CHANGES` taken back. The training patch is the paper's, 128. A step on size x size
    follows, each network in a process of its own, as the authors' takes about 20 GiB: the second of two steps, and the
    process's peak over what it held before.
    """
    if checkout is None:
        torch.manual_seed(0)
        nets: dict[str, nn.Module] = {"ours": Regformer()}
    else:
        ours, theirs = pair(checkout, PAPER)
        nets = {"ours": ours, "authors": theirs}
    for net in nets.values():
        net.to(device)

    def infer(net: nn.Module) -> Callable[[], None]:
        rainy = torch.rand(1, 3, size, size, device=device)

        def run() -> None:
            with torch.no_grad():
                net(rainy)

        return run

    figures: dict[str, dict[str, float]] = {}
    # first, while this process is small
    figures[f"train_step_{size}"] = large = {}
    for who in nets:
        call = [sys.executable, "-m", "benchmarks.authors.regformer", str(checkout), who, str(size), device]
        # large tensors go back to the system at once: without, what glibc keeps of them would not fit beside the rest
        env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
        done = subprocess.run(call, capture_output=True, text=True, check=True, env=env)
        large |= {f"{who}_{key}": value for key, value in json.loads(done.stdout.splitlines()[-1]).items()}
    calls = {who: infer(net) for who, net in nets.items()}
    figures["inference"] = in_turns({**calls, **without(calls["ours"], CHANGES)}, device, rounds)
    steps = {who: train_step(net, patch, device) for who, net in nets.items()}
    figures["train_step"] = in_turns({**steps, **without(steps["ours"], CHANGES)}, device, rounds)
    return figures


def train_step(net: nn.Module, patch: int, device: str) -> Callable[[], None]:
    """A step as their trainer makes it, on one random pair."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-4, weight_decay=1e-4)
    rainy, clean = torch.rand(2, 1, 3, patch, patch, device=device)

    def run() -> None:
        optimizer.zero_grad()
        F.l1_loss(net(rainy), clean).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.01)
        optimizer.step()

    return run


def alone(checkout: str, who: str, patch: int, device: str) -> dict[str, float]:
    """Two training steps of one network in this process: milliseconds of the second, peak MiB over what was held."""
    net = Regformer() if checkout == "None" else pair(Path(checkout), PAPER)[who == "authors"]
    run = train_step(net.to(device), patch, device)
    if device != "cpu":
        run()
        return {"mib": peak(run, device), "ms": in_turns({"net": run}, device)["net_ms"]}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    start = time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()
    run()
    end = time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"mib": (most - before) / 2**10, "ms": 1e3 * (end - start)}


if __name__ == "__main__":
    print(json.dumps(alone(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])))
