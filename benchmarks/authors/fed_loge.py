"""FedLoGe beside the authors' code (ZackZikaiXiao/FedLoGe)."""

import contextlib
import copy
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.measure import error, float64, in_turns
from zoo.engines.federated import local_batches
from zoo.vision.federated.fed_loge import FedLoGe, equiangular, shots, spread

ROUND = {"seed": [11, 12, 13], "work": [1.0, 1.0, 1.0]}


@contextlib.contextmanager
def _package(checkout: Path) -> Iterator[SimpleNamespace]:
    """Their modules; what they only draw pictures with is left out, and ``.cuda()`` stays where it is."""
    before, path, cuda = set(sys.modules), list(sys.path), torch.Tensor.cuda
    sys.path.insert(0, str(checkout))
    for name in ("seaborn", "matplotlib", "matplotlib.pyplot"):
        if name not in sys.modules:
            sys.modules[name] = types.ModuleType(name)
    sys.modules["matplotlib"].pyplot = sys.modules["matplotlib.pyplot"]  # type: ignore[attr-defined]
    torch.Tensor.cuda = lambda self, *a, **k: self  # type: ignore[method-assign]
    try:
        names = {
            "etf": "util.etf_methods",
            "update": "util.update_baseline",
            "fedavg": "util.fedavg",
            "net": "model.model_res",
        }
        with contextlib.redirect_stdout(None):
            yield SimpleNamespace(**{key: importlib.import_module(name) for key, name in names.items()})
    finally:
        sys.path[:] = path
        torch.Tensor.cuda = cuda  # type: ignore[method-assign]
        for name in set(sys.modules) - before:
            if name.split(".")[0] in ("util", "model", "seaborn", "matplotlib"):
                del sys.modules[name]


class _Small(nn.Module):
    """A network of a few weights that answers as theirs does, with ``latent_output`` for the features."""

    def __init__(self, features: int = 12, channels: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3, padding=1)
        self.hidden = nn.Linear(4 * 16, features)
        self.linear = nn.Linear(features, 5)

    def forward(self, x: Tensor, latent_output: bool = False) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv(x)), 2)
        x = F.relu(self.hidden(x.flatten(1)))
        return x if latent_output else self.linear(x)


SMALL = {"conv": "layer1.0", "hidden": "hidden.0"}  # their names -> the backbone's


def _heads(features: int, classes: int, clients: int) -> dict[str, Any]:
    return {
        "g_head": nn.Linear(features, classes),
        "g_aux": nn.Linear(features, classes),
        "l_heads": [nn.Linear(features, classes) for _ in range(clients)],
    }


def _small(clients: int = 3, **changes: Any) -> tuple[nn.Module, dict[str, Any], FedLoGe]:
    torch.manual_seed(0)
    net, heads = _Small(), _heads(12, 5, clients)
    ours = FedLoGe(
        net={"name": "cnn", "widths": [4], "features": 12},
        norm="none", num_classes=5, in_channels=1, image_size=8, num_clients=clients, local_epochs=2, local_batch=4,
        augment=[], mean=[], std=[], **changes,
    )  # fmt: skip
    state = {
        f"model.backbone.{SMALL[k.split('.')[0]]}.{k.split('.')[1]}": v
        for k, v in net.state_dict().items()
        if "linear" not in k
    }
    _fill(ours, state, heads)
    return net, heads, ours


def _resnet(modules: Any, clients: int = 2) -> tuple[nn.Module, dict[str, Any], FedLoGe]:
    """Their ResNet-18 and ours with its weights, through `convert_state_dict`."""
    torch.manual_seed(0)
    net = modules.net.ResNet18(10)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.1)
    heads = _heads(512, 10, clients)
    content = {"model": net, "g_head": heads["g_head"], "g_aux": heads["g_aux"]}
    hyperparameters, state = FedLoGe.convert_state_dict(
        content | {f"l_head_{i}": h for i, h in enumerate(heads["l_heads"])}
    )
    ours = FedLoGe(**hyperparameters, augment=[], mean=[], std=[], local_epochs=1)
    ours.load_state_dict(state)
    ours.states.counts.zero_()
    return net, heads, ours


