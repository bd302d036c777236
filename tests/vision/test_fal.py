"""FAL: attacks against slow twins and in their ball, rounds against adversarial SGD, the proof's network, refusals."""

import json
import math
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.engines.federated import FederatedModule
from zoo.nn.adversary import Adversary, attacked
from zoo.vision.federated.data_federated import FederatedClassificationDataModule
from zoo.vision.federated.fal import FAL, TwoLayer, separability, separable


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> bool:
    theirs = theirs.detach()
    return float((ours.detach() - theirs).abs().max()) <= tolerance * float(theirs.abs().max().clamp(min=1e-12))


def tiny(seed: int = 0, **changes: Any) -> FAL:
    torch.manual_seed(seed)
    sizes = {"num_classes": 3, "in_channels": 1, "image_size": 4, "num_clients": 4, "local_batch": 4, "lr": 0.1}
    model = FAL.from_variant("tiny", **{**sizes, **changes})
    model.log = lambda *a, **k: None  # type: ignore[method-assign]
    return model


def round_of(sizes: tuple[int, ...] = (7, 10, 4), seed: int = 0, classes: int = 3) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    clients = list(range(len(sizes)))
    found: dict[str, Any] = {"client": clients, "size": list(sizes), "work": [1.0] * len(sizes)}
    found["image"] = torch.rand(sum(sizes), 1, 4, 4, generator=generator)
    found["label"] = torch.randint(classes, (sum(sizes),), generator=generator)
    return found | {"seed": [100 * seed + c for c in clients]}


def after(model: FederatedModule, rounds: int = 2, classes: int = 3, **how: Any) -> dict[str, Tensor]:
    for i in range(rounds):
        model.training_step(round_of(seed=i, classes=classes, **how), i)
    return {k: v.clone() for k, v in model.state_dict().items()}


def net() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))
    return model, torch.rand(5, 1, 4, 4), torch.randint(3, (5,))


# ---- attacks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pgd_linf", "pgd_l2", "fgsm"])
def test_attacks_equal_a_loop_over_samples(kind: str) -> None:
    model, x, y = net()
    attack = Adversary(kind, radius=0.2, step=0.07, steps=4)
    start = attack.draw(x.shape, torch.Generator().manual_seed(0))
    found = attack(lambda z: F.cross_entropy(model(z), y, reduction="none"), x, start)
    steps, length = (1, 0.2) if kind == "fgsm" else (4, 0.07)
    for i in range(len(x)):
        z = project(x[i] + 0.2 * start[i], x[i], kind)
        for _ in range(steps):
            z = z.detach().requires_grad_()
            F.cross_entropy(model(z[None]), y[i : i + 1]).backward()
            direction = z.grad / z.grad.norm() if kind == "pgd_l2" else z.grad.sign()
            z = project(z.detach() + length * direction, x[i], kind)
        assert close(found[i], z)
    assert not found.requires_grad


def project(z: Tensor, x: Tensor, kind: str, radius: float = 0.2) -> Tensor:
    away = z - x
    if kind == "pgd_l2":
        away = away * min(1.0, radius / float(away.norm()))
    else:
        away = away.clamp(-radius, radius)
    return (x + away).clamp(0, 1)


@pytest.mark.parametrize("kind", ["pgd_linf", "pgd_l2", "fgsm"])
@pytest.mark.parametrize("radius", [0.0, 0.03, 0.6])
def test_attacks_stay_in_their_ball_and_raise_the_loss(kind: str, radius: float) -> None:
    model, x, y = net()
    x[0] = 0.0
    x[1] = 1.0
    attack = Adversary(kind, radius=radius, step=0.2, steps=5)

    def loss(z: Tensor) -> Tensor:
        return F.cross_entropy(model(z), y, reduction="none")

    found = attack(loss, x, attack.draw(x.shape, torch.Generator().manual_seed(0)))
    away = (found - x).flatten(1)
    size = away.norm(dim=1) if kind == "pgd_l2" else away.abs().amax(1)
    assert float(size.max()) <= radius + 1e-6 and float(found.min()) >= 0 and float(found.max()) <= 1
    if radius == 0:
        assert torch.equal(found, x)
    else:
        assert float(loss(attack(loss, x)).mean().detach()) > float(loss(x).mean().detach())
    free = Adversary(kind, radius=0.6, step=0.2, steps=5, low=None, high=None)
    assert radius != 0.6 or float(free(loss, x).max()) > 1


