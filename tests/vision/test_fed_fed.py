"""FedFed: the authors' recorded tensors, its steps against slow loops, and what must hold of what is shared."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import zoo.engines.federated.module as engine
import zoo.vision.federated.fed_fed as method
from zoo.core.errors import ZooError
from zoo.engines.federated import FederatedModule, Samples, local_batches
from zoo.testing.contract.case import attach, quietly, trainer
from zoo.vision.federated.fed_fed import (
    Distiller,
    FedFed,
    Moments,
    Pass,
    RowAdamW,
    balanced,
    draw_noise,
    joint_loss,
    mixup_loss,
    mosaics,
    our_name,
)

SIZES = {"num_classes": 3, "in_channels": 1, "image_size": 8, "num_clients": 4}
SMALL = {"net": {"name": "cnn", "widths": [4], "features": 6}, "norm": "none", "augment": [], "randaugment": 0}
TINY = {**SIZES, **SMALL, "local_batch": 8, "distill_rounds": 1, "width": 4, "latent": 5, "mosaic": 6, "lr": 0.05}


def module(seed: int = 0, **changes: Any) -> FedFed:
    torch.manual_seed(seed)
    found = attach(FedFed(**{**TINY, **changes}))
    found.log = lambda name, value, **k: logged.__setitem__(name, float(value))
    return found


logged: dict[str, float] = {}


def a_round(
    number: int, clients: tuple[int, ...] = (0, 1, 2, 3), sizes: tuple[int, ...] = (30, 9, 17, 12)
) -> dict[str, Any]:
    """Each client's pictures are its own and the same in every round; the last client has one class only."""
    images, labels = [], []
    for client in clients:
        generator = torch.Generator().manual_seed(client)
        label = (
            torch.randint(3, (sizes[client],), generator=generator) if client < 3 else torch.ones(sizes[client]).long()
        )
        shade = torch.rand(sizes[client], 1, 8, 8, generator=generator) * 80 + 70 * label.view(-1, 1, 1, 1)
        images.append(shade.to(torch.uint8))
        labels.append(label)
    found = {"image": torch.cat(images), "label": torch.cat(labels), "client": list(clients)}
    found |= {"size": [sizes[c] for c in clients], "seed": [100 * number + c for c in clients]}
    return found | {"work": [1.0] * len(clients)}


def far(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a if a[k].numel())


@pytest.fixture
def doubled(monkeypatch: pytest.MonkeyPatch) -> Any:
    """All in float64: AdamW makes whole steps of gradients that are rounding, as those of biases before norms."""
    real, rows = engine.pixels, FedFed.local_batch
    for place in (engine, method):
        monkeypatch.setattr(place, "pixels", lambda x: real(x).double())
    monkeypatch.setattr(
        FedFed, "local_batch", lambda *a: {k: v.double() if v.is_floating_point() else v for k, v in rows(*a).items()}
    )
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# ---- the authors' tensors -------------------------------------------------------------------------------------------


def test_equals_the_authors_tensors() -> None:
    content = load_file(Path(__file__).parents[1] / "golden" / "fed_fed.safetensors")
    inside = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 10))
    model = Distiller(4, 8, 3, 32, inside)
    named = {k.removeprefix("weights."): v for k, v in content.items() if k.startswith("weights.")}
    model.load_state_dict({k if k.startswith("classifier.") else our_name(k): v for k, v in named.items()})
    x, y = content["image"], content["label"]
    found, mean, logvar = copy.deepcopy(model).train()(x, content["eps"])
    for own, name in ((found, "g"), (mean, "mu"), (logvar, "logvar")):
        assert float((own.detach() - content[name]).abs().max() / content[name].abs().max()) < 1e-5, name
    batch = {"image": x, "label": y, "eps": content["eps"], "mask": torch.ones(5, dtype=torch.bool)}
    batch |= {"noise": content["noise"][:, None].expand(2, *x.shape), "weight": torch.tensor([50, 2, 0.005, 0.4])}
    loss = joint_loss(model.train(), batch)["loss"]
    loss.backward()
    assert loss.item() == pytest.approx(float(content["loss"]), rel=1e-5)
    own = {name: p.grad for name, p in model.named_parameters()}
    pairs = []
    for name, value in content.items():
        if name.startswith("gradient."):
            name = name.removeprefix("gradient.")
            pairs.append((own[name if name.startswith("classifier.") else our_name(name)].flatten(), value.flatten()))
    ours, theirs = (torch.cat(side) for side in zip(*pairs, strict=True))
    assert len(pairs) == len(own) and float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5


