"""Node classification on one graph: the public benchmark layouts, users' own graphs, and a generated one.

Index legend: n nodes, e directed edges, f features, c classes.
"""

import collections
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from zoo.core import ZooDataModule, ZooError, seed_from
from zoo.core.datamodule import Items
from zoo.data.plain import Matrix, class_rows, csv_rows, load_npz, unpickle, write_csv
from zoo.graph.node.ogb import ogb_folders, read_ogb

Graph = dict[str, Any]


class NodeClassificationDataModule(ZooDataModule):
    """One attributed graph with labelled nodes, in train, validation and test nodes.

    Batch: the whole graph, the same object every time: "x" (n, f) float, raw features; "edge_index" (2, e) int64,
    sources and targets; "y" (n) int64, -1 where the data has none; "train_mask", "val_mask", "test_mask" (n) bool;
    "name": list[str], the nodes' names. The three datasets hold the same graph: the masks tell the splits apart. A
    user's own graph has "x", "edge_index" and "name".

    What the edges are: every undirected edge twice, once in each direction; edges that come several times are kept
    once; self-loops are removed (methods that want them add them). Nodes without edges stay. A node without features
    has a row of zeros. Edges with unknown nodes are refused; in a user's own CSV such lines are counted and left out.

    root=None: a stochastic block model, made from ``seed``: 4 blocks of 150 nodes, mean degree 3, 80 % of the edges
    within a block, 60 binary words of which each block uses 15 of its own often; 5 labels a class for training, 100
    nodes for validation, the rest for tests. Many nodes have few neighbours and few words: what a node lacks, its
    neighbours' words tell.

    root=DIR: one of the public layouts, in DIR or in DIR/raw: Planetoid (``ind.NAME.x``, ``.tx``, ``.allx``, ``.y``,
    ``.ty``, ``.ally``, ``.graph``, ``.test.index``; github.com/kimiyoung/planetoid); ``NAME.npz`` of
    yandex-research/heterophilous-graphs; or ``NAME.npz`` of shchur/gnn-benchmark (Amazon, Coauthor). Or the Open Graph
    Benchmark's: DIR/ogbn_arxiv, DIR/ogbn_products, ... as the package ogb leaves them (``raw/*.csv.gz`` or
    ``processed/data_processed``, and ``split/*/*.csv.gz``), ``name="ogbn-arxiv"``; what is missing is fetched by the
    package where it is installed. Splits of Geom-GCN (``splits/NAME_split_0.6_0.2_FOLD.npz`` in DIR) serve any of them.

    The Planetoid files are pickles; they are read by an unpickler that knows arrays, sparse matrices, lists and
    dictionaries, and refuses anything else.

    Args:
        batch_size: 1, as a batch is one whole graph.
        num_workers: leave at 0: the graph is made once, workers would only copy it.
        name: of the graph in ``root``; None where it holds a single one.
        split: "auto" takes the split that the files bring: Planetoid's public one (20 labels a class, 500 validation
            nodes, the test nodes of the file), the masks number ``fold`` of a heterophilous file, the Open Graph
            Benchmark's, else "random".
            "geom" takes fold ``fold`` of the Geom-GCN files; "random" draws ``per_class`` training nodes a class and
            500 validation nodes (a third of what is left where there are fewer than 1,500) by ``seed``.
        fold: 0 to 9.
        per_class: training nodes a class of a random split.
    Raises:
        FileNotFoundError: naming the missing file, what was expected and where to get it.
        ZooError: if a file does not hold what its layout says.
    """

    embedded = "a generated graph of 600 nodes (attributed stochastic block model)"
    whole = True
    directed: ClassVar[bool] = False
    """Take edges of the Open Graph Benchmark in the directions that they come in."""

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 1,
        num_workers: int = 0,
        seed: int = 0,
        name: str | None = None,
        split: str = "auto",
        fold: int = 0,
        per_class: int = 20,
    ):
        if split not in ("auto", "geom", "random"):
            raise ValueError(f"split is {split!r}; it must be 'auto', 'geom' or 'random'.")
        if fold < 0 or per_class < 1:
            raise ValueError(f"fold is {fold} and per_class {per_class}; they must be at least 0 and 1.")
        super().__init__(root, batch_size, num_workers, seed)
        self.name, self.split, self.fold, self.per_class = name, split, fold, per_class
        self.save_hyperparameters()

    def build(self) -> dict[str, Dataset]:
        graph = block_model(self.seed) if self.root is None else self._read_public()
        graph.setdefault("name", [str(i) for i in range(len(graph["x"]))])
        graphs = Items([graph])
        return {"train": graphs, "val": graphs, "test": graphs}

    def describe(self) -> dict[str, Any]:
        """``in_features`` and ``num_classes`` of the graph."""
        graph = self.dataset("train")[0]
        return {"in_features": graph["x"].shape[1], "num_classes": int(graph["y"].max()) + 1}

    # ---- public layouts -----------------------------------------------------------------------------------------

    def _read_public(self) -> Graph:
        assert self.root is not None
        folder = self.root / "raw" if (self.root / "raw").is_dir() else self.root
        ogb = ogb_folders(self.root)
        planetoid, archives = [], []
        if self.root not in ogb.values():
            planetoid = sorted(p.name[4:-2] for p in folder.glob("ind.*.x"))
            archives = sorted(p.stem for p in folder.glob("*.npz"))
        fetched = [self.name] if self.name is not None and self.name.startswith("ogbn-") else []
        name = choose(folder, {*planetoid, *archives, *ogb, *fetched}, self.name, "graph", self.layout())
        if name in planetoid or name in archives:
            graph = read_planetoid(folder, name) if name in planetoid else read_npz(folder / f"{name}.npz", self.fold)
        else:
            graph = read_ogb(name, self.root)
            if not self.directed:
                graph["edge_index"] = clean_edges(graph["edge_index"], len(graph["x"]), name)
        if self.split == "geom":
            self._geom_split(graph, name)
        elif self.split == "random" or "train_mask" not in graph:
            graph.update(random_split(graph["y"], self.per_class, self.seed))
        return graph

    def _geom_split(self, graph: Graph, name: str) -> None:
        path = self.need(
            "splits",
            f"{name}_split_0.6_0.2_{self.fold}.npz",
            expected="a Geom-GCN split (train_mask, val_mask, test_mask)",
            get="Copy splits/ from github.com/graphdml-uiuc-jlu/geom-gcn.",
        )
        arrays = load_npz(path, ("train_mask", "val_mask", "test_mask"))
        for key in ("train_mask", "val_mask", "test_mask"):
            if arrays[key].shape != (len(graph["y"]),):
                raise ZooError(f"{path}: {key} has shape {arrays[key].shape}, the graph {len(graph['y'])} nodes.")
            graph[key] = torch.from_numpy(arrays[key].astype(bool)) & (graph["y"] >= 0)

    # ---- users' own graphs --------------------------------------------------------------------------------------

    def read(self, path: Path) -> Items:
        """A user's own graph, or a folder of several.

        Args:
            path: ``NAME.npz`` in one of the two public layouts (labels and masks are not needed), or a folder with
                ``nodes.csv`` (a header, then one line a node: its name, then its features as numbers) and
                ``edges.csv`` (a header, then two names a line); or a folder of such files and folders. Lines that
                cannot be read are counted and left out.
        """
        if path.is_file() or (path / "nodes.csv").is_file():
            places = [path]
        else:
            places = sorted(p for p in path.iterdir() if p.suffix == ".npz" or (p / "nodes.csv").is_file())
        graphs = []
        for place in places:
            try:
                graph = self._read_csv(place) if place.is_dir() else read_npz(place)
            except (ZooError, FileNotFoundError) as error:
                self.skip(place, error)
                continue
            graph.setdefault("name", [str(i) for i in range(len(graph["x"]))])
            graphs.append({key: graph[key] for key in ("x", "edge_index", "name")})
        return Items(graphs)

    def _read_csv(self, folder: Path) -> Graph:
        nodes, edges = folder / "nodes.csv", folder / "edges.csv"
        rows, bad = [], []
        for number, row in csv_rows(nodes):
            try:
                values = np.array([float(v) for v in row[1:]], dtype=np.float32)
            except ValueError:
                bad.append(number)
                continue
            good = len(values) > 0 and np.isfinite(values).all() and (not rows or len(values) == len(rows[0][1]))
            rows.append((row[0], values)) if good else bad.append(number)
        index = {name: i for i, (name, _) in enumerate(rows)}
        if len(index) < len(rows):
            twice = next(name for name, count in collections.Counter(n for n, _ in rows).items() if count > 1)
            raise ZooError(f"{nodes}: node {twice!r} comes twice.")
        if not rows:
            raise ZooError(f"{nodes}: no line with a name and numbers. Lines 2, 3, ...: name, feature, feature, ...")
        if bad:
            self.skip(nodes, f"{len(bad)} lines (the first: {bad[0]}) are not a name and {len(rows[0][1])} numbers")
        pairs, bad = [], []
        for number, row in csv_rows(edges):
            if len(row) >= 2 and row[0] in index and row[1] in index:
                pairs.append((index[row[0]], index[row[1]]))
            else:
                bad.append(number)
        if bad:
            self.skip(edges, f"{len(bad)} lines (the first: {bad[0]}) do not name two nodes of nodes.csv")
        return {
            "x": torch.from_numpy(np.stack([values for _, values in rows])),
            "edge_index": clean_edges(torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).t(), len(rows)),
            "name": [name for name, _ in rows],
        }

    def write(self, predictions: Iterable[dict[str, Any]], path: Path) -> list[Path]:
        """A CSV with one line a node: ``node,class,probability`` (of that class). A folder gets ``predictions.csv``."""
        return write_csv(path, ("node", "class", "probability"), class_rows(predictions))


