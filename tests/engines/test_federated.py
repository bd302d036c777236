"""The federated engine against slow, plain loops, and what must hold whatever the method."""

import copy
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.core import Trainer, ZooError
from zoo.core.recipe import build
from zoo.engines.federated import (
    Clients,
    ClientStates,
    FederatedModule,
    average,
    clip,
    local_batches,
    masked_mean,
    mix,
    nbytes,
    sample_clients,
)
from zoo.engines.federated.algorithms import ALGORITHMS
from zoo.engines.federated.module import ClientAccuracy
from zoo.testing.contract.case import attach, quietly
from zoo.vision.federated.data_federated import FederatedClassificationDataModule

SIZES = {"num_classes": 3, "in_channels": 2, "image_size": 4, "num_clients": 4}
SMALL = {**SIZES, "net": {"name": "cnn", "widths": [3], "features": 5}, "norm": "none", "local_batch": 4, "lr": 0.05}


def module(seed: int = 0, **changes: Any) -> FederatedModule:
    torch.manual_seed(seed)
    return attach(FederatedModule(**{**SMALL, **changes}))


def a_round(seed: int = 0, work: Sequence[float] = (1.0, 1.0, 1.0), clients: Sequence[int] = (0, 2, 3)) -> Any:
    sizes = [5, 11, 8][: len(clients)]
    draws = torch.Generator().manual_seed(seed)
    return {
        "image": torch.rand(sum(sizes), 2, 4, 4, generator=draws),
        "label": torch.randint(3, (sum(sizes),), generator=draws),
        "client": list(clients),
        "size": sizes,
        "work": list(work),
        "seed": [seed + 10 * c for c in clients],
    }


