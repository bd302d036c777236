"""OrdinalShading: a photograph split into albedo and shading, at high resolution and in the wild.

Paper: Chris Careaga, Yağız Aksoy, "Intrinsic Image Decomposition via Ordinal Shading", ACM Transactions on Graphics
43(1) 2023, arXiv:2311.12792. Code by the authors: https://github.com/compphoto/Intrinsic, for academic use only; the
method is the subject of a patent application. This file is written from the paper's equations; the authors' weights
are not distributed with it.

In: a picture I in linear RGB. Out: albedo A (three channels) and grey shading S with I = A * S. Shading is handled as
D = 1 / (1 + S), which lies in (0, 1). Two networks:

    O = ordinal(I)             shading up to a scale and a shift: which of two points is lit more
    O_b = O at 384 pixels      knows the whole scene;   O_f = O at the working size R: keeps every edge
    O_f is brought to the scale of O_b:  c = argmin |c Y(I)/S_f - Y(I)/S_b|^2,  S = 1/O - 1,  Y luminance
    D = merge(I, O_b, O_f);    S = 1/D - 1;    A = I / S

Losses, over the pixels of a mask, with T = 1 / (1 + S_gt) and G the multi-scale gradient:

    L_1 = |s O + b - T|^2 + G(s O + b - T)      (s, b) the least squares fit per picture, s >= 0
    L_2 = |D - T|^2 + G(D - T) + |I/S - A_gt|^2 + G(I/S - A_gt)

Departs from the paper's code: a squared-error fit whose scale had to be cut at zero gets its own best shift
(``authors_shift=True`` leaves the negative scale's); the scale between O_b and O_f is fitted over all pixels, not over
a random half; shading stays above 0.001, so that I = A * S holds with finite albedo. Open in the paper, and chosen
here: the weight of G (1), the training schedule, and in L_2 the scale of the truth, which is brought to that of O_b,
since nothing else is known at inference. Colour shading (a later paper) is not part of this.

Index legend: b picture, c channel, h/w height/width, n lights of a scene.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.core import ZooError, ZooModule, check_channels, check_finite, unwrap
from zoo.nn.intrinsic_metrics import LMSE, WHDR, ScaleInvariantRMSE, ScaleInvariantSSIM
from zoo.nn.layout import channels_last
from zoo.vision.restoration.working_size import check_working_size, optimal_size, resize, rounded_size

FLOOR = 1e-3
"""The least shading, and the least inverse shading."""

# ---- shading and its inverse --------------------------------------------------------------------------------------


def luminance(rgb: Tensor) -> Tensor:
    """CCIR 601 luminance: (..., 3, h, w) -> (..., 1, h, w)."""
    r, g, b = rgb.unbind(-3)
    return (0.3 * r + 0.59 * g + 0.11 * b).unsqueeze(-3)


def invert(shading: Tensor) -> Tensor:
    """D = 1 / (1 + S)."""
    return 1 / (1 + shading)


def uninvert(inverse: Tensor, floor: float = FLOOR) -> Tensor:
    """S = 1 / D - 1, D first clamped to [floor, 1]."""
    return 1 / inverse.clamp(floor, 1.0) - 1


def equalise(image: Tensor, base: Tensor, full: Tensor, mask: Tensor | None = None) -> Tensor:
    """O_f at the scale of O_b: the albedos that they imply agree in least squares.

    Args:
        mask: pixels to fit over, all by default.
    Shapes:
        image: (b, 3, h, w) linear; base, full: (b, 1, h, w) in (0, 1); mask: (b, 1, h, w); returns (b, 1, h, w)
    """
    y = luminance(image)
    a_base, a_full = (y / (1 / o.clamp_min(1e-5) - 1).clamp_min(1e-5) for o in (base, full))
    weighted = a_full if mask is None else a_full * mask
    energy = (weighted * a_full).sum((1, 2, 3), keepdim=True)
    scale = (weighted * a_base).sum((1, 2, 3), keepdim=True) / energy
    scale = torch.where(energy > 0, scale, 1)
    return invert(y / (scale * a_full).clamp_min(1e-5))


# ---- the networks, in the order of the forward pass ---------------------------------------------------------------


class Plain(nn.Module):
    """A small encoder: at each of four levels two 3x3 convolutions, the first of stride 2.

    Shapes:
        x: (b, c, h, w); returns four features at strides 2, 4, 8, 16
    """

    def __init__(self, channels: int, widths: list[int]):
        super().__init__()
        self.widths, self.strides = widths, [2, 4, 8, 16]
        self.levels = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, width, 3, stride=2, padding=1),
                nn.ReLU(inplace=True),
                nn.Conv2d(width, width, 3, padding=1),
                nn.ReLU(inplace=True),
            )
            for before, width in zip([channels, *widths], widths, strict=False)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for level in self.levels:
            x = level(x)
            found.append(x)
        return found


def encoder(which: str | list[int], channels: int, pretrained: bool) -> tuple[nn.Module, list[int], list[int]]:
    """An encoder with the widths and strides of its four features: a timm model, or `Plain` of the widths given.

    Raises:
        ValueError: if timm knows no such model, or it has no features at four strides.
    """
    if isinstance(which, list):
        if len(which) != 4 or min(which) < 1:
            raise ValueError(f"An encoder given by widths has four of them, not {which}.")
        plain = Plain(channels, which)
        return plain, plain.widths, plain.strides
    import timm

    try:
        net = timm.create_model(
            which, pretrained=pretrained, in_chans=channels, features_only=True, out_indices=(1, 2, 3, 4)
        )
    except (RuntimeError, IndexError, AssertionError, AttributeError) as error:
        raise ValueError(
            f"timm has no encoder {which!r} with features at strides 4 to 32 ({str(error).splitlines()[0]}). "
            "`timm.list_models()` names all."
        ) from error
    return net, net.feature_info.channels(), net.feature_info.reduction()  # type: ignore[operator,union-attr]


class Residual(nn.Module):
    """x + conv(relu(conv(relu(x)))).

    Args:
        rectified: what is added is relu(x). The paper's ordinal network does this: its rectifier works in place.
    """

    def __init__(self, width: int, rectified: bool):
        super().__init__()
        self.rectified = rectified
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu_(x) if self.rectified else F.relu(x)  # in place where nobody needs x any more
        z = self.conv2(F.relu_(self.conv1(y)))
        return z.add_(y if self.rectified else x)


class Fusion(nn.Module):
    """One level of the decoder (RefineNet): twice the size of residual(above + residual(skip)), to ``out`` channels.

    Args:
        width: channels of ``above`` and ``skip``.
        out: channels after a 1x1 convolution; None has no such convolution.
        first: the deepest level, which has nothing above it.
    """

    def __init__(self, width: int, out: int | None, rectified: bool, first: bool = False):
        super().__init__()
        self.skip = None if first else Residual(width, rectified)
        self.residual = Residual(width, rectified)
        self.out = None if out is None else nn.Conv2d(width, out, 1)

    def forward(self, skip: Tensor, above: Tensor | None) -> Tensor:
        if self.skip is not None:
            skip = self.skip(skip)
            skip = skip if above is None else skip.add_(above)
        x = self.residual(skip)
        if self.out is not None:  # before enlarging, with which it commutes: a quarter of the work
            x = self.out(x)
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


class Head(nn.Module):
    """conv3x3, twice the size, conv3x3, relu, conv1x1, sigmoid: (b, width, h, w) -> (b, 1, scale h, scale w)."""

    def __init__(self, width: int, inner: int, last: int, scale: int):
        super().__init__()
        self.scale = scale
        self.conv1 = nn.Conv2d(width, inner, 3, padding=1)
        self.conv2 = nn.Conv2d(inner, last, 3, padding=1)
        self.conv3 = nn.Conv2d(last, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or self.scale == 1 or x.shape[-2] <= 32:
            return self.finish(x)
        # The enlarged feature is the largest tensor of all: made in strips, of which each borrows a row of its
        # neighbours. A row near a cut depends on what lies beyond it; those are computed twice and dropped.
        strips, step, h, s = [], 32, x.shape[-2], self.scale
        for top in range(0, h, step):
            bottom = min(top + step, h)
            low, high = max(top - 1, 0), min(bottom + 1, h)
            strip = self.finish(x[..., low:high, :])
            strips.append(strip[..., s * (top - low) : s * (bottom - low), :])
        return torch.cat(strips, -2)

    def finish(self, x: Tensor) -> Tensor:
        if self.scale > 1:
            x = F.interpolate(x, scale_factor=self.scale, mode="bilinear", align_corners=False)
        return self.conv3(F.relu_(self.conv2(x))).sigmoid()


class ShadingNet(nn.Module):
    """Encoder and RefineNet decoder to one map in (0, 1): (b, channels, h, w) -> (b, 1, h, w), sides multiples of 32.

    Args:
        which: the encoder, see `encoder`.
        channels: of the input.
        width: of the decoder, at its finest level.
        taper: the merge network: widths double with each level, a 1x1 convolution halves them on the way up, and the
            output's bias starts at zero. Without, the ordinal network: one width, and rectified residuals.
        pretrained: start the encoder with timm's weights.
    """

    def __init__(self, which: str | list[int], channels: int, width: int, taper: bool, pretrained: bool = False):
        super().__init__()
        self.encoder, found, strides = encoder(which, channels, pretrained)
        widths = [width * 2**level if taper else width for level in range(4)]
        self.project = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1, bias=False) for before, after in zip(found, widths, strict=True)
        )
        outs = [widths[max(level - 1, 0)] if taper else None for level in range(4)]
        self.fusion = nn.ModuleList(
            Fusion(widths[level], outs[level], rectified=not taper, first=level == 3) for level in range(4)
        )
        self.head = Head(width, max(width // 2, 1), min(32, width), strides[0] // 2)
        if taper:
            nn.init.zeros_(self.head.conv3.bias)  # type: ignore[arg-type]
        else:
            # L_1 leaves the contrast of O free: it stays what it was at first, and torch's first weights give a map so
            # flat (a twelfth of T's contrast) that the merge network, which reads it, hardly sees it.
            with torch.no_grad():
                self.head.conv3.weight.mul_(10)

    def forward(self, x: Tensor) -> Tensor:
        features = list(self.encoder(x if isinstance(self.encoder, Plain) else channels_last(x)))
        path = None
        for level in (3, 2, 1, 0):
            path = self.fusion[level](self.project[level](features.pop()), path)
        return self.head(path)


# ---- losses -------------------------------------------------------------------------------------------------------


def scale_and_shift(o: Tensor, target: Tensor, mask: Tensor, authors_shift: bool = False) -> tuple[Tensor, Tensor]:
    """The least squares fit s, b of s O + b to T over a mask, per picture; s is cut at 0. Differentiable.

    Args:
        authors_shift: after a cut, keep the shift that belonged to the negative scale; for a constant O both are 0.
            Otherwise the shift is then the mean of T, the best there is.
    Shapes:
        o, target, mask: (b, 1, h, w); returns two of (b, 1, 1, 1)
    """
    count = mask.sum((1, 2, 3), keepdim=True).clamp_min(1e-12)
    mean_o, mean_t = ((v * mask).sum((1, 2, 3), keepdim=True) / count for v in (o, target))
    centred = (o - mean_o) * mask
    variance = (centred * (o - mean_o)).sum((1, 2, 3), keepdim=True)
    covariance = (centred * (target - mean_t)).sum((1, 2, 3), keepdim=True)
    # of a constant, rounding leaves a variance of a few units in the last place
    varies = variance > count * (8 * torch.finfo(o.dtype).eps * mean_o).square()
    raw = torch.where(varies, covariance / torch.where(varies, variance, 1), 0)
    scale = raw.relu()
    if authors_shift:
        return scale, torch.where(varies, mean_t - raw * mean_o, 0)
    return scale, mean_t - scale * mean_o


def masked_mse(x: Tensor, target: Tensor, mask: Tensor, per_image: bool = False) -> Tensor:
    """Mean squared error over the masked pixels of the whole batch, or the mean of each picture's own.

    Shapes:
        x, target: (b, c, h, w); mask: (b, 1, h, w); returns a scalar
    """
    squares = (x - target).square() * mask
    if per_image:
        return (squares.sum((1, 2, 3)) / (mask.sum((1, 2, 3)) * x.shape[1]).clamp_min(1e-12)).mean()
    return squares.sum() / (mask.sum() * x.shape[1]).clamp_min(1e-12)


DERIVATIVE = (0.425287, 0.0, -0.425287)  # Farid and Simoncelli, three taps: derivative ...
SMOOTHING = (0.229879, 0.540242, 0.229879)  # ... and the prefilter across it


def slopes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives of pictures across and down, of the same size: borders are mirrored.

    Sums of shifted pictures, as a convolution of one channel wastes most of its work.
    """
    d, side, centre = DERIVATIVE[0], SMOOTHING[0], SMOOTHING[1]
    x = F.pad(x, (1, 1, 1, 1), mode="reflect")
    rows = side * (x[..., :-2, :] + x[..., 2:, :]) + centre * x[..., 1:-1, :]
    columns = side * (x[..., :-2] + x[..., 2:]) + centre * x[..., 1:-1]
    return d * (rows[..., :-2] - rows[..., 2:]), d * (columns[..., :-2, :] - columns[..., 2:, :])


