"""GGEUR: clients draw the samples they lack from the shape of each class over all clients, in a frozen feature space.

Paper: Yanbiao Ma, Wei Dai, Wenke Huang, Jiayi Chen, "Geometric Knowledge-Guided Localized Global Distribution Alignment
for Federated Learning", CVPR 2025, arXiv:2503.06457. Code by the authors:
https://github.com/WeiDai-David/2025CVPR_GGEUR, no licence stated.

A frozen encoder turns pictures into features; what clients train together is a linear head. Before their first round
they send, for each class c, how many samples they have, their mean and covariance. The server pools them exactly,

    N_c = Σ n_kc,   μ_c = Σ n_kc μ_kc / N_c,   Σ_c = Σ n_kc (Σ_kc + (μ_kc - μ_c)(μ_kc - μ_c)ᵀ) / N_c

and sends Σ_c = V diag(λ) Vᵀ, the class's geometric shape, to all. Around an anchor a every client then draws

    x' = a + V diag(√λ) ε,   ε ~ N(0, I)

until it has as many samples of a class as the others. Anchors are its own samples and, where clients come from several
domains, the class means ("prototypes") of the other domains: a client never sees another's samples.

Departs from the authors' code: one factor a class instead of three factorisations an anchor; samples are drawn anew in
every round instead of stored; none of the 1e-6 that theirs adds to the diagonal before a Cholesky decomposition, which
is not needed. Their "best local epoch" is always the last (they keep a reference, not a copy), and so it is here. With
more than ten classes they pool class 1 with classes 10 to 19 and so on (names compared by their beginning); not here.

Index legend: s clients, b samples of a local batch, n samples, k classes, d features, r rank, m prototypes.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from zoo.core import ZooError, unwrap
from zoo.core.seeding import seed_from
from zoo.engines.federated import (
    Clients,
    FederatedModule,
    Message,
    Samples,
    full_precision,
    gather,
    masked_mean,
    pixels,
)
from zoo.engines.federated.module import ClientAccuracy

__all__ = ["GGEUR", "FederatedModule", "anchors", "embed", "factor", "guide_set", "pool"]

STACK_BYTES = 2**31
"""Features of clients that train together, in bytes at most, unless ``stack`` says how many do."""

# ---- picture -> features --------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """A frozen CLIP vision model with its own preparation of pictures.

    Pictures are resized by two matrices, one a side, which hold the bicubic filter of the usual CLIP preparation; grey
    ones get three equal channels.

    Args:
        model: a `transformers.CLIPVisionModelWithProjection`.
        image_size: side of the pictures that come in.
        chunk: pictures encoded at once.
    Raises:
        TypeError: if the model gives no image embeddings.
    """

    mean: Tensor
    std: Tensor
    resize: Tensor

    def __init__(self, model: nn.Module, image_size: int, chunk: int = 256):
        super().__init__()
        if not hasattr(model, "visual_projection") or not hasattr(model, "vision_model"):
            raise TypeError(
                f"The backbone {type(model).__name__} has no 'visual_projection': not a CLIPVisionModelWithProjection."
            )
        self.model, self.chunk = model, chunk
        config: Any = model.config
        self.width, self.side = int(config.projection_dim), int(config.image_size)
        for name, value in (
            ("mean", [0.48145466, 0.4578275, 0.40821073]),
            ("std", [0.26862954, 0.26130258, 0.27577711]),
        ):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1), persistent=False)
        # one side of a picture only: what interpolation does to each unit vector
        identity = torch.eye(image_size)[None, None]
        sizes = (self.side, image_size)
        matrix = F.interpolate(identity, sizes, mode="bicubic", antialias=True) if self.side != image_size else identity
        self.register_buffer("resize", matrix[0, 0].clone(), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Shapes: image (n, 1 or 3, h, h) in [0, 1]; returns: (n, d), not normalised."""
        return torch.cat([self._some(part) for part in image.split(self.chunk)])

    def _some(self, x: Tensor) -> Tensor:
        if x.shape[1] == 1:
            x = x.expand(-1, 3, -1, -1)
        if self.resize.shape[0] != self.resize.shape[1]:
            x = (self.resize @ x @ self.resize.T).clamp(0, 1)
        x = ((x - self.mean) / self.std).to(self.model.visual_projection.weight.dtype)  # type: ignore[union-attr]
        return self.model(pixel_values=x).image_embeds.float()


