"""What the family's methods share: the graph of a batch, targets, losses, metrics, prediction; and plain baselines.

`HAN` and `MetaPathGCN` classify along meta-paths chosen by hand: what a search for structures is compared with.

Index legend: n nodes, e edges, s stored features, m nodes or pairs asked for, c classes.
"""

import itertools
from typing import Any, ClassVar

import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.classification import binary_auroc, multiclass_f1_score

from zoo.core import ZooModule, check_finite
from zoo.graph.heterogeneous.meta_structure import Schema
from zoo.graph.heterogeneous.network import TracedGraph, TypedGraph, check_hin, check_nodes
from zoo.nn.graph import Adjacency, Remember, torch_geometric_nn, tracing

GRAPH = ("x", "x_index", "node_type", "edge_index", "edge_type")
"""The batch's keys that make up the graph."""


class SupervisedHIN(ZooModule):
    """Classes of one type's nodes, or whether pairs of two types' nodes belong together.

    A subclass has the hyperparameters ``types``, ``relations``, ``ends``, ``in_features``, ``num_classes`` and ``task``
    and writes ``forward(x, x_index, node_type, edge_index, edge_type, node)``.

    Batch (a dict), the same object every time: the graph as in `ReStruct.forward`; "node" (m) int64, the nodes that are
    classified, or (m, 2), source and target of every pair; "y" (m) int64: the class, -1 where unknown, or 1 and 0 for
    pairs that belong together and pairs that don't; "train_mask", "val_mask", "test_mask" (m) bool, all rows where they
    are missing; "name", list[str], one a row; "types" and "relations", the names in the order of their numbers: where
    they are given in another order than the model's, the graph is put into the model's.

    Logs "loss" of every split; "f1" (macro), "micro_f1" of classes; "auc" of pairs.
    """

    monitor, mode = "val/f1", "max"

    def __init__(self) -> None:
        super().__init__()
        self._checked, self._made, self._arranged = Remember(), Remember(), Remember()
        self._parts = {split: Remember() for split in ("train", "val", "test")}
        self._nodes: dict[int, tuple[Tensor, Tensor]] = {}

    def set_task(self, words: dict[str, str] | None = None) -> None:
        """Check the shared hyperparameters, make schema and metrics; call in ``__init__``.

        Raises:
            ValueError: for an unknown task, or types, relations and features that do not fit together.
        """
        hp, name = self.hparams, type(self).__name__
        if hp.task not in ("classification", "recommendation"):
            raise ValueError(f"{name}: task is {hp.task!r}; it must be 'classification' or 'recommendation'.")
        if len(hp.in_features) != len(hp.types) or min(hp.in_features, default=0) < 1:
            raise ValueError(
                f"{name}: in_features is {hp.in_features}; expected one number of features (at least 1) for each of "
                f"the types {', '.join(hp.types)}."
            )
        if len(hp.ends) != 2:
            raise ValueError(f"{name}: ends is {hp.ends}; expected two types, the structures' source and target.")
        relations = tuple((r[0], r[1]) if len(r) == 2 else tuple(r) for r in hp.relations)
        self.schema = Schema(tuple(hp.types), relations, hp.ends[0], hp.ends[1], words or {})  # type: ignore[arg-type]
        self.scores = nn.ModuleDict()
        if hp.task == "classification":
            if hp.num_classes < 2:
                raise ValueError(f"{name}: num_classes is {hp.num_classes}; it must be at least 2.")
            if hp.ends[0] != hp.ends[1]:
                raise ValueError(f"{name}: ends is {hp.ends}; for classification both are the type that is classified.")
            for split in ("val", "test"):
                self.scores[f"{split}_f1"] = torchmetrics.classification.MulticlassF1Score(hp.num_classes)
                micro = torchmetrics.classification.MulticlassF1Score(hp.num_classes, average="micro")
                self.scores[f"{split}_micro_f1"] = micro
            return
        self.monitor = "val/auc"
        for split in ("val", "test"):
            self.scores[f"{split}_auc"] = torchmetrics.classification.BinaryAUROC()

    # ---- the graph of a batch -----------------------------------------------------------------------------------

    def graph(self, *given: Tensor) -> Any:
        """The graph ready to multiply, made and checked once for the same tensors.

        Args:
            given: what `forward` takes: the graph's tensors, then ``node``.
        Raises:
            ValueError: for shapes, types or numbers that are none of this model's (see `check_hin`).
        """
        *parts, node = given
        hp = self.hparams
        made = TracedGraph(hp.types, hp.relations, hp.in_features, *parts) if any(map(tracing, parts)) else None
        graph = self._made(self._typed, *parts) if made is None else made
        self._check_nodes(node, parts[2])
        return graph

    def _typed(self, *parts: Tensor) -> TypedGraph:
        hp = self.hparams
        number = {name: k for k, name in enumerate(hp.types)}
        check_hin(*parts, hp.in_features, [[number[a], number[b]] for a, b in hp.relations])
        return TypedGraph(hp.types, hp.relations, hp.in_features, *parts)

    def _check_nodes(self, node: Tensor, node_type: Tensor) -> None:
        """Once for the same tensors; the splits' take turns."""
        hp, known = self.hparams, self._nodes.get(id(node))
        if known is not None and known[0] is node and known[1] is node_type:
            return
        ends = hp.ends[:1] if hp.task == "classification" else hp.ends
        check_nodes(node, node_type, [hp.types.index(e) for e in ends])
        if not tracing(node):
            self._nodes = {**dict(list(self._nodes.items())[-7:]), id(node): (node, node_type)}

    def arranged(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with types and relations numbered as the model's.

        Raises:
            ValueError: if the batch has other types or relations.
        """
        types, relations = batch.get("types"), batch.get("relations")
        hp = self.hparams
        if types is None or (list(types) == hp.types and [list(r) for r in relations or hp.relations] == hp.relations):
            return batch
        return self._arranged(self._rearranged, batch)

    def _rearranged(self, batch: dict[str, Any]) -> dict[str, Any]:
        hp, types, relations = self.hparams, list(batch["types"]), [tuple(r) for r in batch["relations"]]
        own = {frozenset(r): k for k, r in enumerate(hp.relations)}
        if set(types) != set(hp.types) or {frozenset(r) for r in relations} != set(own):
            raise ValueError(
                f"The graph has types {', '.join(types)} and relations {', '.join('-'.join(r) for r in relations)}; "
                f"{type(self).__name__} was made for {', '.join(hp.types)} and "
                f"{', '.join('-'.join(r) for r in hp.relations)}."
            )
        device = batch["node_type"].device
        number = torch.tensor([hp.types.index(t) for t in types], device=device)[batch["node_type"]]
        order = torch.argsort(number, stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=device)
        turned = torch.tensor([hp.relations[own[frozenset(r)]] != list(r) for r in relations], device=device)
        edges = place[batch["edge_index"]]
        edges = torch.where(turned[batch["edge_type"]], edges.flip(0), edges)
        return {
            **batch,
            "x_index": torch.stack((place[batch["x_index"][0]], batch["x_index"][1])),
            "node_type": number[order],
            "edge_index": edges,
            "edge_type": torch.tensor([own[frozenset(r)] for r in relations], device=device)[batch["edge_type"]],
            "node": place[batch["node"]],
            "types": hp.types,
            "relations": hp.relations,
        }

    # ---- targets and loss ---------------------------------------------------------------------------------------

    def part(self, batch: dict[str, Any], split: str) -> tuple[Tensor, Tensor]:
        """The rows of "node" that count in a split, and their targets; found once for the same batch.

        Shapes:
            returns: (m) or (m, 2), and (m) int64
        Raises:
            KeyError: if the batch has no "y".
        """
        if "y" not in batch:
            raise KeyError(f"The batch has no 'y'; {type(self).__name__} needs a target for every row of 'node'.")
        node, y, key = batch["node"], batch["y"], f"{split}_mask"
        if tracing(y):
            return node, y
        return self._parts[split](_labelled, node, y, batch.get(key, y))

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy of classes; of pairs, -mean log sigmoid(score) of those that belong together and -mean log
        sigmoid(-score) of the others.

        Shapes:
            output: (m, c) or (m); y: (m) int64; returns: ()
        """
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        if self.hparams.task == "classification":
            return F.cross_entropy(output, y)
        right = y.to(output.dtype)
        good, bad = F.logsigmoid(output) * right, F.logsigmoid(-output) * (1 - right)
        return -good.sum() / right.sum().clamp(min=1) - bad.sum() / (1 - right).sum().clamp(min=1)

    def fitness(self, output: Tensor, y: Tensor) -> Tensor:
        """Macro F1 of classes, area under the ROC curve of pairs."""
        if self.hparams.task == "classification":
            return multiclass_f1_score(output, y, self.hparams.num_classes)
        return binary_auroc(output, y)

    # ---- steps --------------------------------------------------------------------------------------------------

    def outputs(self, batch: dict[str, Any], node: Tensor) -> Tensor:
        """`forward` of a batch's graph."""
        return self(*(batch[key] for key in GRAPH), node)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        batch = self.arranged(batch)
        node, y = self.part(batch, "train")
        loss = self.loss(self.outputs(batch, node), y)
        self.log("train/loss", loss.detach(), batch_size=1)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def _evaluate(self, batch: dict[str, Any], split: str) -> None:
        batch = self.arranged(batch)
        node, y = self.part(batch, split)
        if not len(y):
            return
        output = self.outputs(batch, node).float()
        self.log(f"{split}/loss", self.loss(output, y), batch_size=len(y), on_epoch=True)
        for name, score in self.scores.items():
            if name.startswith(split):
                score.update(output, y)
                key = name.removeprefix(f"{split}_")
                self.log(f"{split}/{key}", score, on_epoch=True, batch_size=len(y), prog_bar=split == "val")

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        check = super().on_before_batch_transfer
        return self._checked(lambda batch: check(batch, dataloader_idx), batch)  # the same graph again: checked

    # ---- prediction ---------------------------------------------------------------------------------------------

    def predict(  # type: ignore[override]
        self,
        x: Tensor,
        x_index: Tensor,
        node_type: Tensor,
        edge_index: Tensor,
        edge_type: Tensor,
        node: Tensor,
        types: list[str] | None = None,
        relations: list[list[str]] | None = None,
    ) -> Tensor:
        """Probabilities of classes (m, c), or that pairs belong together (m).

        Args:
            types, relations: the names behind the numbers, where they may stand in another order than the model's.
        Raises:
            ValueError: if a feature is NaN or infinite, or the graph is none of the model's.
        """
        check_finite(x, "x")
        values = (x, x_index, node_type, edge_index, edge_type, node)
        batch: dict[str, Any] = dict(zip((*GRAPH, "node"), (v.to(self.device) for v in values), strict=True))
        if types is not None:
            batch |= {"types": types, "relations": relations or self.hparams.relations}
            batch = self.arranged(batch)
        output = super().predict(*(batch[key] for key in (*GRAPH, "node"))).float()
        return output.softmax(-1) if self.hparams.task == "classification" else output.sigmoid()

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """ "name": list[str]; "class" (m) int64 and "probability" (m, c), or "score" (m)."""
        names = batch["name"] if "name" in batch else [str(i) for i in range(len(batch["node"]))]
        keys = (*GRAPH, "node", "types", "relations")
        out = self.predict(**{key: batch[key] for key in keys if key in batch})
        if self.hparams.task == "recommendation":
            return {"name": list(names), "score": out}
        return {"name": list(names), "class": out.argmax(1), "probability": out}

    def example_inputs(self) -> tuple[Tensor, ...]:
        """Three nodes of every type; every node has its first feature; relations join all nodes to the second."""
        hp, device = self.hparams, self.device
        count = len(hp.types)
        node_type = torch.arange(count, device=device).repeat_interleave(3)
        nodes = torch.arange(3 * count, device=device)
        x_index = torch.stack((nodes, torch.zeros_like(nodes)))
        pairs = [(hp.types.index(a), hp.types.index(b)) for a, b in hp.relations]
        edges = [(3 * a + i, 3 * b + 1) for a, b in pairs for i in range(3) if (a, i) != (b, 1)]
        kinds = [k for k, (a, b) in enumerate(pairs) for i in range(3) if (a, i) != (b, 1)]
        source, target = (3 * hp.types.index(e) for e in hp.ends)
        node = torch.tensor([source, source + 2], device=device)
        if hp.task == "recommendation":
            node = torch.stack((node, torch.tensor([target + 1, target], device=device)), 1)
        values = torch.linspace(0.5, 1.5, 3 * count, device=device)
        return (
            values,
            x_index,
            node_type,
            torch.tensor(edges, device=device).t().contiguous(),
            torch.tensor(kinds, device=device),
            node,
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr, weight_decay=self.hparams.weight_decay)


def _labelled(node: Tensor, y: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    rows = ((y >= 0) & (mask if mask.dtype == torch.bool else mask >= 0)).nonzero().flatten()
    return node[rows], y[rows]


# ---- baselines -------------------------------------------------------------------------------------------------------


def meta_path_edges(graph: TypedGraph, path: list[str]) -> Tensor:
    """Which nodes of the path's end type a meta-path joins, each pair once.

    Args:
        path: names of types, the last one as the first.
    Shapes:
        returns: (2, pairs) int64, numbers within the type, source and target
    Raises:
        ValueError: if edges do not join two neighbours of the path.
    """
    whole: Tensor | None = None
    for a, b in itertools.pairwise(path):
        if (a, b) not in graph.relations and (b, a) not in graph.relations:
            raise ValueError(f"The path {'-'.join(path)} goes from {a} to {b}, which no relation joins.")
        _, step = graph._kept((a, b), lambda a=a, b=b: graph._adjacency(a, b))
        there = step.there.to_sparse()
        ones = torch.sparse_coo_tensor(
            there.indices(), torch.ones_like(there.values()), step.shape, check_invariants=False
        )
        whole = ones if whole is None else torch.sparse.mm(whole, ones)
    assert whole is not None
    return whole.coalesce().indices()


class _AlongPaths(SupervisedHIN):
    """Baselines that know the nodes of the classified type alone, and which of them meta-paths join.

    A subclass makes its layers in `make` and writes `along`; what it does not get is its own ``usual``.

    Args:
        types, relations, ends, in_features, num_classes, task: as in `ReStruct`; classification only.
        paths: meta-paths by their types, ends included.
        limit: neighbours a node and path, drawn once; 0 for all.
        hidden: units (of all heads together).
        heads: attention heads (`HAN`).
        dropout: rate.
        lr, weight_decay: of Adam.
    """

    usual: ClassVar[dict[str, Any]]
    head = ("last",)

    def __init__(
        self,
        types: list[str] = ["P", "A", "S"],  # noqa: B006
        relations: list[list[str]] = [["P", "A"], ["P", "S"]],  # noqa: B006
        ends: list[str] = ["P", "P"],  # noqa: B006
        in_features: list[int] = [1902, 1902, 1902],  # noqa: B006
        num_classes: int = 3,
        task: str = "classification",
        paths: list[list[str]] | None = None,
        limit: int = 0,
        hidden: int = 64,
        heads: int = 8,
        dropout: float | None = None,
        lr: float | None = None,
        weight_decay: float | None = None,
    ):
        super().__init__()
        paths = self.usual["paths"] if paths is None else paths
        dropout = self.usual["dropout"] if dropout is None else dropout
        lr = self.usual["lr"] if lr is None else lr
        weight_decay = self.usual["weight_decay"] if weight_decay is None else weight_decay
        self.save_hyperparameters()
        self.set_task()
        self.make(in_features[types.index(ends[0])])

    def make(self, width: int) -> None:
        """Make the layers. Args: width: features of the classified type."""
        raise NotImplementedError

    def along(self, x: Tensor, edges: list[Tensor]) -> Tensor:
        """Logits of all nodes of the type. Shapes: x (n, f); edges (2, pairs) of every path; returns: (n, c)."""
        raise NotImplementedError

    def forward(
        self, x: Tensor, x_index: Tensor, node_type: Tensor, edge_index: Tensor, edge_type: Tensor, node: Tensor
    ) -> Tensor:
        """Logits (m, c); see `ReStruct.forward`."""
        self._check_nodes(node, node_type)
        features, edges, first = self._made(self._homogeneous, x, x_index, node_type, edge_index, edge_type)
        return self.along(features, edges)[node - first]

    def _homogeneous(self, *parts: Tensor) -> tuple[Tensor, list[Tensor], Any]:
        graph: TypedGraph = self._typed(*parts)
        own = self.hparams.ends[0]
        width = graph.widths[graph.types.index(own)]
        x = graph.project(own, torch.eye(width, dtype=parts[0].dtype, device=parts[0].device))
        edges = []
        for number, path in enumerate(self.hparams.paths):
            pairs, limit = meta_path_edges(graph, path), self.hparams.limit
            if limit:  # at most so many sources a target, drawn once
                draw = torch.Generator().manual_seed(number)
                order = torch.randperm(pairs.shape[1], generator=draw).to(pairs.device)
                pairs = pairs[:, order]
                pairs = pairs[:, torch.argsort(pairs[1], stable=True)]
                count = torch.bincount(pairs[1], minlength=graph.sizes[own])
                first = (count.cumsum(0) - count)[pairs[1]]
                pairs = pairs[:, torch.arange(pairs.shape[1], device=pairs.device) - first < limit]
            edges.append(pairs)
        return x, edges, graph.first[own]


class HAN(_AlongPaths):
    """HAN (Wang et al., WWW 2019, arXiv:1903.07293): attention among the nodes that a meta-path joins, then over paths.

    By ``torch_geometric.nn.HANConv``; arguments as in `_AlongPaths`.
    """

    variants: ClassVar[dict[str, dict[str, Any]]] = {"tiny": {"hidden": 8, "heads": 2}}
    usual: ClassVar[dict[str, Any]] = {
        "paths": [["P", "A", "P"], ["P", "S", "P"]],
        "dropout": 0.6,
        "lr": 0.005,
        "weight_decay": 0.001,
    }

    def make(self, width: int) -> None:
        hp, own = self.hparams, self.hparams.ends[0]
        self.kinds = [(own, "-".join(path), own) for path in hp.paths]
        layer = torch_geometric_nn().HANConv
        self.conv = layer({own: width}, hp.hidden, ([own], self.kinds), heads=hp.heads, dropout=hp.dropout)
        self.last = nn.Linear(hp.hidden, hp.num_classes)

    def along(self, x: Tensor, edges: list[Tensor]) -> Tensor:
        own = self.hparams.ends[0]
        return self.last(self.conv({own: x}, dict(zip(self.kinds, edges, strict=True)))[own])


class MetaPathGCN(_AlongPaths):
    """Two graph convolutions on the graph that a meta-path makes, the mean over paths; arguments of `_AlongPaths`."""

    variants: ClassVar[dict[str, dict[str, Any]]] = {"tiny": {"hidden": 8}}
    usual: ClassVar[dict[str, Any]] = {"paths": [["P", "A", "P"]], "dropout": 0.5, "lr": 0.01, "weight_decay": 5e-4}

    def make(self, width: int) -> None:
        hp = self.hparams
        self.first = nn.ModuleList(nn.Linear(width, hp.hidden) for _ in hp.paths)
        self.last = nn.ModuleList(nn.Linear(hp.hidden, hp.num_classes) for _ in hp.paths)
        self._adjacent = Remember()

    def along(self, x: Tensor, edges: list[Tensor]) -> Tensor:
        paths = self._adjacent(lambda x, *pairs: [Adjacency(p, len(x)) for p in pairs], x, *edges)
        outs, p = [], self.hparams.dropout
        for adjacency, first, last in zip(paths, self.first, self.last, strict=True):
            h = (adjacency @ first(F.dropout(x, p, self.training))).relu()
            outs.append(adjacency @ last(F.dropout(h, p, self.training)))
        return torch.stack(outs).mean(0)
