"""GlocalIB: equal to the authors' tensors, equations against slow twins, and what users may do wrong."""

import math
from pathlib import Path

import lightning
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from zoo.core import ZooError
from zoo.tabular.timeseries.bases import (
    BASES,
    GPVAE,
    SAITS,
    DLinear,
    Imputation,
    Inception,
    Posterior,
    TimesBlock,
    cauchy_kernel,
    sinusoids,
    whitening,
)
from zoo.tabular.timeseries.data_imputation import TimeSeriesImputationDataModule
from zoo.tabular.timeseries.glocal_ib import (
    GlocalIB,
    Standardiser,
    contrastive_alignment,
    cosine_alignment,
    foundation_target,
    gaussian_error,
    importance_weighted_error,
    local_loss,
    masked_error,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "glocal_ib.safetensors"
TINY = {**GlocalIB.variants["tiny"], "n_features": 3, "n_steps": 12}


def a_batch(b: int = 3, t: int = 12, n: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(b, t, n, generator=draw)
    known = torch.rand(b, t, n, generator=draw) < 0.7
    seen = known & (torch.rand(b, t, n, generator=draw) < 0.7)
    return {"x": values * seen, "mask": seen.float(), "target": values * known, "target_mask": known.float()}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().abs().max() / b.detach().abs().max())


# ---- the authors' numbers -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN)


def from_golden(golden: dict[str, torch.Tensor], base: str, **changes: object) -> GlocalIB:
    theirs = {k.removeprefix(f"{base}/"): v for k, v in golden.items() if k.startswith(f"{base}/")}
    hparams, state = GlocalIB.convert_state_dict({k: v for k, v in theirs.items() if k not in ("imputed", "latent")})
    assert hparams["n_features"] == 3 and hparams["base"] == base
    hparams |= {"dropout": 0.0, "n_steps": 12, **changes}
    model = GlocalIB(**hparams)
    model.load_state_dict(state)
    return model.train()


@pytest.mark.parametrize("base", [base for base in BASES if base != "gpvae"])
def test_equal_to_the_authors_forward_loss_and_gradient(golden, base):
    batch = {k.removeprefix("batch/"): v for k, v in golden.items() if k.startswith("batch/")}
    for theirs, ours in (("contras_1", "contrastive"), ("contras_2", "cosine")):
        model = from_golden(golden, base, alignment=ours)
        parts = model.loss(batch)
        assert relative(parts["loss"], golden[f"{base}.{theirs}/loss"]) < 1e-5
        parts["loss"].backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        assert relative(norm, golden[f"{base}.{theirs}/gradient_norm"]) < 1e-5
        assert relative(model(batch["x"], batch["mask"]), golden[f"{base}/imputed"]) < 1e-5
        assert relative(model.encode(batch["x"], batch["mask"]), golden[f"{base}/latent"]) < 1e-5


def golden_gpvae(golden: dict[str, torch.Tensor], **changes: object) -> GlocalIB:
    """In double precision, with the authors' kernel, which they round to float32."""
    theirs = {k.removeprefix("gpvae/"): v for k, v in golden.items() if k.startswith("gpvae/")}
    hparams, state = GlocalIB.convert_state_dict({k: v for k, v in theirs.items() if k not in ("imputed", "latent")})
    assert hparams["alignment"] == "none" and hparams["local_loss"] == "gaussian" and hparams["kl_weight"] == 0.2
    model = GlocalIB(**{**hparams, "n_steps": 12, **changes})
    state |= {k.replace("gpvae.projector/", "projector."): v for k, v in golden.items() if "gpvae.projector/" in k}
    known = model.state_dict()
    model.load_state_dict({k: v for k, v in state.items() if k in known})
    model.double().train()
    model.base.whiten = whitening(golden["gpvae.kernel"].double())[None]
    return model


def with_noise(model: GlocalIB, noise: torch.Tensor) -> GlocalIB:
    """Draws the latents with this noise, (samples * b, d, t) as the authors' code lays it out."""
    model.base.noise = lambda like: noise.unflatten(0, (-1, len(like))).transpose(-1, -2)
    return model


@pytest.mark.parametrize(("theirs", "ours"), [("cos_align", "cosine"), ("contrastive", "contrastive")])
def test_gpvae_is_equal_to_the_authors_forward_loss_and_gradient(golden, theirs, ours):
    batch = {k.removeprefix("batch/"): v.double() for k, v in golden.items() if k.startswith("batch/")}
    weights = {"local_loss": "mae", "hidden_weight": 1.0, "kl_weight": 1e-6}
    model = golden_gpvae(golden, alignment=ours, project_target=False, **weights)
    parts = with_noise(model, golden["gpvae.noise"]).loss(batch)
    assert relative(parts["kl"], golden[f"gpvae.{theirs}/kl"]) < 1e-5
    assert relative(parts["loss"], golden[f"gpvae.{theirs}/loss"]) < 1e-5
    parts["loss"].backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert relative(norm, golden[f"gpvae.{theirs}/gradient_norm"]) < 1e-5
    model.eval()
    assert relative(model(batch["x"], batch["mask"]), golden["gpvae/imputed"]) < 1e-5
    assert relative(model.encode(batch["x"], batch["mask"]), golden["gpvae/latent"]) < 1e-5


@pytest.mark.parametrize(("row", "m", "k"), [("M", 6, 1), ("K", 2, 3)])
def test_plain_gpvae_is_equal_to_the_authors_bound(golden, row, m, k):
    batch = {k.removeprefix("batch/"): v.double() for k, v in golden.items() if k.startswith("batch/")}
    model = golden_gpvae(golden, elbo_samples=m, importance_samples=k)
    loss = with_noise(model, golden[f"gpvae.own.{row}/noise"]).loss(batch)["loss"]
    assert relative(loss, golden[f"gpvae.own.{row}/loss"]) < 1e-5


def test_kernel_is_the_authors(golden):
    assert relative(cauchy_kernel(12, 7.0), golden["gpvae.kernel"].double()) < 1e-6


@pytest.mark.parametrize("base", ["saits", "timesnet"])
def test_the_authors_fault_makes_a_difference_and_only_the_last_layer_counts(golden, base):
    batch = {k.removeprefix("batch/"): v for k, v in golden.items() if k.startswith("batch/")}
    fixed = from_golden(golden, base, authors_layers=False)
    assert relative(fixed.encode(batch["x"], batch["mask"]), golden[f"{base}/latent"]) > 1e-2
    faulty = from_golden(golden, base, authors_layers=True)
    before = faulty.encode(batch["x"], batch["mask"])
    layer = faulty.base.first[0] if base == "saits" else faulty.base.blocks[0]
    for model, moved in ((faulty, False), (fixed, True)):
        layer = model.base.first[0] if base == "saits" else model.base.blocks[0]
        start = model.encode(batch["x"], batch["mask"]) if moved else before
        with torch.no_grad():
            for p in layer.parameters():
                p.add_(0.3 * torch.randn_like(p))
        assert torch.equal(model.encode(batch["x"], batch["mask"]), start) is not moved


def test_an_unknown_checkpoint_is_refused(golden):
    theirs = {k.removeprefix("tcn/"): v for k, v in golden.items() if k.startswith("tcn/")}
    theirs = {k: v for k, v in theirs.items() if k not in ("imputed", "latent")}
    with pytest.raises(ZooError, match="1 keys of the checkpoint are unknown"):
        GlocalIB.convert_state_dict({**theirs, "surprise": torch.zeros(1)})
    with pytest.raises(ZooError, match="has no"):
        GlocalIB.convert_state_dict({k: v for k, v in theirs.items() if k != "output_projection.bias"})
    plain = {k: v for k, v in theirs.items() if not k.startswith("contrastive")}
    assert GlocalIB.convert_state_dict(plain)[0]["alignment"] == "none"  # PyPOTS' own TCN
    theirs = {k.removeprefix("gpvae/"): v for k, v in golden.items() if k.startswith("gpvae/backbone")}
    deeper = {"backbone.decoder.net.6.weight": torch.zeros(3, 3), "backbone.decoder.net.6.bias": torch.zeros(3)}
    with pytest.raises(ZooError, match="2 hidden layers in the encoder, 3 in the decoder"):
        GlocalIB.convert_state_dict(theirs | deeper)


# ---- equations against slow twins -----------------------------------------------------------------------------------


def test_masked_error_by_hand():
    p, t = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([0.0, 4.0, 9.0])
    mask = torch.tensor([1.0, 1.0, 0.0])
    assert float(masked_error(p, t, mask, "mae")) == pytest.approx(1.5)
    assert float(masked_error(p, t, mask, "mse")) == pytest.approx(2.5)
    assert float(masked_error(p, t, torch.zeros(3))) == 0.0  # nothing to score is no loss, not NaN


def test_local_loss_against_loops():
    batch = a_batch()
    r = [torch.randn_like(batch["x"]) for _ in range(3)]
    hidden = batch["target_mask"] * (1 - batch["mask"])
    got = local_loss(Imputation(r[2], r[0], (r[0], r[1])), batch["x"], batch["mask"], batch["target"], hidden, 2.0, 3.0)
    seen, unseen = [0.0] * 3, 0.0
    for i in torch.cartesian_prod(*(torch.arange(s) for s in batch["x"].shape)).tolist():
        i = tuple(i)
        if batch["mask"][i]:
            for j in range(3):
                seen[j] += abs(float(r[j][i] - batch["target"][i]))
        elif batch["target_mask"][i]:
            unseen += abs(float(r[2][i] - batch["target"][i]))
    expected = 2 * sum(s / float(batch["mask"].sum()) for s in seen) / 3 + 3 * unseen / float(hidden.sum())
    assert float(got) == pytest.approx(expected, rel=1e-5)


def test_cosine_alignment_against_loops_and_limits():
    a, b = torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64)
    time = [float(a[i, :, k] @ b[i, :, k] / a[i, :, k].norm() / b[i, :, k].norm()) for i in range(2) for k in range(3)]
    width = [float(a[i, j] @ b[i, j] / a[i, j].norm() / b[i, j].norm()) for i in range(2) for j in range(5)]
    assert float(cosine_alignment(a, b)) == pytest.approx(1 - sum(time) / 6, abs=1e-12)
    assert float(cosine_alignment(a, b, dim=-1)) == pytest.approx(1 - sum(width) / 10, abs=1e-12)
    assert float(cosine_alignment(a, 3 * a)) == pytest.approx(0, abs=1e-9)
    assert float(cosine_alignment(a, -a)) == pytest.approx(2, abs=1e-9)


