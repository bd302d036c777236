"""What recommenders share: the best k of many scores beside a plain sort, in blocks, and which of them are hits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zoo.graph.recommendation import recommender
from zoo.graph.recommendation.dpcml import DPCML
from zoo.graph.recommendation.nescl import NESCL
from zoo.nn.ranking import GROUP, best


def plain(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    score, index = scores.sort(dim=1, descending=True, stable=True)
    return score[:, :k], index[:, :k]


def agree(scores: Tensor, k: int) -> None:
    before = scores.clone()
    (score, index), (wanted, place) = best(scores, k), plain(scores, k)
    assert torch.equal(scores, before)
    assert torch.equal(score, wanted) and torch.equal(score, scores.topk(k, dim=1).values)
    real = wanted > -torch.inf  # nothing is said of closed items
    assert torch.equal(index[real], place[real])
    assert ((index >= 0) & (index < scores.shape[1])).all() and torch.equal(scores.gather(1, index), score)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    b=st.integers(1, 5),
    n=st.integers(1, 40 * GROUP),
    k=st.integers(1, 30),
    levels=st.sampled_from([1, 2, 50, 10**6]),  # few levels: ties everywhere
    closed=st.sampled_from([0.0, 0.5, 0.999, 1.0]),  # up to all of them, and down to fewer than k left
    seed=st.integers(0, 2**16),
)
def test_best_equals_a_stable_sort(b, n, k, levels, closed, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-levels, levels, (b, n), generator=generator) / levels
    scores[torch.rand(b, n, generator=generator) < closed] = -torch.inf
    agree(scores, min(k, n))
    agree(scores, n)
    padded = torch.full((b, n + 7), torch.inf)  # rows with a gap between them
    padded[:, :n] = scores
    agree(padded[:, :n], min(k, n))


def test_best_of_equal_scores_across_groups_is_the_first():
    scores = torch.zeros(2, 30 * GROUP + 5)
    scores[0, [29 * GROUP, 7, 30 * GROUP + 4]] = 1.0
    assert best(scores, 5)[1].tolist() == [[7, 29 * GROUP, 30 * GROUP + 4, 0, 1], [0, 1, 2, 3, 4]]


def test_best_puts_nan_first_and_keeps_infinities():
    scores = torch.zeros(1, 30 * GROUP)
    scores[0, 1000], scores[0, 500] = torch.nan, torch.inf
    score, index = best(scores, 4)
    assert score[0].isnan().tolist() == [True, False, False, False]
    assert index.tolist() == [[1000, 500, 0, 1]] and score[0, 1:].tolist() == [torch.inf, 0.0, 0.0]


@pytest.mark.parametrize("k", [0, 4])
def test_best_refuses_more_than_there_are(k):
    with pytest.raises(ValueError, match=rf"k is {k}; it must lie in 1\.\.3"):
        best(torch.zeros(2, 3), k)


USERS, ITEMS = 11, 50 * GROUP + 9  # enough items for two stages


def model(kind: str, **changes):
    generator = torch.Generator().manual_seed(0)
    pairs = torch.stack([torch.arange(USERS).repeat(40), torch.randint(ITEMS, (40 * USERS,), generator=generator)])
    pairs = pairs.unique(dim=1)
    torch.manual_seed(0)
    sizes = {"num_users": USERS, "num_items": ITEMS, "num_interactions": pairs.shape[1], "dim": 6, **changes}
    made = NESCL(**sizes, positives=[]) if kind == "inner product" else DPCML(**sizes, vectors=3, **OWNED)
    with torch.no_grad():
        for weight in made.parameters():
            weight.normal_()
    return made.set_graph(pairs), pairs


OWNED = {"assignment": "adaptive", "interactions_per_vector": 20}


@pytest.mark.parametrize("kind", ["inner product", "distance"])
@pytest.mark.parametrize("k", [1, 20, ITEMS])
@pytest.mark.parametrize("ties", [False, True])
def test_ranking_equals_sorting_every_score(kind, k, ties):
    made, pairs = model(kind)
    if ties:  # items in pairs: the same vector twice
        weight = made.item_embeddings.weight if kind == "distance" else made.item_embedding.weight
        with torch.no_grad():
            weight[1 : ITEMS - 1 : 2] = weight[0 : ITEMS - 2 : 2]
        if kind == "inner product":
            made._cached = lambda: torch.cat([made.user_embedding.weight, weight]).detach()
    user = torch.arange(USERS).flip(0)
    seen = torch.randint(-1, ITEMS, (USERS, 300), generator=torch.Generator().manual_seed(1))
    seen[0, :] = -1
    scores = torch.empty(USERS, ITEMS)
    with torch.no_grad():
        made.scorer()(user, scores)
    if not ties or kind == "distance":
        assert torch.allclose(scores, made(user), rtol=1e-4, atol=1e-4)
    for row, u in enumerate(user.tolist()):
        scores[row, pairs[1, pairs[0] == u]] = -torch.inf
        scores[row, seen[row][seen[row] >= 0]] = -torch.inf
    item, score = made.rank(user, k, seen)
    wanted, place = plain(scores, k)
    assert torch.allclose(score, wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(item < 0, wanted == -torch.inf)
    if not ties:
        assert torch.equal(item, place.where(wanted > -torch.inf, -1))
        return
    # of a pair that both are left, the first comes first
    for row in item.tolist():
        at = {i: rank for rank, i in enumerate(row)}
        assert all(at[i] < at[i + 1] for i in row if i >= 0 and i % 2 == 0 and i + 1 in at and i + 2 < ITEMS)


@pytest.mark.parametrize("kind", ["inner product", "distance"])
def test_users_without_items_left_get_none(kind):
    made, pairs = model(kind)
    everything = torch.arange(ITEMS).expand(2, -1).clone()
    everything[1, pairs[1, pairs[0] == 1]] = -1  # already left out
    left = everything[1].max()
    everything[1, left] = -1
    item, score = made.rank(torch.tensor([0, 1]), 3, everything)
    assert item.tolist() == [[-1] * 3, [int(left), -1, -1]]
    assert torch.isneginf(score[item < 0]).all()


@pytest.mark.parametrize("kind", ["inner product", "distance"])
def test_blocks_keep_to_the_limit_and_change_nothing(kind, monkeypatch):
    made, _ = model(kind)
    user = torch.arange(USERS)
    whole = made.rank(user, 20)
    sizes, write = [], made.scorer()

    def watched(users, scores):
        sizes.append(scores.untyped_storage().nbytes())
        write(users, scores)

    monkeypatch.setattr(made, "scorer", lambda: watched)
    monkeypatch.setitem(recommender.BLOCK_MIB, "cpu", 1 / 16)
    parts = made.rank(user, 20)
    assert len(sizes) > 1 and max(sizes) <= 2**16
    assert torch.equal(parts[0], whole[0]) and torch.allclose(parts[1], whole[1], rtol=1e-5)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(b=st.integers(1, 4), k=st.integers(1, 6), t=st.integers(0, 6), seed=st.integers(0, 2**16))
def test_hits_by_loops(b, k, t, seed):
    generator = torch.Generator().manual_seed(seed)
    item, target = (torch.randint(-1, 8, (b, size), generator=generator) for size in (k, t))
    found = recommender.Recommender.hits(item, target)
    wanted = [[i >= 0 and i in row for i in part] for part, row in zip(item.tolist(), target.tolist(), strict=True)]
    assert found.tolist() == wanted
