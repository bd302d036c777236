"""STIGCN beside the authors' code (yellowtownhz/STIGCN)."""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import error, in_turns
from zoo.graph.skeleton.stigcn import STIGCN, fixed_graphs


@contextlib.contextmanager
def _imported(checkout: Path) -> Iterator[None]:
    before, path = set(sys.modules), list(sys.path)
    sys.path.insert(0, str(checkout))
    try:
        yield
    finally:
        sys.path[:] = path  # their graphs add "../"
        for name in set(sys.modules) - before:
            if name.split(".")[0] in ("graph", "model"):
                del sys.modules[name]


def _theirs(checkout: Path, layout: str = "ntu", classes: int = 60, persons: int = 2, **given: Any) -> nn.Module:
    """Their network with random weights; what starts near 0 is drawn too, so that it shows."""
    name, joints = {"ntu": ("ntu_rgb_d", 25), "openpose": ("kinetics", 18)}[layout]
    with _imported(checkout):
        module = importlib.import_module("model.stigcn")
        torch.manual_seed(0)
        net = module.Model(
            num_class=classes, num_point=joints, num_person=persons, graph=f"graph.{name}.Graph", **given
        )
    generator = torch.Generator().manual_seed(1)
    for key, value in net.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        if ".PA" in key or ".PCA" in key:
            value.copy_(0.1 * noise)
        elif key.endswith("bn.weight"):
            value.copy_(1 + 0.1 * noise)
        elif key.endswith(("bn.bias", "running_mean")):
            value.copy_(0.1 * noise)
        elif key.endswith("running_var"):
            value.copy_(1 + 0.3 * noise.abs())
    return net


def _ours(theirs: nn.Module, **changes: Any) -> STIGCN:
    hyperparameters, state = STIGCN.convert_state_dict(theirs.state_dict())
    model = STIGCN(**hyperparameters, **changes)
    model.load_state_dict(state)
    return model


