"""`FederatedModule`: one training step is one round of communication between a server and clients, or among peers.

A round: the server's message goes `down` to the clients that take part; each trains its own copy of the network on its
own samples (`work`, usually steps along `loss`); their messages come `up`; the server combines them (`aggregate`). A
method overrides those of the four that its idea changes. It writes `loss` for one client and one local batch; clients
are trained together or one by one around it.

Index legend: s clients of a round, b samples of a local batch, n samples of all clients of a batch, k classes.
"""

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torchmetrics import Metric

from zoo.core import ZooError, ZooModule, check_finite
from zoo.core.seeding import seed_from
from zoo.engines.federated.aggregation import Message, full_precision, gather, nbytes
from zoo.engines.federated.algorithms import algorithm
from zoo.engines.federated.clients import Bound, Clients, clip, masked_mean
from zoo.engines.federated.schedule import local_batches
from zoo.engines.federated.state import ClientStates, _held
from zoo.engines.federated.views import Views
from zoo.nn.classifiers import classifier, has_batch_norm

Shapes = Mapping[str, tuple[int, ...]]
"""Of the tensors of a message, by name."""

STACK_BELOW = 2e7
"""Forward operations of a local batch up to which clients train together on a CPU, see `FederatedModule.together`."""


class Samples:
    """The local batches of some clients in one round.

    Iterating gives, step by step, how many clients still work and their batches: "image" (s, b, c, h, w) float in
    [0, 1] after the views, "label" (s, b), "mask" (s, b) bool, False where a batch is padded, "row" (s, b), each
    sample's place in the round's batch, and "labelled" (s, b) where the data say it. Where all of them are padded, at
    the end of the smaller last batches, nothing of what the method names in `padded` is left.
    """

    def __init__(self, module: "FederatedModule", batch: dict[str, Any], rows: Sequence[int], plan: tuple[Any, ...]):
        index, mask, counts = self.plan = plan
        self.module, self.batch, self.rows = module, batch, list(rows)
        self.ids = [batch["client"][row] for row in rows]
        starts = torch.tensor(batch["size"]).cumsum(0) - torch.tensor(batch["size"])
        self.index = (index + starts[:, None, None])[self.rows]
        self.mask = mask[self.rows]
        self.counts = [counts[row] for row in rows]
        self.generators = [torch.Generator().manual_seed(seed_from(batch["seed"][row], "views")) for row in rows]
        self.spans = [(int(starts[row]), int(starts[row]) + batch["size"][row]) for row in rows]

    def __len__(self) -> int:
        return max(self.counts)

    def __iter__(self) -> Iterator[tuple[int, dict[str, Tensor]]]:
        for step in range(len(self)):
            count = sum(done > step for done in self.counts)
            batch = self.module.local_batch(self, step, count)  # draws for whole batches: the same for any padding
            width, whole = int(self.mask[:count, step].sum(1).max()), self.mask.shape[2]
            names = self.module.padded if width < whole else ()
            yield count, batch | {name: batch[name][:, :width] for name in names if name in batch}

    def again(self) -> "Samples":
        """The same batches and views from the beginning."""
        return Samples(self.module, self.batch, self.rows, self.plan)

    def own(self, key: str, number: int) -> Tensor:
        """All samples of the ``number``-th of these clients: a slice of what the round's batch holds under ``key``."""
        first, last = self.spans[number]
        return self.batch[key][first:last]


class Rows(dict[str, Tensor]):
    """What clients of a round give, laid into one tensor (count, ...) for each name as they finish."""

    def __init__(self, count: int):
        super().__init__()
        self.count = count

    def at(self, name: str, like: Tensor, place: int) -> Tensor:
        """The row (1, ...) of a client, for values as ``like`` (s, ...)."""
        if name not in self:
            self[name] = like.new_empty(self.count, *like.shape[1:])
        return self[name][place : place + 1]

    def put(self, part: Message, places: Sequence[int]) -> None:
        """Lay what some clients give, each (s, ...), into their rows; what a client wrote there itself stays."""
        for name, value in part.items():
            row = self.at(name, value, places[0])
            if len(places) > 1:
                self[name][list(places)] = value
            elif row.data_ptr() != value.data_ptr():
                row.copy_(value)


