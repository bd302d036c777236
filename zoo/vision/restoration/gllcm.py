"""GLLCM: bone suppression in chest X-rays by global-local latent consistency models.

Paper: Sun et al., "GL-LCM: Global-Local Latent Consistency Models for Fast High-Resolution Bone Suppression in Chest
X-Ray Images", MICCAI 2025, arXiv:2508.03357. Code by the authors: https://github.com/diaoquesang/GL-LCM, MIT.

In: a chest X-ray in [0, 1], and where the lungs are. Out: its soft tissue, without bones. Two stages of training:

    stage "autoencoder"   a vector-quantised autoencoder of X-rays and soft tissue, of whole pictures and of lungs alone
    stage "diffusion"     noise is estimated in its latents: eps(z_t, z_cxr, t), z_t = sqrt(a_t) z_bs + sqrt(1 - a_t) n

Prediction denoises twice at once, from the same noise: the whole picture (global), and the picture with everything but
the lungs set to zero (local), whose noise estimate is led towards detail (local-enhanced guidance):

    eps_local <- alpha eps_local + (1 - alpha) n / std(eps_local),   n ~ N(0, 1)

Both are decoded, and the local lungs are blended into the global picture by solving Poisson's equation (`fusion`).

Departs from the authors' code, each by an argument that restores theirs: the condition is given unscaled in training as
it is in sampling (``condition_scaling``), and each optimiser has its own schedule (``authors_schedule``). Their code
has no consistency distillation either: "consistency" is the sampler.

Index legend: b picture, c channel, h/w height/width (of pictures, or of latents), n = h*w positions, k code.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
import torchmetrics
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.core import ZooError, ZooModule, check_channels, check_finite, seed_from, unwrap
from zoo.nn.layout import channels_last
from zoo.nn.vgg import VGG, VGG16, load_vgg
from zoo.vision.restoration.fusion import drop_small, paste, poisson_blend, seam

# ---- the autoencoder ----------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """relu(x + conv(relu(conv(x)))), both 3x3. (b, c, h, w) -> the same."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, hidden, 3, padding=1)
        self.conv2 = nn.Conv2d(hidden, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv2(self.conv1(x).relu_()) + x).relu_()


class Halve(nn.Conv2d):
    """Half the size: relu(conv4x4 of stride 2)."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__(c_in, c_out, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu_()


class Double(nn.ConvTranspose2d):
    """Twice the size: a transposed conv4x4 of stride 2, then relu unless it is the last."""

    def __init__(self, c_in: int, c_out: int, last: bool):
        super().__init__(c_in, c_out, 4, stride=2, padding=1)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        x = super().forward(x)
        return x if self.last else x.relu_()


class Quantiser(nn.Module):
    """The nearest of k codes for each position; the codes follow what they stand for as moving averages.

    Args:
        codes: k. width: channels of a code. decay: of the averages, a step. commitment: weight of its loss.
    Shapes:
        z: (b, c, h, w); returns the codes in its place, with z's gradient, and the commitment loss ()
    """

    codebook: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self, codes: int, width: int, decay: float = 0.5, commitment: float = 0.25):
        super().__init__()
        self.decay, self.commitment = decay, commitment
        self.register_buffer("codebook", torch.randn(codes, width))
        self.register_buffer("counts", torch.zeros(codes))
        self.register_buffer("sums", self.codebook.clone())

    @torch.no_grad()
    def nearest(self, flat: Tensor) -> Tensor:
        """The index of the nearest code for each row: (n, c) -> (n,). A piece at a time: all distances at once would
        take as much memory as the rest of the network."""
        half = self.codebook.square().sum(1) / 2
        return torch.cat([(half - rows @ self.codebook.t()).argmin(1) for rows in flat.split(16384)])

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu" if z.is_meta else z.device.type, enabled=False):
            flat = z.detach().movedim(1, -1).float()
            shape, flat = flat.shape, flat.reshape(-1, z.shape[1])
            index = self.nearest(flat)
            codes = self.codebook[index].view(shape).movedim(-1, 1).contiguous()
            if self.training:
                self.follow(flat, index)
            loss = self.commitment * F.mse_loss(codes, z.float())
        codes = codes.to(z.dtype)
        return (z + (codes - z).detach() if z.requires_grad else codes), loss

    @torch.no_grad()
    def follow(self, flat: Tensor, index: Tensor) -> None:
        """Move the codes to the averages of the rows that they stand for, over all processes."""
        sums = torch.zeros_like(self.sums).index_add_(0, index, flat)
        counts = torch.zeros_like(self.counts).index_add_(0, index, flat.new_ones(len(flat)))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
            torch.distributed.all_reduce(counts)
        self.counts.mul_(self.decay).add_(counts, alpha=1 - self.decay)
        self.sums.mul_(self.decay).add_(sums, alpha=1 - self.decay)
        total, floor = self.counts.sum(), 1e-5
        smooth = (self.counts + floor) / (total + len(self.counts) * floor) * total
        self.codebook.copy_(self.sums / smooth[:, None])


class Autoencoder(nn.Module):
    """The vector-quantised autoencoder: (b, 1, h, w) in [-1, 1] <-> (b, c, h / 2^levels, w / 2^levels).

    Args:
        widths: channels at each level. hidden: channels inside the residual units. layers: of these a level.
        codes, latent: how many codes there are, and their channels.
    """

    def __init__(self, widths: list[int], hidden: int, layers: int, codes: int, latent: int):
        super().__init__()

        def residuals(width: int) -> list[nn.Module]:
            return [Residual(width, hidden) for _ in range(layers)]

        down: list[nn.Module] = []
        for c_in, c_out in zip([1, *widths], widths, strict=False):
            down += [Halve(c_in, c_out), *residuals(c_out)]
        self.encoder = nn.Sequential(*down, nn.Conv2d(widths[-1], latent, 3, padding=1))
        up: list[nn.Module] = [nn.Conv2d(latent, widths[-1], 3, padding=1)]
        for level in reversed(range(len(widths))):
            c_out = widths[level - 1] if level else 1
            up += [*residuals(widths[level]), Double(widths[level], c_out, last=not level)]
        self.decoder = nn.Sequential(*up)
        self.quantiser = Quantiser(codes, latent)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures made again, and the quantiser's loss."""
        codes, loss = self.quantiser(self.encode(pictures))
        return self.decode(codes), loss

    def encode(self, pictures: Tensor) -> Tensor:
        """Latents before they are quantised."""
        return self.encoder[1:](channels_last(self.encoder[0](pictures)))

    def decode(self, codes: Tensor) -> Tensor:
        """Pictures of latents."""
        return self.decoder(channels_last(codes))


