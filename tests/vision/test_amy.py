"""AMY: graphs and propagation against slow twins and known limits, the local loss by hand, FedAvg as the limit."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from zoo.engines.federated import Samples, local_batches
from zoo.vision.federated.amy import (
    AMY,
    Detection,
    FederatedModule,
    agreement,
    hypergraph,
    neighbours,
    pairwise_graph,
    propagate,
    rank_gap,
    uncertain,
)

SMALL: dict[str, Any] = {
    "net": {"name": "cnn", "widths": [4], "features": 12},
    "norm": "none",
    "num_classes": 5,
    "in_channels": 1,
    "image_size": 8,
    "num_clients": 3,
    "local_epochs": 2,
    "local_batch": 8,
    "neighbours": 3,
    "graph_widths": [6, 5],
    "estimator_width": 4,
    "ramp_rounds": 2,
    "augment": [],
    "lr": 0.05,
}


def quiet(model: Any) -> Any:
    model.logged = {}
    model.log = lambda name, value, **_: model.logged.__setitem__(name, value)  # no trainer
    return model


def small(seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    return quiet(AMY(**{**SMALL, **changes}))


def a_round(
    clients: tuple[int, ...] = (0, 1, 2), sizes: tuple[int, ...] = (9, 17, 11), seed: int = 0
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 5, (sum(sizes),), generator=generator)
    image = torch.rand(sum(sizes), 1, 8, 8, generator=generator)
    rounds = {"client": list(clients), "size": list(sizes), "work": [1.0] * len(sizes)}
    return {"image": image, "label": label, **rounds, "seed": [seed + c for c in clients]}


def points(count: int = 9, d: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(count, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


ALL = torch.ones(9, dtype=torch.bool)

# ---- graphs ---------------------------------------------------------------------------------------------------------


def slow_parts(x: Tensor, k: int) -> tuple[list[set[int]], Any]:
    """Hyperedges as sets, and the likeness of two points, by loops."""
    n = len(x)
    far = [[float((x[i] - x[j]).norm()) for j in range(n)] for i in range(n)]
    pairs = [far[i][j] for i in range(n) for j in range(n) if i != j]
    sigma = sum(pairs) / len(pairs)
    edges = [{i, *sorted((j for j in range(n) if j != i), key=lambda j, i=i: far[i][j])[:k]} for i in range(n)]
    return edges, lambda i, j: math.exp(-((far[i][j] / sigma) ** 2))


@pytest.mark.parametrize("k", [1, 3, 8])
def test_the_hypergraph_equals_a_slow_twin(k: int) -> None:
    x = points()
    edges, alike = slow_parts(x, k)
    weight = [sum(alike(i, j) for j in edge) / len(edge) for i, edge in enumerate(edges)]
    degree = [sum(w for w, edge in zip(weight, edges, strict=True) if v in edge) for v in range(9)]
    slow = torch.zeros(9, 9, dtype=torch.float64)
    for w, edge in zip(weight, edges, strict=True):
        for a in edge:
            for b in edge:
                slow[a, b] += w / len(edge) / math.sqrt(degree[a] * degree[b])
    assert torch.allclose(hypergraph(x, ALL, k), slow, atol=1e-12)


@pytest.mark.parametrize("k", [1, 3])
def test_the_pairwise_graph_equals_a_slow_twin(k: int) -> None:
    x = points()
    edges, alike = slow_parts(x, k)
    a = torch.zeros(9, 9, dtype=torch.float64)
    for i in range(9):
        for j in range(9):
            a[i, j] = alike(i, j) if j in edges[i] or i in edges[j] else 0.0
    degree = a.sum(1)
    assert torch.allclose(pairwise_graph(x, ALL, k), a / (degree[:, None] * degree).sqrt(), atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 12), st.integers(0, 1000), st.booleans())
def test_graphs_are_symmetric_and_do_not_grow(count: int, seed: int, hyper: bool) -> None:
    x = points(count, seed=seed)
    graph = (hypergraph if hyper else pairwise_graph)(x, torch.ones(count, dtype=torch.bool), min(3, count - 1))
    values = torch.linalg.eigvalsh(graph)
    assert torch.allclose(graph, graph.T) and (graph >= 0).all()
    assert values.max() <= 1 + 1e-9
    assert not hyper or values.min() >= -1e-9


@pytest.mark.parametrize("build", [hypergraph, pairwise_graph])
def test_padding_changes_nothing(build: Any) -> None:
    x = points()
    mask = torch.tensor([True] * 6 + [False] * 3)
    whole = build(x, mask, 2)
    assert torch.allclose(whole[:6, :6], build(x[:6], mask[:6], 2), atol=1e-12)
    assert not whole[6:].any() and not whole[:, 6:].any()


def test_fewer_others_than_neighbours() -> None:
    mask = torch.tensor([True, True, False, False])
    near, _ = neighbours(points(4), mask, 3)
    assert near.tolist() == [[False, True, False, False], [True, False, False, False], [False] * 4, [False] * 4]
    assert hypergraph(points(4), torch.tensor([True, False, False, False]), 3)[0, 0] == 1  # alone: itself


def test_equal_points_are_all_alike() -> None:
    graph = hypergraph(torch.ones(5, 2), torch.ones(5, dtype=torch.bool), 4)
    assert torch.allclose(graph, torch.full((5, 5), 0.2))


# ---- labels on the graph --------------------------------------------------------------------------------------------


def test_propagation_equals_iterating() -> None:
    graph = hypergraph(points(), ALL, 3)
    start = torch.rand(9, 4, dtype=torch.float64)
    slow = start
    for _ in range(400):
        slow = 0.8 * graph @ slow + 0.2 * start
    assert torch.allclose(propagate(graph, start, 0.8), slow / slow.sum(1, keepdim=True), atol=1e-10)


def test_limits_of_propagation() -> None:
    start = F.one_hot(torch.tensor([0, 0, 1, 2, 2, 2, 0, 1, 1]), 3).double()
    graph = hypergraph(points(), ALL, 3)
    assert torch.equal(propagate(graph, start, 0.0), start)
    # all in every hyperedge: G = 1 1ᵀ / b, so F = (1 - α) Y + α mean(Y)
    whole = propagate(hypergraph(points(), ALL, 8), start, 0.6)
    assert torch.allclose(whole, 0.4 * start + 0.6 * start.mean(0), atol=1e-12)
    one = torch.zeros(9, 3, dtype=torch.float64)
    one[:, 1] = 1
    assert torch.allclose(propagate(graph, one, 0.9), one)  # a batch of one class stays as it is


def test_a_wrong_label_among_its_like_is_put_right() -> None:
    """Two clouds; one sample of the first bears the second's label, with little certainty."""
    x = torch.cat([points(10, seed=1) * 0.1, points(10, seed=2) * 0.1 + 5]).float()
    label = torch.tensor([0] * 10 + [1] * 10)
    label[3] = 1
    model = small(num_classes=2)
    s = torch.full((20,), 0.9)
    s[3] = 0.1
    model.model.certainty = lambda *_: s
    mask = torch.ones(20, dtype=torch.bool)
    _, refined = model.judge(model.model, x, torch.zeros(20, 2), label, mask)
    assert refined.argmax(1).tolist() == [0] * 10 + [1] * 10
    given = F.one_hot(label, 2).float()
    others = torch.arange(20) != 3
    assert torch.equal(refined[others], given[others])
    s[3] = 1.0  # among the certain: nothing is touched
    assert torch.equal(model.judge(model.model, x, torch.zeros(20, 2), label, mask)[1], given)
    model = small(num_classes=2, refine_margin=1.0)
    model.model.certainty = lambda *_: torch.full((20,), 0.1)
    assert torch.equal(model.judge(model.model, x, torch.zeros(20, 2), label, mask)[1], given)
    # without certainties the graph alone decides
    model = small(num_classes=2, uncertainty=False, neighbours=6, propagate_alpha=0.95, refine_margin=0.05)
    assert model.judge(model.model, x, torch.zeros(20, 2), label, mask)[1].argmax(1)[3] == 0


