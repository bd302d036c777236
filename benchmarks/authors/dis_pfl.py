"""DisPFL beside the authors' code (rong-dai/DisPFL): whole rounds of their API, on the same batches and peers."""

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.measure import error, float64, in_turns
from zoo.core.seeding import seed_from
from zoo.engines.federated import Samples, local_batches
from zoo.vision.federated.dis_pfl import DisPFL, layer_densities

TINY = {"num_classes": 5, "in_channels": 2, "lr": 0.1, "rounds": 4, "num_clients": 4, "peers": 2, "local_epochs": 2}
SIZES = [9, 14, 5, 11]


class _Silent:
    """Their logger, which they hand around."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *a, **k: None


@contextlib.contextmanager
def _package(checkout: Path) -> Iterator[Any]:
    """Their package, importable and gone afterwards."""
    before = set(sys.modules)
    sys.path.insert(0, str(checkout))
    try:
        from fedml_api.model.cv import resnet
        from fedml_api.standalone.DisPFL import dispfl_api, my_model_trainer

        yield SimpleNamespace(api=dispfl_api, trainer=my_model_trainer, resnet=resnet)
    finally:
        sys.path.remove(str(checkout))
        for name in set(sys.modules) - before:
            if name.split(".")[0] in ("fedml_api", "fedml_core"):
                del sys.modules[name]


def _arguments(ours: DisPFL, **changes: Any) -> SimpleNamespace:
    """Their command's arguments; each round's batches come as one list, one epoch."""
    hp = ours.hparams
    given = {
        "client_optimizer": "sgd", "lr": hp.lr, "lr_decay": hp.lr_decay, "momentum": hp.momentum, "wd": hp.weight_decay,
        "epochs": 1, "batch_size": hp.local_batch, "client_num_in_total": hp.num_clients, "comm_round": hp.rounds,
        "client_num_per_round": hp.peers, "dense_ratio": 0.5, "anneal_factor": hp.anneal, "cs": "random", "active": 1.0,
        "erk_power_scale": hp.erk_power, "dis_gradient_check": hp.regrow == "random", "static": not hp.evolve,
        "uniform": False, "different_initial": True, "diff_spa": False, "save_masks": False, "record_mask_diff": False,
        "ci": 0, "dataset": "cifar10",
    }  # fmt: skip
    return SimpleNamespace(**{**given, **changes})


def _round(ours: DisPFL, number: int, sizes: list[int] = SIZES) -> dict[str, Any]:
    """A round's batch as our DataModule gives it."""
    generator = torch.Generator().manual_seed(seed_from("data"))
    hp, total = ours.hparams, sum(sizes)
    image = torch.rand(total, hp.in_channels, hp.image_size, hp.image_size, generator=generator)
    label = torch.randint(hp.num_classes, (total,), generator=generator)
    clients = list(range(len(sizes)))
    seeds = [seed_from(number, client) for client in clients]
    batch = {"image": image.to(torch.get_default_dtype()), "label": label, "client": clients, "size": sizes}
    return {**batch, "work": [1.0] * len(sizes), "seed": seeds}


class _Batches:
    """Their loader of one client: each pass gives the next list of batches that ours went through."""

    def __init__(self, ours: DisPFL, client: int, rounds: int, sizes: list[int]):
        self.lists, hp = [], ours.hparams
        for number in range(rounds):
            batch = _round(ours, number, sizes)
            plan = local_batches(batch["size"], batch["seed"], hp.local_batch, epochs=hp.local_epochs)
            self.lists.append(self._list(ours, batch, client, plan))
            seeds = [seed_from(seed, "screen") for seed in batch["seed"]]
            if hp.evolve and hp.regrow == "gradient":
                plan = local_batches(batch["size"], seeds, hp.local_batch, steps=1)
                self.lists.append(self._list(ours, batch, client, plan))
        self.dataset = range(sizes[client])

    @staticmethod
    def _list(ours: DisPFL, batch: dict[str, Any], client: int, plan: Any) -> list[tuple[Tensor, Tensor]]:
        found = []
        for _, one in Samples(ours, batch, [client], plan):
            mask = one["mask"][0]
            found.append((ours.normalise(one["image"])[0][mask], one["label"][0][mask]))
        return found

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.lists.pop(0))


def _tiny(**changes: Any) -> DisPFL:
    torch.manual_seed(0)
    ours = DisPFL.from_variant("tiny", **{**TINY, "local_batch": 4, **changes}).to(torch.get_default_dtype())
    ours.log = lambda *a, **k: None  # type: ignore[method-assign]
    return ours


