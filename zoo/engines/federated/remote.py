"""A server and clients on machines of their own: what each does in a round, whatever carries their messages.

The server runs the same `training_step` as the simulation, and only asks other machines where that would let clients
work (`Machines`). A client's machine builds the same module with the rows of that client alone, and lets it work on its
own samples (`at_client`). Who takes part and every random draw follow from the same seeds, so that rounds on machines
give the weights that simulated rounds give.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from zoo.core import ZooError
from zoo.core.datamodule import epoch_order
from zoo.core.seeding import seed_from
from zoo.engines.federated.aggregation import Message, full_precision, nbytes
from zoo.engines.federated.module import FederatedModule, Shapes
from zoo.engines.federated.schedule import sample_clients
from zoo.engines.federated.state import holding

log = logging.getLogger(__name__)


@dataclass
class Order:
    """What the server tells a client beside the message that goes down.

    Args:
        number: rounds done before. seed: of this client in this round. work: share of its steps to do, in (0, 1].
        part: a question of the method's `FederatedModule.exchange`, before the round's work; "" is the work.
        aside: what goes to this client alone.
    """

    number: int
    seed: int
    work: float = 1.0
    part: str = ""
    aside: Message = field(default_factory=dict)


@dataclass
class Answer:
    """What comes back from a client: ``up``, its number of samples, and means to log.

    ``up`` is each (1, ...) after a round's work, and as `FederatedModule.answer` gives it in an exchange.
    """

    up: Message
    size: int
    logs: dict[str, float] = field(default_factory=dict)


Send = Callable[[Message, dict[int, Order]], Mapping[int, Answer | str]]
"""Takes what goes down and the clients' orders; gives answers, or why there is none; the silent may be left out."""


def round_seed(seed: int, per_epoch: int, number: int) -> int:
    """The seed of a round as the simulation has it, of a DataModule with this seed and rounds an epoch."""
    epoch, place = divmod(number, per_epoch)
    return seed_from(seed, epoch, int(epoch_order(per_epoch, seed, epoch)[place]))


def surroundings(module: FederatedModule) -> Message:
    """Buffers that are neither the net's nor the clients' nor counters: what a method holds for all, as a frame."""
    apart = ("model.", "states.", "server.", "accuracy.", *module.server_only)
    saved = module.state_dict()
    named = dict(module.named_buffers())
    return {n: v for n, v in named.items() if n in saved and not n.startswith(apart) and n not in ("round", "sent")}


def build_for(clients: Sequence[int], seed: int, build: Callable[[], Any]) -> FederatedModule:
    """The module as the machine of these clients (none: the server) has it; initial weights follow from ``seed``.

    Raises:
        ZooError: for a method that needs all clients' states in one place.
    """
    with holding(clients), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build()
    if not isinstance(module, FederatedModule):
        raise ZooError(f"{type(module).__name__} is no FederatedModule; only those run on many machines.")
    return module


# ---- a client's machine ---------------------------------------------------------------------------------------------


def at_client(
    module: FederatedModule,
    client: int,
    own: dict[str, Any],
    down: Message,
    kept: Message,
    order: Order,
    around: Message | None = None,
) -> tuple[Answer, Message]:
    """One client's part of a round; what goes up, and what stays here until the next.

    Args:
        module: of `build_for` with this client.
        own: all its samples as the DataModule's ``gather([client])`` gives them.
        kept: what the last round left here, each (1, ...); ``{}`` at first. around: the server's `surroundings`.
    """
    device = module.device
    down, own, aside = move_data_to_device((down, own, order.aside), device)
    enter(module, down, around or {}, order.number)
    recall(module, client, kept)
    batch = {**own, "client": [client], "work": [order.work], "seed": [order.seed]}
    size = sum(own["size"])
    if order.part:
        with torch.no_grad(), full_precision(module.round):
            return Answer(module.answer(order.part, batch, 0, aside), size), kept
    module.received.update(aside)
    up, stays, logs = module.local(batch, down, [0])
    module.states.write([client], stays)
    means = {name: float(value.float().mean()) for name, value in logs.items()}
    received = {f"received.{name}": value for name, value in module.received.items()}
    return Answer(up, size, means), module.states.read([client]) | received


def recall(module: FederatedModule, client: int, kept: Message) -> None:
    """Put back what a round left on a client's machine, as `at_client` gave it."""
    module.states.write([client], {n: v for n, v in kept.items() if not n.startswith("received.")})
    received = {n.removeprefix("received."): v for n, v in kept.items() if n.startswith("received.")}
    module.received = move_data_to_device(received, module.device)


@torch.no_grad()
def enter(module: FederatedModule, down: Message, around: Message, number: int) -> None:
    """Make a module what the server's is at the beginning of a round."""
    state = module.state_dict()
    for name, value in (*down.items(), *around.items()):
        if name in state and not name.startswith("states."):
            state[name].copy_(value)
    module.round.fill_(number)


