"""What the family's methods share: the interactions as part of the model, blocked full ranking, its evaluation.

Index legend: m users, n items, e interactions, b batch, k places of a ranked list.
"""

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from zoo.core import ZooError, ZooModule
from zoo.nn.ranking import GROUP, NDCGAtK, RecallAtK, best

BLOCK_MIB = {"cpu": 64}
"""Most MiB of scores that a ranking holds at once, by device (256 if not named). A CPU gains nothing from more."""


class Interactions(nn.Module):
    """Who interacted with what in training, stored by user: what a ranking leaves out, and what is no negative.

    Args:
        users, items: m and n.
        interactions: e, the number of distinct (user, item) pairs.
    Shapes:
        interactions: (2, e) users and items, sorted; start: (m + 1,), where in them each user's begin
    """

    interactions: Tensor
    start: Tensor

    def __init__(self, users: int, items: int, interactions: int):
        super().__init__()
        self.users, self.items = users, items
        # 32 bits: half the memory, and what sparse kernels want
        self.register_buffer("interactions", torch.full((2, interactions), -1, dtype=torch.int32))
        self.register_buffer("start", torch.zeros(users + 1, dtype=torch.int32), persistent=False)
        self.ready = False
        self._gaps: tuple[Any, Tensor] | None = None
        self.register_load_state_dict_post_hook(Interactions._loaded)

    def set(self, interactions: Tensor) -> Tensor:
        """Take the interactions, a (2, e) integer tensor of users and items in any order; return them sorted, int64.

        Raises:
            ValueError: if they are not e distinct pairs in range, or a user has none.
        """
        pairs = self._checked(interactions)
        order = torch.argsort(pairs[0] * self.items + pairs[1])
        pairs = pairs[:, order].to(self.interactions.device)
        self.interactions.copy_(pairs)
        self._index()
        return pairs

    def _checked(self, interactions: Tensor) -> Tensor:
        e = self.interactions.shape[1]
        if interactions.ndim != 2 or interactions.shape[0] != 2 or interactions.is_floating_point():
            raise ValueError(
                f"interactions have shape {tuple(interactions.shape)} and type {interactions.dtype}; expected (2, {e}) "
                "integers: users in row 0, items in row 1. For ratings, keep the pairs that count as positive."
            )
        if interactions.shape[1] != e:
            raise ValueError(
                f"{interactions.shape[1]} interactions came, the model was built for {e}. Build it with "
                f"num_interactions={interactions.shape[1]} (ImplicitCFDataModule.describe() has all three sizes)."
            )
        pairs = interactions.long()
        for name, row, size in (("user", pairs[0], self.users), ("item", pairs[1], self.items)):
            low, high = int(row.min()), int(row.max())
            if low < 0 or high >= size:
                raise ValueError(f"{name} ids run from {low} to {high}; the model was built for 0 to {size - 1}.")
        distinct = torch.unique(pairs[0] * self.items + pairs[1]).numel()
        if distinct != e:
            raise ValueError(f"{e - distinct} of {e} interactions are repeated; give each (user, item) pair once.")
        empty = (torch.bincount(pairs[0], minlength=self.users) == 0).nonzero().flatten().tolist()
        if empty:
            raise ValueError(
                f"{len(empty)} users have no interaction (first: {empty[:3]}): the graph says nothing about them. "
                "Leave them out and number the others 0, 1, ..."
            )
        return pairs

    @staticmethod
    def _loaded(graph: "Interactions", _: Any) -> None:
        graph._index()

    def _index(self) -> None:
        """Derive the rows from the interactions (also after loading)."""
        if self.interactions.is_meta:
            return
        self.ready = bool((self.interactions >= 0).all())
        if self.ready:
            self.start[1:] = torch.bincount(self.interactions[0], minlength=self.users).cumsum(0).int()

    def seen(self, user: Tensor) -> tuple[Tensor, Tensor]:
        """The items of users, as (position in ``user``, item): two vectors of the same length."""
        start = self.start[user].long()
        count = self.start[user + 1].long() - start
        total = int(count.sum())
        at = torch.arange(len(user), device=user.device).repeat_interleave(count, output_size=total)
        first = (start - count.cumsum(0) + count)[at]
        return at, self.interactions[1, first + torch.arange(total, device=user.device)].long()

    def absent(self, user: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Items that users have not, uniform and independent, without trial and error: no device waits for the outcome.

        The r-th item that user u lacks is r + j, where j of u's items lie before it: sorted, u's j-th item i_j leaves
        i_j - j gaps before it.

        Shapes:
            user: (b,); returns: (b, count) int64
        """
        if self.interactions.is_meta:
            return user[:, None].expand(-1, count).clone()
        key = identity(self.interactions)
        if self._gaps is None or self._gaps[0] != key:
            owner, item = self.interactions.long()
            place = torch.arange(len(owner), device=owner.device) - self.start.long()[owner]
            self._gaps = (key, owner * (self.items + 1) + item - place)
        start, end = self.start[user].long(), self.start[user + 1].long()
        free = self.items - (end - start)
        draw = torch.rand(len(user), count, device=user.device, dtype=torch.float64, generator=generator)
        nth = (draw * free[:, None]).long()
        before = torch.searchsorted(self._gaps[1], user[:, None] * (self.items + 1) + nth, right=True)
        return nth + before - start[:, None]

    def extra_repr(self) -> str:
        return f"users={self.users}, items={self.items}, interactions={self.interactions.shape[1]}"


class Recommender(ZooModule):
    """A method that scores every (user, item): the interactions are buffers, so that a checkpoint recommends by itself.

    With a Trainer they come from the DataModule (anything with ``interactions()``), else from the first batch's
    ``graph``, else call `set_graph`. A subclass calls `build_ranking` in its ``__init__`` and writes `scorer`.
    """

    bipartite: Any
    metrics: nn.ModuleDict

    def build_ranking(self, graph: Interactions, top_k: int, block: int) -> None:
        """Attach the interactions and the metrics of a list of ``top_k``, made for at most ``block`` users at once."""
        for name, value in (("top_k", top_k), ("block", block)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
        self.monitor = f"val/recall@{top_k}"
        self.top_k, self.block = top_k, block
        self.bipartite = graph
        self.metrics = nn.ModuleDict(
            {
                split: nn.ModuleDict({"recall": RecallAtK(), "ndcg": NDCGAtK(), "minority_recall": RecallAtK()})
                for split in ("val", "test")
            }
        )

    def scorer(self) -> Callable[[Tensor, Tensor], None]:
        """A function of users (b,) and a float32 tensor (b, n) that it writes the scores of all items into.

        What all users share is made once, here. No gradient is asked for.
        """
        raise NotImplementedError

    # ---- the interactions ---------------------------------------------------------------------------------------

    def set_graph(self, interactions: Tensor) -> Self:
        """Take the training interactions, (2, e) integers (users, items). Returns self.

        Raises:
            ValueError: if they do not fit the model's sizes, repeat a pair, or leave a user out.
        """
        self.bipartite.set(interactions)
        return self

    def setup(self, stage: str) -> None:
        data = getattr(self.trainer, "datamodule", None)
        if hasattr(data, "interactions") and (stage == "fit" or not self.bipartite.ready):
            self.set_graph(data.interactions())

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        batch = super().on_before_batch_transfer(batch, dataloader_idx)
        self.take_graph(batch)
        # every batch brings the graph, so that it stands on its own; it need not travel again
        return {key: value for key, value in batch.items() if key != "graph"} if isinstance(batch, dict) else batch

    def take_graph(self, batch: Any) -> None:
        """Have a graph: the model's own, else the batch's.

        Raises:
            ZooError: if there is none.
        """
        if self.bipartite.ready or self.bipartite.interactions.is_meta:
            return
        if not isinstance(batch, Mapping) or "graph" not in batch:
            raise ZooError(
                f"{type(self).__name__} has no graph yet: call model.set_graph(interactions), (2, e) users and items, "
                "first."
            )
        self.set_graph(batch["graph"])

    # ---- ranking ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def rank(
        self, user: Tensor, k: int | None = None, seen: Tensor | None = None, exclude_seen: bool = True
    ) -> tuple[Tensor, Tensor]:
        """The best k items of each user over the whole catalogue, in blocks; of equal ones the lowest number first.

        A block has at most ``block`` users, and no more than have their scores in 64 MiB on a CPU, 256 MiB elsewhere.

        Args:
            k: ``top_k`` by default, or all items where there are fewer.
            seen: further items to leave out, padded with -1.
            exclude_seen: leave out the items that the user has in the training graph.
        Shapes:
            user: (b,); seen: (b, s); returns: items (b, k) int64, -1 where no item is left, and scores (b, k)
        """
        items = self.bipartite.items
        k = min(self.top_k, items) if k is None else k
        if not 1 <= k <= items:
            raise ValueError(f"k is {k}; it must lie in 1..{items}, the number of items.")
        write, found = self.scorer(), []
        # a CPU multiplies twice as fast into rows that begin at multiples of 64 bytes
        width = items + -items % GROUP
        rows = min(self.rows(user), len(user))
        padded = torch.full((rows, width), -torch.inf, device=user.device)
        for part in spans(len(user), rows):
            scores = padded[: len(user[part]), :items]
            write(user[part], scores)
            self._close(scores, user[part], None if seen is None else seen[part], exclude_seen)
            found.append(best(padded[: len(scores)], k))
        score, item = (torch.cat(parts) for parts in zip(*found, strict=True))
        return item.where(score > -torch.inf, -1), score

    def rows(self, user: Tensor) -> int:
        """How many users a block has: ``block``, or as many as have their scores within the limit of the device."""
        width = self.bipartite.items + -self.bipartite.items % GROUP
        return min(self.block, max(1, int(BLOCK_MIB.get(user.device.type, 256) * 2**18 / width)))

    def _close(self, scores: Tensor, user: Tensor, seen: Tensor | None, exclude_seen: bool = True) -> None:
        """Set the scores of items that do not take part to -inf, in place."""
        if exclude_seen:
            scores[self.bipartite.seen(user)] = -torch.inf
        if seen is not None and seen.shape[1]:
            most = torch.where(seen >= 0, -torch.inf, torch.inf).to(scores.dtype)
            scores.scatter_reduce_(1, seen.clamp(min=0), most, "amin")

    @torch.no_grad()
    def predict(  # type: ignore[override]
        self, user: Tensor | list[int], k: int | None = None, exclude_seen: bool = True
    ) -> dict[str, Tensor]:
        """Recommend: each user's best k items, without those of the training graph.

        Args:
            user: user indices, (b,).
            k: how many; ``top_k`` by default.
            exclude_seen: leave out what the user already has.
        Returns:
            ``item`` (b, k) int64, best first, -1 where no item is left, and ``score`` (b, k).
        Raises:
            ValueError: if a user does not exist.
            ZooError: if the model has no graph yet.
        """
        user = torch.as_tensor(user)
        if user.ndim != 1 or not len(user) or user.is_floating_point():
            raise ValueError(
                f"'user' has shape {tuple(user.shape)}, type {user.dtype}; expected (users >= 1,), integers."
            )
        user = user.to(self.device).long()
        if not user.is_meta:
            low, high = int(user.min()), int(user.max())
            if low < 0 or high >= self.bipartite.users:
                raise ValueError(f"users run from {low} to {high}; the model knows 0 to {self.bipartite.users - 1}.")
        self.take_graph(None)
        item, score = self.rank(user, k, exclude_seen=exclude_seen)
        return {"item": item, "score": score}

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """``name``: the users' own ids; ``item`` and ``score``: (b, top_k), as `predict`."""
        self.take_graph(batch)
        item, score = self.rank(batch["user"])
        return {"name": batch["name"], "item": item, "score": score}

    def example_inputs(self) -> tuple[Tensor, ...]:
        return (torch.arange(min(3, self.bipartite.users), device=self.device),)

    # ---- evaluation ---------------------------------------------------------------------------------------------

    def evaluate(self, batch: dict[str, Tensor], split: str) -> None:
        """Log recall and NDCG of the first ``top_k`` places; where the batch says ``minority``, the recall of those."""
        self.take_graph(batch)
        item, _ = self.rank(batch["user"], seen=batch.get("seen"))
        targets = {("recall", "ndcg"): batch["target"]}
        if "minority" in batch:
            targets[("minority_recall",)] = batch["target"].where(batch["minority"], -1)
        for names, target in targets.items():
            hits, relevant = self.hits(item, target), (target >= 0).sum(1)
            for name in names:
                metric = self.metrics[split][name]  # type: ignore[index]
                metric.update(hits, relevant)
                self.log(f"{split}/{name}@{self.top_k}", metric, on_step=False, on_epoch=True, batch_size=len(item))

    @staticmethod
    def hits(item: Tensor, target: Tensor) -> Tensor:
        """Which items are among the targets, both padded with -1. Shapes: (b, k), (b, t); returns (b, k) bool."""
        if not target.shape[1]:
            return torch.zeros_like(item, dtype=torch.bool)
        target = target.sort(1).values
        place = torch.searchsorted(target, item).clamp(max=target.shape[1] - 1)
        return (target.gather(1, place) == item) & (item >= 0)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.evaluate(batch, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.evaluate(batch, "test")


def spans(size: int, step: int) -> list[slice]:
    """Consecutive slices of at most ``step`` that cover ``size``."""
    return [slice(low, low + step) for low in range(0, size, step)]


def identity(*tensors: Tensor) -> list[Any]:
    """Changes when a tensor moves or is written to."""
    return [(t.device, t.data_ptr(), t._version) for t in tensors]
