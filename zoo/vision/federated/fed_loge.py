"""FedLoGe: one generic and many personal models from clients whose classes are long-tailed.

Paper: Xiao et al., "FedLoGe: Joint Local and Generic Federated Learning under Long-tailed Data", ICLR 2024. Code by the
authors: https://github.com/ZackZikaiXiao/FedLoGe, no licence stated.

Stage 1, every step of a client on the features f of its pictures:

    L = CE(W f + b, y) + CE(G f', y) + CE(H_k f', y),   f' = f without gradient

The backbone learns through W alone, a sparse equiangular classifier (SSE-C) that is drawn and spread once and then
stands still: no frequent class can claim more of the feature space than a rare one. The auxiliary head G is averaged by
the server like the backbone; the head H_k never leaves client k. Stage 2 (GLA-FR) needs no training: the norms of G's
rows follow the class frequencies of all clients, those of H_k the client's own, so

    generic: g_c -> 1.7 g_c / ||g_c||          personal: h_kc + ||h_kc|| g_c,  never a class that the client lacks

which is a linear layer for each of them.

Index legend: b pictures, d features, k classes, s clients.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

from zoo.core import ZooError, unwrap
from zoo.engines.federated import Clients, FederatedModule, Message, Samples, masked_mean
from zoo.nn.classifiers import classifier

__all__ = ["FedLoGe", "FederatedModule", "equiangular", "shots", "sparse", "spread"]

# ---- the classifier that stands still -------------------------------------------------------------------------------


def equiangular(features: int, classes: int) -> Tensor:
    """A random simplex equiangular tight frame: columns of norm 1, any two at the cosine -1 / (k - 1).

        M = sqrt(k / (k - 1)) P (I - 1 1ᵀ / k),   PᵀP = I

    Shapes:
        returns: (d, k)
    Raises:
        ValueError: if there are more classes than features, or fewer than two.
    """
    if not 2 <= classes <= features:
        raise ValueError(
            f"{classes} classes with {features} features: an equiangular frame needs 2 <= classes <= features."
        )
    basis = torch.linalg.qr(torch.rand(features, classes)).Q
    return math.sqrt(classes / (classes - 1)) * (basis - basis.mean(1, keepdim=True))


def sparse(matrix: Tensor, share: float) -> Tensor:
    """The matrix with a random share of its entries set to 0, no column of them whole.

    Raises:
        ValueError: if the share is not in [0, 1), or leaves fewer entries than columns.
    """
    gone = int(share * matrix.numel())
    if not 0 <= share < 1 or matrix.numel() - gone < matrix.shape[1]:
        raise ValueError(
            f"sparsity is {share}; in [0, 1), and low enough to leave each class some of {len(matrix)} features."
        )
    for _ in range(100):
        keep = torch.ones(matrix.numel())
        keep[torch.randperm(matrix.numel())[:gone]] = 0
        found = matrix * keep.view_as(matrix)
        if found.is_meta or bool(found.any(0).all()):
            return found
    raise ValueError(f"sparsity {share} left some class none of {len(matrix)} features in 100 draws; lower it.")


@torch.no_grad()
def spread(matrix: Tensor, norm: float = 0.1, lr: float = 1e-4, steps: int = 10000) -> Tensor:
    """Turn the columns apart, each by the entries it has, and give them one length.

    Adam on sum_c (||m_c|| - norm)² - mean_c arccos(max_{c' ≠ c} cos(m_c, m_c')): what pushes is the angle of each
    column to its nearest. Entries that are 0 stay 0. The gradient is written out, which is faster.

    Shapes:
        matrix: (d, k); returns: (d, k)
    """
    if matrix.is_meta:
        return matrix
    m = matrix.T.clone(memory_format=torch.contiguous_format)  # a class a row: what is summed lies side by side
    keep, k = (m != 0).to(m), len(m)
    optimizer = torch.optim.Adam([m], lr=lr, fused=True)
    with torch.autocast(m.device.type, enabled=False):
        for _ in range(steps):
            length = m.norm(dim=1, keepdim=True)
            unit = m / length
            nearest, which = (unit @ unit.T).fill_diagonal_(-1.0).max(1)
            # d arccos(a) / da = -1 / sqrt(1 - a²), and none where the authors clip a
            push = torch.where(nearest.abs() <= 0.99999, (1 - nearest**2).clamp_min(1e-12).rsqrt(), 0.0)[:, None] / k
            pull = unit[which] * push
            pull.index_add_(0, which, unit * push)
            radial = 2 * (length - norm) - (unit * pull).sum(1, keepdim=True) / length
            m.grad = pull.div_(length).addcmul_(unit, radial).mul_(keep)
            optimizer.step()
    return m.T.contiguous()


# ---- figures by how frequent a class is -----------------------------------------------------------------------------


def shots(counts: Tensor, head: float = 0.75, middle: float = 0.95) -> Tensor:
    """Which classes are frequent, which rare: 0 for those that begin the first 75 % of all samples, 1 up to 95 %, 2.

    Classes are sorted by count, equal ones by number; a class belongs where the samples before it end.

    Shapes:
        counts: (k,); returns: (k,) long
    """
    order = counts.sort(descending=True, stable=True).indices
    sizes = counts[order].double()
    before = (sizes.cumsum(0) - sizes) / sizes.sum()
    group = (before >= head).long() + (before >= middle).long()
    return torch.empty_like(order).scatter_(0, order, group)


class ClassHits(Metric):
    """Right answers by class, summed over batches and processes."""

    full_state_update = False
    correct: Tensor
    total: Tensor

    def __init__(self, classes: int):
        super().__init__()
        self.add_state("correct", torch.zeros(classes, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(classes, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, found: Tensor, label: Tensor) -> None:
        classes = torch.arange(len(self.total), device=label.device)
        own = label[:, None] == classes
        self.total += own.sum(0)
        self.correct += (own & (found == label)[:, None]).sum(0)

    def compute(self) -> Tensor:
        """Right answers and samples of each class, (2, k)."""
        return torch.stack([self.correct, self.total])


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's coefficient of two vectors; equal values share their mean rank."""

    def ranks(x: Tensor) -> Tensor:
        return (x[:, None] > x).double().sum(1) + 0.5 * (x[:, None] == x).double().sum(1)

    return torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1].float()


