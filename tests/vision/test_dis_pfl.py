"""DisPFL: parity with recorded rounds, masks against slow loops, invariants, limits, what is sent, refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from zoo.core import ZooError, catalogue
from zoo.core.seeding import seed_from
from zoo.engines.federated import FederatedModule
from zoo.nn.classifiers import classifier
from zoo.vision.federated.data_federated import FederatedClassificationDataModule
from zoo.vision.federated.dis_pfl import (
    DisPFL,
    fire,
    largest,
    layer_densities,
    owners_mean,
    random_mask,
    regrow,
)

GOLDEN = Path(__file__).parent.parent / "golden" / "dis_pfl.safetensors"
SIZES = [9, 14, 5, 11]


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> bool:
    return float((ours.detach() - theirs).abs().max()) <= tolerance * float(theirs.abs().max().clamp(min=1e-12))


def tiny(**overrides: Any) -> DisPFL:
    torch.manual_seed(0)
    given = {"net": {"name": "cnn", "widths": [4, 6], "features": 12}, "num_clients": 4, "peers": 2, "local_batch": 4}
    return quiet(DisPFL.from_variant("tiny", **{**given, "num_classes": 5, "in_channels": 2, **overrides}))


def quiet(model: Any) -> Any:
    model.log = lambda *a, **k: None  # no trainer
    return model


def batch(number: int = 0, sizes: list[int] = SIZES, channels: int = 2, **changes: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed_from("data"))
    image = torch.rand(sum(sizes), channels, 8, 8, generator=generator)
    label = torch.randint(5, (sum(sizes),), generator=generator)
    clients = list(range(len(sizes)))
    seeds = [seed_from(number, client) for client in clients]
    found = {"image": image, "label": label, "client": clients, "size": sizes, "work": [1.0] * len(sizes)}
    return {**found, "seed": seeds, **changes}


def train(model: Any, rounds: int = 2, **changes: Any) -> Any:
    for number in range(rounds):
        model.training_step(batch(number, **changes), 0)
    return model


def everyone(model: DisPFL, kind: str) -> dict[str, Tensor]:
    return model.states.read(range(model.hparams.num_clients), f"{kind}.")


# ---- parity with the authors' code -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gradient", "random"])
def test_golden(kind: str) -> None:
    """Three rounds of four clients among drawn peers, as their API went through them."""
    golden = load_file(GOLDEN)
    model = tiny(lr=0.1, rounds=4, local_epochs=2, regrow=kind)
    first = {n.removeprefix("first."): v for n, v in golden.items() if n.startswith("first.")}
    for name, value in first.items():
        part, _, parameter = name.partition(".")
        model.states.write(range(4), {parameter: value}, f"{part}.")
        if part == "masks":
            model.states.write(range(4), {parameter: value}, "shared.")
    train(model, 3)
    weights, shared, masks = (everyone(model, part) for part in ("personal", "shared", "masks"))
    for name in masks:
        assert close(weights[name], golden[f"{kind}.weights.{name}"]), name
        assert torch.equal(shared[name], golden[f"{kind}.shared.{name}"]), name
        assert torch.equal(masks[name], golden[f"{kind}.masks.{name}"]), name


def test_converts_their_models() -> None:
    """Their ResNet-18 under its names; what belongs to nobody is the mean over owners."""
    net = classifier(
        {"name": "resnet18", "width": 4}, num_classes=4, in_channels=3, image_size=32, norm="group"
    ).state_dict()
    back = {"stem.0": "conv1", "stem.1": "bn1", "head": "linear"}
    theirs = []
    for name in net:
        for ours, old in back.items():
            name = f"{old}{name[len(ours) :]}" if name.startswith(f"{ours}.") else name
        theirs.append(name.replace(".norm", ".bn"))
    masks = [{n: (torch.rand(v.shape) < 0.5).float() for n, v in zip(theirs, net.values(), strict=True)} for _ in "ab"]
    models = [{n: v * m[n] for n, v in zip(theirs, net.values(), strict=True)} for m in masks]
    hyperparameters, state = DisPFL.convert_state_dict({"w_per_mdls": models, "mask_pers": masks})
    assert hyperparameters == {"num_classes": 4, "in_channels": 3, "num_clients": 2}
    with torch.device("meta"):
        assert {
            n: v.shape for n, v in DisPFL(**hyperparameters, net={"name": "resnet18", "width": 4}).state_dict().items()
        } == {n: v.shape for n, v in state.items()}
    assert torch.equal(state["states.personal__head__bias"][1], models[1]["linear.bias"])
    assert torch.equal(state["states.masks__layer1__0__norm2__weight"][0], masks[0]["layer1.0.bn2.weight"] > 0)
    either = (masks[0]["conv1.weight"] + masks[1]["conv1.weight"]) > 0
    assert close(state["model.stem.0.weight"], net["stem.0.weight"] * either)
    with pytest.raises(ZooError, match="w_per_mdls"):
        DisPFL.convert_state_dict({"state_dict": models[0]})


# ---- masks -----------------------------------------------------------------------------------------------------------

SHAPES = {"conv1": (16, 3, 3, 3), "conv2": (32, 16, 3, 3), "bias": (32,), "fc": (10, 128), "fc_bias": (10,)}


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 0.8, 0.99, 1.0])
def test_densities_add_up(density: float) -> None:
    found = layer_densities(SHAPES, density)
    numbers = {n: torch.Size(s).numel() for n, s in SHAPES.items()}
    assert sum(found[n] * numbers[n] for n in SHAPES) == pytest.approx(density * sum(numbers.values()))
    assert all(0 < share <= 1 for share in found.values())
    sparse = {n: share for n, share in found.items() if share < 1}
    ratios = [share / (sum(SHAPES[n]) / numbers[n]) for n, share in sparse.items()]
    assert max(ratios, default=1) == pytest.approx(min(ratios, default=1))
    drawn = sum(int(random_mask(SHAPES[n], share).sum()) for n, share in found.items())
    assert drawn == pytest.approx(density * sum(numbers.values()), rel=0.01)


def test_densities_by_hand() -> None:
    """Two tensors, 4 x 4 and 2 x 2, raw 0.5 and 1: at 0.6 eps = 12 / 12 = 1; at 0.8 the small one is dense."""
    shapes = {"a": (4, 4), "b": (2, 2)}
    assert layer_densities(shapes, 0.6) == {"a": pytest.approx(0.5), "b": pytest.approx(1.0)}
    assert layer_densities(shapes, 0.8) == {"a": pytest.approx(0.75), "b": 1.0}
    assert layer_densities(shapes, 0.3) == {"a": pytest.approx(0.25), "b": pytest.approx(0.5)}
    assert layer_densities(shapes, 0.6, power=0.0) == {"a": pytest.approx(0.6), "b": pytest.approx(0.6)}


def test_densities_refuse() -> None:
    for density in (0.0, 1.01, -0.2):
        with pytest.raises(ValueError, match="density"):
            layer_densities(SHAPES, density)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 20), st.floats(0, 1))
def test_fire_and_regrow_against_loops(seed: int, clients: int, n: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(clients, n, generator=generator) < 0.6
    weights = torch.randn(clients, n, generator=generator) * masks
    scores = torch.rand(clients, n, generator=generator)
    left, counts = fire(masks, weights, share)
    found = regrow(left, scores, counts)
    for k in range(clients):
        active = [i for i in range(n) if masks[k, i]]
        number = int((torch.tensor(share) * len(active)).ceil())
        stay = sorted(active, key=lambda i: float(weights[k, i].abs()))[number:]
        assert {i for i in range(n) if left[k, i]} == set(stay)
        others = sorted((i for i in range(n) if i not in stay), key=lambda i: -float(scores[k, i]))[:number]
        assert {i for i in range(n) if found[k, i]} == set(stay) | set(others)
        assert int(found[k].sum()) == len(active)


def test_largest_takes_as_many_as_asked() -> None:
    values = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0]])
    assert largest(values, torch.tensor([2.0, 0.0])).tolist() == [[True, False, True], [False, False, False]]


def test_dense_tensors_stay_dense() -> None:
    masks = torch.ones(2, 7, dtype=torch.bool)
    left, counts = fire(masks, torch.randn(2, 7), 0.5)
    assert counts.tolist() == [4, 4] and bool(regrow(left, torch.rand(2, 7), counts).all())


# ---- the mean over owners --------------------------------------------------------------------------------------------


def test_owners_mean_against_loops() -> None:
    torch.manual_seed(0)
    masks = torch.rand(5, 3, 4) < 0.4
    weights = torch.randn(5, 3, 4) * masks
    peers = (torch.rand(2, 5) < 0.7).float()
    found = owners_mean(weights, masks, peers)
    for k in range(2):
        for i in range(3):
            for j in range(4):
                own = [float(weights[p, i, j]) for p in range(5) if peers[k, p] and masks[p, i, j]]
                assert float(found[k, i, j]) == pytest.approx(sum(own) / len(own) if own else 0.0, abs=1e-6)


def test_equal_masks_give_the_plain_mean_and_disjoint_ones_change_nothing() -> None:
    weights = torch.tensor([[1.0, 2.0, 0.0, 0.0], [3.0, 6.0, 0.0, 0.0]])
    both = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0]]).bool()
    assert owners_mean(weights, both, torch.ones(1, 2)).tolist() == [[2.0, 4.0, 0.0, 0.0]]
    apart = torch.tensor([[1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 5.0, 7.0]])
    assert owners_mean(apart, apart > 0, torch.ones(1, 2)).tolist() == [[1.0, 2.0, 5.0, 7.0]]


# ---- rounds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gradient", "random"])
def test_together_and_one_by_one_are_equal(kind: str) -> None:
    one, all_ = (train(tiny(stack=stack, regrow=kind)).state_dict() for stack in (1, None))
    for name, value in one.items():
        if value.dtype == torch.bool:
            assert torch.equal(all_[name], value), name
        else:
            assert close(all_[name].double(), value.double()), name


def test_masks_keep_their_size_and_hold_the_weights() -> None:
    model = tiny()
    before = everyone(model, "masks")
    train(model, 3)
    weights, shared, masks = (everyone(model, part) for part in ("personal", "shared", "masks"))
    changed = 0
    for name, first in before.items():
        count = first.flatten(1).sum(1)
        assert torch.equal(count, shared[name].flatten(1).sum(1)) and torch.equal(count, masks[name].flatten(1).sum(1))
        assert not bool(weights[name][~shared[name]].any())
        changed += int((masks[name] != shared[name]).sum())
    assert changed > 0
    owned = sum(int(m.sum()) for m in before.values()) / 4 / sum(p.numel() for p in model.model.parameters())
    assert owned == pytest.approx(0.5, abs=0.02)


def test_frozen_masks_stay() -> None:
    model = tiny(evolve=False)
    before = everyone(model, "masks")
    after = everyone(train(model), "masks")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_masks_stop_moving_after_the_last_round() -> None:
    model = tiny(rounds=2)
    for number, moves in enumerate((True, True, False, False)):
        before = everyone(model, "masks")
        model.training_step(batch(number), 0)
        after = everyone(model, "masks")
        assert any(not torch.equal(before[n], after[n]) for n in before) is moves


def test_capacities_are_dealt_in_turn() -> None:
    model = tiny(density=[0.4, 0.8, 1.0], num_clients=4)
    masks = everyone(model, "masks")
    total = sum(m[0].numel() for m in masks.values())
    found = [sum(int(m[k].sum()) for m in masks.values()) / total for k in range(4)]
    assert found == pytest.approx([0.4, 0.8, 1.0, 0.4], abs=0.02)
    assert not torch.equal(masks["hidden.0.weight"][0], masks["hidden.0.weight"][3])
    alike = everyone(tiny(density=[0.4, 0.8], shared_mask=True), "masks")["hidden.0.weight"]
    assert torch.equal(alike[0], alike[2]) and not torch.equal(alike[0], alike[1])


def test_switched_off_it_is_fedavg() -> None:
    """Dense, everyone listening to everyone, and clients of one size: the mean of the clients is FedAvg's model."""
    sizes = [8, 8, 8, 8]
    model = train(tiny(density=1.0, topology="full", evolve=False), sizes=sizes)
    hp = model.hyperparameters
    known = FederatedModule.variant("tiny") | {
        k: hp[k] for k in ("net", "num_classes", "in_channels", "image_size", "num_clients", "lr", "momentum", "clip")
    }
    known |= {k: hp[k] for k in ("weight_decay", "lr_decay", "local_epochs", "local_batch", "norm")}
    torch.manual_seed(0)
    plain = train(quiet(FederatedModule(**known)), sizes=sizes)
    for name, value in plain.model.state_dict().items():
        assert close(model.model.state_dict()[name], value), name


