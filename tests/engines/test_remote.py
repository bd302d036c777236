"""Server and clients as separate modules that exchange messages only: the same weights as the simulation."""

import copy
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor

from zoo.core import Trainer, ZooError, catalogue
from zoo.core.recipe import build
from zoo.core.seeding import seed_from
from zoo.engines.federated import ClientStates, FederatedModule
from zoo.engines.federated.algorithms import ALGORITHMS
from zoo.engines.federated.remote import (
    Answer,
    Machines,
    at_client,
    build_for,
    merge_classes,
    own_test,
    relabel,
    round_seed,
    score,
    surroundings,
)
from zoo.engines.federated.state import holding
from zoo.testing.contract.case import quietly
from zoo.vision.federated.data_federated import FederatedClassificationDataModule

DATA = {"clients": 5, "seed": 3, "rounds": 3, "per_class": 14, "test_per_client": 8}
SMALL = {"variant": "tiny", "local_batch": 16, "lr": 0.05, "stack": 1}


def digits(cls: Any = FederatedClassificationDataModule, **changes: Any) -> Any:
    data = cls(**{**DATA, **changes})
    data.setup("fit")
    return data


def simulated(cls: Any, data: Any, given: dict[str, Any], rounds: int = 2, seed: int = 5) -> Any:
    """So many rounds by the Trainer, in one process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(cls, data, given)
    with quietly():
        Trainer(
            accelerator="cpu", max_epochs=-1, max_steps=-1, limit_train_batches=rounds, limit_val_batches=0,
            logger=False, enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
            callbacks=[_Stop()],
        ).fit(model, datamodule=data)  # fmt: skip
    return model


class _Stop(lightning.Callback):
    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        trainer.should_stop = True


class Sites:
    """Clients' machines without a network: a module of its own for each message, as in a process of its own."""

    def __init__(self, cls: Any, data: Any, given: dict[str, Any], seed: int = 5):
        self.make, self.data, self.seed = (lambda: build(cls, data, given)), data, seed
        self.server = build_for([], seed, self.make)
        self.kept: dict[int, dict[str, Tensor]] = {}
        self.broken: set[int] = set()

    def __call__(self, down: Any, orders: Any) -> dict[int, Answer | str]:
        found: dict[int, Answer | str] = {}
        around = copy.deepcopy(surroundings(self.server))
        for client, order in orders.items():
            if client in self.broken:
                continue
            model = build_for([client], self.seed, self.make)
            own = self.data.gather([client])
            answer, self.kept[client] = at_client(
                model, client, own, copy.deepcopy(down), self.kept.get(client, {}), order, around
            )
            found[client] = answer
        return found

    def machines(self, **changes: Any) -> Machines:
        hp = self.data.hparams
        known = {"seed": self.data.seed, "per_epoch": hp.rounds, "per_round": hp.per_round}
        return Machines(self.server, self, **{**known, "dropout": hp.dropout, "stragglers": hp.stragglers, **changes})


def equal(
    server: Any, kept: dict[int, dict[str, Tensor]], model: Any, within: float = 1e-6, least: float = 1e-3
) -> None:
    own, theirs = server.state_dict(), model.state_dict()
    for name, value in theirs.items():
        if name.startswith("states."):
            continue
        if value.is_floating_point() and not name.startswith("accuracy."):
            far = float((own[name] - value).abs().max() / value.abs().max().clamp(min=least)) if value.numel() else 0.0
            assert far <= within, f"{name}: {far}"
        else:
            assert torch.equal(own[name], value) or name.startswith("accuracy."), name
    for client, rows in kept.items():
        for name, row in model.states.read([client]).items():
            assert float((rows[name].float() - row.float()).abs().max()) <= 10 * within, (client, name)


