"""AttentionSVM: gradient descent on softmax attention finds a hard-margin support vector machine.

Paper: Davoud Ataee Tarzanagh, Yingcong Li, Christos Thrampoulidis, Samet Oymak, "Transformers as Support Vector
Machines", arXiv:2308.16898 (2023). Code by the authors: https://github.com/umich-sota/TF-as-SVM, no licence stated.
Reproduces: the local-convergence, multi-token and rank experiments of the authors' notebooks.

In: token sequences x, a cross token z per sequence and a value head v. Out: a score per sequence, the softmax map,
the SVM that explains the attention weight, and the correlation between the two.

    f(X, z) = vᵀ Xᵀ softmax(X W z)      trained by   W ← W - η G / (‖G‖_F + ε)                    (normalised descent)
    W/‖W‖ → argmin ‖W‖ s.t. (x_a - x_t)ᵀ W z >= 1 for all t != a     (‖·‖_F for W itself, ‖·‖_* for W = K Qᵀ)

where a is the token that the attention ends up selecting. Many problems train at once: each is one row of every
tensor, with its own weight, its own loss and its own normalisation.

Departs: ranks are counted relative to the largest singular value, on solutions exact to about 1e-9. The authors
count singular values above 1e-7 of a first-order solver's answer, which also counts the solver's error.

Index legend: s problems held by the module, b problems in a batch, n sequences a problem, t tokens a sequence,
d token size, m rank limit of (K, Q), r recorded iterations, k constraints of an SVM.
"""

import logging
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from zoo.core import ZooError, ZooModule, atomic_write, check_finite, unwrap

log = logging.getLogger(__name__)

EPS = torch.finfo(torch.float64).eps  # the authors' ε, in the step and in the ridge
TINY = 1e-300  # keeps quotients of masked entries finite


# ---- the attention ----------------------------------------------------------------------------------------------