def test_a_linear_loss_is_attacked_in_closed_form() -> None:
    w = torch.tensor([[3.0, -4.0]])
    x = torch.full((1, 2), 0.5)
    linf, l2 = (Adversary(kind, radius=0.1, step=0.05, steps=9) for kind in ("pgd_linf", "pgd_l2"))
    assert close(linf(lambda z: (z * w).sum(1), x), torch.tensor([[0.6, 0.4]]))
    assert close(l2(lambda z: (z * w).sum(1), x), torch.tensor([[0.56, 0.42]]))
    flat = l2(lambda z: 0 * z.sum(1), x)  # no slope: no way to go, and no division by zero
    assert torch.equal(flat, x)


def test_starts_lie_in_the_unit_ball() -> None:
    for kind in ("pgd_linf", "pgd_l2"):
        start = Adversary(kind).draw(torch.Size((400, 6)), torch.Generator().manual_seed(0))
        size = start.norm(dim=1) if kind == "pgd_l2" else start.abs().amax(1)
        assert 0.95 < float(size.max()) <= 1
        assert float(start.mean(0).abs().max()) < 0.1


@pytest.mark.parametrize("training", [False, True])
def test_batch_norm_does_not_remember_attacks(training: bool) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.Sequential(nn.BatchNorm1d(3)))
    model[2].eval()  # frozen on its own
    model[0].train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with attacked(model, training):
        assert model[2][0].training == training
        out = [model(torch.rand(4, 1, 4, 4)) for _ in range(2)]
        assert abs(float(out[0].mean())) < 1e-6 if training else True  # statistics of the batch
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training and not model[2][0].training and model[2][0].track_running_stats


# ---- rounds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attack": "pgd_l2", "rho": 0.5, "weighting": "size", "server_lr": 0.5},
        {"attack": "fgsm", "random_start": False, "clean_weight": 0.3, "algorithm": "scaffold"},
        {"once": True, "local_epochs": 2},
        {"net": {"name": "cnn", "widths": [4], "features": 8}, "norm": "batch", "attack_mode": "train"},
    ],
)
def test_together_equals_one_by_one(changes: dict[str, Any]) -> None:
    one, all_ = (after(tiny(stack=stack, **changes)) for stack in (1, None))
    wrong = [k for k, v in one.items() if v.is_floating_point() and not close(all_[k].double(), v.double())]
    assert not wrong


@pytest.mark.parametrize("off", [{"adversarial": False}, {"rho": 0.0}, {"clean_weight": 1.0, "random_start": False}])
def test_without_attacks_it_is_federated_averaging_bit_for_bit(off: dict[str, Any]) -> None:
    own = tiny(weighting="size", **off)
    torch.manual_seed(0)
    plain = FederatedModule(
        net={"name": "mlp", "hidden": [32]}, num_classes=3, in_channels=1, image_size=4, num_clients=4, local_batch=4,
        norm="none", lr=0.1, momentum=0.0, weight_decay=0.0,
    )  # fmt: skip
    plain.log = lambda *a, **k: None  # type: ignore[method-assign]
    a, b = after(own), after(plain)
    assert all(torch.equal(a[k], b[k]) for k in b)


def test_attacks_from_a_round_on_are_fine_tuning() -> None:
    """Federated averaging bit for bit until then, and FAL from that model afterwards."""
    late, plain, fal = (tiny(**given) for given in ({"attack_from": 2}, {"adversarial": False}, {}))
    own, average = after(late), after(plain)
    assert all(torch.equal(value, average[name]) for name, value in own.items())
    fal.load_state_dict(average)
    for model in (late, plain, fal):
        model.training_step(round_of(seed=2), 2)
    own, tuned = late.state_dict(), fal.state_dict()
    assert all(torch.equal(value, tuned[name]) for name, value in own.items())
    assert not torch.equal(own["model.head.weight"], plain.state_dict()["model.head.weight"])
    with pytest.raises(ValueError, match="attack_from is -1"):
        tiny(attack_from=-1)


