"""FedImpro: parity with a recorded round, estimates and losses against slow twins, the server's mixtures, refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from zoo.core import ZooError
from zoo.engines.federated import FederatedModule
from zoo.vision.federated.fed_impro import SCHEDULES, FedImpro, Gaussians, alignment

GOLDEN = Path(__file__).parent.parent / "golden" / "fed_impro.safetensors"
CLASSES = 3


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> bool:
    theirs = theirs.detach()
    return float((ours.detach() - theirs).abs().max()) <= tolerance * float(theirs.abs().max().clamp(min=1e-12))


def tiny(seed: int = 0, **changes: Any) -> FedImpro:
    torch.manual_seed(seed)
    sizes = {"num_classes": CLASSES, "in_channels": 1, "image_size": 8, "num_clients": 4, "local_batch": 4}
    model = FedImpro.from_variant("tiny", **{**sizes, **changes})
    model.log = lambda *a, **k: None  # type: ignore[method-assign]
    return model


def round_of(
    sizes: tuple[int, ...] = (7, 10, 4), clients: tuple[int, ...] = (0, 2, 3), seed: int = 0
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(sum(sizes), 1, 8, 8, generator=generator)
    label = torch.randint(CLASSES, (sum(sizes),), generator=generator)
    return {
        "image": image,
        "label": label,
        "client": list(clients),
        "size": list(sizes),
        "work": [1.0] * len(sizes),
        "seed": [100 * seed + c for c in clients],
    }


def after(model: FederatedModule, rounds: int = 2) -> dict[str, Tensor]:
    for i in range(rounds):
        model.training_step(round_of(seed=i), i)
    return {k: v.clone() for k, v in model.state_dict().items()}


def gaussians(clients: int = 2, d: int = 5, limit: float = 10.0, **how: Any) -> Gaussians:
    generator = torch.Generator().manual_seed(9)
    mean, std = torch.rand(2, clients, CLASSES, d, generator=generator)
    return Gaussians(mean, std, limit, **how)


def features(steps: int = 3, clients: int = 2, b: int = 6, d: int = 5) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Local batches; no client ever sees the last class, and the second client has one sample of class 1."""
    generator = torch.Generator().manual_seed(4)
    found = []
    for step in range(steps):
        label = torch.randint(CLASSES - 1, (clients, b), generator=generator)
        label[1] = 0
        label[1, 0] = int(step == 1)
        mask = torch.rand(clients, b, generator=generator) < 0.8
        mask[1, 0] = True
        found.append((torch.randn(clients, b, d, generator=generator) + label[..., None], label, mask))
    return found


# ---- parity ---------------------------------------------------------------------------------------------------------


