"""LAGNN: parity with recorded tensors, equations against loops, the two stages, limits, refusals."""

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

import zoo
from zoo.core import ZooError
from zoo.graph.node import lagnn
from zoo.graph.node.data_nodes import NodeClassificationDataModule
from zoo.graph.node.lagnn import (
    LAGNN,
    Generator,
    Judge,
    augmentation_loss,
    disagreement,
    generator_loss,
    read_authors_generator,
)
from zoo.nn.graph import Adjacency, Remember, SparseRows, dropout, row_normalise

GOLDEN = Path(__file__).parent.parent / "golden" / "lagnn.safetensors"


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> bool:
    ours = ours.detach()
    return float((ours - theirs).abs().max()) <= tolerance * float(theirs.abs().max().clamp(min=1e-12))


@pytest.fixture(scope="module")
def graph() -> dict[str, Any]:
    return NodeClassificationDataModule(seed=0).dataset("train")[0]


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN)


def tiny(**overrides: Any) -> LAGNN:
    model = LAGNN.from_variant("tiny", **overrides)
    model.log = lambda *a, **k: None  # no trainer
    return model


def dense_adjacency(edge_index: Tensor, n: int) -> Tensor:
    """D^-1/2 (A + I) D^-1/2, entry by entry."""
    a = torch.eye(n, dtype=torch.float64)
    for source, target in edge_index.T.tolist():
        if source != target:
            a[target, source] += 1
    degree = a.sum(1)
    return a / (degree[:, None] * degree[None, :]).sqrt()


# ---- parity with the authors' code -----------------------------------------------------------------------------------


@pytest.fixture
def converted(golden: dict[str, Tensor]) -> LAGNN:
    content = {k.removeprefix("weights."): v for k, v in golden.items() if k.startswith("weights.")}
    hyperparameters, state = LAGNN.convert_state_dict(content)
    assert {k: hyperparameters[k] for k in ("in_features", "hidden", "num_classes", "concat")} == {
        "in_features": 12,
        "hidden": 8,
        "num_classes": 3,
        "concat": 1,
    }
    model = LAGNN(**hyperparameters).eval()
    model.load_state_dict(state)
    return model


def test_golden_inputs(golden: dict[str, Tensor], converted: LAGNN) -> None:
    x, edge_index = golden["x"], golden["edge_index"]
    assert close(Adjacency(edge_index, 20) @ torch.eye(20), golden["adjacency"])
    assert close(row_normalise(x), golden["own"])
    condition = converted.generator.condition(x)
    for z, expected in zip(golden["z"], golden["augmented"], strict=True):
        assert close(row_normalise(converted.generator.decode(z[0], condition)), expected)


def test_golden_generator(golden: dict[str, Tensor], converted: LAGNN) -> None:
    x, (target, source) = golden["x"], golden["edge_index"]
    generator = converted.generator
    _, mean, log_variance = generator(x[target], x[source])
    output = generator.decode(golden["posterior"], generator.condition(x[source]))
    assert close(mean, golden["mean"]) and close(log_variance, golden["log_variance"])
    assert close(output, golden["reconstruction"])
    loss = generator_loss(output, x[target], mean, log_variance, "bernoulli")
    assert close(loss, golden["generator_loss"])


def test_golden_training_step(golden: dict[str, Tensor], converted: LAGNN) -> None:
    outputs = [converted(golden["x"], golden["edge_index"], sample[None]) for sample in golden["augmented"]]
    log_probs = torch.stack(outputs).log_softmax(-1)
    assert close(log_probs, golden["log_probs"])
    loss = sum(augmentation_loss(log_probs, golden["y"], golden["mask"]))
    assert close(loss, golden["loss"])
    optimizer = converted.configure_optimizers()
    loss.backward()
    names = {"net.branches.0": "gcn1_list.0", "net.branches.1": "gcn1_list.1", "net.classifier": "gc2"}
    trained = {k: p for k, p in converted.named_parameters() if p.requires_grad}
    theirs = {k: f"{names[k.rpartition('.')[0]]}.{k.rpartition('.')[2]}" for k in trained}
    assert all(close(p.grad, golden[f"gradient.{theirs[k]}"]) for k, p in trained.items())
    optimizer.step()
    assert all(close(p, golden[f"stepped.{theirs[k]}"]) for k, p in trained.items())


