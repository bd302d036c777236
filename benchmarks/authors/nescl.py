"""NESCL beside the authors' code (there SUPCCL, on a fork of RecBole): losses, propagation, neighbours, one step.

Only their model file and RecBole's initialisation and losses run; RecBole's base class, its Cython sampler and its
data classes are small stand-ins. What they draw at random (dropped nodes and edges, neighbours) is recorded and given
to ours.
"""

import importlib.util
import multiprocessing
import resource
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn

from benchmarks.measure import timed
from zoo.graph.recommendation.nescl import NESCL, View, most_similar, propagate

NAMES = {"user": "user_id", "item": "item_id"}


class _Recommender(nn.Module):
    """What SUPCCL takes from RecBole's base class: column names, sizes, device."""

    def __init__(self, config: dict[str, Any], dataset: Any):
        super().__init__()
        self.USER_ID, self.ITEM_ID, self.NEG_ITEM_ID = "user_id", "item_id", "neg_item_id"
        self.n_users, self.n_items = dataset.num("user_id"), dataset.num("item_id")
        self.device = config["device"]


class _Dataset:
    """Interactions as RecBole's dataset offers them to a model."""

    def __init__(self, pairs: Tensor, users: int, items: int):
        self.pairs, self.sizes = pairs.numpy(), {"user_id": users, "item_id": items}
        self.inter_feat = self

    def num(self, name: str) -> int:
        return self.sizes[name]

    def numpy(self) -> dict[str, np.ndarray]:
        return {"user_id": self.pairs[0], "item_id": self.pairs[1]}

    def inter_matrix(self, form: str) -> Any:
        ones = np.ones(self.pairs.shape[1], dtype=np.float32)
        return sp.csr_matrix((ones, tuple(self.pairs)), shape=tuple(self.sizes.values()))


