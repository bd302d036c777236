"""The best k of many items, and full-ranking metrics of top-N recommendation: Recall@k and NDCG@k.

The metrics take what a blocked ranking leaves behind (which of the first k items are relevant, and how many relevant
items there are), so that no (users, items) score matrix is kept.
"""

import torch
from torch import Tensor
from torchmetrics import Metric

GROUP = 64  # scores that `best` looks at together: 256 bytes; 32 and 128 are slower for 20 of 40,000 items


def best(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest scores of each row and where they are, largest first; of equal ones the first in the row.

    As ``scores.topk(k)``, which leaves open which of equal scores it takes, but in two stages: the best k items lie in
    the k groups whose largest scores are the largest, so that only these groups are searched. One group and one item
    more than k show whether the choice was free.

    Shapes:
        scores: (b, n) float; returns: scores (b, k) and indices (b, k) int64
    Raises:
        ValueError: unless 1 <= k <= n.
    """
    b, n = scores.shape
    if not 1 <= k <= n:
        raise ValueError(f"k is {k}; it must lie in 1..{n}, the number of scores in a row.")
    more = min(k + 1, n)
    groups = n // GROUP
    if 2 * more > groups:  # too few groups to leave any out
        score, index = scores.topk(more, dim=1)
    else:
        whole = groups * GROUP
        grouped = scores[:, :whole].unflatten(1, (groups, GROUP))
        chosen = grouped.amax(2).topk(more, dim=1, sorted=False).indices
        within = torch.arange(GROUP, device=scores.device)
        rows = torch.arange(b, device=scores.device)[:, None]
        score = torch.cat((grouped[rows, chosen].flatten(1), scores[:, whole:]), dim=1)
        rest = torch.arange(whole, n, device=scores.device).expand(b, -1)
        index = torch.cat(((chosen[:, :, None] * GROUP + within).flatten(1), rest), dim=1)
        score, place = score.topk(more, dim=1)
        index = index.gather(1, place)
    if scores.is_meta:
        return score[:, :k], index[:, :k]
    equal = (score[:, 1:] == score[:, :-1]) & (score[:, 1:] > -torch.inf)
    score, index = score[:, :k], index[:, :k]
    for part in equal.any(1).nonzero().flatten().split(GROUP):  # few rows at a time: the counts below take memory
        row, least = scores[part], score[part, -1:]
        above, level = ~(row <= least), row == least
        taken = above | (level & (level.cumsum(1, dtype=torch.int32) <= k - above.sum(1, keepdim=True)))
        first = taken.nonzero()[:, 1].view(-1, k)
        score[part], order = torch.sort(row.gather(1, first), dim=1, descending=True, stable=True)
        index[part] = first.gather(1, order)
    return score, index


class _RankedList(Metric):
    """Mean over users of a figure of the first k places; users without a relevant item do not count."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    total: Tensor
    users: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("users", torch.zeros(()), dist_reduce_fx="sum")

    def figure(self, hits: Tensor, relevant: Tensor) -> Tensor:
        raise NotImplementedError

    def update(self, hits: Tensor, relevant: Tensor) -> None:
        """Add users.

        Args:
            hits: True where the item at that place is relevant, best place first.
            relevant: how many relevant items the user has, also beyond place k.
        Shapes:
            hits: (b, k) bool; relevant: (b,) integer
        """
        if hits.ndim != 2 or relevant.shape != hits.shape[:1]:
            raise ValueError(
                f"hits has shape {tuple(hits.shape)} and relevant {tuple(relevant.shape)}; "
                "expected (users, k) and (users,)."
            )
        counted = relevant > 0
        figure = self.figure(hits.float(), relevant.clamp(min=1)) * counted
        self.total += figure.sum()
        self.users += counted.sum()

    def compute(self) -> Tensor:
        """The mean, NaN where no user had a relevant item."""
        return self.total / self.users


class RecallAtK(_RankedList):
    """Recall@k = hits in the first k / relevant items, averaged over users."""

    def figure(self, hits: Tensor, relevant: Tensor) -> Tensor:
        return hits.sum(1) / relevant


class NDCGAtK(_RankedList):
    """NDCG@k with binary relevance, averaged over users.

    DCG = sum over places p = 1..k of hit_p / log2(p + 1),   NDCG = DCG / (DCG of min(k, relevant) hits first)
    """

    def figure(self, hits: Tensor, relevant: Tensor) -> Tensor:
        places = torch.arange(hits.shape[1], device=hits.device, dtype=hits.dtype)
        gain = 1 / torch.log2(places + 2)
        ideal = gain.cumsum(0)[relevant.clamp(max=hits.shape[1]) - 1]
        return hits @ gain / ideal