def test_a_round_equals_the_authors() -> None:
    golden = load_file(GOLDEN)
    sizes = {"num_classes": 4, "image_size": 8, "num_clients": 3, "local_batch": 8}
    model = FedImpro(
        net={"name": "resnet10", "width": 3}, ramp=500, authors_update=True, authors_ramp=True, stack=1, **sizes
    )
    model.log = lambda *a, **k: None  # type: ignore[method-assign]
    state = model.state_dict()
    model.load_state_dict(state | {k.removeprefix("start."): v for k, v in golden.items() if k.startswith("start.")})
    model.round += 3
    original, clients = model.local_batch, [0, 2]

    def recorded(samples: Any, step: int, count: int) -> dict[str, Tensor]:
        found = original(samples, step, count)
        assert found["noise"].shape == (1, 12, 12 * 8 // 4 * 4)  # 4 classes three times: a little more than 8
        return found | {"noise": golden[f"noise.{clients.index(samples.ids[0])}.{step}"][None]}

    model.local_batch = recorded  # type: ignore[method-assign]
    batch = {"image": golden["image"], "label": golden["label"], "client": clients, "size": [16, 8]}
    model.training_step({**batch, "work": [1.0, 1.0], "seed": [11, 13]}, 0)
    wanted = {k.removeprefix("after."): v for k, v in golden.items() if k.startswith("after.")}
    wanted = {k: v for k, v in wanted.items() if v.is_floating_point()}  # batch norm's counters they round down
    assert {"feature_mean", "feature_std", "model.stem.0.weight"} < wanted.keys()
    wrong = [k for k, v in wanted.items() if not close(model.state_dict()[k].double(), v.double())]
    assert not wrong


def test_converts_their_resnets_and_no_others() -> None:
    model = FedImpro(net={"name": "resnet10", "width": 64}, num_classes=7, features="none")
    theirs = {}
    for name, value in model.model.state_dict().items():
        for new, old in (("stem.0.", "conv1."), ("stem.1.", "bn1."), ("head.", "linear."), (".norm", ".bn")):
            name = name.replace(new, old)
        theirs[f"module.{name}"] = value
    given, state = FedImpro.convert_state_dict({"model_state_dict": theirs})
    assert given == {"net": "resnet10", "num_classes": 7, "in_channels": 3, "norm": "batch", "features": "none"}
    found = FedImpro(**given)
    found.load_state_dict(found.state_dict() | state)
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(found.predict(x), model.predict(x))
    with pytest.raises(ZooError, match="Not one of the authors' ResNets"):
        FedImpro.convert_state_dict({"conv1.weight": torch.zeros(1)})


# ---- the Gaussians --------------------------------------------------------------------------------------------------


def test_the_estimate_is_the_mean_and_deviation_of_the_round() -> None:
    own, start = gaussians(), gaussians()
    batches = features()
    for batch in batches:
        own.update(*batch)
    for client in range(2):
        h = torch.cat([f[client][m[client]] for f, _, m in batches])
        y = torch.cat([label[client][m[client]] for _, label, m in batches])
        for c in range(CLASSES):
            mine = h[y == c]
            if len(mine) == 0:
                assert torch.equal(own.mean[client, c], start.mean[client, c])
            else:
                assert close(own.mean[client, c], mine.mean(0))
            wanted = mine.std(0) if len(mine) > 1 else start.std[client, c]
            assert close(own.std[client, c], wanted)
    assert own.seen.tolist() == [
        [float(((y[0] == c) & m[0]).sum()) for c in range(CLASSES)] for y, m in [_all(batches)]
    ] + [own.seen[1].tolist()]
    assert own.seen[1, 1] == 1 and own.seen[:, 2].sum() == 0


def _all(batches: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([b[1] for b in batches], 1), torch.cat([b[2] for b in batches], 1)


@pytest.mark.parametrize("how", [{"turnover": 4.0}, {"weight": 0.3}, {"weight": 1.0}, {"turnover": 4.0, "fixed": True}])
def test_moving_estimates_equal_a_loop(how: dict[str, Any]) -> None:
    limit = 0.9
    own, slow = gaussians(limit=limit, **how), gaussians()
    for feature, label, mask in features():
        own.update(feature, label, mask)
        for client in range(2):
            for c in range(CLASSES):
                mine = feature[client][(label[client] == c) & mask[client]]
                if len(mine) == 0:
                    continue
                w = how["weight"] if "weight" in how else min(1.0, len(mine) / how["turnover"])
                slow.mean[client, c] = (1 - w) * slow.mean[client, c] + w * mine.mean(0)
                if len(mine) > 1 and not how.get("fixed"):
                    slow.std[client, c] = (1 - w) * slow.std[client, c] + w * mine.std(0)
        if not how.get("fixed"):
            slow.std.clamp_(max=limit)
    assert close(own.mean, slow.mean) and close(own.std, slow.std)
    assert how.get("fixed") or float(own.std.max()) == pytest.approx(limit)


def test_only_the_first_clients_move_when_others_are_done() -> None:
    own, start = gaussians(), gaussians()
    feature, label, mask = features()[0]
    own.update(feature[:1], label[:1], mask[:1])
    assert torch.equal(own.mean[1], start.mean[1]) and torch.equal(own.std[1], start.std[1])
    assert not torch.equal(own.mean[0], start.mean[0])


def test_a_small_last_batch_does_not_win() -> None:
    """What the authors' weight of 1 would do: the mean of the last batch instead of that of the round."""
    own, theirs = gaussians(1), gaussians(1, weight=1.0)
    label, mask = torch.zeros(1, 6, dtype=torch.long), torch.ones(1, 6, dtype=torch.bool)
    for feature, keep in ((torch.ones(1, 6, 5), mask), (torch.full((1, 6, 5), 7.0), torch.arange(6)[None] < 1)):
        own.update(feature, label, keep)
        theirs.update(feature, label, keep)
    assert close(own.mean[0, 0], torch.full((5,), 13 / 7)) and close(theirs.mean[0, 0], torch.full((5,), 7.0))


# ---- the loss -------------------------------------------------------------------------------------------------------


def one_batch(model: FedImpro, b: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    mean, std = torch.rand(2, CLASSES, model.feature_mean.shape[1], generator=generator)
    return {
        "image": torch.rand(b, 1, 8, 8, generator=generator),
        "label": torch.randint(CLASSES, (b,), generator=generator),
        "mask": torch.arange(b) < b - 1,
        "noise": torch.randn(6, mean.shape[1], generator=generator),
        "feature_mean": mean,
        "feature_std": std,
    }


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("done", [0, 1, 5])
def test_the_loss_equals_a_loop(schedule: str, done: int) -> None:
    model = tiny(schedule=schedule, ramp=4, align=0.5)
    model.round += done
    batch = one_batch(model)
    found = model.loss(model.model, batch)
    stages = list(model.model)
    real, fake = [], []
    for image, label, keep in zip(batch["image"], batch["label"], batch["mask"], strict=True):
        if keep:
            real.append(-F.log_softmax(model.model(image[None]), 1)[0, label])
    for number, noise in enumerate(batch["noise"]):
        c = number % CLASSES
        h = (batch["feature_mean"][c] + batch["feature_std"][c] * noise).view(1, 8, 4, 4)
        for stage in stages[1:]:
            h = stage(h)
        fake.append(-F.log_softmax(h, 1)[0, c])
    r = min(done / 4, 1)
    means = {"real": sum(real) / len(real), "fake": sum(fake) / len(fake)}
    pairs = {"gradual": (1 - r, r), "gradual2half": (1, r), "gradualhalfhalf": (1 - r / 2, r / 2)}
    pairs |= {"milestone": (1, 0) if done < 4 else (0, 1)}
    if schedule == "joint":
        wanted = (sum(real) + sum(fake)) / (len(real) + len(fake))
    else:
        wanted = pairs[schedule][0] * means["real"] + pairs[schedule][1] * means["fake"]
    drawn = torch.stack(
        [batch["feature_mean"][i % 3] + batch["feature_std"][i % 3] * n for i, n in enumerate(batch["noise"])]
    )
    used = torch.cat([batch["mask"], torch.ones(6, dtype=torch.bool)])
    labels = torch.cat([batch["label"], torch.arange(6) % 3])
    both = torch.cat([stages[0](batch["image"]).flatten(1), drawn])
    assert close(found["loss"], wanted + 0.5 * slow_alignment(both[used], labels[used]))
    assert close(found["real"], means["real"].detach()) and close(found["fake"], means["fake"].detach())


def slow_alignment(feature: Tensor, label: Tensor, temperature: float = 0.07) -> Tensor:
    z = feature / feature.norm(dim=1, keepdim=True)
    total = torch.zeros(())
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        alike = [j for j in others if label[j] == label[i]]
        below = sum((z[i] @ z[j] / temperature).exp() for j in others)
        for j in alike:
            total = total - ((z[i] @ z[j] / temperature).exp() / below).log() / len(alike) / len(z)
    return total


def test_alignment_is_least_where_classes_are_apart() -> None:
    label, mask = torch.tensor([0, 0, 1, 1]), torch.ones(4, dtype=torch.bool)
    apart = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    assert float(alignment(apart, label, mask)) < 1e-5 < 1 < float(alignment(apart, torch.tensor([0, 1, 0, 1]), mask))
    alone = alignment(apart, torch.arange(4), mask)  # nobody has another of its class
    assert float(alone) == 0.0


def test_drawn_features_teach_the_upper_part_only() -> None:
    model = tiny()
    model.round += 5
    batch = one_batch(model)
    batch["mask"] = torch.zeros(4, dtype=torch.bool)
    model.loss(model.model, batch)["loss"].backward()
    low, high = model.split(model.model)
    assert not any(p.grad is not None and p.grad.any() for p in low.parameters())
    assert all(p.grad is not None and p.grad.any() for p in high[2:].parameters())


def test_random_gaussians_have_no_say_in_the_first_round() -> None:
    for schedule in ("gradual", "gradual2half", "gradualhalfhalf", "milestone"):
        assert tiny(schedule=schedule).loss_weights() == (1.0, 0.0)
    model = tiny(schedule="gradual2half", ramp=4)
    model.round += 6
    assert model.loss_weights() == (1.0, 1.0)
    model = tiny(schedule="gradual2half", ramp=4, authors_ramp=True)
    model.round += 6
    assert model.loss_weights() == (1.0, 1.5)


# ---- rounds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"features": "own", "authors_update": True},
        {"combine": "label_size", "align": 0.1, "measure": True},
        {"schedule": "joint", "turnover": 5.0, "privacy_std": 0.01, "algorithm": "scaffold"},
        {"norm": "batch", "learn_std": False, "algorithm": "fednova"},
    ],
)
def test_together_equals_one_by_one(changes: dict[str, Any]) -> None:
    one, all_ = (after(tiny(stack=stack, **changes)) for stack in (1, None))
    wrong = [k for k, v in one.items() if v.is_floating_point() and not close(all_[k].double(), v.double())]
    assert not wrong


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "scaffold"])
def test_without_drawn_features_it_is_the_baseline(name: str) -> None:
    own = tiny(features="none", algorithm=name)
    torch.manual_seed(0)
    plain = FederatedModule(
        net={"name": "cnn", "widths": [8, 16], "features": 32}, num_classes=3, in_channels=1, image_size=8,
        num_clients=4, local_batch=4, norm="none", lr=0.1, momentum=0.0, algorithm=name,
    )  # fmt: skip
    plain.log = lambda *a, **k: None  # type: ignore[method-assign]
    a, b = after(own), after(plain)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_drawn_features_change_training_and_prediction_does_not_use_them() -> None:
    with_, without = after(tiny(), 3), after(tiny(features="none"), 3)
    assert not torch.equal(with_["model.head.weight"], without["model.head.weight"])
    model, x = tiny(), torch.rand(2, 1, 8, 8)
    before = model.predict(x)
    model.feature_mean += 7
    assert torch.equal(before, model.predict(x)) and torch.equal(before, model.model(x).softmax(1))


