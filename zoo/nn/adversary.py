"""Adversaries: they change inputs within a small ball so that a loss grows.

Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018, arXiv:1706.06083 (PGD);
Goodfellow et al., "Explaining and Harnessing Adversarial Examples", ICLR 2015, arXiv:1412.6572 (FGSM).

Index legend: n samples, of any shape.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from zoo.core.errors import nearest

KINDS = ("pgd_linf", "pgd_l2", "fgsm")


class Adversary(nn.Module):
    """Projected gradient ascent on the inputs of a loss, whose other arguments stay as they are.

        x_0 = P(x + radius * start),   x_{t+1} = P(x_t + step * direction(grad loss(x_t)))

    P goes back into the ball of ``radius`` around x, then into [low, high]. The direction is the sign of the gradient
    ("pgd_linf", "fgsm") or the gradient over its norm ("pgd_l2"). "fgsm" takes one step of the whole radius.

    It is made of `torch.func.grad`, so it runs as well inside `torch.func.vmap`, and leaves no gradients behind.

    Args:
        kind: "pgd_linf", "pgd_l2" or "fgsm". radius: of the ball. step: length of a step. steps: how many.
        low, high: range of the inputs; None for no bound.
    Raises:
        ValueError: for an unknown kind, negative lengths, or fewer than one step.
    Example:
        >>> import torch
        >>> x, attack = torch.full((2, 3), 0.5), Adversary("pgd_linf", radius=0.1, step=0.05, steps=3)
        >>> attack(lambda z: z.square().sum(1), x)
        tensor([[0.6000, 0.6000, 0.6000],
                [0.6000, 0.6000, 0.6000]])
    """

    def __init__(
        self,
        kind: str = "pgd_linf",
        radius: float = 8 / 255,
        step: float = 2 / 255,
        steps: int = 7,
        low: float | None = 0.0,
        high: float | None = 1.0,
    ):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"No attack {kind!r}.{nearest(kind, list(KINDS))} There are {', '.join(KINDS)}.")
        if radius < 0 or step < 0:
            raise ValueError(f"radius={radius}, step={step} of an attack must not be negative.")
        if steps < 1:
            raise ValueError(f"An attack of {steps} steps; at least 1.")
        self.kind, self.radius, self.low, self.high = kind, radius, low, high
        self.step, self.steps = (radius, 1) if kind == "fgsm" else (step, steps)

    def draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Random starts in the unit ball: uniform in each number, or with a uniform radius on a uniform direction.

        Shapes:
            shape: (n, ...); returns: the same
        """
        if self.kind != "pgd_l2":
            return 2 * torch.rand(shape, generator=generator) - 1
        direction = torch.randn(shape, generator=generator)
        return (
            torch.rand(shape[0], generator=generator).view(-1, *[1] * (len(shape) - 1)) * direction / _norm(direction)
        )

    def forward(self, loss: Callable[[Tensor], Tensor], x: Tensor, start: Tensor | None = None) -> Tensor:
        """The changed inputs.

        Args:
            loss: of inputs like x, a number for each sample or their sum.
        Shapes:
            x: (n, ...); start: the same, see `draw`, or None to start at x; returns: the same
        """
        x = x.detach()
        slope = torch.func.grad(lambda z: loss(z).sum())
        moved = x if start is None else self.project(x + self.radius * start, x)
        for _ in range(self.steps):
            gradient = slope(moved)
            direction = gradient / _norm(gradient) if self.kind == "pgd_l2" else gradient.sign()
            moved = self.project(moved + self.step * direction, x)
        return moved.detach()

    def project(self, moved: Tensor, x: Tensor) -> Tensor:
        """The nearest inputs within the ball around x, then within [low, high], which holds x."""
        if self.kind == "pgd_l2":
            away = moved - x
            moved = x + away * (self.radius / _norm(away)).clamp(max=1.0)
        else:
            moved = torch.minimum(torch.maximum(moved, x - self.radius), x + self.radius)
        return moved if self.low is None and self.high is None else moved.clamp(self.low, self.high)


def _norm(x: Tensor) -> Tensor:
    """Length of each sample, (n, 1, ...), never 0."""
    return x.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, *[1] * (x.ndim - 1))


@contextmanager
def attacked(model: nn.Module, training: bool = False) -> Iterator[None]:
    """A network as an adversary sees it: in eval mode, or in train mode with batch norm's memory left as it is."""
    was = {m: m.training for m in model.modules()}
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats] if training else []
    model.train(training)
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
        for m, mode in was.items():
            m.training = mode