def choose(folder: Path, found: Iterable[str], name: str | None, what: str, layout: str) -> str:
    """Which of the sets in a folder is meant.

    Args:
        found: their names.
        name: what the user wrote; None where there is a single one.
        what: what they are, and ``layout`` what was expected, for the error.
    Raises:
        FileNotFoundError: if it is none of them, or there are none.
        ZooError: if there are several and no name.
    """
    held = sorted(found)
    if name in held or (name is None and len(held) == 1):
        return name or held[0]
    if name is None and held:
        raise ZooError(f"{folder} holds {', '.join(held)}: choose one with name=...")
    wanted, others = "" if name is None else f" {name!r}", f" but {', '.join(held)}" if held else ""
    raise FileNotFoundError(f"{folder} holds no {what}{wanted}{others}. Expected {layout}")


# ---- edges and splits ------------------------------------------------------------------------------------------------


def clean_edges(edges: Tensor, nodes: int, where: object = "The graph") -> Tensor:
    """Both directions of every edge, each once, without self-loops, sorted by source, then target.

    Args:
        where: the file, for the error.
    Shapes:
        edges: (2, any) int64, in any direction, repeats allowed; returns: (2, e)
    Raises:
        ZooError: if an edge names a node that does not exist.
    """
    if edges.numel():
        low, high = (int(v) for v in torch.aminmax(edges))
        if low < 0 or high >= nodes:
            raise ZooError(f"{where}: an edge names node {low if low < 0 else high}; nodes are 0 to {nodes - 1}.")
    edges = edges[:, edges[0] != edges[1]]
    keys = torch.unique(torch.cat((edges[0] * nodes + edges[1], edges[1] * nodes + edges[0])))
    return torch.stack((keys // nodes, keys % nodes))


def random_split(y: Tensor, per_class: int, seed: int, validation: int | None = None) -> dict[str, Tensor]:
    """``per_class`` training nodes a class, then validation nodes, the rest for tests; unlabelled nodes in none.

    Args:
        validation: nodes; None takes 500, or a third of the rest where that has fewer than 1,500.
    Shapes:
        y: (n) int64, -1 for unlabelled; returns: three masks (n) bool
    """
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed_from(seed, "split")))
    order = order[y[order] >= 0]
    # Sorting stably by class keeps the order drawn within each class: its first nodes are the training nodes.
    by_class = order[torch.argsort(y[order], stable=True)]
    counts = torch.bincount(y[order], minlength=1)
    first = (counts.cumsum(0) - counts)[y[by_class]]
    masks = {key: torch.zeros(len(y), dtype=torch.bool) for key in ("train_mask", "val_mask", "test_mask")}
    masks["train_mask"][by_class[torch.arange(len(by_class)) - first < per_class]] = True
    rest = order[~masks["train_mask"][order]]
    if validation is None:
        validation = 500 if len(rest) >= 1500 else len(rest) // 3
    masks["val_mask"][rest[:validation]] = True
    masks["test_mask"][rest[validation:]] = True
    return masks


