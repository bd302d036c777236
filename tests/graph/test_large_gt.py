"""LargeGT: parity with recorded tensors, attention and codebook against loops, samplers, averages, walks, layouts."""

import itertools
import math
import multiprocessing
import os
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import scipy.sparse
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import zoo
from zoo.core import ZooError, recipe
from zoo.graph.node import data_tokens
from zoo.graph.node.data_tokens import (
    LargeGTTokenDataModule,
    Rows,
    averages,
    block_ball,
    exact_sequences,
    geometric_loader,
    half_split,
    node2vec,
    path_sequences,
    prepare,
    quantile_labels,
    random_walks,
    walk_gradient,
)
from zoo.graph.node.large_gt import EPSILON, BatchNorm, Codebook, LargeGT, LocalAttention, _names

GOLDEN = Path(__file__).parent.parent / "golden" / "large_gt.safetensors"
FAST = {"pos_enc": 4, "walks": 1, "walk_length": 4, "context": 2}


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> bool:
    return float((ours.detach() - theirs).abs().max()) <= tolerance * float(theirs.abs().max().clamp(min=1e-12))


def quiet(model: Any) -> Any:
    model.log = lambda *a, **k: None  # no trainer
    return model


def tiny(**overrides: Any) -> LargeGT:
    sizes = {"in_features": 5, "num_classes": 3, "num_nodes": 20, "global_dim": 4, "num_centroids": 6}
    return quiet(LargeGT.from_variant("tiny", **{**sizes, **overrides}))


def still(**overrides: Any) -> LargeGT:
    """Without dropout."""
    return tiny(dropout=0.0, local_dropout=0.0, **overrides)


