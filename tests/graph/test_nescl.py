"""NESCL: recorded parity, equations against loops, hand-computed values, limits, bad inputs."""

import math
from itertools import pairwise
from pathlib import Path

import lightning
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.retrieval import RetrievalNormalizedDCG, RetrievalRecall

from zoo.core import Trainer, ZooError
from zoo.graph.recommendation.data_implicit import ImplicitCFDataModule
from zoo.graph.recommendation.nescl import (
    NESCL,
    View,
    _RowLogSumExp,
    bpr_loss,
    contrastive_loss,
    most_similar,
    norm_penalty,
    propagate,
)
from zoo.nn.ranking import NDCGAtK, RecallAtK

GOLDEN = Path(__file__).parents[1] / "golden" / "nescl.safetensors"
USERS, ITEMS = 7, 6
PAIRS = torch.tensor(
    [
        [0, 0, 0, 1, 1, 2, 2, 2, 3, 4, 4, 5, 5, 6],
        [0, 1, 2, 0, 1, 2, 3, 0, 4, 4, 3, 1, 2, 5],
    ]
)


def small(**overrides) -> NESCL:
    torch.manual_seed(0)
    sizes = {"num_users": USERS, "num_items": ITEMS, "num_interactions": PAIRS.shape[1]}
    return NESCL(**{**sizes, "dim": 4, "layers": 2, "neighbours": 2, "top_k": 3, **overrides}).set_graph(PAIRS)


def batch() -> dict[str, Tensor]:
    return {"user": torch.tensor([0, 2, 5]), "item": torch.tensor([1, 3, 2]), "negative": torch.tensor([5, 4, 0])}


# ---- the authors' results --------------------------------------------------------------------------------------------

CASES = {
    "nescl mean_then_log": {},
    "nescl per_positive": {"variant": "per_positive"},
    "nescl mean_then_log, anchor first": {"anchor_first": True},
    "nescl per_positive, anchor first": {"variant": "per_positive", "anchor_first": True},
    "nescl edge": {"augmentation": "edge"},
    "nescl walk": {"augmentation": "walk"},
    "nescl initial embedding": {"initial_embedding": True, "augmentation": "edge"},
    "nescl amazon-book": {
        "layers": 2, "weight": 0.3, "augmentation": "edge", "variant": "per_positive", "initial_embedding": True,
        "bpr": False, "neighbour_sampling": "similarity", "authors_constant_regulariser": True,
    },
    "sgl": {"positives": ["self"]},
    "lightgcn": {"positives": []},
}  # fmt: skip


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN)


