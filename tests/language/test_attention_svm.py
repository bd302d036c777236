"""AttentionSVM against its authors' recorded runs, scipy's solvers, plain loops, and answers known by hand."""

import math
from pathlib import Path

import lightning
import numpy as np
import pytest
import scipy.optimize
import torch
from safetensors.torch import load_file
from torch import Tensor

from zoo.core import Trainer, ZooError
from zoo.language.theory.attention_svm import (
    AttentionSVM,
    NormalisedGD,
    attend,
    correlation,
    fit_finite,
    fit_svm,
    plot_convergence,
    rank,
    selection_loss,
    softmax,
    value_head,
)
from zoo.language.theory.data_tokens import TokenSelectionDataModule, generate

GOLDEN = Path(__file__).parents[1] / "golden" / "attention_svm.safetensors"


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN)


@pytest.fixture(scope="module")
def data() -> dict[str, Tensor]:
    return generate(4, 3, 4, 6)


def optimal(data: dict[str, Tensor]) -> Tensor:
    return (torch.einsum("bntd,bd->bnt", data["x"], data["v"]) * data["y"][..., None]).argmax(-1)


def constraint_rows(x: Tensor, z: Tensor, ids: Tensor) -> np.ndarray:
    """Every constraint of one problem as a flat matrix, by plain loops."""
    rows = [
        torch.outer(x[i, ids[i]] - x[i, t], z[i]).flatten()
        for i in range(x.shape[0])
        for t in range(x.shape[1])
        if t != ids[i]
    ]
    return torch.stack(rows).numpy()


# ---- the authors' code ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parametrisation", ["W", "KQ"])
@pytest.mark.parametrize("authors_softmax", [True, False])
def test_follows_the_authors_trajectory(golden, parametrisation: str, authors_softmax: bool) -> None:
    names = {"W": ["W.weight"], "KQ": ["key.weight", "query.weight"]}[parametrisation]
    starts = [{n: golden[f"{parametrisation}.start.{n}"][p] for n in names} for p in range(2)]
    converted = [AttentionSVM.convert_state_dict(s) for s in starts]
    assert converted[0][0]["parametrisation"] == parametrisation
    model = AttentionSVM(**{**converted[0][0], "problems": 2, "authors_softmax": authors_softmax})
    with torch.no_grad():
        for name in parametrisation:
            getattr(model, name).copy_(torch.cat([state[name] for _, state in converted]))
    optimiser = model.configure_optimizers()
    steps = golden["steps"].tolist()
    for i in range(steps[-1] + 1):
        optimiser.zero_grad()
        loss, attention = model.loss(golden)
        loss.sum().backward()
        optimiser.step()
        if i in steps:
            theirs = golden[f"{parametrisation}.weights"][:, steps.index(i)]
            assert (model.weight() - theirs).abs().max() <= 1e-10 * theirs.abs().max(), f"step {i}"
    assert torch.equal(attention.argmax(-1), golden[f"{parametrisation}.selected"])


@pytest.mark.parametrize("norm", ["fro", "nuc"])
@pytest.mark.parametrize("parametrisation", ["W", "KQ"])
def test_equals_the_authors_svm(golden, parametrisation: str, norm: str) -> None:
    ours = fit_svm(golden["x"], golden["z"], golden[f"{parametrisation}.selected"], norm).weight
    ours = ours / torch.linalg.matrix_norm(ours, keepdim=True)
    theirs = golden[f"{parametrisation}.svm_{norm}"]
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_generates_the_authors_data(golden) -> None:
    made = generate(2, 6, 8, 10)
    for key in ("x", "y", "z", "v"):
        assert torch.equal(made[key], golden[key])


def test_convert_refuses_other_files() -> None:
    with pytest.raises(ZooError, match=r"expected the keys W\.weight"):
        AttentionSVM.convert_state_dict({"conv.weight": torch.zeros(2, 2)})
    with pytest.raises(ZooError, match=r"got W\.weight, bias"):
        AttentionSVM.convert_state_dict({"W.weight": torch.zeros(2, 2), "bias": torch.zeros(2)})