def _fill(ours: FedLoGe, state: dict[str, Tensor], heads: dict[str, Any]) -> None:
    for name in ("weight", "bias"):
        state[f"sse_{name}"] = getattr(heads["g_head"], name)
        state[f"model.generic.{name}"] = getattr(heads["g_aux"], name)
        state[f"states.personal__local__{name}"] = torch.stack([getattr(h, name) for h in heads["l_heads"]])
    state["sse_ready"] = torch.ones((), dtype=torch.bool)
    own = ours.state_dict()
    ours.load_state_dict({**own, **{k: v.detach().to(own[k]) for k, v in state.items()}})


def _batch(sizes: list[int], shape: tuple[int, ...], classes: int) -> dict[str, Any]:
    """One round. The rarer classes are missing from the first clients."""
    generator = torch.Generator().manual_seed(3)
    draws = [torch.randint(0, classes - 2 + i, (size,), generator=generator) for i, size in enumerate(sizes)]
    whole = draws[-1][:classes]  # theirs divides by the samples of each class
    whole.copy_(torch.arange(len(whole)))
    image = torch.rand(sum(sizes), *shape, generator=generator)
    label = torch.cat([y.clamp(max=classes - 1) for y in draws])
    own = {key: value[: len(sizes)] for key, value in ROUND.items()}
    return {"image": image, "label": label, "client": list(range(len(sizes))), "size": sizes, **own}


def _local(modules: Any, args: Any, batch: dict[str, Any], client: int, plan: Any) -> Any:
    """Their `LocalUpdate` on the batches that ours will take, in that order."""
    index, mask, counts = plan
    first = sum(batch["size"][:client])
    rows = [index[client, t][mask[client, t]] + first for t in range(counts[client])]
    local = object.__new__(modules.update.LocalUpdate)
    local.args, local.ldr_train = args, [(batch["image"][r].to(args.type), batch["label"][r]) for r in rows]
    return local


def _round(modules: Any, net: nn.Module, heads: dict[str, Any], ours: FedLoGe, batch: dict[str, Any]) -> dict[str, Any]:
    """A round of theirs: every client's weights, and the server's."""
    hp = ours._hp
    plan = local_batches(batch["size"], batch["seed"], hp["local_batch"], hp["local_epochs"], drop_last=hp["drop_last"])
    args = SimpleNamespace(
        lr=0.03, momentum=0.5, device="cpu", local_bs=hp["local_batch"], type=next(net.parameters()).dtype
    )
    locals_, auxiliary, loss = [], [], []
    for client in batch["client"]:
        local = _local(modules, args, batch, client, plan)
        found = local.update_weights_gaux(
            net=copy.deepcopy(net), g_head=copy.deepcopy(heads["g_head"]), g_aux=copy.deepcopy(heads["g_aux"]),
            l_head=heads["l_heads"][client], epoch=1,
        )  # fmt: skip
        locals_.append(found[0])
        auxiliary.append(found[1])
        loss.append(found[3])
    clients = [copy.deepcopy(state) for state in locals_]
    net.load_state_dict(modules.fedavg.FedAvg_noniid(locals_, batch["size"]))
    heads["g_aux"] = modules.fedavg.FedAvg_noniid_classifier(auxiliary, batch["size"])
    return {
        "clients": clients,
        "loss": sum(a * b for a, b in zip(loss, batch["size"], strict=True)) / sum(batch["size"]),
    }


def _ours(ours: FedLoGe, batch: dict[str, Any]) -> dict[str, Tensor]:
    logged: dict[str, Tensor] = {}
    ours.log = lambda name, value, **_: logged.__setitem__(name, value)  # type: ignore[method-assign, assignment]
    ours.training_step(batch, 0)
    return logged


def _differences(net: nn.Module, heads: dict[str, Any], ours: FedLoGe) -> dict[str, float]:
    """Largest relative errors of the weights: shared, auxiliary head, clients' heads. The counters of batch norm are
    left out: of their mean of 5 / 3 batches theirs keeps 1, ours 2, and nothing reads them."""
    content = {"model": net, "g_head": heads["g_head"], "g_aux": heads["g_aux"]}
    content |= {f"l_head_{i}": h for i, h in enumerate(heads["l_heads"])}
    if isinstance(net, _Small):
        state = {
            f"model.backbone.{SMALL[k.split('.')[0]]}.{k.split('.')[1]}": v
            for k, v in net.state_dict().items()
            if "linear" not in k
        }
    else:
        state = {k: v for k, v in FedLoGe.convert_state_dict(content)[1].items() if k.startswith("model.backbone.")}
    own = ours.state_dict()
    found = {"backbone": max(error(own[k], v) for k, v in state.items() if v.is_floating_point())}
    for name in ("weight", "bias"):
        theirs = torch.stack([getattr(h, name) for h in heads["l_heads"]])
        pairs = {"generic": (own[f"model.generic.{name}"], getattr(heads["g_aux"], name))}
        pairs["local"] = (own[f"states.personal__local__{name}"], theirs)
        for key, (a, b) in pairs.items():
            found[key] = max(found.get(key, 0.0), error(a, b))
    return found


