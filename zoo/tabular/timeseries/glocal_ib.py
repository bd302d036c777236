"""Glocal-IB: a training objective that keeps time-series imputation good where most values are missing.

Paper: "Glocal Information Bottleneck for Time Series Imputation", NeurIPS 2025, arXiv:2510.04910.
Code by the authors: https://github.com/Muyiiiii/NeurIPS-25-Glocal-IB (README: MIT), on PyPOTS 0.13 base models.

In: windows ``x`` with a mask of what was observed. Out: the same windows, completed. Any imputation network f that
gives a reconstruction R and a latent z can be the base; it is trained with

    loss = local_weight * (observed + hidden reconstruction error)  +  align_weight * A(g(z(x, m)), sg[z(x_o, m_o)])

where x_o is all that is known of the window, x what is left of it after further values were hidden, g a two-layer
projector and sg[.] stops the gradient: the *global* part asks that the latent of a sparse window already says what
the latent of the full window says. At inference only f runs, once. ``alignment="none"`` is the plain base.

Reproduces: the objective with its three alignments, and the bases SAITS, TimesNet, DLinear and TCN as the authors
run them. Departs: GP-VAE, the one base whose loss holds the compactness (KL) term, is not built here, so there is no
``kl_weight``; the first-layer fault of the authors' SAITS and TimesNet is put right (``authors_layers`` restores it).

Index legend: b window, t time step, n channel, d latent width.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanAbsoluteError, MeanMetric, MeanSquaredError

from zoo.core import ZooError, ZooModule, check_finite, unwrap

BASES = ("saits", "timesnet", "dlinear", "tcn")
ALIGNMENTS = ("none", "cosine", "contrastive", "foundation")


# ---- parts ----------------------------------------------------------------------------------------------------------


class Imputation(NamedTuple):
    """What a base returns: ``reconstruction`` (b, t, n), ``latent`` (b, t, d) and further reconstructions that are
    also scored on the observed values (SAITS has two)."""

    reconstruction: Tensor
    latent: Tensor
    partial: tuple[Tensor, ...] = ()


class Standardiser(nn.Module):
    """Channel-wise mean and standard deviation of the training data, as buffers: they travel with the weights.

    Shapes:
        mean, std: (n,) in the units of the data; ``fitted`` says whether they were ever set.
    """

    def __init__(self, n_features: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(n_features))
        self.register_buffer("std", torch.ones(n_features))
        self.register_buffer("fitted", torch.tensor(False))

    def set(self, mean: Tensor, std: Tensor) -> None:
        """Take these statistics; a constant channel is only centred, as in scikit-learn."""
        std = torch.where(std > 0, std, torch.ones_like(std))
        self.mean.copy_(mean)
        self.std.copy_(std)
        self.fitted.fill_(True)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Standardised values, zero where ``mask`` is zero."""
        return (x - self.mean) / self.std * mask

    def inverse(self, x: Tensor) -> Tensor:
        """Back to the units of the data."""
        return x * self.std + self.mean


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


class _Missing(nn.Module):
    """Stands where a live module of the user's belongs."""

    def forward(self, *args: Any) -> Any:
        raise ZooError(
            'This GlocalIB was made with base="custom" but holds no base. Build it with '
            "GlocalIB.from_backbone(your_module, ...) and load the weights into that."
        )