def _theirs(package: Any, ours: DisPFL, rounds: int, sizes: list[int] = SIZES) -> dict[str, Any]:
    """Their API over some rounds from our masks and weights, with the peers that ours draws.

    Returns:
        each client's weights, the mask they were trained under, and the next one, each by name (K, ...).
    """
    args = _arguments(ours)
    trainer = package.trainer.MyModelTrainer(copy.deepcopy(ours.model), args, _Silent())
    trainer.count_training_flops_per_sample = trainer.count_full_flops_per_sample = lambda: 0
    count = len(sizes)
    masks = ours.states.read(range(count), "masks.")
    start = iter([{n: m[k].to(ours.model.state_dict()[n]) for n, m in masks.items()} for k in range(count)])
    trainer.init_masks = lambda params, sparsities: next(start)
    loaders = {k: _Batches(ours, k, rounds, sizes) for k in range(count)}
    test = {k: [(torch.zeros(1, *ours.example_inputs()[0].shape[1:]), torch.zeros(1).long())] for k in range(count)}
    data = [0, 0, [], [], dict(enumerate(sizes)), loaders, test, [[0]]]
    api = package.api.dispflAPI(data, "cpu", args, trainer, _Silent())
    peers = [ours.neighbours(_round(ours, number, sizes)) for number in range(rounds)]
    api._benefit_choose = lambda number, client, *a, **k: peers[number][client][1:]
    seen: dict[int, Any] = {}
    for client in api.client_list:
        train = client.train

        def noted(w: Any, m: Any, number: int, train: Any = train, k: int = client.client_idx) -> Any:
            found = train(w, m, number)
            seen[k] = (found[1], copy.deepcopy(m), found[0])
            return found

        client.train = noted
    draws: list[Tensor] = []
    if ours.hparams.regrow == "random":
        for number in range(rounds):
            batch = _round(ours, number, sizes)
            for k in range(count):
                generator = torch.Generator().manual_seed(seed_from(batch["seed"][k], "regrow"))
                draws += [torch.rand(m.shape[1:], generator=generator).flatten() for m in masks.values()]

    def drawn(candidates: Tensor, number: int, replacement: bool = False) -> Tensor:
        return torch.where(candidates > 0, draws.pop(0), -1.0).topk(number).indices

    args.comm_round, schedule = rounds, args.comm_round
    fire = package.api.Client.fire_mask

    def scheduled(self: Any, masks: Any, weights: Any, number: int) -> Any:
        self.args = SimpleNamespace(**{**vars(args), "comm_round": schedule})
        found = fire(self, masks, weights, number)
        self.args = args
        return found

    with mock.patch.object(torch, "multinomial", drawn), mock.patch.object(package.api.Client, "fire_mask", scheduled):
        api.train()
    names = list(masks)
    stacked = [{n: torch.stack([seen[k][part][n] for k in range(count)]) for n in names} for part in range(3)]
    return dict(zip(("weights", "shared", "masks"), stacked, strict=True))


def _rounds(package: Any, rounds: int = 3, **changes: Any) -> dict[str, float]:
    """Errors of weights and share of different mask entries after some rounds."""
    ours = _tiny(**changes)
    theirs = _theirs(package, ours, rounds)
    for number in range(rounds):
        ours.training_step(_round(ours, number), 0)
    return _compare(ours, theirs)


def _compare(ours: DisPFL, theirs: dict[str, Any]) -> dict[str, float]:
    everyone = range(ours.hparams.num_clients)
    weights = ours.states.read(everyone, "personal.")
    found = {"weights": max(error(weights[n], value) for n, value in theirs["weights"].items())}
    for kind in ("shared", "masks"):
        own = ours.states.read(everyone, f"{kind}.")
        found[kind] = max(float((own[n] != (value != 0)).float().mean()) for n, value in theirs[kind].items())
    return found


def compare(checkout: Path) -> dict[str, float]:
    """Largest relative errors in float32; of masks the share of entries that differ."""
    found: dict[str, float] = {}
    with _package(checkout) as package:
        # How dense each tensor is, at the paper's size and at others.
        network = package.resnet.customized_resnet18()
        shapes = {n: tuple(p.shape) for n, p in network.named_parameters()}
        args = SimpleNamespace(erk_power_scale=1.0)
        trainer = package.trainer.MyModelTrainer(network, args, _Silent())
        worst = ones = 0.0
        for density in (0.2, 0.4, 0.5, 0.6, 0.8):
            theirs = trainer.calculate_sparsities(dict(network.named_parameters()), sparse=density)
            own = layer_densities(shapes, density)
            worst = max(worst, *(abs(own[n] - (1 - theirs[n])) for n in shapes))
            masks = trainer.init_masks(dict(network.named_parameters()), theirs)
            for n, m in masks.items():
                ones = max(ones, abs(int(m.sum()) - int(own[n] * m.numel())) / m.numel())
        found |= {"densities": worst, "mask_sizes": ones}

        # The paper's network: forward, loss, gradients, one step of one client within its mask.
        # torch's float32 norm of so many gradients, which they clip by, is itself off by 1e-4: the step in float64.
        found |= {f"network_{key}": value for key, value in _network(package).items() if key != "step"}
        with float64():
            found["network_float64_step"] = _network(package)["step"]

        # Whole rounds: sparse models among random peers, regrown by gradient or at random; frozen masks; full and ring.
        for label, changes in (
            ("gradient", {}),
            ("random", {"regrow": "random"}),
            ("static", {"evolve": False}),
            ("ring", {"topology": "ring"}),
            ("capacities", {"density": [0.3, 0.6, 0.8, 1.0]}),
            ("momentum", {"momentum": 0.9}),
        ):
            found |= {f"rounds_{label}_{key}": value for key, value in _rounds(package, **changes).items()}
    return found