def test_own_gaussians_stay_with_their_clients() -> None:
    model = tiny(features="own")
    first = model.states.read(range(4), "feature_")
    after(model, 1)
    now = model.states.read(range(4), "feature_")
    assert torch.equal(now["mean"][1], first["mean"][1])  # was not in the round
    assert all(not torch.equal(now["mean"][c], first["mean"][c]) for c in (0, 2, 3))
    plain = tiny(features="none")
    after(plain, 1)
    assert torch.equal(model.sent, plain.sent)
    assert not [n for n in model.broadcast() if "feature" in n]


def test_what_is_sent_is_counted() -> None:
    shared, plain, measured = tiny(), tiny(features="none"), tiny(measure=True)
    for model in (shared, plain, measured):
        after(model, 1)
    size = 3 * CLASSES * shared.feature_mean.shape[1] * 2 * 4  # clients, classes, d, mean and std, bytes
    assert (shared.sent - plain.sent).tolist() == [size, size]
    assert torch.equal(shared.sent, measured.sent)


def test_the_server_takes_the_plain_mean_of_estimates() -> None:
    model = tiny()
    mean, std = torch.rand(2, 3, *model.feature_mean.shape)
    model._combine({"feature.mean": mean, "feature.std": std}, [0, 1, 3])
    assert close(model.feature_mean, (mean[0] + mean[1] + mean[2]) / 3) and close(model.feature_std, std.sum(0) / 3)
    model._combine({"feature.mean": mean, "feature.std": -std}, [0, 1, 3])  # noise can make a deviation negative
    assert float(model.feature_std.min()) == 0


