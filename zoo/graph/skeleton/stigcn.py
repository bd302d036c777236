"""STIGCN: recognises human actions from moving joints, with inception blocks over space and time side by side.

Paper: Zhen Huang, Xu Shen, Xinmei Tian, Houqiang Li, Jianqiang Huang, Xian-Sheng Hua, "Spatio-Temporal Inception Graph
Convolutional Networks for Skeleton-Based Action Recognition", ACM MM 2020, arXiv:2011.13322.
Code by the authors: https://github.com/yellowtownhz/STIGCN, CC BY-NC 4.0.
Reproduces: the single-stream network of the authors' code, 1,596,474 parameters for NTU RGB+D 60.

In: joint coordinates over time, for one or two people. Out: a score per action.

    y = relu( Space(x) + Time(x) + shortcut(x) )
    Space(x) = BN W [ relu BN W_k x (A_k + P_k + α C(x)) ]_k      A: I, I - In, and two polynomials of S = In + Out
    C(x) = softmax_rows( θ(x)ᵀ φ(x) / (w T) )                     which joints move together in this clip
    Time(x) = BN W [ relu BN (w_1 * x), relu BN (w_2 * (x_{t+1} - x_t)) ]

The channel maps W_k are applied before the joints are mixed, all at once: both are linear, so the order is free, and
there are fewer channels to mix afterwards.

Departs: the powers in the Chebyshev-like matrices are taken entry by entry, as in the authors' code; ``cheby="matrix"``
takes powers of the matrix, as the polynomials' name says.

Index legend: b clips, c channels, t frames, v joints, m people, w width of a branch, g graph branches.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from zoo.core import ZooError, ZooModule, check_finite, unwrap
from zoo.graph.skeleton.data_skeleton import LAYOUTS

BRANCHES = ("joint", "bone", "cheby", "soft")


# ---- the skeleton's graph ---------------------------------------------------------------------------------------


def partitions(layout: str) -> Tensor:
    """Three matrices of a skeleton: itself, inwards (towards the root) and outwards, these two with columns of sum 1.

    Shapes:
        returns: (3, v, v); an edge (child, parent) stands at [parent, child] of the second
    Raises:
        ValueError: for an unknown layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; expected one of {', '.join(LAYOUTS)}.")
    joints, edges = LAYOUTS[layout].joints, LAYOUTS[layout].edges
    inward = torch.zeros(joints, joints)
    for child, parent in edges:
        inward[parent, child] = 1
    parts = [a / a.sum(0).clamp_min(1) for a in (inward, inward.T)]
    return torch.stack([torch.eye(joints), *parts])


def fixed_graphs(layout: str, branches: list[str], cheby: Literal["entries", "matrix"] = "entries") -> Tensor:
    """The matrix of each graph branch.

        joint I;  bone I - In;  cheby 4 S² - S - 2 I;  soft softmax_rows((8 S⁴ - 4 S² - 4 S + I) / v)

    Shapes:
        returns: (g, v, v)
    """
    eye, inward, outward = partitions(layout)
    s = inward + outward

    def power(n: int) -> Tensor:
        return s.pow(n) if cheby == "entries" else torch.linalg.matrix_power(s, n)

    found = {
        "joint": eye,
        "bone": eye - inward,
        "cheby": 4 * power(2) - s - 2 * eye,
        "soft": ((8 * power(4) - 4 * power(2) - 4 * s + eye) / len(s)).softmax(-2),
    }
    return torch.stack([found[name] for name in branches])


# ---- blocks -----------------------------------------------------------------------------------------------------


