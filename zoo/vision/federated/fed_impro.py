"""FedImpro: the upper part of each client's network also learns from hidden features drawn from shared Gaussians.

Paper: Tang et al., "FedImpro: Measuring and Improving Client Update in Federated Learning", ICLR 2024,
arXiv:2402.07011. Code by the authors: https://github.com/wizard1203/FedImpro, no licence stated.

Clients with unequal labels pull the upper layers apart. The network is cut in a lower part phi and an upper part
theta; for each class c a Gaussian of the features phi gives stands on the server, N(m_c, v_c^2) with diagonal v_c. At
every step a client draws features of all classes alike from it, and theta learns from real and drawn ones:

    loss = w_real * CE(theta(phi(x)), y) + w_fake * CE(theta(h'), y'),   h' ~ N(m_y', v_y'^2)

where w_fake grows from 0 while the Gaussians are still random. After each forward pass the client puts what phi gave
into its estimate of the Gaussians; the server averages the estimates with the weights. Prediction is the plain
network's.

Departs from the authors' code in these points, each with an argument that restores theirs where it is about numbers:

* Their estimate of a class moves to a batch's mean by min(1, d / 5000), d the size of a feature where the number of
  samples was meant (``authors_update``): at d = 32768 the last batch wins. Here it is the mean of the whole round.
* Their w_fake goes on growing after ``ramp`` rounds, to 2 in their command (``authors_ramp``). Here it stays.
* The number of drawn features follows ``local_batch`` also in the smaller last batch of an epoch.
* Batch norm leaves out the smaller last batch of an epoch, as everywhere in this library.

Their options to freeze or detach the lower part and to add a contrastive head to it are not here: their command uses
none of them.

Index legend: s clients of a round, b samples of a local batch, f drawn features, k classes, d size of a feature.
"""

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.core import ZooError, unwrap
from zoo.core.errors import nearest
from zoo.core.seeding import seed_from
from zoo.engines.federated import Clients, FederatedModule, Message, Samples, local_batches, masked_mean, nbytes

SCHEDULES = ("joint", "gradual", "gradual2half", "gradualhalfhalf", "milestone")


class Gaussians:
    """One diagonal Gaussian for each class and client, and what has been seen of it in this round.

    By default m and v are the mean and the standard deviation of all features since the round began; with ``weight``
    they move to those of each batch: m <- (1 - w) m + w * mean(batch). v never exceeds ``limit`` after an update; a
    class with a single sample keeps its v, and one without keeps both.

    Args:
        mean, std: what clients begin with.
        limit: largest v.
        turnover: samples of a class after which an estimate is all new, w = min(1, n / turnover); 0: whole round.
        weight: w of any batch, whatever its size; beats ``turnover``.
        fixed: leave v as it is.
    Shapes:
        mean, std: (s, k, d)
    """

    def __init__(
        self,
        mean: Tensor,
        std: Tensor,
        limit: float,
        turnover: float = 0.0,
        weight: float | None = None,
        fixed: bool = False,
    ):
        self.mean, self.std, self.limit = mean, std, limit
        self.turnover, self.weight, self.fixed = turnover, weight, fixed
        self.seen = mean.new_zeros(mean.shape[:2])
        self.scatter = torch.zeros_like(std) if not (turnover or weight is not None or fixed) else None

    @torch.no_grad()
    def update(self, feature: Tensor, label: Tensor, mask: Tensor) -> None:
        """Take the features of a local batch into the first clients' estimates.

        Shapes:
            feature: (s', b, d); label, mask: (s', b), of the first s' <= s clients
        """
        rows, feature = slice(len(feature)), feature.to(self.mean)
        belongs = F.one_hot(label, self.mean.shape[1]).to(feature) * mask[..., None]
        count = belongs.sum(1)[..., None]
        centre = belongs.mT @ feature / count.clamp(min=1)
        spread = belongs.mT @ (feature - belongs @ centre).square() if not self.fixed else None
        before = self.mean[rows]
        seen = self.seen[rows, :, None]
        if self.weight is None and not self.turnover:
            share = count / (seen + count).clamp(min=1)
            now = torch.where(seen > 0, before + (centre - before) * share, centre)
        else:
            share = (count / self.turnover).clamp(max=1) if self.weight is None else torch.full_like(count, self.weight)
            now = torch.lerp(before, centre, share)
        if spread is not None:
            total = count
            if self.scatter is not None:
                between = (centre - before).square() * seen * share
                spread = self.scatter[rows] = self.scatter[rows] + torch.where(count > 0, spread + between, 0.0)
                total, share = seen + count, torch.ones_like(share)
            own = (spread / (total - 1).clamp(min=1)).sqrt()
            std = self.std[rows]
            self.std[rows] = torch.where((total > 1) & (count > 0), torch.lerp(std, own, share), std)
            self.std[rows] = self.std[rows].clamp(max=self.limit)
        self.mean[rows] = torch.where(count > 0, now, before)
        self.seen[rows] += count[..., 0]


