"""DPCML: recorded parity, equations against loops, hand-computed values, limits, bad inputs."""

import math
from pathlib import Path

import lightning
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from zoo.core import Trainer, ZooError
from zoo.graph.recommendation.data_implicit import ImplicitCFDataModule
from zoo.graph.recommendation.dpcml import (
    DPCML,
    LibCMLMetrics,
    distances,
    diversity_loss,
    nearest_share,
    preference_loss,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "dpcml.safetensors"
USERS, ITEMS = 7, 6
PAIRS = torch.tensor(
    [
        [0, 0, 0, 1, 1, 2, 2, 2, 3, 4, 4, 5, 5, 6],
        [0, 1, 2, 0, 1, 2, 3, 0, 4, 4, 3, 1, 2, 5],
    ]
)


def small(**overrides) -> DPCML:
    torch.manual_seed(0)
    sizes = {"num_users": USERS, "num_items": ITEMS, "num_interactions": PAIRS.shape[1]}
    given = {**sizes, "dim": 4, "vectors": 3, "negatives": 4, "top_k": 3, **overrides}
    model = DPCML(**given).set_graph(PAIRS)
    with torch.no_grad():
        model.user_embeddings.weight.normal_(0, 0.3)
    return model


def batch() -> dict[str, Tensor]:
    negative = torch.tensor([[5, 4, 3, 3], [1, 4, 5, 5], [0, 3, 4, 5]])
    return {"user": torch.tensor([0, 2, 5]), "item": torch.tensor([1, 3, 2]), "negative": negative}


def error(a: Tensor, b: Tensor) -> float:
    return float((a.detach() - b).abs().max() / b.abs().max())


# ---- the authors' results --------------------------------------------------------------------------------------------

CASES = {
    "dpcml1": {"sampling": "uniform", "negatives": 1},
    "dpcml1, ten negatives": {"sampling": "uniform", "negatives": 10},
    "dpcml2": {},
    "dpcml2, five vectors": {"vectors": 5, "margin": 2.0},
    "dpcml2, no diversity": {"diversity": 0.0},
    "dpcml2, empty range": {"least": 0.3, "most": 0.1},
    "cml, uniform": {"vectors": 1, "diversity": 0.0, "sampling": "uniform", "negatives": 1},
    "cml, hard": {"vectors": 1, "diversity": 0.0},
}


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_authors(golden, case):
    pairs = golden["interactions"]
    g = {k.removeprefix(f"{case}."): v for k, v in golden.items() if k.startswith(f"{case}.")}
    model = DPCML(num_users=40, num_items=60, num_interactions=pairs.shape[1], dim=8, clip="none", **CASES[case])
    model.set_graph(pairs)
    with torch.no_grad():
        model.user_embeddings.weight.copy_(g["user_weight"])
        model.item_embeddings.weight.copy_(g["item_weight"])
        assert error(model(torch.arange(3)), g["scores"]) < 1e-5
    parts = model.losses({k: g[k] for k in ("user", "item", "negative")})
    parts["loss"].backward()
    assert error(parts["loss"], g["loss"][0]) < 1e-5
    for side in ("user", "item"):
        assert error(getattr(model, f"{side}_embeddings").weight.grad, g[f"{side}_gradient"]) < 1e-5


def test_converts_the_authors_tables(golden):
    users, items = golden["dpcml2.user_weight"], golden["dpcml2.item_weight"]
    content = {"user_embeddings.weight": users, "item_embeddings.weight": items, "interactions": golden["interactions"]}
    sizes, state = DPCML.convert_state_dict(content)
    assert sizes["vectors"] == 3 and sizes["dim"] == 8 and sizes["num_users"] == 40
    model = DPCML(**sizes)
    model.load_state_dict(state)
    assert error(model(torch.arange(3)), golden["dpcml2.scores"]) < 1e-5
    assert model.predict([0, 1])["item"].shape == (2, 20)
    with pytest.raises(ZooError, match="add it to the file"):
        DPCML.convert_state_dict({k: v for k, v in content.items() if k != "interactions"})
    with pytest.raises(ZooError, match="24 wide, which is no multiple of the items' 7"):
        DPCML.convert_state_dict({**content, "item_embeddings.weight": items[:, :7]})


# ---- equations against loops -----------------------------------------------------------------------------------------


def slow_distance(model: DPCML, user: int, item: int, owned: int | None = None) -> float:
    """D(u, v) by loops, in float64."""
    hp = model.hyperparameters
    mine = model.user_embeddings.weight[user].double().view(hp["vectors"], hp["dim"])[:owned]
    theirs = model.item_embeddings.weight[item].double()
    return min(float(sum((a - b) ** 2 for a, b in zip(v, theirs, strict=True))) for v in mine.detach())


def slow_loss(model: DPCML, given: dict[str, Tensor], owned: list[int]) -> tuple[float, float]:
    """(preference, DCRS) by loops."""
    hp, total = model.hyperparameters, 0.0
    for u, i, js in zip(given["user"].tolist(), given["item"].tolist(), given["negative"].tolist(), strict=True):
        near = sorted(slow_distance(model, u, j, owned[u]) for j in js)
        positive = slow_distance(model, u, i, owned[u])
        kept = {"uniform": near, "hard": near[:1], "dihars": near[: math.ceil(hp["hardest"] * len(near))]}
        hinges = [max(0.0, hp["margin"] + positive - d) for d in kept[hp["sampling"]]]
        total += sum(hinges) / (len(hinges) if hp["sampling"] == "dihars" else 1)
    c, psi = hp["vectors"], 0.0
    for u in range(USERS):
        mine = model.user_embeddings.weight[u].double().view(c, -1).detach()
        for a in range(owned[u]):
            for b in range(owned[u]):
                if a != b:
                    delta = float(((mine[a] - mine[b]) ** 2).sum())
                    psi += max(0.0, hp["least"] - delta) + max(0.0, delta - hp["most"])
    return total, psi / (USERS * c * c)


@pytest.mark.parametrize("assignment", ["basic", "adaptive"])
@pytest.mark.parametrize("sampling", ["uniform", "hard", "dihars"])
def test_losses_equal_loops(sampling, assignment):
    model = small(sampling=sampling, assignment=assignment, interactions_per_vector=2, hardest=0.4, most=0.5, least=0.3)
    counts = torch.bincount(PAIRS[0]).tolist()
    owned = [3 if assignment == "basic" else min(3, 1 + n // 2) for n in counts]
    assert assignment == "basic" or sorted(set(owned)) == [1, 2]
    preference, psi = slow_loss(model, batch(), owned)
    parts = model.losses(batch())
    assert psi > 0
    assert float(parts["preference"].detach()) == pytest.approx(preference, rel=1e-5)
    assert float(parts["diversity"].detach()) == pytest.approx(psi, rel=1e-5)
    assert float(parts["loss"].detach()) == pytest.approx(preference + 10 * psi, rel=1e-5)
    scores = model(torch.arange(USERS)).detach()
    for user in range(USERS):
        wanted = [-slow_distance(model, user, i, owned[user]) for i in range(ITEMS)]
        assert scores[user].tolist() == pytest.approx(wanted, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("sampling", ["uniform", "hard", "dihars"])
def test_gradient_equals_the_whole_minimum(sampling):
    """Only the nearest vectors are differentiated; that is the gradient of the minimum itself."""
    model, given = small(sampling=sampling, hardest=0.5, diversity=0.0), batch()
    model.losses(given)["loss"].backward()
    mine = model.vectors()[given["user"]]
    tables = model.item_embeddings.weight
    positive = distances(mine, tables[given["item"]][:, None]).amin(1)[:, 0]
    negative = distances(mine, tables[given["negative"]]).amin(1)
    if sampling == "hard":
        negative = negative.amin(1, keepdim=True)
    elif sampling == "dihars":
        negative = negative.topk(2, largest=False).values
    wanted = torch.autograd.grad(
        preference_loss(positive, negative, 1.0, sampling == "dihars"), (model.user_embeddings.weight, tables)
    )
    for a, b in zip((model.user_embeddings.weight.grad, tables.grad), wanted, strict=True):
        assert error(a, b) < 1e-5


def test_positive_and_negative_take_their_own_nearest_vector():
    model = small(vectors=2, dim=1, negatives=1, diversity=0.0, margin=1.0)
    with torch.no_grad():
        model.user_embeddings.weight.copy_(torch.tensor([[0.0, 1.0]]).expand(USERS, -1))
        model.item_embeddings.weight.copy_(torch.tensor([[0.1], [0.8], [0.5], [0.0], [1.0], [2.0]]))
    given = {"user": torch.tensor([0]), "item": torch.tensor([0]), "negative": torch.tensor([[5]])}
    # D(u, i) = 0.01 by the first vector, D(u, j) = 1 by the second
    assert float(model.losses(given)["loss"].detach()) == pytest.approx(1 + 0.01 - 1.0, abs=1e-6)


def test_diversity_by_hand():
    vectors = torch.tensor([[[0.0, 0.0], [0.1, 0.0], [0.0, 1.0]]])  # squared distances 0.01, 1, 1.01
    wanted = 2 * ((0.05 - 0.01) + (1 - 0.25) + (1.01 - 0.25)) / 9
    assert float(diversity_loss(vectors, 0.05, 0.25)) == pytest.approx(wanted, rel=1e-5)
    two = torch.tensor([[True, True, False]])
    assert float(diversity_loss(vectors, 0.05, 0.25, two)) == pytest.approx(2 * 0.04 / 9, rel=1e-5)
    inside = torch.tensor([[[0.0, 0.0], [0.3, 0.0]]])
    assert float(diversity_loss(inside, 0.05, 0.25)) == 0.0


def test_dihars_lies_between_hard_and_uniform():
    distance = torch.tensor([[0.9, 0.1, 0.5, 0.3]])
    assert nearest_share(distance, 0.01).tolist() == [[1]]
    assert nearest_share(distance, 0.5).tolist() == [[1, 3]]
    assert nearest_share(distance, 0.51).shape == (1, 3)
    assert sorted(nearest_share(distance, 1.0)[0].tolist()) == [0, 1, 2, 3]
    hard, one = small(), small(sampling="dihars", hardest=0.25)
    assert float(hard.losses(batch())["loss"].detach()) == float(one.losses(batch())["loss"].detach())
    every, mean = small(sampling="uniform", diversity=0.0), small(sampling="dihars", hardest=1.0, diversity=0.0)
    ratio = every.losses(batch())["loss"] / mean.losses(batch())["loss"]
    assert float(ratio.detach()) == pytest.approx(4, rel=1e-5)


def test_batch_diversity_is_that_of_its_users():
    model = small(diversity_users="batch", most=0.3)
    found = model.losses({k: torch.cat([v, v]) for k, v in batch().items()})["diversity"]
    assert float(found.detach()) == pytest.approx(
        float(diversity_loss(model.vectors()[[0, 2, 5]], 0.05, 0.3).detach()), rel=1e-6
    )


# ---- negatives -------------------------------------------------------------------------------------------------------


def test_negatives_are_uniform_over_what_a_user_lacks():
    model = small()
    torch.manual_seed(1)
    drawn = model.bipartite.absent(torch.arange(USERS), 6000)
    for user in range(USERS):
        missing = sorted(set(range(ITEMS)) - {int(i) for u, i in PAIRS.T if u == user})
        counts = torch.bincount(drawn[user], minlength=ITEMS)
        assert counts.nonzero().flatten().tolist() == missing
        assert torch.allclose(counts[missing] / 6000, torch.tensor(1 / len(missing)), atol=0.03)


def test_a_batch_may_bring_its_negatives():
    given, model = batch(), small(negatives=1)
    assert torch.equal(small().draw(given), given["negative"])
    assert torch.equal(model.draw({**given, "negative": torch.tensor([5, 4, 0])}), torch.tensor([[5], [4], [0]]))
    assert small(negatives=2).draw(given).shape == (3, 2)  # too many came: drawn anew
    assert small(negatives=2).draw({"user": given["user"]}).shape == (3, 2)


# ---- projection ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("clip", "longest", "shortest"), [("ball", 1.0, 0.0), ("sphere", 1.0, 1.0), ("none", 2.0, 0)])
def test_a_step_projects_every_vector(clip, longest, shortest):
    model = small(clip=clip, lr=0.5)
    with torch.no_grad():
        model.user_embeddings.weight[:, :4] *= 20
    optimiser = model.configure_optimizers()
    model.losses(batch())["loss"].backward()
    optimiser.step()
    norms = torch.cat([model.vectors().flatten(0, 1).norm(dim=1), model.item_embeddings.weight.norm(dim=1)]).detach()
    if clip == "none":
        assert norms.max() > longest
    else:
        assert norms.max() <= longest + 1e-6 and norms.min() >= shortest - 1e-6
    assert clip != "ball" or norms.min() < 0.9


# ---- the authors' protocol -------------------------------------------------------------------------------------------


def slow_figures(order: list[int], targets: set[int], places: tuple[int, ...]) -> dict[str, float]:
    """Figures of one user from the ranked list, by loops."""
    found: dict[str, float] = {}
    hits = [p for p, item in enumerate(order) if item in targets]
    for k in places:
        if len(targets) >= k:
            top = [p for p in hits if p < k]
            found[f"libcml_precision@{k}"] = len(top) / k
            found[f"libcml_recall@{k}"] = len(top) / len(targets)
            ideal = sum(1 / math.log2(p + 2) for p in range(k))
            found[f"libcml_ndcg@{k}"] = sum(1 / math.log2(p + 2) for p in top) / ideal
    pairs = [(a, b) for a in hits for b in range(len(order)) if b not in hits]
    found["auc"] = sum(a < b for a, b in pairs) / len(pairs)
    if len(targets) >= 3:
        found["libcml_auc"] = found["auc"]
        found["libcml_map"] = sum((n + 1) / (p + 1) for n, p in enumerate(hits)) / len(hits)
        found["libcml_mrr"] = 1 / (hits[0] + 1)
        ideal = sum(1 / math.log2(p + 2) for p in range(len(hits)))
        found["libcml_ndcg"] = sum(1 / math.log2(p + 2) for p in hits) / ideal
    return found


def test_protocol_equals_loops():
    generator = torch.Generator().manual_seed(0)
    metric, sums = LibCMLMetrics((3, 5)), {}
    for size, counts in ((12, [1, 2, 3, 4]), (9, [5, 7, 3, 1])):
        place, targets, width = [], [], max(counts) + 1
        for count in counts:
            order = torch.randperm(size, generator=generator).tolist()
            chosen = set(torch.randperm(size, generator=generator)[:count].tolist())
            for name, value in slow_figures(order, chosen, (3, 5)).items():
                sums.setdefault(name, []).append(value)
            row = [order.index(i) for i in chosen]
            place.append(row + [0] * (width - count))
            targets.append(count)
        place.append([0] * width)  # a user without a target
        metric.update(torch.tensor(place), torch.tensor([*targets, 0]), torch.full((len(counts) + 1,), size))
    found = {name: float(value) for name, value in metric.compute().items()}
    assert found.keys() == sums.keys()
    for name, values in sums.items():
        assert found[name] == pytest.approx(sum(values) / len(values), rel=1e-6), name


def test_protocol_leaves_out_what_nobody_counts_for():
    metric = LibCMLMetrics()
    metric.update(torch.tensor([[0, 4]]), torch.tensor([2]), torch.tensor([5]))
    assert set(metric.compute()) == {"auc"} and float(metric.compute()["auc"]) == pytest.approx(0.5)
    metric.reset()
    metric.update(torch.zeros(2, 1, dtype=torch.int64), torch.tensor([1, 0]), torch.tensor([1, 1]))
    assert float(metric.compute()["auc"]) == 1.0  # nothing but targets is ranked: as in the authors' code


def test_training_items_take_no_part_in_the_evaluation():
    model = small()
    found: dict[str, Tensor] = {}
    model.log = lambda name, value, **_: found.__setitem__(name, value)
    model.evaluate({"user": torch.tensor([0]), "target": torch.tensor([[4, 5]]), "seen": torch.tensor([[3]])}, "test")
    model.on_test_epoch_end()
    assert float(found["test/auc"]) == 1.0  # items 0 to 2 are in training, 3 is left out: 4 and 5 remain
    assert not model.protocol["test"].users.any()


# ---- as a method of the library --------------------------------------------------------------------------------------


def test_trains_on_planted_interests_and_logs(tmp_path):
    data = ImplicitCFDataModule(planted="interests", val_fraction=0.2, batch_size=512)
    trainer = Trainer(tmp_path, max_epochs=12, accelerator="cpu", logger=False, enable_progress_bar=False)
    model = DPCML(**data.describe(), dim=16, lr=0.02)
    trainer.fit(model, datamodule=data)
    assert torch.equal(model.bipartite.interactions.long(), data.interactions())
    assert {
        "train/preference",
        "train/diversity",
        "val/auc",
        "val/minority_recall@20",
    } <= trainer.callback_metrics.keys()
    found = trainer.test(model, datamodule=data, verbose=False)[0]
    assert found["test/auc"] > 0.7  # chance is 0.5
    assert {"test/recall@20", "test/ndcg@20", "test/minority_recall@20", "test/libcml_ndcg@3"} <= found.keys()


def test_works_with_a_plain_trainer_and_any_loader():
    model = small()
    loader = torch.utils.data.DataLoader([{k: v[i] for k, v in batch().items()} for i in range(3)], batch_size=2)
    trainer = lightning.Trainer(
        max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu"
    )
    before = model.user_embeddings.weight.detach().clone()
    trainer.fit(model, loader)
    assert not torch.equal(before, model.user_embeddings.weight)


def test_checkpoint_recommends_by_itself(tmp_path):
    for assignment in ("basic", "adaptive"):
        model = small(assignment=assignment, interactions_per_vector=2)
        wanted = model.predict([0, 1, 2])
        model.save_pretrained(tmp_path / assignment)
        found = DPCML.from_pretrained(tmp_path / assignment).predict([0, 1, 2])
        assert torch.equal(found["item"], wanted["item"]) and torch.equal(found["score"], wanted["score"])
        seen = {(int(u), int(i)) for u, i in PAIRS.T}
        assert not any((u, i) in seen for u, row in enumerate(found["item"].tolist()) for i in row)


def test_blocks_do_not_matter():
    one, other = small(block=2), small(block=100)
    for a, b in zip(one.rank(torch.arange(USERS)), other.rank(torch.arange(USERS)), strict=True):
        assert torch.allclose(a, b)


def test_meta_device_and_paper_size():
    with torch.device("meta"):
        model = DPCML()
    assert sum(p.numel() for p in model.parameters()) == 938 * 3 * 256 + 1675 * 256
    user = torch.zeros(4, dtype=torch.int64, device="meta")
    for changes in ({}, {"sampling": "dihars"}, {"assignment": "adaptive"}, {"diversity_users": "batch"}):
        with torch.device("meta"):
            model = DPCML(**changes)
        assert model.losses({"user": user, "item": user})["loss"].shape == ()
    assert model(user).shape == (4, 1675)


# ---- bad inputs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"margin": 0.0}, "margin is 0.0; it must be above 0"),
        ({"sampling": "easy"}, "expected uniform, hard, dihars"),
        ({"assignment": "none"}, "expected basic, adaptive"),
        ({"clip": "cube"}, "expected ball, sphere, none"),
        ({"diversity_users": "some"}, "expected all, batch"),
        ({"hardest": 0.0}, r"hardest is 0.0; it must lie in \(0, 1\]"),
        ({"vectors": 0}, "vectors is 0; it must be at least 1"),
        ({"top_k": 0}, "top_k is 0; it must be at least 1"),
        ({"diversity": -1.0}, "none may be below 0"),
    ],
)
def test_bad_hyperparameters(arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments)


def test_bad_users_and_graphs():
    model = small()
    with pytest.raises(ValueError, match="users run from 7 to 7; the model knows 0 to 6"):
        model.predict([7])
    with pytest.raises(ZooError, match="DPCML has no graph yet"):
        DPCML.from_variant("tiny").losses(batch())
    with pytest.raises(ValueError, match="1 users have no interaction"):
        DPCML(num_users=3, num_items=4, num_interactions=2).set_graph(torch.tensor([[0, 2], [1, 1]]))
    with pytest.raises(ValueError, match=r"1 users have every one of the 2 items \(first: \[1\]\)"):
        DPCML(num_users=2, num_items=2, num_interactions=3).set_graph(torch.tensor([[0, 1, 1], [1, 0, 1]]))
