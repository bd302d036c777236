"""TwinSight: equal to its authors' code, losses against loops, what each kind of client learns, limits, bad inputs."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from zoo.engines.federated import Clients, FederatedModule
from zoo.vision.federated.data_semi_supervised import FederatedSemiSupervisedDataModule
from zoo.vision.federated.twin_sight import Dense, TwinSight, agreement_loss, instance_loss, neighbourhood_loss

SMALL = {
    "net": {"name": "cnn", "widths": [4, 6], "features": 8}, "projection": [12, 6], "norm": "none", "in_channels": 1,
    "image_size": 8, "num_clients": 4, "local_batch": 16, "augment": ["crop:1"], "strong": ["crop:1", "noise:0.1"],
}  # fmt: skip


def module(**changes):
    torch.manual_seed(0)
    found = TwinSight(**{**SMALL, **changes})
    found.logged = {}
    found.log = lambda name, value, **_: found.logged.__setitem__(name, float(value))
    return found


@pytest.fixture(scope="module")
def rounds():
    """Rounds of four clients: two labelled; a fifth of each labelled."""
    found = {}
    for name, given in {"kinds": {"labelled_clients": [0, 2], "labelled": 1.0}, "few": {"labelled": 0.2}}.items():
        data = FederatedSemiSupervisedDataModule(clients=4, per_class=24, test="none", **given)
        data.setup("fit")
        found[name] = next(iter(data.train_dataloader()))
    return found


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def difference(a, b):
    return max(float((a[n] - b[n]).abs().max()) for n in a)


# ---- the authors' recorded tensors -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden():
    return load_file(Path(__file__).parents[1] / "golden/twin_sight.safetensors")


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("kind", ["labelled", "unlabelled"])
@pytest.mark.parametrize("stacked", [True, False])
def test_three_steps_equal_the_authors(golden, float64, kind, stacked):
    ours = module(authors_xor=True, local_batch=8)
    # theirs has batch norm in the projector, whatever the network has
    ours.model.unsupervised.head[1] = nn.BatchNorm1d(12)
    weights = {k.removeprefix("weights."): v for k, v in golden.items() if k.startswith("weights.")}
    ours.model.load_state_dict(weights)
    labelled = torch.full((8,), kind == "labelled")
    copies = 2 if stacked else 1
    batches = []
    for weak, strong, label in zip(golden["weak"], golden["strong"], golden["label"], strict=True):
        batch = {"image": weak, "strong": strong, "label": torch.where(labelled, label, -1), "labelled": labelled}
        batch["mask"] = torch.ones_like(labelled)
        batches.append((copies, {key: value[None].repeat(copies, *[1] * value.ndim) for key, value in batch.items()}))

    class Given(list):
        batch = {"known": [8 * (kind == "labelled")] * 2, "size": [8, 8]}
        rows, counts = list(range(copies)), [3] * copies

    down = ours.broadcast()
    clients = ours.clients(ours.start_state(Given.rows, down), stacked)
    logs = ours.work(clients, Given(batches), down)
    for name, wanted in golden.items():
        if name.startswith(f"{kind}."):
            found = clients.state[name.removeprefix(f"{kind}.")]
            for copy in found:
                torch.testing.assert_close(copy, wanted, rtol=1e-9, atol=1e-11)
        elif name.startswith(f"{kind}_mean.") and not (kind == "unlabelled" and name.endswith("supervised")):
            torch.testing.assert_close(
                logs[name.split(".")[1]], wanted.to(logs["loss"]).expand(copies), rtol=1e-5, atol=0
            )


# ---- losses against loops --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed, valid", [(0, 5), (1, 3), (2, 1)])
def test_instance_loss_against_a_loop(seed, valid):
    """Float64; the padded samples neither look for their other view nor stand in others' way."""
    torch.manual_seed(seed)
    z = torch.randn(10, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(5) < valid
    rows = [i for i in range(10) if mask[i % 5]]
    total = 0.0
    for i in rows:

        def cosine(j, i=i):
            return float(z[i] @ z[j] / (z[i].norm() * z[j].norm()))

        others = sum(math.exp(cosine(j) / 0.07) for j in rows if j != i)
        total -= cosine((i + 5) % 10) / 0.07 - math.log(others)
    found = instance_loss(z, mask, 0.07)
    assert float(found.detach()) == pytest.approx(total / len(rows), rel=1e-10, abs=1e-10)
    (grad,) = torch.autograd.grad(found, z)
    assert grad.isfinite().all() and (grad[[i for i in range(10) if i not in rows]] == 0).all()


def test_instance_loss_by_hand():
    """Two pictures, orthogonal, views equal: log(1 + 2 exp(-1 / t)). One picture alone: nothing to confuse it with."""
    z = torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 1]])
    assert float(instance_loss(z, torch.tensor([True, True]), 0.5)) == pytest.approx(math.log(1 + 2 * math.exp(-2)))
    assert float(instance_loss(z, torch.tensor([True, False]), 0.5)) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("valid", [6, 4])
