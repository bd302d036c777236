"""FedLD beside the authors' code (Zeng-Shuang/FedLD): their local training, aggregation and whole rounds."""

import contextlib
import copy
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.measure import error, float64, in_turns
from zoo.core.seeding import seed_from
from zoo.engines.federated import Samples, local_batches
from zoo.nn.layout import channels_last
from zoo.vision.federated.fed_ld import FedLD, margin_penalty, principal_mean

MODULES = ("options", "svd_tools", "running", "tools", "methods", "models")
SIZES = [16, 24, 8, 32, 16]
TINY = {"num_classes": 5, "in_channels": 2, "num_clients": 5, "lr": 0.2, "local_batch": 8, "warm_up": 5}
EVAL = {"norm": "batch", "authors_eval": True}
TINY |= {"local_epochs": 2, "authors_warm_up": True, "authors_buffers": True}


@contextlib.contextmanager
def _package(checkout: Path) -> Iterator[Any]:
    """Their modules, importable and gone afterwards; they read the command's arguments as they load."""
    before, argv = set(sys.modules), sys.argv
    # cvxpy and tqdm are for their other methods and for progress bars
    cvxpy, tqdm = ModuleType("cvxpy"), ModuleType("tqdm")
    tqdm.tqdm = lambda iterable, *a, **k: iterable  # type: ignore[attr-defined]
    sys.path.insert(0, str(checkout))
    sys.argv = ["federated_main.py", "--device", "cpu", "--margin_loss_penalty", "0.1", "--train_rule", "FedLD"]
    try:
        with mock.patch.dict(sys.modules, {"cvxpy": cvxpy, "tqdm": tqdm}):
            import running
            import svd_tools
            from methods import fedld
            from models import cnn

            yield SimpleNamespace(running=running, svd=svd_tools, fedld=fedld, cnn=cnn, args=fedld.args)
    finally:
        sys.path.remove(str(checkout))
        sys.argv = argv
        for name in set(sys.modules) - before:
            if name.split(".")[0] in MODULES:
                del sys.modules[name]


class _Pair(nn.Module):
    """A network as theirs give it: features, of which training makes no use, and logits."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, self.network(x)


class _Loader:
    """Their loader of one client: each pass gives the next epoch's batches of ours."""

    def __init__(self, epochs: list[list[tuple[Tensor, Tensor]]], size: int):
        self.epochs, self.dataset = epochs, range(size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.epochs.pop(0))

    def __len__(self) -> int:
        return len(self.epochs[0])


class _Epoch(list):
    """One epoch's batches; its iterator knows its length, which they ask for."""

    def __iter__(self) -> Any:
        return _Counted(super().__iter__(), len(self))


class _Counted:
    def __init__(self, inner: Any, size: int):
        self.inner, self.size = inner, size

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        return next(self.inner)

    def __len__(self) -> int:
        return self.size


def _round(ours: FedLD, number: int, sizes: list[int]) -> dict[str, Any]:
    """A round's batch as our DataModule gives it."""
    generator = torch.Generator().manual_seed(seed_from("data"))
    hp, total = ours.hparams, sum(sizes)
    image = torch.rand(total, hp.in_channels, hp.image_size, hp.image_size, generator=generator)
    label = torch.randint(hp.num_classes, (total,), generator=generator)
    clients = list(range(len(sizes)))
    seeds = [seed_from(number, client) for client in clients]
    batch = {"image": image.to(torch.get_default_dtype()), "label": label, "client": clients, "size": sizes}
    return {**batch, "work": [1.0] * len(sizes), "seed": seeds}


def _method(build: Callable[[], FedLD]) -> FedLD:
    torch.manual_seed(0)
    ours = build().to(torch.get_default_dtype())
    ours.log = lambda *a, **k: None  # type: ignore[method-assign]
    return ours


def _tiny(**changes: Any) -> FedLD:
    net = {"name": "cnn", "widths": [4, 6], "features": 12}
    return _method(lambda: FedLD.from_variant("tiny", **{**TINY, "net": net, **changes}))