def test_converts() -> None:
    net = {"name": "resnet10", "width": 4}
    model = FedFed(**{**TINY, "net": net, "norm": "batch"})
    theirs = {"classifier": {}, "vae": {}}
    back = {"input": "init_bn", "stem.0": "conv1", "stem.1": "bn1", "head": "linear"}
    inner = {"conv1": "convs.1", "norm": "convs.2", "conv2": "convs.4"}
    outer = {"encoder.0": "encoder_former", "decoder.8": "decoder_last", "decoder.9": "xi_bn"}
    outer |= {"mean": "fc11", "logvar": "fc12", "back": "fc21"}

    def classifier_name(name: str) -> str:
        place, _, kind = name.rpartition(".")
        return f"{back[place]}.{kind}" if place in back else name.replace(".norm", ".bn")

    for name, value in model.state_dict().items():
        if name.startswith("model."):
            theirs["classifier"][classifier_name(name.removeprefix("model."))] = value
        elif name.startswith("vae.classifier."):
            theirs["vae"]["classifier." + classifier_name(name.removeprefix("vae.classifier."))] = value
        elif name.startswith("vae."):
            parts = name.removeprefix("vae.").split(".")
            if ".".join(parts[:-1]) in outer:
                old = f"{outer['.'.join(parts[:-1])]}.{parts[-1]}"
            else:
                number = int(parts[1]) - (parts[0] == "encoder")
                old = ".".join([parts[0], str(number), *(inner.get(p, p) for p in parts[2:])])
            theirs["vae"][old] = value
    hyperparameters, state = FedFed.convert_state_dict(theirs)
    assert {k: v for k, v in hyperparameters.items() if k != "net"} == {
        "num_classes": 3, "in_channels": 1, "image_size": 8, "width": 4, "latent": 5
    }  # fmt: skip
    assert hyperparameters["net"] == net
    again = module(1, **{**hyperparameters, "norm": "batch"})
    own = again.state_dict()
    again.load_state_dict({**own, **state})
    assert far(model.state_dict(), again.state_dict()) == 0
    with pytest.raises(ZooError, match="Expected the state dicts of 'vae' and 'classifier', not x"):
        FedFed.convert_state_dict({"x": torch.zeros(1)})


# ---- pieces against slow twins --------------------------------------------------------------------------------------


def test_mosaics_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 5, 3, 8, 8, generator=generator)
    picks = torch.stack([torch.stack([torch.randperm(5, generator=generator)[:4] for _ in range(7)]) for _ in range(2)])
    corner, hole = (torch.randint(n, (2, 7, 2), generator=generator) for n in (5, 8))
    found = mosaics(x, picks, corner, hole)
    for s in range(2):
        for m in range(7):
            r, c = corner[s, m].tolist()
            wanted = torch.zeros(3, 8, 8)
            for number, (top, left) in enumerate(((0, 0), (4, 0), (0, 4), (4, 4))):
                wanted[:, top : top + 4, left : left + 4] = x[s, picks[s, m, number], :, r : r + 4, c : c + 4]
            i, j = hole[s, m].tolist()
            wanted[:, max(i - 2, 0) : i + 2, max(j - 2, 0) : j + 2] = 0
            assert torch.equal(found[s, m], wanted)


