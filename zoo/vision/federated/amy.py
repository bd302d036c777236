"""AMY: facial expressions with doubtful labels, learned by clients that each judge their own labels.

Paper: Ding et al., "Uncertainty-Aware Label Refinement on Hypergraphs for Personalized Federated Facial Expression
Recognition", IEEE TCSVT 2025, arXiv:2501.01816. The authors' repository holds no code.

A reconstruction from the abstract and short descriptions. The paper's: a backbone, a block that estimates uncertainty
and one that classifies; hyperedges by nearest neighbours with Gaussian weights and convolutions on them; an estimator
that stays with its client; labels refined by propagation on the hypergraph; class prototypes that hold the global phase
together. All sizes, thresholds and loss weights, where gradients stop, and that the estimator sees a, the share of
neighbours with the same label, are ours: features alone do not say whether the label beside them is wrong.

On a local batch with features x, given labels y and scores z:

    e_i = {i and its k nearest},  w_i = mean over e_i of exp(-||x_i - x_j||² / σ²)          the hypergraph
    G = D_v^-1/2 H W D_e^-1 Hᵀ D_v^-1/2
    s = q_k(G relu(G x Θ1) Θ2, a) in (0, 1),  a_i = Σ G_ij [y_j = y_i] / Σ G_ij, j ≠ i      how certain a label is
    F = (1 - α) (I - α G)^-1 (s onehot(y) + (1 - s) softmax(z))                             what its neighbours say
    y' = F where s is among the lowest 30 % and max F - F_y > 0.2, else onehot(y)           the refined label
    L = mean CE(s z, y) + λ mean CE(z, y') + 0.5 max(0, 0.15 - (s_top - s_low)) + μ mean ||x - P_y'||²

The picture of a face alone is enough to predict: backbone and classifier.

Index legend: b pictures, d features, k classes (in shapes) or neighbours (in formulas), s clients.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

from zoo.engines.federated import Clients, FederatedModule, Message, Samples, full_precision, masked_mean
from zoo.nn.classifiers import classifier

__all__ = ["AMY", "FederatedModule", "agreement", "hypergraph", "pairwise_graph", "propagate", "rank_gap", "uncertain"]

SHOWN = ("backbone.", "classifier.")
"""What predicts: the rest of the network only helps to train it."""

# ---- graphs on a batch ----------------------------------------------------------------------------------------------


def neighbours(x: Tensor, mask: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Who is among whose ``k`` nearest, and how alike two samples are: exp(-||x_i - x_j||² / σ²).

    σ is the mean distance of two samples of the batch. Where there are fewer than k others, all are neighbours.

    Shapes:
        x: (b, d); mask: (b,) bool, False where the batch is padded
        returns: near (b, b) bool, row i the neighbours of i without i itself; alike (b, b) in [0, 1], 0 where padded
    """
    both = mask[:, None] & mask[None, :]
    itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
    others = both & ~itself
    length = x.square().sum(1)
    square = (length[:, None] + length[None, :] - 2 * x @ x.T).clamp_min(0).masked_fill(itself, 0)
    sigma = masked_mean(square.sqrt().flatten(), others.flatten()).clamp_min(1e-6)
    alike = (-square / sigma**2).exp() * both
    far = square.masked_fill(~others, torch.inf)
    order = far.topk(min(k, len(x) - 1), dim=1, largest=False).indices
    near = (order[:, :, None] == torch.arange(len(x), device=x.device)).any(1)
    return near & others, alike


