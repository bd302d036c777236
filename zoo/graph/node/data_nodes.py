"""Node classification on one graph: the public benchmark layouts, users' own graphs, and a generated one.

Index legend: n nodes, e directed edges, f features, c classes.
"""

import collections
import csv
import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from zoo.core import ZooDataModule, ZooError, atomic_write, seed_from
from zoo.nn.graph import Remember

Graph = dict[str, Any]


class NodeClassificationDataModule(ZooDataModule):
    """One attributed graph with labelled nodes, in train, validation and test nodes.

    Batch: the whole graph, the same object every time: "x" (n, f) float, raw features; "edge_index" (2, e) int64,
    sources and targets; "y" (n) int64, -1 where the data has none; "train_mask", "val_mask", "test_mask" (n) bool;
    "name": list[str], the nodes' names. The three datasets hold the same graph: the masks tell the splits apart. A
    user's own graph has "x", "edge_index" and "name".

    What the edges are: every undirected edge twice, once in each direction; edges that come several times are kept
    once; self-loops are removed (methods that want them add them). Nodes without edges stay. A node without features
    has a row of zeros.

    root=None: a stochastic block model, made from ``seed``: 4 blocks of 150 nodes, mean degree 3, 80 % of the edges
    within a block, 60 binary words of which each block uses 15 of its own often; 5 labels a class for training, 100
    nodes for validation, the rest for tests. Many nodes have few neighbours and few words: what a node lacks, its
    neighbours' words tell.

    root=DIR: one of the public layouts, in DIR or in DIR/raw: Planetoid (``ind.NAME.x``, ``.tx``, ``.allx``, ``.y``,
    ``.ty``, ``.ally``, ``.graph``, ``.test.index``; github.com/kimiyoung/planetoid); ``NAME.npz`` of
    yandex-research/heterophilous-graphs; or ``NAME.npz`` of shchur/gnn-benchmark (Amazon, Coauthor). Splits of Geom-GCN
    (``splits/NAME_split_0.6_0.2_FOLD.npz`` in DIR) serve any of them.

    The Planetoid files are pickles; they are read by an unpickler that knows arrays, sparse matrices, lists and
    dictionaries, and refuses anything else.

    Args:
        batch_size: 1, as a batch is one whole graph.
        num_workers: leave at 0: the graph is made once, workers would only copy it.
        name: of the graph in ``root``; None where it holds a single one.
        split: "auto" takes the split that the files bring: Planetoid's public one (20 labels a class, 500 validation
            nodes, the test nodes of the file), the masks number ``fold`` of a heterophilous file, else "random".
            "geom" takes fold ``fold`` of the Geom-GCN files; "random" draws ``per_class`` training nodes a class and
            500 validation nodes (a third of what is left where there are fewer than 1,500) by ``seed``.
        fold: 0 to 9.
        per_class: training nodes a class of a random split.
    Raises:
        FileNotFoundError: naming the missing file, what was expected and where to get it.
        ZooError: if a file does not hold what its layout says.
    """

    embedded = "a generated graph of 600 nodes (attributed stochastic block model)"

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
        if batch_size != 1:
            raise ValueError(f"batch_size is {batch_size}; a batch is one whole graph, so it must be 1.")
        super().__init__(root, batch_size, num_workers, seed)
        self.name, self.split, self.fold, self.per_class = name, split, fold, per_class
        self._moved = Remember()
        self.save_hyperparameters()

    def build(self) -> dict[str, Dataset]:
        graph = block_model(self.seed) if self.root is None else self._read_public()
        graph.setdefault("name", [str(i) for i in range(len(graph["x"]))])
        graphs = Graphs([graph])
        return {"train": graphs, "val": graphs, "test": graphs}

    def describe(self) -> dict[str, Any]:
        """``in_features`` and ``num_classes`` of the graph."""
        graph = self.dataset("train")[0]
        return {"in_features": graph["x"].shape[1], "num_classes": int(graph["y"].max()) + 1}

    @staticmethod
    def collate(items: list[Graph]) -> Graph:
        """The graph itself: a batch is one item."""
        return items[0]

    def loader(self, dataset: Dataset, shuffle: bool = False) -> "DataLoader[Any]":
        """The base's loader; every process of a distributed run gets the whole graph, also in evaluation."""
        own = dataset is self._sets.get("predict")  # a user's graphs are shared out: none twice
        loader = super().loader(dataset, shuffle=not own)
        loader.pin_memory = False  # pinning copies: the graph would no longer be the same object every time
        return loader

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """The same graph again is moved once; it then is the same object on the device, too."""
        move = super().transfer_batch_to_device
        return self._moved(lambda batch, device: move(batch, device, dataloader_idx), batch, device)

    # ---- public layouts -----------------------------------------------------------------------------------------

    def _read_public(self) -> Graph:
        assert self.root is not None
        folder = self.root / "raw" if (self.root / "raw").is_dir() else self.root
        planetoid = sorted(p.name[4:-2] for p in folder.glob("ind.*.x"))
        archives = sorted(p.stem for p in folder.glob("*.npz"))
        found = sorted({*planetoid, *archives})
        if self.name is None and len(found) != 1:
            held = f"holds {', '.join(found)}: choose one with name=..." if found else "holds no graph"
            error = ZooError if found else FileNotFoundError
            raise error(f"{folder} {held}{'' if found else f'. Expected {self.layout()}'}")
        name = self.name or found[0]
        if name not in found:
            raise FileNotFoundError(
                f"{folder} holds no graph {name!r}{f' but {chr(44).join(found)}' if found else ''}; expected "
                f"ind.{name}.x and its seven companions, or {name}.npz."
            )
        graph = read_planetoid(folder, name) if name in planetoid else read_npz(folder / f"{name}.npz", self.fold)
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
        arrays = _load_npz(path, ("train_mask", "val_mask", "test_mask"))
        for key in ("train_mask", "val_mask", "test_mask"):
            if arrays[key].shape != (len(graph["y"]),):
                raise ZooError(f"{path}: {key} has shape {arrays[key].shape}, the graph {len(graph['y'])} nodes.")
            graph[key] = torch.from_numpy(arrays[key].astype(bool)) & (graph["y"] >= 0)

    # ---- users' own graphs --------------------------------------------------------------------------------------

    def read(self, path: Path) -> "Graphs":
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
        return Graphs(graphs)

    def _read_csv(self, folder: Path) -> Graph:
        nodes, edges = folder / "nodes.csv", folder / "edges.csv"
        rows, bad = [], []
        for number, row in _csv_rows(nodes):
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
        for number, row in _csv_rows(edges):
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
        path = Path(path)
        target = path if path.suffix.lower() == ".csv" else path / "predictions.csv"
        with atomic_write(target) as part, open(part, "w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(("node", "class", "probability"))
            for prediction in predictions:
                classes = prediction["class"].tolist()
                top = prediction["probability"].gather(1, prediction["class"][:, None])[:, 0].tolist()
                writer.writerows(
                    (name, c, f"{p:.6f}") for name, c, p in zip(prediction["name"], classes, top, strict=True)
                )
        return [target]


class Graphs(Dataset):
    """A list of graphs; an item is the very object, so that who gets it again may know it again."""

    def __init__(self, graphs: Sequence[Graph]):
        self.graphs = list(graphs)

    def __len__(self) -> int:
        return len(self.graphs)

    def __getitem__(self, index: int) -> Graph:
        return self.graphs[index]


# ---- edges and splits ------------------------------------------------------------------------------------------------


def clean_edges(edges: Tensor, nodes: int) -> Tensor:
    """Both directions of every edge, each once, without self-loops, sorted by source, then target.

    Shapes:
        edges: (2, any) int64, in any direction, repeats allowed; returns: (2, e)
    Raises:
        ZooError: if an edge names a node that does not exist.
    """
    if edges.numel():
        low, high = (int(v) for v in torch.aminmax(edges))
        if low < 0 or high >= nodes:
            raise ZooError(f"An edge names node {low if low < 0 else high}; nodes are 0 to {nodes - 1}.")
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


# ---- Planetoid's pickles ---------------------------------------------------------------------------------------------


class _Csr:
    """What a pickled scipy matrix holds, without scipy: its arrays and its shape."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def dense(self) -> np.ndarray:
        rows, columns = self.__dict__.get("_shape") or self.__dict__["shape"]
        indptr, indices, data = (np.asarray(self.__dict__[key]) for key in ("indptr", "indices", "data"))
        if len(indptr) != rows + 1 or len(indices) != len(data) or int(indptr[-1]) > len(data):
            raise ValueError("a sparse matrix whose arrays do not fit its shape")
        x = np.zeros((rows, columns), dtype=np.float32)
        np.add.at(x, (np.repeat(np.arange(rows), np.diff(indptr)), indices), data)
        return x


def _allowed() -> dict[tuple[str, str], Any]:
    reconstruct = np.empty(0).__reduce__()[0]
    table: dict[tuple[str, str], Any] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("collections", "defaultdict"): collections.defaultdict,
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("_codecs", "encode"): _encode,
    }
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        table[module, "_reconstruct"] = reconstruct
    for module in ("__builtin__", "builtins"):
        table |= {(module, kind.__name__): kind for kind in (list, dict, set, int)}
    for module in ("scipy.sparse.csr", "scipy.sparse._csr"):
        table[module, "csr_matrix"] = table[module, "csr_array"] = _Csr
    return table


def _encode(text: str, encoding: str) -> bytes:
    """How Python 3 pickles bytes in protocol 2; other encodings do not occur."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding!r}")
    return text.encode("latin1")