# ---- equal to the simulation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALGORITHMS)
def test_two_rounds_equal_the_simulation(name: str) -> None:
    data = digits(per_round=3, stragglers=0.5)
    given = {**SMALL, "algorithm": name, "personal": ["head."] if name == "fedavg" else []}
    sites = Sites(FederatedModule, data, given)
    machines = sites.machines()
    logs = [machines.step() for _ in range(2)]
    model = simulated(FederatedModule, digits(per_round=3, stragglers=0.5), given)
    equal(sites.server, sites.kept, model)
    assert int(sites.server.round) == 2 and torch.equal(sites.server.sent, model.sent)
    assert all(found["answered"] == 3 and 0 < found.get("train/loss", 1.0) < 10 for found in logs)


FEDERATED = [name for name in catalogue.names() if catalogue.entry(name).toml.parent.name == "federated"]
WITHOUT_SERVER = {"DisPFL", "SCooL"}
"""Their clients read each other's states."""

ALIKE = {"FedFed": ({}, 1e-3)}
"""Its AdamW makes much of biases to which batch norm leaves no gradient but rounding."""


@pytest.mark.parametrize("name", FEDERATED)
def test_every_method_with_a_server_equals_its_simulation(name: str) -> None:
    cls, data_cls = catalogue.load_class(name), catalogue.load_datamodule(name)
    if not (issubclass(cls, FederatedModule) and issubclass(data_cls, FederatedClassificationDataModule)):
        pytest.skip("not of this engine")
    given = {"variant": "tiny"}
    changes, within = ALIKE.get(name, ({}, 1e-5))

    def rounds() -> Sites:
        sites = Sites(cls, digits(data_cls, **changes), given)
        machines = sites.machines()
        assert all(machines.step()["answered"] == 5 for _ in range(2))
        return sites

    if name in WITHOUT_SERVER:
        with pytest.raises(ZooError, match=r"of (its|their) own"):
            rounds()
        return
    sites = rounds()
    model = simulated(cls, digits(data_cls, **changes), given)
    model.sent.copy_(sites.server.sent)  # a method may count what it packs for several clients in one
    equal(sites.server, sites.kept, model, within, 1.0)


GEOMETRIES: list[dict[str, Any]] = [
    {"per_prototype": 4, "fill_absent": True, "domains": 3}, {"geometry": "isotropic", "rank": 3},
    {"geometry": "repeat", "per_prototype": 2}, {"rank": 5, "enlarge": 2, "guide": 0.5}, {"geometry": "off"},
]  # fmt: skip


@pytest.mark.parametrize("given", GEOMETRIES)
def test_statistics_before_the_first_round_equal_the_simulation(given: dict[str, Any]) -> None:
    """Clients come one after the other, so that shapes change and are sent again."""
    given, cls = {"variant": "tiny", **given}, catalogue.load_class("GGEUR")
    sites = Sites(cls, digits(per_round=2, partition="dirichlet", alpha=0.3), given)
    machines = sites.machines()
    assert all(machines.step()["answered"] == 2 for _ in range(3))
    model = simulated(cls, digits(per_round=2, partition="dirichlet", alpha=0.3), given, rounds=3)
    equal(sites.server, {}, model, 1e-5, 1.0)
    assert torch.equal(sites.server.sent, model.sent)


class Telltale(Sites):
    """Writes down what goes to whom."""

    def __call__(self, down: Any, orders: Any) -> dict[int, Answer | str]:
        self.told = [*getattr(self, "told", []), *((client, order) for client, order in orders.items())]
        return super().__call__(down, orders)


def test_shapes_go_to_who_lacks_them_and_statistics_stay_on_the_server() -> None:
    cls = catalogue.load_class("GGEUR")
    sites = Telltale(cls, digits(), {"variant": "tiny"})
    machines = sites.machines()
    machines.step()
    machines.step()
    assert not surroundings(sites.server)
    for client in range(5):
        orders = [order for who, order in sites.told if who == client]
        assert [order.part for order in orders] == ["counts", "moments", "", ""]
        own = set(sites.data.gather([client])["label"].tolist())
        assert set(orders[2].aside["classes"].tolist()) == own and not orders[0].aside and not orders[3].aside
        assert set(sites.kept[client]) == {"received.classes", "received.shape"}
    # a client that has forgotten them costs its answer once
    sites.kept[3].clear()

    def send(down: Any, orders: Any) -> Any:
        broken = [client for client in orders if not (sites.kept[client] or orders[client].aside)]
        for client in broken:
            with pytest.raises(ZooError, match="no shapes of classes: it was started again"):
                sites(down, {client: orders[client]})
        rest = {client: order for client, order in orders.items() if client not in broken}
        return {**dict.fromkeys(broken, "error 2"), **sites(down, rest)}

    machines.send = send
    assert machines.step()["answered"] == 4 and set(machines.silent) == {3}
    assert machines.step()["answered"] == 5


