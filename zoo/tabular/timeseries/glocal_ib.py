"""Glocal-IB: a training objective that keeps time-series imputation good where most values are missing.

Paper: "Glocal Information Bottleneck for Time Series Imputation", NeurIPS 2025, arXiv:2510.04910.
Code by the authors: https://github.com/Muyiiiii/NeurIPS-25-Glocal-IB (README: MIT), on PyPOTS 0.13 base models.

In: windows ``x`` with a mask of what was observed. Out: the same windows, completed. Any imputation network f that
gives a reconstruction R and a latent z can be the base; it is trained with

    loss = local_weight * (observed + hidden reconstruction error)  +  kl_weight * KL(q(z | x) || p(z))
           +  align_weight * A(g(z(x, m)), sg[z(x_o, m_o)])

where x_o is all that is known of the window, x what is left of it after further values were hidden, g a two-layer
projector and sg[.] stops the gradient: the *global* part asks that the latent of a sparse window already says what
the latent of the full window says. The compactness term in the middle is there where the latent has a distribution,
which is with GP-VAE. At inference only f runs, once. ``alignment="none"`` is the plain base.

Reproduces: the objective with its three alignments, and the bases SAITS, TimesNet, DLinear, TCN and GP-VAE (in
``bases.py``) as the authors run them. Their own GP-VAE cannot be run with their objective (``gpvae_my`` passes its
weights to a constructor that takes none); here it gets the objective of the others, with the weights of their command
line, and the mean of q(z | x) is aligned. Departs: the first-layer fault of the authors' SAITS and TimesNet is put
right (``authors_layers`` restores it).

Index legend: b window, t time step, n channel, d latent width.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanAbsoluteError, MeanMetric, MeanSquaredError

from zoo.core import ZooError, ZooModule, check_finite, unwrap
from zoo.tabular.timeseries.bases import BASES, GPVAE, SAITS, TCN, DLinear, Imputation, TimesNet, convert_base, take

ALIGNMENTS = ("none", "cosine", "contrastive", "foundation")


# ---- parts ----------------------------------------------------------------------------------------------------------


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
    """Mean absolute (``"mae"``) or squared (``"mse"``) error over the entries where ``mask`` is one; or, with
    ``"gaussian"``, minus the log-likelihood of a window's entries under unit variance, the mean over windows."""
    if kind == "gaussian":
        return gaussian_error(prediction, target, mask).mean()
    error = prediction - target
    error = error.abs() if kind == "mae" else error.square()
    return (error * mask).sum() / (mask.sum() + 1e-12)