def test_what_cannot_be_converted() -> None:
    generator = {k: v for k, v in load_file(GOLDEN).items() if k.startswith(("weights.encoder", "weights.decoder"))}
    content = {k.removeprefix("weights."): v for k, v in generator.items()}
    with pytest.raises(ZooError, match=r"a generator alone.*load_generator"):
        LAGNN.convert_state_dict(content)
    model = LAGNN(in_features=12, generator_hidden=16, latent=5)
    assert not model.generator_fitted
    model.load_generator(content)
    assert model.generator_fitted and torch.equal(model.generator.mean.bias, content["encoder.linear_means.bias"])
    with pytest.raises(ZooError, match=r"generator.*of another shape"):
        LAGNN(in_features=13, generator_hidden=16, latent=5).load_generator(content)
    with pytest.raises(ZooError, match=r"unexpected \['decoder.MLP.L7.bias'\]"):
        model.load_generator({**content, "decoder.MLP.L7.bias": torch.zeros(1)})
    with pytest.raises(ZooError, match="augment is not 'generator'"):
        LAGNN(augment="none").load_generator(content)


class Sprung:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickled_generators_run_nothing(tmp_path: Path) -> None:
    trace = tmp_path / "sprung"
    torch.save(Sprung(trace), tmp_path / "bad.pkl")
    (tmp_path / "worse.pkl").write_bytes(pickle.dumps(Sprung(trace)))
    for name in ("bad.pkl", "worse.pkl"):
        with pytest.raises(ZooError, match="no pickled generator of the authors"):
            read_authors_generator(tmp_path / name)
    assert not trace.exists()
    with pytest.raises(FileNotFoundError, match=r"none\.pkl is missing"):
        read_authors_generator(tmp_path / "none.pkl")


# ---- layers ----------------------------------------------------------------------------------------------------------


def test_adjacency_against_loops() -> None:
    # node 4 is alone, 2 has a loop (which does not count), 0-1 comes twice (and counts twice)
    edge_index = torch.tensor([[0, 1, 0, 1, 1, 3, 2], [1, 0, 1, 0, 3, 1, 2]])
    expected = dense_adjacency(edge_index, 5)
    x = torch.rand(5, 3, dtype=torch.float64)
    assert torch.allclose(Adjacency(edge_index, 5, torch.float64) @ x, expected @ x, atol=1e-12)
    assert (Adjacency(edge_index, 5, torch.float64) @ x)[4].tolist() == x[4].tolist()


def test_unknown_node_is_named() -> None:
    with pytest.raises(ValueError, match="names node 9; nodes are 0 to 4"):
        Adjacency(torch.tensor([[0], [9]]), 5)


@pytest.mark.parametrize("hops", [1, 2])
def test_part_of_the_graph_decides_the_targets(graph: dict[str, Any], hops: int) -> None:
    adjacency, x = Adjacency(graph["edge_index"], 600), graph["x"]
    targets = graph["train_mask"].nonzero().flatten()
    part, nodes, place = adjacency.within(targets, hops)
    assert torch.equal(nodes[place], targets) and len(nodes) < 600
    whole, small = x, x[nodes]
    for _ in range(hops):
        whole, small = adjacency @ whole, part @ small
    assert torch.allclose(whole[targets], small[place], atol=1e-6)


def test_row_normalise_keeps_zero_rows() -> None:
    x = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    assert row_normalise(x).tolist() == [[0.25, 0.75], [0.0, 0.0]]


def test_sparse_rows_equal_dense() -> None:
    x = (torch.rand(30, 50) < 0.05).double() * torch.rand(30, 50).double()
    x[:3] = 0
    x[-1] = 0
    weight = torch.rand(50, 4, dtype=torch.float64, requires_grad=True)
    rows = SparseRows(x)
    assert torch.equal(rows.dense(), x) and torch.allclose(rows.linear(weight), x @ weight)
    (ours,) = torch.autograd.grad(rows.linear(weight).square().sum(), weight)
    (dense,) = torch.autograd.grad((x @ weight).square().sum(), weight)
    assert torch.allclose(ours, dense)
    dropped = rows.drop(0.5, True).dense()
    assert torch.all((dropped == 0) | torch.isclose(dropped, 2 * x))
    assert rows.drop(0.5, False) is rows


