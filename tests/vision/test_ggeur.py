"""GGEUR: parity with recorded tensors, pooled shapes against all data at once, who draws what around whom, FedAvg as
the limit."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.core import ZooError
from zoo.core.seeding import seed_from
from zoo.vision.federated.ggeur import (
    GGEUR,
    DomainAccuracy,
    Encoder,
    FederatedModule,
    anchors,
    embed,
    factor,
    guide_set,
    pool,
)

GOLDEN = Path(__file__).parent.parent / "golden" / "ggeur.safetensors"
SMALL: dict[str, Any] = {
    "backbone": None,
    "num_classes": 4,
    "in_channels": 6,
    "image_size": 1,
    "num_clients": 3,
    "target": 12,
    "local_epochs": 2,
    "local_batch": 5,
    "lr": 0.01,
}
VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 12,
    "patch_size": 4, "projection_dim": 6,
}  # fmt: skip


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> bool:
    ours, theirs = ours.detach(), theirs.detach()
    if not theirs.numel():
        return ours.shape == theirs.shape
    return float((ours - theirs).abs().max()) <= tolerance * float(theirs.abs().max().clamp(min=1e-12))


def quiet(model: Any) -> Any:
    model.logged = {}
    model.log = lambda name, value, **_: model.logged.__setitem__(name, value)  # no trainer
    return model


def small(seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    return quiet(GGEUR(**{**SMALL, **changes}))


def a_round(
    clients: tuple[int, ...] = (0, 1, 2),
    sizes: tuple[int, ...] = (9, 17, 6),
    seed: int = 0,
    shape: tuple[int, ...] = (6, 1, 1),
) -> dict[str, Any]:
    """A round whose first client lacks class 3."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 4, (sum(sizes),), generator=generator)
    label[: sizes[0]] %= 3
    image = torch.rand(sum(sizes), *shape, generator=generator) + label.view(-1, *[1] * len(shape)) / 8
    rounds = {"client": list(clients), "size": list(sizes), "work": [1.0] * len(sizes)}
    return {"image": image, "label": label, **rounds, "seed": [seed + c for c in clients]}


# ---- parity ---------------------------------------------------------------------------------------------------------


def test_shapes_equal_the_authors() -> None:
    g = load_file(GOLDEN)
    data = [(g[f"shapes.image.{i}"], g[f"shapes.label.{i}"]) for i in range(4)]
    sizes = [len(x) for x, _ in data]
    image, label = (torch.cat(parts) for parts in zip(*data, strict=True))
    model = small(in_channels=16, num_clients=4)
    batch = {"image": image[:, :, None, None], "label": label, "client": [0, 1, 2, 3], "size": sizes}
    model.exchange({**batch, "work": [1.0] * 4, "seed": [0] * 4})
    assert close(model.statistics.covariance, g["shapes.covariance"])
    counts = torch.stack([torch.bincount(y, minlength=4) for _, y in data])
    assert torch.equal(guide_set(counts, 0.8), g["shapes.guides"])


@pytest.mark.parametrize("stack", [None, 1])
def test_rounds_equal_the_authors(stack: int | None) -> None:
    """Double softmax, heads that never come back, and a plain mean: as their loop runs."""
    g = load_file(GOLDEN)
    data = [(g[f"image.{i}"], g[f"label.{i}"]) for i in range(3)]
    changes = {"num_classes": 10, "in_channels": 512, "local_batch": 8, "lr": 1e-3, "geometry": "off", "stack": stack}
    model = small(**changes, authors_softmax=True, authors_no_broadcast=True)
    start = {f"head.{k}": g[f"start.{k}"] for k in ("weight", "bias")}
    model.model.load_state_dict(start)
    model.states.write([0, 1, 2], {f"own.{k}": v[None].repeat(3, *[1] * v.ndim) for k, v in start.items()})
    image, label = (torch.cat(parts) for parts in zip(*data, strict=True))
    batch = {"image": image[:, :, None, None], "label": label, "client": [0, 1, 2], "size": [len(x) for x, _ in data]}
    for number in range(3):
        model.training_step({**batch, "work": [1.0] * 3, "seed": [seed_from(number, c) for c in range(3)]}, 0)
    assert close(model.model.head.weight, g["after.weight"]) and close(model.model.head.bias, g["after.bias"])
    assert model.sent[1] == 0