class _ArrayUnpickler(pickle.Unpickler):
    """Arrays, sparse matrices, lists and dictionaries; nothing else is looked up, so nothing else can run."""

    def find_class(self, module: str, name: str) -> Any:
        found = _allowed().get((module, name))
        if found is None:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no Planetoid file needs")
        return found


def _unpickle(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: expected one of the eight Planetoid files. "
            "Get data/ind.* from github.com/kimiyoung/planetoid."
        )
    try:
        with open(path, "rb") as stream:
            content = _ArrayUnpickler(stream, encoding="latin1").load()
        return content.dense() if isinstance(content, _Csr) else content
    except Exception as error:
        raise ZooError(f"{path} cannot be read: {error}") from error


def read_planetoid(folder: Path, name: str) -> Graph:
    """The graph and public split of ``ind.NAME.*``.

    The rows of ``tx`` come in the order of ``test.index`` and go to those places. Citeseer's test range has 15 holes:
    nodes without features and label (-1), in no split, kept so that the numbers of nodes stay right.

    Raises:
        FileNotFoundError: naming a missing file.
        ZooError: if files do not fit together, or hold what no Planetoid file holds.
    """
    parts = {key: _unpickle(folder / f"ind.{name}.{key}") for key in ("x", "y", "tx", "ty", "allx", "ally", "graph")}
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
    edges = clean_edges(torch.from_numpy(np.stack((sources, targets))), n)
    return {
        "x": torch.from_numpy(x),
        "edge_index": edges,
        "y": labels,
        **{key: mask & (labels >= 0) for key, mask in masks.items()},
    }