# ---- the method -----------------------------------------------------------------------------------------------------


class Branches(nn.Module):
    """A backbone and heads on its features: ``generic`` (averaged), ``local`` (a client's), ``head`` (if learned)."""

    def __init__(self, net: nn.Sequential, static: bool):
        super().__init__()
        last: Any = net[-1]
        self.backbone = net[:-1]
        self.generic = nn.Linear(last.in_features, last.out_features)
        self.local = nn.Linear(last.in_features, last.out_features)
        self.head = None if static else last

    def forward(self, image: Tensor) -> Tensor:
        """Features: (b, c, h, w) -> (b, d)."""
        return self.backbone(image)


class FedLoGe(FederatedModule):
    """A backbone shaped by a fixed sparse equiangular classifier, a generic model and one for each client.

    A training step is a round. Without a client, the forward pass is the generic model's; with one it is that client's.
    A client that never took part gets the generic model. ``static=False, universal=True, personalise=False`` is FedAvg.

    Logged beside accuracies: "test/head", "test/middle" and "test/tail", the generic model's accuracy on classes by how
    frequent they are among the clients' samples, and "test/norm_rank", Spearman's correlation of the norms of the
    auxiliary head's rows with these frequencies. Both are for scoring: no client's counts are sent.

    Args:
        static: whether the backbone learns through the fixed classifier; False: through an ordinary one, learned and
            averaged with it.
        realign: stage 2; False leaves the norms as they were trained.
        universal: without a client, answer by the classifier that the backbone learned through, not by the auxiliary
            head: for test data of any distribution.
        personalise: whether clients have a model of their own; False: the generic one.
        sparsity: share of the fixed classifier's entries that are 0. etf_norm: length of its rows.
        etf_lr: of Adam, which turns its rows apart. etf_steps: how many steps that takes, before the first round.
        equal_norm: length of the realigned generic head's rows; matters only against its bias.
        present_from: training samples that a client must have of a class for its model to name it. The authors go by
            the labels it will be tested on instead, which a client does not know (in their split: 2 where there are one
            to two times as many training as test samples, as in CIFAR-10-LT; 1 where there are fewer).
    Example:
        >>> import torch
        >>> from zoo.vision import FedLoGe
        >>> model = FedLoGe.from_variant("tiny", num_classes=4, num_clients=3)
        >>> model.predict(torch.rand(2, 3, 32, 32), client=1).shape
        torch.Size([2, 4])
    """

    monitor, mode = "val/accuracy", "max"
    head: ClassVar[tuple[str, ...]] = (
        "model.generic", "model.local", "model.head", "sse_", "states.personal__local", "states.counts",
    )  # fmt: skip
    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar100": {
            "net": "resnet34",
            "num_classes": 100,
            "num_clients": 20,
            "mean": [0.5071, 0.4865, 0.4409],
            "std": [0.2673, 0.2564, 0.2762],
        },
        "tiny": {
            "net": {"name": "cnn", "widths": [8, 16], "features": 32},
            "norm": "none",
            "num_clients": 10,
            "local_epochs": 1,
            "local_batch": 32,
            "augment": [],
            "mean": [],
            "std": [],
            "etf_norm": 1.0,
            "etf_lr": 1e-3,
            "etf_steps": 100,
        },
    }

    def __init__(
        self,
        net: str | dict[str, Any] = "resnet18",
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
        num_clients: int = 40,
        static: bool = True,
        realign: bool = True,
        universal: bool = False,
        personalise: bool = True,
        sparsity: float = 0.6,
        etf_norm: float = 0.1,
        etf_lr: float = 1e-4,
        etf_steps: int = 10000,
        equal_norm: float = 1.7,
        present_from: int = 1,
        lr: float = 0.03,
        momentum: float = 0.5,
        weight_decay: float = 0.0,
        lr_decay: float = 1.0,
        local_epochs: int = 5,
        local_steps: int | None = None,
        local_batch: int = 8,
        drop_last: bool = False,
        norm: str = "batch",
        augment: list[str] = ["crop:4", "flip"],  # noqa: B006 (read only; the command knows no tuple)
        mean: list[float] = [0.485, 0.456, 0.406],  # noqa: B006
        std: list[float] = [0.229, 0.224, 0.225],  # noqa: B006
        stack: int | None = None,
        state_on_disk: bool = False,
    ):
        super(FederatedModule, self).__init__()
        self.save_hyperparameters()
        if etf_norm <= 0 or etf_lr <= 0 or equal_norm <= 0:
            raise ValueError(f"etf_norm={etf_norm}, etf_lr={etf_lr}, equal_norm={equal_norm}: all must be above 0.")
        if etf_steps < 0 or present_from < 1:
            raise ValueError(f"etf_steps is {etf_steps}, present_from is {present_from}; at least 0 and 1.")
        self._setup()
        self.states.add("counts", torch.zeros(num_classes))
        features = self.model.generic.in_features
        if static:
            self.register_buffer("sse_weight", sparse(equiangular(features, num_classes), sparsity).T.contiguous())
            bound = 1 / math.sqrt(features)  # the authors' bias is that of an untrained linear layer
            self.register_buffer("sse_bias", torch.empty(num_classes).uniform_(-bound, bound))
            self.register_buffer("sse_ready", torch.zeros((), dtype=torch.bool))
        self.hits = ClassHits(num_classes)

    def build(self) -> nn.Module:
        hp = self._hp
        sizes = {key: hp[key] for key in ("num_classes", "in_channels", "image_size", "norm")}
        return Branches(classifier(hp["net"], **sizes), hp["static"])

    @property
    def _shared(self) -> set[str]:
        return {name for name in super()._shared if not name.startswith("local.")}

    # ---- stage 1 ------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.prepare_classifier()
        super().training_step(batch, batch_idx)

    def prepare_classifier(self) -> None:
        """Turn the rows of the fixed classifier apart, once; the first round does it."""
        hp = self.hparams
        if hp.static and not self.sse_ready.is_meta and not bool(self.sse_ready):
            found = spread(self.sse_weight.T, hp.etf_norm, hp.etf_lr, hp.etf_steps)
            self.sse_weight.copy_(found.T)
            self.sse_ready.fill_(True)

    def through(self, model: nn.Module, features: Tensor) -> Tensor:
        """Scores by the classifier that the backbone learns through: (b, d) -> (b, k)."""
        if model.head is not None:
            return model.head(features)
        return F.linear(features, self.sse_weight.to(features.device), self.sse_bias.to(features.device))

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The three losses: each reaches its own parameters only, so that one step is the authors' three.

        Shapes:
            batch: "image" (b, c, h, w) in [0, 1]; "label", "mask" (b,)
        """
        f = model(self.normalise(batch["image"]))
        still = f.detach()
        scores = {"backbone": self.through(model, f), "generic": model.generic(still), "local": model.local(still)}
        each = {
            name: masked_mean(F.cross_entropy(z, batch["label"], reduction="none"), batch["mask"])
            for name, z in scores.items()
        }
        return {"loss": each["backbone"] + each["generic"] + each["local"], **each}

    def upload(self, clients: Clients, samples: Samples, down: Message) -> tuple[Message, Message]:
        up, kept = super().upload(clients, samples, down)
        classes = torch.arange(self.hparams.num_classes, device=self.device)
        own = [samples.own("label", i) for i in range(len(samples.ids))]
        return up, kept | {"counts": torch.stack([(y[:, None] == classes).sum(0).float() for y in own])}

    # ---- stage 2 ------------------------------------------------------------------------------------------------

    def generic_head(self, head: nn.Linear) -> tuple[Tensor, Tensor]:
        """The auxiliary head with rows of one length: weight (k, d) and bias (k,)."""
        if not self.hparams.realign:
            return head.weight, head.bias
        return head.weight * (self.hparams.equal_norm / head.weight.norm(dim=1, keepdim=True)), head.bias

    def personal_head(self, generic: nn.Linear, weight: Tensor, bias: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """A client's model as one linear layer: weight (k, d), bias (k,), -inf for classes that it lacks.

            (h_c + ||h_c|| g_c) f + h_c0 + g_c0

        Shapes:
            weight, bias: (k, d), (k,) of its own head; counts: (k,) its training samples of each class, all 0 where it
            never took part: it gets the generic head.
        """
        length = weight.norm(dim=1, keepdim=True) if self.hparams.realign else 1.0
        weight, bias = weight + length * generic.weight, bias + generic.bias
        present = counts >= self.hparams.present_from
        present = present | ~present.any()
        weight, bias = weight * present[:, None], bias.masked_fill(~present, -math.inf)
        known, (other_weight, other_bias) = counts.sum() > 0, self.generic_head(generic)
        return torch.where(known, weight, other_weight), torch.where(known, bias, other_bias)

    def logits(self, model: nn.Module, image: Tensor, client: int = -1) -> Tensor:
        f = model(image)
        if client >= 0 and self.hparams.personalise:
            counts = self.states.read([client], "counts", f.device)[""][0]
            return F.linear(f, *self.personal_head(model.generic, model.local.weight, model.local.bias, counts))
        return self.through(model, f) if self.hparams.universal else F.linear(f, *self.generic_head(model.generic))

    @torch.no_grad()
    def realign(self) -> dict[int, tuple[Tensor, Tensor]]:
        """All linear layers of stage 2, weight (k, d) and bias (k,): the generic model's at -1, and each client's.

        Together with ``model.backbone`` they are the trained models, to take elsewhere.
        """
        found = {-1: self.generic_head(self.model.generic)}
        heads = self.states.read(range(self.states.clients), "personal.local.", self.device)
        counts = self.states.read(range(self.states.clients), "counts", self.device)[""]
        for client, own in enumerate(zip(heads["weight"], heads["bias"], counts, strict=True)):
            found[client] = self.personal_head(self.model.generic, *own)
        return found

    # ---- scoring ------------------------------------------------------------------------------------------------

    def score(self, split: str, client: int, image: Tensor, label: Tensor, number: int) -> Tensor:
        logits = super().score(split, client, image, label, number)
        if client < 0:
            self.hits.update(logits.argmax(-1), label)
        return logits

    def _log_accuracy(self, split: str) -> None:
        super()._log_accuracy(split)
        counts = self.states.read(range(self.states.clients), "counts", self.device)[""].sum(0)
        hits: Any = self.hits
        if bool(counts.any()):
            correct, total = hits.compute()
            for number, name in enumerate(("head", "middle", "tail")):
                own = shots(counts) == number
                if bool(total[own].sum() > 0):
                    self.log(f"{split}/{name}", (correct[own].sum() / total[own].sum()).float())
            self.log(f"{split}/norm_rank", rank_correlation(self.model.generic.weight.norm(dim=1), counts))
        hits.reset()

    # ---- the authors' files -------------------------------------------------------------------------------------

    @classmethod
    def convert_state_dict(cls, content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """From the authors' parts, modules or their state dicts, under the names that their script saves them by.

        Args:
            content: ``{"model": ..., "g_head": ..., "g_aux": ..., "l_head_0": ..., "l_head_1": ..., ...}``. They save
                each as a pickle of its own: load those where you trust them, and pack their state dicts into one.
        Returns:
            the hyperparameters, and the weights. The clients' class counts are not in the files: "states.counts"
            (clients, k) says 1 of each, so that personal models leave out no class until it is filled in.
        Raises:
            ZooError: if a part is missing or of no shape that this method knows.
        """
        parts = {k: v.state_dict() if isinstance(v, nn.Module) else v for k, v in content.items()}
        missing = [key for key in ("model", "g_head", "g_aux", "l_head_0") if key not in parts]
        if missing:
            raise ZooError(
                f"No {missing[0]!r} among {', '.join(list(parts)[:5])}; expected model, g_head, g_aux, l_head_0, ..."
            )
        net = unwrap(parts["model"])
        blocks = tuple(len({k.split(".")[1] for k in net if k.startswith(f"layer{i}.")}) for i in (1, 2, 3, 4))
        wide = any(".conv3." in key for key in net)
        depth = {((2, 2, 2, 2), False): 18, ((3, 4, 6, 3), False): 34, ((3, 4, 6, 3), True): 50}.get((blocks, wide))
        if depth is None:
            raise ZooError(f"A network of {blocks} blocks is none of the authors' ResNets (18, 34, 50).")
        state = {}
        for key, value in net.items():
            if not key.startswith(("linear.", "projection.")):  # theirs lie idle: the heads stand beside the network
                name = key.replace("conv1.", "stem.0.").replace("bn1.", "stem.1.") if key.count(".") == 1 else key
                state[f"model.backbone.{name.replace('.bn', '.norm')}"] = value
        state |= {f"sse_{name}": parts["g_head"][name] for name in ("weight", "bias")}
        state["sse_ready"] = torch.ones((), dtype=torch.bool)
        state |= {f"model.generic.{name}": parts["g_aux"][name] for name in ("weight", "bias")}
        clients = sum(key.startswith("l_head_") for key in parts)
        for name in ("weight", "bias"):
            heads = [parts[f"l_head_{i}"][name] for i in range(clients)]
            state[f"states.personal__local__{name}"] = torch.stack(heads)
            state[f"model.local.{name}"] = heads[0]
        classes = len(parts["g_aux"]["bias"])
        stem = net["conv1.weight"]
        hyperparameters = {"net": f"resnet{depth}", "num_classes": classes, "in_channels": stem.shape[1]}
        state |= {"states.counts": torch.ones(clients, classes)}
        state |= {"round": torch.zeros((), dtype=torch.long), "sent": torch.zeros(2, dtype=torch.float64)}
        return {**hyperparameters, "num_clients": clients}, {k: v.detach() for k, v in state.items()}