def test_agreement_by_hand() -> None:
    graph = torch.tensor([[0.5, 0.3, 0.1], [0.3, 0.5, 0.0], [0.1, 0.0, 0.9]])
    given = F.one_hot(torch.tensor([0, 0, 1]), 2).float()
    assert torch.allclose(agreement(graph, given), torch.tensor([0.75, 1.0, 0.0]))
    assert not agreement(torch.eye(2), torch.eye(2)).any()  # alone


def test_without_agreement_labels_do_not_enter_certainty() -> None:
    for seen in (True, False):
        model, x = small(label_agreement=seen), torch.rand(8, 12)
        mask, z = torch.ones(8, dtype=torch.bool), torch.zeros(8, 5)
        labels = torch.arange(8) % 5, torch.arange(8) % 2
        first, second = (model.judge(model.model, x, z, label, mask)[0] for label in labels)
        assert torch.equal(first, second) is not seen


def test_rank_gap_by_hand() -> None:
    s = torch.tensor([0.2, 0.9, 0.5, 0.7, 0.1, 9.0])
    mask = torch.tensor([True] * 5 + [False])
    # 70 % of five: places 0 to 3 of 0.9, 0.7, 0.5, 0.2, 0.1
    assert float(rank_gap(s, mask)) == pytest.approx((0.9 + 0.7 + 0.5 + 0.2) / 4 - 0.1)
    assert float(rank_gap(s, mask, 0.4)) == pytest.approx(0.8 - (0.5 + 0.2 + 0.1) / 3)
    assert uncertain(s, mask).tolist() == [False, False, False, False, True, False]
    assert uncertain(s, mask, 0.4).tolist() == [True, False, True, False, True, False]