def error(a: Tensor, b: Tensor) -> float:
    return float((a.detach() - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("case", CASES)
def test_equals_the_authors(golden, case):
    g = golden
    model = NESCL(num_users=60, num_items=50, num_interactions=g["interactions"].shape[1], dim=8, **CASES[case])
    model.set_graph(g["interactions"])
    with torch.no_grad():
        model.user_embedding.weight.copy_(g["user"])
        model.item_embedding.weight.copy_(g["item"])
        assert error(model.embeddings(), g[f"{case}.propagation"]) < 1e-5
    if model.hyperparameters["positives"]:
        key = "node" if f"{case}.node" in g else "keep"
        views = [View(model.bipartite, **{key: mask.float()}) for mask in g[f"{case}.{key}"]]
        walk = model.hyperparameters["augmentation"] == "walk"
        used = [views[2 * i : 2 * i + 2] if walk else views[:2] for i in range(model.hyperparameters["layers"])]
        model.views = lambda: [[model.whole(), *pair] for pair in used]
    if f"{case}.neighbour" in g:
        model.neighbour = lambda node: g[f"{case}.neighbour"]
    parts = model.losses({k.removeprefix("batch."): v for k, v in g.items() if k.startswith("batch.")})
    parts["loss"].backward()
    loss, bpr, contrast = g[f"{case}.loss"]
    assert error(parts["loss"], loss) < 1e-5
    assert error(parts["bpr"], bpr) < 1e-5
    if "contrast" in parts:
        assert error(model.hyperparameters["weight"] * parts["contrast"], contrast) < 1e-5
    for side in ("user", "item"):
        assert error(getattr(model, f"{side}_embedding").weight.grad, g[f"{case}.{side}_gradient"]) < 1e-5


def test_similarities_equal_the_authors(golden):
    pairs = golden["interactions"]
    for flip, size, others in ((False, 60, 50), (True, 50, 60)):
        _, value = most_similar(pairs.flip(0) if flip else pairs, size, others, 5, block=700)
        wanted = golden["similarity"][60:] if flip else golden["similarity"][:60]
        assert torch.allclose(value, wanted, rtol=1e-5)


# ---- neighbours ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 8, 1000])
def test_neighbours_equal_a_loop(block):
    index, value = most_similar(PAIRS, USERS, ITEMS, 3, block)
    sets = [{int(i) for u, i in PAIRS.T if u == user} for user in range(USERS)]
    for a in range(USERS):
        scores = [
            (len(sets[a] & sets[b]) / (math.sqrt(len(sets[a])) * math.sqrt(len(sets[b])) + 1e-6), -b)
            for b in range(USERS)
            if b != a
        ]
        best = sorted(scores, reverse=True)[:3]
        assert value[a].tolist() == pytest.approx([s for s, _ in best], rel=1e-6)
        assert [int(i) for i, s in zip(index[a], value[a], strict=True) if s > 0] == [-b for s, b in best if s > 0]


def test_a_node_without_neighbours_is_its_own():
    model = small()
    assert model.bipartite.neighbours[6].tolist()[0] == 6  # user 6 alone has item 5
    assert model.bipartite.count[6] == 1 and model.bipartite.count[USERS + 5] == 1
    assert model.bipartite.neighbours[USERS + 5, 0] == USERS + 5
    for sampling in ("uniform", "similarity"):
        model = small(neighbour_sampling=sampling)
        assert set(model.neighbour(torch.full((50,), 6)).tolist()) == {6}


def test_more_neighbours_than_nodes():
    model = small(neighbours=20)
    assert int(model.bipartite.count.max()) < 20
    drawn = model.neighbour(torch.arange(USERS + ITEMS).repeat(50))
    assert int(drawn.max()) < USERS + ITEMS


def test_neighbours_are_drawn_as_said():
    model = small()
    torch.manual_seed(0)
    n = 20000
    node = torch.full((n,), 2)
    near, weight = model.bipartite.neighbours[2].long(), model.bipartite.similarity[2]
    assert model.bipartite.count[2] == 2 and weight[0] > weight[1]
    share = float((model.neighbour(node) == near[0]).float().mean())
    assert share == pytest.approx(0.5, abs=0.02)
    model = small(neighbour_sampling="similarity")
    share = float((model.neighbour(node) == near[0]).float().mean())
    assert share == pytest.approx(float(weight[0] / weight.sum()), abs=0.02)


# ---- propagation -----------------------------------------------------------------------------------------------------


def dense(node: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
    """The normalised adjacency by loops, in float64."""
    size = USERS + ITEMS
    a = torch.zeros(size, size, dtype=torch.float64)
    order = (PAIRS[0] * ITEMS + PAIRS[1]).argsort()
    for e, (user, item) in enumerate(PAIRS[:, order].T.tolist()):
        weight = 1.0 if keep is None else float(keep[e])
        if node is not None:
            weight *= float(node[user] * node[USERS + item])
        a[user, USERS + item] = a[USERS + item, user] = weight
    degree = a.sum(1)
    scale = torch.where(degree > 0, degree.clamp(min=1e-9) ** -0.5, 0.0)
    return scale[:, None] * a * scale


@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("kind", ["whole", "node", "edge", "walk"])
def test_propagation_and_its_gradient_equal_dense_matrices(kind, initial):
    model = small(initial_embedding=initial)
    graph, size = model.bipartite, USERS + ITEMS
    generator = torch.Generator().manual_seed(5)
    layers, matrices = [], []
    for layer in range(3):
        if layer and kind != "walk":
            layers.append(layers[0])
            matrices.append(matrices[0])
            continue
        row, maps = [model.whole()], [dense()]
        for _ in range(0 if kind == "whole" else 2):
            if kind == "node":
                mask = (torch.rand(size, generator=generator) > 0.3).float()
                row.append(View(graph, node=mask))
                maps.append(dense(node=mask))
            else:
                keep = (torch.rand(PAIRS.shape[1], generator=generator) > 0.3).float()
                row.append(View(graph, keep=keep))
                maps.append(dense(keep=keep))
        layers.append(row)
        matrices.append(maps)
    x = torch.randn(size, 4, generator=generator).requires_grad_()
    out = propagate(graph, layers, x, initial)
    y = x.detach().double().requires_grad_()
    wanted = []
    for w in range(len(layers[0])):
        current, total = y, y if initial else 0
        for maps in matrices:
            current = maps[w] @ current
            total = total + current
        wanted.append(total / (3 + initial))
    wanted = torch.cat(wanted, dim=1)
    assert torch.allclose(out.double(), wanted, atol=1e-6)
    weight = torch.randn(out.shape, generator=generator)
    (out * weight).sum().backward()
    (wanted * weight.double()).sum().backward()
    assert torch.allclose(x.grad.double(), y.grad, atol=1e-6)


def test_sparse_and_scattered_products_agree():
    model = small()
    x, keep = torch.randn(USERS + ITEMS, 4), torch.rand(PAIRS.shape[1])
    graph = model.bipartite
    matrix = torch.zeros(graph.size, graph.size)
    for e, (user, item) in enumerate(graph.interactions.T.tolist()):
        matrix[user, USERS + item] = matrix[USERS + item, user] = keep[e]
    assert torch.allclose(graph.multiply(x, keep), matrix @ x, atol=1e-6)
    assert torch.allclose(graph.multiply(x), (matrix > 0).float() @ x, atol=1e-6)
    assert torch.equal(graph.degree(), (matrix > 0).sum(1).float())


def test_views_lack_exactly_their_share():
    model = small(drop=0.5)
    for _ in range(5):
        view = View.thinned(model.bipartite, "edge", 0.5)
        assert int(view.keep.sum()) == PAIRS.shape[1] - PAIRS.shape[1] // 2
    counts = set()
    for _ in range(20):
        view = View.thinned(model.bipartite, "node", 0.3)
        counts.add(int((view.scale[:USERS] > 0).sum()))
        assert int((view.scale[:USERS] > 0).sum()) <= USERS - int(USERS * 0.3)
    assert max(counts) == USERS - int(USERS * 0.3)  # fewer only where a kept node lost all its neighbours


def test_a_pool_draws_the_same_views_again():
    model = small(pool_size=3, augmentation="edge")
    seen = {tuple(model._view().keep.tolist()) for _ in range(60)}
    assert len(seen) == 3
    fresh = small(augmentation="edge")
    assert len({tuple(fresh._view().keep.tolist()) for _ in range(60)}) > 3


def test_no_drop_makes_views_equal_to_the_whole():
    for augmentation in ("node", "edge", "walk"):
        model = small(drop=0.0, augmentation=augmentation)
        out = propagate(model.bipartite, model.views(), model.table()).unflatten(1, (3, -1))
        assert torch.allclose(out[:, 0], out[:, 1], atol=1e-7) and torch.allclose(out[:, 0], out[:, 2], atol=1e-7)


# ---- losses ----------------------------------------------------------------------------------------------------------


def slow_contrast(view1, view2, near, positives, tau, variant, first) -> float:
    """The loss by loops over anchors and positives, in float64."""
    one, two, near = (F.normalize(x.double(), dim=1) for x in (view1, view2, near))
    n = len(one)
    partner = [(i + n // 2) % n for i in range(n)]
    anchors = []
    for i in range(n):
        terms = []
        for name in positives:
            p = {"self": i, "interacted": partner[i], "neighbour": None}[name]
            if first:
                query, positive, keys = one[i], near[i] if p is None else two[p], two
            else:
                query, positive, keys = near[i] if p is None else one[p], two[i], two
            z = sum(math.exp(float(query @ key) / tau) for key in keys)
            terms.append(math.exp(float(query @ positive) / tau) / z)
        anchors.append(terms)
    if variant == "per_positive":
        flat = [t for terms in anchors for t in terms]
        return -sum(map(math.log, flat)) / len(flat)
    return -sum(math.log(sum(terms) / len(terms)) for terms in anchors) / n


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("variant", ["per_positive", "mean_then_log"])
@pytest.mark.parametrize("tau", [0.02, 0.1, 1.0])
@pytest.mark.parametrize("positives", [["self", "interacted", "neighbour"], ["self"], ["neighbour", "interacted"]])
def test_contrast_equals_loops(first, variant, tau, positives):
    generator = torch.Generator().manual_seed(2)
    view1, view2, near = (torch.randn(8, 5, generator=generator) for _ in range(3))
    loss = contrastive_loss(view1, view2, near, near, positives, tau, variant, first)
    assert float(loss) == pytest.approx(slow_contrast(view1, view2, near, positives, tau, variant, first), rel=1e-5)


def test_contrast_by_hand():
    # two orthogonal pairs that agree in both views: the positive scores e, the other e^0
    x = torch.eye(2)
    wanted = -math.log(math.e / (math.e + 1))
    assert float(contrastive_loss(x, x, None, None, ["self"], 1.0)) == pytest.approx(wanted, rel=1e-6)
    # with the partner as second positive, p = (e/(e+1), 1/(e+1)): their mean is 1/2
    both = contrastive_loss(x, x, None, None, ["self", "interacted"], 1.0, "mean_then_log")
    assert float(both) == pytest.approx(math.log(2), rel=1e-6)
    each = contrastive_loss(x, x, None, None, ["self", "interacted"], 1.0, "per_positive")
    assert float(each) == pytest.approx(math.log(math.e + 1) - 0.5, rel=1e-6)


def test_per_positive_is_never_below_mean_then_log():
    x, y, z = torch.randn(3, 10, 4)
    kinds = [float(contrastive_loss(x, y, z, z, variant=v)) for v in ("per_positive", "mean_then_log")]
    assert kinds[0] >= kinds[1]  # Jensen


@pytest.mark.parametrize("bound", [10.0, 200.0])
def test_blocked_logsumexp_and_its_gradient(bound):
    q = (F.normalize(torch.randn(300, 6), dim=1) * bound).requires_grad_()
    k = F.normalize(torch.randn(9000, 6), dim=1).requires_grad_()
    weight = torch.randn(300)
    wanted = torch.logsumexp(q @ k.t(), dim=1)
    grads = torch.autograd.grad((wanted * weight).sum(), (q, k))
    assert 2**21 // len(k) < len(q)  # more than one block
    ours = _RowLogSumExp.apply(q, k, bound)
    mine = torch.autograd.grad((ours * weight).sum(), (q, k))
    assert torch.allclose(ours, wanted, rtol=1e-5)
    assert all(error(a, b) < 1e-5 for a, b in zip(mine, grads, strict=True))


def test_bpr_and_penalty_by_hand():
    user, positive, negative = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 5.0]]), torch.tensor([[1.0, -3.0]])
    assert float(bpr_loss(user, positive, negative)) == pytest.approx(math.log(1 + math.exp(-1)), rel=1e-6)
    assert torch.isfinite(bpr_loss(user, -1000 * positive, negative))
    a, b = torch.tensor([[3.0], [4.0]]), torch.tensor([[0.0], [2.0]])
    assert float(norm_penalty(a, b)) == pytest.approx((5 + 2) / 2)


def test_the_loss_is_the_sum_of_its_parts():
    torch.manual_seed(0)
    parts = small(weight=0.3, regulariser=0.01).losses(batch())
    total = parts["bpr"] + 0.01 * parts["penalty"] + 0.3 * parts["contrast"]
    assert torch.allclose(parts["loss"], total)
    parts = small(bpr=False, weight=0.3, regulariser=0.01).losses(batch())
    assert torch.allclose(parts["loss"], 0.01 * parts["penalty"] + 0.3 * parts["contrast"])
    parts = small(bpr=False, weight=0.3, regulariser=0.01, authors_constant_regulariser=True).losses(batch())
    assert torch.allclose(parts["loss"], 0.01 + 0.3 * parts["contrast"])
    assert "contrast" not in small(positives=[]).losses(batch())


# ---- ranking ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 3, 100])
def test_ranking_equals_sorting_all_scores(block):
    model = small(block=block)
    user = torch.tensor([4, 0, 2, 6])
    extra = torch.tensor([[0, -1], [-1, -1], [5, 4], [-1, 2]])
    items, scores = model.rank(user, 3, extra)
    whole = model(user).detach()
    for row, u in enumerate(user.tolist()):
        out = {int(i) for a, i in PAIRS.T if a == u} | {int(i) for i in extra[row] if i >= 0}
        left = sorted((i for i in range(ITEMS) if i not in out), key=lambda i: -float(whole[row, i]))
        wanted = (left + [-1] * 3)[:3]
        assert items[row].tolist() == wanted
        assert torch.isneginf(scores[row][items[row] < 0]).all()
    assert items[1].tolist() == model.predict([0], k=3)["item"][0].tolist()


def test_predict_can_keep_seen_items():
    model = small()
    all_items = model.predict([0], k=ITEMS, exclude_seen=False)["item"]
    assert sorted(all_items[0].tolist()) == list(range(ITEMS))
    assert sorted(model.predict([0], k=ITEMS)["item"][0].tolist())[:3] == [-1, -1, -1]


def test_cached_embeddings_follow_the_parameters():
    model = small()
    before = model.predict([0, 1])["score"]
    optimiser = model.configure_optimizers()
    model.losses(batch())["loss"].backward()
    optimiser.step()
    after = model.predict([0, 1])["score"]
    assert not torch.equal(before, after)
    with torch.no_grad():
        model.item_embedding.weight.mul_(2)
    assert not torch.equal(after, model.predict([0, 1])["score"])


@pytest.mark.parametrize("k", [1, 5, 20])
def test_metrics_equal_torchmetrics(k):
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(12, 30, generator=generator)
    target = torch.rand(12, 30, generator=generator) < 0.2
    target[3] = False  # a user without a held-out item does not count
    target[4] = True  # one with more than k of them
    recall, ndcg = RecallAtK(), NDCGAtK()
    top = scores.topk(k, dim=1).indices
    for part in (slice(0, 5), slice(5, 12)):
        recall.update(target.gather(1, top)[part], target.sum(1)[part])
        ndcg.update(target.gather(1, top)[part], target.sum(1)[part])
    index = torch.arange(12)[:, None].expand(-1, 30).flatten()
    for ours, theirs in ((recall, RetrievalRecall), (ndcg, RetrievalNormalizedDCG)):
        wanted = theirs(top_k=k, empty_target_action="skip")(scores.flatten(), target.flatten(), indexes=index)
        assert float(ours.compute()) == pytest.approx(float(wanted), rel=1e-5)


def test_ndcg_by_hand():
    metric = NDCGAtK()
    metric.update(torch.tensor([[False, True, False]]), torch.tensor([2]))
    assert float(metric.compute()) == pytest.approx((1 / math.log2(3)) / (1 + 1 / math.log2(3)), rel=1e-6)
    with pytest.raises(ValueError, match=r"expected \(users, k\)"):
        metric.update(torch.zeros(3, dtype=torch.bool), torch.zeros(3))


# ---- the graph as part of the model ----------------------------------------------------------------------------------


def test_checkpoint_recommends_by_itself(tmp_path):
    model = small()
    wanted = model.predict([0, 1, 2])
    model.save_pretrained(tmp_path / "saved")
    again = NESCL.from_pretrained(tmp_path / "saved")
    assert again.bipartite.ready
    assert torch.equal(again.bipartite.columns, model.bipartite.columns) and torch.equal(
        again.bipartite.edges, model.bipartite.edges
    )
    found = again.predict([0, 1, 2])
    assert torch.equal(found["item"], wanted["item"]) and torch.equal(found["score"], wanted["score"])


def test_batches_bring_the_graph_and_a_trainer_takes_it_from_the_data(tmp_path):
    data = ImplicitCFDataModule(batch_size=512, seed=1)
    model = NESCL.from_variant("tiny")
    with pytest.raises(ZooError, match="has no graph yet: call model.set_graph"):
        model.losses(batch())
    loss = model.training_step(next(iter(data.train_dataloader())), 0)
    assert torch.isfinite(loss) and model.bipartite.ready
    model = NESCL.from_variant("tiny")
    trainer = Trainer(tmp_path, max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.fit(model, datamodule=data)
    assert torch.equal(model.bipartite.interactions.long(), data.interactions())
    assert {"val/recall@20", "val/ndcg@20", "train/loss"} <= trainer.callback_metrics.keys()
    found = trainer.test(model, datamodule=data, verbose=False)[0]
    assert {"test/recall@20", "test/ndcg@20", "test/neighbour_cosine"} <= found.keys()


def test_works_with_a_plain_trainer_and_any_loader():
    model = small()
    loader = torch.utils.data.DataLoader([{k: v[i] for k, v in batch().items()} for i in range(3)], batch_size=2)
    trainer = lightning.Trainer(
        max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu"
    )
    before = model.user_embedding.weight.detach().clone()
    trainer.fit(model, loader)
    assert not torch.equal(before, model.user_embedding.weight)


def test_training_ranks_better_than_chance_and_lowers_the_loss():
    data = ImplicitCFDataModule(batch_size=600, val_fraction=0.0)
    torch.manual_seed(0)
    model = NESCL(**data.describe(), dim=16, layers=2, lr=0.01).set_graph(data.interactions())
    optimiser = model.configure_optimizers()
    losses, bpr = [], []
    for _ in range(3):
        for part in data.train_dataloader():
            parts = model.losses(part)
            optimiser.zero_grad()
            parts["loss"].backward()
            optimiser.step()
            losses.append(float(parts["loss"].detach()))
            bpr.append(float(parts["bpr"].detach()))
    assert sum(losses[-5:]) < 0.97 * sum(losses[:5])
    assert sum(bpr[-5:]) < sum(bpr[:5])
    recall = RecallAtK()
    for part in data.test_dataloader():
        items, _ = model.rank(part["user"], 20)
        recall.update((items[:, :, None] == part["target"][:, None]).any(2), (part["target"] >= 0).sum(1))
    assert float(recall.compute()) > 0.2  # chance is 20 of 388 items: 0.05


def test_same_seed_same_loss_and_every_embedding_gets_a_gradient():
    values = []
    for _ in range(2):
        model = small()
        torch.manual_seed(3)
        loss = model.losses(batch())["loss"]
        loss.backward()
        values.append(float(loss.detach()))
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert values[0] == values[1]


def test_meta_device_and_paper_size():
    with torch.device("meta"):
        model = NESCL()
    assert sum(p.numel() for p in model.parameters()) == (29858 + 40981) * 64
    user = torch.zeros(4, dtype=torch.int64, device="meta")
    for positives in (["self", "interacted", "neighbour"], []):
        with torch.device("meta"):
            model = NESCL(positives=positives)
        assert model.losses({"user": user, "item": user, "negative": user})["loss"].shape == ()
    assert model(user).shape == (4, 40981)


def test_bfloat16_training_step_and_export():
    model = small()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.losses(batch())["loss"]
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(model.user_embedding.weight.grad).all()
    user = torch.tensor([0, 3, 5])
    exported = torch.export.export(model.eval(), (user,)).module()
    assert torch.allclose(exported(user), model(user), atol=1e-6)


def test_convert_drops_the_padding_row():
    model = small()
    pad = torch.zeros(1, 4)
    content = {
        "state_dict": {
            "user_embedding.weight": torch.cat([pad, model.user_embedding.weight.detach()]),
            "item_embedding.weight": torch.cat([pad, model.item_embedding.weight.detach()]),
        },
        "interactions": PAIRS + 1,
    }
    sizes, state = NESCL.convert_state_dict(content)
    assert sizes == {"num_users": 7, "num_items": 6, "num_interactions": 14, "dim": 4}
    again = NESCL(**sizes, layers=2)
    again.load_state_dict(state)
    user = torch.arange(USERS)
    assert torch.allclose(again(user), model(user))
    with pytest.raises(ZooError, match="add it to the file"):
        NESCL.convert_state_dict({"state_dict": content["state_dict"]})


# ---- bad inputs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
        ({"variant": "out"}, "variant is 'out'; expected mean_then_log or per_positive"),
        ({"positives": ["me"]}, "expected some of self, interacted, neighbour"),
        ({"augmentation": "walks"}, "expected node, edge, walk"),
        ({"neighbour_sampling": "all"}, "expected uniform, similarity"),
        ({"drop": 1.0}, r"must lie in \[0, 1\)"),
        ({"layers": 0}, "layers is 0"),
        ({"bpr": False, "positives": []}, "nothing is left to train on"),
    ],
)
def test_bad_hyperparameters(arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (PAIRS[:, :-1], "13 interactions came, the model was built for 14"),
        (PAIRS.float(), "For ratings, keep the pairs that count as positive"),
        (PAIRS.T, r"expected \(2, 14\)"),
        (PAIRS.clone().index_put_((torch.tensor(1), torch.tensor(3)), torch.tensor(6)), "item ids run from 0 to 6"),
        (torch.cat([PAIRS[:, :1], PAIRS[:, :-1]], dim=1), "1 of 14 interactions are repeated"),
        (
            PAIRS.clone().index_put_((torch.tensor(0), torch.tensor(8)), torch.tensor(6)),
            r"1 users have no interaction \(f",
        ),
    ],
)
def test_bad_graphs(pairs, message):
    model = small()
    with pytest.raises(ValueError, match=message):
        model.set_graph(pairs)


def test_bad_users():
    model = small()
    for user, message in (
        ([7], "users run from 7 to 7; the model knows 0 to 6"),
        ([-1], "users run from -1"),
        ([], r"expected \(users >= 1,\)"),
        ([0.5], "integers"),
    ):
        with pytest.raises(ValueError, match=message):
            model.predict(user)
    with pytest.raises(ValueError, match=r"must lie in 1\.\.6"):
        model.predict([0], k=7)


def test_losses_fall_with_more_layers_of_agreement():
    # the closer the two views, the lower the contrast: a path of interpolated views
    torch.manual_seed(0)
    one, other = torch.randn(2, 40, 8)
    values = [float(contrastive_loss(one, one + s * other, None, None, ["self"])) for s in (0.0, 0.5, 1.0, 3.0)]
    assert all(a < b for a, b in pairwise(values))
