"""FedLD: parity with recorded rounds, aggregation against slow loops, hand-computed values, limits, refusals."""

import math
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
from zoo.vision.federated.fed_ld import FedLD, margin_penalty, principal_mean, principal_weights

GOLDEN = Path(__file__).parent.parent / "golden" / "fed_ld.safetensors"
SIZES = [16, 24, 8, 32, 16]
NET = {"name": "cnn", "widths": [4, 6], "features": 12}


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> bool:
    return float((ours.detach() - theirs).abs().max()) <= tolerance * float(theirs.abs().max().clamp(min=1e-12))


def quiet(model: Any) -> Any:
    model.log = lambda *a, **k: None  # no trainer
    return model


def tiny(**overrides: Any) -> FedLD:
    torch.manual_seed(0)
    given = {"net": NET, "num_clients": 5, "num_classes": 5, "in_channels": 2, "lr": 0.2, "local_batch": 8}
    return quiet(FedLD.from_variant("tiny", **{**given, **overrides}))


def batch(number: int = 0, sizes: list[int] = SIZES, **changes: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed_from("data"))
    image = torch.rand(sum(sizes), 2, 8, 8, generator=generator)
    label = torch.randint(5, (sum(sizes),), generator=generator)
    clients = list(range(len(sizes)))
    seeds = [seed_from(number, client) for client in clients]
    found = {"image": image, "label": label, "client": clients, "size": sizes, "work": [1.0] * len(sizes)}
    return {**found, "seed": seeds, **changes}


def train(model: Any, rounds: int = 3, **changes: Any) -> Any:
    for number in range(rounds):
        model.training_step(batch(number, **changes), 0)
    return model


def one(update: Tensor, share: float = 0.8, ready: bool = True) -> Tensor:
    return principal_mean({"x": update}, share, torch.tensor([ready]))["x"]


# ---- parity with the authors' code -----------------------------------------------------------------------------------


def test_golden() -> None:
    """Four rounds: the first trains nothing, the second is averaged, then principal directions; statistics go along."""
    golden = load_file(GOLDEN)
    model = tiny(norm="batch", local_epochs=2, warm_up=5, authors_warm_up=True, authors_buffers=True)
    model.model.load_state_dict({n.removeprefix("first."): v for n, v in golden.items() if n.startswith("first.")})
    for number in range(4):
        model.training_step(batch(number), 0)
        for name, value in model.model.state_dict().items():
            if not name.endswith("tracked"):  # theirs cut every client's share of the count to an integer
                assert close(value, golden[f"round{number}.{name}"]), (number, name)


def test_converts_their_models() -> None:
    from torchvision.models import resnet18

    torch.manual_seed(0)
    theirs = resnet18(num_classes=3)
    hyperparameters, state = FedLD.convert_state_dict({"state_dict": theirs.state_dict()})
    assert hyperparameters == {"net": "torchvision:resnet18", "num_classes": 3}
    model = FedLD(**hyperparameters, image_size=32)
    model.load_state_dict(state)
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert close(model.eval()(x), theirs.eval()(model.normalise(x)))
    for content, message in (({"fc.weight": x}, "ResNets"), ({"model": {"a": x}}, "ResNets")):
        with pytest.raises(ZooError, match=message):
            FedLD.convert_state_dict(content)
    with torch.device("meta"):
        deep = resnet18(num_classes=3).state_dict()
    deep["layer1.2.conv1.weight"] = deep["layer1.1.conv1.weight"]
    with pytest.raises(ZooError, match="blocks"):
        FedLD.convert_state_dict(deep)


# ---- margin control --------------------------------------------------------------------------------------------------


def test_penalty_by_hand() -> None:
    """Two samples of two classes: sure of one, and undecided: squares 1 and 1/2."""
    logits, mask = torch.tensor([[100.0, 0.0], [0.0, 0.0]]), torch.tensor([True, True])
    assert float(margin_penalty(logits, mask)) == pytest.approx(math.log(1 + 1.5))
    assert float(margin_penalty(logits, mask, "sample")) == pytest.approx((math.log(2) + math.log(1.5)) / 2)
    half = torch.tensor([False, True])
    assert float(margin_penalty(logits, half)) == pytest.approx(math.log(1.5))
    assert float(margin_penalty(logits, half, "sample")) == pytest.approx(math.log(1.5))


def test_penalty_is_least_where_none_is_sure() -> None:
    logits = torch.zeros(4, 3, requires_grad=True)
    mask = torch.ones(4, dtype=torch.bool)
    margin_penalty(logits, mask).backward()
    assert logits.grad is not None and not bool(logits.grad.abs().gt(1e-7).any())
    assert margin_penalty(torch.randn(4, 3), mask) > margin_penalty(torch.zeros(4, 3), mask)