def test_mixtures_have_the_moments_of_all_samples() -> None:
    model = tiny(combine="label_size")
    d = model.feature_mean.shape[1]
    counts = torch.tensor([[3.0, 2, 0], [5, 1, 0], [2, 2, 0]])
    samples = [[torch.randn(int(n), d) + c for c, n in enumerate(own)] for own in counts]
    mean = torch.stack([torch.stack([x.mean(0) if len(x) else torch.zeros(d) for x in own]) for own in samples])
    std = torch.stack(
        [torch.stack([x.std(0, correction=0) if len(x) else torch.ones(d) for x in own]) for own in samples]
    )
    before = model.feature_mean[2].clone()
    model._combine({"feature.mean": mean, "feature.std": std, "feature.count": counts}, [0, 1, 3])
    for c in range(2):
        together = torch.cat([own[c] for own in samples])
        assert close(model.feature_mean[c], together.mean(0)) and close(
            model.feature_std[c], together.std(0, correction=0)
        )
    assert torch.equal(model.feature_mean[2], before)  # nobody has it
    # client 3 stays away: it counts with the server's own
    old = model.feature_mean.clone()
    model._combine({"feature.mean": mean[:2] + 1, "feature.std": std[:2], "feature.count": counts[:2]}, [0, 1])
    wanted = (3 * (mean[0, 0] + 1) + 5 * (mean[1, 0] + 1) + 2 * old[0]) / 10
    assert close(model.feature_mean[0], wanted)