def test_a_client_alone_keeps_its_weights_to_begin_with() -> None:
    model = train(tiny(), 1)
    model._links = {2: [2]}
    start, own = model.start_state([2], {}), model.states.read([2], "personal.")
    masks = model.states.read([2], "masks.")
    assert all(torch.allclose(start[n], own[n] * masks[n]) for n in start)


# ---- peers -----------------------------------------------------------------------------------------------------------


def test_topologies() -> None:
    round_ = batch(sizes=[4] * 6)
    ring = tiny(num_clients=6, topology="ring").neighbours(round_)
    assert ring == {0: [0, 1, 5], 1: [1, 0, 2], 2: [2, 1, 3], 3: [3, 2, 4], 4: [4, 3, 5], 5: [5, 0, 4]}
    full = tiny(num_clients=6, topology="full").neighbours(round_)
    assert all(sorted(heard) == list(range(6)) and heard[0] == k for k, heard in full.items())
    drawn = tiny(num_clients=6, peers=2).neighbours(round_)
    assert all(heard[0] == k and len(heard) == len(set(heard)) == 3 for k, heard in drawn.items())
    assert drawn == tiny(num_clients=6, peers=2).neighbours(round_)
    assert drawn != tiny(num_clients=6, peers=2).neighbours(batch(1, sizes=[4] * 6))


