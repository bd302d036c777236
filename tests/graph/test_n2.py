"""N2: parity with recorded tensors, pathways against explicit matrices, invariances, both levels, refusals."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

import zoo
from zoo.core import ZooError, recipe
from zoo.graph.node.data_graphs import GraphClassificationDataModule, PackedGraphs
from zoo.graph.node.data_nodes import NodeClassificationDataModule
from zoo.graph.node.n2 import (
    BLOCK,
    LIMIT,
    N2,
    Communicator,
    Members,
    PathIntegral,
    PlainGNN,
    Recurrence,
    _names,
    _ours,
    row_limit,
)
from zoo.graph.node.supervised import IGNORED
from zoo.nn.graph import Adjacency

GOLDEN = Path(__file__).parent.parent / "golden" / "n2.safetensors"


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> bool:
    return float((ours.detach() - theirs).abs().max()) <= tolerance * float(theirs.abs().max().clamp(min=1e-12))


def quiet(model: Any) -> Any:
    model.log = lambda *a, **k: None  # no trainer
    return model


def tiny(**overrides: Any) -> N2:
    return quiet(N2.from_variant("tiny", **{"in_features": 5, "num_classes": 3, **overrides}))


def graphs(sizes: tuple[int, ...] = (4, 40, 1, 9), f: int = 5, seed: int = 0) -> dict[str, Tensor]:
    """Random graphs side by side, with labels for the nodes."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for n in sizes:
        pairs = torch.randint(n, (2, 2 * n), generator=generator)
        parts.append(
            (torch.randn(n, f, generator=generator), torch.unique(torch.cat((pairs, pairs.flip(0)), 1), dim=1))
        )
    batch = PackedGraphs.of(parts).batch(list(range(len(sizes))))
    batch["y"] = torch.randint(3, (len(batch["x"]),), generator=generator)
    return batch


# ---- parity with the authors' code -----------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["node", "graph"])
def test_golden(level: str) -> None:
    golden = {k.removeprefix(f"{level}."): v for k, v in load_file(GOLDEN).items() if k.startswith(f"{level}.")}
    content = {k.removeprefix("weights."): v for k, v in golden.items() if k.startswith("weights.")}
    hyperparameters, state = N2.convert_state_dict({"state_dict": content, "epoch": 3})
    assert hyperparameters == {
        "in_features": 6,
        "num_classes": 3,
        "level": level,
        "width": 12,
        "state": 6,
        "copies": 3,
        "pseudo_nodes": 5,
        "class_copies": 1,
    }
    model = quiet(N2(**hyperparameters, steps=3, dropout=0.0))
    model.load_state_dict(state)
    graph = {k: golden[k] for k in ("x", "edge_index", "y", "batch", "train_mask") if k in golden}
    assert close(model.logits(graph).log_softmax(-1), golden["log_probs"])
    loss = model.training_step(graph, 0)
    assert close(loss, golden["loss"])
    optimizer = model.configure_optimizers()["optimizer"]
    loss.backward()
    own = dict(model.named_parameters())
    theirs = {ours: key for key, ours in _names(level == "graph").items() if f"gradient.{key}" in golden}
    assert own.keys() == theirs.keys()
    weights: list[tuple[Tensor, Tensor]] = []  # of path integrals: one vector, single ones have gradients all rounding
    for name, key in theirs.items():
        expected = _ours(name, golden[f"gradient.{key}"], 3)
        if key.endswith("lambda_copies"):
            weights.append((own[name].grad, expected))
        else:
            assert close(own[name].grad, expected), name
    assert close(*(torch.cat(side) for side in zip(*weights, strict=True)))
    optimizer.step()
    for name, key in theirs.items():
        assert close(own[name], _ours(name, golden[f"stepped.{key}"], 3)), name


def test_what_cannot_be_converted() -> None:
    content = {
        k.removeprefix("node.weights."): v for k, v in load_file(GOLDEN).items() if k.startswith("node.weights.")
    }
    with pytest.raises(ZooError, match=r"missing \['class_neuron'\], unexpected nothing"):
        N2.convert_state_dict({k: v for k, v in content.items() if k != "class_neuron"})
    with pytest.raises(ZooError, match=r"unexpected \['more.weight'\]"):
        N2.convert_state_dict({**content, "more.weight": torch.zeros(1)})


# ---- pathways against explicit matrices ------------------------------------------------------------------------------


