"""FedImpro beside the authors' code (wizard1203/FedImpro): their network, sampler and server run as they are."""

import contextlib
import copy
import functools
import logging
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.measure import error, float64, in_turns
from zoo.engines.federated import Samples, local_batches
from zoo.vision.federated.fed_impro import FedImpro, _name

PACKAGES = ("trainers", "utils", "loss_fn", "lr_scheduler", "model", "optim", "timers", "recorders", "configs")


class Stub(types.ModuleType):
    """A package that their files import and these paths never use."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return mock.MagicMock()


@contextlib.contextmanager
def _package(checkout: Path) -> Iterator[types.SimpleNamespace]:
    """Their modules, importable and gone afterwards; what they log is dropped."""
    before, level = dict(sys.modules), logging.root.manager.disable
    for name in ("wandb", "pandas", "matplotlib", "matplotlib.pyplot", "seaborn"):
        try:
            __import__(name)
        except ImportError:
            sys.modules[name] = Stub(name)
    for name in ("utils.tracker", "utils.wandb_util"):  # records of their runs; one of them needs an old numpy
        sys.modules[name] = Stub(name)
    sys.path.insert(0, str(checkout))
    logging.disable(logging.CRITICAL)
    try:
        from model.cv import resnet_v2
        from optim.build import create_optimizer
        from trainers import spliter
        from utils.data_utils import average_named_params

        yield types.SimpleNamespace(
            resnet=resnet_v2, spliter=spliter, optimizer=create_optimizer, average=average_named_params
        )
    finally:
        logging.disable(level)
        sys.path.remove(str(checkout))
        for name in set(sys.modules) - set(before):
            if name.split(".")[0] in PACKAGES or isinstance(sys.modules[name], Stub):
                del sys.modules[name]


def _args(**changes: Any) -> types.SimpleNamespace:
    """The options of their command that these paths read."""
    given: dict[str, Any] = {
        "dataset": "cifar10", "num_classes": 10, "max_epochs": 1000, "model": "resnet18_v2", "model_out_feature": False,
        "fed_split": "FeatureSynthesisLabel", "fed_split_module_num": 1, "fed_split_module_choose": "layer2",
        "fed_split_feature_synthesis": "GaussianSynthesisLabel", "fed_split_noise_std": 0.1,
        "fed_split_std_mode": "update", "fed_split_estimate_mode": "selected", "fed_split_estimate_weight": "uniform",
        "fed_split_loss_weight": 1.0, "fed_split_constrain_feat": False, "fed_split_hidden_loss": None,
        "fed_split_feature_weight_sched": "gradual2half", "fed_split_feature_weight_max_epochs": 500,
        "fed_split_hidden_detach": False, "fed_split_forward_decouple": False, "fed_split_freeze_front": False,
        "fed_split_forward_detach_decouple_begin_epochs": 0, "freeze_backbone": False, "freeze_bn": False,
        "server_optimizer": "no", "client_optimizer": "no", "role": "client", "algorithm": "FedAvg", "opt": "sgd",
        "lr": 0.1, "wd": 1e-4, "momentum": 0.0, "nesterov": False,
    }  # fmt: skip
    return types.SimpleNamespace(**{**given, **changes})


def _network(their: Any, args: Any, blocks: tuple[int, ...], width: int, channels: int = 3) -> nn.Module:
    """Their ResNet; narrower than theirs by their own layer maker, where ``width`` is not 64."""
    net = their.resnet.ResNet(their.resnet.BasicBlock, list(blocks), num_classes=args.num_classes, args=args)
    if width != 64:
        net.in_planes = width
        net.conv1 = nn.Conv2d(channels, width, kernel_size=3, stride=1, padding=1, bias=False)
        net.bn1 = nn.BatchNorm2d(width)
        for number, count in enumerate(blocks):
            layer = net._make_layer(their.resnet.BasicBlock, width * 2**number, count, 2 if number else 1)
            setattr(net, f"layer{number + 1}", layer)
        net.linear = nn.Linear(8 * width, args.num_classes)
    return net


class Pair:
    """One global model of ours and of theirs, equal, with equal Gaussians."""

    def __init__(
        self,
        their: Any,
        depth: int = 10,
        width: int = 4,
        image: int = 16,
        progress: int = 3,
        ours: dict[str, Any] | None = None,
        **theirs: Any,
    ):
        torch.manual_seed(0)
        self.their, self.args, self.progress = their, _args(**theirs), progress
        blocks = (1, 1, 1, 1) if depth == 10 else (2, 2, 2, 2)
        self.net = _network(their, self.args, blocks, width)
        for p in self.net.parameters():  # batch norm begins at 1 and 0, where errors would hide
            if p.ndim == 1:
                p.data += 0.1 * torch.randn_like(p)
        self.optimizer = their.optimizer(self.args, self.net)
        self.spliter = their.spliter.Spliter(self.args, torch.device("cpu"), self.net, self.optimizer)
        self.spliter.generate_layer_generator_dict(self.net, torch.randn(2, 3, image, image))
        self.net.train()
        arguments: dict[str, Any] = {
            "net": {"name": f"resnet{depth}", "width": width}, "num_classes": self.args.num_classes,
            "image_size": image,
            "num_clients": 3, "cut": self.args.fed_split_module_choose,
            "schedule": {"default": "joint"}.get(
                self.args.fed_split_feature_weight_sched, self.args.fed_split_feature_weight_sched
            ),
            "ramp": self.args.fed_split_feature_weight_max_epochs, "authors_update": True, "authors_ramp": True,
            "stack": 1, "local_batch": 8,
        }  # fmt: skip
        self.model = FedImpro(**{**arguments, **(ours or {})})
        if next(self.net.parameters()).dtype == torch.float64:
            self.model.double()
        state = self.model.state_dict()
        state |= {f"model.{_name(k)}": v.clone() for k, v in self.net.state_dict().items()}
        state |= {f"feature_{k}": v.clone() for k, v in self.spliter.get_layer_generator_dict()[0].items() if v.ndim}
        self.model.load_state_dict(state)
        self.model.round += progress
        self.model.log = lambda *a, **k: None  # type: ignore[method-assign]

    def batch(self, sizes: tuple[int, ...] = (16, 8), clients: tuple[int, ...] = (0, 2)) -> dict[str, Any]:
        """A round's samples of a few clients; the second one lacks most classes."""
        hp, generator = self.model.hparams, torch.Generator().manual_seed(3)
        image = torch.rand(sum(sizes), hp.in_channels, hp.image_size, hp.image_size, generator=generator)
        label = torch.randint(hp.num_classes, (sum(sizes),), generator=generator)
        label[sizes[0] :] %= 2
        found = {"image": image.to(self.model.dtype), "label": label, "client": list(clients), "size": list(sizes)}
        return {**found, "work": [1.0] * len(sizes), "seed": [11 + c for c in clients]}

    def round(self, batch: dict[str, Any]) -> list[list[dict[str, Tensor]]]:
        """Our round; the local batches of each client, with the noise drawn for them."""
        seen: dict[int, list[dict[str, Tensor]]] = {}
        original = self.model.local_batch

        def watched(samples: Any, step: int, count: int) -> dict[str, Tensor]:
            found = original(samples, step, count)
            for row, client in enumerate(samples.ids[:count]):
                seen.setdefault(client, []).append({k: v[row] for k, v in found.items()})
            return found

        self.model.local_batch = watched  # type: ignore[method-assign]
        self.model.training_step(batch, 0)
        self.model.local_batch = original  # type: ignore[method-assign]
        return [seen[client] for client in batch["client"]]

    def step(self, rows: dict[str, Tensor]) -> Tensor:
        """One step of theirs on a local batch, with the noise that ours drew."""
        noise = rows["noise"]

        def normal(mean: Tensor, std: Tensor) -> Tensor:
            return mean + std * noise

        self.optimizer.zero_grad()
        losses: list[Tensor] = []
        backward = torch.Tensor.backward

        def kept(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            losses.append(loss.detach().clone())
            backward(loss, *args, **kwargs)

        drawn = mock.patch.object(torch, "normal", normal) if self.given else contextlib.nullcontext()
        with drawn, mock.patch.object(torch.Tensor, "backward", kept):
            self.spliter.split_train(
                self.net, rows["image"], rows["label"], nn.CrossEntropyLoss(), progress=self.progress
            )
        self.optimizer.step()
        return losses[-1]

    def theirs(self, steps: list[list[dict[str, Tensor]]], batch: dict[str, Any]) -> dict[str, Tensor]:
        """Their round on the same local batches; the server's state afterwards, by our names."""
        start = copy.deepcopy(self.net.state_dict())
        gaussians = copy.deepcopy(self.spliter.get_layer_generator_dict())
        models, estimates = [], {}
        for client, size, own in zip(batch["client"], batch["size"], steps, strict=True):
            self.net.load_state_dict(start)
            self.spliter.set_layer_generator_dict(copy.deepcopy(gaussians))
            for rows in own:
                self.step(rows)
            models.append((size, copy.deepcopy(self.net.state_dict())))
            estimates[client] = copy.deepcopy(self.spliter.get_layer_generator_dict())
        self.spliter.set_layer_generator_dict(gaussians)
        sizes = dict(zip(batch["client"], batch["size"], strict=True))
        total = sum(batch["size"])
        classes = self.args.num_classes
        first = [sum(batch["size"][:i]) for i in range(len(batch["size"]))]
        owned = {
            client: torch.bincount(batch["label"][a : a + n], minlength=classes).tolist()
            for client, n, a in zip(batch["client"], batch["size"], first, strict=True)
        }
        absent = [*self.absent, *[1] * (classes - len(self.absent))]
        owned = {c: owned.get(c, absent) for c in range(self.model.hparams.num_clients)}  # they index by its order
        sums = [max(sum(own[label] for own in owned.values()), 1) for label in range(classes)]
        shares = {c: {label: own[label] / sums[label] for label in range(classes)} for c, own in owned.items()}
        merged = self.spliter.average_layer_generator_dict(total, sizes, shares, estimates)[0]
        weights = self.their.average(models, [size / total for size, _ in models])
        return {f"model.{_name(k)}": v for k, v in weights.items()} | {
            f"feature_{k}": v for k, v in merged.items() if v.ndim
        }

    given = True
    """Whether theirs takes the noise that ours drew, or draws."""
    absent = [3, 1, 0, 2]
    """Samples of each class of the clients that are not in the round."""


def _round(pair: Pair, label: str) -> dict[str, float]:
    """A whole round: clients' steps, their Gaussians, and what the server makes of them."""
    batch = pair.batch()
    ours = pair.model
    steps = pair.round(batch)
    wanted = pair.theirs(steps, batch)
    state = ours.state_dict()
    weights = [k for k in wanted if k.startswith("model.") and wanted[k].is_floating_point()]
    found = {f"{label}.weights": max(error(state[k], wanted[k]) for k in weights)}
    for name in ("feature_mean", "feature_std"):
        if name in wanted:
            found[f"{label}.{name}"] = error(state[name], wanted[name])
    return found


def _first_step(pair: Pair, size: int = 8) -> dict[str, float]:
    """Loss, gradients, Gaussians and weights after one step of one client."""
    model, batch = pair.model, pair.batch((size,), (0,))
    losses: dict[str, Tensor] = {}
    model.log = lambda name, value, **k: losses.__setitem__(name, value)  # type: ignore[method-assign]
    before = {n: p.detach().clone() for n, p in model.model.named_parameters()}
    (rows,) = pair.round(batch)[0]
    loss = pair.step(rows)
    lr, decay = model.hparams.lr, model.hparams.weight_decay
    after = dict(model.model.named_parameters())
    grads = {n: (before[n] - after[n].detach()) / lr - decay * before[n] for n in after}
    theirs = {_name(n): p for n, p in pair.net.named_parameters()}
    estimate = pair.spliter.get_layer_generator_dict()[0]
    largest = max(float(p.grad.abs().max()) for p in theirs.values())
    return {
        "loss": error(losses["train/loss"], loss),
        "gradients": max(float((grads[n] - p.grad).abs().max()) for n, p in theirs.items()) / largest,
        "step": max(error(after[n], p) for n, p in theirs.items()),
        "feature_mean": error(model.feature_mean, estimate["mean"]),
        "feature_std": error(model.feature_std, estimate["std"]),
    }


def compare(checkout: Path) -> dict[str, float]:
    """Largest relative errors: their ResNet-18 as it is, then whole rounds of a narrow ResNet-10 with every option."""
    small: dict[str, Any] = {"num_classes": 4}
    found: dict[str, float] = {}
    with _package(checkout) as their:
        pair = Pair(their, depth=18, width=64, image=32, progress=100)
        pair.model.eval()
        pair.net.eval()
        x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        found["resnet18.forward"] = error(pair.model(x), pair.net(x))
        pair.net.train()
        found |= {f"resnet18.{k}": v for k, v in _first_step(pair).items()}
        for dtype in (torch.float32, torch.float64):
            end = "_float64" if dtype == torch.float64 else ""
            with float64(dtype == torch.float64):
                for schedule in ("default", "gradual", "gradual2half", "gradualhalfhalf", "milestone"):
                    options = {**small, "fed_split_feature_weight_sched": schedule}
                    options["fed_split_feature_weight_max_epochs"] = 4
                    for progress in (6,) if dtype == torch.float64 else (3,):
                        pair = Pair(their, progress=progress, **options)
                        label = f"round.{schedule}{progress}{end}"
                        found |= _round(pair, label)
                for layer in ("layer1", "layer3") if dtype == torch.float64 else ():
                    found |= _round(Pair(their, fed_split_module_choose=layer, **small), f"round.{layer}{end}")
                pair = Pair(
                    their, ours={"align": 0.5}, fed_split_constrain_feat=True, fed_split_loss_weight=0.5, **small
                )
                found |= _round(pair, f"round.align{end}")
                pair = Pair(their, ours={"learn_std": False}, fed_split_std_mode="default", **small)
                found |= _round(pair, f"round.fixed_std{end}")
                sizes = {"fed_split_estimate_mode": "all", "fed_split_estimate_weight": "label_size"}
                pair = Pair(their, ours={"combine": "label_size"}, **small, **sizes)
                pair.model.label_count += torch.tensor(pair.absent)
                found |= _round(pair, f"round.label_size{end}")
    return found


def golden(checkout: Path) -> dict[str, Tensor]:
    """A round of two clients of the narrow ResNet: its start, its local batches, and the server's state after it."""
    with _package(checkout) as their:
        pair = Pair(their, ours={"net": {"name": "resnet10", "width": 3}}, width=3, image=8, num_classes=4)
        start = {
            f"start.{k}": v.clone() for k, v in pair.model.state_dict().items() if k.startswith(("model", "feature"))
        }
        batch = pair.batch()
        steps = pair.round(batch)
        after = {f"after.{k}": v.clone() for k, v in pair.theirs(steps, batch).items()}
        noise = {f"noise.{c}.{i}": rows["noise"] for c, own in enumerate(steps) for i, rows in enumerate(own)}
    return {**start, **after, **noise, "image": batch["image"], "label": batch["label"]}


def _own_step(pair: Pair, batch: dict[str, Any]) -> Callable[[], Any]:
    """A client's step of ours: its local batch and drawn features, weights, and its estimate of the Gaussians."""
    model, down = pair.model, pair.model.broadcast()
    plan = local_batches(batch["size"], batch["seed"], model.hparams.local_batch, drop_last=True)
    samples = Samples(model, batch, [0], plan)
    return functools.partial(model.work, model.clients(model.start_state([0], down), False), samples, down)


def speed(checkout: Path | None, device: str = "cpu") -> dict[str, dict[str, float]]:
    """A step of one client, ResNet-18 at batch 32, and a round of ten clients, two steps each of a narrow ResNet-10."""
    with _package(checkout) if checkout is not None else contextlib.nullcontext() as their:  # type: ignore[attr-defined]
        if checkout is None:
            raise FileNotFoundError("FedImpro's speed is measured beside the authors' code: pass --authors DIR.")
        found = {}
        settings: dict[str, dict[str, Any]] = {
            "local_step": {"depth": 18, "width": 64, "image": 32, "ours": {"local_batch": 32}},
            "round": {"image": 16, "ours": {"local_batch": 32, "num_clients": 10, "stack": None}},
        }
        for name, options in settings.items():
            pair = Pair(their, **options)
            pair.model.to(device)
            clients = tuple(range(10 if name == "round" else 1))
            batch = pair.batch(tuple(64 if name == "round" else 32 for _ in clients), clients)
            steps = pair.round(batch)

            def ours(pair: Pair = pair, batch: dict[str, Any] = batch) -> None:
                pair.model.training_step(batch, 0)

            def theirs(pair: Pair = pair, batch: dict[str, Any] = batch, steps: Any = steps) -> None:
                pair.theirs(steps, batch)

            if name == "local_step":  # both without a round around them
                ours, theirs = _own_step(pair, batch), functools.partial(pair.step, steps[0][0])
            pair.given = False
            found[name] = in_turns({"ours": ours, "authors": theirs}, device)
        return found
