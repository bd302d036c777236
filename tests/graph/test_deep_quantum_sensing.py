"""DeepQuantumSensing against the authors' recorded values, states known by hand, plain loops and theory."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from zoo.core import Trainer, ZooError
from zoo.graph.physics import deep_quantum_sensing as dqs
from zoo.graph.physics.data_optical_sensing import (
    Environment,
    Laboratory,
    OpticalSensingDataModule,
    OpticalSimulator,
    axis_basis,
    check_setups,
    local,
    multinomial,
    mutate_setups,
    random_setups,
    setup_to_text,
    text_to_setup,
)
from zoo.graph.physics.deep_quantum_sensing import DeepQuantumSensing, TrigInterpolator, calibrate, trial_errors

GOLDEN = Path(__file__).parents[1] / "golden" / "deep_quantum_sensing.safetensors"
PAULI = {
    "X": torch.tensor([[0, 1], [1, 0]], dtype=torch.complex128),
    "Y": torch.tensor([[0, -1j], [1j, 0]], dtype=torch.complex128),
    "Z": torch.tensor([[1, 0], [0, -1]], dtype=torch.complex128),
}


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    # copied, for a file in memory is not aligned as complex arithmetic needs it
    return {key: value.clone() for key, value in load_file(GOLDEN).items()}


def setups(*texts: str, angles: int = 4) -> Tensor:
    """Setups from text, filled up to one length."""
    rows = [text_to_setup(text, angles) for text in texts]
    longest = max(map(len, rows))
    return torch.tensor([[*map(list, row), *[[0] * 4] * (longest - len(row))] for row in rows])


def ghz(n: int) -> Tensor:
    psi = torch.zeros(2**n, dtype=torch.complex128)
    psi[0] = psi[-1] = 1 / math.sqrt(2)
    return psi


def random_states(count: int, n: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    psi = torch.randn(count, 2**n, dtype=torch.complex128, generator=generator)
    return psi / psi.norm(dim=-1, keepdim=True)


def generator_matrix(environment: Environment) -> Tensor:
    """G as a dense matrix, from Kronecker products alone."""
    n, eye = environment.paths, torch.eye(2, dtype=torch.complex128)

    def product(parts: dict[int, Tensor]) -> Tensor:
        total = torch.ones(1, 1, dtype=torch.complex128)
        for i in range(n):
            total = torch.kron(total, parts.get(i, eye))
        return total

    if environment.name == "XX":
        pairs = itertools.combinations(range(n), 2)
        return sum(product({u: PAULI["X"], v: PAULI["X"]}) for u, v in pairs) / 2
    if environment.name == "random":
        z = PAULI["Z"]
        return sum(product({i: r.mH @ z @ r}) for i, r in enumerate(environment.rotation)) / 2
    return sum(product({i: PAULI[environment.name]}) for i in range(n)) / 2


# ---- the authors' code ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("paths", [4, 8])
def test_states_equal_the_authors_symbolic_optics(golden, paths: int) -> None:
    theirs = torch.view_as_complex(golden[f"state{paths}"])
    assert float((OpticalSimulator(paths)(golden[f"devices{paths}"]) - theirs).abs().max()) <= 1e-12


@pytest.mark.parametrize("environment", ["X", "Y", "Z", "XX"])
def test_qfi_equals_the_authors_labels(golden, environment: str) -> None:
    psi = torch.view_as_complex(golden["state4"])
    ours, theirs = Environment(environment, 4).qfi(psi), golden[f"qfi_{environment}"]
    assert float((ours - theirs).abs().max()) <= 1e-9
    assert float(theirs.max()) > 1


def test_graph_equals_the_authors(golden) -> None:
    x, adjacency, mask = (part[0] for part in dqs.encode(golden["devices4"][:1], 4, 4))
    edges = torch.zeros(int(mask.sum()), int(mask.sum()), dtype=torch.bool)
    edges[golden["edge_index"][0], golden["edge_index"][1]] = True
    assert torch.equal(x[mask], golden["node_features"])
    assert torch.equal(adjacency[mask][:, mask], edges)


@pytest.mark.parametrize("name", ["gnn", "mlp"])
@pytest.mark.parametrize("pack", [True, False])
def test_predictors_equal_the_authors(golden, name: str, pack: bool) -> None:
    weights = {k.removeprefix(f"{name}.weights."): v for k, v in golden.items() if k.startswith(f"{name}.weights.")}
    hparams, state = DeepQuantumSensing.convert_state_dict({"state_dict": weights})
    assert hparams["paths"] == 4 and hparams["angles"] == 4 and hparams["hidden"] == 8
    model = DeepQuantumSensing(**hparams)
    model.load_state_dict(state)
    call = (lambda d: model.net(d, pack)) if name == "gnn" else model
    for mode in ("eval", "train"):
        model.train(mode == "train")
        out = call(golden["devices4"])
        theirs = golden[f"{name}.{mode}"]
        assert float((out - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max())
    loss = dqs.qfi_loss(out, golden["qfi_Z"])
    assert float(loss) == pytest.approx(float(golden[f"{name}.loss"]), rel=1e-5)
    loss.backward()
    first = model.net.embed.weight if name == "gnn" else model.net.layers[0].weight
    theirs = golden[f"{name}.gradient"]
    assert float((first.grad - theirs).abs().max()) <= 1e-4 * float(theirs.abs().max())


def test_convert_refuses_other_weights(golden) -> None:
    with pytest.raises(ZooError, match=r"No GNN_QFM or MLP"):
        DeepQuantumSensing.convert_state_dict({"conv.weight": torch.zeros(2, 2)})
    weights = {k.removeprefix("gnn.weights."): v for k, v in golden.items() if k.startswith("gnn.weights.")}
    with pytest.raises(ZooError, match=r"for 21 features a node"):
        DeepQuantumSensing.convert_state_dict({**weights, "emb.0.weight": torch.zeros(8, 21)})


# ---- the optics -------------------------------------------------------------------------------------------------


def test_hong_ou_mandel_dip() -> None:
    """Equal photons leave a beam splitter together: no coincidence. Photons of different polarisation do not."""
    simulator = OpticalSimulator(2)
    same, other, closed = simulator(setups("HH(0,1) BS(0,1)", "HH(0,1) HWP(1,45) BS(0,1)", "HH(0,1)"), normalise=False)
    assert float(same.abs().max()) < 1e-15
    # a†H b†V → (a + i b)H (b + i a)V / 2: coincidences ab: HV with 1/2, VH with i * i / 2 = -1/2
    assert torch.allclose(other, torch.tensor([0, 0.5, -0.5, 0], dtype=torch.complex128))
    assert torch.allclose(closed, torch.tensor([1, 0, 0, 0], dtype=torch.complex128))


def test_hong_ou_mandel_dip_follows_the_overlap() -> None:
    """Coincidences after a beam splitter are (1 - |<u|v>|²) / 2, here with a wave plate turning one photon by 2 θ."""
    simulator = OpticalSimulator(2, angles=90)
    chances = []
    for degrees in range(2, 92, 4):
        psi = simulator(setups(f"HH(0,1) HWP(1,{degrees}) BS(0,1)", angles=90), normalise=False)
        overlap = math.cos(2 * math.radians(degrees)) ** 2
        chances.append(float(psi.abs().square().sum()))
        assert chances[-1] == pytest.approx((1 - overlap) / 2, abs=1e-12)
    assert min(chances) < 0.01 and max(chances) > 0.49


def test_pairs_are_bell_states() -> None:
    psi = OpticalSimulator(2)(setups("PAIR(0,1)"))[0]
    assert torch.allclose(psi, ghz(2))
    assert float(Environment("Z", 2).qfi(psi[None])) == pytest.approx(4)  # the Heisenberg limit of two photons


@pytest.mark.parametrize("n", [4, 6, 8])
def test_ghz_states_of_up_to_eight_photons(n: int) -> None:
    """Pairs joined by polarising beam splitters make (|H...H> + |V...V>)/√2, whose QFI is N² along Z."""
    text = " ".join(f"PAIR({p},{p + 1})" for p in range(0, n, 2))
    text += "".join(f" PBS({p},{p + 1})" for p in range(1, n - 1, 2))
    psi = OpticalSimulator(n)(setups(text))[0]
    fidelity = float((psi.conj() * ghz(n)).sum().abs())
    assert fidelity == pytest.approx(1, abs=1e-12)
    qfi = {name: float(Environment(name, n).qfi(psi[None])) for name in ("X", "Y", "Z")}
    assert qfi["Z"] == pytest.approx(n**2) and qfi["X"] == pytest.approx(n) and qfi["Y"] == pytest.approx(n)
    assert Environment("Z", n).limit == n**2 and Environment("Z", n).degree == n


def test_half_wave_plates_turn_the_ghz_state_to_another_axis() -> None:
    """22.5 degree plates are Hadamards: the same state then senses X instead of Z."""
    plates = " ".join(f"HWP({p},22.5)" for p in range(4))
    psi = OpticalSimulator(4, angles=8)(setups(f"PAIR(0,1) PAIR(2,3) PBS(1,2) {plates}", angles=8))
    assert float(Environment("X", 4).qfi(psi)) == pytest.approx(16)
    assert float(Environment("Z", 4).qfi(psi)) == pytest.approx(4)


def test_simulator_against_polynomials() -> None:
    """The state as a polynomial in creation operators, multiplied out term by term."""
    devices = random_setups(12, 4, 4, 2, 6, torch.Generator().manual_seed(3))
    ours = OpticalSimulator(4)(devices, normalise=False)
    s = 1 / math.sqrt(2)
    for row, psi in zip(devices.tolist(), ours, strict=True):
        state = {(): 1.0 + 0j}  # sorted tuples of modes (path, polarisation) -> coefficient
        for kind, p, q, k in row:
            if kind in (6, 7, 8):
                pairs = {6: [(0, s), (1, s)], 7: [(0, 1.0)], 8: [(1, 1.0)]}[kind]
                state = _collect(
                    (tuple(sorted((*term, (p, c), (q, c)))), value * w)
                    for term, value in state.items()
                    for c, w in pairs
                )
            elif kind:
                c, d = math.cos(2 * math.pi * k / 4), math.sin(2 * math.pi * k / 4)

                def become(mode, kind=kind, p=p, q=q, c=c, d=d):
                    path, colour = mode
                    if path not in (p, q):
                        return [(mode, 1.0)]
                    other = q if path == p else p
                    if kind == 1:
                        return [(mode, s), ((other, colour), 1j * s)]
                    if kind == 2:
                        return [(mode, 1.0)] if colour == 0 else [((other, 1), 1.0)]
                    if kind == 3:
                        return [((path, 0), c if colour == 0 else d), ((path, 1), d if colour == 0 else -c)]
                    if kind == 4:
                        own = (1 - 1j * c) * s if colour == 0 else (1 + 1j * c) * s
                        return [(mode, own), ((path, 1 - colour), -1j * d * s)]
                    return [(mode, 1j)]

                terms = []
                for term, value in state.items():
                    for choice in itertools.product(*(become(mode) for mode in term)):
                        factor = math.prod((w for _, w in choice), start=value)
                        terms.append((tuple(sorted(mode for mode, _ in choice)), factor))
                state = _collect(terms)
        wanted = torch.zeros(16, dtype=torch.complex128)
        for term, value in state.items():
            if [path for path, _ in term] == [0, 1, 2, 3]:
                wanted[int("".join(str(c) for _, c in term), 2)] = value
        assert torch.allclose(psi, wanted, atol=1e-12)


def _collect(terms) -> dict:
    found: dict = {}
    for term, value in terms:
        found[term] = found.get(term, 0) + value
    return found


def test_linear_optics_is_unitary_and_keeps_the_norm_below_one() -> None:
    simulator, devices = OpticalSimulator(6), random_setups(50, 6, 4, generator=torch.Generator().manual_seed(0))
    u = simulator.modes(devices)
    assert torch.allclose(u @ u.mH, torch.eye(12, dtype=u.dtype).expand_as(u), atol=1e-12)
    norm = simulator(devices, normalise=False).norm(dim=-1)
    assert float(norm.max()) <= 1 + 1e-9
    whole = simulator(devices).norm(dim=-1)
    assert bool(((whole - 1).abs().lt(1e-9) | (whole == 0)).all()) and bool((whole == 0).any())


def test_precision_and_chunks_do_not_change_the_state() -> None:
    devices = random_setups(20, 4, 4, generator=torch.Generator().manual_seed(1))
    whole = OpticalSimulator(4)(devices)
    assert torch.allclose(OpticalSimulator(4)(devices, chunk=7), whole, atol=1e-14)
    assert torch.allclose(OpticalSimulator(4, precision="complex64")(devices).to(whole.dtype), whole, atol=1e-5)


# ---- the environment --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["X", "Y", "Z", "XX", "random"])
def test_qfi_against_dense_matrices(name: str) -> None:
    environment, psi = Environment(name, 4, seed=1), random_states(5, 4)
    g = generator_matrix(environment)
    for i in range(5):
        mean, square = (float((psi[i].conj() @ m @ psi[i]).real) for m in (g, g @ g))
        assert float(environment.qfi(psi)[i]) == pytest.approx(4 * (square - mean**2), abs=1e-10)
    values = torch.linalg.eigvalsh(g)
    assert float(values[-1] - values[0]) ** 2 == pytest.approx(environment.limit)


@pytest.mark.parametrize("name", ["Y", "XX", "random"])
def test_probabilities_against_the_matrix_exponential(name: str) -> None:
    environment, psi = Environment(name, 4), random_states(1, 4)[0]
    g, phases = generator_matrix(environment), torch.tensor([0.0, 0.4, 2.0], dtype=torch.float64)
    for basis in ("X", "Y", "Z"):
        turn = axis_basis(torch.tensor([float(basis == b) for b in "XYZ"])).expand(4, 2, 2)
        p = environment.probabilities(psi, phases, basis)
        for row, phi in zip(p, phases.tolist(), strict=True):
            wanted = local(torch.linalg.matrix_exp(-1j * phi * g) @ psi, turn).abs().square()
            assert torch.allclose(row, wanted, atol=1e-12)


def test_axis_basis_diagonalises() -> None:
    axes = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, -1], [0.48, -0.6, 0.64]]).double()
    for axis, u in zip(axes, axis_basis(axes), strict=True):
        sigma = sum(a * PAULI[b] for a, b in zip(axis.tolist(), "XYZ", strict=True))
        assert torch.allclose(u @ sigma @ u.mH, PAULI["Z"], atol=1e-12)


def test_dephased_qfi() -> None:
    """GHZ states lose (1 - p)^(2 N) of N²; without dephasing the spectral formula is the variance."""
    for n, p in ((2, 0.1), (4, 0.3)):
        environment = Environment("Z", n, dephasing=p)
        assert float(environment.qfi(ghz(n)[None])) == pytest.approx(n**2 * (1 - p) ** (2 * n), rel=1e-9)
    psi = random_states(4, 4)
    nearly, pure = Environment("random", 4, dephasing=1e-9), Environment("random", 4)
    assert torch.allclose(nearly.qfi(psi), pure.qfi(psi), rtol=1e-5)
    noisy = Environment("random", 4, dephasing=0.2)
    assert bool((noisy.qfi(psi) < pure.qfi(psi)).all())
    phases = torch.linspace(0, 3, 5)
    p = noisy.probabilities(psi[0], phases, "Y")
    assert torch.allclose(p.sum(1), torch.ones(5).double())
    assert torch.allclose(
        Environment("random", 4, dephasing=1e-12).probabilities(psi[0], phases, "Y"),
        pure.probabilities(psi[0], phases, "Y"),
        atol=1e-9,
    )


def test_classical_information_never_exceeds_the_quantum_one() -> None:
    for name in ("Z", "XX", "random"):
        environment, psi = Environment(name, 4), random_states(3, 4)
        known = torch.arange(2 * environment.degree + 1).double() * 2 * math.pi / (2 * environment.degree + 1)
        for state, qfi in zip(psi, environment.qfi(psi), strict=True):
            for basis in ("X", "Y", "Z"):
                curve = TrigInterpolator(known, environment.probabilities(state, known, basis), environment.degree)
                at = torch.linspace(0.1, 6, 9).double()
                p, slope = environment.probabilities(state, at, basis), curve.derivative(at)
                assert float((slope.square() / p).sum(-1).max()) <= float(qfi) * (1 + 1e-6)


def test_labels_with_shot_noise_scatter_around_the_exact_ones() -> None:
    laboratory = Laboratory(OpticalSimulator(4), Environment("Z", 4))
    devices = random_setups(100, 4, 4, generator=torch.Generator().manual_seed(0))
    exact = laboratory.qfi(devices)
    noisy = laboratory.qfi(devices, shots=1_000_000, generator=torch.Generator().manual_seed(1))
    assert float((noisy - exact).abs().max()) < 0.6 and float((noisy - exact).abs().max()) > 1e-4
    assert laboratory.queries == 200
    with pytest.raises(ValueError, match="needs a pure state"):
        Laboratory(laboratory.simulator, Environment("Z", 4, dephasing=0.1)).qfi(devices, shots=10)


def test_multinomial_counts() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.0, 0.0, 0.0, 1.0]])
    counts = multinomial(p, 100_000, torch.Generator().manual_seed(0))
    assert counts.sum(1).tolist() == [100_000, 100_000] and counts[1].tolist() == [0, 0, 0, 100_000]
    assert torch.allclose(counts[0] / 100_000, p[0].double(), atol=0.01)


# ---- trigonometric interpolation --------------------------------------------------------------------------------


def test_interpolation_is_exact_from_2n_plus_1_phases_and_wrong_from_fewer() -> None:
    environment, psi = Environment("Z", 4), random_states(1, 4)[0]
    at = torch.linspace(0, 6, 50).double()
    truth = environment.probabilities(psi, at, "X")
    for points in (9, 14):
        known = torch.arange(points).double() * 2 * math.pi / points
        curve = TrigInterpolator(known, environment.probabilities(psi, known, "X"), 4)
        assert float((curve(at) - truth).abs().max()) < 1e-12
        slope = (environment.probabilities(psi, at + 1e-5, "X") - environment.probabilities(psi, at - 1e-5, "X")) / 2e-5
        assert torch.allclose(curve.derivative(at), slope, atol=1e-8)
    random = torch.rand(9, generator=torch.Generator().manual_seed(0)).double() * 6  # any phases, not only equal steps
    assert (
        float((TrigInterpolator(random, environment.probabilities(psi, random, "X"), 4)(at) - truth).abs().max()) < 1e-6
    )
    few = torch.arange(5).double() * 2 * math.pi / 5
    with pytest.raises(ValueError, match="5 phases determine 5 coefficients; degree 4 has 9"):
        TrigInterpolator(few, environment.probabilities(psi, few, "X"), 4)
    aliased = TrigInterpolator(few, environment.probabilities(psi, few, "X"), 4, allow_alias=True)
    assert float((aliased(at) - truth).abs().max()) > 0.02


def test_interpolation_is_the_discrete_fourier_transform_on_equal_steps() -> None:
    values = torch.rand(7, 2, generator=torch.Generator().manual_seed(0)).double()
    phases = torch.arange(7).double() * 2 * math.pi / 7
    c = torch.fft.fft(values, dim=0) / 7
    wanted = torch.cat([c[:1].real, 2 * c[1:4].real, -2 * c[1:4].imag])
    assert torch.allclose(TrigInterpolator(phases, values, 3).coefficients, wanted, atol=1e-12)


def ghz_bench(n: int) -> tuple[Laboratory, Tensor]:
    text = " ".join(f"PAIR({p},{p + 1})" for p in range(0, n, 2)) + "".join(
        f" PBS({p},{p + 1})" for p in range(1, n - 1, 2)
    )
    return Laboratory(OpticalSimulator(n), Environment("Z", n)), setups(text)[0]


@pytest.mark.parametrize("n", [2, 4])
def test_estimates_reach_the_cramer_rao_bound_at_the_heisenberg_limit(n: int) -> None:
    laboratory, bench = ghz_bench(n)
    draw = torch.Generator().manual_seed(0)
    sensor = calibrate(laboratory, bench, 200_000, generator=draw)
    assert sensor.basis in ("X", "Y") and sensor.period == pytest.approx(2 * math.pi / n)
    found = trial_errors(laboratory, bench, sensor, 2000, 400, draw)
    assert found["cramer_rao"] == pytest.approx(found["quantum"], rel=1e-3)
    assert found["quantum"] == pytest.approx(1 / (n * math.sqrt(2000)), rel=1e-9)
    assert 0.85 < found["ratio"] < 1.2
    assert found["rmse"] < found["shot_noise"]  # below what unentangled light allows


def test_too_few_calibration_phases_spoil_the_estimate() -> None:
    laboratory, bench = ghz_bench(4)
    draw = torch.Generator().manual_seed(0)
    sensor = calibrate(laboratory, bench, points=5, allow_alias=True, generator=draw)
    assert trial_errors(laboratory, bench, sensor, trials=100, generator=draw)["ratio"] > 3


def test_the_error_bar_is_right_and_the_interval_is_kept() -> None:
    laboratory, bench = ghz_bench(2)
    draw = torch.Generator().manual_seed(1)
    sensor = calibrate(laboratory, bench, 200_000, generator=draw)
    phi, shots = 0.3, 3000
    p = laboratory.environment.probabilities(ghz(2), phi + sensor.offsets, sensor.basis)
    counts = multinomial(p.expand(200, 3, 4), shots // 3, draw)
    found, error = sensor.estimate(counts)
    assert float(found.mean()) == pytest.approx(phi, abs=0.01)
    assert float(found.std()) == pytest.approx(float(error.mean()), rel=0.2)
    later, _ = sensor.estimate(counts[:3], (2 * math.pi, 3 * math.pi))
    assert torch.allclose(later, found[:3] + 2 * math.pi, atol=1e-3)  # 0.3 modulo the period of pi
    with pytest.raises(ValueError, match=r"expected \(repetitions, 3, 4\)"):
        sensor.estimate(counts[:, :2])


def test_a_setup_that_does_not_see_the_phase_is_refused() -> None:
    laboratory = Laboratory(OpticalSimulator(2), Environment("Z", 2))
    with pytest.raises(ZooError, match="does not see the phase"):
        calibrate(laboratory, setups("HH(0,1)")[0])
    with pytest.raises(ValueError, match="nothing to count"):
        calibrate(laboratory, setups("HH(0,1) BS(0,1)")[0])


# ---- the predictor ----------------------------------------------------------------------------------------------


def test_graph_by_walking_along_the_paths() -> None:
    devices = random_setups(30, 4, 4, generator=torch.Generator().manual_seed(2))
    _, adjacency, mask = dqs.encode(devices, 4, 4)
    for row, edges, nodes in zip(devices.tolist(), adjacency, mask, strict=True):
        wanted = torch.zeros_like(edges)
        last = [0] * 4
        stops = [(i + 1, {d[1], d[2]}) for i, d in enumerate(row) if d[0]] + [(len(row) + 1, set(range(4)))]
        for node, lanes in stops:
            for lane in lanes:
                wanted[last[lane], node] = wanted[node, last[lane]] = True
                last[lane] = node
        assert torch.equal(edges, wanted)
        assert nodes.tolist() == [True, *(bool(d[0]) for d in row), True]


def test_attention_by_loops() -> None:
    torch.manual_seed(0)
    layer = dqs.GraphAttention(6, 2).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    adjacency = torch.rand(5, 5) < 0.5
    adjacency[range(5), range(5)] = True
    out = layer(x, None, None, adjacency[None])
    q, k, v = (part.view(5, 2, 6) for part in layer.project(x)[:, :36].split(12, -1))
    skip = layer.project(x)[:, 36:]
    for i in range(5):
        near = adjacency[i].nonzero().flatten()
        heads = []
        for h in range(2):
            weights = torch.tensor([float(q[i, h] @ k[j, h]) / math.sqrt(6) for j in near]).softmax(0)
            heads.append(sum(w * v[j, h] for w, j in zip(weights, near, strict=True)))
        o = sum(heads) / 2
        beta = torch.sigmoid(layer.gate.weight[0] @ torch.cat([o, skip[i], o - skip[i]]))
        assert torch.allclose(out[i], beta * skip[i] + (1 - beta) * o, atol=1e-6)


@pytest.mark.parametrize("training", [False, True])
def test_blanks_change_nothing(training: bool) -> None:
    torch.manual_seed(0)
    models = [DeepQuantumSensing.from_variant("tiny", paths=4) for _ in range(3)]
    devices = random_setups(16, 4, 4, generator=torch.Generator().manual_seed(0))
    wide = torch.nn.functional.pad(devices, (0, 0, 0, 5))
    start = {k: v.clone() for k, v in models[0].state_dict().items()}
    outs = []
    for model, given, pack in zip(models, (devices, wide, wide), (True, True, False), strict=True):
        model.load_state_dict(start)
        model.train(training)
        outs.append(model.net(given, pack))
        outs[-1].square().mean().backward()
    for model, out in zip(models[1:], outs[1:], strict=True):
        assert torch.allclose(out, outs[0], atol=1e-5)
        for (name, p), q in zip(model.named_parameters(), models[0].parameters(), strict=True):
            assert torch.allclose(p.grad, q.grad, atol=1e-4), name
        for a, b in zip(model.buffers(), models[0].buffers(), strict=True):
            assert torch.allclose(a, b, atol=1e-5)


def test_packed_attention_and_its_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [1, 1, 0, 0]]).bool()
    adjacency = (torch.rand(3, 4, 4, generator=generator) < 0.5) & mask[:, :, None] & mask[:, None]
    adjacency |= torch.eye(4, dtype=torch.bool)
    flat = mask.flatten()
    rows, places = flat.nonzero().squeeze(1), flat.cumsum(0) - 1
    torch.manual_seed(0)
    layer = dqs.GraphAttention(3, 2).double()
    x = torch.randn(len(rows), 3, dtype=torch.float64, requires_grad=True)
    grid = x.new_zeros(12, 3).index_copy(0, rows, x)
    packed, whole = layer(x, rows, places, adjacency), layer(grid, None, None, adjacency)[rows]
    assert torch.allclose(packed, whole, atol=1e-12)
    inputs, toward = (x, *layer.parameters()), torch.randn_like(whole)
    for a, b in zip(*(torch.autograd.grad(y, inputs, toward) for y in (packed, whole)), strict=True):
        assert torch.allclose(a, b, atol=1e-12)
    projected = torch.randn(len(rows), 21, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: dqs._PackedAttention.apply(p, rows, places, adjacency, 2), projected)


def test_losses_by_hand() -> None:
    predicted, qfi = torch.tensor([1.0, 3.0, 2.0]), torch.tensor([1.0, 1.0, 4.0])
    assert float(dqs.qfi_loss(predicted, qfi)) == pytest.approx((0 + 4 + 4) / 3)
    assert float(dqs.qfi_loss(predicted, qfi, "huber")) == pytest.approx((0 + 1.5 + 1.5) / 3)
    pairs = [math.log1p(math.exp(-(2.0 - 1.0))), math.log1p(math.exp(-(2.0 - 3.0)))]  # each counted in both orders
    assert float(dqs.qfi_loss(predicted, qfi, rank_weight=0.1)) == pytest.approx(8 / 3 + 0.1 * sum(pairs) / 2)


def test_scores_against_scipy_and_enumeration() -> None:
    import scipy.stats

    a = torch.randint(0, 5, (40,), generator=torch.Generator().manual_seed(0)).double()
    b = a + torch.randn(40, generator=torch.Generator().manual_seed(1))
    assert float(dqs.spearman(a, b)) == pytest.approx(scipy.stats.spearmanr(a, b).statistic)
    assert float(dqs.spearman(torch.ones(4), torch.arange(4.0))) == 0
    values = torch.tensor([0.0, 5.0, 1.0, 1.0, 3.0])
    wanted = [max(c) for c in itertools.combinations(values.tolist(), 3)]
    assert dqs.best_of_random(values, 3) == pytest.approx(sum(wanted) / len(wanted))


class Oracle(DeepQuantumSensing):
    """Knows every setup's QFI, so that a search is tested without training."""

    def predict(self, devices: Tensor) -> Tensor:
        return self.bench.qfi(devices)