def test_contrastive_alignment_against_loops():
    a, b = torch.randn(2, 4, 3, dtype=torch.float64), torch.randn(2, 4, 3, dtype=torch.float64)
    total = 0.0
    for i in range(2):
        for step in range(4):  # the step of the target; the student's steps compete
            scores = [float(a[i, s] @ b[i, step] / a[i, s].norm() / b[i, step].norm()) for s in range(4)]
            total -= scores[step] - math.log(sum(math.exp(s) for s in scores))
    assert float(contrastive_alignment(a, b)) == pytest.approx(total / 8, abs=1e-12)
    # constant over time: nothing tells the steps apart
    flat = torch.ones(2, 4, 3)
    assert float(contrastive_alignment(flat, flat)) == pytest.approx(math.log(4), abs=1e-6)


@pytest.mark.parametrize("loss", [cosine_alignment, contrastive_alignment])
def test_no_gradient_reaches_the_target(loss):
    a, b = torch.randn(2, 4, 3, requires_grad=True), torch.randn(2, 4, 3, requires_grad=True)
    loss(a, b).backward()
    assert a.grad is not None and b.grad is None


def test_saits_against_a_slow_twin():
    torch.manual_seed(0)
    net = SAITS(3, 6, 8, 2, 2, 5, 0.0).double()
    batch = {k: v.double() for k, v in a_batch(2, 6, 3).items()}
    x, m = batch["x"], batch["mask"]

    def layer(block, h, want_map=False):
        q, k, v = block.qkv(h).chunk(3, dim=-1)
        out, maps = torch.zeros_like(h), torch.zeros(2, 6, 6, dtype=h.dtype)
        for i in range(2):
            for head in range(2):
                part = slice(4 * head, 4 * head + 4)
                for t in range(6):
                    others = [s for s in range(6) if s != t]
                    score = torch.stack([q[i, t, part] @ k[i, s, part] / 2 for s in others]).softmax(0)
                    for weight, s in zip(score, others, strict=True):
                        out[i, t, part] += weight * v[i, s, part]
                        maps[i, t, s] += weight / 2
        h = block.norm_1(h + block.project(out))
        h = block.norm_2(h + block.down(F.relu(block.up(h))))
        return (h, maps) if want_map else h

    z = net.input_1(torch.cat([x, m], 2)) + net.positions
    for block in net.first:
        z = layer(block, z)
    one = net.output_1(z)
    h = net.input_2(torch.cat([m * x + (1 - m) * one, m], 2)) + net.positions
    h = layer(net.second[0], h)
    h, maps = layer(net.second[1], h, want_map=True)
    two = net.output_3(F.relu(net.output_2(h)))
    eta = torch.sigmoid(net.output_mix(torch.cat([m, maps], 2)))
    got = net(x, m)
    assert torch.allclose(got.latent, z, atol=1e-10)
    assert torch.allclose(got.reconstruction, (1 - eta) * two + eta * one, atol=1e-10)


