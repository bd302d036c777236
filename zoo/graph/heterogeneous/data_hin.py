"""Heterogeneous graphs: node classes and user-item scores, in public layouts, of users' own, and generated.

Index legend: n nodes, e edges, s stored features, m nodes or pairs asked for.
"""

import collections
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from zoo.core import ZooDataModule, ZooError, seed_from
from zoo.core.datamodule import Items
from zoo.data.plain import Matrix, class_rows, csv_rows, load_npz, unpickle, write_csv

Graph = dict[str, Any]

WORDS = {
    "acm": {"P-A": "Is Written By", "A-P": "Wrote", "P-S": "Is About", "S-P": "Is The Subject Of"},
    "dblp": {
        "P-A": "Is Written By", "A-P": "Wrote", "P-C": "Appeared At", "C-P": "Published", "P-T": "Mentions",
        "T-P": "Is Mentioned In",
    },
    "imdb": {"M-D": "Is Directed By", "D-M": "Directed", "M-A": "Stars", "A-M": "Appears In"},
    "freebase": {
        "M-D": "Is Directed By", "D-M": "Directed", "M-A": "Stars", "A-M": "Appears In", "M-W": "Is Written By",
        "W-M": "Wrote",
    },
    "yelp": {
        "U-U": "Knows", "U-B": "Went To", "B-U": "Was Visited By", "U-O": "Paid", "O-U": "Was Paid By",
        "B-A": "Is A Kind Of", "A-B": "Comprises", "B-I": "Lies In", "I-B": "Is Home To",
    },
    "amazon": {
        "U-I": "Bought", "I-U": "Was Bought By", "I-B": "Is Made By", "B-I": "Makes", "I-C": "Belongs To",
        "C-I": "Comprises", "I-V": "Was Viewed With", "V-I": "Is A View Of",
    },
    "douban": {
        "U-U": "Knows", "U-M": "Watched", "M-U": "Was Watched By", "U-G": "Joined", "G-U": "Has Member",
        "M-A": "Stars", "A-M": "Appears In", "M-D": "Is Directed By", "D-M": "Directed", "M-T": "Is Of Genre",
        "T-M": "Is The Genre Of",
    },
}  # fmt: skip
"""What the edges of known sets are called; by what the name of the set's folder contains."""
TYPES = {
    "acm": "PAS", "dblp": "APC", "imdb": "MDA", "yelp": "UBAIO", "amazon": "UIBCV", "douban": "UMGADT",
}  # fmt: skip
"""The types behind the numbers of the authors' files, whose names these do not hold."""