@pytest.mark.parametrize("p", [0.1, 0.5, 0.6, 0.9])
def test_dropout(p: float) -> None:
    torch.manual_seed(0)
    y = dropout(torch.ones(500, 401), p, True)
    kept = y != 0
    assert kept.float().mean() == pytest.approx(1 - p, abs=0.005)
    assert y[kept].unique().tolist() == [pytest.approx(1 / (1 - p), rel=1e-3)]
    columns = kept.float().mean(0)  # four entries share a draw: no column may stand out
    assert float((columns - (1 - p)).abs().max()) < 5 * math.sqrt(p * (1 - p) / 500)
    assert abs(float(torch.corrcoef(kept.float().T[:4])[0, 1])) < 0.2
    x = torch.rand(3)
    assert dropout(x, p, False) is x and dropout(x, 0.0, True) is x


def test_remember() -> None:
    calls: list[int] = []
    remember = Remember()
    x, y = torch.ones(2), torch.ones(2)

    def make(t: Tensor) -> Tensor:
        calls.append(1)
        return t * 2

    assert remember(make, x) is remember(make, x) and len(calls) == 1
    assert remember.knows(x) and not remember.knows(y)
    x += 1  # changed in place: no longer the same
    assert remember(make, x).tolist() == [4, 4] and len(calls) == 2
    assert remember(make, y) is not None and len(calls) == 3
    with torch.inference_mode():
        made = remember(make, torch.ones(2))
    assert not made.is_inference()  # a later training step may use it
    assert not copy.deepcopy(remember).knows(y)


# ---- equations against loops -----------------------------------------------------------------------------------------