def _stage_two(
    modules: Any, net: nn.Module, heads: dict[str, Any], ours: FedLoGe, batch: dict[str, Any]
) -> dict[str, float]:
    """Realigned heads and accuracies: theirs change the heads that they are given, which shows what they used."""
    classes, x = ours.hparams.num_classes, batch["image"]
    y, clients = batch["label"], range(len(heads["l_heads"]))
    counts = np.stack([np.bincount(part.numpy(), minlength=classes) for part in y.split(batch["size"])])
    args = SimpleNamespace(lr=0.03, momentum=0.5, device="cpu", local_bs=16, num_classes=classes)
    data = SimpleNamespace(
        global_test_distribution=counts.sum(0), local_test_distribution=counts, get_args=lambda: args
    )
    pairs = list(zip(x.to(next(net.parameters()).dtype), y, strict=True))
    heads_now = ours.eval().realign()
    found: dict[str, float] = {}

    generic = copy.deepcopy(heads["g_aux"])
    _check_accuracy(ours, modules.update.globaltest_calibra(net, generic, pairs, args, data), batch)
    found["realigned"] = error(heads_now[-1][0], generic.weight)
    local = object.__new__(modules.update.LocalUpdate)
    local.args, local.ldr_train = args, []
    features = net.eval()(torch.stack([p[0] for p in pairs]), latent_output=True)
    for client in clients:
        own, aux = copy.deepcopy(heads["l_heads"][client]), copy.deepcopy(heads["g_aux"])
        _, aux, own, _ = local.update_weights_norm_init(
            net=net, g_head=heads["g_head"], g_aux=aux, l_head=own, seed=0, net_glob=net, epoch=0
        )
        start = sum(batch["size"][:client])
        rows = slice(start, start + batch["size"][client])
        right = modules.update.localtest(net, aux, own, pairs, data, range(rows.start, rows.stop), client)[0]
        theirs = own(features[rows]) + aux(features[rows])
        with torch.no_grad():
            scores = ours(x[rows].to(features.dtype), client)
        present = torch.from_numpy(counts[client] > 0)
        found["personal"] = max(found.get("personal", 0.0), error(scores[:, present], theirs[:, present]))
        if (
            float((scores.argmax(1) == y[rows]).float().mean()) != np.float32(right)
            or (~present[scores.argmax(1)]).any()
        ):
            raise AssertionError(f"client {client} is scored differently: theirs {right}")
    return found


def _check_accuracy(ours: FedLoGe, theirs: tuple[float, dict[str, float]], batch: dict[str, Any]) -> None:
    """Their accuracies, of all classes and by how frequent they are, must be ours: all are counts of samples."""
    logged: dict[str, Tensor] = {}
    ours.log = lambda name, value, **_: logged.__setitem__(name, value)  # type: ignore[method-assign, assignment]
    ours.test_step(
        {**batch, "image": batch["image"].to(ours.sse_weight.dtype), "client": [-1], "size": [len(batch["label"])]}, 0
    )
    ours.on_test_epoch_end()
    for name, value in {"accuracy": theirs[0], **theirs[1]}.items():
        if abs(float(logged.get(f"test/{name}", 0.0)) - value) > 1e-6:
            raise AssertionError(f"{name}: theirs {value}, ours {logged.get(f'test/{name}')}")


class _Stop(Exception):
    pass