def test_convert_reads_the_sizes() -> None:
    hparams, state = AttentionSVM.convert_state_dict(
        {
            "state_dict": {
                "key.weight": torch.rand(3, 5),
                "query.weight": torch.rand(3, 5),
                "value.weight": torch.rand(5, 5),
            }
        }
    )
    assert hparams == {"problems": 1, "dim": 5, "parametrisation": "KQ", "rank": 3, "head": "relu"}
    AttentionSVM(**hparams).load_state_dict(state)


# ---- the attention ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["linear", "relu"])
@pytest.mark.parametrize("parametrisation", ["W", "KQ"])
def test_forward_and_loss_against_loops(head: str, parametrisation: str) -> None:
    data = generate(2, 3, 4, 5, head)
    model = AttentionSVM(
        problems=2, dim=5, head=head, parametrisation=parametrisation, rank=2 if parametrisation == "KQ" else None
    )
    score, attention = model(data["x"], data["z"], data["v"])
    for p in range(2):
        w = model.weight()[p].detach()
        losses = []
        for i in range(3):
            a = [float(data["x"][p, i, t] @ w @ data["z"][p, i]) for t in range(4)]
            s = [math.exp(u) / sum(map(math.exp, a)) for u in a]
            context = sum(s[t] * data["x"][p, i, t] for t in range(4))
            v = data["v"][p]
            f = float(v @ context) if head == "linear" else float(torch.relu(v.T @ context).sum())
            assert score[p, i].item() == pytest.approx(f, abs=1e-12)
            assert attention[p, i].tolist() == pytest.approx(s, abs=1e-12)
            losses.append(math.log(1 + math.exp(-float(data["y"][p, i]) * f)))
        assert selection_loss(score, data["y"])[p].item() == pytest.approx(sum(losses) / 3, abs=1e-12)


def test_self_attention_asks_with_a_token_of_the_sequence(data) -> None:
    own = AttentionSVM(problems=4, dim=6, attention="self", query_index=2)
    cross = AttentionSVM(problems=4, dim=6)
    cross.load_state_dict(own.state_dict())
    assert torch.equal(own(data["x"], None, data["v"])[1], cross(data["x"], data["x"][:, :, 2], data["v"])[1])


def test_exact_softmax_is_softmax() -> None:
    scores = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.equal(softmax(scores), torch.softmax(scores, -1))
    assert torch.autograd.gradcheck(softmax, scores)


def test_exact_softmax_keeps_small_gradients_in_float32() -> None:
    grads = []
    for exact, dtype in ((True, torch.float32), (False, torch.float32), (False, torch.float64)):
        scores = torch.tensor([18.0, 0.0, -1.0], dtype=dtype, requires_grad=True)
        (softmax(scores, exact) * torch.tensor([0.3, 0.1, -0.2], dtype=dtype)).sum().backward()
        grads.append(scores.grad.double())
    assert torch.allclose(grads[0], grads[2], rtol=1e-5, atol=0)
    assert not torch.allclose(grads[1], grads[2], rtol=0.1, atol=0)  # what it is for


def test_uniform_attention_at_zero_weight(data) -> None:
    z = data["z"]
    attention = attend(data["x"], z, torch.zeros(4, 6, 6, dtype=torch.float64))
    assert torch.allclose(attention, torch.full_like(attention, 0.25))
    score = value_head((attention.unsqueeze(-2) @ data["x"]).squeeze(-2), data["v"])
    assert torch.allclose(score, torch.einsum("bntd,bd->bn", data["x"], data["v"]) / 4)


# ---- the optimiser ----------------------------------------------------------------------------------------------


def test_every_problem_moves_by_the_step_length() -> None:
    p = torch.nn.Parameter(torch.zeros(3, 2, 2, dtype=torch.float64))
    p.grad = torch.stack([torch.eye(2), 1e-9 * torch.ones(2, 2), torch.zeros(2, 2)]).double()
    NormalisedGD([p], lr=0.1).step()
    assert torch.linalg.matrix_norm(p.detach()).tolist() == pytest.approx([0.1, 0.1, 0.0], rel=1e-6)
    q = torch.nn.Parameter(torch.zeros(1, 2))
    q.grad = torch.tensor([[1.0, -2.0]])
    NormalisedGD([q], lr=0.5, normalise=False).step()
    assert q.tolist() == [[-0.5, 1.0]]