def build_foundation(backbone: str | dict, revision: str | None, output: str, remote_code: bool) -> nn.Module:
    """A transformers model by Hub id or local folder (with its weights) or by config (``model_type`` and sizes)."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    auto = AutoModelForCausalLM if output == "generate" else AutoModel
    if isinstance(backbone, str):
        return auto.from_pretrained(backbone, revision=revision, trust_remote_code=remote_code)
    if "model_type" not in backbone:
        raise ValueError(f"backbone={backbone} names no 'model_type'; give a transformers config, or a Hub id.")
    return auto.from_config(AutoConfig.for_model(**backbone))


def foundation_target(model: nn.Module, x: Tensor, output: str) -> Tensor:
    """What a frozen foundation model says about complete, standardised windows, one vector a time step.

    Args:
        output: ``"generate"``: the authors' use of Time-MoE, which reads the n values of a time step as a sequence and
            continues it by n more; ``"hidden"``: the last hidden state over time, averaged over channels and
            stretched linearly from patches to steps; ``"call"``: ``model(x)`` is the target.
    Shapes:
        x: (b, t, n)
        returns: (b, t, n) for ``generate``, else (b, t, k)
    """
    b, t, n = x.shape
    if output == "call":
        return model(x)
    if output == "generate":
        return model.generate(x.reshape(-1, n), max_new_tokens=n)[:, -n:].reshape(b, t, n)
    if getattr(model, "main_input_name", "") == "past_values":
        hidden = model(past_values=x).last_hidden_state  # (b, n, patches, k) where channels stay apart
    else:
        hidden = model(x.transpose(1, 2).reshape(b * n, t)).last_hidden_state
        hidden = hidden.reshape(b, n, *hidden.shape[1:])
    if hidden.ndim == 4:
        hidden = hidden.mean(1)
    return F.interpolate(hidden.transpose(1, 2), size=t, mode="linear").transpose(1, 2)


# ---- losses ---------------------------------------------------------------------------------------------------------


def masked_error(prediction: Tensor, target: Tensor, mask: Tensor, kind: str = "mae") -> Tensor:
    """Mean absolute (``"mae"``) or squared (``"mse"``) error over the entries where ``mask`` is one."""
    error = prediction - target
    error = error.abs() if kind == "mae" else error.square()
    return (error * mask).sum() / (mask.sum() + 1e-12)


def local_loss(
    imputed: Imputation,
    x: Tensor,
    mask: Tensor,
    target: Tensor,
    hidden: Tensor,
    observed_weight: float = 1.0,
    hidden_weight: float = 1.0,
    kind: str = "mae",
) -> Tensor:
    """Reconstruction of what the base saw, averaged over its reconstructions, plus of what was hidden from it.

    Shapes:
        x, mask, target, hidden: (b, t, n); ``hidden`` is one where ``target`` is known and ``mask`` is zero
    """
    seen = [*imputed.partial, imputed.reconstruction]
    observed = sum(masked_error(r, x, mask, kind) for r in seen) / len(seen)
    loss = observed_weight * observed
    if hidden_weight:
        loss = loss + hidden_weight * masked_error(imputed.reconstruction, target, hidden, kind)
    return loss


def cosine_alignment(student: Tensor, target: Tensor, dim: int = 1) -> Tensor:
    """1 - mean cosine along ``dim``; the authors take the time axis (1), every latent channel a vector over time."""
    return 1 - F.cosine_similarity(student, target.detach(), dim=dim, eps=1e-8).mean()


def contrastive_alignment(student: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy that picks, for every step of the target, the student's same step among all; no temperature.

    Shapes:
        student, target: (b, t, d)
    """
    logits = F.normalize(student, dim=-1) @ F.normalize(target.detach(), dim=-1).transpose(-1, -2)
    steps = torch.arange(student.shape[1], device=student.device).expand(student.shape[0], -1)
    return F.cross_entropy(logits, steps)


# ---- the method -----------------------------------------------------------------------------------------------------