def conv(inner: int, outer: int, kernel: int = 1, branches: int = 1, bias: bool = False) -> nn.Conv2d:
    """Convolution along time, initialised as ``branches`` separate ones of ``outer / branches`` channels (fan out)."""
    layer = nn.Conv2d(inner, outer, (kernel, 1), padding=(kernel // 2, 0), bias=bias)
    nn.init.normal_(layer.weight, 0, math.sqrt(2 * branches / (outer * kernel)))
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class Space(nn.Module):
    """Graph convolutions with several fixed, one learned and one clip-dependent matrix, side by side.

    Shapes:
        x: (b, c, t, v); returns: (b, outer, t, v)
    """

    def __init__(self, inner: int, outer: int, graphs: Tensor, relation: bool = True):
        super().__init__()
        g = len(graphs)
        self.width = outer // g
        self.register_buffer("graphs", graphs.clone(), persistent=False)
        self.offsets = nn.Parameter(torch.full_like(graphs, 1e-6))
        self.relate = conv(inner, 2 * self.width, branches=2, bias=True) if relation else None
        self.scale = nn.Parameter(torch.full((1,), 1e-6)) if relation else None
        self.mix, self.norm = conv(inner, g * self.width, branches=g), nn.BatchNorm2d(g * self.width)
        self.fuse, self.fuse_norm = conv(g * self.width, outer), nn.BatchNorm2d(outer)

    def relation(self, x: Tensor) -> Tensor:
        """C(x): (b, v, v), columns of sum 1."""
        assert self.relate is not None
        theta, phi = self.relate(x).split(self.width, 1)
        size = self.width * x.shape[2]
        return (theta.flatten(1, 2).mT @ phi.flatten(1, 2) / size).softmax(-2)

    def forward(self, x: Tensor) -> Tensor:
        b, _, t, v = x.shape
        a = (self.graphs + self.offsets).unsqueeze(0)  # (1, g, v, v)
        if self.relate is not None:
            a = a + self.scale * self.relation(x).unsqueeze(1)
        y = self.mix(x).view(b, -1, self.width * t, v) @ a.to(x.dtype)
        y = F.relu(self.norm(y.view(b, -1, t, v)))
        return self.fuse_norm(self.fuse(y))


class Time(nn.Module):
    """Convolutions over three frames, of positions and of their change to the next frame.

    Shapes:
        x: (b, c, t, v); returns: (b, outer, t, v)
    """

    def __init__(self, inner: int, outer: int, motion: bool = True):
        super().__init__()
        width = outer // 2 if motion else outer
        self.still, self.still_norm = conv(inner, width, 3), nn.BatchNorm2d(width)
        self.moving, self.moving_norm = (conv(inner, width, 3), nn.BatchNorm2d(width)) if motion else (None, None)
        self.fuse, self.fuse_norm = conv(outer, outer), nn.BatchNorm2d(outer)

    def forward(self, x: Tensor) -> Tensor:
        parts = [F.relu(self.still_norm(self.still(x)))]
        if self.moving is not None:
            change = F.pad(x[:, :, 1:] - x[:, :, :-1], (0, 0, 0, 1))  # the last frame does not move
            parts.append(F.relu(self.moving_norm(self.moving(change))))
        return self.fuse_norm(self.fuse(torch.cat(parts, 1)))


class InceptionBlock(nn.Module):
    """``relu(Space(x) + Time(x) + shortcut(x))``; with a shortcut both start near 0.

    Shapes:
        x: (b, c, t, v); returns: (b, outer, t, v)
    """

    def __init__(self, inner: int, outer: int, graphs: Tensor, relation: bool, motion: bool, shortcut: bool = True):
        super().__init__()
        self.space, self.time = Space(inner, outer, graphs, relation), Time(inner, outer, motion)
        self.residual = shortcut
        changed = shortcut and inner != outer
        self.widen, self.widen_norm = (conv(inner, outer), nn.BatchNorm2d(outer)) if changed else (None, None)
        if shortcut:
            nn.init.constant_(self.space.fuse_norm.weight, 1e-6)
            nn.init.constant_(self.time.fuse_norm.weight, 1e-6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.space(x) + self.time(x)
        if self.residual:
            y = y + (x if self.widen is None else self.widen_norm(self.widen(x)))
        return F.relu(y)


class PlainBlock(nn.Module):
    """The baseline's block (ST-GCN): a graph convolution over three partitions, then a convolution over nine frames.

    Shapes:
        x: (b, c, t, v); returns: (b, outer, t, v)
    """

    def __init__(self, inner: int, outer: int, graphs: Tensor, shortcut: bool = True):
        super().__init__()
        self.register_buffer("graphs", graphs.clone(), persistent=False)
        self.importance = nn.Parameter(torch.ones_like(graphs))
        self.mix, self.mix_norm = conv(inner, len(graphs) * outer, bias=True), nn.BatchNorm2d(outer)
        self.time, self.time_norm = conv(outer, outer, 9, bias=True), nn.BatchNorm2d(outer)
        self.residual = shortcut
        changed = shortcut and inner != outer
        self.widen, self.widen_norm = (conv(inner, outer), nn.BatchNorm2d(outer)) if changed else (None, None)

    def forward(self, x: Tensor) -> Tensor:
        b, _, t, v = x.shape
        y = self.mix(x).view(b, len(self.graphs), -1, v) @ (self.graphs * self.importance)
        y = F.relu(self.mix_norm(y.sum(1).view(b, -1, t, v)))
        y = self.time_norm(self.time(y))
        if self.residual:
            y = y + (x if self.widen is None else self.widen_norm(self.widen(x)))
        return F.relu(y)


class SkeletonNet(nn.Module):
    """Norm of the input, four stages with halved frames between them, mean over joints, frames and people, linear.

    Shapes:
        skeleton: (b, c, t, v, m); returns: (b, num_classes)
    """

    def __init__(
        self,
        layout: str,
        in_channels: int,
        persons: int,
        num_classes: int,
        widths: list[int],
        layers: list[int],
        architecture: str,
        branches: list[str],
        cheby: Literal["entries", "matrix"],
        relation: bool,
        motion: bool,
        dropout: float,
    ):
        super().__init__()
        self.norm = nn.BatchNorm1d(persons * LAYOUTS[layout].joints * in_channels)
        plain = architecture == "stgcn"
        graphs = partitions(layout) if plain else fixed_graphs(layout, branches, cheby)

        def block(inner: int, outer: int, shortcut: bool = True) -> nn.Module:
            if plain:
                return PlainBlock(inner, outer, graphs, shortcut)
            return InceptionBlock(inner, outer, graphs, relation, motion, shortcut)

        self.first, inner = block(in_channels, widths[0], shortcut=False), widths[0]
        self.stages = nn.ModuleList()
        for count, outer in zip(layers, widths[1:], strict=True):
            self.stages.append(nn.Sequential(*(block(inner if i == 0 else outer, outer) for i in range(count))))
            inner = outer
        self.dropout, self.fc = nn.Dropout(dropout), nn.Linear(inner, num_classes)
        nn.init.normal_(self.fc.weight, 0, math.sqrt(2 / num_classes))
        nn.init.zeros_(self.fc.bias)

    def forward(self, skeleton: Tensor) -> Tensor:
        b, c, t, v, m = skeleton.shape
        x = self.norm(skeleton.permute(0, 4, 3, 1, 2).reshape(b, m * v * c, t))
        x = x.view(b, m, v, c, t).permute(0, 1, 3, 4, 2).reshape(b * m, c, t, v)
        x = self.first(x)
        for stage in self.stages:
            x = stage(F.max_pool2d(x, (2, 1)))
        x = x.view(b, m, x.shape[1], -1).mean(3).mean(1)
        return self.fc(self.dropout(x))


# ---- the method -------------------------------------------------------------------------------------------------


class STIGCN(ZooModule):
    """Spatio-temporal inception graph convolutional network.

    Args:
        layout: which joints: "ntu" (25), "openpose" (18, as in Kinetics-Skeleton) or "jhmdb" (15).
        in_channels: coordinates a joint (x, y, z, or x, y, confidence).
        persons: people a clip; missing ones are zeros.
        num_classes: actions.
        widths: channels of the four stages.
        layers: blocks of the stages after the first, which has one.
        architecture: "stigcn", or "stgcn" for the baseline with one graph and one temporal path in sequence.
        branches: graph branches, some of "joint", "bone", "cheby", "soft"; the paper has all.
        cheby: powers in the last two "entries" by entry (the authors' code) or of the "matrix".
        relation: learn which joints move together in a clip, C(x).
        motion: the temporal path over changes between frames.
        dropout: before the last layer.
        lr: of SGD with Nesterov momentum 0.9; falls to 0 on a cosine, epoch by epoch.
        weight_decay: of SGD.
    Shapes:
        skeleton: (b, in_channels, t, v, persons), t at least 2 to the power of the stages after the first
        returns: (b, num_classes) logits
    Raises:
        ValueError: for sizes or names that do not fit.
    Example:
        >>> model = STIGCN.from_variant("tiny")
        >>> model.predict(torch.randn(1, 3, 32, 25, 2)).shape
        torch.Size([1, 60])
    """

    variants = {"tiny": {"widths": [8, 8, 16, 16], "layers": [1, 1, 1]}}
    monitor, mode = "val/accuracy", "max"
    head = ("net.fc",)

    def __init__(
        self,
        layout: Literal["ntu", "openpose", "jhmdb"] = "ntu",
        in_channels: int = 3,
        persons: int = 2,
        num_classes: int = 60,
        widths: list[int] = [64, 64, 128, 256],  # noqa: B006
        layers: list[int] = [3, 3, 3],  # noqa: B006
        architecture: Literal["stigcn", "stgcn"] = "stigcn",
        branches: list[str] = ["joint", "bone", "cheby", "soft"],  # noqa: B006
        cheby: Literal["entries", "matrix"] = "entries",
        relation: bool = True,
        motion: bool = True,
        dropout: float = 0.5,
        lr: float = 0.1,
        weight_decay: float = 5e-4,
    ):
        super().__init__()
        self.save_hyperparameters()
        if min(in_channels, persons, num_classes) < 1 or len(widths) != len(layers) + 1 or min(layers, default=0) < 1:
            raise ValueError(
                f"in_channels={in_channels}, persons={persons}, num_classes={num_classes} and all of layers={layers} "
                f"must be at least 1, and widths={widths} have one entry more than layers."
            )
        if not branches or len(set(branches)) < len(branches) or set(branches) - set(BRANCHES):
            raise ValueError(f"branches is {branches}; expected some of {', '.join(BRANCHES)}, each once.")
        if any(w % (2 * len(branches)) for w in widths):
            raise ValueError(f"widths={widths} must be multiples of 2 * {len(branches)} branches.")
        self.net = SkeletonNet(
            layout, in_channels, persons, num_classes, widths, layers, architecture, branches, cheby, relation, motion,
            dropout,
        )  # fmt: skip
        self.joints = LAYOUTS[layout].joints
        top = {"accuracy": 1, "top5": min(5, num_classes)}
        self.metrics = nn.ModuleDict(
            {
                f"{split}_{name}": MulticlassAccuracy(num_classes, top_k=k, average="micro")
                for split in ("val", "test")
                for name, k in top.items()
            }
        )

    def forward(self, skeleton: Tensor) -> Tensor:
        hp, stages = self.hparams, len(self.hparams.layers)
        wanted = (hp.in_channels, self.joints, hp.persons)
        if skeleton.ndim != 5 or (skeleton.shape[1], *skeleton.shape[3:]) != wanted:
            raise ValueError(
                f"'skeleton' has shape {tuple(skeleton.shape)}; expected (batch, {wanted[0]} coordinates, frames, "
                f"{wanted[1]} joints of layout {hp.layout!r}, {wanted[2]} persons)."
            )
        if skeleton.shape[2] < 2**stages:
            raise ValueError(f"'skeleton' has {skeleton.shape[2]} frames; {stages} poolings need {2**stages} or more.")
        return self.net(skeleton)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch["skeleton"]), batch["label"])
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch["label"]))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def _evaluate(self, batch: dict[str, Any], split: str) -> None:
        logits, label = self(batch["skeleton"]), batch["label"]
        self.log(f"{split}/loss", F.cross_entropy(logits.float(), label), batch_size=len(label), on_epoch=True)
        for name in ("accuracy", "top5"):
            metric = self.metrics[f"{split}_{name}"]
            metric.update(logits, label)
            self.log(f"{split}/{name}", metric, batch_size=len(label), prog_bar=name == "accuracy")

    def predict(self, skeleton: Tensor) -> Tensor:  # type: ignore[override]
        """Probabilities of the actions.

        Shapes:
            skeleton: (b, in_channels, t, v, persons); returns: (b, num_classes)
        Raises:
            ValueError: if a coordinate is NaN or infinite, or the shape does not fit.
        """
        check_finite(skeleton, "skeleton")
        return super().predict(skeleton).softmax(-1)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """ "name": list[str]; "label": (b,) int64; "probability": (b, num_classes)."""
        probability = self.predict(batch["skeleton"])
        names = batch.get("name", [f"clip{i:05d}" for i in range(len(probability))])
        return {"name": list(names), "label": probability.argmax(1), "probability": probability}

    def configure_optimizers(self) -> Any:
        hp = self.hparams
        optimizer = torch.optim.SGD(
            self.parameter_groups(), lr=hp.lr, momentum=0.9, nesterov=True, weight_decay=hp.weight_decay
        )
        steps = self.trainer.estimated_stepping_batches  # also counts the batches of an epoch
        epochs = max(1, math.ceil(steps / max(1, self.trainer.num_training_batches)))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda epoch: 0.5 * (1 + math.cos(math.pi * min(epoch, epochs) / epochs))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "epoch"}}

    def example_inputs(self) -> tuple[Tensor, ...]:
        """Two clips of 16 frames."""
        hp = self.hparams
        shape = (2, hp.in_channels, max(16, 2 ** len(hp.layers)), self.joints, hp.persons)
        return (torch.randn(shape, device=self.device),)

    # ---- authors' weights ---------------------------------------------------------------------------------------

    @classmethod
    def convert_state_dict(cls, content: dict) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The authors' ``Model``: four branches become one convolution, two projections another.

        Raises:
            ZooError: for keys that their model does not have.
        """
        content = dict(unwrap(content))
        if "layer0.spatial.PA1" not in content or "fc.weight" not in content:
            raise ZooError(
                "No STIGCN of the authors: expected layer0.*, layer1.*, ..., fc.*; found "
                f"{', '.join(list(content)[:3])}."
            )
        of_norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        state: dict[str, Tensor] = {}

        def take(theirs: str, ours: str, parts: tuple[str, ...]) -> None:
            for p in parts:
                state[f"{ours}.{p}"] = content.pop(f"{theirs}.{p}")

        def join(theirs: list[str], ours: str, parts: tuple[str, ...]) -> None:
            for p in parts:
                pieces = [content.pop(f"{name}.{p}") for name in theirs]
                state[f"{ours}.{p}"] = pieces[0] if pieces[0].ndim == 0 else torch.cat(pieces)

        def block(theirs: str, ours: str) -> None:
            space, branches = f"{theirs}.spatial", [f"{theirs}.spatial.branches.{k}" for k in range(4)]
            state[f"{ours}.space.offsets"] = torch.stack([content.pop(f"{space}.PA{k}") for k in (1, 2, 3, 4)])
            state[f"{ours}.space.scale"] = content.pop(f"{space}.PCA")
            join([f"{space}.CA.proj1", f"{space}.CA.proj2"], f"{ours}.space.relate", ("weight", "bias"))
            join([f"{b}.conv" for b in branches], f"{ours}.space.mix", ("weight",))
            join([f"{b}.bn" for b in branches], f"{ours}.space.norm", of_norm)
            for k, name in enumerate(("still", "moving")):
                take(f"{theirs}.temporal.branches.{k}.conv", f"{ours}.time.{name}", ("weight",))
                take(f"{theirs}.temporal.branches.{k}.bn", f"{ours}.time.{name}_norm", of_norm)
            for half, name in (("spatial", "space"), ("temporal", "time")):
                take(f"{theirs}.{half}.fusion.conv", f"{ours}.{name}.fuse", ("weight",))
                take(f"{theirs}.{half}.fusion.bn", f"{ours}.{name}.fuse_norm", of_norm)
            if f"{theirs}.shortcut.conv.weight" in content:
                take(f"{theirs}.shortcut.conv", f"{ours}.widen", ("weight",))
                take(f"{theirs}.shortcut.bn", f"{ours}.widen_norm", of_norm)

        joints = content["layer0.spatial.PA1"].shape[0]
        in_channels = content["layer0.temporal.branches.0.conv.weight"].shape[1]
        layouts = [name for name, layout in LAYOUTS.items() if layout.joints == joints]
        if not layouts:
            raise ZooError(f"The weights are for {joints} joints; known are {', '.join(LAYOUTS)}.")
        persons = content["data_bn.bn.weight"].shape[0] // (joints * in_channels)
        try:
            take("data_bn.bn", "net.norm", of_norm)
            take("fc", "net.fc", ("weight", "bias"))
            block("layer0", "net.first")
            widths, layers = [state["net.first.space.fuse.weight"].shape[0]], []
            while any(key.startswith(f"layer{len(layers) + 1}.") for key in content):
                stage = len(layers) + 1
                count = len({key.split(".")[1] for key in content if key.startswith(f"layer{stage}.")})
                for i in range(count):
                    block(f"layer{stage}.{i}", f"net.stages.{stage - 1}.{i}")
                widths.append(state[f"net.stages.{stage - 1}.0.space.fuse.weight"].shape[0])
                layers.append(count)
        except KeyError as error:
            raise ZooError(f"No STIGCN of the authors: {error.args[0]} is missing.") from error
        if content:
            raise ZooError(f"No STIGCN of the authors: it has no {', '.join(list(content)[:3])}.")
        sizes = {"layout": layouts[0], "in_channels": in_channels, "persons": persons}
        sizes |= {"num_classes": state["net.fc.bias"].shape[0], "widths": widths, "layers": layers}
        return sizes, state
