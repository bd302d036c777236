"""PSNR and SSIM as the image restoration literature reports them: on luma, on 8-bit pictures, averaged over pictures.

The figures equal BasicSR's ``calculate_psnr`` and ``calculate_ssim`` with ``test_y_channel=True`` and those of the
MATLAB scripts that papers use: pictures are rounded to 8 bits first, luma is ITU-R BT.601 (Y in [16, 235]), SSIM takes
an 11x11 Gaussian window of sigma 1.5 wherever it fits into the picture. The generic metrics of torchmetrics differ in
each of these points.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
import torchmetrics
from torch import Tensor


def luma(rgb: Tensor, quantise: bool = True) -> Tensor:
    """Luma of ITU-R BT.601 in [16, 235]: Y = 65.481 R + 128.553 G + 24.966 B + 16, in float64 where there is one.

    Args:
        rgb: (b, 3, h, w) in [0, 1]; values outside are clamped.
        quantise: round to 8 bits first, as a picture that was saved.
    Shapes:
        returns: (b, h, w)
    """
    if rgb.ndim != 4 or rgb.shape[1] != 3:
        raise ValueError(f"A picture batch has shape (b, 3, h, w); this has {tuple(rgb.shape)}.")
    rgb = rgb.detach().to(torch.float32 if rgb.device.type == "mps" else torch.float64).clamp(0, 1)
    if quantise:
        rgb = (rgb * 255).round() / 255
    weights = rgb.new_tensor([65.481, 128.553, 24.966])
    return torch.einsum("bchw,c->bhw", rgb, weights) + 16


def psnr(a: Tensor, b: Tensor, quantise: bool = True, border: int = 0) -> Tensor:
    """Peak signal-to-noise ratio on luma, in dB, peak 255; infinite for equal pictures.

    Args:
        border: pixels left out on each side (super-resolution leaves out its scale; deraining none).
    Shapes:
        a, b: (b, 3, h, w) in [0, 1]; returns (b,)
    """
    difference = _pair(a, b, quantise, border)
    error = (difference[0] - difference[1]).square().mean((1, 2))
    return 10 * torch.log10(255**2 / error)


def ssim(a: Tensor, b: Tensor, quantise: bool = True, border: int = 0) -> Tensor:
    """Structural similarity on luma (Wang et al. 2004), at the positions where the whole window lies inside.

    Shapes:
        a, b: (b, 3, h, w) in [0, 1], sides at least 11 after the border is off; returns (b,)
    Raises:
        ValueError: if a picture is smaller than the window.
    """
    x, y = (t[:, None] for t in _pair(a, b, quantise, border))
    if min(x.shape[-2:]) < 11:
        raise ValueError(f"SSIM needs pictures of at least 11 x 11 pixels; these have {x.shape[-2]} x {x.shape[-1]}.")
    window = torch.exp(-(torch.arange(-5, 6, dtype=x.dtype, device=x.device) ** 2) / (2 * 1.5**2))
    window = window / window.sum()

    # Five local means at once; the window is separable.
    stacked = torch.cat((x, y, x * x, y * y, x * y), 1).flatten(0, 1)[:, None]
    means = F.conv2d(F.conv2d(stacked, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
    mx, my, xx, yy, xy = means.unflatten(0, (len(x), 5))[:, :, 0].unbind(1)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mx * my + c1) * (2 * (xy - mx * my) + c2)
    similarity = similarity / ((mx**2 + my**2 + c1) * (xx - mx**2 + yy - my**2 + c2))
    return similarity.mean((1, 2))


def _pair(a: Tensor, b: Tensor, quantise: bool, border: int) -> tuple[Tensor, Tensor]:
    if a.shape != b.shape:
        raise ValueError(f"The pictures differ in shape: {tuple(a.shape)} and {tuple(b.shape)}.")
    inner = slice(border, -border or None)
    return luma(a, quantise)[:, inner, inner], luma(b, quantise)[:, inner, inner]


class _MeanOverPictures(torchmetrics.Metric):
    """The mean over pictures of a function of (prediction, target, ...); sums are kept, so that processes add up."""

    higher_is_better: ClassVar[bool] = True  # type: ignore[misc]
    is_differentiable: ClassVar[bool] = False  # type: ignore[misc]
    full_state_update: ClassVar[bool] = False  # type: ignore[misc]
    total: Tensor
    count: Tensor

    def __init__(self, quantise: bool = True, border: int = 0):
        super().__init__()
        self.quantise, self.border = quantise, border
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def measure(self, *pictures: Tensor) -> Tensor:
        raise NotImplementedError

    def update(self, *pictures: Tensor) -> None:
        """Take in a batch.

        Shapes:
            pictures: prediction, target (and what else the metric takes), each (b, 3, h, w) in [0, 1]
        """
        values = self.measure(*pictures)
        self.total = self.total + values.sum().to(self.total.dtype)
        self.count = self.count + len(values)

    def compute(self) -> Tensor:
        return self.total / self.count


class PSNR(_MeanOverPictures):
    """Mean over pictures of `psnr`, in dB. A picture equal to its target counts as ``ceiling``.

    Args:
        quantise: round to 8 bits first.
        border: pixels left out on each side.
        ceiling: dB of a perfect picture, whose true value is infinite and would be the mean of any set.
    """

    def __init__(self, quantise: bool = True, border: int = 0, ceiling: float = 100.0):
        super().__init__(quantise, border)
        self.ceiling = ceiling

    def measure(self, *pictures: Tensor) -> Tensor:
        prediction, target = pictures
        return psnr(prediction, target, self.quantise, self.border).clamp(max=self.ceiling)


class PSNRGain(PSNR):
    """Mean over pictures of psnr(prediction, target) - psnr(input, target), in dB: what the restoration gained.

    Takes (prediction, target, input). Arguments as in `PSNR`.
    """

    def measure(self, *pictures: Tensor) -> Tensor:
        prediction, target, given = pictures
        return super().measure(prediction, target) - super().measure(given, target)


class SSIM(_MeanOverPictures):
    """Mean over pictures of `ssim`.

    Args:
        quantise: round to 8 bits first.
        border: pixels left out on each side.
    """

    def measure(self, *pictures: Tensor) -> Tensor:
        prediction, target = pictures
        return ssim(prediction, target, self.quantise, self.border)