def test_problems_do_not_touch_each_other(data) -> None:
    together, alone = AttentionSVM(problems=4, dim=6), AttentionSVM(problems=4, dim=6)
    alone.load_state_dict(together.state_dict())
    one = {key: value[2:3] for key, value in data.items()} | {"index": torch.tensor([2])}
    for model, batch in ((together, data), (alone, one)):
        optimiser = model.configure_optimizers()
        for _ in range(20):
            optimiser.zero_grad()
            model.loss(batch)[0].sum().backward()
            optimiser.step()
    assert torch.allclose(together.W[2], alone.W[2], rtol=0, atol=1e-12)
    assert not torch.allclose(together.W[1], alone.W[1])


# ---- the SVM ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "t", "d"), [(3, 4, 6), (6, 8, 10), (5, 4, 4)])
def test_frobenius_svm_against_nnls(n: int, t: int, d: int) -> None:
    data = generate(4, n, t, d)
    ids = optimal(data)
    svm = fit_svm(data["x"], data["z"], ids)
    for p in range(4):
        a = constraint_rows(data["x"][p], data["z"][p], ids[p])
        # least-distance programming: min ‖w‖ s.t. A w >= 1 by nnls (Lawson and Hanson)
        e = np.vstack([a.T, np.ones(len(a))])
        solution, _ = scipy.optimize.nnls(e, np.r_[np.zeros(d * d), 1.0], maxiter=10_000)
        r = e @ solution - np.r_[np.zeros(d * d), 1.0]
        theirs = -r[:-1] / r[-1]
        assert svm.weight[p].flatten().numpy() == pytest.approx(theirs, abs=1e-6 * abs(theirs).max())
        assert svm.margin[p].item() == pytest.approx(1 / np.linalg.norm(theirs), rel=1e-7)


def test_nuclear_svm_against_slsqp_and_its_own_optimality() -> None:
    data = generate(3, 3, 4, 5)
    ids = optimal(data)
    svm = fit_svm(data["x"], data["z"], ids, "nuc")
    for p in range(3):
        a = constraint_rows(data["x"][p], data["z"][p], ids[p])
        w = svm.weight[p].numpy()
        held = a @ w.ravel()
        assert held.min() >= 1 - 1e-8
        # Optimality: Σ λ A with λ >= 0 on the tight constraints is a subgradient of ‖·‖_* at W.
        u, s, vt = np.linalg.svd(w)
        r = int((s > 1e-5 * s[0]).sum())
        tight = a[held < 1 + 1e-6].reshape(-1, 5, 5)
        inside = np.stack([np.r_[(u[:, :r].T @ m).ravel(), (m @ vt[:r].T).ravel()] for m in tight], 1)
        face = u[:, :r] @ vt[:r]
        target = np.r_[(u[:, :r].T @ face).ravel(), (face @ vt[:r].T).ravel()]
        weights, residual = scipy.optimize.nnls(inside, target)
        assert residual < 1e-4
        assert np.linalg.norm(np.tensordot(weights, tight, 1), 2) <= 1 + 1e-4
        # No descent from here: an independent solver finds nothing smaller (P, Q with ‖P‖² + ‖Q‖² = 2 ‖W‖_*).
        start = np.r_[(u * np.sqrt(s)).ravel(), (vt.T * np.sqrt(s)).ravel()] + 0.05 * np.random.default_rng(p).normal(
            size=50
        )
        found = scipy.optimize.minimize(
            lambda f: 0.5 * f @ f,
            start,
            jac=lambda f: f,
            method="SLSQP",
            constraints={
                "type": "ineq",
                "fun": lambda f, a=a: a @ (f[:25].reshape(5, 5) @ f[25:].reshape(5, 5).T).ravel() - 1,
            },
            options={"maxiter": 500, "ftol": 1e-12},
        )
        assert found.success
        assert found.fun == pytest.approx(s.sum(), rel=1e-5)


def test_svm_known_by_hand() -> None:
    # one sequence, x_0 - x_1 = (2, 0), z = (1, 0): both norms give W = diag(1/2, 0)
    x, z = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]]), torch.tensor([[1.0, 0.0]])
    for norm in ("fro", "nuc"):
        svm = fit_svm(x, z, torch.tensor([0]), norm)
        assert torch.allclose(svm.weight, torch.tensor([[0.5, 0.0], [0.0, 0.0]]).double(), atol=1e-8)
        assert float(svm.margin) == pytest.approx(2.0, abs=1e-7)