def test_adamw_rows_step_and_rest_on_their_own() -> None:
    """Three rows, the second of which rests at odd steps; then only the first goes on, then all again."""
    state = {"w": torch.randn(3, 4, 2), "b": torch.randn(3, 2)}
    start = {name: value.clone() for name, value in state.items()}
    moments = Moments(state, ["w", "b"])
    grads = torch.randn(7, 3, 10)
    did: list[list[int]] = [[], [], []]
    for number, (count, turn) in enumerate([(3, 1), (3, 0), (3, 1), (1, 1), (1, 1), (3, 0), (3, 1)]):
        leaves = [value[:count].detach().requires_grad_() for value in state.values()]
        takes = torch.tensor([True, bool(turn), True])
        optimizer = RowAdamW(leaves, moments, [takes, takes], 0.01, 0.1)
        leaves[0].grad, leaves[1].grad = grads[number, :count, :8].view(-1, 4, 2), grads[number, :count, 8:]
        optimizer.step()
        for row in range(count):
            if takes[row]:
                did[row].append(number)
    for row in range(3):
        for name, part in (("w", slice(0, 8)), ("b", slice(8, 10))):
            w = start[name][row].flatten().clone()
            m = v = torch.zeros_like(w)
            for t, number in enumerate(did[row], 1):
                g = grads[number, row, part]
                m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
                size = 0.01 * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t)
                w = w - size * (0.1 * w + m / (v.sqrt() + 1e-8))
            assert torch.allclose(state[name][row].flatten(), w, atol=1e-6)


def test_one_unstacked_client_steps_as_a_row() -> None:
    grad, state = torch.randn(2, 5), {"w": torch.zeros(1, 5)}
    other = {"w": torch.zeros(1, 5)}
    for kept, stacked in ((state, True), (other, False)):
        moments = Moments(kept, ["w"])
        for g in grad:
            leaf = (kept["w"] if stacked else kept["w"][0]).detach().requires_grad_()
            leaf.grad = g[None] if stacked else g
            RowAdamW([leaf], moments, [None], 0.1, 0.0).step()
    assert torch.equal(state["w"], other["w"]) and state["w"].abs().max() > 0.1


def test_losses_by_hand() -> None:
    torch.manual_seed(0)
    model = Distiller(4, 5, 1, 8, nn.Sequential(nn.Flatten(), nn.Linear(64, 3))).train()
    x, y, eps = torch.rand(6, 1, 8, 8), torch.arange(6) % 3, torch.randn(6, 5)
    noise, weight, mask = (
        torch.randn(2, 6, 1, 8, 8),
        torch.tensor([3.0, 2.0, 0.5, 0.25]),
        torch.ones(6, dtype=torch.bool),
    )
    found = joint_loss(model, {"image": x, "label": y, "mask": mask, "eps": eps, "noise": noise, "weight": weight})
    g, mean, logvar = model(x, eps)
    kl = sum(-0.5 * (1 + lv - mu**2 - lv.exp()) for mu, lv in zip(mean.flatten(), logvar.flatten(), strict=True))
    scores = [model.classifier(x - g + n) for n in noise]
    ce = sum(F.cross_entropy(s, y) for s in scores) / 2
    terms = [F.mse_loss(g, x), ce, kl / (6 * 3 * 5), F.cross_entropy(model.classifier(x), y)]
    assert float(found["loss"]) == pytest.approx(
        float(sum(w * t for w, t in zip(weight, terms, strict=True))), rel=1e-5
    )
    other, share = torch.tensor([3, 0, 1, 5, 4, 2]), torch.tensor([0.3])
    mixed = mixup_loss(model, {"image": x, "label": y, "mask": mask, "other": other, "share": share})["loss"]
    both = model.classifier(0.3 * x + 0.7 * x[other])
    assert float(mixed) == pytest.approx(
        float(0.3 * F.cross_entropy(both, y) + 0.7 * F.cross_entropy(both, y[other])), rel=1e-5
    )


