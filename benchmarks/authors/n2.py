"""N2 beside the authors' code (sunjss/N2): their networks run as they are, at both levels."""

import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.measure import error, float64, in_turns
from zoo.graph.node.n2 import N2, _names, _ours

SIZES = {"d_model": 24, "q_dim": 8, "n_q": 4, "n_pnode": 12, "T": 3}
PAPER = {"d_model": 128, "q_dim": 64, "n_q": 8, "n_c": 1, "n_pnode": 256, "T": 4, "dropout": 0.4}
PATHS = ("collect", "inspect", "collect_again", "dispatch", "output")


@contextlib.contextmanager
def _package(checkout: Path) -> Iterator[Any]:
    """Their module ``model.modules``, importable and gone afterwards; what it prints is dropped."""
    before = set(sys.modules)
    sys.path.insert(0, str(checkout))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            import model.modules as modules

            yield modules
    finally:
        sys.path.remove(str(checkout))
        for name in set(sys.modules) - before:
            if name.split(".")[0] == "model":
                del sys.modules[name]


def _graph(n: int = 30, f: int = 10, classes: int = 3, edges: int = 60, seed: int = 1) -> dict[str, Any]:
    """A random graph: both directions of every edge, an isolated node at the end."""
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.randint(n - 1, (2, edges), generator=generator)
    pairs = torch.unique(torch.cat((pairs, pairs.flip(0)), 1)[:, torch.cat((pairs[0] != pairs[1],) * 2)], dim=1)
    x = torch.randn(n, f, generator=generator)
    y = torch.randint(classes, (n,), generator=generator)
    return {"x": x, "edge_index": pairs, "y": y, "train_mask": torch.arange(n) % 2 == 0}


def _several(graphs: list[dict[str, Any]], classes: int = 3) -> dict[str, Any]:
    """Graphs side by side, a label each."""
    first, parts = 0, []
    for g in graphs:
        parts.append(g["edge_index"] + first)
        first += len(g["x"])
    y = torch.randint(classes, (len(graphs),), generator=torch.Generator().manual_seed(4))
    batch = torch.repeat_interleave(torch.arange(len(graphs)), torch.tensor([len(g["x"]) for g in graphs]))
    return {"x": torch.cat([g["x"] for g in graphs]), "edge_index": torch.cat(parts, 1), "batch": batch, "y": y}


def _data(graph: dict[str, Any]) -> Any:
    """What their networks take: torch_geometric's Data, or Batch where there are several graphs."""
    from torch_geometric.data import Batch, Data

    if "batch" not in graph:
        return Data(x=graph["x"], edge_index=graph["edge_index"], edge_attr=graph.get("edge_attr"))
    parts, batch = [], graph["batch"]
    for g in range(int(batch[-1]) + 1):
        nodes = (batch == g).nonzero().flatten()
        edges = batch[graph["edge_index"][0]] == g
        attributes = graph["edge_attr"][edges] if "edge_attr" in graph else None
        parts.append(
            Data(x=graph["x"][nodes], edge_index=graph["edge_index"][:, edges] - nodes[0], edge_attr=attributes)
        )
    return Batch.from_data_list(parts)


def _method(theirs: nn.Module, **arguments: Any) -> N2:
    """Ours with their weights, through `convert_state_dict`, dropout off on both sides."""
    hyperparameters, state = N2.convert_state_dict(theirs.state_dict())
    edges = arguments.get("edge_features", 0)
    hyperparameters["in_features"] -= edges
    model = N2(**{**hyperparameters, "steps": theirs.T, "dropout": 0.0, **arguments})
    model.load_state_dict(state)
    model.log = lambda *a, **k: None  # type: ignore[method-assign]
    for part in theirs.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return model


def _loss(output: Tensor, graph: dict[str, Any], task: str) -> Tensor:
    """The losses of their script, on their networks' outputs."""
    y = graph["y"]
    if task == "single-class":
        mask = graph.get("train_mask", torch.ones(len(y), dtype=torch.bool))
        return F.nll_loss(output[mask], y[mask])
    known = y == y
    return F.binary_cross_entropy_with_logits(output[known], y[known].float())