def test_samples_are_drawn_where_the_authors_draw_them() -> None:
    g = load_file(GOLDEN)
    x, means = g["sets.own"], g["sets.means"]
    draws = torch.Generator().manual_seed(3)
    assert torch.equal(x[anchors(30, 470, draws, 500)], g["sets.single"])
    draws = torch.Generator().manual_seed(3)
    which = anchors(30, 20, draws, 50, per_anchor=50, kept=50, prototypes=3, per_prototype=50)
    assert torch.equal(torch.cat([x, torch.cat([x, means])[which]]), g["sets.office"])


# ---- statistics -----------------------------------------------------------------------------------------------------


def everything(batch: dict[str, Any], label: int) -> tuple[Tensor, Tensor]:
    """Mean and biased covariance of a class over all clients at once, in float64."""
    x = batch["image"].flatten(1)[batch["label"] == label].double()
    return x.mean(0), torch.cov(x.T, correction=0).view(x.shape[1], x.shape[1])


def test_pooled_statistics_equal_all_data_at_once() -> None:
    model, batch = small(guide=1.0), a_round()
    model.exchange(batch)
    known = model.statistics
    assert known.total.tolist() == torch.bincount(batch["label"], minlength=4).tolist()
    for c in range(4):
        mean, covariance = everything(batch, c)
        assert close(known.mean[c].double(), mean) and close(known.covariance[c].double(), covariance)


def test_clients_that_come_later_are_pooled_exactly_too() -> None:
    first, second = a_round((0, 2), (9, 17)), a_round((1, 2), (6, 17), seed=3)
    second["image"][6:], second["label"][6:] = first["image"][9:], first["label"][9:]  # client 2 has what it had
    model = small(guide=1.0)
    model.exchange(first)
    version = int(model.statistics.version)
    model.exchange(first)
    assert int(model.statistics.version) == version  # nobody new
    model.exchange(second)
    assert model.statistics.reported.all()
    whole = {k: torch.cat([first[k], second[k][:6]]) for k in ("image", "label")}
    for c in range(4):
        mean, covariance = everything(whole, c)
        assert close(model.statistics.mean[c].double(), mean)
        assert close(model.statistics.covariance[c].double(), covariance)


def test_the_guide_set_by_hand() -> None:
    counts = torch.tensor([[50, 0, 5, 1], [30, 0, 5, 0], [19, 0, 5, 0], [1, 0, 5, 0]])
    wanted = [[1, 0, 1, 1], [1, 0, 1, 0], [0, 0, 1, 0], [0, 0, 1, 0]]  # 50 + 30 are 80 %; 3 of 4 are not
    assert guide_set(counts, 0.8).int().tolist() == wanted
    assert torch.equal(guide_set(counts, 1.0), counts > 0)
    # only who stands for a class is pooled
    batch, model = a_round(), small(guide=0.5)
    model.exchange(batch)
    per = torch.stack([torch.bincount(y, minlength=4) for y in batch["label"].split(batch["size"])])
    assert torch.equal(model.statistics.total, (per * guide_set(per, 0.5)).sum(0).float())
    assert model.statistics.total.sum() < per.sum()


def test_pool_of_one_part_has_no_spread() -> None:
    means = torch.rand(1, 2, 3)
    total, mean, between = pool(torch.tensor([[4.0, 0.0]]), means)
    assert torch.equal(total, torch.tensor([4.0, 0.0])) and torch.allclose(mean[0], means[0, 0])
    assert not between.any()