def block_model(seed: int, blocks: int = 4, size: int = 150, degree: float = 3.0, homophily: float = 0.8) -> Graph:
    """Attributed stochastic block model.

    Args:
        seed: of everything drawn.
        blocks, size: classes, and nodes a class.
        degree: mean degree, before repeated edges are merged.
        homophily: fraction of edges within a block.
    """
    generator = torch.Generator().manual_seed(seed_from(seed, "block model"))
    n, words, own = blocks * size, 15 * blocks, 15
    y = torch.arange(blocks).repeat_interleave(size)
    source = torch.randint(n, (round(n * degree / 2),), generator=generator)
    shift = torch.randint(1, blocks, source.shape, generator=generator)
    stay = torch.rand(source.shape, generator=generator) < homophily
    block = (y[source] + torch.where(stay, 0, shift)) % blocks
    target = block * size + torch.randint(size, source.shape, generator=generator)
    mine = torch.arange(words) // own == y[:, None]
    x = (torch.rand((n, words), generator=generator) < torch.where(mine, 0.25, 0.03)).float()
    edges = clean_edges(torch.stack((source, target)), n)
    return {"x": x, "edge_index": edges, "y": y, **random_split(y, per_class=5, seed=seed, validation=100)}


# ---- Planetoid -------------------------------------------------------------------------------------------------------


