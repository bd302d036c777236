"""FD4MM: motion magnification by decoupled frequencies.

Paper: Wang et al., "Frequency Decoupling for Motion Magnification via Multi-Level Isomorphic Architecture", CVPR 2024.
Code by the authors: https://github.com/Jiafei127/FD4MM, MIT.

In: a reference frame A, a current frame B and a factor. Out: B, with what moved since A moved that many times as far.
Only the coarsest low band carries the motion; the high bands of B carry the detail:

    high0, high1, high2, low = pyramid(B);  low_A = pyramid(A)
    magnified = low + g2( g1(T(low - low_A)) * (factor - 1) )
    picture   = decoder(magnified, high2, high1, high0)

T and what refines each band are transformer blocks whose attention is over channels and keeps positive products only.

Beyond the released code: a clip's frames are encoded once each, whatever they are compared with; `motion="temporal"`
puts a band-pass over time in the place of the difference low - low_A, as Oh et al. (ECCV 2018) do with their shapes.

Index legend: b picture, h/w height/width of a feature, n = h*w positions, c channel, k head, i/j channel within a head,
o output. All features are channels-last, (b, h, w, c), as in Restormer's descendants here: 1x1 convolutions are matrix
products, and layer norm over the channels reads memory in order.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchmetrics import MeanMetric
from torchmetrics.functional.image import structural_similarity_index_measure

from zoo.core import ZooModule, check_channels, check_finite, unwrap
from zoo.nn.checkpoint_names import Renamed
from zoo.nn.layout import channels_last
from zoo.nn.padding import pad_reflect
from zoo.nn.vgg import VGG, load_vgg

MOTIONS = ("static", "dynamic", "temporal")

# ---- parts, in the order of the forward pass ----------------------------------------------------------------------


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1) -> Tensor:
    """A depthwise 3x3 convolution on (b, h, w, c), padded with zeros so that height and width stay."""
    x, weight = x.permute(0, 3, 1, 2), weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    y = F.conv2d(x, weight, bias, padding=dilation, dilation=dilation, groups=len(weight))
    return y.permute(0, 2, 3, 1)


def far(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A depthwise 3x3 convolution of dilation 2 on (b, h, w, c), padded with zeros so that height and width stay.

    With dilation 2, even rows and columns never meet odd ones. On a CPU the backward pass of a plain convolution on the
    four sorts of pixels apart is several times faster than the dilated one's.
    """
    b, h, w, c = x.shape
    if x.device.type != "cpu" or not torch.is_grad_enabled() or h % 2 or w % 2:
        return depthwise(x, weight, bias, dilation=2)
    parts = x.view(b, h // 2, 2, w // 2, 2, c).permute(0, 2, 4, 1, 3, 5).reshape(4 * b, h // 2, w // 2, c)
    y = depthwise(parts, weight, bias).reshape(b, 2, 2, h // 2, w // 2, c)
    return y.permute(0, 3, 1, 4, 2, 5).reshape(b, h, w, c)


def spatial(function: Callable[..., Tensor], x: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """A function of (b, c, h, w), such as pooling, on (b, h, w, c)."""
    return function(x.permute(0, 3, 1, 2), *arguments, **options).permute(0, 2, 3, 1)


class Split(nn.Module):
    """Frequency decomposition: what two kernels of different reach see in common, and the rest (FreqDec).

        x1, x2 = dw3x3(conv1x1(x));  lo = dw3x3 of dilation 2 (x1);  hi = dw3x3(x2) - lo;  gelu(hi), gelu(lo)

    Shapes:
        x: (b, h, w, c); `forward` returns hi and lo, `low` lo alone, each (b, h, w, c)
    """

    def __init__(self, width: int):
        super().__init__()
        self.expand = nn.Linear(width, 2 * width)
        self.conv = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.far = nn.Conv2d(width, width, 3, padding=2, dilation=2, groups=width)
        self.near = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def half(self, x: Tensor, which: int) -> Tensor:
        """x1 or x2: each half lies dense in memory for what follows, and none is computed that nothing asks for."""
        parts = (p.chunk(2)[which] for p in (self.expand.weight, self.expand.bias, self.conv.weight, self.conv.bias))
        w, b, kernel, bias = parts
        return depthwise(F.linear(x, w, b), kernel, bias)

    def raw_low(self, x: Tensor) -> Tensor:
        return far(self.half(x, 0), self.far.weight, self.far.bias)

    def low(self, x: Tensor) -> Tensor:
        return F.gelu(self.raw_low(x))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        lo = self.raw_low(x)
        hi = depthwise(self.half(x, 1), self.near.weight, self.near.bias) - lo
        return F.gelu(hi), F.gelu(lo)


class SparseAttention(nn.Module):
    """Channel attention that keeps positive products, with the residual: x + project(relu(q^ k^T * temperature) v).

    q^ and k^ have unit length over the n positions. Neither is ever formed: their lengths divide the small matrix of
    products; and the output projection is multiplied into the attention, so that v is read once.

    Shapes:
        x: (b, h, w, c) what the residual adds to; q, k, v: (b, h, w, c); returns (b, h, w, c)
    """

    own: Tensor

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(heads))
        self.project = nn.Linear(width, width, bias=False)
        size = width // heads
        own = torch.eye(heads).repeat_interleave(size, 0).repeat_interleave(size, 1)
        self.register_buffer("own", own, persistent=False)  # (c, c): 1 where two channels share a head

    def forward(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, h, w, c = x.shape
        x, q, k, v = (t.reshape(b, h * w, c) for t in (x, q, k, v))
        exact = torch.promote_types(q.dtype, torch.float32)  # lengths of bfloat16 features are summed in float32
        # clamped before the root, whose slope at zero would make the gradient of an all-zero channel NaN
        lq, lk = (t.square().sum(1, dtype=exact).clamp_min(1e-24).sqrt() for t in (q, k))  # as F.normalize's 1e-12
        tau = self.temperature.repeat_interleave(c // len(self.temperature))
        scale = self.own * tau[:, None] / (lq[:, :, None] * lk[:, None, :])
        # products of all channels, of which those across heads are dropped: cheaper than skinny products head by head
        attention = F.relu(q.transpose(1, 2) @ k * scale)  # (b, i, j)
        weight = (self.project.weight.to(attention.dtype) @ attention).transpose(1, 2)  # (b, j, o)
        if v.dtype != x.dtype or weight.dtype != v.dtype:  # autocast: the residual stays as exact as it came
            return (x + v @ weight.to(v.dtype)).view(b, h, w, c)
        return torch.baddbmm(x, v, weight).view(b, h, w, c)


class Filter(nn.Module):
    """Sparse high-pass or low-pass filter, with the residual: attention whose queries are pooled first.

        q, k, v = dw3x3(conv1x1(y))
        high: q = gelu(conv1x1(maxpool3x3(q)))      low: q = upsample(gelu(conv1x1(avgpool2x2(q))))

    Shapes:
        x: (b, h, w, c) what the residual adds to; y: (b, h, w, c) its layer norm; returns (b, h, w, c)
    """

    def __init__(self, width: int, heads: int, high: bool):
        super().__init__()
        self.high = high
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.conv = nn.Conv2d(3 * width, 3 * width, 3, padding=1, groups=3 * width, bias=False)
        self.pooled = nn.Linear(width, width)
        self.attention = SparseAttention(width, heads)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        points, kernels = self.qkv.weight.chunk(3), self.conv.weight.chunk(3)

        def one(index: int) -> Tensor:
            return depthwise(F.linear(y, points[index]), kernels[index])

        q = one(0)  # alone, as pooling needs room
        if self.high:
            q = F.gelu(self.pooled(spatial(F.max_pool2d, q, 3, stride=1, padding=1)))
        else:
            q = F.gelu(self.pooled(spatial(F.avg_pool2d, q, 2)))
            q = spatial(F.interpolate, q, size=tuple(y.shape[1:3]), mode="bilinear", align_corners=True)
        return self.attention(x, q, one(1), one(2))


class Mixer(nn.Module):
    """Sparse frequency mixer, with the residual: the low part of y asks, its high part is key and value.

    Shapes:
        x: (b, h, w, c) what the residual adds to; y: (b, h, w, c) its layer norm; returns (b, h, w, c)
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.split = Split(width)
        self.attention = SparseAttention(width, heads)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hi, lo = self.split(y)
        return self.attention(x, lo, hi, hi)


class Block(nn.Module):
    """x += filter(norm(x)); x += conv1x1(gelu(conv1x1(norm(x)))), the second twice as wide inside.

    Args:
        kind: ``"high"``, ``"low"`` or ``"mix"``.
        whole: all of the block is made again in the backward pass, by the `Stack` it is in; else the second half only.
    Shapes:
        x: (b, h, w, c); returns (b, h, w, c)
    """

    def __init__(self, width: int, heads: int, kind: str, whole: bool = False):
        super().__init__()
        self.whole = whole
        self.norm1 = nn.LayerNorm(width, eps=1e-5)
        self.filter = Mixer(width, heads) if kind == "mix" else Filter(width, heads, kind == "high")
        self.norm2 = nn.LayerNorm(width, eps=1e-5)
        self.expand = nn.Linear(width, 2 * width)
        self.reduce = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.filter(x, self.norm1(x))
        if torch.is_grad_enabled() and not self.whole:  # five tensors the less are kept for the backward pass
            return checkpoint(self.feed, x, use_reentrant=False, preserve_rng_state=False)
        return self.feed(x)

    def feed(self, x: Tensor) -> Tensor:
        return x + self.reduce(F.gelu(self.expand(self.norm2(x))))


class Stack(nn.ModuleList):
    """Blocks in a row; with ``recompute``, activations inside a block are made again in the backward pass."""

    recompute = False

    def forward(self, x: Tensor) -> Tensor:
        again = self.recompute and torch.is_grad_enabled()
        for block in self:
            x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False) if again else block(x)
        return x


class Up(nn.Module):
    """Twice the size and half the channels: conv3x3 c -> 2c, then pixel shuffle."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        x = spatial(self.conv, x).reshape(b, h, w, c // 2, 2, 2)
        return x.permute(0, 1, 4, 2, 5, 3).reshape(b, 2 * h, 2 * w, -1)


class Code(NamedTuple):
    """What the pyramid makes of frames: ``low`` (b, h/8, w/8, c2), the motion's band, and ``high``, the bands of detail
    before their filters: (b, h/2, w/2, c0), (b, h/4, w/4, c1), (b, h/8, w/8, c2)."""

    low: Tensor
    high: tuple[Tensor, ...]


class FD4MMNet(nn.Module):
    """The network alone (Fig. 2), on pictures in [-1, 1] whose sides are multiples of 8. Arguments as in `FD4MM`."""

    def __init__(
        self,
        widths: tuple[int, ...] = (24, 48, 96),
        heads: tuple[int, ...] = (4, 4, 8),
        high: tuple[int, ...] = (2, 4, 4),
        low: int = 4,
        mixers: tuple[int, ...] = (6, 4, 4),
        filters: bool = True,
        recompute: bool = False,
    ):
        super().__init__()

        def stack(level: int, count: int, kind: str) -> Stack:
            made = Stack(Block(widths[level], heads[level], kind, recompute) for _ in range(count if filters else 0))
            made.recompute = recompute
            return made

        self.embed = nn.Conv2d(3, widths[0], 3, stride=2, padding=1, bias=False)
        self.split = nn.ModuleList(Split(width) for width in widths)
        self.widen = nn.ModuleList(nn.Linear(widths[level], widths[level + 1]) for level in range(2))
        self.high = nn.ModuleList(stack(level, high[level], "high") for level in range(3))
        self.motion = stack(2, low, "low")
        self.gain1 = nn.Linear(widths[2], widths[2], bias=False)
        self.gain2 = nn.Linear(widths[2], widths[2], bias=False)
        self.reduce = nn.ModuleList(nn.Linear(2 * width, width) for width in widths)
        self.mix = nn.ModuleList(stack(level, mixers[level], "mix") for level in range(3))
        self.up = nn.ModuleList(Up(width) for width in widths)
        self.output = nn.Conv2d(widths[0] // 2, 3, 3, padding=1)

    def features(self, picture: Tensor) -> Tensor:
        """(b, 3, h, w) -> (b, h/2, w/2, c0)."""
        return self.embed(channels_last(picture)).permute(0, 2, 3, 1)

    def coarser(self, level: int, low: Tensor) -> Tensor:
        return self.widen[level](spatial(F.avg_pool2d, low, 2))

    def low(self, picture: Tensor) -> Tensor:
        """The motion's band of a reference, whose detail nobody looks at: (b, 3, h, w) -> (b, h/8, w/8, c2)."""
        x = self.features(picture)
        for level in range(2):
            x = self.coarser(level, self.split[level].low(x))
        return self.split[2].low(x)

    def encode(self, picture: Tensor) -> Code:
        """Low band and raw high bands of (b, 3, h, w)."""
        x, bands = self.features(picture), []
        for level in range(3):
            hi, x = self.split[level](x)
            bands.append(hi)
            if level < 2:
                x = self.coarser(level, x)
        return Code(x, tuple(bands))

    def render(self, code: Code, difference: Tensor, factor: Tensor) -> Tensor:
        """Magnify and decode.

        Shapes:
            difference: like code.low, how the low band moved; factor: (b,); returns (b, 3, h, w)
        """
        strength = (factor - 1).view(-1, 1, 1, 1).to(difference.dtype)
        change = F.gelu(self.gain1(self.motion(difference))) * strength
        x = code.low + F.gelu(self.gain2(change))
        for level in (2, 1, 0):
            own, other = self.reduce[level].weight.chunk(2, 1)  # of two features side by side, without copying them
            x = F.linear(x, own, self.reduce[level].bias) + F.linear(self.high[level](code.high[level]), other)
            x = self.up[level](self.mix[level](x))
        return spatial(self.output, x).permute(0, 3, 1, 2)

    def forward(self, frame_a: Tensor, frame_b: Tensor, factor: Tensor) -> Tensor:
        code = self.encode(frame_b)
        return self.render(code, code.low - self.low(frame_a), factor)


# ---- loss ---------------------------------------------------------------------------------------------------------


def charbonnier(difference: Tensor) -> Tensor:
    """Mean of sqrt(difference^2 + 0.001^2)."""
    exact = difference.to(torch.promote_types(difference.dtype, torch.float32))
    return (exact.square() + 1e-6).sqrt().mean()


def laplacian(x: Tensor) -> Tensor:
    """x less what a Laplacian pyramid keeps of it: smooth, take every second pixel, put zeros between, smooth.

    The kernel is the outer product of (.05, .25, .4, .25, .05) with itself; borders are repeated.

    Shapes:
        x: (b, c, h, w); returns (b, c, h, w)
    """
    line = x.new_tensor([0.05, 0.25, 0.4, 0.25, 0.05])
    kernel = torch.outer(line, line).expand(x.shape[1], 1, 5, 5)

    def smooth(y: Tensor) -> Tensor:
        return F.conv2d(F.pad(y, (2, 2, 2, 2), mode="replicate"), kernel, groups=y.shape[1])

    grid = torch.zeros_like(x)
    grid[..., ::2, ::2] = 4 * smooth(x)[..., ::2, ::2]
    return x - smooth(grid)


def magnification_loss(
    magnified: Tensor,
    amplified: Tensor,
    frame_b: Tensor,
    features: Callable[[Tensor], Tensor] | None,
    edge: float = 1.0,
    contrast: float = 0.5,
) -> dict[str, Tensor]:
    """The paper's loss, on pictures in [0, 1] that are taken to [-1, 1] first.

        charb(y - t) + edge * charb(lap(y) - lap(t)) + contrast * charb(V(y) - V(t)) / (charb(V(y) - V(B)) + 1e-7)

    Args:
        magnified: y. amplified: t, the target. frame_b: B, which y should not resemble.
        features: V, on pictures in [-1, 1]; not needed where ``contrast`` is 0.
    Shapes:
        pictures: (b, 3, h, w)
    Returns:
        ``loss`` and its terms ``pixel``, ``edge``, ``contrast`` before they are weighted, scalars.
    """
    y, target, given = (2 * x - 1 for x in (magnified, amplified, frame_b))
    difference = y - target
    terms = {"pixel": charbonnier(difference)}
    total = terms["pixel"]
    if edge:
        terms["edge"] = charbonnier(laplacian(difference))  # linear: one Laplacian does for both pictures
        total = total + edge * terms["edge"]
    if contrast:
        assert features is not None
        with torch.no_grad():  # before the features that the gradient flows through: less is held at once
            wanted, unwanted = features(target), features(given)
        found = features(y)
        terms["contrast"] = charbonnier(found - wanted) / (charbonnier(found - unwanted) + 1e-7)
        total = total + contrast * terms["contrast"]
    return {"loss": total, **terms}


# ---- time ---------------------------------------------------------------------------------------------------------


class BandPass:
    """A band-pass over time, one frame in and, after ``delay`` frames, one out; what stands still gives zero.

    Args:
        band: lowest and highest frequency in Hz, 0 < low < high < fps / 2.
        fps: frames a second.
        order: of a causal Butterworth filter, whose output comes at once and lags behind in phase.
        taps: an odd length above 1 takes a windowed-sinc filter instead, in phase: it waits for (taps - 1) / 2 frames.
    Raises:
        ValueError: if the band does not fit under half the frame rate.
    """

    def __init__(self, band: tuple[float, float], fps: float, order: int = 2, taps: int = 0):
        low, high = band
        if not 0 < low < high < fps / 2:
            raise ValueError(
                f"The band is {low:g} to {high:g} Hz at {fps:g} frames a second; it must lie between 0 and "
                f"{fps / 2:g} Hz, half the frame rate, lower end first."
            )
        from scipy import signal

        self.first: Tensor | None = None
        self.taps: list[float] = []
        self.sections: list[list[float]] = []
        self.delay = taps // 2
        if taps:
            self.taps = signal.firwin(taps, [low, high], pass_zero=False, fs=fps).tolist()
        else:
            self.sections = signal.butter(order, [low, high], "bandpass", fs=fps, output="sos").tolist()
        self.states: list[list[Any]] = [[0.0, 0.0] for _ in self.sections]
        self.past: deque[Tensor] = deque(maxlen=max(taps, 1))

    def push(self, x: Tensor) -> Tensor | None:
        """Take a frame in; the filtered frame of ``delay`` frames ago comes out, None while there is none."""
        if self.first is None:
            self.first = x
            if self.taps:  # before the first frame nothing moved
                self.past.extend([torch.zeros_like(x)] * self.delay)
        y = x - self.first
        if self.taps:
            self.past.append(y)
            if len(self.past) < len(self.taps):
                return None
            total = torch.zeros_like(y)
            for weight, value in zip(self.taps, self.past, strict=True):  # symmetric: no need to turn it round
                total.add_(value, alpha=weight)
            return total
        for (b0, b1, b2, _, a1, a2), state in zip(self.sections, self.states, strict=True):
            y, before = b0 * y + state[0], y  # transposed direct form II
            state[0] = b1 * before - a1 * y + state[1]
            state[1] = b2 * before - a2 * y
        return y

    def flush(self) -> Iterator[Tensor]:
        """The frames that are still to come, as if the clip stood still after its last one."""
        if not self.taps or self.first is None:
            return
        last = self.past[-1] + self.first
        for _ in range(self.delay):
            if (y := self.push(last)) is not None:
                yield y


# ---- the method ---------------------------------------------------------------------------------------------------


class FD4MM(ZooModule):
    """FD4MM for video motion magnification (CVPR 2024).

    The defaults are the paper's. The VGG of the loss is loaded when training first needs it, and is part of no
    checkpoint where ``backbone`` names where it comes from.

    Args:
        widths: channels at 1/2, 1/4 and 1/8 of the picture's size.
        heads: attention heads at these three; the motion's band has those of the last.
        high: high-pass blocks on the detail of each size.
        low: low-pass blocks on the motion.
        mixers: mixer blocks of the decoder at each size.
        filters: False takes all these blocks out; what is left is the pyramid and its inverse.
        recompute: in training keep only what lies between blocks: under half the memory, for about a tenth of the time.
        edge: weight of the Laplacian term of the loss.
        contrast: weight of the contrastive term.
        backbone: where the contrastive term's VGG19 comes from: timm's Hub id, a folder or file, or
            ``{"widths": [...]}`` for a small one with random weights.
        backbone_revision: commit, tag or branch of the Hub id.
        factor: how many times as far things shall move in a clip (`magnify`, `zoo predict`).
        motion: what a clip's frame is compared with: ``"static"``, the first; ``"dynamic"``, the one before;
            ``"temporal"``, none: a band-pass over time takes the motion out.
        band: lowest and highest frequency of ``"temporal"``, in Hz.
        order: order of its causal Butterworth filter.
        taps: an odd number takes a symmetric filter of that many frames instead, which does not lag behind.
        lr: Adam's learning rate.
    Raises:
        ValueError: if widths and heads do not fit, or an argument is out of range.
    Example:
        >>> model = FD4MM.from_variant("tiny")
        >>> a, b = torch.rand(2, 1, 3, 50, 70)
        >>> model.predict(a, b, 20.0).shape
        torch.Size([1, 3, 50, 70])
        >>> len(list(model.magnify(torch.rand(5, 3, 32, 48), factor=10)))
        5
    """

    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "small": {
            "widths": [12, 24, 48],
            "heads": [2, 2, 4],
            "high": [1, 1, 1],
            "low": 1,
            "mixers": [1, 1, 1],
            "backbone": {"blocks": [2, 2, 1], "widths": [16, 32, 32]},
            "lr": 1e-3,
        },
        "tiny": {
            "widths": [4, 8, 16],
            "heads": [2, 2, 4],
            "high": [1, 1, 1],
            "low": 1,
            "mixers": [1, 1, 1],
            "backbone": {"blocks": [2, 1], "widths": [4, 8]},
            "lr": 1e-3,
        },
    }
    monitor, mode = "val/psnr", "max"

    def __init__(
        self,
        widths: list[int] = [24, 48, 96],  # noqa: B006 - read only
        heads: list[int] = [4, 4, 8],  # noqa: B006 - read only
        high: list[int] = [2, 4, 4],  # noqa: B006 - read only
        low: int = 4,
        mixers: list[int] = [6, 4, 4],  # noqa: B006 - read only
        filters: bool = True,
        recompute: bool = True,
        edge: float = 1.0,
        contrast: float = 0.5,
        backbone: str | dict[str, Any] = "timm/vgg19.tv_in1k",
        backbone_revision: str | None = None,
        factor: float = 20.0,
        motion: str = "static",
        band: list[float] | None = None,
        order: int = 2,
        taps: int = 0,
        lr: float = 1e-4,
    ):
        super().__init__()
        if any(len(x) != 3 for x in (widths, heads, high, mixers)) or min(*widths, *heads, *high, *mixers, low) < 1:
            raise ValueError(
                f"widths is {widths}, heads {heads}, high {high}, mixers {mixers} and low {low}; the first four are "
                "three counts of at least 1, low is at least 1."
            )
        doubled = [widths[0] * 2**level for level in range(3)]
        if widths[0] % 2 or widths != doubled or any(width % k for width, k in zip(widths, heads, strict=True)):
            raise ValueError(
                f"widths is {widths}; it must begin even, double twice, and be multiples of heads {heads}."
            )
        if edge < 0 or contrast < 0 or order < 1 or taps < 0 or (taps and taps % 2 == 0) or taps == 1:
            raise ValueError(
                f"edge is {edge}, contrast {contrast}, order {order} and taps {taps}; the first two must be at least "
                "0, order at least 1, taps 0 or an odd number from 3 on."
            )
        _check_motion(factor, motion, band)
        self.save_hyperparameters()
        sizes = (tuple(x) for x in (widths, heads, high))
        self.net = FD4MMNet(*sizes, low, tuple(mixers), filters, recompute)
        self.backbone = self.load_backbone() if isinstance(backbone, dict) and contrast else None
        for stage in ("val", "test"):
            for name in ("psnr", "ssim", "psnr_frame_b", "gain", "motion"):
                self.add_module(f"{stage}_{name}", MeanMetric())

    def forward(self, frame_a: Tensor, frame_b: Tensor, factor: Tensor) -> Tensor:
        """Magnify without clamping.

        Shapes:
            frame_a, frame_b: (b, 3, h, w) float in [0, 1], h and w multiples of 8 from 16 on; factor: (b,)
            returns: (b, 3, h, w)
        Raises:
            ValueError: for other shapes.
        """
        _check_pair(frame_a, frame_b, factor)
        h, w = frame_b.shape[-2:]
        if h % 8 or w % 8 or min(h, w) < 16:
            raise ValueError(
                f"FD4MM: height {h} and width {w} must be multiples of 8, at least 16. `predict` takes any size; or "
                "crop or pad."
            )
        return (self.net(2 * frame_a - 1, 2 * frame_b - 1, factor) + 1) / 2

    def example_inputs(self) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        frames = torch.rand(2, 1, 3, 32, 40, generator=generator).to(self.device)
        return frames[0], frames[1], torch.full((1,), 10.0, device=self.device)

    # ---- training -----------------------------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        if stage == "fit" and self.backbone is None and self.hparams.contrast:  # early: a missing file is told at once
            self.backbone = self.load_backbone()

    def load_backbone(self) -> VGG:
        """VGG19 to relu3_1, fed with pictures in [-1, 1] as they are."""
        backbone, revision = self.hparams.backbone, self.hparams.backbone_revision
        return load_vgg(backbone, revision, (2, 2, 1), normalise=False, hint="; or leave the term out with contrast=0")

    def perceive(self, picture: Tensor) -> Tensor:
        """The contrastive term's features of pictures in [-1, 1]; loads the VGG where it is not there yet."""
        if self.backbone is None:
            self.backbone = self.load_backbone().to(picture.device)
        return self.backbone(channels_last(picture))

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """`magnification_loss` of a batch, with this model's weights."""
        magnified = self(batch["frame_a"], batch["frame_b"], batch["factor"])
        hp = self.hparams
        return magnification_loss(magnified, batch["amplified"], batch["frame_b"], self.perceive, hp.edge, hp.contrast)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        terms = self.loss(batch)
        self.log_dict({f"train/{name}": value for name, value in terms.items()}, batch_size=len(batch["frame_b"]))
        return terms["loss"]

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._score("val", batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._score("test", batch)

    def _score(self, stage: str, batch: dict[str, Any]) -> None:
        """PSNR and SSIM of RGB pictures in [0, 1], frame B's own PSNR, the gain over it, and ``motion``: the gain over
        the same network's output at factor 1, what magnifying adds whatever the decoder loses. Means over pictures."""
        still = self.predict(batch["frame_a"], batch["frame_b"], 1.0).float()
        magnified = self.predict(batch["frame_a"], batch["frame_b"], batch["factor"])
        target = batch["amplified"].float()
        size = len(target)
        psnr, before = (_psnr(x.float(), target) for x in (magnified, batch["frame_b"]))
        ssim = structural_similarity_index_measure(magnified.float(), target, data_range=1.0, reduction="none")
        found = {"psnr": psnr, "ssim": ssim, "psnr_frame_b": before, "gain": psnr - before}
        found["motion"] = psnr - _psnr(still, target)
        for name, values in found.items():
            metric = getattr(self, f"{stage}_{name}")
            metric.update(values)
            self.log(f"{stage}/{name}", metric, on_step=False, on_epoch=True, batch_size=size)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [p for name, p in self.named_parameters() if not name.startswith("backbone.") and p.requires_grad]
        return torch.optim.Adam(trained, lr=self.hparams.lr, betas=(0.9, 0.999))

    # ---- pairs and clips ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(self, frame_a: Tensor, frame_b: Tensor, factor: Tensor | float) -> Tensor:  # type: ignore[override]
        """Magnify the motion from A to B, at any size: padded by reflection, clamped to [0, 1].

        Args:
            frame_a, frame_b: (b, 3, h, w) float in [0, 1].
            factor: one number for all, or (b,); at least 0. 1 gives B as the network sees it.
        Shapes:
            returns: (b, 3, h, w), in [0, 1]
        Raises:
            ValueError: for other shapes, a value that is not finite, a negative factor, or pictures outside [0, 1].
        """
        if not isinstance(factor, Tensor) or factor.ndim == 0:
            factor = torch.full((len(frame_b),), float(factor))
        _check_pair(frame_a, frame_b, factor)
        for name, x in (("frame_a", frame_a), ("frame_b", frame_b), ("factor", factor)):
            check_finite(x, name)
        if bool((factor < 0).any()):
            raise ValueError(f"'factor' is {float(factor.min()):g}; it must be at least 0.")
        for name, x in (("frame_a", frame_a), ("frame_b", frame_b)):
            _check_range(x, name)
        h, w = frame_b.shape[-2:]
        a, b = (pad_reflect(frame, 8, 16) for frame in (frame_a, frame_b))
        return super().predict(a, b, factor)[..., :h, :w].clamp(0, 1)

    @torch.no_grad()
    def magnify(
        self,
        frames: Iterable[Tensor],
        factor: float | None = None,
        motion: str | None = None,
        band: tuple[float, float] | list[float] | None = None,
        fps: float | None = None,
        batch_size: int = 1,
    ) -> Iterator[Tensor]:
        """Magnify a clip frame by frame, as they come; each is encoded once, and few are held at once.

        A frame without one to compare with (the first, but for ``"temporal"``) goes through the network with factor 1.

        Args:
            frames: (3, h, w) float in [0, 1], all of one size.
            factor, motion, band: instead of the hyperparameters of these names.
            fps: frames a second, which ``"temporal"`` needs.
            batch_size: frames that are decoded together.
        Shapes:
            yields as many (3, h, w), in [0, 1], on the CPU
        Raises:
            ValueError: if an argument is out of range, or a frame's shape or values are.
        """
        hp = self.hparams
        factor = hp.factor if factor is None else float(factor)
        motion, band = motion or hp.motion, band or hp.band
        _check_motion(factor, motion, band)
        bandpass = None
        if motion == "temporal":
            if not fps:
                raise ValueError("motion='temporal' needs fps, the clip's frames a second.")
            bandpass = BandPass((band[0], band[1]), fps, hp.order, hp.taps)  # type: ignore[index]

        size: tuple[int, ...] | None = None
        reference: Tensor | None = None
        waiting: deque[Code] = deque()  # encoded, not compared yet
        ready: list[tuple[Code, Tensor, float]] = []

        def decode() -> Iterator[Tensor]:
            code = Code(
                torch.cat([c.low for c, _, _ in ready]),
                tuple(torch.cat(bands) for bands in zip(*(c.high for c, _, _ in ready), strict=True)),
            )
            strength = torch.tensor([s for _, _, s in ready], device=self.device)
            pictures = (self.net.render(code, torch.cat([d for _, d, _ in ready]), strength) + 1) / 2
            ready.clear()
            assert size is not None
            yield from pictures[..., : size[1], : size[2]].float().clamp(0, 1).cpu()

        for number, frame in enumerate(frames):
            if size is None:
                check_channels(frame[None], 3, "frame")
                size = tuple(frame.shape)
            elif tuple(frame.shape) != size:
                raise ValueError(f"Frame {number} has shape {tuple(frame.shape)}; those before it have {size}.")
            check_finite(frame, f"frame {number}")
            _check_range(frame, f"frame {number}")
            code = self.net.encode(2 * pad_reflect(frame[None], 8, 16).to(self.device) - 1)
            waiting.append(code)
            if bandpass is not None:
                moved, strength = bandpass.push(code.low), factor
            else:
                moved = code.low - (code.low if reference is None else reference)
                strength = factor if number else 1.0
                reference = code.low if motion == "dynamic" or reference is None else reference
            if moved is not None:
                ready.append((waiting.popleft(), moved, strength))
            if len(ready) >= batch_size:
                yield from decode()
        for moved in bandpass.flush() if bandpass is not None else ():
            ready.append((waiting.popleft(), moved, factor))
            if len(ready) >= batch_size:
                yield from decode()
        if ready:
            yield from decode()

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """``magnified``: (b, 3, h, w) in [0, 1] for pairs. For clips (`clip`: a list), ``magnified`` is a list of clips
        whose frames are computed as they are asked for, with this model's factor, motion and band. ``name``."""
        if "clip" in batch:
            made = []
            for clip in batch["clip"]:
                lazy = clip.map(lambda frames, fps=clip.fps: self.magnify(frames, fps=fps))
                made.append(lazy)
            return {"magnified": made, "name": batch["name"]}
        magnified = self.predict(batch["frame_a"], batch["frame_b"], batch["factor"])
        return {"magnified": magnified, "name": batch["name"]}

    @classmethod
    def convert_state_dict(cls, content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The authors' checkpoint as (hyperparameters, state dict); every size is read off the shapes.

        Raises:
            ZooError: if a key is missing or unknown, so that nothing is dropped or left at random.
        """
        return convert(unwrap(content))


def _psnr(x: Tensor, target: Tensor) -> Tensor:
    """20 log10(1 / root mean square error) of each picture, at most 100 as the authors have it."""
    error = (x - target).square().mean((1, 2, 3))
    return (-10 * torch.log10(error.clamp_min(1e-10))).clamp(max=100)


def _check_pair(frame_a: Tensor, frame_b: Tensor, factor: Tensor) -> None:
    check_channels(frame_a, 3, "frame_a")
    check_channels(frame_b, 3, "frame_b")
    if frame_a.shape != frame_b.shape:
        raise ValueError(f"frame_a has shape {tuple(frame_a.shape)}, frame_b {tuple(frame_b.shape)}: they must agree.")
    if tuple(factor.shape) != (len(frame_b),):
        raise ValueError(f"'factor' has shape {tuple(factor.shape)}; expected ({len(frame_b)},), one for each pair.")


def _check_range(x: Tensor, name: str) -> None:
    if x.is_meta or torch.compiler.is_compiling():
        return
    low, high = float(x.min()), float(x.max())
    if low < -1e-3 or high > 1 + 1e-3:
        raise ValueError(f"'{name}' has values from {low:.3g} to {high:.3g}; pictures are in [0, 1]. Divide by 255?")


def _check_motion(factor: float, motion: str, band: Any) -> None:
    if not (math.isfinite(factor) and factor >= 0):
        raise ValueError(f"factor is {factor}; it must be a finite number of at least 0.")
    if motion not in MOTIONS:
        raise ValueError(f"motion is {motion!r}; it may be {', '.join(map(repr, MOTIONS))}.")
    if motion == "temporal" and (not band or len(band) != 2):
        raise ValueError(f"motion='temporal' needs band=[low, high] in Hz; band is {band}.")


# ---- the authors' checkpoints -------------------------------------------------------------------------------------

_SPLIT = {"pwconv": "expand", "dwconv": "conv", "dila1": "near", "dila2": "far"}
_BLOCK = {
    **{f"norm{n}.body.{kind}": f"norm{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")},
    **{
        f"ffn.fc{n}.{kind}": f"{new}.{kind}" for n, new in ((1, "expand"), (2, "reduce")) for kind in ("weight", "bias")
    },
    **{
        f"{name}.{old}": f"filter.{new}"
        for name, pool in (("Sparse_Highpass_Filter", "Maxpool"), ("Sparse_Lowpass_Filter", "pool"))
        for old, new in (
            ("temperature", "attention.temperature"),
            ("qkv.weight", "qkv.weight"),
            ("qkv_dwconv.weight", "conv.weight"),
            ("project_out.weight", "attention.project.weight"),
            (f"{pool}.1.weight", "pooled.weight"),
            (f"{pool}.1.bias", "pooled.bias"),
        )
    },
    "FreqMixer.temperature": "filter.attention.temperature",
    "FreqMixer.project_out.weight": "filter.attention.project.weight",
    **{
        f"FreqMixer.fd.{old}.{kind}": f"filter.split.{new}.{kind}"
        for old, new in _SPLIT.items()
        for kind in ("weight", "bias")
    },
}
_STACKS = {
    **{f"freq_pyramid.highfilter_{level}": f"high.{level}" for level in range(3)},
    **{f"pyramid_recons.fuse_{level}": f"mix.{level}" for level in range(3)},
    "manipulator.lowpass": "motion",
}
_SINGLE = {
    "freq_pyramid.PatchEmbed.proj.weight": "embed.weight",
    "manipulator.nonlinear1.0.weight": "gain1.weight",
    "manipulator.nonlinear2.0.weight": "gain2.weight",
    **{f"pyramid_recons.up_{level}.body.0.weight": f"up.{level}.conv.weight" for level in range(3)},
    **{f"pyramid_recons.output.{kind}": f"output.{kind}" for kind in ("weight", "bias")},
    **{
        f"{old}.{kind}": f"{new}.{kind}"
        for kind in ("weight", "bias")
        for old, new in (
            *((f"freq_pyramid.increase_{level + 1}", f"widen.{level}") for level in range(2)),
            *((f"pyramid_recons.reduce_{level}", f"reduce.{level}") for level in range(3)),
            *(
                (f"freq_pyramid.freqdec{level}.{part}", f"split.{level}.{name}")
                for level in range(3)
                for part, name in _SPLIT.items()
            ),
        )
    },
}


def rename(theirs: Mapping[str, Tensor]) -> Renamed:
    """The authors' tensors (weights, or gradients) under our names and in our shapes.

    Raises:
        ZooError: naming keys that FD4MM does not have.
    """
    return Renamed(theirs, "FD4MM", _SINGLE, _STACKS, _BLOCK)


def convert(theirs: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """See `FD4MM.convert_state_dict`."""
    ours = rename(theirs)

    hyper = {
        "widths": [ours.need(f"split.{level}.near.weight").shape[0] for level in range(3)],
        "heads": [len(ours.need(f"mix.{level}.0.filter.attention.temperature")) for level in range(3)],
        "high": [ours.count(f"high.{level}") for level in range(3)],
        "low": ours.count("motion"),
        "mixers": [ours.count(f"mix.{level}") for level in range(3)],
    }
    return hyper, ours