def paths(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """W of one graph, entry by entry: a (N, k, q), b (M, k, q), one copy counts as all."""
    copies, q = len(weight), a.shape[-1]
    w = torch.zeros(len(a), len(b), dtype=a.dtype)
    for i in range(len(a)):
        for j in range(len(b)):
            for k in range(copies):
                left, right = a[i, min(k, a.shape[1] - 1)], b[j, min(k, b.shape[1] - 1)]
                w[i, j] += weight[k] * (left * right).sum() / (q * copies)
    for i in range(len(a)):
        total = abs(w[i].sum().item())
        if total > 1e4:
            w[i] *= 1e4 / total
    return w


@pytest.mark.parametrize(("copies", "k"), [(3, 3), (3, 1), (1, 1)])
@pytest.mark.parametrize("scale", [1.0, 300.0])
@pytest.mark.parametrize("wide", [2, 40])
def test_path_integrals_against_loops(copies: int, k: int, scale: float, wide: int) -> None:
    torch.manual_seed(0)
    integral = PathIntegral(4, copies).double()
    nodes, pseudo = scale * torch.randn(7, 1, 4).double(), scale * torch.randn(5, k, 4).double()
    values = torch.randn(5, wide).double()
    if scale > 1:
        assert float(paths(integral.weight, pseudo, pseudo).sum(1).abs().max()) == pytest.approx(1e4)
    expected = paths(integral.weight, nodes, pseudo) @ values
    mixed = integral.mix(pseudo)
    found = row_limit(nodes[:, 0] @ mixed.sum(0)[:, None]) * (nodes[:, 0] @ (mixed.t() @ values))
    assert close(found, expected, 1e-12)
    gathered = paths(integral.weight, pseudo, nodes) @ nodes[:, 0]
    found = Recurrence._gather(mixed[None], nodes.sum(0), (nodes[:, 0].t() @ nodes[:, 0])[None], Members(None, 1))
    assert close(found[0], gathered, 1e-12)
    assert close(integral.among(pseudo[None], values[None])[0], paths(integral.weight, pseudo, pseudo) @ values, 1e-12)


def test_limit_is_a_constant_for_gradients() -> None:
    sums = torch.tensor([0.0, -2e4, 9.9e3, 4e4], requires_grad=True)
    limit = row_limit(sums)
    assert limit.tolist() == pytest.approx([1.0, 0.5, 1.0, 0.25]) and not limit.requires_grad
    assert pytest.approx(1e4) == LIMIT


def step_by_matrices(layer: Recurrence, f: Tensor, s: Tensor, p: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One step for one graph as the paper's equations have it, every pathway a matrix. p: (P, k, q)."""
    act, n = F.leaky_relu, len(f)

    def communicate(c: Communicator, p: Tensor, gathered: Tensor) -> tuple[Tensor, Tensor]:
        told = paths(c.paths.weight, p, p) @ gathered
        return act(c.displacement(told)).view(len(p), -1, s.shape[1]), act(c.value(told))

    moved, insight = communicate(layer.communicator, p, paths(layer.collect.weight, p, s[:, None]) @ f / n)
    p = layer.pseudo_norm(p + moved)
    i = paths(layer.inspect.weight, s[:, None], p) @ insight
    u = a @ torch.cat((f, i, s), 1)
    h = layer.local_norm(s + act(layer.local(u)))
    gathered = torch.cat((paths(layer.collect_again.weight, p, h[:, None]) @ u / n, insight), 1)
    moved, value = communicate(layer.communicator_again, p, gathered)
    p = layer.pseudo_norm_again(p + moved)
    d = paths(layer.dispatch.weight, h[:, None], p) @ value
    return layer.feature_norm(f + act(layer.feature(d))), layer.state_norm(h + d), p


def dense(edge_index: Tensor, n: int) -> Tensor:
    """D^-1/2 (A + I) D^-1/2, entry by entry; row = target."""
    a = torch.eye(n, dtype=torch.float64)
    for source, target in edge_index.T.tolist():
        if source != target:
            a[target, source] += 1
    degree = a.sum(1)
    return a / (degree[:, None] * degree[None, :]).sqrt()


@pytest.mark.parametrize("directed", [False, True])
def test_recurrence_against_the_equations(directed: bool) -> None:
    torch.manual_seed(1)
    layer = Recurrence(6, 4, 3, True, 0.0).double()
    edges = torch.tensor([[0, 0, 1, 2, 5], [1, 2, 3, 4, 6]])
    edges = edges if directed else torch.cat((edges, edges.flip(0)), 1)
    f, s, p = torch.randn(8, 6).double(), torch.randn(8, 4).double(), torch.randn(5, 1, 4).double()
    ours, theirs = (f, s, p[None]), (f, s, p)
    adjacency, members = Adjacency(edges, 8, torch.float64), Members(None, 8)
    for _ in range(3):  # one copy first, then three
        ours = layer(*ours, adjacency, members)
        theirs = step_by_matrices(layer, *theirs, dense(edges, 8))
        assert all(close(a.squeeze(0), b, 1e-10) for a, b in zip(ours, theirs, strict=True))


@given(st.lists(st.integers(1, 2 * BLOCK + 3), min_size=1, max_size=6), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_members_against_loops(sizes: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    n = sum(sizes)
    batch = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    members = Members(batch, n)
    a, b, m = torch.randn(n, 3).double(), torch.randn(n, 2).double(), torch.randn(len(sizes), 3, 4).double()
    own = [(batch == g).nonzero().flatten() for g in range(len(sizes))]
    assert torch.allclose(members.outer(a, b), torch.stack([a[i].T @ b[i] for i in own]))
    assert torch.allclose(members.apply(a, m), torch.cat([a[i] @ m[g] for g, i in enumerate(own)]))
    assert torch.allclose(members.sum(a), torch.stack([a[i].sum(0) for i in own]))


# ---- invariances -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["node", "graph"])
@pytest.mark.parametrize("pseudo_nodes", [0, 8])
def test_graphs_of_a_batch_do_not_see_each_other(level: str, pseudo_nodes: int) -> None:
    torch.manual_seed(0)
    model = tiny(level=level, pseudo_nodes=pseudo_nodes).eval()
    batch = graphs()
    together = model(batch["x"], batch["edge_index"], batch["batch"])
    for g in range(4):
        nodes = (batch["batch"] == g).nonzero().flatten()
        edges = batch["edge_index"][:, batch["batch"][batch["edge_index"][0]] == g] - nodes[0]
        alone = model(batch["x"][nodes], edges)
        assert close(together[nodes] if level == "node" else together[g : g + 1], alone, 1e-5)


@pytest.mark.parametrize("level", ["node", "graph"])
def test_order_of_nodes_and_edges_does_not_matter(level: str) -> None:
    torch.manual_seed(0)
    model, batch = tiny(level=level).eval(), graphs((30,))
    order = torch.randperm(30)
    place = order.argsort()
    edges = place[batch["edge_index"]][:, torch.randperm(batch["edge_index"].shape[1])]
    found, expected = model(batch["x"][order], edges), model(batch["x"], batch["edge_index"])
    assert close(found, expected[order] if level == "node" else expected, 1e-5)


def test_pseudo_nodes_join_what_no_edge_joins() -> None:
    torch.manual_seed(0)
    x, none = torch.randn(6, 5), torch.zeros(2, 0, dtype=torch.int64)
    changed = torch.cat((x[:5], x[5:] + 1))
    for pseudo_nodes, moves in ((8, True), (0, False)):
        model = tiny(pseudo_nodes=pseudo_nodes).eval()
        difference = (model(changed, none) - model(x, none)).abs().amax(1)
        assert bool((difference[:5] > 1e-6).all()) == moves and float(difference[5]) > 1e-6


def test_messages_follow_the_direction_of_edges() -> None:
    torch.manual_seed(0)
    x, edge = torch.randn(2, 5), torch.tensor([[0], [1]])
    changed = x + torch.tensor([[1.0], [0.0]])  # only the source
    for theirs, moved in ((False, 1), (True, 0)):
        model = tiny(pseudo_nodes=0, authors_direction=theirs).eval()
        difference = (model(changed, edge) - model(x, edge)).abs().amax(1)
        assert (float(difference[1]) > 1e-6) == (moved == 1)


def test_edge_features_are_summed_at_their_sources() -> None:
    edges, attributes = torch.tensor([[0, 0, 1, 2], [1, 2, 2, 2]]), torch.tensor([[1.0], [2.0], [4.0], [8.0]])
    x = torch.zeros(4, 5)
    for theirs, expected in ((False, [3, 4, 8, 0]), (True, [4, 5, 8, 1])):  # 2 has a loop of its own
        model = tiny(edge_features=1, authors_edge_sum=theirs)
        inputs, _, _ = model.prepare(x, edges, None, attributes)
        inputs = inputs if isinstance(inputs, Tensor) else inputs.dense()
        assert inputs[:, 5].tolist() == expected


def test_double_precision_agrees_with_single() -> None:
    torch.manual_seed(0)
    model, batch = tiny().eval(), graphs()
    single = model(batch["x"], batch["edge_index"], batch["batch"])
    double = model.double()(batch["x"].double(), batch["edge_index"], batch["batch"])
    assert double.dtype == torch.float64 and close(single.double(), double, 1e-4)


# ---- targets, losses, schedule ---------------------------------------------------------------------------------------


def test_targets_and_losses_by_hand() -> None:
    model = tiny()
    batch = {"y": torch.tensor([0, 2, -1, 1]), "train_mask": torch.tensor([True, False, True, True])}
    assert model.targets(batch, "train").tolist() == [0, IGNORED, IGNORED, 1]
    assert model.targets(batch, "test").tolist() == [0, 2, IGNORED, 1]  # no mask: all
    logits = torch.zeros(4, 3)
    assert float(model.loss(logits, model.targets(batch, "train"))) == pytest.approx(float(torch.tensor(3.0).log()))
    labels = tiny(targets="labels", level="graph")
    y = torch.tensor([[1.0, torch.nan, 0.0], [0.0, 1.0, torch.nan]])
    assert labels.targets({"y": y}, "train").tolist() == [[1, IGNORED, 0], [0, 1, IGNORED]]
    logits = torch.tensor([[2.0, 9.0, -1.0], [0.0, 0.5, 9.0]])
    terms = [F.softplus(torch.tensor(v)) for v in (-2.0, -1.0, 0.0, -0.5)]
    assert float(labels.loss(logits, labels.targets({"y": y}, "train"))) == pytest.approx(float(sum(terms)) / 4)
    with pytest.raises(KeyError, match="no 'y'"):
        model.targets({}, "train")


def test_schedule() -> None:
    model = tiny(lr=0.1, warmup=4, lr_decay=0.1)
    made = model.configure_optimizers()
    rates = []
    for _ in range(9):
        rates.append(made["optimizer"].param_groups[0]["lr"])
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.01, 0.001, 1e-4, 1e-4, 1e-4])
    assert made["lr_scheduler"]["interval"] == "step"
    constant = tiny(lr=0.1).configure_optimizers()
    assert constant["optimizer"].param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("level", ["node", "graph"])
@pytest.mark.parametrize("targets", ["class", "labels"])
def test_trains_and_logs(level: str, targets: str, tmp_path: Path) -> None:
    data = GraphClassificationDataModule(target=level, batch_size=100)
    data.setup()
    if targets == "labels":
        y = F.one_hot(data.dataset("train").y).float()
        y[0, 0] = torch.nan
        for split in ("train", "val", "test"):
            data.dataset(split).y = y
    model = recipe.build(N2, data, {"variant": "tiny", "targets": targets})
    assert model.hparams.level == level and model.hparams.in_features == data.describe()["in_features"]
    quietly = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = zoo.Trainer(default_root_dir=tmp_path, max_epochs=1, **quietly)
    trainer.fit(model, datamodule=data)
    (found,) = trainer.test(model, datamodule=data, verbose=False)
    expected = {"loss", "auroc", "ap"} if targets == "labels" else {"loss", "accuracy"}
    if targets == "class" and level == "graph":
        expected |= {"auroc"}  # two classes
    assert {k.removeprefix("test/") for k in found} == expected and all(0 <= v < 5 for v in found.values())
    out = trainer.predict(model, datamodule=data)[0]
    rows = len(out["name"])
    assert out["probability"].shape == (rows, model.hparams.num_classes)
    assert out["class"].shape == ((rows,) if targets == "class" else (rows, model.hparams.num_classes))


def test_auroc_is_the_area() -> None:
    model = tiny(num_classes=2)
    logged: dict[str, Any] = {}
    model.log = lambda name, value, **k: logged.update({name: value})
    logits = torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 3.0], [0.0, 0.0], [0.0, 9.0]])
    model.logits = lambda batch: logits
    model.test_step({"y": torch.tensor([0, 1, 1, 1, -1])}, 0)
    assert float(logged["test/auroc"].compute()) == pytest.approx(2 / 3)  # pairs 1>0, 2>0 right, 0>1 wrong
    assert float(logged["test/accuracy"]) == pytest.approx(0.5)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"level": "edge"}, "level is 'edge'; it must be one of node, graph"),
        ({"targets": "value"}, "targets is 'value'"),
        ({"steps": 0}, "steps is 0"),
        ({"pseudo_nodes": -1}, "pseudo_nodes is -1"),
        ({"class_copies": 3}, r"class_copies is 3; it must be 1 or copies \(2\)"),
        ({"num_classes": 0}, "num_classes is 0"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        tiny(**arguments)


def test_wrong_inputs() -> None:
    model, batch = tiny(), graphs()
    x, edges, graph = batch["x"], batch["edge_index"], batch["batch"]
    with pytest.raises(ValueError, match=r"expected \(nodes >= 1, 5\)"):
        model(x[:, :4], edges)
    with pytest.raises(ValueError, match=r"'x' has shape \(0, 5\)"):
        model(x[:0], edges[:, :0])
    with pytest.raises(ValueError, match="names node 99"):
        model(x, torch.tensor([[0], [99]]))
    with pytest.raises(ValueError, match="in the order of their graphs"):
        model(x, edges, graph.flip(0))
    with pytest.raises(ValueError, match="none empty"):
        model(x, edges, graph * 2)
    with pytest.raises(ValueError, match=r"'batch' has shape \(3,\)"):
        model(x, edges, graph[:3])
    with pytest.raises(ValueError, match="'edge_attr' is of shape .*; expected none"):
        model(x, edges, graph, torch.zeros(edges.shape[1], 1))
    with pytest.raises(ValueError, match="'edge_attr' is missing"):
        tiny(edge_features=2)(x, edges, graph)
    x[3, 2] = torch.nan
    with pytest.raises(ValueError, match="'x' holds 1 values"):
        model.predict(x, edges, graph)


# ---- baselines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gcn", "gat", "sage", "gin", "mlp"])
@pytest.mark.parametrize("level", ["node", "graph"])
def test_baselines(kind: str, level: str) -> None:
    torch.manual_seed(0)
    model = quiet(PlainGNN(5, 3, kind, level, hidden=8, layers=3, norm=True).eval())
    batch = graphs()
    together = model(batch["x"], batch["edge_index"], batch["batch"])
    assert together.shape == ((54, 3) if level == "node" else (4, 3))
    nodes = slice(4, 44)
    edges = batch["edge_index"][:, (batch["edge_index"] >= 4).all(0) & (batch["edge_index"] < 44).all(0)]
    alone = model(batch["x"][nodes], edges - 4)
    assert close(together[nodes] if level == "node" else together[1:2], alone, 1e-5)
    if level == "node":
        model.train().training_step(batch, 0).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        changed = model.eval()(batch["x"] + (torch.arange(54) == 53)[:, None], batch["edge_index"], batch["batch"])
        moved = (changed - together).abs().amax(1) > 1e-7
        assert bool(moved[53]) and bool(moved[45:53].any()) == (kind != "mlp") and not moved[:44].any()


def test_plain_gcn_against_dense_matrices() -> None:
    torch.manual_seed(0)
    model, batch = PlainGNN(5, 3, hidden=4).double().eval(), graphs((12,))
    a, x = dense(batch["edge_index"], 12), batch["x"].double()
    (conv,), last = model.convs, model.last
    expected = a @ (a @ x @ conv.weight.T + conv.bias).relu() @ last.weight.T + last.bias
    assert close(model(x, batch["edge_index"]), expected, 1e-12)
    with pytest.raises(ValueError, match="kind is 'cheb'"):
        PlainGNN(kind="cheb")


# ---- real data -------------------------------------------------------------------------------------------------------


def real(name: str) -> str:
    root = Path(os.environ.get("ZOO_DATA", "")) / name
    if not os.environ.get("ZOO_DATA") or not root.is_dir():
        pytest.skip(f"needs $ZOO_DATA/{name}")
    return str(root)


def test_minesweeper() -> None:
    data = NodeClassificationDataModule(root=real("minesweeper"))
    graph = data.dataset("train")[0]
    assert graph["x"].shape == (10000, 7) and graph["edge_index"].shape == (2, 78804)
    assert [int(graph[f"{s}_mask"].sum()) for s in ("train", "val", "test")] == [5000, 2500, 2500]
    model = recipe.build(N2, data, {"variant": "tiny"})
    assert quiet(model).training_step(graph, 0).isfinite()


def test_proteins() -> None:
    data = GraphClassificationDataModule(root=real("proteins"), seed=0)
    data.setup()
    assert data.describe() == {"in_features": 3, "num_classes": 2, "edge_features": 0, "level": "graph"}
    assert [len(data.dataset(s)) for s in ("train", "val", "test")] == [902, 100, 111]
    model = recipe.build(N2, data, {"variant": "tiny"})
    assert quiet(model).training_step(next(iter(data.train_dataloader())), 0).isfinite()