@pytest.mark.parametrize("part", ["counts", "moments"])
def test_who_falls_silent_before_the_round_is_not_pooled(part: str) -> None:
    cls = catalogue.load_class("GGEUR")
    sites = Sites(cls, digits(), {"variant": "tiny", "guide": 1.0})

    def send(down: Any, orders: Any) -> Any:
        found = dict(sites(down, orders))
        if next(iter(orders.values())).part == part and 0 in found:
            found[0].up[next(iter(found[0].up))] = torch.zeros(1, 1)  # type: ignore[union-attr]
        return found

    machines = sites.machines()
    machines.send = send
    assert machines.step()["answered"] == 4
    known = sites.server.statistics
    assert "does not fit" in machines.silent[0] and known.reported.tolist() == [False, True, True, True, True]
    others = torch.bincount(sites.data.gather([1, 2, 3, 4])["label"], minlength=10)
    assert known.total.tolist() == others.tolist()
    machines.send = sites
    assert machines.step()["answered"] == 5 and known.reported.all()
    machines = Sites(cls, digits(), {"variant": "tiny"}).machines(min_clients=5)
    with pytest.raises(ZooError, match="4 of 5 clients answered, min_clients is 5"):
        machines.send = send
        machines.step()


def test_seeds_of_rounds_are_those_of_the_loader() -> None:
    data = digits()
    for epoch in range(2):
        for place, batch in enumerate(data.train_dataloader()):
            seed = round_seed(data.seed, 3, 3 * epoch + place)
            assert batch["seed"] == [seed_from(seed, client) for client in batch["client"]]


# ---- faults ---------------------------------------------------------------------------------------------------------


def test_a_silent_client_is_left_out_as_if_it_had_dropped_out(caplog: pytest.LogCaptureFixture) -> None:
    sites = Sites(FederatedModule, digits(), SMALL)
    sites.broken = {2}
    found = sites.machines().step()
    assert found["answered"] == 4 and "client 2: no answer" in caplog.text
    data, model = digits(), Sites(FederatedModule, digits(), SMALL)
    batch = next(iter(data.train_dataloader()))
    batch["work"] = [float(client != 2) for client in batch["client"]]
    whole = build_for(range(5), 5, model.make)
    whole.log = lambda *_, **__: None
    whole.training_step(batch, 0)
    for name, value in whole.model.state_dict().items():
        assert torch.allclose(sites.server.model.state_dict()[name], value, atol=1e-6), name


def test_too_few_answers_end_the_run_and_leave_the_weights() -> None:
    sites = Sites(FederatedModule, digits(), SMALL)
    before = copy.deepcopy(sites.server.state_dict())
    sites.broken = {0, 1, 3}
    with pytest.raises(ZooError, match=r"Round 1: 2 of 5 clients answered, min_clients is 3\. client 0: no answer"):
        sites.machines(min_clients=3).step()
    assert all(torch.equal(value, before[name]) for name, value in sites.server.state_dict().items())
    with pytest.raises(ZooError, match="between 1 and 5"):
        sites.machines(min_clients=6)


def test_broken_answers_are_left_out() -> None:
    sites = Sites(FederatedModule, digits(), SMALL)

    def send(down: Any, orders: Any) -> Any:
        found = dict(sites(down, orders))
        found[0].up["model.head.bias"][0, 0] = float("nan")  # type: ignore[union-attr]
        found[1].up["model.head.bias"] = torch.zeros(1, 3)  # type: ignore[union-attr]
        found[2].up.pop("model.head.bias")  # type: ignore[union-attr]
        found[3] = "error 2: CUDA out of memory"
        return found

    machines = sites.machines()
    machines.send = send
    assert machines.step()["answered"] == 1
    assert set(machines.silent) == {0, 1, 2, 3}
    expected = ("NaN or infinite", "is (1, 3), expected (1, 10)", "is None, expected (1, 10)", "CUDA out of memory")
    for client, words in enumerate(expected):
        assert words in machines.silent[client]


