"""Many graphs: classification of whole graphs, or of their nodes. TU layout, users' own graphs, generated ones.

Index legend: n nodes of all graphs of a batch, e directed edges, b graphs, f features, k edge features, c classes.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from zoo.core import ZooDataModule, ZooError, seed_from
from zoo.data.plain import class_rows, write_csv
from zoo.graph.node.data_nodes import NodeClassificationDataModule, choose

FOLDS = 10


class GraphClassificationDataModule(ZooDataModule):
    """A set of graphs in training, validation and test graphs; whole graphs or their nodes have the labels.

    Batch: several graphs side by side, as torch_geometric's: "x" (n, f) float; "edge_index" (2, e) int64, sources and
    targets, every undirected edge twice; "batch" (n) int64, the graph of each node, in order; "y" int64, one a graph or
    (``target="node"``) one a node, -1 where the data has none; "edge_attr" (e, k) float, with ``edges``; "name":
    list[str], the graphs' numbers, or "graph/node". A user's own graphs have no "y".

    What the edges are: every undirected edge twice, once in each direction; edges that come several times are kept
    once, with the first one's features; self-loops are removed. Nodes without edges stay. An edge with an unknown node,
    or between graphs, is refused.

    root=None: generated from ``seed``, 600 rings of 16 to 40 nodes, 200 of them for validation and tests each. With
    ``target="node"`` every node has one of 4 keys, and 4 nodes at random places, one a key, show a colour; the label of
    a node is the colour that goes with its key in its ring: what a node must know lies anywhere. With
    ``target="graph"`` two nodes at opposite ends of the ring show one of 4 colours; the label says whether it is the
    same.

    root=DIR: the TU layout (chrsmrrs.github.io/datasets), in DIR or in DIR/raw: ``NAME_A.txt``,
    ``NAME_graph_indicator.txt``, ``NAME_graph_labels.txt``, where the set has them ``NAME_node_labels.txt``,
    ``NAME_node_attributes.txt``, ``NAME_edge_labels.txt``, ``NAME_edge_attributes.txt``; and where the folds are fixed
    ``10fold_idx/test_idx-K.txt`` in DIR, K = 1 to 10 (github.com/weihua916/powerful-gnns).

    Args:
        name: of the set in ``root``; None where it holds a single one.
        target: "graph" or "node" (the labels of ``NAME_node_labels.txt``; features then are attributes or degrees).
        features: "auto" takes node labels (one-hot) with attributes behind them, in a set without either the degree
            (one-hot); "labels", "attributes" or "degree" take just that.
        edges: edge labels (one-hot) and attributes as "edge_attr".
        fold: the tenth that is tested, 0 to 9; None takes ``seed`` modulo 10. Without files, folds are scikit-learn's
            stratified ones of random state 42, the same for every seed.
        val_fraction: part of the other nine tenths that validates, drawn class by class by ``seed``.
        val_is_test: validate on the tested tenth, as published tables do, which choose the best epoch there.
    Raises:
        FileNotFoundError: naming the missing file, what was expected and where to get it.
        ZooError: if a file does not hold what its layout says.
    """

    embedded = "600 generated rings"

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        name: str | None = None,
        target: str = "graph",
        features: str = "auto",
        edges: bool = False,
        fold: int | None = None,
        val_fraction: float = 0.1,
        val_is_test: bool = False,
    ):
        for key, value, choices in (
            ("target", target, ("graph", "node")),
            ("features", features, ("auto", "labels", "attributes", "degree")),
        ):
            if value not in choices:
                raise ValueError(f"{key} is {value!r}; it must be one of {', '.join(choices)}.")
        if (fold is not None and not 0 <= fold < FOLDS) or not 0.0 < val_fraction < 1.0:
            raise ValueError(f"fold is {fold} and val_fraction {val_fraction}; expected 0 to 9, and between 0 and 1.")
        if target == "node" and features == "labels":
            raise ValueError("target='node' asks for the nodes' labels; features='labels' would give them away.")
        super().__init__(root, batch_size, num_workers, seed)
        self.name, self.target, self.features, self.edges = name, target, features, edges
        self.fold, self.val_fraction, self.val_is_test = fold, val_fraction, val_is_test
        self.save_hyperparameters()

    def build(self) -> dict[str, Dataset]:
        if self.root is None:
            make = recall_rings if self.target == "node" else matching_rings
            order = torch.arange(600)
            graphs, parts = make(self.seed, 600), (order[:200], order[200:400], order[400:])
        else:
            graphs = self._read_public()
            parts = self._split(graphs)
        return {key: graphs.subset(part) for key, part in zip(("train", "val", "test"), parts, strict=True)}

    def describe(self) -> dict[str, Any]:
        """``in_features``, ``num_classes``, ``edge_features`` and ``level``."""
        graphs = self.dataset("train")
        assert isinstance(graphs, PackedGraphs)
        k = 0 if graphs.edge_attr is None else graphs.edge_attr.shape[1]
        sizes = {"in_features": graphs.x.shape[1], "num_classes": graphs.classes, "edge_features": k}
        return {**sizes, "level": self.target}

    # ---- the public layout --------------------------------------------------------------------------------------

    def _read_public(self) -> "PackedGraphs":
        assert self.root is not None
        folder = self.root / "raw" if (self.root / "raw").is_dir() else self.root
        found = sorted(p.name.removesuffix("_A.txt") for p in folder.glob("*_A.txt"))
        name = choose(folder, found, self.name, "set of graphs", self.layout())
        return read_tu(folder, name, self.target, self.features, self.edges)

    def _split(self, graphs: "PackedGraphs") -> tuple[Tensor, Tensor, Tensor]:
        """Numbers of the training, validation and test graphs."""
        assert self.root is not None and graphs.groups is not None
        fold = self.seed % FOLDS if self.fold is None else self.fold
        path = self.root / "10fold_idx" / f"test_idx-{fold + 1}.txt"
        if path.is_file():
            try:
                test = torch.tensor([int(v) for v in path.read_text().split()])
            except ValueError as error:
                raise ZooError(f"{path} does not hold numbers of graphs: {error}") from error
            if len(test) == 0 or int(test.min()) < 0 or int(test.max()) >= len(graphs):
                raise ZooError(f"{path} numbers graphs beyond the {len(graphs)} of the set, or none.")
        else:
            test = stratified_fold(graphs.groups, fold)
        rest = torch.ones(len(graphs), dtype=torch.bool)
        rest[test] = False
        others = rest.nonzero().flatten()
        if self.val_is_test:
            return others, test, test
        generator = torch.Generator().manual_seed(seed_from(self.seed, "validation", fold))
        chosen = torch.zeros(len(graphs), dtype=torch.bool)
        for group in graphs.groups[others].unique():
            members = others[graphs.groups[others] == group]
            members = members[torch.randperm(len(members), generator=generator)]
            chosen[members[: max(1, round(self.val_fraction * len(members)))]] = True
        return (rest & ~chosen).nonzero().flatten(), chosen.nonzero().flatten(), test

    # ---- users' own graphs --------------------------------------------------------------------------------------

    def read(self, path: Path) -> "PackedGraphs":
        """A user's own graphs: one, or a folder of several.

        Args:
            path: a graph as `NodeClassificationDataModule.read` takes it (``NAME.npz``, or a folder with ``nodes.csv``
                and ``edges.csv``), or a folder of such files and folders.
        """
        single = path.is_file() or (path / "nodes.csv").is_file()
        places = [path] if single else sorted(p for p in path.iterdir() if p.suffix == ".npz" or p.is_dir())
        reader, graphs, names, width = NodeClassificationDataModule(), [], [], None
        for place in places:
            found = reader.read(place)
            for graph in found.items:
                if width is not None and graph["x"].shape[1] != width:
                    self.skip(place, f"{graph['x'].shape[1]} features a node, {width} in the graphs before it")
                    continue
                width = graph["x"].shape[1]
                graphs.append(graph)
                names.append(place.stem)
        self.skipped += reader.skipped
        packed = PackedGraphs.of([(g["x"], g["edge_index"]) for g in graphs], names=names)
        packed.node_names = [node for g in graphs for node in g["name"]]
        packed.by_node = self.target == "node"
        return packed

    def write(self, predictions: Iterable[dict[str, Any]], path: Path) -> list[Path]:
        """A CSV with one line a graph or node: ``name,class,probability``. A folder gets ``predictions.csv``."""
        return write_csv(path, ("name", "class", "probability"), class_rows(predictions))


class Packed(Dataset):
    """Samples in a few tensors, of which a subclass's ``batch(indices, generator)`` cuts some out without a loop."""

    chosen: Tensor
    """Numbers of the samples that belong to this dataset."""

    def batch(self, indices: list[int], generator: torch.Generator | None = None) -> dict[str, Any]:
        raise NotImplementedError

    def subset(self, which: Tensor) -> Self:
        """The same tensors, only these of the samples."""
        part = object.__new__(type(self))
        part.__dict__.update(self.__dict__, chosen=self.chosen[which])
        return part

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.batch([index])