def test_scaling_the_tokens_scales_the_svm(data) -> None:
    ids = optimal(data)
    for norm in ("fro", "nuc"):
        base, scaled = (fit_svm(data["x"] * c, data["z"], ids, norm).weight for c in (1, 1000))
        assert torch.allclose(scaled * 1000, base, rtol=1e-4, atol=1e-4 * float(base.abs().max()))


def test_norms_order_and_ranks(data) -> None:
    ids = optimal(data)
    fro, nuc = (fit_svm(data["x"], data["z"], ids, norm) for norm in ("fro", "nuc"))
    fro_norm, nuc_norm = torch.linalg.matrix_norm, lambda w: torch.linalg.matrix_norm(w, "nuc")
    assert (fro_norm(fro.weight) <= fro_norm(nuc.weight) * (1 + 1e-9)).all()
    assert (nuc_norm(nuc.weight) <= nuc_norm(fro.weight) * (1 + 1e-9)).all()
    assert (rank(nuc.weight) <= rank(fro.weight)).all()
    assert (rank(fro.weight) <= 3).all()  # n: W is a sum of n outer products


def test_a_batch_of_svms_equals_single_ones(data) -> None:
    ids = optimal(data)
    for norm in ("fro", "nuc"):
        batch = fit_svm(data["x"], data["z"], ids, norm).weight
        for p in range(4):
            one = fit_svm(data["x"][p], data["z"][p], ids[p], norm).weight
            assert torch.allclose(batch[p], one, rtol=0, atol=2e-6 * float(one.abs().max()))


@pytest.mark.parametrize("norm", ["fro", "nuc"])
def test_infeasible_svm_is_refused(norm: str) -> None:
    data = generate(3, 6, 8, 2)  # too many tokens for d = 2
    with pytest.raises(ValueError, match=r"No W separates .*infeasible.*d >= max\(T - 1, n\) = 7"):
        fit_svm(data["x"], data["z"], optimal(data), norm)
    svm = fit_svm(data["x"], data["z"], optimal(data), norm, infeasible="skip")
    assert not svm.feasible.any() and (svm.weight == 0).all() and (svm.margin == 0).all()


def test_equal_tokens_are_infeasible() -> None:
    data = generate(2, 3, 4, 6)
    data["x"][1, 0, 2] = data["x"][1, 0, 1]
    ids = torch.tensor([[0, 0, 0], [1, 0, 0]])
    svm = fit_svm(data["x"], data["z"], ids, infeasible="skip")
    assert svm.feasible.tolist() == [True, False]
    with pytest.raises(ValueError, match="problem 1 "):
        fit_svm(data["x"], data["z"], ids)


@pytest.mark.parametrize("norm", ["fro", "nuc"])
def test_several_kept_tokens(norm: str) -> None:
    data = generate(3, 3, 4, 8, "relu")
    s = torch.tensor([0.6, 0.4, 1e-12, 1e-12]).double().expand(3, 3, 4)
    kept = s > 1e-3
    limit, finite = fit_svm(data["x"], data["z"], kept, norm).weight, fit_finite(data["x"], data["z"], s, kept, norm)
    for p in range(3):
        for i in range(3):
            x, z = data["x"][p, i], data["z"][p, i]
            assert float((x[0] - x[1]) @ limit[p] @ z) == pytest.approx(0, abs=1e-7)
            for t in (2, 3):
                assert float((x[0] - x[t]) @ limit[p] @ z) >= 1 - 1e-7
            assert float((x[1] - x[0]) @ finite[p] @ z) == pytest.approx(math.log(0.4 / 0.6), abs=1e-7)
    if norm == "fro":  # an independent solver finds nothing smaller
        a = np.stack(
            [
                np.outer(data["x"][0, i, 0] - data["x"][0, i, t], data["z"][0, i]).ravel()
                for i in range(3)
                for t in (1, 2, 3)
            ]
        )
        rules = [
            {"type": "eq", "fun": lambda w: a[::3] @ w, "jac": lambda w: a[::3]},
            {
                "type": "ineq",
                "fun": lambda w: np.delete(a, [0, 3, 6], 0) @ w - 1,
                "jac": lambda w: np.delete(a, [0, 3, 6], 0),
            },
        ]
        found = scipy.optimize.minimize(
            lambda w: 0.5 * w @ w, np.zeros(64), jac=lambda w: w, method="SLSQP", constraints=rules
        )
        assert limit[0].flatten().numpy() == pytest.approx(found.x, abs=1e-5)