def test_bytes_of_the_first_exchange() -> None:
    model, batch = small(guide=1.0), a_round()
    model.training_step(batch, 0)
    per = torch.stack([torch.bincount(y, minlength=4) for y in batch["label"].split(batch["size"])])
    present, head = int((per > 0).sum()), 4 * 4 * 7
    up = 4 * 3 * 4 + 4 * present * (6 + 36) + 3 * head  # counts; means and covariances; heads
    down = 4 * present * 36 + 3 * head
    assert model.sent.tolist() == [up, down]
    model.training_step(a_round(seed=1), 0)
    assert model.sent.tolist() == [up + 3 * head, down + 3 * head]
    assert small(geometry="off").exchanges is False and small(geometry="repeat").exchanges is False


def test_what_is_sent_holds_no_sample() -> None:
    """What comes up in a round is the head; what the server keeps is sums over classes."""
    model, batch = small(per_prototype=3), a_round()
    model.training_step(batch, 0)
    up, kept, _ = model.local(batch, model.broadcast(), [0, 1, 2])
    assert set(up) == {"model.head.weight", "model.head.bias"} and not kept
    shapes = {k: tuple(v.shape) for k, v in model.statistics.state_dict().items()}
    assert shapes["covariance"] == (4, 6, 6) and shapes["prototypes"] == (3, 4, 6)


# ---- shapes ---------------------------------------------------------------------------------------------------------


def test_the_factor_gives_the_covariance_back() -> None:
    z = torch.randn(40, 5, dtype=torch.float64)
    covariance = z.T @ z
    whole = factor(covariance)
    assert close(whole @ whole.T, covariance, 1e-12)
    values, vectors = torch.linalg.eigh(covariance)
    two = factor(covariance, rank=2)
    assert two.shape == (5, 2)
    assert close(two @ two.T, vectors[:, 3:] * values[3:] @ vectors[:, 3:].T, 1e-12)


def test_enlarged_eigenvalues_by_hand() -> None:
    diagonal = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    large = factor(diagonal, enlarge=3)
    assert torch.allclose(large @ large.T, torch.diag(torch.tensor([1.0, 2.0 * 1, 3.0 * 3, 4.0 * 5])))
    little = factor(diagonal, enlarge=3, smallest=True)
    assert torch.allclose(little @ little.T, torch.diag(torch.tensor([1.0 * 5, 2.0 * 3, 3.0 * 1, 4.0])))
    assert factor(torch.zeros(3, 3)).eq(0).all()  # a class of one sample has no shape
    negative = factor(torch.diag(torch.tensor([1.0, -1e-3])))
    assert negative.isfinite().all() and torch.allclose(negative @ negative.T, torch.diag(torch.tensor([1.0, 0.0])))


@pytest.mark.parametrize("geometry", ["class", "isotropic"])
def test_new_samples_have_the_shape(geometry: str) -> None:
    model, batch = small(geometry=geometry, guide=1.0), a_round()
    model.exchange(batch)
    noise = model._around(torch.zeros(200000, 6), 1, seed=4)
    wanted = everything(batch, 1)[1].float()
    if geometry == "isotropic":
        wanted = wanted.trace() / 6 * torch.eye(6)
    assert noise.mean(0).abs().max() < 0.01 * wanted.diagonal().sqrt().max()
    assert close(torch.cov(noise.T), wanted, 0.02)


def test_new_samples_are_their_anchors_without_a_shape() -> None:
    model, batch = small(), a_round(sizes=(1, 1, 1))
    batch["label"][:] = torch.tensor([0, 1, 2])
    model.exchange(batch)  # one sample of each class
    x, y = model.fill(batch["image"][:1].flatten(1), batch["label"][:1], client=0, seed=0)
    assert len(x) == 12 and x.eq(x[0]).all() and y.eq(0).all()


# ---- who draws around whom ------------------------------------------------------------------------------------------


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("own", "most"), [(1, 500), (9, 500), (10, 50), (240, 50), (250, 1), (499, 1)])
def test_the_single_domain_rule(own: int, most: int) -> None:
    which = anchors(own, 500 - own, draws(), 500)
    uses = torch.bincount(which, minlength=own)
    assert len(which) == 500 - own and len(uses) == own and int(uses.max()) <= most
    if own in (9, 240):
        assert int(uses.min()) > 0 or own == 240