@pytest.mark.parametrize("kind", ["gaussian", "laplace"])
def test_noise(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    found = draw_noise((400, 1, 16, 16), 0.2, kind, generator)
    wanted = 0.2 if kind == "gaussian" else 0.2 * 2**0.5  # the authors' Laplace has the number as its scale
    assert float(found.std()) == pytest.approx(wanted, rel=0.02) and abs(float(found.mean())) < 0.003
    assert not torch.equal(found[0], found[1])
    once = draw_noise((3, 1, 16, 16), 0.2, kind, generator, once=True)
    assert torch.equal(once[0], once[1]) and once.shape == (3, 1, 16, 16)


def test_pool_is_drawn_balanced() -> None:
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 3)[torch.randperm(83, generator=torch.Generator().manual_seed(0))]
    found = balanced(labels, 32, 3, torch.Generator().manual_seed(1))
    assert len(found) == 32
    classes = labels[found[:30]]
    assert torch.bincount(classes).tolist() == [10, 10, 10]
    for label in (0, 1):  # enough of them: none twice
        assert len(set(found[:30][classes == label].tolist())) == 10
    repeated = torch.bincount(found[:30][classes == 2], minlength=83)[labels == 2]
    assert sorted(repeated.tolist()) == [3, 3, 4]
    other = balanced(labels, 32, 3, torch.Generator().manual_seed(2))
    assert not torch.equal(found, other)
    lacking = balanced(torch.zeros(5, dtype=torch.long), 12, 3, torch.Generator())  # the pool has one class
    assert len(lacking) == 12 and lacking.max() < 5


# ---- rounds ---------------------------------------------------------------------------------------------------------


def test_together_equals_one_by_one(doubled: None) -> None:
    runs = []
    for stack in (None, 1, 3):
        model = module(stack=stack, distill_epochs=2)
        start = {k: v.clone() for k, v in model.state_dict().items()}
        for number in range(4):
            batch = a_round(number)
            if number == 1:
                batch["work"] = [1.0, 0.0, 1.0, 1.0]  # the second never shares
            if number in (0, 3):
                batch["work"] = [0.4, 1.0, 0.7, 1.0]
            model.training_step(batch, number)
        state = {k: v.double() for k, v in model.state_dict().items()}
        moved = [k for k, p in model.named_parameters() if torch.equal(p, start[k])]
        assert not moved, f"not trained: {moved[:3]}"
        runs.append(state | {k: v.double() for k, v in model.named_buffers() if k.startswith("pool")})
    assert far(runs[0], runs[1]) < 1e-8 and far(runs[0], runs[2]) < 1e-8
    assert len(runs[0]["pool_label"]) == 30 + 17 + 12


@pytest.mark.parametrize("frozen", [False, True])
def test_clients_of_one_class_skip_the_mosaics(doubled: None, frozen: bool) -> None:
    """Also their running statistics; their VAE learns by the joint step only, with the authors' switch not at all."""
    model = module(authors_frozen=frozen, stack=None)
    batch = a_round(0, (2, 3))
    seen: dict[str, list[Tensor]] = {}
    down = model.broadcast()
    for mosaic in (6, 0):
        model._hp["mosaic"] = mosaic
        up, _, _ = model.local(batch, down, [0, 1])
        seen[str(mosaic)] = [torch.cat([v[row].double().flatten() for v in up.values()]) for row in (0, 1)]
    assert not torch.allclose(seen["6"][0], seen["0"][0])
    assert torch.allclose(seen["6"][1], seen["0"][1], atol=1e-12)
    names = [n for n, _ in model.vae.named_parameters() if not n.startswith("classifier.")]
    still = [bool(torch.equal(up[f"vae.{n}"][1], down[f"vae.{n}"])) for n in names]
    assert all(still) if frozen else not any(still)
    assert not any(bool(torch.equal(up[f"vae.{n}"][0], down[f"vae.{n}"])) for n in names)


def test_kinds_of_clients() -> None:
    model = module()
    batch = a_round(0, sizes=(200, 9, 60, 40))
    plan = local_batches(batch["size"], batch["seed"], 8)
    few, mostly = model.kinds(Samples(model, batch, [2, 1, 3, 0], plan))
    assert few.tolist() == [False, True, False, False]  # 9 < 0.2 * 77.25
    assert mostly.tolist() == [False, False, True, False]
    few, mostly = module(adaptive=False).kinds(Samples(model, batch, [2, 1, 3, 0], plan))
    assert not few.any() and not mostly.any()