def test_search_measures_only_what_it_reports() -> None:
    model = Oracle.from_variant("tiny", top_k=5, candidates=400)
    model.bench = Laboratory(OpticalSimulator(4), Environment("X", 4))
    laboratory = Laboratory(OpticalSimulator(4), Environment("X", 4))
    draw = torch.Generator().manual_seed(0)
    setups, qfi = model.search(laboratory, rounds=2, generations=8, generator=draw)
    assert len(setups) == len(qfi) == laboratory.queries == 10
    assert len(setups.flatten(1).unique(dim=0)) == 10
    assert qfi.tolist() == sorted(qfi.tolist(), reverse=True)
    best = laboratory.qfi(random_setups(400, 4, 4, generator=draw)).max()
    assert float(qfi[0]) > float(best)  # changes lead beyond what chance finds
    check_setups(setups, 4, 4)


def test_active_learning_moves_the_predictor() -> None:
    model = DeepQuantumSensing.from_variant("tiny", top_k=4, candidates=50)
    before = model.net.head.weight.clone()
    laboratory = Laboratory(OpticalSimulator(4), Environment("Z", 4))
    known = random_setups(20, 4, 4, generator=torch.Generator().manual_seed(0))
    model.search(laboratory, 2, 1, known=(known, laboratory.qfi(known)), tune_steps=2)
    assert not torch.equal(before, model.net.head.weight)