@pytest.mark.parametrize("xor", [False, True])
def test_neighbourhood_loss_against_a_loop(valid, xor):
    torch.manual_seed(3)
    u, s = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    total = 0.0
    for i in range(valid):
        for j in range(valid):
            a = F.cosine_similarity(u[i], u[j], dim=0)
            b = F.cosine_similarity(s[i], s[j], dim=0)
            total += float((a - b) ** 2)
    wanted = total / ((valid ^ 2) if xor else valid**2)
    assert float(neighbourhood_loss(u, s, torch.arange(6) < valid, xor)) == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize("valid", [5, 3])
def test_agreement_loss_against_a_loop(valid):
    torch.manual_seed(0)
    p, z = torch.randn(2, 10, 4, requires_grad=True).unbind()
    mask = torch.arange(5) < valid
    loss = agreement_loss(p, z, mask)
    total = 0.0
    for i in range(valid):
        for ours, other in ((i, i + 5), (i + 5, i)):
            a, b = p[ours].tolist(), z[other].tolist()
            total -= sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))
    assert float(loss.detach()) == pytest.approx(total / (2 * valid), rel=1e-5)
    assert torch.autograd.grad(loss, z, allow_unused=True) == (None,), "nothing is learnt from what is wanted"


def test_agreement_loss_by_hand():
    east, north = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    mask = torch.tensor([True])
    assert agreement_loss(torch.stack([east, north]), torch.stack([3 * north, east]), mask) == -1
    assert agreement_loss(torch.stack([east, east]), torch.stack([east, -east]), mask) == 0


def test_projectors_and_predictors_are_the_authors():
    """Where each normalises: SimSiam behind its last layer, too, the others between layers."""
    shapes = [type(layer).__name__ for layer in Dense([4, 6, 6, 3], "batch", last=True)]
    assert shapes == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"]
    assert [type(layer).__name__ for layer in Dense([4, 6, 3], "batch")] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    widths = {"byol": [(6, 12), (12, 6)], "simsiam": [(6, 3), (3, 6)]}
    for kind, wanted in widths.items():
        linear = [x for x in module(unsupervised=kind).model.predictor if isinstance(x, nn.Linear)]
        assert [(x.in_features, x.out_features) for x in linear] == wanted
    paper = TwinSight(unsupervised="simsiam", projection=[512, 512], net={"name": "resnet10", "width": 64})
    assert [x.out_features for x in paper.model.predictor if isinstance(x, nn.Linear)] == [256, 512]


@pytest.mark.parametrize("kind", ["byol", "simsiam"])
def test_other_objectives_in_a_round(kind, rounds):
    """Together equals one by one; SimSiam keeps nothing, BYOL's target stays with its client and follows by hand."""
    found = []
    for stack in (None, 1):
        model = module(unsupervised=kind, stack=stack, norm="group", decay=0.9)
        for number in range(2):
            model.training_step({**rounds["kinds"], "seed": [number] * 4}, 0)
        found.append(state(model))
        sent = model.broadcast()
        assert not any(name.startswith("model.target.") for name in sent)
        assert model.logged["train/instance"] <= (4 if kind == "byol" else 1)
    assert difference(*found) < 1e-5
    kept = [name for name in found[0] if name.startswith("states.personal__target")]
    assert bool(kept) == (kind == "byol")
    assert all(not torch.equal(found[0][name][0], found[0][name][1]) for name in kept if name.endswith("head__0__bias"))


