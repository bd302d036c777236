"""DeepQuantumSensing: finds an optical setup that senses at the Heisenberg limit in an environment that nobody knows.

Paper: Zeqiao Zhou, Yuxuan Du, Xu-Fei Yin, Shanshan Zhao, Xinmei Tian, Dacheng Tao, "Optical Quantum Sensing for
Agnostic Environments via Deep Learning", arXiv:2311.07203 (2023).
Code by the authors: https://github.com/ZeddTheGoat/Deep-learning-Quantum-Sensing, MIT.

In: optical setups as graphs, and the quantum Fisher information (QFI) that some of them showed. Out: the QFI that any
other setup would show, a setup chosen by it, and the parameter φ estimated with that setup.

    F(ψ) = 4 (<ψ|G²|ψ> - <ψ|G|ψ>²)  <=  (g_max - g_min)²       = N² for G = Σ σ/2, while unentangled light has N
    F̂ = Linear(max_nodes h),   h ← MLP(β skip(h) + (1 - β) Σ_j softmax_j(q·k_j / √c) v_j)     over the setup's graph
    p(φ) = Σ_{f=0}^{R} a_f cos fφ + b_f sin fφ,   R = g_max - g_min:   2R + 1 known phases fix it; φ by likelihood

Equal to the authors' code: the optics, the setups' graphs, the labels, the predictor, its loss and optimiser, and their
MLP. Not public, hence ours: how candidates are drawn and scored (`search`) and the trigonometric interpolation
(`TrigInterpolator`, `calibrate`), of which the abstract states the purpose; and environments with an axis for each
photon, dephasing, labels with shot noise, the Huber and ranking losses, which are off by default.

Index legend: b setups, t devices, n nodes of a graph = t + 2, N paths and photons, f node features, c hidden size,
h heads, k outcomes 2^N, m calibration phases, o offsets, r repetitions.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import CatMetric

from zoo.core import ZooError, ZooModule, check_finite, unwrap
from zoo.graph.physics.data_optical_sensing import (
    BS,
    HWP,
    PBS,
    QWP,
    Laboratory,
    check_setups,
    multinomial,
    mutate_setups,
    random_setups,
)

log = logging.getLogger(__name__)


# ---- the graph of a setup ---------------------------------------------------------------------------------------


def encode(devices: Tensor, paths: int, angles: int) -> tuple[Tensor, Tensor, Tensor]:
    """The graph of a setup: a node for each device, one before and one after all, joined along the paths of light.

    Features are one-hot over (start, BS, PBS, HWP at each angle, QWP at each angle, R, PAIR, HH, VV, end), then which
    paths run through the node. Two nodes are joined if one comes right after the other on some path.

    Shapes:
        devices: (b, t, 4)
        returns: features (b, n, 2 angles + 8 + N), adjacency (b, n, n) bool, symmetric, and mask (b, n), True = node
    """
    kind, first, second, angle = devices.unbind(-1)
    used, lane = kind != 0, torch.arange(paths, device=devices.device)
    on = ((first.unsqueeze(-1) == lane) | (second.unsqueeze(-1) == lane)) & used.unsqueeze(-1)
    ends = torch.ones_like(on[:, :1])
    on = torch.cat([ends, on, ends], 1)  # (b, n, N)
    mask = F.pad(used, (1, 1), value=True)
    order = on.to(torch.int16).cumsum(1).to(torch.int16)  # nodes so far on each path
    follows = (order.unsqueeze(1) == order.unsqueeze(2) + 1) & on.unsqueeze(1) & on.unsqueeze(2)  # (b, i, j, N)
    adjacency = follows.any(-1)
    # BS 1, PBS 2, HWP 3..., QWP 3 + angles..., R, PAIR, HH, VV; the last is the end
    turned = angle - 1 + torch.where(kind == QWP, 3 + angles, 3)
    plate = (kind == HWP) | (kind == QWP)
    code = torch.where((kind == BS) | (kind == PBS), kind, kind - QWP + 2 + 2 * angles)
    code = F.pad(torch.where(plate, turned, code), (1, 0))
    code = F.pad(code, (0, 1), value=2 * angles + 7)
    types = (code.unsqueeze(-1) == torch.arange(2 * angles + 8, device=devices.device)) & mask.unsqueeze(-1)
    return torch.cat([types, on], -1).float(), adjacency | adjacency.mT, mask


class NodeNorm(nn.BatchNorm1d):
    """Batch norm over the nodes of all graphs; ``weight`` of 0 leaves a row out of the statistics.

    Shapes:
        x: (rows, c); weight: (rows,) or None; returns: (rows, c)
    """

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:  # type: ignore[override]
        if weight is None or not self.training:
            return super().forward(x)
        w = weight.to(x.dtype).unsqueeze(-1)
        count = w.sum()
        mean = (w * x).sum(0) / count
        centred = x - mean
        variance = (w * centred.square()).sum(0) / count
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            unbiased = variance * count / (count - 1)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        return centred * torch.rsqrt(variance + self.eps) * self.weight + self.bias


class _PackedAttention(torch.autograd.Function):
    """Attention between nodes without blanks, averaged over heads, and the skip, from their common projection.

    On a CPU this takes a third of the time of ``scaled_dot_product_attention`` between graphs of 20 nodes: queries,
    keys and values stay where the projection put them, and so do their gradients.

    Shapes:
        projected: (rows, (3 h + 1) c), queries, keys, values, skip; rows, places, adjacency: see `GraphAttention`
        returns: (rows, c) twice
    """

    @staticmethod
    def forward(
        ctx: Any, projected: Tensor, rows: Tensor, places: Tensor, adjacency: Tensor, heads: int
    ) -> tuple[Tensor, Tensor]:
        b, n, _ = adjacency.shape
        c = projected.shape[1] // (3 * heads + 1)
        # nobody looks at blank places, whatever stands there
        grid = projected[:, :-c].index_select(0, places).view(b, n, 3, heads, c)
        q, k, v = grid.unbind(2)
        weight = projected.new_empty(heads, b, n, n)
        for h in range(heads):
            torch.bmm(q[:, :, h], k[:, :, h].mT, out=weight[h])
        weight.mul_(c**-0.5).masked_fill_(~adjacency, -torch.inf)
        weight = torch.softmax(weight, -1)
        out = torch.bmm(weight[0], v[:, :, 0])
        for h in range(1, heads):
            out.baddbmm_(weight[h], v[:, :, h])
        ctx.save_for_backward(grid, rows, weight)
        return out.flatten(0, 1).index_select(0, rows).div_(heads), projected[:, -c:].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, skip: Tensor) -> tuple[Tensor | None, ...]:
        grid, rows, weight = ctx.saved_tensors
        b, n, _, heads, c = grid.shape
        q, k, v = grid.unbind(2)
        full = grad.new_zeros(b * n, c).index_copy_(0, rows, grad / heads).view(b, n, c)
        found = torch.empty_like(grid)
        toward = torch.empty_like(weight)
        for h in range(heads):
            torch.bmm(full, v[:, :, h].mT, out=toward[h])
            torch.bmm(weight[h].mT, full, out=found[:, :, 2, h])
        toward.mul_(weight)  # and through the softmax: a (g - Σ a g)
        toward.sub_(weight * toward.sum(-1, keepdim=True)).mul_(c**-0.5)
        for h in range(heads):
            torch.bmm(toward[h], k[:, :, h], out=found[:, :, 0, h])
            torch.bmm(toward[h].mT, q[:, :, h], out=found[:, :, 1, h])
        gradient = grad.new_empty(len(rows), (3 * heads + 1) * c)
        torch.index_select(found.view(b * n, -1), 0, rows, out=gradient[:, :-c])
        gradient[:, -c:] = skip
        return gradient, None, None, None, None


class GraphAttention(nn.Module):
    """Attention of each node over its neighbours, averaged over heads, with a gated skip (graph transformer).

        o_i = mean_h Σ_j softmax_j(q_i·k_j / √c) v_j,   y_i = β_i W x_i + (1 - β_i) o_i,
        β_i = sigmoid(w·[o_i, W x_i, o_i - W x_i])

    Shapes:
        x: (rows, c) nodes; rows: their places in the (b * n) grid, or None if all of it is there
        places: (b * n,) which row stands in each place, any at all in blank ones, or None as ``rows``
        adjacency: (b, n, n) bool, at least one True a row; returns: (rows, c)
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.dim, self.heads, self.dropout = dim, heads, dropout
        self.project = nn.Linear(dim, 3 * heads * dim + dim)  # query, key, value, skip
        self.gate = nn.Linear(3 * dim, 1, bias=False)

    def forward(self, x: Tensor, rows: Tensor | None, places: Tensor | None, adjacency: Tensor) -> Tensor:
        b, n, _ = adjacency.shape
        projected = self.project(x)
        dropout = self.dropout if self.training else 0.0
        whole = projected.dtype in (torch.float32, torch.float64)
        if whole and rows is not None and places is not None and not dropout:
            out, skip = _PackedAttention.apply(projected, rows, places, adjacency, self.heads)
        else:
            qkv, skip = projected.split([3 * self.heads * self.dim, self.dim], -1)
            if places is not None:
                qkv = qkv.index_select(0, places)
            q, k, v = qkv.view(b, n, 3, self.heads, self.dim).permute(2, 0, 3, 1, 4)
            out = F.scaled_dot_product_attention(q, k, v, adjacency.unsqueeze(1), dropout)
            out = out.mean(1).flatten(0, 1)
            out = out if rows is None else out[rows]
        # w·[o, s, o - s] without putting them side by side
        first, second, third = self.gate.weight.unflatten(1, (3, self.dim)).unbind(1)
        gate = torch.sigmoid(F.linear(out, first + third) + F.linear(skip, second - third))
        return out + gate * (skip - out)