def hypergraph(x: Tensor, mask: Tensor, k: int) -> Tensor:
    """G = D_v^-1/2 H W D_e^-1 Hᵀ D_v^-1/2: hyperedge i holds sample i and its k nearest.

    Its weight is the mean likeness of i to its members. Eigenvalues lie in [0, 1].

    Shapes:
        x: (b, d); mask: (b,) bool; returns: (b, b), rows and columns of padded samples 0
    """
    near, alike = neighbours(x, mask, k)
    itself = torch.eye(len(x), dtype=torch.bool, device=x.device) & mask
    member = (near | itself).to(x)  # (edge, vertex): Hᵀ
    size = member.sum(1).clamp_min(1)
    weight = (member * alike).sum(1) / size
    degree = (member * weight[:, None]).sum(0)
    scale = torch.where(degree > 0, degree.clamp_min(1e-12).rsqrt(), 0.0)
    half = member * (weight / size).sqrt()[:, None] * scale
    return half.T @ half


def pairwise_graph(x: Tensor, mask: Tensor, k: int) -> Tensor:
    """G = D^-1/2 (A + I) D^-1/2 with A_ij the likeness where i is among j's k nearest, or j among i's.

    Shapes:
        as of `hypergraph`
    """
    near, alike = neighbours(x, mask, k)
    itself = torch.eye(len(x), dtype=torch.bool, device=x.device) & mask
    a = alike * (near | near.T | itself)
    degree = a.sum(1)
    scale = torch.where(degree > 0, degree.clamp_min(1e-12).rsqrt(), 0.0)
    return scale[:, None] * a * scale


GRAPHS = {"hyper": hypergraph, "knn": pairwise_graph}


def propagate(graph: Tensor, start: Tensor, alpha: float) -> Tensor:
    """F = (1 - α) (I - α G)^-1 Y, its rows scaled to sum 1: what a sample and its surroundings say.

    Shapes:
        graph: (b, b); start: (b, k), not negative; returns: (b, k)
    """
    identity = torch.eye(len(graph), device=graph.device, dtype=graph.dtype)
    found = (1 - alpha) * torch.linalg.solve(identity - alpha * graph, start)
    return found / found.sum(1, keepdim=True).clamp_min(1e-12)


def agreement(graph: Tensor, given: Tensor) -> Tensor:
    """a_i = Σ G_ij [y_j = y_i] / Σ G_ij over j ≠ i, in [0, 1]: the share of neighbours that bear the same label.

    Shapes:
        graph: (b, b); given: (b, k), one-hot; returns: (b,), 0 where there are no neighbours
    """
    others = graph * (1 - torch.eye(len(graph), device=graph.device, dtype=graph.dtype))
    return ((others @ given) * given).sum(1) / others.sum(1).clamp_min(1e-12)


def uncertain(s: Tensor, mask: Tensor, top: float = 0.7) -> Tensor:
    """What is not padded and not among the largest ``top`` share: (b,), (b,) -> (b,) bool."""
    place = s.masked_fill(~mask, -torch.inf).argsort(descending=True).argsort()
    return mask & (place >= top * mask.sum())


def rank_gap(s: Tensor, mask: Tensor, top: float = 0.7) -> Tensor:
    """Mean of the largest ``top`` share of what is not padded, less the mean of the rest: (b,), (b,) -> ()."""
    low = uncertain(s.detach(), mask, top)
    return masked_mean(s, mask & ~low) - masked_mean(s, low)


# ---- the network ----------------------------------------------------------------------------------------------------


class FERNet(nn.Module):
    """Backbone, classifier, two layers on the graph, and the estimator that stays with its client."""

    prototype: Tensor
    seen: Tensor

    def __init__(self, net: nn.Sequential, widths: list[int], estimator: int, agreement: bool):
        super().__init__()
        last: Any = net[-1]
        d, classes = last.in_features, last.out_features
        self.backbone, self.classifier = net[:-1], last
        self.theta1 = nn.Linear(d, widths[0], bias=False)
        self.theta2 = nn.Linear(widths[0], widths[1], bias=False)
        self.estimator = nn.Sequential(nn.Linear(widths[1] + agreement, estimator), nn.ReLU(), nn.Linear(estimator, 1))
        self.register_buffer("prototype", torch.zeros(classes, d))
        self.register_buffer("seen", torch.zeros(classes))

    def certainty(self, graph: Tensor, x: Tensor, agreement: Tensor | None = None) -> Tensor:
        """s in (0, 1): (b, b), (b, d), (b,) -> (b,)."""
        u = graph @ self.theta2(F.relu(graph @ self.theta1(x)))
        if agreement is not None:
            u = torch.cat([u, agreement[:, None]], 1)
        return self.estimator(u).squeeze(-1).sigmoid()

    def forward(self, image: Tensor) -> Tensor:
        """Scores: (b, c, h, w) -> (b, k)."""
        return self.classifier(self.backbone(image))