class _Softmax(torch.autograd.Function):
    """Softmax whose gradient keeps its relative accuracy when one probability is nearly 1.

        dL/da_t = s_t Σ_u s_u (g_t - g_u)        instead of        s_t (g_t - Σ_u s_u g_u)

    The usual form subtracts two nearly equal numbers, so that in float32 the gradient becomes exactly 0, or noise,
    after a few hundred normalised steps. Both forms are the same function.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        probabilities = torch.softmax(scores, -1)
        ctx.save_for_backward(probabilities)
        return probabilities

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (s,) = ctx.saved_tensors
        return s * (s.unsqueeze(-2) * (grad.unsqueeze(-1) - grad.unsqueeze(-2))).sum(-1)


def softmax(scores: Tensor, exact: bool = True) -> Tensor:
    """Softmax over the last dimension; ``exact`` takes the gradient without cancellation (`_Softmax`)."""
    needed = exact and scores.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_exporting()
    return _Softmax.apply(scores) if needed else torch.softmax(scores, -1)


def attend(x: Tensor, z: Tensor, key: Tensor, query: Tensor | None = None, exact: bool = True) -> Tensor:
    """Attention map ``softmax(X W z)`` of the token z over the tokens X, W = ``key`` or ``key queryᵀ``.

    Shapes:
        x: (b, n, t, d); z: (b, n, d); key: (b, d, d), or (b, d, m) together with query: (b, d, m)
        returns: (b, n, t), rows sum to 1
    """
    u = z @ key.mT if query is None else (z @ query) @ key.mT  # W z: (b, n, d)
    return softmax((x @ u.unsqueeze(-1)).squeeze(-1), exact)


def value_head(context: Tensor, v: Tensor, head: str = "linear") -> Tensor:
    """``vᵀ c`` (linear) or ``1ᵀ relu(Vᵀ c)`` (relu) of vectors c.

    Shapes:
        context: (b, n, d) or (b, n, t, d); v: (b, d) for "linear", (b, d, d) for "relu"
        returns: context's shape without d
    """
    spread = (v.shape[0],) + (1,) * (context.ndim - 2)
    if head == "linear":
        return (context * v.view(*spread, -1)).sum(-1)
    flat = context.flatten(1, -2) @ v  # (b, n * t, d)
    return torch.relu(flat).sum(-1).view(context.shape[:-1])


def selection_loss(score: Tensor, y: Tensor) -> Tensor:
    """``mean_i log(1 + exp(-y_i f_i))`` of each problem.

    Shapes:
        score: (b, n); y: (b, n), -1 or +1
        returns: (b,)
    """
    return nn.functional.softplus(-y * score).mean(-1)


class NormalisedGD(torch.optim.Optimizer):
    """Normalised gradient descent for parameters that hold one problem per row.

        p_s ← p_s - lr * g_s / (‖g_s‖_F + eps)        for each row s by its own gradient

    Rows without a gradient stay where they are. ``normalise=False`` gives plain gradient descent.

    Args:
        params: parameters, each (s, ...).
        lr: length of every step.
        eps: added to the norm; a gradient much smaller than it moves nothing.
    """

    def __init__(self, params: Iterable[Any], lr: float = 0.1, eps: float = EPS, normalise: bool = True):
        super().__init__(params, {"lr": lr, "eps": eps, "normalise": normalise})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                step = p.grad
                if group["normalise"]:
                    norm = torch.linalg.vector_norm(step.flatten(1), dim=1) + group["eps"]
                    step = step / norm.view(-1, *[1] * (p.ndim - 1))
                p.sub_(step, alpha=group["lr"])
        return loss


# ---- the support vector machine ---------------------------------------------------------------------------------


class SVM(NamedTuple):
    """What `fit_svm` returns, one row per problem.

    weight: (b, d, d) the minimiser W, zero where infeasible. margin: (b,) 1 / ‖W‖ in the norm that was minimised.
    feasible: (b,) bool. gap: (b,) relative duality gap or constraint error left, whichever is larger.
    """

    weight: Tensor
    margin: Tensor
    feasible: Tensor
    gap: Tensor


def fit_svm(
    x: Tensor,
    z: Tensor,
    tokens: Tensor,
    norm: Literal["fro", "nuc"] = "fro",
    infeasible: Literal["raise", "skip"] = "raise",
) -> SVM:
    """Hard-margin SVM that separates the kept tokens of each sequence from its other tokens (Att-SVM).

        min ‖W‖  s.t.  (x_a - x_t)ᵀ W z_i >= 1   for a kept, t not kept;   (x_a - x_b)ᵀ W z_i = 0   for a, b both kept

    Solved by primal-dual interior points on all problems at once: for "fro" as the point of smallest norm in the
    convex hull of the constraint matrices (which also decides feasibility), for "nuc" as a semidefinite programme.
    Exact to about 1e-9, in float64 whatever comes in.

    Args:
        tokens: index of the one kept token, or a mask of all kept ones.
        norm: "fro" (bias of training W) or "nuc" (bias of training K and Q).
        infeasible: "raise", or "skip" to mark such problems in ``feasible``.
    Shapes:
        x: (b, n, t, d); z: (b, n, d); tokens: (b, n) integer or (b, n, t) bool. Without b everywhere: one problem.
    Raises:
        ValueError: for shapes that do not fit, a sequence that keeps no token, or problems that no W can separate.
    Example:
        >>> x, z = torch.randn(1, 3, 4, 6), torch.randn(1, 3, 6)
        >>> svm = fit_svm(x, z, torch.zeros(1, 3, dtype=torch.long))
        >>> svm.weight.shape
        torch.Size([1, 6, 6])
    """
    if x.ndim == 3:
        return SVM(*(part[0] for part in fit_svm(x[None], z[None], tokens[None], norm, infeasible)))
    if norm not in ("fro", "nuc") or infeasible not in ("raise", "skip"):
        raise ValueError(f"norm is {norm!r} ('fro' or 'nuc') and infeasible {infeasible!r} ('raise' or 'skip').")
    if x.ndim != 4 or z.shape != (*x.shape[:2], x.shape[3]) or tokens.shape[:2] != x.shape[:2]:
        raise ValueError(
            f"x {tuple(x.shape)}, z {tuple(z.shape)} and tokens {tuple(tokens.shape)} do not fit; "
            "expected (b, n, t, d), (b, n, d) and (b, n) or (b, n, t)."
        )
    check_finite(x, "x")
    check_finite(z, "z")
    x, z = x.double(), z.double()
    kept = tokens if tokens.ndim == 3 else nn.functional.one_hot(tokens, x.shape[2]).bool()
    if not bool(kept.any(-1).all()):
        raise ValueError("Every sequence must keep at least one token; `tokens` has a row without.")
    delta, cross, first = _constraints(x, z, kept)
    other, equal = (~kept).flatten(1), (kept & ~first).flatten(1)  # against the first kept token
    weight, gap = _frobenius(delta, cross, other, equal)
    feasible = gap.isfinite()
    if infeasible == "raise" and not bool(feasible.all()):
        lost = (~feasible).nonzero().flatten().tolist()
        raise ValueError(
            f"No W separates the selected tokens of problem {', '.join(map(str, lost[:5]))}"
            f"{', ...' if len(lost) > 5 else ''} (n={x.shape[1]}, T={x.shape[2]}, d={x.shape[3]}): the SVM is "
            f"infeasible. Random tokens are separable from d >= max(T - 1, n) = {max(x.shape[2] - 1, x.shape[1])} on; "
            "check for equal tokens in a sequence, or pass infeasible='skip'."
        )
    if norm == "nuc" and bool(feasible.any()):
        which = feasible.nonzero().flatten()
        ones = torch.ones_like(delta[which, :, 0]) * other[which]
        part, part_gap = _nuclear(delta[which], cross[which], ones, other[which], equal[which])
        weight, gap = weight.index_copy(0, which, part), gap.index_copy(0, which, part_gap)
    size = torch.linalg.matrix_norm(weight, norm)
    return SVM(weight, torch.where(feasible, 1 / size.clamp_min(TINY), 0.0), feasible, gap)


def fit_finite(
    x: Tensor, z: Tensor, probabilities: Tensor, kept: Tensor, norm: Literal["fro", "nuc"] = "fro"
) -> Tensor:
    """Smallest W that gives the kept tokens of each sequence their probability ratios (W_fin of the paper).

        min ‖W‖  s.t.  (x_a - x_b)ᵀ W z_i = log(s_a / s_b)   for a, b both kept

    Shapes:
        x: (b, n, t, d); z: (b, n, d); probabilities: (b, n, t); kept: (b, n, t) bool
        returns: (b, d, d), zero where every sequence keeps one token; NaN where no W fits
    """
    x, z = x.double(), z.double()
    delta, cross, first = _constraints(x, z, kept)
    equal = (kept & ~first).flatten(1)
    ratio = probabilities.double().clamp_min(TINY).log()
    wanted = ratio.gather(-1, first.int().argmax(-1, keepdim=True)) - ratio  # log(s_first / s_t)
    wanted = wanted.flatten(1) * equal
    rows = _matrices(delta * equal[..., None], cross)
    weight = (torch.linalg.pinv(rows) @ wanted.unsqueeze(-1)).squeeze(-1)
    off = (torch.einsum("bkw,bw->bk", rows, weight) - wanted).abs().amax(-1)
    weight = weight.view(-1, x.shape[-1], x.shape[-1])
    if norm == "nuc":
        some = equal.any(-1)
        if bool(some.any()):
            which = some.nonzero().flatten()
            part, _ = _nuclear(delta[which], cross[which], wanted[which], torch.zeros_like(equal[which]), equal[which])
            weight = weight.index_copy(0, which, part)
    return torch.where((off > 1e-6)[:, None, None], torch.nan, weight)


def _constraints(x: Tensor, z: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each constraint as the outer product ``delta crossᵀ``: the first kept token less token t, times z.

    Returns delta (b, n * t, d), cross (b, n * t, d) and the mask (b, n, t) of the first kept tokens.
    """
    index = kept.int().argmax(-1)
    first = nn.functional.one_hot(index, x.shape[2]).bool()
    reference = x.gather(2, index[:, :, None, None].expand(-1, -1, 1, x.shape[3]))
    return (reference - x).flatten(1, 2), z.unsqueeze(2).expand_as(x).flatten(1, 2), first


def _matrices(delta: Tensor, cross: Tensor) -> Tensor:
    """The constraints as flattened matrices: (b, k, d * d)."""
    return (delta.unsqueeze(-1) * cross.unsqueeze(-2)).flatten(2)


