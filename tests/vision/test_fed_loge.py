"""FedLoGe: parity with recorded tensors, frame and steps against slow twins, stage 2 by hand, FedAvg as the limit."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.core import ZooError
from zoo.vision.federated.fed_loge import (
    ClassHits,
    FederatedModule,
    FedLoGe,
    equiangular,
    rank_correlation,
    shots,
    sparse,
    spread,
)

GOLDEN = Path(__file__).parent.parent / "golden" / "fed_loge.safetensors"
SMALL: dict[str, Any] = {
    "net": {"name": "cnn", "widths": [4], "features": 12},
    "norm": "none",
    "num_classes": 5,
    "in_channels": 1,
    "image_size": 8,
    "num_clients": 3,
    "local_epochs": 2,
    "local_batch": 4,
    "augment": [],
    "mean": [],
    "std": [],
    "etf_steps": 20,
}


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> bool:
    return float((ours.detach() - theirs).abs().max()) <= tolerance * float(theirs.abs().max().clamp(min=1e-12))


def quiet(model: Any) -> Any:
    model.logged = {}
    model.log = lambda name, value, **_: model.logged.__setitem__(name, value)  # no trainer
    return model


def small(seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    return quiet(FedLoGe(**{**SMALL, **changes}))


def a_round(clients: tuple[int, ...] = (0, 1, 2), sizes: tuple[int, ...] = (9, 17, 6), seed: int = 0) -> dict[str, Any]:
    """A round whose first client lacks class 4."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 5, (sum(sizes),), generator=generator)
    label[: sizes[0]] %= 4
    rounds = {"client": list(clients), "size": list(sizes), "work": [1.0] * len(sizes)}
    rounds["seed"] = [seed + c for c in clients]
    return {"image": torch.rand(sum(sizes), 1, 8, 8, generator=generator), "label": label, **rounds}


# ---- parity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stack", [None, 1])
def test_a_round_equals_the_authors(stack: int | None) -> None:
    g = load_file(GOLDEN)
    model = small(stack=stack)
    model.load_state_dict({**model.state_dict(), **{k[6:]: v for k, v in g.items() if k.startswith("start.")}})
    sizes = g["size"].tolist()
    batch = {"image": g["image"], "label": g["label"], "size": sizes, "seed": g["seed"].tolist()}
    model.training_step({**batch, "client": [0, 1, 2], "work": [1.0] * 3}, 0)
    state = model.state_dict()
    after = {k[6:]: v for k, v in g.items() if k.startswith("after.")}
    assert len(after) == 8 and all(close(state[k], v) for k, v in after.items())
    assert close(model.logged["train/loss"], g["loss"])

    heads = model.eval().realign()
    assert close(heads[-1][0], g["realigned"]) and torch.equal(heads[-1][1], model.model.generic.bias)
    for client, own in enumerate(g["label"].split(sizes)):
        present = torch.bincount(own, minlength=5) > 0
        scores = model(g["image"], client).detach()
        assert close(scores[:, present], g["personal"][client][:, present])
        assert (scores[:, ~present] == -math.inf).all()


def test_the_fixed_classifier_equals_the_authors() -> None:
    g = load_file(GOLDEN)
    start, after = g["classifier.start"], g["classifier.after"]
    found = spread(start, steps=20)
    assert close(found, after) and close(found - start, after - start, 1e-4)  # a way of 2e-3 beside entries of 0.5


# ---- the classifier that stands still -------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 5, 12])
def test_the_frame_is_equiangular(classes: int) -> None:
    gram = equiangular(12, classes).T @ equiangular(12, classes)
    assert gram.shape == (classes, classes)
    m = equiangular(12, classes).double()
    wanted = torch.full((classes, classes), -1 / (classes - 1), dtype=torch.float64).fill_diagonal_(1.0)
    assert torch.allclose(m.T @ m, wanted, atol=1e-5)
    assert torch.allclose(m.sum(1), torch.zeros(12, dtype=torch.float64), atol=1e-5)  # its columns balance


def test_sparse_drops_the_share_and_keeps_the_rest() -> None:
    m = equiangular(20, 5)
    found = sparse(m, 0.6)
    assert int((found == 0).sum()) == 60 and torch.equal(found[found != 0], m[found != 0])
    assert torch.equal(sparse(m, 0.0), m)
    for seed in range(30):  # 30 % of draws would leave some class nothing
        torch.manual_seed(seed)
        assert sparse(equiangular(4, 3), 0.6).any(0).all()


