"""TwinSight: federated learning where most clients have no labels, with one network for labels and one without.

Paper: Zhang, Yang, Tian, Wang, Liu, Han, "Robust Training of Federated Models with Extremely Label Deficiency",
ICLR 2024, arXiv:2402.14430. Code by the authors: https://github.com/visitworld123/Twin-sight, MIT.
Reproduces: the setting with labelled and unlabelled clients, and that where each client has few labels, with SimCLR,
BYOL or SimSiam as the unsupervised objective. Departs: clients' momentum begins anew every round (the authors' clients
keep theirs); the strong view is the engine's RandAugment and a square of 8 pixels set to 0 (theirs: a grey one of up to
16); labelled samples of the second setting go round without the smaller last batch. BYOL's target follows the online
network after every step (the authors' never moves: ``decay=1.0``), and with SimSiam, too, it is the features that are
tied (theirs: the projections).

Index legend: b samples of a local batch, d features, k classes.
"""

import copy
import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.core import unwrap
from zoo.engines.federated import Clients, FederatedModule, Message, Samples, Views, masked_mean, pixels
from zoo.nn.classifiers import features
from zoo.vision.federated.data_semi_supervised import labelled_part, two_pools


class Dense(nn.Sequential):
    """Linear layers with normalisation and ReLU between them, and with ``last`` normalisation behind the last one."""

    def __init__(self, widths: list[int], norm: str, last: bool = False):
        kinds = {
            "batch": nn.BatchNorm1d,
            "group": lambda width: nn.GroupNorm(1, width),
            "none": lambda _: nn.Identity(),
        }
        layers: list[nn.Module] = []
        for inside, outside in itertools.pairwise(widths):
            layers += [nn.Linear(inside, outside), kinds[norm](outside), nn.ReLU()]
        super().__init__(*(layers[:-1] if last else layers[:-2]))


