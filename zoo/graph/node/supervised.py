"""Supervised learning on graphs with one forward pass: targets, loss, metrics, prediction; and plain baselines.

`SupervisedGNN` is the base of methods whose training is just that, on the nodes of graphs or on whole graphs;
`PlainGNN` is what they are compared with: GCN, GAT, GraphSAGE and GIN of torch_geometric, or an MLP.

Index legend: n nodes of all graphs of a batch, e directed edges, b graphs, f features, k edge features, c classes.
"""

import itertools
from typing import Any, ClassVar

import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.core import ZooModule, check_finite
from zoo.nn.graph import Adjacency, Remember, SparseRows, as_features, check_graph, drop, linear, torch_geometric_nn

IGNORED = -100
"""A target that does not count, in `SupervisedGNN.targets`; what ``F.cross_entropy`` leaves out by default."""


def check_batch_index(batch: Tensor | None, nodes: int) -> None:
    """Refuse a ``batch`` that does not number the graphs of all nodes in order.

    Shapes:
        batch: (n) int64, ascending from 0 without gaps; None is one graph
    Raises:
        ValueError: saying what came and what is expected.
    """
    if batch is None:
        return
    if batch.shape != (nodes,) or batch.dtype != torch.int64:
        raise ValueError(
            f"'batch' has shape {tuple(batch.shape)} and type {batch.dtype}; expected ({nodes},) and int64: the number "
            "of each node's graph."
        )
    steps = batch.diff()
    if int(batch[0]) != 0 or bool(((steps != 0) & (steps != 1)).any()):
        raise ValueError(
            "'batch' must be 0, ..., 0, 1, ..., 1, 2, ...: nodes in the order of their graphs, none empty."
        )