def gradient_loss(x: Tensor, target: Tensor, mask: Tensor, scales: int = 4, per_image: bool = False) -> Tensor:
    """G: the gradient's magnitude of x - target at sizes 1, 1/2, 1/4, 1/8; the mean over the sizes.

    A pixel counts where the mask, shrunk with the picture, is whole in the 3x3 about it.

    Shapes:
        x, target: (b, c, h, w); mask: (b, 1, h, w); returns a scalar
    """
    difference = x - target
    total = x.new_zeros(())
    for scale in range(scales):
        if min(x.shape[-2:]) >> scale < 2:
            break  # too small for a slope
        small, kept = difference, mask
        if scale:
            options: dict[str, Any] = {"mode": "bilinear", "align_corners": True, "antialias": True}
            small = F.interpolate(difference, scale_factor=0.5**scale, **options)
            kept = F.interpolate(mask, scale_factor=0.5**scale, **options)
        kept = -F.max_pool2d(-torch.floor(kept + 1e-3), 3, stride=1, padding=1)
        across, down = slopes(small)
        magnitude = (across.square() + down.square() + 1e-8).sqrt().mean(1, keepdim=True)
        if per_image:
            total = total + ((magnitude * kept).sum((1, 2, 3)) / kept.sum((1, 2, 3)).clamp_min(1)).mean()
        else:
            total = total + (magnitude * kept).sum() / kept.sum().clamp_min(1)
    return total / scales


