"""Runs the authors' Glocal-IB beside ours: losses, five bases, gradients, a step of Adam, time and memory.

Their base models build on PyPOTS 0.13: a checkout of its tag v0.13 is expected beside theirs (``DIR/../PyPOTS``), or
PyPOTS installed. Their package for coloured prints is replaced by an empty one.
"""

import contextlib
import importlib
import sys
import types
import unittest.mock
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import multivariate_normal

from benchmarks.measure import in_turns
from zoo.tabular.timeseries.bases import cauchy_kernel, whitening
from zoo.tabular.timeseries.glocal_ib import GlocalIB, contrastive_alignment, cosine_alignment

SMALL = {"n_steps": 24, "n_features": 5, "n_layers": 2, "d_model": 32, "d_ffn": 24}
OWN = {
    "saits": {"n_heads": 4, "d_k": 8, "d_v": 8, "dropout": 0.0, "attn_dropout": 0.0, "diagonal_attention_mask": True},
    "timesnet": {"top_k": 3, "n_kernels": 3, "dropout": 0.0, "apply_nonstationary_norm": False},
    "dlinear": {"moving_avg_window_size": 3, "individual": False},
    "tcn": {"kernel_size": 3, "dropout": 0.0},
}
GPVAE = {"input_dim": 5, "time_length": 24, "latent_dim": 6, "encoder_sizes": (16, 16), "decoder_sizes": (16, 16)}
FOLDER = {"saits": "SAITS", "timesnet": "TimesNet", "dlinear": "DLinear", "tcn": "TCN"}


class Continues(nn.Module):
    """A foundation model for the comparison: continues a sequence by values that follow from it."""

    def generate(self, x: Tensor, max_new_tokens: int) -> Tensor:
        return torch.cat([x, torch.sin(x.cumsum(1))[:, -max_new_tokens:]], dim=1)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> "Continues":
        return cls()


def _package(name: str, path: Path | None = None) -> types.ModuleType:
    """A package without its ``__init__``, which would pull in what these models never use."""
    module = types.ModuleType(name)
    module.__path__ = [str(path)] if path else []  # type: ignore[attr-defined]
    sys.modules[name] = module
    return module


def load(checkout: Path) -> types.SimpleNamespace:
    """The authors' modules: ``core`` by base, ``loss``, ``wrapper``, and PyPOTS' own ``saits`` backbone.

    Raises:
        FileNotFoundError: if PyPOTS is neither beside the checkout nor installed.
    """
    checkout = Path(checkout)
    beside = checkout.parent / "PyPOTS" / "pypots"
    if beside.is_dir():
        _package("pypots", beside)
    elif importlib.util.find_spec("pypots") is None:
        raise FileNotFoundError(f"{beside} is missing: clone https://github.com/WenjieDu/PyPOTS at tag v0.13 there.")
    _package("muyi").utils = _package("muyi.utils")  # type: ignore[attr-defined]
    sys.modules["muyi.utils"].color_print = lambda *args, **kwargs: None  # type: ignore[attr-defined]
    _package("otherModel", checkout / "otherModel")
    core = {}
    for base, folder in FOLDER.items():
        _package(f"otherModel.{folder}", checkout / "otherModel" / folder)
        core[base] = importlib.import_module(f"otherModel.{folder}.core")
        core[base].AutoModelForCausalLM = Continues
    _package("otherModel.GPVAE", checkout / "otherModel" / "GPVAE")
    _package("Glocal_IB", checkout / "Glocal_IB")
    return types.SimpleNamespace(
        core=core,
        loss=importlib.import_module("otherModel.loss"),
        align=importlib.import_module("Glocal_IB.align_loss"),
        wrapper=importlib.import_module("Glocal_IB.Glocal_IB").Glocal_IB,
        saits=importlib.import_module("pypots.nn.modules.saits").BackboneSAITS,
        criteria=importlib.import_module("pypots.nn.modules.loss"),
        gpvae=importlib.import_module("otherModel.GPVAE.core")._GPVAE,
        gpvae_layers=importlib.import_module("pypots.nn.modules.gpvae.layers"),
    )


