"""Full-ranking metrics of top-N recommendation: Recall@k and NDCG@k from the ranked list alone.

They take what a blocked ranking leaves behind (which of the first k items are relevant, and how many relevant items
there are), so that no (users, items) score matrix is kept.
"""

import torch
from torch import Tensor
from torchmetrics import Metric


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