def ordinal_loss(
    o: Tensor,
    target: Tensor,
    mask: Tensor,
    gradient: float = 1.0,
    invariant: bool = True,
    authors_shift: bool = False,
    per_image: bool = False,
) -> Tensor:
    """L_1: O against T up to a scale and a shift.

    Args:
        gradient: weight of G.
        invariant: fit scale and shift first; without, O is compared as it is.
        authors_shift, per_image: see `scale_and_shift` and `masked_mse`.
    Shapes:
        o, target, mask: (b, 1, h, w); returns a scalar
    """
    if invariant:
        scale, shift = scale_and_shift(o, target, mask, authors_shift)
        o = scale * o + shift
    return masked_mse(o, target, mask, per_image) + gradient * gradient_loss(o, target, mask, per_image=per_image)


def merge_loss(
    inverse: Tensor,
    image: Tensor,
    target: Tensor,
    albedo: Tensor,
    mask: Tensor,
    gradient: float = 1.0,
    on_albedo: bool = True,
    per_image: bool = False,
) -> Tensor:
    """L_2: D against T, and the albedo that D implies against the true one.

    Shapes:
        inverse, target, mask: (b, 1, h, w); image, albedo: (b, 3, h, w); returns a scalar
    """
    pairs = [(inverse, target)]
    if on_albedo:
        pairs.append((image / uninvert(inverse).clamp_min(FLOOR), albedo))
    parts = [
        masked_mse(x, t, mask, per_image) + gradient * gradient_loss(x, t, mask, per_image=per_image) for x, t in pairs
    ]
    return torch.stack(parts).sum()


