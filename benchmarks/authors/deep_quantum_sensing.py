"""DeepQuantumSensing beside the authors' code (ZeddTheGoat/Deep-learning-Quantum-Sensing).

Their generator is a script; the few lines of its loop stand here around their own functions (`_their_state`).
"""

import contextlib
import importlib
import importlib.util
import math
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import error, in_turns
from zoo.graph.physics.data_optical_sensing import (
    SOURCES,
    OpticalSensingDataModule,
    OpticalSimulator,
    random_setups,
)
from zoo.graph.physics.deep_quantum_sensing import DeepQuantumSensing, encode, qfi_loss

ENVIRONMENTS = {
    "Z": "get_loader_qfm_var_Z_quantize45",
    "X": "get_loader_qfm_var_X_quantize45",
    "Y": "get_loader_qfm_var_Y_quantize45",
    "XX": "get_loader_qfm_var_XX",
}


@contextlib.contextmanager
def _path(folder: Path) -> Iterator[None]:
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            if name.split(".")[0] in ("device", "utils", "models"):
                del sys.modules[name]


def _optics(checkout: Path) -> Any:
    """Their symbolic optics, ``utils/utils.py``, which imports ``device`` beside it."""
    with _path(checkout / "utils"):
        spec = importlib.util.spec_from_file_location("dqs_optics", checkout / "utils" / "utils.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


def _their_state(optics: Any, setup: list[list[int]], paths: int, angles: int) -> Tensor:
    """One pass of the loop in ``dataset_generate.py``."""
    import sympy as sp

    table = {i: sp.IndexedBase(name) for i, name in zip(range(paths), "abcdefgh", strict=False)}
    wild = [sp.Wild(f"x{i + 1}") for i in range(paths)]
    coeff, l1, l2 = sp.Wild("coeff"), sp.Wild("l1"), sp.Wild("l2")
    state: Any = 1
    for kind, first, second, _ in (row for row in setup if row[0] in SOURCES):
        state = state * optics.action(act_id=kind, p1=table[first], p2=table[second])
    devices = [[k, table[p], table[q], a * sp.pi / angles] for k, p, q, a in setup if k and k not in SOURCES]
    expr = optics.apply_actions(state, devices)
    expr = optics.replaceRule(expr, {coeff * table[i][l1] * table[i][l2]: 0 for i in range(paths)})
    if expr == 0:  # their generator would stop here with an error
        return torch.zeros(2**paths, dtype=torch.complex128)
    factor = math.prod((table[i][wild[i]] for i in range(1, paths)), start=table[0][wild[0]])
    return torch.from_numpy(optics.StateVector(optics.TermsCoeffList(expr, factor), paths))


def _text_file(folder: Path, devices: Tensor, states: Tensor, paths: int) -> Path:
    """Setups and states in their form."""
    path = folder / "dataset.txt"
    lines = [f"{len(devices)} 8 {paths} 15"]
    for setup, psi in zip(devices.tolist(), states, strict=True):
        numbers = [v for row in setup if row[0] for v in row]
        lines.append(" ".join(map(repr, [*numbers, *psi.real.tolist(), *psi.imag.tolist()])))
    path.write_text("\n".join(lines) + "\n")
    return path


def _their_graphs(checkout: Path, path: Path, loader: str, count: int) -> list[Any]:
    with _path(checkout):
        module = importlib.import_module("utils.train_utils")
        return list(getattr(module, loader)(str(path), count)[0].dataset)


def _networks(checkout: Path, features: int, hidden: int, layers: int, heads: int = 4) -> tuple[Any, Any]:
    """Their GNN_QFM with random weights and statistics (its heads are always 4), and the class of their MLP."""
    assert heads == 4
    with _path(checkout):
        module = importlib.import_module("models.model")
        torch.manual_seed(0)
        theirs = module.GNN_QFM(features, 19, 1, hidden_size=hidden, num_layers=layers - 1)
        return _stirred(theirs), module.MLP


def _stirred(net: nn.Module) -> nn.Module:
    """Statistics of the norms away from 0 and 1, so that a norm left out would show."""
    generator = torch.Generator().manual_seed(3)
    for name, value in net.state_dict().items():
        if name.endswith("running_mean"):
            value.copy_(0.1 * torch.randn(value.shape, generator=generator))
        if name.endswith("running_var"):
            value.copy_(0.5 + torch.rand(value.shape, generator=generator))
    return net


def _collate(graphs: list[Any]) -> Any:
    from torch_geometric.data import Batch

    return Batch.from_data_list(graphs)


def _ours(theirs: nn.Module, **changes: Any) -> DeepQuantumSensing:
    hyperparameters, state = DeepQuantumSensing.convert_state_dict(theirs.state_dict())
    model = DeepQuantumSensing(**{**hyperparameters, **changes})
    model.load_state_dict(state)
    return model


def _named(model: DeepQuantumSensing, theirs: nn.Module, pick: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """A property of their parameters under our names, by their own conversion."""
    content = dict(theirs.state_dict())
    every = theirs.named_parameters(remove_duplicate=False)  # their first layer has two names
    content |= {name: pick(p) for name, p in every if not name.startswith("bn.")}
    _, state = DeepQuantumSensing.convert_state_dict(content)
    names = dict(model.named_parameters())
    return {key: value for key, value in state.items() if key in names}


def _step(theirs: nn.Module, call: Callable[[], Tensor], devices: Tensor, qfi: Tensor, name: str) -> dict[str, float]:
    """Forward in both modes, loss, gradients and one Adam step."""
    ours = _ours(theirs)
    theirs.eval(), ours.eval()
    found = {f"{name}forward": error(ours(devices), call())}
    theirs.train(), ours.train()
    found[f"{name}forward_training"] = error(mine := ours(devices), other := call())
    loss, wanted = qfi_loss(mine, qfi), nn.functional.mse_loss(other, qfi)
    found[f"{name}loss"] = error(loss, wanted)
    loss.backward(), wanted.backward()
    largest = max(float(p.grad.abs().max()) for p in theirs.parameters() if p.grad is not None)
    gradients = _named(ours, theirs, lambda p: p.grad)
    # relative to the largest of all: biases before a batch norm have gradients of rounding alone
    own = dict(ours.named_parameters())
    found[f"{name}gradients"] = max(float((own[k].grad - g).abs().max()) for k, g in gradients.items()) / largest
    # A step of Adam is ±lr wherever there is a gradient, also one of rounding: these are set equal first.
    for key, gradient in gradients.items():
        own[key].grad.copy_(gradient)
    optimizer = torch.optim.Adam(theirs.parameters(), lr=1e-4, weight_decay=1e-5)
    optimizer.step(), ours.configure_optimizers().step()
    stepped = _named(ours, theirs, lambda p: p.detach())
    found[f"{name}step"] = max(error(own[k], v) for k, v in stepped.items())
    states = _named_state(ours, theirs)
    found[f"{name}statistics"] = max(error(ours.state_dict()[k], v) for k, v in states.items())
    return found


def _named_state(model: DeepQuantumSensing, theirs: nn.Module) -> dict[str, Tensor]:
    _, state = DeepQuantumSensing.convert_state_dict(theirs.state_dict())
    return {k: v for k, v in state.items() if "running" in k}


def _setups(count: int, paths: int, longest: int, angles: int = 4, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return random_setups(count, paths, angles, min(3, longest), longest, generator)


def compare(checkout: Path) -> dict[str, float]:
    """Largest relative errors; states and labels in float64, networks in float32."""
    optics, found = _optics(checkout), {}
    for paths, count, longest in ((4, 12, 5), (6, 2, 3), (8, 1, 3)):
        devices = _setups(count, paths, longest)
        theirs = torch.stack([_their_state(optics, setup, paths, 4) for setup in devices.tolist()])
        ours = OpticalSimulator(paths)(devices)
        found[f"state_{paths}_photons"] = error(ours, theirs)
        if paths == 4:
            labelled, states = devices, theirs
    fine = _setups(3, 4, 3, angles=90, seed=5)
    theirs = torch.stack([_their_state(optics, setup, 4, 90) for setup in fine.tolist()])
    found["state_fine_angles"] = error(OpticalSimulator(4, 90)(fine), theirs)
    with tempfile.TemporaryDirectory() as folder:
        path = _text_file(Path(folder), labelled, states, 4)
        for environment, loader in ENVIRONMENTS.items():
            graphs = _their_graphs(checkout, path, loader, len(labelled))
            data = OpticalSensingDataModule(folder, environment=environment)
            read, qfi, _ = data._files()
            found[f"qfi_{environment}"] = error(qfi.double(), torch.tensor([g.y for g in graphs]))
        wrong = 0
        for setup, graph in zip(labelled, graphs, strict=True):
            x, adjacency, mask = (part[0] for part in encode(setup[None], 4, 4))
            edges = torch.zeros(len(graph.x), len(graph.x), dtype=torch.bool)
            edges[graph.edge_index[0], graph.edge_index[1]] = True
            # a blank place in the middle keeps the order of the others
            wrong += int(not torch.equal(x[mask], graph.x)) + int(not torch.equal(adjacency[mask][:, mask], edges))
        found["graphs"] = float(wrong) / len(labelled)
        found["read"] = float((read != labelled[:, : read.shape[1]]).sum())
    batch, qfi = _collate(graphs), torch.tensor([float(g.y) for g in graphs])
    net, mlp = _networks(checkout, 20, 32, 5)
    found |= _step(net, lambda: net(batch.x, batch.edge_index, batch.batch), labelled, qfi, "")
    torch.manual_seed(0)
    flat = _stirred(mlp(20, 19, 1, hidden_size=32))
    rows = encode(nn.functional.pad(labelled, (0, 0, 0, 17 - labelled.shape[1])), 4, 4)[0]
    found |= _step(flat, lambda: flat(rows, None, None), labelled, qfi, "mlp_")
    # their finer encoding has its features in another order
    wide, _ = _networks(checkout, 192, 16, 2)
    with tempfile.TemporaryDirectory() as folder:
        path = _text_file(Path(folder), fine, theirs, 4)
        with _path(checkout):
            module = importlib.import_module("utils.train_utils")
            graphs = list(module.get_loader_qfm_var_XX_quantize2(str(path))[0].dataset)
    batch, wide = _collate(graphs), wide.eval()
    found["forward_fine_angles"] = error(_ours(wide).eval()(fine), wide(batch.x, batch.edge_index, batch.batch))
    return found


def golden(checkout: Path) -> dict[str, Tensor]:
    """Setups, their states, labels, weights and outputs."""
    optics, kept = _optics(checkout), {}
    for paths, count, longest in ((4, 10, 6), (8, 1, 3)):
        devices = _setups(count, paths, longest, seed=1)
        states = torch.stack([_their_state(optics, setup, paths, 4) for setup in devices.tolist()])
        kept |= {f"devices{paths}": devices, f"state{paths}": torch.view_as_real(states).contiguous()}
        if paths == 8:
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = _text_file(Path(folder), devices, states, 4)
            for environment, loader in ENVIRONMENTS.items():
                graphs = _their_graphs(checkout, path, loader, count)
                kept[f"qfi_{environment}"] = torch.tensor([g.y for g in graphs])
        kept["node_features"] = graphs[0].x.contiguous()
        kept["edge_index"] = graphs[0].edge_index.contiguous()
        batch = _collate(graphs)
        net, mlp = _networks(checkout, 20, 8, 2)
        torch.manual_seed(0)
        flat = _stirred(mlp(20, 19, 1, hidden_size=8))
        rows = encode(nn.functional.pad(devices, (0, 0, 0, 17 - devices.shape[1])), 4, 4)[0]
        for name, theirs, inputs in (
            ("gnn", net, (batch.x, batch.edge_index, batch.batch)),
            ("mlp", flat, (rows, None, None)),
        ):
            kept |= {f"{name}.weights.{key}": value.clone() for key, value in theirs.state_dict().items()}
            kept[f"{name}.eval"] = theirs.eval()(*inputs).detach()
            kept[f"{name}.train"] = (out := theirs.train()(*inputs)).detach()
            loss = nn.functional.mse_loss(out, kept["qfi_Z"].float())
            kept[f"{name}.loss"] = loss.detach()
            loss.backward()
            first = "emb.0.weight" if name == "gnn" else "back.0.weight"
            kept[f"{name}.gradient"] = dict(theirs.named_parameters())[first].grad.clone()
    return kept


def speed(checkout: Path | None, device: str = "cpu") -> dict[str, dict]:
    """A training step and prediction at the paper's size (batch 64), and simulated setups, for 4 and 8 photons."""
    found: dict[str, dict] = {}
    for paths in (4, 8):
        devices = _setups(64, paths, 15).to(device)
        features = 16 + paths
        rows: dict[str, dict[str, Callable[[], Any]]] = {"train_step": {}, "predict": {}}
        if checkout is not None:
            theirs, _ = _networks(checkout, features, 256, 5)
            model, theirs = _ours(theirs).to(device), theirs.to(device)
        else:
            model = DeepQuantumSensing(paths=paths).to(device)
        qfi = torch.rand(64, device=device) * 16
        model.log = lambda *a, **k: None  # type: ignore[method-assign]
        own = model.configure_optimizers()

        def step(model: Any = model, own: Any = own, devices: Tensor = devices, qfi: Tensor = qfi) -> None:
            own.zero_grad()
            model.training_step({"devices": devices, "qfi": qfi}, 0).backward()
            own.step()

        rows["train_step"]["ours"] = lambda m=model, s=step: (m.train(), s())
        rows["predict"]["ours"] = lambda m=model, d=devices: m.predict(d)
        if checkout is not None:
            states = torch.zeros(64, 2**paths, dtype=torch.complex128)
            states[:, 0] = 1
            with tempfile.TemporaryDirectory() as folder:
                path = _text_file(Path(folder), devices.cpu(), states, paths)
                graphs = _their_graphs(checkout, path, ENVIRONMENTS["Z"], 64)
            batch = _collate(graphs).to(device)
            optimizer = torch.optim.Adam(theirs.parameters(), lr=1e-4, weight_decay=1e-5)

            def other(net: Any = theirs, batch: Any = batch, optimizer: Any = optimizer, qfi: Tensor = qfi) -> None:
                net.train()
                optimizer.zero_grad()
                nn.functional.mse_loss(net(batch.x.float(), batch.edge_index, batch.batch), qfi).backward()
                optimizer.step()

            @torch.no_grad()
            def infer(net: Any = theirs, batch: Any = batch) -> Any:
                return net.eval()(batch.x.float(), batch.edge_index, batch.batch)

            rows["train_step"]["authors"], rows["predict"]["authors"] = other, infer
        found |= {f"{row}_{paths}_photons": in_turns(calls, device, 15) for row, calls in rows.items()}
        simulator, many = OpticalSimulator(paths).to(device), _setups(1024, paths, 15).to(device)
        entry = in_turns({"ours": lambda s=simulator, m=many: s(m)}, device, 5)
        entry["ours_ms"] /= len(many)
        if checkout is not None:
            optics = _optics(checkout)
            # Theirs takes minutes for eight photons and many devices: a few short setups, both sides the same.
            few = _setups(4 if paths == 4 else 1, paths, 8 if paths == 4 else 3, seed=2)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            start = time.perf_counter()
            for setup in few.tolist():
                _their_state(optics, setup, paths, 4)
            entry["authors_ms"] = 1e3 * (time.perf_counter() - start) / len(few)
            entry["authors_mib"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        found[f"simulate_{paths}_photons"] = entry
    return found
