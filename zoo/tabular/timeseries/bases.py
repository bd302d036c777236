"""The imputation networks that Glocal-IB is trained around, as its authors run them on PyPOTS 0.13.

Each is a plain ``nn.Module``: ``forward(x, mask)`` takes standardised windows (b, t, n), zero where ``mask`` is zero,
and gives an `Imputation`; ``encode(x, mask)`` gives its latent alone. `convert_base` reads the authors' weights.

Index legend: b window, t time step, n channel, d latent width, s sample of the latent.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.core import ZooError

BASES = ("saits", "timesnet", "dlinear", "tcn", "gpvae")


class Imputation(NamedTuple):
    """What a base returns.

    Shapes:
        reconstruction: (b, t, n)
        latent: (b, t, d)
        partial: further reconstructions that are also scored on the observed values: SAITS' two, and those of
            GP-VAE's other samples
        kl: (b,), how far the latent's distribution is from its prior; None for bases without one
        log_ratio: (s, b), log q(z|x) - log p(z) of the samples behind ``partial`` and ``reconstruction``, in this order
    """

    reconstruction: Tensor
    latent: Tensor
    partial: tuple[Tensor, ...] = ()
    kl: Tensor | None = None
    log_ratio: Tensor | None = None


def sinusoids(length: int, width: int) -> Tensor:
    """Position table (length, width): sine in the even, cosine in the odd columns (Transformer)."""
    position = torch.arange(length, dtype=torch.float32)[:, None]
    rate = torch.exp(torch.arange(0, width, 2, dtype=torch.float32) * -(math.log(10000.0) / width))
    return torch.stack([torch.sin(position * rate), torch.cos(position * rate)], dim=-1).flatten(1)


class EncoderLayer(nn.Module):
    """Post-norm transformer layer that can also return its attention map, averaged over heads.

    Shapes:
        x: (b, t, d); mask: (t, t) bool, True = may attend
        returns: (b, t, d), and (b, t, t) or None
    """

    def __init__(self, width: int, heads: int, hidden: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        self.norm_1 = nn.LayerNorm(width, eps=1e-6)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.norm_2 = nn.LayerNorm(width, eps=1e-6)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None, need_map: bool = False) -> tuple[Tensor, Tensor | None]:
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        weights = None
        if need_map:  # fused attention keeps the map to itself
            scores = (q * (d // self.heads) ** -0.5) @ k.transpose(-1, -2)
            if mask is not None:
                scores = scores.masked_fill(~mask, -math.inf)
            attention = scores.softmax(-1)
            mixed, weights = attention @ v, attention.mean(1)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = self.norm_1(x + self.dropout(self.project(mixed.transpose(1, 2).reshape(b, t, d))))
        return self.norm_2(x + self.dropout(self.down(F.relu(self.up(x))))), weights


class SAITS(nn.Module):
    """Self-attention imputation (Du et al. 2023): two blocks of encoder layers and a learned mix of their answers.

        z = block_1([x, m]),  X1 = W z,  X2 = W'' relu(W' block_2([m x + (1-m) X1, m]))
        X3 = (1 - eta) X2 + eta X1,  eta = sigmoid(V [m, attention map of the last layer])

    The diagonal of every attention map is masked: no step may look at its own value. The latent is z.

    Args:
        authors_layers: feed every layer of the first block the embedding instead of the previous layer's output, as
            the authors' code does; only the last of these layers then counts.
    """

    hidden_weight: ClassVar[float] = 1.0

    def __init__(
        self,
        n_features: int,
        n_steps: int,
        d_model: int,
        n_layers: int,
        n_heads: int,
        d_ffn: int,
        dropout: float,
        diagonal_mask: bool = True,
        authors_layers: bool = False,
    ):
        super().__init__()
        self.authors_layers = authors_layers
        self.input_1 = nn.Linear(2 * n_features, d_model)
        self.first = nn.ModuleList(EncoderLayer(d_model, n_heads, d_ffn, dropout) for _ in range(n_layers))
        self.output_1 = nn.Linear(d_model, n_features)
        self.input_2 = nn.Linear(2 * n_features, d_model)
        self.second = nn.ModuleList(EncoderLayer(d_model, n_heads, d_ffn, dropout) for _ in range(n_layers))
        self.output_2 = nn.Linear(d_model, n_features)
        self.output_3 = nn.Linear(n_features, n_features)
        self.output_mix = nn.Linear(n_features + n_steps, n_features)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("positions", sinusoids(n_steps, d_model), persistent=False)
        allowed = ~torch.eye(n_steps, dtype=torch.bool) if diagonal_mask else None
        self.register_buffer("allowed", allowed, persistent=False)

    def encode(self, x: Tensor, mask: Tensor) -> Tensor:
        """The latent alone: the first block."""
        embedded = z = self.dropout(self.input_1(torch.cat([x, mask], dim=2)) + self.positions)
        for layer in self.first[-1:] if self.authors_layers else self.first:
            z, _ = layer(embedded if self.authors_layers else z, self.allowed)
        return z

    def forward(self, x: Tensor, mask: Tensor) -> Imputation:
        z = self.encode(x, mask)
        one = self.output_1(z)
        filled = mask * x + (1 - mask) * one
        h = self.dropout(self.input_2(torch.cat([filled, mask], dim=2)) + self.positions)
        weights = None
        for i, layer in enumerate(self.second):
            h, weights = layer(h, self.allowed, need_map=i + 1 == len(self.second))
        two = self.output_3(F.relu(self.output_2(h)))
        eta = torch.sigmoid(self.output_mix(torch.cat([mask, weights.to(mask.dtype)], dim=2)))
        return Imputation((1 - eta) * two + eta * one, z, (one, two))


class Inception(nn.Module):
    """The mean of ``n_kernels`` convolutions of sizes 1, 3, 5, ..., computed as one convolution of the largest size."""

    def __init__(self, width_in: int, width_out: int, n_kernels: int):
        super().__init__()
        self.kernels = nn.ModuleList(nn.Conv2d(width_in, width_out, 2 * i + 1, padding=i) for i in range(n_kernels))
        for conv in self.kernels:
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(conv.bias)

    def merged(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the one convolution."""
        reach = len(self.kernels) - 1
        weight = sum(F.pad(conv.weight, [reach - i] * 4) for i, conv in enumerate(self.kernels)) / len(self.kernels)
        return weight, sum(conv.bias for conv in self.kernels) / len(self.kernels)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, *self.merged(), padding=len(self.kernels) - 1)