# ---- the method ---------------------------------------------------------------------------------------------------


class OrdinalShading(ZooModule):
    """Intrinsic decomposition via ordinal shading (arXiv:2311.12792).

    Training takes the ordinal network first and then, with it frozen, the merge network: both in one run
    (``stage="both"``), or one at a time, the second from the first's checkpoint:
    ``OrdinalShading.from_pretrained(folder, stage="merge")``.

    Args:
        stage: what is trained: ``"ordinal"``, ``"merge"`` (the ordinal network is frozen), or ``"both"``: the first
            ``share`` of the Trainer's steps the one, the rest the other. ``"ordinal"`` also makes `forward` return O.
        encoder: of the ordinal network: a timm model's name, or four widths of a small plain one.
        merge_encoder: of the merge network.
        width: channels of the ordinal network's decoder.
        merge_width: channels of the merge network's decoder at its finest level; doubled with each level.
        pretrained: start both encoders with timm's weights (those of the paper's ResNeXt are CC BY-NC).
        ordinal: the ordinal network's loss: ``"ssi"``, invariant to scale and shift, is the paper's; ``"mse"`` fits T
            itself; ``"none"`` drops the network: the other one regresses D from the picture alone.
        albedo_loss: with the albedo's part of L_2.
        base: side in pixels of the pass that sees the whole scene: the receptive field.
        resolution: working size of `predict`: ``"optimal"`` is the R_x rule, ``"own"`` the picture's, or pixels of the
            longer side.
        confidence: x of R_x, the share of pixels that may see no edge.
        max_size: most pixels of the longer side under R_x.
        gradient: weight of the multi-scale gradient in both losses.
        per_image: mean over pictures of their masked means, instead of over all masked pixels of a batch.
        authors_shift: keep the shift of a scale that was cut at zero, as the authors' code does.
        share: of the steps that train the ordinal network, where ``stage`` is ``"both"``.
        lr: Adam's learning rate.
        encoder_lr: Adam's learning rate for the encoders.
    Raises:
        ValueError: if an argument is out of range.
    Example:
        >>> model = OrdinalShading.from_variant("tiny")
        >>> result = model.predict(torch.rand(1, 3, 50, 70))
        >>> result["albedo"].shape, result["shading"].shape
        (torch.Size([1, 3, 50, 70]), torch.Size([1, 1, 50, 70]))
    """

    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {
            "encoder": [8, 16, 24, 32],
            "merge_encoder": [8, 16, 24, 32],
            "width": 16,
            "merge_width": 8,
            "base": 32,
            "resolution": "own",
            "lr": 2e-3,
            "encoder_lr": 2e-3,
        },
    }
    monitor, mode = "val/albedo_rmse", "min"

    def __init__(
        self,
        stage: str = "both",
        encoder: str | list[int] = "resnext101_32x8d.fb_wsl_ig1b_ft_in1k",
        merge_encoder: str | list[int] = "tf_efficientnet_lite3.in1k",
        width: int = 256,
        merge_width: int = 64,
        pretrained: bool = False,
        ordinal: str = "ssi",
        albedo_loss: bool = True,
        base: int = 384,
        resolution: str | int = "optimal",
        confidence: float = 0.0,
        max_size: int = 1500,
        gradient: float = 1.0,
        per_image: bool = False,
        authors_shift: bool = False,
        share: float = 0.5,
        lr: float = 1e-4,
        encoder_lr: float = 1e-5,
    ):
        super().__init__()
        if stage not in ("ordinal", "merge", "both") or ordinal not in ("ssi", "mse", "none"):
            raise ValueError(
                f"stage is {stage!r} and ordinal {ordinal!r}; they may be 'ordinal', 'merge', 'both' and 'ssi', 'mse', "
                "'none'."
            )
        if ordinal == "none" and stage == "ordinal":
            raise ValueError("stage='ordinal' trains the network that ordinal='none' leaves out.")
        if base < 32 or base % 32 or max_size < base or not 0 <= confidence < 1 or not 0 < share < 1:
            raise ValueError(
                f"base is {base}, max_size {max_size}, confidence {confidence} and share {share}; base is a multiple "
                "of 32, max_size at least that, confidence in [0, 1) and share in (0, 1)."
            )
        if width < 2 or merge_width < 2 or gradient < 0:
            raise ValueError(f"width is {width}, merge_width {merge_width} and gradient {gradient}; at least 2, 2, 0.")
        check_working_size(resolution)
        self.save_hyperparameters()
        self.ordinal = None if ordinal == "none" else ShadingNet(encoder, 3, width, False, pretrained)
        self.merge = ShadingNet(merge_encoder, 3 if ordinal == "none" else 5, merge_width, True, pretrained)
        if stage == "merge" and self.ordinal is not None:
            self.freeze("ordinal")
        if stage == "ordinal":
            self.freeze("merge")
        self.scores = nn.ModuleDict(
            {
                "albedo_rmse": ScaleInvariantRMSE(),
                "albedo_rmse_image": ScaleInvariantRMSE(),
                "shading_rmse": ScaleInvariantRMSE(),
                "albedo_lmse": LMSE(),
                "shading_lmse": LMSE(),
                "albedo_ssim": ScaleInvariantSSIM(),
                "shading_ssim": ScaleInvariantSSIM(),
                "whdr": WHDR(),
            }
        )

    @classmethod
    def load_extra(cls, folder: Path, hyperparameters: dict[str, Any]) -> dict[str, Any]:
        """A checkpoint brings its encoders' weights along: timm's need not be fetched first."""
        return {**hyperparameters, "pretrained": False}

    # ---- computing ------------------------------------------------------------------------------------------------

    def forward(self, image: Tensor) -> dict[str, Tensor] | Tensor:
        """The decomposition at the picture's own size.

        Shapes:
            image: (b, 3, h, w) linear RGB, h and w multiples of 32
            returns: {"albedo": (b, 3, h, w), "shading", "ord_base", "ord_full": (b, 1, h, w)}, or O (b, 1, h, w) where
            ``stage`` is ``"ordinal"``; without an ordinal network there are only albedo and shading
        Raises:
            ValueError: for another shape.
        """
        check_channels(image, 3, "image")
        h, w = image.shape[-2:]
        if h % 32 or w % 32:
            raise ValueError(
                f"OrdinalShading: height {h} and width {w} must be multiples of 32. `predict` takes any size from 32."
            )
        if self.hparams.stage == "ordinal":
            return self.ordinal(image)  # type: ignore[misc]
        hints = self.hints(image)
        inverse = self.merge(torch.cat((image, *hints), 1)).float()
        shading = uninvert(inverse).clamp_min(FLOOR)
        named = dict(zip(("ord_base", "ord_full"), hints, strict=False))
        return {"albedo": image / shading, "shading": shading, **named}

    def hints(self, image: Tensor) -> tuple[Tensor, ...]:
        """O_b and O_f, each (b, 1, h, w), at one scale; nothing where there is no ordinal network."""
        if self.ordinal is None:
            return ()
        h, w = image.shape[-2:]
        small = rounded_size(h, w, self.hparams.base)
        full = self.ordinal(image).float()
        if small == (h, w):  # one pass serves for both: they are equal, and so is their scale
            return full, full
        base = resize(self.ordinal(resize(image, small)).float(), (h, w))
        return base, equalise(image.float(), base, full)

    def working_size(self, image: Tensor, resolution: str | int | None = None) -> tuple[int, int]:
        """Height and width, multiples of 32, at which `predict` computes.

        Shapes:
            image: (3, h, w) linear RGB
        """
        resolution = check_working_size(self.hparams.resolution if resolution is None else resolution)
        h, w = image.shape[-2:]
        if resolution == "own":
            return 32 * -(-h // 32), 32 * -(-w // 32)
        if resolution == "optimal":
            found = optimal_size(image.clamp(0, 1) ** (1 / 2.2), self.hparams.base, self.hparams.confidence)
            resolution = min(max(found, h, w), self.hparams.max_size)
        return rounded_size(h, w, int(resolution))

    def at_working_size(self, image: Tensor, resolution: str | int | None = None) -> dict[str, Tensor]:
        """`forward` in eval mode on one picture (1, 3, h, w), brought to its working size, with ``"image"`` there."""
        image = image.to(self.device)
        size = self.working_size(image[0], resolution)
        if size != tuple(image.shape[-2:]):  # as the eye sees it, so that highlights don't spread
            image = resize(image ** (1 / 2.2), size).clamp_min(0) ** 2.2
        found = super().predict(image)
        return {**(found if isinstance(found, dict) else {"ordinal": found}), "image": image}

    @torch.no_grad()
    def predict(self, image: Tensor, resolution: str | int | None = None) -> dict[str, Tensor]:  # type: ignore[override]
        """Decompose pictures of any size: computed at the working size, returned at the picture's own, I = A * S.

        Args:
            image: (b, 3, h, w) linear RGB, at least 0; sides of at least 32.
            resolution: instead of the hyperparameter of that name.
        Shapes:
            returns: {"albedo": (b, 3, h, w), "shading": (b, 1, h, w)}; while ``stage`` is ``"ordinal"``, also
            ``"ordinal"``, O (b, 1, h, w), and shading and albedo are those that it implies
        Raises:
            ValueError: for another shape, for values that are not finite or below 0, or a picture that is black.
        """
        check_channels(image, 3, "image")
        if not torch.compiler.is_compiling():
            check_finite(image, "image")
        h, w = image.shape[-2:]
        if min(h, w) < 32:
            raise ValueError(f"'image' is {h} x {w} pixels; sides must be at least 32. Enlarge it first.")
        if float(image.amin()) < 0 or not bool(image.flatten(1).any(1).all()):
            raise ValueError("'image' holds values below 0, or a picture that is black all over; it is linear light.")
        image = image.to(self.device)
        sizes = [self.working_size(one, resolution) for one in image]
        alike = len(set(sizes)) == 1 and len(sizes) * sizes[0][0] * sizes[0][1] <= 2**18
        results = [self._one(part, resolution) for part in (image,) * alike or image.split(1)]
        return {key: torch.cat([result[key] for result in results]) for key in results[0]}

    def _one(self, image: Tensor, resolution: str | int | None) -> dict[str, Tensor]:
        found = self.at_working_size(image, resolution)
        inverse = found["ordinal"].float() if "ordinal" in found else invert(found["shading"])
        inverse = resize(inverse, (image.shape[-2], image.shape[-1]))
        shading = uninvert(inverse).clamp_min(FLOOR)
        extra = {"ordinal": inverse} if "ordinal" in found else {}
        return {"albedo": image / shading, "shading": shading, **extra}

    def example_inputs(self) -> tuple[Tensor, ...]:
        return (torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0)).to(self.device),)

    # ---- training -------------------------------------------------------------------------------------------------

    def phase(self) -> str:
        """Which network this step trains: ``"ordinal"`` or ``"merge"``."""
        if self.hparams.stage != "both":
            return self.hparams.stage
        if self.ordinal is None:
            return "merge"
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise ZooError("stage='both' divides the Trainer's steps: set max_steps or max_epochs.")
        return "ordinal" if self.global_step < self.hparams.share * steps else "merge"

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        phase = self.phase()
        if self.ordinal is not None:  # frozen in the second phase, its batch norms too
            self.ordinal.train(phase == "ordinal" and "ordinal" not in self._frozen)
        loss = self.ordinal_step(batch) if phase == "ordinal" else self.merge_step(batch)
        self.log(f"train/{phase}", loss, batch_size=len(batch["image"]))
        return loss

    def ordinal_step(self, batch: dict[str, Any]) -> Tensor:
        """L_1 at the crops' size and, where that is another, at the base size: the network serves at both."""
        image, target, mask = batch["image"], invert(batch["shading"]), batch["mask"]
        hp = self.hparams
        options = (hp.gradient, hp.ordinal == "ssi", hp.authors_shift, hp.per_image)
        loss = ordinal_loss(self.ordinal(image).float(), target, mask, *options)  # type: ignore[misc]
        small = rounded_size(image.shape[-2], image.shape[-1], hp.base)
        if small == tuple(image.shape[-2:]):
            return loss
        kept = torch.floor(resize(mask, small) + 1e-3)
        at_base = self.ordinal(resize(image, small)).float()  # type: ignore[misc]
        return (loss + ordinal_loss(at_base, resize(target, small), kept, *options)) / 2

    def merge_step(self, batch: dict[str, Any]) -> Tensor:
        """L_2; what the ordinal network says is taken as given, and sets the truth's scale."""
        image, albedo, shading, mask = (batch[key] for key in ("image", "albedo", "shading", "mask"))
        with torch.no_grad():
            hints = self.hints(image)
            if hints:  # A_gt is brought to the albedo that O_b implies, S_gt the other way
                implied = luminance(image) / uninvert(hints[0]).clamp_min(FLOOR)
                true = luminance(albedo)
                scale = (true * implied * mask).sum((1, 2, 3), keepdim=True)
                scale = scale / (true.square() * mask).sum((1, 2, 3), keepdim=True).clamp_min(1e-12)
                scale = torch.where(scale > 0, scale, 1)
                albedo, shading = albedo * scale, shading / scale
        inverse = self.merge(torch.cat((image, *hints), 1)).float()
        hp = self.hparams
        return merge_loss(inverse, image, invert(shading), albedo, mask, hp.gradient, hp.albedo_loss, hp.per_image)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._score("val", batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._score("test", batch)

    def _score(self, stage: str, batch: dict[str, Any]) -> None:
        """Scale-invariant RMSE, LMSE and SSIM where there is a truth, WHDR where there are judgements.

        ``albedo_rmse_image`` is what the picture itself, taken for the albedo, would score.
        """
        found = self._each(batch["image"])
        used = []
        for name in ("albedo", "shading"):
            if name not in batch:
                continue
            used += [f"{name}_{kind}" for kind in ("rmse", "lmse", "ssim")]
            for mine, true, mask in zip(found[name], batch[name], batch["mask"], strict=True):
                for kind in ("rmse", "lmse", "ssim"):
                    self.scores[f"{name}_{kind}"].update(mine[None], true[None], mask[None])
        if "albedo" in batch:
            for image, true, mask in zip(batch["image"], batch["albedo"], batch["mask"], strict=True):
                self.scores["albedo_rmse_image"].update(image[None], true[None], mask[None])
            used.append("albedo_rmse_image")
        if "comparisons" in batch:
            self.scores["whdr"].update(found["albedo"], batch["comparisons"])  # type: ignore[operator]
            used.append("whdr")
        for name in used:
            self.log(f"{stage}/{name}", self.scores[name], on_step=False, on_epoch=True, batch_size=len(batch["name"]))

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """What `predict` returns, as tensors, or as lists for pictures of several sizes; ``image`` and ``name``."""
        found = self._each(batch["image"])
        if isinstance(batch["image"], Tensor):
            found = {key: torch.stack(list(value)) for key, value in found.items()}
        return {**found, "image": batch["image"], "name": batch["name"]}

    def _each(self, image: Tensor | list[Tensor]) -> dict[str, Any]:
        """`predict` on pictures of one size (a tensor) or of several (a list)."""
        if isinstance(image, Tensor):
            return dict(self.predict(image))
        results = [self.predict(one[None]) for one in image]
        return {key: [result[key][0] for result in results] for key in results[0]}

    def parameter_groups(self) -> Iterable[Any]:
        """The encoders in a group of their own."""
        groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
        for name, p in self.named_parameters():
            if p.requires_grad:
                groups[name.startswith(("ordinal.encoder.", "merge.encoder."))].append(p)
        return [{"params": groups[False]}, {"params": groups[True], "lr": self.hparams.encoder_lr}]

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameter_groups(), lr=self.hparams.lr)

    @classmethod
    def convert_state_dict(cls, content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The authors' ``ord_state_dict`` and ``iid_state_dict`` (v1.0), or a dict of both under ``ordinal`` and
        ``merge`` (v2: stage_0 and stage_1), as (hyperparameters, state dict). Their licence is for academic use.

        Raises:
            ZooError: if a network is missing, or a key is missing or unknown.
        """
        return convert(content)


# ---- dense truth from pictures under several lights ---------------------------------------------------------------


@torch.no_grad()
def pseudo_truth(
    model: OrdinalShading, images: Tensor, resolution: str | int | None = None, skip: Iterable[int] = ()
) -> tuple[Tensor, Tensor]:
    """Albedo and shadings of a still scene from pictures under several lights: the paper's truth for fine-tuning.

    Each picture is decomposed; each albedo is scaled to the first one in least squares; the scene's is their median.
    What the light does in a single picture (shadows, highlights) is gone from that. S_i = Y(I_i) / Y(A).

    Args:
        model: a trained `OrdinalShading`.
        images: (n, 3, h, w) linear RGB, white-balanced: the same view under n lights.
        resolution: of `OrdinalShading.predict`.
        skip: lights that the albedo is made without (a flash in the picture).
    Shapes:
        returns: albedo (3, h, w), shadings (n, 1, h, w)
    Raises:
        ValueError: if no picture is left.
    """
    check_channels(images, 3, "images")
    kept = [i for i in range(len(images)) if i not in set(skip)]
    if not kept:
        raise ValueError(f"Of {len(images)} pictures all are skipped; at least one is needed.")
    found = []
    for i in kept:
        albedo = model.predict(images[i : i + 1], resolution)["albedo"][0]
        if found:
            albedo = albedo * (albedo * found[0]).sum() / albedo.square().sum().clamp_min(1e-12)
        found.append(albedo)
    stacked = torch.stack(found)
    # the mean of the two in the middle for an even number, as numpy's median
    order = stacked.sort(0).values
    albedo = (order[(len(found) - 1) // 2] + order[len(found) // 2]) / 2
    shadings = luminance(images.to(albedo)) / luminance(albedo)[None].clamp_min(FLOOR)
    return albedo, shadings


# ---- the authors' checkpoints -------------------------------------------------------------------------------------


def convert(content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """See `OrdinalShading.convert_state_dict`."""
    named = {
        "ordinal": content.get("ord_state_dict", content.get("ordinal")),
        "merge": content.get("iid_state_dict", content.get("merge")),
    }
    if any(not isinstance(value, Mapping) for value in named.values()):
        raise ZooError(
            f"The checkpoint holds {', '.join(map(str, list(content)[:5]))}; expected ord_state_dict and "
            "iid_state_dict, or ordinal and merge."
        )
    state: dict[str, Tensor] = {}
    for name, value in named.items():
        assert isinstance(value, Mapping)
        state |= {f"{name}.{key}": tensor for key, tensor in rename(unwrap(value), name).items()}
    return {
        "width": state["ordinal.head.conv1.weight"].shape[1],
        "merge_width": state["merge.head.conv1.weight"].shape[1],
    }, state


def rename(theirs: Mapping[str, Tensor], network: str) -> dict[str, Tensor]:
    """The authors' tensors (weights or gradients) of a network under our names.

    Args:
        network: ``"ordinal"`` or ``"merge"``.
    Raises:
        ZooError: naming unknown keys.
    """
    decoder = {f"layer{i}_rn.": f"project.{i - 1}." for i in range(1, 5)}
    for i in range(1, 5):
        for old, new in (("resConfUnit1.", "skip."), ("resConfUnit2.", "residual."), ("out_conv.", "out.")):
            decoder[f"refinenet{i}.{old}"] = f"fusion.{i - 1}.{new}"
    decoder |= {"output_conv.0.": "head.conv1.", "output_conv.2.": "head.conv2.", "output_conv.4.": "head.conv3."}
    decoder = {f"scratch.{old}": new for old, new in decoder.items()}
    if network == "ordinal":
        stem = {"layer1.0.": "conv1.", "layer1.1.": "bn1.", "layer1.4.": "layer1."}
        body = {**stem, **{f"layer{i}.": f"layer{i}." for i in (2, 3, 4)}}
    else:
        stem = {"layer1.0.": "conv_stem.", "layer1.1.": "bn1."}
        groups = {(1, 3): 0, (1, 4): 1, (2, 0): 2, (3, 0): 3, (3, 1): 4, (4, 0): 5, (4, 1): 6}
        body = stem | {f"layer{layer}.{i}.": f"blocks.{block}." for (layer, i), block in groups.items()}
    names = {**decoder, **{f"pretrained.{old}": f"encoder.{new}" for old, new in body.items()}}
    found: dict[str, Tensor] = {}
    unknown = []
    for key, value in theirs.items():
        if key.startswith("scratch.refinenet4.resConfUnit1."):
            continue  # there, but never used: nothing lies above the deepest level
        old = next((old for old in names if key.startswith(old)), None)
        if old is None:
            unknown.append(key)
        else:
            found[names[old] + key.removeprefix(old)] = value
    if unknown:
        raise ZooError(f"{len(unknown)} keys of the {network} network are unknown ({', '.join(unknown[:3])}).")
    return found
