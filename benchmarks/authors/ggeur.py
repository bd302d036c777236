"""GGEUR beside the authors' code (WeiDai-David/2025CVPR_GGEUR), which are scripts that read and write files."""

import ast
import contextlib
import os
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.measure import error, in_turns
from zoo.core.seeding import seed_from
from zoo.engines.federated import local_batches
from zoo.vision.federated.ggeur import GGEUR, anchors, factor, guide_set

SINGLE, DIGITS, OFFICE = "Single Domian", "Multi Domain/Digits", "Multi Domain/Office-Home-LDS"
STUBS = ("open_clip", "matplotlib", "matplotlib.pyplot", "tqdm", "PIL", "PIL.Image")


def _script(path: Path) -> types.ModuleType:
    """The imports, functions and classes of a script, without what it does at once."""
    for name in STUBS:
        if name not in sys.modules:
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].tqdm = lambda x, **_: x  # type: ignore[attr-defined]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    tree.body = [node for node in tree.body if isinstance(node, kinds)]
    module = types.ModuleType(path.stem)
    exec(compile(tree, str(path), "exec"), module.__dict__)
    return module


@contextlib.contextmanager
def _elsewhere() -> Iterator[Path]:
    """A folder that their scripts may write to, and no word from them."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        os.chdir(folder)
        try:
            yield Path(folder)
        finally:
            os.chdir(before)


# ---- shapes ----------------------------------------------------------------------------------------------------------


def _features(sizes: list[list[int]], width: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Features and labels of clients with so many samples of each class: correlated, classes and clients apart."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for counts in sizes:
        label = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        mix = torch.randn(width, width, generator=generator) / width**0.5
        x = torch.randn(len(label), width, generator=generator) @ mix
        x += torch.randn(len(counts), width, generator=generator)[label] + torch.randn(width, generator=generator)
        order = torch.randperm(len(label), generator=generator)
        found.append((x[order], label[order]))
    return found


def _batch(data: list[tuple[Tensor, Tensor]], seed: int = 0) -> dict[str, Any]:
    clients = list(range(len(data)))
    whole = {"image": torch.cat([x for x, _ in data])[:, :, None, None], "label": torch.cat([y for _, y in data])}
    lists = {"client": clients, "size": [len(x) for x, _ in data], "work": [1.0] * len(data)}
    return {**whole, **lists, "seed": [seed_from(seed, c) for c in clients]}


def _model(width: int, classes: int, clients: int, **changes: Any) -> Any:
    sizes = {"backbone": None, "in_channels": width, "image_size": 1, "num_classes": classes, "num_clients": clients}
    found: Any = GGEUR(**{**sizes, **changes})
    found.logged = {}
    found.log = lambda name, value, **_: found.logged.__setitem__(name, value)
    return found


def _pooled(checkout: Path, data: list[tuple[Tensor, Tensor]], guides: Tensor) -> Tensor:
    """Their covariances by class, from the clients that stand for it."""
    module = _script(checkout / SINGLE / "clip_tensor2aggregate_covariance_matrix.py")
    found: list[Any] = [None] * guides.shape[1]
    with _elsewhere() as folder:
        folders = []
        for client, (x, y) in enumerate(data):
            for c in guides[client].nonzero().flatten().tolist():
                place = folder / f"alpha=0.1_class_{c}_client_{client}"
                place.mkdir()
                np.save(place / "final_embeddings.npy", x[y == c].numpy())
                folders.append(str(place))
        for c in range(guides.shape[1]):
            several = guides[:, c].sum() > 1
            call = module.process_multiple_appearances if several else module.process_single_appearance
            call(c, folders, found)
    return torch.from_numpy(np.stack(found))


SIZES = [[30, 0, 7, 4], [12, 25, 7, 0], [3, 40, 7, 9], [1, 2, 7, 90]]


def _shapes(checkout: Path) -> dict[str, float]:
    """The guide set, the pooled covariances, and the covariance that new samples are drawn with."""
    data = _features(SIZES, 16)
    counts = torch.tensor(SIZES)
    module = _script(checkout / SINGLE / "client-guided_set.py")
    with contextlib.redirect_stdout(None):
        theirs = {
            c: module.analyze_class_distribution(SIZES, 4, int(counts[:, c].sum()), 0.8)[c]
            for c in range(counts.shape[1])
        }
    guides = guide_set(counts, 0.8)
    if any(sorted(theirs[c]) != guides[:, c].nonzero().flatten().tolist() for c in theirs):
        raise AssertionError(f"guide sets differ: theirs {theirs}, ours {guides}")
    ours = _model(16, 4, 4)
    ours.exchange(_batch(data))
    pooled = _pooled(checkout, data, guides)
    found = {"pooled_covariance": error(ours.statistics.covariance.double(), pooled)}
    ours = _model(16, 4, 4).double()
    ours.exchange(_batch([(x.double(), y) for x, y in data]))
    found["pooled_covariance_float64"] = error(
        ours.statistics.covariance, _pooled(checkout, [(x.double(), y) for x, y in data], guides)
    )

    for name, folder, enlarge in (
        ("single", SINGLE + "/cov_matrix_generate_features.py", 0),
        ("digits", DIGITS + "/prototype_cov_matrix_generate_features.py", 10),
        ("office", OFFICE + "/prototype_cov_matrix_generate_features.py", 10),
    ):
        module = _script(checkout / folder)
        module.np = _Numpy()
        worst = 0.0
        for matrix in pooled:
            module.generate_new_samples(np.zeros(16), matrix.numpy(), 1)
            drawn = torch.from_numpy(module.np.random.covariance) - 1e-6 * torch.eye(16)  # their jitter
            own = factor(matrix, enlarge=enlarge, smallest=True)
            worst = max(worst, error(own @ own.mT, drawn))
        found[f"drawn_covariance_{name}_float64"] = worst
    return found


class _Numpy:
    """NumPy whose random part gives the means of what is asked for, and chooses by a permutation of torch's."""

    class random:
        covariance: Any = None
        generator: torch.Generator

        @classmethod
        def multivariate_normal(cls, mean: Any, cov: Any, count: int) -> Any:
            cls.covariance = cov
            return np.repeat(mean[None], count, 0)

        @classmethod
        def choice(cls, count: int, size: int, replace: bool) -> Any:
            return torch.randperm(count, generator=cls.generator)[:size].numpy()

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