class GraphBlock(nn.Module):
    """Attention, then a perceptron with batch norm. No residual: the gate's skip is the only way past."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.attention = GraphAttention(dim, heads, dropout)
        self.widen, self.norm = nn.Linear(dim, 4 * dim), NodeNorm(4 * dim)
        self.narrow, self.dropout = nn.Linear(4 * dim, dim), nn.Dropout(dropout)

    def forward(
        self, x: Tensor, rows: Tensor | None, places: Tensor | None, adjacency: Tensor, weight: Tensor | None
    ) -> Tensor:
        x = self.attention(x, rows, places, adjacency)
        return self.narrow(self.dropout(F.gelu(self.norm(self.widen(x), weight))))


class GraphPredictor(nn.Module):
    """Setup to QFI: embedding, blocks, largest value over nodes, linear (the authors' ``GNN_QFM``).

    On a CPU only real nodes are computed with; elsewhere blank places go along, which needs no look at the data.

    Shapes:
        devices: (b, t, 4); returns: (b,)
    """

    def __init__(self, paths: int, angles: int, hidden: int, layers: int, heads: int, dropout: float):
        super().__init__()
        self.paths, self.angles = paths, angles
        self.embed, self.norm = nn.Linear(2 * angles + 8 + paths, hidden), NodeNorm(hidden)
        self.blocks = nn.ModuleList(GraphBlock(hidden, heads, dropout) for _ in range(layers))
        self.head = nn.Linear(hidden, 1)

    def forward(self, devices: Tensor, pack: bool | None = None) -> Tensor:
        if pack is None:
            pack = devices.device.type == "cpu" and not torch.compiler.is_compiling()
        if pack and devices.shape[1] % 2:
            devices = F.pad(devices, (0, 0, 0, 1))  # products between 19 nodes take twice the time of 20
        x, adjacency, mask = encode(devices, self.paths, self.angles)
        b, n, _ = x.shape
        x, flat = x.flatten(0, 1), mask.flatten()
        rows = flat.nonzero().squeeze(1) if pack else None
        weight = None if pack else flat
        x = x if rows is None else x[rows]
        places = None if rows is None else (flat.cumsum(0) - 1).clamp_min(0)
        # A blank place looks at itself: a row without anything to look at would give NaN.
        adjacency = adjacency | torch.diag_embed(~mask)
        x = F.gelu(self.norm(self.embed(x), weight))
        for block in self.blocks:
            x = block(x, rows, places, adjacency, weight)
        if rows is not None:
            x = x.index_select(0, places)
        x = x.view(b, n, -1).masked_fill(~mask.unsqueeze(-1), -torch.inf).amax(1)
        return self.head(x).squeeze(-1)


class SequencePredictor(nn.Module):
    """The baseline without a graph: the same features in a row through a perceptron (the authors' ``MLP``).

    Shapes:
        devices: (b, t, 4) with t + 2 = ``length``; returns: (b,)
    """

    def __init__(self, paths: int, angles: int, hidden: int, length: int):
        super().__init__()
        self.paths, self.angles, self.length = paths, angles, length
        self.layers = nn.Sequential(
            nn.Linear((2 * angles + 8 + paths) * length, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
        )
        self.head = nn.Linear(hidden, 1)

    def forward(self, devices: Tensor) -> Tensor:
        room = self.length - 2
        if devices.shape[1] > room:
            raise ValueError(f"Setups of {devices.shape[1]} devices came; predictor='mlp' has length={self.length}.")
        x, _, _ = encode(F.pad(devices, (0, 0, 0, room - devices.shape[1])), self.paths, self.angles)
        return self.head(self.layers(x.flatten(1))).squeeze(-1)


def qfi_loss(predicted: Tensor, qfi: Tensor, loss: Literal["mse", "huber"] = "mse", rank_weight: float = 0.0) -> Tensor:
    """Squared (or Huber) error, plus ``rank_weight`` times the logistic loss of every pair's order.

    Shapes:
        predicted, qfi: (b,); returns: ()
    """
    predicted, qfi = predicted.float(), qfi.float()
    total = F.mse_loss(predicted, qfi) if loss == "mse" else F.huber_loss(predicted, qfi)
    if rank_weight:
        sign = torch.sign(qfi.unsqueeze(1) - qfi)
        pairs = F.softplus(-sign * (predicted.unsqueeze(1) - predicted)) * sign.abs()
        total = total + rank_weight * pairs.sum() / sign.abs().sum().clamp_min(1)
    return total


# ---- trigonometric interpolation --------------------------------------------------------------------------------


class TrigInterpolator:
    """A real trigonometric polynomial of known degree R through measured values.

        p(φ) = a_0 + Σ_{f=1}^{R} a_f cos fφ + b_f sin fφ

    An outcome's probability after ``exp(-iφG)`` is exactly of this form, with R = g_max - g_min. Equally spaced phases
    make it a discrete Fourier transform; any others work too (least squares).

    Args:
        phases: radians; at least 2R + 1 different ones in a full turn, or the frequencies cannot be told apart.
        values: measured at them.
        degree: R.
        allow_alias: with fewer phases take the polynomial of smallest norm, which is wrong between them.
    Shapes:
        phases: (m,); values: (m, k); coefficients: (2R + 1, k)
    Raises:
        ValueError: if the phases do not determine the polynomial.
    Example:
        >>> phases = torch.arange(3) * 2 * torch.pi / 3
        >>> curve = TrigInterpolator(phases, torch.cos(phases).unsqueeze(-1), degree=1)
        >>> round(float(curve(torch.tensor([1.0]))), 4)
        0.5403
    """

    def __init__(self, phases: Tensor, values: Tensor, degree: int, allow_alias: bool = False):
        if phases.ndim != 1 or values.ndim != 2 or len(values) != len(phases) or degree < 0:
            raise ValueError(
                f"phases {tuple(phases.shape)}, values {tuple(values.shape)} and degree={degree} do not fit; expected "
                "(m,), (m, k) and a degree of at least 0."
            )
        self.degree = degree
        basis = self.basis(phases.double())
        rank = int(torch.linalg.matrix_rank(basis, rtol=1e-9))
        if rank < 2 * degree + 1 and not allow_alias:
            raise ValueError(
                f"{len(phases)} phases determine {rank} coefficients; degree {degree} has {2 * degree + 1}. Measure "
                f"at {2 * degree + 1} different phases or more, such as 2 pi j / {2 * degree + 1}."
            )
        self.coefficients = torch.linalg.pinv(basis, rtol=1e-9) @ values.double()

    def basis(self, phases: Tensor, derivative: bool = False) -> Tensor:
        f = torch.arange(1, self.degree + 1, dtype=phases.dtype, device=phases.device)
        angle = phases.unsqueeze(-1) * f
        constant = torch.zeros_like(phases) if derivative else torch.ones_like(phases)
        c, s = (-f * angle.sin(), f * angle.cos()) if derivative else (angle.cos(), angle.sin())
        return torch.cat([constant.unsqueeze(-1), c, s], -1)

    def __call__(self, phases: Tensor) -> Tensor:
        """Values at phases (...): (..., k)."""
        return self.basis(phases.double()) @ self.coefficients

    def derivative(self, phases: Tensor) -> Tensor:
        """Slopes at phases (...): (..., k)."""
        return self.basis(phases.double(), derivative=True) @ self.coefficients

    def power(self) -> Tensor:
        """Strength of each frequency 1...R, summed over outcomes: (R,)."""
        r = self.degree
        return self.coefficients[1:].square().sum(-1).view(2, r).sum(0)


class Sensor:
    """A calibrated setup: its fringes, the basis that it is read out in, and where they repeat.

    A measured fringe that should touch 0 may cross it. Smoothly, over the calibration's own error s, it is kept above:
    p̃ = (p + sqrt(p² + 4 s²)) / 2.

    Args:
        curve: probabilities of all outcomes as functions of the phase.
        basis: axis that every photon is measured along.
        error: s, standard error of each outcome's probability (k,); None for exact curves.
        noise: power that a frequency which is not there shows on average (0 for exact curves).
    Attributes:
        period: radians after which everything repeats. An estimate is one of phi + j * period.
        offsets: known phases (o,) to add while measuring, a third of the fastest fringe apart: with one alone, phi and
            its mirror image on a fringe look the same.
    Raises:
        ZooError: if no outcome depends on the phase.
    """

    def __init__(self, curve: TrigInterpolator, basis: str, error: Tensor | None = None, noise: float = 0.0):
        self.curve, self.basis = curve, basis
        self.error = torch.full_like(curve.coefficients[0], 1e-9) if error is None else error.double()
        present = (curve.power() > max(8 * noise, 1e-12)).nonzero().flatten().add(1).tolist()
        if not present:
            raise ZooError(f"No outcome of this setup depends on the phase when measured along {basis}.")
        self.period = 2 * math.pi / math.gcd(*present)
        self.offsets = torch.arange(3) * 2 * math.pi / (3 * max(present))

    def fringes(self, phases: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities p̃ > 0 and their slopes at phases (...): both (..., k)."""
        p = self.curve(phases)
        root = (p.square() + 4 * self.error.square()).sqrt()
        above = (p + root) / 2
        return above, self.curve.derivative(phases) * above / root

    def fisher(self, phases: Tensor) -> Tensor:
        """Classical Fisher information of one event, ``Σ p'² / p``: (...)."""
        p, slope = self.fringes(phases)
        return (slope.square() / p).sum(-1)

    def estimate(
        self, counts: Tensor, interval: tuple[float, float] | None = None, grid: int = 2048
    ) -> tuple[Tensor, Tensor]:
        """The phase of largest (Poisson) likelihood ``Σ n log p̃ - n_total p̃``: on a grid, then by Fisher scoring.

        Args:
            counts: events of each outcome with each of `offsets` added to the phase.
            interval: radians; one period around 0 by default.
        Shapes:
            counts: (r, o, k); returns: phase (r,) in the interval, and its standard error (r,)
        Raises:
            ValueError: if the counts do not fit the offsets and outcomes.
        """
        k = self.curve.coefficients.shape[-1]
        if counts.ndim != 3 or counts.shape[1:] != (len(self.offsets), k):
            raise ValueError(
                f"counts have shape {tuple(counts.shape)}; expected (repetitions, {len(self.offsets)}, {k}): one row "
                "an offset, one column an outcome."
            )
        check_finite(counts, "counts")
        low, high = interval or (-self.period / 2, self.period / 2)
        counts, total = counts.double(), counts.double().sum(-1)
        points = low + (high - low) * torch.arange(grid, dtype=torch.float64) / grid
        likelihood = torch.zeros(len(counts), grid, dtype=torch.float64)
        for i, offset in enumerate(self.offsets):
            p, _ = self.fringes(points + offset)
            likelihood += counts[:, i] @ p.log().mT - total[:, i : i + 1] * p.sum(-1)
        phi = points[likelihood.argmax(1)]
        step = (high - low) / grid
        for _ in range(20):
            p, slope = self.fringes(phi.unsqueeze(1) + self.offsets)  # (r, o, k)
            score = ((counts / p - total.unsqueeze(-1)) * slope).sum((1, 2))
            information = (total * (slope.square() / p).sum(-1)).sum(1)
            phi = phi + (score / information.clamp_min(1e-12)).clamp(-step, step)
        return low + (phi - low).remainder(high - low), information.clamp_min(1e-12).rsqrt()


def calibrate(
    laboratory: Laboratory,
    setup: Tensor,
    shots: int = 20_000,
    points: int | None = None,
    bases: Sequence[str] = ("X", "Y", "Z"),
    allow_alias: bool = False,
    generator: torch.Generator | None = None,
) -> Sensor:
    """Learn a setup's fringes from counts at known phases, in the basis that then tells most about the phase.

    Args:
        laboratory: where the counts come from; anything with ``counts`` and ``environment.degree`` does.
        shots: events at each phase in each basis.
        points: known phases over a full turn; 2 degree + 1 by default, the fewest that suffice.
        bases: axes to try.
    Shapes:
        setup: (t, 4)
    Raises:
        ZooError: if the phase shows in none of the bases.
    """
    degree = laboratory.environment.degree
    points = 2 * degree + 1 if points is None else points
    phases = torch.arange(points, dtype=torch.float64) * 2 * math.pi / points
    turn = torch.arange(64 * degree, dtype=torch.float64) * 2 * math.pi / (64 * degree)
    best: tuple[float, Sensor] | None = None
    for basis in bases:
        counts = laboratory.counts(setup, phases, shots, basis, generator)
        curve = TrigInterpolator(phases, counts / shots, degree, allow_alias)
        events = points * shots / (2 * degree + 1)  # per fitted coefficient
        error = (counts.sum(0).clamp_min(1) / (points * shots) / events).sqrt()
        try:
            sensor = Sensor(curve, basis, error, noise=2 / (points * shots))
        except ZooError:
            continue
        told = float(sensor.fisher(turn).mean())
        if best is None or told > best[0]:
            best = told, sensor
    if best is None:
        raise ZooError(f"This setup does not see the phase: flat fringes along {', '.join(bases)}.")
    return best[1]


def trial_errors(
    laboratory: Laboratory,
    setup: Tensor,
    sensor: Sensor,
    shots: int = 2000,
    trials: int = 200,
    generator: torch.Generator | None = None,
) -> dict[str, float]:
    """Estimate hidden phases and compare with what theory allows.

    Phases are drawn uniformly from one period of the true fringes; ``shots`` events are split over the offsets.

    Returns:
        ``rmse`` in radians (modulo the period); ``cramer_rao`` of the measurement, ``quantum`` = (shots F)^-1/2 of the
        best possible one, ``shot_noise`` = (shots N)^-1/2 of unentangled light; ``ratio`` = rmse / cramer_rao.
    """
    environment = laboratory.environment
    psi = laboratory.simulator(setup.unsqueeze(0))[0]
    degree = environment.degree
    known = torch.arange(2 * degree + 1, dtype=torch.float64) * 2 * math.pi / (2 * degree + 1)
    true = Sensor(TrigInterpolator(known, environment.probabilities(psi, known, sensor.basis), degree), sensor.basis)
    phi = (torch.rand(trials, dtype=torch.float64, generator=generator) - 0.5) * true.period
    o = len(sensor.offsets)
    share = [shots // o + (i < shots % o) for i in range(o)]
    counts, information = [], torch.zeros(trials, dtype=torch.float64)
    for offset, part in zip(sensor.offsets.tolist(), share, strict=True):
        p = environment.probabilities(psi, phi + offset, sensor.basis)
        counts.append(multinomial(p, part, generator))
        # where an outcome's chance touches 0 its p'²/p is a limit that the quotient misses: look right beside it
        information += part * torch.stack([true.fisher(phi + offset + e) for e in (-1e-4, 1e-4)]).mean(0)
    found, _ = sensor.estimate(torch.stack(counts, 1), (-true.period / 2, true.period / 2))
    error = (found - phi + true.period / 2).remainder(true.period) - true.period / 2
    rmse, bound = float(error.square().mean().sqrt()), float((1 / information.clamp_min(1e-12)).mean().sqrt())
    qfi = float(environment.qfi(psi.unsqueeze(0)))
    return {
        "rmse": rmse,
        "cramer_rao": bound,
        "quantum": 1 / math.sqrt(shots * max(qfi, 1e-12)),
        "shot_noise": 1 / math.sqrt(shots * environment.paths),
        "ratio": rmse / bound,
    }


# ---- scores -----------------------------------------------------------------------------------------------------


def average_ranks(x: Tensor) -> Tensor:
    """Ranks from 1, equal values sharing the mean of theirs: (n,) float64."""
    _, inverse, count = torch.unique(x, return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    return (last - (count.double() - 1) / 2)[inverse]


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Rank correlation, 0 where either is constant: ()."""
    a, b = (r - r.mean() for r in (average_ranks(a), average_ranks(b)))
    return (a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-12)


def best_of_random(values: Tensor, draws: int) -> float:
    """Expected largest of ``draws`` values drawn at random without putting back."""
    ordered, n = values.double().sort().values, len(values)
    i = torch.arange(1, n + 1, dtype=torch.float64, device=values.device)
    # P(largest is the i-th) = C(i - 1, draws - 1) / C(n, draws)
    ways = torch.lgamma(i) - torch.lgamma((i - draws + 1).clamp_min(1)) - math.lgamma(draws)
    every = math.lgamma(n + 1) - math.lgamma(draws + 1) - math.lgamma(n - draws + 1)
    return float((ordered * (ways - every).exp() * (i >= draws)).sum())


# ---- the method -------------------------------------------------------------------------------------------------


class DeepQuantumSensing(ZooModule):
    """Predicts a setup's quantum Fisher information, searches with it, and senses with what it found.

    Training is supervised: setups and their measured QFI in one environment, of which the model knows nothing else.
    ``trainer.test`` scores the predictor, selects setups by it and, where the data module has a `laboratory`, also
    searches beyond them (``search_rounds``), calibrates the best setup and estimates hidden phases with it.

    Args:
        paths: photons and paths N, even.
        angles: wave-plate angles are multiples of 180/angles degrees.
        predictor: "gnn", or "mlp" for the baseline that sees the same devices without their graph.
        hidden: width of the predictor ("mlp": the authors use 128).
        layers: blocks of the gnn.
        heads: attention heads, each of the full width.
        dropout: of attention weights and inside the perceptrons.
        length: most nodes of a setup, which the mlp needs to know.
        limit: largest QFI that the environment allows, by which metrics are divided: N² for G = Σ σ/2.
        loss: "mse" or "huber".
        rank_weight: of the pairwise ranking loss.
        lr: of Adam.
        weight_decay: of Adam (added to the gradient).
        top_k: setups that are built and measured after the predictor has chosen them.
        search_rounds: rounds of `search` in a test; 0 leaves it out.
        candidates: setups scored a round of `search`.
        calibration_shots: events at each known phase.
        shots: events for one estimate of the phase.
        trials: hidden phases estimated in a test.
    Shapes:
        devices: (b, t, 4) int64: kind, path, path, angle (see `data_optical_sensing.KINDS`), blank rows 0
        returns: (b,) QFI
    Raises:
        ValueError: for sizes that do not fit.
    Example:
        >>> model = DeepQuantumSensing.from_variant("tiny")
        >>> model.predict(torch.tensor([[[6, 0, 1, 0], [6, 2, 3, 0], [2, 1, 2, 0]]])).shape
        torch.Size([1])
    """

    variants = {
        "tiny": {"hidden": 16, "layers": 2, "heads": 2, "top_k": 2, "trials": 10},
        "eight": {"paths": 8, "length": 21, "limit": 64.0},
    }
    monitor, mode = "val/loss", "min"

    def __init__(
        self,
        paths: int = 4,
        angles: int = 4,
        predictor: Literal["gnn", "mlp"] = "gnn",
        hidden: int = 256,
        layers: int = 5,
        heads: int = 4,
        dropout: float = 0.0,
        length: int = 19,
        limit: float = 16.0,
        loss: Literal["mse", "huber"] = "mse",
        rank_weight: float = 0.0,
        lr: float = 1e-4,
        weight_decay: float = 1e-5,
        top_k: int = 20,
        search_rounds: int = 0,
        candidates: int = 20_000,
        calibration_shots: int = 20_000,
        shots: int = 2000,
        trials: int = 200,
    ):
        super().__init__()
        self.save_hyperparameters()
        if paths < 2 or paths % 2 or min(angles, hidden, layers, heads, top_k, candidates, shots, trials) < 1:
            raise ValueError(
                f"paths={paths} must be even and at least 2; angles, hidden, layers, heads, top_k, candidates, shots "
                "and trials at least 1."
            )
        if limit <= 0 or length < paths // 2 + 2:
            raise ValueError(f"limit={limit} must be positive and length={length} at least {paths // 2 + 2}.")
        self.net: nn.Module = (
            GraphPredictor(paths, angles, hidden, layers, heads, dropout)
            if predictor == "gnn"
            else SequencePredictor(paths, angles, hidden, length)
        )
        kept = [f"{split}_{what}" for split in ("val", "test") for what in ("predicted", "qfi")]
        self.kept = nn.ModuleDict({name: CatMetric() for name in kept})
        self.best_setup: Tensor | None = None
        """The setup that the last test chose, (t, 4)."""

    def forward(self, devices: Tensor) -> Tensor:
        if devices.ndim != 3 or devices.shape[-1] != 4 or devices.is_floating_point():
            raise ValueError(
                f"'devices' is {devices.dtype} of shape {tuple(devices.shape)}; expected integers (setups, devices, 4)."
            )
        return self.net(devices)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        batch = super().on_before_batch_transfer(batch, dataloader_idx)
        check_setups(batch["devices"], self.hparams.paths, self.hparams.angles)
        return batch

    # ---- training -----------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        predicted = self(batch["devices"])
        loss = qfi_loss(predicted, batch["qfi"], self.hparams.loss, self.hparams.rank_weight)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(predicted))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._keep("val", batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._keep("test", batch)

    def _keep(self, split: str, batch: dict[str, Any]) -> None:
        self.kept[f"{split}_predicted"].update(self(batch["devices"]).float())
        self.kept[f"{split}_qfi"].update(batch["qfi"].float())

    def _kept(self, split: str) -> tuple[Tensor, Tensor]:
        """Predictions and labels of the whole epoch, of all ranks; forgotten afterwards."""
        metrics = [self.kept[f"{split}_{what}"] for what in ("predicted", "qfi")]
        predicted, qfi = (torch.as_tensor(metric.compute()).flatten() for metric in metrics)
        for metric in metrics:
            metric.reset()
        return predicted, qfi

    def on_validation_epoch_end(self) -> None:
        predicted, qfi = self._kept("val")
        self.log("val/loss", F.mse_loss(predicted, qfi))
        self.log("val/spearman", spearman(predicted, qfi).float(), prog_bar=True)

    def on_test_epoch_end(self) -> None:
        hp = self.hparams
        predicted, qfi = self._kept("test")
        found = {"mse": F.mse_loss(predicted, qfi), "spearman": spearman(predicted, qfi)}
        spread = (qfi - qfi.mean()).square().sum().clamp_min(1e-12)
        found["r2"] = 1 - (predicted - qfi).square().sum() / spread
        k = min(hp.top_k, len(qfi))
        chosen = predicted.topk(k).indices
        best = float(qfi[chosen].max())
        found["selected"] = best / hp.limit
        found["selected_mean"] = qfi[chosen].mean() / hp.limit
        found["random"] = best_of_random(qfi, k) / hp.limit
        found["regret"] = (float(qfi.max()) - best) / hp.limit
        laboratory = getattr(getattr(self.trainer, "datamodule", None), "laboratory", None)
        if laboratory is not None:
            at = int(chosen[qfi[chosen].argmax()])
            found |= self._sense(laboratory, at, best)
        self.log_dict({f"test/{name}": float(value) for name, value in found.items()})

    def _sense(self, laboratory: Laboratory, at: int, best: float) -> dict[str, float]:
        """Search beyond the test set, and sense with the best setup of all."""
        hp, found = self.hparams, {}
        setup = self.trainer.datamodule.dataset("test")[at]["devices"]
        if hp.search_rounds:
            before = laboratory.queries
            setups, measured = self.search(laboratory, rounds=hp.search_rounds)
            found["searched"] = float(measured[0]) / hp.limit
            found["queries"] = float(laboratory.queries - before)
            if float(measured[0]) > best:
                setup = setups[0]
        self.best_setup = setup
        try:
            for name, points in (("", None), ("_aliased", laboratory.environment.degree + 1)):
                sensor = calibrate(laboratory, setup, hp.calibration_shots, points, allow_alias=points is not None)
                errors = trial_errors(laboratory, setup, sensor, hp.shots, hp.trials)
                found[f"cramer_rao_ratio{name}"] = errors["ratio"]
                if not name:
                    found["shot_noise_ratio"] = errors["rmse"] / errors["shot_noise"]
                    found["quantum_ratio"] = errors["rmse"] / errors["quantum"]
        except (ZooError, ValueError) as error:
            log.warning("DeepQuantumSensing: no estimate with %s: %s", setup.tolist(), error)
        return found

    def configure_optimizers(self) -> torch.optim.Optimizer:
        hp = self.hparams
        return torch.optim.Adam(self.parameter_groups(), lr=hp.lr, weight_decay=hp.weight_decay)

    # ---- prediction and search ----------------------------------------------------------------------------------

    def predict(self, devices: Tensor) -> Tensor:  # type: ignore[override]
        """QFI of setups.

        Shapes:
            devices: (b, t, 4); returns: (b,)
        Raises:
            ValueError: for a setup that is none, or of another number of photons.
        """
        check_setups(devices, self.hparams.paths, self.hparams.angles)
        return super().predict(devices)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """ "qfi" (b,) predicted; "heisenberg" (b,), its share of the limit; "devices"; "name"."""
        qfi = self.predict(batch["devices"])
        names = batch.get("name", [f"setup{i:05d}" for i in range(len(qfi))])
        return {
            "name": list(names),
            "devices": batch["devices"],
            "qfi": qfi,
            "heisenberg": qfi / self.hparams.limit,
        }

    @torch.no_grad()
    def score(self, devices: Tensor, chunk: int = 4096) -> Tensor:
        """`predict` in pieces, for many candidates: (b,) on the CPU."""
        return torch.cat([self.predict(part).float().cpu() for part in devices.split(chunk)])

    @torch.no_grad()
    def search(
        self,
        laboratory: Laboratory,
        rounds: int = 1,
        generations: int = 5,
        longest: int = 15,
        known: tuple[Tensor, Tensor] | None = None,
        tune_steps: int = 0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Look for the setup of largest QFI: score many, build few.

        Each round scores ``candidates`` new random setups, improves the best of them (and of those measured so far) by
        single changes over ``generations``, all by the predictor alone, and measures the ``top_k`` that it likes best.

        Args:
            laboratory: where setups are measured; ``rounds * top_k`` are.
            known: setups and their QFI to start from and, with ``tune_steps``, to go on learning with.
            tune_steps: optimiser steps on what is known and measured after every round but the last; this changes the
                weights (active learning).
            longest: most devices after the sources.
        Shapes:
            returns: setups (rounds * top_k, t, 4) and their measured QFI, best first
        """
        hp, t = self.hparams, self.hparams.paths // 2 + longest
        measured = torch.zeros(0, t, 4, dtype=torch.long)
        values = torch.zeros(0, dtype=torch.float64)
        for turn in range(rounds):
            pool = random_setups(hp.candidates, hp.paths, hp.angles, min(3, longest), longest, generator)
            parents = measured
            if known is not None:
                best = known[1].topk(min(hp.top_k, len(known[1]))).indices
                parents = torch.cat([parents, F.pad(known[0][best], (0, 0, 0, t - known[0].shape[1]))])
            keep = min(10 * hp.top_k, hp.candidates)
            pool = _unseen(
                torch.cat([pool, *(mutate_setups(parents, hp.paths, hp.angles, generator) for _ in range(8))])
            )
            scores = self.score(pool)
            for _ in range(generations):
                at = scores.topk(keep).indices
                children = [mutate_setups(pool[at], hp.paths, hp.angles, generator) for _ in range(8)]
                pool = _unseen(torch.cat([pool[at], *children]))
                scores = self.score(pool)
            pool, scores = _without(pool, scores, measured)
            chosen = pool[scores.topk(min(hp.top_k, len(pool))).indices]
            measured = torch.cat([measured, chosen])
            values = torch.cat([values, laboratory.qfi(chosen, generator=generator).cpu()])
            if tune_steps and turn + 1 < rounds:
                self._tune(measured, values, known, tune_steps, generator)
        order = values.argsort(descending=True)
        return measured[order], values[order]

    @torch.enable_grad()
    def _tune(
        self,
        measured: Tensor,
        values: Tensor,
        known: tuple[Tensor, Tensor] | None,
        steps: int,
        generator: torch.Generator | None,
    ) -> None:
        """Go on training: half of every batch from what the search measured, half from what was known."""
        training, optimizer = self.training, self.configure_optimizers()
        self.train()
        t = measured.shape[1]
        for _ in range(steps):
            parts = []
            for devices, qfi in [(measured, values), *([known] if known is not None else [])]:
                at = torch.randint(0, len(qfi), (32,), generator=generator)
                parts.append((F.pad(devices[at], (0, 0, 0, t - devices.shape[1])), qfi[at].double()))
            devices, qfi = (torch.cat(p).to(self.device) for p in zip(*parts, strict=True))
            optimizer.zero_grad()
            qfi_loss(self(devices), qfi, self.hparams.loss, self.hparams.rank_weight).backward()
            optimizer.step()
        self.train(training)

    def example_inputs(self) -> tuple[Tensor, ...]:
        """Two setups with three devices after the sources."""
        hp = self.hparams
        sources = [[6, p, p + 1, 0] for p in range(0, hp.paths, 2)]
        rows = [[*sources, [1, 0, 1, 0], [3, 0, 0, 1], [5, 1, 1, 0]], [*sources, [2, 1, 0, 0], [4, 1, 1, 1], [0] * 4]]
        return (torch.tensor(rows, device=self.device),)

    # ---- authors' weights ---------------------------------------------------------------------------------------

    @classmethod
    def convert_state_dict(cls, content: dict) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The authors' ``GNN_QFM`` or ``MLP``; the norms ``bn`` that their forward never calls are left out, and the
        second name ``first_layer`` of their first layer.

        Features of their finer set of angles (90, 2 degrees apart) stand in another order, which is put right.

        Raises:
            ZooError: for keys that their models do not have.
        """
        content = {k: v for k, v in unwrap(content).items() if not k.startswith(("bn.", "first_layer."))}
        if "back.0.weight" in content:
            return cls._convert_mlp(content)
        width = content["emb.0.weight"].shape[1] if "emb.0.weight" in content else 0
        layers = sum(key.endswith(".lin_key.weight") for key in content)
        names = {f"emb.0.{p}": f"embed.{p}" for p in ("weight", "bias")}
        state_of = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        names |= {f"emb.1.module.{p}": f"norm.{p}" for p in state_of}
        names |= {f"predictor.{p}": f"head.{p}" for p in ("weight", "bias")}
        for i in range(layers):
            names |= {f"linear.{i}.0.{p}": f"blocks.{i}.widen.{p}" for p in ("weight", "bias")}
            names |= {f"linear.{i}.1.module.{p}": f"blocks.{i}.norm.{p}" for p in state_of}
            names |= {f"linear.{i}.4.{p}": f"blocks.{i}.narrow.{p}" for p in ("weight", "bias")}
            names[f"layers.{i}.lin_beta.weight"] = f"blocks.{i}.attention.gate.weight"
        parts = [f"layers.{i}.lin_{n}.{p}" for i in range(layers) for n in _PARTS for p in ("weight", "bias")]
        if not layers or content.keys() != {*names, *parts}:
            strange = sorted(content.keys() ^ {*names, *parts})
            raise ZooError(
                f"No GNN_QFM or MLP of the authors: expected emb.*, layers.*, linear.* and predictor.*; differing keys "
                f"{', '.join(strange[:3])}."
            )
        state = {ours: content[theirs] for theirs, ours in names.items()}
        for i in range(layers):
            for p in ("weight", "bias"):
                pieces = [content[f"layers.{i}.lin_{n}.{p}"] for n in _PARTS]
                state[f"blocks.{i}.attention.project.{p}"] = torch.cat(pieces)
        hidden = content["emb.0.weight"].shape[0]
        sizes, columns = _sizes(width, 1)
        state["embed.weight"] = state["embed.weight"][:, columns].contiguous()
        heads = content["layers.0.lin_key.bias"].shape[0] // hidden
        sizes |= {"hidden": hidden, "layers": layers, "heads": heads}
        return sizes, {f"net.{key}": value for key, value in state.items()}

    @classmethod
    def _convert_mlp(cls, content: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        names = {key: key.replace("back.", "layers.").replace("predictor.", "head.") for key in content}
        weight = content["back.0.weight"]
        for length in (19, 17, 18, 20, 21):  # 19 nodes in the authors' script
            if weight.shape[1] % length == 0 and weight.shape[1] // length in _WIDTHS:
                sizes, columns = _sizes(weight.shape[1] // length, length)
                break
        else:
            raise ZooError(f"The authors' MLP has {weight.shape[1]} inputs, which no setup of theirs has.")
        state = {f"net.{names[key]}": value for key, value in content.items()}
        state["net.layers.0.weight"] = weight[:, columns].contiguous()
        return {**sizes, "predictor": "mlp", "hidden": weight.shape[0], "length": length}, state


_PARTS = ("query", "key", "value", "skip")
_WIDTHS = {2 * q + 8 + n: (q, n) for q in (90, 4) for n in (8, 6, 4, 2)}
"""Features of a node in the authors' files, to (angles, paths)."""


def _sizes(width: int, length: int) -> tuple[dict[str, Any], Tensor]:
    """Hyperparameters by the features of a node, and where each of our columns stands among theirs.

    Raises:
        ZooError: if the authors' encodings have no such width.
    """
    if width not in _WIDTHS:
        raise ZooError(f"The weights are for {width} features a node; the authors' encodings have {sorted(_WIDTHS)}.")
    angles, paths = _WIDTHS[width]
    order = list(range(width))
    if angles == 90:  # theirs: start, BS, PBS, R, PAIR, HH, VV, HWP..., QWP..., end, paths
        order = [0, 1, 2, *range(7, 187), 3, 4, 5, 6, *range(187, width)]
    columns = torch.tensor([node * width + i for node in range(length) for i in order])
    return {"angles": angles, "paths": paths, "limit": float(paths**2), "length": paths // 2 + 17}, columns


def _unseen(devices: Tensor) -> Tensor:
    """Without repetitions."""
    return torch.unique(devices.flatten(1), dim=0).view(-1, *devices.shape[1:])


def _without(pool: Tensor, scores: Tensor, measured: Tensor) -> tuple[Tensor, Tensor]:
    """The pool less what was already measured."""
    seen = {tuple(row) for row in measured.flatten(1).tolist()}
    fresh = torch.tensor([tuple(row) not in seen for row in pool.flatten(1).tolist()], dtype=torch.bool)
    return pool[fresh], scores[fresh]