def _run(theirs: nn.Module, ours: N2, graph: dict[str, Any], task: str = "single-class") -> dict[str, float]:
    """Output, loss, gradients and the weights after one step of Adam."""
    data = _data(graph)
    output = theirs(data)
    logits = ours.logits(graph)
    found = {"forward": error(logits.log_softmax(-1) if task == "single-class" else logits, output)}
    losses = {"theirs": _loss(output, graph, task), "ours": ours.training_step(graph, 0)}
    found["loss"] = error(losses["ours"], losses["theirs"])
    optimizers = [torch.optim.Adam(theirs.parameters(), lr=1e-3, weight_decay=1e-6)]
    optimizers.append(ours.configure_optimizers()["optimizer"])
    for loss in losses.values():
        loss.backward()
    names = _names(ours.hparams.level == "graph")
    own, copies = dict(ours.named_parameters()), ours.hparams.copies
    used = {names[k]: p for k, p in theirs.named_parameters() if k in names}
    pairs = {k: (own[k].grad, _ours(k, p.grad, copies)) for k, p in used.items()}
    # The few weights of all path integrals are one vector: single ones have gradients that are all rounding.
    weights = [k for k in pairs if k.endswith((".paths.weight", *(f"{kind}.weight" for kind in PATHS)))]
    both = [torch.cat(side) for side in zip(*(pairs.pop(k) for k in weights), strict=True)]
    found["gradients"] = max(error(a, b) for a, b in (*pairs.values(), both))
    for optimizer in optimizers:
        optimizer.step()
    found["step"] = max(error(own[k], _ours(k, p, copies)) for k, p in used.items())
    return found


def compare(checkout: Path) -> dict[str, float]:
    """Largest relative errors in float32, dropout off."""
    found: dict[str, float] = {}

    def note(label: str, figures: dict[str, float]) -> None:
        found.update({f"{label}_{key}": value for key, value in figures.items()})

    with _package(checkout) as modules:
        # Node level: one graph; several at once; with a single copy; with features of edges.
        torch.manual_seed(0)
        graph = _graph()
        theirs = modules.N2Node(d_in=10, nclass=3, n_c=1, dropout=0.4, **SIZES)
        note("node", _run(theirs, _method(theirs), graph))

        torch.manual_seed(1)
        several = _several([_graph(n, seed=s) for s, n in enumerate((5, 41, 33))])
        several["y"] = torch.randint(3, (79,), generator=torch.Generator().manual_seed(2))
        theirs = modules.N2Node(d_in=10, nclass=3, n_c=1, dropout=0.4, **SIZES)
        note("nodes_of_graphs", _run(theirs, _method(theirs), several))

        torch.manual_seed(2)
        theirs = modules.N2Node(d_in=10, nclass=3, n_c=1, dropout=0.4, **{**SIZES, "n_q": 1})
        note("one_copy", _run(theirs, _method(theirs), graph))

        torch.manual_seed(3)
        looped = {**graph, "edge_index": torch.cat((graph["edge_index"], torch.tensor([[4], [4]])), 1)}
        looped["edge_attr"] = torch.randn(looped["edge_index"].shape[1], 2)
        theirs = modules.N2Node(d_in=10, d_ein=2, nclass=3, n_c=1, dropout=0.4, **SIZES)
        note("edge_features", _run(theirs, _method(theirs, edge_features=2, authors_edge_sum=True), looped))

        torch.manual_seed(4)
        directed = {**graph, "edge_index": torch.randint(30, (2, 70))}
        directed["edge_index"][0, 0] = 29  # they count nodes by the largest number
        theirs = modules.N2Node(d_in=10, nclass=3, n_c=1, dropout=0.4, **SIZES)
        note("directed", _run(theirs, _method(theirs, authors_direction=True), directed))

        # Graph level: classes; labels with unknown ones and a class state a copy (ogbg-molpcba).
        torch.manual_seed(6)
        graphs = _several([_graph(n, seed=s) for s, n in enumerate((5, 70, 33, 12))])
        theirs = modules.N2Graph(d_in=10, nclass=3, n_c=1, dropout=0.4, **SIZES)
        note("graph", _run(theirs, _method(theirs), graphs))

        torch.manual_seed(7)
        labels = {**graphs, "y": (torch.rand(4, 5) < 0.5).float()}
        labels["y"][1, 2] = labels["y"][3, 0] = torch.nan
        labels["edge_attr"] = torch.randn(labels["edge_index"].shape[1], 3)
        theirs = modules.N2Graph(d_in=10, d_ein=3, nclass=5, n_c=4, dropout=0.4, task_type="multi-class", **SIZES)
        ours = _method(theirs, edge_features=3, authors_edge_sum=True, targets="labels")
        note("labels", _run(theirs, ours, labels, "multi-class"))

        # The paper's size. Adam's first step is nearly the sign of a gradient, and many are all rounding here: float64.
        torch.manual_seed(8)
        theirs, large = modules.N2Node(**{**PAPER, "d_in": 745, "nclass": 8}), _graph(400, 745, 8, 2000)
        assert sum(p.numel() for p in theirs.parameters()) == 548280
        note("paper", {key: value for key, value in _run(theirs, _method(theirs), large).items() if key != "step"})
        with float64():
            torch.manual_seed(8)
            theirs, large = modules.N2Node(**{**PAPER, "d_in": 745, "nclass": 8}), _graph(400, 745, 8, 2000)
            found["paper_float64_step"] = _run(theirs, _method(theirs), large)["step"]
            # One kind of pathway after the other reaches the limit of its rows, sums in which large terms cancel.
            small, clipped = _graph(), []
            for kind in [name for name, _ in theirs.named_parameters() if name.endswith("lambda_copies")]:
                torch.manual_seed(5)
                theirs = modules.N2Node(d_in=10, nclass=3, n_c=1, dropout=0.4, **SIZES)
                with torch.no_grad():
                    theirs.get_parameter(kind).mul_(1e6)
                clipped.append(error(_method(theirs).logits(small).log_softmax(-1), theirs(_data(small))))
            found["clipped_float64_forward"] = max(clipped)
    return found