# ---- which samples --------------------------------------------------------------------------------------------------


def _single(checkout: Path, x: Tensor, target: int, classes: int, seed: int) -> Tensor:
    """The set of one client and class that theirs writes, each new sample where its anchor is."""
    module = _script(checkout / SINGLE / "cov_matrix_generate_features.py")
    module.np = _Numpy()
    module.np.random.generator = torch.Generator().manual_seed(seed)
    with _elsewhere() as folder:
        place = folder / "initial" / "alpha=0.1_class_0_client_0"
        place.mkdir(parents=True)
        np.save(place / "final_embeddings.npy", x.numpy())
        module.process_class_client(
            0, 0, [np.eye(x.shape[1])], str(folder / "initial"), str(folder / "done"), 0.1, classes, target
        )
        return torch.from_numpy(np.load(folder / "done" / place.name / "final_embeddings_filled.npy"))


def _multi(checkout: Path, script: str, x: Tensor, prototypes: Tensor, per: int, seed: int) -> Tensor:
    module = _script(checkout / script / "prototype_cov_matrix_generate_features.py")
    module.np = _Numpy()
    module.np.random.generator = torch.Generator().manual_seed(seed)
    with contextlib.redirect_stdout(None):
        given = x.numpy(), [np.eye(x.shape[1])], list(prototypes.numpy())
        return torch.from_numpy(np.asarray(module.process_clients(0, 0, *given, per)))


def _ours(x: Tensor, prototypes: Tensor, target: int, seed: int, cap: bool = False, **rule: Any) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    if cap and len(x) >= target:  # theirs draws new samples first, and leaves them
        anchors(len(x), 0, draws, target, prototypes=len(prototypes), **rule)
        return x[torch.randperm(len(x), generator=draws)[:target]]
    which = anchors(len(x), target - len(x), draws, target, prototypes=len(prototypes), **rule)
    return torch.cat([x, torch.cat([x, prototypes])[which]])


def _sets(checkout: Path) -> dict[str, float]:
    """Which samples a filled class has, from the same permutations; new ones stand at their anchors."""
    generator = torch.Generator().manual_seed(1)

    def some(count: int) -> Tensor:
        return torch.randn(count, 10, generator=generator, dtype=torch.float64)

    none, found = some(0), {"single_domain_sets": 0.0, "digits_sets": 0.0, "office_sets": 0.0}
    for classes, target, sizes in ((10, 5000, (1, 9, 10, 37, 2499, 2500, 4999)), (100, 500, (1, 9, 10, 249, 250, 400))):
        for size in sizes:
            x = some(size)
            pair = _ours(x, none, target, size), _single(checkout, x, target, classes, size)
            found["single_domain_sets"] = max(found["single_domain_sets"], error(*pair))
    digits = {"per_anchor": 12, "kept": 500, "per_prototype": 500}
    for size, others in ((42, 3), (60, 3), (300, 3), (1600, 1)):
        x, means = some(size), some(others)
        pair = _ours(x, means, 2000, size, **digits), _multi(checkout, DIGITS, x, means, 12, size)
        found["digits_sets"] = max(found["digits_sets"], error(*pair))
    office = {"per_anchor": 50, "kept": 50, "per_prototype": 50, "cap": True}
    for size, others in ((1, 3), (20, 2), (49, 3), (50, 3), (70, 3)):
        x, means = some(size), some(others)
        pair = _ours(x, means, 50, size, **office), _multi(checkout, OFFICE, x, means, 50, size)
        found["office_sets"] = max(found["office_sets"], error(*pair))
    means = some(3)
    absent = _ours(none, means, 50, 0, **office, first_only=True)
    found["office_sets"] = max(found["office_sets"], error(absent, _multi(checkout, OFFICE, none, means, 50, 0)))
    return found