class Critic(nn.Module):
    """The patch discriminator of the autoencoder's first stage: (b, 1, h, w) -> (b, 1, h / 8 - 2, w / 8 - 2)."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        widths = [width * 2**i for i in range(layers + 1)]
        self.first = nn.Conv2d(1, width, 4, stride=2, padding=1)
        pairs = list(itertools.pairwise(widths))
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 4, stride=1 if i == layers - 1 else 2, padding=1, bias=False)
            for i, (a, b) in enumerate(pairs)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for _, b in pairs)
        self.last = nn.Conv2d(widths[-1], 1, 4, padding=1)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.normal_(m.weight, 0.0, 0.02)
            elif isinstance(m, nn.BatchNorm2d):
                nn.init.normal_(m.weight, 1.0, 0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.first(x), 0.2, inplace=True)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.leaky_relu(norm(conv(x)), 0.2, inplace=True)
        return self.last(x)


# ---- the noise estimator (the U-Net of guided diffusion) ----------------------------------------------------------

GROUPS = 32  # of every group norm


def embed_time(timestep: Tensor, width: int) -> Tensor:
    """Cosines and sines of the step at ``width / 2`` frequencies from 1 to 1/10000: (b,) -> (b, width)."""
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=timestep.device)
    angles = timestep.float()[:, None] * torch.exp(-math.log(10000) * steps / half)
    return torch.cat((angles.cos(), angles.sin()), -1)


class Step(nn.Module):
    """A residual block that the time scales and shifts: x + conv(silu(film(norm(conv(silu(norm(x)))), t))).

    Args:
        c_in, c_out: channels. time: channels of the time's embedding. resample: "", "down" or "up", by two.
    Shapes:
        x: (b, c_in, h, w); time: (b, time), after its silu; returns (b, c_out, h, w), or half or twice the size
    """

    def __init__(self, c_in: int, c_out: int, time: int, resample: str = ""):
        super().__init__()
        self.resample = resample
        self.norm1 = nn.GroupNorm(GROUPS, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.embed = nn.Linear(time, 2 * c_out)
        self.norm2 = nn.GroupNorm(GROUPS, c_out)
        self.conv2 = zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = F.silu(self.norm1(x))
        if self.resample == "down":
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        elif self.resample == "up":
            h, x = (F.interpolate(t, scale_factor=2, mode="nearest") for t in (h, x))
        h = self.conv1(h)
        # the norm's own scale and shift and the time's are one scale and one shift of each channel
        scale, shift = self.embed(time).chunk(2, 1)
        scale = 1 + scale
        weight, bias = self.norm2.weight * scale, self.norm2.bias * scale + shift
        h = F.group_norm(h, GROUPS, eps=self.norm2.eps)
        h = F.silu(torch.addcmul(bias[..., None, None].to(h.dtype), h, weight[..., None, None].to(h.dtype)))
        return self.skip(x) + self.conv2(h)


class Attention(nn.Module):
    """Self-attention over the positions, with the residual. (b, c, h, w) -> the same."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(GROUPS, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = zero(nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        y = self.qkv(self.norm(x).flatten(2).transpose(1, 2))  # (b, n, 3c): q, k, v, each head by head
        q, k, v = y.view(b, h * w, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, h * w, c)
        return x + self.project(y).transpose(1, 2).reshape(b, c, h, w)


def zero(layer: nn.Module) -> Any:
    """The layer with weights and biases of zero: its block starts as the identity."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


class NoiseEstimator(nn.Module):
    """Noise in latents, of which a part is the condition: (b, c, h, w), (b,) -> (b, c, h, w).

    Args:
        channels: c, of which the first half is the noisy latent, the second the condition.
        width, mult: channels at level i are width * mult[i]. blocks: residual blocks a level.
        attention: downsampling factors at which blocks attend. heads: of attention.
        recompute: keep only convolutions' outputs for the backward pass, and make the rest of a block again.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        mult: list[int],
        blocks: int,
        attention: list[int],
        heads: int,
        recompute: bool = False,
    ):
        super().__init__()
        self.width, self.recompute = width, recompute
        time = 4 * width
        self.time = nn.Sequential(nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time))
        current, factor = width * mult[0], 1
        self.down = nn.ModuleList([nn.ModuleList([nn.Conv2d(channels, current, 3, padding=1)])])
        widths = [current]
        for level, m in enumerate(mult):
            for _ in range(blocks):
                layers: list[nn.Module] = [Step(current, current := width * m, time)]
                if factor in attention:
                    layers.append(Attention(current, heads))
                self.down.append(nn.ModuleList(layers))
                widths.append(current)
            if level < len(mult) - 1:
                self.down.append(nn.ModuleList([Step(current, current, time, "down")]))
                widths.append(current)
                factor *= 2
        self.middle = nn.ModuleList(
            [Step(current, current, time), Attention(current, heads), Step(current, current, time)]
        )
        self.up = nn.ModuleList()
        for level, m in reversed(list(enumerate(mult))):
            for i in range(blocks + 1):
                layers = [Step(current + widths.pop(), current := width * m, time)]
                if factor in attention:
                    layers.append(Attention(current, heads))
                if level and i == blocks:
                    layers.append(Step(current, current, time, "up"))
                    factor //= 2
                self.up.append(nn.ModuleList(layers))
        self.norm = nn.GroupNorm(GROUPS, current)
        self.out = zero(nn.Conv2d(current, channels, 3, padding=1))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        time = F.silu(self.time(embed_time(timestep, self.width).to(self.time[0].weight.dtype)))

        def run(layers: Any, x: Tensor) -> Tensor:
            for layer in layers:
                if not isinstance(layer, Step):
                    x = layer(x)
                elif self.recompute and torch.is_grad_enabled():
                    x = checkpoint(layer, x, time, use_reentrant=False, context_fn=_keep_convolutions)
                else:
                    x = layer(x, time)
            return x

        skips = []
        for layers in self.down:
            x = run(layers, x)
            skips.append(x)
        x = run(self.middle, x)
        for layers in self.up:
            x = run(layers, torch.cat((x, skips.pop()), 1))
        return self.out(F.silu(self.norm(x)))


def _keep_convolutions() -> Any:
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    return create_selective_checkpoint_contexts([torch.ops.aten.convolution.default])


# ---- diffusion and its samplers -----------------------------------------------------------------------------------


def signal_levels(steps: int, first: float = 0.00085, last: float = 0.012) -> Tensor:
    """abar_t, what is left of the signal's variance after step t, with betas whose roots are evenly spaced: (steps,)"""
    betas = torch.linspace(first**0.5, last**0.5, steps, dtype=torch.float32) ** 2
    return torch.cumprod(1 - betas, 0)


def add_noise(x: Tensor, noise: Tensor, signal: Tensor) -> Tensor:
    """sqrt(abar) x + sqrt(1 - abar) noise; signal: (b,), of each picture."""
    signal = signal.view(-1, 1, 1, 1).to(x.dtype)
    return signal.sqrt() * x + (1 - signal).sqrt() * noise