class ClientAccuracy(Metric):
    """Accuracy on the server's own set and on each client's: counts that sum over batches and processes.

    `compute` gives "accuracy" (the server's set), and over clients with samples "personal_accuracy" (mean),
    "worst_accuracy" and "spread" (standard deviation); only what was measured.
    """

    full_state_update = False
    correct: Tensor
    total: Tensor

    def __init__(self, clients: int):
        super().__init__()
        self.add_state("correct", torch.zeros(clients + 1, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(clients + 1, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, client: int, correct: Tensor, total: int) -> None:
        """Add ``correct`` of ``total`` samples of a client; -1 is the server's set."""
        self.correct[client + 1] += correct.sum()
        self.total[client + 1] += total

    def compute(self) -> dict[str, Tensor]:
        share = self.correct / self.total
        found = {}
        if self.total[0] > 0:
            found["accuracy"] = share[0].float()
        own = share[1:][self.total[1:] > 0].float()
        if len(own):
            found |= {"personal_accuracy": own.mean(), "worst_accuracy": own.min()}
            found["spread"] = own.std(correction=0)
        return found


class FederatedModule(ZooModule):
    """Image classification by many clients that keep their data: FedAvg, its relatives, and the base of methods.

    Args:
        net: name of a classifier of `zoo.nn.classifiers`, or ``{"name": ..., arguments}``.
        num_classes: classes k. in_channels: channels of a picture. image_size: its side in pixels.
        num_clients: clients there are; what lives on with each has so many rows.
        algorithm: "fedavg", "fedprox", "scaffold", "fednova", "ditto" (personal models beside the global one) or
            "local" (no exchange).
        mu: weight of the proximal term of "fedprox" and "ditto".
        server_lr: how far the server goes towards the clients' mean.
        lr: of the clients' SGD. momentum, weight_decay: of the same, both begin anew every round.
        lr_decay: factor of the learning rate from round to round.
        local_epochs: passes of each client over its samples in a round. local_steps: so many steps instead.
        local_batch: samples of a local batch.
        drop_last: leave out the smaller last batch of a local epoch; batch norm needs that, and does it by itself.
        norm: normalisation of the net: "batch", "group" or "none".
        batch_norm: "aggregate" the statistics and weights of batch norm with the rest, or keep them "personal".
        personal: name prefixes of parameters that never leave their client ("head.").
        clip: largest norm of a client's gradient; 0 for none.
        augment: views of training pictures, see `zoo.engines.federated.views` ("crop:4", "flip").
        mean, std: of each channel, subtracted from and divided out of pictures in [0, 1].
        stack: how many clients train together at most; None decides by cost, see `together`.
        state_on_disk: keep what lives on with each client in files in the run's folder.
    """

    round: Tensor
    sent: Tensor
    _mean: Tensor
    _std: Tensor
    monitor, mode = "val/accuracy", "max"
    head: ClassVar[tuple[str, ...]] = ("model.head",)
    ragged: ClassVar[dict[str, float]] = {}
    """Names of messages (s, n, ...) that hold a row for each sample of a client, and what pads the smaller ones."""
    padded: ClassVar[tuple[str, ...]] = ("image", "label", "labelled", "mask", "row")
    """What of a local batch has a row for each sample and ends where they do; () keeps all padding, for a method whose
    batches have several parts or whose loss looks from sample to sample."""
    server_only: ClassVar[tuple[str, ...]] = ()
    """Name prefixes of buffers that the server keeps to itself; the others go to the clients, see `remote`."""
    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {"net": {"name": "cnn", "widths": [8, 16], "features": 32}, "norm": "none", "local_batch": 32}
    }

    def __init__(
        self,
        net: str | dict[str, Any] = "resnet18",
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
        num_clients: int = 10,
        algorithm: str = "fedavg",
        mu: float = 0.1,
        server_lr: float = 1.0,
        lr: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        lr_decay: float = 1.0,
        local_epochs: int = 1,
        local_steps: int | None = None,
        local_batch: int = 32,
        drop_last: bool = False,
        norm: str = "batch",
        batch_norm: str = "aggregate",
        personal: list[str] = [],  # noqa: B006 (read only; the command knows no tuple)
        clip: float = 0.0,
        augment: list[str] = [],  # noqa: B006
        mean: list[float] = [],  # noqa: B006
        std: list[float] = [],  # noqa: B006
        stack: int | None = None,
        state_on_disk: bool = False,
    ):
        super().__init__()
        self.save_hyperparameters()
        self._setup()

    def _setup(self) -> None:
        """Everything that follows from the hyperparameters; the last line of a method's ``__init__``."""
        self.automatic_optimization = False
        hp = {**_defaults(FederatedModule), **self.hyperparameters}
        for key in ("num_classes", "in_channels", "image_size", "num_clients", "local_batch", "local_epochs"):
            if hp[key] < 1:
                raise ValueError(f"{key} is {hp[key]}; it must be at least 1.")
        for key in ("lr", "momentum", "weight_decay", "mu", "server_lr", "clip"):
            if hp[key] < 0 or (key == "momentum" and hp[key] >= 1):
                raise ValueError(f"{key} is {hp[key]}; it must not be negative{', and below 1' * (key == 'momentum')}.")
        if len(hp["mean"]) != len(hp["std"]) or len(hp["mean"]) not in (0, 1, hp["in_channels"]):
            raise ValueError(
                f"mean={hp['mean']}, std={hp['std']}: one number for each of {hp['in_channels']} channels, [] for "
                "none. Data with channels=3 serve grey pictures as colour ones."
            )
        if hp["batch_norm"] not in ("aggregate", "personal"):
            raise ValueError(f"batch_norm is {hp['batch_norm']!r}; 'aggregate' or 'personal'.")
        self._hp = hp
        self.mu, self.server_lr, self.momentum = hp["mu"], hp["server_lr"], hp["momentum"]
        self.model = self.build()
        if has_batch_norm(self.model):
            hp["drop_last"] = True
        self.views = Views(hp["augment"])
        self.states = ClientStates(hp["num_clients"], _held.get(), lean=hp["state_on_disk"])
        self.server = ClientStates(1)
        self.received: Message = {}  # what came `aside`, on a client's machine
        self.register_buffer("round", torch.zeros((), dtype=torch.long))
        self.register_buffer("sent", torch.zeros(2, dtype=torch.float64))  # bytes up, bytes down
        self.register_buffer("_mean", torch.tensor(hp["mean"] or [0.0]).view(-1, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(hp["std"] or [1.0]).view(-1, 1, 1), persistent=False)
        self.algorithm = algorithm(hp["algorithm"], self)
        for name in self.personal_names:
            self.states.add(f"personal.{name}", self.model.state_dict()[name])
        self.algorithm.setup()
        self.accuracy = nn.ModuleDict({split: ClientAccuracy(hp["num_clients"]) for split in ("on_val", "on_test")})
        self._flops: float | None = None
        self._read: tuple[Tensor | None, int, int] = (None, 0, 0)  # see `done`

    # ---- what a method overrides --------------------------------------------------------------------------------

    def build(self) -> nn.Module:
        """The network that clients train."""
        hp = self._hp
        sizes = {key: hp[key] for key in ("num_classes", "in_channels", "image_size", "norm")}
        return classifier(hp["net"], **sizes)

    def logits(self, model: nn.Module, image: Tensor, client: int = -1) -> Tensor:
        """Class scores of pictures, normalised already, by the global model, or by a client's for that client.

        Shapes:
            image: (b, c, h, w); returns: (b, k)
        """
        return model(image)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What one client minimises on one local batch, as "loss", and what else to log: scalars.

        No Python decision may depend on values, and no random number be drawn here: many clients run through at once.

        Shapes:
            batch: "image" (b, c, h, w) in [0, 1]; "label", "mask" (b,)
        """
        each = F.cross_entropy(self.logits(model, self.normalise(batch["image"])), batch["label"], reduction="none")
        return {"loss": masked_mean(each, batch["mask"])}

    def local_batch(self, samples: Samples, step: int, count: int) -> dict[str, Tensor]:
        """The local batches of the first ``count`` clients at a step, with all that `loss` needs; draws views."""
        rows = samples.index[:count, step].to(self.device)
        found: Message = {k: samples.batch[k][rows] for k in ("label", "labelled") if k in samples.batch}
        image = self.views(pixels(samples.batch["image"][rows]), samples.generators[:count])
        return {"image": image, **found, "mask": samples.mask[:count, step].to(self.device), "row": rows}

    def broadcast(self) -> Message:
        """What the server sends to every client of a round, by name: each (...)."""
        state, shared = self.model.state_dict(), self._shared
        return self.algorithm.broadcast({f"model.{n}": v.detach() for n, v in state.items() if n in shared})

    def work(self, clients: Clients, samples: Samples, down: Message) -> dict[str, Tensor]:
        """What clients do in a round; returns what to log, each (s,). By default steps along `loss`."""
        return self.train_clients(clients, samples)

    def upload(self, clients: Clients, samples: Samples, down: Message) -> tuple[Message, Message]:
        """What comes up from each client, and what stays with it until it is asked again: each (s, ...)."""
        steps = torch.tensor(samples.counts, dtype=torch.float32, device=self.device)
        up, kept = self.algorithm.finish(clients, samples.ids, steps, down)
        shared = self._shared
        up |= {f"model.{n}": v for n, v in clients.state.items() if n in shared}
        kept |= {f"personal.{n}": v for n, v in clients.state.items() if n not in shared}
        return up, kept

    def aggregate(self, down: Message, up: Message, weights: Tensor, batch: dict[str, Any]) -> None:
        """The server's part: take ``up``, each (s, ...), of the clients that answered into the global model.

        ``weights`` (s,) are the clients' numbers of samples, and ``batch["client"]`` says who they are.
        """
        self.set_weights(self.algorithm.aggregate(down, up, weights))

    # ---- before the round, for methods whose clients report something first ---------------------------------------

    def exchange(self, batch: dict[str, Any]) -> None:
        """The server's part of what comes before a round's work, by way of `consult`; nothing by default."""

    def consult(
        self, part: str, batch: dict[str, Any], asked: Mapping[int, Message], shapes: Mapping[int, Shapes]
    ) -> Iterator[tuple[int, Message]]:
        """Ask clients of a round: the rows that answer, and their answers, one by one; of this rank's rows only.

        Args:
            part: which of a method's questions. asked: by row of the batch, what goes to this client alone.
            shapes: by row, those that the answer must have.
        """
        world, rank = self._ranks
        for row in list(asked)[rank::world]:
            yield row, self.answer(part, batch, row, asked[row])

    def answer(self, part: str, batch: dict[str, Any], row: int, asked: Message) -> Message:
        """A client's part of an `exchange`: what it answers, of its own samples."""
        raise NotImplementedError(f"{type(self).__name__} asks {part!r} and answers nothing.")

    def aside(self, client: int) -> Message:
        """What goes down to one client alone in a round on machines, which keeps it in `received`."""
        return {}

    # ---- the round ----------------------------------------------------------------------------------------------

    @property
    def _ranks(self) -> tuple[int, int]:
        """How many processes share a round's clients, and which this is."""
        return (self.trainer.world_size, self.trainer.global_rank) if self._trainer is not None else (1, 0)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        with torch.no_grad(), full_precision(self.round):
            self.exchange(batch)
        down = self.broadcast()
        answered = [row for row, share in enumerate(batch["work"]) if share > 0]
        world, rank = self._ranks
        if len(answered) < world:
            raise ZooError(f"{len(answered)} clients answered in this round: too few for {world} processes.")
        up, kept, logs = self.local(batch, down, answered[rank::world])
        answered = [row for row in answered if batch["work"][row] > 0]  # on machines of their own some fall silent
        ids = [batch["client"][row] for row in answered]
        self.states.write(ids, gather(kept, len(ids)))
        up, logs = gather(up, len(ids)), gather(logs, len(ids))
        kind = torch.float64 if self.dtype == torch.float64 else torch.float32
        weights = torch.tensor([batch["size"][row] for row in answered], dtype=kind, device=self.device)
        with torch.no_grad():
            self.aggregate(down, up, weights, {**batch, "client": ids})
            self.round += 1
            self.sent += torch.tensor([self.bytes_up(up), self.bytes_down(down, batch["client"])]).to(self.sent)
        for name, value in logs.items():
            mean = (value * weights).sum() / weights.sum()
            self.log(f"train/{name}", mean, prog_bar=name == "loss", batch_size=len(ids))

    def local(self, batch: dict[str, Any], down: Message, rows: Sequence[int]) -> tuple[Message, Message, Message]:
        """Let some clients of a round work: what comes up, what stays, what to log; each (len(rows), ...).

        Args:
            rows: which clients of the batch, by their places in ``batch["client"]``.
        """
        hp = self._hp
        options = {"epochs": hp["local_epochs"], "steps": hp["local_steps"], "drop_last": hp["drop_last"]}
        plan = local_batches(batch["size"], batch["seed"], hp["local_batch"], work=batch["work"], **options)
        order = sorted(rows, key=lambda row: -plan[2][row])  # who has most steps to do comes first
        size = self.together(order, down)
        up, kept, logs = (Rows(len(rows)) for _ in range(3))
        for first in range(0, len(order), size):
            samples = Samples(self, batch, order[first : first + size], plan)
            places = [rows.index(row) for row in samples.rows]
            state = self.start_state(samples.ids, down)
            # Alone, a client trains in its row of what will come up: copying a large network costs as much as a step.
            own = None if size > 1 else {n: up.at(f"model.{n}", v, places[0]).copy_(v) for n, v in state.items()}
            clients = self.clients(state, size > 1, own)
            clients.corrections += self.algorithm.corrections(samples.ids, down)
            logs.put(self.work(clients, samples, down), places)
            sent, held = self.upload(clients, samples, down)
            kept.put(held | self.algorithm.beside(samples, down, size > 1), places)
            up.put(sent, places)
        return {name: up[name] for name in sent}, kept, logs  # not what a client trained but keeps

    def clients(self, state: Message, stacked: bool, own: Message | None = None) -> Clients:
        """Clients ready to work from ``state``, each (s, ...), which itself stays as it is; ``own`` is its copy."""
        self.model.train()
        if own is None:
            own = {name: value.clone(memory_format=torch.contiguous_format) for name, value in state.items()}
        found = Clients(self.model, own, self.local_optimizer, stacked, start=state)
        if self._hp["clip"]:
            found.corrections.append(clip(self._hp["clip"]))
        return found

    def train_clients(self, clients: Clients, samples: Samples, only: str | tuple[str, ...] = "") -> Message:
        """Steps along `loss` over all local batches; the mean over a client's steps of what it gives, each (s,)."""
        total: Message = {}
        counts = torch.tensor(samples.counts, dtype=torch.float32, device=self.device)
        for count, batch in samples:
            if count < clients.count:
                clients.narrow(count)
            found = clients.step(self.loss, batch, only)
            self.after_step(clients)
            for name, value in found.items():
                total.setdefault(name, torch.zeros_like(counts))[:count] += value
        return {name: value / counts for name, value in total.items()}

    def after_step(self, clients: Clients) -> None:
        """What else changes in the clients' states after each of their steps along `loss`; nothing by default."""

    def start_state(self, ids: Sequence[int], down: Message) -> Message:
        """What each client begins with, to be read only: what came down, and its own of what is personal; (s, ...)."""
        size = len(ids)
        shared = {n.removeprefix("model."): v for n, v in down.items() if n.startswith("model.")}
        state = {n: v.expand(size, *v.shape) for n, v in shared.items()}
        own = self.states.read(ids, "personal.", self.device)
        personal = set(self.personal_names) if own else set()
        return state | {n: v for n, v in own.items() if n in personal}

    # ---- pieces -------------------------------------------------------------------------------------------------

    @property
    def personal_names(self) -> list[str]:
        """Names of parameters and buffers that never leave their client."""
        shared = self._shared
        return [name for name in self.model.state_dict() if name not in shared]

    @property
    def _shared(self) -> set[str]:
        hp = self._hp
        if hp["algorithm"] == "local":
            return set()
        own = tuple(hp["personal"])
        if hp["batch_norm"] == "personal":
            own += tuple(f"{n}." for n, m in self.model.named_modules() if isinstance(m, _BatchNorm))
        return {name for name in self.model.state_dict() if not (own and name.startswith(own))}

    @property
    def shared_parameters(self) -> list[str]:
        """Names of the parameters that are trained and sent."""
        shared = self._shared
        return [name for name, p in self.model.named_parameters() if p.requires_grad and name in shared]

    @property
    def done(self) -> int:
        """Rounds done, as a number: an accelerator is asked once a round. 0 on the meta device."""
        buffer, version, number = self._read
        if buffer is not self.round or version != self.round._version:
            number = 0 if self.round.is_meta else int(self.round)
            self._read = self.round, self.round._version, number
        return number

    def round_lr(self) -> float:
        """The clients' learning rate in this round."""
        return self._hp["lr"] * self._hp["lr_decay"] ** self.done

    def local_optimizer(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        """A client's optimiser, new every round. It must work element by element: the clients are rows of tensors."""
        hp = self._hp
        return torch.optim.SGD(parameters, lr=self.round_lr(), momentum=hp["momentum"], weight_decay=hp["weight_decay"])

    def together(self, rows: Sequence[int], down: Message) -> int:
        """How many clients train together: `stack`, else all on an accelerator, else by cost.

        On a CPU it pays where starting an operation costs more than computing it: up to `STACK_BELOW` operations in the
        forward pass of a local batch (``python -m benchmarks federated`` measures it). The figures do not depend on it
        beyond the order of sums.
        """
        if self._hp["stack"] is not None:
            return max(min(self._hp["stack"], len(rows)), 1)
        if self.device.type not in ("cpu", "meta"):
            return max(len(rows), 1)
        return max(len(rows), 1) if self._cost() <= STACK_BELOW else 1

    def _cost(self) -> float:
        """Operations of a local batch's forward pass, counted once, on the meta device."""
        if self._flops is None:
            from torch.utils.flop_counter import FlopCounterMode

            hp = self._hp
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                shape = (hp["local_batch"], hp["in_channels"], hp["image_size"], hp["image_size"])
                self.logits(copy.deepcopy(self.model).to("meta"), torch.empty(shape, device="meta"))
            self._flops = float(counter.get_total_flops())
        return self._flops

    @torch.no_grad()
    def set_weights(self, weights: Message) -> None:
        """Put weights and buffers, named "model." and what follows, into the global model."""
        state = self.model.state_dict()
        for name, value in weights.items():
            state[name.removeprefix("model.")].copy_(value)

    def bytes_up(self, up: Message) -> int:
        """Bytes that the clients of a round sent."""
        return nbytes(up)

    def bytes_down(self, down: Message, clients: Sequence[int]) -> int:
        """Bytes that went to all clients that were asked."""
        return len(clients) * nbytes(down)

    def normalise(self, image: Tensor) -> Tensor:
        """Pictures in [0, 1] as the network wants them."""
        return (image - self._mean) / self._std if self._hp["mean"] else image

    # ---- evaluation ---------------------------------------------------------------------------------------------

    def personal_weights(self, client: int) -> Message:
        """What a client's own model has instead of the global one's weights, by name; ``{}`` where there is none."""
        return {n: v[0] for n, v in self.states.read([client], "personal.", self.device).items()}

    def forward(self, image: Tensor, client: int = -1) -> Tensor:
        """Class scores by the global model, or by a client's own.

        Shapes:
            image: (b, c, h, w) float in [0, 1], or uint8; returns: (b, k)
        """
        hp = self._hp
        expected = (hp["in_channels"], hp["image_size"], hp["image_size"])
        if tuple(image.shape[1:]) != expected or not len(image):
            wanted = ", ".join(map(str, expected))
            raise ValueError(f"'image' has shape {tuple(image.shape)}; expected (batch >= 1, {wanted}).")
        x = self.normalise(pixels(image))
        if client < 0:
            return self.logits(self.model, x)
        if client >= hp["num_clients"]:
            raise ValueError(f"client is {client}; there are {hp['num_clients']}, from 0.")
        network = Bound(self.model, lambda model, x: self.logits(model, x, client))
        own = {f"network.{name}": value for name, value in self.personal_weights(client).items()}
        return functional_call(network, own, (x,))

    def predict(self, image: Tensor, client: int = -1) -> Tensor:
        """Probabilities (b, k) of pictures (b, c, h, w), by the global model or a client's own."""
        check_finite(image, "image")
        return super().predict(image, client=client).softmax(-1)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        return {"name": batch["name"], "probability": self.predict(batch["image"])}

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    @torch.no_grad()
    def _evaluate(self, batch: dict[str, Any], split: str) -> None:
        """Every process has all sets, and scores every so-manieth piece of them."""
        world, rank = self._ranks
        first, number = 0, 0
        for client, size in zip(batch["client"], batch["size"], strict=True):
            for start in range(first, first + size, 1024):
                rows = slice(start, min(start + 1024, first + size))
                if number % world == rank:
                    self.score(split, client, batch["image"][rows], batch["label"][rows], number)
                number += 1
            first += size

    def score(self, split: str, client: int, image: Tensor, label: Tensor, number: int) -> Tensor:
        """Class scores (b, k) of some pictures by a client's model, or with -1 by the global one, taken into account.

        Shapes:
            image: (b, c, h, w); label: (b,); ``number`` is the piece's place in its batch, to seed draws with
        """
        logits = self(image, client)
        self.accuracy[f"on_{split}"].update(client, logits.argmax(-1) == label, len(label))  # type: ignore[operator]
        return logits

    def on_validation_epoch_end(self) -> None:
        self._log_accuracy("val")

    def on_test_epoch_end(self) -> None:
        self._log_accuracy("test")

    def _log_accuracy(self, split: str) -> None:
        metric: Any = self.accuracy[f"on_{split}"]
        found = metric.compute()
        if self.monitor == f"{split}/personal_accuracy" and "accuracy" in found:  # data without clients' own sets
            found.setdefault("personal_accuracy", found["accuracy"])
        for name, value in found.items():
            self.log(f"{split}/{name}", value, prog_bar=name == "accuracy")
        metric.reset()
        for name, value in zip(("up_mb", "down_mb"), self.sent / 1e6, strict=True):
            self.log(f"{split}/{name}", value.float())

    # ---- Lightning ----------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> list[Any]:
        """None of its own: clients have theirs, for a round."""
        return []

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and self._hp["state_on_disk"] and self.states.folder is None:
            self.states.to_disk(f"{self.trainer.default_root_dir}/clients")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.states.folder is not None:
            checkpoint["clients"] = name = f"round-{int(self.round):06d}"
            self.states.snapshot(name)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if "clients" in checkpoint and self._trainer is not None:
            if self.states.folder is None:
                self.states.to_disk(f"{self.trainer.default_root_dir}/clients")
            self.states.restore(checkpoint["clients"])

    def example_inputs(self) -> tuple[Tensor, ...]:
        hp = self._hp
        return (torch.rand(2, hp["in_channels"], hp["image_size"], hp["image_size"], device=self.device),)


def pixels(image: Tensor) -> Tensor:
    """Pictures as float in [0, 1]; bytes are divided by 255."""
    return image / 255 if image.dtype == torch.uint8 else image


def _defaults(cls: type) -> dict[str, Any]:
    return {name: p.default for name, p in inspect.signature(cls).parameters.items()}
