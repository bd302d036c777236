"""SCooL: clients without a server learn with each other along a graph that is inferred as they learn.

Paper: Shuangtong Li, Tianyi Zhou, Xinmei Tian, Dacheng Tao, "Structured Cooperative Learning with Graphical Model
Priors", ICML 2023, arXiv:2306.09595. Code by the authors: https://github.com/ShuangtongLi/SCooL, GPL-3.0.

Every client has a model, theta_i, and a task of its own; all models begin alike. A round:

    delta_i = theta_i - (theta_i after S steps on the client's own samples)             local training
    Y_ij    = - mean loss of model i, so trained, on a few samples of client j          how well i does on j's task
    w       = the graph that Y and a prior make likely, rows of sum 1                   E-step
    theta_i = theta_i - sum_j w_ij delta_j                                              M-step (Eq. 22, appendix C.1)

Priors: a stochastic block model (clients fall into blocks, Eq. 18-21), attention between updates (Eq. 25-31), or a
fixed graph (the Dirac prior): "all" is FedAvg, "none" training alone, "ring" with ``mixing="models"`` D-PSGD.
After some rounds each client keeps its strongest neighbours only.

In: 32 x 32 pictures of each client. Out: a classifier for each client, and the graph `SCooL.cooperation` (K, K).

Departs from the authors' code, where it has slips (arguments ``authors_*`` restore them): logits without a ReLU;
memberships by a softmax (theirs fade with many clients: among 100 the prior moves w by 0.3 %); a pruned pair is
excluded (theirs passes for a loss of 0, or turns the order of neighbours round). Each client's few samples are drawn
once a round for all others, not anew for each. Saturation jitter and grey padding of their crops are left out.

Index legend: K clients, s that take part in a round, M blocks, b samples, k classes, o/r rows of a parameter and values
in each.
"""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from zoo.core import ZooError, atomic_write
from zoo.core.seeding import seed_from
from zoo.engines.federated import (
    Clients,
    FederatedModule,
    Message,
    Samples,
    average,
    full_precision,
    gather,
    local_batches,
    mix,
    nbytes,
    pixels,
)
from zoo.engines.federated.clients import Bound

PRIORS, TOPOLOGIES, MIXING = ("sbm", "attention", "dirac"), ("all", "ring", "none"), ("updates", "models")
IMAGES = 2048
"""Pictures that are looked at in one go when losses across clients are measured."""
EPS = 1e-6
"""Keeps logarithms and digamma functions finite, as in the authors' code."""

# ---- networks --------------------------------------------------------------------------------------------------------