class PackedGraphs(Packed):
    """Graphs end to end in a few tensors; a batch is cut out of them without a loop over graphs.

    Args:
        x: (n, f) of all graphs.
        edge_index: (2, e), nodes numbered within their graph, edges in the order of the graphs.
        nodes, edges: (graphs) int64, how many of each a graph has.
        y: (graphs) or (n) int64, or None.
        edge_attr: (e, k) or None.
        groups: (graphs) int64, the graphs' own classes, by which folds are stratified.
        names: of the graphs; None numbers them.
        classes: how many there are; None counts them.
    """

    def __init__(
        self,
        x: Tensor,
        edge_index: Tensor,
        nodes: Tensor,
        edges: Tensor,
        y: Tensor | None = None,
        edge_attr: Tensor | None = None,
        groups: Tensor | None = None,
        names: Sequence[str] | None = None,
        classes: int | None = None,
    ):
        self.x, self.edge_index, self.y, self.edge_attr, self.groups = x, edge_index, y, edge_attr, groups
        self.nodes, self.edges = nodes, edges
        self.first_node, self.first_edge = nodes.cumsum(0) - nodes, edges.cumsum(0) - edges
        self.names = list(names) if names is not None else [str(i) for i in range(len(nodes))]
        self.node_names: list[str] | None = None
        self.by_node = y is not None and len(y) == len(x) and len(x) != len(nodes)
        self.classes = classes if classes is not None or y is None else int(y.max()) + 1
        self.chosen = torch.arange(len(nodes))

    @classmethod
    def of(cls, graphs: Sequence[tuple[Tensor, Tensor]], **more: Any) -> "PackedGraphs":
        """From pairs (x, edge_index), the nodes of each numbered from 0."""
        if not graphs:
            none = torch.zeros(0, dtype=torch.int64)
            return cls(torch.zeros(0, 0), torch.zeros(2, 0, dtype=torch.int64), none, none, **more)
        nodes = torch.tensor([len(x) for x, _ in graphs])
        edges = torch.tensor([e.shape[1] for _, e in graphs])
        return cls(torch.cat([x for x, _ in graphs]), torch.cat([e for _, e in graphs], 1), nodes, edges, **more)

    def batch(self, indices: list[int], generator: torch.Generator | None = None) -> dict[str, Any]:
        """Several graphs side by side."""
        which = self.chosen[indices]
        nodes, edges = self.nodes[which], self.edges[which]
        rows, columns = _ranges(self.first_node[which], nodes), _ranges(self.first_edge[which], edges)
        before = torch.repeat_interleave(nodes.cumsum(0) - nodes, edges)
        graph = torch.repeat_interleave(torch.arange(len(which)), nodes)
        found = {"x": self.x[rows], "edge_index": self.edge_index[:, columns] + before, "batch": graph}
        if self.y is not None:
            found["y"] = self.y[rows] if self.by_node else self.y[which]
        if self.edge_attr is not None:
            found["edge_attr"] = self.edge_attr[columns]
        names = [self.names[i] for i in which.tolist()]
        if self.by_node:
            own = self.node_names
            inside = torch.arange(len(rows)) - (nodes.cumsum(0) - nodes)[graph]
            ends = [own[i] for i in rows.tolist()] if own is not None else [str(i) for i in inside.tolist()]
            names = [f"{names[g]}/{end}" for g, end in zip(graph.tolist(), ends, strict=True)]
        return {**found, "name": names}