def test_mutations_stay_setups() -> None:
    draw = torch.Generator().manual_seed(0)
    devices = random_setups(200, 6, 4, generator=draw)
    changed = mutate_setups(devices, 6, 4, draw)
    check_setups(changed, 6, 4)
    assert bool(((changed != devices).any(-1).sum(1) <= 1).all()) and not torch.equal(changed, devices)


def test_whole_method_in_a_trainer(tmp_path: Path) -> None:
    data = OpticalSensingDataModule(train_size=64, val_size=20, test_size=60)
    model = DeepQuantumSensing.from_variant("tiny", search_rounds=1, candidates=60, calibration_shots=2000)
    trainer = Trainer(
        default_root_dir=tmp_path, max_epochs=1, logger=False, enable_progress_bar=False, accelerator="cpu"
    )
    trainer.fit(model, datamodule=data)
    (found,) = trainer.test(model, datamodule=data, verbose=False)
    assert 0 <= found["test/random"] <= 1 and 0 <= found["test/regret"] <= 1 and found["test/queries"] == 2
    assert model.best_setup is not None
    if "test/cramer_rao_ratio" in found:
        assert found["test/cramer_rao_ratio"] > 0.5


# ---- data -------------------------------------------------------------------------------------------------------


def test_text_form_and_back() -> None:
    text = "PAIR(0,1) VV(2,3) BS(0,2) PBS(3,1) HWP(1,45) QWP(0,180) R(2)"
    rows = setups(text)[0]
    assert rows[4:].tolist() == [[3, 1, 1, 1], [4, 0, 0, 4], [5, 2, 2, 0]]
    assert setup_to_text(rows, 4) == text
    assert text_to_setup("hwp(1, -45); mirror( 0 )", 4) == [(3, 1, 1, 3), (5, 0, 0, 0)]
    with pytest.raises(ZooError, match=r"multiples of 45 degrees"):
        text_to_setup("HWP(1,10)", 4)
    for bad in ("LASER(0,1)", "BS(0)", "BS(0,x)", "BS 0", "R(0,1)"):
        with pytest.raises(ZooError, match="is no device"):
            text_to_setup(bad, 4)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("PAIR(0,1) BS(0,1)", "has 1 pair sources; 4 photons need 2"),
        ("PAIR(0,1) HH(2,3) BS(0,4)", "a path that is not 0...3"),
        ("PAIR(0,1) HH(2,3) BS(1,1)", "between a path and itself"),
        ("PAIR(0,1) BS(0,1) HH(2,3)", "sources come first"),
    ],
)
def test_wrong_setups_are_refused(text: str, reason: str) -> None:
    devices = setups(text)
    with pytest.raises(ValueError, match=reason):
        DeepQuantumSensing.from_variant("tiny").predict(devices)
    with pytest.raises(ValueError, match=reason):
        OpticalSimulator(4)(devices)


