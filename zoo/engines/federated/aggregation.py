"""What a server, or a client among its peers, does with what came in: small functions of stacked tensors.

Index legend: s clients that answered. A message is a dict of tensors; many messages lie stacked, each (s, ...).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

Message = dict[str, Tensor]


def full_precision(x: Tensor) -> torch.autocast:
    """No autocast on the device of ``x`` within; the meta device knows none anyway."""
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)


def average(stacked: Mapping[str, Tensor], weights: Tensor) -> Message:
    """Weighted mean over clients; integer tensors (batch norm's counters) are rounded.

    Shapes:
        stacked: each (s, ...); weights: (s,), not negative, scaled here to sum 1; returns: each (...)
    Raises:
        ValueError: if no weight is positive.
    """
    if not weights.is_meta and not bool(weights.sum() > 0):
        raise ValueError("No client to average: all weights are 0.")
    share = weights / weights.sum()
    return {name: _weighted(value, share[None])[0] for name, value in stacked.items()}


def mix(stacked: Mapping[str, Tensor], matrix: Tensor) -> Message:
    """Every client's own weighted sum of all: row i of ``matrix`` says how much client i takes of each.

    Shapes:
        stacked: each (s, ...); matrix: (r, s); returns: each (r, ...)
    """
    return {name: _weighted(value, matrix) for name, value in stacked.items()}


def _weighted(value: Tensor, matrix: Tensor) -> Tensor:
    kind = value.dtype if value.dtype in (torch.float32, torch.float64) else torch.float32
    with full_precision(value):  # a mean in half precision would lose the update
        found = matrix.to(value.device, kind) @ value.reshape(len(value), -1).to(kind)
    found = found.view(len(matrix), *value.shape[1:])
    return found.to(value.dtype) if value.is_floating_point() else found.round().to(value.dtype)


def nbytes(message: Mapping[str, Tensor]) -> int:
    """Size of a message as it would be sent, densely."""
    return sum(value.numel() * value.element_size() for value in message.values())


def gather(stacked: Message, total: int) -> Message:
    """All clients' messages on every rank, in the order of the round, of which rank r trained r, r + world, ...

    Shapes:
        stacked: each (own, ...); returns: each (total, ...)
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return stacked
    world = dist.get_world_size()
    most = -(-total // world)
    found = {}
    for name, value in stacked.items():
        padded = value.new_zeros(most, *value.shape[1:])
        padded[: len(value)] = value
        parts = [torch.empty_like(padded) for _ in range(world)]
        dist.all_gather(parts, padded.contiguous())
        found[name] = torch.stack(parts, 1).flatten(0, 1)[:total]
    return found