def test_one_step_of_all_clients_is_central_adversarial_sgd() -> None:
    """K = 1, eta_global = 1, equal sizes: a step on the union, attacked at its weights."""
    model = tiny(local_steps=1, local_batch=5, random_start=False, attack_steps=3)
    batch = round_of((5, 5, 5))
    central = tiny()
    x, y = batch["image"], batch["label"]
    attack = Adversary("pgd_linf", radius=0.1, step=0.05, steps=3)
    worst = attack(lambda z: F.cross_entropy(central.model(z), y, reduction="none"), x)
    F.cross_entropy(central.model(worst), y).backward()
    model.training_step(batch, 0)
    for (name, p), q in zip(central.model.named_parameters(), model.model.parameters(), strict=True):
        assert p.grad is not None and close(q, p - 0.1 * p.grad), name


def test_local_steps_attack_the_local_model_and_once_the_global() -> None:
    """A client's rounds as a plain loop; ``once`` keeps the attacks at the first weights."""
    for once in (False, True):
        model = tiny(local_epochs=3, local_batch=6, random_start=False, once=once)
        batch = round_of((6,))
        slow = tiny()
        attack = Adversary("pgd_linf", radius=0.1, step=0.05, steps=2)
        x, y = batch["image"], batch["label"]
        worst = x
        for step in range(3):
            if step == 0 or not once:
                worst = attack(lambda z, net=slow.model, y=y: F.cross_entropy(net(z), y, reduction="none"), x)
            slow.zero_grad()
            F.cross_entropy(slow.model(worst), y).backward()
            with torch.no_grad():
                for p in slow.model.parameters():
                    p -= 0.1 * p.grad
        model.training_step(batch, 0)
        assert all(close(p, q) for p, q in zip(model.model.parameters(), slow.model.parameters(), strict=True))


def test_the_server_goes_its_own_step_along_the_plain_mean() -> None:
    full, half = tiny(), tiny(server_lr=0.5)
    start = {k: v.clone() for k, v in full.model.state_dict().items()}
    batch = round_of((3, 9))
    singles = []
    for client in range(2):
        lone = tiny()
        rows = slice(0, 3) if client == 0 else slice(3, 12)
        one = {"image": batch["image"][rows], "label": batch["label"][rows], "work": [1.0], "client": [client]}
        lone.training_step({**one, "size": [batch["size"][client]], "seed": [batch["seed"][client]]}, 0)
        singles.append(lone.model.state_dict())
    full.training_step(batch, 0)
    half.training_step(batch, 0)
    for name, first in start.items():
        mean = (singles[0][name] + singles[1][name]) / 2  # though one has three times the samples
        assert close(full.model.state_dict()[name], mean)
        assert close(half.model.state_dict()[name], (first + mean) / 2)


def test_clean_weight_mixes_the_losses() -> None:
    batch = {"image": torch.rand(3, 1, 4, 4), "adversarial": torch.rand(3, 1, 4, 4), "label": torch.tensor([0, 1, 2])}
    batch["mask"] = torch.tensor([True, True, False])
    losses = [float(tiny(clean_weight=w).loss(tiny().model, batch)["loss"]) for w in (0.0, 0.25, 1.0)]
    assert losses[1] == pytest.approx(0.75 * losses[0] + 0.25 * losses[2], rel=1e-5)
    model = tiny().model
    wanted = F.cross_entropy(model(batch["adversarial"][:2]), batch["label"][:2])
    assert losses[0] == pytest.approx(float(wanted), rel=1e-5)