def far(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    found = [
        (ours[k] - v).abs().max() / v.abs().max().clamp(min=1e-3) for k, v in theirs.items() if v.is_floating_point()
    ]
    return max(map(float, found))


# ---- one round, by plain loops --------------------------------------------------------------------------------------


class Twin:
    """FedAvg and its relatives as one would write them first: one client after the other, torch's own optimiser."""

    def __init__(self, model: FederatedModule):
        self.hp, self.net = model._hp, copy.deepcopy(model.model)
        zero = {n: torch.zeros_like(p) for n, p in self.net.named_parameters()}
        self.control = {c: copy.deepcopy(zero) for c in (*range(4), "server")}
        self.own = {c: copy.deepcopy(self.net) for c in range(4)}

    def local(self, net: nn.Module, rows: slice, batch: dict[str, Any], k: int, client: int, kind: str) -> int:
        hp = self.hp
        first = {n: p.detach().clone() for n, p in self.net.named_parameters()}
        optimizer = torch.optim.SGD(net.parameters(), hp["lr"], hp["momentum"], weight_decay=hp["weight_decay"])
        index, mask, counts = local_batches(batch["size"], batch["seed"], hp["local_batch"], work=batch["work"])
        x, y = batch["image"][rows], batch["label"][rows]
        for step in range(counts[k]):
            chosen = index[k, step][mask[k, step]]
            optimizer.zero_grad()
            F.cross_entropy(net(x[chosen]), y[chosen]).backward()
            for n, p in net.named_parameters():
                if kind == "scaffold":
                    p.grad += self.control["server"][n] - self.control[client][n]
                if kind in ("fedprox", "pull"):
                    p.grad += hp["mu"] * (p.detach() - first[n])
            optimizer.step()
        return counts[k]

    def step(self, batch: dict[str, Any]) -> None:
        hp, kind = self.hp, self.hp["algorithm"]
        first = copy.deepcopy(self.net.state_dict())
        nets, sizes, steps, start = [], [], [], 0
        changes = []
        for k, (client, size) in enumerate(zip(batch["client"], batch["size"], strict=True)):
            rows = slice(start, start + size)
            start += size
            if batch["work"][k] == 0:
                continue
            if kind in ("ditto", "local"):
                self.local(self.own[client], rows, batch, k, client, "pull" if kind == "ditto" else "")
            net = copy.deepcopy(self.net)
            t = self.local(net, rows, batch, k, client, kind)
            nets.append(net.state_dict())
            sizes.append(size)
            steps.append(t)
            if kind == "scaffold":
                own, server = self.control[client], self.control["server"]
                new = {n: own[n] - server[n] + (first[n] - net.state_dict()[n]) / (t * hp["lr"]) for n in own}
                changes.append({n: new[n] - own[n] for n in own})
                self.control[client] = new
        share = [s / sum(sizes) for s in sizes]
        if kind == "local":
            return
        if kind == "fednova":
            rho = hp["momentum"]
            lengths = []
            for t in steps:  # the sum of the weights that momentum gives each gradient
                velocity = length = 0.0
                for _ in range(t):
                    velocity = rho * velocity + 1
                    length += velocity
                lengths.append(length)
            effective = sum(p * a for p, a in zip(share, lengths, strict=True))
            new = {
                n: first[n]
                - effective * sum(p * (first[n] - s[n]) / a for p, a, s in zip(share, lengths, nets, strict=True))
                for n in first
            }
        else:
            new = {n: sum(p * s[n] for p, s in zip(share, nets, strict=True)) for n in first}
            new = {n: first[n] + hp["server_lr"] * (v - first[n]) for n, v in new.items()}
        self.net.load_state_dict(new)
        for n in self.control["server"] if kind == "scaffold" else ():
            self.control["server"][n] += sum(c[n] for c in changes) / hp["num_clients"]


@pytest.mark.parametrize("stack", [None, 1, 2])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_rounds_equal_plain_loops(name: str, stack: int | None) -> None:
    model = module(algorithm=name, stack=stack, server_lr=0.7 if name == "fedavg" else 1.0, mu=0.3)
    twin = Twin(model)
    for number, work in enumerate([(1.0, 1.0, 1.0), (1.0, 0.4, 0.0), (0.5, 1.0, 1.0)]):
        batch = a_round(number, work, ((0, 2, 3), (1, 2, 3), (0, 1, 2))[number])
        model.training_step(batch, number)
        twin.step(batch)
    assert far(model.model.state_dict(), twin.net.state_dict()) < 1e-5
    if name in ("ditto", "local"):
        for client in range(4):
            assert far(model.personal_weights(client), twin.own[client].state_dict()) < 1e-5
    if name == "scaffold":
        for client in range(4):
            kept = {n: v[0] for n, v in model.states.read([client], "control.").items()}
            assert far(kept, twin.control[client]) < 1e-5


def test_padding_is_cut_off_where_all_clients_have_it() -> None:
    """Small last batches are as small as they are, and views draw for whole ones: alone or together, the same."""
    found = {}
    for stack in (1, 3):
        model = module(stack=stack, augment=["crop:1", "flip", "noise:0.1"])
        seen: list[tuple[int, ...]] = []
        inner = model.loss
        model.loss = (
            lambda net, batch, inner=inner, seen=seen: (  # type: ignore[method-assign]
                seen.append(tuple(batch["image"].shape[:1])) or inner(net, batch)
            )
        )
        model.training_step(a_round(), 0)
        found[stack] = model.model.state_dict()
        # clients of 5, 11 and 8 samples in batches of 4, most steps first
        assert seen == {1: [(4,), (4,), (3,), (4,), (1,), (4,), (4,)], 3: [(4,), (4,), (3,)]}[stack]
    assert far(found[1], found[3]) < 1e-5
    for name in ("image", "label", "mask", "row"):
        assert name in model.padded


@pytest.mark.parametrize("batch_norm", ["aggregate", "personal"])
def test_batch_norm_per_client(batch_norm: str) -> None:
    """Statistics move within each client, with whole batches only, and are averaged or stay."""
    models = [module(norm="batch", stack=stack, batch_norm=batch_norm) for stack in (None, 1)]
    for model in models:
        model.training_step(a_round(), 0)
    assert far(models[0].state_dict(), models[1].state_dict()) < 1e-5
    name = "layer1.1.running_mean"
    moved = not torch.equal(models[0].model.state_dict()[name], torch.zeros(3))
    assert moved == (batch_norm == "aggregate")
    own = models[0].personal_weights(0)
    assert (name in own) == (batch_norm == "personal")
    if own:
        assert own["layer1.1.num_batches_tracked"] == 1  # 5 samples: one whole batch of 4
        assert own[name].abs().sum() > 0 and models[0].personal_weights(1)[name].abs().sum() == 0


def test_personal_parameters_stay() -> None:
    model = module(personal=["head."])
    before = copy.deepcopy(model.model.state_dict())
    model.training_step(a_round(), 0)
    after = model.model.state_dict()
    assert torch.equal(before["head.weight"], after["head.weight"])
    assert not torch.equal(before["hidden.0.weight"], after["hidden.0.weight"])
    assert not torch.equal(model.personal_weights(0)["head.weight"], before["head.weight"])
    assert torch.equal(model.personal_weights(1)["head.weight"], before["head.weight"]), "client 1 took no part"
    x = torch.rand(2, 2, 4, 4)
    assert not torch.allclose(model(x, client=0), model(x, client=2)) and torch.equal(model(x, client=1), model(x))
    head = 4 * (5 * 3 + 3)
    assert model.sent.tolist() == [3 * (nbytes(before) - head)] * 2


def test_bytes_count_who_was_asked_and_who_answered() -> None:
    model = module(algorithm="scaffold")
    model.training_step(a_round(work=(1.0, 0.0, 1.0)), 0)
    size = nbytes(model.model.state_dict())
    assert model.sent.tolist() == [2 * 2 * size, 3 * 2 * size]
    silent = module(algorithm="local")
    silent.training_step(a_round(), 0)
    assert silent.sent.tolist() == [0, 0]


def test_clipping_is_per_client() -> None:
    grads = {"a": torch.tensor([[3.0], [0.3]]), "b": torch.tensor([[4.0, 0.0], [0.0, 0.4]])}
    clients = Clients(nn.Identity(), {"x": torch.zeros(2, 1)}, lambda p: torch.optim.SGD([torch.zeros(1)], 0.1))
    found = clip(1.0)(clients, grads)
    assert torch.allclose(found["a"], torch.tensor([[0.6], [0.3]]), atol=1e-5)
    assert torch.allclose(found["b"], torch.tensor([[0.8, 0.0], [0.0, 0.4]]), atol=1e-5)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_narrowing_keeps_optimiser_state(make: Any) -> None:
    """Clients with fewer steps drop out; the others go on as if alone."""
    net = nn.Linear(3, 2)
    start = {n: torch.randn(3, *p.shape) for n, p in net.named_parameters()}
    x = torch.randn(3, 5, 6, 3)
    more = {"momentum": 0.9} if make is torch.optim.SGD else {}

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["x"]).square().mean()

    clients = Clients(net, {n: v.clone() for n, v in start.items()}, lambda p: make(p, lr=0.1, **more))
    for step in range(5):
        if step in (2, 4):
            clients.narrow(clients.count - 1)
        clients.step(loss, {"x": x[: clients.count, step]})
    for client, steps in enumerate((5, 4, 2)):
        alone = nn.Linear(3, 2)
        alone.load_state_dict({n: v[client] for n, v in start.items()})
        optimizer = make(alone.parameters(), lr=0.1, **more)
        for step in range(steps):
            optimizer.zero_grad()
            alone(x[client, step]).square().mean().backward()
            optimizer.step()
        assert far({n: v[client] for n, v in clients.state.items()}, alone.state_dict()) < 1e-5