def test_finite_part_vanishes_for_single_tokens(data) -> None:
    kept = torch.nn.functional.one_hot(optimal(data), 4).bool()
    for norm in ("fro", "nuc"):
        assert (fit_finite(data["x"], data["z"], kept.double(), kept, norm) == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": torch.zeros(4, 3, 5)}, "do not fit"),
        ({"tokens": torch.zeros(4, 2, dtype=torch.long)}, "do not fit"),
        ({"tokens": torch.zeros(4, 3, 4, dtype=torch.bool)}, "at least one token"),
        ({"norm": "l1"}, "norm is 'l1'"),
        ({"x": torch.full((4, 3, 4, 6), torch.nan)}, "'x' holds"),
    ],
)
def test_fit_svm_refuses(data, change: dict, message: str) -> None:
    arguments = {"x": data["x"], "z": data["z"], "tokens": optimal(data), **change}
    with pytest.raises(ValueError, match=message):
        fit_svm(**arguments)


def test_correlation_limits() -> None:
    w = torch.randn(2, 3, 3).double()
    assert correlation(w, 5 * w).tolist() == pytest.approx([1, 1])
    assert correlation(w, -w).tolist() == pytest.approx([-1, -1])
    assert correlation(w, torch.zeros_like(w)).tolist() == [0, 0]


# ---- training ---------------------------------------------------------------------------------------------------