class TimesBlock(nn.Module):
    """Folds a series by its strongest periods into pictures and convolves them (Wu et al. 2023).

    The ``top_k`` periods are those of the mean spectrum of the whole batch, as in every public implementation: a
    window's result depends on the windows beside it.
    """

    def __init__(self, d_model: int, d_ffn: int, top_k: int, n_kernels: int):
        super().__init__()
        self.top_k = top_k
        self.conv = nn.Sequential(Inception(d_model, d_ffn, n_kernels), nn.GELU(), Inception(d_ffn, d_model, n_kernels))

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        amplitude = torch.fft.rfft(x if x.dtype == torch.float64 else x.float(), dim=1).abs()  # no half precision
        mean = amplitude.mean((0, 2))
        mean = torch.cat([torch.zeros_like(mean[:1]), mean[1:]])  # the constant has no period
        top = mean.topk(self.top_k).indices
        weight = amplitude.mean(-1)[:, top].softmax(1).to(x.dtype)
        up, down = self.conv[0].merged(), self.conv[2].merged()  # once for all periods
        reach = len(self.conv[0].kernels) - 1
        out = x
        for i, frequency in enumerate(top.tolist()):
            period = t // max(frequency, 1)
            rows = math.ceil(t / period)
            folded = F.pad(x, (0, 0, 0, rows * period - t)).view(b, rows, period, d).permute(0, 3, 1, 2)
            back = F.conv2d(F.gelu(F.conv2d(folded, *up, padding=reach)), *down, padding=reach)
            back = back.permute(0, 2, 3, 1).reshape(b, -1, d)[:, :t]
            out = out + back * weight[:, i, None, None]
        return out