@dataclass
class Content:
    """A heterogeneous graph as it is read, before it becomes a batch; numbers run within a type.

    Args:
        sizes: nodes of every type, in order.
        edges: by pairs of types, (2, e).
        features: (rows, columns, values, width) by type; a type without them gets its nodes' own numbers (one-hot).
        target: the classified type.
        y: (m) classes of its nodes, -1 where unknown.
        splits: row numbers of "train", "val", "test".
        names: of the nodes, by type.
    """

    sizes: dict[str, int]
    edges: dict[tuple[str, str], np.ndarray]
    features: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray, int]] = field(default_factory=dict)
    target: str | None = None
    y: np.ndarray | None = None
    splits: dict[str, np.ndarray] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)
    words: dict[str, str] = field(default_factory=dict)

    def batch(self) -> Graph:
        """The graph's part of a batch: every edge once, no self-loops, one relation a pair of types.

        Raises:
            ZooError: if an edge names a node that its type does not have, or there are no edges.
        """
        types = list(self.sizes)
        first = dict(zip(types, itertools.accumulate([0, *self.sizes.values()]), strict=False))
        relations: list[tuple[str, str]] = []
        joined: dict[tuple[str, str], list[np.ndarray]] = {}
        for (a, b), pairs in self.edges.items():
            for row, kind in enumerate((a, b)):
                if kind not in self.sizes:
                    raise ZooError(f"Edges {a}-{b} join a type {kind!r}; types are {', '.join(types)}.")
                if pairs.size and (pairs[row].min() < 0 or pairs[row].max() >= self.sizes[kind]):
                    wrong = pairs[row].min() if pairs[row].min() < 0 else pairs[row].max()
                    raise ZooError(f"An edge {a}-{b} names node {wrong} of {kind}, which has {self.sizes[kind]} nodes.")
            turned = (b, a) in joined and a != b
            key = (b, a) if turned else (a, b)
            relations += [] if key in joined else [key]
            joined.setdefault(key, []).append(pairs[::-1] if turned else pairs)
        parts, kinds = [], []
        for number, (a, b) in enumerate(relations):
            pairs = np.concatenate(joined[a, b], 1).astype(np.int64)
            if a == b:  # one row a pair of nodes; a node is no neighbour of its own
                pairs = np.sort(pairs[:, pairs[0] != pairs[1]], axis=0)
            pairs = np.unique(pairs, axis=1)
            parts.append(pairs + np.array([[first[a]], [first[b]]]))
            kinds.append(np.full(pairs.shape[1], number))
        if not sum(p.shape[1] for p in parts):
            raise ZooError("The graph has no edges; structures need some.")
        stored = [self._stored(name, first[name]) for name in types]
        return {
            "x": torch.from_numpy(np.concatenate([s[2] for s in stored]).astype(np.float32)),
            "x_index": torch.from_numpy(np.stack([np.concatenate([s[k] for s in stored]) for k in (0, 1)])),
            "node_type": torch.arange(len(types)).repeat_interleave(torch.tensor(list(self.sizes.values()))),
            "edge_index": torch.from_numpy(np.concatenate(parts, 1)),
            "edge_type": torch.from_numpy(np.concatenate(kinds)),
            "types": types,
            "relations": [list(r) for r in relations],
        }

    def _stored(self, name: str, first: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if name not in self.features:
            own = np.arange(self.sizes[name], dtype=np.int64)
            return own + first, own, np.ones(len(own))
        rows, columns, values, _ = self.features[name]
        return rows.astype(np.int64) + first, columns.astype(np.int64), values

    def widths(self) -> list[int]:
        """Features of every type."""
        return [self.features[t][3] if t in self.features else n for t, n in self.sizes.items()]

    def rows(self) -> Graph:
        """The classified nodes' part of a batch: "node", "y", masks, "name"."""
        types = list(self.sizes)
        target = self.target or types[0]
        if target not in self.sizes:
            raise ZooError(f"target is {target!r}; the graph's types are {', '.join(types)}.")
        m, first = self.sizes[target], sum(n for t, n in self.sizes.items() if types.index(t) < types.index(target))
        found: Graph = {"node": torch.arange(first, first + m)}
        found["name"] = self.names.get(target) or [str(i) for i in range(m)]
        if self.y is not None:
            found["y"] = torch.from_numpy(self.y.astype(np.int64))
        for split, members in self.splits.items():
            found[f"{split}_mask"] = torch.zeros(m, dtype=torch.bool)
            found[f"{split}_mask"][torch.from_numpy(members.astype(np.int64))] = True
        return found


class _HINData(ZooDataModule):
    """What both DataModules share."""

    task = ""
    whole = True
    _content: Content | None = None

    def build(self) -> dict[str, Dataset]:
        content, more = self._load()
        self._content = content
        graphs = Items([{**content.batch(), **more}])
        return {"train": graphs, "val": graphs, "test": graphs}

    def _load(self) -> tuple[Content, Graph]:
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """``types``, ``relations``, ``words``, ``ends``, ``in_features``, ``task`` and ``num_classes`` of the graph."""
        graph = self.dataset("train")[0]
        assert self._content is not None
        known = {f"{a}-{b}" for x, y in graph["relations"] for a, b in ((x, y), (y, x))}
        ends = [graph["types"][k] for k in graph["node_type"][graph["node"].view(len(graph["node"]), -1)[0]].tolist()]
        found = {
            "types": graph["types"],
            "relations": graph["relations"],
            "words": {k: v for k, v in self._content.words.items() if k in known},
            "ends": ends * 2 if len(ends) == 1 else ends,
            "in_features": self._content.widths(),
            "task": self.task,
        }
        if self.task == "classification":
            found["num_classes"] = int(graph["y"].max()) + 1
        return found

    def read(self, path: Path) -> Items:
        """A user's own graph, or a folder of several.

        Args:
            path: a file or folder in one of the layouts (labels are not needed); or a folder with ``nodes.csv`` (a
                header, then a line a node: its name, its type, then its features as numbers, or nothing) and
                ``edges.csv`` (a header, then two names a line); or a folder of such. Lines that cannot be read are
                counted and left out.
        """
        places = [path]
        if path.is_dir() and not any((path / f).exists() for f in _MARKS) and not list(path.glob("??.txt")):
            places = sorted(p for p in path.iterdir() if p.is_dir() or p.suffix == ".pt")
        graphs = []
        for place in places:
            try:
                graphs.append(self._own(place))
            except (ZooError, FileNotFoundError) as error:
                self.skip(place, error)
        return Items(graphs)

    def _own(self, place: Path) -> Graph:
        raise NotImplementedError


_MARKS = ("nodes.csv", "edges.pkl", "adjs_offset.pkl", "labels.npy")


class HINDataModule(_HINData):
    """One heterogeneous graph whose nodes of one type have classes.

    Batch: the whole graph, the same object every time: "x" (s) float, the stored features, and "x_index" (2, s) int64,
    node and column of each, where columns count within the node's type; "node_type" (n) int64, ascending: nodes stand
    together by type; "edge_index" (2, e) int64, every edge once, from the relation's first type to its second;
    "edge_type" (e) int64, the relation; "types", list[str], and "relations", list[list[str]]: the names behind the
    numbers; "node" (m) int64, all nodes of the classified type; "y" (m) int64, -1 where unknown; "train_mask",
    "val_mask", "test_mask" (m) bool; "name": list[str], those nodes' names. A user's own graph has no targets.

    What the edges are: edges that come several times, also in both directions, are kept once; self-loops are removed;
    relations between the same two types are one, as a structure cannot tell them apart. Nodes without edges stay and
    have their own features alone. Edges between other types than their relation's, and unknown nodes, are refused;
    in a user's own CSV such lines are counted and left out. A type without features gets its nodes' own numbers
    (one-hot), and so does a user's own, which then must have as many nodes as the model was made for.

    root=None: 300 movies, 40 directors, 200 actors, 30 keywords, 25 companies, made from ``seed``. A director works in
    one of four genres; a movie's class is its director's, or with 15 % any other. Who acts, who pays and what is
    mentioned is random; a movie has 16 features, noise with a faint trace of the class; the others have noise.

    root=DIR: one of the public layouts: of the authors (``edges.pkl``, a list of sparse matrices over all nodes,
    ``node_types.npy``, ``labels.pkl``, training, validation and test pairs of node and class, ``node_features.pkl``, an
    array; github.com/LinChen-65/ReStruct); of HeCo (``pa.txt``, ``ps.txt``, ...: two numbers a line, the types' letters
    in the file's name; ``labels.npy``, ``train_20.npy``, ``val_20.npy``, ``test_20.npy``, optional ``p_feat.npz``, ...;
    github.com/liun-online/HeCo, data/acm); or ``data.pt``, a saved torch_geometric ``HeteroData``.

    The pickles are read by an unpickler that knows arrays, sparse matrices, lists and dictionaries, and refuses
    anything else; ``data.pt`` is read with ``weights_only=True``.

    Args:
        batch_size: 1, as a batch is one whole graph.
        num_workers: leave at 0: the graph is made once, workers would only copy it.
        per_class: training nodes a class of HeCo's layout: 20, 40 or 60.
        target: the type that is classified; None takes the one that the labels are of, or, where there are none, the
            first.
    Raises:
        FileNotFoundError: naming the missing file, what was expected and where to get it.
        ZooError: if a file does not hold what its layout says.
    """

    embedded = "a generated graph of 300 movies with directors, actors, keywords and companies"
    task = "classification"

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 1,
        num_workers: int = 0,
        seed: int = 0,
        per_class: int = 20,
        target: str | None = None,
    ):
        super().__init__(root, batch_size, num_workers, seed)
        self.per_class, self.target = per_class, target
        self.save_hyperparameters()

    def _load(self) -> tuple[Content, Graph]:
        content = movies(self.seed) if self.root is None else self._content_of(self.root, labelled=True)
        return content, content.rows()

    def remember(self) -> dict[str, Any]:
        """The type that is classified: a user's own files hold no labels that tell it."""
        return {**super().remember(), "target": self.describe()["ends"][0]}

    def _content_of(self, place: Path, labelled: bool) -> Content:
        if (place / "edges.pkl").exists():
            content = read_restruct(place, labelled)
        elif place.is_dir() and list(place.glob("??.txt")):
            content = read_heco(place, self.per_class, labelled)
        elif place.suffix == ".pt" or (place / "data.pt").exists():
            content = read_hetero(place if place.is_file() else place / "data.pt")
        elif (place / "nodes.csv").exists():
            content = read_csv(place, self.skip)
        else:
            raise FileNotFoundError(f"{place} holds no heterogeneous graph: expected {self.layout()}")
        content.target = self.target or content.target
        if labelled and (content.y is None or not content.splits):
            raise ZooError(f"{place}: the graph has no labels or no splits; training needs both.")
        return content

    def _own(self, place: Path) -> Graph:
        content = self._content_of(place, labelled=False)
        keep = ("node", "name")
        return {**content.batch(), **{k: v for k, v in content.rows().items() if k in keep}}

    def write(self, predictions: Iterable[dict[str, Any]], path: Path) -> list[Path]:
        """A CSV with one line a node: ``node,class,probability`` (of that class). A folder gets ``predictions.csv``."""
        return write_csv(path, ("node", "class", "probability"), class_rows(predictions))