def fit(folder: Path, steps: int, data: TokenSelectionDataModule | None = None, **hparams) -> tuple[AttentionSVM, dict]:
    torch.manual_seed(0)
    data = data or TokenSelectionDataModule(problems=4, sequences=4, tokens=5, dim=8, batch_size=4, iterations=steps)
    model = AttentionSVM(**{"problems": 4, "dim": 8, **hparams})
    trainer = Trainer(
        folder, max_steps=steps, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.fit(model, datamodule=data)
    (found,) = trainer.test(model, datamodule=data, verbose=False)
    return model, found


def descend(steps: int, data: dict, **hparams) -> tuple[AttentionSVM, dict[str, float]]:
    """The same by a plain PyTorch loop."""
    torch.manual_seed(0)
    model = AttentionSVM(**{"problems": len(data["x"]), "dim": data["x"].shape[-1], "history": 0, **hparams})
    optimiser = model.configure_optimizers()
    for _ in range(steps):
        model.record()
        optimiser.zero_grad()
        model.loss(data)[0].sum().backward()
        optimiser.step()
    found = model.measure(data)
    return model, {name: float(value.mean()) for name, value in found.items()}


def test_w_and_kq_go_to_their_own_svm() -> None:
    data = generate(4, 4, 5, 8)
    _, w = descend(700, data)
    _, kq = descend(400, data, parametrisation="KQ")
    _, plain = descend(400, data, normalise=False)
    assert w["corr_fro"] > 0.95 > plain["corr_fro"]
    assert kq["corr_nuc"] > 0.95 and kq["nuclear_bias"] > 0 > w["nuclear_bias"]
    assert kq["nuclear_ratio"] < w["nuclear_ratio"] - 0.3


def test_trainer_follows_the_plain_loop_and_keeps_a_history(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    data = TokenSelectionDataModule(problems=4, sequences=4, tokens=5, dim=8, batch_size=4, iterations=150)
    model, found = fit(tmp_path, 300, data, history=7, history_every=2)
    by_hand, by_loop = descend(300, data.problems())
    assert torch.equal(model.W, by_hand.W)
    assert found["test/corr_fro"] == pytest.approx(by_loop["corr_fro"], abs=1e-6)
    # the history thins itself: 7 slots, evenly spaced, from the start
    kept = model.history_iteration[0]
    kept = kept[kept >= 0]
    assert kept[0] == 0 and len(kept) >= 4 and (kept.diff() == kept.diff()[0]).all() and kept[-1] + kept[1] >= 300
    assert torch.equal(model.iteration, torch.full((4,), 300))
    assert plot_convergence(model, tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"
    curve = model.measured[0]["Frobenius SVM"].mean(0)
    assert curve[0] < 0.5 < 0.85 < curve[-1] == pytest.approx(found["test/corr_fro"], abs=1e-6)


def test_history_holds_the_weight_of_its_iteration(data) -> None:
    model = AttentionSVM(problems=4, dim=6, history=3, history_every=1)
    trail = []
    for _ in range(9):
        trail.append(model.W.detach().clone())
        model.record()
        with torch.no_grad():
            model.W += 1
    assert model.history_iteration.tolist() == [[0, 4, 8]] * 4
    assert torch.equal(model.history_weight, torch.stack([trail[0], trail[4], trail[8]], 1))


def test_rank_limit_bounds_the_weight() -> None:
    model, found = descend(200, generate(4, 4, 5, 8), parametrisation="KQ", rank=2)
    assert found["rank"] <= 2 and model.K.shape == (4, 8, 2)
    assert found["corr_nuc"] > 0.5


def test_float32_converges_too() -> None:
    data = generate(8, 6, 8, 10)
    found = descend(800, data, precision="float32")[1]
    theirs = descend(800, data, precision="float32", authors_softmax=True)[1]
    assert found["corr_fro"] > 0.98
    assert found["corr_fro"] > theirs["corr_fro"] + 0.01


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
def test_trainer_precision_leaves_float64_alone(tmp_path: Path, precision: str) -> None:
    data = TokenSelectionDataModule(problems=4, iterations=5)
    weights = []
    for p in ("32-true", precision):
        torch.manual_seed(0)
        model = AttentionSVM(problems=4)
        lightning.Trainer(
            max_steps=5, precision=p, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, num_sanity_val_steps=0, default_root_dir=tmp_path,
        ).fit(model, datamodule=data)  # fmt: skip
        weights.append(model.W.detach().clone())
    assert weights[0].dtype == weights[1].dtype == torch.float64
    assert torch.equal(*weights)


def test_moves_to_float32(data) -> None:
    model = AttentionSVM(problems=4, dim=6).to(torch.float32)
    score, _ = model(data["x"], data["z"], data["v"])
    assert score.dtype == torch.float32
    assert model.predict(data["x"], data["z"], data["v"])["correlation"].isfinite().all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(data["x"], data["z"], data["v"])[0], score)


@pytest.mark.gpu
def test_cuda_equals_cpu(data) -> None:
    model = AttentionSVM(problems=4, dim=6)
    here = model.predict(data["x"], data["z"], data["v"])
    there = model.cuda().predict(data["x"], data["z"], data["v"])
    for key in ("score", "probabilities", "svm", "correlation"):
        assert torch.allclose(here[key], there[key].cpu(), rtol=0, atol=1e-8)


def test_blocks_train_as_one_batch(tmp_path: Path) -> None:
    whole = TokenSelectionDataModule(problems=4, batch_size=4, iterations=10)
    blocks = TokenSelectionDataModule(problems=4, batch_size=3, iterations=10)
    weights = [
        fit(tmp_path / str(i), steps, d, dim=10)[0].W for i, (steps, d) in enumerate(((10, whole), (20, blocks)))
    ]
    assert torch.allclose(*weights, rtol=0, atol=1e-12)


def test_multi_token_decomposition() -> None:
    _, found = descend(600, generate(24, 3, 4, 4, "relu"), head="relu", infeasible="skip")
    valid = found["valid"]  # means over all: invalid runs count as 0
    assert 0 < valid < 1
    assert found["corr_svmeq"] > 0.9 * valid
    assert found["gain"] > 0
    assert found["kept"] > valid  # some attention keeps several tokens


def test_test_refuses_infeasible_problems() -> None:
    data = generate(4, 6, 8, 2)
    with pytest.raises(ValueError, match="No W separates"):
        AttentionSVM(problems=4, dim=2, svm_tokens="optimal").measure(data)
    found = AttentionSVM(problems=4, dim=2, svm_tokens="optimal", infeasible="skip").measure(data)
    assert (found["feasible"] == 0).all()
    # what the attention selects by W, W itself separates
    assert (AttentionSVM(problems=4, dim=2).measure(data)["feasible"] == 1).all()


def test_optimal_tokens_for_the_rank_study(data) -> None:
    batch = data | {"y": data["y"]}
    found = AttentionSVM(problems=4, dim=6, svm_tokens="optimal").measure(batch)
    assert torch.equal(found["rank_svm"], rank(fit_svm(data["x"], data["z"], optimal(data)).weight).double())


# ---- use --------------------------------------------------------------------------------------------------------


def test_predict_by_loops(data) -> None:
    model = AttentionSVM(problems=4, dim=6)
    found = model.predict(data["x"], data["z"], data["v"])
    for p in range(4):
        w = model.weight()[p].detach()
        for i in range(3):
            a = [float(data["x"][p, i, t] @ w @ data["z"][p, i]) for t in range(4)]
            best = int(np.argmax(a))
            assert int(found["selected"][p, i]) == best
            margin = min(a[best] - a[t] for t in range(4) if t != best) / float(w.norm())
            assert float(found["sequence_margin"][p, i]) == pytest.approx(margin, abs=1e-10)
        svm = fit_svm(data["x"][p], data["z"][p], found["selected"][p])
        assert float(found["margin"][p]) == pytest.approx(float(svm.margin), rel=1e-6)
        assert float(found["correlation"][p]) == pytest.approx(float(correlation(w, svm.weight)), abs=1e-6)


def test_saved_and_loaded_bit_for_bit(tmp_path: Path, data) -> None:
    model = AttentionSVM(problems=4, dim=6, history=5)
    model.record()
    model.save_pretrained(tmp_path / "saved")
    back = AttentionSVM.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), back.state_dict().values(), strict=True))
    assert back.W.dtype == torch.float64