def _theirs(package: Any, ours: FedLD, network: nn.Module, rounds: int, sizes: list[int]) -> list[dict[str, Tensor]]:
    """Their rounds from the weights of ``network``, on our batches: the global weights after each."""
    hp = ours.hparams
    package.args.lr, package.args.num_users, package.args.epochs = hp.lr, len(sizes), rounds
    package.args.local_epoch, package.args.k_proportion = hp.local_epochs, hp.principal
    package.args.margin_loss_penalty = package.fedld.args.margin_loss_penalty = hp.margin
    package.svd.args.k_proportion = hp.principal
    plans = []
    for number in range(rounds):
        batch = _round(ours, number, sizes)
        plan = local_batches(
            batch["size"], batch["seed"], hp.local_batch, epochs=hp.local_epochs, drop_last=ours._hp["drop_last"]
        )
        plans.append((batch, plan))
    clients = []
    for k, size in enumerate(sizes):
        epochs = []
        for batch, plan in plans:
            steps = []
            for _, one in Samples(ours, batch, [k], plan):
                mask = one["mask"][0]
                steps.append((ours.normalise(one["image"])[0][mask], one["label"][0][mask]))
            per = len(steps) // hp.local_epochs
            epochs += [_Epoch(steps[i : i + per]) for i in range(0, len(steps), per)]
        client = package.fedld.LocalUpdate_FedLD(
            idx=k, args=package.args, train_set=_Loader(epochs, size), test_set=None, model=copy.deepcopy(network)
        )
        # their test before training leaves the network in eval mode; without it batch norm is trained as it is meant
        test: Any = client.local_model.eval if ours.hparams.authors_eval else int
        client.local_test = lambda *a, test=test, **k: float(bool(test()))
        clients.append(client)
    history: dict[str, Any] = {key: None for key in network.state_dict()}
    history["grad_len"] = package.svd.initialize_grad_len(network, history)
    found = []
    with contextlib.redirect_stdout(io.StringIO()):
        for number in range(rounds):
            package.running.train_round_fedld(package.args, network, clients, number, history)
            found.append({n.removeprefix("network."): v.clone() for n, v in network.state_dict().items()})
    return found


def _rounds(package: Any, ours: FedLD, rounds: int, sizes: list[int]) -> dict[str, float]:
    """Errors of the global weights after the first and the last of some rounds, parameters and buffers apart."""
    theirs = _theirs(package, ours, _Pair(copy.deepcopy(ours.model)), rounds, sizes)
    trained = {n for n, _ in ours.model.named_parameters()}
    found = {}
    for number in range(rounds):
        ours.training_step(_round(ours, number, sizes), 0)
        own = ours.model.state_dict()
        errors = {n: error(own[n].double(), v.double()) for n, v in theirs[number].items() if not n.endswith("tracked")}
        for label, group in (("weights", trained), ("statistics", own.keys() - trained)):
            if label == "weights" or any(n in errors for n in group):
                found[label] = max([errors[n] for n in group if n in errors] + [found.get(label, 0.0)])
    return found


def _aggregation(package: Any, clients: int, keep: float, size: int = 40) -> float:
    """Error of one aggregation of random updates that have a common direction."""
    generator = torch.Generator().manual_seed(clients)
    dtype = torch.get_default_dtype()
    common = torch.randn(size, generator=generator)
    spread = torch.randn(clients, size, generator=generator) * torch.arange(1, clients + 1)[:, None]
    updates = (common + spread).to(dtype)
    package.svd.args.k_proportion = keep
    history = {"layer": torch.ones(size, dtype=dtype), "grad_len": {"layer": size}}
    theirs, _ = package.svd.pcgrad_svd(clients, list(updates), history)
    return error(principal_mean({"layer": updates}, keep, torch.ones(1, dtype=torch.bool))["layer"], theirs)


def compare(checkout: Path) -> dict[str, float]:
    """Largest relative errors in float32; where their singular vectors lose more than that, in float64 too."""
    found: dict[str, float] = {}
    with _package(checkout) as package:
        # Margin control.
        torch.manual_seed(0)
        logits, target = torch.randn(50, 3, requires_grad=True), torch.randint(3, (50,))
        theirs = package.fedld.MarginalLogLoss(0.1)(logits, target)
        (grad,) = torch.autograd.grad(theirs, logits)
        mask = torch.ones(50, dtype=torch.bool)
        ours = nn.functional.cross_entropy(logits, target) + 0.1 * margin_penalty(logits, mask)
        found |= {"loss": error(ours, theirs), "loss_gradient": error(torch.autograd.grad(ours, logits)[0], grad)}

        # The paper's network: forward, loss, gradients, weights after a local step. One aggregation. Whole rounds of
        # five clients: a CNN, and one with batch norm, whose statistics go along.
        for label, context in (("", contextlib.nullcontext), ("float64_", float64)):
            with context():
                found |= {f"network_{label}{key}": value for key, value in _network(package).items()}
                for clients, keep in ((2, 0.5), (5, 0.8), (12, 0.8), (5, 1.0)):
                    found[f"aggregate_{label}{clients}_{keep:g}"] = _aggregation(package, clients, keep)
                for name, changes in (("cnn", {}), ("batch_norm", {"norm": "batch"}), ("eval", EVAL)):
                    errors = _rounds(package, _tiny(**changes), 4, SIZES)
                    found |= {f"rounds_{label}{name}_{key}": value for key, value in errors.items()}
    return found