def load_vision(backbone: str | dict[str, Any], revision: str | None = None) -> nn.Module:
    """A CLIP vision model in float32, from a Hub id or folder (with weights) or a config (random weights).

    Raises:
        ZooError: if nothing is found under the id or folder.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    if isinstance(backbone, dict):
        return CLIPVisionModelWithProjection(CLIPVisionConfig(**backbone))
    name = str(Path(backbone).expanduser()) if Path(backbone).expanduser().is_dir() else backbone
    try:
        return CLIPVisionModelWithProjection.from_pretrained(name, revision=revision).float()
    except (OSError, ValueError) as error:
        raise ZooError(
            f"No CLIP vision model under backbone={backbone!r}: {str(error).splitlines()[0]} "
            "Give a Hub id, a folder written by save_pretrained, a config dict, or None for features as they are."
        ) from error


def embed(folder: Path, seed: int, width: int = 32, hidden: int = 0, shifts: Sequence[str] = ()) -> None:
    """Features for recipes without a pretrained encoder: whitened principal components of scikit-learn's digits.

    Args:
        folder: gets ``digits.npz``, or a file for each of ``shifts``, a domain each, which divide the digits for
            training; all of them test. Components are those of all training pictures.
        width: how many components. hidden: of so many random ReLU features instead of pixels, where not 0.
        shifts: looks as the DataModule knows them.
    """
    import numpy as np

    from zoo.vision.federated.data_federated import FederatedClassificationDataModule, shift

    data = FederatedClassificationDataModule(seed=seed, clients=1, partition="iid", val=0.0, test="none")
    data.setup("fit")
    rest: Any = data.dataset("test")
    draws = torch.Generator().manual_seed(seed_from(seed, "embed"))
    order, kinds = torch.randperm(len(data.images), generator=draws), list(shifts) or ["none"]
    parts = [order[i :: len(kinds)] for i in range(len(kinds))]
    train = [pixels(shift(data.images[p], kind, draws)).flatten(1) for p, kind in zip(parts, kinds, strict=True)]
    test = [pixels(shift(rest.pictures.image, kind, draws)).flatten(1) for kind in kinds]
    if hidden:
        weight, bias = torch.randn(64, hidden, generator=draws) / 8, torch.randn(hidden, generator=draws)
        train, test = ([F.relu((x - 0.3) / 0.38 @ weight + bias) for x in xs] for xs in (train, test))
    whole = torch.cat(train)
    _, values, axes = torch.linalg.svd(whole - whole.mean(0), full_matrices=False)
    matrix = axes[:width].T * (len(whole) ** 0.5 / values[:width])
    for i, kind in enumerate(kinds):
        name = kind.replace(":", "_") if shifts else "digits"
        x = {f"x_{split}": ((p[i] - whole.mean(0)) @ matrix).numpy() for split, p in (("train", train), ("test", test))}
        labels = {"y_train": data.labels[parts[i]].numpy(), "y_test": rest.pictures.label.numpy()}
        np.savez(folder / f"{i}_{name}.npz", **x, **labels)


# ---- the shape of a class -------------------------------------------------------------------------------------------


def guide_set(counts: Tensor, share: float) -> Tensor:
    """Which clients stand for a class: those with most samples of it, until they hold this share of all.

    Shapes:
        counts: (s, k); returns: (s, k) bool, True only where there are samples
    """
    order = counts.sort(dim=0, descending=True, stable=True).indices
    sizes = counts.gather(0, order).double()
    before = sizes.cumsum(0) - sizes
    chosen = (before < share * sizes.sum(0)) & (sizes > 0)
    return torch.zeros_like(chosen).scatter(0, order, chosen)


def class_means(x: Tensor, label: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Samples and mean of each class, 0 where there are none.

    Shapes:
        x: (n, d); label: (n,); returns: (k,), (k, d)
    """
    counts = torch.bincount(label, minlength=classes).to(x)
    sums = x.new_zeros(classes, x.shape[1]).index_add_(0, label, x)
    return counts, sums / counts.clamp(min=1)[:, None]


