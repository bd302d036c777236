"""FAL: federated adversarial learning, with the two-layer network that its convergence proof is about.

Paper: Li, Song, Yang, "Federated Adversarial Learning: A Framework with Convergence Analysis", ICML 2023,
arXiv:2208.03635. No public code.

A minimum over weights of a maximum over changes of the inputs, on the data of all clients:

    min_U  1/N sum_c 1/J sum_i  max_{||x' - x|| <= rho}  loss(f_U(x'), y)

In round t each client begins with U_c = U(t) and takes K steps: it attacks the samples of a local batch against its
own current model, x' = A(U_c; x, y), then U_c <- U_c - eta_local * gradient of the mean loss at x'. The server moves by
U(t+1) = U(t) + eta_global * mean over clients of (U_c - U(t)); eta_global = 1 is the average of the clients.

A reconstruction: the algorithm is the paper's; what its text leaves open and we chose: the attack (PGD with random
start), its range ([0, 1]), the general network and its training figures, plain numbers of samples on clients (the mean
over clients is unweighted, as in the analysis where all have J), sampling of clients, and the constants of the analysed
network's initialisation (variance 1/m of w and b, second layer of +-m^(-1/3)).

Index legend: s clients of a round, b samples of a local batch, k classes, m neurons, d numbers of an input.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric

from zoo.core.errors import nearest
from zoo.core.seeding import seed_from
from zoo.engines.federated import Clients, FederatedModule, Message, Samples, local_batches, masked_mean, pixels
from zoo.nn.adversary import KINDS, Adversary, attacked

log = logging.getLogger(__name__)

CRITERIA = ("cross_entropy", "absolute", "squared")


class TwoLayer(nn.Module):
    """The analysed network: m neurons with ReLU, of which only the movement u of their weights is trained.

        f(x) = sum_r a_r relu(<w_r + u_r, x> + b_r),   a_r = +-m^(-1/3), w_r ~ N(0, I/m), b_r ~ N(0, 1/m), first u_r = 0

    Its scores of the two classes are -f/2 and f/2, so that their cross-entropy is the logistic loss log(1 + exp(-y f)).

    Shapes:
        x: (n, ...) of d numbers; returns: (n, 2)
    """

    constants = ("a", "w", "b")

    def __init__(self, inputs: int, width: int = 4096):
        super().__init__()
        self.register_buffer("a", (2.0 * torch.randint(2, (width,)) - 1) * width ** (-1 / 3))
        self.register_buffer("w", torch.randn(width, inputs) / width**0.5)
        self.register_buffer("b", torch.randn(width) / width**0.5)
        self.u = nn.Parameter(torch.zeros(width, inputs))

    a: Tensor
    w: Tensor
    b: Tensor

    def forward(self, x: Tensor) -> Tensor:
        f = F.relu(F.linear(x.flatten(1), self.w + self.u, self.b)) @ self.a
        return torch.stack([-f / 2, f / 2], 1)

    @torch.no_grad()
    def moved(self) -> Tensor:
        """The furthest that a neuron has gone: max_r ||u_r||."""
        return self.u.norm(dim=1).max()

    @torch.no_grad()
    def flipped(self, x: Tensor) -> Tensor:
        """Share of (sample, neuron) pairs whose ReLU has changed sides since the beginning."""
        x = x.flatten(1)
        before, now = F.linear(x, self.w, self.b) > 0, F.linear(x, self.w + self.u, self.b) > 0
        return (before != now).float().mean()


def separability(x: Tensor, label: Tensor) -> Tensor:
    """Least distance between samples of different classes; infinite where there is one class only.

    Shapes:
        x: (n, ...); label: (n,); returns: ()
    """
    x = x.flatten(1)
    far = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    return far.masked_fill(label[:, None] == label[None], torch.inf).min()


def separable(folder: Path, seed: int, gap: float = 1.0, inputs: int = 10, clients: int = 5, samples: int = 20) -> None:
    """Write unit vectors of two classes as ``data.npz`` and ``partition.json``, for the theory's set-up.

    Vectors come in pairs x = +-(gap / 2) e + sqrt(1 - gap^2 / 4) v with a common direction e and a v of their own
    across it, so that the classes are ``gap`` apart. Clients have three of one class for one of the other, in turns.

    Args:
        gap: distance of the classes, in (0, 2). inputs: numbers of a vector. clients: how many.
        samples: of each client, a multiple of 4.
    """
    draws = np.random.default_rng(seed_from(seed, "separable"))
    wanted = [[samples * 3 // 4, samples // 4][:: 1 if client % 2 == 0 else -1] for client in range(clients)]
    totals = [sum(own[c] for own in wanted) for c in (0, 1)]
    axis = draws.normal(size=inputs)
    axis /= np.linalg.norm(axis)
    across = draws.normal(size=(max(totals), inputs))
    across -= (across @ axis)[:, None] * axis
    across *= np.sqrt(1 - gap**2 / 4) / np.linalg.norm(across, axis=1, keepdims=True)
    x = np.concatenate([(across + sign * gap / 2 * axis)[:n] for sign, n in zip((-1, 1), totals, strict=True)])
    y = np.repeat([0, 1], totals)
    first, shares = [0, totals[0]], []
    for own in wanted:
        shares.append([i for c in (0, 1) for i in range(first[c], first[c] + own[c])])
        first = [f + n for f, n in zip(first, own, strict=True)]
    (folder / "partition.json").write_text(json.dumps({"clients": shares}), encoding="utf-8")
    x = x.astype(np.float32)
    np.savez(folder / "data.npz", x_train=x, y_train=y, x_test=x, y_test=y)


class FAL(FederatedModule):
    """Federated adversarial learning (FAL): clients train against an attack on their current local models.

    Args:
        net: name of a classifier of `zoo.nn.classifiers`, or ``{"name": ..., arguments}``; ``{"name": "two_layer",
            "width": 4096}`` is the analysed network, for two classes.
        adversarial: whether clients are attacked in training; without it is federated averaging.
        attack_from: rounds of federated averaging before clients are attacked: FedAvg, then adversarial fine-tuning.
        attack: "pgd_linf", "pgd_l2" or "fgsm" (one step of rho).
        rho: how far an input may be moved, in the norm of the attack, pictures being in [0, 1].
        attack_step: length of a step of the attack. attack_steps: how many.
        random_start: begin the attack anywhere in the ball.
        attack_mode: mode of batch norm during the attack: "eval", or "train" (statistics of the batch, not remembered).
        once: attack all samples once a round, against the global model, and use that at all local steps: cheaper.
        clean_weight: share of the loss on the samples as they are, in [0, 1].
        clamp: keep attacked inputs in [0, 1]; off for inputs that are no pictures.
        criterion: "cross_entropy" (logistic for two classes), or for two classes "absolute" |f - y| or "squared"
            (f - y)^2, with y = -1, 1 and f the difference of the two scores.
        weighting: the server's mean over clients: "uniform", or by their numbers of samples ("size").
        eval_steps: steps of the attack that the global model is tested with, of the same length.
    Raises:
        ValueError: for unknown words, a negative rho, fewer than one step, or a binary criterion with more classes.
    Example:
        >>> from zoo.vision import FAL
        >>> model = FAL.from_variant("tiny", in_channels=1, image_size=8)
        >>> model.predict(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    monitor, mode = "val/robust_accuracy", "max"
    padded: ClassVar[tuple[str, ...]] = (*FederatedModule.padded, "start")
    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {
            "net": {"name": "mlp", "hidden": [32]},
            "norm": "none",
            "rho": 0.1,
            "attack_step": 0.05,
            "attack_steps": 2,
            "eval_steps": 3,
        }
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
        lr: float = 0.05,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        lr_decay: float = 1.0,
        local_epochs: int = 1,
        local_steps: int | None = None,
        local_batch: int = 64,
        drop_last: bool = False,
        norm: str = "group",
        batch_norm: str = "aggregate",
        clip: float = 0.0,
        augment: list[str] = [],  # noqa: B006 (read only; the command knows no tuple)
        mean: list[float] = [],  # noqa: B006
        std: list[float] = [],  # noqa: B006
        stack: int | None = None,
        state_on_disk: bool = False,
        adversarial: bool = True,
        attack_from: int = 0,
        attack: str = "pgd_linf",
        rho: float = 8 / 255,
        attack_step: float = 2 / 255,
        attack_steps: int = 7,
        random_start: bool = True,
        attack_mode: str = "eval",
        once: bool = False,
        clean_weight: float = 0.0,
        clamp: bool = True,
        criterion: str = "cross_entropy",
        weighting: str = "uniform",
        eval_steps: int = 20,
    ):
        super(FederatedModule, self).__init__()
        self.save_hyperparameters()
        words = {
            "attack": KINDS,
            "attack_mode": ("eval", "train"),
            "criterion": CRITERIA,
            "weighting": ("uniform", "size"),
        }
        for key, known in words.items():
            value = self.hyperparameters[key]
            if value not in known:
                raise ValueError(f"{key} is {value!r}; one of {', '.join(known)}.{nearest(value, list(known))}")
        if attack_from < 0:
            raise ValueError(f"attack_from is {attack_from}; a number of rounds, not negative.")
        if rho < 0 or not 0 <= clean_weight <= 1:
            raise ValueError(
                f"rho={rho}, clean_weight={clean_weight}: rho must not be negative, clean_weight in [0, 1]."
            )
        if local_steps is not None and local_steps < 1:
            raise ValueError(f"local_steps is {local_steps}; at least 1, or None for whole passes.")
        if criterion != "cross_entropy" and num_classes != 2:
            raise ValueError(f"criterion={criterion!r} is for two classes; num_classes is {num_classes}.")
        bounds: dict[str, Any] = {"low": 0.0, "high": 1.0} if clamp else {"low": None, "high": None}
        lengths = {"radius": rho, "step": attack_step}
        self.adversary = Adversary(attack, **lengths, steps=attack_steps, **bounds)
        judge = "pgd_l2" if attack == "pgd_l2" else "pgd_linf"
        self.judge = Adversary(judge, **lengths, steps=eval_steps, **bounds)
        self.fgsm = Adversary("fgsm", radius=rho, **bounds) if judge == "pgd_linf" else self._one_step(lengths, bounds)
        self._setup()
        self.figures = nn.ModuleDict(
            {f"{name}_on_{split}": MeanMetric() for split in ("val", "test") for name in self._robust}
        )
        self._separability: float | None = None
        if isinstance(self.model, TwoLayer):
            self.register_buffer("least", torch.tensor(torch.inf))

    _robust: ClassVar[tuple[str, ...]] = ("robust_accuracy", "fgsm_accuracy", "robust_loss")
    least: Tensor

    @staticmethod
    def _one_step(lengths: dict[str, float], bounds: dict[str, Any]) -> Adversary:
        return Adversary("pgd_l2", radius=lengths["radius"], step=lengths["radius"], steps=1, **bounds)

    def build(self) -> nn.Module:
        hp = self._hp
        net = hp["net"]
        if not (isinstance(net, dict) and net.get("name") == "two_layer"):
            return super().build()
        if hp["num_classes"] != 2:
            raise ValueError(f"The two-layer network is for two classes; num_classes is {hp['num_classes']}.")
        own = {key: value for key, value in net.items() if key != "name"}
        if unknown := set(own) - {"width"}:
            raise ValueError(f"The net 'two_layer' has no argument {unknown.pop()!r}; it has 'width'.")
        return TwoLayer(hp["in_channels"] * hp["image_size"] ** 2, **own)

    # ---- a client's step ----------------------------------------------------------------------------------------

    def each_loss(self, logits: Tensor, label: Tensor) -> Tensor:
        """The loss of each sample by ``criterion``.

        Shapes:
            logits: (b, k); label: (b,); returns: (b,)
        """
        if self._hp["criterion"] == "cross_entropy":
            return F.cross_entropy(logits, label, reduction="none")
        gap = logits[:, 1] - logits[:, 0] - (2.0 * label - 1)
        return gap.abs() if self._hp["criterion"] == "absolute" else gap.square()

    def attack(self, model: nn.Module, batch: Mapping[str, Tensor], adversary: Adversary) -> Tensor:
        """One client's pictures, changed by an adversary against its network as it is.

        Shapes:
            batch: "image" (b, c, h, w) in [0, 1], "label" (b,), "start" as the image or missing; returns: as the image
        """

        def loss(image: Tensor) -> Tensor:
            return self.each_loss(self.logits(model, self.normalise(image)), batch["label"])

        return adversary(loss, batch["image"], batch.get("start"))

    def _attack_all(self, clients: Clients, batch: dict[str, Tensor]) -> Tensor:
        """All clients' pictures against their own current networks, (s, b, c, h, w)."""
        wanted: dict[str, Tensor] = {key: batch[key] for key in ("image", "label", "start") if key in batch}
        with torch.no_grad(), attacked(self.model, self._hp["attack_mode"] == "train"):
            return clients.call(lambda model, rows: self.attack(model, rows, self.adversary), wanted)

    def local_batch(self, samples: Samples, step: int, count: int) -> dict[str, Tensor]:
        """As ever, and "start" (s, b, c, h, w), where each attack begins."""
        found = super().local_batch(samples, step, count)
        if self._attacks and self._hp["random_start"]:
            shape = found["image"].shape[1:]
            draws = [self.adversary.draw(shape, generator) for generator in samples.generators[:count]]
            found["start"] = torch.stack(draws).to(found["image"])
        return found

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The mean loss on "adversarial" pictures, mixed with that on "image" by ``clean_weight``."""
        share = self._hp["clean_weight"]

        def mean(image: Tensor) -> Tensor:
            return masked_mean(self.each_loss(self.logits(model, self.normalise(image)), batch["label"]), batch["mask"])

        if "adversarial" not in batch or share == 1:
            return {"loss": mean(batch["image"])}
        loss = mean(batch["adversarial"])
        return {"loss": loss if share == 0 else (1 - share) * loss + share * mean(batch["image"])}

    # ---- a client's round ---------------------------------------------------------------------------------------

    @property
    def _attacks(self) -> bool:
        return self._hp["adversarial"] and self._hp["rho"] > 0 and self.done >= self._hp["attack_from"]

    def work(self, clients: Clients, samples: Samples, down: Message) -> Message:
        """K steps, each on a batch that is attacked just before."""
        if not self._attacks:
            return self.train_clients(clients, samples)
        fixed = self._attack_once(clients, samples) if self._hp["once"] else None
        total: Message = {}
        counts = torch.tensor(samples.counts, dtype=torch.float32, device=self.device)
        for count, batch in samples:
            if count < clients.count:
                clients.narrow(count)
            image = self._attack_all(clients, batch) if fixed is None else fixed[batch["row"]]
            for name, value in clients.step(self.loss, {**batch, "adversarial": image}).items():
                total.setdefault(name, torch.zeros_like(counts))[:count] += value
        return {name: value / counts for name, value in total.items()}

    def _attack_once(self, clients: Clients, samples: Samples) -> Tensor:
        """All samples of the round, those of these clients attacked against the weights they begin with."""
        batch = samples.batch
        plan = local_batches(batch["size"], batch["seed"], self._hp["local_batch"])
        whole = Samples(self, batch, samples.rows, plan)
        found = pixels(batch["image"]).clone()
        for step in range(len(whole)):
            rows = self.local_batch(whole, step, len(whole.ids))
            found[rows["row"][rows["mask"]]] = self._attack_all(clients, rows)[rows["mask"]]
        return found

    # ---- the server's part --------------------------------------------------------------------------------------

    def broadcast(self) -> Message:
        """The weights; what of the analysed network never changes is not sent."""
        down = super().broadcast()
        still = [f"model.{name}" for name in TwoLayer.constants] if isinstance(self.model, TwoLayer) else []
        return {name: value for name, value in down.items() if name not in still}

    def aggregate(self, down: Message, up: Message, weights: Tensor, batch: dict[str, Any]) -> None:
        trained = [f"model.{name}" for name in self.shared_parameters]
        square = sum((up[n] - up[n].mean(0)).square().flatten(1).sum(1) for n in trained)
        if trained:
            self.log("train/drift", torch.as_tensor(square).sqrt().mean(), batch_size=len(weights))
        uniform = self._hp["weighting"] == "uniform"
        super().aggregate(down, up, torch.ones_like(weights) if uniform else weights, batch)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        if isinstance(self.model, TwoLayer) and "image" in batch:  # a real server sees no pictures
            self._watch(batch)

    def local(self, batch: dict[str, Any], down: Message, rows: Sequence[int]) -> tuple[Message, Message, Message]:
        self._refuse(batch)
        return super().local(batch, down, rows)

    def _refuse(self, batch: dict[str, Any]) -> None:
        image, label = batch["image"], batch["label"]
        if image.is_meta:
            return
        if int(label.max()) >= self._hp["num_classes"]:
            raise ValueError(f"A label is {int(label.max())}; num_classes is {self._hp['num_classes']}.")
        if self._hp["clamp"] and image.is_floating_point() and (image.min() < 0 or image.max() > 1):
            raise ValueError(
                f"'image' goes from {float(image.min()):.4g} to {float(image.max()):.4g}; attacks are kept in [0, 1]. "
                "Scale the pictures, or pass clamp=False."
            )

    def _watch(self, batch: dict[str, Any]) -> None:
        """The quantities of the proof, on the data of all clients of the round: measured here, not sent."""
        assert isinstance(self.model, TwoLayer)
        x, label, hp = pixels(batch["image"]), batch["label"], self._hp
        if x.is_meta:
            return
        if self._separability is None:
            self._separability = float(separability(x, label))
            if hp["rho"] >= self._separability / 2:
                log.warning(
                    "FAL: rho=%g is not below half of the classes' distance %.4g: no network can fit them robustly.",
                    hp["rho"], self._separability,
                )  # fmt: skip
        robust = self._robust_figures(x, label, seed_from("watch", self.done))["robust_loss"].mean()
        self.least.copy_(torch.minimum(self.least, robust.to(self.least)))
        found = {"moved": self.model.moved(), "flipped": self.model.flipped(self.normalise(x)), "robust_loss": robust}
        for name, value in {**found, "separability": torch.tensor(self._separability)}.items():
            self.log(f"train/{name}", value, batch_size=len(batch["client"]))

    # ---- evaluation ---------------------------------------------------------------------------------------------

    def _robust_figures(self, image: Tensor, label: Tensor, seed: int) -> Message:
        """What attacks on the global model leave of it, for each sample: see `_robust`."""
        generator = torch.Generator().manual_seed(seed)
        with torch.inference_mode(False), torch.no_grad(), attacked(self.model):
            x, label = pixels(image).clone(), label.clone()
            batch = {"image": x, "label": label}
            start = self.judge.draw(x.shape, generator).to(x)
            worst = self.attack(self.model, {**batch, "start": start}, self.judge)
            logits = self.logits(self.model, self.normalise(worst))
            quick = self.logits(self.model, self.normalise(self.attack(self.model, batch, self.fgsm)))
            return {
                "robust_accuracy": (logits.argmax(1) == label).float(),
                "fgsm_accuracy": (quick.argmax(1) == label).float(),
                "robust_loss": self.each_loss(logits, label),
            }

    def score(self, split: str, client: int, image: Tensor, label: Tensor, number: int) -> Tensor:
        logits = super().score(split, client, image, label, number)
        found = self._robust_figures(image, label, seed_from(split, 1024 * number)) if client < 0 else {}
        for name, value in found.items():
            self.figures[f"{name}_on_{split}"].update(value)  # type: ignore[operator]
        return logits

    def _log_accuracy(self, split: str) -> None:
        super()._log_accuracy(split)
        for name in self._robust:
            metric: Any = self.figures[f"{name}_on_{split}"]
            self.log(f"{split}/{name}", metric.compute(), prog_bar=name == "robust_accuracy")
            metric.reset()
        if isinstance(self.model, TwoLayer):
            self.log(f"{split}/least_robust_loss", self.least)