@pytest.mark.parametrize("stacked", [False, True])
def test_clients_leave_the_network_as_it_was(stacked: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    net[2].bias.requires_grad_(False)
    own, before = {id(v) for v in (*net.parameters(), *net.buffers())}, copy.deepcopy(net.state_dict())
    state = {n: (v + 0.1 if v.is_floating_point() else v)[None].clone() for n, v in before.items()}
    local = copy.deepcopy(net)
    local.load_state_dict({name: value[0] for name, value in state.items()})
    batch, optimizers = {"x": torch.rand(1, 5, 3)}, []

    def make(leaves: list[Tensor]) -> torch.optim.Optimizer:
        optimizers.append(torch.optim.SGD(leaves, lr=0.1))
        return optimizers[-1]

    def failing(network: nn.Module, rows: dict[str, Tensor]) -> Tensor:
        raise RuntimeError("in the middle")

    clients = Clients(net, state, make, stacked)
    with pytest.raises(RuntimeError, match="in the middle"):
        clients.call(failing, batch)
    clients.step(lambda network, rows: network(rows["x"]).square().mean(), batch)
    local(batch["x"][0]).square().mean().backward()
    torch.optim.SGD([p for p in local.parameters() if p.requires_grad], lr=0.1).step()

    assert {id(v) for v in (*net.parameters(), *net.buffers())} == own
    assert all(torch.equal(v, before[n]) for n, v in net.state_dict().items())
    assert far({name: value[0] for name, value in state.items()}, local.state_dict()) < 1e-6
    assert int(state["1.num_batches_tracked"]) == 1
    assert all(p.grad is None for o in optimizers for g in o.param_groups for p in g["params"])


@pytest.mark.parametrize("stacked", [False, True])
def test_tied_weights_are_refused(stacked: bool) -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    state = {name: value[None].clone() for name, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=r"1\.weight of the network is another"):
        Clients(net, state, lambda leaves: torch.optim.SGD(leaves, lr=0.1), stacked)


@pytest.mark.parametrize("pool", [False, True])
def test_a_lone_clients_pictures_lie_channels_last_where_the_network_pools(pool: bool) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2) if pool else nn.Identity(), nn.Flatten(), nn.LazyLinear(2))
    net(torch.rand(1, 3, 8, 8))
    seen = {}

    def look(network: nn.Module, rows: dict[str, Tensor]) -> Tensor:
        seen.update({name: value.stride() for name, value in rows.items()})
        return network(rows["image"]).sum()

    state = {name: value[None].clone() for name, value in net.state_dict().items()}
    batch = {"image": torch.rand(1, 5, 3, 8, 8), "feature": torch.rand(1, 5, 7), "label": torch.ones(1, 5).long()}
    clients = Clients(net, state, lambda leaves: torch.optim.SGD(leaves, lr=0.1), stacked=False)
    found = clients.call(look, batch)
    assert seen["image"] == ((192, 1, 24, 3) if pool else (192, 64, 8, 1))
    assert seen["feature"] == (7, 1) and seen["label"] == (1,)
    assert float(found[0].detach()) == pytest.approx(float(net(batch["image"][0]).sum().detach()), rel=1e-5)