def test_byols_target_follows_by_hand():
    torch.manual_seed(1)
    model = module(unsupervised="byol", decay=0.75)
    clients = model.clients(model.start_state([0, 1], model.broadcast()), True)
    before = {n: v.clone() for n, v in clients.state.items() if n.startswith("target.")}
    image = torch.rand(2, 6, 1, 8, 8)
    batch = {"image": image, "strong": image.flip(-1), "label": torch.zeros(2, 6, dtype=torch.long)}
    batch |= {key: torch.ones(2, 6, dtype=torch.bool) for key in ("labelled", "mask")}
    logged = clients.step(model.loss, batch)
    assert all(torch.equal(clients.state[n], v) for n, v in before.items()), "no gradient, and no step"
    with torch.no_grad():
        fresh = module(unsupervised="byol").model.train()
        views = [model.normalise(image[0]), model.normalise(image[0].flip(-1))]
        p, t = ([f(v) for v in views] for f in (lambda v: fresh.predictor(fresh.unsupervised(v)), fresh.target))
        one, two = (2 - 2 * F.cosine_similarity(a, b) for a, b in ((p[0], t[1]), (p[1], t[0])))
    assert float(logged["instance"][0]) == pytest.approx(float((one + two).mean()), rel=1e-5)
    model.after_step(clients)
    for name, value in before.items():
        online = clients.state[name.replace("target.", "unsupervised.")]
        assert torch.allclose(clients.state[name], 0.75 * value + 0.25 * online, atol=1e-7)


def test_neighbourhood_loss_invariances_and_limits():
    """Turning either space, scaling a feature: nothing changes. Equal neighbourhoods: 0. A zero feature: no NaN."""
    torch.manual_seed(4)
    u, s, mask = torch.randn(6, 4), torch.randn(6, 4), torch.ones(6, dtype=torch.bool)
    turn = torch.linalg.qr(torch.randn(4, 4)).Q
    scale = torch.rand(6, 1) + 0.5
    one, other = neighbourhood_loss(u, s, mask), neighbourhood_loss((u * scale) @ turn, s, mask)
    torch.testing.assert_close(one, other)
    assert float(neighbourhood_loss(u, 3 * u @ turn, mask)) < 1e-10
    u[2] = 0
    u.requires_grad_()
    (grad,) = torch.autograd.grad(neighbourhood_loss(u, s, mask), u)
    assert grad.isfinite().all()


def test_the_authors_denominator_at_two_pictures():
    """b XOR 2 is 0 at b = 2: then 1, so that it stays finite."""
    u, s = torch.eye(2), torch.ones(2, 2)
    assert float(neighbourhood_loss(u, s, torch.ones(2, dtype=torch.bool), True)) == pytest.approx(2.0)
    assert float(neighbourhood_loss(u, s, torch.ones(2, dtype=torch.bool))) == pytest.approx(0.5)


# ---- pseudo labels ---------------------------------------------------------------------------------------------------


def logit(p):
    """Scores of three classes whose softmax is p."""
    return torch.tensor(p).log()


WEAK = logit([[0.96, 0.02, 0.02], [0.5, 0.3, 0.2], [0.01, 0.98, 0.01], [0.01, 0.01, 0.98]])
STRONG = logit([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6], [0.3, 0.4, 0.3], [0.1, 0.1, 0.8]])


def test_fixmatch_by_hand():
    found = module(pseudo="fixmatch", num_classes=3)._pseudo(WEAK, STRONG, torch.tensor([True, True, True, False]), {})
    assert float(found["pseudo"]) == pytest.approx(-(math.log(0.5) + math.log(0.4)) / 3, rel=1e-5)
    assert float(found["sure_share"]) == pytest.approx(2 / 3)
    none = module(pseudo="fixmatch", num_classes=3)._pseudo(WEAK, STRONG, torch.zeros(4, dtype=torch.bool), {})
    assert float(none["pseudo"]) == 0


def test_the_authors_swap_labels_the_weak_view():
    given = {"pseudo": "fixmatch", "threshold": 0.75, "num_classes": 3}
    everyone = torch.ones(4, dtype=torch.bool)
    found = module(**given, authors_swap=True)._pseudo(WEAK, STRONG, everyone, {})
    assert float(found["pseudo"]) == pytest.approx(-math.log(0.98) / 4, rel=1e-4)