def test_what_is_shared(doubled: None) -> None:
    """Noised residuals of every picture and nothing else; each client once; counted without padding."""
    model = module(share_rounds=2, std1=1e-6, std2=1e-6)
    assert [model.phase] == ["distill"]
    model.training_step(a_round(0), 0)
    assert model.phase == "share" and not len(model.pool_label)
    down = model.broadcast()
    assert all(name.startswith("vae.") for name in down)
    before = model.sent.clone()
    model.training_step(a_round(1, (0, 2)), 1)
    model.training_step(a_round(2), 2)
    assert model.phase == "train"
    assert len(model.pool_label) == 30 + 17 + 9 + 12
    batch = a_round(0)
    x = batch["image"].double() / 255
    with torch.no_grad():
        residual = x - model.vae.eval()(x)[0]
    order = torch.cat([torch.arange(30), torch.arange(39, 56), torch.arange(30, 39), torch.arange(56, 68)])
    for pooled in (model.pool_first, model.pool_second):
        assert pooled.dtype == torch.half
        assert torch.allclose(pooled.double(), residual[order], atol=2e-3)
    assert torch.equal(model.pool_label.long(), batch["label"][order])
    assert float((model.sent - before)[0]) == 68 * (2 * 64 * 2 + 4)
    # from here the pool goes to each client once
    before = model.sent.clone()
    weights = sum(v.numel() * v.element_size() for v in model.broadcast().values())
    model.training_step(a_round(3, (0, 1)), 3)
    assert float((model.sent - before)[1]) == 2 * (weights + 68 * (2 * 64 * 2 + 4))
    model.training_step(a_round(4, (1, 2)), 4)
    assert float((model.sent - before)[1]) == 4 * weights + 3 * 68 * (2 * 64 * 2 + 4)


def test_noise_is_on_what_is_shared_and_each_picture_has_its_own() -> None:
    for once in (False, True):
        model = module(authors_noise=once, std1=0.5, std2=0.1)
        clean, first, second = model.residuals(torch.rand(50, 1, 8, 8), model.vae.state_dict(), torch.Generator())
        assert float((first - clean).std()) == pytest.approx(0.5, rel=0.2)
        assert float((second - clean).std()) == pytest.approx(0.1, rel=0.2)
        spread = float((first - clean).std(0).mean())
        assert spread < 1e-5 if once else spread > 0.4


def test_last_phase_batches() -> None:
    """[x; r1; r2] with as many residuals of each kind as pictures; over an epoch each class equally often."""
    model = module()
    for number in range(2):
        model.training_step(a_round(number), number)
    batch = a_round(5, (0, 2))
    samples = Samples(model, batch, [0, 1], local_batches(batch["size"], batch["seed"], 8, drop_last=True))
    seen = []
    for count, found in samples:
        assert found["shared"].shape == (count, 16, 1, 8, 8) and found["shared_label"].shape == (count, 16)
        seen.append(found["shared_label"][0])
    first = torch.cat([label[:8] for label in seen])  # 24 of the 30 pictures: 10 residuals of each class
    counts = torch.bincount(first, minlength=3)
    assert len(first) == 24 and counts.max() <= 10 and counts.min() >= 4
    assert not torch.allclose(found["shared"][0, :8], found["shared"][0, 8:], atol=0.2)
    loss = model.loss(model.model, {key: value[0] for key, value in found.items()})["loss"]
    scores = model.model(torch.cat([found["image"][0], found["shared"][0]]))
    assert float(loss) == pytest.approx(
        float(F.cross_entropy(scores, torch.cat([found["label"][0], seen[-1]]))), rel=1e-5
    )


@pytest.mark.parametrize("algorithm", ["fedavg", "fedprox", "scaffold", "fednova"])
def test_without_distillation_it_is_the_algorithm(algorithm: str) -> None:
    model = module(distill_rounds=0, algorithm=algorithm)
    assert model.phase == "train"
    given = {k: v for k, v in model.hyperparameters.items() if k in FederatedModule(**SIZES).hyperparameters}
    torch.manual_seed(0)
    plain = FederatedModule(**{**given, "drop_last": True})
    plain.model = copy.deepcopy(model.model)
    plain.algorithm.setup()
    attach(plain)
    for number in range(2):
        for each in (model, plain):
            each.training_step(a_round(number, (0, 2)), number)
    assert far(model.model.state_dict(), plain.model.state_dict()) < 1e-6
    assert model.sent.tolist() == plain.sent.tolist()