def test_other_wrong_inputs() -> None:
    model = DeepQuantumSensing.from_variant("tiny")
    with pytest.raises(ValueError, match=r"expected integers \(setups, devices, 4\)"):
        model(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"angle that is not 1\.\.\.4"):
        model.predict(torch.tensor([[[6, 0, 1, 0], [6, 2, 3, 0], [3, 0, 0, 5]]]))
    with pytest.raises(ValueError, match="must be even"):
        DeepQuantumSensing(paths=3)
    with pytest.raises(ValueError, match="environment is 'W'"):
        Environment("W")
    with pytest.raises(ValueError, match="length=5"):
        small = DeepQuantumSensing.from_variant("tiny", predictor="mlp", length=5)
        small(random_setups(2, 4, 4))


def test_generated_set() -> None:
    sets = [OpticalSensingDataModule(train_size=50, val_size=10, test_size=20, seed=s) for s in (0, 0, 1)]
    a, b, c = (data.dataset("train").devices for data in sets)
    assert torch.equal(a, b) and not torch.equal(a, c)
    test = sets[0].dataset("test")
    assert torch.allclose(test.qfi.double(), sets[0].laboratory.qfi(test.devices), atol=1e-5)
    assert sets[0].describe() == {"paths": 4, "angles": 4, "length": 19, "limit": 16.0}
    kinds = a[:, 2:, 0]
    count = (kinds != 0).sum(1)
    assert int(count.min()) >= 3 and int(count.max()) <= 15 and set(kinds.unique().tolist()) == {0, 1, 2, 3, 4, 5}
    wrong = OpticalSensingDataModule(train_size=50, val_size=10, test_size=20, shuffle_labels=True)
    assert not torch.equal(wrong.dataset("train").qfi, sets[0].dataset("train").qfi)
    assert torch.equal(wrong.dataset("test").qfi, test.qfi)