def test_who_does_not_answer_is_no_peer_and_keeps_its_state() -> None:
    model = tiny(topology="full")
    away = batch(work=[1.0, 0.0, 1.0, 1.0])
    assert model.neighbours(away) == {0: [0, 2, 3], 2: [2, 0, 3], 3: [3, 0, 2]}
    before = everyone(model, "personal")
    model.training_step(away, 0)
    after = everyone(model, "personal")
    for name in before:
        assert torch.equal(before[name][1], after[name][1])
    assert any(not torch.equal(before[n][0], after[n][0]) for n in before)


def test_what_is_sent_is_counted_by_hand() -> None:
    """Active weights at 4 bytes, and a bit an entry where a tensor is not dense, over every link."""
    model = tiny(topology="ring")
    sizes = [0] * 4
    for mask in everyone(model, "masks").values():
        for k in range(4):
            ones, entries = int(mask[k].sum()), mask[k].numel()
            sizes[k] += 4 * ones + (0 if ones == entries else -(-entries // 8))
    train(model, 1)
    assert model.sent.tolist() == [2.0 * sum(sizes)] * 2
    dense = train(tiny(topology="ring", density=1.0), 1)
    assert dense.sent[0] == 4 * 2 * 4 * sum(p.numel() for p in dense.model.parameters())


# ---- a client's model ------------------------------------------------------------------------------------------------


def test_client_models() -> None:
    model = train(tiny(mean=[0.2, 0.3], std=[0.5, 0.4])).eval()
    x = torch.rand(3, 2, 8, 8)
    outputs = [model(x, k) for k in range(4)]
    assert not torch.allclose(outputs[0], outputs[1])
    assert torch.allclose(model.client_model(1)(model.normalise(x)), outputs[1])
    owners = everyone(model, "shared")["head.weight"].sum(0)
    mean = everyone(model, "personal")["head.weight"].sum(0) / owners.clamp(min=1)
    assert torch.allclose(model.model.state_dict()["head.weight"], mean, atol=1e-6)
    for wrong in (4, -1):
        with pytest.raises(ValueError, match="client is"):
            model.client_model(wrong)


def test_learns_on_the_embedded_data() -> None:
    data = FederatedClassificationDataModule(seed=3, alpha=0.3, clients=6)
    data.setup("fit")
    torch.manual_seed(0)
    net = {"name": "mlp", "hidden": [32]}
    model = quiet(DisPFL.from_variant("tiny", net=net, norm="none", num_clients=6, rounds=6, local_epochs=3))

    def right() -> float:
        found = [model.predict(data.images[own], k).argmax(-1) == data.labels[own] for k, own in enumerate(data.shares)]
        return sum(float(one.float().mean()) for one in found) / len(found)

    assert right() < 0.4
    for number in range(6):
        rows = data.gather(range(6)) | {"work": [1.0] * 6, "seed": [seed_from(number, k) for k in range(6)]}
        model.training_step(rows, 0)
    assert right() > 0.85


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"density": 0.0}, "density"),
        ({"density": [0.5, 1.5]}, "density"),
        ({"density": []}, "density"),
        ({"layers": "erdos"}, "layers"),
        ({"regrow": "magnitude"}, "regrow"),
        ({"topology": "star"}, "topology"),
        ({"num_clients": 1}, "num_clients"),
        ({"peers": 0}, "peers"),
        ({"rounds": 0}, "rounds"),
        ({"anneal": 1.5}, "anneal"),
        ({"topology": "ring", "num_clients": 2}, "ring"),
        ({"norm": "batch"}, "norm"),
        ({"net": {"name": "resnet10", "width": 4, "norm": "batch"}}, "batch norm"),
        ({"num_clients": 4, "lr": -1.0}, "lr"),
    ],
)
def test_bad_arguments_are_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        tiny(**given)
    assert "\n" not in str(caught.value)


def test_facts() -> None:
    facts = catalogue.facts("DisPFL")
    assert facts["arxiv"] == "2206.00187" and facts["fidelity"] == "parity"
    assert DisPFL.variant("scripts") == {"regrow": "random"}