def test_privacy_noise_follows_the_seed_and_has_its_size() -> None:
    quiet, loud, again = (tiny(privacy_std=s) for s in (0.0, 0.05, 0.05))
    a, b, c = (after(m, 1) for m in (quiet, loud, again))
    assert torch.equal(b["feature_mean"], c["feature_mean"])
    difference = b["feature_mean"] - a["feature_mean"]
    assert float(difference.std()) == pytest.approx(0.05 / 3**0.5, rel=0.2)  # mean of three clients' noise
    assert not torch.equal(difference, b["feature_std"] - a["feature_std"])


def test_equal_clients_have_equal_gradients() -> None:
    model = tiny(measure=True, features="none")
    batch = round_of((6, 6), (0, 1))
    batch["image"][6:], batch["label"][6:] = batch["image"][:6], batch["label"][:6]
    model.training_step(batch, 0)
    assert float(model.unlike[:2].max()) < 1e-10
    apart = tiny(measure=True, features="none")
    apart.training_step(round_of((6, 6), (0, 1)), 0)
    x, y = round_of((6, 6), (0, 1))["image"], round_of((6, 6), (0, 1))["label"]
    plain, grads = tiny(features="none"), []
    for part in (slice(0, 6), slice(6, 12)):
        plain.zero_grad()
        F.cross_entropy(plain(x[part]), y[part]).backward()
        grads.append({n: p.grad.clone() for n, p in plain.model.named_parameters() if p.grad is not None})
    halves = {n: (grads[0][n] - grads[1][n]).square().sum() / 4 for n in grads[0]}
    low = sum(v for n, v in halves.items() if n.startswith("layer1."))
    wanted = torch.stack([low, sum(halves.values()) - low]).double()
    assert close(apart.unlike[:2], wanted, 1e-4)


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cut": "layer9"}, "cut is 'layer9'; a stage of the net below the last: layer1, layer2, pool, hidden"),
        ({"cut": "head"}, "cut is 'head'"),
        ({"features": "share"}, "features is 'share'; one of shared, own, none. Did you mean 'shared'"),
        ({"schedule": "half"}, "schedule is 'half'"),
        ({"combine": "all"}, "combine is 'all'"),
        ({"num_classes": 1}, "at least 2"),
        ({"ramp": 0}, "ramp at least 1"),
        ({"noise_std": 0.0}, "noise_std positive"),
        ({"privacy_std": -1.0}, "the others not negative"),
    ],
)
def test_refuses(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as caught:
        tiny(**changes)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_gaussians_of_another_size_are_refused() -> None:
    with pytest.raises(ZooError, match="feature_mean"):
        tiny(cut="layer2").load_state_dict(tiny(cut="layer1").state_dict())