def test_freematch_by_hand():
    """time_p and p_model after one batch, and the threshold of each class relative to the commonest."""
    everyone = torch.ones(4, dtype=torch.bool)
    start = {"sure": torch.tensor(0.9), "often": torch.tensor([0.6, 0.3, 0.1])}
    found = module(pseudo="freematch", num_classes=3)._pseudo(WEAK, STRONG, everyone, start)
    p = WEAK.softmax(1)
    level = 0.999 * 0.9 + 0.001 * float(p.max(1).values.mean())
    often = 0.999 * start["often"] + 0.001 * p.mean(0)
    torch.testing.assert_close(found["sure"], torch.tensor(level))
    torch.testing.assert_close(found["often"], often)
    # 0.5 of class 0 is below 0.9; classes 1 and 2 are rare, and all pass
    wanted = -(math.log(0.5) + math.log(0.4) + math.log(0.8)) / 4
    assert float(found["pseudo"]) == pytest.approx(wanted, rel=1e-5)
    ranged = module(pseudo="freematch", num_classes=3, threshold_range=[0.97, 0.99])
    assert float(ranged._pseudo(WEAK, STRONG, everyone, start)["sure_share"]) == 0.5
    nobody = module(pseudo="freematch", num_classes=3)._pseudo(WEAK, STRONG, ~everyone, start)
    assert torch.equal(nobody["sure"], start["sure"]) and torch.equal(nobody["often"], start["often"])


def test_freematch_begins_anew_in_every_local_epoch(rounds):
    """Steps' thresholds, seen through a loss that only hands them on: 1 / k at the beginning of each epoch."""
    ours = module(pseudo="freematch", local_epochs=2, labelled_batch=8)
    seen, loss = [], ours.loss

    def watch(model, batch):
        seen.append(batch["sure"].clone())
        return loss(model, batch)

    ours.loss, ours._hp["stack"] = watch, 1
    ours.local(rounds["few"], ours.broadcast(), [0])
    unlabelled = rounds["few"]["size"][0] - rounds["few"]["known"][0]
    epoch = -(-unlabelled // 16)
    values = [float(value) for value in seen]
    assert len(values) == 2 * epoch and epoch > 1
    assert [i for i, value in enumerate(values) if value == pytest.approx(0.1, abs=1e-7)] == [0, epoch]


# ---- clients ---------------------------------------------------------------------------------------------------------


SETTINGS = {
    "kinds": ("kinds", {}),
    "epochs": ("kinds", {"local_epochs": 2, "momentum": 0.5}),
    "few": ("few", {"labelled_batch": 8, "pseudo": "freematch", "algorithm": "fedprox"}),
    "one_pool": ("few", {"pseudo": "fixmatch", "threshold": 0.2}),
    "batch_norm": ("kinds", {"norm": "batch"}),
    "group_norm": ("kinds", {"norm": "group"}),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_together_equals_one_by_one(rounds, setting):
    which, changes = SETTINGS[setting]
    found = []
    for stack in (None, 1):
        ours = module(**changes, stack=stack)
        for _ in range(2):
            ours.training_step(rounds[which], 0)
        found.append(state(ours.model))
    for name, value in found[1].items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-5, atol=1e-5)


def test_a_client_without_labels_moves_all_but_the_supervised_head(rounds):
    ours = module(weight_decay=0.1)
    down = ours.broadcast()
    up, _, _ = ours.local(rounds["kinds"], down, [0, 1, 2, 3])
    for name, value in up.items():
        moved = [not torch.equal(row, down[name]) for row in value]
        if name.startswith("model.supervised.head."):
            assert moved == [True, False, True, False], name
        else:
            assert all(moved), name


def test_that_head_stays_under_any_correction(rounds):
    ours = module(weight_decay=0.1, algorithm="fedprox", mu=5.0, clip=0.1)
    down = ours.broadcast()
    up, _, _ = ours.local(rounds["kinds"], down, [1])
    assert torch.equal(up["model.supervised.head.weight"][0], down["model.supervised.head.weight"])


def test_hidden_labels_change_nothing(rounds):
    """Whatever stands where a label is hidden, the round is the same."""
    batch = rounds["kinds"]
    found = []
    for hidden in (-1, 7):
        ours = module(pseudo="fixmatch")
        ours.training_step({**batch, "label": torch.where(batch["labelled"], batch["label"], hidden)}, 0)
        found.append(state(ours.model))
    assert difference(*found) == 0


def test_the_supervised_networks_gradient_on_an_unlabelled_client_is_that_of_the_tie():
    ours = module(sim=2.0)
    x, strong = torch.rand(6, 1, 8, 8), torch.rand(6, 1, 8, 8)
    mask = torch.ones(6, dtype=torch.bool)
    batch = {"image": x, "strong": strong, "label": torch.full((6,), -1), "labelled": ~mask, "mask": mask}
    loss = ours.loss(ours.model, batch)
    weight = ours.model.supervised.layer1[0].weight
    (found,) = torch.autograd.grad(loss["loss"], weight, retain_graph=True)
    u, s = ours.model.unsupervised[:-1](x), ours.model.supervised[:-1](x)
    (wanted,) = torch.autograd.grad(2.0 * neighbourhood_loss(u, s, mask), weight)
    torch.testing.assert_close(found, wanted)
    assert float(loss["supervised"]) == 0 and float(loss["loss"].detach()) == pytest.approx(
        float((0.5 * loss["instance"] + 2 * loss["neighbourhood"]).detach()), rel=1e-6
    )


def test_padding_changes_nothing():
    ours = module()
    torch.manual_seed(1)
    batch = {"image": torch.rand(5, 1, 8, 8), "strong": torch.rand(5, 1, 8, 8), "label": torch.arange(5)}
    batch |= {"labelled": torch.tensor([True, True, False, True, True]), "mask": torch.ones(5, dtype=torch.bool)}
    padded = {key: torch.cat([value, value[:2]]) for key, value in batch.items()}
    padded["mask"][5:] = False
    one, other = (ours.loss(ours.model, given) for given in (batch, padded))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-7)


