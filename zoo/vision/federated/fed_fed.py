"""FedFed: clients share what of their pictures helps to classify them, under noise, and keep the rest.

Paper: Yang, Zhang, Zheng, Tian, Peng, Liu, Han, "FedFed: Feature Distillation against Data Heterogeneity in Federated
Learning", NeurIPS 2023, arXiv:2310.05077. Code by the authors: https://github.com/visitworld123/FedFed, licence MIT.

In: pictures that lie unevenly on many clients. Out: one classifier. A training run has three phases, counted in rounds:

1. ``distill_rounds`` rounds: clients train a small VAE g together, and beside it a classifier f that must recognise the
   residual alone. g(x) is then what a picture looks like, and x - g(x) what f needs of it (Eq. 6):

       re ||g(x) - x||^2 + ce CE(f([x - g(x) + n1; x - g(x) + n2]), y) + kl KL + x_ce CE(f(x), y)

2. ``share_rounds`` rounds, one where everybody takes part: each client sends x - g(x) + n1 and x - g(x) + n2 of all its
   pictures, once. The server pools them. Pictures, g(x) and clean residuals never leave their client.
3. From then on: federated learning of a new classifier, by any algorithm; every local batch is [x; r1; r2], with r1 and
   r2 drawn from the pool in equal numbers of each class.

``distill_rounds=0`` is the algorithm without FedFed.

Departs from the authors' code: the noise is another for each picture, where theirs adds one to a whole batch
(``authors_noise``), which whoever holds two residuals of a batch can cancel. A client of mostly one class skips the
mosaics, as theirs, but goes on with its VAE, which theirs leaves frozen by a switch that only the mosaics turn back
(``authors_frozen``). Optimisers begin anew every round; theirs go on with each client. Classifiers inside the VAE don't
see the mosaics' residuals, which theirs uses for batch norm's running statistics only. Smaller last batches are left
out. The factor of the reconstruction falls from 10 to 1 in their epochs, which begin at 1 in every round: it is 10.

Index legend: s clients, b samples of a local batch, m mosaics, k classes, z latent numbers, c/h/w channels and sides.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from zoo.core import ZooError
from zoo.core.seeding import seed_from
from zoo.engines.federated import (
    Clients,
    FederatedModule,
    Message,
    Samples,
    Views,
    average,
    local_batches,
    masked_mean,
    pixels,
)
from zoo.engines.federated.views import RandAugment
from zoo.nn.classifiers import classifier

# ---- networks -------------------------------------------------------------------------------------------------------


def with_input_norm(net: str | dict[str, Any], sizes: dict[str, Any]) -> nn.Sequential:
    """A classifier of `zoo.nn.classifiers` behind a batch norm of its input, which takes the place of normalisation."""
    stages = classifier(net, **sizes)
    return nn.Sequential(OrderedDict(input=nn.BatchNorm2d(sizes["in_channels"]), **dict(stages.named_children())))


class ResidualBlock(nn.Module):
    """x + conv1(lrelu(norm(conv3(lrelu(x)))))."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, 1, 1)
        self.norm = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.leaky_relu(self.norm(self.conv1(F.leaky_relu(x)))))