def gaussian_error(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """-log N(target; prediction, 1), summed over the entries of a window where ``mask`` is one: (b,)."""
    error = 0.5 * (prediction - target).square() + 0.5 * math.log(2 * math.pi)
    return (error * mask).sum((1, 2))


def importance_weighted_error(imputed: Imputation, x: Tensor, mask: Tensor, samples: int) -> Tensor:
    """Minus the importance-weighted bound on log p(x) (Burda et al. 2016), up to the constant log ``samples``.

    The log-sum over ``samples`` draws of p(x | z) p(z) / q(z | x), the mean over groups of draws and over windows.
    """
    errors = [gaussian_error(r, x, mask) for r in (*imputed.partial, imputed.reconstruction)]
    weights = -torch.stack(errors) - imputed.log_ratio  # (groups * samples, b)
    return -weights.unflatten(0, (-1, samples)).logsumexp(1).mean()


def local_loss(
    imputed: Imputation,
    x: Tensor,
    mask: Tensor,
    target: Tensor,
    hidden: Tensor,
    observed_weight: float = 1.0,
    hidden_weight: float = 1.0,
    kind: str = "mae",
    samples: int = 1,
) -> Tensor:
    """Reconstruction of what the base saw, averaged over its reconstructions, plus of what was hidden from it.

    Args:
        samples: of an importance-weighted bound, which is the error on what the base saw where it drew any.
    Shapes:
        x, mask, target, hidden: (b, t, n); ``hidden`` is one where ``target`` is known and ``mask`` is zero
    """
    seen = [*imputed.partial, imputed.reconstruction]
    if imputed.log_ratio is None:
        observed = sum(masked_error(r, x, mask, kind) for r in seen) / len(seen)
    else:
        observed = importance_weighted_error(imputed, x, mask, samples)
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
        base: ``saits``, ``timesnet``, ``dlinear``, ``tcn`` or ``gpvae`` (``custom`` is set by `from_backbone`).
        alignment: ``cosine`` (the authors' contras_2), ``contrastive`` (contras_1), ``foundation`` (FM_align) or
            ``none``: the plain base.
        align_weight: weight of the alignment (the authors' README example uses 0.5).
        local_weight: weight of the local loss.
        kl_weight: weight of the compactness term, GP-VAE's divergence from its prior, summed over latents and steps.
        observed_weight: weight, inside the local loss, of the error on what the base saw.
        hidden_weight: the same for what was hidden from it; None is the authors' choice: 1, for TimesNet 0.
        local_loss: ``mae`` (what the authors' runs use), ``mse`` or ``gaussian``, minus the log-likelihood of a window
            under unit variance. A plain GP-VAE (PyPOTS 0.13) is ``base="gpvae"``, ``alignment="none"``,
            ``local_loss="gaussian"``, ``hidden_weight=0``, ``kl_weight=0.2``.
        cosine_dim: axis of the cosine: 1 is time (the authors'), 2 or -1 the latent width.
        project_target: send the complete window's latent through the projector too; None is what the authors'
            experiments do: yes for ``contrastive``, no for ``cosine`` (their stand-alone wrapper never does).
        complete_mask: mask that goes with the complete window: ``ones`` (the paper's), ``known`` (one where a value
            is known) or ``same`` (the masked window's, as in the authors' stand-alone wrapper).
        d_model: width of the base, and of its latent except for DLinear (n); for GP-VAE of its latent only.
        n_layers: layers a block (SAITS), blocks (TimesNet), levels (TCN), hidden layers of encoder and of decoder
            (GP-VAE).
        n_heads: attention heads of SAITS; must divide ``d_model``.
        d_ffn: hidden width of SAITS' feed-forward part and of TimesNet's convolutions.
        dropout: rate; it also acts in the complete pass.
        diagonal_mask: SAITS' attention may not look at its own step.
        kernel_size: of TCN's convolutions.
        top_k: periods a TimesNet block folds by.
        n_kernels: convolutions in a TimesNet inception.
        moving_average: odd length of DLinear's moving average, in steps.
        individual: DLinear has one map a channel, and no mask.
        d_hidden: width of GP-VAE's hidden layers.
        window: steps that GP-VAE's encoder sees at once; None is all, as in the authors' runs (PyPOTS: 3).
        length_scale: of GP-VAE's prior, a Cauchy kernel, in steps.
        sigma: scale of that kernel.
        kernel_scales: groups of GP-VAE's latents, the length scale of each half of that of the one before.
        elbo_samples: draws of GP-VAE's latent in a training step (M).
        importance_samples: draws in the log of one importance-weighted bound (K); with more than one, ``local_loss``
            is ``gaussian`` and the bound takes the place of the error on what the base saw and of the KL term.
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
        kl_weight: float = 1e-6,
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
        d_hidden: int = 64,
        window: int | None = None,
        length_scale: float = 7.0,
        sigma: float = 1.0,
        kernel_scales: int = 1,
        elbo_samples: int = 1,
        importance_samples: int = 1,
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
        _one_of("local_loss", local_loss, ("mae", "mse", "gaussian"))
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
        if base == "gpvae":
            if length_scale <= 0 or sigma <= 0:
                raise ValueError(f"length_scale={length_scale}, sigma={sigma}: the prior's kernel needs both above 0.")
            if not 1 <= kernel_scales <= d_model or (window is not None and not 1 <= window <= n_steps):
                raise ValueError(
                    f"kernel_scales={kernel_scales}, window={window}: need 1 to d_model={d_model} scales and a window "
                    f"of 1 to n_steps={n_steps} steps, or None."
                )
            if elbo_samples < 1 or importance_samples < 1:
                raise ValueError(f"elbo_samples={elbo_samples}, importance_samples={importance_samples}: at least 1.")
        if importance_samples > 1 and (base != "gpvae" or local_loss != "gaussian"):
            raise ValueError(
                f"importance_samples={importance_samples} weighs likelihoods: it goes with base='gpvae' and "
                f"local_loss='gaussian', not {base!r} and {local_loss!r}."
            )

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
        elif base == "gpvae":
            self.base = GPVAE(
                n_features, n_steps, d_model, n_layers, d_hidden, window, length_scale, sigma, kernel_scales,
                elbo_samples, importance_samples,
            )  # fmt: skip
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
        """The training loss of a batch: ``loss`` and its unweighted parts ``local``, ``kl`` and ``alignment``."""
        hp = self.hparams
        mask, known = batch["mask"], batch["target_mask"]
        self._check(batch["x"], mask)
        x, target = self.scaler(batch["x"], mask), self.scaler(batch["target"], known)
        imputed = self.run_base(x, mask)
        hidden_weight = hp.hidden_weight
        if hidden_weight is None:
            hidden_weight = getattr(self.base, "hidden_weight", 1.0)
        local = local_loss(
            imputed, x, mask, target, known * (1 - mask), hp.observed_weight, hidden_weight, hp.local_loss,
            hp.importance_samples,
        )  # fmt: skip
        parts = {"loss": hp.local_weight * local, "local": local}
        if imputed.kl is not None:
            kl = imputed.kl.mean()
            parts |= {"loss": parts["loss"] + hp.kl_weight * kl, "kl": kl}
        if hp.alignment == "none":
            return parts
        student = self.projector(imputed.latent)
        with torch.no_grad():
            goal = self.goal(x, mask, target, known)
        if hp.alignment == "contrastive":
            alignment = contrastive_alignment(student, goal)
        else:
            alignment = cosine_alignment(student, goal, hp.cosine_dim)
        return {**parts, "loss": parts["loss"] + hp.align_weight * alignment, "alignment": alignment}

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
        """Weights of the authors' models, or of plain PyPOTS SAITS, TimesNet, DLinear, TCN and GP-VAE.

        Sizes are read off the shapes; what leaves no trace there (``n_heads``, ``top_k``, ``moving_average``, TCN's
        and GP-VAE's ``n_steps``, GP-VAE's prior) is the paper's. These models work on standardised data: the
        standardisation is the identity until it is set. Projectors of FM_align are left out with their foundation model
        (``alignment="none"``): imputing needs neither. A GP-VAE has its own objective, PyPOTS' by default.

        Raises:
            ZooError: for keys that belong to none of the five bases.
        """
        theirs = dict(unwrap(content))
        ours: dict[str, Tensor] = {}
        from_authors = any(key.startswith("contrastive_projection.") for key in theirs)
        foundation = any(key.startswith("alignment_projection.") for key in theirs)
        alignment = "cosine" if from_authors and not foundation else "none"
        if alignment == "cosine":
            for i in (0, 2):
                take(theirs, ours, f"contrastive_projection.{i}", f"projector.{i}")
        unused = ("alignment_projection.", "foundation_model.", "contrastive_projection.")
        theirs = {key: value for key, value in theirs.items() if not key.startswith(unused)}
        hparams = {"alignment": alignment, **convert_base(theirs, ours)}
        if hparams.get("base") in ("saits", "timesnet"):
            hparams["authors_layers"] = from_authors
        if hparams.get("base") == "gpvae" and alignment == "none":
            hparams |= {"local_loss": "gaussian", "hidden_weight": 0.0, "kl_weight": 0.2}
        if theirs:
            raise ZooError(f"{len(theirs)} keys of the checkpoint are unknown ({', '.join(list(theirs)[:3])}).")
        n = hparams["n_features"]
        ours |= {"scaler.mean": torch.zeros(n), "scaler.std": torch.ones(n), "scaler.fitted": torch.tensor(False)}
        return hparams, ours


def _one_of(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r}; choose one of {', '.join(map(repr, choices))}.")