def _frobenius(delta: Tensor, cross: Tensor, other: Tensor, equal: Tensor) -> tuple[Tensor, Tensor]:
    """min ‖W‖_F s.t. ⟨A_k, W⟩ >= 1 (``other``), = 0 (``equal``). Returns W and the gap, infinite where infeasible.

    The minimiser is w / ‖w‖² with w the point of smallest norm in the convex hull of the A_k (projected on the
    complement of the equality rows); it is infeasible exactly if the hull holds 0.
    """
    rows = _matrices(delta, cross)
    if bool(equal.any()):
        fixed = rows * equal.unsqueeze(-1)
        rows = rows - (rows @ torch.linalg.pinv(fixed)) @ fixed
    rows = rows * other.unsqueeze(-1)
    size = torch.linalg.vector_norm(rows, dim=-1).amax(-1).clamp_min(TINY)
    rows = rows / size[:, None, None]
    share = _min_norm_point(rows @ rows.mT, other)
    point = torch.einsum("bk,bkw->bw", share, rows)
    squared = point.square().sum(-1)
    # Below 1e-6 of the longest row the hull touches 0 as far as float64 can tell.
    feasible = (squared > 1e-12) & other.any(-1)
    weight = point / squared.clamp_min(TINY).unsqueeze(-1)
    held = torch.einsum("bkw,bw->bk", rows, weight)
    gap = torch.where(other, 1 - held, -torch.inf).amax(-1).clamp_min(0)
    feasible &= gap < 1e-3
    weight = torch.where(feasible[:, None], weight / size[:, None], 0.0)
    d = delta.shape[-1]
    return weight.view(-1, d, d), torch.where(feasible, gap, torch.inf)