def _planetoid(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: expected one of the eight Planetoid files. "
            "Get data/ind.* from github.com/kimiyoung/planetoid."
        )
    content = unpickle(path)
    try:
        return content.dense() if isinstance(content, Matrix) else content
    except (KeyError, ValueError, TypeError) as error:
        raise ZooError(f"{path} cannot be read: {error}") from error


def read_planetoid(folder: Path, name: str) -> Graph:
    """The graph and public split of ``ind.NAME.*``.

    The rows of ``tx`` come in the order of ``test.index`` and go to those places. Citeseer's test range has 15 holes:
    nodes without features and label (-1), in no split, kept so that the numbers of nodes stay right.

    Raises:
        FileNotFoundError: naming a missing file.
        ZooError: if files do not fit together, or hold what no Planetoid file holds.
    """
    parts = {key: _planetoid(folder / f"ind.{name}.{key}") for key in ("x", "y", "tx", "ty", "allx", "ally", "graph")}
    path = folder / f"ind.{name}.test.index"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: expected the numbers of the test nodes, one a line.")
    try:
        test = np.array(path.read_text().split(), dtype=np.int64)
        known, labelled = len(parts["allx"]), len(parts["y"])
        n = max(int(test.max()) + 1, known)
        if test.min() < known or len(test) != len(parts["tx"]) or len(np.unique(test)) != len(test):
            raise ValueError(f"{path.name} does not number the rows of tx from {known} on")
        x = np.zeros((n, parts["allx"].shape[1]), dtype=np.float32)
        x[:known], x[test] = parts["allx"], parts["tx"]
        y = np.full(n, -1, dtype=np.int64)
        for rows, one_hot in ((np.arange(known), parts["ally"]), (test, parts["ty"])):
            y[rows] = np.where(one_hot.any(1), one_hot.argmax(1), -1)
        lists = parts["graph"]
        sources = np.repeat(np.fromiter(lists, np.int64, len(lists)), [len(v) for v in lists.values()])
        targets = np.fromiter((t for v in lists.values() for t in v), np.int64, len(sources))
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise ZooError(f"The Planetoid files of {name!r} in {folder} do not fit together: {error}") from error
    masks = {key: torch.zeros(n, dtype=torch.bool) for key in ("train_mask", "val_mask", "test_mask")}
    masks["train_mask"][:labelled] = True
    masks["val_mask"][labelled : labelled + 500] = True
    masks["val_mask"][known:] = False
    masks["test_mask"][torch.from_numpy(test)] = True
    labels = torch.from_numpy(y)
    edges = clean_edges(torch.from_numpy(np.stack((sources, targets))), n, folder / f"ind.{name}.graph")
    return {
        "x": torch.from_numpy(x),
        "edge_index": edges,
        "y": labels,
        **{key: mask & (labels >= 0) for key, mask in masks.items()},
    }