# ---- training -------------------------------------------------------------------------------------------------------


def _train(
    checkout: Path, ours: Any, data: list[tuple[Tensor, Tensor]], test: tuple[Tensor, Tensor], rounds: int
) -> tuple[dict[str, Tensor], list[float], Any]:
    """Their whole federated loop of the single-domain script, from our head and in the order of our local batches."""
    module = _script(checkout / SINGLE / "FL_MLP_10.py")
    hp = ours.hparams
    start = {"fc3.weight": ours.model.head.weight.detach(), "fc3.bias": ours.model.head.bias.detach()}
    kind = start["fc3.weight"].dtype

    def begin(net: nn.Module, num_classes: int) -> None:
        plain(net, num_classes)
        net.to(kind).load_state_dict(start)

    def loader(dataset: Any, batch_size: int, shuffle: bool) -> Any:
        steps = orders.pop(0) if shuffle else torch.arange(len(dataset)).split(batch_size)
        x, y = torch.as_tensor(dataset.features), torch.as_tensor(dataset.labels)
        return _Loader([(x[rows], y[rows]) for rows in steps], dataset)

    orders: list[Any] = []
    for number in range(rounds):
        batch = _batch(data, number)
        index, mask, _ = local_batches(batch["size"], batch["seed"], hp.local_batch, hp.local_epochs)
        for client, size in enumerate(batch["size"]):
            per = -(-size // hp.local_batch)
            for epoch in range(hp.local_epochs):
                steps = range(epoch * per, (epoch + 1) * per)
                orders.append([index[client, t][mask[client, t]] for t in steps])
    plain, module.MyNet.__init__, module.DataLoader = module.MyNet.__init__, begin, loader
    module.device, module.alpha, module.client_count = torch.device("cpu"), 0.1, len(data)
    given = [(None, None, x.numpy(), y.numpy()) for x, y in data]
    with _elsewhere() as folder:
        (folder / "CIFAR-10/features/alpha=0.1_model").mkdir(parents=True)
        found, accuracies = module.federated_train_and_evaluate_augmented(
            given, test[0], test[1], rounds, hp.local_epochs, hp.local_batch, hp.lr
        )
    return found.state_dict(), accuracies, module


class _Loader(list):
    def __init__(self, batches: list[Any], dataset: Any):
        super().__init__(batches)
        self.dataset = dataset


def _heads(
    checkout: Path, kind: torch.dtype, rounds: int = 3
) -> tuple[Any, dict[str, Tensor], Any, Any, dict[str, Any]]:
    """Our rounds and theirs on the same features of 512 numbers."""
    torch.manual_seed(0)
    data = [(x.to(kind), y) for x, y in _features([[9, 5, 0], [2, 0, 13], [0, 8, 4]], 512, seed=2)]
    test = tuple(torch.cat(parts) for parts in zip(*data, strict=True))
    plain = {"geometry": "off", "local_batch": 8, "local_epochs": 2}
    ours = _model(512, 10, 3, **plain, authors_softmax=True, authors_no_broadcast=True).to(kind)
    start = {k: v.detach().clone() for k, v in ours.model.state_dict().items()}
    theirs, accuracies, _ = _train(checkout, ours, data, test, rounds)  # type: ignore[arg-type]
    for number in range(rounds):
        ours.training_step(_batch(data, number), 0)
    return ours, theirs, accuracies, data, start


def compare(checkout: Path) -> dict[str, float]:
    """Largest relative errors: statistics, shapes, which samples are drawn, and heads after whole rounds."""
    found = {**_shapes(checkout), **_sets(checkout)}
    for kind, name in ((torch.float32, ""), (torch.float64, "_float64")):
        ours, theirs, accuracies, data, start = _heads(checkout, kind)
        moved = {k: theirs[f"fc3.{k}"] - start[f"head.{k}"] for k in ("weight", "bias")}
        for key, way in moved.items():
            own = ours.model.state_dict()[f"head.{key}"]
            found[f"three_rounds_{key}{name}"] = error(own, theirs[f"fc3.{key}"])
            if kind == torch.float64:  # Adam divides by the gradient's size: float32 shows its rounding
                found[f"three_rounds_{key}_way{name}"] = error(own - start[f"head.{key}"], way)
        x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
        right = float((ours.eval()(x[:, :, None, None]).argmax(1) == y).double().mean())
        if abs(100 * right - accuracies[-1]) > 1e-9:
            raise AssertionError(f"accuracy after three rounds: theirs {accuracies[-1]}, ours {100 * right}")
    return found


def golden(checkout: Path) -> dict[str, Tensor]:
    """Features of four clients with their pooled covariances, and three clients' heads after three rounds."""
    data = _features(SIZES, 16)
    guides = guide_set(torch.tensor(SIZES), 0.8)
    tensors = {"shapes.covariance": _pooled(checkout, data, guides).float(), "shapes.guides": guides}
    for i, (x, y) in enumerate(data):
        tensors |= {f"shapes.image.{i}": x, f"shapes.label.{i}": y}
    _, theirs, _, data, start = _heads(checkout, torch.float32)
    tensors |= {"start.weight": start["head.weight"], "start.bias": start["head.bias"]}
    tensors |= {"after.weight": theirs["fc3.weight"], "after.bias": theirs["fc3.bias"]}
    for i, (x, y) in enumerate(data):
        tensors |= {f"image.{i}": x, f"label.{i}": y}
    x = torch.randn(30, 10, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    means = torch.randn(3, 10, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    tensors |= {"sets.own": x, "sets.means": means}
    tensors["sets.single"] = _single(checkout, x, 500, 100, 3)[30:]
    tensors["sets.office"] = _multi(checkout, OFFICE, x, means, 50, 3)
    return {k: v.detach().clone().contiguous() for k, v in tensors.items()}


# ---- speed -----------------------------------------------------------------------------------------------------------


def speed(checkout: Path | None, device: str = "cpu") -> dict[str, dict[str, float]]:
    """One class of a client filled from 5 samples to 500 of 512 numbers, the pooled covariance of two classes of four
    clients, and a round of ten clients with 200 samples each. What NumPy holds is not in the allocator's records, so
    that their memory is left out of the first two."""
    found: dict[str, dict[str, float]] = {}
    (x, y), *_ = _features([[5]], 512)
    covariance = torch.cov(torch.randn(600, 512, generator=torch.Generator().manual_seed(0)).T, correction=0)
    ours = _model(512, 1, 1, target=500).to(device)
    ours.statistics.covariance.copy_(covariance[None])
    own = x.to(device), y.to(device)

    def fill() -> None:
        ours._factors = None  # the factor is counted too, which a client computes once for all rounds
        ours.fill(*own, client=0, seed=0)

    sides: dict[str, Callable[[], Any]] = {"ours": fill}
    if checkout is not None and device == "cpu":
        module = _script(checkout / SINGLE / "cov_matrix_generate_features.py")
        sides["authors"] = lambda: _filled(module, x, covariance)
    found["fill_5_to_500"] = in_turns(sides, device)
    found["fill_5_to_500"].pop("authors_mib", None)

    data = _features([[200, 100]] * 4, 512)
    batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in _batch(data).items()}

    def pooled() -> None:
        _model(512, 2, 4, guide=1.0).to(device).exchange(batch)

    sides = {"ours": pooled}
    if checkout is not None and device == "cpu":
        sides["authors"] = lambda: _pooled(checkout, data, torch.ones(4, 2, dtype=torch.bool))
    found["pool_4_clients"] = in_turns(sides, device)
    found["pool_4_clients"].pop("authors_mib", None)

    data = _features([[20] * 10] * 10, 512)
    test = tuple(part[:64] for part in data[0])
    head = _model(512, 10, 10, geometry="off", local_epochs=2, authors_softmax=True).to(device)
    batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in _batch(data).items()}
    sides = {"ours": lambda: head.training_step(batch, 0)}
    if checkout is not None and device == "cpu":
        sides["authors"] = lambda: _train(checkout, head, data, test, 1)  # type: ignore[arg-type]
    found["round_of_10_clients"] = in_turns(sides, device)
    return found


def _filled(module: Any, x: Tensor, covariance: Tensor) -> None:
    with _elsewhere() as folder:
        place = folder / "initial" / "alpha=0.1_class_0_client_0"
        place.mkdir(parents=True)
        np.save(place / "final_embeddings.npy", x.numpy())
        given = str(folder / "initial"), str(folder / "done")
        module.process_class_client(0, 0, [covariance.numpy()], *given, 0.1, 100, 500)
