"""DPCML beside the authors' code (COCML and HarCML in LibCML): scores, losses, gradients, one step, ranking figures.

Their model, evaluator and sampler files run as they are; ``Tensor.cuda`` stands still, tqdm and toolz are stand-ins.
"""

import contextlib
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import lil_matrix
from torch import Tensor

from benchmarks.authors.nescl import _error, _graph, _load, _peak
from benchmarks.measure import timed
from zoo.graph.recommendation.dpcml import DPCML, LibCMLMetrics, diversity_loss

CASES: dict[str, dict[str, Any]] = {
    "dpcml1": {"sampling": "uniform", "negatives": 1},
    "dpcml1, ten negatives": {"sampling": "uniform", "negatives": 10},
    "dpcml2": {},
    "dpcml2, five vectors": {"vectors": 5, "margin": 2.0},
    "dpcml2, no diversity": {"diversity": 0.0},
    "dpcml2, empty range": {"least": 0.3, "most": 0.1},
    "cml, uniform": {"vectors": 1, "diversity": 0.0, "sampling": "uniform", "negatives": 1},
    "cml, hard": {"vectors": 1, "diversity": 0.0},
}
USERS, ITEMS, MEAN, DIM, BATCH = 40, 60, 9, 16, 32


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Their models move to a GPU at every step."""
    kept = torch.Tensor.cuda
    torch.Tensor.cuda = lambda self, *a, **k: self  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.Tensor.cuda = kept  # type: ignore[method-assign]


def authors(checkout: Path) -> types.SimpleNamespace:
    """Their model, evaluator and samplers."""
    if "libcml.CML" not in sys.modules:
        bar = types.ModuleType("tqdm")
        bar.tqdm = lambda x, **_: x  # type: ignore[attr-defined]
        toolz = types.ModuleType("toolz")
        toolz.partition_all = lambda n, x: (x[i : i + n] for i in range(0, len(x), n))  # type: ignore[attr-defined]
        kept = {name: sys.modules.get(name) for name in ("tqdm", "toolz")}
        sys.modules |= {"tqdm": bar, "toolz": toolz}
        package = types.ModuleType("libcml")
        package.__path__ = [str(checkout / "sampler")]  # type: ignore[attr-defined]
        sys.modules["libcml"] = package
        _load("libcml.sampler", checkout / "sampler" / "sampler.py")
        for name in ("hard_sampler", "uniform_sampler"):
            _load(f"libcml.{name}", checkout / "sampler" / f"{name}.py")
        _load("libcml.evaluation", checkout / "evaluator" / "evaluation.py")
        _load("libcml.CML", checkout / "model" / "CML.py")
        for name, module in kept.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
    found = {n: sys.modules[f"libcml.{n}"] for n in ("CML", "evaluation", "hard_sampler", "uniform_sampler")}
    return types.SimpleNamespace(**found)


def _pair(module: Any, pairs: Tensor, users: int, items: int, **overrides: Any) -> tuple[Any, DPCML]:
    """Both models with the same weights, large enough that hinges and both bounds of DCRS are met and missed."""
    torch.manual_seed(0)
    ours = DPCML(num_users=users, num_items=items, num_interactions=pairs.shape[1], clip="none", **overrides).set_graph(
        pairs
    )
    hp = ours.hyperparameters
    theirs = (module.COCML if hp["sampling"] == "uniform" else module.HarCML)(
        users,
        items,
        margin=hp["margin"],
        DCRS_reg=hp["diversity"],
        m1=hp["least"],
        m2=hp["most"],
        dim=hp["dim"],
        per_user_k=hp["vectors"],
    )
    with torch.no_grad():
        centre = 0.5 * torch.randn(users, 1, hp["dim"]) / hp["dim"] ** 0.5
        spread = torch.rand(users, 1, 1) * torch.randn(users, hp["vectors"], hp["dim"]) * (0.6 / hp["dim"] ** 0.5)
        ours.user_embeddings.weight.copy_((centre + spread).flatten(1))
        theirs.user_embeddings.weight.copy_(ours.user_embeddings.weight)
        theirs.item_embeddings.weight.copy_(ours.item_embeddings.weight)
    return theirs, ours


def _batch(ours: DPCML, pairs: Tensor, size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    user, item = pairs[:, torch.randint(pairs.shape[1], (size,), generator=generator)]
    negative = ours.bipartite.absent(user, ours.hyperparameters["negatives"], generator)
    return {"user": user, "item": item, "negative": negative}


def _theirs(batch: dict[str, Tensor], uniform: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What their loader hands out: a triplet for each negative, or all negatives of a pair."""
    count = batch["negative"].shape[1]
    if not uniform:
        return batch["user"], batch["item"], batch["negative"]
    return batch["user"].repeat_interleave(count), batch["item"].repeat_interleave(count), batch["negative"].flatten()


