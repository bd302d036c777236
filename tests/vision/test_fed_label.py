"""FedLabel: the choice of the expert against a loop and by hand, what the teacher is, limits, bad inputs."""

import math

import pytest
import torch
from torch.nn import functional as F

from zoo.engines.federated import FederatedModule
from zoo.vision.federated.data_semi_supervised import FederatedSemiSupervisedDataModule
from zoo.vision.federated.fed_label import FedLabel, assimilate

SMALL = {
    "net": {"name": "cnn", "widths": [4, 6], "features": 8}, "norm": "none", "in_channels": 1, "image_size": 8,
    "num_clients": 4, "local_batch": 16, "labelled_batch": 8, "local_epochs": 1, "augment": ["crop:1"],
    "strong": ["crop:1", "noise:0.1"], "threshold": 0.1,
}  # fmt: skip


def module(**changes):
    torch.manual_seed(0)
    found = FedLabel(**{**SMALL, **changes})
    found.logged = {}
    found.log = lambda name, value, **_: found.logged.__setitem__(name, float(value))
    return found


def first(**arguments):
    data = FederatedSemiSupervisedDataModule(**{"clients": 4, "per_class": 24, "test": "none", **arguments})
    data.setup("fit")
    return next(iter(data.train_dataloader()))


@pytest.fixture(scope="module")
def batch():
    return first(labelled=0.2)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def difference(a, b):
    return max(float((a[n] - b[n]).abs().max()) for n in a)


# ---- the expert ------------------------------------------------------------------------------------------------------


def slow(local, world, student, mask, threshold, expert):
    """One sample after the other."""
    rows = []
    for p_l, p_g, s, valid in zip(local.tolist(), world.tolist(), student, mask.tolist(), strict=True):
        c_l, c_g = max(p_l), max(p_g)
        ours = c_l >= c_g if expert == "select" else expert == "local"
        (p, c), (other, less) = ((p_l, c_l), (p_g, c_g)) if ours else ((p_g, c_g), (p_l, c_l))
        log = [float(v) for v in F.log_softmax(s, 0)]
        sure = valid and c >= threshold
        agree = sure and p_l.index(c_l) == p_g.index(c_g)
        pseudo = -log[p.index(c)] if sure else 0.0
        divergence = sum(q * (math.log(q) - v) for q, v in zip(other, log, strict=True) if q > 0)
        rows.append((pseudo, less / c * divergence if agree else 0.0, sure, agree, ours and sure))
    return rows


@pytest.mark.parametrize("expert", ["select", "local", "global"])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.8])
def test_assimilate_against_a_loop(expert, threshold):
    torch.manual_seed(1)
    local, world = (torch.randn(40, 4, dtype=torch.float64).mul(2).softmax(1) for _ in range(2))
    student, mask = torch.randn(40, 4, dtype=torch.float64), torch.arange(40) < 33
    found = assimilate(local, world, student, mask, threshold, expert)
    for name, wanted in zip(
        ("pseudo", "consistency", "sure", "agree", "local"),
        zip(*slow(local, world, student, mask, threshold, expert), strict=True),
        strict=True,
    ):
        torch.testing.assert_close(
            found[name].double(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-10, atol=1e-12
        )
    assert found["sure"].any()


def test_assimilate_by_hand():
    """The local model surer and alone in its word; the global one surer, both agreed; nobody sure; a tie: the local."""
    local = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.55, 0.45], [0.8, 0.2]])
    world = torch.tensor([[0.2, 0.8], [1.0, 0.0], [0.5, 0.5], [0.2, 0.8]])
    student = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [0.25, 0.75]]).log()
    found = assimilate(local, world, student, torch.ones(4, dtype=torch.bool), 0.8)
    assert found["sure"].tolist() == [True, True, False, True]
    assert found["local"].tolist() == [True, False, False, True]
    assert found["agree"].tolist() == [False, True, False, False]
    torch.testing.assert_close(found["pseudo"], torch.tensor([math.log(2), math.log(2), 0.0, math.log(4)]))
    # the other is the local model: KL((0.6, 0.4) || (0.5, 0.5)), weighted 0.6 / 1
    wanted = 0.6 * (0.6 * math.log(1.2) + 0.4 * math.log(0.8))
    torch.testing.assert_close(found["consistency"], torch.tensor([0.0, wanted, 0.0, 0.0]))