def alignment(feature: Tensor, label: Tensor, mask: Tensor, temperature: float = 0.07) -> Tensor:
    """Supervised contrast: features of a class are drawn together, those of others pushed apart.

    For an anchor i with others of its class P(i), all on the unit sphere: -mean over P(i) of log softmax over all
    others of z_i z_j / temperature; 0 where P(i) is empty. Khosla et al., NeurIPS 2020, arXiv:2004.11362.

    Shapes:
        feature: (n, d); label, mask: (n,); returns: ()
    """
    z = F.normalize(feature, dim=1)
    others = mask[None] & ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    similar = (z @ z.T / temperature).masked_fill(~others, -torch.inf)
    log_share = (similar - similar.logsumexp(1, keepdim=True)).masked_fill(~others, 0.0)
    alike = others & (label[:, None] == label[None])
    return masked_mean(-(log_share * alike).sum(1) / alike.sum(1).clamp(min=1), mask)


class FedImpro(FederatedModule):
    """Federated classification with features drawn from Gaussians that clients share (FedImpro).

    Args:
        net: name of a classifier of `zoo.nn.classifiers`, or ``{"name": ..., arguments}``.
        cut: name of the last stage of the lower part ("layer2"); see the net for its stages.
        features: where the drawn features come from: Gaussians that all share ("shared"), each client's own ("own",
            never sent), or no drawn features ("none": plain FedAvg, or whatever ``algorithm`` says).
        schedule: weights of the losses of real and drawn features in round t, with r = min(t / ramp, 1):
            "gradual2half" 1 and r; "gradual" 1 - r and r; "gradualhalfhalf" 1 - r/2 and r/2; "joint" one mean over
            both; "milestone" only real ones until round ``ramp``, only drawn ones after it.
        ramp: rounds until drawn features have their full weight.
        noise_std: first standard deviation of all Gaussians, and the largest one.
        learn_std: whether the standard deviations are estimated too; else they stay.
        turnover: samples of a class after which a client's estimate is all new: w = min(1, n / turnover) for a batch
            with n of them. 0: the mean over the whole round.
        combine: how the server combines estimates: "uniform", the mean of means and of standard deviations over the
            clients of the round; or "label_size", as mixtures over all clients, weighted by how many samples of a class
            each has, with the present Gaussians for clients that are not in the round.
        align: weight of the supervised contrast between real and drawn features.
        privacy_std: standard deviation of the noise that clients add to the estimates they send.
        measure: measure how unlike the clients' gradients at the global weights are, lower and upper part apart. It
            takes one more pass over all samples of the round; the gradients are not part of what is sent.
        authors_update: the authors' weight of a batch, min(1, d / 5000).
        authors_ramp: r grows without bound, as in the authors' code.
    Raises:
        ValueError: for an unknown cut, schedule or mode, fewer than two classes, or numbers out of range.
    Example:
        >>> from zoo.vision import FedImpro
        >>> model = FedImpro.from_variant("tiny", in_channels=1, image_size=8)
        >>> model.predict(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    head: ClassVar[tuple[str, ...]] = ("model.head", "feature_", "states.feature_", "label_count")
    server_only: ClassVar[tuple[str, ...]] = ("label_count", "unlike")
    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {
            "net": {"name": "cnn", "widths": [8, 16], "features": 32},
            "norm": "none",
            "cut": "layer1",
            "ramp": 2,
            "local_batch": 32,
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
        lr: float = 0.1,
        momentum: float = 0.0,
        weight_decay: float = 1e-4,
        lr_decay: float = 1.0,
        local_epochs: int = 1,
        local_steps: int | None = None,
        local_batch: int = 128,
        drop_last: bool = False,
        norm: str = "batch",
        batch_norm: str = "aggregate",
        clip: float = 0.0,
        augment: list[str] = [],  # noqa: B006 (read only; the command knows no tuple)
        mean: list[float] = [],  # noqa: B006
        std: list[float] = [],  # noqa: B006
        stack: int | None = None,
        state_on_disk: bool = False,
        cut: str = "layer2",
        features: str = "shared",
        schedule: str = "gradual2half",
        ramp: int = 500,
        noise_std: float = 0.1,
        learn_std: bool = True,
        turnover: float = 0.0,
        combine: str = "uniform",
        align: float = 0.0,
        privacy_std: float = 0.0,
        measure: bool = False,
        authors_update: bool = False,
        authors_ramp: bool = False,
    ):
        super(FederatedModule, self).__init__()
        self.save_hyperparameters()
        self._setup()
        hp = self._hp
        for key, known in (
            ("features", ("shared", "own", "none")),
            ("schedule", SCHEDULES),
            ("combine", ("uniform", "label_size")),
        ):
            if hp[key] not in known:
                raise ValueError(f"{key} is {hp[key]!r}; one of {', '.join(known)}.{nearest(hp[key], list(known))}")
        if num_classes < 2:
            raise ValueError(
                f"num_classes is {num_classes}; Gaussians of a single class tell nothing apart: at least 2."
            )
        if ramp < 1 or noise_std <= 0 or min(turnover, align, privacy_std) < 0:
            raise ValueError(
                f"ramp={ramp}, noise_std={noise_std}, turnover={turnover}, align={align}, privacy_std={privacy_std}: "
                "ramp at least 1, noise_std positive, the others not negative."
            )
        stages = list(dict(self.model.named_children()))
        if cut not in stages[:-1]:
            raise ValueError(f"cut is {cut!r}; a stage of the net below the last: {', '.join(stages[:-1])}.")
        self._above = stages.index(cut) + 1
        self._gaussians: Gaussians | None = None
        if features != "none":
            self._size = size = self._feature_size()
            first = {"mean": torch.rand(num_classes, size), "std": torch.full((num_classes, size), noise_std)}
            for name, value in first.items():
                if features == "shared":
                    self.register_buffer(f"feature_{name}", value)
                else:
                    self.states.add(f"feature_{name}", value)
            if features == "shared" and combine == "label_size":
                self.register_buffer("label_count", torch.zeros(num_clients, num_classes))
        if measure:
            self.register_buffer("unlike", torch.zeros(3, dtype=torch.float64))  # sums of low and high, rounds

    feature_mean: Tensor
    feature_std: Tensor
    label_count: Tensor
    unlike: Tensor

    def _feature_size(self) -> int:
        hp = self._hp
        low = copy.deepcopy(self.split(self.model)[0]).to("meta").eval()
        return low(torch.empty(1, hp["in_channels"], hp["image_size"], hp["image_size"], device="meta")).numel()

    def split(self, model: nn.Module) -> tuple[nn.Sequential, nn.Sequential]:
        """The lower and the upper part of a network, on the same weights."""
        assert isinstance(model, nn.Sequential)
        return model[: self._above], model[self._above :]

    def loss_weights(self) -> tuple[float, float]:
        """Weights of the losses of real and of drawn features in this round; not used by "joint"."""
        hp = self._hp
        ratio = self.done / hp["ramp"] if hp["authors_ramp"] else min(self.done / hp["ramp"], 1.0)
        pairs = {
            "joint": (1.0, 1.0),
            "gradual": (1 - ratio, ratio),
            "gradual2half": (1.0, ratio),
            "gradualhalfhalf": (1 - ratio / 2, ratio / 2),
            "milestone": (1.0, 0.0) if self.done < hp["ramp"] else (0.0, 1.0),
        }
        return pairs[hp["schedule"]]

    # ---- a client's step ----------------------------------------------------------------------------------------

    def local_batch(self, samples: Samples, step: int, count: int) -> dict[str, Tensor]:
        """As ever, and "noise" (s, f, d), standard normal: as many of each class, together a little over a batch."""
        found = super().local_batch(samples, step, count)
        if self._hp["features"] == "none":
            return found
        classes = self._hp["num_classes"]
        shape = ((self._hp["local_batch"] // classes + 1) * classes, self._size)
        if self.device.type == "meta":
            return {**found, "noise": torch.empty(count, *shape, device="meta")}
        seeds = [int(torch.randint(2**62, (), generator=generator)) for generator in samples.generators[:count]]
        draws = [torch.Generator(self.device).manual_seed(seed) for seed in seeds]  # d is large: drawn where it is used
        noise = torch.stack([torch.randn(shape, generator=draw, device=self.device) for draw in draws])
        return {**found, "noise": noise}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Cross-entropy of real and drawn features, and the real ones as "feature", (b, d).

        Shapes:
            batch: "image" (b, c, h, w), "label", "mask" (b,), "noise" (f, d), "feature_mean", "feature_std" (k, d); all
                but the first three only where features are drawn
        """
        if "noise" not in batch:
            return super().loss(model, batch)
        hp, size = self._hp, len(batch["label"])
        low, high = self.split(model)
        h = low(self.normalise(batch["image"]))
        mean, std, noise = batch["feature_mean"], batch["feature_std"], batch["noise"]
        drawn = (mean + std * noise.view(-1, *mean.shape)).flatten(0, 1)
        drawn_label = torch.arange(len(mean), device=h.device).repeat(len(drawn) // len(mean))
        scores = high(torch.cat([h, drawn.view(-1, *h.shape[1:]).to(h.dtype)]))
        each = F.cross_entropy(scores, torch.cat([batch["label"], drawn_label]), reduction="none")
        real, fake = masked_mean(each[:size], batch["mask"]), each[size:].mean()
        if hp["schedule"] == "joint":
            used = torch.cat([batch["mask"], torch.ones_like(drawn_label, dtype=torch.bool)])
            loss = masked_mean(each, used)
        else:
            weights = self.loss_weights()
            loss = weights[0] * real + weights[1] * fake
        feature = h.flatten(1)
        if hp["align"]:
            used = torch.cat([batch["mask"], torch.ones_like(drawn_label, dtype=torch.bool)])
            both, labels = torch.cat([feature, drawn.to(h.dtype)]), torch.cat([batch["label"], drawn_label])
            loss = loss + hp["align"] * alignment(both, labels, used)
        return {"loss": loss, "real": real.detach(), "fake": fake.detach(), "feature": feature}

    # ---- a client's round ---------------------------------------------------------------------------------------

    def work(self, clients: Clients, samples: Samples, down: Message) -> Message:
        """Steps along `loss`; after each the features it saw go into the client's estimate of the Gaussians."""
        self._gaussians = None if self._hp["features"] == "none" else self._start_gaussians(samples, down)
        self._gradients = self._probe(clients, samples) if self._hp["measure"] else {}
        if self._gaussians is None:
            return self.train_clients(clients, samples)
        total: Message = {}
        counts = torch.tensor(samples.counts, dtype=torch.float32, device=self.device)
        for count, batch in samples:
            if count < clients.count:
                clients.narrow(count)
            found = clients.step(self.loss, self._with_gaussians(batch, count))
            self._gaussians.update(found.pop("feature"), batch["label"], batch["mask"])
            for name, value in found.items():
                total.setdefault(name, torch.zeros_like(counts))[:count] += value
        return {name: value / counts for name, value in total.items()}

    def _start_gaussians(self, samples: Samples, down: Message) -> Gaussians:
        hp, size = self._hp, len(samples.ids)
        if hp["features"] == "own":
            found = self.states.read(samples.ids, "feature_", self.device)
        else:
            sent = {
                "std": self.feature_std,
                **{n.removeprefix("feature."): v for n, v in down.items() if "feature." in n},
            }
            found = {n: v[None].repeat(size, 1, 1) for n, v in sent.items()}
        weight = min(1.0, found["mean"].shape[-1] / 5000) if hp["authors_update"] else None
        return Gaussians(found["mean"], found["std"], hp["noise_std"], hp["turnover"], weight, not hp["learn_std"])

    def _with_gaussians(self, batch: dict[str, Tensor], count: int) -> dict[str, Tensor]:
        assert self._gaussians is not None
        return {**batch, "feature_mean": self._gaussians.mean[:count], "feature_std": self._gaussians.std[:count]}

    def _probe(self, clients: Clients, samples: Samples) -> Message:
        """Each client's gradient at the global weights over all its samples, by name: each (s, ...)."""
        sizes = samples.batch["size"]
        plan = local_batches(sizes, samples.batch["seed"], max(sizes))
        count, batch = next(iter(Samples(self, samples.batch, samples.rows, plan)))
        if self._gaussians is not None:
            batch = self._with_gaussians(batch, count)
        state = {name: value.clone() for name, value in clients.state.items()}
        probe = Clients(self.model, state, self.local_optimizer, clients.stacked, start=clients.start)
        return probe.gradients(self.loss, batch)[1]

    def broadcast(self) -> Message:
        down = super().broadcast()
        if self._hp["features"] == "shared":
            down["feature.mean"] = self.feature_mean
            if self._hp["learn_std"]:
                down["feature.std"] = self.feature_std
        return down

    def upload(self, clients: Clients, samples: Samples, down: Message) -> tuple[Message, Message]:
        hp = self._hp
        up, kept = super().upload(clients, samples, down)
        up |= {f"gradient.{name}": value for name, value in self._gradients.items()}
        if self._gaussians is None:
            return up, kept
        estimate = {"mean": self._gaussians.mean, "std": self._gaussians.std}
        if hp["features"] == "own":
            return up, kept | {f"feature_{name}": value for name, value in estimate.items()}
        if hp["privacy_std"]:
            seeds = [seed_from(samples.batch["seed"][row], "privacy") for row in samples.rows]
            for value in estimate.values():
                for row, seed in zip(value, seeds, strict=True):
                    generator = torch.Generator().manual_seed(seed_from(seed, value is estimate["std"]))
                    row += hp["privacy_std"] * torch.randn(row.shape, generator=generator).to(row)
        up["feature.mean"] = estimate["mean"]
        if hp["learn_std"]:
            up["feature.std"] = estimate["std"]
        if hp["combine"] == "label_size":
            labels = [samples.own("label", i) for i in range(len(samples.ids))]
            owned = [F.one_hot(label, hp["num_classes"]).sum(0) for label in labels]
            up["feature.count"] = torch.stack(owned).to(estimate["mean"])
        return up, kept

    # ---- the server's part --------------------------------------------------------------------------------------

    def aggregate(self, down: Message, up: Message, weights: Tensor, batch: dict[str, Any]) -> None:
        super().aggregate(down, up, weights, batch)
        if self._hp["features"] == "shared":
            self._combine(up, batch["client"])
        if self._hp["measure"]:
            lower = tuple(f"gradient.{name}." for name, _ in self.split(self.model)[0].named_children())
            parts = torch.zeros_like(self.unlike[:2])
            for name, value in up.items():
                if name.startswith("gradient."):
                    apart = (value - value.mean(0)).square().flatten(1).sum(1).mean()
                    parts[0 if name.startswith(lower) else 1] += apart
            self.unlike += torch.cat([parts, torch.ones_like(parts[:1])])
            for part, value in zip(("low", "high"), parts, strict=True):
                self.log(f"train/dissimilarity_{part}", value.float(), batch_size=len(weights))

    def _combine(self, up: Message, ids: list[int]) -> None:
        mean, std = up["feature.mean"], up.get("feature.std")
        if self._hp["combine"] == "uniform":
            self.feature_mean.copy_(mean.mean(0))
            if std is not None:
                self.feature_std.copy_(std.mean(0).clamp(min=0))
            return
        self.label_count[ids] = up["feature.count"]
        total = self.label_count.sum(0)
        share = (self.label_count / total.clamp(min=1))[..., None]
        here = torch.zeros(len(share), dtype=torch.bool, device=share.device)
        here[ids] = True
        # a client that is not in the round counts with what the server has
        parts = torch.cat([share[ids], share[~here].sum(0, keepdim=True)])
        means = torch.cat([mean, self.feature_mean[None]])
        merged = (parts * means).sum(0)
        known = (total > 0)[:, None]
        if std is not None:
            square = torch.cat([std, self.feature_std[None]]).square() + (means - merged).square()
            self.feature_std.copy_(torch.where(known, (parts * square).sum(0).sqrt(), self.feature_std))
        self.feature_mean.copy_(torch.where(known, merged, self.feature_mean))

    def bytes_up(self, up: Message) -> int:
        """Bytes that clients sent; the gradients of ``measure`` are looked at, not sent."""
        return nbytes({name: value for name, value in up.items() if not name.startswith("gradient.")})

    def _log_accuracy(self, split: str) -> None:
        super()._log_accuracy(split)
        if self._hp["measure"] and self.unlike[2] > 0:
            for part, value in zip(("low", "high"), self.unlike[:2] / self.unlike[2], strict=True):
                self.log(f"{split}/dissimilarity_{part}", value.float())

    # ---- the authors' weights -----------------------------------------------------------------------------------

    @classmethod
    def convert_state_dict(cls, content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """A ResNet of the authors (``resnet10_v2`` to ``resnet50_v2``, batch norm) as ours, without Gaussians.

        Raises:
            ZooError: if it is another network.
        """
        theirs = unwrap(content)
        counts = tuple(len({k.split(".")[1] for k in theirs if k.startswith(f"layer{i}.")}) for i in range(1, 5))
        deep = "layer1.0.conv3.weight" in theirs
        depths = {(1, 1, 1, 1): 10, (2, 2, 2, 2): 18, (3, 4, 6, 3): 50 if deep else 34}
        if counts not in depths or "linear.weight" not in theirs:
            raise ZooError(
                f"Not one of the authors' ResNets: it has {counts} blocks, and keys as {next(iter(theirs))!r}."
            )
        classes, channels = len(theirs["linear.weight"]), theirs["conv1.weight"].shape[1]
        found = {"net": f"resnet{depths[counts]}", "num_classes": classes, "in_channels": channels, "norm": "batch"}
        return {**found, "features": "none"}, {f"model.{_name(key)}": value for key, value in theirs.items()}


def _name(theirs: str) -> str:
    """Our name of a parameter of the authors' ResNet, within the net."""
    for old, new in (("conv1.", "stem.0."), ("bn1.", "stem.1."), ("linear.", "head.")):
        if theirs.startswith(old):
            return new + theirs.removeprefix(old)
    return theirs.replace(".bn", ".norm")