def test_anchors_at_their_limits() -> None:
    assert len(anchors(7, 0, draws(), 5)) == 0 and len(anchors(7, -2, draws(), 5)) == 0
    assert len(anchors(0, 5, draws(), 5)) == 0  # neither samples nor prototypes
    assert set(anchors(0, 50, draws(), 50, prototypes=2, per_prototype=40).tolist()) == {0, 1}
    assert set(anchors(0, 50, draws(), 50, prototypes=2, per_prototype=50, first_only=True).tolist()) == {0}
    # too few offers: each anchor's share grows alike, where the authors' code stops with an error
    uses = torch.bincount(anchors(2, 30, draws(), 32, per_anchor=3, prototypes=1, per_prototype=9))
    assert uses.sum() == 30 and uses.tolist() == [6, 6, 18]
    # of own draws so many are kept, of the prototypes' all
    uses = torch.bincount(anchors(5, 24, draws(), 29, per_anchor=10, kept=4, prototypes=2, per_prototype=10))
    assert uses[:5].sum() == 4 and uses[5:].tolist() == [10, 10]


def test_filled_sets() -> None:
    batch, model = a_round(), small()
    model.exchange(batch)
    x, y = batch["image"][:9].flatten(1), batch["label"][:9]
    filled, labels = model.fill(x, y, client=0, seed=5)
    present = torch.bincount(y, minlength=4) > 0
    assert torch.bincount(labels, minlength=4).tolist() == [12 * int(p) for p in present]  # absent ones stay absent
    for c in range(3):  # own samples are all there
        assert torch.equal(filled[labels == c][: int((y == c).sum())], x[y == c])
    again, _ = model.fill(x, y, client=0, seed=5)
    other, _ = model.fill(x, y, client=0, seed=6)
    assert torch.equal(filled, again) and not torch.equal(filled, other)
    # more than the target: all are kept, or as many as that
    few = small(target=2)
    few.exchange(batch)
    assert (torch.bincount(few.fill(x, y, 0, 5)[1], minlength=4) >= torch.bincount(y, minlength=4)).all()
    capped = small(target=2, cap=True)
    capped.exchange(batch)
    kept, labels = capped.fill(x, y, 0, 5)
    assert int(torch.bincount(labels).max()) == 2
    assert (kept[labels == 0][:, None] == x[y == 0]).all(-1).any(1).all() or int((y == 0).sum()) < 2


def test_repeat_only_repeats() -> None:
    batch, model = a_round(), small(geometry="repeat")
    x, y = batch["image"][9:26].flatten(1), batch["label"][9:26]
    filled, labels = model.fill(x, y, client=1, seed=0)
    assert all((row == x[y == c]).all(1).any() for row, c in zip(filled, labels, strict=True))
    assert len(filled) == 12 * int((torch.bincount(y) > 0).sum())


def test_prototypes_come_from_other_domains_only() -> None:
    """Clients 0 and 2 are of one domain, so client 0 gets client 1's means, and client 1 those of both together."""
    batch = a_round()
    model = small(domains=2, per_prototype=20, per_anchor=1, kept=0, fill_absent=True, geometry="repeat")
    model.exchange(batch)
    parts = list(zip(batch["image"].flatten(1).split(batch["size"]), batch["label"].split(batch["size"]), strict=True))
    means, there = model.others(0)
    assert means.shape == (1, 4, 6) and there.shape == (1, 4)
    x, y = parts[1]
    assert all(close(means[0, c], x[y == c].mean(0)) for c in range(4) if there[0, c])
    means, _ = model.others(1)
    x, y = (torch.cat([a, b]) for a, b in zip(parts[0], parts[2], strict=True))
    assert all(close(means[0, c], x[y == c].mean(0)) for c in range(4) if (y == c).any())
    filled, labels = model.fill(*parts[0], client=0, seed=0)
    assert (parts[0][1] != 3).all() and (labels == 3).sum() == 12  # its absent class, from client 1
    mean = parts[1][0][parts[1][1] == 3].mean(0)
    assert torch.allclose(filled[labels == 3], mean.expand(12, -1))