class HINRecommendationDataModule(_HINData):
    """One heterogeneous graph, and pairs of users and items that belong together or don't.

    Batch: the graph as in `HINDataModule` ("x", "x_index", "node_type", "edge_index", "edge_type", "types",
    "relations"); "node" (m, 2) int64, user and item of every pair; "y" (m) int64, 1 or 0; "train_mask", "val_mask",
    "test_mask" (m) bool; "name": list[str], "USER ITEM". A user's own graph has no targets.

    root=None: 120 users, 90 items, 12 brands, 8 categories, made from ``seed``. Users like the items of four brands;
    half of what they like is in the graph as bought, the rest are training, validation and test pairs, as many pairs of
    what they don't like beside them. Categories are random.

    root=DIR: the authors' layout: ``adjs_offset.pkl``, a dictionary of sparse matrices over all nodes,
    ``node_types.npy``, ``pos_pairs_offset_larger_than_2_2.npz`` and ``neg_pairs_offset_for_pos_larger_than_2_2.npz``
    with pairs ``train``, ``val`` and ``test`` (github.com/LinChen-65/ReStruct, data_recommendation).

    A user's own graph is in the same layout without the two files, or in CSV as in `HINDataModule`, and beside it
    ``pairs.csv``: a header, then a user's and an item's name (or number in the graph) a line.

    Args:
        batch_size: 1, as a batch is one whole graph.
        num_workers: leave at 0: the graph is made once, workers would only copy it.
        pairs: ends of the two files' names: the authors' draws of the split are told apart by it.
    Raises:
        FileNotFoundError: naming the missing file, what was expected and where to get it.
        ZooError: if a file does not hold what its layout says.
    """

    embedded = "a generated graph of 120 users and 90 items with brands and categories"
    task = "recommendation"

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 1,
        num_workers: int = 0,
        seed: int = 0,
        pairs: str = "larger_than_2_2",
    ):
        super().__init__(root, batch_size, num_workers, seed)
        self.pairs = pairs
        self.save_hyperparameters()

    def _load(self) -> tuple[Content, Graph]:
        if self.root is None:
            return shop(self.seed)
        content = read_restruct(self.root, labelled=False)
        files = (f"pos_pairs_offset_{self.pairs}.npz", f"neg_pairs_offset_for_pos_{self.pairs}.npz")
        paths = [self.need(f, expected="pairs 'train', 'val' and 'test'", get=_AUTHORS) for f in files]
        parts = {}
        for y, path in zip((1, 0), paths, strict=True):
            arrays = load_npz(path, ("train", "val", "test"))
            for split in ("train", "val", "test"):
                if arrays[split].ndim != 2 or arrays[split].shape[1] != 2:
                    raise ZooError(f"{path}: '{split}' has shape {arrays[split].shape}; expected (pairs, 2).")
                parts[split, y] = arrays[split]
        return content, pair_rows(parts, content)

    def _own(self, place: Path) -> Graph:
        if (place / "adjs_offset.pkl").exists():
            content = read_restruct(place, labelled=False)
            index = {str(i): i for i in range(sum(content.sizes.values()))}
        else:
            content = read_csv(place, self.skip)
            index = {n: i for i, n in enumerate(name for names in content.names.values() for name in names)}
        path = place / "pairs.csv"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: expected a header, then a user's and an item's name a line.")
        lines = csv_rows(path)
        good = [(r[0], r[1]) for _, r in lines if len(r) >= 2 and r[0] in index and r[1] in index]
        if not good:
            raise ZooError(f"{path}: no line names two nodes of the graph.")
        if len(good) < len(lines):
            self.skip(path, f"{len(lines) - len(good)} lines do not name two nodes of the graph")
        return {
            **content.batch(),
            "node": torch.tensor([(index[a], index[b]) for a, b in good]),
            "name": [f"{a} {b}" for a, b in good],
        }

    def write(self, predictions: Iterable[dict[str, Any]], path: Path) -> list[Path]:
        """A CSV with one line a pair: ``pair,score``. A folder gets ``predictions.csv``."""
        rows = (
            (name, f"{score:.6f}")
            for prediction in predictions
            for name, score in zip(prediction["name"], prediction["score"].tolist(), strict=True)
        )
        return write_csv(path, ("pair", "score"), rows)