def pool(counts: Tensor, means: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count and mean of all samples of several parts, and how the parts' means spread around it.

    The covariance of all is this spread plus the mean of the parts' own covariances, weighted by ``counts``.

    Shapes:
        counts: (s, k); means: (s, k, d); returns: (k,), (k, d), (k, d, d)
    """
    total = counts.sum(0)
    share = (counts / total.clamp(min=1))[..., None]
    mean = (share * means).sum(0)
    apart = (means - mean) * share.sqrt()
    return total, mean, torch.einsum("skd,ske->kde", apart, apart)


def factor(covariance: Tensor, rank: int | None = None, enlarge: int = 0, smallest: bool = False) -> Tensor:
    """L with L Lᵀ = Σ: eigenvectors times roots of eigenvalues, the largest first; negative ones count as 0.

    Args:
        rank: how many of them; None for all.
        enlarge: multiply the ``enlarge`` largest eigenvalues by 5, ..., 1; the smallest instead with ``smallest``.
    Shapes:
        covariance: (..., d, d); returns: (..., d, r)
    """
    values, vectors = torch.linalg.eigh(covariance)
    if enlarge:
        count = min(enlarge, values.shape[-1])
        times = torch.ones_like(values)
        steps = torch.linspace(5, 1, enlarge, dtype=values.dtype, device=values.device)[:count]
        if smallest:
            times[..., :count] = steps
        else:
            times[..., -count:] = steps.flip(0)
        values = values * times
    order = slice(None) if rank is None else slice(0, rank)
    return (vectors * values.clamp(min=0).sqrt()[..., None, :]).flip(-1)[..., order]


def anchors(
    own: int,
    need: int,
    generator: torch.Generator,
    target: int,
    per_anchor: int | None = None,
    kept: int | None = None,
    prototypes: int = 0,
    per_prototype: int = 0,
    first_only: bool = False,
) -> Tensor:
    """Around which anchor each new sample of a class is drawn: 0 to own - 1 the client's own samples, then prototypes.

    Each anchor offers as many draws as it may be used for, and ``need`` of all these are taken without replacement.
    Where there are too few, every anchor offers the same multiple.

    Args:
        own: samples that the client has. need: samples to draw.
        target: samples that it will have. per_anchor: draws that an own sample offers; None is the single-domain rule:
            one where that suffices, else ``target`` of fewer than ten samples, a tenth of it of more.
        kept: draws around own samples that are kept, of those; None for all.
        prototypes, per_prototype: prototypes, and draws that each offers. first_only: of the first prototype alone,
            where a client has no samples (the authors').
    Shapes:
        returns: (need,) long; empty where there is nothing to draw around
    """
    if per_anchor is None:
        per_anchor = 1 if own >= need else target if own < 10 else max(target // 10, 1)
    offers = torch.arange(own).repeat_interleave(per_anchor)
    if kept is not None:
        offers = offers[torch.randperm(len(offers), generator=generator)[:kept]]
    others = own + torch.arange(1 if first_only and own == 0 else prototypes).repeat_interleave(per_prototype)
    offers = torch.cat([offers, others]) if prototypes else offers
    if need <= 0 or not len(offers):
        return offers[:0]
    offers = offers.repeat(-(-need // len(offers)))
    return offers[torch.randperm(len(offers), generator=generator)[:need]]


class Statistics(nn.Module):
    """What the server knows: counts and means of each client's classes, and each class's count, mean, covariance.

    Args:
        prototypes: whether to keep each client's means, for other domains.
    """

    total: Tensor
    mean: Tensor
    covariance: Tensor
    counts: Tensor
    prototypes: Tensor
    reported: Tensor
    version: Tensor
    known: Tensor

    def __init__(self, clients: int, classes: int, features: int, prototypes: bool):
        super().__init__()
        self.register_buffer("total", torch.zeros(classes))
        self.register_buffer("mean", torch.zeros(classes, features))
        self.register_buffer("covariance", torch.zeros(classes, features, features))
        self.register_buffer("counts", torch.zeros(clients, classes))
        self.register_buffer("prototypes", torch.zeros(clients if prototypes else 0, classes, features))
        self.register_buffer("reported", torch.zeros(clients, dtype=torch.bool))
        # which clients have been sent the shapes as they are now
        self.register_buffer("version", torch.zeros((), dtype=torch.long))
        self.register_buffer("known", torch.zeros(clients, dtype=torch.long))


# ---- accuracy by domain ---------------------------------------------------------------------------------------------


class DomainAccuracy(ClientAccuracy):
    """Adds "domain_accuracy", mean over domains, "domain_spread", standard deviation, and "domain_<i>".

    Client i is of domain i modulo ``domains``.
    """

    def __init__(self, clients: int, domains: int):
        super().__init__(clients)
        self.domains = domains

    def compute(self) -> dict[str, Tensor]:
        found = super().compute()
        place = torch.arange(len(self.total) - 1, device=self.total.device) % self.domains
        zero = self.total.new_zeros(self.domains)
        correct, total = (zero.index_add(0, place, value[1:]) for value in (self.correct, self.total))
        share = (correct / total).float()
        measured = total > 0
        if bool(measured.any()):
            found["domain_accuracy"] = share[measured].mean()
            found["domain_spread"] = share[measured].std(correction=0)
            found |= {f"domain_{i}": share[i] for i in measured.nonzero().flatten().tolist()}
        return found


# ---- the method -----------------------------------------------------------------------------------------------------


class GGEUR(FederatedModule):
    """A linear head on frozen features, trained by clients that fill up their classes from the classes' global shapes.

    A training step is a round. Clients that take part for the first time first send their statistics, and the server
    pools them with those it has; what goes up and down for that is counted in the bytes of that round. Features of a
    client's pictures are computed once in a fit and kept in memory.

    ``geometry="off"`` is FedAvg (or another ``algorithm``) on the same features. `forward` takes pictures, or vectors
    as (b, d, 1, 1) with ``backbone=None``.

    Logged beside accuracies, with ``domains``: "domain_accuracy", "domain_spread", and "domain_0", ...: of each
    domain's clients.

    Args:
        backbone: Hub id or folder of a CLIP model of transformers, whose vision part gives the features, or a
            CLIPVisionConfig as a dict (random weights); None: the picture's values are the features. With an id or
            folder, checkpoints leave it out.
        backbone_revision: commit, tag or branch of the Hub id.
        num_clients: clients there are.
        geometry: how new samples spread: "class" (as the pooled covariance), "isotropic" (alike in all directions, with
            its trace), "repeat" (not at all: anchors are repeated), or "off" (no new samples).
        target: samples of each class that a client fills up to.
        per_anchor: new samples that one own sample is used for at most; None is the rule of the single-domain code.
        kept: new samples around own ones that are kept, before those of prototypes are added; None for all.
        per_prototype: new samples around each other domain's class mean; 0: no means are exchanged.
        fill_absent: fill also classes of which a client has no sample, from other domains' means.
        cap: take only ``target`` of the own samples where there are more.
        guide: share of a class's samples whose holders, those with most first, send its statistics.
        rank: eigenpairs of a covariance that are sent and drawn from, the largest; None for all.
        enlarge: so many of the largest eigenvalues are multiplied by 5, ..., 1.
        domains: how many there are, given to clients in turn; None: every client is one.
        weighted: average heads by the clients' numbers of samples; the authors weigh all alike.
        optimizer: of the clients, "adam" or "sgd".
        lr: of it. local_epochs: passes over a client's own and new samples in a round.
        cache_mb: memory for features, in MB; the oldest are dropped.
        chunk: pictures encoded at once.
        authors_softmax: put a softmax before the cross-entropy, which has its own.
        authors_no_broadcast: clients go on from their own heads; the average is only scored.
        authors_smallest: enlarge the smallest eigenvalues, not the largest.
        authors_first_prototype: fill absent classes from the first other domain's mean alone.
    Raises:
        ValueError: if a number is out of range, or arguments contradict each other.
    Example:
        >>> import torch
        >>> from zoo.vision import GGEUR
        >>> model = GGEUR.from_variant("tiny", in_channels=1, image_size=8, num_classes=4)
        >>> model.predict(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 4])
    """

    monitor, mode = "val/accuracy", "max"
    head: ClassVar[tuple[str, ...]] = ("model.head", "statistics.", "states.", "server.")
    server_only: ClassVar[tuple[str, ...]] = ("statistics.",)
    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar100": {"num_classes": 100, "target": 500},
        "tinyimagenet": {"num_classes": 200, "target": 500, "image_size": 64},
        "digits": {
            "num_clients": 4,
            "target": 2000,
            "per_anchor": 12,
            "kept": 500,
            "per_prototype": 500,
            "guide": 1.0,
            "enlarge": 10,
            "domains": 4,
        },
        "office_home": {
            "num_classes": 65,
            "image_size": 224,
            "num_clients": 4,
            "target": 50,
            "per_anchor": 50,
            "kept": 50,
            "per_prototype": 50,
            "fill_absent": True,
            "cap": True,
            "guide": 1.0,
            "enlarge": 10,
            "domains": 4,
            "local_batch": 16,
            "local_epochs": 1,
        },
        "tiny": {
            "backbone": None,
            "in_channels": 1,
            "image_size": 8,
            "target": 50,
            "lr": 0.01,
            "local_epochs": 1,
            "local_batch": 32,
        },
    }

    def __init__(
        self,
        backbone: str | dict[str, Any] | None = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
        backbone_revision: str | None = None,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
        num_clients: int = 10,
        geometry: str = "class",
        target: int = 5000,
        per_anchor: int | None = None,
        kept: int | None = None,
        per_prototype: int = 0,
        fill_absent: bool = False,
        cap: bool = False,
        guide: float = 0.8,
        rank: int | None = None,
        enlarge: int = 0,
        domains: int | None = None,
        algorithm: str = "fedavg",
        mu: float = 0.1,
        weighted: bool = False,
        optimizer: str = "adam",
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        lr_decay: float = 1.0,
        local_epochs: int = 10,
        local_steps: int | None = None,
        local_batch: int = 64,
        mean: list[float] = [],  # noqa: B006 (read only; the command knows no tuple)
        std: list[float] = [],  # noqa: B006
        cache_mb: int = 2048,
        chunk: int = 256,
        stack: int | None = None,
        authors_softmax: bool = False,
        authors_no_broadcast: bool = False,
        authors_smallest: bool = False,
        authors_first_prototype: bool = False,
    ):
        super(FederatedModule, self).__init__()
        self.save_hyperparameters()
        self._check()
        encoder = None if backbone is None else Encoder(load_vision(backbone, backbone_revision), image_size, chunk)
        self._width = in_channels * image_size**2 if encoder is None else encoder.width
        self._setup()
        self.backbone = encoder
        if encoder is not None:
            self.freeze("backbone")
        if authors_no_broadcast:
            for name, value in self.model.state_dict().items():
                self.states.add(f"own.{name}", value)
        if domains is not None:
            self.accuracy = nn.ModuleDict({f"on_{s}": DomainAccuracy(num_clients, domains) for s in ("val", "test")})
        self.statistics = Statistics(num_clients, num_classes, self._width, per_prototype > 0)
        self._factors: Tensor | None = None
        self._behind: set[int] = set()  # to whom shapes go in this round
        self._features: OrderedDict[Any, tuple[Tensor, Tensor]] = OrderedDict()
        self.register_load_state_dict_post_hook(_forget)

    def _check(self) -> None:
        hp = self.hparams
        if hp.geometry not in ("class", "isotropic", "repeat", "off"):
            raise ValueError(f"geometry is {hp.geometry!r}; 'class', 'isotropic', 'repeat' or 'off'.")
        if hp.optimizer not in ("adam", "sgd"):
            raise ValueError(f"optimizer is {hp.optimizer!r}; 'adam' or 'sgd'.")
        for name, least in (
            ("target", 1), ("per_anchor", 1), ("kept", 0), ("per_prototype", 0), ("rank", 1), ("enlarge", 0),
            ("domains", 1), ("cache_mb", 0), ("chunk", 1),
        ):  # fmt: skip
            value = getattr(hp, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; at least {least}.")
        if not 0 < hp.guide <= 1:
            raise ValueError(f"guide is {hp.guide}; a share in (0, 1].")
        if hp.fill_absent and not hp.per_prototype:
            raise ValueError("fill_absent needs per_prototype above 0: a class without samples has no other anchors.")
        if hp.authors_no_broadcast and hp.algorithm != "fedavg":
            raise ValueError(f"authors_no_broadcast is FedAvg's, not that of algorithm={hp.algorithm!r}.")
        if hp.backbone is not None and (hp.mean or hp.std):
            raise ValueError("mean and std go with backbone=None: a backbone has its own.")
        if hp.backbone is not None and hp.in_channels not in (1, 3):
            raise ValueError(f"in_channels is {hp.in_channels}; a backbone takes pictures of 1 or 3 channels.")

    @classmethod
    def from_backbone(cls, module: nn.Module, **hparams: Any) -> Self:
        """Build around a live `transformers.CLIPVisionModelWithProjection`; its weights are then part of checkpoints.

        Args:
            module: the model; it is frozen and shared, not copied.
            hparams: hyperparameters.
        """
        Encoder(module, 8)  # refuses what is none
        kept = (
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
            "layer_norm_eps", "image_size", "patch_size", "num_channels", "projection_dim",
        )  # fmt: skip
        config: Any = module.config
        self = cls(**{**hparams, "backbone": {name: getattr(config, name) for name in kept}})
        self.backbone = Encoder(module, self.hparams.image_size, self.hparams.chunk)
        return self.freeze("backbone")

    def build(self) -> nn.Module:
        return nn.Sequential(OrderedDict(head=nn.Linear(self._width, self._hp["num_classes"])))

    # ---- features -----------------------------------------------------------------------------------------------

    def encode(self, image: Tensor) -> Tensor:
        """Features of pictures that `normalise` has seen: (n, c, h, w) -> (n, d)."""
        return image.flatten(1) if self.backbone is None else self.backbone(image)

    def logits(self, model: nn.Module, image: Tensor, client: int = -1) -> Tensor:
        return model(self.encode(image))

    @torch.no_grad()
    def features(self, key: Any, image: Tensor) -> Tensor:
        """Features of a set of pictures, kept under a key: they are computed again only for other pictures.

        Shapes:
            image: (n, c, h, w) in [0, 1], or uint8; returns: (n, d)
        """
        if self.backbone is None:
            return self.encode(self.normalise(pixels(image)))
        flat = image.reshape(-1)
        mark = flat[:: max(len(flat) // 4096, 1)]
        if key in self._features:
            kept, found = self._features[key]
            if len(found) == len(image) and torch.equal(kept, mark) and found.device == image.device:
                self._features.move_to_end(key)
                return found
        with full_precision(image):
            parts = [self.encode(self.normalise(pixels(part))) for part in image.split(self.hparams.chunk)]
            found = torch.cat(parts)
        if not image.is_meta:
            self._features[key] = (mark.clone(), found)
            while sum(f.nbytes for _, f in self._features.values()) > 1e6 * self.hparams.cache_mb:
                self._features.popitem(last=False)
        return found

    def _of(self, batch: dict[str, Any], row: int) -> tuple[Tensor, Tensor]:
        """Features and labels of one client of a round."""
        first = sum(batch["size"][:row])
        rows = slice(first, first + batch["size"][row])
        return self.features(("train", batch["client"][row]), batch["image"][rows]), batch["label"][rows]

    # ---- the first exchange -------------------------------------------------------------------------------------

    @property
    def exchanges(self) -> bool:
        """Whether statistics are sent at all."""
        hp = self.hparams
        return hp.geometry in ("class", "isotropic") or (hp.geometry == "repeat" and hp.per_prototype > 0)

    def exchange(self, batch: dict[str, Any]) -> None:
        """Statistics of clients that report for the first time go up; who lacks the shapes as they are gets them."""
        if not self.exchanges or self.device.type == "meta":
            return
        known = self.statistics
        reported = known.reported.tolist()
        new = [row for row, share in enumerate(batch["work"]) if share > 0 and not reported[batch["client"][row]]]
        if new:
            self._report(batch, new)
            self._factors = None
        there = [client for client, share in zip(batch["client"], batch["work"], strict=True) if share > 0]
        ids = torch.tensor(there, device=self.device)
        behind = ids[known.known[ids] < known.version]
        known.known[behind] = known.version
        self._behind = set(behind.tolist())
        self.sent[1] += self._bytes_of_shapes(behind)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        asked = [row for row, share in enumerate(batch["work"]) if share > 0]
        super().training_step(batch, batch_idx)
        # who fell silent, on a machine of its own, may have no shapes, or none any more
        self.statistics.known[[batch["client"][row] for row in asked if batch["work"][row] == 0]] = 0

    def _report(self, batch: dict[str, Any], rows: list[int]) -> None:
        """Ask who has how many samples of which class, then the guides for their means and covariances; pool them."""
        hp, known = self.hparams, self.statistics
        k, d = hp.num_classes, self._width
        nothing: dict[int, Message] = {row: {} for row in rows}
        told = dict(self.consult("counts", batch, nothing, {row: {"counts": (k,)} for row in rows}))
        rows = [row for row in rows if batch["work"][row] > 0]
        own = [answer["counts"] for answer in told.values()]
        counts = gather({"counts": torch.stack(own) if own else known.counts[:0]}, len(rows))["counts"]
        guides = guide_set(counts, hp.guide)
        wanted = guides | (counts > 0) if hp.per_prototype else guides
        spread = guides & (hp.geometry != "repeat")
        asked = {row: {"means": wanted[i], "spread": spread[i]} for i, row in enumerate(rows)}
        shapes = {
            row: {"means": (int(wanted[i].sum()), d), "spread": (int(spread[i].sum()), d, d)}
            for i, row in enumerate(rows)
        }
        mine, within = [], torch.zeros_like(known.covariance)
        for row, answer in self.consult("moments", batch, asked, shapes):  # covariances are summed as they come
            mine.append(within.new_zeros(k, d).index_put((asked[row]["means"],), answer["means"].to(within)))
            for c, value in zip(asked[row]["spread"].nonzero().flatten().tolist(), answer["spread"], strict=True):
                within[c] += value
        there = torch.tensor([batch["work"][row] > 0 for row in rows], device=self.device)
        rows = [row for row in rows if batch["work"][row] > 0]
        counts, guides, wanted, spread = (value[there] for value in (counts, guides, wanted, spread))
        means = gather({"means": torch.stack(mine) if mine else within.new_zeros(0, k, d)}, len(rows))["means"]
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(within)
        parts = torch.cat([known.total[None], counts * guides])
        total, mean, between = pool(parts, torch.cat([known.mean[None], means]))
        within += known.total[:, None, None] * known.covariance
        known.covariance.copy_(between + within / total.clamp(min=1)[:, None, None])
        known.total.copy_(total)
        known.mean.copy_(mean)
        ids = torch.tensor([batch["client"][row] for row in rows], dtype=torch.long, device=self.device)
        known.counts[ids] = counts
        if hp.per_prototype:
            known.prototypes[ids] = means
        known.reported[ids] = True
        known.version += 1
        self.sent[0] += 4 * (counts.numel() + d * int(wanted.sum()) + d * d * int(spread.sum()))

    def answer(self, part: str, batch: dict[str, Any], row: int, asked: Message) -> Message:
        """A client's statistics: "counts" (k,), or of the classes asked for "means" (m, d) and "spread" (g, d, d).

        The spread of a class is its number of samples times their covariance.
        """
        k, first = self.hparams.num_classes, sum(batch["size"][:row])
        if part == "counts":
            label = batch["label"][first : first + batch["size"][row]]
            if int(label.max()) >= k:
                raise ValueError(f"'label' goes up to {int(label.max())}; num_classes is {k}.")
            return {"counts": torch.bincount(label, minlength=k).to(self.statistics.counts)}
        x, label = self._of(batch, row)
        means = class_means(x, label, k)[1]
        apart = [x[label == c] - means[c] for c in asked["spread"].nonzero().flatten().tolist()]
        spread = torch.stack([z.T @ z for z in apart]) if apart else x.new_zeros(0, x.shape[1], x.shape[1])
        return {"means": means[asked["means"]], "spread": spread}

    def _needs(self, client: int) -> tuple[Tensor, Tensor]:
        """Classes that a client may fill (k,), and whose means of which other domains it then uses (m, k); bool."""
        hp = self.hparams
        present = self.statistics.counts[client] > 0
        others = self.others(client)[1] if hp.per_prototype else present[None, :0]
        fills = present | others.any(0) if hp.fill_absent else present
        return fills, others & fills if hp.per_prototype else others

    def _bytes_of_shapes(self, ids: Tensor) -> int:
        """Bytes of the shapes and prototypes that these clients use."""
        per = {"class": self._width * min(self.hparams.rank or self._width, self._width), "isotropic": 1, "repeat": 0}
        needs = [self._needs(client) for client in ids.tolist()]
        return 4 * sum(
            per[self.hparams.geometry] * int(fills.sum()) + self._width * int(others.sum()) for fills, others in needs
        )

    def aside(self, client: int) -> Message:
        """Shapes of the classes that a client fills, and other domains' means, where it lacks them as they are now."""
        if client not in self._behind:
            return {}
        fills, there = self._needs(client)
        found = {"classes": fills.nonzero().flatten()}
        if self.hparams.geometry == "class":
            found["shape"] = self.factors()[fills]
        elif self.hparams.geometry == "isotropic":
            found["shape"] = self.factors()[fills, 0, 0]
        if self.hparams.per_prototype:
            found |= {"there": there, "means": self.others(client)[0][there]}
        return found

    @property
    def _told(self) -> Message | None:
        """On a client's machine what the server sent it `aside`; None where the server's statistics are."""
        if not self.states.held:
            return None
        if "classes" not in self.received:
            raise ZooError(
                "This client has no shapes of classes: it was started again, without a folder to keep them. The server "
                "sends them again in its next round."
            )
        return self.received

    def others(self, client: int) -> tuple[Tensor, Tensor]:
        """Class means of the other domains, each over that domain's clients, and which there are.

        Shapes:
            returns: (m, k, d), (m, k) bool
        """
        known, hp, told = self.statistics, self.hparams, self._told
        if told is not None:
            means = known.mean.new_zeros(*told["there"].shape, self._width)
            return means.index_put((told["there"],), told["means"]), told["there"]
        domains = hp.domains or hp.num_clients
        place = torch.arange(hp.num_clients, device=self.device) % domains
        counts = known.counts.new_zeros(domains, hp.num_classes).index_add(0, place, known.counts)
        sums = known.prototypes.new_zeros(domains, hp.num_classes, self._width)
        sums.index_add_(0, place, known.counts[..., None] * known.prototypes)
        other = torch.arange(domains, device=self.device) != client % domains
        return (sums / counts.clamp(min=1)[..., None])[other], (counts > 0)[other]

    # ---- new samples --------------------------------------------------------------------------------------------

    def factors(self) -> Tensor:
        """What multiplies ε for each class, (k, d, r): computed once after each exchange."""
        if self._factors is None or self._factors.device != self.device:
            self._factors = self._received_factors() if self._told else self._own_factors()
        return self._factors

    def _own_factors(self) -> Tensor:
        hp, covariance = self.hparams, self.statistics.covariance
        if hp.geometry == "class":
            return factor(covariance, hp.rank, hp.enlarge, hp.authors_smallest)
        spread = (covariance.diagonal(dim1=-2, dim2=-1).sum(-1) / self._width).sqrt()
        return spread[:, None, None] * torch.eye(self._width, device=self.device)

    def _received_factors(self) -> Tensor:
        """Those that came `aside`, 0 for classes that this client does not fill."""
        classes, shape = self.received["classes"], self.received["shape"]
        if self.hparams.geometry == "isotropic":
            shape = shape[:, None, None] * torch.eye(self._width, device=self.device)
        return shape.new_zeros(self.hparams.num_classes, *shape.shape[1:]).index_put((classes,), shape)

    @torch.no_grad()
    def fill(self, x: Tensor, label: Tensor, client: int, seed: int) -> tuple[Tensor, Tensor]:
        """A client's samples and new ones beside them, class by class; a function of the seed.

        Shapes:
            x: (n, d); label: (n,); returns: (n', d), (n',)
        """
        hp = self.hparams
        if hp.geometry == "off" or x.is_meta:
            return x, label
        means, there = self.others(client) if hp.per_prototype else (None, None)
        found, labels = [], []
        for c in range(hp.num_classes):
            own = x[label == c]
            draws = torch.Generator().manual_seed(seed_from(seed, "anchors", c))
            if hp.cap and len(own) >= hp.target:
                own = own[torch.randperm(len(own), generator=draws)[: hp.target].to(x.device)]
            if not len(own) and not hp.fill_absent:
                continue
            base, m = own, 0
            if means is not None and there is not None:
                m = int(there[:, c].sum())
                base = torch.cat([own, means[there[:, c], c]])
            need = hp.target - len(own)
            offers = hp.per_anchor, hp.kept, m, hp.per_prototype, hp.authors_first_prototype
            which = anchors(len(own), need, draws, hp.target, *offers).to(x.device)
            found += [own, self._around(base[which], c, seed)]
            labels += [c] * (len(own) + len(which))
        return torch.cat(found), torch.tensor(labels, device=label.device)

    def _around(self, anchor: Tensor, label: int, seed: int) -> Tensor:
        """One new sample around each anchor: (n, d) -> (n, d)."""
        if self.hparams.geometry == "repeat" or not len(anchor):
            return anchor
        shape = self.factors()[label]
        draws = torch.Generator(anchor.device).manual_seed(seed_from(seed, "samples", label))
        noise = torch.randn(len(anchor), shape.shape[1], generator=draws, device=anchor.device)
        return torch.addmm(anchor, noise, shape.T)

    # ---- the round ----------------------------------------------------------------------------------------------

    def local(self, batch: dict[str, Any], down: Message, rows: Sequence[int]) -> tuple[Message, Message, Message]:
        """The engine's, on features: as many clients at a time as train together get their samples."""
        order = sorted(rows, key=lambda row: -batch["size"][row])
        size = self.together(order, down)
        found = []
        for first in range(0, len(order), size):
            part = order[first : first + size]
            with full_precision(batch["image"]):
                sets = [
                    self.fill(*self._of(batch, row), client=batch["client"][row], seed=batch["seed"][row])
                    for row in part
                ]
            few = {key: [batch[key][row] for row in part] for key in ("client", "work", "seed")}
            few |= {"image": torch.cat([x for x, _ in sets]), "label": torch.cat([y for _, y in sets])}
            few["size"] = [len(x) for x, _ in sets]
            del sets
            found.append(super().local(few, down, range(len(part))))
        back = torch.tensor([order.index(row) for row in rows], device=self.device)
        parts = zip(*found, strict=True)
        return tuple({n: torch.cat([m[n] for m in part])[back] for n in part[0]} for part in parts)  # type: ignore[return-value]

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Cross-entropy of the head.

        Shapes:
            batch: "image" (b, d) features; "label", "mask" (b,)
        """
        scores = model(batch["image"])
        scores = scores.softmax(-1) if self.hparams.authors_softmax else scores
        return {"loss": masked_mean(F.cross_entropy(scores, batch["label"], reduction="none"), batch["mask"])}

    def local_optimizer(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        if self.hparams.optimizer == "sgd":
            return super().local_optimizer(parameters)
        return torch.optim.Adam(parameters, lr=self.round_lr(), weight_decay=self.hparams.weight_decay)

    def start_state(self, ids: Sequence[int], down: Message) -> Message:
        if self.hparams.authors_no_broadcast:
            return self.states.read(ids, "own.", self.device)
        return super().start_state(ids, down)

    def broadcast(self) -> Message:
        return {} if self.hparams.authors_no_broadcast else super().broadcast()

    def upload(self, clients: Clients, samples: Samples, down: Message) -> tuple[Message, Message]:
        up, kept = super().upload(clients, samples, down)
        if self.hparams.authors_no_broadcast:
            kept |= {f"own.{name}": value for name, value in clients.state.items()}
        return up, kept

    def aggregate(self, down: Message, up: Message, weights: Tensor, batch: dict[str, Any]) -> None:
        super().aggregate(down, up, weights if self.hparams.weighted else torch.ones_like(weights), batch)

    def together(self, rows: Sequence[int], down: Message) -> int:
        size = super().together(rows, down)
        if self.hparams.stack is None:
            samples = self.hparams.target * self.hparams.num_classes
            size = min(size, max(STACK_BYTES // (4 * self._width * samples), 1))
        return size

    def _cost(self) -> float:
        return 2.0 * self.hparams.local_batch * self._width * self.hparams.num_classes

    # ---- scoring ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _evaluate(self, batch: dict[str, Any], split: str) -> None:
        first = 0
        for client, size in zip(batch["client"], batch["size"], strict=True):
            rows = slice(first, first + size)
            x = self.features((split, client), batch["image"][rows])
            own = self.personal_weights(client) if client >= 0 else {}
            found = functional_call(self.model, own, (x,)).argmax(-1)
            self.accuracy[f"on_{split}"].update(client, found == batch["label"][rows], size)  # type: ignore[operator]
            first += size

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self._features.clear()

    def on_fit_end(self) -> None:
        self._features.clear()

    # ---- the authors' files -------------------------------------------------------------------------------------

    @classmethod
    def convert_state_dict(cls, content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The authors' global head: fc3.weight (k, d), fc3.bias (k,). No statistics are in it: clients report anew.

        Raises:
            ZooError: if a tensor is missing or unknown.
        """
        tensors = unwrap(content)
        if tensors.keys() != {"fc3.weight", "fc3.bias"}:
            raise ZooError(f"Not a GGEUR head: it holds {sorted(tensors)[:4]}; expected fc3.weight and fc3.bias.")
        k, d = tensors["fc3.weight"].shape
        hyperparameters = {"num_classes": k, "authors_softmax": True}
        state = {f"statistics.{n}": v for n, v in Statistics(10, k, d, False).state_dict().items()}
        state |= {f"model.head.{n}": tensors[f"fc3.{n}"].float() for n in ("weight", "bias")}
        state |= {"round": torch.zeros((), dtype=torch.long), "sent": torch.zeros(2, dtype=torch.float64)}
        return hyperparameters, state


def _forget(module: nn.Module, _: Any) -> None:
    """After loading, features and factors are another model's."""
    own: Any = module
    own._features.clear()
    own._factors = None
