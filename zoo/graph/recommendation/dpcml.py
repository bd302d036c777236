"""DPCML: collaborative metric learning with several vectors a user, kept apart so that minor interests get their own.

Paper: Bao, Xu, Yang, He, Cao, Huang, "The Minority Matters: A Diversity-Promoting Collaborative Metric Learning
Algorithm", NeurIPS 2022, arXiv:2209.15292. Code by the authors: https://github.com/statusrank/LibCML (there COCML and
HarCML), no licence.

In: users, items and who interacted with what. Out: a score for every (user, item), or each user's best k unseen items.

    D(u, v) = min over c of ||e_u^c - e_v||^2,   score = -D
    preference = sum over (u, i, j) of relu(margin + D(u, i) - D(u, j))            j: items that u has not
    delta = ||e_u^c - e_u^c'||^2
    psi = mean over users u and all C x C pairs c, c' of relu(m1 - delta) + relu(delta - m2)       DCRS; c = c' adds 0
    loss = preference + eta * psi

``sampling`` says which of S drawn items are j: all (DPCML1), the nearest (DPCML2), or the nearest share (DiHarS).
``vectors=1`` is plain collaborative metric learning (Hsieh et al., WWW 2017): no diversity, the baseline.

Departs from the authors' code: vectors are projected to the unit ball after every step, the paper's feasible set, where
their loop has the call commented out (``clip="none"``) and its body puts them on the sphere (``clip="sphere"``);
negatives are drawn anew every step instead of once an epoch. Not in their code, and our reading of the paper's
description: ``sampling="dihars"`` and ``assignment="adaptive"``.

Index legend: m users, n items, b batch, c vectors a user, s drawn items, t targets, d channels.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

from zoo.core import ZooError, unwrap
from zoo.graph.recommendation.recommender import Interactions, Recommender, spans

SAMPLING = ("uniform", "hard", "dihars")
ASSIGNMENTS = ("basic", "adaptive")
CLIPS = ("ball", "sphere", "none")
PLACES = (3, 5, 10, 20, 30, 50)

# ---- distances and losses --------------------------------------------------------------------------------------------


def distances(vectors: Tensor, items: Tensor, owned: Tensor | None = None) -> Tensor:
    """Squared distances between users' vectors and items of their own, by the inner products.

    Shapes:
        vectors: (b, c, d); items: (b, s, d); owned: (b, c) bool, False for vectors that do not take part
        returns: (b, c, s), infinite where not owned
    """
    found = vectors.square().sum(-1)[:, :, None] + items.square().sum(-1)[:, None]
    found = torch.baddbmm(found, vectors, items.transpose(1, 2), alpha=-2)
    return found if owned is None else found.masked_fill(~owned[:, :, None], torch.inf)


def preference_loss(positive: Tensor, negative: Tensor, margin: float, mean: bool = False) -> Tensor:
    """Sum over users of relu(margin + D(u, i) - D(u, j)), summed (or averaged) over the j of each.

    Shapes:
        positive: (b,); negative: (b, s); returns: ()
    """
    hinge = F.relu(margin + positive[:, None] - negative)
    return (hinge.mean(1) if mean else hinge.sum(1)).sum()


def diversity_loss(vectors: Tensor, least: float, most: float, owned: Tensor | None = None) -> Tensor:
    """DCRS: what every two vectors of a user lack to a squared distance of ``least``, and exceed ``most`` by.

    Shapes:
        vectors: (m, c, d); owned: (m, c) bool; returns: ()
    """
    m, c, _ = vectors.shape
    first, second = torch.triu_indices(c, c, 1, device=vectors.device)
    # one difference a pair, not two, and no inner products: delta is small against the norms
    delta = (vectors[:, first] - vectors[:, second]).square().sum(-1)
    excess = F.relu(least - delta) + F.relu(delta - most)
    if owned is not None:
        excess = excess * (owned[:, first] & owned[:, second])
    return 2 * excess.sum() / (m * c * c)


def nearest_share(distance: Tensor, share: float) -> Tensor:
    """The ceil(share * s) nearest items (DiHarS): the false positives at a false positive rate of ``share``.

    Shapes:
        distance: (b, s); returns: (b, ceil(share * s)) positions
    """
    count = max(1, -int(-share * distance.shape[1] // 1))
    return distance.topk(count, dim=1, largest=False).indices


# ---- the authors' protocol -------------------------------------------------------------------------------------------


class LibCMLMetrics(Metric):
    """LibCML's ranking figures, from the places of the targets in the full ranking of the items not in training.

    precision@k, recall@k, ndcg@k over users with at least k targets; MAP, MRR, AUC and NDCG over those with at least 3;
    ``auc`` over all with a target, which is what a checkpoint is chosen by. What no user counts for is left out.

    Args:
        places: the k.
        least: how many targets a user must have for MAP, MRR, AUC and NDCG.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    total: Tensor
    users: Tensor

    def __init__(self, places: tuple[int, ...] = PLACES, least: int = 3) -> None:
        super().__init__()
        self.places, self.least = places, least
        self.names = [f"libcml_{name}@{k}" for k in places for name in ("precision", "recall", "ndcg")]
        self.names += [f"libcml_{name}" for name in ("map", "mrr", "auc", "ndcg")] + ["auc"]
        for name in ("total", "users"):
            self.add_state(name, torch.zeros(len(self.names), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, place: Tensor, targets: Tensor, ranked: Tensor) -> None:
        """Add users.

        Args:
            place: how many ranked items stand before each target, in any order; anything where there is none.
            targets: how many targets each user has, the first so many columns of ``place``.
            ranked: how many items are ranked for each user.
        Shapes:
            place: (b, t) integer; targets, ranked: (b,) integer
        """
        keep, count, size = targets > 0, targets[:, None], ranked[:, None]
        place, count, size, targets = place[keep], count[keep], size[keep], targets[keep]
        if not len(place):
            return
        order = torch.arange(place.shape[1], device=place.device)
        real = order < count
        place = place.where(real, torch.iinfo(torch.int64).max // 2).sort(1).values
        gain = real / torch.log2(place.double() + 2)
        ideal = (1 / torch.log2(order.double() + 2)).cumsum(0)
        top = 1 / torch.log2(torch.arange(max(self.places), device=place.device) + 2.0).double()
        rows, counted = [], []
        for k in self.places:
            hit = real & (place < k)
            hits = hit.sum(1)
            rows += [hits / k, hits / targets, (gain * hit).sum(1) / top[:k].sum()]
            counted += [targets >= k] * 3
        below = (real * (size - place)).sum(1) - targets * (targets + 1) / 2
        auc = torch.where(ranked[keep] > targets, below / (targets * (ranked[keep] - targets)).clamp(min=1), 1.0)
        precision = (real * (order + 1) / (place.double() + 1)).sum(1) / targets
        rows += [precision, 1 / (place[:, 0].double() + 1), auc, gain.sum(1) / ideal[targets - 1], auc]
        counted += [targets >= self.least] * 4 + [targets > 0]
        self.total += torch.stack([(r * c).sum().double() for r, c in zip(rows, counted, strict=True)])
        self.users += torch.stack([c.sum().double() for c in counted])

    def compute(self) -> dict[str, Tensor]:
        """The means by name."""
        return {n: t / u for n, t, u in zip(self.names, self.total, self.users, strict=True) if u > 0}


# ---- the method ------------------------------------------------------------------------------------------------------


class DPCML(Recommender):
    """Top-N recommendation from implicit feedback: metric learning with several vectors a user, kept apart.

    The interactions are part of the model (buffers), so a checkpoint can recommend by itself; they come from the
    Trainer's DataModule, else from the first batch's ``graph``, else call `set_graph`. The loss is a sum over the
    batch, and ``diversity`` is tied to the batch size by that.

    Args:
        num_users, num_items: sizes of the two embedding tables.
        num_interactions: distinct (user, item) pairs in the training data.
        dim: channels of a vector.
        vectors: C, how many a user has at most; 1 is plain collaborative metric learning.
        sampling: which of the drawn items count as negatives: ``"uniform"`` all of them (DPCML1), ``"hard"`` the
            nearest (DPCML2), ``"dihars"`` the nearest share ``hardest`` of them, averaged.
        negatives: S, items drawn for every training pair.
        hardest: share of the drawn items that ``"dihars"`` keeps, in (0, 1].
        margin: of the hinge, above 0, in squared distance.
        diversity: weight of DCRS, eta; 0 leaves it out.
        least, most: m1 and m2, the range that squared distances between a user's vectors are kept in; DCRS is left
            out where least >= most, as in the authors' code.
        diversity_users: DCRS over ``"all"`` users every step, or those of the ``"batch"`` (for many users: cheaper, and
            weighted by their activity).
        assignment: ``"basic"`` gives every user C vectors, ``"adaptive"`` 1 + interactions //
            ``interactions_per_vector``, at most C.
        interactions_per_vector: see ``assignment``.
        clip: after every step, vectors go to the unit ``"ball"`` (where they lie outside), the ``"sphere"``, or stay:
            ``"none"``.
        lr: Adam's learning rate.
        weight_decay: Adam's, as L2 in the gradient.
        top_k: length of the ranked list that is evaluated and predicted.
        block: most users ranked at once; fewer where their scores (4 bytes an item; ranking with several vectors holds
            two such blocks) would take more than 64 MiB on a CPU, 256 MiB elsewhere.
    Shapes:
        user: (b,) int64; returns: (b, n) float scores, minus squared distances
    Raises:
        ValueError: for a hyperparameter out of range.
    Example:
        >>> from zoo.graph import DPCML, ImplicitCFDataModule
        >>> data = ImplicitCFDataModule()
        >>> model = DPCML.from_variant("tiny").set_graph(data.interactions())
        >>> model.predict([0, 1])["item"].shape
        torch.Size([2, 20])
    """

    variants: ClassVar = {
        "tiny": {
            "num_users": 600, "num_items": 400, "num_interactions": 6600, "dim": 8, "vectors": 2, "negatives": 4,
        },
        "cml": {"vectors": 1, "diversity": 0.0},
        "dpcml1": {"sampling": "uniform"},
        "steam-200k": {"num_users": 3757, "num_items": 5113, "num_interactions": 67653},
    }  # fmt: skip
    monitor, mode = "val/auc", "max"

    def __init__(
        self,
        num_users: int = 938,
        num_items: int = 1675,
        num_interactions: int = 32844,
        dim: int = 256,
        vectors: int = 3,
        sampling: str = "hard",
        negatives: int = 10,
        hardest: float = 0.3,
        margin: float = 1.0,
        diversity: float = 10.0,
        least: float = 0.05,
        most: float = 0.25,
        diversity_users: str = "all",
        assignment: str = "basic",
        interactions_per_vector: int = 20,
        clip: str = "ball",
        lr: float = 1e-3,
        weight_decay: float = 1e-5,
        top_k: int = 20,
        block: int = 1024,
    ):
        super().__init__()
        self.save_hyperparameters()
        for name, value, known in (
            ("sampling", sampling, SAMPLING),
            ("assignment", assignment, ASSIGNMENTS),
            ("diversity_users", diversity_users, ("all", "batch")),
            ("clip", clip, CLIPS),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; expected {', '.join(known)}.")
        at_least_one = {"num_users": num_users, "num_items": num_items, "num_interactions": num_interactions}
        at_least_one |= {"dim": dim, "vectors": vectors, "negatives": negatives}
        for name, value in {**at_least_one, "interactions_per_vector": interactions_per_vector}.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
        if not margin > 0:
            raise ValueError(f"margin is {margin}; it must be above 0 (the paper's is 1).")
        if not 0 < hardest <= 1:
            raise ValueError(f"hardest is {hardest}; it must lie in (0, 1].")
        if min(diversity, least, most, weight_decay) < 0:
            raise ValueError(
                f"diversity, least, most and weight_decay are {diversity}, {least}, {most} and {weight_decay}; "
                "none may be below 0."
            )
        self.user_embeddings = nn.Embedding(num_users, vectors * dim)
        self.item_embeddings = nn.Embedding(num_items, dim)
        nn.init.normal_(self.user_embeddings.weight, std=0.01)
        nn.init.normal_(self.item_embeddings.weight, std=dim**-0.5)
        self.build_ranking(Interactions(num_users, num_items, num_interactions), top_k, block)
        self.monitor = type(self).monitor
        self.protocol = nn.ModuleDict({split: LibCMLMetrics() for split in ("val", "test")})

    # ---- vectors ------------------------------------------------------------------------------------------------

    def set_graph(self, interactions: Tensor) -> Self:
        super().set_graph(interactions)
        full = (self.bipartite.start.diff() == self.bipartite.items).nonzero().flatten().tolist()
        if full:
            raise ValueError(
                f"{len(full)} users have every one of the {self.bipartite.items} items (first: {full[:3]}): there is "
                "no negative to draw. Leave them out and number the others 0, 1, ..."
            )
        return self

    def vectors(self) -> Tensor:
        """All users' vectors, (m, c, d)."""
        hp = self.hyperparameters
        return self.user_embeddings.weight.unflatten(1, (hp["vectors"], hp["dim"]))

    def owned(self, user: Tensor) -> Tensor | None:
        """Which vectors users have, (b, c) bool; None where all have all."""
        hp = self.hyperparameters
        if hp["assignment"] == "basic":
            return None
        start = self.bipartite.start
        count = start.index_select(0, user + 1) - start.index_select(0, user)
        number = 1 + count // hp["interactions_per_vector"]
        return torch.arange(hp["vectors"], device=user.device) < number[:, None]

    @torch.no_grad()
    def project(self) -> None:
        """Put every vector back into the unit ball, or onto the sphere (``clip``); an optimiser step does it itself."""
        hp = self.hyperparameters
        if hp["clip"] == "none":
            return
        for weight in (self.user_embeddings.weight, self.item_embeddings.weight):
            vectors = weight.view(-1, hp["dim"])
            norm = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
            vectors.div_(norm.clamp(min=1.0 if hp["clip"] == "ball" else 1e-12))

    # ---- forward ------------------------------------------------------------------------------------------------

    def forward(self, user: Tensor) -> Tensor:
        """Scores of all items for some users. Shapes: (b,) int64; returns (b, n)."""
        hp, items = self.hyperparameters, self.item_embeddings.weight
        mine = self.user_embeddings.weight.index_select(0, user).unflatten(1, (hp["vectors"], hp["dim"]))
        owned, square = self.owned(user), items.square().sum(1)
        best = None
        for c in range(hp["vectors"]):  # the maximum as it goes: never (b, c, n)
            vector = mine[:, c]
            score = 2 * vector @ items.t() - square - vector.square().sum(1, keepdim=True)
            if owned is not None:
                score = score.masked_fill(~owned[:, c, None], -torch.inf)
            best = score if best is None else torch.maximum(best, score)
        assert best is not None
        return best

    def scorer(self) -> Callable[[Tensor, Tensor], None]:
        # 2 v·i - |v|² - |i|² as one product: (2v, -|v|², 1)·(i, 1, -|i|²)
        hp, items = self.hyperparameters, self.item_embeddings.weight.float()
        square = items.square().sum(1, keepdim=True)
        items = torch.cat((items, torch.ones_like(square), -square), dim=1).t()
        other: Tensor | None = None

        def write(user: Tensor, scores: Tensor) -> None:
            nonlocal other
            mine = self.user_embeddings.weight.index_select(0, user).float().unflatten(1, (hp["vectors"], hp["dim"]))
            square, owned = mine.square().sum(2, keepdim=True), self.owned(user)
            if owned is not None:
                square = square.masked_fill(~owned[:, :, None], torch.inf)
            mine = torch.cat((2 * mine, -square, torch.ones_like(square)), dim=2)
            torch.mm(mine[:, 0], items, out=scores)
            for c in range(1, hp["vectors"]):
                if other is None:
                    other = torch.empty(len(user), scores.stride(0), device=user.device)[:, : scores.shape[1]]
                torch.mm(mine[:, c], items, out=other[: len(user)])
                torch.maximum(scores, other[: len(user)], out=scores)

        return write

    # ---- training -----------------------------------------------------------------------------------------------

    def draw(self, batch: Mapping[str, Tensor]) -> Tensor:
        """S items for each pair, uniform among those that its user has not: the batch's, where it brings as many.

        Shapes:
            returns: (b, s) int64
        """
        count, given = self.hyperparameters["negatives"], batch.get("negative")
        if given is not None and given.shape == (len(batch["user"]), count):
            return given
        if given is not None and count == 1:
            return given.reshape(-1, 1)
        return self.bipartite.absent(batch["user"], count)

    def losses(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The loss and its parts: ``loss``, ``preference``, ``diversity`` (before its weight).

        Shapes:
            batch: user, item (b,) int64, and optionally negative (b, s)
        """
        hp = self.hyperparameters
        self.take_graph(batch)
        user, item = batch["user"], batch["item"]
        items = torch.cat([item[:, None], self.draw(batch)], dim=1)
        vectors, table = self.vectors(), self.item_embeddings.weight
        owned = self.owned(user)
        # Only the nearest vector of each item (and of the items only those that count) gets a gradient: find them
        # without one, then compute their distances anew.
        with torch.no_grad():
            near = vectors.index_select(0, user)
            every = distances(near, table[items], owned)
            distance, vector = every.min(1)
            if hp["sampling"] == "hard":
                kept = distance[:, 1:].argmin(1, keepdim=True)
            elif hp["sampling"] == "dihars":
                kept = nearest_share(distance[:, 1:], hp["hardest"])
            else:
                kept = torch.arange(hp["negatives"], device=user.device).expand(len(user), -1)
            kept = F.pad(kept + 1, (1, 0))  # the positive comes first
            items, vector = items.gather(1, kept), vector.gather(1, kept)
        mine = vectors.flatten(0, 1).index_select(0, (user[:, None] * hp["vectors"] + vector).flatten())
        theirs = table.index_select(0, items.flatten())
        exact = (mine - theirs).square().sum(1).view_as(items)
        parts = {"preference": preference_loss(exact[:, 0], exact[:, 1:], hp["margin"], hp["sampling"] == "dihars")}
        parts["loss"] = parts["preference"]
        if hp["diversity"] and hp["least"] < hp["most"] and hp["vectors"] > 1:
            if hp["diversity_users"] == "batch":
                some = user.unique() if not user.is_meta else user
                parts["diversity"] = diversity_loss(
                    vectors.index_select(0, some), hp["least"], hp["most"], self.owned(some)
                )
            else:
                everyone = torch.arange(len(vectors), device=user.device)
                parts["diversity"] = diversity_loss(vectors, hp["least"], hp["most"], self.owned(everyone))
            parts["loss"] = parts["preference"] + hp["diversity"] * parts["diversity"]
        return parts

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        parts = self.losses(batch)
        for name, value in parts.items():
            self.log(f"train/{name}", value.detach(), batch_size=len(batch["user"]))
        return parts["loss"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        hp = self.hyperparameters
        optimiser = torch.optim.Adam(self.parameter_groups(), lr=hp["lr"], weight_decay=hp["weight_decay"])
        optimiser.register_step_post_hook(lambda *_: self.project())
        return optimiser

    # ---- evaluation ---------------------------------------------------------------------------------------------

    def evaluate(self, batch: dict[str, Tensor], split: str) -> None:
        """As for any recommender, and the authors' figures (`LibCMLMetrics`)."""
        super().evaluate(batch, split)
        user, target = batch["user"], batch["target"]
        for part in spans(len(user), self.rows(user)):
            scores = self(user[part]).detach().float()
            self._close(scores, user[part], batch["seen"][part] if "seen" in batch else None)
            own = scores.gather(1, target[part].clamp(min=0))
            ranked = scores.sort(1).values
            place = scores.shape[1] - torch.searchsorted(ranked, own, right=True)
            self.protocol[split].update(  # type: ignore[operator]
                place, (target[part] >= 0).sum(1), (scores > -torch.inf).sum(1)
            )

    def _log_protocol(self, split: str) -> None:
        metric = self.protocol[split]
        for name, value in metric.compute().items():  # type: ignore[operator]
            self.log(f"{split}/{name}", value.float(), sync_dist=True)  # equal on all ranks; says so to lightning
        metric.reset()  # type: ignore[operator]

    def on_validation_epoch_end(self) -> None:
        self._log_protocol("val")

    def on_test_epoch_end(self) -> None:
        self._log_protocol("test")

    # ---- authors' checkpoints -----------------------------------------------------------------------------------

    @classmethod
    def convert_state_dict(cls, content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """From LibCML's ``user_embeddings.weight`` (m, c * d) and ``item_embeddings.weight`` (n, d).

        LibCML does not save the interactions; put the training pairs beside the tensors as ``interactions``, (2, e).

        Raises:
            ZooError: if one of the three is missing, or the widths do not go together.
        """
        pairs = content.get("interactions")
        tensors = unwrap({k: v for k, v in content.items() if k != "interactions"})
        users, items = tensors.get("user_embeddings.weight"), tensors.get("item_embeddings.weight")
        if users is None or items is None or not isinstance(pairs, Tensor):
            raise ZooError(
                "Expected user_embeddings.weight, item_embeddings.weight and 'interactions', a (2, e) tensor of the "
                f"training pairs (LibCML does not save them: add it to the file). Got {', '.join(map(str, content))}."
            )
        if users.shape[1] % items.shape[1]:
            raise ZooError(
                f"user_embeddings.weight is {users.shape[1]} wide, which is no multiple of the items' {items.shape[1]}."
            )
        sizes = {
            "num_users": len(users),
            "num_items": len(items),
            "num_interactions": pairs.shape[1],
            "dim": items.shape[1],
            "vectors": users.shape[1] // items.shape[1],
        }
        model = cls(**sizes).set_graph(pairs)
        state = {k: v.clone() for k, v in model.state_dict().items()}
        state |= {"user_embeddings.weight": users.clone(), "item_embeddings.weight": items.clone()}
        return sizes, state