def test_plot_needs_a_measurement(tmp_path: Path, data) -> None:
    model = AttentionSVM(problems=4, dim=6)
    pytest.importorskip("matplotlib")
    with pytest.raises(ZooError, match=r"run trainer\.test"):
        plot_convergence(model, tmp_path / "x.png")
    assert plot_convergence(model, tmp_path / "x.svg", batch=data).stat().st_size > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 3, 4, 5)}, r"'x' has shape \(4, 3, 4, 5\); expected \(problems, sequences, tokens, 6\)"),
        ({"x": torch.zeros(0, 3, 4, 6)}, "none of them 0"),
        ({"z": torch.zeros(4, 2, 6)}, r"'z' has shape .* must be \(4, 3, 6\)"),
        ({"z": None}, "'z' is missing"),
        ({"v": torch.zeros(4, 6, 6)}, r"'v' has shape .*head='linear' expects \(4, 6\)"),
        ({"index": torch.tensor([0, 1, 2, 7])}, r"names problem 7; this module holds 0\.\.\.3"),
        ({"index": torch.tensor([0])}, r"'index' has shape \(1,\)"),
        ({"v": torch.full((4, 6), torch.inf)}, "'v' holds 24 values"),
    ],
)
def test_predict_refuses(data, change: dict, message: str) -> None:
    model = AttentionSVM(problems=4, dim=6)
    arguments = {key: data[key] for key in ("x", "z", "v")} | change
    with pytest.raises(ValueError, match=message):
        model.predict(**arguments)


def test_fewer_problems_need_their_numbers(data) -> None:
    model = AttentionSVM(problems=4, dim=6)
    part = [data[key][1:3] for key in ("x", "z", "v")]
    with pytest.raises(ValueError, match="holds 2 problems and the module 4: pass 'index'"):
        model.predict(*part)
    found = model.predict(*part, index=torch.tensor([1, 2]))
    assert torch.equal(found["score"], model.predict(*(data[k] for k in ("x", "z", "v")))["score"][1:3])


@pytest.mark.parametrize(
    ("hparams", "message"),
    [
        ({"problems": 0}, "problems=0"),
        ({"rank": 2}, "rank=2 needs parametrisation='KQ'"),
        ({"parametrisation": "KQ", "rank": 11}, r"lies in 1\.\.\.dim=10"),
    ],
)
def test_constructor_refuses(hparams: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionSVM(**hparams)
    with pytest.raises(TypeError, match="parametrisation"):
        AttentionSVM(parametrisation="QK")