def test_the_student_learns_nothing_from_itself():
    """Two equal models: the expert is the local one, all agree, and a student that says the same has no divergence."""
    p = torch.rand(5, 3, generator=torch.Generator().manual_seed(0)).softmax(1)
    found = assimilate(p, p, p.log(), torch.ones(5, dtype=torch.bool), 0.0)
    assert found["agree"].all() and found["local"].all()
    torch.testing.assert_close(found["consistency"], torch.zeros(5), atol=1e-6, rtol=0)


# ---- a client's loss -------------------------------------------------------------------------------------------------


def step_batch(ours, unlabelled=7, labelled=3):
    torch.manual_seed(2)
    found = {
        "known": torch.rand(labelled, 1, 8, 8), "label": torch.arange(labelled),
        "labelled": torch.ones(labelled, dtype=torch.bool), "image": torch.rand(unlabelled, 1, 8, 8),
        "strong": torch.rand(unlabelled, 1, 8, 8), "mask": torch.ones(unlabelled, dtype=torch.bool),
        "global": torch.randn(unlabelled, 10).mul(2).softmax(1),
    }  # fmt: skip
    return found


@pytest.mark.parametrize("average", ["masked", "batch"])
def test_loss_is_the_sum_of_its_terms(average):
    ours = module(threshold=0.4, average=average, weight=0.7, consistency=0.3)
    batch = step_batch(ours)
    local = ours.model(batch["image"]).softmax(1).detach()
    terms = assimilate(local, batch["global"], ours.model(batch["strong"]), batch["mask"], 0.4)
    sure, agree = int(terms["sure"].sum()), int(terms["agree"].sum())
    assert 0 < sure < 7
    pseudo = terms["pseudo"].sum() / (sure if average == "masked" else 7)
    consistency = terms["consistency"].sum() / (max(agree, 1) if average == "masked" else 7)
    wanted = F.cross_entropy(ours.model(batch["known"]), batch["label"]) + 0.7 * (pseudo + 0.3 * consistency)
    found = ours.loss(ours.model, batch)
    torch.testing.assert_close(found["loss"], wanted, rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad(loss, list(ours.model.parameters())) for loss in (found["loss"], wanted)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_where_nobody_is_sure_only_labels_teach():
    ours = module(threshold=1.0)
    batch = step_batch(ours)
    found = ours.loss(ours.model, batch)
    assert all(found[name].item() == 0 for name in ("pseudo", "consistency", "sure_share"))
    torch.testing.assert_close(found["loss"], F.cross_entropy(ours.model(batch["known"]), batch["label"]))
    grads = torch.autograd.grad(found["loss"], list(ours.model.parameters()))
    assert all(g.isfinite().all() for g in grads)


def test_a_client_without_labels_only_takes_pseudo_labels():
    ours = module()
    batch = step_batch(ours)
    batch["label"], batch["labelled"] = torch.full((3,), -1), torch.zeros(3, dtype=torch.bool)
    found = ours.loss(ours.model, batch)
    assert float(found["supervised"]) == 0 and float(found["loss"]) > 0


def test_padding_changes_nothing():
    ours = module(threshold=0.3)
    batch = step_batch(ours)
    padded = {k: torch.cat([v, v[:2]]) if k in ("image", "strong", "mask", "global") else v for k, v in batch.items()}
    padded["mask"][7:] = False
    one, other = (ours.loss(ours.model, given) for given in (batch, padded))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-7)


# ---- a round ---------------------------------------------------------------------------------------------------------


SETTINGS = [{}, {"average": "batch", "local_epochs": 2}, {"expert": "global", "norm": "group"}, {"norm": "batch"}]


@pytest.mark.parametrize("changes", SETTINGS)
def test_together_equals_one_by_one(batch, changes):
    found = []
    for stack in (None, 1):
        ours = module(**changes, stack=stack)
        for _ in range(2):
            ours.training_step(batch, 0)
        found.append(state(ours.model))
    for name, value in found[1].items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-5, atol=1e-5)