class Twins(nn.Module):
    """The supervised network, which classifies, and the unsupervised one, which tells pictures apart.

    Args:
        objective: of the unsupervised one: "simclr"; "simsiam", which has a predictor behind its projector; or "byol",
            which has a target network beside, too, that no gradient reaches.
    Shapes:
        x: (b, c, h, w), normalised; returns: (b, k), by the supervised network alone
    """

    def __init__(
        self,
        supervised: nn.Sequential,
        unsupervised: nn.Sequential,
        objective: str = "simclr",
        projection: Sequence[int] = (4096, 2048),
        norm: str = "batch",
    ):
        super().__init__()
        self.supervised, self.unsupervised = supervised, unsupervised
        inside, (hidden, outside) = unsupervised.head.in_features, projection
        if objective == "simsiam":
            head = Dense([inside, hidden, hidden, outside], norm, last=True)  # type: ignore[list-item]
        else:
            head = Dense([inside, hidden, outside], norm)  # type: ignore[list-item]
        unsupervised.head = head
        if objective != "simclr":
            inner = hidden if objective == "byol" else max(outside // 2, 1)
            self.predictor = Dense([outside, inner, outside], norm)
        if objective == "byol":
            self.target = copy.deepcopy(unsupervised).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.supervised(x)


def instance_loss(z: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """NT-Xent over two views: each picture must find its other view among all others, by cosine / ``temperature``.

    Args:
        z: projections, the b first views and then the b second. mask: samples that are no padding.
    Shapes:
        z: (2b, d); mask: (b,) bool; returns: ()
    """
    z, keep = F.normalize(z, dim=1), torch.cat([mask, mask])
    others = keep[None] & ~torch.eye(len(keep), dtype=torch.bool, device=z.device)
    logits = (z @ z.T / temperature).masked_fill(~others, -torch.inf)
    positive = (z * z.roll(len(mask), 0)).sum(1) / temperature
    return masked_mean(torch.where(keep, logits.logsumexp(1) - positive, 0.0), keep)


def agreement_loss(predicted: Tensor, wanted: Tensor, mask: Tensor) -> Tensor:
    """Minus the cosines of what is predicted of each view and the other view's projection, mean over both; in [-1, 1].

    Args:
        predicted: from the b first views, then the b second. wanted: projections in the same order, not learnt from.
            mask: samples that are no padding.
    Shapes:
        predicted, wanted: (2b, d); mask: (b,) bool; returns: ()
    """
    cosine = F.cosine_similarity(predicted, wanted.detach().roll(len(mask), 0), dim=1)
    return -masked_mean(cosine, torch.cat([mask, mask]))


def neighbourhood_loss(f_u: Tensor, f_s: Tensor, mask: Tensor, authors_xor: bool = False) -> Tensor:
    """How far the two networks disagree about which pictures of a batch are alike: ||G_u - G_s||^2 / b^2, G of cosines.

    Args:
        f_u, f_s: features of the unsupervised and the supervised network. mask: samples that are no padding.
        authors_xor: divide by b XOR 2 as the authors' code does (at least 1), not by b squared.
    Shapes:
        f_u, f_s: (b, d), d may differ; mask: (b,) bool; returns: ()
    """
    f_u, f_s, count = F.normalize(f_u, dim=1), F.normalize(f_s, dim=1), mask.sum()
    square = (f_u @ f_u.T - f_s @ f_s.T).square() * (mask[:, None] & mask[None])
    pairs = count.bitwise_xor(torch.full_like(count, 2)) if authors_xor else count.square()
    return square.sum() / pairs.clamp(min=1)


class TwinSight(FederatedModule):
    """Every client trains two networks: one on labels, one on telling pictures apart, tied by which pictures are alike.

        labelled:    CE(g_s(x), y) + ins L_ins(unsupervised) + sim ||G_u - G_s||^2 / b^2
        unlabelled:                  ins L_ins(unsupervised) + sim ||G_u - G_s||^2 / b^2

    L_ins is NT-Xent over a weak and a strong view of each picture, or BYOL's or SimSiam's loss, and G the cosines
    between the weak views' features in a batch. So an unlabelled client's supervised network learns only which pictures
    are alike, and no objective of one kind of client pulls at the other's. What no gradient reaches on an unlabelled
    client (the supervised head) stays as it came down. The server averages both networks by numbers of samples; only
    the supervised one predicts.

    ``ins = sim = 0`` leaves federated averaging of the supervised network; with ``pseudo`` it is FedAvg with FixMatch
    or FreeMatch. The data are `FederatedSemiSupervisedDataModule`'s: ``labelled=1.0, labelled_clients=4`` of 10 is the
    paper's main setting. Its second, a few labels at each client, adds ``labelled_batch=64, pseudo="freematch",
    pseudo_weight=5.0, algorithm="fedprox", mu=1.0``.

    Args:
        unsupervised: objective of that network: "simclr", "byol" or "simsiam".
        projection: hidden and last width of its projector; the authors' for "simsiam" is [512, 512].
        decay: share of BYOL's target network that stays in a step; the target never leaves its client.
        ins: weight of the unsupervised network's loss. temperature: of that loss.
        sim: weight of the loss that ties the two. The authors' code divides by b XOR 2 = 66 at b = 64 where b^2 was
            meant, so theirs weighs 62 times as much as ours at the same ``sim``.
        authors_xor: divide as the authors' code does; worthless at b = 2, where that is 0.
        pseudo: pseudo labels for unlabelled samples, from the weak view for the strong one: "" (none), "fixmatch"
            (where the network is sure beyond ``threshold``) or "freematch" (beyond a threshold that follows how sure
            it is of each class, from 1 / k anew in every local epoch).
        pseudo_weight: of their loss; 0.5 in the authors' code for unlabelled clients, 5.0 for few labels at each.
        threshold: of "fixmatch". threshold_range: least and largest threshold of "freematch"; [] for no limits (the
            authors' on SVHN: [0.9, 0.95]).
        authors_swap: label the weak view by the strong one, as the authors' code does on unlabelled clients.
        labelled_batch: labelled samples that go with each local batch, which is then of unlabelled ones, over which
            local epochs are counted; 0 takes a client's samples as they are.
        strong: views of the strong kind; ``augment`` are those of the weak one.

    Example:
        >>> import torch
        >>> from zoo.vision import TwinSight
        >>> model = TwinSight.from_variant("tiny", num_clients=6, in_channels=1, image_size=8)
        >>> model.predict(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    padded: ClassVar[tuple[str, ...]] = ()
    head: ClassVar[tuple[str, ...]] = ("model.supervised.head",)
    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {
            "net": {"name": "cnn", "widths": [8, 16], "features": 32},
            "projection": [32, 16],
            "norm": "none",
            "augment": ["crop:1"],
            "strong": ["crop:1", "noise:0.15", "erase:3"],
        }
    }

    def __init__(
        self,
        net: str | dict[str, Any] = "resnet18",
        unsupervised: str = "simclr",
        projection: list[int] = [4096, 2048],  # noqa: B006 (read only; the command knows no tuple)
        decay: float = 0.99,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
        num_clients: int = 10,
        ins: float = 0.5,
        temperature: float = 0.07,
        sim: float = 1.0,
        authors_xor: bool = False,
        pseudo: str = "",
        pseudo_weight: float = 0.5,
        threshold: float = 0.95,
        threshold_range: list[float] = [],  # noqa: B006
        authors_swap: bool = False,
        labelled_batch: int = 0,
        algorithm: str = "fedavg",
        mu: float = 1.0,
        server_lr: float = 1.0,
        lr: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        lr_decay: float = 1.0,
        local_epochs: int = 1,
        local_steps: int | None = None,
        local_batch: int = 64,
        drop_last: bool = False,
        norm: str = "batch",
        batch_norm: str = "aggregate",
        personal: list[str] = [],  # noqa: B006
        clip: float = 0.0,
        augment: list[str] = ["flip", "crop:4"],  # noqa: B006
        strong: list[str] = ["randaugment:3", "erase:8", "flip", "crop:4"],  # noqa: B006
        mean: list[float] = [],  # noqa: B006
        std: list[float] = [],  # noqa: B006
        stack: int | None = None,
        state_on_disk: bool = False,
    ):
        super(FederatedModule, self).__init__()
        self.save_hyperparameters()
        if min(ins, sim, pseudo_weight) < 0 or temperature <= 0 or labelled_batch < 0:
            raise ValueError(
                f"ins={ins}, sim={sim}, pseudo_weight={pseudo_weight}, labelled_batch={labelled_batch}, "
                f"temperature={temperature}: not negative, the temperature above 0."
            )
        if unsupervised not in ("simclr", "byol", "simsiam") or not 0 <= decay <= 1:
            raise ValueError(f"unsupervised={unsupervised!r}, decay={decay}: 'simclr', 'byol' or 'simsiam'; in [0, 1].")
        if pseudo not in ("", "fixmatch", "freematch"):
            raise ValueError(f"pseudo is {pseudo!r}; '', 'fixmatch' or 'freematch'.")
        if len(projection) != 2 or min(projection) < 1:
            raise ValueError(f"projection is {projection}; the hidden and the last width, two positive numbers.")
        if len(threshold_range) not in (0, 2) or not 0 <= threshold <= 1:
            raise ValueError(
                f"threshold={threshold}, threshold_range={threshold_range}: in [0, 1]; two numbers or none."
            )
        self._setup()
        self.strong = Views(strong)

    def build(self) -> nn.Module:
        hp, supervised, unsupervised = self._hp, super().build(), super().build()
        return Twins(supervised, unsupervised, hp["unsupervised"], hp["projection"], hp["norm"])  # type: ignore[arg-type]

    @property
    def _shared(self) -> set[str]:
        return {name for name in super()._shared if not name.startswith("target.")}

    # ---- a client's loss ----------------------------------------------------------------------------------------

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The two lines of the class's docstring, and pseudo labels if asked for.

        Shapes:
            batch: "image", "strong" (b, c, h, w) in [0, 1]; "label" (b,), -1 where not "labelled" (b,); "mask" (b,);
                with "freematch" also "sure" () and "often" (k,)
        """
        hp, mask, count = self._hp, batch["mask"], len(batch["mask"])
        known = mask & batch["labelled"]
        x = self.normalise(batch["image"])
        if "strong" in batch:
            x = torch.cat([x, self.normalise(batch["strong"])])
        f_s = features(model.supervised, x)
        logits = model.supervised.head(f_s)  # type: ignore[operator, union-attr]
        each = F.cross_entropy(logits[:count], batch["label"].clamp(min=0), reduction="none")
        found = {"supervised": masked_mean(each, known)}
        loss = found["supervised"]
        if hp["ins"] or hp["sim"]:
            f_u, found["instance"] = self._instance(model, x, mask)
            found["neighbourhood"] = neighbourhood_loss(f_u[:count], f_s[:count], mask, hp["authors_xor"])
            loss = loss + hp["ins"] * found["instance"] + hp["sim"] * found["neighbourhood"]
        if hp["pseudo"]:
            found |= self._pseudo(logits[:count], logits[count:], mask & ~batch["labelled"], batch)
            loss = loss + hp["pseudo_weight"] * found["pseudo"]
        return {"loss": loss, **found}

    def _instance(self, model: nn.Module, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Features (2b, d) of the unsupervised network for both views x (2b, ...), one below the other; its loss."""
        net: Any = model
        hp = self._hp
        if hp["unsupervised"] == "simclr":
            f_u = features(net.unsupervised, x)
            return f_u, instance_loss(net.unsupervised.head(f_u), mask, hp["temperature"])
        views = x.split(len(mask))  # each by itself, so that batch norm sees one kind, as the authors' does
        f_u = [features(net.unsupervised, view) for view in views]
        z = [net.unsupervised.head(f) for f in f_u]
        predicted = torch.cat([net.predictor(one) for one in z])
        if hp["unsupervised"] == "simsiam":
            return torch.cat(f_u), agreement_loss(predicted, torch.cat(z), mask)
        wanted = torch.cat([net.target(view) for view in views])
        return torch.cat(f_u), 4 + 4 * agreement_loss(predicted, wanted, mask)  # two sums of 2 - 2 cos

    def after_step(self, clients: Clients) -> None:
        """BYOL's target goes a little towards the online network."""
        if self._hp["unsupervised"] != "byol":
            return
        for name, value in clients.now.items():
            if name.startswith("unsupervised."):
                target = clients.state[f"target.{name.removeprefix('unsupervised.')}"][: clients.count]
                target.mul_(self._hp["decay"]).add_(value.detach(), alpha=1 - self._hp["decay"])

    def _pseudo(self, weak: Tensor, strong: Tensor, unlabelled: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Cross-entropy of one view to what the network says of the other, where it is sure; over all unlabelled."""
        hp = self._hp
        if hp["authors_swap"]:
            weak, strong = strong, weak
        probability = weak.detach().softmax(1)
        most, label = probability.max(1)
        found: dict[str, Tensor] = {}
        if hp["pseudo"] == "fixmatch":
            sure = most >= hp["threshold"]
        else:
            some, keep = unlabelled.any(), 0.999
            mean = (probability * unlabelled[:, None]).sum(0) / unlabelled.sum().clamp(min=1)
            level = torch.where(some, keep * batch["sure"] + (1 - keep) * masked_mean(most, unlabelled), batch["sure"])
            often = torch.where(some, keep * batch["often"] + (1 - keep) * mean, batch["often"])
            threshold = level * (often / often.max())[label]
            if hp["threshold_range"]:
                threshold = threshold.clamp(*hp["threshold_range"])
            sure, found = most >= threshold, {"sure": level, "often": often}
        each = F.cross_entropy(strong, label, reduction="none") * sure
        return {"pseudo": masked_mean(each, unlabelled), "sure_share": masked_mean(sure.float(), unlabelled), **found}

    # ---- a client's round ---------------------------------------------------------------------------------------

    def local(self, batch: dict[str, Any], down: Message, rows: Any) -> tuple[Message, Message, Message]:
        hp = self._hp
        if hp["labelled_batch"] and "known" in batch:
            steps = hp["local_steps"] or hp["local_epochs"] * -(-max(batch["size"]) // hp["local_batch"])
            batch = two_pools(batch, hp["labelled_batch"], steps)
        return super().local(batch, down, rows)

    def local_batch(self, samples: Samples, step: int, count: int) -> dict[str, Tensor]:
        """The engine's, before it the labelled samples with ``labelled_batch``, and "strong", the other view."""
        found = super().local_batch(samples, step, count)
        image = samples.batch["image"][found.pop("row")]
        found.setdefault("labelled", torch.ones_like(found["mask"]))
        generators = samples.generators[:count]
        if "whole" in samples.batch:
            part = labelled_part(samples, step, count)
            image = torch.cat([part["image"], image], 1)
            weak = self.views(pixels(part["image"]), generators)
            # a client without labels fills up with pictures that are none of the batch
            part |= {"image": weak, "mask": part["labelled"]}
            found = {key: torch.cat([part[key].to(value.device), value], 1) for key, value in found.items()}
        if self._hp["ins"] or self._hp["sim"] or self._hp["pseudo"]:
            found["strong"] = self.strong(pixels(image), generators)
        return found

    def work(self, clients: Clients, samples: Samples, down: Message) -> Message:
        """Steps along `loss`; what had no gradient on a client without labels is put back: no decay, no momentum."""
        hp = self._hp
        logs = self._follow(clients, samples) if hp["pseudo"] == "freematch" else self.train_clients(clients, samples)
        known = samples.batch.get("known", samples.batch["size"])
        bare = [i for i, row in enumerate(samples.rows) if known[row] == 0]
        if bare and not hp["pseudo"]:
            idle = "supervised.head." if hp["sim"] else "supervised."
            for name, start in clients.start.items():
                if name.startswith(idle):
                    clients.state[name][bare] = start[bare]
        return logs

    def _follow(self, clients: Clients, samples: Samples) -> Message:
        """`train_clients` where each step hands on to the next how sure the network is, from 1 / k in every epoch."""
        hp, total = self._hp, {}
        counts = torch.tensor(samples.counts, dtype=torch.float32, device=self.device)
        epoch = [-(-done // hp["local_epochs"]) if hp["local_steps"] is None else done for done in samples.counts]
        first = {"sure": torch.ones(len(counts)), "often": torch.ones(len(counts), hp["num_classes"])}
        first = {name: (value / hp["num_classes"]).to(self.device) for name, value in first.items()}
        now = {name: value.clone() for name, value in first.items()}
        for step, (count, batch) in enumerate(samples):
            if count < clients.count:
                clients.narrow(count)
            anew = [i for i in range(count) if step % epoch[i] == 0]
            for name in now:
                now[name][anew] = first[name][anew]
            found = clients.step(self.loss, {**batch, **{name: value[:count] for name, value in now.items()}})
            self.after_step(clients)
            for name in now:
                now[name][:count] = found.pop(name).to(now[name])
            for name, value in found.items():
                total.setdefault(name, torch.zeros_like(counts))[:count] += value
        return {name: value / counts for name, value in total.items()}

    # ---- the authors' files -------------------------------------------------------------------------------------

    @classmethod
    def convert_state_dict(cls, content: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """From the authors' ``SemiFed`` with SimCLR: a ResNet-18 or 34, both networks.

        Raises:
            KeyError: for a key that it does not know.
        """
        content = unwrap(content)
        twins = {"sup_classifier.": "supervised.", "unsup_model.online_encoder.": "unsupervised."}
        state: dict[str, Tensor] = {}
        for key, value in content.items():
            side = next((theirs for theirs in twins if key.startswith(theirs)), None)
            if side is None:
                raise KeyError(f"{key!r} is no part of the authors' SemiFed with SimCLR.")
            state[f"model.{twins[side]}{_ours(key.removeprefix(side))}"] = value
        blocks = len({k.split(".")[2] for k in content if k.startswith("sup_classifier.layer3.")})
        hidden = content["unsup_model.online_encoder.fc.net.0.weight"]
        found = {
            "net": {2: "resnet18", 6: "resnet34"}[blocks],
            "num_classes": len(content["sup_classifier.fc.weight"]),
            "in_channels": content["sup_classifier.conv1.weight"].shape[1],
            "projection": [len(hidden), len(content["unsup_model.online_encoder.fc.net.3.weight"])],
        }
        state |= {"round": torch.zeros((), dtype=torch.long), "sent": torch.zeros(2, dtype=torch.float64)}
        return found, state


def _ours(key: str) -> str:
    """Our name of a parameter of the authors' ResNet."""
    first, _, rest = key.partition(".")
    if first in ("conv1", "bn1"):
        return f"stem.{0 if first == 'conv1' else 1}.{rest}"
    if first == "fc":
        return f"head.{rest.removeprefix('net.')}"
    return key.replace(".bn", ".norm")