def golden(checkout: Path) -> dict[str, Tensor]:
    """Tiny graphs, their weights, and what their code makes of both at the two levels."""
    tensors: dict[str, Tensor] = {}
    sizes = {"d_model": 12, "q_dim": 6, "n_q": 3, "n_pnode": 5, "T": 3}
    with _package(checkout) as modules:
        for label in ("node", "graph"):
            torch.manual_seed(0)
            if label == "node":
                graph = _graph(20, 6)
                theirs = modules.N2Node(d_in=6, nclass=3, n_c=1, dropout=0.0, **sizes)
            else:
                graph = _several([_graph(n, 6, seed=s) for s, n in enumerate((4, 40, 9))])
                theirs = modules.N2Graph(d_in=6, nclass=3, n_c=1, dropout=0.0, **sizes)
            found = {f"weights.{k}": v.clone() for k, v in theirs.state_dict().items()}
            optimizer = torch.optim.Adam(theirs.parameters(), lr=1e-3, weight_decay=1e-6)
            output = theirs(_data(graph))
            loss = _loss(output, graph, "single-class")
            loss.backward()
            found |= {f"gradient.{k}": p.grad.clone() for k, p in theirs.named_parameters() if p.grad is not None}
            optimizer.step()
            found |= {f"stepped.{k}": p.detach().clone() for k, p in theirs.named_parameters() if p.grad is not None}
            found |= {**graph, "log_probs": output, "loss": loss}
            tensors |= {f"{label}.{k}": v.detach().contiguous() for k, v in found.items()}
    return tensors


# ---- speed -----------------------------------------------------------------------------------------------------------


def _sides(checkout: Path | None, graph: dict[str, Any], level: str, device: str) -> dict[str, Callable[[], Any]]:
    """One update on each side, at the paper's size; theirs without its anomaly detection, which is for debugging."""
    f, classes = graph["x"].shape[1], int(graph["y"].max()) + 1
    ours = N2(in_features=f, num_classes=classes, level=level).to(device)
    ours.log = lambda *a, **k: None  # type: ignore[method-assign]
    optimizer = ours.configure_optimizers()["optimizer"]
    moved = {k: v.to(device) for k, v in graph.items()}

    def own() -> None:
        optimizer.zero_grad()
        ours.training_step(moved, 0).backward()
        optimizer.step()

    sides: dict[str, Callable[[], Any]] = {"ours": own}
    if checkout is None:
        return sides
    with _package(checkout) as modules:
        network = modules.N2Node if level == "node" else modules.N2Graph
        theirs = network(d_in=f, nclass=classes, d_model=128, q_dim=64, n_q=8, n_c=1, n_pnode=256, T=4, dropout=0.4).to(
            device
        )
    data, own_optimizer = _data(graph).to(device), torch.optim.Adam(theirs.parameters(), lr=1e-3, weight_decay=1e-6)

    def authors() -> None:
        own_optimizer.zero_grad()
        _loss(theirs(data), moved, "single-class").backward()
        own_optimizer.step()

    return {**sides, "authors": authors}


def speed(checkout: Path | None, device: str = "cpu") -> dict[str, dict[str, float]]:
    """A training step at the paper's size, in turns, medians: on a graph of AmazonPhoto's size (7,650 nodes), and on a
    batch of 16 graphs whose sizes spread like those of PROTEINS (12 to 400 nodes). Beside them a forward pass of ours
    over graphs of growing size and equal degree, which is linear in the nodes.
    """
    torch.manual_seed(0)
    found = {}
    several = _several([_graph(n, 3, 2, 2 * n, seed=n) for n in (400, 120, *range(12, 68, 4))], 2)
    for label, graph, level in (("node_step", _graph(7650, 745, 8, 119000), "node"), ("graph_step", several, "graph")):
        found[label] = in_turns(_sides(checkout, graph, level, device), device)
    model = N2(in_features=32, num_classes=4).to(device).eval()
    for n in (1000, 2000, 4000, 8000, 16000):
        graph = {key: value.to(device) for key, value in _graph(n, 32, 4, 5 * n).items()}

        @torch.no_grad()
        def forward(graph: dict[str, Any] = graph) -> None:
            model(graph["x"], graph["edge_index"])

        found[f"forward_{n}_nodes"] = in_turns({"ours": forward}, device)
    return found