def test_the_teacher_is_what_was_sent_in_eval_mode(batch):
    """Every step's "global" is the global model's word on the weak view, whatever the local weights are by then."""
    ours = module(norm="batch", lr=0.5)
    with torch.no_grad():
        for name, value in ours.model.named_buffers():
            if name.endswith("running_mean"):
                value.uniform_(-1, 1)
    seen, loss = [], ours.loss

    def watch(model, batch):
        seen.append((batch["image"].detach(), batch["global"].detach()))
        return loss(model, batch)

    ours.loss, ours._hp["stack"] = watch, 1
    ours.local(batch, ours.broadcast(), [0, 1])
    assert len(seen) > 2 and ours.model.training
    ours.model.eval()
    for image, world in seen:
        torch.testing.assert_close(world, ours.model(image).softmax(1).detach(), rtol=1e-5, atol=1e-6)


def test_at_the_first_step_both_models_are_the_same(batch):
    """Without augmentation of its own, the first step's local model is the global one: all labels are local."""
    ours = module(local_steps=1)
    ours.training_step(batch, 0)
    assert ours.logged["train/local_share"] == pytest.approx(1.0, abs=0.1)
    assert ours.logged["train/sure_share"] == 1.0


def test_hidden_labels_change_nothing(batch):
    found = []
    for hidden in (-1, 7):
        ours = module()
        ours.training_step({**batch, "label": torch.where(batch["labelled"], batch["label"], hidden)}, 0)
        found.append(state(ours.model))
    assert difference(*found) == 0


def test_steps_are_counted_over_unlabelled_samples(batch):
    ours, seen = module(local_epochs=3), []
    loss = ours.loss
    ours.loss = lambda model, given: (seen.append(len(given["known"])), loss(model, given))[1]
    ours._hp["stack"] = 1
    ours.local(batch, ours.broadcast(), [1])
    unlabelled = batch["size"][1] - batch["known"][1]
    assert seen == [8] * (3 * -(-unlabelled // 16))


@pytest.mark.parametrize("stack", [None, 1])
def test_without_pseudo_labels_it_is_fedavg_on_the_labelled_samples(stack):
    """Whole batches, so that the order does not matter: two clients with four labelled samples each."""
    given = {"clients": 2, "partition": "iid", "per_class": 10, "val": 0.2, "labelled": 0.1}
    whole, alone = first(**given), first(**given, unlabelled=False)
    assert whole["known"] == alone["size"] == [4, 4]
    assert whole["size"] == [40, 40]
    sizes = {"num_clients": 2, "local_steps": 3, "augment": [], "stack": stack, "threshold": 0.0}
    ours = module(weight=0.0, labelled_batch=4, **sizes)
    names = ("net", "norm", "in_channels", "image_size")
    torch.manual_seed(0)
    plain = FederatedModule(
        **{key: SMALL[key] for key in names}, num_clients=2, local_steps=3, local_batch=4, lr=0.03, weight_decay=5e-4,
        stack=stack,
    )  # fmt: skip
    plain.log = lambda *_, **__: None
    for _ in range(2):
        ours.training_step(whole, 0)
        plain.training_step(alone, 0)
    assert difference(state(ours.model), state(plain.model)) < 1e-6
    assert set(ours.logged) == {"train/loss", "train/supervised"}


def test_nothing_but_the_model_is_sent(batch):
    ours = module()
    ours.training_step(batch, 0)
    one = sum(value.numel() * value.element_size() for value in ours.model.state_dict().values())
    assert ours.sent.tolist() == [4 * one, 4 * one]


def test_a_round_learns(batch):
    ours = module(lr=0.2, threshold=0.8, local_epochs=2)
    logged = []
    for _ in range(12):
        ours.training_step(batch, 0)
        logged.append(ours.logged["train/supervised"])
    assert logged[-1] < math.log(10) - 0.3


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"expert": "both"}, "expert is 'both'; 'select', 'local' or 'global'"),
        ({"average": "all"}, "average is 'all'"),
        ({"threshold": 1.2}, "threshold=1.2"),
        ({"weight": -1.0}, "weight=-1.0"),
        ({"consistency": -1.0}, "consistency=-1.0"),
        ({"labelled_batch": 0}, "labelled_batch=0"),
        ({"local_epochs": 0}, "local_epochs is 0"),
    ],
)
def test_bad_arguments(arguments, match):
    with pytest.raises(ValueError, match=match) as caught:
        module(**arguments)
    assert "\n" not in str(caught.value)


def test_data_without_known_labels_are_refused(batch):
    with pytest.raises(ValueError, match="'known'"):
        module().training_step({k: v for k, v in batch.items() if k != "known"}, 0)