def test_only_some_parameters_learn() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    state = {n: p.detach()[None].repeat(2, *[1] * p.ndim) for n, p in net.named_parameters()}
    clients = Clients(net, state, lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.5))
    clients.step(lambda m, b: {"loss": m(b["x"]).mean()}, {"x": torch.randn(2, 4, 2)}, only="1.")
    assert torch.equal(clients.state["0.weight"][0], net[0].weight)
    assert not torch.equal(clients.state["1.weight"][0], net[1].weight)
    with pytest.raises(ValueError, match="2 clients cannot train unstacked"):
        Clients(net, state, lambda p: torch.optim.SGD(p, lr=0.1), stacked=False)


# ---- who and when ---------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    batch=st.integers(1, 9),
    epochs=st.integers(1, 3),
    drop=st.booleans(),
    steps=st.none() | st.integers(1, 12),
)
def test_local_batches_see_everything(sizes: list[int], batch: int, epochs: int, drop: bool, steps: int | None) -> None:
    index, mask, counts = local_batches(sizes, list(range(len(sizes))), batch, epochs, steps, drop_last=drop)
    assert index.shape == mask.shape == (len(sizes), max(counts), batch)
    for k, size in enumerate(sizes):
        per_epoch = max(size // batch, 1) if drop else -(-size // batch)
        assert counts[k] == (steps if steps is not None else epochs * per_epoch)
        assert not mask[k, counts[k] :].any() and int(index[k].max()) < size
        if drop:
            assert mask[k, : counts[k]].all()
        for first in range(0, counts[k] - per_epoch + 1, per_epoch):
            seen = index[k, first : first + per_epoch][mask[k, first : first + per_epoch]]
            if not drop:
                assert seen.sort().values.tolist() == list(range(size)), "each sample once an epoch"
            elif size >= batch:
                assert len(seen.unique()) == len(seen)
            else:
                assert len(seen.unique()) == size, "a small client fills its only batch by repeating"
    again = local_batches(sizes[:1], [0], batch, epochs, steps, drop_last=drop)
    assert torch.equal(again[0][0, : counts[0]], index[0, : counts[0]]), "alone as among others"


def test_work_shares() -> None:
    *_, counts = local_batches([10, 10, 10], [0, 1, 2], 2, work=[1.0, 0.0, 0.01])
    assert counts == [5, 0, 1]
    with pytest.raises(ValueError, match="Client number 1 of this round has no samples"):
        local_batches([3, 0], [0, 1], 2)


def test_sampling_is_seeded_and_uniform() -> None:
    assert sample_clients(20, 5, 7, 0.3, 0.3) == sample_clients(20, 5, 7, 0.3, 0.3)
    hits, answered, whole = torch.zeros(10), 0, 0
    for seed in range(600):
        chosen, work = sample_clients(10, 4, seed, 0.25, 0.5)
        assert len(set(chosen)) == 4 == len(work) and any(w > 0 for w in work)
        hits[chosen] += 1
        answered += sum(w > 0 for w in work)
        whole += sum(w == 1 for w in work)
    assert hits.min() > 190 and hits.max() < 290  # 240 each
    assert 0.72 < answered / 2400 < 0.79 and 0.34 < whole / 2400 < 0.42
    for bad in ({"per_round": 0}, {"per_round": 11}, {"dropout": 1.0}, {"stragglers": -0.1}):
        with pytest.raises(ValueError):
            sample_clients(**{"clients": 10, "per_round": 3, "seed": 0, **bad})


def test_averages() -> None:
    stacked = {"w": torch.tensor([[1.0, 2.0], [3.0, 6.0]]), "n": torch.tensor([1, 4])}
    mean = average(stacked, torch.tensor([1.0, 3.0]))
    assert mean["w"].tolist() == [2.5, 5.0] and mean["n"] == 3 and mean["n"].dtype == torch.int64
    swapped = mix(stacked, torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]]))
    assert swapped["w"].tolist() == [[3.0, 6.0], [1.0, 2.0], [2.0, 4.0]]
    with pytest.raises(ValueError, match="all weights are 0"):
        average(stacked, torch.zeros(2))
    assert masked_mean(torch.tensor([1.0, 5.0]), torch.tensor([True, False])) == 1
    assert masked_mean(torch.tensor([1.0, 5.0]), torch.zeros(2, dtype=torch.bool)) == 0