def batch_of(
    size: int = 6, nodes: int = 20, k: int = 4, seed: int = 0, dtype: Any = torch.float32
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    node = torch.randperm(nodes, generator=generator)[:size]
    tokens = torch.randint(nodes, (size, k), generator=generator)
    tokens[:, 0] = node
    return {
        "features": torch.randn(nodes, 3, 5, generator=generator).to(dtype),
        "tokens": tokens,
        "pos_enc": torch.randn(size, 4, generator=generator).to(dtype),
        "node": node,
        "y": torch.randint(3, (size,), generator=generator),
    }


# ---- parity with the authors' code -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "local", "global"])
def test_golden(kind: str) -> None:
    golden = {k.removeprefix(f"{kind}."): v for k, v in load_file(GOLDEN).items() if k.startswith(f"{kind}.")}
    content = {k.removeprefix("weights."): v for k, v in golden.items() if k.startswith("weights.")}
    hyperparameters, state = LargeGT.convert_state_dict({"model": content})
    book = {"num_nodes": 20, "num_centroids": 7, "global_dim": 4} if kind != "local" else {}
    assert hyperparameters == {
        **{"in_features": 5, "num_classes": 3, "conv_type": kind, "width": 6, "heads": 2, "norm": "batch"},
        **book,
    }
    model = quiet(LargeGT(**hyperparameters, dropout=0.0, local_dropout=0.0, authors_key_gradient=True))
    model.load_state_dict(state)
    batch = {key: golden[key] for key in ("features", "tokens", "pos_enc", "node", "y")}
    single = {key: value.float() if value.is_floating_point() else value for key, value in batch.items()}
    with torch.no_grad():
        assert close(model.eval().logits(single).double(), golden["evaluated"])
    model.double().load_state_dict(state)  # weights after a step are compared in the precision they were recorded in
    optimizer = model.train().configure_optimizers()
    loss = model.training_step(batch, 0)
    assert close(loss, golden["loss"])
    loss.backward()
    own, gradients, stepped = dict(model.named_parameters()), {}, {}
    for key, name in _names(kind, "batch").items():
        expected = golden[f"stepped.{key}"]
        if name.startswith("codebook."):  # which has moved in that step
            assert close(model.state_dict()[name].double(), expected.double()), name
            assert not torch.equal(expected, content[key])
        elif name in own:  # a bias before a batch norm has a gradient that is all rounding: layer by layer
            pairs = (own[name].grad, golden[f"gradient.{key}"]), (own[name], expected)
            for found, (a, b) in zip((gradients, stepped), pairs, strict=True):
                b = b[:, b.shape[1] // 2 :] if name == "local.score.weight" else b
                found.setdefault(name.rpartition(".")[0], []).append((a, b.flatten()))
    optimizer.step()
    for found in (gradients, stepped):
        for layer, parts in found.items():
            ours, theirs = zip(*parts, strict=True)
            assert close(torch.cat([t.detach().flatten() for t in ours]), torch.cat(theirs)), layer


def test_what_cannot_be_converted() -> None:
    content = {
        k.removeprefix("full.weights."): v for k, v in load_file(GOLDEN).items() if k.startswith("full.weights.")
    }
    with pytest.raises(ZooError, match=r"missing \['fc_in_seq.0.weight'\], unexpected nothing"):
        LargeGT.convert_state_dict({k: v for k, v in content.items() if k != "fc_in_seq.0.weight"})
    with pytest.raises(ZooError, match=r"unexpected \['more.weight'\]"):
        LargeGT.convert_state_dict({**content, "more.weight": torch.zeros(1)})
    with pytest.raises(ZooError, match=r"fc_out.weight is missing"):
        LargeGT.convert_state_dict({"weight": torch.zeros(1)})
    with pytest.raises(ZooError, match="Assignments below 0"):
        LargeGT.convert_state_dict({**content, "convs.0.c_idx": -content["convs.0.c_idx"] - 1})


# ---- local module ----------------------------------------------------------------------------------------------------


def attention_by_loops(module: LocalAttention, last: nn.Linear, tokens: Tensor) -> Tensor:
    """One sequence (L, h), head by head, row by row."""
    x = module.embed(last(tokens))
    y, width = module.norm(x), x.shape[1]
    heads = []
    for head in range(module.heads):
        part = slice(head * width, (head + 1) * width)
        q, k, v = (f(y)[:, part] for f in (module.query, module.key, module.value))
        rows = []
        for i in range(len(y)):
            weight = torch.stack([(q[i] @ k[j]) / math.sqrt(width) for j in range(len(y))]).softmax(0)
            rows.append(sum(weight[j] * v[j] for j in range(len(y))))
        heads.append(torch.stack(rows))
    o = module.output_norm(module.residual(x) + module.output(torch.cat(heads, 1)))
    scores = torch.stack([(module.score.weight[0] * o[t]).sum() for t in range(1, len(o))])
    return o[0] + sum(s * o[t + 1] for t, s in enumerate(scores.softmax(0)))


@pytest.mark.parametrize("train", [True, False])
def test_local_attention_against_loops(train: bool) -> None:
    torch.manual_seed(0)
    model = still(conv_type="local").double().train(train)
    for p in model.parameters():  # the start has nearly uniform attention
        nn.init.normal_(p, 0, 0.5)
    batch = batch_of(dtype=torch.float64)
    hidden = model.token_input(batch["features"]).relu()
    expected = [attention_by_loops(model.local, model.token_last, hidden[row].flatten(0, 1)) for row in batch["tokens"]]
    assert close(model._local(batch["features"], batch["tokens"]), torch.stack(expected), 1e-12)


def test_the_order_of_a_sequence_does_not_matter_but_its_first_node_does() -> None:
    torch.manual_seed(0)
    model, batch = tiny().eval(), batch_of(k=5)
    expected = model.logits(batch)
    mixed = {**batch, "tokens": batch["tokens"][:, [0, 3, 1, 4, 2]]}
    assert close(model.logits(mixed), expected, 1e-5)
    other = {**batch, "tokens": batch["tokens"][:, [1, 0, 2, 3, 4]]}
    assert not close(model.logits(other), expected, 1e-3)


def test_the_table_of_features_may_hold_others_in_any_order() -> None:
    torch.manual_seed(0)
    model, batch = tiny().eval(), batch_of()
    order = torch.randperm(25)
    table = torch.cat((batch["features"], torch.randn(5, 3, 5)))[order]
    moved = {**batch, "features": table, "tokens": order.argsort()[batch["tokens"]]}
    assert close(model.logits(moved), model.logits(batch), 1e-6)


def test_dropout_differs_from_token_to_token() -> None:
    torch.manual_seed(0)
    model = tiny(conv_type="local", dropout=0.5, local_dropout=0.0).train()
    batch = batch_of(k=3)
    batch["tokens"][:] = batch["tokens"][:, :1]  # the same node three times
    seen = []
    model.local.norm.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    model._local(batch["features"], batch["tokens"])
    first, second = seen[0][:, 0], seen[0][:, 3]  # the same feature of the same node
    assert not close(first, second, 1e-3)


# ---- codebook --------------------------------------------------------------------------------------------------------


def book(centroids: int = 4, width: int = 3, nodes: int = 9, **more: Any) -> Codebook:
    torch.manual_seed(0)
    return Codebook(centroids, width, nodes, **more).double()


def update_by_loops(book: Codebook, x: Tensor, node: Tensor, norm: nn.BatchNorm1d) -> dict[str, Tensor]:
    """What an update leaves, centroid by centroid; torch's batch norm for the normalisation."""
    z = norm(x)
    nearest = [min(range(len(book.size)), key=lambda c: float((v - book.embedding[c]).square().sum())) for v in z]
    size = torch.stack([0.99 * s + 0.01 * nearest.count(c) for c, s in enumerate(book.size)])
    n = size.sum()
    size = (size + 1e-5) / (n + len(size) * 1e-5) * n
    total = book.total * 0.99
    for v, c in zip(z, nearest, strict=True):
        total[c] += 0.01 * v
    embedding = torch.stack([total[c] / size[c] for c in range(len(size))])
    assigned = book.assigned.clone()
    for i, c in reversed(list(zip(node.tolist(), nearest, strict=True))):  # the first of a node that comes twice
        assigned[i] = c
    return {
        "size": size,
        "total": total,
        "embedding": embedding,
        "centroids": embedding * (norm.running_var + 1e-5).sqrt() + norm.running_mean,
        "mean": norm.running_mean,
        "variance": norm.running_var,
        "assigned": assigned,
        "count": torch.bincount(assigned, minlength=len(size)),
    }


@pytest.mark.parametrize("authors_start", [False, True])
def test_codebook_against_loops(authors_start: bool) -> None:
    ours = book(authors_start=authors_start)
    norm = nn.BatchNorm1d(3, affine=False).double()
    for step in range(4):
        x = torch.randn(5 + step, 3, dtype=torch.float64) * 3 + 1
        node = torch.tensor([3, 1, 3, 8, 0, 1, 2, 3])[: 5 + step]
        expected = update_by_loops(ours, x, node, norm)
        ours.update(x, node)
        for key, value in expected.items():
            assert close(getattr(ours, key).double(), value.double(), 1e-9), (step, key)


def test_codebook_by_hand() -> None:
    ours = book(2, 1, 4)
    for name, value in {"embedding": [[-1.0], [1.0]], "total": [[-2.0], [4.0]], "size": [2.0, 4.0]}.items():
        getattr(ours, name).copy_(torch.tensor(value))
    ours.assigned.copy_(torch.tensor([0, 0, 0, 1]))
    ours.recount()
    ours.update(torch.tensor([[3.0], [5.0], [7.0]]).double(), torch.tensor([0, 1, 2]))
    z = math.sqrt(4 / (8 / 3 + EPSILON))  # mean 5, variance 8 / 3
    assert ours.mean.item() == pytest.approx(0.1 * 5) and ours.variance.item() == pytest.approx(0.9 + 0.1 * 4)
    # -z falls to the first centroid; 0 and z lie nearer to the second (0 lies between: the first of equals)
    assert ours.assigned.tolist() == [0, 0, 1, 1] and ours.count.tolist() == [2, 2]
    assert ours.total.flatten().tolist() == pytest.approx([-2 * 0.99 - 0.01 * z, 4 * 0.99 + 0.01 * z])
    assert ours.size.tolist() == pytest.approx([2 * 0.99 + 0.02, 4 * 0.99 + 0.01], rel=1e-5)


def test_only_training_with_numbers_moves_the_codebook() -> None:
    torch.manual_seed(0)
    model, batch = tiny(), batch_of()
    before = {k: v.clone() for k, v in model.codebook.state_dict().items()}

    def same() -> list[bool]:
        return [torch.equal(v, before[k]) for k, v in model.codebook.state_dict().items()]

    model.eval().logits(batch)
    model.predict_step(batch, 0)
    model.validation_step(batch, 0)
    model.train()(batch["features"], batch["tokens"], batch["pos_enc"])
    assert all(same())
    model.logits(batch)
    assert not any(same())


def test_counts_follow_the_assignments() -> None:
    torch.manual_seed(0)
    model = tiny()
    for step in range(5):
        model.logits(batch_of(seed=step))
        assert model.codebook.count.tolist() == torch.bincount(model.codebook.assigned, minlength=6).tolist()
    again = tiny()
    assert "codebook.count" not in model.state_dict()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.codebook.count, model.codebook.count)
    assert pickle.loads(pickle.dumps(again.codebook)).count.tolist() == again.codebook.count.tolist()


def test_centroids_weigh_as_many_nodes_as_they_have() -> None:
    """Attention to B centroids with counts is plain attention to N nodes, each at its centroid's place."""
    torch.manual_seed(0)
    model = still(conv_type="global").double().eval()
    attend, codebook = model.attend, model.codebook
    codebook.assigned.copy_(torch.tensor([0, 2, 5])[torch.randint(3, (20,))])  # three centroids are empty
    codebook.recount()
    query = torch.randn(6, 8).double()
    own = codebook.centroids[codebook.assigned.long()]
    expected = []
    for head in range(2):
        part = slice(16 * head, 16 * head + 16)
        q, k, v = attend.query(query)[:, part], attend.key(own)[:, part], attend.value(own[:, :4])[:, part]
        expected.append((q @ k.T / 4).softmax(1) @ v)
    found = attend(query, codebook.centroids, codebook.centroids[:, :4], codebook.count)
    assert close(found, torch.cat(expected, 1), 1e-12)
    codebook.centroids[1] = 1e6  # an empty one
    again = attend(query, codebook.centroids, codebook.centroids[:, :4], codebook.count)
    assert torch.equal(again, found)


def test_the_authors_start_throws_unused_centroids_away() -> None:
    x, node = torch.randn(8, 3).double(), torch.arange(8)
    far = {}
    for theirs in (True, False):
        ours = book(64, 3, 9, authors_start=theirs)
        ours.update(x, node)
        far[theirs] = float(ours.centroids.norm(dim=1).max())
        if not theirs:  # a centroid without queries stays where it was
            unused = torch.bincount(ours._nearest(x)[1], minlength=64) == 0
            assert bool(unused.any())
    assert far[True] > 1e3 and far[False] < 10


def test_gradients_are_those_of_the_codebook_that_was_used() -> None:
    torch.manual_seed(0)
    state, batch = still().double().state_dict(), batch_of(dtype=torch.float64)
    gradients = []
    for theirs, moves in ((False, True), (False, False), (True, True)):
        model = still(authors_key_gradient=theirs).double()
        model.load_state_dict(state)
        if not moves:
            model.codebook.update = lambda x, node: None
        model.training_step(batch, 0).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    ours, held, theirs = gradients
    assert all(torch.equal(ours[name], held[name]) for name in ours)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == ["attend.key.weight"]


def _rank(rank: int, path: str, parts: list[Any], queue: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    ours = book()
    for x, node in parts[rank]:
        ours.update(x, node)
    queue.put((rank, {k: v.numpy() for k, v in {**ours.state_dict(), "count": ours.count}.items()}))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_two_ranks_keep_one_codebook(tmp_path: Path) -> None:
    """Batches of different sizes, one of them a single node, and a node on both ranks."""
    generator = torch.Generator().manual_seed(1)
    sizes = ((3, 5), (4, 1))
    nodes = torch.tensor([3, 1, 0, 1, 5, 6, 7, 8]), torch.tensor([4, 2, 3, 8, 2])
    xs = [torch.randn(sum(pair), 3, generator=generator, dtype=torch.float64) for pair in sizes]
    parts: list[list[Any]] = [[], []]
    expected = book()
    for x, node, (a, _) in zip(xs, nodes, sizes, strict=True):
        expected.update(x, node)
        parts[0].append((x[:a], node[:a]))
        parts[1].append((x[a:], node[a:]))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    ranks = [context.Process(target=_rank, args=(r, str(tmp_path / "store"), parts, queue)) for r in (0, 1)]
    for process in ranks:
        process.start()
    found = dict(queue.get(timeout=60) for _ in ranks)
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    for rank, (key, value) in itertools.product((0, 1), {**expected.state_dict(), "count": expected.count}.items()):
        assert close(torch.from_numpy(found[rank][key]).double(), value.double(), 1e-12), (rank, key)


# ---- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "local", "global"])
@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
def test_a_batch_of_one(kind: str, norm: str) -> None:
    torch.manual_seed(0)
    model, batch = still(conv_type=kind, norm=norm), batch_of(1)
    expected = model.eval().logits(batch)
    assert expected.shape == (1, 3)
    before = {k: v.clone() for k, v in model.state_dict().items() if "running" in k}
    loss = model.train().training_step(batch, 0)
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())
    assert all(torch.equal(before[k], model.state_dict()[k]) for k in before)
    assert all(b.isfinite().all() for b in model.buffers() if b.is_floating_point())


def test_batch_norm_is_torchs_beyond_one() -> None:
    ours, theirs, x = BatchNorm(4), nn.BatchNorm1d(4), torch.randn(5, 4)
    assert torch.equal(ours(x), theirs(x)) and torch.equal(ours.running_var, theirs.running_var)


def test_loss_leaves_out_unknown_labels() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0], [9.0, 0.0, 0.0]])
    assert float(LargeGT.loss(logits, torch.tensor([1, -1]))) == pytest.approx(math.log(3))