# ---- a client's loss ------------------------------------------------------------------------------------------------


def one_batch(model: Any, padded: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    mask = torch.arange(8) < 8 - padded
    image = torch.rand(8, 1, 8, 8, generator=generator)
    return {"image": image, "label": torch.arange(8) % 5, "mask": mask, "refine": torch.tensor(0.5)}


@pytest.mark.parametrize("weighting", ["logits", "loss"])
def test_the_loss_by_hand(weighting: str) -> None:
    model = small(refine_margin=0.01, weighting=weighting)
    net, batch = model.model, one_batch(None)
    with torch.no_grad():
        net.estimator[2].bias.fill_(-4)  # hardly anything is certain
        net.estimator[2].weight.mul_(20)  # and no two alike
        net.theta2.weight.mul_(20)
        net.prototype.copy_(torch.rand(5, 12))
        net.seen.copy_(torch.tensor([1.0, 0.0, 2.0, 1.0, 0.0]))
    found = model.loss(net, batch)
    rows = slice(0, 6)  # the rest is padded
    x = net.backbone(batch["image"])[rows]
    z, y = net.classifier(x), batch["label"][rows]
    graph = hypergraph(x.detach(), torch.ones(6, dtype=torch.bool), 3)
    near = torch.tensor([sum(graph[i, j] * (y[i] == y[j]) for j in range(6) if j != i) for i in range(6)])
    near = near / (graph.sum(1) - graph.diagonal())
    u = torch.cat([graph @ net.theta2(F.relu(graph @ net.theta1(x))), near[:, None]], 1)
    s = torch.sigmoid(net.estimator(u))[:, 0]
    given = F.one_hot(y, 5).float()
    said = propagate(graph, s[:, None] * given + (1 - s[:, None]) * z.softmax(1), 0.8)
    refined, away = [], []
    for i in range(6):
        change = said[i].max() - said[i, y[i]] > 0.01 and i == int(s.argmin())
        refined.append(said[i] if change else given[i])
        c = int(refined[-1].argmax())
        away.append(float(net.seen[c] > 0) * (x[i] - net.prototype[c]).square().sum())
    assert any(not torch.equal(r, g) for r, g in zip(refined, given, strict=True)) and sum(away) > 0
    log_p = z.log_softmax(1)
    order = s.sort(descending=True).values  # 70 % of six: five
    each = [-(s[i] * z[i]).log_softmax(0)[y[i]] / 6 for i in range(6)]
    if weighting == "loss":
        each = [s[i] * -log_p[i, y[i]] / s.sum() for i in range(6)]
    wanted = {
        "given": sum(each),
        "refined": sum(-(refined[i] * log_p[i]).sum() for i in range(6)) / 6,
        "rank": (0.15 - (order[:5].mean() - order[5])).clamp_min(0),
        "prototype": sum(away) / 6,
    }
    for name, value in wanted.items():
        assert float(found[name]) == pytest.approx(float(value), rel=1e-5), name
    total = wanted["given"] + 0.5 * wanted["refined"] + 0.5 * wanted["rank"] + 0.1 * wanted["prototype"]
    assert float(found["loss"]) == pytest.approx(float(total), rel=1e-5)


def test_gradients_reach_what_they_should() -> None:
    model = small()
    with torch.no_grad():
        model.model.seen.fill_(1)
    model.loss(model.model, one_batch(None))["loss"].backward()
    assert all(p.grad is not None and p.grad.any() for p in model.model.parameters())
    # the refined labels are targets: none flows through them to the estimator
    model = small(prototypes=False, rank_weight=0.0)
    batch = one_batch(None)
    refined = model.loss(model.model, batch)["refined"]
    grads = torch.autograd.grad(refined, list(model.model.estimator.parameters()), allow_unused=True)
    assert all(g is None for g in grads)


def test_the_weight_of_refined_labels_rises() -> None:
    model = small(ramp_rounds=4, warm_share=0.5)
    batch = a_round((0, 1), (24, 8))
    plan = local_batches(batch["size"], batch["seed"], 8, epochs=2)
    seen = []
    for done in (0, 1, 8):
        model.round.fill_(done)
        seen.append([found["refine"].tolist() for _, found in Samples(model, batch, [0, 1], plan)])
    assert seen[0] == [[0.0, 0.0]] * 2 + [[0.0]] * 4
    # six steps and two: the first half of each without
    assert seen[1] == [[0.0, 0.0], [0.0, 0.25], [0.0], [0.25], [0.25], [0.25]]
    assert seen[2][-1] == [1.0]


# ---- rounds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, {"graph": "knn", "label_agreement": False}, {"norm": "batch"}, {"uncertainty": False}]
)
def test_stacked_equals_one_by_one(changes: dict[str, Any]) -> None:
    together, alone = small(**changes), small(stack=1, **changes)
    for seed in (0, 1):
        for model in (together, alone):
            model.training_step(a_round(seed=seed), 0)
    for (name, a), b in zip(together.state_dict().items(), alone.state_dict().values(), strict=True):
        error = (a.double() - b.double()).abs().max()
        assert float(error) <= 1e-5 * max(float(b.double().abs().max()), 1e-2), name