def test_accuracy_by_client() -> None:
    metric = ClientAccuracy(3)
    assert metric.compute() == {}
    metric.update(-1, torch.tensor([True, False]), 2)
    metric.update(0, torch.tensor([True, True]), 2)
    metric.update(2, torch.tensor([False, True, False, False]), 4)
    found = {k: float(v) for k, v in metric.compute().items()}
    assert found == {"accuracy": 0.5, "personal_accuracy": 0.625, "worst_accuracy": 0.25, "spread": 0.375}


# ---- what lives on with clients -------------------------------------------------------------------------------------


def test_states_in_memory_and_on_disk(tmp_path: Path) -> None:
    states = [ClientStates(5), ClientStates(5)]
    for one in states:
        one.add("a.b", torch.tensor([1.0, 2.0]))
        one.add("mask", torch.tensor(True))
    states[1].to_disk(tmp_path)
    for one in states:
        one.write([3, 1], {"b": torch.tensor([[5.0, 6.0], [7.0, 8.0]])}, prefix="a.")
        assert one.read([1, 3, 0], "a.")["b"].tolist() == [[7.0, 8.0], [5.0, 6.0], [1.0, 2.0]]
        assert one.read([0])["mask"].tolist() == [True] and "a.b" in one and one.names == ["a.b", "mask"]
    assert list(states[0].state_dict()) == ["a__b", "mask"] and not states[1].state_dict()
    states[1].snapshot("round-1")
    states[1].write([0], {"a.b": torch.zeros(1, 2)})
    states[1].restore("round-1")
    assert states[1].read([0], "a.")["b"].tolist() == [[1.0, 2.0]]
    with pytest.raises(ZooError, match=r"not in .*round-9"):
        states[1].restore("round-9")
    for number in range(5):
        states[1].snapshot(f"round-{number + 2}")
    assert len(list((tmp_path / "saved").iterdir())) == 3


class Stop(Exception):
    pass