class Detection(Metric):
    """How well wrong labels are found (AUROC of 1 - s), and how many of them are put right; summed over processes.

    Certainties are counted in 512 steps of (0, 1).
    """

    full_state_update = False
    counts: Tensor
    refined: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(2, 512, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("refined", torch.zeros(4, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, s: Tensor, given: Tensor, refined: Tensor, clean: Tensor, mask: Tensor) -> None:
        """Shapes: all alike."""
        wrong = given != clean
        step = ((1 - s) * 512).long().clamp(0, 511)
        for kind, own in enumerate((mask & ~wrong, mask & wrong)):
            self.counts[kind] += torch.bincount(step[own], minlength=512)
        right = refined == clean
        parts = (mask & wrong & right, mask & wrong, mask & ~wrong & ~right, mask & ~wrong)
        self.refined += torch.stack([part.sum() for part in parts])

    def compute(self) -> dict[str, Tensor]:
        """ "auroc"; "corrected", share of wrong labels put right; "spoiled", share of right ones made wrong."""
        right, wrong = self.counts
        total = right.sum() * wrong.sum()
        if not total > 0:
            return {}
        below = right.cumsum(0) - right
        corrected, spoiled = self.refined[0] / self.refined[1], self.refined[2] / self.refined[3]
        auroc = (wrong * (below + right / 2)).sum() / total
        return {"auroc": auroc.float(), "corrected": corrected.float(), "spoiled": spoiled.float()}


# ---- the method -----------------------------------------------------------------------------------------------------


class AMY(FederatedModule):
    """Personalised federated learning from doubtful labels, which a hypergraph over each batch judges and refines.

    A training step is a round. A client's model is the global one after its last local training; its estimator never
    leaves it. Up come weights, and for each class the sum of certainty times features, down go weights and prototypes.
    With ``uncertainty``, ``propagation`` and ``prototypes`` off it is FedAvg with local fine-tuning.

    Where training batches hold "clean", the labels before noise, "train/auroc" (finding wrong labels by 1 - s),
    "train/corrected" and "train/spoiled" are logged, of the round's clients after their training; nothing learns from
    them. "test/client_<i>" is a client's accuracy by its own model.

    Args:
        graph: "hyper", or "knn" for ordinary edges between the same neighbours.
        neighbours: k, in a batch. propagate_alpha: α in [0, 1), how far labels go on the graph.
        graph_widths: of the two layers on the graph. estimator_width: hidden units of a client's estimator.
        weighting: what certainty multiplies: a sample's "logits", or its "loss", divided by the batch's mean certainty.
            The second is smallest where a few easy samples have all the weight, and does collapse so.
        label_agreement: let the estimator see how many neighbours bear a sample's label; False: features alone.
        uncertainty: weigh samples by how certain they are; False: all alike, and any label may be refined.
        propagation: learn from refined labels too.
        prototypes: draw features to the global prototype of their refined class.
        prototype_weight: of that, μ. rank_weight: of the gap between certain and uncertain samples.
        rank_margin: how large that gap shall be. rank_top: share of the certain ones, whose labels are kept.
        refine_margin: how much more another class must have, on the graph, for a label to be refined.
        ramp_rounds: rounds over which the weight λ of refined labels rises from 0 to 1.
        warm_share: share of a client's steps in a round before refined labels come in.
    Example:
        >>> import torch
        >>> from zoo.vision import AMY
        >>> model = AMY.from_variant("tiny", image_size=16)
        >>> model.predict(torch.rand(2, 3, 16, 16), client=1).shape
        torch.Size([2, 7])
    """

    monitor, mode = "val/personal_accuracy", "max"
    padded: ClassVar[tuple[str, ...]] = ()
    head: ClassVar[tuple[str, ...]] = (
        "model.classifier", "model.prototype", "model.seen", "states.own__classifier",
    )  # fmt: skip
    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {
            "net": {"name": "cnn", "widths": [8, 16], "features": 32},
            "norm": "none",
            "image_size": 32,
            "graph_widths": [16, 16],
            "estimator_width": 8,
            "local_epochs": 1,
            "local_batch": 32,
            "augment": [],
        },
        "ferplus": {"num_classes": 8, "in_channels": 1, "image_size": 48},
    }

    def __init__(
        self,
        net: str | dict[str, Any] = {"name": "resnet18", "width": 32},  # noqa: B006 (read only)
        num_classes: int = 7,
        in_channels: int = 3,
        image_size: int = 100,
        num_clients: int = 10,
        graph: str = "hyper",
        neighbours: int = 5,
        propagate_alpha: float = 0.8,
        graph_widths: list[int] = [256, 128],  # noqa: B006
        estimator_width: int = 64,
        weighting: str = "logits",
        label_agreement: bool = True,
        uncertainty: bool = True,
        propagation: bool = True,
        prototypes: bool = True,
        prototype_weight: float = 0.1,
        rank_weight: float = 0.5,
        rank_margin: float = 0.15,
        rank_top: float = 0.7,
        refine_margin: float = 0.2,
        ramp_rounds: int = 20,
        warm_share: float = 0.2,
        lr: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        lr_decay: float = 1.0,
        local_epochs: int = 5,
        local_steps: int | None = None,
        local_batch: int = 64,
        drop_last: bool = False,
        norm: str = "batch",
        augment: list[str] = ["crop:4", "flip"],  # noqa: B006
        mean: list[float] = [],  # noqa: B006
        std: list[float] = [],  # noqa: B006
        stack: int | None = None,
        state_on_disk: bool = False,
    ):
        super(FederatedModule, self).__init__()
        self.save_hyperparameters()
        if graph not in GRAPHS:
            raise ValueError(f"graph is {graph!r}; 'hyper' or 'knn'.")
        if weighting not in ("logits", "loss"):
            raise ValueError(f"weighting is {weighting!r}; 'logits' or 'loss'.")
        if not 1 <= neighbours < local_batch:
            raise ValueError(f"neighbours is {neighbours}; from 1 to {local_batch - 1}, below local_batch.")
        if not 0 <= propagate_alpha < 1:
            raise ValueError(f"propagate_alpha is {propagate_alpha}; in [0, 1).")
        if len(graph_widths) != 2 or min(*graph_widths, estimator_width) < 1:
            raise ValueError(f"graph_widths={graph_widths}, estimator_width={estimator_width}: two widths and one.")
        for key in ("rank_top", "refine_margin", "warm_share"):
            if not 0 <= self.hyperparameters[key] <= 1:
                raise ValueError(f"{key} is {self.hyperparameters[key]}; in [0, 1].")
        for key in ("prototype_weight", "rank_weight", "rank_margin", "ramp_rounds"):
            if self.hyperparameters[key] < 0:
                raise ValueError(f"{key} is {self.hyperparameters[key]}; it must not be negative.")
        self._setup()
        for name, value in self.model.state_dict().items():
            if name.startswith(SHOWN):
                self.states.add(f"own.{name}", value)
        self.states.add("came", torch.zeros(()))
        self.detection = Detection()

    def build(self) -> nn.Module:
        hp = self._hp
        sizes = {key: hp[key] for key in ("num_classes", "in_channels", "image_size", "norm")}
        return FERNet(classifier(hp["net"], **sizes), hp["graph_widths"], hp["estimator_width"], hp["label_agreement"])

    @property
    def _shared(self) -> set[str]:
        return {name for name in super()._shared if not name.startswith("estimator.")}

    # ---- a client's work ----------------------------------------------------------------------------------------

    def ramp(self) -> float:
        """λ of this round: 0 in the first, 1 after ``ramp_rounds``."""
        return min(self.done / self.hparams.ramp_rounds, 1.0) if self.hparams.ramp_rounds else 1.0

    def local_batch(self, samples: Samples, step: int, count: int) -> dict[str, Tensor]:
        found = super().local_batch(samples, step, count)
        warm = torch.tensor(
            [step < self.hparams.warm_share * own for own in samples.counts[:count]], device=self.device
        )
        return found | {"refine": torch.where(warm, 0.0, self.ramp())}

    def judge(self, model: nn.Module, x: Tensor, z: Tensor, label: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """How certain each given label is, (b,), and the refined ones, (b, k), without gradient."""
        hp = self.hparams
        full = torch.promote_types(x.dtype, torch.float32)  # distances and a linear system: no half precision
        with full_precision(x):
            graph = GRAPHS[hp.graph](x.detach().to(full), mask, hp.neighbours)
        given = (label[:, None] == torch.arange(hp.num_classes, device=label.device)).to(graph)
        near = agreement(graph, given) if hp.label_agreement else None
        s = model.certainty(graph, x, near) if hp.uncertainty else torch.ones_like(x[:, 0])
        trust = s.detach()[:, None].to(full) if hp.uncertainty else 0.5
        with full_precision(x):
            start = trust * given + (1 - trust) * z.detach().to(full).softmax(-1)
            said = propagate(graph, start, hp.propagate_alpha)
        another = said.amax(1) - (said * given).sum(1) > hp.refine_margin
        if hp.uncertainty:
            another = another & uncertain(s.detach(), mask, hp.rank_top)
        return s, torch.where(another[:, None], said, given)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What one client minimises on one local batch.

        Shapes:
            batch: "image" (b, c, h, w) in [0, 1]; "label", "mask" (b,); "refine" (), λ at this step
        """
        hp, label, mask = self.hparams, batch["label"], batch["mask"]
        x = model.backbone(self.normalise(batch["image"]))
        z = model.classifier(x)
        each = F.cross_entropy(z, label, reduction="none")
        if not (hp.uncertainty or hp.propagation or hp.prototypes):
            return {"loss": masked_mean(each, mask)}
        s, refined = self.judge(model, x, z, label, mask)
        if hp.weighting == "logits":
            found = {"given": masked_mean(F.cross_entropy(s[:, None] * z, label, reduction="none"), mask)}
        else:
            found = {"given": masked_mean(s * each, mask) / masked_mean(s, mask).clamp_min(1e-6)}
        loss = found["given"]
        if hp.propagation:
            found["refined"] = masked_mean(-(refined * z.log_softmax(-1)).sum(1), mask)
            loss = loss + batch["refine"] * found["refined"]
        if hp.uncertainty:
            found["rank"] = F.relu(hp.rank_margin - rank_gap(s, mask, hp.rank_top))
            loss = loss + hp.rank_weight * found["rank"]
        if hp.prototypes:
            chosen = (refined == refined.amax(1, keepdim=True)).to(x)
            chosen = chosen / chosen.sum(1, keepdim=True)
            known = chosen @ (model.seen > 0).to(x)
            away = (x - chosen @ model.prototype).square().sum(1)
            found["prototype"] = masked_mean(known * away, mask)
            loss = loss + hp.prototype_weight * found["prototype"]
        return {"loss": loss, **found}

    def survey(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a client tells about its classes: Σ s x and Σ s over the samples whose refined label is the class."""
        x = model.backbone(self.normalise(batch["image"]))
        s, refined = self.judge(model, x, model.classifier(x), batch["label"], batch["mask"])
        best = refined.argmax(1)
        classes = torch.arange(self.hparams.num_classes, device=x.device)
        weight = (best[:, None] == classes).to(x) * (s * batch["mask"])[:, None]
        return {"sum": weight.T @ x, "weight": weight.sum(0), "certainty": s, "best": best}

    def work(self, clients: Clients, samples: Samples, down: Message) -> dict[str, Tensor]:
        logs = self.train_clients(clients, samples)
        self._told = self._survey(clients, samples) if self.hparams.prototypes or "clean" in samples.batch else {}
        return logs

    @torch.no_grad()
    def _survey(self, clients: Clients, samples: Samples) -> Message:
        """One pass over each client's samples with its trained weights: class sums, each (s, ...)."""
        watcher = Clients(
            clients.model, {n: v.clone() for n, v in clients.state.items()}, self.local_optimizer, clients.stacked
        )
        size, counts = (
            self._hp["local_batch"],
            [samples.spans[i][1] - samples.spans[i][0] for i in range(len(samples.ids))],
        )
        told: Message = {}
        for step, (count, batch) in enumerate(samples.again()):
            passing = [step < max(n // size if self._hp["drop_last"] else -(-n // size), 1) for n in counts[:count]]
            if not any(passing):
                break
            watcher.narrow(count)
            found = watcher.call(self.survey, batch)
            first = torch.tensor(passing, device=self.device)
            for name in ("sum", "weight"):
                value = found[name] * first.view(-1, *[1] * (found[name].ndim - 1))
                told.setdefault(name, value.new_zeros(len(counts), *value.shape[1:]))[:count] += value
            if "clean" in samples.batch and not self.round.is_meta:
                mask = batch["mask"] & first[:, None]
                clean = samples.batch["clean"][batch["row"]]
                self.detection.update(found["certainty"], batch["label"], found["best"], clean, mask)
        return told

    def upload(self, clients: Clients, samples: Samples, down: Message) -> tuple[Message, Message]:
        up, kept = super().upload(clients, samples, down)
        up = {name: value for name, value in up.items() if name not in ("model.prototype", "model.seen")}
        if self.hparams.prototypes:
            up |= {f"class.{name}": self._told[name] for name in ("sum", "weight")}
        kept |= {f"own.{name}": value for name, value in clients.state.items() if name.startswith(SHOWN)}
        return up, kept | {"came": torch.ones(len(samples.ids), device=self.device)}

    # ---- the server ---------------------------------------------------------------------------------------------

    def aggregate(self, down: Message, up: Message, weights: Tensor, batch: dict[str, Any]) -> None:
        super().aggregate(down, up, weights, batch)
        if self.hparams.prototypes:
            total, model = up["class.weight"].sum(0), self.model
            fresh = up["class.sum"].sum(0) / total.clamp_min(1e-6)[:, None]
            # a class that nobody showed keeps what it had
            model.prototype.copy_(torch.where(total[:, None] > 0, fresh, model.prototype))
            model.seen.copy_(torch.where(total > 0, total, model.seen))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        detection: Any = self.detection
        if "clean" in batch and not self.round.is_meta:
            for name, value in detection.compute().items():
                self.log(f"train/{name}", value)
            detection.reset()

    # ---- evaluation ---------------------------------------------------------------------------------------------

    def personal_weights(self, client: int) -> Message:
        if not bool(self.states.read([client], "came")[""]):
            return {}
        return {n: v[0] for n, v in self.states.read([client], "own.", self.device).items()}

    def _log_accuracy(self, split: str) -> None:
        metric: Any = self.accuracy[f"on_{split}"]
        if split == "test":
            with metric.sync_context(should_sync=metric._to_sync, dist_sync_fn=metric.dist_sync_fn):
                for client, (right, total) in enumerate(zip(metric.correct[1:], metric.total[1:], strict=True)):
                    if total > 0:
                        self.log(f"test/client_{client}", (right / total).float())
        super()._log_accuracy(split)