def their_file(folder: Path, devices: Tensor, psi: Tensor) -> Path:
    lines = [f"{len(devices)} 8 4 15"]
    for rows, state in zip(devices.tolist(), psi, strict=True):
        numbers = [v for row in rows if row[0] for v in row] + state.real.tolist() + state.imag.tolist()
        lines.append(" ".join(map(repr, numbers)))
    path = folder / "dataset_4qubit_quantize45.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_reads_the_authors_layout(tmp_path: Path) -> None:
    devices = random_setups(30, 4, 4, generator=torch.Generator().manual_seed(0))
    psi = OpticalSimulator(4)(devices)
    their_file(tmp_path, devices, psi)
    data = OpticalSensingDataModule(str(tmp_path), environment="Y", train_size=20)
    assert data.describe()["limit"] == 16.0
    assert [len(data.dataset(s)) for s in ("train", "val", "test")] == [20, 3, 3]
    assert torch.allclose(data.dataset("train").qfi.double(), Environment("Y", 4).qfi(psi)[:20], atol=1e-5)
    length = data.dataset("test").devices.shape[1]
    packed = [[row for row in rows if row[0]] for rows in devices[27:].tolist()]
    for rows, wanted in zip(data.dataset("test").devices.tolist(), packed, strict=True):
        assert rows == wanted + [[0] * 4] * (length - len(wanted))