def slow_loss(m: Tensor, norm: float) -> Tensor:
    """The two wishes, class by class."""
    angles, lengths = [], []
    for c in range(m.shape[1]):
        cosines = [F.cosine_similarity(m[:, c], m[:, o], dim=0) for o in range(m.shape[1]) if o != c]
        angles.append(torch.acos(torch.stack(cosines).max().clamp(-0.99999, 0.99999)))
        lengths.append((m[:, c].norm() - norm) ** 2)
    return torch.stack(lengths).sum() - torch.stack(angles).mean()


def test_spread_equals_a_slow_twin() -> None:
    m = sparse(equiangular(9, 4), 0.4).double()
    slow, keep = m.clone().requires_grad_(), (m != 0).double()
    optimizer = torch.optim.Adam([slow], lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        slow_loss(slow, 0.5).backward()
        slow.grad = slow.grad * keep
        optimizer.step()
    found = spread(m, 0.5, 0.01, 60)
    assert torch.allclose(found, slow.detach(), atol=1e-10)
    assert torch.equal(found == 0, m == 0)


def test_spread_turns_columns_apart_and_gives_them_one_length() -> None:
    torch.manual_seed(0)
    m = sparse(equiangular(32, 6), 0.6)
    found = spread(m, 0.1, 1e-3, 1500)
    closest = [F.normalize(x, dim=0).T @ F.normalize(x, dim=0) - 2 * torch.eye(6) for x in (m, found)]
    assert closest[1].max() < closest[0].max() - 0.02
    assert closest[1].max() < -0.15  # a full frame has -0.2
    assert torch.allclose(found.norm(dim=0), torch.full((6,), 0.1), atol=0.01)
    assert torch.equal(spread(m, steps=0), m)


def test_parallel_columns_stay_finite() -> None:
    """The angle's slope has no bound where two columns coincide; there, nothing pushes."""
    assert spread(torch.ones(6, 3), 1.0, 1e-3, 5).isfinite().all()


def test_the_classifier_is_made_once_and_stands_still() -> None:
    model = small()
    first = model.sse_weight.clone()
    assert not model.sse_ready
    model.training_step(a_round(), 0)
    made = model.sse_weight.clone()
    assert model.sse_ready and not torch.equal(first, made)
    assert torch.equal(made, spread(first.T, 0.1, 1e-4, 20).T)
    model.training_step(a_round(seed=1), 0)
    assert torch.equal(model.sse_weight, made)
    again = small(seed=1)
    again.load_state_dict(model.state_dict())
    again.training_step(a_round(seed=2), 0)
    assert torch.equal(again.sse_weight, made)


def test_a_new_head_gets_a_new_classifier(tmp_path: Path) -> None:
    model = small()
    model.training_step(a_round(), 0)
    model.save_pretrained(tmp_path / "saved")
    changed = FedLoGe.from_pretrained(tmp_path / "saved", num_classes=7)
    assert changed.sse_weight.shape == (7, 12) and not changed.sse_ready
    assert changed.states.counts.shape == (3, 7) and not changed.states.counts.any()
    assert torch.equal(changed.model.backbone.hidden[0].weight, model.model.backbone.hidden[0].weight)


# ---- stage 1 --------------------------------------------------------------------------------------------------------


def test_one_step_is_three_separate_ones() -> None:
    """Each head by an optimiser of its own, on features from before the backbone's step."""
    model = small(local_epochs=1, num_clients=1)
    model.prepare_classifier()
    batch = a_round((0,), (4,))
    twin = small(local_epochs=1, num_clients=1)
    twin.load_state_dict(model.state_dict())
    net = twin.model
    local = nn.Linear(12, 5)
    local.load_state_dict({k: twin.states.read([0], f"personal.local.{k}")[""][0] for k in ("weight", "bias")})
    parts = (net.backbone, net.generic, local)
    optimizers = [torch.optim.SGD(p.parameters(), lr=0.03, momentum=0.5) for p in parts]
    f = net.backbone(batch["image"])
    heads = [lambda x: x @ twin.sse_weight.T + twin.sse_bias, net.generic, local]
    total = torch.zeros(())
    for head, optimizer, x in zip(heads, optimizers, (f, f.detach(), f.detach()), strict=True):
        loss = F.cross_entropy(head(x), batch["label"])
        loss.backward()
        optimizer.step()
        total += loss.detach()
    model.training_step(batch, 0)
    for name, value in net.state_dict().items():
        if not name.startswith("local."):
            assert close(model.model.state_dict()[name], value), name
    own = model.states.read([0], "personal.local.")
    assert close(own["weight"][0], local.weight.detach()) and close(own["bias"][0], local.bias.detach())
    assert close(model.logged["train/loss"], total)


def test_heads_do_not_reach_the_backbone() -> None:
    """With other heads, the backbone goes the same way; with another fixed classifier, another."""
    ways = []
    for what in ("", "generic", "local", "sse"):
        model = small()
        model.prepare_classifier()
        with torch.no_grad():
            if what == "sse":
                model.sse_weight.neg_()
            elif what == "generic":
                model.model.generic.weight.mul_(-3)
            elif what == "local":
                model.states.personal__local__weight.mul_(-3)
        model.training_step(a_round(), 0)
        ways.append(model.model.backbone.hidden[0].weight.detach().clone())
    assert torch.equal(ways[0], ways[1]) and torch.equal(ways[0], ways[2])
    assert not torch.allclose(ways[0], ways[3])


def test_stacked_equals_one_by_one() -> None:
    together, alone = small(), small(stack=1)
    for seed in (0, 1):
        for model in (together, alone):
            model.training_step(a_round(seed=seed), 0)
    for (name, a), b in zip(together.state_dict().items(), alone.state_dict().values(), strict=True):
        assert close(a.double(), b.double()), name


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_switched_off_it_is_fedavg(norm: str) -> None:
    ours = small(static=False, universal=True, personalise=False, norm=norm)
    shared = {key: value for key, value in SMALL.items() if key != "etf_steps"} | {"norm": norm}
    plain = quiet(FederatedModule(**shared, lr=0.03, momentum=0.5, weight_decay=0.0))
    names = [k for k in plain.model.state_dict() if not k.startswith("head.")]
    heads = [k for k in plain.model.state_dict() if k.startswith("head.")]
    own = {k: ours.model.state_dict()[f"backbone.{k}"] for k in names} | {k: ours.model.state_dict()[k] for k in heads}
    plain.model.load_state_dict(own)
    for seed in (0, 1):
        ours.training_step(a_round(seed=seed), 0)
        plain.training_step(a_round(seed=seed), 0)
    assert close(ours.logged["train/backbone"], plain.logged["train/loss"])
    image = torch.rand(4, 1, 8, 8)
    for client in (-1, 0, 2):
        assert close(ours.eval()(image, client), plain.eval()(image).detach())


def test_what_is_sent_and_what_stays() -> None:
    model = small()
    down = model.broadcast()
    assert {k.split(".")[1] for k in down} == {"backbone", "generic"}
    up, kept, _ = model.local(a_round(), down, [0, 1, 2])
    assert up.keys() == down.keys()
    assert set(kept) == {"personal.local.weight", "personal.local.bias", "counts"}
    batch = a_round()
    assert torch.equal(kept["counts"][1], torch.bincount(batch["label"][9:26], minlength=5).float())


def test_the_head_of_a_client_that_rests_survives() -> None:
    model = small()
    model.training_step(a_round(), 0)
    before = model.states.read([0, 1, 2], "personal.local.weight")[""]
    model.training_step(a_round((0, 2), (9, 17), seed=1), 0)
    after = model.states.read([0, 1, 2], "personal.local.weight")[""]
    assert torch.equal(before[1], after[1]) and not torch.allclose(before[0], after[0])


# ---- stage 2 --------------------------------------------------------------------------------------------------------


def by_hand(**changes: Any) -> Any:
    """Two features that pass through, three classes; client 0 has 5, 1 and no samples of them, client 1 never came."""
    model = small(num_classes=3, num_clients=2, **changes)
    model.model.backbone = nn.Identity()
    with torch.no_grad():
        for head, weight, bias in (
            (model.model.generic, [[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]], [0.5, 0.0, -0.5]),
            (model.model.local, [[0.0, 0.0]] * 3, [0.0] * 3),
        ):
            head.weight, head.bias = nn.Parameter(torch.tensor(weight)), nn.Parameter(torch.tensor(bias))
        model.states.personal__local__weight = torch.tensor([[[0.6, 0.8], [2.0, 0.0], [0.0, 7.0]], [[9.0, 9.0]] * 3])
        model.states.personal__local__bias = torch.tensor([[1.0, 2.0, 3.0], [9.0] * 3])
        model.states.counts.copy_(torch.tensor([[5.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))
    return model


X = torch.tensor([[1.0, 1.0], [2.0, -1.0]])


def test_the_generic_head_by_hand() -> None:
    # rows (3, 4) / 5, (0, 1), (1, 0), times 1.7, and the biases as they were
    wanted = 1.7 * torch.tensor([[1.4, 1.0, 1.0], [0.4, -1.0, 2.0]]) + torch.tensor([0.5, 0.0, -0.5])
    assert torch.allclose(by_hand().logits(by_hand().model, X), wanted)
    raw = torch.tensor([[7.0, 2.0, 1.0], [2.0, -2.0, 2.0]]) + torch.tensor([0.5, 0.0, -0.5])
    model = by_hand(realign=False)
    assert torch.allclose(model.logits(model.model, X), raw)


def personal(model: Any, client: int) -> Tensor:
    """As `forward` does it, without its check of shapes."""
    with torch.no_grad():
        for name, value in model.personal_weights(client).items():
            model.model.get_parameter(name).copy_(value)
    return model.logits(model.model, X, client)


def test_a_personal_head_by_hand() -> None:
    inf = math.inf
    # client 0: (0.6, 0.8) + 1 * (3, 4), (2, 0) + 2 * (0, 2); class 2 is not its own
    wanted = torch.tensor([[8.4 + 1.5, 6.0 + 2.0, -inf], [2.4 + 1.5, 0.0 + 2.0, -inf]])
    model = by_hand()
    assert torch.allclose(personal(model, 0), wanted)
    assert torch.allclose(model.realign()[0][0][:2], torch.tensor([[3.6, 4.8], [2.0, 4.0]]))
    # without stage 2: the sum of both heads
    model = by_hand(realign=False)
    raw = torch.tensor([[8.4 + 1.5, 4.0 + 2.0, -inf], [2.4 + 1.5, 2.0 + 2.0, -inf]])
    assert torch.allclose(personal(model, 0), raw)
    # two samples are wanted of a class: only class 0 is left
    assert personal(by_hand(present_from=2), 0)[:, 1:].eq(-inf).all()
    # nothing would be left: nothing is left out
    assert personal(by_hand(present_from=6), 0).isfinite().all()


def test_a_client_that_never_came_gets_the_generic_model() -> None:
    model = by_hand()
    assert torch.equal(personal(model, 1), model.logits(model.model, X))
    assert torch.equal(model.realign()[1][0], model.realign()[-1][0])
    model = by_hand(personalise=False)
    assert torch.equal(personal(model, 0), model.logits(model.model, X))


def test_realigned_scores_do_not_depend_on_norms() -> None:
    model = by_hand()
    before = model.logits(model.model, X)
    with torch.no_grad():
        model.model.generic.weight.mul_(torch.tensor([[10.0], [0.1], [3.0]]))
    assert torch.allclose(model.logits(model.model, X), before)


def test_realign_gives_the_layers_that_forward_uses() -> None:
    model = small()
    model.training_step(a_round((0, 2), (9, 17)), 0)
    image = torch.rand(3, 1, 8, 8)
    heads = model.eval().realign()
    assert sorted(heads) == [-1, 0, 1, 2]
    for client, (weight, bias) in heads.items():
        wanted = F.linear(model.model(image), weight, bias).detach()
        assert torch.allclose(model(image, client), wanted, atol=1e-6)
    found = model.predict(image, client=0)
    assert found.sum(1).allclose(torch.ones(3)) and not found[:, 4].any()


def test_universal_answers_by_the_fixed_classifier() -> None:
    model = small(universal=True)
    image = torch.rand(3, 1, 8, 8)
    wanted = model.model(image) @ model.sse_weight.T + model.sse_bias
    assert torch.allclose(model.eval()(image), wanted, atol=1e-6)


# ---- scoring --------------------------------------------------------------------------------------------------------


def test_shots_by_hand() -> None:
    # 50 of 100 come first, then 25: up to 75; 20: up to 95; what begins there is rare
    assert shots(torch.tensor([25.0, 5.0, 50.0, 20.0])).tolist() == [0, 2, 0, 1]
    assert shots(torch.tensor([10.0, 10.0, 10.0, 10.0])).tolist() == [0, 0, 0, 1]
    assert shots(torch.tensor([97.0, 2.0, 1.0])).tolist() == [0, 2, 2]


def test_rank_correlation_equals_scipy() -> None:
    from scipy.stats import spearmanr

    a, b = torch.tensor([3.0, 1.0, 2.0, 2.0, 9.0]), torch.tensor([2.0, 2.0, 5.0, 1.0, 8.0])
    assert float(rank_correlation(a, b)) == pytest.approx(spearmanr(a, b).statistic, abs=1e-6)


def test_scores_by_frequency() -> None:
    model = small()
    model.training_step(a_round(), 0)
    test = a_round((-1,), (40,), seed=5)
    model.test_step(test, 0)
    model.on_test_epoch_end()
    right = model.eval()(test["image"]).argmax(1) == test["label"]
    group = shots(model.states.counts.sum(0))[test["label"]]
    for number, name in enumerate(("head", "middle", "tail")):
        if (group == number).any():
            assert float(model.logged[f"test/{name}"]) == pytest.approx(float(right[group == number].float().mean()))
    assert float(model.logged["test/accuracy"]) == pytest.approx(float(right.float().mean()))
    assert -1 <= float(model.logged["test/norm_rank"]) <= 1
    assert not model.hits.total.any()  # the next epoch begins at 0
    hits = ClassHits(3)
    hits.update(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]))
    assert hits.compute().tolist() == [[1, 1, 0], [2, 1, 0]]


# ---- refusals and the authors' files ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_classes": 13}, "13 classes with 12 features"),
        ({"num_classes": 1}, "needs 2 <= classes"),
        ({"sparsity": 1.0}, r"sparsity is 1.0; in \[0, 1\)"),
        ({"sparsity": 0.95}, "low enough"),
        ({"etf_norm": 0.0}, "must be above 0"),
        ({"present_from": 0}, "present_from is 0"),
        ({"etf_steps": -1}, "etf_steps is -1"),
        ({"mean": [0.5, 0.5], "std": [1.0, 1.0]}, "one number for each of 1 channels"),
        ({"momentum": 1.0}, "below 1"),
    ],
)
def test_refusals(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        FedLoGe(**{**SMALL, **changes})
    assert "\n" not in str(caught.value)


def test_refuses_unknown_clients_and_shapes() -> None:
    model = small()
    with pytest.raises(ValueError, match="client is 3; there are 3"):
        model.predict(torch.rand(1, 1, 8, 8), client=3)
    with pytest.raises(ValueError, match="expected"):
        model.predict(torch.rand(1, 3, 8, 8))


def authors(classes: int = 4, clients: int = 2) -> dict[str, Any]:
    """The authors' parts with the names and shapes that theirs have, at the size of ResNet-18."""
    from zoo.nn.classifiers import resnet

    net = {}
    for key, value in resnet(18, classes).state_dict().items():
        if not key.startswith("head."):
            name = key.replace("stem.0", "conv1").replace("stem.1", "bn1").replace("norm", "bn")
            net[name] = value
    idle = nn.Linear(512, classes).state_dict()
    net |= {f"{part}.{k}": v for part in ("linear", "projection") for k, v in idle.items()}
    heads = {f"l_head_{i}": nn.Linear(512, classes) for i in range(clients)}
    return {"model": net, "g_head": nn.Linear(512, classes).state_dict(), "g_aux": nn.Linear(512, classes), **heads}


def test_converts_the_authors_files() -> None:
    content = authors()
    hyperparameters, state = FedLoGe.convert_state_dict(content)
    assert hyperparameters == {"net": "resnet18", "num_classes": 4, "in_channels": 3, "num_clients": 2}
    model = FedLoGe(**hyperparameters)
    model.load_state_dict(state)
    assert torch.equal(model.model.backbone.layer2[0].shortcut[1].bias, content["model"]["layer2.0.shortcut.1.bias"])
    assert torch.equal(model.sse_weight, content["g_head"]["weight"]) and model.sse_ready
    assert torch.equal(model.states.read([1], "personal.local.bias")[""][0], content["l_head_1"].bias)
    assert model.predict(torch.rand(1, 3, 32, 32), client=1).isfinite().all()
    del content["g_aux"]
    with pytest.raises(ZooError, match="No 'g_aux' among"):
        FedLoGe.convert_state_dict(content)
    content = authors()
    content["model"] = {k: v for k, v in content["model"].items() if not k.startswith("layer4.")}
    with pytest.raises(ZooError, match="none of the authors' ResNets"):
        FedLoGe.convert_state_dict(content)