# ---- npz -------------------------------------------------------------------------------------------------------------


def read_npz(path: Path, fold: int = 0) -> Graph:
    """A graph of yandex-research/heterophilous-graphs or shchur/gnn-benchmark; labels and masks where it has them.

    Raises:
        ZooError: if it has neither layout, or pieces that do not fit.
    """
    arrays = load_npz(path)
    try:
        if "node_features" in arrays:
            x = torch.from_numpy(arrays["node_features"].astype(np.float32))
            pairs = torch.from_numpy(arrays["edges"].astype(np.int64)).reshape(-1, 2).t()
            y = arrays.get("node_labels")
        elif "adj_indptr" in arrays and ("attr_indptr" in arrays or "attr_matrix" in arrays):
            if "attr_matrix" in arrays:
                x = torch.from_numpy(arrays["attr_matrix"].astype(np.float32))
            else:
                parts = {key: arrays[f"attr_{key}"] for key in ("indptr", "indices", "data", "shape")}
                x = torch.from_numpy(Matrix("csr", parts).dense())
            indptr = arrays["adj_indptr"].astype(np.int64)
            rows = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
            pairs = torch.from_numpy(np.stack((rows, arrays["adj_indices"].astype(np.int64))))
            y = arrays.get("labels")
        else:
            raise ZooError(
                f"{path} holds {', '.join(sorted(arrays)) or 'nothing'}; expected node_features and edges "
                "(heterophilous-graphs), or adj_* and attr_* (gnn-benchmark)."
            )
        if x.ndim != 2 or len(x) == 0:
            raise ValueError(f"features have shape {tuple(x.shape)}")
        graph: Graph = {"x": x, "edge_index": clean_edges(pairs, len(x), path)}
        if y is not None:
            if y.shape != (len(x),):
                raise ValueError(f"labels have shape {y.shape}, the graph {len(x)} nodes")
            graph["y"] = torch.from_numpy(y.astype(np.int64))
        for key in ("train_mask", "val_mask", "test_mask"):
            if f"{key}s" in arrays and y is not None:
                masks = arrays[f"{key}s"].astype(bool)
                if masks.ndim != 2 or masks.shape[1] != len(x) or fold >= len(masks):
                    raise ValueError(f"{key}s has shape {masks.shape}; fold {fold} of {len(x)} nodes was asked for")
                graph[key] = torch.from_numpy(masks[fold]) & (graph["y"] >= 0)
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise ZooError(f"{path} does not hold a graph: {error}") from error
    return graph