def pair_rows(parts: dict[tuple[str, int], np.ndarray], content: Content) -> Graph:
    """The pairs' part of a batch, out of pairs of global node numbers by (split, target).

    Raises:
        ZooError: if pairs join other types than the first pair's.
    """
    node = torch.from_numpy(np.concatenate([p for p in parts.values()]).astype(np.int64))
    count = [(split, y, len(p)) for (split, y), p in parts.items()]
    n = sum(content.sizes.values())
    if len(node) and (int(node.min()) < 0 or int(node.max()) >= n):
        raise ZooError(f"A pair names node {int(node.max())}; nodes are 0 to {n - 1}.")
    kinds = torch.arange(len(content.sizes)).repeat_interleave(torch.tensor(list(content.sizes.values())))[node]
    if not len(node) or bool((kinds != kinds[0]).any()):
        raise ZooError("The pairs do not all join the same two types.")
    found: Graph = {"node": node, "y": torch.cat([torch.full((c,), y) for _, y, c in count])}
    for split in ("train", "val", "test"):
        found[f"{split}_mask"] = torch.cat([torch.full((c,), s == split) for s, _, c in count])
    found["name"] = [f"{a} {b}" for a, b in node.tolist()]
    return found


# ---- public layouts --------------------------------------------------------------------------------------------------