# ---- the idea switched off -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stack", [None, 1])
def test_without_the_twin_and_with_all_labels_it_is_fedavg(stack):
    data = FederatedSemiSupervisedDataModule(clients=4, per_class=24, labelled=1.0, test="none")
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    ours = module(ins=0.0, sim=0.0, stack=stack)
    names = ("net", "norm", "in_channels", "image_size", "num_clients", "local_batch", "augment")
    torch.manual_seed(0)
    plain = FederatedModule(**{key: SMALL[key] for key in names}, stack=stack)
    plain.log = lambda *_, **__: None
    assert difference(state(ours.model.supervised), state(plain.model)) == 0
    for _ in range(2):
        ours.training_step(batch, 0)
        plain.training_step(batch, 0)
    assert difference(state(ours.model.supervised), state(plain.model)) < 1e-6
    # nothing trained the twin
    assert difference(state(ours.model.unsupervised), state(module().model.unsupervised)) < 1e-7


def test_untied_the_unlabelled_clients_leave_the_supervised_network_alone(rounds):
    ours = module(sim=0.0, weight_decay=0.1)
    down = ours.broadcast()
    up, _, _ = ours.local(rounds["kinds"], down, [1, 3])
    for name, value in up.items():
        assert all(torch.equal(row, down[name]) for row in value) == name.startswith("model.supervised."), name


def test_fedprox_weighs_as_much_as_the_authors_at_one(rounds):
    """theirs: loss + 0.5 sum ||w - w_g||^2, whose gradient is w - w_g: mu = 1 here."""
    ours = module(algorithm="fedprox", mu=1.0, momentum=0.0, weight_decay=0.0, lr=0.1)
    clients = Clients(
        ours.model, {n: v[None].clone() for n, v in ours.model.state_dict().items()}, ours.local_optimizer
    )
    with torch.no_grad():
        for value in clients.state.values():
            value += 1.0
    clients.corrections += ours.algorithm.corrections([0], ours.broadcast())
    start = {name: value.clone() for name, value in clients.state.items()}

    def nothing(model, batch):
        return {"loss": sum(p.sum() for p in model.parameters()) * 0.0}

    clients.step(nothing, {"image": torch.zeros(1, 1)})
    for name, value in start.items():
        torch.testing.assert_close(clients.state[name], value - 0.1)


# ---- the rest --------------------------------------------------------------------------------------------------------