def _ranges(first: Tensor, count: Tensor) -> Tensor:
    """first[0], first[0] + 1, ..., then first[1], ...: ``count`` numbers each."""
    start = torch.repeat_interleave(first - (count.cumsum(0) - count), count)
    return start + torch.arange(int(count.sum()))


def stratified_fold(y: Tensor, fold: int) -> Tensor:
    """The numbers in one tenth: scikit-learn's stratified folds of random state 42, which GIN and others use."""
    from sklearn.model_selection import StratifiedKFold

    splits = StratifiedKFold(FOLDS, shuffle=True, random_state=42).split(np.zeros(len(y)), y.numpy())
    return torch.from_numpy([test for _, test in splits][fold])


# ---- generated sets --------------------------------------------------------------------------------------------------


def _rings(generator: torch.Generator, count: int) -> list[Tensor]:
    """Edges of rings of 16 to 40 nodes, both directions."""
    sizes = torch.randint(16, 41, (count,), generator=generator).tolist()
    rings = [torch.stack((torch.arange(n), torch.arange(n).roll(-1))) for n in sizes]
    return [torch.cat((ring, ring.flip(0)), 1) for ring in rings]


def recall_rings(seed: int, count: int, keys: int = 4, colours: int = 4) -> PackedGraphs:
    """Rings whose nodes must recall what lies anywhere: features are key and shown colour, labels the key's colour."""
    generator = torch.Generator().manual_seed(seed_from(seed, "recall rings"))
    graphs, labels = [], []
    for edges in _rings(generator, count):
        n = edges.shape[1] // 2
        key = torch.randint(keys, (n,), generator=generator)
        places = torch.randperm(n, generator=generator)[:keys]
        key[places] = torch.arange(keys)
        colour = torch.randint(colours, (keys,), generator=generator)
        x = torch.zeros(n, keys + colours)
        x[torch.arange(n), key] = 1.0
        x[places, keys + colour] = 1.0
        graphs.append((x, edges))
        labels.append(colour[key])
    packed = PackedGraphs.of(graphs, y=torch.cat(labels), classes=colours)
    packed.by_node = True
    return packed