# ---- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"per_prototype": 4, "domains": 3}, {"authors_no_broadcast": True}])
def test_stacked_equals_one_by_one(changes: dict[str, Any]) -> None:
    together, alone = small(**changes), small(stack=1, **changes)
    for seed in (0, 1):
        for model in (together, alone):
            model.training_step({**a_round(), "seed": [seed, seed + 7, seed + 9]}, 0)
    for (name, a), b in zip(together.state_dict().items(), alone.state_dict().values(), strict=True):
        assert close(a.double(), b.double()), name


@pytest.mark.parametrize("algorithm", ["fedavg", "fedprox", "scaffold"])
def test_switched_off_it_is_fedavg(algorithm: str) -> None:
    shared = {k: v for k, v in SMALL.items() if k not in ("backbone", "target")} | {"algorithm": algorithm}
    ours = small(geometry="off", weighted=True, optimizer="sgd", momentum=0.5, algorithm=algorithm)
    plain = quiet(
        FederatedModule(**shared, net={"name": "mlp", "hidden": []}, norm="none", momentum=0.5, weight_decay=0.0)
    )
    plain.model.head.load_state_dict(ours.model.head.state_dict())
    for seed in (0, 1):
        ours.training_step(a_round(seed=seed), 0)
        plain.training_step(a_round(seed=seed), 0)
    assert close(ours.model.head.weight, plain.model.head.weight) and ours.sent.equal(plain.sent)


def test_a_local_step_by_hand() -> None:
    """One client, one batch: Adam's first step is the gradient's sign times the rate."""
    model = small(geometry="off", num_clients=1, local_epochs=1, local_batch=9)
    batch = a_round((0,), (9,))
    head = nn.Linear(6, 4)
    head.load_state_dict(model.model.head.state_dict())
    F.cross_entropy(head(batch["image"].flatten(1)), batch["label"]).backward()
    wanted = head.weight - 0.01 * head.weight.grad / (head.weight.grad.abs() + 1e-8)
    model.training_step(batch, 0)
    assert close(model.model.head.weight, wanted.detach())


def test_all_clients_weigh_alike() -> None:
    heads = {
        "model.head.weight": torch.tensor([[[1.0]], [[4.0]]]).expand(2, 4, 6),
        "model.head.bias": torch.zeros(2, 4),
    }
    for weighted, mean in ((False, 2.5), (True, 3.25)):
        model = small(weighted=weighted)
        model.aggregate(model.broadcast(), heads, torch.tensor([1.0, 3.0]), {})
        assert torch.allclose(model.model.head.weight, torch.full((4, 6), mean))


def test_without_broadcast_clients_go_on_from_their_own_heads() -> None:
    model = small(authors_no_broadcast=True)
    model.training_step(a_round(), 0)
    own = model.states.read([0, 1, 2], "own.head.")["weight"]
    assert torch.allclose(own.mean(0), model.model.head.weight, atol=1e-6)
    start = model.start_state([0, 1, 2], {})
    assert torch.equal(start["head.weight"], own) and not torch.allclose(own[0], own[1])


def test_resumes_with_the_same_samples() -> None:
    model = small(per_prototype=3)
    model.training_step(a_round(), 0)
    again = small(seed=1, per_prototype=3)
    again.load_state_dict(model.state_dict())
    for one in (model, again):
        one.training_step(a_round(seed=2), 0)
    assert torch.equal(model.model.head.weight, again.model.head.weight)


# ---- features -------------------------------------------------------------------------------------------------------