def lcm_timesteps(steps: int, total: int, grid: int = 50) -> list[int]:
    """The steps of the consistency sampler, descending: ``steps`` of a grid of ``grid`` (at least) evenly spaced ones.

    Raises:
        ValueError: if there are more steps than training has.
    """
    grid = max(grid, steps)
    if steps < 1 or grid > total:
        raise ValueError(f"steps is {steps}; it may be 1 to the {total} of training.")
    every = total // grid
    points = [(i + 1) * every - 1 for i in range(grid)][::-1]
    return [points[i * grid // steps] for i in range(steps)]


def lcm_step(
    x: Tensor, eps: Tensor, noise: Tensor | None, step: int, signal: Tensor, to: Tensor, limit: float | None
) -> Tensor:
    """One step of the consistency sampler (as in diffusers' LCMScheduler): the clean latent is estimated, kept within
    +-limit, mixed with x by the boundary condition, and noise is put on it again up to the next step's level.

        x0 = clip((x - sqrt(1 - abar) eps) / sqrt(abar));  c_out x0 + c_skip x,  c_skip = s^2 / ((10 t)^2 + s^2)

    Args:
        noise: fresh, or None at the last step. step: t. signal, to: abar of this and of the next step, ().
    """
    clean = (x - (1 - signal).sqrt() * eps) / signal.sqrt()
    if limit is not None:
        clean = clean.clamp(-limit, limit)
    data, scaled = 0.5, 10.0 * step
    root = scaled**2 + data**2
    clean = scaled / root**0.5 * clean + data**2 / root * x
    return clean if noise is None else to.sqrt() * clean + (1 - to).sqrt() * noise


def ddpm_timesteps(steps: int, total: int) -> list[int]:
    """``steps`` evenly spaced steps of ancestral sampling, descending to 0."""
    if not 1 <= steps <= total:
        raise ValueError(f"steps is {steps}; it may be 1 to the {total} of training.")
    return [i * (total // steps) for i in range(steps)][::-1]


def ddpm_step(x: Tensor, eps: Tensor, noise: Tensor | None, signal: Tensor, to: Tensor, limit: float | None) -> Tensor:
    """One step of ancestral sampling (Ho et al. 2020, eq. 7, with the smaller variance); arguments as in `lcm_step`."""
    clean = (x - (1 - signal).sqrt() * eps) / signal.sqrt()
    if limit is not None:
        clean = clean.clamp(-limit, limit)
    kept = signal / to
    mean = to.sqrt() * (1 - kept) / (1 - signal) * clean + kept.sqrt() * (1 - to) / (1 - signal) * x
    if noise is None:
        return mean
    return mean + ((1 - to) / (1 - signal) * (1 - kept)).clamp_min(1e-20).sqrt() * noise


def enhance(eps: Tensor, noise: Tensor, alpha: float) -> Tensor:
    """Local-enhanced guidance: alpha eps + (1 - alpha) noise / std(eps), the deviation over each picture's output."""
    deviation = eps.flatten(1).std(1).view(-1, 1, 1, 1)
    return alpha * eps + (1 - alpha) * noise / deviation.clamp_min(1e-12)


# ---- losses and measures ------------------------------------------------------------------------------------------


def ms_ssim(a: Tensor, b: Tensor) -> Tensor:
    """Multi-scale structural similarity over five halvings, as the authors use it: means over all pictures at each
    scale, negative ones as zero; the values' range is 2 where the first picture falls below -0.5, else 1.

    Shapes:
        a, b: (b, 1, h, w), sides at least 16; returns ()
    """
    product = a.new_ones(())
    weights = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
    for level, weight in enumerate(weights):
        similarity, contrast = _ssim(a, b)
        part = similarity if level == len(weights) - 1 else contrast
        product = product * part.clamp_min(1e-8) ** weight  # at zero the power's slope is infinite
        if level < len(weights) - 1:
            a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return product


def _ssim(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Mean structural similarity and its contrast part under a Gaussian window of sigma 1.5, 11 wide or as it fits."""
    size = min(11, *a.shape[-2:])
    line = torch.exp(-((torch.arange(size, dtype=a.dtype, device=a.device) - size // 2) ** 2) / (2 * 1.5**2))
    line = line / line.sum()
    stacked = torch.cat((a, b, a * a, b * b, a * b))
    means = F.conv2d(F.conv2d(stacked, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))
    ma, mb, aa, bb, ab = means.chunk(5)
    span = torch.where(a.detach().amin() < -0.5, 2.0, 1.0)
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    upper, lower = 2 * (ab - ma * mb) + c2, aa - ma**2 + bb - mb**2 + c2
    return ((2 * ma * mb + c1) * upper / ((ma**2 + mb**2 + c1) * lower)).mean(), (upper / lower).mean()


def least_squares(scores: Tensor, wanted: float) -> Tensor:
    """The critic's loss: mean (leaky(scores) - wanted)^2, with MONAI's leaky rectifier of slope 0.05."""
    return (F.leaky_relu(scores, 0.05) - wanted).square().mean()


class Perceptual(nn.Module):
    """LPIPS on VGG-16: distance of unit feature vectors at five depths, weighted by channel; neither trained nor saved.

    Args:
        vgg: VGG-16. lines: the five channels' weights, each (c,).
    Shapes:
        a, b: (b, 1, h, w) in [-1, 1]; returns ()
    """

    def __init__(self, vgg: VGG, lines: list[Tensor]):
        super().__init__()
        self.vgg = vgg
        for i, line in enumerate(lines):
            self.register_buffer(f"line{i}", line.detach().float().view(1, -1, 1, 1))

    @classmethod
    def load(cls, source: str) -> "Perceptual":
        """With VGG-16's weights as `load_vgg` finds them.

        Raises:
            ZooError: if they cannot be had.
        """
        from torchmetrics.functional.image import lpips as package

        vgg = load_vgg(source, blocks=VGG16["blocks"], hint="; or set `perceptual_weight` to 0")
        lines = torch.load(Path(package.__file__).parent / "lpips_models/vgg.pth", weights_only=True)
        return cls(vgg, [lines[f"lin{i}.model.1.weight"] for i in range(5)])

    def features(self, x: Tensor) -> list[Tensor]:
        """Unit vectors at five depths, each (b, c, h, w)."""
        found = self.vgg.stages(x.expand(-1, 3, -1, -1))
        return [x / (x.square().sum(1, keepdim=True).clamp_min(1e-30).sqrt() + 1e-10) for x in found]

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        total = a.new_zeros(())
        for depth, (first, second) in enumerate(zip(self.features(a), self.features(b), strict=True)):
            total = total + ((first - second).square() * getattr(self, f"line{depth}")).sum(1).mean()
        return total


def as_saved(x: Tensor) -> Tensor:
    """Clamped to [0, 1] and rounded to 8 bits, as the authors' scores see a picture."""
    return (x.clamp(0, 1) * 255).round() / 255


def mean_squared_error(bs: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Of each picture, (b, 1, h, w) -> (b,); with a mask over its set pixels (over all where none is set)."""
    error = (as_saved(bs) - as_saved(target)).square()
    if mask is None:
        return error.mean((1, 2, 3))
    weight = (mask > 0.5).to(error.dtype)
    weight = torch.where(weight.amax((1, 2, 3), keepdim=True) > 0, weight, torch.ones_like(weight))
    return (error * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3))


def decibels(error: Tensor) -> Tensor:
    """PSNR for a peak of 1; 100 dB for no error at all."""
    return (-10 * torch.log10(error)).clamp(max=100.0)


def bone_suppression_ratio(bs: Tensor, target: Tensor, cxr: Tensor) -> Tensor:
    """How much of the bones' energy is gone: 1 - sum max(target - bs, 0)^2 / sum (cxr - target)^2, of each picture.

    bs is first brought to the target's mean. 1 is best. As the authors' script computes it.

    Shapes:
        bs, target, cxr: (b, 1, h, w) in [0, 1]; returns (b,)
    """
    bs, target, cxr = as_saved(bs), as_saved(target), as_saved(cxr)
    missing = target - bs
    missing = (missing - missing.mean((1, 2, 3), keepdim=True)).clamp_min(0)
    return 1 - missing.square().sum((1, 2, 3)) / (cxr - target).square().sum((1, 2, 3)).clamp_min(1e-12)


def load_lpips(device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS on AlexNet as the authors' script uses it, on grey pictures in [0, 1] as they are: two (b, 1, h, w) -> ().

    Raises:
        ZooError: if AlexNet's weights cannot be had.
    """
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    try:
        measure: Any = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=False).to(device).eval()
    except Exception as error:  # of the download, of torchvision missing
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ZooError(
            f"LPIPS needs torchvision and AlexNet's weights, which cannot be had ({reason[:120]}). Leave `lpips` out."
        ) from error
    return lambda a, b: measure(*(as_saved(t).expand(-1, 3, -1, -1) for t in (a, b)))


def lungs_alone(picture: Tensor, mask: Tensor) -> Tensor:
    """The picture stretched to [0, 1] by its own smallest and largest value, and zero outside the mask.

    Shapes:
        picture: (b, 1, h, w) in [0, 1]; mask: (b, 1, h, w); returns (b, 1, h, w)
    """
    low, high = picture.amin((1, 2, 3), keepdim=True), picture.amax((1, 2, 3), keepdim=True)
    return (picture - low) / (high - low).clamp_min(1e-6) * (mask > 0.5)


# ---- the method ---------------------------------------------------------------------------------------------------

SCORES = ("psnr", "mse", "bsr", "psnr_lungs", "bsr_lungs", "seam", "psnr_cxr", "gain")


class GLLCM(ZooModule):
    """Bone suppression by global-local latent consistency models; the defaults are the paper's (SZCH-X-Rays).

    Train the autoencoder first (``stage="autoencoder"``), then go on from its checkpoint:
    ``GLLCM.from_pretrained(folder, stage="diffusion")``, or ``zoo fit GLLCM --from folder --model.stage diffusion``.
    A training batch of b X-rays makes 2 b samples (whole and lungs alone) for the second stage and 4 b for the first.

    Sampling is deterministic: the noise follows from ``noise_seed`` and is the same for every picture, so that a
    result depends neither on its neighbours in a batch nor on the device.

    Args:
        stage: "diffusion" trains the noise estimator (the autoencoder stays as it is) and predicts; "autoencoder"
            trains the autoencoder against a critic.
        autoencoder: folder, ``.ckpt`` file or repository of the first stage, whose autoencoder ``fit`` starts from.
        size: side in pixels of the square that pictures are worked on at; a multiple of all halvings. Pictures of
            another size are resized, and what was taken away is resized back, so that detail stays.
        ae_widths, ae_hidden, ae_layers: of the autoencoder: channels a level, inside residual units, units a level.
        codes: how many codes.
        latent: channels of a code.
        critic_width: channels of the critic's first layer.
        critic_layers: layers of the critic after it.
        perceptual: VGG-16 for the perceptual loss: timm's Hub id, or a folder or file with its weights.
        perceptual_weight: of that loss; 0 needs no VGG.
        adversarial_weight: of the critic's loss. ssim_weight: of 1 - MS-SSIM.
        lr_autoencoder: Adam's rate of the autoencoder. lr_critic: of the critic.
        lr_halved: steps after which both are halved.
        authors_schedule: as in the authors' code halve the autoencoder's rate twice there and the critic's never.
        width: of the noise estimator, at its first level.
        mult: channels of its levels over ``width``.
        blocks: residual blocks a level.
        attention: downsampling factors at which there is attention.
        heads: of attention.
        recompute: make the estimator's activations again in the backward pass, save those of convolutions: less memory.
        timesteps: of the diffusion, T.
        offset_noise: strength of the training noise that is equal over a channel.
        condition_scaling: "raw": the condition is given as it is; "authors": in training times sqrt(abar_t), as in the
            authors' code, whose weights need it only there.
        lr: AdamW's rate, a tenth after 1/2, 2/3 and 5/6 of training.
        weight_decay: AdamW's.
        sampler: "lcm" (consistency), or "ddpm" (ancestral, as in BS-LDM).
        steps: of the sampler.
        paths: "both"; "global" or "local" alone.
        guidance: "enhanced" (the paper's), "free" (classifier-free: alpha local + (1 - alpha) global), or "none".
        alpha: strength of guidance; 1 is none.
        clip_global, clip_local: range that the estimated clean latent is kept within, on either path.
        clip_growth: added to it with every step.
        requantise: replace the sampled latents by their nearest codes before decoding (the authors do not).
        fusion: "poisson", or "paste" (with its seam).
        min_region: connected parts of the lung mask below so many pixels are left out.
        noise_seed: of the sampler.
        lpips: test LPIPS, too, on AlexNet (torchvision fetches its weights).
    Shapes:
        cxr: (b, 1, h, w) in [0, 1]; mask: (b, 1, h, w), lungs above 0.5; predict returns (b, 1, h, w) in [0, 1]
    Example:
        >>> model = GLLCM.from_variant("tiny")
        >>> model.predict(torch.rand(1, 1, 64, 64), torch.ones(1, 1, 64, 64)).shape
        torch.Size([1, 1, 64, 64])
    """

    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {
            "size": 64,
            "ae_widths": [8, 8],
            "ae_hidden": 8,
            "ae_layers": 1,
            "codes": 32,
            "width": 32,
            "mult": [1, 1],
            "blocks": 1,
            "attention": [2],
            "heads": 2,
            "steps": 2,
            "perceptual_weight": 0.0,
            "critic_width": 8,
            "critic_layers": 2,
        },
        "jsrt": {"clip_global": 1.7, "clip_local": 3.0},
    }
    monitor, mode = "val/loss", "min"
    head = ("net.", "critic.")
    untrusted = ("autoencoder",)

    def __init__(
        self,
        stage: str = "diffusion",
        autoencoder: str | None = None,
        size: int = 1024,
        ae_widths: tuple[int, ...] = (128, 256, 512),
        ae_hidden: int = 512,
        ae_layers: int = 2,
        codes: int = 1024,
        latent: int = 4,
        critic_width: int = 64,
        critic_layers: int = 3,
        perceptual: str = "timm/vgg16.tv_in1k",
        perceptual_weight: float = 0.001,
        adversarial_weight: float = 0.01,
        ssim_weight: float = 1.0,
        lr_autoencoder: float = 1e-4,
        lr_critic: float = 5e-4,
        lr_halved: int = 200,
        authors_schedule: bool = False,
        width: int = 128,
        mult: tuple[int, ...] = (1, 1, 2, 2, 4, 4),
        blocks: int = 8,
        attention: tuple[int, ...] = (64, 32, 16, 8),
        heads: int = 8,
        recompute: bool = False,
        timesteps: int = 1000,
        offset_noise: float = 0.1,
        condition_scaling: str = "raw",
        lr: float = 1e-4,
        weight_decay: float = 0.01,
        sampler: str = "lcm",
        steps: int = 50,
        paths: str = "both",
        guidance: str = "enhanced",
        alpha: float = 3.0,
        clip_global: float = 2.0,
        clip_local: float = 3.5,
        clip_growth: float = 0.025,
        requantise: bool = False,
        fusion: str = "poisson",
        min_region: int = 100,
        noise_seed: int = 0,
        lpips: bool = False,
    ):
        super().__init__()
        _one_of("stage", stage, "diffusion", "autoencoder")
        _one_of("condition_scaling", condition_scaling, "raw", "authors")
        _one_of("sampler", sampler, "lcm", "ddpm")
        _one_of("paths", paths, "both", "global", "local")
        _one_of("guidance", guidance, "enhanced", "free", "none")
        _one_of("fusion", fusion, "poisson", "paste")
        if guidance == "free" and paths == "local":
            raise ValueError("guidance 'free' weighs the local path against the global one: paths must be 'both'.")
        bad = [w for w in (width * m for m in mult) if w % GROUPS or w % heads]
        if bad:
            raise ValueError(
                f"width {width} times mult {list(mult)} must give multiples of {GROUPS} and heads {heads}."
            )
        halvings = 2 ** (len(ae_widths) + len(mult) - 1)
        if size % halvings or size < halvings:
            raise ValueError(
                f"size is {size}; {len(ae_widths)} + {len(mult) - 1} halvings need a multiple of {halvings}."
            )
        (lcm_timesteps if sampler == "lcm" else ddpm_timesteps)(steps, timesteps)
        self.save_hyperparameters()
        self.factor = 2 ** len(ae_widths)
        self.autoencoder = Autoencoder(list(ae_widths), ae_hidden, ae_layers, codes, latent)
        self.net = self.critic = None
        if stage == "diffusion":
            self.net = NoiseEstimator(2 * latent, width, list(mult), blocks, list(attention), heads, recompute)
            self.freeze("autoencoder")
        else:
            self.critic = Critic(critic_width, critic_layers)
            self.automatic_optimization = False
        self.register_buffer("signal", signal_levels(timesteps), persistent=False)
        self.scores = nn.ModuleDict({name: torchmetrics.MeanMetric() for name in SCORES})
        self._perceptual: list[Perceptual] = []  # in a list: neither a submodule nor saved
        self._lpips: list[Callable[[Tensor, Tensor], Tensor]] = []

    # ---- forward ------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, condition: Tensor | None = None, timestep: Tensor | None = None) -> Tensor:
        """What the stage trains: the noise in latents; in the stage "autoencoder", pictures made again.

        Shapes:
            x, condition: (b, latent, h, w), timestep: (b,) long; returns (b, 2 latent, h, w), of which only the first
            half is trained. Stage "autoencoder": x: (b, 1, h, w) in [0, 1], nothing else; returns (b, 1, h, w)
        Raises:
            ValueError: for other shapes.
        """
        if self.net is None:
            check_channels(x, 1, "x")
            return self.autoencoder(2 * x - 1)[0] / 2 + 0.5
        if condition is None or timestep is None:
            raise ValueError(
                "GLLCM: forward takes a noisy latent, its condition and the time step; `predict` pictures."
            )
        check_channels(x, self.hparams.latent, "x")
        check_channels(condition, self.hparams.latent, "condition")
        return self.net(torch.cat((x, condition), 1), timestep)

    def example_inputs(self) -> tuple[Tensor, ...]:
        g = torch.Generator().manual_seed(0)
        if self.net is None:
            return (torch.rand(1, 1, 16 * self.factor, 16 * self.factor, generator=g).to(self.device),)
        side = 2 ** len(self.hparams.mult)
        x, condition = torch.randn(2, 1, self.hparams.latent, side, side, generator=g).to(self.device)
        return x, condition, torch.tensor([500], device=self.device)

    def encode(self, picture: Tensor) -> Tensor:
        """A picture's latent, quantised: (b, 1, h, w) in [0, 1] -> (b, latent, h / factor, w / factor)."""
        return self.autoencoder.quantiser(self.autoencoder.encode(2 * picture - 1))[0]

    def decode(self, latent: Tensor) -> Tensor:
        """The picture of a latent, not clamped to [0, 1]."""
        if self.hparams.requantise:
            latent = self.autoencoder.quantiser(latent)[0]
        return self.autoencoder.decode(latent) / 2 + 0.5

    # ---- training -----------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        source = self.hparams.autoencoder
        if stage != "fit" or not source or getattr(self.trainer, "ckpt_path", None):
            return  # a resumed run has it in its checkpoint
        given = GLLCM.from_pretrained(source)
        try:
            self.autoencoder.load_state_dict(given.autoencoder.state_dict())
        except RuntimeError as error:
            raise ZooError(
                f"The autoencoder in {source} has other sizes than this model: {given.hparams.ae_widths}, "
                f"{given.hparams.ae_hidden}, {given.hparams.ae_layers}, {given.hparams.codes}, {given.hparams.latent} "
                "(ae_widths, ae_hidden, ae_layers, codes, latent)."
            ) from error

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor | None:
        if self.net is None:
            self._autoencoder_step(batch)
            return None
        loss = self.diffusion_loss(batch)
        self.log("train/loss", loss, batch_size=len(batch["cxr"]))
        return loss

    def diffusion_loss(self, batch: dict[str, Any], generator: torch.Generator | None = None) -> Tensor:
        """Mean squared error of the estimated noise, on whole pictures and on lungs alone (where there is a mask)."""
        cxr, bs, mask = batch["cxr"], batch["bs"], batch["mask"]
        with torch.no_grad():
            self.autoencoder.eval()
            pictures = torch.cat((cxr, lungs_alone(cxr, mask), bs, lungs_alone(bs, mask)))
            condition, clean = self.encode(pictures).chunk(2)
        weight = torch.cat((mask.new_ones(len(mask)), (mask > 0.5).flatten(1).any(1).to(mask.dtype)))
        draw = {"generator": generator, "device": "cpu" if generator is not None else clean.device}
        noise = torch.randn(clean.shape, **draw).to(clean)
        shared = torch.randn(*clean.shape[:2], 1, 1, **draw).to(clean)
        noise = noise + self.hparams.offset_noise * shared
        timestep = torch.randint(self.hparams.timesteps, (len(clean),), **draw).to(clean.device)
        return self.noise_loss(clean, condition, noise, timestep, weight)

    def noise_loss(
        self, clean: Tensor, condition: Tensor, noise: Tensor, timestep: Tensor, weight: Tensor | None = None
    ) -> Tensor:
        """The same on latents, with the noise and the steps (b,) given; weight: (b,), of each sample."""
        signal = self.signal[timestep]
        if self.hparams.condition_scaling == "authors":
            condition = signal.sqrt().view(-1, 1, 1, 1).to(condition.dtype) * condition
        estimate = self(add_noise(clean, noise, signal), condition, timestep)[:, : self.hparams.latent]
        error = (estimate.float() - noise.float()).square().mean((1, 2, 3))
        return error.mean() if weight is None else (error * weight).sum() / weight.sum()

    def _autoencoder_step(self, batch: dict[str, Any]) -> None:
        optimizers: Any = self.optimizers()
        schedulers: Any = self.lr_schedulers()
        pictures = self.pictures(batch)
        loss, reconstruction, parts = self.autoencoder_loss(pictures)
        optimizers[0].zero_grad()
        self.manual_backward(loss)
        optimizers[0].step()
        critic_loss = self.critic_loss(pictures, reconstruction)
        optimizers[1].zero_grad()
        self.manual_backward(critic_loss)
        optimizers[1].step()
        for scheduler in schedulers or ():
            scheduler.step()
        self.log_dict({f"train/{k}": v for k, v in parts.items()}, batch_size=len(batch["cxr"]))
        self.log("train/critic", critic_loss, batch_size=len(batch["cxr"]))

    def pictures(self, batch: dict[str, Any]) -> Tensor:
        """What the autoencoder learns from: CXR and BS, whole and lungs alone, in [-1, 1]: (4 b, 1, h, w)."""
        cxr, bs, mask = batch["cxr"], batch["bs"], batch["mask"]
        return 2 * torch.cat((cxr, bs, lungs_alone(cxr, mask), lungs_alone(bs, mask))) - 1

    def autoencoder_loss(self, pictures: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The autoencoder's loss on pictures in [-1, 1], what it made of them, and the loss's parts by name.

        MSE + quantiser + w_p LPIPS + w_a adversarial + w_s (1 - MS-SSIM)
        """
        assert self.critic is not None
        hp = self.hparams
        reconstruction, commitment = self.autoencoder(pictures)
        made = reconstruction.float()
        parts = {"mse": F.mse_loss(made, pictures), "commitment": commitment}
        loss = parts["mse"] + commitment
        if hp.adversarial_weight:
            held = [p for p in self.critic.parameters() if p.requires_grad]
            for p in held:  # its gradients would be thrown away
                p.requires_grad_(False)
            parts["adversarial"] = least_squares(self.critic(reconstruction), 1.0)
            for p in held:
                p.requires_grad_(True)
            loss = loss + hp.adversarial_weight * parts["adversarial"]
        if hp.perceptual_weight:
            if not self._perceptual:
                self._perceptual.append(Perceptual.load(hp.perceptual))
            parts["perceptual"] = self._perceptual[0].to(made.device)(made, pictures)
            loss = loss + hp.perceptual_weight * parts["perceptual"]
        if hp.ssim_weight:
            parts["ssim"] = ms_ssim(made, pictures)
            loss = loss + hp.ssim_weight * (1 - parts["ssim"])
        return loss, reconstruction, {"loss": loss, **parts}

    def critic_loss(self, pictures: Tensor, reconstruction: Tensor) -> Tensor:
        """The critic's: half the least squares on what was made (0) and on what is real (1), times its weight."""
        assert self.critic is not None
        made = least_squares(self.critic(reconstruction.detach()), 0.0)
        real = least_squares(self.critic(pictures), 1.0)
        return self.hparams.adversarial_weight * (made + real) / 2

    def configure_optimizers(self) -> Any:
        hp = self.hparams
        if self.net is None:
            assert self.critic is not None
            first = torch.optim.Adam(self.autoencoder.parameters(), lr=hp.lr_autoencoder)
            second = torch.optim.Adam(self.critic.parameters(), lr=hp.lr_critic)
            at = [hp.lr_halved]
            if hp.authors_schedule:
                return [first, second], [torch.optim.lr_scheduler.MultiStepLR(first, at, 0.25)]
            return [first, second], [torch.optim.lr_scheduler.MultiStepLR(o, at, 0.5) for o in (first, second)]
        optimizer = torch.optim.AdamW(
            self.parameter_groups(), lr=hp.lr, eps=1e-6, weight_decay=hp.weight_decay, foreach=None
        )
        total = self.trainer.estimated_stepping_batches

        def factor(step: int) -> float:  # epochs 300, 400 and 500 of 600
            return 0.1 ** sum(step >= total * part for part in (1 / 2, 2 / 3, 5 / 6)) if math.isfinite(total) else 1.0

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # ---- evaluation ---------------------------------------------------------------------------------------------

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """The stage's own error, under the same noise every time: sampling would take longer than training."""
        if self.net is None:
            pictures = self.pictures(batch)
            loss = F.mse_loss(self.autoencoder(pictures)[0].float(), pictures)
        else:
            loss = self.diffusion_loss(batch, torch.Generator().manual_seed(seed_from("gllcm", "val", batch_idx)))
        self.log("val/loss", loss, batch_size=len(batch["cxr"]), sync_dist=True)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """PSNR, MSE and bone suppression ratio as the authors' script, on 8 bits; within the lungs too; how far the
        error jumps at their contour; the PSNR of the X-ray itself and the gain over it. Stage "autoencoder": of
        pictures made again."""
        cxr, bs, mask = batch["cxr"], batch["bs"], batch["mask"]
        if self.net is None:
            predicted = self.autoencoder(2 * bs - 1)[0].div(2).add(0.5).clamp(0, 1)
        else:
            predicted = self.predict(cxr, mask)
        error = mean_squared_error(predicted, bs)
        lungs = (mask > 0.5).to(bs.dtype)
        found = {
            "psnr": decibels(error),
            "mse": error,
            "bsr": bone_suppression_ratio(predicted, bs, cxr),
            "psnr_lungs": decibels(mean_squared_error(predicted, bs, mask)),
            "bsr_lungs": bone_suppression_ratio(predicted * lungs, bs * lungs, cxr * lungs),
            "seam": seam(predicted - bs, mask),
            "psnr_cxr": decibels(mean_squared_error(cxr, bs)),
            "gain": decibels(error) - decibels(mean_squared_error(cxr, bs)),
        }
        for name, values in found.items():
            metric: Any = self.scores[name]
            metric.update(values)
            self.log(f"test/{name}", metric, on_step=False, on_epoch=True, batch_size=len(bs))
        if self.hparams.lpips:
            if not self._lpips:
                self._lpips.append(load_lpips(bs.device))
            distance = self._lpips[0](predicted, bs)
            self.log("test/lpips", distance, on_step=False, on_epoch=True, batch_size=len(bs), sync_dist=True)

    # ---- prediction ---------------------------------------------------------------------------------------------

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """``bs``: (b, 1, h, w) in [0, 1], or a list of (1, h, w) for pictures of several sizes; ``name``."""
        cxr, mask = batch["cxr"], batch.get("mask")
        if isinstance(cxr, Tensor):
            return {"bs": self.predict(cxr, mask), "name": batch["name"]}
        masks = [None] * len(cxr) if mask is None else [m[None] for m in mask]
        return {
            "bs": [self.predict(x[None], m)[0] for x, m in zip(cxr, masks, strict=True)],
            "name": batch["name"],
        }

    @torch.no_grad()
    def predict(self, cxr: Tensor, mask: Tensor | None = None, steps: int | None = None) -> Tensor:  # type: ignore[override]
        """Take the bones out of X-rays of any size.

        Args:
            cxr: (b, 1, h, w) in [0, 1], bright bones on dark lungs.
            mask: (b, 1, h, w), lungs above 0.5. Without one, or where it is empty, only the global path serves.
            steps: instead of the hyperparameter of that name.
        Shapes:
            returns: (b, 1, h, w) in [0, 1]; zero where the X-ray is
        Raises:
            ValueError: for another shape, a value that is not finite or lies outside [0, 1].
            ZooError: in the stage "autoencoder", which has nothing to predict with.
        """
        if self.net is None:
            raise ZooError(
                "GLLCM: this is a checkpoint of the autoencoder alone; train stage='diffusion' from it first."
            )
        check_channels(cxr, 1, "cxr")
        check_finite(cxr, "cxr")
        if cxr.amin() < 0 or cxr.amax() > 1:
            raise ValueError(f"'cxr' has values from {cxr.amin():.4g} to {cxr.amax():.4g}; expected [0, 1].")
        cxr = cxr.to(self.device)
        if mask is not None:
            check_channels(mask, 1, "mask")
            check_finite(mask, "mask")
            if mask.shape != cxr.shape:
                raise ValueError(f"'mask' has shape {tuple(mask.shape)} and 'cxr' {tuple(cxr.shape)}; they must agree.")
            mask = mask.to(cxr)
        training = {name for name, m in self.named_modules() if m.training}
        self.eval()
        try:
            return self._predict(cxr, mask, steps or self.hparams.steps)
        finally:
            for name in training:
                self.get_submodule(name).training = True

    def _predict(self, cxr: Tensor, mask: Tensor | None, steps: int) -> Tensor:
        side = (self.hparams.size,) * 2
        small = cxr
        if cxr.shape[-2:] != side:
            small = F.interpolate(cxr, side, mode="bilinear", antialias=True).clamp(0, 1)
            mask = None if mask is None else F.interpolate(mask, side, mode="bilinear", antialias=True)
        whole = self.restore(small, mask, steps)
        if small is not cxr:  # resize what was taken away, not the picture
            taken = F.interpolate(whole - small, cxr.shape[-2:], mode="bilinear", antialias=True)
            whole = (cxr + taken).clamp(0, 1)
        return torch.where(cxr < 0.5 / 255, torch.zeros_like(whole), whole)

    def restore(
        self,
        cxr: Tensor,
        mask: Tensor | None,
        steps: int,
        draw: Callable[[str, tuple[int, ...]], Tensor] | None = None,
    ) -> Tensor:
        """The whole pipeline at the model's own size: encode, sample, decode, fuse.

        Args:
            draw: noise by its use ("start", "guide", "global", "local") and shape; by default from ``noise_seed``.
        Shapes:
            cxr: (b, 1, size, size) in [0, 1]; mask: the same, or None; returns the same, in [0, 1]
        """
        hp = self.hparams
        black = cxr < 0.5 / 255
        rows = torch.arange(0, device=cxr.device)  # the pictures that have lungs
        if mask is not None and hp.paths != "global":
            rows = (mask > 0.5).flatten(1).any(1).nonzero().flatten()
        alone = hp.paths == "local" and len(rows) == len(cxr)
        local = self.encode(lungs_alone(cxr[rows], mask[rows])) if mask is not None and len(rows) else None
        latents = self.sample(None if alone else self.encode(cxr), local, rows, steps, draw or self._noise(cxr))
        whole = None if latents[0] is None else self.decode(latents[0]).masked_fill(black, 0)
        if latents[1] is None or mask is None:
            assert whole is not None
            return whole.clamp(0, 1)
        lungs, held = self.decode(latents[1]), (mask[rows] > 0.5).to(cxr.dtype)
        if whole is None:
            return (lungs * held).masked_fill(black, 0).clamp(0, 1)
        count = held.sum((1, 2, 3), keepdim=True)
        shift = ((whole[rows] - lungs) * held).sum((1, 2, 3), keepdim=True) / count
        lungs = (lungs + shift).masked_fill(black[rows], 0).clamp(0, 1)
        whole = whole.clamp(0, 1)
        fuse = poisson_blend if hp.fusion == "poisson" else paste
        whole[rows] = fuse(lungs, whole[rows], drop_small(held, hp.min_region)).to(whole.dtype)
        return whole.clamp(0, 1)

    def sample(
        self,
        whole: Tensor | None,
        local: Tensor | None,
        rows: Tensor,
        steps: int,
        draw: Callable[[str, tuple[int, ...]], Tensor],
    ) -> tuple[Tensor | None, Tensor | None]:
        """Denoise both paths side by side, each step in one pass of the network.

        Args:
            whole: condition of the global path, (b, latent, h, w), or None. local: of the local one, or None.
            rows: which of the pictures the local ones are.
        """
        assert self.net is not None
        hp = self.hparams
        conditions = torch.cat([c for c in (whole, local) if c is not None])
        count = 0 if whole is None else len(whole)
        start = draw("start", (1, *conditions.shape[1:]))
        x = start.expand(len(conditions), -1, -1, -1)
        times = (lcm_timesteps if hp.sampler == "lcm" else ddpm_timesteps)(steps, hp.timesteps)
        for j, t in enumerate(times):
            timestep = torch.full((len(x),), t, device=x.device)
            out = self.net(torch.cat((x, conditions), 1), timestep)
            parts = []
            for path, piece in enumerate((slice(0, count), slice(count, None))):
                if (whole, local)[path] is None:
                    continue
                eps = out[piece]
                if path and hp.guidance == "free" and whole is not None:
                    eps = hp.alpha * eps + (1 - hp.alpha) * out[:count][rows]
                elif path and hp.guidance == "enhanced" and hp.alpha != 1:
                    eps = enhance(eps, draw("guide", (1, *eps.shape[1:])), hp.alpha)
                noise = None
                if j < len(times) - 1:
                    noise = draw("local" if path else "global", (1, *x.shape[1:]))
                limit = (hp.clip_local if path else hp.clip_global) + hp.clip_growth * j
                to = self.signal[times[j + 1]] if j < len(times) - 1 else self.signal.new_ones(())
                eps, now, signal = eps[:, : hp.latent], x[piece], self.signal[t]
                if hp.sampler == "lcm":
                    parts.append(lcm_step(now, eps, noise, t, signal, to, limit))
                else:
                    parts.append(ddpm_step(now, eps, noise, signal, to, limit))
            x = torch.cat(parts)
        return (None if whole is None else x[:count]), (None if local is None else x[count:])

    def _noise(self, like: Tensor) -> Callable[[str, tuple[int, ...]], Tensor]:
        """Noise from ``noise_seed``, a stream for each use, drawn on the CPU: the same on every device."""
        streams: dict[str, torch.Generator] = {}

        def draw(use: str, shape: tuple[int, ...]) -> Tensor:
            if use not in streams:
                streams[use] = torch.Generator().manual_seed(seed_from("gllcm", use, self.hparams.noise_seed))
            return torch.randn(shape, generator=streams[use]).to(like)

        return draw

    # ---- the authors' weights -----------------------------------------------------------------------------------

    @classmethod
    def convert_state_dict(cls, content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The authors' VQGAN and U-Net, in one dictionary, as (hyperparameters, state dict).

        Their files are whole pickled modules, which only their own code opens. In an environment of its own:
        ``torch.save({**torch.load(vqgan, weights_only=False).state_dict(), **torch.load(unet,
        weights_only=False).state_dict()}, "both.pth")``. Every size is read off the shapes, but for the heads (8).

        Raises:
            ZooError: if a key is missing or unknown.
        """
        return convert(unwrap(content))


def _one_of(name: str, value: str, *accepted: str) -> None:
    if value not in accepted:
        raise ValueError(f"{name} is {value!r}; it may be {', '.join(map(repr, accepted))}.")


def train_autoencoder(folder: Path, seed: int, data: dict[str, Any], model: dict[str, Any], steps: int) -> None:
    """The first stage as a preparing step of a recipe: train an autoencoder and save its checkpoint into ``folder``.

    Args:
        data: arguments of `BoneSuppressionDataModule`. model: of `GLLCM`. steps: batches to train on.
    """
    import lightning

    from zoo.core import Trainer
    from zoo.core.recipe import build
    from zoo.vision.restoration.data_bone_suppression import BoneSuppressionDataModule

    lightning.seed_everything(seed, verbose=False)
    source = BoneSuppressionDataModule(**{"seed": seed, **data})
    source.setup("fit")
    method = build(GLLCM, source, {**model, "stage": "autoencoder"})
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    limits = {"max_epochs": -1, "max_steps": 2 * steps, "limit_val_batches": 0}  # two optimisers step a batch
    trainer = Trainer(default_root_dir=folder / "run", accelerator="cpu", seed=seed, **quiet, **limits)
    trainer.fit(method, datamodule=source)
    method.save_pretrained(folder)


# ---- the authors' checkpoints -------------------------------------------------------------------------------------

_PARTS = {
    "input_blocks": "down",
    "middle_block": "middle",
    "output_blocks": "up",
    "time_embed": "time",
}
_LAYERS = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "embed",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "skip",
    "norm": "norm",
    "qkv": "qkv",
    "proj_out": "project",
}
_QUANTISER = {"embedding.weight": "codebook", "ema_cluster_size": "counts", "ema_w": "sums"}


def rename(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' tensors (weights, or gradients) of either network under our names and in our shapes.

    Raises:
        ZooError: naming keys that neither has.
    """
    ours: dict[str, Tensor] = {}
    unknown = []
    for key, value in theirs.items():
        words = key.split(".")
        new = ""
        if words[0] in ("encoder", "decoder") and words[1] == "blocks" and words[-2:-1] == ["conv"]:
            new = ".".join(["autoencoder", words[0], *words[2:-2], words[-1]])
        elif key.startswith("quantizer.quantizer.") and key.removeprefix("quantizer.quantizer.") in _QUANTISER:
            new = f"autoencoder.quantiser.{_QUANTISER[key.removeprefix('quantizer.quantizer.')]}"
        elif words[0] == "out" and words[1] in ("0", "2"):
            new = f"net.{'norm' if words[1] == '0' else 'out'}.{words[-1]}"
        elif words[0] == "time_embed" or key.startswith("input_blocks.0.0."):
            new = ".".join(["net", _PARTS[words[0]], *words[1:]])
        elif words[0] in _PARTS:
            at = 2 if words[0] == "middle_block" else 3
            layer = ".".join(words[at:-1])
            if layer in _LAYERS:
                new = ".".join(["net", _PARTS[words[0]], *words[1:at], _LAYERS[layer], words[-1]])
        if not new:
            unknown.append(key)
            continue
        ours[new] = (value[..., 0] if value.ndim == 3 else value).clone()  # their 1x1 convolutions over positions
    if unknown:
        raise ZooError(
            f"{len(unknown)} keys of the checkpoint are unknown ({', '.join(unknown[:3])}): it is no GL-LCM."
        )
    return ours


def convert(theirs: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """See `GLLCM.convert_state_dict`."""
    ours = rename(theirs)

    def need(key: str) -> Tensor:
        if key not in ours:
            what = "VQGAN" if key.startswith("autoencoder.") else "U-Net"
            raise ZooError(
                f"The checkpoint lacks {key} of the authors' {what}: put both state dicts into one dictionary."
            )
        return ours[key]

    codes, latent = need("autoencoder.quantiser.codebook").shape
    width = need("net.time.0.weight").shape[1]
    encoder = {int(k.split(".")[2]) for k in ours if k.startswith("autoencoder.encoder.")}
    halving = [
        i for i in sorted(encoder) if ours.get(f"autoencoder.encoder.{i}.weight", torch.empty(0)).shape[-1:] == (4,)
    ]
    layers = (halving[1] if len(halving) > 1 else max(encoder)) - halving[0] - 1
    up = {int(k.split(".")[2]) for k in ours if k.startswith("net.up.")}
    doubling = [k for k in ours if k.startswith("net.up.") and k.endswith("conv1.weight") and k.split(".")[3] != "0"]
    levels = len(doubling) + 1
    blocks = len(up) // levels - 1
    first = [need(f"net.down.{1 + level * (blocks + 1)}.0.conv1.weight") for level in range(levels)]
    attention = [2**i for i in range(levels) if f"net.down.{1 + i * (blocks + 1)}.1.qkv.weight" in ours]
    paper = [64, 32, 16, 8]
    hyper = {
        "ae_widths": [ours[f"autoencoder.encoder.{i}.weight"].shape[0] for i in halving],
        "ae_hidden": ours["autoencoder.encoder.1.conv1.weight"].shape[0] if layers else 512,
        "ae_layers": layers,
        "codes": codes,
        "latent": latent,
        "width": width,
        "mult": [weight.shape[0] // width for weight in first],
        "blocks": blocks,
        "attention": paper if attention == [f for f in sorted(paper) if f < 2**levels] else attention,
        "condition_scaling": "authors",
    }
    return hyper, ours