def own_test(batches: Iterable[dict[str, Any]], client: int) -> dict[str, Any] | None:
    """The pictures that a client is tested on, out of the DataModule's sets to score; None where there are none."""
    for batch in batches:
        first = 0
        for who, size in zip(batch["client"], batch["size"], strict=True):
            if who == client:
                return {key: batch[key][first : first + size] for key in ("image", "label")}
            first += size
    return None


@torch.no_grad()
def score(module: FederatedModule, client: int, test: dict[str, Any]) -> dict[str, float]:
    """Accuracy of the global and of the client's own model on pictures of the client, and how many there are."""
    module.eval()
    image, label = move_data_to_device((test["image"], test["label"]), module.device)
    hits = {"accuracy": 0, "personal_accuracy": 0}
    for rows in torch.arange(len(label)).split(1024):
        for name, who in (("accuracy", -1), ("personal_accuracy", client)):
            hits[name] += int((module(image[rows], who).argmax(-1) == label[rows]).sum())
    return {name: hit / max(len(label), 1) for name, hit in hits.items()} | {"samples": float(len(label))}


# ---- the server -----------------------------------------------------------------------------------------------------


class Machines:
    """Rounds of a server whose clients are elsewhere.

    Args:
        module: of `build_for` without clients.
        send: carries messages to the clients and back.
        seed, per_epoch, per_round, dropout, stragglers: as the DataModule has them (``rounds`` is ``per_epoch``).
        min_clients: answers that a round needs.
    """

    def __init__(
        self,
        module: FederatedModule,
        send: Send,
        *,
        seed: int = 0,
        per_epoch: int = 10,
        per_round: int | None = None,
        dropout: float = 0.0,
        stragglers: float = 0.0,
        min_clients: int = 1,
    ):
        self.module, self.send, self.seed, self.per_epoch = module, send, seed, per_epoch
        self.clients = module.states.clients
        self.per_round = per_round or self.clients
        self.dropout, self.stragglers, self.min_clients = dropout, stragglers, min_clients
        if not 1 <= min_clients <= self.per_round:
            raise ZooError(f"min_clients is {min_clients}; it must be between 1 and {self.per_round}, those asked.")
        self.silent: dict[int, str] = {}
        self.wire = self._asked = 0

    def step(self) -> dict[str, float]:
        """One round; what a client's training logged, as weighted means, and "answered".

        Raises:
            ZooError: if fewer than ``min_clients`` answered; the global weights are then as they were.
        """
        self.silent = {}
        number = int(self.module.round)
        seed = round_seed(self.seed, self.per_epoch, number)
        ids, work = sample_clients(self.clients, self.per_round, seed, self.dropout, self.stragglers)
        self._asked = sum(share > 0 for share in work)
        # how many samples a client has is known when it answers
        seeds = [seed_from(seed, i) for i in ids]
        batch: dict[str, Any] = {"client": ids, "work": work, "seed": seeds, "size": [0] * len(ids)}
        found: dict[str, float] = {}
        with _instead(
            self.module, local=self._ask, consult=self._consult,
            log=lambda name, value, **_: found.update({name: float(value)}),
        ):  # fmt: skip
            self.module.train()
            try:
                self.module.training_step(batch, number)
            except KeyError as error:
                raise ZooError(
                    f"{type(self.module).__name__} reads {error} of clients' samples on the server, where there are "
                    "none: it cannot run on machines of their own."
                ) from error
        return {**found, "answered": float(sum(share > 0 for share in batch["work"]))}

    def _ask(self, batch: dict[str, Any], down: Message, rows: Sequence[int]) -> tuple[Message, Message, Message]:
        """In the place of `FederatedModule.local`: the clients work elsewhere, and what is theirs stays there."""
        device = self.module.device
        answers = self._send("", batch, down, {row: self.module.aside(batch["client"][row]) for row in rows})
        forms = Counter(self._form(answer) for answer in answers.values() if isinstance(answer, Answer))
        common = dict(forms.most_common(1)[0][0]) if forms else {}
        own = self.module.state_dict()
        expected = {n: (1, *own[n].shape) if n.startswith("model.") and n in own else s for n, s in common.items()}
        good = self._good(batch, answers, dict.fromkeys(answers, expected))
        for row, answer in good.items():
            batch["size"][row] = answer.size
        first = next(iter(good.values()))
        up = {name: self._joined(name, [answer.up[name] for answer in good.values()]).to(device) for name in first.up}
        every = [name for name in first.logs if all(name in answer.logs for answer in good.values())]
        logs = {name: torch.tensor([answer.logs[name] for answer in good.values()], device=device) for name in every}
        return up, {}, logs

    def _consult(
        self, part: str, batch: dict[str, Any], asked: Mapping[int, Message], shapes: Mapping[int, Shapes]
    ) -> Iterator[tuple[int, Message]]:
        """In the place of `FederatedModule.consult`; the rows of clients that fall silent have no work left."""
        good = self._good(batch, self._send(part, batch, {}, asked), shapes)
        for row, answer in good.items():
            yield row, {name: value.to(self.module.device) for name, value in answer.up.items()}

    def _send(
        self, part: str, batch: dict[str, Any], down: Message, asides: Mapping[int, Message]
    ) -> dict[int, Answer | str]:
        """What clients answer, by row of the batch."""
        number, client = int(self.module.round), batch["client"]
        orders = {
            client[row]: Order(number, batch["seed"][row], batch["work"][row], part, aside)
            for row, aside in asides.items()
        }
        self.wire += len(orders) * nbytes(down) + sum(nbytes(aside) for aside in asides.values())
        answers = self.send(down, orders)
        return {row: answers.get(client[row], "no answer in time") for row in asides}

    def _good(
        self, batch: dict[str, Any], answers: Mapping[int, Answer | str], shapes: Mapping[int, Shapes]
    ) -> dict[int, Answer]:
        """The answers that are sound, by row; the other clients are out of this round."""
        good: dict[int, Answer] = {}
        number = int(self.module.round) + 1
        for row, answer in answers.items():
            fault = answer if isinstance(answer, str) else self._fault(answer, shapes[row])
            if fault or isinstance(answer, str):
                self.silent[batch["client"][row]], batch["work"][row] = fault, 0.0
                log.warning("Round %d goes on without client %d: %s", number, batch["client"][row], fault)
            else:
                good[row] = answer
        self.wire += sum(nbytes(answer.up) for answer in good.values())
        left, asked = sum(share > 0 for share in batch["work"]), self._asked
        if left < self.min_clients:
            reasons = "; ".join(f"client {client}: {fault}" for client, fault in list(self.silent.items())[:3])
            raise ZooError(
                f"Round {number}: {left} of {asked} clients answered, min_clients is {self.min_clients}. {reasons}"
            )
        return good

    def _fault(self, answer: Answer, expected: Shapes) -> str:
        """What is wrong with an answer: it must have the shapes that are expected, and be finite; "" if nothing is."""
        shapes = dict(self._form(answer))
        far = [n for n in sorted({**expected, **shapes}) if shapes.get(n) != expected.get(n)]
        if far:
            return f"its message does not fit: {far[0]} is {shapes.get(far[0])}, expected {expected.get(far[0])}"
        wild = [n for n, v in answer.up.items() if v.is_floating_point() and not bool(v.isfinite().all())]
        if wild:
            return f"its message holds NaN or infinite numbers ({wild[0]})"
        return "" if answer.size > 0 else "it has no samples"

    def _form(self, answer: Answer) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Names and shapes; where rows are a client's samples, their number does not count."""
        ragged = self.module.ragged
        form = {n: (1, -1, *v.shape[2:]) if n in ragged else tuple(v.shape) for n, v in answer.up.items()}
        return tuple(sorted(form.items()))

    def _joined(self, name: str, parts: list[Tensor]) -> Tensor:
        """Clients' messages one below the other, the smaller padded where they are ragged."""
        if name in self.module.ragged:
            most, fill = max(part.shape[1] for part in parts), self.module.ragged[name]
            more = [part.new_full((1, most - part.shape[1], *part.shape[2:]), fill) for part in parts]
            parts = [torch.cat(pair, 1) for pair in zip(parts, more, strict=True)]
        return torch.cat(parts)


@contextmanager
def _instead(module: Any, **functions: Callable[..., Any]) -> Iterator[None]:
    """A module some of whose methods are others for a while."""
    for name, function in functions.items():
        object.__setattr__(module, name, function)
    try:
        yield
    finally:
        for name in functions:
            object.__delattr__(module, name)


def merge_classes(lists: Sequence[Sequence[str]]) -> list[str]:
    """Names of the classes of all sites: their common order where it is one, else sorted, numbers by value."""
    if all(list(names) == list(lists[0]) for names in lists):
        return list(lists[0])
    every = {name for names in lists for name in names}
    return sorted(every, key=lambda name: (0, int(name), name) if name.isdigit() else (1, 0, name))


def relabel(label: Tensor, own: Sequence[str], common: Sequence[str]) -> Tensor:
    """A site's labels as numbers of the common classes; -1 (unknown) stays.

    Raises:
        ZooError: for a class that the common ones lack.
    """
    if list(own) == list(common):
        return label
    missing = [name for name in own if name not in common]
    if missing:
        raise ZooError(f"Class {missing[0]!r} is not among the common ones: {', '.join(common)}.")
    table = torch.tensor([*map(list(common).index, own), -1])
    return table[label]