def _min_norm_point(gram: Tensor, on: Tensor, iterations: int = 60) -> Tensor:
    """min ½ λᵀ H λ s.t. Σ λ = 1, λ >= 0 over the entries ``on``: Mehrotra's predictor-corrector, batched.

    Shapes:
        gram: (b, k, k); on: (b, k) bool
        returns: λ (b, k)
    """
    one = on.to(gram.dtype)
    count = one.sum(-1, keepdim=True).clamp_min(1)
    off = torch.diag_embed(1 - one)  # keeps the factorisation regular in the unused rows
    share, slack, level = one / count, one.clone(), torch.zeros_like(count)

    def limit(value: Tensor, change: Tensor) -> Tensor:
        ratio = torch.where((change < 0) & on, -value / change.clamp_max(-TINY), torch.inf)
        return ratio.amin(-1, keepdim=True).clamp_max(1.0)

    for _ in range(iterations):
        dual = ((gram @ share.unsqueeze(-1)).squeeze(-1) - level - slack) * one
        primal = share.sum(-1, keepdim=True) - 1
        mean = (share * slack).sum(-1, keepdim=True) / count
        if bool((torch.maximum(mean, dual.abs().amax(-1, keepdim=True)) < 1e-15).all()):
            break
        inverse = torch.where(on, 1 / share.clamp_min(TINY), 0.0)
        factor, _ = torch.linalg.cholesky_ex(gram + torch.diag_embed(slack * inverse) + off)

        def direction(target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """Newton step towards ``share * slack`` changing by ``target``."""
            right = (target * inverse - dual) * one  # noqa: B023 - called at once
            solved = torch.cholesky_solve(torch.stack([right, one], -1), factor)  # noqa: B023
            free, per_level = solved[..., 0] * one, solved[..., 1] * one
            rise = (-primal - free.sum(-1, keepdim=True)) / per_level.sum(-1, keepdim=True)  # noqa: B023
            change = free + rise * per_level
            return change, rise, (target - slack * change) * inverse  # noqa: B023

        d_share, _, d_slack = direction(-share * slack)
        reach = torch.minimum(limit(share, d_share), limit(slack, d_slack))
        ahead = ((share + reach * d_share) * (slack + reach * d_slack)).sum(-1, keepdim=True) / count
        centre = (ahead / mean.clamp_min(TINY)) ** 3
        d_share, d_level, d_slack = direction((centre * mean - d_share * d_slack - share * slack) * one)
        reach = 0.99 * torch.minimum(limit(share, d_share), limit(slack, d_slack))
        new = share + reach * d_share, slack + reach * d_slack, level + reach * d_level
        # A problem that has reached the end of float64 stays where it is.
        fine = torch.isfinite(new[0]).all(-1, keepdim=True) & torch.isfinite(new[1]).all(-1, keepdim=True)
        share, slack, level = (torch.where(fine, a, b) for a, b in zip(new, (share, slack, level), strict=True))
    return share / share.sum(-1, keepdim=True).clamp_min(TINY)


def _nuclear(
    delta: Tensor, cross: Tensor, wanted: Tensor, other: Tensor, equal: Tensor, iterations: int = 60
) -> tuple[Tensor, Tensor]:
    """min ‖W‖_* s.t. ⟨A_k, W⟩ >= wanted (``other``), = wanted (``equal``). Returns W and the relative gap.

    As a semidefinite programme, with A_k = delta_k cross_kᵀ in the upper right block:

        min ½ tr X,  X = [[P, W], [Wᵀ, R]] ⪰ 0          max Σ λ_k wanted_k,  S = ½ I - Σ λ_k Â_k ⪰ 0,  λ_other >= 0

    by Mehrotra's predictor-corrector along the HKM direction. Every Â_k has rank two, so that the k x k Newton
    system costs a few matrix products.
    """
    batch, rows, d = delta.shape
    like: dict[str, Any] = {"dtype": delta.dtype, "device": delta.device}
    one = (other | equal).to(delta.dtype)
    top = torch.cat([delta * one[..., None], torch.zeros_like(delta)], -1)
    low = torch.cat([torch.zeros_like(cross), cross * one[..., None]], -1)
    eye = torch.eye(2 * d, **like)
    size = delta.norm(dim=-1) * cross.norm(dim=-1) * one
    start = 10 * wanted.abs().amax(-1).clamp_min(1e-3) / torch.where(one > 0, size, torch.inf).amin(-1)
    multiplier = torch.where(other, 0.5 / size.sum(-1, keepdim=True), 0.0)
    primal, slack = eye * start[:, None, None], other * start[:, None]
    total = 2 * d + other.sum(-1)
    off = torch.diag_embed(1 - one)

    def sym(a: Tensor) -> Tensor:
        return (a + a.mT) / 2

    def spread(weights: Tensor) -> Tensor:  # Σ λ_k Â_k
        return sym((top * weights.unsqueeze(-1)).mT @ low)

    def held(a: Tensor) -> Tensor:  # ⟨Â_k, a⟩
        return ((top @ sym(a)) * low).sum(-1)

    def cone_limit(factor: Tensor, change: Tensor) -> Tensor:
        half = torch.linalg.solve_triangular(factor, change, upper=False)
        least = torch.linalg.eigvalsh(sym(torch.linalg.solve_triangular(factor, half.mT, upper=False)))[:, 0]
        return torch.where(least < 0, -1 / least.clamp_max(-TINY), torch.inf)

    def limit(value: Tensor, change: Tensor) -> Tensor:
        return torch.where(other & (change < 0), -value / change.clamp_max(-TINY), torch.inf).amin(-1)

    best, weight = torch.full((batch,), torch.inf, **like), torch.zeros(batch, d, d, **like)
    done = torch.zeros(batch, dtype=torch.bool, device=delta.device)
    dual = eye / 2 - spread(multiplier)
    for _ in range(iterations):
        factor_x, fault_x = torch.linalg.cholesky_ex(primal)
        factor_s, fault_s = torch.linalg.cholesky_ex(dual)
        objective = (wanted * multiplier).sum(-1).abs()
        gap = (primal * dual).sum((-1, -2)) + (multiplier * slack).sum(-1)
        miss = ((wanted + slack - held(primal)) * one).abs().amax(-1)
        error = torch.maximum(gap / (objective + TINY), miss)
        sound = (fault_x == 0) & (fault_s == 0) & error.isfinite()
        better = sound & ~done & (error < best)
        best, weight = torch.where(better, error, best), torch.where(better[:, None, None], primal[:, :d, d:], weight)
        done |= (best < 1e-11) | ~sound | (error > 1e3 * best)
        if bool(done.all()):
            break
        # Finished problems ride along as the identity, so that no factorisation can fail.
        rest = done[:, None, None]
        primal, dual = torch.where(rest, eye, primal), torch.where(rest, eye, dual)
        factor_x, factor_s = torch.where(rest, eye, factor_x), torch.where(rest, eye, factor_s)
        multiplier = torch.where(done[:, None], other.to(delta.dtype), multiplier)
        slack = torch.where(done[:, None], other.to(delta.dtype), slack)
        mean = ((primal * dual).sum((-1, -2)) + (multiplier * slack).sum(-1)) / total
        inverse_s = torch.cholesky_solve(eye.expand_as(factor_s), factor_s)
        inverse = torch.where(other, 1 / multiplier.clamp_min(TINY), 0.0)
        xx, xz, zz = top @ primal @ top.mT, top @ primal @ low.mT, low @ primal @ low.mT
        ss, st, tt = top @ inverse_s @ top.mT, top @ inverse_s @ low.mT, low @ inverse_s @ low.mT
        newton = sym(xx * tt + zz * ss + xz * st.mT + xz.mT * st) / 4 + torch.diag_embed(slack * inverse) + off
        scale = newton.diagonal(dim1=-2, dim2=-1).rsqrt()
        scaled = newton * scale.unsqueeze(-1) * scale.unsqueeze(-2)
        factor, _ = torch.linalg.cholesky_ex(scaled + 1e-14 * torch.eye(rows, **like))

        def solve(right: Tensor) -> Tensor:
            def once(r: Tensor) -> Tensor:
                return scale * torch.cholesky_solve((scale * r).unsqueeze(-1), factor).squeeze(-1)  # noqa: B023

            first = once(right)
            return first + once(right - (newton @ first.unsqueeze(-1)).squeeze(-1))  # noqa: B023

        def direction(mu: Tensor, bend: Tensor | float = 0.0, bend_lp: Tensor | float = 0.0) -> tuple[Tensor, ...]:
            """Newton step towards complementarity ``mu``, with Mehrotra's second-order terms."""
            d_primal = mu[:, None, None] * inverse_s - primal - bend  # noqa: B023
            d_slack = torch.where(other, (mu[:, None] - bend_lp) * inverse - slack, 0.0)  # noqa: B023
            d_multiplier = solve((wanted - held(primal + d_primal) + slack + d_slack) * one) * one  # noqa: B023
            turn = spread(d_multiplier)
            d_slack = torch.where(other, d_slack - slack * inverse * d_multiplier, 0.0)  # noqa: B023
            return d_primal + sym(primal @ turn @ inverse_s), d_slack, d_multiplier, -turn  # noqa: B023

        def reach(step: tuple[Tensor, ...], share: float) -> tuple[Tensor, Tensor]:
            on_primal = torch.minimum(cone_limit(factor_x, step[0]), limit(slack, step[1]))  # noqa: B023
            on_dual = torch.minimum(cone_limit(factor_s, step[3]), limit(multiplier, step[2]))  # noqa: B023
            return (share * on_primal).clamp_max(1.0), (share * on_dual).clamp_max(1.0)

        step = direction(torch.zeros_like(mean))
        step = tuple(torch.nan_to_num(part) for part in step)
        p, q = reach(step, 1.0)
        ahead = ((primal + p[:, None, None] * step[0]) * (dual + q[:, None, None] * step[3])).sum((-1, -2))
        ahead = ahead + ((slack + p[:, None] * step[1]) * (multiplier + q[:, None] * step[2])).sum(-1)
        centre = (ahead / total / mean).clamp(0, 1) ** 3
        step = direction(centre * mean, sym(step[0] @ step[3] @ inverse_s), step[1] * step[2])
        step = tuple(torch.nan_to_num(part) for part in step)
        p, q = reach(step, 0.98)
        primal, slack = sym(primal + p[:, None, None] * step[0]), slack + p[:, None] * step[1]
        multiplier = multiplier + q[:, None] * step[2]
        dual = eye / 2 - spread(multiplier)
    return weight, best


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """``⟨A, B⟩ / (‖A‖_F ‖B‖_F)`` over the last two dimensions; 0 where one is zero."""
    a, b = (w / torch.linalg.matrix_norm(w, keepdim=True).clamp_min(TINY) for w in (a, b))
    return (a * b).sum((-1, -2))


def rank(weight: Tensor, tolerance: float = 1e-5) -> Tensor:
    """Singular values above ``tolerance`` times the largest: (b, d, d) -> (b,) integer."""
    values = torch.linalg.svdvals(weight)
    return (values > tolerance * values[..., :1]).sum(-1)


# ---- the method -------------------------------------------------------------------------------------------------


class AttentionSVM(ZooModule):
    """One-layer softmax attention on token selection problems, and the SVM that its weight converges to.

    Only the attention weight trains; the value head v comes with the data and stays. One training step is one step
    of normalised gradient descent on every problem in the batch. There is no held-out set: validation and test
    look at the problems that were trained, by loss, probability and correlation with the SVM.

    Everything is computed in ``precision`` (float64, as the authors do) whatever the Trainer's precision: mixed
    precision leaves float64 alone, and autocast is switched off for float32. ``.to(torch.float32)`` works too
    (inputs follow the weight's dtype), for devices without float64; the exact softmax gradient is what keeps it
    converging there. A SVM is always solved in float64.

    Args:
        problems: independent problems s, each with an own weight.
        dim: token size d.
        parametrisation: "W" (d x d), or "KQ": W = K Qᵀ.
        rank: columns m of K and Q, which bound the rank of W; None = dim. Only for "KQ".
        head: "linear" (f = vᵀ c) or "relu" (f = 1ᵀ relu(Vᵀ c), where attention may keep several tokens).
        attention: "cross" (z from the data) or "self" (z_i = the token ``query_index`` of sequence i).
        query_index: which token asks, for "self".
        normalise: False trains by plain gradient descent, whose norm does not diverge in any reasonable time.
        lr: length η of every step (step size without ``normalise``).
        eps: ε beside the gradient's norm.
        ridge: factor of ‖K‖² + ‖Q‖² in the loss; without effect until the gradient itself vanishes. Only for "KQ".
        authors_softmax: take the gradient of PyTorch's softmax, as the authors do, which cancels once a token is
            selected: harmless in float64, fatal in float32.
        svm_tokens: "selected" (argmax of the attention: local convergence) or "optimal" (argmax of y times the
            token's own value: global convergence, rank study), the tokens that the SVM keeps.
        infeasible: what `measure` and ``test`` do with problems that no W separates: "raise", or "skip".
        kept_above, dropped_below: multi-token runs keep the tokens with probability above the first; runs with a
            probability between the two have not converged and are left out, as are runs that drop no token.
        history: iterations of W that are kept for `plot_convergence`; doubling their spacing when full. 0: none.
        history_every: spacing of these to begin with.
        precision: "float64" or "float32", of the weight.
    Shapes:
        x: (b, n, t, d); z: (b, n, d), absent for "self"; v: (b, d), or (b, d, d) with head "relu"; y: (b, n) -1 or +1;
        index: (b,) integer, the problem that each row is; absent: row i is problem i, all of them.
        forward returns score (b, n) and attention map (b, n, t).
    Example:
        >>> model = AttentionSVM(problems=1, dim=6)
        >>> score, attention = model(torch.randn(1, 3, 4, 6), torch.randn(1, 3, 6), torch.randn(1, 6))
        >>> attention.shape
        torch.Size([1, 3, 4])
    """

    variants: ClassVar = {"tiny": {"problems": 8}}
    monitor, mode = "val/loss", "min"

    def __init__(
        self,
        problems: int = 100,
        dim: int = 10,
        parametrisation: Literal["W", "KQ"] = "W",
        rank: int | None = None,
        head: Literal["linear", "relu"] = "linear",
        attention: Literal["cross", "self"] = "cross",
        query_index: int = 0,
        normalise: bool = True,
        lr: float = 0.1,
        eps: float = EPS,
        ridge: float = EPS,
        authors_softmax: bool = False,
        svm_tokens: Literal["selected", "optimal"] = "selected",
        infeasible: Literal["raise", "skip"] = "raise",
        kept_above: float = 1e-3,
        dropped_below: float = 1e-6,
        history: int = 101,
        history_every: int = 20,
        precision: Literal["float64", "float32"] = "float64",
    ):
        super().__init__()
        self.save_hyperparameters()
        if problems < 1 or dim < 1 or history < 0 or history_every < 1:
            raise ValueError(
                f"problems={problems}, dim={dim}, history_every={history_every} must be at least 1, "
                f"history={history} at least 0."
            )
        if rank is not None and (parametrisation != "KQ" or not 1 <= rank <= dim):
            raise ValueError(f"rank={rank} needs parametrisation='KQ' and lies in 1...dim={dim}.")
        shape = (problems, dim, dim if rank is None else rank)
        dtype = getattr(torch, precision)
        # As `nn.Linear` starts: uniform up to 1 / sqrt(d).
        names = ("W",) if parametrisation == "W" else ("K", "Q")
        for name in names:
            start = torch.empty(shape, dtype=dtype).uniform_(-1 / math.sqrt(dim), 1 / math.sqrt(dim))
            self.register_parameter(name, nn.Parameter(start))
        self.register_buffer("iteration", torch.zeros(problems, dtype=torch.long))
        self.register_buffer("history_iteration", torch.full((problems, history), -1))
        self.register_buffer("history_weight", torch.zeros(problems, history, dim, dim, dtype=dtype))
        self.measured: list[dict[str, Any]] = []  # by the last test or `measure`: what `plot_convergence` draws
        scores = ("loss", "probability", "optimal")
        fits = ("nuclear_ratio", "rank", "rank_svm", "feasible")
        several = {
            "linear": ("corr_fro", "corr_nuc", "nuclear_bias"),
            "relu": ("corr_mm", "corr_svmeq", "corr_1token", "gain", "valid", "kept"),
        }[head]
        self.val_metrics = nn.ModuleDict({name: MeanMetric().set_dtype(torch.float64) for name in scores[:2]})
        self.test_metrics = nn.ModuleDict(
            {name: MeanMetric().set_dtype(torch.float64) for name in (*scores, *fits, *several)}
        )

    # ---- the weight ---------------------------------------------------------------------------------------------

    def factors(self, index: Tensor | None = None) -> list[Tensor]:
        """[W] or [K, Q] of the problems ``index`` (all without one): each (b, d, d) or (b, d, m)."""
        parts = [self.W] if self.hparams.parametrisation == "W" else [self.K, self.Q]
        return parts if index is None else [part[index] for part in parts]

    def weight(self, index: Tensor | None = None) -> Tensor:
        """W, or K Qᵀ: (b, d, d)."""
        parts = self.factors(index)
        return parts[0] if len(parts) == 1 else parts[0] @ parts[1].mT

    def forward(self, x: Tensor, z: Tensor | None, v: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, z, v = self._checked(x, z, v, index)
        device = x.device.type
        if not x.is_meta and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self._forward(x, z, v, index)
        return self._forward(x, z, v, index)

    def _forward(self, x: Tensor, z: Tensor, v: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
        attention = attend(x, z, *self.factors(index), exact=not self.hparams.authors_softmax)
        context = (attention.unsqueeze(-2) @ x).squeeze(-2)
        return value_head(context, v, self.hparams.head), attention

    def _checked(self, x: Tensor, z: Tensor | None, v: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """x, z and v in the weight's dtype, z taken from x for self-attention.

        Raises:
            ValueError: saying which shape came and which was expected.
        """
        hp, dtype = self.hparams, self.factors()[0].dtype
        if x.ndim != 4 or x.shape[-1] != hp.dim or 0 in x.shape:
            raise ValueError(
                f"'x' has shape {tuple(x.shape)}; expected (problems, sequences, tokens, {hp.dim}), none of them 0."
            )
        b, n, t, d = x.shape
        if hp.attention == "self":
            if not -t <= hp.query_index < t:
                raise ValueError(f"query_index={hp.query_index} is outside sequences of {t} tokens.")
            z = x[:, :, hp.query_index]
        if z is None:
            raise ValueError("'z' is missing: cross attention needs a token per sequence. Or set attention='self'.")
        if z.shape != (b, n, d):
            raise ValueError(f"'z' has shape {tuple(z.shape)}; with this 'x' it must be {(b, n, d)}.")
        wanted = (b, d) if hp.head == "linear" else (b, d, d)
        if v.shape != wanted:
            raise ValueError(f"'v' has shape {tuple(v.shape)}; head={hp.head!r} expects {wanted}.")
        if index is None and b != hp.problems:
            raise ValueError(
                f"The batch holds {b} problems and the module {hp.problems}: pass 'index', the number of each problem."
            )
        if index is not None and index.shape != (b,):
            raise ValueError(f"'index' has shape {tuple(index.shape)}; expected ({b},), one number a problem.")
        return x.to(dtype), z.to(dtype), v.to(dtype)

    def check_index(self, index: Tensor | None) -> None:
        """Refuse numbers of problems that the module does not hold.

        Raises:
            ValueError: naming the number.
        """
        if index is None or index.is_meta or index.numel() == 0:
            return
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= self.hparams.problems:
            raise ValueError(
                f"'index' names problem {high if low >= 0 else low}; this module holds "
                f"0...{self.hparams.problems - 1}. Build it with problems=... as many as the data holds."
            )

    # ---- Lightning ----------------------------------------------------------------------------------------------

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        batch = super().on_before_batch_transfer(batch, dataloader_idx)
        self.check_index(batch.get("index"))
        return batch

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """(loss of each problem (b,) with the ridge, attention map): for training by a loop of one's own.

        Take the sum over problems to step, so that each has its own gradient.
        """
        score, attention = self(batch["x"], batch.get("z"), batch["v"], batch.get("index"))
        loss = selection_loss(score, batch["y"].to(score.dtype))
        if self.hparams.parametrisation == "KQ" and self.hparams.ridge:
            loss = loss + self.hparams.ridge * sum(p.square().sum((1, 2)) for p in self.factors(batch.get("index")))
        return loss, attention

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.record(batch.get("index"))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss, _ = self.loss(batch)
        self.log("train/loss", loss.detach().mean(), prog_bar=True, batch_size=len(loss))
        return loss.sum()

    @torch.no_grad()
    def record(self, index: Tensor | None = None) -> None:
        """Count one iteration of the problems ``index`` and keep W where one is due.

        Iterations 0, e, 2e, ... are kept. When ``history`` of them are full every second one is dropped and e doubles.
        """
        room = self.hparams.history
        rows = torch.arange(self.hparams.problems, device=self.iteration.device) if index is None else index
        now = self.iteration[rows]
        self.iteration[rows] = now + 1
        if room < 2:
            return
        # e is history_every doubled until iteration `now` fits into `room` slots.
        doubled = torch.log2((now // self.hparams.history_every // room + 1).double()).ceil().long()
        every = self.hparams.history_every * 2**doubled
        due = now % every == 0
        if not bool(due.any()):
            return
        rows, now, every = rows[due], now[due], every[due]
        full = (now > 0) & (now // every == (room + 1) // 2) & (self.history_iteration[rows, -1] >= 0)
        for row in rows[full].tolist():  # rare: thin out
            half = (room + 1) // 2
            for kept, empty in ((self.history_iteration, -1), (self.history_weight, 0)):
                kept[row, :half] = kept[row, ::2].clone()
                kept[row, half:] = empty
        slot = now // every
        self.history_iteration[rows, slot] = now
        self.history_weight[rows, slot] = self.weight(rows).to(self.history_weight.dtype)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        loss, attention = self.loss(batch)
        for name, values in (("loss", loss), ("probability", attention.amax(-1))):
            self.val_metrics[name].update(values)
            self.log(f"val/{name}", self.val_metrics[name], prog_bar=name == "probability", batch_size=len(loss))

    def on_test_start(self) -> None:
        self.measured = []

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        loss, _ = self.loss(batch)
        found = self.measure(batch)
        valid = {"corr_mm", "corr_svmeq", "corr_1token", "gain", "kept"}
        fitted = {"corr_fro", "corr_nuc", "nuclear_bias", "rank_svm"}
        for name, metric in self.test_metrics.items():
            values = loss if name == "loss" else found[name]
            if name in fitted:
                values = values[found["feasible"].bool()]
            elif name in valid:
                values = values[found["valid"].bool()]
            metric.update(values)
            self.log(f"test/{name}", metric, batch_size=len(loss))

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        found = self.predict(batch["x"], batch.get("z"), batch["v"], batch.get("index"))
        return {**found, "name": batch.get("name", [f"problem{i:04d}" for i in range(len(batch["x"]))])}

    @torch.no_grad()
    def predict(  # type: ignore[override]
        self, x: Tensor, z: Tensor | None, v: Tensor, index: Tensor | None = None
    ) -> dict[str, Tensor]:
        """What the attention selects, and the SVM that it should have converged to.

        Returns a dict of ``score`` (b, n), ``probabilities`` (b, n, t), ``selected`` (b, n) token indices,
        ``sequence_margin`` (b, n) = min_t (x_selected - x_t)ᵀ W z / ‖W‖_F, ``svm`` (b, d, d), ``margin`` (b,) of the
        SVM in its norm (Frobenius for "W", nuclear for "KQ"), ``correlation`` (b,) of W with it, ``feasible`` (b,)
        (where False, the three are 0), ``curve_iteration``, ``curve_probability`` and ``curve_correlation`` (b, r).

        Raises:
            ValueError: for NaN, shapes that do not fit, or problems that the module does not hold.
        """
        x, v = x.to(self.device), v.to(self.device)
        z = z.to(self.device) if z is not None else None
        index = index.to(self.device) if index is not None else None
        self.check_index(index)
        for name, value in (("x", x), ("z", z), ("v", v)):
            if value is not None:
                check_finite(value, name)
        score, attention = super().predict(x, z, v, index)
        x, z, _ = self._checked(x, z, v, index)
        weight = self.weight(index)
        selected = attention.argmax(-1)
        delta, cross, first = _constraints(x, z, nn.functional.one_hot(selected, x.shape[2]).bool())
        margin = torch.einsum("bkd,bde,bke->bk", delta, weight, cross).view(attention.shape)
        margin = margin.masked_fill(first, torch.inf).amin(-1)
        margin = torch.where(margin.isinf(), 0.0, margin)  # a sequence of one token
        svm = fit_svm(x, z, selected, "fro" if self.hparams.parametrisation == "W" else "nuc", infeasible="skip")
        iterations, probability, correlated = self._curves(x, z, index, [svm.weight])
        return {
            "score": score,
            "probabilities": attention,
            "selected": selected,
            "sequence_margin": margin / torch.linalg.matrix_norm(weight).unsqueeze(-1),
            "svm": svm.weight,
            "margin": svm.margin,
            "correlation": correlation(weight.double(), svm.weight),
            "feasible": svm.feasible,
            "curve_iteration": iterations,
            "curve_probability": probability,
            "curve_correlation": correlated[0],
        }

    # ---- the comparison with the SVM ----------------------------------------------------------------------------

    @torch.no_grad()
    def measure(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Compare the weight with the SVMs; every value (b,), float64.

        ``probability``: mean over sequences of the largest softmax probability. ``optimal``: share of sequences that
        select the token of highest value. ``nuclear_ratio``: ‖W‖_* / ‖W‖_2. ``rank``: of W; ``rank_svm``: of the SVM of
        the parametrisation's own norm. ``feasible``: 1 where an SVM exists (always, for selected tokens: W itself
        separates them). With head "linear" also ``corr_fro``, ``corr_nuc``: correlation of W with the SVM in either
        norm, and ``nuclear_bias``: the second less the first. With head "relu" instead ``valid``: 1 where the run
        converged to a proper subset of tokens (few do: the authors go on until they have 500); ``kept``: mean tokens
        kept a sequence; ``corr_mm`` (with the multi-token SVM), ``corr_svmeq`` (with W_fin + R W_mm), ``corr_1token``
        (with the SVM of the one most probable token), ``gain``: corr_svmeq - corr_1token; these are 0 where ``valid``
        is, and ``test`` averages over the others (nan where there are none).

        Raises:
            ValueError: for an infeasible problem with ``infeasible="raise"``.
        """
        hp, index = self.hparams, batch.get("index")
        own: Literal["fro", "nuc"] = "fro" if hp.parametrisation == "W" else "nuc"
        _, attention = ZooModule.predict(self, batch["x"], batch.get("z"), batch["v"], index)
        x, z, v = self._checked(batch["x"], batch.get("z"), batch["v"], index)
        weight, attention = self.weight(index).double(), attention.double()
        value = value_head(x, v, hp.head) * batch["y"].unsqueeze(-1)  # of each token by itself: (b, n, t)
        selected, best = attention.argmax(-1), value.argmax(-1)
        tokens = selected if hp.svm_tokens == "selected" else best
        spectrum = torch.linalg.svdvals(weight)
        norms = ("fro", "nuc") if hp.head == "linear" else (own,)
        svms = {norm: fit_svm(x, z, tokens, norm, hp.infeasible) for norm in norms}
        found = {
            "probability": attention.amax(-1).mean(-1),
            "optimal": (selected == best).double().mean(-1),
            "nuclear_ratio": spectrum.sum(-1) / spectrum[:, 0],
            "rank": rank(weight).double(),
            "rank_svm": rank(svms[own].weight).double(),
            "feasible": svms[own].feasible.double(),
        }
        if hp.head == "linear":
            found |= {f"corr_{norm}": correlation(weight, svm.weight) for norm, svm in svms.items()}
            found["nuclear_bias"] = found["corr_nuc"] - found["corr_fro"]
        else:
            found |= self._several(x, z, attention, weight, own)
        iterations, probability, curves = self._curves(x, z, index, [svm.weight for svm in svms.values()])
        keep = svms[own].feasible.cpu()
        named = {"fro": "Frobenius SVM", "nuc": "nuclear SVM"}
        self.measured.append(
            {"iteration": iterations.cpu()[keep], "Softmax probability": probability.cpu()[keep]}
            | {named[norm]: curve.cpu()[keep] for norm, curve in zip(svms, curves, strict=True)}
        )
        return found

    def _several(
        self, x: Tensor, z: Tensor, attention: Tensor, weight: Tensor, norm: Literal["fro", "nuc"]
    ) -> dict[str, Tensor]:
        """The multi-token decomposition W ~ W_fin + R W_mm, with R by least squares."""
        hp = self.hparams
        kept, dropped = attention > hp.kept_above, attention <= hp.dropped_below
        valid = (kept | dropped).flatten(1).all(-1) & dropped.flatten(1).any(-1)
        kept = torch.where(valid[:, None, None], kept, nn.functional.one_hot(attention.argmax(-1), x.shape[2]).bool())
        limit = fit_svm(x, z, kept, norm, "skip")
        finite = fit_finite(x, z, attention, kept, norm)
        valid &= limit.feasible & finite.isfinite().flatten(1).all(-1)
        single = fit_svm(x, z, attention.argmax(-1), norm, "skip")
        valid &= single.feasible  # the authors leave these out too
        finite, direction = torch.nan_to_num(finite), limit.weight
        distance = (direction * (weight - finite)).sum((-1, -2)) / direction.square().sum((-1, -2)).clamp_min(TINY)
        predicted = finite + distance[:, None, None] * direction
        found = {
            "corr_mm": correlation(weight, direction),
            "corr_svmeq": correlation(weight, predicted),
            "corr_1token": correlation(weight, single.weight),
            "kept": kept.double().sum(-1).mean(-1),
        }
        found["gain"] = found["corr_svmeq"] - found["corr_1token"]
        return {name: value * valid for name, value in found.items()} | {"valid": valid.double()}

    def _curves(
        self, x: Tensor, z: Tensor, index: Tensor | None, targets: list[Tensor]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Over the recorded iterations: their numbers, the softmax probability and the correlation with each target.

        All (b, r); ends with the weight as it is now. r counts the iterations that every problem here recorded.
        """
        rows = torch.arange(self.hparams.problems, device=x.device) if index is None else index
        recorded = self.history_iteration[rows]
        r = int((recorded >= 0).all(0).sum())
        numbers = torch.cat([recorded[:, :r], self.iteration[rows, None]], 1)
        weights = torch.cat([self.history_weight[rows, :r], self.weight(rows).unsqueeze(1)], 1)  # (b, r + 1, d, d)
        u = torch.einsum("brde,bne->brnd", weights.to(z.dtype), z)
        scores = torch.einsum("bntd,brnd->brnt", x, u)
        probability = torch.softmax(scores, -1).amax(-1).mean(-1)
        return numbers, probability, [correlation(weights.double(), target.unsqueeze(1)) for target in targets]

    def example_inputs(self) -> tuple[Tensor | None, ...]:
        """x, z, v and index of up to two problems with three sequences of four tokens."""
        hp, b = self.hparams, min(2, self.hparams.problems)
        like = {"dtype": self.factors()[0].dtype, "device": self.device}
        x, z = torch.randn(b, 3, max(4, hp.query_index + 1), hp.dim, **like), torch.randn(b, 3, hp.dim, **like)
        v = torch.randn(b, *[hp.dim] * (1 if hp.head == "linear" else 2), **like)
        return x, z if hp.attention == "cross" else None, v, torch.arange(b, device=self.device)

    def configure_optimizers(self) -> NormalisedGD:
        hp = self.hparams
        return NormalisedGD(self.parameters(), hp.lr, hp.eps, hp.normalise)

    # ---- authors' weights ---------------------------------------------------------------------------------------

    @classmethod
    def convert_state_dict(cls, content: dict) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The authors' ``SelfAttn`` as one problem. Theirs stores Wᵀ, Kᵀ and Qᵀ; v and V belong to the data here.

        Raises:
            ZooError: for keys that their model does not have.
        """
        content = unwrap(content)
        known = {"W.weight", "key.weight", "query.weight", "v", "value.weight"}
        names = {"W": "W.weight"} if "W.weight" in content else {"K": "key.weight", "Q": "query.weight"}
        if not set(names.values()) <= content.keys() <= known:
            raise ZooError(
                f"AttentionSVM: expected the keys W.weight, or key.weight and query.weight, with v and value.weight; "
                f"got {', '.join(sorted(content))}."
            )
        m, d = content[next(iter(names.values()))].shape
        hparams: dict[str, Any] = {"problems": 1, "dim": d, "parametrisation": "W" if "W" in names else "KQ"}
        if hparams["parametrisation"] == "KQ" and m != d:
            hparams["rank"] = m
        if "value.weight" in content:
            hparams["head"] = "relu"
        own = {name: content[key].T[None].double().contiguous() for name, key in names.items()}
        return hparams, {**cls(**hparams).state_dict(), **own}


# ---- the picture ------------------------------------------------------------------------------------------------


def plot_convergence(module: AttentionSVM, path: str | Path, batch: dict[str, Any] | None = None) -> Path:
    """Draw probability and correlation over the iterations, mean and spread over problems, as the paper does.

    Draws what the last ``trainer.test`` measured, or ``batch`` (keys x, z, v, y, index). `zoo predict` and
    ``TokenSelectionDataModule.write`` leave the same picture beside their tables.

    Args:
        path: file to write; the suffix chooses the format (png, pdf, svg).
    Raises:
        ZooError: if nothing was measured yet, or matplotlib is not installed.
    """
    if batch is not None:
        module.measured = []
        module.measure({k: a.to(module.device) if isinstance(a, Tensor) else a for k, a in batch.items()})
    parts = [part for part in module.measured if len(part["iteration"])]
    if not parts:
        raise ZooError("Nothing to draw yet: run trainer.test(module, data) first, or pass batch=.")
    length = min(part["iteration"].shape[1] for part in parts)
    joined = {name: torch.cat([part[name][:, :length] for part in parts]) for name in parts[0]}
    return draw_curves(joined.pop("iteration")[0], joined, path)


def draw_curves(iterations: Tensor, curves: dict[str, Tensor], path: str | Path) -> Path:
    """A panel for the probability and one for the correlations.

    Shapes:
        iterations: (r,); each curve: (problems, r). The key "Softmax probability" goes to the first panel.
    Raises:
        ZooError: if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # no window, no global state
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ZooError("The convergence picture needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    for name, values in curves.items():
        panel = panels[0 if name == "Softmax probability" else 1]
        mean, spread = values.double().mean(0), values.double().std(0, correction=0)
        panel.plot(iterations.tolist(), mean.tolist(), linewidth=2, label=name)
        panel.fill_between(iterations.tolist(), (mean - spread).tolist(), (mean + spread).tolist(), alpha=0.15)
    for panel, title in zip(panels, ("Softmax probability", "Correlation coefficient"), strict=True):
        panel.set(xlabel="Iterations", ylabel=title, ylim=(0, 1.05))
        panel.grid(True)
        panel.legend(loc="lower right")
    path = Path(path)
    with atomic_write(path) as part:
        figure.savefig(part, dpi=120)
    return path