def _recorded(modules: Any, features: int, classes: int, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Their frame, its sparse start, and where it is after so many of their ten thousand steps."""
    held: dict[str, Any] = {"steps": 0}

    class Short(torch.optim.Adam):
        def __init__(self, params: list[Tensor], **given: Any):
            held.update(start=params[0].detach().clone(), matrix=params[0])
            super().__init__(params, **given)

        def step(self, *given: Any, **more: Any) -> None:  # type: ignore[override]
            super().step(*given, **more)
            held["steps"] += 1
            if held["steps"] == steps:
                raise _Stop

    theirs = modules.etf.ETF_Classifier(features, classes)
    modules.etf.optim = SimpleNamespace(Adam=Short)
    try:
        theirs.gen_sparse_ETF(features, classes, 0.6)
    except _Stop:
        pass
    finally:
        modules.etf.optim = torch.optim
    return theirs.ori_M, held["start"], held["matrix"].detach()


def _classifier(modules: Any, features: int, classes: int, steps: int) -> dict[str, float]:
    """The frame from the same random matrix, and the way that the sparse one goes from the same start."""
    np.random.seed(0)
    random = torch.from_numpy(np.random.random(size=(features, classes))).to(torch.get_default_dtype())
    np.random.seed(0)
    frame, start, after = _recorded(modules, features, classes, steps)
    draw, torch.rand = torch.rand, lambda *_, **__: random  # type: ignore[assignment]
    try:
        found = {"frame": error(equiangular(features, classes), frame)}
    finally:
        torch.rand = draw  # type: ignore[assignment]
    if int((start == 0).sum()) != int(0.6 * features * classes):
        raise AssertionError(f"{int((start == 0).sum())} entries are 0")
    own = spread(start, steps=steps)
    return found | {"spread": error(own, after), "spread_way": error(own - start, after - start)}


def compare(checkout: Path) -> dict[str, float]:
    """Largest relative errors in float32, of single steps and of whole rounds."""
    found: dict[str, float] = {}
    with _package(checkout) as modules:
        # one round of three clients, six to ten steps each, then stage 2 on its result
        batch = _batch([9, 17, 12], (1, 8, 8), 5)
        net, heads, ours = _small()
        theirs = _round(modules, net, heads, ours, batch)
        logged = _ours(ours, batch)
        found["round_loss"] = error(logged["train/loss"], torch.tensor(theirs["loss"]))
        found |= {f"round_{k}": v for k, v in _differences(net, heads, ours).items()}
        found |= {f"stage2_{k}": v for k, v in _stage_two(modules, net, heads, ours, batch).items()}

        # one step and two of the paper's ResNet-18, batch norm included
        one = _batch([8, 16], (3, 32, 32), 10)
        net, heads, ours = _resnet(modules)
        theirs = _round(modules, net, heads, ours, one)
        logged = _ours(ours, one)
        found["resnet_loss"] = error(logged["train/loss"], torch.tensor(theirs["loss"]))
        found |= {f"resnet_{k}": v for k, v in _differences(net, heads, ours).items()}
        found |= {f"resnet_stage2_{k}": v for k, v in _stage_two(modules, net, heads, ours, one).items()}

        found |= {f"classifier_{k}": v for k, v in _classifier(modules, 512, 10, 1).items()}
        found |= {f"classifier100_{k}": v for k, v in _classifier(modules, 512, 100, 1).items()}
        # Which column is nearest changes within rounding, so many steps are held against each other in float64.
        patched = modules.etf.ETF_Classifier.generate_random_orthogonal_matrix
        modules.etf.ETF_Classifier.generate_random_orthogonal_matrix = lambda self, d, k: torch.from_numpy(
            np.linalg.qr(np.random.random((d, k)))[0]
        )
        with float64():
            found["classifier_float64_200_steps"] = _classifier(modules, 512, 10, 200)["spread_way"]
        modules.etf.ETF_Classifier.generate_random_orthogonal_matrix = patched

        for seed in range(20):
            drawn = np.random.default_rng(seed).integers(0, 40, 12)
            grouped = modules.update.shot_split(drawn, threshold_3shot=[75, 95])[0]
            own = shots(torch.from_numpy(drawn))
            if any(sorted(grouped[k]) != (own == i).nonzero().flatten().tolist() for i, k in enumerate(grouped)):
                raise AssertionError(f"{drawn}: theirs {grouped}, ours {own}")
    return found


def golden(checkout: Path) -> dict[str, Tensor]:
    """A round of three clients, the weights before and after, and the heads of stage 2."""
    tensors: dict[str, Tensor] = {}
    with _package(checkout) as modules:
        batch = _batch([9, 17, 12], (1, 8, 8), 5)
        net, heads, ours = _small()
        tensors |= {
            f"start.{k}": v.clone() for k, v in ours.state_dict().items() if k.startswith(("model", "sse", "states"))
        }
        loss = _round(modules, net, heads, ours, batch)["loss"]
        tensors |= {"image": batch["image"], "label": batch["label"], "size": torch.tensor(batch["size"])}
        tensors |= {"seed": torch.tensor(batch["seed"]), "loss": torch.tensor(loss)}
        for k, v in net.state_dict().items():
            if "linear" not in k:
                tensors[f"after.model.backbone.{SMALL[k.split('.')[0]]}.{k.split('.')[1]}"] = v
        generic, local = copy.deepcopy(heads["g_aux"]), heads["l_heads"]
        for name in ("weight", "bias"):
            tensors[f"after.model.generic.{name}"] = getattr(generic, name).clone()
            tensors[f"after.states.personal__local__{name}"] = torch.stack([getattr(h, name) for h in local])
        args = SimpleNamespace(lr=0.03, momentum=0.5, device="cpu", local_bs=16, num_classes=5)
        counts = np.stack([np.bincount(p.numpy(), minlength=5) for p in batch["label"].split(batch["size"])])
        data = SimpleNamespace(global_test_distribution=counts.sum(0), get_args=lambda: args)
        pairs = list(zip(batch["image"], batch["label"], strict=True))
        modules.update.globaltest_calibra(net, generic, pairs, args, data)
        tensors["realigned"] = generic.weight.clone()
        features = net(batch["image"], latent_output=True)
        worker = object.__new__(modules.update.LocalUpdate)
        worker.args, worker.ldr_train = args, []
        scores = []
        for head in local:
            _, aux, own, _ = worker.update_weights_norm_init(
                net=net, g_head=None, g_aux=copy.deepcopy(heads["g_aux"]), l_head=head, seed=0, net_glob=None, epoch=0
            )
            scores.append(own(features) + aux(features))
        tensors["personal"] = torch.stack(scores)

        np.random.seed(0)
        _, start, after = _recorded(modules, 16, 5, 20)
        tensors |= {"classifier.start": start, "classifier.after": after}
    return {k: v.detach().clone().contiguous() for k, v in tensors.items()}


# ---- speed -----------------------------------------------------------------------------------------------------------


def speed(checkout: Path | None, device: str = "cpu") -> dict[str, dict[str, float]]:
    """A round of eight clients with a small network, a client's step of the paper's ResNet-18 with its batch of 8, the
    heads of stage 2 for 40 clients on 100 pictures each, and 200 steps of the fixed classifier (10 and 100 classes).
    """
    found: dict[str, dict[str, float]] = {}
    package = contextlib.nullcontext() if checkout is None else _package(checkout)
    with package as modules:
        sizes = [64] * 8
        batch = _batch(sizes, (1, 8, 8), 5) | {"seed": list(range(8)), "work": [1.0] * 8, "client": list(range(8))}
        net, heads, ours = _small(8)
        found["round_of_8_small"] = in_turns(_rounds(modules, net, heads, ours, batch, device), device)
        if modules is not None:
            one = _batch([8, 8], (3, 32, 32), 10)
            net, heads, ours = _resnet(modules)
            found["resnet18_two_clients"] = in_turns(_rounds(modules, net, heads, ours, one, device), device)
        for classes in (10, 100):
            sides: dict[str, Callable[[], Any]] = {}
            matrix = equiangular(512, classes) * (torch.rand(512, classes) > 0.6)
            sides["ours"] = lambda matrix=matrix: spread(matrix, steps=200)
            if modules is not None:
                sides["authors"] = lambda classes=classes: _recorded(modules, 512, classes, 200)
            found[f"classifier_{classes}_200_steps"] = in_turns(sides, device)
    return found


def _rounds(
    modules: Any, net: nn.Module, heads: dict[str, Any], ours: FedLoGe, batch: dict[str, Any], device: str
) -> Any:
    ours, moved = ours.to(device), {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    ours.log = lambda *a, **k: None  # type: ignore[method-assign]
    sides: dict[str, Callable[[], Any]] = {"ours": lambda: ours.training_step(moved, 0)}
    if modules is not None and device == "cpu":
        sides["authors"] = lambda: _round(modules, net, heads, ours, batch)
    return sides