def test_binary_losses_by_hand() -> None:
    logits, label = torch.tensor([[1.0, 3.0], [0.5, 0.0]]), torch.tensor([1, 1])  # f = 2 and -0.5, y = 1
    found = {c: tiny(num_classes=2, criterion=c).each_loss(logits, label).tolist() for c in ("absolute", "squared")}
    assert found == {"absolute": [1.0, 1.5], "squared": [1.0, 2.25]}
    logistic = tiny(num_classes=2).each_loss(logits, label)
    assert close(logistic, torch.tensor([1 + math.exp(-2), 1 + math.exp(0.5)]).log())


# ---- evaluation -----------------------------------------------------------------------------------------------------


def test_robust_accuracy_falls_with_rho_to_nothing(tmp_path: Path) -> None:
    """No gradient masking: a trained network withstands small attacks, and none that may do anything."""
    data = FederatedClassificationDataModule(clients=3, test="none", rounds=3, seed=0)
    figures = {}
    for rho in (0.0, 0.05, 1.0):
        torch.manual_seed(0)
        model = FAL.from_variant(
            "tiny", in_channels=1, image_size=8, num_clients=3, adversarial=False, rho=rho,
                attack_step=max(rho / 4, 1e-3),
            eval_steps=20, lr=0.3,
        )  # fmt: skip
        trainer = lightning.Trainer(
            default_root_dir=tmp_path, max_epochs=3, logger=False, enable_checkpointing=False, accelerator="cpu",
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
        )  # fmt: skip
        trainer.fit(model, datamodule=data)
        (figures[rho],) = trainer.test(model, datamodule=data, verbose=False)
    assert figures[0.0]["test/robust_accuracy"] == pytest.approx(figures[0.0]["test/accuracy"])
    assert figures[0.0]["test/accuracy"] > figures[0.05]["test/robust_accuracy"] + 0.02 > 0.5
    assert figures[0.05]["test/robust_accuracy"] <= figures[0.05]["test/fgsm_accuracy"]
    assert figures[1.0]["test/robust_accuracy"] == 0.0
    assert figures[1.0]["test/robust_loss"] > figures[0.05]["test/robust_loss"]


# ---- the analysed network -------------------------------------------------------------------------------------------


def theory(**changes: Any) -> FAL:
    given = {
        "net": {"name": "two_layer", "width": 64},
        "num_classes": 2,
        "attack": "pgd_l2",
        "clamp": False,
        "rho": 0.05,
    }
    return tiny(**{**given, **changes})


def test_the_analysed_network_by_hand() -> None:
    model = TwoLayer(2, width=8)
    assert [n for n, _ in model.named_parameters()] == ["u"] and torch.equal(model.a.abs(), torch.full((8,), 0.5))
    with torch.no_grad():
        model.u += torch.randn(8, 2)
    x = torch.randn(3, 2)
    for row, out in zip(x, model(x), strict=True):
        f = sum(
            float(a) * max(0.0, float((w + u) @ row + b))
            for a, w, u, b in zip(model.a, model.w, model.u, model.b, strict=True)
        )
        assert out.tolist() == pytest.approx([-f / 2, f / 2], abs=1e-5)
    assert float(model.moved()) == pytest.approx(max(float(u.norm()) for u in model.u))
    flips = [
        (float(w @ r + b) > 0) != (float((w + u) @ r + b) > 0)
        for r in x
        for w, u, b in zip(model.w, model.u, model.b, strict=True)
    ]
    assert float(model.flipped(x)) == pytest.approx(sum(flips) / len(flips))
    wide = TwoLayer(10, width=100_000)
    assert float(wide.w.var()) == pytest.approx(1e-5, rel=0.02) and float(wide.b.var()) == pytest.approx(1e-5, rel=0.03)


def test_constants_of_the_proof_stay_and_are_not_sent() -> None:
    model = theory()
    before = {n: getattr(model.model, n).clone() for n in TwoLayer.constants}
    after(model, classes=2)
    assert all(torch.equal(getattr(model.model, n), v) for n, v in before.items())
    assert float(model.model.moved()) > 0
    assert list(model.broadcast()) == ["model.u"]
    assert model.sent.tolist() == [2 * 3 * 64 * 16 * 4] * 2  # rounds, clients, neurons, inputs, bytes
    together, single = (after(theory(stack=stack), classes=2) for stack in (None, 1))
    assert close(together["model.u"], single["model.u"]) and close(together["least"], single["least"])