class SupervisedGNN(ZooModule):
    """Nodes or whole graphs, one right class each or several labels.

    A subclass has the hyperparameters ``level`` ("node" or "graph"), ``targets`` ("class" or "labels") and
    ``num_classes``, and writes ``forward(x, edge_index, batch=None, edge_attr=None)``.

    Batch (a dict, or a torch_geometric ``Data`` or ``Batch``): "x" (n, f) float; "edge_index" (2, e) int64, every
    undirected edge twice; "y", one row a node or a graph: int64, -1 where unknown, or with ``targets="labels"`` (·, c)
    float of 0 and 1, NaN where unknown; optional "batch" (n) int64, the graph of each node, in order; "edge_attr"
    (e, k) float; at node level "train_mask", "val_mask", "test_mask" (n) bool, all nodes where it is missing; "name",
    list[str], one a node or a graph. A loader that yields the same object again says: the same graphs. They then are
    checked once.

    Logs "loss" of every split; "accuracy" with classes; "auroc" with two classes or labels; "ap", the mean over the
    labels of the average precision, with labels.
    """

    monitor, mode = "val/loss", "min"
    nan_keys = ("y",)

    def __init__(self) -> None:
        super().__init__()
        self._checked = Remember()

    def set_task(self, level: str, targets: str, num_classes: int) -> None:
        """Check the three hyperparameters and make the metrics; call in ``__init__``.

        Raises:
            ValueError: for an unknown choice.
        """
        name = type(self).__name__
        for key, value, choices in (("level", level, ("node", "graph")), ("targets", targets, ("class", "labels"))):
            if value not in choices:
                raise ValueError(f"{name}: {key} is {value!r}; it must be one of {', '.join(choices)}.")
        if num_classes < 1:
            raise ValueError(f"{name}: num_classes is {num_classes}; it must be at least 1.")
        self.scores = nn.ModuleDict()
        for split in ("val", "test"):
            if targets == "labels":
                task = {"num_labels": num_classes, "ignore_index": IGNORED}
                self.scores[f"{split}_auroc"] = torchmetrics.classification.MultilabelAUROC(**task)
                self.scores[f"{split}_ap"] = torchmetrics.classification.MultilabelAveragePrecision(**task)
            elif num_classes == 2:
                self.scores[f"{split}_auroc"] = torchmetrics.classification.BinaryAUROC()

    # ---- targets and loss ---------------------------------------------------------------------------------------

    def targets(self, batch: Any, split: str) -> Tensor:
        """The targets of a split, `IGNORED` where there is none.

        Shapes:
            returns: (n) or (b) int64; with ``targets="labels"`` (·, c) int64
        Raises:
            KeyError: naming the key that the batch lacks.
        """
        if "y" not in batch:
            raise KeyError(f"The batch has no 'y'; {type(self).__name__} needs one row a {self.hparams.level}.")
        y, key = batch["y"], f"{split}_mask"
        if self.hparams.targets == "labels":
            y = torch.where(y.isnan(), IGNORED, y).long()
        else:
            y = torch.where(y < 0, IGNORED, y)
        if self.hparams.level == "node" and key in batch:
            mask = batch[key] if y.ndim == 1 else batch[key][:, None]
            y = torch.where(mask, y, IGNORED)
        return y

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean over the targets that count: cross-entropy, or binary cross-entropy a label.

        Shapes:
            logits: (·, c); targets: as `targets` gives them; returns: ()
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.hparams.targets == "class":
            return F.cross_entropy(logits, targets, ignore_index=IGNORED)
        known = (targets != IGNORED).to(logits.dtype)
        right = targets.clamp(0, 1).to(logits.dtype)
        losses = F.binary_cross_entropy_with_logits(logits, right, reduction="none")
        return (losses * known).sum() / known.sum()

    # ---- steps --------------------------------------------------------------------------------------------------

    def logits(self, batch: Any) -> Tensor:
        """`forward` of a batch."""
        more = {key: batch[key] for key in ("batch", "edge_attr") if key in batch}
        return self(batch["x"], batch["edge_index"], **more)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(self.logits(batch), self.targets(batch, "train"))
        self.log("train/loss", loss.detach(), batch_size=1)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def _evaluate(self, batch: Any, split: str) -> None:
        targets, logits = self.targets(batch, split), self.logits(batch).float()
        known = targets != IGNORED
        count = int(known.sum())
        if count == 0:
            return
        self.log(f"{split}/loss", self.loss(logits, targets), batch_size=count, on_epoch=True, prog_bar=split == "val")
        if self.hparams.targets == "class":
            logits, targets = logits[known], targets[known]
            correct = (logits.argmax(1) == targets).float().mean()
            self.log(f"{split}/accuracy", correct, batch_size=count, on_epoch=True)
        for name, score in self.scores.items():
            if name.startswith(split):
                score.update(logits[:, 1] - logits[:, 0] if self.hparams.targets == "class" else logits, targets)
                self.log(f"{split}/{name.removeprefix(f'{split}_')}", score, on_epoch=True, batch_size=count)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        check = super().on_before_batch_transfer
        return self._checked(lambda batch: check(batch, dataloader_idx), batch)  # the same graphs again: checked

    # ---- prediction ---------------------------------------------------------------------------------------------

    def predict(  # type: ignore[override]
        self, x: Tensor, edge_index: Tensor, batch: Tensor | None = None, edge_attr: Tensor | None = None
    ) -> Tensor:
        """Probabilities of classes, or of every label, one row a node or a graph.

        Shapes:
            x: (n, f); edge_index: (2, e); batch: (n); edge_attr: (e, k); returns: (·, c)
        Raises:
            ValueError: if a feature is NaN or infinite.
        """
        check_finite(x, "x")
        if edge_attr is not None:
            check_finite(edge_attr, "edge_attr")
        logits = super().predict(x, edge_index, batch=batch, edge_attr=edge_attr)
        return logits.softmax(-1) if self.hparams.targets == "class" else logits.sigmoid()

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """ "name": list[str] (the position where the batch has none); "class": int64, one a row, or with
        ``targets="labels"`` one of 0 and 1 a label; "probability": (·, c)."""
        more = {key: batch[key] for key in ("batch", "edge_attr") if key in batch}
        probability = self.predict(batch["x"], batch["edge_index"], **more)
        names = batch["name"] if "name" in batch else [str(i) for i in range(len(probability))]
        chosen = probability.argmax(1) if self.hparams.targets == "class" else (probability > 0.5).long()
        return {"name": list(names), "class": chosen, "probability": probability}

    def example_inputs(self) -> tuple[Tensor, ...]:
        """One graph: a ring of 8 nodes (with edge features where the model takes them)."""
        nodes = torch.arange(8, device=self.device)
        ring = torch.stack((nodes, nodes.roll(1)))
        x = torch.linspace(-1, 1, 8 * self.hparams.in_features, device=self.device).view(8, -1)
        return x, torch.cat((ring, ring.flip(0)), dim=1)