_AUTHORS = "Get data_node_classification/ or data_recommendation/ from github.com/LinChen-65/ReStruct."


def _known(folder: Path) -> str | None:
    return next((key for key in WORDS if key in folder.resolve().name.lower()), None)


def read_restruct(folder: Path, labelled: bool = True) -> Content:
    """The authors' layout, of either task.

    The types' names are not in the files: they are known for the authors' sets (by the folder's name) and else are
    letters, "A" for number 0. Matrices are taken for edges between the types of their first entry.

    Raises:
        FileNotFoundError: naming a missing file.
        ZooError: if files do not fit together.
    """
    path = folder / "edges.pkl" if (folder / "edges.pkl").exists() else folder / "adjs_offset.pkl"
    kinds_path = folder / "node_types.npy"
    for needed, what in ((path, "the list of sparse matrices"), (kinds_path, "the type of every node")):
        if not needed.is_file():
            raise FileNotFoundError(f"{needed} is missing: expected {what}. {_AUTHORS}")
    stored = unpickle(path)
    matrices = list(stored.values()) if isinstance(stored, dict) else stored
    try:
        kinds = np.load(kinds_path, allow_pickle=False).astype(np.int64)
        if kinds.ndim != 1 or not len(kinds) or kinds.min() < 0:
            raise ValueError(f"node_types.npy has shape {kinds.shape}")
        order = np.argsort(kinds, kind="stable")
        if (order != np.arange(len(kinds))).any():
            raise ValueError("node_types.npy does not ascend: nodes must stand together by type")
        count = int(kinds.max()) + 1
        letters = TYPES.get(_known(folder) or "", "")
        types = list(letters[:count]) if len(letters) >= count else [chr(ord("A") + k) for k in range(count)]
        sizes = np.bincount(kinds, minlength=count)
        first = np.concatenate(([0], sizes.cumsum()))
        edges: dict[tuple[str, str], np.ndarray] = {}
        for number, matrix in enumerate(matrices):
            if not isinstance(matrix, Matrix) or matrix.shape != (len(kinds), len(kinds)):
                raise ValueError(f"matrix {number} of {path.name} is no sparse ({len(kinds)}, {len(kinds)}) matrix")
            rows, columns, values = matrix.places()
            rows, columns = rows[values != 0], columns[values != 0]
            if not len(rows):
                continue
            a, b = kinds[rows[0]], kinds[columns[0]]
            if (kinds[rows] != a).any() or (kinds[columns] != b).any():
                raise ValueError(f"matrix {number} of {path.name} joins several pairs of types")
            pairs = np.stack((rows - first[a], columns - first[b]))
            key = (types[a], types[b])
            edges[key] = np.concatenate((edges[key], pairs), 1) if key in edges else pairs
        content = Content(dict(zip(types, sizes.tolist(), strict=True)), edges, words=_words(folder))
        features = folder / "node_features.pkl"
        if features.is_file():
            content.features = _by_type(unpickle(features), kinds, types, first)
        if labelled:
            _labels(folder / "labels.pkl", kinds, types, first, content)
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise ZooError(f"The files in {folder} do not fit together: {error}") from error
    return content