def _run(module: Any, case: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """(ours, theirs) of everything that a step computes."""
    pairs = _graph(USERS, ITEMS, MEAN, seed=1)
    theirs, ours = _pair(module, pairs, USERS, ITEMS, dim=DIM, **case)
    batch = _batch(ours, pairs, BATCH)
    user = torch.arange(USERS)
    hp = ours.hyperparameters
    found = {"scores": (ours(user), theirs.predict(user))}
    if hp["vectors"] > 1:
        found["diversity"] = (diversity_loss(ours.vectors(), hp["least"], hp["most"]), theirs.DCRS())
    optimisers = [
        torch.optim.Adam(theirs.parameters(), lr=hp["lr"], weight_decay=hp["weight_decay"]),
        ours.configure_optimizers(),
    ]
    loss = theirs(*_theirs(batch, hp["sampling"] == "uniform"))
    parts = ours.losses(batch)
    found["loss"] = (parts["loss"], loss)
    loss.backward()
    parts["loss"].backward()
    for side in ("user", "item"):
        a, b = getattr(ours, f"{side}_embeddings").weight, getattr(theirs, f"{side}_embeddings").weight
        found[f"{side} gradient"] = (a.grad, b.grad)
    for optimiser in optimisers:
        optimiser.step()
    for side in ("user", "item"):
        a, b = getattr(ours, f"{side}_embeddings").weight, getattr(theirs, f"{side}_embeddings").weight
        # the first step of Adam is lr * sign(gradient): rounding decides where a gradient is all but zero
        sure = (b.grad.abs() > 1e-4 * b.grad.abs().max()) | (b.grad == 0)
        found[f"{side} step"] = (a * sure, b * sure)
    return found


def _projected(module: Any) -> tuple[Tensor, Tensor]:
    """Their projection to the sphere, beside ours."""
    pairs = _graph(USERS, ITEMS, MEAN, seed=1)
    theirs, ours = _pair(module, pairs, USERS, ITEMS, dim=DIM)
    ours.hyperparameters["clip"] = "sphere"
    ours.project()
    theirs.ClipNorm()
    return (
        torch.cat([p.flatten() for p in ours.parameters()]),
        torch.cat([p.flatten() for p in theirs.parameters()]),
    )


def _figures(module: Any) -> tuple[dict[str, float], dict[str, float]]:
    """(ours, theirs) of the ranking figures, on a held-out part of a random graph."""
    everything = _graph(USERS, ITEMS, 3 * MEAN, seed=2)
    held = torch.rand(everything.shape[1], generator=torch.Generator().manual_seed(0)) < 0.35
    train, test = everything[:, ~held], everything[:, held]
    theirs, ours = _pair(module.CML, train, USERS, ITEMS, dim=DIM)
    matrices = []
    for part in (train, test):
        matrix = lil_matrix((USERS, ITEMS))
        matrix[tuple(part.numpy())] = 1
        matrices.append(matrix)
    evaluator = module.evaluation.Evaluator(USERS, ITEMS, *matrices)
    theirs.predict = lambda users, predict=theirs.predict: predict(torch.as_tensor(users))
    everyone, found = np.arange(USERS), {}
    with torch.no_grad():
        for k in (3, 5, 10):
            values = evaluator.precision_recall_ndcg_k(theirs, everyone, k)
            for name, value in zip(("precision", "recall", "ndcg"), values, strict=True):
                found[f"libcml_{name}@{k}"] = float(value)
        values = evaluator.map_mrr_auc_ndcg(theirs, everyone)
        found |= dict(zip(("libcml_map", "libcml_mrr", "libcml_auc", "libcml_ndcg"), map(float, values), strict=True))
    metric = LibCMLMetrics((3, 5, 10))
    ours.protocol["test"], ours.log = metric, lambda *a, **k: None  # type: ignore[method-assign, assignment]
    user = test[0].unique()
    rows = [test[1, test[0] == u] for u in user]
    target = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
    ours.evaluate({"user": user, "target": target}, "test")
    computed = {name: float(value) for name, value in metric.compute().items()}
    return {name: computed[name] for name in found}, found


def compare(checkout: Path) -> dict[str, float]:
    """Largest relative errors by figure, over all cases; and case by case for the loss."""
    module, worst = authors(checkout), {}
    with on_cpu():
        for name, case in CASES.items():
            for figure, (a, b) in _run(module.CML, case).items():
                error = _error(a, b)
                worst[figure] = max(worst.get(figure, 0.0), error)
                if figure == "loss":
                    worst[f"loss, {name}"] = error
        worst["projection"] = _error(*_projected(module.CML))
        ours, theirs = _figures(module)
        worst["ranking figures"] = max(abs(ours[n] - theirs[n]) / theirs[n] for n in theirs)
    return worst


def golden(checkout: Path) -> dict[str, Tensor]:
    """Inputs, weights and the authors' results of every case, on a graph of 40 users and 60 items."""
    module = authors(checkout)
    pairs = _graph(USERS, ITEMS, MEAN, seed=1)
    out: dict[str, Tensor] = {"interactions": pairs}
    with on_cpu():
        for name, case in CASES.items():
            theirs, ours = _pair(module.CML, pairs, USERS, ITEMS, dim=8, **case)
            batch = _batch(ours, pairs, BATCH)
            uniform = ours.hyperparameters["sampling"] == "uniform"
            out |= {f"{name}.{k}": v for k, v in batch.items()}
            out[f"{name}.user_weight"] = theirs.user_embeddings.weight.detach().clone()
            out[f"{name}.item_weight"] = theirs.item_embeddings.weight.detach().clone()
            with torch.no_grad():
                out[f"{name}.scores"] = theirs.predict(torch.arange(3))
            loss = theirs(*_theirs(batch, uniform))
            loss.backward()
            out[f"{name}.loss"] = loss.detach().reshape(1)
            out[f"{name}.user_gradient"] = theirs.user_embeddings.weight.grad.clone()
            out[f"{name}.item_gradient"] = theirs.item_embeddings.weight.grad.clone()
    return {k: v.contiguous() for k, v in out.items()}


# ---- speed -----------------------------------------------------------------------------------------------------------


def speed(checkout: Path | None, device: str = "cpu") -> dict[str, dict[str, float]]:
    """A training step, the scores of a block of users, and an epoch's negatives, at ml-100k's size; in turn.

    938 users, 1,675 items, 35 interactions a user, batch 256, three vectors of 256 channels, ten negatives.
    """
    users, items, mean, size = 938, 1675, 35, 256
    pairs = _graph(users, items, mean, seed=0)
    torch.manual_seed(0)
    sizes = {"num_users": users, "num_items": items, "num_interactions": pairs.shape[1]}
    ours = DPCML(**sizes).set_graph(pairs).to(device)
    batch = {k: v.to(device) for k, v in _batch(ours.cpu(), pairs, size).items()}
    ours.to(device)
    optimiser = ours.configure_optimizers()
    some, every = torch.arange(256, device=device), pairs[0].to(device)

    def our_step() -> None:
        optimiser.zero_grad()
        ours.losses(batch)["loss"].backward()
        optimiser.step()

    def our_scores() -> None:
        with torch.no_grad():
            ours(some)

    steps: dict[str, dict[str, Callable[[], Any]]] = {
        "train_step": {"ours": our_step},
        "scores": {"ours": our_scores},
        "negatives": {"ours": lambda: ours.bipartite.absent(every, 10)},
    }
    with contextlib.ExitStack() as stack:
        if device == "cpu":
            stack.enter_context(on_cpu())
        if checkout is not None:
            module = authors(checkout)
            theirs = module.CML.HarCML(users, items, margin=1.0, dim=256).to(device)
            other = torch.optim.Adam(theirs.parameters(), lr=1e-3, weight_decay=1e-5)
            matrix = lil_matrix((users, items))
            matrix[tuple(pairs.numpy())] = 1
            sampler = module.hard_sampler.HardSampler("hard", matrix, 10)

            def their_step() -> None:
                other.zero_grad()
                theirs(*_theirs(batch, False)).backward()
                other.step()

            def their_scores() -> None:
                with torch.no_grad():
                    theirs.predict(some)

            steps["train_step"]["authors"] = their_step
            steps["scores"]["authors"] = their_scores
            steps["negatives"]["authors"] = sampler.sampling
        rounds = {"train_step": 30, "scores": 15, "negatives": 3}
        result = {name: timed(pair, device, rounds[name]) for name, pair in steps.items()}
        for name, pair in steps.items():
            for side, step in pair.items():
                result[name][f"{side}_mib"] = _peak(step, device)
    return result