def cnn5(num_classes: int, in_channels: int, image_size: int) -> nn.Sequential:
    """Two 5 x 5 convolutions without padding and a hidden layer of 512: the network for CIFAR."""
    side = ((image_size - 4) // 2 - 4) // 2
    if side < 1:
        raise ZooError(f"The net 'cnn5' leaves nothing of pictures of {image_size} pixels; it needs 16.")
    stages: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (inside, wide) in enumerate(((in_channels, 32), (32, 64)), 1):
        stages[f"layer{number}"] = nn.Sequential(nn.Conv2d(inside, wide, 5), nn.ReLU(), nn.MaxPool2d(2))
    stages["pool"] = nn.Flatten()
    stages["hidden"] = nn.Sequential(nn.Linear(64 * side**2, 512), nn.ReLU())
    stages["head"] = nn.Linear(512, num_classes)
    return nn.Sequential(stages)


def conv4(num_classes: int, in_channels: int, image_size: int) -> nn.Sequential:
    """Four 3 x 3 convolutions of 32 channels with group normalisation: the network for MiniImageNet."""
    stages: OrderedDict[str, nn.Module] = OrderedDict()
    side = image_size
    for number in range(1, 5):
        stride = 1 if number == 4 else 2
        conv = nn.Conv2d(in_channels if number == 1 else 32, 32, 3)
        stages[f"layer{number}"] = nn.Sequential(conv, nn.ReLU(), nn.GroupNorm(4, 32), nn.MaxPool2d(2, stride))
        side = (side - 4) // stride + 1
    if side < 1:
        raise ZooError(f"The net 'conv4' leaves nothing of pictures of {image_size} pixels; it needs 52.")
    stages["pool"] = nn.Flatten()
    stages["head"] = nn.Linear(32 * side**2, num_classes)
    return nn.Sequential(stages)


NETS = {"cnn5": cnn5, "conv4": conv4}

# ---- the graph -------------------------------------------------------------------------------------------------------


def unit_rows(w: Tensor, extra: float = 0.0) -> Tensor:
    """Rows scaled to sum 1 (with ``extra`` added to the sum they are divided by); a row of zeros keeps to itself.

    Shapes:
        w: (K, K), not negative; returns: (K, K)
    """
    total = w.sum(1, keepdim=True)
    return torch.where(total > 0, w / (total + extra).clamp(min=torch.finfo(w.dtype).tiny), torch.eye(len(w)).to(w))


def fixed_graph(topology: str, ids: Sequence[int], clients: int, samples: Tensor) -> Tensor:
    """The graph of the Dirac prior among the clients of a round.

    Args:
        topology: "all" (each takes of all by their samples), "ring" (a third of itself, of the client before and of the
            one after it) or "none" (nothing of others).
        ids: which of ``clients``. samples: (s,) their numbers of samples.
    Shapes:
        returns: (s, s), rows of sum 1
    """
    if topology == "all":
        return unit_rows(samples.expand(len(ids), -1))
    place = torch.as_tensor(ids, device=samples.device)
    apart = (place[:, None] - place) % clients
    near = (apart == 0) | (topology == "ring") * ((apart == 1) | (apart == clients - 1))
    return unit_rows(near.to(samples))


def block_model(
    score: Tensor,
    gamma: Tensor,
    membership: Tensor,
    orders: Sequence[Sequence[int]],
    scale: float = 1.0,
    learn: bool = False,
    authors_sums: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Variational inference of who works with whom under a stochastic block model, Eq. 18-21.

        w_ij = sigmoid((Y_ij + Omega_i [log B - log(1 - B)] Omega_j) / scale)

    and then, client after client, Omega_i by Eq. 20-21 and gamma_i = Omega_i + alpha, once for each of ``orders``. B is
    0.8 on its diagonal and 0.2 elsewhere, alpha is 1; with ``learn`` they follow Eq. 24 and 23 after each pass (alpha
    by steps of 0.1 along the mean over clients, whose size the paper leaves open).

    Args:
        score: Y; -inf excludes a pair. gamma, membership: first values of gamma and Omega.
        orders: the clients in the order of each pass.
        authors_sums: divide exp(x) by its sum + 1e-6 where a softmax belongs, as the authors' code does.
    Shapes:
        score: (K, K); gamma, membership: (K, M); returns: w (K, K) not scaled to rows of sum 1, Omega (K, M), B (M, M)
    """
    count, blocks = gamma.shape
    omega, gamma = membership.clone(), gamma.clone()
    b = 0.2 + 0.6 * torch.eye(blocks).to(score)
    alpha = torch.ones(blocks).to(score)
    w = torch.zeros_like(score)
    for order in orders:
        yes, no = (b + EPS).log(), (1 - b + EPS).log()
        w = ((score + omega @ (yes - no) @ omega.T) / scale).sigmoid()
        others = 1 - torch.eye(count).to(w)
        row, column = w * others, w.T * others
        row_not, column_not = (1 - w) * others, (1 - w.T) * others
        for i in order:
            x = (
                row[i] @ omega @ yes.T
                + column[i] @ omega @ yes
                + row_not[i] @ omega @ no.T
                + column_not[i] @ omega @ no
            )
            x = x + (gamma[i] + EPS).digamma() - (gamma[i].sum() + EPS).digamma()
            omega[i] = x.exp() / (x.exp().sum() + EPS) if authors_sums else x.softmax(0)
            gamma[i] = alpha + omega[i]
        if learn:
            b = (omega.T @ w @ omega / (omega.sum(0)[:, None] * omega.sum(0) + EPS)).clamp(EPS, 1 - EPS)
            ascent = (gamma.digamma() - gamma.sum(1, keepdim=True).digamma()).mean(0)
            alpha = (alpha + 0.1 * (ascent - alpha.digamma() + alpha.sum().digamma())).clamp(min=1e-3)
    return w, omega, b


class UpdateEncoder(nn.Module):
    """How alike clients' updates are: phi of the attention prior, two layers for each parameter of the network.

        f_ij = mean over parameters of <E(u_i), E(u_j)> / o,   E(u) = tanh(Linear_20(tanh(Linear_10(u)))) on each row

    Args:
        shapes: of the network's parameters.
    """

    def __init__(self, shapes: Sequence[Sequence[int]]):
        super().__init__()
        rest = [int(np.prod(shape[1:])) for shape in shapes]
        self.first = nn.ModuleList([nn.Linear(size, 10) for size in rest])
        self.second = nn.ModuleList([nn.Linear(10, 20) for _ in rest])

    def forward(self, updates: Sequence[Tensor]) -> Tensor:
        """Shapes: updates: each (s, o, ...), all of a client's together of norm 1; returns: (s, s)"""
        total = torch.zeros(())
        for first, second, update in zip(self.first, self.second, updates, strict=True):
            code = second(first(update.flatten(2) if update.ndim > 2 else update[..., None]).tanh()).tanh()
            total = total.to(code) + code.flatten(1) @ code.flatten(1).T / update.shape[1]
        return total / len(self.first)


def attention_graph(
    likeness: Tensor,
    score: Tensor,
    kept: Tensor,
    scale: float = 1.0,
    authors_sums: bool = False,
    authors_pruned: bool = False,
) -> Tensor:
    """w_i. = softmax(f_i. + Y_i. / scale) over the neighbours that are kept, Eq. 29.

    Args:
        likeness: f. score: Y. kept: which pairs are left.
        authors_sums: add 1e-5 to the two sums that rows are divided by, as the authors' code does.
        authors_pruned: once pruned, divide Y by its row's sum first: Y being negative, the worst neighbour then counts
            most, as in the authors' code.
    Shapes:
        all: (K, K); returns: (K, K)
    """
    p = likeness.masked_fill(~kept, -torch.inf).softmax(1).to(score)
    if not (authors_sums or authors_pruned):
        return (p.log() + (score / scale).masked_fill(~kept, -torch.inf)).softmax(1)
    y = score.masked_fill(~kept, 0.0)
    if authors_pruned and not bool(kept.all()):
        y = y / y.sum(1, keepdim=True)
    extra = 1e-5 if authors_sums else 0.0
    y = unit_rows((y / scale).exp() * kept, extra)
    return unit_rows(y * p, extra)


# ---- the method ------------------------------------------------------------------------------------------------------


class SCooL(FederatedModule):
    """Personal classifiers that learn with each other along a graph they infer (SCooL).

    All clients have models of their own, ``predict(image, client=3)``; without a client their mean answers. Row i of
    `cooperation` says how much client i takes of each. "graph_share" is logged where several clients have the same
    classes: the part of what clients take from others that comes from those.

    Args:
        net: "cnn5" (for CIFAR), "conv4" (for MiniImageNet), or a classifier of `zoo.nn.classifiers`.
        prior: of the graph: "sbm", "attention" or "dirac" (the graph is fixed).
        topology: of the fixed graph: "all", "ring" or "none", see `fixed_graph`.
        mixing: what is summed along the graph: "updates", or "models" as in D-PSGD: sum_j w_ij theta_j - delta_i.
        scale: the graph's temperature. The paper's runs: "sbm" 1 with groups of like clients, 2 without; "attention" 9
            and 2.
        mask_fraction: share of all clients that each keeps as neighbours in the end (the paper's runs: 0.2 with groups,
            0.1 without); 1 keeps all.
        fix_graph_round: after which round, counted from 0, they are chosen: the largest w_ij, with "attention" Y_ij.
        blocks: of the stochastic block model. sweeps: passes of its inference in a round.
        learn_blocks: learn how blocks are connected (Eq. 23, 24; the paper's, not in the authors' code).
        encoder_lr: learning rate of the attention's encoder (AdamW, a step a round).
        probe: samples of each client that the others' losses are measured on in a round.
        own_classes: a client's own answer is one of the classes that it has samples of.
        authors_sums: the authors' normalisations, see `block_model` and `attention_graph`.
        authors_pruned: the authors' handling of pruned pairs: a loss of 0 with "sbm", see `attention_graph`.
        authors_relu: a ReLU on the logits, as in the authors' networks.
        lr: of the clients' SGD. local_steps: steps of each client in a round. local_batch: samples of a local batch.
    Raises:
        ValueError: for fewer than two clients, unknown words, or numbers out of range.
    Example:
        >>> from zoo.vision import SCooL
        >>> model = SCooL.from_variant("tiny", num_clients=5)
        >>> model.predict(*model.example_inputs(), client=2).shape
        torch.Size([2, 10])
    """

    monitor, mode = "val/personal_accuracy", "max"
    head: ClassVar[tuple[str, ...]] = (
        "model.head",
        "states.personal__head",
        "states.own__classes",
        "server.first__head",
    )
    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {
            "net": {"name": "cnn", "widths": [4, 8], "features": 16},
            "num_clients": 10,
            "local_steps": 2,
            "fix_graph_round": 1,
            "augment": [],
            "mean": [],
            "std": [],
        },
        "attention": {"prior": "attention", "scale": 9.0},
        "miniimagenet": {"net": "conv4", "num_classes": 100, "image_size": 84},
    }

    def __init__(
        self,
        net: str | dict[str, Any] = "cnn5",
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
        num_clients: int = 100,
        prior: str = "sbm",
        topology: str = "all",
        mixing: str = "updates",
        scale: float = 1.0,
        mask_fraction: float = 0.2,
        fix_graph_round: int = 10,
        blocks: int = 2,
        sweeps: int = 2,
        learn_blocks: bool = False,
        encoder_lr: float = 0.2,
        probe: int = 10,
        own_classes: bool = True,
        lr: float = 0.01,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        lr_decay: float = 1.0,
        local_epochs: int = 5,
        local_steps: int | None = 250,
        local_batch: int = 10,
        norm: str = "none",
        clip: float = 0.0,
        augment: list[str] = ["crop:4", "flip"],  # noqa: B006 (read only; the command knows no tuple)
        mean: list[float] = [0.4914, 0.4822, 0.4465],  # noqa: B006
        std: list[float] = [0.2023, 0.1994, 0.2010],  # noqa: B006
        stack: int | None = None,
        state_on_disk: bool = False,
        authors_sums: bool = False,
        authors_pruned: bool = False,
        authors_relu: bool = False,
    ):
        super(FederatedModule, self).__init__()
        self.save_hyperparameters()
        words = {"prior": (prior, PRIORS), "topology": (topology, TOPOLOGIES), "mixing": (mixing, MIXING)}
        for key, (word, known) in words.items():
            if word not in known:
                raise ValueError(f"{key} is {word!r}; one of {', '.join(known)}.")
        if num_clients < 2:
            raise ValueError(f"num_clients is {num_clients}; learning with each other takes at least 2.")
        self.neighbours = int(num_clients * mask_fraction + 1e-9)
        if not 0 < mask_fraction <= 1 or self.neighbours < 1:
            raise ValueError(
                f"mask_fraction is {mask_fraction}: of {num_clients} clients each would keep {self.neighbours}; "
                "give at least 1 / num_clients, and at most 1."
            )
        if scale <= 0 or blocks < 1 or sweeps < 1 or probe < 1 or fix_graph_round < 0:
            raise ValueError(
                f"scale={scale}, blocks={blocks}, sweeps={sweeps}, probe={probe}, fix_graph_round={fix_graph_round}: "
                "scale above 0, the last not negative, the others at least 1."
            )
        self._setup()
        self.states.add("own.classes", torch.zeros(num_classes, dtype=torch.bool))
        # not "graph": exported modules have that of their own
        self.register_buffer("cooperation", torch.eye(num_clients))
        self.register_buffer("kept", torch.ones(num_clients, num_clients, dtype=torch.bool))
        self.encoder: UpdateEncoder | None = None
        if prior == "attention":
            self._setup_encoder()
        self._traffic = 0

    def _setup_encoder(self) -> None:
        """phi, each client's moments of its optimiser, and theta^0, which updates are counted from."""
        named = dict(self.model.named_parameters())
        self.encoder = UpdateEncoder([p.shape for p in named.values()])
        for name, p in named.items():
            self.server.add(f"first.{name}", p)
        for name, p in self.encoder.named_parameters():
            for moment in ("mean", "square"):
                self.states.add(f"encoder.{moment}.{name}", torch.zeros_like(p))
        self.states.add("steps.encoder", torch.zeros(()))

    # ---- what clients do ----------------------------------------------------------------------------------------

    def build(self) -> nn.Module:
        hp = self._hp
        if isinstance(hp["net"], str) and hp["net"] in NETS:
            return NETS[hp["net"]](hp["num_classes"], hp["in_channels"], hp["image_size"])
        return super().build()

    @property
    def _shared(self) -> set[str]:
        """There is no server: all parameters are personal."""
        return set()

    def broadcast(self) -> Message:
        return {}

    def logits(self, model: nn.Module, image: Tensor, client: int = -1) -> Tensor:
        """Class scores; a client's own have -inf for the classes that it has no samples of.

        Shapes:
            image: (b, c, h, w); returns: (b, k)
        """
        found = model(image)
        if self._hp["authors_relu"]:
            found = found.relu()
        if client >= 0 and self._hp["own_classes"]:
            own = self.states.read([client], "own.", found.device)["classes"][0]
            found = found.masked_fill(~(own | ~own.any()), -torch.inf)
        return found

    def work(self, clients: Clients, samples: Samples, down: Message) -> Message:
        label = samples.batch["label"]
        if not label.is_meta and bool((label < 0).any() | (label >= self._hp["num_classes"]).any()):
            raise ZooError(f"Labels go up to {int(label.max())}; the model has num_classes={self._hp['num_classes']}.")
        return super().work(clients, samples, down)

    def upload(self, clients: Clients, samples: Samples, down: Message) -> tuple[Message, Message]:
        """The trained model, for its neighbours; which classes a client has stays with it."""
        every = torch.arange(self._hp["num_classes"], device=self.device)
        labels = [samples.own("label", i) for i in range(len(samples.ids))]
        classes = torch.stack([(label[:, None] == every).any(0) for label in labels])
        return {f"model.{n}": value for n, value in clients.state.items()}, {"own.classes": classes}

    # ---- how they learn from each other -------------------------------------------------------------------------

    def aggregate(self, down: Message, up: Message, weights: Tensor, batch: dict[str, Any]) -> None:
        """E-step and M-step among the clients that answered; the mean of all clients' models is the global one."""
        ids = batch["client"]
        with full_precision(weights):
            before = self.states.read(ids, "personal.", self.device)
            after = {name: up[f"model.{name}"] for name in before}
            w = self.cooperate(after, weights, batch)
            change = {name: value - after[name] for name, value in before.items()}
            if self._hp["mixing"] == "models":
                new = {name: value - change[name] for name, value in mix(before, w).items()}
            else:
                new = {name: before[name] - value for name, value in mix(change, w).items()}
            self.states.write(ids, new, "personal.")
            place = torch.as_tensor(ids, device=self.device)
            self.cooperation[place] = torch.zeros_like(self.cooperation[place]).index_copy(
                1, place, w.to(self.cooperation)
            )
            clients = self._hp["num_clients"]
            everyone = new if len(ids) == clients else self.states.read(range(clients), "personal.", self.device)
            mean = average(everyone, torch.ones(clients, device=self.device))
            self.set_weights({f"model.{name}": value for name, value in mean.items()})

    def cooperate(self, models: Message, weights: Tensor, batch: dict[str, Any]) -> Tensor:
        """The graph among the clients of a round, (s, s), rows of sum 1; prunes when it is time.

        Args:
            models: the trained ones, each (s, ...). weights: (s,) numbers of samples. batch: the round's.
        """
        hp, ids = self._hp, batch["client"]
        size = nbytes({name: value[0] for name, value in models.items()})
        if hp["prior"] == "dirac":
            w = fixed_graph(hp["topology"], ids, hp["num_clients"], weights)
            self._traffic = _links(w > 0) * size
            return w
        place = torch.as_tensor(ids, device=self.device)
        kept = self.kept[place][:, place]
        kept = kept | (~kept.any(1, keepdim=True) & torch.eye(len(ids), dtype=torch.bool, device=kept.device))
        loss = self.cross_loss(models, batch, kept)
        if not loss.is_meta and not bool(loss[kept].isfinite().all()):
            i, j = (kept & ~loss.isfinite()).nonzero()[0].tolist()
            raise ZooError(f"The loss of client {ids[i]}'s model on client {ids[j]}'s data is {loss[i, j]}: lower lr.")
        # a few numbers for each pair: nothing for an accelerator
        score = -(loss if loss.is_meta else loss.cpu()).double()
        if hp["prior"] == "sbm":
            w = choice = self._blocks(score, kept.to(score.device), batch)
        else:
            w, choice = self._attend(models, score, kept.to(score.device), ids), score
        # model i goes to j to be tried, its loss comes back; update j goes to i
        self._traffic = _links(kept) * (size + 4) + _links(w > 0) * size
        if self.encoder is not None:
            self._traffic += len(ids) * nbytes(dict(self.encoder.named_parameters()))
        self._prune(choice, place)
        return w.to(self.device, self.cooperation.dtype)

    def _blocks(self, score: Tensor, kept: Tensor, batch: dict[str, Any]) -> Tensor:
        """The graph by the block model, from fresh memberships as in every round."""
        hp = self._hp
        gamma, omega, orders = self.first_blocks(len(score), batch["seed"])
        score = score.masked_fill(~kept, 0.0 if hp["authors_pruned"] else -torch.inf)
        first = gamma.to(score), omega.to(score)
        w, _, _ = block_model(score, *first, orders, hp["scale"], hp["learn_blocks"], hp["authors_sums"])
        return unit_rows(w * kept)

    def first_blocks(self, size: int, seeds: Sequence[int]) -> tuple[Tensor, Tensor, list[list[int]]]:
        """What the block model's inference begins with: gamma uniform in (0, 2 / M], Omega from it, orders of clients.

        Args:
            size: clients s. seeds: of this round.
        Shapes:
            returns: gamma, Omega (s, M) float64; the order of each sweep
        """
        blocks = self._hp["blocks"]
        draws = np.random.default_rng(seed_from("blocks", *seeds))
        gamma = 2 / blocks * (1 - draws.random((size, blocks)))
        omega = np.stack([draws.dirichlet(row) for row in gamma])
        orders = [draws.permutation(size).tolist() for _ in range(self._hp["sweeps"])]
        return torch.from_numpy(gamma), torch.from_numpy(omega), orders

    def _attend(self, models: Message, score: Tensor, kept: Tensor, ids: Sequence[int]) -> Tensor:
        """The graph by attention between updates since the first weights; then each client's step of phi, averaged."""
        hp, encoder = self._hp, self.encoder
        assert encoder is not None
        first = self.server.read([0], "first.", self.device)
        moved = {name: value - models[name] for name, value in first.items()}
        length = torch.stack([value.flatten(1).square().sum(1) for value in moved.values()]).sum(0).sqrt() + 1e-10
        updates = [value / length.view(-1, *[1] * (value.ndim - 1)) for value in moved.values()]
        target = score.masked_fill(~kept, -torch.inf).div(hp["scale"]).softmax(1)
        with torch.enable_grad():
            likeness = encoder(updates)
            log_p = (likeness.masked_fill(~kept.to(likeness.device), -torch.inf).softmax(1) + 1e-10).log()
            lost = -(target.to(log_p) * log_p).sum(1)  # of each client, for its own copy of phi
            rows = torch.eye(len(ids), device=lost.device).split(16)
            parameters = list(encoder.parameters())
            parts = [torch.autograd.grad(lost, parameters, r, True, is_grads_batched=True) for r in rows]
        grads = {name: torch.cat(p) for (name, _), p in zip(encoder.named_parameters(), zip(*parts), strict=True)}  # noqa: B905
        self._encoder_step(grads, ids)
        exact = {"authors_sums": hp["authors_sums"], "authors_pruned": hp["authors_pruned"]}
        return attention_graph(likeness.detach().to(score), score, kept, hp["scale"], **exact)

    def _encoder_step(self, grads: Message, ids: Sequence[int]) -> None:
        """AdamW of every client on its own gradient, each (s, ...), and the mean of what they come to."""
        assert self.encoder is not None
        step = self.states.read(ids, "steps.", self.device)["encoder"] + 1
        kept: Message = {"steps.encoder": step}
        rate, decay, (beta, gamma) = self._hp["encoder_lr"], 0.01, (0.9, 0.99)  # torch's default weight decay
        for name, p in self.encoder.named_parameters():
            times = step.view(-1, *[1] * p.ndim)
            mean, square = (
                self.states.read(ids, f"encoder.{moment}.{name}", self.device)[""] for moment in ("mean", "square")
            )
            mean = torch.lerp(grads[name], mean, beta)
            square = gamma * square + (1 - gamma) * grads[name].square()
            size = (square / (1 - gamma**times)).sqrt() + 1e-8
            moved = p.detach() * (1 - rate * decay) - rate * mean / (1 - beta**times) / size
            p.copy_(moved.mean(0))
            kept |= {f"encoder.mean.{name}": mean, f"encoder.square.{name}": square}
        self.states.write(ids, kept)

    def _prune(self, strength: Tensor, place: Tensor) -> None:
        """Keep the strongest neighbours, (s, s), of clients that have not chosen theirs; from the next round on."""
        if self.round.is_meta or self.done < self._hp["fix_graph_round"] or self.neighbours == len(self.kept):
            return
        best = place[strength.topk(min(self.neighbours, len(place))).indices.to(place.device)]
        chosen = torch.zeros_like(self.kept[place]).scatter(1, best, True)
        still = self.kept[place].all(1, keepdim=True)
        self.kept[place] = torch.where(still, chosen, self.kept[place])

    # ---- how well each does on the others' data -----------------------------------------------------------------

    @torch.no_grad()
    def cross_loss(self, models: Message, batch: dict[str, Any], kept: Tensor) -> Tensor:
        """Mean loss of each client's model on a few samples of each client's, in eval mode; inf where not kept.

        Ranks share the models. Where every client keeps as many, only those pairs are computed.

        Shapes:
            models: each (s, ...); kept: (s, s) bool; returns: (s, s)
        """
        image, label, mask = self.probes(batch)
        count, columns = len(image), None
        if not kept.is_meta:
            per_row = kept.sum(1)
            if int(per_row.max()) == int(per_row.min()) < count:
                columns = kept.nonzero()[:, 1].view(count, -1)
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self._trainer is not None else (1, 0)
        rows = list(range(rank, count, world))
        size = self.together(rows, {})
        training, found = self.model.training, []
        self.model.eval()
        for first in range(0, len(rows), size):
            chunk = torch.as_tensor(rows[first : first + size], device=self.device)
            which = None if columns is None else columns[chunk]
            own = {name: value[chunk] for name, value in models.items()}
            each = self._losses(own, image, label, which)  # (chunk, clients, b)
            told = mask.expand(len(chunk), *mask.shape) if which is None else mask[which]
            mean = (each * told).sum(2) / told.sum(2)
            if which is not None:
                mean = mean.new_full((len(chunk), count), torch.inf).scatter(1, which, mean)
            found.append(mean)
        self.model.train(training)
        return gather({"loss": torch.cat(found)}, count)["loss"].masked_fill(~kept, torch.inf)

    def _losses(self, models: Message, image: Tensor, label: Tensor, which: Tensor | None) -> Tensor:
        """Each model's loss on the samples of all clients, or of those in its row of ``which``: (m, clients, b)."""
        network = Bound(self.model, lambda model, x: self.logits(model, x))
        count, size = len(next(iter(models.values()))), image.shape[1]

        def one(weights: Message, x: Tensor, y: Tensor) -> Tensor:
            own = {f"network.{name}": value for name, value in weights.items()}
            found = functional_call(network, own, (x,))
            exact = found.to(torch.promote_types(found.dtype, torch.float32))
            return F.cross_entropy(exact, y, reduction="none")

        parts = []
        step = max(IMAGES // (count * size), 1)
        for first in range(0, len(image) if which is None else which.shape[1], step):
            if which is None:  # the same pictures for all models
                x, y, shared = image[first : first + step].flatten(0, 1), label[first : first + step].flatten(), None
            else:
                picked = which[:, first : first + step]
                x, y, shared = image[picked].flatten(1, 2), label[picked].flatten(1), 0
            if count > 1:
                parts.append(vmap(one, in_dims=(0, shared, shared))(models, x, y))
            else:
                alone = {name: value[0] for name, value in models.items()}
                parts.append(one(alone, x if shared is None else x[0], y if shared is None else y[0])[None])
        return torch.cat(parts, 1).unflatten(1, (-1, size))

    def probes(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """A few samples of each client that answered, with views as in training, drawn anew every round.

        Shapes:
            returns: image (s, b, c, h, w) normalised, label (s, b), mask (s, b) bool, False where a client has fewer
        """
        rows = [row for row, share in enumerate(batch["work"]) if share > 0]
        sizes, seeds = ([batch[key][row] for row in rows] for key in ("size", "seed"))
        index, mask, _ = local_batches(sizes, [seed_from(seed, "probe") for seed in seeds], self._hp["probe"], steps=1)
        starts = torch.tensor(batch["size"]).cumsum(0) - torch.tensor(batch["size"])
        place = (index[:, 0] + starts[rows][:, None]).to(batch["image"].device)
        generators = [torch.Generator().manual_seed(seed_from(seed, "probe views")) for seed in seeds]
        image = self.views(pixels(batch["image"][place]), generators)
        return self.normalise(image), batch["label"][place], mask[:, 0].to(self.device)

    # ---- what is counted and logged -----------------------------------------------------------------------------

    def bytes_up(self, up: Message) -> int:
        """Bytes that clients sent to each other in this round: trained models to be tried, updates, the encoder."""
        return self._traffic

    def bytes_down(self, down: Message, clients: Sequence[int]) -> int:
        """The same bytes, as they were received."""
        return self._traffic

    def fellows(self) -> Tensor:
        """Which clients have the same classes, (K, K) bool, False on the diagonal; none before training."""
        classes = self.states.read(range(self._hp["num_clients"]), "own.")["classes"]
        alike = (classes[:, None] == classes).all(2) & classes.any(1)[:, None]
        return alike & ~torch.eye(len(alike), dtype=torch.bool, device=alike.device)

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self._log_graph("val")

    def on_test_epoch_end(self) -> None:
        super().on_test_epoch_end()
        self._log_graph("test")

    def _log_graph(self, split: str) -> None:
        alike = self.fellows()
        others = self.cooperation - self.cooperation.diag().diag()
        if bool(alike.any()) and float(others.sum()) > 0:
            self.log(f"{split}/graph_share", others[alike].sum() / others.sum())


def _links(pairs: Tensor) -> int:
    """How many pairs of different clients there are in (s, s) bool; 0 on the meta device."""
    return 0 if pairs.is_meta else int(pairs.sum() - pairs.diagonal().sum())


# ---- groups of like clients, and a picture ---------------------------------------------------------------------------


def group_partition(
    labels: Tensor,
    groups: int = 5,
    clients_per_group: int = 20,
    per_class: int | None = None,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """Divide samples among groups of clients that share classes ("non-IID SBM"): each group has classes of its own.

    Classes go to groups in their order, as many to each, and a class's samples in equal parts to the group's clients.

    Args:
        labels: (n,) long. per_class: samples of each of its classes that a client gets; None = all there are.
        generator: draws which samples a client gets, and the clients' order; None keeps both.
    Returns:
        indices of each client's samples, groups * clients_per_group lists.
    Raises:
        ZooError: if classes or samples do not go round.
    """
    classes = int(labels.max()) + 1
    if groups < 1 or clients_per_group < 1 or classes % groups:
        raise ZooError(f"{classes} classes cannot be divided among {groups} groups of {clients_per_group} clients.")
    shares: list[list[Tensor]] = [[] for _ in range(groups * clients_per_group)]
    for label in range(classes):
        where = (labels == label).nonzero().flatten()
        if generator is not None:
            where = where[torch.randperm(len(where), generator=generator)]
        each = len(where) // clients_per_group
        if each < (per_class or 1):
            raise ZooError(f"Class {label} has {len(where)} samples: too few for {clients_per_group} clients a group.")
        first = label // (classes // groups) * clients_per_group
        for client in range(clients_per_group):
            last = client == clients_per_group - 1 and per_class is None  # takes what is left over
            shares[first + client].append(where[client * each :][: None if last else per_class or each])
    found = [torch.cat(parts).sort().values for parts in shares]
    if generator is None:
        return found
    return [found[i] for i in torch.randperm(len(found), generator=generator).tolist()]


def prepare_groups(
    folder: Path,
    seed: int,
    groups: int = 5,
    clients_per_group: int = 20,
    per_class: int | None = None,
    root: str | None = None,
    val: float = 0.1,
) -> None:
    """Write ``groups.json``, a partition file of `group_partition` for FederatedClassificationDataModule (same val)."""
    import json

    from zoo.vision.federated.data_federated import FederatedClassificationDataModule

    whole = {"clients": 1, "partition": "iid", "min_size": 1, "test": "none"}
    data = FederatedClassificationDataModule(root, seed=seed, val=val, **whole)  # type: ignore[arg-type]
    data.setup("fit")
    pool = data.shares[0]
    draws = torch.Generator().manual_seed(seed_from(seed, "groups"))
    shares = group_partition(data.labels[pool], groups, clients_per_group, per_class, draws)
    with atomic_write(folder / "groups.json") as part:
        part.write_text(json.dumps({"clients": [pool[share].tolist() for share in shares]}), encoding="utf-8")


def draw_graph(model: SCooL, path: str | Path, title: str = "") -> None:
    """Draw the graph as a picture, clients with the same classes side by side, and lines between them.

    Args:
        path: where to; the ending says the format.
    Raises:
        ZooError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ZooError("Drawing a graph needs matplotlib: pip install 'paper-zoo[plots]'.") from error

    clients = model.hyperparameters["num_clients"]
    classes = model.states.read(range(clients), "own.")["classes"].cpu()
    owned = [tuple(row.nonzero().flatten().tolist()) for row in classes]
    order = sorted(range(clients), key=lambda i: (owned[i], i))
    graph = model.cooperation.detach().cpu()[order][:, order]
    figure = Figure(figsize=(5.2, 4.4), layout="constrained")
    axis = figure.add_subplot()
    image = axis.imshow(graph.numpy(), cmap="Purples", vmin=0, interpolation="nearest")
    figure.colorbar(image, ax=axis, label="weight")
    kinds = [owned[i] for i in order]
    starts = [i for i in range(clients) if i == 0 or kinds[i] != kinds[i - 1]]
    if len(starts) <= clients // 2:
        for place in starts[1:]:
            axis.axhline(place - 0.5, color="0.6", linewidth=0.6)
            axis.axvline(place - 0.5, color="0.6", linewidth=0.6)
        names = [", ".join(map(str, kinds[i])) for i in starts]
        centres = [(a + b - 1) / 2 for a, b in zip(starts, [*starts[1:], clients], strict=True)]
        axis.set_xticks(centres, names)
        axis.set_yticks(centres, names)
        axis.set(xlabel="classes of the client that gives", ylabel="classes of the client that takes")
    else:
        axis.set(xlabel="client that gives", ylabel="client that takes")
    axis.set_title(title or f"round {int(model.round)}")
    figure.savefig(path, dpi=120)