class PlainGNN(SupervisedGNN):
    """Plain networks to compare with: layers of torch_geometric, ReLU and dropout between them.

        h_0 = x,   h_l = dropout(relu(norm(conv_l(h_l-1)))),   logits = conv_L(h_L-1)

    At graph level the last convolution is followed by ReLU, the mean over each graph's nodes and a linear layer.
    "mlp" sees no edges.

    Args:
        in_features: features a node.
        num_classes: classes or labels.
        kind: "gcn" (arXiv:1609.02907), "gat" (1710.10903), "sage" (mean, 1706.02216), "gin" (1810.00826) or "mlp".
        level: "node" or "graph".
        targets: "class" or "labels".
        hidden: hidden units (of all heads together).
        layers: convolutions.
        heads: attention heads ("gat"); the last layer of the node level has one.
        dropout: rate before every layer.
        norm: layer norm after every hidden convolution.
        lr: learning rate (Adam).
        weight_decay: L2 penalty.
    Raises:
        ValueError: for an unknown choice.
        ImportError: where torch_geometric is missing (all but "gcn" and "mlp").
    """

    variants: ClassVar[dict[str, dict[str, Any]]] = {"tiny": {"hidden": 8}}
    head = ("last",)

    def __init__(
        self,
        in_features: int = 1433,
        num_classes: int = 7,
        kind: str = "gcn",
        level: str = "node",
        targets: str = "class",
        hidden: int = 64,
        layers: int = 2,
        heads: int = 4,
        dropout: float = 0.5,
        norm: bool = False,
        lr: float = 0.01,
        weight_decay: float = 5e-4,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.set_task(level, targets, num_classes)
        if kind not in ("gcn", "gat", "sage", "gin", "mlp"):
            raise ValueError(f"PlainGNN: kind is {kind!r}; it must be gcn, gat, sage, gin or mlp.")
        if layers < 1 or hidden < 1:
            raise ValueError(f"PlainGNN: layers is {layers} and hidden {hidden}; they must be at least 1.")
        whole = level == "graph"
        widths = [in_features, *[hidden] * (layers if whole else layers - 1)]
        self.convs = nn.ModuleList(self._conv(kind, a, b, heads) for a, b in itertools.pairwise(widths))
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) if norm else nn.Identity() for _ in self.convs)
        self.last = nn.Linear(hidden, num_classes) if whole else self._conv(kind, widths[-1], num_classes, 1)
        self._graph = Remember()

    def _conv(self, kind: str, inputs: int, outputs: int, heads: int) -> nn.Module:
        if kind in ("gcn", "mlp"):
            return nn.Linear(inputs, outputs)
        layers = torch_geometric_nn()
        if kind == "gat":
            return layers.GATConv(inputs, outputs // heads, heads=heads, dropout=self.hparams.dropout)
        if kind == "sage":
            return layers.SAGEConv(inputs, outputs)
        return layers.GINConv(nn.Sequential(nn.Linear(inputs, outputs), nn.ReLU(), nn.Linear(outputs, outputs)))

    def forward(
        self, x: Tensor, edge_index: Tensor, batch: Tensor | None = None, edge_attr: Tensor | None = None
    ) -> Tensor:
        """Logits, one row a node or a graph; ``edge_attr`` is not looked at.

        Shapes:
            x: (n, in_features); edge_index: (2, e) int64; batch: (n) int64; returns: (n, c) or (b, c)
        Raises:
            ValueError: for other shapes, or an unknown node in ``edge_index``.
        """
        check_graph(x, edge_index, self.hparams.in_features)
        adjacency, h, sizes = self._graph(self._prepared, x, edge_index, batch)
        p, training = self.hparams.dropout, self.training
        for conv, norm in zip(self.convs, self.norms, strict=True):
            h = norm(self._convolve(conv, drop(h, p, training), adjacency)).relu()
        if self.hparams.level == "node":
            return self._convolve(self.last, drop(h, p, training), adjacency)
        if isinstance(h, SparseRows):
            h = h.dense()
        groups = torch.zeros_like(x[:, 0], dtype=torch.int64) if batch is None else batch
        pooled = h.new_zeros(len(sizes), h.shape[1]).index_add(0, groups, h) / sizes[:, None].to(h.dtype)
        return self.last(F.dropout(pooled, p, training))

    def _prepared(self, x: Tensor, edge_index: Tensor, batch: Tensor | None) -> tuple[Any, Any, Tensor]:
        check_batch_index(batch, len(x))
        kind = self.hparams.kind
        sizes = torch.tensor([len(x)], device=x.device) if batch is None else torch.bincount(batch)
        return Adjacency(edge_index, len(x), x.dtype), as_features(x) if kind in ("gcn", "mlp") else x, sizes

    def _convolve(self, conv: nn.Module, h: Tensor | SparseRows, adjacency: Adjacency) -> Tensor:
        if not isinstance(conv, nn.Linear):
            return conv(h, adjacency.edge_index)
        out = linear(h, conv.weight.t())
        return (out if self.hparams.kind == "mlp" else adjacency @ out) + conv.bias

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr, weight_decay=self.hparams.weight_decay)