def _load(name: str, path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def authors(checkout: Path) -> types.ModuleType:
    """Their model file, with the dropped nodes and edges recorded in ``dropped``."""
    if "recbole.model.general_recommender.supccl" in sys.modules:
        return sys.modules["recbole.model.general_recommender.supccl"]
    for name in (
        "recbole",
        "recbole.model",
        "recbole.util",
        "recbole.util.cython",
        "recbole.model.general_recommender",
    ):
        sys.modules[name] = types.ModuleType(name)
    base = types.ModuleType("recbole.model.abstract_recommender")
    base.GeneralRecommender = _Recommender  # type: ignore[attr-defined]
    utils = types.ModuleType("recbole.utils")
    utils.InputType = types.SimpleNamespace(PAIRWISE=2)  # type: ignore[attr-defined]
    choice = types.ModuleType("recbole.util.cython.random_choice")
    dropped: list[np.ndarray] = []

    def randint_choice(high: int, size: float, replace: bool) -> np.ndarray:
        dropped.append(np.random.choice(high, int(size), replace=replace))
        return dropped[-1]

    choice.randint_choice = randint_choice  # type: ignore[attr-defined]
    sys.modules |= {m.__name__: m for m in (base, utils, choice)}
    for name in ("init", "loss"):
        _load(f"recbole.model.{name}", checkout / "recbole" / "model" / f"{name}.py")
    module = _load(
        "recbole.model.general_recommender.supccl",
        checkout / "recbole" / "model" / "general_recommender" / "supccl.py",
    )
    module.dropped = dropped  # type: ignore[attr-defined]
    module.tqdm = lambda x: x  # type: ignore[attr-defined]
    return module


def _config(hp: dict[str, Any], pool: int, device: str = "cpu") -> dict[str, Any]:
    """Their configuration for our hyperparameters."""
    positives = hp["positives"]
    flags = dict.fromkeys(
        ("interacted_neighbors", "similar_user_neighbors", "similar_item_neighbors", "different_view"), True
    )
    weights = dict.fromkeys(
        ("different_view_weight", "interacted_neighbors_weight", "sample_item_weight", "sample_user_weight"), 1.0
    )
    return {
        **flags,
        **weights,
        "embedding_size": hp["dim"],
        "n_layers": hp["layers"],
        "reg_weight": hp["regulariser"],
        "ssl_ratio": hp["drop"],
        "ssl_temp": hp["temperature"],
        "ssl_reg": hp["weight"],
        "ssl_mode": 3,
        "aug_type": {"node": 0, "edge": 1, "walk": 2}[hp["augmentation"]],
        "use_gpu": device != "cpu",
        "device": device,
        "USER_ID_FIELD": "user_id",
        "ITEM_ID_FIELD": "item_id",
        "ssl_strategy": 9 if len(positives) == 3 else 0,
        "positive_cl_type": {"per_positive": 1, "mean_then_log": 2}[hp["variant"]],
        "train_neg_sample_args": {"by": 1},
        "lightgcn_flag": not positives,
        "pairwise_loss": hp["bpr"],
        "random_strategy": True,
        "augmentation": bool(positives),
        "add_initial_embedding": hp["initial_embedding"],
        "sample_item_weight_flag": False,
        "sample_user_weight_flag": False,
        "supcon_flag": hp["anchor_first"],
        "prob_sampling": hp["neighbour_sampling"] == "similarity",
        "sub_graph_pool": pool,
        "k": hp["neighbours"],
    }


def _graph(users: int, items: int, mean: int, seed: int) -> Tensor:
    """Random interactions with popular items, sorted, every user and item at least once."""
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.arange(items) + 5.0) ** -0.5
    drawn = torch.multinomial(weight.expand(users, -1), mean, generator=generator)
    pairs = torch.stack([torch.arange(users).repeat_interleave(mean), drawn.flatten()])
    every = torch.stack([torch.arange(items) % users, torch.arange(items)])
    key = torch.cat([pairs[0] * items + pairs[1], every[0] * items + every[1]]).unique()
    return torch.stack([key // items, key % items])


def _pair(
    module: types.ModuleType, pairs: Tensor, users: int, items: int, pool: int, **overrides: Any
) -> tuple[Any, NESCL]:
    """Both models with the same weights."""
    torch.manual_seed(0)
    np.random.seed(0)
    ours = NESCL(num_users=users, num_items=items, num_interactions=pairs.shape[1], **overrides).set_graph(pairs)
    module.dropped.clear()
    theirs = module.SUPCCL(_config(ours.hyperparameters, pool), _Dataset(pairs, users, items))
    with torch.no_grad():
        theirs.user_embedding.weight.copy_(ours.user_embedding.weight)
        theirs.item_embedding.weight.copy_(ours.item_embedding.weight)
    return theirs, ours


def _views(module: types.ModuleType, ours: NESCL) -> list[View]:
    """Their stored sub-graphs as our views."""
    graph, made = ours.bipartite, []
    draws = iter(module.dropped)
    for first in draws:
        if ours.hyperparameters["augmentation"] == "node":
            mask = torch.ones(graph.size)
            mask[torch.from_numpy(first)] = 0
            mask[torch.from_numpy(next(draws)) + graph.users] = 0
            made.append(View(graph, node=mask))
        else:
            keep = torch.zeros(graph.interactions.shape[1])
            keep[torch.from_numpy(first)] = 1
            made.append(View(graph, keep=keep))
    return made


def _align(module: types.ModuleType, theirs: Any, ours: NESCL) -> None:
    """Give ours the views, and later the neighbours, that theirs draws."""
    hp = ours.hyperparameters
    if not hp["positives"]:
        return
    views = _views(module, ours)
    order = iter([(2 * i, 2 * i + 1) for i in range(len(views) // 2)] * 100)
    theirs.sample_subgraph_idx = lambda: tuple(theirs.sub_mat_dict[i] for i in next(order))
    layers = range(hp["layers"])
    chosen = [(2 * i, 2 * i + 1) if hp["augmentation"] == "walk" else (0, 1) for i in layers]
    ours.views = lambda: [[ours.whole(), views[a], views[b]] for a, b in chosen]  # type: ignore[method-assign]
    drawn: list[int] = []
    sample = theirs.neighbor_sample

    def recorded(near: Any, weight: Any) -> Any:
        found, value = sample(near, weight)
        drawn.append(int(found))
        return found, value

    theirs.neighbor_sample = recorded

    def neighbour(node: Tensor) -> Tensor:
        offset = (node >= ours.bipartite.users) * ours.bipartite.users
        return torch.tensor(drawn[-len(node) :]) + offset

    ours.neighbour = neighbour  # type: ignore[method-assign]


def _batch(pairs: Tensor, items: int, size: int, seed: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    user, item = pairs[:, torch.randint(pairs.shape[1], (size,), generator=generator)]
    return {"user": user, "item": item, "negative": torch.randint(items, (size,), generator=generator)}


def _theirs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"user_id": batch["user"], "item_id": batch["item"], "neg_item_id": batch["negative"]}


def _without_views(theirs: Any) -> Any:
    """Their propagation through the whole graph alone, which draws nothing."""
    theirs.augmentation, kept = False, theirs.augmentation
    try:
        return theirs.forward()
    finally:
        theirs.augmentation = kept


def _error(a: Tensor, b: Tensor) -> float:
    return float((a.detach() - b.detach()).abs().max() / b.detach().abs().max())


CASES: dict[str, dict[str, Any]] = {
    "nescl mean_then_log": {},
    "nescl per_positive": {"variant": "per_positive"},
    "nescl mean_then_log, anchor first": {"anchor_first": True},
    "nescl per_positive, anchor first": {"variant": "per_positive", "anchor_first": True},
    "nescl edge": {"augmentation": "edge"},
    "nescl walk": {"augmentation": "walk"},
    "nescl initial embedding": {"initial_embedding": True, "augmentation": "edge"},
    "nescl amazon-book": {
        **NESCL.variants["amazon-book"],
        "authors_constant_regulariser": True,
    },
    "sgl": {"positives": ["self"]},
    "lightgcn": {"positives": []},
}
for _case in CASES.values():
    for _size in ("num_users", "num_items", "num_interactions"):
        _case.pop(_size, None)
USERS, ITEMS, MEAN = 60, 50, 6


def _run(module: types.ModuleType, case: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """(ours, theirs) of everything that a step computes."""
    pairs = _graph(USERS, ITEMS, MEAN, seed=1)
    walk = case.get("augmentation") == "walk"
    theirs, ours = _pair(module, pairs, USERS, ITEMS, pool=6 if walk else 2, dim=16, **case)
    _align(module, theirs, ours)
    batch = _batch(pairs, ITEMS, 32)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    with torch.no_grad():
        found["propagation"] = (ours.embeddings(), torch.cat(_without_views(theirs)))
    optimisers = [torch.optim.Adam(theirs.parameters(), lr=1e-3), ours.configure_optimizers()]
    loss, bpr, contrast = theirs.calculate_loss(_theirs(batch), 0, 0)
    parts = ours.losses(batch)
    found["loss"] = (parts["loss"], loss.reshape(()))
    found["bpr"] = (parts["bpr"], bpr)
    if ours.hyperparameters["positives"]:
        found["contrast"] = (ours.hyperparameters["weight"] * parts["contrast"], contrast)
    loss.backward()
    parts["loss"].backward()
    for side in ("user", "item"):
        a, b = getattr(ours, f"{side}_embedding").weight, getattr(theirs, f"{side}_embedding").weight
        found[f"{side} gradient"] = (a.grad, b.grad)
    for optimiser in optimisers:
        optimiser.step()
    for side in ("user", "item"):
        a, b = getattr(ours, f"{side}_embedding").weight, getattr(theirs, f"{side}_embedding").weight
        # the first step of Adam is lr * sign(gradient): rounding decides where a gradient is all but zero
        sure = b.grad.abs() > 1e-4 * b.grad.abs().max()
        found[f"{side} step"] = (a * sure, b * sure)
    return found


def compare(checkout: Path) -> dict[str, float]:
    """Largest relative errors by figure, over all cases; and case by case for the loss."""
    module = authors(checkout)
    worst: dict[str, float] = {}
    for name, case in CASES.items():
        for figure, (a, b) in _run(module, case).items():
            error = _error(a, b)
            worst[figure] = max(worst.get(figure, 0.0), error)
            if figure == "loss":
                worst[f"loss, {name}"] = error
    worst["neighbours"] = _neighbours(module)
    return worst


def _neighbours(module: types.ModuleType) -> float:
    """Relative error of the k best similarities; the nodes themselves must agree, less ties for the last."""
    pairs = _graph(USERS, ITEMS, MEAN, seed=1)
    theirs, ours = _pair(module, pairs, USERS, ITEMS, pool=2, dim=16)
    worst = 0.0
    for side, offset, size in (("user", 0, USERS), ("item", USERS, ITEMS)):
        lists = getattr(theirs, f"{side}_similar_neighbors_mat")
        weights = getattr(theirs, f"{side}_similar_neighbors_weights_mat")
        for node in range(size):
            n = int(ours.bipartite.count[offset + node])
            mine = ours.bipartite.similarity[offset + node, :n]
            if len(weights[node]) != n:
                return float("inf")
            value = torch.tensor(np.asarray(weights[node]), dtype=torch.float32)
            worst = max(worst, _error(mine, value))
            # among equal similarities, above all the last, theirs takes any
            sure = int((mine > mine[-1] + 1e-6).sum()) if n == ours.bipartite.neighbours.shape[1] else n
            near = (ours.bipartite.neighbours[offset + node, :sure] - offset).tolist()
            if sorted(near) != sorted(map(int, lists[node][:sure])):
                return float("inf")
    return worst


def golden(checkout: Path) -> dict[str, Tensor]:
    """Inputs, weights, draws and the authors' results of every case, on a graph of 60 users and 50 items."""
    module = authors(checkout)
    pairs = _graph(USERS, ITEMS, MEAN, seed=1)
    batch = _batch(pairs, ITEMS, 32)
    out: dict[str, Tensor] = {"interactions": pairs, **{f"batch.{k}": v for k, v in batch.items()}}
    for name, case in CASES.items():
        walk = case.get("augmentation") == "walk"
        theirs, ours = _pair(module, pairs, USERS, ITEMS, pool=6 if walk else 2, dim=8, **case)
        _align(module, theirs, ours)
        out.setdefault("user", theirs.user_embedding.weight.detach().clone())
        out.setdefault("item", theirs.item_embedding.weight.detach().clone())
        if ours.hyperparameters["positives"]:
            views = _views(module, ours)
            key = "node" if ours.hyperparameters["augmentation"] == "node" else "keep"
            made = [(v.scale > 0) if key == "node" else v.keep.bool() for v in views]
            out[f"{name}.{key}"] = torch.stack(made)
            if key == "node":  # a scale is also 0 where a node lost all its neighbours; the mask says what was dropped
                out[f"{name}.node"] = _masks(module, ours)
        loss, bpr, contrast = theirs.calculate_loss(_theirs(batch), 0, 0)
        loss.backward()
        if len(ours.hyperparameters["positives"]) == 3:
            anchor = torch.cat([batch["user"], batch["item"] + USERS])
            out[f"{name}.neighbour"] = ours.neighbour(anchor)
        out[f"{name}.loss"] = torch.stack([loss.reshape(()), bpr, contrast.reshape(())]).detach()
        out[f"{name}.user_gradient"] = theirs.user_embedding.weight.grad.clone()
        out[f"{name}.item_gradient"] = theirs.item_embedding.weight.grad.clone()
        if name.startswith("nescl mean_then_log") and "anchor" not in name:
            out["similarity"] = _padded(theirs)
        with torch.no_grad():
            out[f"{name}.propagation"] = torch.cat(_without_views(theirs))
    return {k: v.contiguous() for k, v in out.items()}


def _masks(module: types.ModuleType, ours: NESCL) -> Tensor:
    masks = torch.ones(len(module.dropped) // 2, ours.bipartite.size, dtype=torch.bool)
    for i, (user, item) in enumerate(zip(module.dropped[::2], module.dropped[1::2], strict=True)):
        masks[i, torch.from_numpy(user)] = False
        masks[i, torch.from_numpy(item) + ours.bipartite.users] = False
    return masks


def _padded(theirs: Any) -> Tensor:
    rows = [*theirs.user_similar_neighbors_weights_mat, *theirs.item_similar_neighbors_weights_mat]
    padded = torch.zeros(len(rows), theirs.k)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = torch.tensor(np.asarray(row))
    return padded


# ---- speed -----------------------------------------------------------------------------------------------------------


def _peak(step: Callable[[], Any], device: str) -> float:
    """MiB that a step needs on top of what there was: on a CPU the growth of a forked child's resident set."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()

    def child() -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        step()
        queue.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)

    process = context.Process(target=child)
    process.start()
    process.join()
    return round(queue.get(), 1)


def speed(checkout: Path | None, device: str = "cpu") -> dict[str, dict[str, float]]:
    """One training step, the propagation in it, and the search for neighbours; both sides in turn.

    On CUDA at Gowalla's size (29,858 x 40,981, batch 4096), on a CPU at a tenth of it.
    """
    users, items, mean, size = (29858, 40981, 25, 4096) if device != "cpu" else (3000, 4000, 25, 1024)
    pairs = _graph(users, items, mean, seed=0)
    sizes = {"num_users": users, "num_items": items, "num_interactions": pairs.shape[1]}
    torch.manual_seed(0)
    np.random.seed(0)
    ours = NESCL(**sizes).set_graph(pairs).to(device)
    batch = {k: v.to(device) for k, v in _batch(pairs, items, size).items()}
    theirs = None
    if checkout is not None:
        module = authors(checkout)
        theirs = module.SUPCCL(_config(ours.hyperparameters, 6, device), _Dataset(pairs, users, items)).to(device)
        theirs.norm_adj_matrix = theirs.norm_adj_matrix.to(device)

    def our_step() -> None:
        optimiser.zero_grad()
        ours.losses(batch)["loss"].backward()
        optimiser.step()

    optimiser = ours.configure_optimizers()
    steps: dict[str, dict[str, Callable[[], Any]]] = {"train_step": {"ours": our_step}}
    table = ours.table().detach().requires_grad_()
    layers = [[ours.whole()]] * 3
    one = torch.ones(ours.bipartite.size, 64, device=device)
    steps["propagation"] = {"ours": lambda: propagate(ours.bipartite, layers, table).backward(one)}
    if theirs is not None:
        other = torch.optim.Adam(theirs.parameters(), lr=1e-3)
        theirs.exist_sample_set = _Never()  # they never draw the same pair of sub-graphs twice; six would not last

        def their_step() -> None:
            other.zero_grad()
            theirs.calculate_loss(_theirs(batch), 0, 0)[0].backward()
            other.step()

        def their_propagation() -> None:
            x, found = table, []
            for _ in range(3):
                x = torch.sparse.mm(theirs.norm_adj_matrix, x)
                found.append(x)
            torch.stack(found, dim=1).mean(1).backward(one)

        steps["train_step"]["authors"] = their_step
        steps["propagation"]["authors"] = their_propagation
        similarity = module.ComputeSimilarity
        matrix = _Dataset(pairs, users, items).inter_matrix("csr")
        if device == "cpu":
            steps["neighbours"] = {
                "ours": lambda: most_similar(pairs, users, items, 5),
                "authors": lambda: similarity(None, matrix, topk=5).compute_similarity("user"),
            }
    result = {name: timed(pair, device, 3 if device == "cpu" else 20) for name, pair in steps.items()}
    for name, pair in steps.items():
        for side, step in pair.items():
            result[name][f"{side}_mib"] = _peak(step, device)
    return result


class _Never(set):  # type: ignore[type-arg]
    """A set that remembers nothing."""

    def add(self, item: Any) -> None:
        pass