def test_own_measurements_train(tmp_path: Path) -> None:
    devices = random_setups(12, 4, 4, generator=torch.Generator().manual_seed(0))
    lines = ["setup,qfi", *(f'"{setup_to_text(row, 4)}",{i}' for i, row in enumerate(devices))]
    (tmp_path / "lab.csv").write_text("\n".join(lines))
    data = OpticalSensingDataModule(str(tmp_path))
    assert data.dataset("train").qfi.tolist() == list(range(10))
    (tmp_path / "lab.csv").write_text(lines[0].replace(",qfi", "") + '\n"PAIR(0,1) HH(2,3)"\n')
    with pytest.raises(ZooError, match="has no qfi"):
        OpticalSensingDataModule(str(tmp_path)).setup()
    (tmp_path / "lab.csv").unlink()
    with pytest.raises(FileNotFoundError, match="holds no setups"):
        OpticalSensingDataModule(str(tmp_path)).setup()


def test_own_files_in_and_out(tmp_path: Path) -> None:
    import numpy as np

    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "a.csv").write_text('name,setup\nghz,"PAIR(0,1) PAIR(2,3) PBS(1,2)"\n,HH(0,1) HH(2,3) R(0)\n')
    np.savez(folder / "b.npz", devices=random_setups(2, 4, 4).numpy())
    (folder / "broken.csv").write_text("name,setup\nx,LASER(0)\n")
    (folder / "six.csv").write_text('setup\n"PAIR(0,1) PAIR(2,3) PAIR(4,5)"\n')
    data = OpticalSensingDataModule().from_files(folder)
    batch = next(iter(data.predict_dataloader()))
    assert batch["name"] == ["ghz", "a_00001", "b_00000", "b_00001"] and "qfi" not in batch
    reasons = {path.name: reason for path, reason in data.skipped}
    assert reasons.keys() == {"broken.csv", "six.csv"}
    assert "line 2" in reasons["broken.csv"] and "6 photons" in reasons["six.csv"]
    out = DeepQuantumSensing.from_variant("tiny").predict_step(batch, 0)
    (written,) = data.write([out], tmp_path / "out")
    lines = written.read_text().splitlines()
    assert lines[0] == "name,rank,qfi,heisenberg,setup" and '"PAIR(0,1) PAIR(2,3) PBS(1,2)"' in lines[1]
    assert sorted(int(line.split(",")[1]) for line in lines[1:]) == [1, 2, 3, 4]
    (binary,) = data.write([out], tmp_path / "out.npz")
    with np.load(binary) as kept:
        assert kept["devices"].shape[0] == 4 and kept["qfi"] == pytest.approx(out["qfi"].numpy())


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.csv", "name,device\nx,y\n", "expected setup"),
        ("a.csv", "setup\n", "holds no setups"),
        ("a.csv", 'setup,qfi\n"PAIR(0,1)",many\n', "line 2"),
        ("a.csv", 'setup,qfi\n"PAIR(0,1)",nan\n', "finite"),
        ("a.txt", "hello\n", "not in the authors' form"),
        ("a.txt", "1 8 4 15\n6 0 1 0 6 2 3\n", "four a device"),
        ("a.npz", "no zip", "no .npz"),
        ("a.json", "{}", "expected .csv"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: str, reason: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ZooError, match=reason):
        OpticalSensingDataModule().from_files(tmp_path / name)