@pytest.mark.parametrize("on_disk", [False, True])
def test_resumes_in_the_middle_bit_for_bit(tmp_path: Path, on_disk: bool) -> None:
    given: dict[str, Any] = {
        "variant": "tiny",
        "algorithm": "scaffold",
        "personal": ["head."],
        "state_on_disk": on_disk,
    }
    given |= {"augment": ["crop:1", "noise:0.1"], "local_batch": 64}

    def parts(folder: Path, epochs: int) -> tuple[Any, Any, Trainer]:
        data = FederatedClassificationDataModule(rounds=3, per_round=4, clients=8, stragglers=0.5, dropout=0.2)
        data.setup()
        torch.manual_seed(0)
        options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        return data, build(FederatedModule, data, given), Trainer(default_root_dir=folder, max_epochs=epochs, **options)

    with quietly():
        data, whole, trainer = parts(tmp_path / "whole", 2)
        trainer.fit(whole, datamodule=data)
        data, broken, trainer = parts(tmp_path / "broken", 2)
        broken.on_train_batch_end = lambda *_: trainer.save_checkpoint(tmp_path / "4.ckpt") or _stop(trainer)
        with pytest.raises(Stop):
            trainer.fit(broken, datamodule=data)
        data, again, trainer = parts(tmp_path / "broken", 2)
        trainer.fit(again, datamodule=data, ckpt_path=tmp_path / "4.ckpt")
    assert int(again.round) == int(whole.round) == 6
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    ids = list(range(8))
    for name, value in whole.states.read(ids).items():
        assert torch.equal(value, again.states.read(ids)[name]), name


def _stop(trainer: Trainer) -> None:
    if trainer.fit_loop.epoch_loop.total_batch_idx == 3:
        raise Stop


WORKER = """
import sys, torch, warnings
warnings.simplefilter("ignore")
from zoo.core import Trainer
from zoo.core.recipe import build
from zoo.engines.federated import FederatedModule
from zoo.vision.federated.data_federated import FederatedClassificationDataModule
devices, out = int(sys.argv[1]), sys.argv[2]
data = FederatedClassificationDataModule(rounds=3, per_round=5, dropout=0.2)
data.setup()
torch.manual_seed(0)
model = build(FederatedModule, data, {"variant": "tiny", "algorithm": "scaffold", "personal": ["head."]})
run = Trainer(default_root_dir=f"{out}/{devices}", accelerator="cpu", devices=devices, max_epochs=1, logger=False,
              strategy="ddp" if devices > 1 else "auto", enable_progress_bar=False, enable_model_summary=False)
run.fit(model, datamodule=data)
content = {"state": model.state_dict(), "metrics": dict(run.callback_metrics)}
torch.save(content, f"{out}/{devices}-{run.global_rank}.pt")
"""


@pytest.mark.slow
def test_processes_share_a_round(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    for devices in (1, 2):
        subprocess.run(
            [sys.executable, str(script), str(devices), str(tmp_path)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, check=True, capture_output=True, timeout=240,
        )  # fmt: skip
    one, two, other = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in ("1-0", "2-0", "2-1"))
    assert far(two["state"], one["state"]) < 1e-5
    assert all(torch.equal(v, other["state"][k]) for k, v in two["state"].items())
    for name, value in one["metrics"].items():
        assert float(two["metrics"][name]) == pytest.approx(float(value), rel=1e-4), name


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"algorithm": "fedprx"}, "No algorithm 'fedprx'. Did you mean 'fedprox'"),
        ({"net": "resnet17"}, "No net 'resnet17'"),
        ({"net": {"name": "cnn", "width": [3], "depth": 2}}, "no argument 'depth'"),
        ({"net": {"name": "cnn", "widths": [3, 3, 3, 3]}}, "nothing of pictures of 4 pixels"),
        ({"norm": "layer"}, "No normalisation 'layer'"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"num_clients": 0}, "num_clients is 0"),
        ({"mean": [0.5]}, "mean="),
        ({"augment": ["crp"]}, "No view 'crp'"),
        ({"batch_norm": "local"}, "batch_norm is 'local'"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], error: str) -> None:
    with pytest.raises((ValueError, ZooError)) as caught:
        FederatedModule(**{**SMALL, **changes})
    assert error in str(caught.value) and "\n" not in str(caught.value)


def test_wrong_pictures() -> None:
    model = module()
    with pytest.raises(ValueError, match=r"expected \(batch >= 1, 2, 4, 4\)"):
        model(torch.rand(1, 3, 4, 4))
    with pytest.raises(ValueError, match="client is 4; there are 4"):
        model(torch.rand(1, 2, 4, 4), client=4)
    with pytest.raises(ValueError, match="'image' holds 1 values that are NaN"):
        model.predict(torch.full((1, 2, 4, 4), 0.5).index_put((torch.tensor(0),) * 4, torch.tensor(torch.nan)))