def _network(package: Any) -> dict[str, float]:
    torch.manual_seed(0)
    theirs = package.cnn.ResNet50()
    theirs.fc = nn.Linear(2048, 2)
    hyperparameters, state = FedLD.convert_state_dict(theirs.state_dict())
    ours = FedLD(**hyperparameters, image_size=64, num_clients=2, local_batch=4, warm_up=0)
    ours.load_state_dict(state)
    ours.log = lambda *a, **k: None  # type: ignore[method-assign]
    batch = _round(ours, 0, [4, 4])
    x, y = ours.normalise(batch["image"][:4]), batch["label"][:4]
    theirs.eval()
    found = {"forward": error(ours.eval()(batch["image"][:4]), theirs(x)[1])}
    theirs.train()
    if x.dtype == torch.float32:
        # Ours lays pictures channels last. Batch norm over four of them is so badly conditioned that in float32 another
        # order of sums moves the gradients by a hundredth: both in the same layout; in float64 each in its own.
        x = channels_last(x)
    samples = Samples(ours, batch, [0], local_batches([4, 4], [1, 2], 4, steps=1))
    samples.index = torch.arange(4)[None, None]
    seen: dict[str, Tensor] = {}
    clients = ours.clients(ours.start_state([0], ours.broadcast()), False)
    clients.corrections.append(lambda _, grads: seen.update(grads) or grads)
    logs = ours.work(clients, samples, {})
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.01, momentum=0.5, weight_decay=0.0005)
    loss = package.fedld.MarginalLogLoss(0.1)(theirs(x)[1], y)
    loss.backward()
    found["loss"] = error(logs["loss"][0], loss)
    grads = {n: p.grad for n, p in theirs.named_parameters()}
    found["gradients"] = error(
        torch.cat([seen[n][0].flatten() for n in grads]), torch.cat([g.flatten() for g in grads.values()])
    )
    optimizer.step()
    after = {n: v for n, v in theirs.state_dict().items() if not n.endswith("tracked")}
    found["step"] = error(
        torch.cat([clients.state[n][0].flatten() for n in after]), torch.cat([v.flatten() for v in after.values()])
    )
    return found


def golden(checkout: Path) -> dict[str, Tensor]:
    """Four rounds of five tiny clients, with batch norm: where they begin, and their global weights after each."""
    with _package(checkout) as package:
        ours = _tiny(norm="batch")
        tensors = {f"first.{n}": v.clone() for n, v in ours.model.state_dict().items()}
        for number, state in enumerate(_theirs(package, ours, _Pair(copy.deepcopy(ours.model)), 4, SIZES)):
            tensors |= {f"round{number}.{n}": v for n, v in state.items()}
    return {n: v.detach().clone().contiguous() for n, v in tensors.items()}


# ---- speed -----------------------------------------------------------------------------------------------------------


def speed(checkout: Path | None, device: str = "cpu") -> dict[str, dict[str, float]]:
    """A round of ten tiny clients, and the aggregation alone of five ResNet-50's updates; in turns, medians."""
    found = {}
    with contextlib.ExitStack() as stack:
        package = None
        if checkout is not None and device == "cpu":
            package = stack.enter_context(_package(checkout))
        sizes = [130] * 10
        ours = _tiny(num_clients=10, local_batch=32).to(device)
        begin = copy.deepcopy(ours.state_dict())
        batch = _round(ours, 0, sizes)
        batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}

        def own() -> None:
            ours.load_state_dict(begin)
            ours.training_step(batch, 0)

        sides: dict[str, Callable[[], Any]] = {"ours": own}
        if package is not None:
            sides["authors"] = lambda: _theirs(package, ours, _Pair(copy.deepcopy(ours.model)), 1, sizes)
        found["round_of_10_tiny"] = in_turns(sides, device)

        from torchvision.models import resnet50

        torch.manual_seed(0)
        network = resnet50(num_classes=2).to(device)
        shapes = {n: v.shape for n, v in network.state_dict().items() if v.is_floating_point()}
        updates = {n: torch.randn(5, *shape, device=device) for n, shape in shapes.items()}
        ready = torch.ones(len(updates), dtype=torch.bool, device=device)
        sides = {"ours": lambda: principal_mean(updates, 0.8, ready)}
        if package is not None:
            rows = [torch.cat([v[i].flatten() for v in updates.values()]) for i in range(5)]
            lengths = {n: shape.numel() for n, shape in shapes.items()}

            def authors() -> None:
                history = {n: torch.ones(size) for n, size in lengths.items()} | {"grad_len": lengths}
                package.svd.args.k_proportion = 0.8
                package.svd.pcgrad_svd(5, rows, history)

            sides["authors"] = authors
        found["aggregate_5_resnet50"] = in_turns(sides, device)
    return found