# ---- pieces ---------------------------------------------------------------------------------------------------------


def test_a_machine_holds_the_rows_of_its_client_only() -> None:
    with holding([2]):
        model = FederatedModule.from_variant("tiny", num_clients=1000, personal=["head."], in_channels=1, image_size=8)
    rows = model.states.state_dict()
    assert all(len(value) == 1 for value in rows.values())
    value = {name: row + 1 for name, row in model.states.read([2]).items()}
    model.states.write([2], value)
    assert all(torch.equal(model.states.read([2])[name], row) for name, row in value.items())
    with pytest.raises(ZooError, match="client 7 is on a machine of its own"):
        model.states.read([7])
    first = {name: row - 1 for name, row in value.items()}
    model.states.complete()
    for name, row in model.states.read([2, 7]).items():
        assert torch.equal(row[:1], value[name]) and torch.allclose(row[1:], first[name], atol=1e-5)
    assert ClientStates(3).held is None


def test_classes_of_sites_that_lack_some() -> None:
    assert merge_classes([["b", "a"], ["b", "a"]]) == ["b", "a"]  # their own order
    common = merge_classes([["10", "2"], ["2", "3"], ["x"]])
    assert common == ["2", "3", "10", "x"]
    assert relabel(torch.tensor([0, 1, -1]), ["10", "2"], common).tolist() == [2, 0, -1]
    with pytest.raises(ZooError, match="'y' is not among"):
        relabel(torch.tensor([0]), ["y"], common)


def test_scores_are_those_of_the_simulation() -> None:
    data = digits()
    model = build_for([1], 0, lambda: build(FederatedModule, data, {**SMALL, "personal": ["head."]}))
    batch = own_test(data.test_dataloader(), 1)
    assert batch is not None and own_test(data.test_dataloader(), 9) is None
    found = score(model, 1, batch)
    right = model(batch["image"]).argmax(-1) == batch["label"]
    assert found["accuracy"] == pytest.approx(float(right.float().mean())) and found["samples"] == len(right)
    head = {name: torch.full_like(row, -1e3) for name, row in model.states.read([1]).items()}
    model.states.write([1], {**head, "personal.head.bias": 1e6 * (torch.arange(10) == 4)[None].float()})
    assert score(model, 1, batch)["personal_accuracy"] == pytest.approx(float((batch["label"] == 4).float().mean()))


def test_lean_states_take_a_row_until_one_is_written(tmp_path: Path) -> None:
    first, row = torch.arange(6.0).view(2, 3), 10 + torch.arange(6.0).view(1, 2, 3)
    lean, full = (ClientStates(400_000, lean=word) for word in (True, False))
    for one in (lean, full):
        one.add("weight", first[:, :1])
        one.add("mask", torch.tensor(True))
    assert lean.weight.untyped_storage().nbytes() == 8  # type: ignore[union-attr]
    assert torch.equal(lean.read([7, 9])["weight"], full.read([7, 9])["weight"])
    lean.to_disk(tmp_path)
    for one in (lean, full):
        one.write([399_999, 3], {"weight": row[:, :, :1].repeat(2, 1, 1), "mask": torch.tensor([False, False])})
    for name, value in full.read(range(400_000)).items():
        assert torch.equal(lean.read(range(400_000))[name], value)
    for load in (False, True):
        other = ClientStates(3, lean=True)
        other.add("weight", first)
        if load:
            other.load_state_dict({"weight": torch.cat([row, row + 1, row + 2])})
        else:
            other.write([1], {"weight": row + 1})
        assert torch.equal(other.read([1])["weight"], row + 1)
        assert torch.equal(other.read([0])["weight"], row if load else first[None])