def matching_rings(seed: int, count: int, colours: int = 4) -> PackedGraphs:
    """Rings with two coloured nodes at opposite ends: is it the same colour? Half of them have it."""
    generator = torch.Generator().manual_seed(seed_from(seed, "matching rings"))
    y = torch.arange(count) % 2
    y = y[torch.randperm(count, generator=generator)]
    graphs = []
    for edges, same in zip(_rings(generator, count), y.tolist(), strict=True):
        n = edges.shape[1] // 2
        first, shift, start = (int(torch.randint(high, (), generator=generator)) for high in (colours, colours - 1, n))
        second = first if same else (first + 1 + shift) % colours
        x = torch.zeros(n, 1 + colours)
        x[:, 0] = 1.0
        for place, colour in ((start, first), ((start + n // 2) % n, second)):
            x[place] = 0.0
            x[place, 1 + colour] = 1.0
        graphs.append((x, edges))
    return PackedGraphs.of(graphs, y=y, groups=y)


# ---- the TU layout ---------------------------------------------------------------------------------------------------


def _numbers(path: Path, kind: type = int) -> np.ndarray:
    """The numbers of a text file, one line a row, separated by commas; (lines, columns).

    Raises:
        FileNotFoundError: if there is no such file.
        ZooError: if it holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: expected one of the files of the TU layout. Get the set from "
            "chrsmrrs.github.io/datasets."
        )
    try:
        values = np.loadtxt(path, delimiter=",", dtype=np.float64, ndmin=2)
    except (ValueError, UnicodeDecodeError) as error:
        raise ZooError(f"{path} does not hold lines of numbers: {error}") from error
    if kind is int and (values != np.round(values)).any():
        raise ZooError(f"{path} holds numbers that are not whole.")
    return values.astype(np.int64 if kind is int else np.float32)


def _one_hot(labels: np.ndarray) -> np.ndarray:
    """One column a value that occurs, in ascending order; label columns side by side. Shapes: (m, any) -> (m, ·)."""
    parts = []
    for column in labels.T:
        values, index = np.unique(column, return_inverse=True)
        parts.append(np.eye(len(values), dtype=np.float32)[index])
    return np.concatenate(parts, axis=1)


def read_tu(
    folder: Path, name: str, target: str = "graph", features: str = "auto", edges: bool = False
) -> PackedGraphs:
    """A set of the TU layout; arguments as in `GraphClassificationDataModule`.

    Raises:
        FileNotFoundError: naming a missing file.
        ZooError: if files do not fit together.
    """

    def optional(kind: str, number: type = int) -> np.ndarray | None:
        path = folder / f"{name}_{kind}.txt"
        return _numbers(path, number) if path.is_file() else None

    pairs = _numbers(folder / f"{name}_A.txt") - 1
    graph = _numbers(folder / f"{name}_graph_indicator.txt")[:, 0] - 1
    labels = _numbers(folder / f"{name}_graph_labels.txt")[:, 0]
    n, count = len(graph), len(labels)
    if pairs.shape[1] != 2 or pairs.min(initial=0) < 0 or pairs.max(initial=0) >= n:
        raise ZooError(f"{name}_A.txt in {folder} does not hold pairs of the {n} nodes.")
    if (np.diff(graph) < 0).any() or not np.array_equal(np.unique(graph), np.arange(count)):
        raise ZooError(f"{name}_graph_indicator.txt in {folder} does not number the {count} graphs in order.")
    if (graph[pairs[:, 0]] != graph[pairs[:, 1]]).any():
        raise ZooError(f"{name}_A.txt in {folder} joins nodes of different graphs.")
    parts = {"labels": optional("node_labels"), "attributes": optional("node_attributes", float)}
    own = [optional("edge_labels"), optional("edge_attributes", float)] if edges else []
    for kind, values in (*parts.items(), *(("edges", v) for v in own)):
        rows = len(pairs) if kind == "edges" else n
        if values is not None and len(values) != rows:
            raise ZooError(f"{name} in {folder}: {len(values)} lines of {kind}, {rows} expected.")

    pairs, line = _both_ways(pairs, n)
    order = np.argsort(graph[pairs[:, 0]], kind="stable")
    nodes = torch.from_numpy(np.bincount(graph, minlength=count))
    first = np.cumsum(nodes.numpy()) - nodes.numpy()
    inside = pairs[order] - first[graph[pairs[order, 0]]][:, None]
    x = torch.from_numpy(_features(name, folder, parts, pairs, n, target, features))
    groups = torch.from_numpy(np.unique(labels, return_inverse=True)[1])
    y = groups
    if target == "node":
        if parts["labels"] is None:
            raise FileNotFoundError(f"{folder / f'{name}_node_labels.txt'} is missing: expected the nodes' labels.")
        y = torch.from_numpy(np.unique(parts["labels"][:, 0], return_inverse=True)[1])
    given = [_one_hot(v) if v.dtype == np.int64 else v for v in own if v is not None]
    if edges and not given:
        raise FileNotFoundError(f"{folder} holds neither {name}_edge_labels.txt nor {name}_edge_attributes.txt.")
    packed = PackedGraphs(
        x,
        torch.from_numpy(np.ascontiguousarray(inside.T)),
        nodes,
        torch.from_numpy(np.bincount(graph[pairs[:, 0]], minlength=count)),
        y=y,
        edge_attr=torch.from_numpy(np.concatenate(given, axis=1)[line][order]) if given else None,
        groups=groups,
    )
    packed.by_node = target == "node"
    return packed


def _both_ways(pairs: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Every edge in both directions, each once, without self-loops: pairs (e, 2), and the line that each is of (e).

    The order is that of the file; a direction that it lacks comes behind, with the other's line.
    """
    both, line = np.concatenate((pairs, pairs[:, ::-1])), np.tile(np.arange(len(pairs)), 2)
    kept = np.sort(np.unique(both[:, 0] * n + both[:, 1], return_index=True)[1])
    kept = kept[both[kept, 0] != both[kept, 1]]
    return both[kept], line[kept]


def _features(
    name: str, folder: Path, parts: dict[str, np.ndarray | None], pairs: np.ndarray, n: int, target: str, features: str
) -> np.ndarray:
    """(n, f) float32, as ``features`` says."""
    wanted = ("labels", "attributes") if features == "auto" else (features,)
    if target == "node":  # the labels are what is asked for
        wanted = tuple(kind for kind in wanted if kind != "labels")
    found = []
    for kind in wanted:
        values = parts.get(kind)
        if values is not None:
            found.append(_one_hot(values) if kind == "labels" else values)
        elif features == kind != "degree":
            raise FileNotFoundError(f"{folder / f'{name}_node_{kind}.txt'} is missing: features={features!r} needs it.")
    if found:
        return np.concatenate(found, axis=1)
    degree = np.bincount(pairs[:, 0], minlength=n)
    return np.eye(int(degree.max(initial=0)) + 1, dtype=np.float32)[degree]
