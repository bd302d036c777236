"""Restoring pictures of any size: padding to the network's multiple, and overlapping tiles where memory is short."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def pad_reflect(x: Tensor, multiple: int) -> Tensor:
    """Pad height and width at the end, by reflection, to multiples of ``multiple``.

    A side too short to reflect as far as needed is reflected again (1 pixel: repeated).

    Shapes:
        x: (b, c, h, w); returns (b, c, H, W), H and W the next multiples
    """
    for dim in (-2, -1):
        while missing := -x.shape[dim] % multiple:
            size = x.shape[dim]
            step = min(missing, max(size - 1, 1))
            mode = "reflect" if size > 1 else "replicate"
            x = F.pad(x, (0, 0, 0, step) if dim == -2 else (0, step, 0, 0), mode=mode)
    return x


def check_tile(tile: int) -> int:
    """``tile`` itself, if it can be a tile's side.

    Raises:
        ValueError: if it is neither 0 (never cut) nor a multiple of 8 from 64 on.
    """
    if tile < 0 or tile % 8 or 0 < tile < 64:
        raise ValueError(f"tile is {tile}; it must be 0 (never cut) or a multiple of 8 from 64 on.")
    return tile


def starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along a side: spread evenly, on multiples of 8, neighbours sharing at least ``overlap``."""
    if size <= tile:
        return [0]
    count = -(-(size - overlap) // (tile - overlap))
    return [min(round(k * (size - tile) / (count - 1) / 8) * 8, size - tile) for k in range(count)]


def tiled(restore: Callable[[Tensor], Tensor], x: Tensor, tile: int, overlap: int) -> Tensor:
    """Restore tile by tile and blend: each tile's weight falls linearly to its inner borders over the overlap.

    What a tile's border spoils enters with a weight near zero, and where two tiles differ throughout (the network may
    look at all of a tile) the difference becomes a ramp, never an edge.

    Args:
        restore: (b, c, h, w) -> (b, c, h, w) of the same size.
        x: (b, c, h, w), sides multiples of 8.
        tile: side of a tile in pixels, a multiple of 8.
        overlap: pixels that neighbours share at least.
    """
    rows, columns = starts(x.shape[-2], tile, overlap), starts(x.shape[-1], tile, overlap)
    total, weights = None, None
    for top in rows:
        for left in columns:
            piece = restore(x[..., top : top + tile, left : left + tile])
            if total is None or weights is None:
                total = piece.new_zeros(x.shape)
                weights = piece.new_zeros(x.shape[-2:])
            down = _ramp(piece.shape[-2], top, x.shape[-2], overlap, piece)
            right = _ramp(piece.shape[-1], left, x.shape[-1], overlap, piece)
            weight = torch.outer(down, right)
            total[..., top : top + tile, left : left + tile] += piece * weight
            weights[top : top + tile, left : left + tile] += weight
    assert total is not None and weights is not None
    return total / weights


def _ramp(length: int, start: int, size: int, overlap: int, like: Tensor) -> Tensor:
    """Weights along one side of a tile: up over ``overlap`` pixels, down at the end, full at the picture's borders."""
    position = torch.arange(length, device=like.device, dtype=like.dtype) + 0.5
    up = position / overlap if start > 0 else torch.ones_like(position)
    down = (length - position) / overlap if start + length < size else torch.ones_like(position)
    return torch.minimum(up, down).clamp(max=1)