def test_the_backbone_is_frozen_and_asked_once() -> None:
    model = small(backbone=VISION, in_channels=1, image_size=8)
    before = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    calls: list[int] = []
    model.backbone.model.register_forward_hook(lambda *_: calls.append(1))
    batch = a_round(shape=(1, 8, 8))
    for _ in range(3):
        model.training_step(batch, 0)
    assert len(calls) == 3  # once a client
    assert all(torch.equal(v, before[k]) for k, v in model.backbone.state_dict().items())
    assert not any(p.requires_grad for p in model.backbone.parameters())
    assert not any("_features" in k for k in model.state_dict())
    # a client with other pictures is not answered with old features
    other = {**batch, "image": batch["image"].flip(0)}
    model.training_step(other, 0)
    assert len(calls) > 3
    full = model.features(("train", 0), other["image"][:9])
    assert torch.equal(full, model.encode(other["image"][:9]))
    model.hparams.cache_mb = 0
    model.features("more", batch["image"])
    assert not model._features


def test_encoder_equals_transformers_on_prepared_pictures() -> None:
    """Resizing as Pillow's bicubic filter does, and normalisation, before the same model."""
    import numpy as np
    from PIL import Image

    model = small(backbone=VISION, in_channels=3, image_size=20)
    encoder = model.backbone
    generator = torch.Generator().manual_seed(0)
    smooth = F.interpolate(torch.rand(1, 3, 5, 5, generator=generator), 20, mode="bilinear")
    image = (255 * smooth).round().to(torch.uint8)
    picture = Image.fromarray(image[0].permute(1, 2, 0).numpy()).resize((12, 12), Image.Resampling.BICUBIC)
    prepared = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
    ours = (encoder.resize @ (image.float() / 255) @ encoder.resize.T).clamp(0, 1)
    assert (ours - prepared).abs().max() < 1.5 / 255  # Pillow rounds to bytes, twice
    same = small(backbone=VISION, in_channels=3, image_size=12)
    same.backbone.load_state_dict(encoder.state_dict())
    mean, std = encoder.mean, encoder.std
    wanted = encoder.model(pixel_values=(prepared - mean) / std).image_embeds
    assert close(same.backbone(prepared), wanted.detach())
    grey = torch.rand(2, 1, 12, 12)
    assert torch.equal(same.backbone(grey), same.backbone(grey.expand(-1, 3, -1, -1)))
    exported = torch.export.export(same.eval(), (torch.rand(2, 3, 12, 12),)).module()
    assert close(exported(prepared.repeat(2, 1, 1, 1)), same(prepared.repeat(2, 1, 1, 1)).detach(), 1e-4)


def test_a_live_backbone_and_a_saved_one(tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    vision = CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION))
    shared = {**SMALL, "in_channels": 3, "image_size": 12}
    live = GGEUR.from_backbone(vision, **{k: v for k, v in shared.items() if k != "backbone"})
    assert live.backbone.model is vision
    live.save_pretrained(tmp_path / "live")
    image = torch.rand(2, 3, 12, 12)
    assert torch.equal(GGEUR.from_pretrained(tmp_path / "live").predict(image), live.predict(image))
    vision.save_pretrained(tmp_path / "vision")
    named = GGEUR(**{**shared, "backbone": str(tmp_path / "vision")})
    assert not any(k.startswith("backbone.") for k in named.saved_state_dict())
    named.model.load_state_dict(live.model.state_dict())
    assert close(named.predict(image), live.predict(image))
    with pytest.raises(TypeError, match="not a CLIPVisionModelWithProjection"):
        GGEUR.from_backbone(nn.Linear(2, 2))
    with pytest.raises(ZooError, match="No CLIP vision model") as caught:
        GGEUR(**{**shared, "backbone": str(tmp_path)})
    assert "\n" not in str(caught.value)
    with pytest.raises(TypeError, match="not a CLIPVision"):
        Encoder(nn.Linear(2, 2), 8)


# ---- scoring --------------------------------------------------------------------------------------------------------