def _words(folder: Path) -> dict[str, str]:
    return WORDS.get(_known(folder) or "", {})


def _by_type(
    x: Any, kinds: np.ndarray, types: list[str], first: np.ndarray
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray, int]]:
    """Features of all nodes, an array or a sparse matrix, as stored features by type."""
    if isinstance(x, Matrix):
        (n, f), (rows, columns, values) = x.shape, x.places()
    else:
        x = np.asarray(x)
        if x.ndim != 2:
            raise ValueError(f"node_features.pkl has shape {x.shape}; expected (nodes, features)")
        (n, f), (rows, columns) = x.shape, x.nonzero()
        values = x[rows, columns]
    if n != len(kinds):
        raise ValueError(f"node_features.pkl has {n} rows for {len(kinds)} nodes")
    found = {}
    for k, name in enumerate(types):
        inside = kinds[rows] == k
        found[name] = (rows[inside] - first[k], columns[inside], values[inside].astype(np.float32), f)
    return found


def _labels(path: Path, kinds: np.ndarray, types: list[str], first: np.ndarray, content: Content) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: expected training, validation and test pairs. {_AUTHORS}")
    parts = [np.asarray(part).reshape(-1, 2).astype(np.int64) for part in unpickle(path)]
    if len(parts) != 3 or not len(parts[0]):
        raise ValueError(f"labels.pkl has {len(parts)} parts; expected training, validation and test pairs")
    every = np.concatenate(parts)
    if every[:, 0].min() < 0 or every[:, 0].max() >= len(kinds) or every[:, 1].min() < 0:
        raise ValueError("labels.pkl names nodes that do not exist, or negative classes")
    own = kinds[every[0, 0]]
    if (kinds[every[:, 0]] != own).any():
        raise ValueError("labels.pkl holds nodes of several types")
    if len(np.unique(every[:, 0])) != len(every):
        raise ValueError("labels.pkl names a node twice")
    content.target = types[own]
    content.y = np.full(content.sizes[types[own]], -1, dtype=np.int64)
    content.y[every[:, 0] - first[own]] = every[:, 1]
    content.splits = {s: p[:, 0] - first[own] for s, p in zip(("train", "val", "test"), parts, strict=True)}


def read_heco(folder: Path, per_class: int = 20, labelled: bool = True) -> Content:
    """HeCo's layout; the classified type is the one with as many nodes as there are labels.

    Raises:
        FileNotFoundError: naming a missing file.
        ZooError: if files do not fit together.
    """
    get = "Get data/acm, data/dblp or data/freebase from github.com/liun-online/HeCo."
    edges: dict[tuple[str, str], np.ndarray] = {}
    for path in sorted(folder.glob("??.txt")):
        try:
            pairs = np.array(path.read_text().split(), dtype=np.int64).reshape(-1, 2).T
        except ValueError as error:
            raise ZooError(f"{path} cannot be read: expected two node numbers a line ({error}).") from error
        edges[path.stem[0].upper(), path.stem[1].upper()] = pairs
    sizes: dict[str, int] = {}
    for key, pairs in edges.items():
        for row, kind in enumerate(key):
            sizes[kind] = max(sizes.get(kind, 0), int(pairs[row].max(initial=-1)) + 1)
    content = Content(sizes, edges, words=_words(folder))
    for kind in sizes:
        path = folder / f"{kind.lower()}_feat.npz"
        if path.is_file():
            rows, content.features[kind] = _sparse_npz(path)
            if rows < sizes[kind]:
                raise ZooError(f"{path} has {rows} rows; edges name node {sizes[kind] - 1} of {kind}.")
            sizes[kind] = rows
    if not labelled:
        return content
    labels = _npy(folder / "labels.npy", get)
    own = [t for t, n in sizes.items() if n == len(labels)]
    if not own:  # nodes at the end may have no edges: the type in most files, if it is not too large
        most = collections.Counter(t for key in edges for t in key).most_common(1)[0][0]
        own = [most] if sizes[most] < len(labels) and most not in content.features else []
    if not own:
        raise ZooError(f"{folder}: labels.npy has {len(labels)} rows, which no type has: {sizes}.")
    content.target, content.y = own[0], labels.astype(np.int64)
    sizes[own[0]] = len(labels)
    content.sizes = {own[0]: sizes[own[0]], **{t: n for t, n in sizes.items() if t != own[0]}}
    for split in ("train", "val", "test"):
        members = _npy(folder / f"{split}_{per_class}.npy", get).astype(np.int64)
        if len(members) and (members.min() < 0 or members.max() >= len(labels)):
            raise ZooError(f"{folder}/{split}_{per_class}.npy names node {members.max()} of {len(labels)}.")
        content.splits[split] = members
    return content