class Distiller(nn.Module):
    """The VAE g and the classifier f that looks at what g leaves.

    Args:
        width: channels inside. latent: z. image_size: a multiple of 4. classifier: f.
    Shapes:
        x: (b, c, h, w) in [0, 1]; eps: (b, z) standard normal, none: the mean is taken
        returns: g(x) in (0, 1), as x; mean and logarithm of the variance (b, z)
    """

    def __init__(self, width: int, latent: int, in_channels: int, image_size: int, classifier: nn.Module):
        super().__init__()
        self.shape = (width, image_size // 4, image_size // 4)
        inside, half = width * (image_size // 4) ** 2, width // 2
        self.encoder = nn.Sequential(
            nn.Conv2d(in_channels, half, 4, 2, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU(),
            nn.Conv2d(half, width, 4, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            ResidualBlock(width), nn.BatchNorm2d(width), ResidualBlock(width),
        )  # fmt: skip
        self.mean, self.logvar = nn.Linear(inside, latent), nn.Linear(inside, latent)
        self.back = nn.Linear(latent, inside)
        self.decoder = nn.Sequential(
            ResidualBlock(width), nn.BatchNorm2d(width), ResidualBlock(width), nn.BatchNorm2d(width),
            nn.ConvTranspose2d(width, half, 4, 2, 1, bias=False), nn.BatchNorm2d(half), nn.LeakyReLU(), nn.Tanh(),
            nn.ConvTranspose2d(half, in_channels, 4, 2, 1, bias=False), nn.BatchNorm2d(in_channels), nn.Sigmoid(),
        )  # fmt: skip
        self.classifier = classifier

    def forward(self, x: Tensor, eps: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        inner = self.encoder(x).flatten(1)
        mean, logvar = self.mean(inner), self.logvar(inner)
        z = mean if eps is None else mean + (0.5 * logvar).exp() * eps
        return self.decoder(self.back(z).view(-1, *self.shape)), mean, logvar


# ---- losses of the first phase, each of one client on one batch -----------------------------------------------------


def divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL to the standard normal, over b * 3 * z: the authors' 3, whatever the channels."""
    return -0.5 * (1 + logvar - mean.square() - logvar.exp()).sum() / (3 * mean.numel())


def mixup_loss(model: Distiller, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Step 1: f on mixtures of two pictures, "share" (1,) of each and the rest of the one at "other" (b,)."""
    x, y, share, other = batch["image"], batch["label"], batch["share"], batch["other"]
    scores = model.classifier(share * x + (1 - share) * x[other])
    both = [F.cross_entropy(scores, target, reduction="none") for target in (y, y[other])]
    return {"loss": masked_mean(share * both[0] + (1 - share) * both[1], batch["mask"])}


def mosaic_loss(model: Distiller, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Step 2: g on mosaics, the "weight" (4,) of the joint step's terms in mind."""
    found, mean, logvar = model(batch["image"], batch["eps"])
    weight = batch["weight"]
    return {"loss": weight[0] * F.mse_loss(found, batch["image"]) + weight[2] * divergence(mean, logvar)}


def joint_loss(model: Distiller, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Step 3: g and f together (Eq. 6); residuals and pictures go through f in one batch.

    Shapes:
        batch: "image" (b, c, h, w), "label", "mask" (b,), "eps" (b, z), "noise" (2, b, c, h, w), "weight" (4,) of
        reconstruction, residuals, KL and pictures
    """
    x, y, mask = batch["image"], batch["label"], batch["mask"]
    found, mean, logvar = model(x, batch["eps"])
    scores = model.classifier(torch.cat([*(x - found + batch["noise"]), x]))
    each = F.cross_entropy(scores, y.repeat(3), reduction="none")
    square = (found - x).square().flatten(1).mean(1)
    terms = {
        "mse": masked_mean(square, mask),
        "ce": masked_mean(each[: 2 * len(y)], mask.repeat(2)),
        "kl": divergence(mean, logvar),
        "x_ce": masked_mean(each[2 * len(y) :], mask),
    }
    return {"loss": (torch.stack(list(terms.values())) * batch["weight"]).sum(), **terms}


STEPS = {"mixup": mixup_loss, "mosaic": mosaic_loss, "joint": joint_loss}


def mosaics(x: Tensor, picks: Tensor, corner: Tensor, hole: Tensor) -> Tensor:
    """Grids of 2 x 2 pieces of four pictures, from the same place of each, with a square hole of half the side.

    Shapes:
        x: (s, b, c, h, h); picks: (s, m, 4) which pictures: above left, below left, above right, below right in the
        authors' axes (first rows, then columns); corner: (s, m, 2) of the piece; hole: (s, m, 2) its centre
        returns: (s, m, c, h, h)
    """
    s, m, side = len(x), picks.shape[1], x.shape[-1]
    half, every = side // 2, torch.arange(side, device=x.device)
    rows = corner[..., :1, None, None] + every[:half, None]  # (s, m, 1, half, 1)
    columns = corner[..., 1:, None, None] + every[:half]  # (s, m, 1, 1, half)
    client = torch.arange(s, device=x.device)[:, None, None, None, None]
    pieces = x.movedim(2, -1)[client, picks[..., None, None], rows, columns]  # (s, m, 4, half, half, c)
    grid = pieces.view(s, m, 2, 2, half, half, -1).permute(0, 1, 6, 3, 4, 2, 5).reshape(s, m, -1, side, side)
    near = (every - hole[..., None] >= -half // 2) & (every - hole[..., None] < half // 2)  # (s, m, 2, h)
    return grid.masked_fill((near[..., 0, :, None] & near[..., 1, None, :])[:, :, None], 0.0)


class Moments:
    """AdamW's moments and steps of clients side by side, which outlive the three steps' narrowing to who still works.

    Args:
        state: the clients' tensors, each (s, ...). names: of those that are trained, in their order.
    """

    def __init__(self, state: Message, names: Sequence[str]):
        self.names = list(names)
        self.first = [torch.zeros_like(state[name]) for name in names]
        self.second = [torch.zeros_like(state[name]) for name in names]
        self.steps = [state[name].new_zeros(len(state[name])) for name in names]


PIECE = 2**15
"""Parameters that an optimiser's step of one client takes at once on a CPU, so that they stay in its cache."""


class RowAdamW(torch.optim.Optimizer):
    """The authors' AdamW, for clients that are rows of the same tensors, each with its own steps; some may rest.

        w -= lr sqrt(1 - b2^t) / (1 - b1^t) (decay w + m / (sqrt(v) + 1e-8)),  b1 = 0.9, b2 = 0.999

    Args:
        parameters: each (rows, ...), or without rows where the one client is not stacked. moments: of all clients.
        turn: for each of the moments' names, (s,) bool, who takes the step; none: all.
    """

    def __init__(self, parameters: list[Tensor], moments: Moments, turn: list[Tensor | None], lr: float, decay: float):
        super().__init__(parameters, {"lr": lr, "decay": decay})
        self.moments, self.turn = moments, turn

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        group, all_ = self.param_groups[0], self.moments
        for number, p in enumerate(group["params"]):
            if p.grad is None:
                continue
            stacked = p.ndim == all_.first[number].ndim
            rows = slice(0, len(p) if stacked else 1)
            w, g = (p, p.grad) if stacked else (p[None], p.grad[None])
            first, second, steps = (values[number][rows] for values in (all_.first, all_.second, all_.steps))
            turn = self.turn[number]
            steps += 1 if turn is None else turn[rows]
            size = group["lr"] * (1 - 0.999**steps).sqrt() / (1 - 0.9**steps).clamp(min=1e-12)
            if turn is not None:
                self._some(w, g, first, second, size, turn[rows])
            elif w.numel() > PIECE and len(w) == 1 and w.device.type == "cpu":
                flat = (w.view(-1), g.reshape(-1), first.view(-1), second.view(-1))
                for parts in zip(*(value.split(PIECE) for value in flat), strict=True):
                    self._move(*parts, size)
            else:
                self._move(w, g, first, second, size.view(-1, *[1] * (w.ndim - 1)))

    def _some(self, w: Tensor, g: Tensor, first: Tensor, second: Tensor, size: Tensor, turn: Tensor) -> None:
        """A step of the rows whose turn it is."""
        before = [value.clone() for value in (w, first, second)]
        shape = (-1, *[1] * (w.ndim - 1))
        self._move(w, g, first, second, size.view(shape))
        for value, old in zip((w, first, second), before, strict=True):
            value.copy_(torch.where(turn.view(shape), value, old))

    def _move(self, w: Tensor, g: Tensor, first: Tensor, second: Tensor, size: Tensor) -> None:
        """In place, with two temporary tensors: passes over memory are what a step of many parameters costs."""
        decay = self.param_groups[0]["decay"]
        first.lerp_(g, 0.1)
        square = torch.mul(g, g)
        second.lerp_(square, 0.001)
        way = torch.sqrt(second, out=square).add_(1e-8)
        torch.div(first, way, out=way)
        w -= torch.mul(w, decay).add_(way).mul_(size)


# ---- the pool -------------------------------------------------------------------------------------------------------


def draw_noise(shape: Sequence[int], std: float, kind: str, generator: torch.Generator, once: bool = False) -> Tensor:
    """Noise for pictures of ``shape`` (n, c, h, w); ``once``: one for all n, as the authors' code draws it."""
    size = (1, *shape[1:]) if once else tuple(shape)
    if kind == "gaussian":
        return (std * torch.randn(size, generator=generator)).expand(*shape)
    centred = torch.rand(size, generator=generator, dtype=torch.float64) - 0.5
    found = -std * centred.sign() * torch.log1p(-2 * centred.abs().clamp(max=0.5 - 2**-54))
    return found.float().expand(*shape)


def balanced(labels: Tensor, number: int, classes: int, generator: torch.Generator) -> Tensor:
    """Places of ``number`` samples of the pool: as many of each class, without repetition where there are enough.

    What is left over by the division, or by classes that the pool lacks, is drawn from all.

    Shapes:
        labels: (p,); returns: (number,) long
    """
    order = torch.argsort(labels.double() + torch.rand(len(labels), generator=generator, dtype=torch.float64))
    counts = torch.bincount(labels, minlength=classes)
    each = torch.arange(number // classes)
    first = (counts.cumsum(0) - counts)[counts > 0, None]
    chosen = order[(first + each % counts[counts > 0, None]).flatten()]
    rest = torch.randperm(len(labels), generator=generator)
    return torch.cat([chosen, rest.repeat(-(-number // len(rest)))[: number - len(chosen)]])


# ---- the method -----------------------------------------------------------------------------------------------------


class Pass(Samples):
    """One of the first phase's three ways through the clients' samples: its own order and its own draws."""

    def __init__(self, module: "FedFed", samples: Samples, kind: str, epoch: int):
        hp, batch = module._hp, samples.batch
        seeds = [seed_from(seed, kind, epoch) for seed in batch["seed"]]
        index, mask, counts = local_batches(
            batch["size"], seeds, hp["local_batch"], steps=hp["local_steps"], work=batch["work"], drop_last=True
        )
        for before, row in zip(samples.rows, samples.rows[1:], strict=False):  # rounding a straggler's share
            counts[row] = min(counts[row], counts[before])
        super().__init__(module, {**batch, "seed": seeds}, samples.rows, (index, mask, counts))
        self.kind = kind


class FedFed(FederatedModule):
    """Federated learning on one's own pictures and a pool of all clients' noised performance-sensitive features.

    Args:
        net: name of a classifier of `zoo.nn.classifiers`, or ``{"name": ..., arguments}``, for both classifiers.
        num_classes: classes k. in_channels: channels of a picture, 1 or 3 with `randaugment`. image_size: its side, a
            multiple of 4.
        num_clients: clients there are.
        algorithm: of the last phase: "fedavg", "fedprox", "scaffold" or "fednova".
        mu: weight of the proximal term of "fedprox".
        server_lr: how far the server goes towards the clients' mean, in the last phase.
        lr: of the clients' SGD in the last phase. momentum, weight_decay: of the same.
        lr_decay: factor of that learning rate from round to round.
        local_epochs: passes of each client over its samples in a round of the last phase. local_steps: so many steps
            instead, and in each step of the first phase too.
        local_batch: pictures of a local batch, at least 4.
        norm: normalisation inside the classifiers: "batch", "group" or "none". Their input has batch norm always.
        clip: largest norm of a client's gradient in the last phase; 0 for none.
        augment: views of pictures and, in the last phase, of pooled residuals.
        randaugment: operations of RandAugment on pictures beside, followed by a grey hole; 0 for neither. Mosaics have
            at most two and no hole.
        stack: how many clients train together at most; None decides by cost.
        distill_rounds: rounds of the first phase; 0: no FedFed.
        distill_epochs: passes of each client over its samples in each of them.
        share_rounds: rounds of the second phase. More than one where not all clients take part in a round; each sends
            its residuals once.
        width: channels d inside the VAE. latent: its z.
        vae_lr, vae_decay: of the clients' AdamW in the first phase.
        re, ce, kl, x_ce: weights of reconstruction, residuals' classes, divergence and pictures' classes.
        curriculum: factor of ``re``.
        adaptive: other weights for clients with less than a fifth of the mean number of samples (5 ``re``, ``kl`` / 2),
            or of which 70 % have one class (5 ``ce``, 5 ``kl``, 5 ``x_ce``, no mosaics).
        mixup: parameter of the Beta distribution of mixtures.
        mosaic: mosaics beside each local batch; 0: none.
        std1, std2: standard deviation of the two noises (``noise="laplace"``: its scale).
        noise: "gaussian" or "laplace".
        private: refuse to share without noise.
        authors_noise: one noise for a whole batch, in sharing of 64 pictures, as in the authors' code.
        authors_frozen: clients of mostly one class don't train their VAE, as in the authors' code.
    Raises:
        ValueError: for values out of range, and for no noise with ``private``.

    Example:
        >>> model = FedFed.from_variant("tiny")
        >>> model(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    padded: ClassVar[tuple[str, ...]] = ()
    head: ClassVar[tuple[str, ...]] = ("model.head", "vae.classifier.head")
    ragged: ClassVar[dict[str, float]] = {"first": 0, "second": 0, "label": -1}
    variants: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {
            "net": {"name": "cnn", "widths": [8, 16], "features": 32},
            "norm": "none",
            "local_batch": 64,
            "augment": [],
            "randaugment": 0,
            "distill_rounds": 1,
            "width": 4,
            "latent": 8,
            "mosaic": 16,
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
        lr: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        lr_decay: float = 1.0,
        local_epochs: int = 1,
        local_steps: int | None = None,
        local_batch: int = 32,
        norm: str = "batch",
        clip: float = 0.0,
        augment: list[str] = ["crop:4", "flip"],  # noqa: B006 (read only; the command knows no tuple)
        randaugment: int = 3,
        stack: int | None = None,
        distill_rounds: int = 15,
        distill_epochs: int = 1,
        share_rounds: int = 1,
        width: int = 32,
        latent: int = 2048,
        vae_lr: float = 1e-3,
        vae_decay: float = 1e-6,
        re: float = 5.0,
        ce: float = 2.0,
        kl: float = 0.005,
        x_ce: float = 0.4,
        curriculum: float = 10.0,
        adaptive: bool = True,
        mixup: float = 2.0,
        mosaic: int = 64,
        std1: float = 0.15,
        std2: float = 0.25,
        noise: str = "gaussian",
        private: bool = True,
        authors_noise: bool = False,
        authors_frozen: bool = False,
    ):
        super(FederatedModule, self).__init__()
        self.save_hyperparameters()
        if algorithm not in ("fedavg", "fedprox", "scaffold", "fednova"):
            raise ValueError(
                f"algorithm is {algorithm!r}; FedFed has one global model: fedavg, fedprox, scaffold, fednova."
            )
        if image_size % 4 or image_size < 4:
            raise ValueError(f"image_size is {image_size}; the VAE halves it twice: give a multiple of 4.")
        if local_batch < 4:
            raise ValueError(f"local_batch is {local_batch}; a mosaic takes 4 pictures of a batch.")
        if noise not in ("gaussian", "laplace"):
            raise ValueError(f"noise is {noise!r}; 'gaussian' or 'laplace'.")
        if min(std1, std2) < 0 or (private and distill_rounds and min(std1, std2) == 0):
            raise ValueError(f"std1={std1}, std2={std2}: clients share nothing without noise. Or give private=False.")
        whole = {"distill_rounds": distill_rounds, "mosaic": mosaic, "randaugment": randaugment}
        for key, value in whole.items():
            if value < 0:
                raise ValueError(f"{key} is {value}; it must not be negative.")
        if min(distill_epochs, share_rounds, latent) < 1 or width < 2 or width % 2:
            raise ValueError(
                f"distill_epochs={distill_epochs}, share_rounds={share_rounds}, latent={latent}, width={width}: at "
                "least 1, and width even."
            )
        if min(re, ce, kl, x_ce, vae_lr, vae_decay, curriculum) < 0 or mixup <= 0:
            raise ValueError(
                "Weights and rates of the VAE (re, ce, kl, x_ce, vae_lr, ...) are not negative, mixup above 0."
            )
        self._setup()
        hp = self.hyperparameters
        sizes = {key: self._hp[key] for key in ("num_classes", "in_channels", "image_size", "norm")}
        self.vae = Distiller(width, latent, in_channels, image_size, with_input_norm(net, sizes))
        self.plain, self.mild = Views(hp["augment"]), Views(hp["augment"])
        if randaugment:
            self.views.views.append(RandAugment(randaugment, hole=0.5))
            self.mild.views.append(RandAugment(min(randaugment, 2)))
        picture = (in_channels, image_size, image_size)
        pool = {
            "first": torch.zeros(0, *picture, dtype=torch.half),
            "second": torch.zeros(0, *picture, dtype=torch.half),
            "label": torch.zeros(0, dtype=torch.int32),
            "held": torch.zeros(num_clients, dtype=torch.bool),  # who has downloaded the pool
        }
        for (
            name,
            value,
        ) in pool.items():  # in resumable checkpoints, but not among the weights: see `on_save_checkpoint`
            self.register_buffer(f"pool_{name}", value, persistent=False)
        self.states.add("shared", torch.zeros(()))  # whether a client has sent its residuals

    def build(self) -> nn.Module:
        hp = self._hp
        sizes = {key: hp[key] for key in ("num_classes", "in_channels", "image_size", "norm")}
        return with_input_norm(hp["net"], sizes)

    @property
    def phase(self) -> str:
        """What the coming round is for: "distill", "share" or "train"."""
        done, first = self.done, self._hp["distill_rounds"]
        if not first or done >= first + self._hp["share_rounds"]:
            return "train"
        return "distill" if done < first else "share"

    def round_lr(self) -> float:
        """The clients' learning rate in this round of the last phase."""
        hp = self._hp
        before = hp["distill_rounds"] + hp["share_rounds"] if hp["distill_rounds"] else 0
        return hp["lr"] * hp["lr_decay"] ** max(self.done - before, 0)

    # ---- a round ------------------------------------------------------------------------------------------------

    def broadcast(self) -> Message:
        if self.phase == "train":
            return super().broadcast()
        return {f"vae.{name}": value.detach() for name, value in self.vae.state_dict().items()}

    def start_state(self, ids: Sequence[int], down: Message) -> Message:
        if self.phase == "train":
            return super().start_state(ids, down)
        return {n.removeprefix("vae."): v[None].repeat(len(ids), *[1] * v.ndim) for n, v in down.items()}

    def clients(self, state: Message, stacked: bool, own: Message | None = None) -> Clients:
        if self.phase == "train":
            return super().clients(state, stacked, own)
        self.vae.train()
        return Clients(self.vae, own or state, self.local_optimizer, stacked)

    def work(self, clients: Clients, samples: Samples, down: Message) -> Message:
        if self.phase == "train":
            return super().work(clients, samples, down)
        return self.distill(clients, samples) if self.phase == "distill" else self.extract(samples, down)

    def upload(self, clients: Clients, samples: Samples, down: Message) -> tuple[Message, Message]:
        if self.phase == "train":
            return super().upload(clients, samples, down)
        if self.phase == "distill":
            return {f"vae.{name}": value for name, value in clients.state.items()}, {}
        done = {"shared": torch.ones(len(samples.rows), device=self.device)}
        return samples.shared, done  # type: ignore[attr-defined]

    def aggregate(self, down: Message, up: Message, weights: Tensor, batch: dict[str, Any]) -> None:
        if self.phase == "train":
            super().aggregate(down, up, weights, batch)
        elif self.phase == "distill":
            state = self.vae.state_dict()
            for name, value in average(up, weights).items():
                state[name.removeprefix("vae.")].copy_(value)
        else:
            self.take_in(up)

    def bytes_down(self, down: Message, clients: Sequence[int]) -> int:
        """Beside the weights, the pool to every client that has none yet."""
        found = super().bytes_down(down, clients)
        if down and next(iter(down)).startswith("model."):
            new = [client for client in clients if not self.pool_held[client]] if len(self.pool_label) else []
            for client in new:
                self.pool_held[client] = True
            found += len(new) * (self.pool_first.nbytes + self.pool_second.nbytes + self.pool_label.nbytes)
        return found

    def bytes_up(self, up: Message) -> int:
        """Shared residuals are counted without the padding to the largest client."""
        if "label" not in up:
            return super().bytes_up(up)
        sample = 2 * up["first"][0, 0].nbytes + up["label"].element_size()
        return 0 if up["label"].is_meta else int((up["label"] >= 0).sum()) * sample

    # ---- phase 1: distillation ----------------------------------------------------------------------------------

    def distill(self, clients: Clients, samples: Samples) -> Message:
        """Train the VAE and its classifier: an epoch of mixtures, of mosaics, of the joint loss, in turns."""
        hp, state = self._hp, clients.state
        poor, skewed = self.kinds(samples)
        one, five = torch.ones_like(poor, dtype=torch.float32), torch.full(poor.shape, 5.0, device=poor.device)
        weight = torch.stack([
            hp["curriculum"] * hp["re"] * torch.where(poor, five, one), hp["ce"] * torch.where(skewed, five, one),
            hp["kl"] * torch.where(poor, 0.5 * one, torch.where(skewed, five, one)),
            hp["x_ce"] * torch.where(skewed, five, one),
        ], 1)  # fmt: skip
        mosaic = torch.zeros_like(weight)
        mosaic[:, 0], mosaic[:, 2] = hp["curriculum"] * hp["re"], hp["kl"]
        weights = {"joint": weight, "mosaic": mosaic}
        moments = Moments(state, [name for name in state if name in clients.start])
        rest: dict[str, list[Tensor | None]] = {"mixup": [None] * len(moments.names)}
        rest["mosaic"] = [~skewed] * len(moments.names)
        frozen = ~skewed if hp["authors_frozen"] else None
        rest["joint"] = [None if name.startswith("classifier.") else frozen for name in moments.names]
        logs: Message = {}
        for epoch in range(hp["distill_epochs"]):
            for kind in STEPS if hp["mosaic"] else ("mixup", "joint"):

                def make(leaves: list[Tensor], turn: list[Tensor | None] = rest[kind]) -> torch.optim.Optimizer:
                    return RowAdamW(leaves, moments, turn, hp["vae_lr"], hp["vae_decay"])

                if kind == "mosaic" and not skewed.is_meta and bool(skewed.all()):
                    continue
                still = {n: v.clone() for n, v in state.items() if n not in clients.start} if kind == "mosaic" else {}
                part, way = Clients(self.vae, state, make, clients.stacked), Pass(self, samples, kind, epoch)
                counts = torch.tensor(way.counts, dtype=torch.float32, device=self.device)
                total: Message = {}
                for count, batch in way:
                    if count < part.count:
                        part.narrow(count)
                    if kind in weights:
                        batch["weight"] = weights[kind][:count]
                    only = "classifier." if kind == "mixup" else ""
                    for name, value in part.step(STEPS[kind], batch, only).items():
                        total.setdefault(name, torch.zeros_like(counts))[:count] += value
                for name, value in still.items():  # statistics of who skips the mosaics rest too
                    value = torch.where(skewed.view(-1, *[1] * (value.ndim - 1)), value, state[name])
                    state[name].copy_(value)
                logs = {name: value / counts for name, value in total.items()}
        return logs

    def kinds(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Which clients have few samples, and which mostly one class: (s,) bool; none without ``adaptive``."""
        sizes = torch.tensor(samples.batch["size"], dtype=torch.float32, device=self.device)
        own = sizes[samples.rows]
        every = torch.arange(self._hp["num_classes"], device=self.device)
        labels = [samples.own("label", i).to(self.device) for i in range(len(samples.rows))]
        most = torch.stack([(label[:, None] == every).sum(0).max() for label in labels])
        few = own < 0.2 * sizes.mean()
        mostly = (own > 0.2 * sizes.mean()) & (most > 0.7 * own)
        return (few, mostly) if self._hp["adaptive"] else (few & False, mostly & False)

    def local_batch(self, samples: Samples, step: int, count: int) -> dict[str, Tensor]:
        if not isinstance(samples, Pass):
            found = super().local_batch(samples, step, count)
            return found | self.pooled(samples, step, count) if len(self.pool_label) else found
        kind, generators = samples.kind, samples.generators[:count]
        if kind != "mosaic":
            found = super().local_batch(samples, step, count)
            shape = found["image"].shape[1:]
            draw = self.draw_mixup if kind == "mixup" else self.draw_joint
        else:
            rows = samples.index[:count, step].to(self.device)
            found = {"image": self.mild(pixels(samples.batch["image"][rows]), generators)}
            shape, draw = found["image"].shape[1:], self.draw_mosaic
        draws = [draw(shape, generator) for generator in generators]
        found |= {key: torch.stack([own[key] for own in draws]).to(self.device) for key in draws[0]}
        if kind == "mosaic":
            image = mosaics(found["image"], *(found.pop(key) for key in ("picks", "corner", "hole")))
            found |= {"image": image, "mask": torch.ones(image.shape[:2], dtype=torch.bool, device=self.device)}
        return found

    def draw_mixup(self, shape: torch.Size, generator: torch.Generator) -> Message:
        beta = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        share = torch.tensor([beta.beta(self._hp["mixup"], self._hp["mixup"])], dtype=torch.float32)
        return {"share": share, "other": torch.randperm(shape[0], generator=generator)}

    def draw_mosaic(self, shape: torch.Size, generator: torch.Generator) -> Message:
        m, side = self._hp["mosaic"], shape[-1]
        return {
            "picks": torch.rand(m, shape[0], generator=generator).argsort(1)[:, :4],
            "corner": torch.randint(side // 2 + 1, (m, 2), generator=generator),
            "hole": torch.randint(side, (m, 2), generator=generator),
            "eps": torch.randn(m, self._hp["latent"], generator=generator),
        }

    def draw_joint(self, shape: torch.Size, generator: torch.Generator) -> Message:
        hp = self._hp
        noises = [draw_noise(shape, hp[f"std{i}"], hp["noise"], generator, hp["authors_noise"]) for i in (1, 2)]
        return {"eps": torch.randn(shape[0], hp["latent"], generator=generator), "noise": torch.stack(noises)}

    # ---- phase 2: sharing ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def residuals(self, x: Tensor, weights: Message, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """x - g(x) of pictures in [0, 1], clean, and with each of the two noises; g by its weights, in eval mode.

        Shapes:
            x: (n, c, h, w); returns: three times the same
        """
        hp, found = self._hp, []
        self.vae.eval()
        for part in x.split(64):  # the authors' batch
            clean = part - functional_call(self.vae, weights, (part,))[0]
            noises = (
                draw_noise(part.shape, hp[s], hp["noise"], generator, hp["authors_noise"]) for s in ("std1", "std2")
            )
            found.append((clean, *(clean + noise.to(clean) for noise in noises)))
        first, second, third = (torch.cat(parts) for parts in zip(*found, strict=True))
        return first, second, third

    def extract(self, samples: Samples, down: Message) -> Message:
        """The noised residuals of all pictures of the clients, without views, padded to the largest client.

        They wait in ``samples.shared``: "first", "second" (s, n, c, h, 2 w) bytes of half numbers, "label" (s, n), -1
        in the padding and for clients that have shared before. Logs "kept", the part of the pictures' variance that g
        explains: what stays with the clients.
        """
        hp, most = self._hp, max(samples.batch["size"])
        weights = {name.removeprefix("vae."): value for name, value in down.items()}
        done = self.states.read(samples.ids, "shared")[""]
        shape = (len(samples.rows), most, hp["in_channels"], hp["image_size"], hp["image_size"])
        first, second = torch.zeros(2, *shape, dtype=torch.half, device=self.device)
        label = torch.full(shape[:2], -1, dtype=torch.int32, device=self.device)
        kept = torch.zeros(len(samples.rows), device=self.device)
        for i, row in enumerate(samples.rows):
            x = pixels(samples.own("image", i).to(self.device))
            generator = torch.Generator().manual_seed(seed_from(samples.batch["seed"][row], "share"))
            clean, *noised = self.residuals(x, weights, generator)
            kept[i] = 1 - clean.square().sum() / (x - x.mean(0)).square().sum().clamp(min=1e-9)
            if not done[i]:
                first[i, : len(x)], second[i, : len(x)] = noised
                label[i, : len(x)] = samples.own("label", i)
        # as bytes: autocast joins no half tensors
        shared = {"first": first.view(torch.uint8), "second": second.view(torch.uint8), "label": label}
        samples.shared = shared  # type: ignore[attr-defined]
        return {"kept": kept}

    def take_in(self, up: Message) -> None:
        """Add what came up to the pool."""
        real = up["label"] >= 0
        for name in ("first", "second", "label"):
            old = getattr(self, f"pool_{name}")
            new = up[name][real].view(old.dtype)
            with torch.autocast(self.device.type, enabled=False):
                setattr(self, f"pool_{name}", torch.cat([old, new]))

    # ---- phase 3: federated learning with the pool --------------------------------------------------------------

    def pooled(self, samples: Samples, step: int, count: int) -> Message:
        """Two residuals beside each picture of a local batch: "shared" (s, 2 b, c, h, w), "shared_label" (s, 2 b).

        In every local epoch a client draws as many of each kind as it has pictures, of all classes equally many, and
        pairs them with its pictures.
        """
        hp, drawn = self._hp, samples.__dict__.setdefault("drawn", {})
        images, labels, all_labels = [], [], self.pool_label.cpu().long()
        for i in range(count):
            size = samples.spans[i][1] - samples.spans[i][0]
            epoch = step // max(size // hp["local_batch"], 1)
            if drawn.get(i, (-1,))[0] != epoch:
                generator = torch.Generator().manual_seed(
                    seed_from(samples.batch["seed"][samples.rows[i]], "pool", epoch)
                )
                drawn[i] = (epoch, *(balanced(all_labels, size, hp["num_classes"], generator) for _ in range(2)))
            own = samples.index[i, step] - samples.spans[i][0]
            first, second = (places[own] for places in drawn[i][1:])
            images.append(torch.cat([self.pool_first[first].float(), self.pool_second[second].float()]))
            labels.append(all_labels[torch.cat([first, second])])
        image = self.plain(torch.stack(images), samples.generators[:count])
        return {"shared": image, "shared_label": torch.stack(labels).to(self.device)}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Cross-entropy of pictures and residuals, which go through the network in one batch.

        Shapes:
            batch: "image" (b, c, h, w); "label", "mask" (b,); "shared" (2 b, c, h, w); "shared_label" (2 b,)
        """
        if "shared" not in batch:
            return super().loss(model, batch)
        scores = self.logits(model, torch.cat([batch["image"], batch["shared"]]))
        each = F.cross_entropy(scores, torch.cat([batch["label"], batch["shared_label"]]), reduction="none")
        return {"loss": masked_mean(each, batch["mask"].repeat(3))}

    # ---- checkpoints --------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A run's checkpoints hold the pool, what is saved for the Hub does not."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["pool"] = {n: v for n, v in self.named_buffers(recurse=False) if n.startswith("pool_")}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        for name, value in checkpoint.get("pool", {}).items():
            setattr(self, name, value.to(self.device))

    @classmethod
    def convert_state_dict(cls, content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Take over state dicts of the authors' VAE and classifier, ResNets: ``{"vae": ..., "classifier": ...}``."""
        if not {"vae", "classifier"} <= content.keys():
            raise ZooError(f"Expected the state dicts of 'vae' and 'classifier', not {', '.join(list(content)[:3])}.")
        vae, own = content["vae"], content["classifier"]
        blocks = [
            sum(1 for n in own if n.startswith(f"layer{i}.") and n.endswith(".conv1.weight")) for i in range(1, 5)
        ]
        deep = any(name.endswith("conv3.weight") for name in own)
        depth = {(1, 1, 1, 1): 10, (2, 2, 2, 2): 18, (3, 4, 6, 3): 50 if deep else 34}.get(tuple(blocks))
        if depth is None:
            raise ZooError(f"The classifier has {blocks} blocks; ResNets of depth 10, 18, 34 and 50 convert.")
        width = vae["encoder.2.weight"].shape[0]
        side = round((len(vae["fc21.bias"]) / width) ** 0.5)
        hyperparameters = {
            "net": {"name": f"resnet{depth}", "width": len(own["bn1.weight"])},
            "num_classes": len(own["linear.bias"]),
            "in_channels": own["conv1.weight"].shape[1],
            "image_size": 4 * side,
            "width": width,
            "latent": len(vae["fc11.bias"]),
        }
        state = {f"model.{our_name(name)}": value for name, value in own.items()}
        state |= {f"vae.{our_name(name)}": value for name, value in vae.items()}
        state |= {"round": torch.zeros((), dtype=torch.long), "sent": torch.zeros(2, dtype=torch.float64)}
        return hyperparameters, state


def our_name(name: str) -> str:
    """The name of one of the authors' tensors here, of their VAE or their ResNet."""
    if name.startswith("classifier."):
        return f"classifier.{our_name(name.removeprefix('classifier.'))}"
    first, _, last = name.partition(".")
    whole = {"encoder_former": "encoder.0", "decoder_last": "decoder.8", "xi_bn": "decoder.9", "fc11": "mean",
             "fc12": "logvar", "fc21": "back", "init_bn": "input", "conv1": "stem.0", "bn1": "stem.1",
             "linear": "head"}  # fmt: skip
    if first in whole:
        return f"{whole[first]}.{last}"
    if first in ("encoder", "decoder"):
        number, _, last = last.partition(".")
        inner = {"convs.1": "conv1", "convs.2": "norm", "convs.4": "conv2"}
        for theirs, ours in inner.items():
            last = f"{ours}.{last.removeprefix(theirs + '.')}" if last.startswith(theirs + ".") else last
        return f"{first}.{int(number) + (first == 'encoder')}.{last}"
    return name.replace(".bn", ".norm")