def test_domain_accuracy_by_hand() -> None:
    metric = DomainAccuracy(4, 2)
    for client, right, total in ((-1, 5, 10), (0, 8, 10), (1, 1, 2), (2, 0, 10), (3, 3, 6)):
        metric.update(client, torch.tensor([1.0] * right + [0.0] * (total - right)), total)
    found = metric.compute()
    assert float(found["domain_0"]) == pytest.approx(0.4) and float(found["domain_1"]) == pytest.approx(0.5)
    assert float(found["domain_accuracy"]) == pytest.approx(0.45)
    assert float(found["domain_spread"]) == pytest.approx(0.05)
    assert float(found["accuracy"]) == 0.5
    silent = DomainAccuracy(4, 2)
    silent.update(-1, torch.ones(2), 2)
    assert set(silent.compute()) == {"accuracy"}


def test_scores_of_domains() -> None:
    model = small(domains=3)
    for client, size in ((-1, 12), (0, 5), (1, 6), (2, 7)):
        batch = a_round((client,), (size,), seed=size)
        model.test_step(batch, 0)
        right = model(batch["image"]).argmax(1) == batch["label"]
        if client >= 0:
            model.logged[f"wanted_{client}"] = right.float().mean()
    model.on_test_epoch_end()
    shares = torch.stack([model.logged[f"wanted_{c}"] for c in range(3)])
    assert all(torch.isclose(model.logged[f"test/domain_{c}"], shares[c]) for c in range(3))
    assert torch.isclose(model.logged["test/domain_spread"], shares.std(correction=0))


def test_recipes_features(tmp_path: Path) -> None:
    import numpy as np

    embed(tmp_path, 0, 8, 20, ["none", "invert"])
    files = sorted(tmp_path.glob("*.npz"))
    assert [f.stem for f in files] == ["0_none", "1_invert"]
    parts = [np.load(f) for f in files]
    x = np.concatenate([p["x_train"] for p in parts])
    assert x.shape[1] == 8 and np.abs(x.mean(0)).max() < 1e-3
    assert np.abs(np.cov(x.T, bias=True) - np.eye(8)).max() < 1e-2
    assert len(x) + len(parts[0]["y_test"]) == 1797
    assert (parts[0]["y_test"] == parts[1]["y_test"]).all() and np.abs(
        parts[0]["x_test"] - parts[1]["x_test"]
    ).max() > 0.1


# ---- refusals and the authors' files --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"geometry": "round"}, "geometry is 'round'"),
        ({"optimizer": "lion"}, "optimizer is 'lion'"),
        ({"target": 0}, "target is 0; at least 1"),
        ({"rank": 0}, "rank is 0; at least 1"),
        ({"guide": 0.0}, r"guide is 0.0; a share in \(0, 1\]"),
        ({"fill_absent": True}, "needs per_prototype"),
        ({"authors_no_broadcast": True, "algorithm": "scaffold"}, "FedAvg's"),
        (
            {"backbone": VISION, "in_channels": 3, "image_size": 8, "mean": [0.5], "std": [0.5]},
            "a backbone has its own",
        ),
        ({"backbone": VISION}, "1 or 3 channels"),
        ({"momentum": 1.0}, "below 1"),
    ],
)
def test_refusals(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        GGEUR(**{**SMALL, **changes})
    assert "\n" not in str(caught.value)


def test_refuses_labels_and_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="'label' goes up to 3; num_classes is 3"):
        small(num_classes=3).training_step(a_round(), 0)
    with pytest.raises(ValueError, match="expected"):
        small().predict(torch.rand(1, 5, 1, 1))
    with pytest.raises(ValueError, match="image"):
        small().predict(torch.full((1, 6, 1, 1), math.nan))


def test_converts_the_authors_head() -> None:
    content = nn.Linear(512, 7).state_dict()
    hyperparameters, state = GGEUR.convert_state_dict({f"fc3.{k}": v for k, v in content.items()})
    model = GGEUR(**hyperparameters, backbone=None, in_channels=512, image_size=1)
    model.load_state_dict(state)
    x = torch.rand(3, 512)
    assert torch.equal(model(x[:, :, None, None]), F.linear(x, content["weight"], content["bias"]))
    with pytest.raises(ZooError, match="Not a GGEUR head"):
        GGEUR.convert_state_dict({"fc.weight": torch.zeros(2, 2)})