def read_hetero(path: Path) -> Content:
    """A saved torch_geometric ``HeteroData``, or its ``to_dict()``; relations between two types become one.

    Raises:
        ZooError: if it cannot be read without running code, or is no such graph.
    """
    try:
        from torch_geometric.data import HeteroData
        from torch_geometric.data.storage import BaseStorage, EdgeStorage, NodeStorage
    except ImportError as error:
        raise ZooError("Reading a HeteroData needs torch_geometric: pip install 'paper-zoo[graph]'.") from error
    try:
        with torch.serialization.safe_globals([HeteroData, BaseStorage, NodeStorage, EdgeStorage]):
            stored = torch.load(path, map_location="cpu", weights_only=True)
        data = stored if isinstance(stored, HeteroData) else HeteroData.from_dict(stored)
        sizes = {str(t): int(data[t].num_nodes) for t in data.node_types}
        letters = {t: t for t in sizes}
        edges: dict[tuple[str, str], np.ndarray] = {}
        for a, _, b in data.edge_types:
            pairs = data[a, _, b].edge_index.numpy()
            edges[a, b] = np.concatenate((edges[a, b], pairs), 1) if (a, b) in edges else pairs
        content = Content(sizes, edges)
        for t in letters:
            x = data[t].get("x")
            if x is not None:
                x = x.to_dense() if x.layout != torch.strided else x
                rows, columns = x.nonzero(as_tuple=True)
                values = x[rows, columns].float()
                content.features[t] = (rows.numpy(), columns.numpy(), values.numpy(), x.shape[1])
            y = data[t].get("y")
            if y is not None and content.target is None and y.ndim == 1:
                content.target, content.y = t, y.numpy()
                for split in ("train", "val", "test"):
                    mask = data[t].get(f"{split}_mask")
                    if mask is not None:
                        content.splits[split] = mask.nonzero().flatten().numpy()
    except ZooError:
        raise
    except Exception as error:
        text = (str(error).splitlines() or [type(error).__name__])[0]
        raise ZooError(f"{path} cannot be read as a HeteroData: {text[:200]}") from error
    return content


def read_csv(folder: Path, skip: Any) -> Content:
    """``nodes.csv`` and ``edges.csv`` (see `_HINData.read`); lines that cannot be read are left out and go to ``skip``.

    Raises:
        FileNotFoundError: naming a missing file.
        ZooError: for a node that comes twice, or none.
    """
    nodes, edges = folder / "nodes.csv", folder / "edges.csv"
    rows: dict[str, list[tuple[str, list[float]]]] = {}
    bad, place = [], {}
    for number, row in csv_rows(nodes):
        try:
            values = [float(v) for v in row[2:] if v.strip()]
        except ValueError:
            values = [np.nan]
        own = rows.get(row[1], []) if len(row) > 1 else []
        if len(row) < 2 or not row[1] or not np.isfinite(values).all() or (own and len(own[0][1]) != len(values)):
            bad.append(number)
            continue
        if row[0] in place:
            raise ZooError(f"{nodes}: node {row[0]!r} comes twice.")
        rows.setdefault(row[1], []).append((row[0], values))
        place[row[0]] = (row[1], len(rows[row[1]]) - 1)
    if not rows:
        raise ZooError(f"{nodes}: no line with a name and a type. Lines 2, 3, ...: name, type, feature, feature, ...")
    if bad:
        skip(nodes, f"{len(bad)} lines (the first: {bad[0]}) are not a name, a type and as many numbers as its others")
    pairs: dict[tuple[str, str], list[tuple[int, int]]] = {}
    bad = []
    for number, row in csv_rows(edges):
        if len(row) >= 2 and row[0] in place and row[1] in place:
            (a, i), (b, j) = place[row[0]], place[row[1]]
            pairs.setdefault((a, b), []).append((i, j))
        else:
            bad.append(number)
    if bad:
        skip(edges, f"{len(bad)} lines (the first: {bad[0]}) do not name two nodes of nodes.csv")
    content = Content(
        {t: len(members) for t, members in rows.items()},
        {key: np.array(p, dtype=np.int64).T for key, p in pairs.items()},
        names={t: [name for name, _ in members] for t, members in rows.items()},
    )
    for t, members in rows.items():
        x = np.array([values for _, values in members], dtype=np.float32)
        if x.shape[1]:
            at = x.nonzero()
            content.features[t] = (*at, x[at], x.shape[1])  # type: ignore[assignment]
    return content