class TimesNet(nn.Module):
    """TimesNet (Wu et al. 2023) as PyPOTS 0.13 runs it: it sees the zero-filled values and no mask.

    The authors train it on the observed term only (``hidden_weight`` 0), and their latent of the complete window is
    therefore that of x_o. In PyPOTS 0.13 every block reads the embedding, so that only the last one counts
    (``authors_layers=True``); here each block reads the one before.
    """

    hidden_weight: ClassVar[float] = 0.0

    def __init__(
        self,
        n_features: int,
        n_steps: int,
        d_model: int,
        n_layers: int,
        d_ffn: int,
        top_k: int,
        n_kernels: int,
        dropout: float,
        authors_layers: bool = False,
    ):
        super().__init__()
        self.authors_layers = authors_layers
        self.input = nn.Conv1d(n_features, d_model, 3, padding=1, padding_mode="circular", bias=False)
        nn.init.kaiming_normal_(self.input.weight, mode="fan_in", nonlinearity="leaky_relu")
        self.blocks = nn.ModuleList(TimesBlock(d_model, d_ffn, top_k, n_kernels) for _ in range(n_layers))
        self.norm = nn.LayerNorm(d_model)
        self.output = nn.Linear(d_model, n_features)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("positions", sinusoids(n_steps, d_model), persistent=False)

    def encode(self, x: Tensor, mask: Tensor) -> Tensor:
        embedded = z = self.dropout(self.input(x.transpose(1, 2)).transpose(1, 2) + self.positions)
        for block in self.blocks[-1:] if self.authors_layers else self.blocks:
            z = self.norm(block(embedded if self.authors_layers else z))
        return z

    def forward(self, x: Tensor, mask: Tensor) -> Imputation:
        z = self.encode(x, mask)
        return Imputation(self.output(z), z)