class GlocalIB(ZooModule):
    """Imputation trained with local reconstruction and global latent alignment.

    Batches hold ``x`` and ``mask`` (and for training, validation and test ``target`` and ``target_mask``), all
    (b, t, n) float in the units of the data; ``x`` is finite, its value where ``mask`` is 0 does not matter. The model
    standardises by itself: with a DataModule that has ``statistics()`` by these, at the start of every fit; with any
    other loader by one pass over it, at the first fit.

    Args:
        n_features: channels n.
        n_steps: length t of a window; 2 or more.
        base: ``saits``, ``timesnet``, ``dlinear`` or ``tcn`` (``custom`` is set by `from_backbone`).
        alignment: ``cosine`` (the authors' contras_2), ``contrastive`` (contras_1), ``foundation`` (FM_align) or
            ``none``: the plain base.
        align_weight: weight of the alignment (the authors' README example uses 0.5).
        local_weight: weight of the local loss.
        observed_weight: weight, inside the local loss, of the error on what the base saw.
        hidden_weight: the same for what was hidden from it; None is the authors' choice: 1, for TimesNet 0.
        local_loss: ``mae`` (what the authors' runs use) or ``mse``.
        cosine_dim: axis of the cosine: 1 is time (the authors'), 2 or -1 the latent width.
        project_target: send the complete window's latent through the projector too; None is what the authors'
            experiments do: yes for ``contrastive``, no for ``cosine`` (their stand-alone wrapper never does).
        complete_mask: mask that goes with the complete window: ``ones`` (the paper's), ``known`` (one where a value
            is known) or ``same`` (the masked window's, as in the authors' stand-alone wrapper).
        d_model: width of the base, and of its latent except for DLinear (n).
        n_layers: layers a block (SAITS), blocks (TimesNet), levels (TCN).
        n_heads: attention heads of SAITS; must divide ``d_model``.
        d_ffn: hidden width of SAITS' feed-forward part and of TimesNet's convolutions.
        dropout: rate; it also acts in the complete pass.
        diagonal_mask: SAITS' attention may not look at its own step.
        kernel_size: of TCN's convolutions.
        top_k: periods a TimesNet block folds by.
        n_kernels: convolutions in a TimesNet inception.
        moving_average: odd length of DLinear's moving average, in steps.
        individual: DLinear has one map a channel, and no mask.
        backbone: the frozen foundation model of ``alignment="foundation"``: Hub id, local folder or transformers
            config (``{"model_type": ...}``). The paper's is ``Maple728/TimeMoE-50M``, which needs remote code.
        backbone_revision: commit of the Hub repository.
        foundation_output: how its answer is read: ``generate``, ``hidden`` or ``call``; see `foundation_target`.
        foundation_dim: width of its answer; None reads it off the model.
        foundation_remote_code: allow code from the Hub repository to run.
        authors_foundation_input: show the foundation model the masked window, as the authors' code does, instead of
            the complete one.
        authors_layers: restore a fault in the authors' SAITS and PyPOTS 0.13's TimesNet: layers read the embedding
            and not the layer before, so that only the last counts.
        lr: learning rate of Adam.
    Raises:
        ValueError: for a value that the other arguments do not allow.
    Example:
        >>> import torch
        >>> from zoo.tabular import GlocalIB
        >>> model = GlocalIB.from_variant("tiny")
        >>> model.predict(torch.randn(2, 48, 6)).shape  # NaN = missing
        torch.Size([2, 48, 6])
    """

    variants: ClassVar = {
        "tiny": {"n_features": 6, "n_steps": 48, "d_model": 16, "n_layers": 1, "n_heads": 2, "d_ffn": 16},
        "small": {"d_model": 64, "d_ffn": 64},
    }
    monitor, mode = "val/mse", "min"
    head = ("base.input", "base.output", "base.levels.0.", "scaler.")

    def __init__(
        self,
        n_features: int = 7,
        n_steps: int = 96,
        base: str = "saits",
        alignment: str = "cosine",
        align_weight: float = 1.0,
        local_weight: float = 1.0,
        observed_weight: float = 1.0,
        hidden_weight: float | None = None,
        local_loss: str = "mae",
        cosine_dim: int = 1,
        project_target: bool | None = None,
        complete_mask: str = "ones",
        d_model: int = 256,
        n_layers: int = 2,
        n_heads: int = 4,
        d_ffn: int = 128,
        dropout: float = 0.1,
        diagonal_mask: bool = True,
        kernel_size: int = 3,
        top_k: int = 3,
        n_kernels: int = 5,
        moving_average: int = 3,
        individual: bool = False,
        backbone: str | dict | None = None,
        backbone_revision: str | None = None,
        foundation_output: str = "generate",
        foundation_dim: int | None = None,
        foundation_remote_code: bool = False,
        authors_foundation_input: bool = False,
        authors_layers: bool = False,
        lr: float = 1e-3,
    ):
        super().__init__()
        self.save_hyperparameters()
        _one_of("base", base, (*BASES, "custom"))
        _one_of("alignment", alignment, ALIGNMENTS)
        _one_of("local_loss", local_loss, ("mae", "mse"))
        _one_of("complete_mask", complete_mask, ("ones", "known", "same"))
        _one_of("foundation_output", foundation_output, ("generate", "hidden", "call"))
        _one_of("cosine_dim", cosine_dim, (1, 2, -1, -2))
        if n_features < 1 or n_steps < 2:
            raise ValueError(f"n_features={n_features}, n_steps={n_steps}: need at least 1 channel and 2 steps.")
        if base in ("saits", "timesnet") and d_model % 2:
            raise ValueError(f"d_model={d_model} is odd; the position table needs an even width.")
        if base == "saits" and d_model % n_heads:
            raise ValueError(f"d_model={d_model} is not a multiple of n_heads={n_heads}.")
        if base == "timesnet" and not 1 <= top_k <= n_steps // 2:
            raise ValueError(f"top_k={top_k}: {n_steps} steps have {n_steps // 2} periods to choose from.")
        if base == "dlinear" and (moving_average % 2 == 0 or moving_average > n_steps):
            raise ValueError(f"moving_average={moving_average} must be odd and at most n_steps={n_steps}.")

        self.scaler = Standardiser(n_features)
        if base == "saits":
            self.base: nn.Module = SAITS(
                n_features, n_steps, d_model, n_layers, n_heads, d_ffn, dropout, diagonal_mask, authors_layers
            )
        elif base == "timesnet":
            self.base = TimesNet(
                n_features, n_steps, d_model, n_layers, d_ffn, top_k, n_kernels, dropout, authors_layers
            )
        elif base == "dlinear":
            self.base = DLinear(n_features, n_steps, d_model, moving_average, individual)
        elif base == "tcn":
            self.base = TCN(n_features, d_model, n_layers, kernel_size, dropout)
        else:
            self.base = _Missing()

        latent = n_features if base == "dlinear" else d_model
        if alignment == "foundation":
            if backbone is None and foundation_output != "call":
                raise ValueError(
                    'alignment="foundation" needs backbone=: a Hub id (the paper: "Maple728/TimeMoE-50M"), a folder '
                    "or a transformers config; or a live module through from_backbone(foundation=...)."
                )
            if backbone is not None:
                self._hold(build_foundation(backbone, backbone_revision, foundation_output, foundation_remote_code))
            if foundation_output == "generate":
                width = n_features
            else:
                config = getattr(getattr(self, "backbone", None), "config", None)
                width = foundation_dim or getattr(config, "hidden_size", None) or getattr(config, "d_model", None)
                if width is None:
                    raise ValueError("Give foundation_dim=, the width of what the foundation model answers.")
            self.projector = nn.Sequential(nn.Linear(latent, width), nn.ReLU(), nn.Linear(width, width))
        elif alignment != "none":
            self.projector = nn.Sequential(nn.Linear(latent, latent), nn.ReLU(), nn.Linear(latent, latent))
        metrics = {}
        for stage in ("val", "test"):
            metrics[f"{stage}_mae"], metrics[f"{stage}_mse"] = MeanAbsoluteError(), MeanSquaredError()
            metrics[f"{stage}_cosine"] = MeanMetric()
        self.metrics = nn.ModuleDict(metrics)

    def _hold(self, foundation: nn.Module) -> None:
        self.backbone = foundation
        self.freeze("backbone")

    @classmethod
    def from_backbone(
        cls, base: nn.Module | None = None, *, foundation: nn.Module | None = None, **hparams: Any
    ) -> Self:
        """Wrap a live imputation network of one's own, or align with a live foundation model.

        Args:
            base: called with standardised ``x`` (b, t, n; zero where missing) and ``mask``; returns the reconstruction
                (b, t, n) and a latent (b, t, ``d_model``), and may return further reconstructions for the local loss.
                An optional method ``encode(x, mask)`` that returns the latent alone saves work.
            foundation: called with complete standardised windows (b, t, n); returns (b, t, ``foundation_dim``).
            hparams: the other hyperparameters; give ``d_model``, the width of the latent.
        """
        if base is not None:
            hparams["base"] = "custom"
        if foundation is not None:
            hparams |= {"alignment": "foundation", "foundation_output": "call"}
        model = cls(**hparams)
        if base is not None:
            model.base = base
        if foundation is not None:
            model._hold(foundation)
        return model

    # ---- the forward pass -------------------------------------------------------------------------------------------

    def run_base(self, x: Tensor, mask: Tensor) -> Imputation:
        """The base on standardised values, whatever form its answer has."""
        answer = self.base(x, mask)
        return answer if isinstance(answer, Imputation) else Imputation(answer[0], answer[1], tuple(answer[2:]))

    def encode(self, x: Tensor, mask: Tensor) -> Tensor:
        """The latent (b, t, d) of standardised windows."""
        return self.base.encode(x, mask) if hasattr(self.base, "encode") else self.run_base(x, mask).latent

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Complete the windows: observed values stay, the others are filled in.

        Shapes:
            x, mask: (b, t, n); x in the units of the data, mask 1 where observed and 0 where missing
            returns: (b, t, n) in the units of the data
        """
        self._check(x, mask)
        filled = self.scaler.inverse(self.run_base(self.scaler(x, mask), mask).reconstruction)
        return torch.where(mask > 0, x, filled.to(x.dtype))

    def example_inputs(self) -> tuple[Tensor, ...]:
        shape = (2, self.hparams["n_steps"], self.hparams["n_features"])
        draw = torch.Generator().manual_seed(0)
        x, mask = torch.randn(shape, generator=draw), (torch.rand(shape, generator=draw) < 0.5).float()
        return (x * mask).to(self.device), mask.to(self.device)

    def _check(self, x: Tensor, mask: Tensor) -> None:
        steps, channels = self.hparams["n_steps"], self.hparams["n_features"]
        if x.ndim != 3 or tuple(x.shape[1:]) != (steps, channels) or x.shape[0] == 0:
            raise ValueError(
                f"'x' has shape {tuple(x.shape)}; expected (batch >= 1, {steps} steps, {channels} channels). "
                "predict(x) takes series of any length."
            )
        if mask.shape != x.shape:
            raise ValueError(f"'mask' has shape {tuple(mask.shape)}, 'x' {tuple(x.shape)}; they must be equal.")

    def loss(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The training loss of a batch: ``loss`` and its unweighted parts ``local`` and ``alignment``."""
        hp = self.hparams
        mask, known = batch["mask"], batch["target_mask"]
        self._check(batch["x"], mask)
        x, target = self.scaler(batch["x"], mask), self.scaler(batch["target"], known)
        imputed = self.run_base(x, mask)
        hidden_weight = hp.hidden_weight
        if hidden_weight is None:
            hidden_weight = getattr(self.base, "hidden_weight", 1.0)
        local = local_loss(
            imputed, x, mask, target, known * (1 - mask), hp.observed_weight, hidden_weight, hp.local_loss
        )
        parts = {"loss": hp.local_weight * local, "local": local}
        if hp.alignment == "none":
            return parts
        student = self.projector(imputed.latent)
        with torch.no_grad():
            goal = self.goal(x, mask, target, known)
        if hp.alignment == "contrastive":
            alignment = contrastive_alignment(student, goal)
        else:
            alignment = cosine_alignment(student, goal, hp.cosine_dim)
        return {"loss": parts["loss"] + hp.align_weight * alignment, "local": local, "alignment": alignment}

    def goal(self, x: Tensor, mask: Tensor, target: Tensor, known: Tensor) -> Tensor:
        """What the projected latent of the masked window is drawn to; all arguments standardised."""
        hp = self.hparams
        if hp.alignment == "foundation":
            return foundation_target(self.backbone, x if hp.authors_foundation_input else target, hp.foundation_output)
        goal = self.encode(target, self._complete_mask(mask, known))
        project = hp.project_target
        if project is None:
            project = hp.alignment == "contrastive"
        return self.projector(goal) if project else goal

    def _complete_mask(self, mask: Tensor, known: Tensor) -> Tensor:
        return {"ones": torch.ones_like(mask), "known": known, "same": mask}[self.hparams["complete_mask"]]

    # ---- Lightning --------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        super().on_fit_start()
        data = getattr(self.trainer, "datamodule", None)
        if hasattr(data, "statistics"):
            self.scaler.set(*data.statistics())

    def on_train_start(self) -> None:
        if not bool(self.scaler.fitted):
            self.fit_scaler(self.trainer.train_dataloader)

    @torch.no_grad()
    def fit_scaler(self, batches: Iterable[Mapping[str, Tensor]]) -> Self:
        """Set the standardisation from the known values of training batches, over all processes."""
        totals = torch.zeros(3, self.hparams["n_features"], dtype=torch.float64)
        shift = None
        for batch in batches:
            values, known = batch["target"].double().cpu(), batch["target_mask"].double().cpu()
            if shift is None:  # sums of squares around a value of the data: no cancellation
                shift = (values * known).sum((0, 1)) / known.sum((0, 1)).clamp(min=1)
            off = (values - shift) * known
            totals += torch.stack([known.sum((0, 1)), off.sum((0, 1)), off.square().sum((0, 1))])
        if shift is None:
            raise ZooError("No training batches to take mean and standard deviation from.")
        count = totals[0].clamp(min=1)
        mean, square = shift + totals[1] / count, totals[2] / count - (totals[1] / count) ** 2
        if self._trainer is not None and self.trainer.world_size > 1:
            every = self.all_gather(torch.stack([totals[0], mean, square]).float().to(self.device)).double().cpu()
            share = every[:, 0] / every[:, 0].sum(0).clamp(min=1)
            mean = (share * every[:, 1]).sum(0)
            square = (share * (every[:, 2] + (every[:, 1] - mean) ** 2)).sum(0)
        if not bool((totals[0] > 0).all()):
            empty = torch.nonzero(totals[0] == 0).flatten().tolist()
            raise ZooError(f"Channels {empty} have no known value in the training batches. Leave them out.")
        self.scaler.set(mean.float(), square.clamp(min=0).sqrt().float())
        return self

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        parts = self.loss(batch)
        for name, value in parts.items():
            self.log(f"train/{name}", value.detach(), batch_size=len(batch["x"]), prog_bar=name == "loss")
        return parts["loss"]

    def _evaluate(self, batch: dict[str, Any], stage: str) -> None:
        """MAE and MSE, in standard deviations, on the values hidden from the model; and how alike the latents of the
        masked and the complete window are."""
        mask, known = batch["mask"], batch["target_mask"]
        self._check(batch["x"], mask)
        x, target = self.scaler(batch["x"], mask), self.scaler(batch["target"], known)
        imputed = self.run_base(x, mask)
        hidden = (known * (1 - mask)).bool()
        complete = self.encode(target, self._complete_mask(mask, known))
        cosine = F.cosine_similarity(imputed.latent, complete, dim=self.hparams["cosine_dim"])
        self.metrics[f"{stage}_cosine"].update(cosine)
        self.log(f"{stage}/cosine", self.metrics[f"{stage}_cosine"], batch_size=len(x))
        for name in ("mae", "mse"):  # logged by every process, also where its windows hide nothing
            metric = self.metrics[f"{stage}_{name}"]
            metric.update(imputed.reconstruction[hidden].float(), target[hidden])
            self.log(f"{stage}/{name}", metric, batch_size=len(x), prog_bar=True)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """``imputed`` (b, t, n) in the units of the data, and what the batch says of where the windows come from."""
        kept = {key: batch[key] for key in ("name", "start", "length") if key in batch}
        return {**kept, "imputed": self.predict(batch["x"], batch["mask"])}

    @torch.no_grad()
    def predict(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Complete series of any length, in the units of the data.

        Series longer than a window are cut into windows, the last one flush with the end; shorter ones are continued
        by missing values.

        Args:
            x: (b, length, n); NaN where missing.
            mask: the same shape, 1 where observed and 0 where missing; with it, x may hold anything there.
        Shapes:
            returns: (b, length, n)
        Raises:
            ValueError: if an observed value is infinite, or the shape does not fit.
        """
        if x.ndim != 3 or x.shape[2] != self.hparams["n_features"] or 0 in x.shape[:2]:
            raise ValueError(
                f"'x' has shape {tuple(x.shape)}; expected (batch >= 1, length >= 1, "
                f"{self.hparams['n_features']} channels)."
            )
        if mask is not None and mask.shape != x.shape:
            raise ValueError(f"'mask' has shape {tuple(mask.shape)}, 'x' {tuple(x.shape)}; they must be equal.")
        x = x.to(self.device)
        seen = ~x.isnan()
        if mask is not None:
            seen = seen & (mask.to(self.device) > 0)
        x = torch.where(seen, x, torch.zeros_like(x))
        check_finite(x, "x")
        b, length, n = x.shape
        t = self.hparams["n_steps"]
        short = max(t - length, 0)
        x, seen = F.pad(x, (0, 0, 0, short)), F.pad(seen, (0, 0, 0, short))
        starts = [*range(0, x.shape[1] - t, t), x.shape[1] - t]
        windows = torch.stack([x[:, s : s + t] for s in starts], dim=1).flatten(0, 1)
        masks = torch.stack([seen[:, s : s + t] for s in starts], dim=1).flatten(0, 1).to(x.dtype)
        done = super().predict(windows, masks).view(b, len(starts), t, n)
        out = torch.empty_like(x)
        for i, s in reversed(list(enumerate(starts))):  # where the last two overlap, the earlier one stands
            out[:, s : s + t] = done[:, i]
        return out[:, :length]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameter_groups(), lr=self.hparams["lr"])

    # ---- the authors' checkpoints -----------------------------------------------------------------------------------

    @classmethod
    def convert_state_dict(cls, content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Weights of the authors' models, or of plain PyPOTS SAITS, TimesNet, DLinear and TCN.

        Sizes are read off the shapes; what leaves no trace there (``n_heads``, ``top_k``, ``moving_average``, TCN's
        ``n_steps``) is the paper's. These models work on standardised data: the standardisation is the identity until
        it is set. Projectors of FM_align are left out with their foundation model (``alignment="none"``): imputing
        needs neither.

        Raises:
            ZooError: for keys that belong to none of the four bases.
        """
        theirs = dict(unwrap(content))
        ours: dict[str, Tensor] = {}
        hparams: dict[str, Any] = {}
        from_authors = any(key.startswith("contrastive_projection.") for key in theirs)
        foundation = any(key.startswith("alignment_projection.") for key in theirs)
        hparams["alignment"] = "cosine" if from_authors and not foundation else "none"

        def take(source: str, target: str, *parts: str) -> None:
            for part in parts or ("weight", "bias"):
                if f"{source}.{part}" not in theirs:
                    raise ZooError(f"The checkpoint has no '{source}.{part}'; is it one of Glocal-IB's or PyPOTS'?")
                ours[f"{target}.{part}"] = theirs.pop(f"{source}.{part}")

        for i in (0, 2):
            if hparams["alignment"] == "cosine":
                take(f"contrastive_projection.{i}", f"projector.{i}")
        unused = ("alignment_projection.", "foundation_model.", "contrastive_projection.")
        theirs = {key: value for key, value in theirs.items() if not key.startswith(unused)}
        if "encoder.embedding_1.embedding_layer.weight" in theirs:
            _convert_saits(theirs, ours, take, hparams)
            hparams["authors_layers"] = from_authors
        elif "enc_embedding.value_embedding.tokenConv.weight" in theirs:
            _convert_timesnet(theirs, ours, take, hparams)
            hparams["authors_layers"] = from_authors
        elif any(key.startswith("backbone.network.") for key in theirs):
            _convert_tcn(theirs, ours, take, hparams)
        elif any(key.startswith("backbone.linear_seasonal") for key in theirs):
            _convert_dlinear(theirs, ours, take, hparams)
        if theirs:
            raise ZooError(f"{len(theirs)} keys of the checkpoint are unknown ({', '.join(list(theirs)[:3])}).")
        n = hparams["n_features"]
        ours |= {"scaler.mean": torch.zeros(n), "scaler.std": torch.ones(n), "scaler.fitted": torch.tensor(False)}
        return hparams, ours


def _one_of(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r}; choose one of {', '.join(map(repr, choices))}.")


def _count(theirs: Mapping[str, Tensor], prefix: str) -> int:
    return 1 + max(int(key.removeprefix(prefix).split(".")[0]) for key in theirs if key.startswith(prefix))


def _convert_saits(theirs: dict[str, Tensor], ours: dict[str, Tensor], take: Any, hparams: dict[str, Any]) -> None:
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


def _convert_timesnet(theirs: dict[str, Tensor], ours: dict[str, Tensor], take: Any, hparams: dict[str, Any]) -> None:
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


def _convert_tcn(theirs: dict[str, Tensor], ours: dict[str, Tensor], take: Any, hparams: dict[str, Any]) -> None:
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


def _convert_dlinear(theirs: dict[str, Tensor], ours: dict[str, Tensor], take: Any, hparams: dict[str, Any]) -> None:
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