def test_accuracy_is_a_mean_over_nodes() -> None:
    model, logged = tiny(), {}
    model.log = lambda name, value, **k: logged.update({name: (value, k["batch_size"])})
    model.logits = lambda batch: F.one_hot(torch.tensor([0, 1, 2, 0]), 3).float()
    model.test_step({"y": torch.tensor([0, 1, 1, -1])}, 0)
    assert float(logged["test/accuracy"][0]) == pytest.approx(2 / 3) and logged["test/accuracy"][1] == 3


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"conv_type": "both"}, "conv_type is 'both'; it must be one of full, local, global"),
        ({"norm": "group"}, "norm is 'group'"),
        ({"num_centroids": 0}, "num_centroids is 0"),
        ({"num_nodes": 0}, "num_nodes is 0"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        tiny(**arguments)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"features": torch.zeros(20, 3, 4)}, r"'features' has shape \(20, 3, 4\); expected .*, 5\)"),
        ({"features": torch.zeros(20, 5)}, "'features' has shape"),
        ({"tokens": torch.zeros(6, 1, dtype=torch.int64)}, "K >= 2"),
        ({"tokens": torch.zeros(6, 4, dtype=torch.int32)}, "type torch.int32; expected .* int64"),
        ({"tokens": torch.full((6, 4), 20)}, "'tokens' names 20; expected 0 to 19"),
        ({"tokens": torch.full((6, 4), -1)}, "'tokens' names -1"),
        ({"pos_enc": torch.zeros(6, 3)}, r"'pos_enc' is of shape \(6, 3\); expected \(6, 4\): global_dim is 4"),
        ({"pos_enc": None}, "'pos_enc' is missing"),
        ({"node": torch.full((6,), 20)}, "'node' names 20"),
        ({"node": torch.zeros(5, dtype=torch.int64)}, r"'node' has shape \(5,\)"),
    ],
)
def test_wrong_inputs(change: dict[str, Any], match: str) -> None:
    batch = {**batch_of(), **change}
    with pytest.raises(ValueError, match=match):
        tiny()(*(batch[key] for key in ("features", "tokens", "pos_enc", "node")))