def _clips(count: int, frames: int, joints: int = 25, persons: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(count, 3, frames, joints, persons, generator=generator)
    if persons > 1:
        x[0, ..., 1] = 0  # one clip shows a single person
    return x, torch.randint(0, 4, (count,), generator=generator)


def _gradients(theirs: nn.Module) -> dict[str, Tensor]:
    """Their gradients under our names, by the conversion itself."""
    content = dict(theirs.state_dict()) | {name: p.grad for name, p in theirs.named_parameters()}
    _, state = STIGCN.convert_state_dict(content)
    return state


def compare(checkout: Path) -> dict[str, float]:
    """Largest relative errors in float32, dropout off; the whole network of the paper's size."""
    found: dict[str, float] = {}
    for layout, joints in (("ntu", 25), ("openpose", 18)):
        net = _theirs(checkout, layout, dropout=0.0)
        theirs = torch.stack([getattr(net.layer0.spatial, f"A{k}") for k in (1, 2, 3, 4)])
        ours = fixed_graphs(layout, ["joint", "bone", "cheby", "soft"])
        found[f"graphs_{layout}"] = error(ours, theirs)
        x, _ = _clips(3, 32, joints)
        model = _ours(net, dropout=0.0)
        net.eval(), model.eval()
        found[f"forward_{layout}"] = error(model(x), net(x))
    for dtype in (torch.float32, torch.float64):
        found |= _training(checkout, dtype)
    return found


def _training(checkout: Path, dtype: torch.dtype) -> dict[str, float]:
    """One training step. Gradients also in float64: in float32 both sides' rounding grows over ten blocks of norms."""
    tag = "" if dtype == torch.float32 else "_float64"
    net = _theirs(checkout, dropout=0.0)
    model = _ours(net, dropout=0.0).to(dtype)
    net = net.to(dtype)
    x, y = _clips(4, 32)
    x = x.to(dtype)
    net.train(), model.train()
    mine, other = model(x), net(x)
    found = {f"forward_training{tag}": error(mine, other)}
    loss, wanted = nn.functional.cross_entropy(mine, y), nn.functional.cross_entropy(other, y)
    found[f"loss{tag}"] = error(loss, wanted)
    loss.backward(), wanted.backward()
    own, grads = dict(model.named_parameters()), _gradients(net)
    # relative to the largest of all: biases before a norm have gradients of rounding alone
    largest = max(float(p.grad.abs().max()) for p in net.parameters())
    found[f"gradients{tag}"] = max(float((p.grad - grads[k]).abs().max()) for k, p in own.items()) / largest
    settings = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
    for parameters in (net.parameters(), model.parameters()):
        torch.optim.SGD(parameters, **settings).step()
    _, state = STIGCN.convert_state_dict(net.state_dict())
    found[f"step{tag}"] = max(error(p, state[k]) for k, p in own.items())
    found[f"statistics{tag}"] = max(error(model.state_dict()[k], v) for k, v in state.items() if "running" in k)
    return found


def golden(checkout: Path) -> dict[str, Tensor]:
    """Fixed graphs of both layouts and one block of each kind with its weights and outputs."""
    kept: dict[str, Tensor] = {}
    for layout in ("ntu", "openpose"):
        net = _theirs(checkout, layout, classes=4, layers=[1, 1, 1])
        kept[f"graphs_{layout}"] = torch.stack([getattr(net.layer0.spatial, f"A{k}") for k in (1, 2, 3, 4)])
    with _imported(checkout):
        module, graph = importlib.import_module("model.stigcn"), importlib.import_module("graph.kinetics")
        torch.manual_seed(0)
        # their widths are fixed; the whole network in small is built of their own blocks
        net = module.Model(layers=[1, 1, 1], num_class=4, num_point=18, num_person=2, graph="graph.kinetics.Graph")
        a, net.inplanes = graph.Graph().A, 8
        net.layer0 = module.BasicBlock(3, 8, a, residual=False)
        net.layer1 = net._make_layer(module.BasicBlock, 8, 1)
        net.layer2 = net._make_layer(module.BasicBlock, 16, 1)
        net.layer3 = net._make_layer(module.BasicBlock, 16, 1)
        net.fc, net.dropout = nn.Linear(16, 4), nn.Dropout(0.0)
    generator = torch.Generator().manual_seed(1)
    for key, value in net.state_dict().items():
        if ".PA" in key or ".PCA" in key:
            value.copy_(0.1 * torch.randn(value.shape, generator=generator))
        elif key.endswith("bn.weight"):
            value.copy_(1 + 0.1 * torch.randn(value.shape, generator=generator))
        elif key.endswith("running_var"):
            value.copy_(1 + torch.rand(value.shape, generator=generator))
    x, y = _clips(2, 16, 18)
    kept |= {"skeleton": x, "label": y}
    kept |= {f"weights.{key}": value.clone() for key, value in net.state_dict().items()}
    kept["eval"] = net.eval()(x).detach()
    kept["train"] = (out := net.train()(x)).detach()
    loss = nn.functional.cross_entropy(out, y)
    loss.backward()
    kept |= {"loss": loss.detach(), "gradient": net.layer0.spatial.PA3.grad.clone()}
    return kept


def speed(checkout: Path | None, device: str = "cpu") -> dict[str, dict]:
    """A training step and prediction of the paper's network; fewer clips and frames on a CPU (2 of 64)."""
    count, frames, runs = (2, 64, 3) if device == "cpu" else (32, 300, 10)
    x, y = (part.to(device) for part in _clips(count, frames))
    nets: dict[str, nn.Module] = {}
    if checkout is not None:
        theirs = _theirs(checkout).to(device)
        nets = {"ours": _ours(theirs).to(device), "authors": theirs}
    else:
        nets = {"ours": STIGCN().to(device)}
    found: dict[str, dict] = {}
    optimizers = {who: torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9) for who, net in nets.items()}

    def step(who: str) -> None:
        nets[who].train()
        optimizers[who].zero_grad()
        nn.functional.cross_entropy(nets[who](x), y).backward()
        optimizers[who].step()

    @torch.no_grad()
    def infer(who: str) -> None:
        nets[who].eval()(x)

    for row, call in (("train_step", step), ("predict", infer)):
        calls = {who: (lambda who=who, call=call: call(who)) for who in nets}
        found[row] = in_turns(calls, device, runs)
    return found