def test_positions_are_the_transformers():
    table = sinusoids(5, 6)
    for t in range(5):
        for k in range(3):
            angle = t / 10000 ** (2 * k / 6)
            assert float(table[t, 2 * k]) == pytest.approx(math.sin(angle), abs=1e-6)
            assert float(table[t, 2 * k + 1]) == pytest.approx(math.cos(angle), abs=1e-6)


def test_merged_inception_is_the_mean_of_its_convolutions():
    torch.manual_seed(0)
    net = Inception(3, 4, 3).double()
    for conv in net.kernels:
        nn.init.normal_(conv.bias)
    x = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    assert torch.allclose(net(x), sum(conv(x) for conv in net.kernels) / 3, atol=1e-12)


def test_times_block_against_a_slow_twin():
    torch.manual_seed(0)
    net = TimesBlock(4, 3, 2, 2).double()
    x = torch.randn(2, 10, 4, dtype=torch.float64)
    spectrum = torch.fft.rfft(x, dim=1).abs()
    strength = spectrum.mean((0, 2))
    strength[0] = 0
    top = sorted(range(6), key=lambda i: -strength[i])[:2]
    answers = []
    for f in top:
        period = 10 // f
        rows = -(-10 // period)
        padded = torch.cat([x, torch.zeros(2, rows * period - 10, 4, dtype=x.dtype)], 1)
        picture = torch.zeros(2, 4, rows, period, dtype=x.dtype)
        for r in range(rows):
            for c in range(period):
                picture[:, :, r, c] = padded[:, r * period + c]
        y = net.conv(picture)
        answers.append(torch.stack([y[:, :, i // period, i % period] for i in range(10)], 1))
    weight = spectrum.mean(-1)[:, top].softmax(1)
    expected = x + sum(answers[i] * weight[:, i, None, None] for i in range(2))
    assert torch.allclose(net(x), expected, atol=1e-10)


@pytest.mark.parametrize("individual", [False, True])
def test_dlinear_parts_add_up(individual):
    net = DLinear(2, 6, 4, 3, individual)
    x, m = torch.randn(2, 6, 2), torch.ones(2, 6, 2)
    padded = torch.cat([x[:, :1], x, x[:, -1:]], 1)
    trend = torch.stack([padded[:, i : i + 3].mean(1) for i in range(6)], 1)
    parts = []
    for name, part in (("seasonal", x - trend), ("trend", trend)):
        weight, bias = getattr(net, f"time_{name}"), getattr(net, f"bias_{name}")
        if individual:
            mapped = [weight[n] @ part[:, :, n].T + bias[n][:, None] for n in range(2)]
            parts.append(torch.stack(mapped, -1).transpose(0, 1))
        else:
            h = getattr(net, f"input_{name}")(torch.cat([part, m], 2))
            h = torch.einsum("ts,bsd->btd", weight, h) + bias[:, None]
            parts.append(getattr(net, f"output_{name}")(h))
    assert torch.allclose(net(x, m).reconstruction, sum(parts), atol=1e-5)


def test_cauchy_kernel_by_hand():
    expected = torch.tensor([[1.001, 0.8, 0.5], [0.8, 1.001, 0.8], [0.5, 0.8, 1.001]], dtype=torch.float64)
    assert torch.allclose(cauchy_kernel(3, 2.0), expected, atol=1e-12)
    assert float(cauchy_kernel(3, 2.0, sigma=2.0)[0, 1]) == pytest.approx(1.6)
    assert float(cauchy_kernel(3, 2.0, sigma=2.0)[0, 0]) == pytest.approx(2.001)


def test_whitening_makes_steps_independent():
    kernel = cauchy_kernel(20, 7.0)
    w = whitening(kernel)
    assert torch.equal(w, w.tril())
    assert torch.allclose(w @ kernel @ w.T, torch.eye(20, dtype=torch.float64), atol=1e-9)


def test_divergence_by_hand():
    """B = [[2, 1], [0, 1]], K = 1, m = (1, 2): the covariance is [[1, -1], [-1, 5]] / 4, its determinant 1 / 4."""
    net = GPVAE(1, 2, 1, 1, 3)
    net.whiten = torch.eye(2)[None]
    q = Posterior(torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[2.0], [1.0]]]), torch.tensor([[[1.0]]]))
    assert float(net.divergence(q)) == pytest.approx(0.5 * (1.5 + 5 - 2 + math.log(4)), rel=1e-6)
    prior = Posterior(torch.zeros(1, 2, 1), torch.ones(1, 2, 1), torch.zeros(1, 1, 1))
    assert float(net.divergence(prior)) == pytest.approx(0, abs=1e-6)


def test_gpvae_against_dense_gaussians():
    """Sampling, densities and divergence against torch's, with dense matrices and two length scales."""
    torch.manual_seed(0)
    net = GPVAE(3, 7, 5, 2, 6, window=4, kernel_scales=2, elbo_samples=2).double()
    net.whiten = torch.stack([whitening(cauchy_kernel(7, scale)) for scale in (7.0, 3.5)])
    q = Posterior(*(part.detach() for part in net.posterior(torch.randn(4, 7, 3, dtype=torch.float64))))
    dense = torch.zeros(4, 5, 7, 7, dtype=torch.float64)
    for i in range(7):
        dense[..., i, i] = q.diagonal[:, i]
        if i < 6:
            dense[..., i, i + 1] = q.above[:, i]
    assert float(q.diagonal.min()) > 1 and float(q.above.min()) > 0
    root = torch.linalg.inv(dense).transpose(-1, -2)
    theirs = torch.distributions.MultivariateNormal(q.mean.transpose(1, 2), scale_tril=root)
    kernels = torch.stack([cauchy_kernel(7, scale) for scale in (7.0, 7.0, 7.0, 3.5, 3.5)])
    prior = torch.distributions.MultivariateNormal(torch.zeros(5, 7, dtype=torch.float64), kernels)
    expected = torch.distributions.kl_divergence(theirs, prior).sum(1)
    assert torch.allclose(net.divergence(q), expected, rtol=1e-9)
    noise = net.noise(q.mean)
    z = q.sample(noise)
    flat = z.transpose(-1, -2)  # (2, 4, 5, 7)
    assert torch.allclose(flat, theirs.loc + torch.einsum("bdij,sbdj->sbdi", root, noise.transpose(-1, -2)), atol=1e-10)
    ratio = (theirs.log_prob(flat) - prior.log_prob(flat)).sum(-1)
    assert noise.shape == (2, 4, 7, 5) and torch.allclose(net.log_ratio(q, z, noise), ratio, rtol=1e-9)


def test_importance_weighted_error_against_loops():
    batch = a_batch(2)
    answers = [torch.randn_like(batch["x"]) for _ in range(6)]
    imputed = Imputation(answers[5], answers[0], tuple(answers[:5]), log_ratio=torch.randn(6, 2))
    total = bound = 0.0
    for group in range(2):
        for b in range(2):
            logs = []
            for k in range(3):
                i = 3 * group + k
                seen = batch["mask"][b] > 0
                off = (answers[i][b] - batch["x"][b])[seen]
                likelihood = sum(-0.5 * float(v) ** 2 - 0.5 * math.log(2 * math.pi) for v in off)
                logs.append(likelihood - float(imputed.log_ratio[i, b]))
            total -= math.log(sum(math.exp(v - max(logs)) for v in logs)) + max(logs)
            bound -= sum(logs) / 3
    got = float(importance_weighted_error(imputed, batch["x"], batch["mask"], 3))
    assert got == pytest.approx(total / 4, rel=1e-5)
    assert got + math.log(3) < bound / 4  # the log of a mean is above the mean of the logs
    one = gaussian_error(answers[0], batch["x"], batch["mask"])
    assert float(masked_error(answers[0], batch["x"], batch["mask"], "gaussian")) == pytest.approx(float(one.mean()))


def test_compactness_has_its_weight_and_only_where_there_is_a_prior():
    torch.manual_seed(0)
    model = GlocalIB(**{**TINY, "base": "gpvae", "kl_weight": 0.25, "align_weight": 2.0, "local_weight": 3.0})
    parts = model.loss(a_batch())
    expected = 3 * parts["local"] + 0.25 * parts["kl"] + 2 * parts["alignment"]
    assert float(parts["loss"].detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert "kl" not in GlocalIB(**TINY).loss(a_batch())
    bound = {"local_loss": "gaussian", "importance_samples": 2, "elbo_samples": 2, "hidden_weight": 0.0}
    model = GlocalIB(**{**TINY, "base": "gpvae", "alignment": "none", **bound})
    assert set(model.loss(a_batch())) == {"loss", "local"}  # the divergence is inside the bound
    assert torch.equal(model.eval().loss(a_batch())["loss"], model.loss(a_batch())["loss"])  # no draws, no bound


def test_gpvae_draws_in_training_and_answers_by_the_mean():
    torch.manual_seed(0)
    model, batch = GlocalIB(**{**TINY, "base": "gpvae", "elbo_samples": 3}), a_batch()
    drawn = model.run_base(batch["x"], batch["mask"])
    assert len(drawn.partial) == 2 and not torch.equal(drawn.partial[0], drawn.reconstruction)
    assert torch.equal(drawn.latent, model.encode(batch["x"], batch["mask"]))
    model.eval()
    assert torch.equal(model.predict(batch["x"], batch["mask"]), model.predict(batch["x"], batch["mask"]))
    answer = model.run_base(batch["x"], batch["mask"])
    assert answer.kl is None and torch.equal(answer.reconstruction, model.base.decode(drawn.latent))


def test_divergence_is_no_work_for_half_precision():
    torch.manual_seed(0)
    model, batch = GlocalIB(**{**TINY, "base": "gpvae"}), a_batch()
    whole = model.loss(batch)["kl"]
    with torch.autocast("cpu", torch.bfloat16):
        half = model.loss(batch)["kl"]
    assert half.dtype == torch.float32 and float(half.detach()) == pytest.approx(float(whole.detach()), rel=0.05)


# ---- invariants -----------------------------------------------------------------------------------------------------


def test_no_step_of_one_attention_layer_sees_itself():
    net = SAITS(2, 6, 8, 1, 2, 4, 0.0)
    layer, h = net.first[0], torch.randn(1, 6, 8)
    _, maps = layer(h, net.allowed, need_map=True)
    assert float(maps[0].detach().diagonal().abs().max()) == 0.0
    assert torch.allclose(maps.sum(-1), torch.ones(1, 6), atol=1e-6)
    with_map, _ = layer(h, net.allowed, need_map=True)
    without, _ = layer(h, net.allowed)
    assert torch.allclose(with_map, without, atol=1e-6)  # fused attention gives the same


def test_tcn_looks_only_back():
    torch.manual_seed(0)
    model = GlocalIB(**{**TINY, "base": "tcn", "n_layers": 3}).eval()
    batch = a_batch(1)
    later = batch["x"].clone()
    later[:, 8:] += 1
    a, b = model.encode(batch["x"], batch["mask"]), model.encode(later, batch["mask"])
    assert torch.equal(a[:, :8], b[:, :8]) and not torch.equal(a[:, 8:], b[:, 8:])


@pytest.mark.parametrize("base", BASES)
def test_observed_values_stay_and_hidden_ones_have_no_influence(base):
    torch.manual_seed(0)
    model = GlocalIB(**{**TINY, "base": base}).eval()
    model.scaler.set(torch.tensor([5.0, -3.0, 0.0]), torch.tensor([2.0, 10.0, 1.0]))
    batch = a_batch()
    with torch.no_grad():
        out = model(batch["x"], batch["mask"])
        noise = batch["x"] + 1000 * (1 - batch["mask"])
        assert torch.equal(out, model(noise, batch["mask"]))
    assert torch.equal(out[batch["mask"] > 0], batch["x"][batch["mask"] > 0])


@pytest.mark.parametrize("base", BASES)
def test_training_target_leaks_nothing_that_is_unknown(base):
    """Values that the target does not know change no loss: true test values can never enter."""
    torch.manual_seed(0)
    model = GlocalIB(**{**TINY, "base": base, "dropout": 0.0})
    batch = a_batch()
    changed = {**batch, "target": batch["target"] + 100 * (1 - batch["target_mask"])}
    losses = []
    for either in (batch, changed):
        torch.manual_seed(1)  # GP-VAE draws its latent
        losses.append(model.loss(either)["loss"])
    assert torch.equal(*losses)


@settings(max_examples=20, deadline=None)
@given(shift=st.floats(-50, 50), scale=st.floats(0.1, 50))
def test_units_do_not_matter(shift, scale):
    """After fitting the standardisation, a change of units changes the answer by just that."""
    torch.manual_seed(0)
    model = GlocalIB(**{**TINY, "dropout": 0.0}).eval()
    batch = a_batch()
    model.fit_scaler([batch])
    first = model.predict(batch["x"], batch["mask"])
    other = {**batch, "target": batch["target"] * scale + shift}
    model.fit_scaler([other])
    second = model.predict(batch["x"] * scale + shift, batch["mask"])
    assert torch.allclose(second, first * scale + shift, atol=1e-3 * scale + 1e-4 * abs(shift))


def test_mask_of_the_complete_pass():
    model = GlocalIB(**{**TINY, "dropout": 0.0})
    batch = a_batch()
    losses = {}
    for kind in ("ones", "known", "same"):
        model.hparams["complete_mask"] = kind
        losses[kind] = float(model.loss(batch)["alignment"].detach())
    assert len(set(losses.values())) == 3
    full = {**batch, "target_mask": torch.ones_like(batch["mask"])}
    model.hparams["complete_mask"] = "ones"
    expected = float(model.loss(full)["alignment"].detach())
    model.hparams["complete_mask"] = "known"
    assert float(model.loss(full)["alignment"].detach()) == pytest.approx(expected, abs=1e-6)


def test_no_alignment_is_the_plain_base():
    torch.manual_seed(0)
    plain = GlocalIB(**{**TINY, "alignment": "none", "dropout": 0.0})
    aligned = GlocalIB(**{**TINY, "align_weight": 0.0, "dropout": 0.0})
    assert not hasattr(plain, "projector")
    aligned.load_state_dict({**aligned.state_dict(), **plain.state_dict()})
    batch = a_batch()
    assert torch.equal(plain.loss(batch)["loss"], aligned.loss(batch)["loss"])
    assert set(plain.loss(batch)) == {"loss", "local"}


@pytest.mark.parametrize("alignment", ["cosine", "contrastive"])
@pytest.mark.parametrize("base", BASES)
def test_a_plain_loop_lowers_the_loss_and_reaches_every_weight(base, alignment):
    torch.manual_seed(0)
    model = GlocalIB(**{**TINY, "base": base, "alignment": alignment, "dropout": 0.0, "lr": 1e-2})
    batch = a_batch(4)
    optimiser = model.configure_optimizers()
    losses = []
    for _ in range(80 if base == "dlinear" else 15):  # all of DLinear's steps start equal: slow to break
        optimiser.zero_grad()
        loss = model.loss(batch)["loss"]
        loss.backward()
        if not losses:
            assert [name for name, p in model.named_parameters() if p.grad is None] == []
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0]


# ---- one's own base, foundation models ------------------------------------------------------------------------------


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x, mask):
        z = torch.tanh(self.a(torch.cat([x, mask], -1)))
        return self.b(z), z


def test_a_live_base_trains_and_its_weights_load_again():
    model = GlocalIB.from_backbone(Own(), n_features=3, n_steps=12, d_model=8)
    model.loss(a_batch())["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())
    again = GlocalIB.from_backbone(Own(), n_features=3, n_steps=12, d_model=8)
    again.load_state_dict(model.state_dict())
    batch = a_batch()
    assert torch.equal(again.predict(batch["x"], batch["mask"]), model.predict(batch["x"], batch["mask"]))
    with pytest.raises(ZooError, match="from_backbone"):
        GlocalIB(**{**TINY, "base": "custom"}).predict(torch.zeros(1, 12, 3))


def test_a_live_foundation_model_is_frozen_and_gives_the_target():
    class Ramp(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return self.w * x.cumsum(1)[..., :2]

    model = GlocalIB.from_backbone(foundation=Ramp(), foundation_dim=2, **{**TINY, "dropout": 0.0}).train()
    assert not model.backbone.training and not model.backbone.w.requires_grad
    batch = a_batch()
    parts = model.loss(batch)
    student = model.projector(model.encode(batch["x"], batch["mask"]))
    goal = batch["target"].cumsum(1)[..., :2]
    assert float(parts["alignment"].detach()) == pytest.approx(
        float(cosine_alignment(student, goal).detach()), abs=1e-6
    )


def test_a_foundation_model_by_config_reads_patches_and_channels():
    patches = {"model_type": "patchtst", "num_input_channels": 3, "context_length": 12, "patch_length": 4}
    patches |= {"patch_stride": 4, "d_model": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 8}
    model = GlocalIB(**TINY, alignment="foundation", backbone=patches, foundation_output="hidden")
    x = torch.randn(2, 12, 3)
    hidden = model.backbone(past_values=x).last_hidden_state  # (2, 3 channels, 3 patches, 8)
    target = foundation_target(model.backbone, x, "hidden")
    assert hidden.shape == (2, 3, 3, 8) and target.shape == (2, 12, 8)
    expected = F.interpolate(hidden.mean(1).transpose(1, 2), size=12, mode="linear").transpose(1, 2)
    assert torch.allclose(target, expected)
    model.loss(a_batch())["loss"].backward()
    assert all(p.grad is None for p in model.backbone.parameters())
    assert any(key.startswith("backbone.") for key in model.saved_state_dict())


def test_generate_reads_the_values_of_a_step_as_a_sequence():
    class Next(nn.Module):
        def generate(self, x, max_new_tokens):
            return torch.cat([x, x[:, -1:] + torch.arange(1, max_new_tokens + 1)], 1)

    x = torch.randn(2, 5, 3)
    got = foundation_target(Next(), x, "generate")
    assert torch.allclose(got[1, 4], x[1, 4, 2] + torch.tensor([1.0, 2.0, 3.0]))


def test_foundation_alignment_asks_for_a_model():
    with pytest.raises(ValueError, match="needs backbone="):
        GlocalIB(**TINY, alignment="foundation")
    with pytest.raises(ValueError, match="'model_type'"):
        GlocalIB(**TINY, alignment="foundation", backbone={"d_model": 4})
    with pytest.raises(ValueError, match="foundation_dim"):
        GlocalIB(**TINY, alignment="foundation", foundation_output="call")


# ---- standardisation, prediction, errors ----------------------------------------------------------------------------


def test_standardiser_by_hand():
    scaler = Standardiser(2)
    scaler.set(torch.tensor([1.0, 5.0]), torch.tensor([2.0, 0.0]))
    x = torch.tensor([[[3.0, 5.0], [1e9, 6.0]]])
    mask = torch.tensor([[[1.0, 1.0], [0.0, 1.0]]])
    assert torch.equal(scaler(x, mask), torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]))  # a constant channel is centred
    assert torch.equal(scaler.inverse(torch.tensor([[1.0, 2.0]])), torch.tensor([[3.0, 7.0]]))


def test_scaler_fitted_from_batches_is_that_of_the_joined_data():
    model = GlocalIB(**TINY)
    batches = [a_batch(seed=i) for i in range(3)]
    for batch in batches:
        batch["target"] = (batch["target"] * 3 + 1000) * batch["target_mask"]
    model.fit_scaler(batches)
    values, known = (torch.cat([b[k] for b in batches]).double() for k in ("target", "target_mask"))
    for n in range(3):
        column = values[..., n][known[..., n] > 0]
        assert float(model.scaler.mean[n]) == pytest.approx(float(column.mean()), rel=1e-6)
        assert float(model.scaler.std[n]) == pytest.approx(float(column.std(correction=0)), rel=1e-4)
    empty = a_batch()
    empty["target_mask"][..., 1] = 0
    with pytest.raises(ZooError, match=r"Channels \[1\]"):
        model.fit_scaler([empty])
    with pytest.raises(ZooError, match="No training batches"):
        model.fit_scaler([])


def fit(model: GlocalIB, **given: object) -> lightning.Trainer:
    trainer = lightning.Trainer(
        max_epochs=1, limit_train_batches=2, limit_val_batches=1, num_sanity_val_steps=0, accelerator="cpu",
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, **given)
    return trainer


def test_fit_takes_the_scaler_from_the_data_and_it_travels(tmp_path):
    data = TimeSeriesImputationDataModule(rate=0.5, batch_size=64)
    model = GlocalIB.from_variant("tiny")
    trainer = fit(model, datamodule=data)
    mean, std = data.statistics()
    assert torch.equal(model.scaler.mean, mean) and torch.equal(model.scaler.std, std)
    assert {"val/mae", "val/mse", "val/cosine", "train/loss"} <= set(trainer.callback_metrics)
    model.save_pretrained(tmp_path / "saved")
    again = GlocalIB.from_pretrained(tmp_path / "saved")
    x = torch.randn(2, 48, 6)
    x[:, ::3] = math.nan
    assert torch.equal(again.predict(x), model.predict(x))


def test_any_loader_trains_and_the_scaler_is_fitted_from_it():
    rows = [{k: v[0] * 7 + 40 * (k in ("x", "target")) for k, v in a_batch(1, seed=i).items()} for i in range(4)]
    for row in rows:
        for key in ("mask", "target_mask"):
            row[key] = (row[key] > 0).float()
    model = GlocalIB(**TINY)
    fit(model, train_dataloaders=torch.utils.data.DataLoader(rows, batch_size=2))
    assert bool(model.scaler.fitted) and 30 < float(model.scaler.mean.mean()) < 50


def test_metrics_are_exact_over_uneven_batches():
    data = TimeSeriesImputationDataModule(rate=0.5, batch_size=64)
    model = GlocalIB.from_variant("tiny")
    model.scaler.set(*data.statistics())
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    found = trainer.test(model, datamodule=data, verbose=False)[0]
    whole = data.dataset("test").batch(list(range(200)), torch.Generator())
    model.eval()
    with torch.no_grad():
        x, target = model.scaler(whole["x"], whole["mask"]), model.scaler(whole["target"], whole["target_mask"])
        out = model.run_base(x, whole["mask"])
        complete = model.encode(target, torch.ones_like(x))
    hidden = whole["mask"] == 0
    off = (out.reconstruction - target)[hidden]
    assert found["test/mae"] == pytest.approx(float(off.abs().mean()), rel=1e-5)
    assert found["test/mse"] == pytest.approx(float(off.square().mean()), rel=1e-5)
    assert found["test/cosine"] == pytest.approx(
        float(F.cosine_similarity(out.latent, complete, dim=1).mean()), rel=1e-5
    )


@pytest.mark.parametrize("length", [1, 5, 12, 13, 30, 36])
def test_predict_takes_series_of_any_length(length):
    torch.manual_seed(0)
    model = GlocalIB(**TINY)
    x = torch.randn(2, length, 3)
    x[torch.rand(x.shape) < 0.4] = math.nan
    out = model.predict(x)
    assert out.shape == x.shape and bool(out.isfinite().all())
    assert torch.equal(out[~x.isnan()], x[~x.isnan()])
    if length >= 12:  # the first window is as if it stood alone
        assert torch.allclose(out[:, :12], model.predict(x[:, :12]), atol=1e-6)
    if length == 30:  # windows at 0, 12 and, flush with the end, 18
        assert torch.allclose(out[:, 24:], model.predict(x[:, 18:])[:, 6:], atol=1e-6)


def test_predict_and_predict_step_agree_and_restore_the_mode():
    model = GlocalIB(**TINY).train()
    batch = a_batch()
    out = model.predict_step({**batch, "name": ["a", "b", "c"]}, 0)
    assert out["name"] == ["a", "b", "c"] and model.training
    assert torch.equal(out["imputed"], model.predict(batch["x"], batch["mask"]))
    holes = torch.where(batch["mask"] > 0, batch["x"], torch.full_like(batch["x"], math.nan))
    assert torch.equal(out["imputed"], model.predict(holes))


def test_wrong_input_is_one_clear_error():
    model = GlocalIB(**TINY)
    x, mask = torch.zeros(2, 12, 3), torch.ones(2, 12, 3)
    with pytest.raises(ValueError, match="3 channels"):
        model.predict(torch.zeros(2, 12, 4))
    with pytest.raises(ValueError, match="batch >= 1"):
        model.predict(x[:0])
    with pytest.raises(ValueError, match="'mask' has shape"):
        model.predict(x, mask[:1])
    with pytest.raises(ValueError, match="infinite"):
        model.predict(torch.full((2, 12, 3), math.inf))
    with pytest.raises(ValueError, match=r"12 steps, 3 channels.*any length"):
        model(torch.zeros(2, 10, 3), torch.ones(2, 10, 3))
    with pytest.raises(ValueError, match="must be equal"):
        model(x, mask[:, :, :1])


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"base": "lstm"}, "base='lstm'; choose one of 'saits'"),
        ({"alignment": "cos"}, "alignment='cos'"),
        ({"local_loss": "huber"}, "local_loss"),
        ({"complete_mask": "none"}, "complete_mask"),
        ({"cosine_dim": 0}, "cosine_dim=0"),
        ({"n_steps": 1}, "2 steps"),
        ({"n_heads": 3}, "multiple of n_heads=3"),
        ({"d_model": 15}, "odd"),
        ({"base": "timesnet", "top_k": 40}, "top_k=40"),
        ({"base": "dlinear", "moving_average": 4}, "moving_average=4"),
        ({"base": "gpvae", "length_scale": 0.0}, "length_scale=0.0"),
        ({"base": "gpvae", "kernel_scales": 17}, "kernel_scales=17"),
        ({"base": "gpvae", "window": 13}, "window=13"),
        ({"base": "gpvae", "elbo_samples": 0}, "elbo_samples=0"),
        ({"base": "gpvae", "importance_samples": 2}, "weighs likelihoods"),
    ],
)
def test_wrong_hyperparameters_are_refused(wrong, match):
    with pytest.raises(ValueError, match=match):
        GlocalIB(**{**TINY, **wrong})


def test_other_channels_take_a_new_head_and_keep_the_rest(tmp_path):
    model = GlocalIB(**TINY)
    model.save_pretrained(tmp_path / "saved")
    other = GlocalIB.from_pretrained(tmp_path / "saved", n_features=5)
    assert torch.equal(other.base.first[0].qkv.weight, model.base.first[0].qkv.weight)
    assert torch.equal(other.projector[0].weight, model.projector[0].weight)
    assert other.base.input_1.weight.shape == (16, 10) and not bool(other.scaler.fitted)
    other.loss(a_batch(n=5))["loss"].backward()
    with pytest.raises(ZooError, match="do not fit"):
        GlocalIB.from_pretrained(tmp_path / "saved", d_model=32)
