"""Optical sensing: photonic setups, the states that they prepare, what an environment does to them, and their files.

A setup has N photons in N paths, one from each end of N/2 pair sources, and a list of devices. Only the events with
one photon in every path count. Path 0 is the most significant bit of an amplitude's index; H is 0, V is 1.

Index legend: b setups, t devices a setup (sources first), n paths and photons N, k outcomes 2^N, m phases.
"""

import csv
import functools
import itertools
import logging
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from zoo.core import ZooDataModule, ZooError, atomic_write
from zoo.core.seeding import seed_from

log = logging.getLogger(__name__)

KINDS = ("NONE", "BS", "PBS", "HWP", "QWP", "R", "PAIR", "HH", "VV")
"""Devices by number, as in the authors' files: beam splitter, polarising beam splitter, half- and quarter-wave plate,
mirror (a phase i), and the sources of (HH + VV)/sqrt(2), HH and VV pairs. NONE fills up short setups."""
BS, PBS, HWP, QWP, MIRROR, PAIR, HH, VV = range(1, 9)
TWO_PATHS, PLATES, SOURCES = (BS, PBS, PAIR, HH, VV), (HWP, QWP), (PAIR, HH, VV)


# ---- setups -----------------------------------------------------------------------------------------------------


def check_setups(devices: Tensor, paths: int, angles: int) -> None:
    """Refuse what is no list of setups for so many paths and wave-plate angles.

    Shapes:
        devices: (b, t, 4) integer: kind, first path, second path, angle in steps of 180/angles degrees
    Raises:
        ValueError: naming the first setup at fault and what is wrong with it.
    """
    if devices.ndim != 3 or devices.shape[-1] != 4 or devices.is_floating_point() or devices.is_complex():
        raise ValueError(
            f"'devices' is {devices.dtype} of shape {tuple(devices.shape)}; expected integers (setups, devices, 4): "
            "kind, path, path, angle."
        )
    if devices.is_meta or len(devices) == 0:
        return
    kind, first, second, angle = devices.unbind(-1)
    used, plate, source = kind != 0, _is_in(kind, PLATES), _is_in(kind, SOURCES)
    low, high = torch.minimum(first, second), torch.maximum(first, second)
    two = _is_in(kind, TWO_PATHS)
    before = source & (torch.cumsum((used & ~source).long(), 1) > 0)
    faults = {
        f"a kind of device that is not 0...{len(KINDS) - 1}": (kind < 0) | (kind >= len(KINDS)),
        f"a path that is not 0...{paths - 1} (the model is for {paths} photons)": used & ((low < 0) | (high >= paths)),
        "a device between a path and itself": two & (first == second),
        "a device for one path with two different ones": used & ~two & (first != second),
        f"a wave-plate angle that is not 1...{angles}": plate & ((angle < 1) | (angle > angles)),
        "an angle for a device that has none": used & ~plate & (angle != 0),
        "a source after another device; sources come first": before,
    }
    for what, wrong in faults.items():
        rows = wrong.any(1)
        if bool(rows.any()):
            raise ValueError(f"Setup {int(rows.nonzero()[0])} has {what}.")
    count = source.sum(1)
    if bool((count != paths // 2).any()):
        row = int((count != paths // 2).nonzero()[0])
        raise ValueError(
            f"Setup {row} has {int(count[row])} pair sources; {paths} photons need {paths // 2} (PAIR, HH or VV)."
        )


def _is_in(kind: Tensor, kinds: tuple[int, ...]) -> Tensor:
    return torch.stack([kind == k for k in kinds]).any(0)


def random_setups(
    count: int, paths: int, angles: int, shortest: int = 3, longest: int = 15, generator: torch.Generator | None = None
) -> Tensor:
    """Random setups as the authors draw them: every source and device at random, ``shortest`` to ``longest`` devices.

    Shapes:
        returns: (count, paths / 2 + longest, 4) int64
    """

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    sources = torch.zeros(count, paths // 2, 4, dtype=torch.long)
    sources[..., 0] = draw(PAIR, VV + 1, count, paths // 2)
    sources[..., 1] = torch.arange(0, paths, 2)
    sources[..., 2] = torch.arange(1, paths, 2)
    kind = draw(BS, MIRROR + 1, count, longest)
    first = draw(0, paths, count, longest)
    other = (first + draw(1, paths, count, longest)) % paths  # any path but the first
    second = torch.where(_is_in(kind, (BS, PBS)), other, first)
    angle = torch.where(_is_in(kind, PLATES), draw(1, angles + 1, count, longest), 0)
    devices = torch.stack([kind, first, second, angle], -1)
    length = draw(shortest, longest + 1, count, 1)
    devices = torch.where((torch.arange(longest) < length).unsqueeze(-1), devices, 0)
    return torch.cat([sources, devices], 1)


def mutate_setups(devices: Tensor, paths: int, angles: int, generator: torch.Generator | None = None) -> Tensor:
    """Each setup with one change: a source or device replaced, removed, or added where there is room.

    Shapes:
        devices: (b, t, 4) as `random_setups` gives them; returns: the same
    """
    b, t, _ = devices.shape
    fresh = random_setups(b, paths, angles, t - paths // 2, t - paths // 2, generator)
    place = torch.randint(0, t, (b,), generator=generator)
    drop = (torch.rand(b, generator=generator) < 0.3) & (place >= paths // 2)
    rows = torch.arange(b)
    changed = devices.clone()
    changed[rows, place] = torch.where(drop.unsqueeze(-1), 0, fresh[rows, place])
    return changed


def text_to_setup(text: str, angles: int) -> list[tuple[int, int, int, int]]:
    """``"PAIR(0,1) HH(2,3) BS(0,2) HWP(1,45) R(3)"`` as rows of ``devices``; wave-plate angles are in degrees.

    Raises:
        ZooError: naming the piece that is no device, or an angle that is no multiple of 180/angles degrees.
    """
    rows = []
    for piece in re.findall(r"[^\s;()]+\s*\([^)]*\)|[^\s;]+", text):
        match = re.fullmatch(r"([A-Za-z]+)\s*\(([^)]*)\)", piece)
        name = match.group(1).upper() if match else ""
        name = {"DC": "PAIR", "MIRROR": "R"}.get(name, name)
        try:
            numbers = [float(v) for v in match.group(2).split(",")] if match else []
        except ValueError:
            numbers = []
        kind = KINDS.index(name) if name in KINDS[1:] else 0
        wanted = 1 if kind == MIRROR else 2
        if not kind or len(numbers) != wanted or any(v != int(v) for v in numbers[: 1 if kind in PLATES else 2]):
            raise ZooError(
                f"{piece!r} is no device: expected BS(path,path), PBS(path,path), HWP(path,degrees), "
                "QWP(path,degrees), R(path), PAIR(path,path), HH(path,path) or VV(path,path)."
            )
        if kind in PLATES:
            steps = numbers[1] % 180 * angles / 180
            if abs(steps - round(steps)) > 1e-6:
                raise ZooError(f"{piece!r}: the angles of this model are multiples of {180 / angles:g} degrees.")
            rows.append((kind, int(numbers[0]), int(numbers[0]), round(steps) % angles or angles))
        else:
            rows.append((kind, int(numbers[0]), int(numbers[-1]), 0))
    return rows


def setup_to_text(devices: Tensor, angles: int) -> str:
    """A row of ``devices`` (t, 4) as text, wave-plate angles in degrees."""
    pieces = []
    for kind, first, second, angle in devices.tolist():
        if kind in PLATES:
            pieces.append(f"{KINDS[kind]}({first},{180 * angle / angles:g})")
        elif kind:
            pieces.append(f"{KINDS[kind]}({first}{'' if kind == MIRROR else f',{second}'})")
    return " ".join(pieces)


# ---- the optics -------------------------------------------------------------------------------------------------


@functools.cache
def _joins(paths: int) -> list[list[tuple[Tensor, Tensor]]]:
    """How amplitudes of 2s paths follow from those of 2(s - 1) and one more source's pair.

    Entry s - 2 lists, for each of the pairs that the new source may fill, the rows to read: flat indices into
    (subsets of 2(s - 1) paths) x (their polarisations), and into (pairs) x (their polarisations).
    """
    levels = [list(itertools.combinations(range(paths), 2 * s)) for s in range(1, paths // 2 + 1)]
    pairs = {pair: i for i, pair in enumerate(levels[0])}
    found = []
    for s in range(1, paths // 2):
        size, where = 2 * (s + 1), {subset: i for i, subset in enumerate(levels[s - 1])}
        colours = np.array(list(itertools.product((0, 1), repeat=size)))
        steps = []
        for ends in itertools.combinations(range(size), 2):
            rest = [i for i in range(size) if i not in ends]
            weights = 2 ** np.arange(size - 3, -1, -1)
            left_colour, pair_colour = colours[:, rest] @ weights, colours[:, ends] @ np.array([2, 1])
            left, pair = [], []
            for subset in levels[s]:
                left.append(where[tuple(subset[i] for i in rest)] * 2 ** (size - 2) + left_colour)
                pair.append(pairs[tuple(subset[i] for i in ends)] * 4 + pair_colour)
            steps.append((torch.from_numpy(np.concatenate(left)), torch.from_numpy(np.concatenate(pair))))
        found.append(steps)
    return found


class OpticalSimulator(nn.Module):
    """Setups to states: the amplitudes of the events with one photon in each path.

        source     S_s = Σ_c w_c a†_{p,c} a†_{q,c}                 w = (1, 1)/√2, (1, 0) or (0, 1) for H and V
        devices    a†_{p,c} → Σ U_{pc,p'c'} a†_{p'c'}              linear, so that S_s becomes a quadratic form A_s
        amplitude  ψ[c_1...c_N] = Σ_{pairings of the paths with the sources} Π_s A_s[(p, c_p), (q, c_q)]

    The sum has N!/2^(N/2) terms (2,520 for eight photons); joining source by source over subsets of paths takes 41,000
    multiplications instead. No symbols: a whole batch of setups runs as a few matrix products and gathers.

    Args:
        paths: N, even, 2 to 8 (more works, memory permitting).
        angles: wave-plate angles are k * 180/angles degrees, k = 1...angles.
        precision: "complex128" finds events that cancel exactly; "complex64" is faster.
    Shapes:
        devices: (b, t, 4); returns: (b, 2^N) of norm 1, or all 0 where no such event exists
    Example:
        >>> simulator = OpticalSimulator(paths=2)
        >>> devices = torch.tensor([[[7, 0, 1, 0], [1, 0, 1, 0]]])  # HH pair on a beam splitter: Hong-Ou-Mandel
        >>> float(simulator(devices).abs().max())
        0.0
    """

    def __init__(self, paths: int = 4, angles: int = 4, precision: Literal["complex64", "complex128"] = "complex128"):
        super().__init__()
        if paths < 2 or paths % 2 or angles < 1:
            raise ValueError(f"paths={paths} must be even and at least 2, angles={angles} at least 1.")
        self.paths, self.angles = paths, angles
        self.register_buffer("table", self._table().to(getattr(torch, precision)), persistent=False)
        for s, steps in enumerate(_joins(paths)):
            for name, which in (("left", 0), ("pair", 1)):
                self.register_buffer(f"{name}{s}", torch.stack([step[which] for step in steps]), persistent=False)

    def _table(self) -> Tensor:
        """Every device as a matrix on the 2N modes, by `_index`; the first is the identity."""
        n, modes = self.paths, 2 * self.paths
        eye = torch.eye(modes, dtype=torch.complex128)
        found = {(0, 0, 0, 0): eye}
        for p, q in itertools.permutations(range(n), 2):
            split, polarising = eye.clone(), eye.clone()
            for c in (0, 1):
                for u, v in ((p, q), (q, p)):
                    split[2 * u + c, 2 * u + c] = 1 / math.sqrt(2)
                    split[2 * u + c, 2 * v + c] = 1j / math.sqrt(2)
            polarising[[2 * p + 1, 2 * q + 1]] = polarising[[2 * q + 1, 2 * p + 1]]  # V is reflected, H goes through
            found[BS, p, q, 0], found[PBS, p, q, 0] = split, polarising
        for p in range(n):
            mirror = eye.clone()
            mirror[2 * p, 2 * p] = mirror[2 * p + 1, 2 * p + 1] = 1j
            found[MIRROR, p, p, 0] = mirror
            for k in range(1, self.angles + 1):
                c, s = (f(2 * math.pi * k / self.angles) for f in (math.cos, math.sin))
                half, quarter = eye.clone(), eye.clone()
                rows = slice(2 * p, 2 * p + 2)
                half[rows, rows] = torch.tensor([[c, s], [s, -c]], dtype=eye.dtype)
                quarter[rows, rows] = torch.tensor([[1 - 1j * c, -1j * s], [-1j * s, 1 + 1j * c]]).to(eye.dtype)
                quarter[rows, rows] /= math.sqrt(2)
                found[HWP, p, p, k], found[QWP, p, p, k] = half, quarter
        place = torch.zeros(PAIR, n, n, self.angles + 1, dtype=torch.long)
        for i, key in enumerate(found):
            place[key] = i
        self.register_buffer("place", place, persistent=False)
        return torch.stack(list(found.values()))

    def modes(self, devices: Tensor) -> Tensor:
        """What every initial mode has become: (b, 2N, 2N), rows by path and polarisation before the devices."""
        kind, first, second, angle = devices.unbind(-1)
        optical = (kind != 0) & (kind < PAIR)
        zero = torch.zeros_like(kind)
        parts = [torch.where(optical, value, zero) for value in (kind, first, second, angle)]
        index = self.place[tuple(parts)]  # sources and blanks: the identity
        u = self.table[index[:, 0]]
        for step in range(1, devices.shape[1]):
            if bool(index[:, step].any()):
                u = u @ self.table[index[:, step]]
        return u

    def forward(self, devices: Tensor, normalise: bool = True, chunk: int = 256) -> Tensor:
        check_setups(devices, self.paths, self.angles)
        parts = [self._amplitudes(part) for part in devices.to(self.table.device).split(chunk)]
        psi = torch.cat(parts) if parts else self.table.new_zeros(0, 2**self.paths)
        return unit(psi) if normalise else psi

    def _amplitudes(self, devices: Tensor) -> Tensor:
        b, n = len(devices), self.paths
        u = self.modes(devices)
        sources = _is_in(devices[..., 0], SOURCES)
        at = (~sources).long().argsort(dim=1, stable=True)[:, : n // 2]
        sources = devices.gather(1, at.unsqueeze(-1).expand(-1, -1, 4))  # (b, n / 2, 4)
        kind, first, second, _ = sources.unbind(-1)
        h = torch.where(kind == PAIR, 1 / math.sqrt(2), (kind == HH).to(u.real.dtype))
        v = torch.where(kind == PAIR, 1 / math.sqrt(2), (kind == VV).to(u.real.dtype))
        rows = torch.arange(b, device=u.device).unsqueeze(-1)
        forms = 0
        for c, weight in enumerate((h, v)):
            left, right = u[rows, 2 * first + c], u[rows, 2 * second + c]  # (b, n / 2, 2N)
            forms = forms + (weight.unsqueeze(-1) * left).unsqueeze(-1) * right.unsqueeze(-2)
        forms = forms + forms.mT  # A_s: the coefficient of a†_i a†_j, i < j
        pairs = torch.combinations(torch.arange(n, device=u.device), 2)
        forms = forms.view(b, n // 2, n, 2, n, 2)[:, :, pairs[:, 0], :, pairs[:, 1]]  # (pairs, b, n / 2, 2, 2)
        forms = forms.permute(2, 0, 3, 4, 1).reshape(n // 2, -1, b)  # setups last: gathers move whole rows
        psi = forms[0]
        for s in range(n // 2 - 1):
            left, pair = getattr(self, f"left{s}"), getattr(self, f"pair{s}")
            total = torch.zeros(left.shape[1], b, dtype=psi.dtype, device=psi.device)
            for k in range(len(left)):
                total.addcmul_(psi[left[k]], forms[s + 1][pair[k]])
            psi = total
        return psi.T


def unit(psi: Tensor) -> Tensor:
    """States of norm 1; where nothing is left but rounding, 0.

    Shapes:
        psi: (..., 2^N) complex
    """
    norm = torch.linalg.vector_norm(psi, dim=-1, keepdim=True)
    # The smallest amplitude of 15 devices is near 2^-15 per photon pair; rounding is far below that.
    least = 1e-10 if psi.dtype == torch.complex128 else 1e-5
    return torch.where(norm > least, psi / norm.clamp_min(least), 0)


# ---- the environment --------------------------------------------------------------------------------------------


def local(psi: Tensor, matrices: Tensor) -> Tensor:
    """Apply a 2 x 2 matrix to each photon.

    Shapes:
        psi: (..., 2^N); matrices: (N, 2, 2); returns: (..., 2^N)
    """
    n, shape = len(matrices), psi.shape
    for i, m in enumerate(matrices):
        h, v = psi.reshape(*shape[:-1], 2**i, 2, 2 ** (n - i - 1)).unbind(-2)
        psi = torch.stack([m[0, 0] * h + m[0, 1] * v, m[1, 0] * h + m[1, 1] * v], -2).reshape(shape)
    return psi


def axis_basis(axis: Tensor) -> Tensor:
    """The unitary that takes ``n.sigma`` to ``sigma_z``: rows are its eigenvectors' conjugates, +1 first.

    Shapes:
        axis: (..., 3) of length 1; returns: (..., 2, 2) complex128
    """
    x, y, z = axis.double().unbind(-1)
    theta, phi = torch.atan2(torch.hypot(x, y), z), torch.atan2(y, x)
    c, s = torch.cos(theta / 2).to(torch.complex128), torch.sin(theta / 2).to(torch.complex128)
    turn = torch.polar(torch.ones_like(phi), phi)
    up, down = torch.stack([c, s * turn.conj()], -1), torch.stack([-s * turn, c], -1)
    return torch.stack([up, down], -2)


AXES = {"X": (1.0, 0.0, 0.0), "Y": (0.0, 1.0, 0.0), "Z": (0.0, 0.0, 1.0)}


class Environment:
    """An unknown environment that imprints a parameter: ``exp(-i phi G)``, then dephasing.

        X, Y, Z    G = Σ_v σ_v / 2            along one axis, the same for all photons
        XX         G = Σ_{u<v} X_u X_v / 2    every two photons interact
        random     G = Σ_v n_v·σ_v / 2        an axis of its own for each photon, drawn from ``seed``
        dephasing  each photon's coherence along its axis is multiplied by 1 - dephasing

    G is diagonal after a rotation of each photon, so that neither it nor the evolution is ever a matrix of 2^N x 2^N.

    Attributes:
        limit: the largest quantum Fisher information of a pure state, (g_max - g_min)²: N² for all but XX.
        degree: the highest frequency of an outcome's probability in phi, g_max - g_min.
    """

    def __init__(
        self,
        name: Literal["X", "Y", "Z", "XX", "random"] = "Z",
        paths: int = 4,
        seed: int = 0,
        dephasing: float = 0.0,
    ):
        if name not in ("X", "Y", "Z", "XX", "random"):
            raise ValueError(f"environment is {name!r}; expected X, Y, Z, XX or random.")
        if not 0 <= dephasing <= 1:
            raise ValueError(f"dephasing is {dephasing}; expected 0...1.")
        self.name, self.paths, self.dephasing = name, paths, dephasing
        if name == "random":
            drawn = torch.randn(paths, 3, generator=torch.Generator().manual_seed(seed_from("axes", paths, seed)))
            axes = drawn / drawn.norm(dim=-1, keepdim=True)
        else:
            axes = torch.tensor([AXES[name[0]]] * paths)
        self.rotation = axis_basis(axes)
        self.bits = (torch.arange(2**paths).unsqueeze(-1) >> torch.arange(paths - 1, -1, -1)) & 1  # (2^N, N)
        total = (1 - 2 * self.bits).double().sum(-1)
        self.spectrum = (total.square() - paths) / 4 if name == "XX" else total / 2
        self.degree = round(float(self.spectrum.max() - self.spectrum.min()))
        self.limit = float(self.spectrum.max() - self.spectrum.min()) ** 2

    def density(self, psi: Tensor) -> Tensor:
        """The dephased state in the environment's own basis: (..., 2^N, 2^N)."""
        c = local(psi.to(torch.complex128), self.rotation)
        apart = (self.bits.unsqueeze(1) != self.bits).sum(-1).double()
        return c.unsqueeze(-1) * c.conj().unsqueeze(-2) * (1 - self.dephasing) ** apart

    def qfi(self, psi: Tensor) -> Tensor:
        """Quantum Fisher information: 4 Var(G), or where dephasing mixes the state the spectral formula.

            F = 2 Σ_ab |<a|G|b>|² (λ_a - λ_b)² / (λ_a + λ_b)

        Shapes:
            psi: (b, 2^N), norm 1 or 0 (for which F = 0); returns: (b,) float64
        """
        if self.dephasing == 0:
            p = local(psi.to(torch.complex128), self.rotation).abs().square()
            mean = p @ self.spectrum
            return 4 * (p @ self.spectrum.square() - mean.square()).clamp_min(0)
        found = []
        for part in psi.split(max(1, 2**16 // psi.shape[-1] ** 2 * 64)):
            values, vectors = torch.linalg.eigh(self.density(part))
            values = values.clamp_min(0)
            g = vectors.mH @ (self.spectrum.unsqueeze(-1) * vectors)
            plus, minus = values.unsqueeze(-1) + values.unsqueeze(-2), values.unsqueeze(-1) - values.unsqueeze(-2)
            weight = torch.where(plus > 1e-12, minus.square() / plus.clamp_min(1e-12), 0)
            found.append(2 * (g.abs().square() * weight).sum((-1, -2)))
        return torch.cat(found)

    def probabilities(self, psi: Tensor, phases: Tensor, basis: str = "X") -> Tensor:
        """Chance of every outcome when each photon is measured along the axis ``basis`` after the phase.

        Shapes:
            psi: (2^N,); phases: (m,) radians; returns: (m, 2^N) float64
        """
        if basis not in AXES:
            raise ValueError(f"basis is {basis!r}; expected X, Y or Z.")
        turn = axis_basis(torch.tensor(AXES[basis])) @ self.rotation.mH
        c = local(psi.to(torch.complex128), self.rotation)
        angle = -phases.double().unsqueeze(-1) * self.spectrum
        wave = torch.polar(torch.ones_like(angle), angle)  # exp(-i phi G)
        if self.dephasing == 0:
            return local(wave * c, turn).abs().square()
        rho = self.density(psi) * wave.unsqueeze(-1) * wave.conj().unsqueeze(-2)
        half = local(rho.mT, turn).mT  # rows turned
        return local(half, turn.conj()).diagonal(dim1=-2, dim2=-1).real.clamp_min(0)


class Laboratory:
    """A bench and its environment: what an experimenter can do, and how often it was done.

    Everything that the method learns about an environment goes through here; `queries` counts setups built.

    Args:
        simulator: the optics.
        environment: what the light meets.
    """

    def __init__(self, simulator: OpticalSimulator, environment: Environment):
        self.simulator, self.environment, self.queries = simulator, environment, 0

    def qfi(
        self, devices: Tensor, shots: int = 0, step: float = 0.3, generator: torch.Generator | None = None
    ) -> Tensor:
        """Quantum Fisher information of setups: exact, or from fidelities that were each measured with ``shots``.

            F ≈ 8 (1 - sqrt(Fid(φ, φ + δ))) / δ²

        Args:
            step: δ in radians, divided by N.
        Shapes:
            devices: (b, t, 4); returns: (b,) float64
        """
        self.queries += len(devices)
        psi, environment = self.simulator(devices), self.environment
        if shots == 0:
            return environment.qfi(psi)
        if environment.dephasing:
            raise ValueError("A fidelity estimate needs a pure state: set shots or dephasing to 0.")
        delta = step / environment.paths
        p = local(psi.to(torch.complex128), environment.rotation).abs().square()
        overlap = (p * torch.polar(torch.ones_like(environment.spectrum), delta * environment.spectrum)).sum(-1)
        fidelity = overlap.abs().square().clamp(0, 1)
        hits = torch.binomial(torch.full_like(fidelity, shots), fidelity, generator=generator)
        found = 8 * (1 - (hits / shots).sqrt()) / delta**2
        return torch.where(psi.abs().sum(-1) > 0, found, 0)

    def counts(
        self, setup: Tensor, phases: Tensor, shots: int, basis: str = "X", generator: torch.Generator | None = None
    ) -> Tensor:
        """How often each outcome was seen at each phase, of ``shots`` events with one photon in every path.

        Shapes:
            setup: (t, 4); phases: (m,); returns: (m, 2^N) float64, rows sum to ``shots``
        Raises:
            ValueError: if the setup gives no such event.
        """
        self.queries += 1
        psi = self.simulator(setup.unsqueeze(0))[0]
        if float(psi.abs().sum()) == 0:
            raise ValueError("This setup never has one photon in every path: there is nothing to count.")
        p = self.environment.probabilities(psi, phases, basis)
        return multinomial(p, shots, generator)


def multinomial(probabilities: Tensor, shots: int, generator: torch.Generator | None = None) -> Tensor:
    """Counts of ``shots`` draws in every row, by one binomial per outcome.

    Shapes:
        probabilities: (..., k); returns: (..., k) float64
    """
    left = torch.full(probabilities.shape[:-1], float(shots), dtype=torch.float64)
    rest = probabilities.double().sum(-1)
    counts = []
    for i in range(probabilities.shape[-1]):
        p = probabilities[..., i].double()
        share = torch.where(rest > 1e-12, p / rest.clamp_min(1e-12), 0).clamp(0, 1)
        drawn = torch.binomial(left, share, generator=generator)
        drawn = left if i + 1 == probabilities.shape[-1] else drawn
        counts.append(drawn)
        left, rest = left - drawn, rest - p
    return torch.stack(counts, -1)


# ---- data -------------------------------------------------------------------------------------------------------


class Setups(Dataset):
    """Setups with, where it is known, their QFI.

    Shapes:
        devices: (b, t, 4); qfi: (b,) or None
    """

    def __init__(self, devices: Tensor, qfi: Tensor | None = None, names: list[str] | None = None):
        self.devices, self.qfi = devices, qfi
        self.names = names or [f"setup{i:05d}" for i in range(len(devices))]

    def __len__(self) -> int:
        return len(self.devices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item: dict[str, Any] = {"devices": self.devices[index], "name": self.names[index]}
        if self.qfi is not None:
            item["qfi"] = self.qfi[index]
        return item

    def batch(self, indices: list[int], generator: torch.Generator) -> dict[str, Any]:
        """Many at once: stacking single items would cost as much as a small model's step."""
        at = torch.tensor(indices)
        found: dict[str, Any] = {"devices": self.devices[at], "name": [self.names[i] for i in indices]}
        if self.qfi is not None:
            found["qfi"] = self.qfi[at]
        return found


class OpticalSensingDataModule(ZooDataModule):
    """Optical setups and the quantum Fisher information (QFI) that they show in one environment.

    Batch: "devices": (b, t, 4) int64, rows kind, path, path, angle as in `KINDS` (sources first, blank rows 0); "qfi":
    (b,) float32, 0...limit; "name": list[str].

    root=None: random setups, drawn as the authors draw them, in a simulated ``environment``.

    root=DIR: one set of setups, all of one number of photons, as DIR/*.txt in the authors' form (a line of counts, then
    a line a setup: four numbers a device, then the state, to which ``environment`` gives the label), or DIR/*.csv with
    columns setup and qfi (and name), or DIR/*.npz with devices (n, t, 4) and qfi (n,). The files are read in the order
    of their names; the first setups train, the last test. Licence: the user's own.

    A user's own setups to predict: the same files without qfi, or a folder of them. In a .csv a setup is text, such as
    ``PAIR(0,1) HH(2,3) BS(0,2) HWP(1,45) R(3)`` with wave-plate angles in degrees.

    Args:
        batch_size: setups a batch.
        paths: photons N of generated setups.
        angles: wave plates stand at multiples of 180/angles degrees (the authors: 4 or 90).
        environment: "X", "Y", "Z", "XX" or "random", see `Environment`.
        dephasing: see `Environment`.
        train_size: setups to train on (of files: at most so many).
        val_size: setups to choose the checkpoint by.
        test_size: setups to test on.
        shortest: fewest devices of a generated setup, sources not counted.
        longest: most devices of a generated setup.
        label_shots: events per fidelity from which training labels are estimated; 0 for exact labels.
        shuffle_labels: training and validation labels go to the wrong setups (a control: nothing can be learned).
    """

    embedded: ClassVar[str] = "random setups in a simulated environment"

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        paths: int = 4,
        angles: int = 4,
        environment: Literal["X", "Y", "Z", "XX", "random"] = "Z",
        dephasing: float = 0.0,
        train_size: int = 3000,
        val_size: int = 500,
        test_size: int = 2000,
        shortest: int = 3,
        longest: int = 15,
        label_shots: int = 0,
        shuffle_labels: bool = False,
    ):
        super().__init__(root, batch_size, num_workers, seed)
        self.save_hyperparameters()
        if paths < 2 or paths % 2 or angles < 1:
            raise ValueError(f"paths={paths} must be even and at least 2, angles={angles} at least 1.")
        if min(train_size, val_size, test_size) < 1 or not 1 <= shortest <= longest:
            raise ValueError(
                f"train_size={train_size}, val_size={val_size}, test_size={test_size} must be at least 1 and "
                f"1 <= shortest={shortest} <= longest={longest}."
            )
        Environment(environment, 2, dephasing=dephasing)  # refuses early
        self._found: tuple[Tensor, Tensor | None, list[str]] | None = None
        self._laboratory: Laboratory | None = None

    @property
    def paths(self) -> int:
        """Photons: of the files where there are some."""
        return _photons(self._files()[0]) if self.root is not None else self.hparams.paths

    @property
    def laboratory(self) -> Laboratory:
        """The simulated bench and environment that the labels came from."""
        hp = self.hparams
        if self._laboratory is None:
            environment = Environment(hp.environment, self.paths, hp.seed, hp.dephasing)
            self._laboratory = Laboratory(OpticalSimulator(self.paths, hp.angles), environment)
        return self._laboratory

    def _files(self) -> tuple[Tensor, Tensor, list[str]]:
        """All setups, labels and names under the root."""
        if self._found is None:
            assert self.root is not None
            files = sorted(p for p in self.root.iterdir() if p.suffix in READERS)
            if not files:
                raise FileNotFoundError(
                    f"{self.root} holds no setups: expected the authors' *.txt, or *.csv or *.npz with setups and qfi."
                )
            parts = [read_setups(path, self.hparams.angles) for path in files]
            for path, (_, extra, _) in zip(files, parts, strict=True):
                if extra is None:
                    raise ZooError(f"{path.name} has no qfi: training needs the measured QFI of every setup.")
            devices, extra, names = join_setups(parts, files)
            photons = _photons(devices)
            check_setups(devices, photons, self.hparams.angles)
            if extra is not None and extra.is_complex():  # the authors' files hold states
                environment = Environment(self.hparams.environment, photons, self.hparams.seed, self.hparams.dephasing)
                extra = environment.qfi(unit(extra))
            self._found = devices, extra.float(), names
        return self._found  # type: ignore[return-value]

    def build(self) -> dict[str, Dataset]:
        hp = self.hparams
        draw = torch.Generator().manual_seed(seed_from("setups", hp.seed))
        if self.root is None:
            sizes = (hp.train_size, hp.val_size, hp.test_size)
            devices = random_setups(sum(sizes), hp.paths, hp.angles, hp.shortest, hp.longest, draw)
            exact, names = self.laboratory.qfi(devices).float(), None
            noisy = exact
            if hp.label_shots:
                noisy = self.laboratory.qfi(devices, hp.label_shots, generator=draw).float()
        else:
            devices, exact, names = self._files()
            noisy, n = exact, len(devices)
            if n < 3:
                raise ZooError(f"{self.root} holds {n} setups; at least 3 are needed to train, validate and test.")
            test = max(1, min(hp.test_size, n // 10))
            val = max(1, min(hp.val_size, n // 10))
            sizes = (min(hp.train_size, n - val - test), val, test)
        n, (train, val, test) = len(devices), sizes
        if hp.shuffle_labels:
            noisy = noisy.clone()
            noisy[: n - test] = noisy[: n - test][torch.randperm(n - test, generator=draw)]
        spans = {"train": slice(0, train), "val": slice(n - test - val, n - test), "test": slice(n - test, n)}
        return {
            split: Setups(devices[at], (exact if split == "test" else noisy)[at], names[at] if names else None)
            for split, at in spans.items()
        }

    def describe(self) -> dict[str, Any]:
        """Sizes that a module needs: ``paths``, ``angles``, ``length`` (nodes of the longest setup) and ``limit``."""
        length = self.dataset("train").devices.shape[1] + 2  # type: ignore[attr-defined]
        limit = self.laboratory.environment.limit
        return {"paths": self.paths, "angles": self.hparams.angles, "length": length, "limit": limit}

    def read(self, path: Path) -> Dataset:
        """A .csv, .npz or the authors' .txt with setups, or a folder of them; a qfi in them is not looked at."""
        files = sorted(p for p in path.iterdir() if p.suffix in READERS) if path.is_dir() else [path]
        parts: list[Part] = []
        good: list[Path] = []
        for file in files:
            try:
                devices, _, names = read_setups(file, self.hparams.angles)
                join_setups([*parts, (devices, None, names)], [*good, file])
            except (ZooError, ValueError) as error:
                self.skip(file, error)
            else:
                parts.append((devices, None, names))
                good.append(file)
        if not parts:
            return Setups(torch.zeros(0, 1, 4, dtype=torch.long))
        devices, _, names = join_setups(parts, good)
        return Setups(devices, None, names)

    def write(self, predictions: Iterable[dict[str, Any]], path: Path) -> list[Path]:
        """A table of name, rank (1 is the most promising), predicted qfi, its share of the Heisenberg limit and setup.

        ``path`` is a .csv, a .npz with the same columns (and ``devices``), or a folder that gets ``setups.csv``.
        """
        parts = list(predictions)
        if not parts:
            raise ZooError("No predictions to write.")
        names = [name for p in parts for name in p["name"]]
        devices, qfi, share = (torch.cat([p[k].cpu() for p in parts]) for k in ("devices", "qfi", "heisenberg"))
        rank = torch.empty(len(qfi), dtype=torch.long)
        rank[qfi.argsort(descending=True, stable=True)] = torch.arange(1, len(qfi) + 1)
        target = path if path.suffix in (".csv", ".npz") else path / "setups.csv"
        with atomic_write(target) as part:
            if target.suffix == ".npz":
                columns = {"devices": devices, "qfi": qfi, "heisenberg": share, "rank": rank}
                with open(part, "wb") as stream:
                    np.savez_compressed(stream, name=np.array(names), **{k: v.numpy() for k, v in columns.items()})
            else:
                with open(part, "w", newline="", encoding="utf-8") as stream:
                    rows = csv.writer(stream)
                    rows.writerow(["name", "rank", "qfi", "heisenberg", "setup"])
                    for i, name in enumerate(names):
                        text = setup_to_text(devices[i], self.hparams.angles)
                        rows.writerow([name, int(rank[i]), f"{float(qfi[i]):.6g}", f"{float(share[i]):.6g}", text])
        return [target]


# ---- files ------------------------------------------------------------------------------------------------------

Part = tuple[Tensor, Tensor | None, list[str]]
"""devices (n, t, 4), then qfi (n,) or states (n, 2^N) or None, then names."""


def read_setups(path: Path, angles: int) -> Part:
    """The setups of one file, by its suffix.

    Raises:
        ZooError: saying what is wrong with the file.
    """
    if path.suffix not in READERS:
        raise ZooError(f"{path.name}: expected .csv, .npz, or .txt in the authors' form.")
    try:
        devices, extra, names = READERS[path.suffix](path, angles)
    except (OSError, UnicodeDecodeError, EOFError, csv.Error) as error:
        raise ZooError(f"{path.name} cannot be read: {str(error).splitlines()[0][:120]}") from error
    if extra is not None and not bool(torch.isfinite(torch.view_as_real(extra) if extra.is_complex() else extra).all()):
        raise ZooError(f"{path.name}: every qfi must be a finite number.")
    try:
        check_setups(devices, _photons(devices), angles)
    except ValueError as error:
        raise ZooError(f"{path.name}: {error}") from error
    return devices, extra, names


def _read_csv(path: Path, angles: int) -> Part:
    with open(path, newline="", encoding="utf-8-sig") as stream:
        table = csv.DictReader(stream)
        heads = [h.strip().lower() for h in table.fieldnames or []]
        table.fieldnames = heads
        if "setup" not in heads:
            raise ZooError(f"{path.name} has the columns {', '.join(heads) or 'none'}; expected setup (name, qfi).")
        rows, names, values = [], [], []
        for line, record in enumerate(table, 2):
            if record.get(None) and heads[-1] == "setup":  # the commas of an unquoted setup
                record["setup"] = ",".join([record["setup"], *record.pop(None)])
            try:
                rows.append(text_to_setup(record["setup"] or "", angles))
                values.append(float(record["qfi"]) if "qfi" in heads else 0.0)
            except (ZooError, ValueError, TypeError) as error:
                raise ZooError(f"{path.name}, line {line}: {error}") from error
            names.append(record.get("name") or f"{path.stem}_{line - 2:05d}")
    if not rows:
        raise ZooError(f"{path.name} holds no setups.")
    return _stack(rows), torch.tensor(values, dtype=torch.float64) if "qfi" in heads else None, names


def _read_npz(path: Path, angles: int) -> Part:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except Exception as error:  # numpy's and zipfile's own classes, in words about pickles and context managers
        raise ZooError(
            f"{path.name} is no .npz of plain arrays, or is damaged; expected what np.savez(path, devices=devices, "
            "qfi=qfi) writes."
        ) from error
    devices = arrays.get("devices")
    if devices is None or devices.ndim != 3 or devices.shape[-1] != 4 or devices.dtype.kind not in "iu":
        raise ZooError(
            f"{path.name}: expected an integer array devices (n, t, 4); it holds {', '.join(arrays) or 'none'}."
        )
    n, qfi = len(devices), arrays.get("qfi")
    if n == 0:
        raise ZooError(f"{path.name} holds no setups.")
    if qfi is not None and (qfi.shape != (n,) or qfi.dtype.kind not in "fiu"):
        raise ZooError(f"{path.name}: qfi has shape {qfi.shape}; expected {n} numbers.")
    names = [str(v) for v in arrays["name"]] if "name" in arrays else []
    if len(names) != n:
        names = [f"{path.stem}_{i:05d}" for i in range(n)]
    extra = None if qfi is None else torch.from_numpy(qfi.astype(np.float64))
    return torch.from_numpy(devices.astype(np.int64)), extra, names


def _read_txt(path: Path, angles: int) -> Part:
    with open(path, encoding="utf-8") as stream:
        try:
            _, _, paths, _ = (int(v) for v in next(stream, "").split())
            lines = [[float(v) for v in line.split()] for line in stream if line.strip()]
        except ValueError as error:
            raise ZooError(
                f"{path.name} is not in the authors' form: first a line with four counts (the third is the photons), "
                "then numbers only."
            ) from error
    if not lines:
        raise ZooError(f"{path.name} holds no setups.")
    size, rows, states = 2**paths, [], []
    for i, line in enumerate(lines):
        count = len(line) - 2 * size
        if count < 4 or count % 4:
            raise ZooError(
                f"{path.name}, setup {i}: {len(line)} numbers; expected four a device and {2 * size} for the state of "
                f"{paths} photons."
            )
        rows.append([tuple(int(v) for v in line[j : j + 4]) for j in range(0, count, 4)])
        states.append(line[count:])
    values = torch.tensor(states, dtype=torch.float64)
    return (
        _stack(rows),
        torch.complex(values[:, :size], values[:, size:]),
        [f"{path.stem}_{i:05d}" for i in range(len(rows))],
    )


def _stack(rows: list[list[tuple[int, int, int, int]]]) -> Tensor:
    devices = torch.zeros(len(rows), max(1, *map(len, rows)) if len(rows) > 1 else max(1, len(rows[0])), 4).long()
    for i, row in enumerate(rows):
        if row:
            devices[i, : len(row)] = torch.tensor(row)
    return devices


def _photons(devices: Tensor) -> int:
    """Two a source of the first setup, at least two."""
    return max(2, 2 * int(_is_in(devices[0, :, 0], SOURCES).sum()))


def join_setups(parts: list[Part], files: list[Path]) -> Part:
    """Files' setups as one set, short ones filled up with blanks.

    Raises:
        ZooError: if they differ in photons, or in whether they hold states or measured values.
    """
    longest, photons = max(d.shape[1] for d, _, _ in parts), _photons(parts[0][0])
    for file, (devices, extra, _) in zip(files, parts, strict=True):
        if _photons(devices) != photons:
            raise ZooError(f"{file.name} is for {_photons(devices)} photons, {files[0].name} for {photons}.")
        first = parts[0][1]
        if (extra is None) != (first is None) or (extra is not None and extra.is_complex() != first.is_complex()):
            raise ZooError(f"{file.name} and {files[0].name} mix states, measured values and setups without either.")
    padded = [nn.functional.pad(d, (0, 0, 0, longest - d.shape[1])) for d, _, _ in parts]
    extra = None if parts[0][1] is None else torch.cat([e for _, e, _ in parts])
    return torch.cat(padded), extra, [name for _, _, names in parts for name in names]


READERS = {".csv": _read_csv, ".npz": _read_npz, ".txt": _read_txt}