def test_generated_classes_are_as_far_apart_as_asked(tmp_path: Path) -> None:
    separable(tmp_path, seed=3, gap=0.6)
    file = str(tmp_path / "partition.json")
    data = FederatedClassificationDataModule(root=str(tmp_path), partition_file=file, val=0.0, test="none", rounds=1)
    data.setup("fit")
    assert data.describe() == {"num_classes": 2, "in_channels": 10, "image_size": 1, "num_clients": 5}
    batch = next(iter(data.train_dataloader()))
    assert close(batch["image"].flatten(1).norm(dim=1), torch.ones(100))
    assert float(separability(batch["image"], batch["label"])) == pytest.approx(0.6, abs=1e-5)
    shares = [batch["label"][20 * c : 20 * c + 20].sum().item() for c in range(5)]
    assert shares == [5, 15, 5, 15, 5]
    assert sorted(i for own in json.loads(Path(file).read_text())["clients"] for i in own) == list(range(100))


def test_theory_warns_where_no_robust_fit_exists(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    separable(tmp_path, seed=3, gap=0.6)
    file = str(tmp_path / "partition.json")
    data = FederatedClassificationDataModule(root=str(tmp_path), partition_file=file, val=0.0, test="none", rounds=1)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    for rho, warned in ((0.2, False), (0.3, True)):
        caplog.clear()
        model = theory(in_channels=10, image_size=1, num_clients=5, rho=rho, local_steps=2)
        logged = {}
        model.log = lambda name, value, logged=logged, **k: logged.__setitem__(name, float(value))  # type: ignore[method-assign]
        model.training_step(batch, 0)
        assert ("no network can fit" in caplog.text) == warned
        assert logged["train/separability"] == pytest.approx(0.6, abs=1e-5)
        assert logged["train/robust_loss"] == pytest.approx(float(model.least)) and logged["train/moved"] > 0
        assert 0 <= logged["train/flipped"] <= 1 and logged["train/drift"] > 0


def test_one_class_is_infinitely_separable() -> None:
    assert math.isinf(float(separability(torch.rand(3, 2), torch.zeros(3))))
    assert float(separability(torch.tensor([[0.0, 0], [3, 4], [0, 1]]), torch.tensor([0, 1, 0]))) == pytest.approx(
        18**0.5
    )


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rho": -0.1}, "rho must not be negative"),
        ({"attack": "pgd"}, "attack is 'pgd'; one of pgd_linf, pgd_l2, fgsm"),
        ({"attack_mode": "evil"}, "Did you mean 'eval'"),
        ({"attack_steps": 0}, "at least 1"),
        ({"attack_step": -1.0}, "must not be negative"),
        ({"local_steps": 0}, "local_steps is 0"),
        ({"clean_weight": 1.5}, "clean_weight in [0, 1]"),
        ({"criterion": "absolute"}, "is for two classes; num_classes is 3"),
        ({"weighting": "sizes"}, "weighting is 'sizes'"),
        ({"net": {"name": "two_layer"}}, "two-layer network is for two classes"),
        ({"net": {"name": "two_layer", "m": 4}, "num_classes": 2}, "no argument 'm'"),
    ],
)
def test_refuses(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as caught:
        tiny(**changes)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_refuses_pictures_out_of_range_and_labels_without_a_class() -> None:
    batch = round_of()
    with pytest.raises(ValueError, match=r"goes from .* to .*; attacks are kept in \[0, 1\]"):
        tiny().training_step({**batch, "image": 2 * batch["image"]}, 0)
    tiny(clamp=False).training_step({**batch, "image": 2 * batch["image"]}, 0)
    with pytest.raises(ValueError, match="A label is 2; num_classes is 2"):
        tiny(num_classes=2).training_step(batch, 0)
    with pytest.raises(ValueError, match="No attack 'pgd'"):
        Adversary("pgd")