def test_margin_control_adds_to_the_loss() -> None:
    rows = {"image": torch.rand(6, 2, 8, 8), "label": torch.arange(6) % 5, "mask": torch.arange(6) < 5}
    plain, held = tiny(margin=0.0), tiny(margin=0.3)
    without, with_ = (model.loss(model.model, rows)["loss"].item() for model in (plain, held))
    penalty = plain.loss(plain.model, rows)["penalty"].item()
    assert with_ - without == pytest.approx(0.3 * penalty, rel=1e-4)


# ---- principal gradients ---------------------------------------------------------------------------------------------


def slow(updates: Tensor, share: float) -> Tensor:
    """The rule as the paper writes it: projections, one after the other, of a singular value decomposition."""
    g = updates.double()
    m = len(g)
    _, s, e = torch.linalg.svd(g @ g.T / m)
    total = torch.zeros_like(g[0])
    for i in range(m):
        for j in range(int(m * share)):
            v = g.T @ e[j]
            if s[j] <= 1e-12 * s[0] or float(v.norm()) == 0:
                continue
            projected = (g[i] @ v) / (v @ v) * v
            if float(projected.norm()) > 0:
                total += projected / projected.norm() * s[j] / s.sum() * g[i].norm()
    return total / m


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 7), st.integers(2, 30), st.sampled_from([0.5, 0.8, 1.0]))
def test_principal_mean_against_loops(seed: int, clients: int, size: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    updates = torch.randn(clients, size, generator=generator) + torch.randn(size, generator=generator)
    assert close(one(updates.double(), share), slow(updates, share), 1e-6)


def test_equal_updates_come_back() -> None:
    g = torch.randn(3, 4)
    assert close(one(g[None].repeat(5, 1, 1)), g, 1e-5)
    assert close(one(torch.stack([g, 3 * g, -2 * g]), 1.0), g * (1 + 3 - 2) / 3)


def test_orthogonal_updates_by_hand() -> None:
    """g_1 = (2, 0), g_2 = (0, 1): S = 2, 1/2; the first kept alone gives 1/2 * 4/5 * 2 e_1."""
    updates = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    assert one(updates, 0.5).tolist() == pytest.approx([0.8, 0.0], abs=1e-6)
    assert one(updates, 1.0).tolist() == pytest.approx([0.8, 0.1], abs=1e-6)


def test_one_against_the_rest_moves_the_aggregate_less_than_the_mean() -> None:
    torch.manual_seed(0)
    common = torch.randn(50)
    agree = common + 0.1 * torch.randn(4, 50)
    odd = torch.randn(50)
    odd = -2 * odd / odd.norm() * common.norm() - common
    both = torch.cat([agree, odd[None]])

    def away(value: Tensor) -> float:
        return float(1 - torch.cosine_similarity(value, agree.mean(0), dim=0))

    assert away(one(both)) != pytest.approx(away(both.mean(0)))
    small = torch.cat([agree, -0.5 * torch.randn(1, 50)])
    assert away(one(small)) < away(small.mean(0))


def test_nothing_moves_and_single_numbers() -> None:
    assert not bool(one(torch.zeros(4, 6)).any())
    assert float(one(torch.tensor([[1.0], [2.0], [6.0]]))) == 3.0
    updates = torch.randn(4, 6)
    assert close(one(updates, ready=False), updates.mean(0))
    assert close(one(updates, 0.2), updates.mean(0))
    assert principal_mean({}, 0.8, torch.zeros(0, dtype=torch.bool)) == {}
    partly = torch.cat([torch.randn(1, 6), torch.zeros(3, 6)])
    assert bool(one(partly, 1.0).isfinite().all())


def test_weights_of_several_tensors_at_once() -> None:
    updates = {"a": torch.randn(4, 3, 2), "b": torch.randn(4, 7), "c": torch.randn(4, 1)}
    ready = torch.tensor([True, False, True])
    found = principal_mean(updates, 0.8, ready)
    assert close(found["a"], one(updates["a"])) and close(found["b"], updates["b"].mean(0))
    assert close(found["c"], updates["c"].mean(0))
    gram = torch.stack([u.flatten(1).double() @ u.flatten(1).double().T for u in updates.values()])
    assert close(principal_weights(gram, 3)[0], principal_weights(gram[:1], 3)[0])


def test_divergence_is_one_line() -> None:
    with pytest.raises(ZooError, match="not finite") as caught:
        one(torch.tensor([[1.0, torch.inf], [0.0, 1.0]]))
    assert "\n" not in str(caught.value)


# ---- rounds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_together_and_one_by_one_are_equal(norm: str) -> None:
    single, together = (train(tiny(stack=stack, norm=norm)).state_dict() for stack in (1, None))
    for name, value in single.items():
        assert close(together[name].double(), value.double()), name


def test_switched_off_it_is_fedavg() -> None:
    model = train(tiny(margin=0.0, principal=0.0))
    hp = model.hyperparameters
    same = ("net", "num_classes", "in_channels", "image_size", "num_clients", "lr", "momentum", "weight_decay")
    torch.manual_seed(0)
    plain = FederatedModule(**{k: hp[k] for k in (*same, "local_epochs", "local_batch", "norm")})
    plain = train(quiet(plain))
    for name, value in plain.model.state_dict().items():
        assert torch.equal(model.model.state_dict()[name], value), name


def test_the_first_round_is_the_plain_mean() -> None:
    """All clients count alike, whatever their sizes; then every tensor has moved."""
    model = tiny()
    down = model.broadcast()
    start = {n: v.clone() for n, v in down.items()}
    up, _, _ = model.local(batch(), start, range(5))
    assert not bool(model.ready.any())
    train(model, 1)
    assert bool(model.ready.all())
    for name, value in model.model.state_dict().items():
        assert close(value, up[f"model.{name}"].mean(0)), name


def test_statistics_are_averaged_unless_asked() -> None:
    model, theirs = (train(tiny(norm="batch", authors_buffers=a), 2) for a in (False, True))
    assert len(theirs.ready) == len(model.ready) + 4
    own, other = model.model.state_dict(), theirs.model.state_dict()
    assert not torch.allclose(own["layer1.1.running_mean"], other["layer1.1.running_mean"])
    assert bool((own["layer1.1.running_var"] >= 0).all())


def test_authors_eval_leaves_the_statistics() -> None:
    model = tiny(norm="batch", authors_eval=True)
    before = {n: v.clone() for n, v in model.model.state_dict().items()}
    after = train(model, 2).model.state_dict()
    assert torch.equal(before["layer1.1.running_mean"], after["layer1.1.running_mean"])
    assert not torch.equal(before["layer1.0.weight"], after["layer1.0.weight"])


def test_learning_rate_warms_up() -> None:
    model, theirs = tiny(warm_up=5, local_epochs=2), tiny(warm_up=5, local_epochs=2, authors_warm_up=True)
    rates = []
    for done in range(4):
        for one_ in (model, theirs):
            one_.round.fill_(done)
        rates.append((model.round_lr() / 0.2, theirs.round_lr() / 0.2))
    assert [r for r, _ in rates] == pytest.approx([0.4, 0.8, 1.0, 1.0])
    assert [r for _, r in rates] == pytest.approx([0.0, 0.4, 0.8, 1.0])
    assert tiny(warm_up=0).round_lr() == 0.2


def test_decomposition_adds_up() -> None:
    model = tiny(decompose=True)
    logged: dict[str, float] = {}
    model.log = lambda name, value, **k: logged.update({name: float(value)})
    away = batch(work=[1.0, 0.0, 1.0, 1.0, 1.0])
    model.training_step(away, 0)
    parts = [logged[f"train/{name}_loss"] for name in ("local", "shift", "aggregation")]
    with torch.no_grad():
        whole = torch.nn.functional.cross_entropy(model.eval()(away["image"]), away["label"])
    assert sum(parts) == pytest.approx(float(whole), rel=1e-5)
    # by hand: the first client's model on its own samples
    model = tiny()
    up, _, _ = model.local(away, {n: v.clone() for n, v in model.broadcast().items()}, [0, 2, 3, 4])
    network = tiny().model
    losses = []
    for place, (first, last) in enumerate(((0, 16), (40, 48), (48, 80), (80, 96))):
        network.load_state_dict({n.removeprefix("model."): v[place] for n, v in up.items()})
        with torch.no_grad():
            own = torch.nn.functional.cross_entropy(network(away["image"][first:last]), away["label"][first:last])
        losses.append(float(own))
    assert parts[0] == pytest.approx(sum(losses) / 4, rel=1e-5)


# ---- networks and refusals -------------------------------------------------------------------------------------------


def test_the_papers_network_is_torchvisions() -> None:
    with torch.device("meta"):
        model = FedLD()
    assert model.model.fc.weight.shape == (2, 2048) and model.model.conv1.kernel_size == (7, 7)
    assert model.example_inputs()[0].shape == (2, 3, 384, 384)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"num_clients": 1}, ValueError, "num_clients"),
        ({"margin": -0.1}, ValueError, "margin"),
        ({"principal": 1.5}, ValueError, "principal"),
        ({"principal": 0.1}, ValueError, "no direction"),
        ({"warm_up": -1}, ValueError, "warm_up"),
        ({"margin_reduction": "sum"}, ValueError, "margin_reduction"),
        ({"net": "torchvision:resnet5"}, ZooError, "torchvision:resnet5"),
        ({"net": "torchvision:resnet18"}, ValueError, "in_channels"),
        ({"pretrained": True}, ValueError, "pretrained"),
    ],
)
def test_bad_arguments_are_one_line(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        tiny(**given)
    assert "\n" not in str(caught.value)


def test_facts() -> None:
    facts = catalogue.facts("FedLD")
    assert facts["arxiv"] == "2408.12300" and facts["code_licence"] == "none"