def test_algorithms_of_the_last_phase_see_nothing_of_the_others() -> None:
    for algorithm in ("scaffold", "fednova", "fedprox"):
        model, other = module(algorithm=algorithm), module()
        for number in range(2):
            model.training_step(a_round(number), number)
            other.training_step(a_round(number), number)
        assert far(model.vae.state_dict(), other.vae.state_dict()) == 0
        assert torch.equal(model.pool_first, other.pool_first)
        for number in (2, 3):  # SCAFFOLD's first round is FedAvg's
            for each in (model, other):
                each.training_step(a_round(number), number)
        assert far(model.model.state_dict(), other.model.state_dict()) > 1e-6


def test_learns_to_keep_most_of_a_picture() -> None:
    model = module(distill_rounds=25, latent=16, width=8, vae_lr=5e-3)
    for number in range(26):
        model.training_step(a_round(number), number)
    assert logged["train/kept"] > 0.2  # a third of the variance is noise, and one client has one class only


def test_checkpoints_hold_the_pool(tmp_path: Path) -> None:
    from zoo.vision.federated.data_federated import FederatedClassificationDataModule

    def data() -> Any:
        return FederatedClassificationDataModule(rounds=4, clients=3, per_class=12, test="none")

    given = {**TINY, "num_classes": 10, "num_clients": 3}
    with quietly():
        torch.manual_seed(0)
        whole = FedFed(**given)
        run = trainer(tmp_path, max_epochs=1, limit_train_batches=4, limit_val_batches=0, max_steps=-1)
        run.fit(whole, datamodule=data())
        run.save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    again = FedFed(**given)
    again.on_load_checkpoint(content)
    again.load_state_dict(content["state_dict"])
    assert torch.equal(again.pool_first, whole.pool_first) and torch.equal(again.pool_held, whole.pool_held)
    assert len(again.pool_label) > 50 and far(again.state_dict(), whole.state_dict()) == 0
    again.save_pretrained(tmp_path / "hub")  # the pool is not for the Hub
    assert not len(FedFed.from_pretrained(tmp_path / "hub").pool_label)


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"std1": 0.0}, "share nothing without noise"),
        ({"std2": -0.1, "private": False}, "std2=-0.1"),
        ({"algorithm": "ditto"}, "algorithm is 'ditto'; FedFed has one global model"),
        ({"image_size": 10}, "image_size is 10; the VAE halves it twice"),
        ({"local_batch": 3}, "a mosaic takes 4 pictures"),
        ({"noise": "uniform"}, "noise is 'uniform'"),
        ({"distill_rounds": -1}, "distill_rounds is -1"),
        ({"width": 3}, "width=3"),
        ({"re": -1.0}, "not negative"),
        ({"mixup": 0.0}, "mixup above 0"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error) as caught:
        FedFed(**{**TINY, **changes})
    assert "\n" not in str(caught.value)


def test_no_noise_where_privacy_is_off() -> None:
    model = module(std1=0.0, std2=0.0, private=False)
    clean, first, second = model.residuals(torch.rand(3, 1, 8, 8), model.vae.state_dict(), torch.Generator())
    assert torch.equal(clean, first) and torch.equal(clean, second)


def test_a_straggler_does_part_of_each_way() -> None:
    model, batch = module(), a_round(0)
    batch["work"] = [0.5, 1.0, 1.0, 0.4]
    plan = local_batches(batch["size"], batch["seed"], 8, work=batch["work"], drop_last=True)
    samples = Samples(model, batch, [2, 0, 1, 3], plan)
    way = Pass(model, samples, "joint", 0)
    assert way.counts == [2, 2, 1, 1] and way.ids == [2, 0, 1, 3]
    assert not torch.equal(way.index, Pass(model, samples, "joint", 1).index)