def _network(package: Any) -> dict[str, float]:
    torch.manual_seed(0)
    theirs = package.resnet.customized_resnet18()
    trainer = package.trainer.MyModelTrainer(theirs, SimpleNamespace(erk_power_scale=1.0), _Silent())
    shares = trainer.calculate_sparsities(trainer.get_trainable_params(), sparse=0.5)
    mask = {n: m.detach() for n, m in trainer.init_masks(trainer.get_trainable_params(), shares).items()}
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            p.mul_(mask[n])
    arguments = {"w_per_mdls": [copy.deepcopy(theirs.state_dict())] * 2, "mask_pers": [mask] * 2}
    hyperparameters, state = DisPFL.convert_state_dict(arguments)
    ours = DisPFL(**hyperparameters, local_batch=4, local_epochs=1, augment=[], topology="full")
    ours = ours.to(torch.get_default_dtype())
    ours.load_state_dict(state)
    ours.log = lambda *a, **k: None  # type: ignore[method-assign]
    sizes = [8, 4]
    batch = _round(ours, 0, sizes)
    x, y = ours.normalise(batch["image"][:4]), batch["label"][:4]
    output = theirs(x)
    found = {"forward": error(ours(batch["image"][:4], 0), output)}
    nn.functional.cross_entropy(output, y).backward()
    samples = Samples(ours, batch, [0], local_batches([8, 4], [1, 2], 4, steps=1))
    samples.index, samples.mask = torch.arange(4)[None, None], torch.ones(1, 1, 4, dtype=torch.bool)
    seen: dict[str, Tensor] = {}
    clients = ours.clients(ours.start_state([0], {}), False)
    clients.corrections.insert(0, lambda _, grads: seen.update(grads) or grads)
    logs = ours.work(clients, samples, {})
    found["loss"] = error(logs["loss"][0], nn.functional.cross_entropy(output, y))
    names = dict(zip((n for n, _ in ours.model.named_parameters()), theirs.named_parameters(), strict=True))
    found["gradients"] = max(error(seen[n][0], p.grad) for n, (_, p) in names.items())
    args = _arguments(ours)
    stepping = package.trainer.MyModelTrainer(theirs, args, _Silent())
    stepping.set_masks(mask)
    stepping.train([(x, y)], "cpu", args, 0)
    found["step"] = max(error(clients.state[n][0], p) for n, (_, p) in names.items())
    return found


def golden(checkout: Path) -> dict[str, Tensor]:
    """Three rounds of four tiny clients: where they begin, and what their code makes of it."""
    tensors: dict[str, Tensor] = {}
    with _package(checkout) as package:
        for label, changes in (("gradient", {}), ("random", {"regrow": "random"})):
            ours = _tiny(net={"name": "cnn", "widths": [4, 6], "features": 12}, **changes)
            if label == "gradient":
                everyone = range(len(SIZES))
                for kind in ("personal", "masks"):
                    tensors |= {f"first.{kind}.{n}": v for n, v in ours.states.read(everyone, f"{kind}.").items()}
            for kind, values in _theirs(package, ours, 3).items():
                tensors |= {f"{label}.{kind}.{n}": v if kind == "weights" else v != 0 for n, v in values.items()}
    return {n: v.detach().clone().contiguous() for n, v in tensors.items()}


# ---- speed -----------------------------------------------------------------------------------------------------------


def speed(checkout: Path | None, device: str = "cpu") -> dict[str, dict[str, float]]:
    """A round, in turns, medians: ten tiny clients on 8 x 8 pictures; two of the paper's ResNet-18, a batch each."""
    found = {}
    for label, build, sizes in (
        ("round_of_10_tiny", lambda: _tiny(num_clients=10, peers=3, local_batch=32, local_epochs=2), [130] * 10),
        ("round_of_2_paper", lambda: _paper(), [8, 8]),
    ):
        ours = build().to(device)
        begin = copy.deepcopy(ours.state_dict())
        batch = _round(ours, 0, sizes)
        batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}

        def own(ours: DisPFL = ours, begin: Any = begin, batch: Any = batch) -> None:
            ours.load_state_dict(begin)
            ours.training_step(batch, 0)

        sides: dict[str, Callable[[], Any]] = {"ours": own}
        with contextlib.ExitStack() as stack:
            if checkout is not None and device == "cpu":
                package = stack.enter_context(_package(checkout))
                sides["authors"] = lambda package=package, ours=ours, sizes=sizes: _theirs(package, ours, 1, sizes)
            found[label] = in_turns(sides, device)
    return found


def _paper() -> DisPFL:
    torch.manual_seed(0)
    ours = DisPFL(num_clients=2, local_batch=8, local_epochs=1, augment=[])
    ours.log = lambda *a, **k: None  # type: ignore[method-assign]
    return ours