def test_switched_off_it_is_fedavg_with_fine_tuning() -> None:
    ours = small(uncertainty=False, propagation=False, prototypes=False)
    theirs = {
        k: v for k, v in SMALL.items() if k not in ("neighbours", "graph_widths", "estimator_width", "ramp_rounds")
    }
    plain = quiet(FederatedModule(**theirs))
    own = {k.replace("classifier.", "head."): v for k, v in ours.model.state_dict().items()}
    own = {k.removeprefix("backbone."): v for k, v in own.items()}
    plain.model.load_state_dict({k: own[k] for k in plain.model.state_dict()})
    image = torch.rand(4, 1, 8, 8)
    for seed in (0, 1):
        down = plain.broadcast()
        up, _, _ = plain.local(a_round(seed=seed), down, [0, 1, 2])
        ours.training_step(a_round(seed=seed), 0)
        plain.training_step(a_round(seed=seed), 0)
    assert torch.allclose(ours.eval()(image), plain.eval()(image), atol=1e-6)
    tuned = torch.func.functional_call(plain.model, {k[6:]: v[1] for k, v in up.items()}, (image,))
    assert torch.allclose(ours(image, 1), tuned, atol=1e-6)  # a client keeps what it had before the server's mean


def test_what_is_sent_and_what_stays() -> None:
    model = small()
    up, kept, _ = model.local(a_round(), model.broadcast(), [0, 1, 2])
    parts = {name.split(".")[1] for name in up}
    assert parts == {"backbone", "classifier", "theta1", "theta2", "sum", "weight"}
    assert up["class.sum"].shape == (3, 5, 12) and up["class.weight"].shape == (3, 5)
    assert not any("estimator" in name for name in (*up, *model.broadcast()))
    assert {name.split(".")[0] for name in kept} == {"personal", "own", "came"}
    assert {n.split(".")[1] for n in kept if n.startswith("personal.")} == {"estimator"}
    assert not any(
        name.startswith("class.") for name in small(prototypes=False).local(a_round(), model.broadcast(), [0])[0]
    )


def test_prototypes_by_hand() -> None:
    """The server divides sums by certainties; what nobody showed stays."""
    model = small()
    down = model.broadcast()
    up, _, _ = model.local(a_round(), down, [0, 1, 2])
    up["class.weight"][:, 2] = 0
    with torch.no_grad():
        model.model.prototype.fill_(7.0)
        model.model.seen.fill_(3.0)
        model.aggregate(down, up, torch.tensor([9.0, 17.0, 11.0]), {"client": [0, 1, 2]})
    wanted = up["class.sum"].sum(0) / up["class.weight"].sum(0)[:, None]
    kept = torch.arange(5) != 2
    assert torch.allclose(model.model.prototype[kept], wanted[kept])
    assert (model.model.prototype[2] == 7).all() and model.model.seen[2] == 3