@pytest.mark.parametrize("key", ["features", "pos_enc"])
def test_nan_is_refused(key: str) -> None:
    batch = batch_of()
    batch[key].view(-1)[3] = torch.nan
    with pytest.raises(ValueError, match=f"'{key}' holds 1 values"):
        tiny().predict(batch["features"], batch["tokens"], batch["pos_enc"])


# ---- edges and sequences ---------------------------------------------------------------------------------------------


def random_graph(n: int = 30, edges: int = 60, seed: int = 0, alone: int = 2) -> Tensor:
    """Directed, with repeats and self-loops; the last nodes have no edges."""
    return torch.randint(n - alone, (2, edges), generator=torch.Generator().manual_seed(seed))


def neighbours(edges: Tensor, n: int) -> list[set[int]]:
    found: list[set[int]] = [set() for _ in range(n)]
    for source, target in edges.T.tolist():
        if source != target:
            found[source].add(target)
    return found


@given(st.integers(1, 9), st.integers(0, 40), st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_rows(n: int, count: int, seed: int) -> None:
    edges = torch.randint(n, (2, count), generator=torch.Generator().manual_seed(seed))
    rows, near = Rows(edges, n), neighbours(edges, n)
    assert [rows.of(torch.tensor([i])).tolist() for i in range(n)] == [sorted(s) for s in near]
    assert rows.second().tolist() == [sum(len(near[j]) for j in s) for s in near]
    assert rows.degree.tolist() == [len(s) for s in near]


def test_unknown_nodes_are_refused() -> None:
    with pytest.raises(ZooError, match="names node 9; nodes are 0 to 4"):
        Rows(torch.tensor([[0], [9]]), 5)
    with pytest.raises(ZooError, match="names node -1"):
        Rows(torch.tensor([[0], [-1]]), 5)


@pytest.mark.parametrize("chunk", [40, 2**22])
def test_exact_sequences_come_from_the_multiset(chunk: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(data_tokens._chunks, "__defaults__", (chunk,))
    n, k, edges = 40, 9, random_graph(40, 130)
    near = neighbours(edges, n)
    out = torch.full((n, k), -1, dtype=torch.int32)
    exact_sequences(Rows(edges, n), k, torch.Generator().manual_seed(0), out)
    kinds = Counter()
    for i, row in enumerate(out.tolist()):
        two = set().union(*(near[j] for j in near[i]))
        multiset, drawn = Counter([*near[i], *two]), Counter(row[1:])
        assert row[0] == i and drawn.total() == k - 1
        if multiset.total() >= k - 1:
            assert drawn <= multiset  # without replacement
            kinds["chosen"] += 1
        elif multiset:
            times = (k - 1) // multiset.total()
            assert all(drawn[j] in (c * times, *range(c * times, c * times + c + 1)) for j, c in multiset.items())
            assert set(drawn) == set(multiset) and set(row[1 : 1 + len(near[i])]) == near[i]  # one edge away first
            kinds["repeated"] += 1
        else:
            assert len(drawn) == k - 1 and all(0 <= j < n for j in drawn)
            kinds["alone"] += 1
    assert min(kinds[key] for key in ("chosen", "repeated", "alone")) >= 2


def test_exact_sequences_choose_evenly() -> None:
    """A star of stars: 4 nodes one edge away, 12 two edges away (and the node itself), each as often as any other."""
    edges = [(0, j) for j in range(1, 5)] + [(j, 5 + 3 * (j - 1) + m) for j in range(1, 5) for m in range(3)]
    edges = torch.tensor([*edges, *[(b, a) for a, b in edges]]).T
    rows, generator = Rows(edges, 17), torch.Generator().manual_seed(0)
    counts, out = torch.zeros(17), torch.empty(17, 6, dtype=torch.int32)
    for _ in range(600):
        exact_sequences(rows, 6, generator, out)
        counts += torch.bincount(out[0, 1:], minlength=17)
    expected = 600 * 5 / 17  # all 17 are in the list, itself among them
    assert float((counts - expected).abs().max()) < 5 * math.sqrt(expected)


def path_list(near: list[list[int]], i: int) -> list[int]:
    return [*near[i], *(end for j in near[i] for end in near[j])]


def test_path_sequences_use_up_the_list_evenly() -> None:
    n, k, edges = 40, 30, random_graph(40, 100)
    near, rows = [sorted(s) for s in neighbours(edges, n)], Rows(edges, n)
    out = torch.full((n, k), -1, dtype=torch.int32)
    path_sequences(rows, k, torch.Generator().manual_seed(0), out)
    for i, row in enumerate(out.tolist()):
        entries = path_list(near, i)
        assert row[0] == i and min(row) >= 0 and max(row) < n
        if entries:
            # entry number e is drawn at least floor(share) - 1 times and at most ceil(share) + 1, in the list's order
            share, drawn, multiset = (k - 1) / len(entries), Counter(row[1:]), Counter(entries)
            assert set(drawn) <= set(multiset)
            for j, times in multiset.items():
                assert times * (math.floor(share) - 1) <= drawn[j] <= times * (math.ceil(share) + 1)
            assert row[1] == entries[0] or share < 1
        else:
            assert len(set(row[1:])) == k - 1


def test_path_sequences_weigh_nodes_by_paths() -> None:
    n, k, edges = 25, 7, random_graph(25, 90)
    rows, generator = Rows(edges, n), torch.Generator().manual_seed(1)
    a = torch.zeros(n, n)
    a[edges[0], edges[1]] = 1
    a.fill_diagonal_(0)
    expected = a + a @ a
    counts, out, rounds = torch.zeros(n, n), torch.empty(n, k, dtype=torch.int32), 800
    for _ in range(rounds):
        path_sequences(rows, k, generator, out)
        counts += torch.stack([torch.bincount(row, minlength=n) for row in out[:, 1:]])
    busy = expected.sum(1) > 0
    share = expected[busy] / expected[busy].sum(1, keepdim=True)
    found = counts[busy] / (rounds * (k - 1))
    bound = 5 * (share / (rounds * (k - 1))).sqrt() + 1e-9
    assert bool(((found - share).abs() <= bound).all())
    # ... and not evenly, as the exact sampler does: some node two edges away is reached by several paths
    even = (expected[busy] > 0) / (expected[busy] > 0).sum(1, keepdim=True)
    assert float((found - even).abs().max()) > 0.05


def test_path_sequences_of_some_nodes_and_in_chunks(monkeypatch: Any) -> None:
    rows, nodes = Rows(random_graph(30, 250, alone=0), 30), torch.tensor([7, 3, 29, 3])
    assert int(rows.degree.min()) > 0  # nodes without edges draw from the generator by themselves
    out = torch.empty(4, 5, dtype=torch.int32)
    path_sequences(rows, 5, torch.Generator().manual_seed(0), out, nodes)
    assert out[:, 0].tolist() == nodes.tolist()
    whole, parts = (torch.empty(30, 5, dtype=torch.int32) for _ in range(2))
    path_sequences(rows, 5, torch.Generator().manual_seed(0), whole)
    monkeypatch.setattr(data_tokens._chunks, "__defaults__", (50,))
    path_sequences(rows, 5, torch.Generator().manual_seed(0), parts)
    assert torch.equal(whole, parts)


def test_a_graph_without_edges() -> None:
    rows, generator = Rows(torch.zeros(2, 0, dtype=torch.int64), 3), torch.Generator().manual_seed(0)
    for draw in (exact_sequences, path_sequences):
        out = torch.full((3, 5), -1, dtype=torch.int32)
        draw(rows, 5, generator, out)
        assert out[:, 0].tolist() == [0, 1, 2] and int(out.min()) >= 0 and int(out.max()) <= 2
    assert random_walks(rows, torch.tensor([2, 0]), 3, generator).tolist() == [[2, 2, 2], [0, 0, 0]]
    assert node2vec(rows, 4, generator, 1, 3, 2).isfinite().all()


@pytest.mark.parametrize("chunk", [25, 2**22])
def test_averages_against_a_dense_matrix(chunk: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(data_tokens._chunks, "__defaults__", (chunk,))
    n, edges = 30, random_graph(30, 90)
    a = torch.eye(n, dtype=torch.float64)
    for i, near in enumerate(neighbours(edges, n)):
        for j in near:
            a[i, j] = 1
    a = a.sum(0).rsqrt()[:, None] * a * a.sum(1).rsqrt()
    features = torch.zeros(n, 3, 4, dtype=torch.float64)
    features[:, 0] = torch.randn(n, 4)
    averages(Rows(edges, n), features, 2)
    x = features[:, 0]
    assert close(features[:, 1], a @ x, 1e-12) and close(features[:, 2], a @ a @ x, 1e-12)


# ---- positional encodings --------------------------------------------------------------------------------------------


def windows(walk: Tensor, context: int) -> Tensor:
    """As torch_geometric's Node2Vec cuts them."""
    return torch.cat([walk[:, j : j + context] for j in range(walk.shape[1] - context + 1)])


def skip_gram(table: Tensor, good: Tensor, bad: Tensor) -> Tensor:
    """The loss of torch_geometric's Node2Vec, for windows."""
    found = []
    for walk, sign in ((good, 1), (bad, -1)):
        scores = (table[walk[:, :1]] * table[walk[:, 1:]]).sum(-1)
        found.append(-F.logsigmoid(sign * scores).mean())
    return found[0] + found[1]


def test_walk_gradient_against_autograd() -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(12, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    good, bad = torch.randint(12, (2, 7, 9), generator=generator)
    skip_gram(table, windows(good, 4), windows(bad, 4)).backward()
    found = torch.zeros(12, 5, dtype=torch.float64)
    for walk, near in ((good, True), (bad, False)):
        found.index_add_(0, walk.flatten(), walk_gradient(table.detach()[walk], 4, near).flatten(0, 1))
    assert close(found, table.grad, 1e-12)


def test_node2vec_against_sparse_adam(monkeypatch: Any) -> None:
    """The same walks through torch's embedding, autograd and SparseAdam."""
    rows, walks, seen = Rows(random_graph(30, 90), 30), [], []
    own, draw = random_walks, torch.randint
    monkeypatch.setattr(data_tokens, "random_walks", lambda *a: walks.append(own(*a)) or walks[-1].clone())
    monkeypatch.setattr(torch, "randint", lambda *a, **k: seen.append(draw(*a, **k)) or seen[-1])
    found = node2vec(rows, 6, torch.Generator().manual_seed(3), 2, 6, 3, epochs=2, batch=8)
    assert len(walks) == len(seen) == 8
    start = torch.empty(30, 6).normal_(generator=torch.Generator().manual_seed(3))
    table = nn.Embedding.from_pretrained(start, freeze=False, sparse=True)
    optimizer = torch.optim.SparseAdam(list(table.parameters()), lr=0.01)
    for good, bad in zip(walks, seen, strict=True):
        loss = 0
        for walk, sign in ((good, 1), (bad, -1)):
            vectors = table(windows(walk, 3))
            loss = loss - F.logsigmoid(sign * (vectors[:, :1] * vectors[:, 1:]).sum(-1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert close(found, table.weight.detach(), 1e-5)


def test_walks_follow_edges() -> None:
    edges = random_graph(30, 60)
    near = neighbours(edges, 30)
    walks = random_walks(Rows(edges, 30), torch.arange(30).repeat(5), 8, torch.Generator().manual_seed(0))
    assert walks[:, 0].tolist() == list(range(30)) * 5
    for a, b in itertools.pairwise(walks.T.tolist()):
        assert all(v in near[u] or (not near[u] and v == u) for u, v in zip(a, b, strict=True))


def test_node2vec_tells_two_halves_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    half = torch.randint(20, (2, 100), generator=generator)
    edges = torch.cat((half, half + 20), 1)
    encodings = node2vec(Rows(torch.cat((edges, edges.flip(0)), 1), 40), 8, generator, 5, 10, 5, epochs=40, batch=10)
    similar = F.normalize(encodings) @ F.normalize(encodings).T
    within = (similar[:20, :20].mean() + similar[20:, 20:].mean()) / 2
    assert float(within) > float(similar[:20, 20:].mean()) + 0.3


# ---- the DataModule --------------------------------------------------------------------------------------------------


def test_labels_are_the_commonest_block_within_three_hops() -> None:
    graph = block_ball(3, blocks=3, size=12, degree=2.0)
    near = neighbours(graph["edge_index"], 36)
    for i in range(36):
        ball = {i}
        for _ in range(3):
            ball |= set().union(*(near[j] for j in ball))
        counts = Counter(j // 12 for j in ball)
        assert counts[int(graph["y"][i])] == max(counts.values())


def test_batches_hold_what_they_say() -> None:
    data = LargeGTTokenDataModule(tokens=6, batch_size=50, **FAST)
    data.setup()
    assert data.describe() == {"in_features": 8, "num_classes": 8, "num_nodes": 2000, "global_dim": 4}
    assert [len(data.dataset(split)) for split in ("train", "val", "test")] == [1000, 500, 500]
    whole, batch = data.dataset("train"), next(iter(data.train_dataloader()))
    node = batch["node"]
    ids = whole.tokens[node].long()
    assert batch["tokens"].shape == (50, 6) and torch.equal(ids[:, 0], node)
    assert torch.equal(batch["features"][batch["tokens"]], whole.features[ids])
    assert len(batch["features"]) == len(ids.unique())
    assert torch.equal(batch["pos_enc"], whole.pos_enc[node]) and torch.equal(batch["y"], whole.y[node])
    assert batch["name"] == [str(i) for i in node.tolist()]
    seen = torch.cat([b["node"] for b in data.train_dataloader()])
    assert torch.equal(seen.sort().values, whole.masks["train_mask"].nonzero().flatten())


def test_whole_graph_form_is_the_same_graph() -> None:
    whole = LargeGTTokenDataModule(form="graph", seed=1)
    graph = next(iter(whole.train_dataloader()))
    data = LargeGTTokenDataModule(tokens=3, seed=1, hops=0, **FAST)
    tokens = data.dataset("test")
    assert torch.equal(tokens.features[:, 0], graph["x"]) and torch.equal(tokens.y, graph["y"])
    assert torch.equal(tokens.chosen, graph["test_mask"].nonzero().flatten())
    assert tokens.features.shape == (2000, 1, 8)
    assert whole.describe() == {"in_features": 8, "num_classes": 8}


def test_torch_geometric_loader() -> None:
    pytest.importorskip("torch_geometric")
    options = {"tokens": 6, "batch_size": 50, **FAST}
    ours, theirs = LargeGTTokenDataModule(**options), LargeGTTokenDataModule(loader="torch_geometric", **options)
    model = quiet(recipe.build(LargeGT, ours, {"variant": "tiny"}))
    for a, b in zip(ours.train_dataloader(), theirs.train_dataloader(), strict=True):
        assert torch.equal(a["node"], b.node) and torch.equal(a["y"], b.y) and a["name"] == b.name
        assert torch.equal(a["features"][a["tokens"]], b.features[b.tokens])
        assert torch.equal(a["pos_enc"], b.pos_enc) and b.batch_size == len(a["node"])
        assert torch.equal(b.n_id[: b.batch_size], b.node)
        source, target = b.edge_index
        assert torch.equal(source.view(b.batch_size, 5), b.tokens[:, 1:])
        assert target.view(b.batch_size, 5)[:, 2].tolist() == list(range(b.batch_size))
    assert close(model.eval().logits(b), model.logits(a), 1e-6)
    assert quiet(model.train()).training_step(b, 0).isfinite()
    own = geometric_loader(ours.dataset("val"), batch_size=100, shuffle=True)
    assert len(own) == 5 and sum(len(batch.node) for batch in own) == 500


@pytest.mark.parametrize("loader", ["zoo", "torch_geometric"])
def test_trains_and_predicts(loader: str, tmp_path: Path) -> None:
    data = LargeGTTokenDataModule(tokens=4, batch_size=250, loader=loader, **FAST)
    model = recipe.build(LargeGT, data, {"variant": "tiny"})
    quietly = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = zoo.Trainer(default_root_dir=tmp_path, max_epochs=1, **quietly)
    trainer.fit(model, datamodule=data)
    (found,) = trainer.test(model, datamodule=data, verbose=False)
    assert found.keys() == {"test/loss", "test/accuracy"}
    out = trainer.predict(model, datamodule=data)
    files = data.write(out, tmp_path / "predicted.csv")
    lines = files[0].read_text().splitlines()
    assert lines[0] == "node,class,probability" and len(lines) == 501


def test_torch_geometric_loader_resumes_within_an_epoch(tmp_path: Path) -> None:
    pytest.importorskip("torch_geometric")
    quietly = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    states = []
    for steps, start in ((3, None), (5, None), (5, tmp_path / "3" / "checkpoints" / "last.ckpt")):
        data = LargeGTTokenDataModule(tokens=4, batch_size=100, loader="torch_geometric", **FAST)
        torch.manual_seed(0 if start is None else 1)  # all of it comes from the checkpoint
        model = recipe.build(LargeGT, data, {"variant": "tiny"})
        folder = tmp_path / (str(steps) if start is None else "resumed")
        trainer = zoo.Trainer(default_root_dir=folder, max_steps=steps, limit_val_batches=0, **quietly)
        trainer.fit(model, datamodule=data, ckpt_path=start)
        states.append(model.state_dict())
    assert all(torch.equal(value, states[2][key]) for key, value in states[1].items())
    assert not torch.equal(states[0]["mix.weight"], states[1]["mix.weight"])


def test_a_users_own_graph(tmp_path: Path) -> None:
    (tmp_path / "nodes.csv").write_text("name,a,b\nann,1,2\nbob,3,4\ncleo,0,1\n")
    (tmp_path / "edges.csv").write_text("from,to\nann,bob\n")
    data = LargeGTTokenDataModule(tokens=3, **FAST).from_files(tmp_path)
    (batch,) = data.predict_dataloader()
    assert batch["name"] == ["ann", "bob", "cleo"] and "y" not in batch and "node" not in batch
    assert batch["tokens"][0].tolist() == [0, 1, 0]  # bob one edge away, and back
    model = tiny(in_features=2)
    assert model.predict_step(batch, 0)["probability"].shape == (3, 3)


def test_prepared_once_and_mapped(tmp_path: Path, monkeypatch: Any) -> None:
    options = {"tokens": 5, "cache": str(tmp_path), **FAST}
    first = LargeGTTokenDataModule(**options).dataset("train")
    files = sorted(tmp_path.iterdir())
    assert [f.name.split("-")[0] for f in files] == ["features", "node2vec", "tokens"]
    for name in ("averages", "node2vec", "exact_sequences"):
        monkeypatch.setattr(data_tokens, name, lambda *a, **k: pytest.fail("made again"))
    second = LargeGTTokenDataModule(**options).dataset("train")
    assert all(torch.equal(getattr(first, k), getattr(second, k)) for k in ("features", "tokens", "pos_enc"))
    monkeypatch.undo()
    memory = LargeGTTokenDataModule(tokens=5, **FAST).dataset("train")
    assert all(torch.equal(getattr(first, k), getattr(memory, k)) for k in ("features", "tokens", "pos_enc"))
    LargeGTTokenDataModule(**{**options, "seed": 1}).setup()
    assert len(list(tmp_path.iterdir())) == 6
    files[0].write_bytes(files[0].read_bytes()[:200])
    with pytest.raises(ZooError, match="cannot be read: .* made anew"):
        LargeGTTokenDataModule(**options).setup()


def test_an_interrupted_preparation_leaves_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    def stop(*a: Any, **k: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(data_tokens, "averages", stop)
    with pytest.raises(KeyboardInterrupt):
        LargeGTTokenDataModule(tokens=5, cache=str(tmp_path), **FAST).setup()
    assert [f.name.split("-")[0] for f in tmp_path.iterdir()] == ["tokens"]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"tokens": 1}, "tokens is 1, .*; expected at least 2"),
        ({"hops": 3}, "hops 3"),
        ({"sampler": "all"}, "sampler is 'all'; it must be one of auto, exact, paths"),
        ({"form": "rows"}, "form is 'rows'"),
        ({"loader": "dgl"}, "loader is 'dgl'"),
        ({"walk_length": 5, "context": 6}, "walks no shorter"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"walk_batch": 0}, "walk_batch 0"),
    ],
)
def test_wrong_data_arguments(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        LargeGTTokenDataModule(**arguments)


def test_features_that_are_not_finite() -> None:
    x = torch.zeros(3, 2)
    x[1, 0] = torch.inf
    with pytest.raises(ValueError, match="'x' holds 1 values"):
        prepare({"x": x, "edge_index": torch.tensor([[0], [1]])}, tokens=3, pos_enc=0)


# ---- public layouts --------------------------------------------------------------------------------------------------


def prepared_content(n: int = 10, k: int = 3, f: int = 4) -> list[Any]:
    """What the authors' script saves: a list of lists, tensors, a scipy matrix, one-hot labels, three splits."""
    generator = torch.Generator().manual_seed(0)
    sequences = torch.cat((torch.arange(n)[:, None], torch.randint(n, (n, k - 1), generator=generator)), 1).tolist()
    x, context = torch.randn(n, f, generator=generator), torch.randn(n, 3, f, generator=generator)
    edges = random_graph(n, 30, alone=0)
    matrix = scipy.sparse.csr_matrix((np.ones(30), edges.numpy()), shape=(n, n))
    y = F.one_hot(torch.arange(n) % 3, 3)
    return [sequences, x, context, matrix, y, torch.arange(6), torch.tensor([6, 7]), torch.tensor([8, 9])]


def test_prepared_files(tmp_path: Path) -> None:
    content = prepared_content()
    (tmp_path / "data").mkdir()
    torch.save(tuple(content), tmp_path / "data" / "ogbn-products_sample_node_len_3.pt", pickle_protocol=4)
    data = LargeGTTokenDataModule(root=str(tmp_path), tokens=3, **FAST)
    train = data.dataset("train")
    assert torch.equal(train.tokens, torch.tensor(content[0], dtype=torch.int32))
    assert torch.equal(train.features, torch.cat((content[1][:, None], content[2][:, :2]), 1))
    assert train.y.tolist() == [i % 3 for i in range(10)] and train.chosen.tolist() == list(range(6))
    assert data.dataset("test").chosen.tolist() == [8, 9]
    assert train.pos_enc.shape == (10, 4)  # from the matrix in the file
    encodings = torch.randn(10, 4)
    torch.save(encodings, tmp_path / "data" / "ogbn-products_embedding_4.pt")
    again = LargeGTTokenDataModule(root=str(tmp_path), tokens=3, **FAST).dataset("train")
    assert torch.equal(again.pos_enc, encodings)
    torch.save(torch.randn(9, 4), tmp_path / "data" / "ogbn-products_embedding_4.pt")
    with pytest.raises(ZooError, match=r"Positional encodings have shape \(9, 4\); expected \(10, 4\)"):
        LargeGTTokenDataModule(root=str(tmp_path), tokens=3, **FAST).setup()


def test_prepared_files_of_papers100m(tmp_path: Path) -> None:
    sequences, x, context, *_ = prepared_content()
    label = torch.arange(10).float()[:, None] % 3
    label[4] = torch.nan
    splits = {"train": torch.arange(4), "valid": torch.tensor([5]), "test": torch.arange(6, 10)}
    content = {"nodes_in_seq": torch.tensor(sequences), "node_feat": x, "label": label, "split_idx": splits}
    path = tmp_path / "ogbn-papers100M_sample_node_len_3.pt"
    torch.save(content, path)
    options = {"root": str(tmp_path), "tokens": 3, "pos_enc": 0}
    with pytest.raises(FileNotFoundError, match="hop2token_feats.pt is missing"):
        LargeGTTokenDataModule(**options).setup()
    torch.save(context, tmp_path / "ogbn-papers100M_sample_node_len_3_hop2token_feats.pt")
    train = LargeGTTokenDataModule(**options).dataset("train")
    assert train.y.tolist() == [0, 1, 2, 0, -1, 2, 0, 1, 2, 0] and train.chosen.tolist() == [0, 1, 2, 3]
    assert train.pos_enc is None and torch.equal(train.features[:, 2], context[:, 1])
    with pytest.raises(ZooError, match="no edges to draw"):
        LargeGTTokenDataModule(**{**options, "pos_enc": 4}).setup()


class Runs:
    def __reduce__(self) -> Any:
        return os.mkdir, ("/nowhere/made/by/a/pickle",)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({0: [[0, 1, 99]] + [[i, 0, 1] for i in range(1, 10)]}, "name nodes 0 to 99; expected .* 0 to 9"),
        ({0: [[9 - i, 0, 1] for i in range(10)]}, "must begin with the node itself"),
        ({0: [[i, 0] for i in range(10)]}, r"Sequences of shape \(10, 2\)"),
        ({2: torch.zeros(10, 3, 5)}, "does not hold prepared sequences: averages have shape"),
        ({3: Runs()}, "cannot be read as a file of tensors"),
        ({0: "x"}, "does not hold prepared sequences"),
    ],
)
def test_broken_prepared_files(change: dict[int, Any], match: str, tmp_path: Path) -> None:
    content = prepared_content()
    for place, value in change.items():
        content[place] = value
    torch.save(content, tmp_path / "ogbn-products_sample_node_len_3.pt")
    with pytest.raises(ZooError, match=match):
        LargeGTTokenDataModule(root=str(tmp_path), tokens=3, **FAST).setup()


def write_patents(folder: Path, n: int = 12) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    content = {
        "edge_index": np.array([[0, 0, 1, 2, 5], [1, 2, 3, 4, 5]]),
        "node_feat": scipy.sparse.csc_matrix(generator.random((n, 3))),
        "num_nodes": n,
        "years": generator.integers(1960, 2000, (1, n)).astype(float),
    }
    scipy.io.savemat(folder / "snap_patents.mat", content)
    return content


def test_snap_patents(tmp_path: Path) -> None:
    content = write_patents(tmp_path)
    data = LargeGTTokenDataModule(root=str(tmp_path), tokens=4, **FAST)
    train = data.dataset("train")
    assert np.allclose(train.features[:, 0].numpy(), content["node_feat"].toarray())
    assert train.y.tolist() == quantile_labels(content["years"].flatten()).tolist()
    assert train.tokens[0, 0] == 0 and len({1, 2, 3, 4} & set(train.tokens[0, 1:].tolist())) == 3
    assert train.tokens[1].tolist() == [1, 3, 3, 3]  # edges keep their direction: 3 leads nowhere, and not back
    assert [len(data.dataset(split)) for split in ("train", "val", "test")] == [6, 3, 3]
    assert sorted(p.name.split("-")[0] for p in (tmp_path / "prepared").iterdir()) == ["features", "node2vec", "tokens"]
    # prepared sequences take labels and edges from it
    sequences = torch.cat((torch.arange(12)[:, None], torch.zeros(12, 1, dtype=torch.int64)), 1)
    x = torch.from_numpy(content["node_feat"].toarray()).float()
    torch.save([sequences.tolist(), x, torch.zeros(12, 3, 3)], tmp_path / "snap-patents_sample_node_len_2.pt")
    again = LargeGTTokenDataModule(root=str(tmp_path), tokens=2, **FAST).dataset("train")
    assert torch.equal(again.tokens.long(), sequences) and torch.equal(again.y, train.y)
    assert torch.equal(again.chosen, train.chosen) and not again.features[:, 1:].any()


def test_broken_snap_patents(tmp_path: Path) -> None:
    content = write_patents(tmp_path)
    scipy.io.savemat(tmp_path / "snap_patents.mat", {**content, "num_nodes": 11})
    with pytest.raises(ZooError, match="does not hold snap-patents: 11 nodes"):
        LargeGTTokenDataModule(root=str(tmp_path), tokens=2, **FAST).setup()
    (tmp_path / "snap_patents.mat").write_bytes(b"no")
    with pytest.raises(ZooError, match="does not hold snap-patents"):
        LargeGTTokenDataModule(root=str(tmp_path), tokens=2, **FAST).setup()


def test_years_into_five_classes() -> None:
    assert quantile_labels(np.array([1.0, 2, 3, 4, 5, 6, 7, 8, 9, 10])).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert quantile_labels(np.array([5.0, np.nan, 5.0])).tolist() == [4, -1, 4]


def test_layouts_of_its_parent(tmp_path: Path) -> None:
    edges = np.array([[0, 1], [1, 0], [1, 2], [2, 2]])
    labels = np.array([0, 1, 0, 1])
    np.savez(tmp_path / "own.npz", node_features=np.eye(4, 3), edges=edges, node_labels=labels)
    data = LargeGTTokenDataModule(root=str(tmp_path), tokens=4, split="half", **FAST)
    train = data.dataset("train")
    assert len(train) == 2 and len(data.dataset("val")) == 1 and len(data.dataset("test")) == 1
    assert sorted(train.tokens[0, 1:].tolist()) == [0, 1, 2]  # 1 one edge away, 0 and 2 two edges away
    assert set(train.tokens[2].tolist()) == {0, 1, 2}  # its self-loop counts for nothing
    with pytest.raises(FileNotFoundError, match="holds no graph"):
        LargeGTTokenDataModule(root=str(tmp_path), name="other", **FAST).setup()
    for name in ("a", "b"):
        torch.save([], tmp_path / f"{name}_sample_node_len_4.pt")
    with pytest.raises(ZooError, match="holds a, b: choose one"):
        LargeGTTokenDataModule(root=str(tmp_path), tokens=4, **FAST).setup()


def test_half_split() -> None:
    y = torch.arange(12) % 3
    y[:4] = -1
    masks = half_split(y, 0)
    assert [int(m.sum()) for m in masks.values()] == [4, 2, 2] and not sum(masks.values())[:4].any()
    assert int(sum(m.int() for m in masks.values()).max()) == 1


# ---- real data -------------------------------------------------------------------------------------------------------


def test_cora() -> None:
    root = Path(os.environ.get("ZOO_DATA", "")) / "cora"
    if not os.environ.get("ZOO_DATA") or not root.is_dir():
        pytest.skip("needs $ZOO_DATA/cora")
    graph = LargeGTTokenDataModule(root=str(root), form="graph", split="geom").dataset("train")[0]
    sequences = prepare(graph, tokens=6, pos_enc=0)
    assert sequences.features.shape == (2708, 3, 1433) and sequences.tokens.shape == (2708, 6)
    batch = sequences.batch(list(range(8)))
    model = quiet(LargeGT.from_variant("tiny", in_features=1433, num_classes=7, num_nodes=2708, conv_type="local"))
    assert model.training_step(batch, 0).isfinite()