def test_generator_loss_by_hand() -> None:
    output, x = torch.tensor([[0.5, 0.5], [0.25, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    zero = torch.zeros(2, 3)
    expected = (2 * math.log(2) - math.log(0.75)) / 2
    assert float(generator_loss(output, x, zero, zero, "bernoulli")) == pytest.approx(expected, rel=1e-6)
    squared = (4 * 0.25 - 0.5 + 0.0625) / 2  # 0.25 + 0.25 + 0.0625 + 0
    assert float(generator_loss(output, x, zero, zero, "gaussian")) == pytest.approx(squared)
    # KL(N(1, 1) || N(0, 1)) = 1/2 a dimension
    more = generator_loss(output, x, zero + 1, zero, "gaussian") - squared
    assert float(more) == pytest.approx(1.5)


def test_disagreement_against_loops() -> None:
    torch.manual_seed(1)
    log_probs, y = torch.randn(5, 4, 3, dtype=torch.float64).log_softmax(-1), torch.tensor([0, 2, 1, 1])
    total = 0.0
    for node in range(4):
        passes = [math.exp(log_probs[m, node, y[node]]) for m in range(5)]
        total += -math.log(sum(passes) / 5) + sum(math.log(p) for p in passes) / 5
    assert float(disagreement(log_probs, y)) == pytest.approx(total / 4, rel=1e-12)
    assert total < 0  # Jensen
    same = log_probs[:1].expand(5, -1, -1)
    assert float(disagreement(same, y)) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(("samples", "temperature", "lam"), [(1, 0.5, 1.0), (4, 0.5, 1.0), (3, 0.2, 0.7)])
def test_augmentation_loss_against_loops(samples: int, temperature: float, lam: float) -> None:
    torch.manual_seed(2)
    log_probs = torch.randn(samples, 6, 3, dtype=torch.float64).log_softmax(-1)
    y, mask = torch.tensor([0, 2, -1, 1, 1, 0]), torch.tensor([1, 1, 0, 0, 1, 0]).bool()
    p = log_probs.exp()
    nll = consistency = 0.0
    for s in range(samples):
        nll -= sum(float(log_probs[s, v, y[v]]) for v in (0, 1, 4)) / 3
        for v in range(6):
            mean = [sum(float(p[t, v, c]) for t in range(samples)) / samples for c in range(3)]
            powers = [m ** (1 / temperature) for m in mean]
            consistency += sum((float(p[s, v, c]) - powers[c] / sum(powers)) ** 2 for c in range(3)) / 6
    supervised, ours = augmentation_loss(log_probs, y, mask, temperature, lam)
    assert float(supervised) == pytest.approx(nll / samples, rel=1e-12)
    assert float(ours) == pytest.approx(lam * consistency / samples, rel=1e-12)


def test_no_gradient_through_the_target() -> None:
    logits = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    y, mask = torch.zeros(4, dtype=torch.int64), torch.ones(4).bool()
    (gradient,) = torch.autograd.grad(augmentation_loss(logits.log_softmax(-1), y, mask)[1], logits)
    probs = logits.detach().softmax(-1)
    target = probs.mean(0).square()
    target = target / target.sum(1, keepdim=True)
    fixed = (logits.softmax(-1) - target).square().sum(2).mean()
    assert torch.allclose(gradient, torch.autograd.grad(fixed, logits)[0])
    certain = torch.tensor([[[0.0, -50.0]]], dtype=torch.float64).log_softmax(-1)
    assert float(augmentation_loss(certain, torch.zeros(1, dtype=torch.int64), torch.ones(1).bool())[1]) < 1e-12


def test_lagcn_against_loops() -> None:
    torch.manual_seed(3)
    edge_index = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    net = lagnn.LAGCN(5, 2, 3, branches=2).double().eval()
    features = [torch.rand(4, 5, dtype=torch.float64) for _ in range(2)]
    a = dense_adjacency(edge_index, 4)
    hidden = [(a @ x @ b.weight + b.bias).relu() for x, b in zip(features, net.branches, strict=True)]
    expected = a @ torch.cat(hidden, 1) @ net.classifier.weight + net.classifier.bias
    assert torch.allclose(net(features, Adjacency(edge_index, 4, torch.float64)), expected)


def test_judge_scores_as_one_pass_after_another(graph: dict[str, Any]) -> None:
    """The passes in one product, on the part of the graph that matters, are passes over the whole graph."""
    torch.manual_seed(0)
    judge = Judge(graph["x"], graph["edge_index"], graph["y"], graph["train_mask"], 4, epochs=5, passes=3)
    judge.net.input_dropout = judge.net.p = 0.0
    x = row_normalise(graph["x"])
    part = row_normalise(judge.x)
    expected = judge.net([x], Adjacency(graph["edge_index"], 600)).log_softmax(-1)[graph["train_mask"]]
    for log_probs in judge._pass(part, 3):
        assert torch.allclose(log_probs, expected, atol=1e-5)
    assert judge.score(part) == pytest.approx(0.0, abs=1e-5)  # passes without dropout agree
    judge.net.input_dropout = judge.net.p = 0.5
    assert judge.score(part) < -1e-4


# ---- stage 1 ---------------------------------------------------------------------------------------------------------


def bipartite() -> dict[str, Any]:
    """Nodes of kind a know words 0 to 3, of kind b words 4 to 7, and only a-b edges: own and neighbours' never meet."""
    x = torch.zeros(60, 8)
    x[:30, :4] = x[30:, 4:] = 1
    generator = torch.Generator().manual_seed(0)
    pairs = torch.stack(
        (torch.randint(30, (300,), generator=generator), 30 + torch.randint(30, (300,), generator=generator))
    )
    y = (torch.arange(60) >= 30).long()
    return {"x": x, "edge_index": torch.cat((pairs, pairs.flip(0)), 1), "y": y, "train_mask": torch.arange(60) % 6 == 0}


def test_generator_draws_neighbours_not_the_node() -> None:
    torch.manual_seed(0)
    data = bipartite()
    model = tiny(in_features=8, num_classes=2, generator_epochs=20, select=False, row_normalise=False)
    model.fit_generator(data["x"], data["edge_index"], data["y"], data["train_mask"])
    drawn = model.draw(data["x"], seed=1)[0]
    assert drawn[:30, 4:].mean() > 0.9 and drawn[:30, :4].mean() < 0.1
    assert drawn[30:, :4].mean() > 0.9 and drawn[30:, 4:].mean() < 0.1


def test_directed_edges_run_from_the_neighbour_to_the_node() -> None:
    """Edges point to the node that gathers: only kind a has neighbours, and these are of kind b."""
    torch.manual_seed(0)
    data = bipartite()
    model = tiny(in_features=8, num_classes=2, generator_epochs=40, select=False, row_normalise=False)
    to_a = data["edge_index"][:, data["edge_index"][1] < 30]
    model.fit_generator(data["x"], to_a, data["y"], data["train_mask"])
    drawn = model.draw(data["x"], seed=1)[0]
    assert drawn[:30, 4:].mean() > 0.9 and drawn[:30, :4].mean() < 0.1


def test_generator_sees_training_labels_only(graph: dict[str, Any]) -> None:
    outcomes = []
    for y in (graph["y"], torch.where(graph["train_mask"], graph["y"], (graph["y"] + 1) % 4)):
        torch.manual_seed(0)
        model = tiny()
        outcome = model.fit_generator(graph["x"], graph["edge_index"], y, graph["train_mask"])
        outcomes.append((outcome, model.generator.output.weight))
    assert outcomes[0][0] == outcomes[1][0] and torch.equal(outcomes[0][1], outcomes[1][1])
    assert 20 < outcomes[0][0]["step"] <= 28 and outcomes[0][0]["score"] < 0


@pytest.mark.parametrize(
    ("authors_warmup", "scores", "chosen"),
    [
        (False, [-3.0, -2.0, -4.0, -1.0], 28),  # at steps 22, 24, 26, 28: the best after warm-up
        (False, [-2.0, -3.0, -4.0, -5.0], 22),
        (True, [-9.0] * 10 + [-3.0, -2.0, -4.0, -5.0], 24),
        (True, [-9.0] * 9 + [-0.1] + [-3.0, -2.0, -4.0, -1.0], None),  # a good step of the warm-up blocks all later
    ],
)
def test_selection(
    graph: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    authors_warmup: bool,
    scores: list[float],
    chosen: int | None,
) -> None:
    left, updates = list(scores), []
    monkeypatch.setattr(Judge, "score", lambda self, features: left.pop(0))
    plain = Judge.update
    monkeypatch.setattr(Judge, "update", lambda self, f, epochs: (updates.append(epochs), plain(self, f, 1))[1])
    model = tiny(judge_every=2, authors_warmup=authors_warmup)
    outcome = model.fit_generator(graph["x"], graph["edge_index"], graph["y"], graph["train_mask"])
    assert not left and updates[0] == 20 and all(u == 20 for u in updates)
    if chosen is None:
        assert outcome["step"] == 28 and math.isnan(outcome["score"]) and "No generator was chosen" in caplog.text
    else:
        assert outcome == {"step": chosen, "score": scores[(chosen - 28) // 2 - 1]}


def test_chosen_generator_is_the_one_kept(graph: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    scores, seen = iter([-1.0, -2.0]), []

    def score(self: Judge, features: Tensor) -> float:
        seen.append(features)
        return next(scores)

    monkeypatch.setattr(Judge, "score", score)
    states = []
    draw = Judge.draw
    monkeypatch.setattr(Judge, "draw", lambda self, g: (states.append(copy.deepcopy(g.state_dict())), draw(self, g))[1])
    model = tiny()  # steps 24 and 28 are scored
    model.fit_generator(graph["x"], graph["edge_index"], graph["y"], graph["train_mask"])
    kept = model.generator.state_dict()
    assert all(torch.equal(kept[k], states[0][k]) for k in kept)
    assert not torch.equal(kept["output.weight"], states[1]["output.weight"])
    assert not any(p.requires_grad for p in model.generator.parameters()) and bool(model.generator_fitted)


def test_generator_refusals(graph: dict[str, Any]) -> None:
    rest = (graph["edge_index"], graph["y"], graph["train_mask"])
    with pytest.raises(ValueError, match=r"lies in \[0, 2\].*likelihood='gaussian'"):
        tiny().fit_generator(graph["x"] * 2, *rest)
    loops = torch.arange(600).expand(2, -1)
    with pytest.raises(ZooError, match="no edges to train the generator on"):
        tiny().fit_generator(graph["x"], loops, *rest[1:])


def test_gaussian_generator(graph: dict[str, Any]) -> None:
    """The OGB form: batch norm, tanh, squared error, a fixed number of steps, features as they are."""
    torch.manual_seed(0)
    settings = {"in_features": 60, "num_classes": 4, "hidden": 8, "generator_hidden": 16, "generator_lr": 1e-2}
    model = LAGNN.from_variant("ogb_arxiv", **settings)
    x = torch.randn(600, 60) * 0.3
    outcome = model.fit_generator(x, graph["edge_index"], graph["y"], graph["train_mask"])
    assert outcome["step"] == 20 and math.isnan(outcome["score"])
    assert int(model.generator.output_norm.num_batches_tracked) == 20
    drawn = model.draw(x, 1)
    assert drawn.abs().max() <= 1 and drawn.min() < 0
    theirs = LAGNN.from_variant("ogb_arxiv", **settings, authors_batch_statistics=True)
    theirs.load_state_dict(model.state_dict())
    other = theirs.draw(x, 1)
    assert not torch.allclose(other, drawn)
    assert other.atanh().mean().abs() < 0.1  # normalised over these very nodes
    assert int(theirs.generator.output_norm.num_batches_tracked) == 20  # drawing moves nothing


# ---- the two inputs, modes and seeds ---------------------------------------------------------------------------------


def test_evaluation_draws_the_stored_sample(graph: dict[str, Any]) -> None:
    model, x, e = tiny().eval(), graph["x"], graph["edge_index"]
    first = model(x, e)
    assert torch.equal(first, model(x, e)) and torch.equal(first, model(x, e, model.draw(x, int(model.noise_seed))))
    model.noise_seed += 1
    assert not torch.equal(first, model(x, e))
    model.train()
    model.net.eval()
    assert not torch.equal(model(x, e), model(x, e))  # training draws afresh


def test_drawn_rows_sum_to_one(graph: dict[str, Any]) -> None:
    drawn = tiny(concat=3).draw(graph["x"], 0)
    assert drawn.shape == (3, 600, 60) and torch.allclose(drawn.sum(-1), torch.ones(3, 600))
    assert not torch.equal(drawn[0], drawn[1])


def test_without_augmentation_it_is_the_gcn(graph: dict[str, Any]) -> None:
    x, e, y, mask = graph["x"], graph["edge_index"], graph["y"], graph["train_mask"]
    model = tiny(augment="none", dropout=0.0)
    assert model.generator is None and len(model.net.branches) == 1 and bool(model.generator_fitted)
    a = dense_adjacency(e, 600).float()
    x = row_normalise(x)
    net = model.net
    hidden = (a @ x @ net.branches[0].weight + net.branches[0].bias).relu()
    logits = a @ hidden @ net.classifier.weight + net.classifier.bias
    assert torch.allclose(model(graph["x"], e), logits, atol=1e-5)
    loss = model.training_step(graph, 0)
    assert float(loss) == pytest.approx(float(F.cross_entropy(logits[mask], y[mask])), rel=1e-5)


def test_control_gives_own_features_to_every_branch(graph: dict[str, Any]) -> None:
    model = tiny(augment="self", concat=2).eval()
    x = row_normalise(graph["x"])
    adjacency = Adjacency(graph["edge_index"], 600)
    expected = model.net([x, x, x], adjacency)
    assert torch.allclose(model(graph["x"], graph["edge_index"]), expected, atol=1e-6)


@pytest.mark.parametrize("backbone", ["gcn", "gat", "gcnii", "grand"])
def test_every_backbone_trains_all_its_parameters(graph: dict[str, Any], backbone: str) -> None:
    if backbone == "gat":
        pytest.importorskip("torch_geometric")
    torch.manual_seed(0)
    model = tiny(backbone_name=backbone, layers=3, dropout=0.2, conv_weight_decay=0.1).train()
    optimizer = model.configure_optimizers()
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model.training_step(graph, 0)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.net.parameters())
    assert losses[-1] < losses[0] and all(p.grad is None for p in model.generator.parameters())
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for p in model.net.parameters()}
    if backbone == "gcnii":
        assert [(len(g["params"]), g["weight_decay"]) for g in optimizer.param_groups] == [(6, 5e-4), (3, 0.1)]


def test_grand_uses_views_in_training_and_own_features_alone_afterwards(graph: dict[str, Any]) -> None:
    model = tiny(backbone_name="grand", concat=2).train()
    assert len(model.views(graph["x"], graph["edge_index"])) == 3
    model.eval()
    first = model(graph["x"], graph["edge_index"])
    model.noise_seed += 1
    assert torch.equal(first, model(graph["x"], graph["edge_index"]))


def test_authors_init_starts_below_zero() -> None:
    torch.manual_seed(0)
    ours, theirs = LAGNN(augment="none").net, LAGNN(augment="none", authors_init=True).net
    deviation = 1 / math.sqrt(8)
    assert ours.branches[0].weight.mean().abs() < 0.01 and ours.branches[0].bias.abs().max() == 0
    assert float(theirs.branches[0].weight.mean()) == pytest.approx(-deviation, rel=0.05)
    assert float(theirs.branches[0].weight.std()) == pytest.approx(deviation, rel=0.05)


# ---- fit -------------------------------------------------------------------------------------------------------------


def fit(model: LAGNN, folder: Path, data: Any, epochs: int, **more: Any) -> zoo.Trainer:
    trainer = zoo.Trainer(
        max_epochs=epochs, default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, **more,
    )  # fmt: skip
    trainer.fit(model, datamodule=data)
    return trainer


def test_fit_does_both_stages_and_keeps_the_best_sample(tmp_path: Path) -> None:
    lightning.seed_everything(0, verbose=False)
    data, model = NodeClassificationDataModule(), LAGNN.from_variant("tiny")
    start = int(model.noise_seed)
    trainer = fit(model, tmp_path, data, 40)
    assert bool(model.generator_fitted) and int(model.noise_seed) == start + 40
    best = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)
    again = LAGNN.from_variant("tiny")
    again.load_state_dict(best["state_dict"])
    assert start < int(again.noise_seed) <= start + 40
    (metrics,) = trainer.validate(again, datamodule=data, verbose=False)
    recorded = next(iter(best["callbacks"].values()))["best_model_score"]
    assert metrics["val/loss"] == float(recorded)  # the very sample that it was chosen by
    (tested,) = trainer.test(again, datamodule=data, verbose=False)
    assert tested["test/accuracy"] > 0.8 and tested["test/accuracy"] > tested["test/accuracy_low_degree"]
    (prediction,) = trainer.predict(again, datamodule=data)
    graph = data.dataset("test")[0]
    accuracy = (prediction["class"] == graph["y"])[graph["test_mask"]].float().mean()
    assert tested["test/accuracy"] == pytest.approx(float(accuracy))
    assert torch.equal(prediction["probability"], again.predict(graph["x"], graph["edge_index"]))
    assert torch.allclose(prediction["probability"].sum(1), torch.ones(600))


def test_a_fitted_generator_is_not_fitted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = NodeClassificationDataModule()
    fit(LAGNN.from_variant("tiny"), tmp_path, data, 2)
    monkeypatch.setattr(LAGNN, "fit_generator", lambda *a: pytest.fail("stage 1 ran again"))
    resumed = LAGNN.from_variant("tiny")
    trainer = zoo.Trainer(
        max_epochs=4, default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(resumed, datamodule=data, ckpt_path="last")
    assert trainer.current_epoch == 4


def test_one_generator_serves_many_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lagnn.pretrain_generator(tmp_path, 0, variant="tiny")
    file = tmp_path / "generator.safetensors"
    kept = load_file(file)
    monkeypatch.setattr(LAGNN, "fit_generator", lambda *a: pytest.fail("stage 1 ran again"))
    model = LAGNN.from_variant("tiny", generator_file=str(file))
    fit(model, tmp_path / "run", NodeClassificationDataModule(), 1)
    assert model.generator is not None and bool(model.generator_fitted)
    assert all(torch.equal(v, kept[k]) for k, v in model.generator.state_dict().items())
    file.unlink()  # what is saved needs the file no more
    folder = model.save_pretrained(tmp_path / "saved")
    assert torch.equal(LAGNN.from_pretrained(folder).generator.output.weight, kept["output.weight"])
    lagnn.save_file({"output.weight": torch.zeros(2, 2)}, file)
    with pytest.raises(ZooError, match="generator"):
        fit(tiny(generator_file=str(file)), tmp_path / "other", NodeClassificationDataModule(), 1)
    with pytest.raises(FileNotFoundError, match="pretrain_generator"):
        fit(tiny(generator_file=str(tmp_path / "none")), tmp_path / "no", NodeClassificationDataModule(), 1)


def test_plain_trainer_and_own_loader_of_two_graphs(tmp_path: Path) -> None:
    graphs = [dict(NodeClassificationDataModule(seed=s).dataset("train")[0]) for s in (0, 1)]
    loader = DataLoader(graphs, batch_size=1, collate_fn=lambda items: items[0])
    model = LAGNN.from_variant("tiny")
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(model, loader, loader)
    assert trainer.global_step == 4 and math.isfinite(float(trainer.callback_metrics["val/loss"]))


def test_nan_in_features_is_refused_before_training(tmp_path: Path) -> None:
    data = NodeClassificationDataModule()
    data.dataset("train")[0]["x"][5, 5] = math.nan
    with pytest.raises(ValueError, match="'x' holds 1 values that are NaN"):
        fit(LAGNN.from_variant("tiny"), tmp_path, data, 1)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone_name": "sage"}, "backbone_name is 'sage'; it must be one of gcn, gat, gcnii, grand"),
        ({"augment": "vae"}, "augment is 'vae'"),
        ({"likelihood": "poisson"}, "likelihood is 'poisson'"),
        ({"concat": 0}, "concat is 0; it must be at least 1"),
        ({"layers": 1}, "layers is 1"),
    ],
)
def test_bad_hyperparameters(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LAGNN(**arguments)


def test_bad_inputs(graph: dict[str, Any]) -> None:
    model, x, e = tiny().eval(), graph["x"], graph["edge_index"]
    for bad, edges, message in (
        (x[:, :5], e, r"'x' has shape \(600, 5\); expected \(nodes >= 1, 60\)"),
        (x[:0], e, r"'x' has shape \(0, 60\)"),
        (x, e.float(), "int64: sources in row 0"),
        (x, e.T, r"'edge_index' has shape \(\d+, 2\)"),
        (x[:100], e, r"names node \d+; nodes are 0 to 99"),
    ):
        with pytest.raises(ValueError, match=message):
            model(bad, edges)
    with pytest.raises(ValueError, match=r"'augmented' has shape \(2, 600, 60\); expected \(1, 600, 60\)"):
        model(x, e, torch.zeros(2, 600, 60))
    hurt = x.clone()
    hurt[0, 0] = math.inf
    with pytest.raises(ValueError, match="'x' holds 1 values"):
        model.predict(hurt, e)
    with pytest.raises(KeyError, match="no 'train_mask'; LAGNN needs"):
        model.training_step({"x": x, "edge_index": e, "y": graph["y"]}, 0)


def test_graph_without_edges_predicts(graph: dict[str, Any]) -> None:
    empty = torch.zeros(2, 0, dtype=torch.int64)
    assert torch.isfinite(tiny().predict(graph["x"], empty)).all()
    assert torch.isfinite(tiny().predict(torch.zeros(3, 60), empty)).all()  # no features at all


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch_geometric.nn", None)
    with pytest.raises(ImportError, match=r"paper-zoo\[graph\]"):
        tiny(backbone_name="gat")


def test_generator_parts_fit_together() -> None:
    generator = Generator(7, 5, 3).double()
    x, c = (torch.rand(4, 7, dtype=torch.float64) for _ in range(2))
    z = torch.rand(4, 3, dtype=torch.float64)
    hidden = F.relu(generator.decoder(torch.cat((z, c), 1)))
    assert torch.allclose(generator.decode(z, generator.condition(c)), generator.output(hidden).sigmoid())
    assert [t.shape for t in generator(x, c)] == [(4, 7), (4, 3), (4, 3)]