def theirs_model(authors: types.SimpleNamespace, base: str, align: str, **changes: Any) -> nn.Module:
    """Their model of a base in train mode, with ``changes`` to the small sizes."""
    sizes = {**SMALL, **OWN[base], **changes}
    if base == "tcn":
        sizes["n_levels"], sizes["d_hidden"] = sizes.pop("n_layers"), sizes.pop("d_model")
        sizes.pop("d_ffn")
    if base == "dlinear":
        sizes.pop("n_layers"), sizes.pop("d_ffn")
    if base != "timesnet":
        sizes |= {"ORT_weight": 1, "MIT_weight": 1}
    model = getattr(authors.core[base], f"_{FOLDER[base]}")(
        loss_type="123",
        loss_weight=[1.0, 1e-6, 1.0],
        align_type=align,
        training_loss=authors.criteria.MAE(),
        validation_metric=authors.criteria.MSE(),
        **sizes,
    )
    return model.train()


def ours_model(theirs: nn.Module, base: str, align: str, **changes: Any) -> GlocalIB:
    """Ours with their weights, set to do as they do."""
    hparams, state = GlocalIB.convert_state_dict(theirs.state_dict())
    own = {"saits": {"n_heads": 4}, "timesnet": {"top_k": 3}}.get(base, {})
    hparams |= {"dropout": 0.0, "lr": 1e-3, **own, **changes}
    if base == "tcn":
        hparams["n_steps"] = changes.get("n_steps", SMALL["n_steps"])
    hparams["alignment"] = {"contras_1": "contrastive", "contras_2": "cosine", "FM_align": "foundation"}[align]
    if align == "FM_align":
        hparams |= {"foundation_output": "generate", "authors_foundation_input": True, "backbone": TINY_CAUSAL}
    model = GlocalIB(**hparams)
    if align == "FM_align":
        model.backbone = Continues()
        for i in (0, 2):
            for part in ("weight", "bias"):
                state[f"projector.{i}.{part}"] = theirs.state_dict()[f"alignment_projection.{i}.{part}"]
    model.load_state_dict(state)
    return model.train()


# Any transformers config does: the model built from it is replaced by `Continues`.
TINY_CAUSAL = {"model_type": "gpt2", "n_layer": 1, "n_head": 1, "n_embd": 4, "vocab_size": 4, "n_positions": 4}


def batch(sizes: dict[str, int], windows: int = 4, seed: int = 0, rate: float = 0.5) -> dict[str, Tensor]:
    """A batch in our keys, standardised: half of the values known, a fifth of these hidden."""
    draw = torch.Generator().manual_seed(seed)
    shape = (windows, sizes["n_steps"], sizes["n_features"])
    values = torch.randn(shape, generator=draw).cumsum(1) / 3
    known = torch.rand(shape, generator=draw) >= rate
    seen = known & (torch.rand(shape, generator=draw) >= 0.2)
    return {"x": values * seen, "mask": seen.float(), "target": values * known, "target_mask": known.float()}


def in_their_keys(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "X": ours["x"],
        "missing_mask": ours["mask"],
        "X_ori": ours["target"],
        "indicating_mask": ours["target_mask"] - ours["mask"],
    }


def error(ours: Tensor, theirs: Tensor) -> float:
    """max|a - b| / max|b|."""
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max().clamp(min=1e-30))