def test_only_the_supervised_network_predicts():
    ours = module()
    x = torch.rand(3, 1, 8, 8)
    before = ours.predict(x)
    torch.testing.assert_close(before, ours.model.supervised(x).softmax(1).detach())
    with torch.no_grad():
        for p in ours.model.unsupervised.parameters():
            p.zero_()
    assert torch.equal(ours.predict(x), before)


def test_what_is_sent(rounds):
    ours = module()
    ours.training_step(rounds["kinds"], 0)
    one = sum(value.numel() * value.element_size() for value in ours.model.state_dict().values())
    assert ours.sent.tolist() == [4 * one, 4 * one]
    assert set(ours.logged) == {f"train/{n}" for n in ("loss", "supervised", "instance", "neighbourhood")}


def test_a_round_learns(rounds):
    ours = module(lr=0.05, norm="batch")
    logged = []
    for _ in range(6):
        ours.training_step(rounds["kinds"], 0)
        logged.append([ours.logged[f"train/{name}"] for name in ("supervised", "instance")])
    assert logged[-1][0] < logged[0][0] - 0.1 and logged[-1][1] < logged[0][1] - 0.5


def authors_state(blocks=(2, 2, 2, 2), classes=7, hidden=6, last=3):
    """Names and shapes of the authors' SemiFed around a ResNet, narrow."""
    found = {}

    def put(name, *shape):
        found[name] = torch.randn(*shape)

    def norm(name, width):
        for part in ("weight", "bias", "running_mean", "running_var"):
            put(f"{name}.{part}", width)
        found[f"{name}.num_batches_tracked"] = torch.tensor(3)

    for side in ("unsup_model.online_encoder", "sup_classifier"):
        put(f"{side}.conv1.weight", 64, 1, 3, 3)
        norm(f"{side}.bn1", 64)
        inside = 64
        for layer, count in enumerate(blocks, 1):
            wide = 64 * 2 ** (layer - 1)
            for block in range(count):
                where = f"{side}.layer{layer}.{block}"
                put(f"{where}.conv1.weight", wide, inside, 3, 3)
                put(f"{where}.conv2.weight", wide, wide, 3, 3)
                norm(f"{where}.bn1", wide)
                norm(f"{where}.bn2", wide)
                if inside != wide:
                    put(f"{where}.shortcut.0.weight", wide, inside, 1, 1)
                    norm(f"{where}.shortcut.1", wide)
                inside = wide
    put("sup_classifier.fc.weight", classes, 512), put("sup_classifier.fc.bias", classes)
    side = "unsup_model.online_encoder.fc.net"
    put(f"{side}.0.weight", hidden, 512), put(f"{side}.0.bias", hidden)
    norm(f"{side}.1", hidden)
    put(f"{side}.3.weight", last, hidden), put(f"{side}.3.bias", last)
    return found


def test_convert_state_dict():
    theirs = authors_state()
    hyperparameters, found = TwinSight.convert_state_dict({"state_dict": theirs})
    assert hyperparameters == {"net": "resnet18", "num_classes": 7, "in_channels": 1, "projection": [6, 3]}
    with torch.device("meta"):
        ours = TwinSight(**hyperparameters)
    ours.load_state_dict(found, assign=True)
    head = "model.unsupervised.head.3.weight"
    assert torch.equal(ours.state_dict()[head], theirs["unsup_model.online_encoder.fc.net.3.weight"])
    with pytest.raises(KeyError, match=r"unsup_model.online_predictor"):
        TwinSight.convert_state_dict({**theirs, "unsup_model.online_predictor.net.0.weight": torch.zeros(1)})


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"ins": -1.0}, "ins=-1.0"),
        ({"sim": -0.1}, "sim=-0.1"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"pseudo": "mixmatch"}, "pseudo is 'mixmatch'; '', 'fixmatch' or 'freematch'"),
        ({"projection": [8]}, r"projection is \[8\]"),
        ({"threshold_range": [0.5]}, "two numbers or none"),
        ({"threshold": 1.5}, "threshold=1.5"),
        ({"labelled_batch": -1}, "labelled_batch=-1"),
        ({"lr": -0.1}, "lr is -0.1"),
    ],
)
def test_bad_arguments(arguments, match):
    with pytest.raises(ValueError, match=match) as caught:
        module(**arguments)
    assert "\n" not in str(caught.value)