# ---- npz -------------------------------------------------------------------------------------------------------------


def _load_npz(path: Path, keys: Iterable[str] = ()) -> dict[str, np.ndarray]:
    """The arrays of an archive that are no pickles.

    Raises:
        ZooError: if it is no such archive, or lacks one of ``keys``.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {}
            for key in archive.files:
                try:
                    arrays[key] = archive[key]
                except ValueError:  # an object array: names in the gnn-benchmark files, which nothing here needs
                    continue
    except Exception as error:
        raise ZooError(f"{path} cannot be read as an npz archive: {error}") from error
    missing = [key for key in keys if key not in arrays]
    if missing:
        raise ZooError(f"{path} lacks {', '.join(missing)}; it holds {', '.join(sorted(arrays)) or 'nothing'}.")
    return arrays


def read_npz(path: Path, fold: int = 0) -> Graph:
    """A graph of yandex-research/heterophilous-graphs or shchur/gnn-benchmark; labels and masks where it has them.

    Raises:
        ZooError: if it has neither layout, or pieces that do not fit.
    """
    arrays = _load_npz(path)
    try:
        if "node_features" in arrays:
            x = torch.from_numpy(arrays["node_features"].astype(np.float32))
            pairs = torch.from_numpy(arrays["edges"].astype(np.int64)).reshape(-1, 2).t()
            y = arrays.get("node_labels")
        elif "adj_indptr" in arrays and ("attr_indptr" in arrays or "attr_matrix" in arrays):
            if "attr_matrix" in arrays:
                x = torch.from_numpy(arrays["attr_matrix"].astype(np.float32))
            else:
                matrix = _Csr()
                matrix.__setstate__({key: arrays[f"attr_{key}"] for key in ("indptr", "indices", "data", "shape")})
                x = torch.from_numpy(matrix.dense())
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
        graph: Graph = {"x": x, "edge_index": clean_edges(pairs, len(x))}
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


# ---- csv -------------------------------------------------------------------------------------------------------------


def _csv_rows(path: Path) -> list[tuple[int, list[str]]]:
    """(line number, fields) of every line after the header that is not empty.

    Raises:
        FileNotFoundError: if there is no such file.
        ZooError: if it is no text.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: expected a header and one line for each node or edge.")
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:
            reader = csv.reader(stream)
            rows = [(reader.line_num, [field.strip() for field in row]) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ZooError(f"{path} is no CSV file: {error}") from error
    return [(number, row) for number, row in rows[1:] if any(row)]