def _in_our_names(theirs: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by their parameters' names, by ours: the conversion of weights only renames, joins and stacks."""
    content = {key: tensors.get(key, torch.zeros_like(value)) for key, value in theirs.state_dict().items()}
    return GlocalIB.convert_state_dict(content)[1]


def _compare_model(authors: types.SimpleNamespace, base: str, align: str, label: str, **changes: Any) -> dict:
    """Loss, forward pass and gradients in float32; a step of Adam in float64.

    Adam's first step is lr * g / (|g| + eps): where a gradient is all but zero, the rounding of float32 decides its
    sign, in both codes alike.
    """
    figures = _compare_in(authors, base, align, label, torch.float32, **changes)
    exact = _compare_in(authors, base, align, label, torch.float64, **changes)
    return {k: (exact if k.endswith(".step") else figures)[k] for k in figures}


def _compare_in(
    authors: types.SimpleNamespace, base: str, align: str, label: str, dtype: torch.dtype, **changes: Any
) -> dict[str, float]:
    torch.manual_seed(0)
    theirs = theirs_model(authors, base, align, **changes)
    ours = ours_model(theirs, base, align).to(dtype)
    theirs.to(dtype)
    data = {key: value.to(dtype) for key, value in batch(SMALL).items()}
    results = theirs.calc_criterion(in_their_keys(data))
    parts = ours.loss(data)
    figures = {f"{label}.loss": error(parts["loss"], results["loss"])}
    figures[f"{label}.forward"] = error(ours(data["x"], data["mask"]), results["imputed_data"])
    figures[f"{label}.latent"] = error(ours.encode(data["x"], data["mask"]), results["X_obs_z_contras"])

    optimiser = torch.optim.Adam(theirs.parameters(), lr=1e-3)
    results["loss"].backward()
    own = ours.configure_optimizers()
    parts["loss"].backward()
    gradients = _in_our_names(theirs, {k: p.grad for k, p in theirs.named_parameters() if p.grad is not None})
    worst = [error(p.grad, gradients[k]) for k, p in ours.named_parameters() if p.grad is not None and k in gradients]
    figures[f"{label}.gradients"] = max(worst)
    optimiser.step()
    own.step()
    weights = _in_our_names(theirs, theirs.state_dict())
    figures[f"{label}.step"] = max(error(p, weights[k]) for k, p in ours.named_parameters() if k in weights)
    return figures


def compare(checkout: Path) -> dict[str, float]:
    """Relative errors against the authors' code in float32."""
    authors = load(checkout)
    figures: dict[str, float] = {}
    for base in FOLDER:
        for align in ("contras_2", "contras_1"):
            figures |= _compare_model(authors, base, align, f"{base}.{align}")
    figures |= _compare_model(authors, "dlinear", "contras_2", "dlinear_individual", individual=True)
    figures |= _compare_model(authors, "saits", "FM_align", "saits.FM_align")

    # SAITS without the fault: PyPOTS' own backbone
    torch.manual_seed(1)
    sizes = {**SMALL, **{k: v for k, v in OWN["saits"].items() if k != "diagonal_attention_mask"}}
    backbone = authors.saits(**sizes)
    hparams, state = GlocalIB.convert_state_dict({f"encoder.{k}": v for k, v in backbone.state_dict().items()})
    ours = GlocalIB(**{**hparams, "dropout": 0.0})
    ours.load_state_dict(state)
    data = batch(SMALL)
    allowed = (1 - torch.eye(SMALL["n_steps"])).unsqueeze(0)
    one, two, three, *_ = backbone(data["x"], data["mask"], allowed)
    answer = ours.run_base(data["x"], data["mask"])
    figures["saits.without_fault.reconstruction"] = error(answer.reconstruction, three)
    figures["saits.without_fault.partial"] = max(error(answer.partial[0], one), error(answer.partial[1], two))

    # the losses by themselves, in both of their code paths
    a, b = torch.randn(3, 10, 8), torch.randn(3, 10, 8)
    keys = ("X_obs_z_contras", "X_obs_p_contras", "X_ori_z_contras", "X_ori_p_contras")
    given = dict(zip(keys, (a, a, b, b), strict=True))
    figures["cosine_alignment"] = max(
        error(cosine_alignment(a, b), authors.loss.MyContrastiveLoss_v2()(given)),
        error(cosine_alignment(a, b), authors.align.CosAlignLoss()(a, b)),
    )
    figures["contrastive_alignment"] = max(
        error(contrastive_alignment(a, b), authors.loss.MyContrastiveLoss_v1()(given)),
        error(contrastive_alignment(a, b), authors.align.ContrastiveLoss()(a, b)),
    )
    figures |= _compare_wrapper(authors)
    figures["gpvae.kernel"] = error(cauchy_kernel(96, 7.0), authors.gpvae_layers.cauchy_kernel(96, 1.0, 7.0))
    single, exact = _compare_whole_gpvae(authors, torch.float32), _compare_whole_gpvae(authors, torch.float64)
    figures |= {k: (exact if k.endswith(".step") else single)[k] for k in single}
    return figures | _compare_gpvae(authors)


class OwnBase(nn.Module):
    """A base of one's own, for the stand-alone wrapper: it takes ``missing_mask`` or ``mask``."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(10, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.tanh(self.encoder(torch.cat([x, mask], dim=-1)))
        return self.decoder(z), z


def _compare_wrapper(authors: types.SimpleNamespace) -> dict[str, float]:
    """Their ``Glocal_IB(base)``: the same mask in both passes, no projector on the target."""
    figures = {}
    data = batch(SMALL)
    for theirs_name, ours_name in (("cos_align", "cosine"), ("contrastive", "contrastive")):
        torch.manual_seed(2)
        wrapper = authors.wrapper(OwnBase(), 16, theirs_name, align_weight=0.5).train()
        ours = GlocalIB.from_backbone(
            OwnBase(),
            n_features=5,
            n_steps=24,
            d_model=16,
            alignment=ours_name,
            complete_mask="same",
            project_target=False,
        )
        ours.base.load_state_dict(wrapper.base_model.state_dict())
        ours.projector.load_state_dict(wrapper.projection.state_dict())
        results = wrapper(data["x"], data["target"], mask=data["mask"])
        figures[f"wrapper.{theirs_name}"] = error(0.5 * ours.loss(data)["alignment"], results["alignment_loss"])
    return figures


# ---- GP-VAE ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def fixed_noise(noise: Tensor, ours: GlocalIB) -> Iterator[None]:
    """Both codes draw their latents with this noise, (samples * b, d, t) as theirs lays it out."""

    def of_ours(like: Tensor) -> Tensor:
        return noise.unflatten(0, (-1, len(like))).transpose(-1, -2).to(like.dtype)

    with (
        unittest.mock.patch.object(
            multivariate_normal, "_standard_normal", lambda *shape, dtype, device: noise.to(dtype)
        ),
        unittest.mock.patch.object(ours.base, "noise", of_ours),
    ):
        yield


def gpvae_pair(
    authors: types.SimpleNamespace, dtype: torch.dtype, sizes: dict[str, Any], **changes: Any
) -> tuple[nn.Module, GlocalIB]:
    """Their GP-VAE and ours with its weights and ``changes``, in this precision.

    Both priors come from the same kernel, rounded to float32 by theirs: its condition number makes rounding visible.
    """
    theirs = authors.gpvae(**sizes).train()
    hparams, state = GlocalIB.convert_state_dict(theirs.state_dict())
    ours = GlocalIB(
        **{**hparams, "n_steps": sizes["time_length"], "kernel_scales": theirs.backbone.kernel_scales, **changes}
    )
    ours.load_state_dict(state, strict=False)  # all but the projector
    prior = theirs.to(dtype).backbone._init_prior()
    covariance = prior.covariance_matrix.to(dtype)
    theirs.backbone.prior = torch.distributions.MultivariateNormal(prior.loc.to(dtype), covariance)
    ours.to(dtype).train()
    first = [int((ours.base.group == i).nonzero()[0]) for i in range(len(ours.base.whiten))]
    ours.base.whiten = torch.stack([whitening(covariance[i].double()) for i in first]).to(dtype)
    return theirs, ours


def _compare_gpvae(authors: types.SimpleNamespace) -> dict[str, float]:
    """Their plain GP-VAE by its own objective: one draw, several (M), importance-weighted (K), several scales.

    In float64: nearly all of this loss is the divergence from a prior with a condition number of 10^4. In float32
    their gradients are 2e-4 away from those in float64, ours 6e-6.
    """
    rows: dict[str, dict[str, Any]] = {
        "gpvae": {"window_size": 24},
        "gpvae_window_M": {"window_size": 3, "M": 3},
        "gpvae_K": {"window_size": 5, "M": 2, "K": 3},
        "gpvae_scales": {"window_size": 24, "kernel_scales": 2},
    }
    figures: dict[str, float] = {}
    for label, row in rows.items():
        torch.manual_seed(6)
        m, k = row.get("M", 1), row.get("K", 1)
        sizes = {**GPVAE, "beta": 0.2, **row}
        theirs, ours = gpvae_pair(authors, torch.float64, sizes, elbo_samples=m, importance_samples=k)
        data = {key: value.double() for key, value in batch(SMALL).items()}
        imputed, latent = theirs.backbone.get_emb(data["x"], data["mask"])
        ours.eval()
        figures[f"{label}.forward"] = error(ours(data["x"], data["mask"]), imputed[:, 0])
        figures[f"{label}.latent"] = error(ours.encode(data["x"], data["mask"]), latent.transpose(1, 2))
        ours.train()
        noise = torch.randn(m * k * 4, GPVAE["latent_dim"], GPVAE["time_length"], dtype=torch.float64)
        with fixed_noise(noise, ours):
            loss = theirs.calc_criterion(in_their_keys(data))["loss"]
            figures |= _compare_step(label, theirs, ours, loss, ours.loss(data)["loss"])
    return figures


def _compare_step(
    label: str, theirs: nn.Module, ours: GlocalIB, loss: Tensor, own_loss: Tensor, projector: nn.Module | None = None
) -> dict[str, float]:
    """Loss, gradients and a step of Adam of a GP-VAE, and of their wrapper's projector."""
    figures = {f"{label}.loss": error(own_loss, loss)}
    heads = dict(projector.named_parameters(prefix="projector")) if projector else {}
    optimiser, own = torch.optim.Adam([*theirs.parameters(), *heads.values()], lr=1e-3), ours.configure_optimizers()
    loss.backward()
    own_loss.backward()

    def in_our_names(read: Callable[[nn.Parameter], Tensor]) -> dict[str, Tensor]:
        base = _in_our_names(theirs, {key: read(p) for key, p in theirs.named_parameters()})
        return base | {key: read(p) for key, p in heads.items()}

    gradients = in_our_names(lambda p: p.grad)
    figures[f"{label}.gradients"] = max(error(p.grad, gradients[k]) for k, p in ours.named_parameters())
    optimiser.step()
    own.step()
    weights = in_our_names(lambda p: p.detach())
    figures[f"{label}.step"] = max(error(p, weights[k]) for k, p in ours.named_parameters())
    return figures


class GPVAEBase(nn.Module):
    """Their GP-VAE as a base for their wrapper: a sample's reconstruction, and the posterior's mean as (b, t, d)."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.backbone.encode(x)
        return self.backbone.decode(posterior.rsample()).mean, posterior.mean.transpose(1, 2)


def whole_gpvae(
    authors: types.SimpleNamespace, dtype: torch.dtype, align: str, sizes: dict[str, Any], data: dict[str, Tensor]
) -> types.SimpleNamespace:
    """The whole objective on GP-VAE, put together from their parts: GP-VAE, its divergence from its prior, the local
    loss and the wrapper of ``Glocal_IB``, with the weights 1, 1e-6 and 1 of their command line; and ours."""
    ours_align = {"cos_align": "cosine", "contrastive": "contrastive"}[align]
    own = {"local_loss": "mae", "hidden_weight": 1.0, "kl_weight": 1e-6}
    theirs, ours = gpvae_pair(authors, dtype, sizes, alignment=ours_align, project_target=False, **own)
    backbone = theirs.backbone
    wrapper = authors.wrapper(GPVAEBase(backbone), sizes["latent_dim"], align).to(dtype).train()
    ours.projector.load_state_dict(wrapper.projection.state_dict())
    noise = torch.randn(len(data["x"]), sizes["latent_dim"], sizes["time_length"], dtype=torch.float64)
    data = {key: value.to(dtype) for key, value in data.items()}
    with fixed_noise(noise, ours):
        results = wrapper(data["x"], data["target"])
        local = authors.align.PredictionLoss(1, 1, authors.criteria.calc_mae)
        hidden = data["target_mask"] - data["mask"]
        reconstruction, *_ = local(results["output"], data["target"], data["mask"], hidden)
        kl = backbone.kl_divergence(backbone.encode(data["x"]), backbone.prior).sum(1).mean()
        loss = reconstruction + 1e-6 * kl + results["alignment_loss"]
        parts = ours.loss(data)
    return types.SimpleNamespace(
        theirs=theirs, ours=ours, projector=wrapper.projection, noise=noise, kl=kl, loss=loss, parts=parts
    )


def _compare_whole_gpvae(authors: types.SimpleNamespace, dtype: torch.dtype) -> dict[str, float]:
    figures: dict[str, float] = {}
    for align in ("cos_align", "contrastive"):
        torch.manual_seed(7)
        run = whole_gpvae(authors, dtype, align, {**GPVAE, "window_size": GPVAE["time_length"]}, batch(SMALL))
        figures[f"gpvae.{align}.kl"] = error(run.parts["kl"], run.kl)
        figures |= _compare_step(f"gpvae.{align}", run.theirs, run.ours, run.loss, run.parts["loss"], run.projector)
    return figures


def golden(checkout: Path) -> dict[str, Tensor]:
    """Their weights, inputs and outputs in a tiny configuration, for the tests that run without their code."""
    authors = load(checkout)
    sizes = {"n_steps": 12, "n_features": 3, "d_model": 8, "d_ffn": 6}
    data = batch({**SMALL, **sizes}, windows=2, seed=3)
    out: dict[str, Tensor] = {f"batch/{k}": v for k, v in data.items()}
    for base in FOLDER:
        heads = {"d_k": 2, "d_v": 2} if base == "saits" else {}
        if base == "timesnet":
            heads["n_kernels"] = 2
        for align in ("contras_1", "contras_2"):
            torch.manual_seed(4)
            model = theirs_model(authors, base, align, **sizes, **heads)
            if align == "contras_1":
                # never called there (calendar embeddings), and by far the largest tensors
                skip = ("enc_embedding.temporal_embedding.",)
                out |= {f"{base}/{k}": v.clone() for k, v in model.state_dict().items() if not k.startswith(skip)}
            results = model.calc_criterion(in_their_keys(data))
            model.zero_grad()
            results["loss"].backward()
            total = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
            out[f"{base}.{align}/loss"], out[f"{base}.{align}/gradient_norm"] = results["loss"].detach(), total
            out[f"{base}/imputed"] = results["imputed_data"].detach()
            out[f"{base}/latent"] = results["X_obs_z_contras"].detach().clone()
    out |= _golden_gpvae(authors, data)
    return {k: v.contiguous() for k, v in out.items()}


def _golden_gpvae(authors: types.SimpleNamespace, data: dict[str, Tensor]) -> dict[str, Tensor]:
    sizes = {"input_dim": 3, "time_length": 12, "latent_dim": 4, "encoder_sizes": (6, 6), "decoder_sizes": (6, 6)}
    sizes |= {"window_size": 12, "beta": 0.2}
    out = {}
    for align in ("cos_align", "contrastive"):
        torch.manual_seed(8)
        run = whole_gpvae(authors, torch.float64, align, sizes, data)
        run.loss.backward()
        parameters = [*run.theirs.parameters(), *run.projector.parameters()]
        out[f"gpvae.{align}/loss"], out[f"gpvae.{align}/kl"] = run.loss.detach(), run.kl.detach()
        out[f"gpvae.{align}/gradient_norm"] = torch.stack([p.grad.norm() for p in parameters]).norm()
    out |= {f"gpvae/{k}": v.float() for k, v in run.theirs.state_dict().items()}
    out |= {f"gpvae.projector/{k}": v.float() for k, v in run.projector.state_dict().items()}
    imputed, latent = run.theirs.backbone.get_emb(data["x"].double(), data["mask"].double())
    out |= {"gpvae/imputed": imputed[:, 0].detach(), "gpvae/latent": latent.transpose(1, 2).detach()}
    out |= {"gpvae.noise": run.noise, "gpvae.kernel": run.theirs.backbone.prior.covariance_matrix[0].float()}
    for label, samples in (("M", {"M": 6}), ("K", {"M": 2, "K": 3})):  # the same weights by their own objective
        torch.manual_seed(8)
        theirs, ours = gpvae_pair(authors, torch.float64, {**sizes, **samples})
        noise = torch.randn(6 * len(data["x"]), sizes["latent_dim"], 12, dtype=torch.float64)
        with fixed_noise(noise, ours):
            loss = theirs.calc_criterion({k: v.double() for k, v in in_their_keys(data).items()})["loss"]
        out[f"gpvae.own.{label}/loss"], out[f"gpvae.own.{label}/noise"] = loss.detach(), noise
    return out


def speed(checkout: Path | None, device: str = "cpu") -> dict[str, dict]:
    """A training step (batch 32, 96 steps, 7 channels, d_model 256, dropout 0.1), ours and theirs in turn, median.

    ``train_step`` is SAITS, ``train_step_gpvae`` a plain GP-VAE by its own objective, which theirs can run. Rows ending
    in ``_fault`` restore the authors' fault in ours too: their first layers run forward but get no gradient, and ours
    leaves them out; without it ours trains every layer.
    """
    authors = load(checkout) if checkout else None
    sizes = {"n_steps": 96, "n_features": 7, "d_model": 256, "d_ffn": 128}
    rows = {
        "train_step": ("saits", False),
        "train_step_saits_fault": ("saits", True),
        "train_step_timesnet": ("timesnet", False),
        "train_step_timesnet_fault": ("timesnet", True),
        "train_step_dlinear": ("dlinear", False),
        "train_step_tcn": ("tcn", False),
        "train_step_gpvae": ("gpvae", False),
    }
    return {row: _speed_row(authors, base, fault, sizes, device) for row, (base, fault) in rows.items()}


def _speed_row(
    authors: types.SimpleNamespace | None, base: str, fault: bool, sizes: dict[str, int], device: str
) -> dict[str, float]:
    data = {k: v.to(device) for k, v in batch({**SMALL, **sizes}, windows=32).items()}
    steps = {}
    if authors is not None:
        changes: dict[str, Any] = {"dropout": 0.1} if base in ("saits", "timesnet", "tcn") else {}
        changes |= {"d_k": 64, "d_v": 64} if base == "saits" else {}
        changes |= {"n_kernels": 5} if base == "timesnet" else {}
        if base == "gpvae":
            names = {
                "input_dim": "n_features",
                "time_length": "n_steps",
                "latent_dim": "d_model",
                "window_size": "n_steps",
            }
            theirs = authors.gpvae(**{key: sizes[name] for key, name in names.items()}, beta=0.2).to(device).train()
        else:
            theirs = theirs_model(authors, base, "contras_2", **sizes, **changes).to(device)
        optimiser = torch.optim.Adam(theirs.parameters(), lr=1e-3)
        given = in_their_keys(data)

        def step_theirs() -> None:
            optimiser.zero_grad()
            theirs.calc_criterion(given)["loss"].backward()
            optimiser.step()

        steps["authors"] = step_theirs
    plain = {"alignment": "none", "local_loss": "gaussian", "hidden_weight": 0.0, "kl_weight": 0.2}
    objective = plain if base == "gpvae" else {}
    ours = GlocalIB(**sizes, base=base, dropout=0.1, authors_layers=fault, **objective).to(device).train()
    own = ours.configure_optimizers()

    def step_ours() -> None:
        own.zero_grad()
        ours.loss(data)["loss"].backward()
        own.step()

    steps["ours"] = step_ours
    rounds = 50 if device != "cpu" else 2 if base in ("timesnet", "gpvae") else 11
    return in_turns(steps, device, rounds)
