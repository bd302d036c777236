"""Metrics of out-of-distribution detection: FPR95, AUROC and AUPR, with the known ("ID") images as positives."""

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_auroc, binary_average_precision, binary_roc
from torchmetrics.utilities.data import dim_zero_cat


def ranks(score: Tensor) -> Tensor:
    """Scores as ranks in [0, 1], ties kept: torchmetrics squashes what lies outside, and merges close scores so."""
    values, inverse = torch.unique(score, return_inverse=True)
    return inverse.double() / max(1, len(values) - 1)


def fpr_at_tpr(score: Tensor, known: Tensor, tpr: float = 0.95, nearest: bool = True) -> Tensor:
    """The share of unknown images accepted where the share ``tpr`` of known ones is.

    Args:
        nearest: the threshold whose true positive rate is nearest to ``tpr``, as in the code that the OOD literature
            shares (on equal rates the larger false positive rate); False: the first threshold that reaches ``tpr``.
    Shapes:
        score: (n,) float, large = known; known: (n,) bool; returns: scalar in [0, 1].
    """
    false, true, _ = binary_roc(ranks(score), known.long())
    if not nearest:
        return false[torch.nonzero(true >= tpr)[0, 0]]
    # the origin (nothing accepted) is no candidate, nor what lies beyond the first threshold that accepts all
    last = int(torch.nonzero(true >= 1)[0, 0])
    gap = (true[1 : last + 1].double() - tpr).abs()
    best = int(torch.nonzero(gap <= gap.min() + 1e-12)[-1, 0]) + 1
    return false[best]


class OODMetrics(Metric):
    """FPR95, AUROC and AUPR of known images against each set of unknown ones, and their means over the sets.

    `compute` returns ``fpr95``, ``auroc``, ``aupr`` (means) and ``fpr95/1``, ... for each set by its number; nothing
    where known or unknown images are lacking.

    Shapes:
        update(score (n,) float, large = known; group (n,) long, 0 = known, 1, 2, ... = the set it comes from).
    """

    full_state_update = False
    score: list[Tensor]
    group: list[Tensor]

    def __init__(self, nearest: bool = True):
        super().__init__()
        self.nearest = nearest
        self.add_state("score", default=[], dist_reduce_fx="cat")
        self.add_state("group", default=[], dist_reduce_fx="cat")

    def update(self, score: Tensor, group: Tensor) -> None:
        if score.shape != group.shape or score.ndim != 1:
            raise ValueError(f"score {tuple(score.shape)} and group {tuple(group.shape)} must be equally long vectors.")
        self.score.append(score.detach().float())
        self.group.append(group.detach().long())

    def compute(self) -> dict[str, Tensor]:
        if not len(self.score):
            return {}
        score, group = dim_zero_cat(self.score), dim_zero_cat(self.group)
        sets = [int(g) for g in group.unique() if g > 0]
        if not bool((group == 0).any()):
            return {}
        figures: dict[str, Tensor] = {}
        for number in sets:
            kept = (group == 0) | (group == number)
            s, known = score[kept], group[kept] == 0
            figures[f"fpr95/{number}"] = fpr_at_tpr(s, known, nearest=self.nearest).float()
            figures[f"auroc/{number}"] = binary_auroc(ranks(s), known.long()).float()
            figures[f"aupr/{number}"] = binary_average_precision(ranks(s), known.long()).float()
        for name in ("fpr95", "auroc", "aupr") if sets else ():
            figures[name] = torch.stack([figures[f"{name}/{number}"] for number in sets]).mean()
        return figures