def _npy(path: Path, get: str) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: expected an array. {get}")
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ZooError(f"{path} cannot be read as an array: {error}") from error
    if array.ndim == 2:  # one-hot labels
        array = array.argmax(1)
    return array


def _sparse_npz(path: Path) -> tuple[int, tuple[np.ndarray, np.ndarray, np.ndarray, int]]:
    """scipy's npz of a CSR matrix: how many rows, and its stored features."""
    matrix = Matrix("csr", load_npz(path, ("indptr", "indices", "shape", "data")))
    try:
        rows, columns, values = matrix.places()
    except ValueError as error:
        raise ZooError(f"{path} does not hold {error}") from error
    return matrix.shape[0], (rows, columns, values.astype(np.float32), matrix.shape[1])


# ---- generated graphs ------------------------------------------------------------------------------------------------


def movies(seed: int, genres: int = 4, noise: float = 0.15) -> Content:
    """The embedded graph of `HINDataModule`: directors decide; actors, keywords and companies do not."""
    draw = np.random.default_rng(seed_from(seed, "movies"))
    sizes = {"M": 300, "D": 40, "A": 200, "K": 30, "C": 25}
    m = sizes["M"]
    director = draw.integers(sizes["D"], size=m)
    genre = draw.permutation(np.arange(sizes["D"]) % genres)[director]
    other = (genre + draw.integers(1, genres, size=m)) % genres
    y = np.where(draw.random(m) < noise, other, genre)
    edges = {
        ("M", "D"): np.stack((np.arange(m), director)),
        ("M", "A"): np.stack((np.repeat(np.arange(m), 3), draw.integers(sizes["A"], size=3 * m))),
        ("M", "K"): np.stack((np.repeat(np.arange(m), 2), draw.integers(sizes["K"], size=2 * m))),
        ("M", "C"): np.stack((np.arange(m), draw.integers(sizes["C"], size=m))),
    }
    centres = draw.normal(size=(genres, 16))
    features = {}
    for kind, n in sizes.items():
        x = draw.normal(size=(n, 16)) + (0.25 * centres[y] if kind == "M" else 0.0)
        rows, columns = np.indices(x.shape).reshape(2, -1)
        features[kind] = (rows, columns, x[rows, columns].astype(np.float32), 16)
    order = draw.permutation(m)
    splits = {"train": order[:80], "val": order[80:190], "test": order[190:]}
    words = {**WORDS["imdb"], "M-K": "Mentions", "K-M": "Is Mentioned In", "M-C": "Is Paid By", "C-M": "Paid"}
    return Content(sizes, edges, features, "M", y, splits, words=words)


def shop(seed: int) -> tuple[Content, Graph]:
    """The embedded graph of `HINRecommendationDataModule`: users like brands; categories say nothing."""
    draw = np.random.default_rng(seed_from(seed, "shop"))
    sizes = {"U": 120, "I": 90, "B": 12, "C": 8}
    brand, category = draw.integers(12, size=90), draw.integers(8, size=90)
    group = draw.integers(3, size=120)  # users of a group like the same four brands
    likes = brand[None] % 3 == group[:, None]
    good = np.argwhere(likes & (draw.random(likes.shape) < 0.5))
    bad = np.argwhere(~likes)
    good, bad = good[draw.permutation(len(good))], bad[draw.permutation(len(bad))]
    half, rest = len(good) // 2, len(good) - len(good) // 2
    content = Content(
        sizes,
        {
            ("U", "I"): good[:half].T,
            ("I", "B"): np.stack((np.arange(90), brand)),
            ("I", "C"): np.stack((np.arange(90), category)),
        },
        words={k: v for k, v in WORDS["amazon"].items() if "V" not in k},
    )
    offset = np.array([[0, sizes["U"]]])
    parts = {}
    for y, pairs in ((1, good[half:]), (0, bad[:rest])):
        cuts = (int(0.6 * rest), int(0.8 * rest))
        for split, part in zip(("train", "val", "test"), np.split(pairs + offset, cuts), strict=True):
            parts[split, y] = part
    return content, pair_rows(parts, content)