def test_class_sums_equal_a_slow_twin() -> None:
    """Of the weights after training, over each sample once, by the batches of the first pass."""
    model = small(stack=1)
    batch = a_round((0,), (9,))
    up, kept, _ = model.local(batch, model.broadcast(), [0])
    state = {k[6:]: v[0] for k, v in up.items() if k.startswith("model.")}
    state |= {k[9:]: v[0] for k, v in kept.items() if k.startswith("personal.")}
    model.model.load_state_dict({**model.model.state_dict(), **state})
    index, mask, _ = local_batches([9], batch["seed"], 8, epochs=2)
    sums, weights = torch.zeros(5, 12), torch.zeros(5)
    for step in range(2):
        rows = index[0, step][mask[0, step]]
        x = model.model.backbone(batch["image"][rows])
        s, refined = model.judge(
            model.model, x, model.model.classifier(x), batch["label"][rows], torch.ones(len(rows), dtype=torch.bool)
        )
        for i in range(len(rows)):
            sums[refined[i].argmax()] += (s[i] * x[i]).detach()
            weights[refined[i].argmax()] += s[i].detach()
    assert torch.allclose(up["class.sum"][0], sums, atol=1e-5) and torch.allclose(up["class.weight"][0], weights)


def test_a_client_that_never_came_gets_the_global_model() -> None:
    model = small()
    model.training_step(a_round((0, 2), (9, 17)), 0)
    image = torch.rand(3, 1, 8, 8)
    assert torch.equal(model.eval()(image, 1), model(image))
    assert not torch.allclose(model(image, 0), model(image))
    before = model(image, 0).detach()
    model.training_step(a_round((1, 2), (9, 17)), 0)
    assert torch.equal(model.eval()(image, 0), before)


# ---- scoring --------------------------------------------------------------------------------------------------------


def test_detection_equals_scikit_learn() -> None:
    from sklearn.metrics import roc_auc_score

    generator = torch.Generator().manual_seed(0)
    s = (torch.randint(0, 512, (200,), generator=generator) + 0.5) / 512
    clean, given, refined = (torch.randint(0, 3, (200,), generator=generator) for _ in range(3))
    mask = torch.rand(200, generator=generator) < 0.8
    detection = Detection()
    for part in (slice(0, 90), slice(90, 200)):
        detection.update(s[part], given[part], refined[part], clean[part], mask[part])
    found = detection.compute()
    wrong = given != clean
    assert float(found["auroc"]) == pytest.approx(roc_auc_score(wrong[mask], 1 - s[mask]), abs=1e-6)
    own = wrong & mask
    assert float(found["corrected"]) == pytest.approx(float((refined == clean)[own].float().mean()))
    own = ~wrong & mask
    assert float(found["spoiled"]) == pytest.approx(float((refined != clean)[own].float().mean()))
    assert Detection().compute() == {}


def test_clean_labels_are_only_for_scoring() -> None:
    a, b = small(), small()
    batch = a_round()
    a.training_step({**batch, "clean": (batch["label"] + (batch["label"] == 1)) % 5}, 0)
    b.training_step(batch, 0)
    assert {"train/auroc", "train/corrected", "train/spoiled"} <= a.logged.keys() and "train/auroc" not in b.logged
    ours = {k: v for k, v in a.state_dict().items() if not k.startswith("detection")}
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in ours.items())


def test_clients_accuracies_are_logged_one_by_one() -> None:
    model = small()
    model.training_step(a_round(), 0)
    test = a_round((-1, 1), (20, 30), seed=5)
    model.test_step(test, 0)
    model.on_test_epoch_end()
    right = model.eval()(test["image"][20:], 1).argmax(1) == test["label"][20:]
    assert float(model.logged["test/client_1"]) == pytest.approx(float(right.float().mean()))
    assert float(model.logged["test/personal_accuracy"]) == float(model.logged["test/client_1"])
    assert "test/client_0" not in model.logged and not model.accuracy["on_test"].total.any()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"graph": "line"}, "graph is 'line'; 'hyper' or 'knn'"),
        ({"weighting": "class"}, "weighting is 'class'; 'logits' or 'loss'"),
        ({"neighbours": 8}, "neighbours is 8; from 1 to 7, below local_batch"),
        ({"neighbours": 0}, "neighbours is 0"),
        ({"propagate_alpha": 1.0}, r"propagate_alpha is 1.0; in \[0, 1\)"),
        ({"graph_widths": [4]}, "two widths and one"),
        ({"rank_top": 1.5}, r"rank_top is 1.5; in \[0, 1\]"),
        ({"ramp_rounds": -1}, "must not be negative"),
        ({"prototype_weight": -0.1}, "prototype_weight is -0.1"),
    ],
)
def test_refusals(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        AMY(**{**SMALL, **changes})
    assert "\n" not in str(caught.value)