class DLinear(nn.Module):
    """DLinear (Zeng et al. 2023): one linear map over time for the moving average, one for what is left of it.

    Not ``individual``: both parts are first embedded together with the mask (PyPOTS). ``individual``: one map a
    channel, no mask. The latent is the reconstruction itself, d = n.
    """

    hidden_weight: ClassVar[float] = 1.0

    def __init__(self, n_features: int, n_steps: int, d_model: int, moving_average: int, individual: bool):
        super().__init__()
        self.window, self.individual = moving_average, individual
        bound = 1 / math.sqrt(n_steps)
        maps = (n_features, n_steps, n_steps) if individual else (n_steps, n_steps)
        for part in ("seasonal", "trend"):
            # Every step starts as the mean over the window; biases as in nn.Linear.
            self.register_parameter(f"time_{part}", nn.Parameter(torch.full(maps, 1 / n_steps)))
            self.register_parameter(f"bias_{part}", nn.Parameter(torch.empty(maps[:-1]).uniform_(-bound, bound)))
        if not individual:
            self.input_seasonal = nn.Linear(2 * n_features, d_model)
            self.input_trend = nn.Linear(2 * n_features, d_model)
            self.output_seasonal = nn.Linear(d_model, n_features)
            self.output_trend = nn.Linear(d_model, n_features)

    def mix(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The linear map over time: (b, t, c) -> (b, t, c)."""
        if self.individual:
            return torch.einsum("bsn,nts->btn", x, weight) + bias.T
        return F.linear(x.transpose(1, 2), weight, bias).transpose(1, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Imputation:
        reach = (self.window - 1) // 2
        padded = F.pad(x.transpose(1, 2), (reach, reach), mode="replicate")
        trend = F.avg_pool1d(padded, self.window, stride=1).transpose(1, 2)
        seasonal = x - trend
        if not self.individual:
            seasonal = self.input_seasonal(torch.cat([seasonal, mask], dim=2))
            trend = self.input_trend(torch.cat([trend, mask], dim=2))
        seasonal = self.mix(seasonal, self.time_seasonal, self.bias_seasonal)
        trend = self.mix(trend, self.time_trend, self.bias_trend)
        if not self.individual:
            seasonal, trend = self.output_seasonal(seasonal), self.output_trend(trend)
        return Imputation(seasonal + trend, seasonal + trend)

    def encode(self, x: Tensor, mask: Tensor) -> Tensor:
        return self(x, mask).latent


class CausalLevel(nn.Module):
    """Two weight-normalised dilated convolutions that look only back, with a residual path. x: (b, c, t)."""

    def __init__(self, width_in: int, width_out: int, kernel: int, dilation: int, dropout: float):
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        self.reach = (kernel - 1) * dilation
        self.conv_1 = norm(nn.Conv1d(width_in, width_out, kernel, dilation=dilation))
        self.conv_2 = norm(nn.Conv1d(width_out, width_out, kernel, dilation=dilation))
        self.dropout = nn.Dropout(dropout)
        self.shortcut = nn.Conv1d(width_in, width_out, 1) if width_in != width_out else nn.Identity()
        if width_in != width_out:
            nn.init.normal_(self.shortcut.weight, 0, 0.01)

    def forward(self, x: Tensor) -> Tensor:
        h = self.dropout(F.relu(self.conv_1(F.pad(x, (self.reach, 0)))))
        h = self.dropout(F.relu(self.conv_2(F.pad(h, (self.reach, 0)))))
        return F.relu(h + self.shortcut(x))


class TCN(nn.Module):
    """Temporal convolutional network (Bai et al. 2018) on values and mask; the latent is its last hidden layer."""

    hidden_weight: ClassVar[float] = 1.0

    def __init__(self, n_features: int, d_model: int, n_layers: int, kernel_size: int, dropout: float):
        super().__init__()
        self.input = nn.Linear(2 * n_features, n_features)
        self.dropout = nn.Dropout(dropout)
        self.levels = nn.Sequential(
            *(CausalLevel(d_model if i else n_features, d_model, kernel_size, 2**i, dropout) for i in range(n_layers))
        )
        self.output = nn.Linear(d_model, n_features)

    def encode(self, x: Tensor, mask: Tensor) -> Tensor:
        embedded = self.dropout(self.input(torch.cat([x, mask], dim=2)))
        return self.levels(embedded.transpose(1, 2)).transpose(1, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Imputation:
        z = self.encode(x, mask)
        return Imputation(self.output(z), z)


def cauchy_kernel(n_steps: int, length_scale: float, sigma: float = 1.0) -> Tensor:
    """K(s, t) = sigma / (1 + ((s - t) / length_scale)^2), and 0.001 more on the diagonal: (t, t) in float64."""
    step = torch.arange(n_steps, dtype=torch.float64)
    distance = (step[:, None] - step) / length_scale
    return sigma / (1 + distance.square()) + 0.001 * torch.eye(n_steps, dtype=torch.float64)


def whitening(kernel: Tensor) -> Tensor:
    """W, lower triangular, with W K W^T = 1: it makes independent steps of what has the covariance K."""
    root = torch.linalg.cholesky(kernel)
    return torch.linalg.solve_triangular(root, torch.eye(len(kernel)).to(root), upper=False)


class Posterior(NamedTuple):
    """d independent Gaussian processes over t steps: N(mean, (B B^T)^-1) with B upper bidiagonal.

    Shapes:
        mean, diagonal: (b, t, d); above: (b, t - 1, d), the diagonal above the main one
    """

    mean: Tensor
    diagonal: Tensor
    above: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """mean + B^-T noise, step by step: B^T only reaches one step back. (s, b, t, d) -> (s, b, t, d)."""
        rows = [noise[..., 0, :] / self.diagonal[:, 0]]
        for i in range(1, noise.shape[-2]):
            rows.append((noise[..., i, :] - self.above[:, i - 1] * rows[-1]) / self.diagonal[:, i])
        return self.mean + torch.stack(rows, dim=-2)


class GPVAE(nn.Module):
    """GP-VAE (Fortuin et al. 2020): a variational autoencoder whose latents are Gaussian processes over time.

        q(z_j | x) = N(m_j, (B_j B_j^T)^-1),   B_j = 1 + sigmoid(.) on the diagonal, sigmoid(.) above it, zero elsewhere
        p(z_j) = N(0, K),   K(s, t) = sigma / (1 + (s - t)^2 / l^2) + 0.001 [s = t]      (Cauchy kernel)
        p(x_t | z_t) = N(decoder(z_t), 1)

    The encoder, one convolution over ``window`` steps and layers on each step, sees the zero-filled values and no mask.
    The latent is the mean m; the reconstruction is that of a sample in training, of the mean otherwise. The divergence
    of q from p is the compactness term of Glocal-IB (``kl``).

    Args:
        d_model: latent processes d.
        d_hidden: width of the ``n_layers`` hidden layers of encoder and decoder.
        window: steps that the convolution spans; None is all of them, as in the authors' runs (PyPOTS: 3).
        length_scale: l, in steps.
        kernel_scales: the latents fall into as many groups, with length scales l, l / 2, l / 4, ...
        elbo_samples, importance_samples: M and K of the importance-weighted bound; M * K samples are drawn.
    """

    hidden_weight: ClassVar[float] = 1.0

    def __init__(
        self,
        n_features: int,
        n_steps: int,
        d_model: int,
        n_layers: int,
        d_hidden: int,
        window: int | None = None,
        length_scale: float = 7.0,
        sigma: float = 1.0,
        kernel_scales: int = 1,
        elbo_samples: int = 1,
        importance_samples: int = 1,
    ):
        super().__init__()
        window = n_steps if window is None else window
        self.n_steps = n_steps
        self.samples, self.importance_samples = elbo_samples * importance_samples, importance_samples
        self.input = nn.Conv1d(n_features, d_hidden, window, padding=window // 2)
        self.hidden = nn.Sequential(*_layers(d_hidden, d_hidden, n_layers - 1))
        self.mean = nn.Linear(d_hidden, d_model)
        self.bands = nn.Linear(d_hidden, 2 * d_model)  # of every latent: the diagonal, the one above it
        self.decoder = nn.Sequential(*_layers(d_model, d_hidden, n_layers))
        self.output = nn.Linear(d_hidden, n_features)
        # In float64: the kernel's condition number is 10^4 and more.
        scales = [whitening(cauchy_kernel(n_steps, length_scale / 2**i, sigma)).float() for i in range(kernel_scales)]
        self.register_buffer("whiten", torch.stack(scales), persistent=False)
        group = torch.arange(d_model) // math.ceil(d_model / kernel_scales)
        self.register_buffer("group", group, persistent=False)

    def posterior(self, x: Tensor) -> Posterior:
        """q(z | x) of (b, t, n)."""
        h = self.features(x)
        bands = self.bands(h)
        bands = bands.to(torch.promote_types(bands.dtype, torch.float32))  # what follows is no work for half precision
        bands = bands.sigmoid().unflatten(-1, (-1, 2))
        return Posterior(self.mean(h).to(bands.dtype), 1 + bands[..., 0], bands[:, :-1, :, 1])

    def features(self, x: Tensor) -> Tensor:
        """Hidden layers of the encoder: (b, t, n) -> (b, t, d_hidden)."""
        h = self.input(x.transpose(1, 2))[..., : self.n_steps]  # a window of even length gives a step too many
        return self.hidden(h.transpose(1, 2))

    def encode(self, x: Tensor, mask: Tensor) -> Tensor:
        """The latent alone: the posterior's mean."""
        return self.mean(self.features(x))

    def decode(self, z: Tensor) -> Tensor:
        """The mean of p(x | z), step by step: (..., t, d) -> (..., t, n)."""
        return self.output(self.decoder(z))

    def noise(self, like: Tensor) -> Tensor:
        """Standard normal noise for the samples: (b, t, d) -> (s, b, t, d)."""
        return torch.randn(self.samples, *like.shape, dtype=like.dtype, device=like.device)

    def forward(self, x: Tensor, mask: Tensor) -> Imputation:
        if not self.training:
            z = self.encode(x, mask)
            return Imputation(self.decode(z), z)
        q = self.posterior(x)
        noise = self.noise(q.mean)
        z = q.sample(noise)
        *others, last = self.decode(z)
        if self.importance_samples > 1:
            return Imputation(last, q.mean, tuple(others), log_ratio=self.log_ratio(q, z, noise))
        return Imputation(last, q.mean, tuple(others), kl=self.divergence(q))

    def whitened(self, z: Tensor) -> Tensor:
        """W z of every latent, (..., t, d): standard normal where z comes from the prior."""
        with torch.autocast("cpu" if z.is_meta else z.device.type, enabled=False):
            return torch.einsum("dst,...td->...sd", self.whiten[self.group], z)

    def log_scale(self) -> Tensor:
        """log |W| of every latent, (d,)."""
        return self.whiten.diagonal(dim1=1, dim2=2).log().sum(1)[self.group]

    def divergence(self, q: Posterior) -> Tensor:
        """KL(q || p) in closed form, summed over the latents: (b,).

            2 KL = |W B^-T|^2 + |W m|^2 - t + 2 log|B| - 2 log|W|

        Rows of B^-1 W^T from the last to the first: B only reaches one step ahead, and row i starts at step i. So no
        (t, t) matrix is solved, and only these triangles are kept for the gradient.
        """
        inverse = 1 / q.diagonal
        ratio = q.above * inverse[:, :-1]
        whiten = self.whiten[self.group]  # (d, t, t)
        spread = torch.zeros_like(inverse[:, 0])
        row = None
        for i in reversed(range(self.n_steps)):
            own = whiten[:, i:, i] * inverse[:, i, :, None]
            row = own if row is None else own - ratio[:, i, :, None] * row
            row = F.pad(row, (1, 0))  # the square of the padded row: one tensor kept, not two
            spread = spread + row.square().sum(-1)
        distance = self.whitened(q.mean).square().sum(1)
        log_scale = q.diagonal.log().sum(1) - self.log_scale()
        return (0.5 * (spread + distance - self.n_steps) + log_scale).sum(1)

    def log_ratio(self, q: Posterior, z: Tensor, noise: Tensor) -> Tensor:
        """log q(z | x) - log p(z) of samples z = m + B^-T noise, summed over the latents: (s, b)."""
        posterior = q.diagonal.log().sum(1) - 0.5 * noise.square().sum(-2)
        prior = self.log_scale() - 0.5 * self.whitened(z).square().sum(-2)
        return (posterior - prior).sum(-1)


def _layers(width_in: int, width: int, count: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for i in range(count):
        layers += [nn.Linear(width if i else width_in, width), nn.ReLU()]
    return layers


# ---- the authors' names of the weights ------------------------------------------------------------------------------


Take = Callable[..., None]


def convert_base(theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> dict[str, Any]:
    """Move the weights of a base from ``theirs``, by the authors' names, to ``ours``; what they say of its sizes.

    Raises:
        ZooError: for a base of which a part is missing or that is built otherwise.
    """
    hparams: dict[str, Any] = {}
    marks = {
        "encoder.embedding_1.embedding_layer.weight": _convert_saits,
        "enc_embedding.value_embedding.tokenConv.weight": _convert_timesnet,
        "backbone.network.": _convert_tcn,
        "backbone.linear_seasonal": _convert_dlinear,
        "backbone.encoder.mu_layer.": _convert_gpvae,
    }
    for mark, convert in marks.items():
        if any(key.startswith(mark) for key in theirs):
            convert(theirs, ours, lambda *names: take(theirs, ours, *names), hparams)
            break
    return hparams


def take(theirs: dict[str, Tensor], ours: dict[str, Tensor], source: str, target: str, *parts: str) -> None:
    """Move ``parts`` (weight and bias by default) of a layer of theirs to one of ours."""
    for part in parts or ("weight", "bias"):
        if f"{source}.{part}" not in theirs:
            raise ZooError(f"The checkpoint has no '{source}.{part}'; is it one of Glocal-IB's or PyPOTS'?")
        ours[f"{target}.{part}"] = theirs.pop(f"{source}.{part}")


def _count(theirs: Mapping[str, Tensor], prefix: str) -> int:
    return 1 + max(int(key.removeprefix(prefix).split(".")[0]) for key in theirs if key.startswith(prefix))


def _convert_saits(theirs: dict[str, Tensor], ours: dict[str, Tensor], take: Take, hparams: dict[str, Any]) -> None:
    first = theirs["encoder.embedding_1.embedding_layer.weight"]
    d_model, n = first.shape[0], first.shape[1] // 2
    hparams |= {
        "base": "saits",
        "n_features": n,
        "n_steps": theirs["encoder.weight_combine.weight"].shape[1] - n,
        "d_model": d_model,
        "n_layers": _count(theirs, "encoder.layer_stack_for_first_block."),
        "d_ffn": theirs["encoder.layer_stack_for_first_block.0.pos_ffn.linear_1.weight"].shape[0],
    }
    for block, name in ((1, "first"), (2, "second")):
        take(f"encoder.embedding_{block}.embedding_layer", f"base.input_{block}")
        theirs.pop(f"encoder.embedding_{block}.position_enc.pos_table", None)
        for i in range(hparams["n_layers"]):
            source, target = f"encoder.layer_stack_for_{name}_block.{i}", f"base.{name}.{i}"
            qkv = [theirs.pop(f"{source}.slf_attn.w_{part}s.weight") for part in "qkv"]
            if any(part.shape != (d_model, d_model) for part in qkv):
                raise ZooError(
                    f"The attention of {source} has widths {[p.shape[0] for p in qkv]}; only n_heads * d_k = "
                    f"n_heads * d_v = d_model = {d_model} is supported."
                )
            ours[f"{target}.qkv.weight"] = torch.cat(qkv)
            take(f"{source}.slf_attn.fc", f"{target}.project", "weight")
            take(f"{source}.layer_norm", f"{target}.norm_1")
            take(f"{source}.pos_ffn.linear_1", f"{target}.up")
            take(f"{source}.pos_ffn.linear_2", f"{target}.down")
            take(f"{source}.pos_ffn.layer_norm", f"{target}.norm_2")
    take("encoder.reduce_dim_z", "base.output_1")
    take("encoder.reduce_dim_beta", "base.output_2")
    take("encoder.reduce_dim_gamma", "base.output_3")
    take("encoder.weight_combine", "base.output_mix")


def _convert_timesnet(theirs: dict[str, Tensor], ours: dict[str, Tensor], take: Take, hparams: dict[str, Any]) -> None:
    first = theirs["enc_embedding.value_embedding.tokenConv.weight"]
    table = theirs.pop("enc_embedding.position_embedding.pos_table")
    hparams |= {
        "base": "timesnet",
        "n_features": first.shape[1],
        "n_steps": table.shape[1],
        "d_model": first.shape[0],
        "n_layers": _count(theirs, "model.model."),
        "n_kernels": _count(theirs, "model.model.0.conv.0.kernels."),
        "d_ffn": theirs["model.model.0.conv.0.kernels.0.weight"].shape[0],
    }
    take("enc_embedding.value_embedding.tokenConv", "base.input", "weight")
    for i in range(hparams["n_layers"]):
        for j in (0, 2):
            for k in range(hparams["n_kernels"]):
                take(f"model.model.{i}.conv.{j}.kernels.{k}", f"base.blocks.{i}.conv.{j}.kernels.{k}")
    take("model.layer_norm", "base.norm")
    take("projection", "base.output")
    # Never called in their code: calendar embeddings and a second norm.
    for key in [key for key in theirs if key.startswith(("enc_embedding.temporal_embedding.", "layer_norm."))]:
        theirs.pop(key)


def _convert_tcn(theirs: dict[str, Tensor], ours: dict[str, Tensor], take: Take, hparams: dict[str, Any]) -> None:
    first = theirs["backbone.network.0.conv1.weight_v"]
    hparams |= {
        "base": "tcn",
        "n_features": first.shape[1],
        "d_model": first.shape[0],
        "n_layers": _count(theirs, "backbone.network."),
        "kernel_size": first.shape[2],
    }
    take("saits_embedding.embedding_layer", "base.input")
    take("output_projection", "base.output")
    for i in range(hparams["n_layers"]):
        for j in (1, 2):
            source, target = f"backbone.network.{i}.conv{j}", f"base.levels.{i}.conv_{j}"
            take(source, target, "bias")
            ours[f"{target}.parametrizations.weight.original0"] = theirs.pop(f"{source}.weight_g")
            ours[f"{target}.parametrizations.weight.original1"] = theirs.pop(f"{source}.weight_v")
        if f"backbone.network.{i}.downsample.weight" in theirs:
            take(f"backbone.network.{i}.downsample", f"base.levels.{i}.shortcut")
        for key in [key for key in theirs if key.startswith(f"backbone.network.{i}.net.")]:
            theirs.pop(key)  # the same two convolutions under a second name


def _convert_dlinear(theirs: dict[str, Tensor], ours: dict[str, Tensor], take: Take, hparams: dict[str, Any]) -> None:
    hparams |= {"base": "dlinear", "individual": "backbone.linear_seasonal.0.weight" in theirs}
    for part in ("seasonal", "trend"):
        source = f"backbone.linear_{part}"
        for name, kind in (("weight", "time"), ("bias", "bias")):
            if hparams["individual"]:
                stack = [theirs.pop(f"{source}.{i}.{name}") for i in range(_count(theirs, f"{source}."))]
                ours[f"base.{kind}_{part}"] = torch.stack(stack)
            else:
                ours[f"base.{kind}_{part}"] = theirs.pop(f"{source}.{name}")
        if not hparams["individual"]:
            take(f"{part}_saits_embedding.embedding_layer", f"base.input_{part}")
            take(f"linear_{part}_output", f"base.output_{part}")
    weight = ours["base.time_trend"]
    hparams["n_steps"] = weight.shape[-1]
    if hparams["individual"]:
        hparams["n_features"] = weight.shape[0]
    else:
        hparams["n_features"] = ours["base.output_trend.weight"].shape[0]
        hparams["d_model"] = ours["base.output_trend.weight"].shape[1]


def _convert_gpvae(theirs: dict[str, Tensor], ours: dict[str, Tensor], take: Take, hparams: dict[str, Any]) -> None:
    first = theirs["backbone.encoder.net.0.weight"]
    hparams |= {
        "base": "gpvae",
        "n_features": first.shape[1],
        "d_model": theirs["backbone.encoder.mu_layer.weight"].shape[0],
        "n_layers": (_count(theirs, "backbone.encoder.net.") + 2) // 2,
        "d_hidden": first.shape[0],
        "window": first.shape[2],
    }
    depth = (_count(theirs, "backbone.decoder.net.") - 1) // 2
    last = f"backbone.decoder.net.{2 * depth}."
    widths = {v.shape[0] for k, v in theirs.items() if ".net." in k and not k.startswith(last)}
    if depth != hparams["n_layers"] or len(widths) > 1:
        raise ZooError(
            f"This GP-VAE has {hparams['n_layers']} hidden layers in the encoder, {depth} in the decoder, of widths "
            f"{sorted(widths)}; only one number of layers and one width is supported."
        )
    take("backbone.encoder.net.0", "base.input")
    for i in range(depth - 1):
        take(f"backbone.encoder.net.{1 + 2 * i}", f"base.hidden.{2 * i}")
    take("backbone.encoder.mu_layer", "base.mean")
    take("backbone.encoder.logvar_layer", "base.bands")
    for i in range(depth):
        take(f"backbone.decoder.net.{2 * i}", f"base.decoder.{2 * i}")
    take(f"backbone.decoder.net.{2 * depth}", "base.output")
