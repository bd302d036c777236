"""Checks of what users hand in: one clear line instead of a wrong result."""

from typing import Any

import torch
from torch import Tensor


def check_finite(x: Tensor, name: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        ValueError: naming the tensor and how many of its values are not finite.
    """
    if x.is_meta or not (x.is_floating_point() or x.is_complex()):
        return
    finite = torch.isfinite(x)
    if not bool(finite.all()):
        raise ValueError(
            f"'{name}' holds {int((~finite).sum())} values that are NaN or infinite (of {x.numel()}). "
            "Remove or fill them before they reach the model."
        )


def check_batch(batch: Any, allowed: tuple[str, ...] = ()) -> None:
    """Refuse a batch with no samples or with NaN in a float tensor whose key is not in ``allowed``.

    Raises:
        ValueError: naming the key.
    """
    if hasattr(batch, "to_dict") and not isinstance(batch, dict):  # torch_geometric's Data
        batch = batch.to_dict()
    if not isinstance(batch, dict):
        return
    for key, value in batch.items():
        if isinstance(value, Tensor) and value.layout == torch.strided and key not in allowed:
            if value.ndim and value.shape[0] == 0 and key not in ("edge_index", "edge_attr"):
                raise ValueError(
                    f"The batch is empty: '{key}' has shape {tuple(value.shape)}. Give at least one sample."
                )
            check_finite(value, key)


def check_channels(x: Tensor, channels: int, name: str, dims: int = 4) -> None:
    """Refuse anything but ``(batch, channels, ...)`` with ``dims`` dimensions and at least one sample.

    Raises:
        ValueError: saying the shape that came and the one expected.
    """
    if x.ndim != dims or x.shape[1] != channels or x.shape[0] == 0:
        wanted = ", ".join(["batch >= 1", str(channels), *["height", "width", "depth"][: dims - 2]])
        raise ValueError(f"'{name}' has shape {tuple(x.shape)}; expected ({wanted}).")
