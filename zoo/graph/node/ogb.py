"""Node property sets of the Open Graph Benchmark, from the folder that its package ``ogb`` leaves behind.

    ROOT/ogbn_arxiv/raw/{edge,node-feat,node-label,num-node-list}.csv.gz, or ROOT/ogbn_arxiv/processed/data_processed
    ROOT/ogbn_arxiv/split/time/{train,valid,test}.csv.gz            (one folder, named after what splits)

The files are read here: with torch 2.6 and later the package cannot read its own processed file
(github.com/snap-stanford/ogb/pull/507), and it asks questions on the terminal. It is called only for what is not there.

Index legend: n nodes, e directed edges, f features.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from zoo.core import ZooError
from zoo.data.plain import tensor_file

TURNED = ("ogbn-products", "ogbn-proteins")
"""Sets whose raw files list every undirected edge once; the package adds the other direction."""
SPLITS = {"train": "train_mask", "valid": "val_mask", "test": "test_mask"}


def ogb_folders(root: Path) -> dict[str, Path]:
    """The sets in a folder by name; the folder may itself be one."""
    places = [root, *sorted(p for p in root.iterdir() if p.is_dir())]
    return {p.name.replace("_", "-", 1): p for p in places if p.name.startswith("ogbn_")}


def read_ogb(name: str, root: Path) -> dict[str, Any]:
    """ "x" (n, f) float, "edge_index" (2, e) in the package's directions, "y" (n) int64, -1 where unknown, and masks.

    Args:
        name: "ogbn-arxiv", "ogbn-products", ...
        root: the folder that holds the set's, as the package takes it; or the set's own.
    Raises:
        FileNotFoundError: naming what is missing, where neither files nor the package are there.
        ZooError: if files do not fit together, or there are several labels a node.
    """
    folder = ogb_folders(root).get(name, root / name.replace("-", "_", 1))
    if (folder / "processed" / "data_processed").is_file():
        content = tensor_file(folder / "processed" / "data_processed")
        splits = {part: _split(folder, part) for part in SPLITS}
    elif (folder / "raw" / "edge.csv.gz").is_file():
        content = _raw(folder / "raw", name in TURNED)
        splits = {part: _split(folder, part) for part in SPLITS}
    else:
        try:
            from ogb.nodeproppred import NodePropPredDataset
        except ImportError as error:
            raise FileNotFoundError(
                f"{folder} holds neither raw/edge.csv.gz nor processed/data_processed: unpack the set from "
                "ogb.stanford.edu there, or pip install ogb, which downloads it."
            ) from error
        dataset = NodePropPredDataset(name=name, root=str(root))
        content = dict(zip(("graph", "labels"), dataset[0], strict=True))
        splits = dataset.get_idx_split()
    try:
        graph, labels = content["graph"], np.asarray(content["labels"], dtype=np.float64)
        if graph.get("node_feat") is None:
            raise ValueError("its nodes have no features")
        x = torch.from_numpy(np.asarray(graph["node_feat"], dtype=np.float32))
        edges = torch.from_numpy(np.ascontiguousarray(graph["edge_index"], dtype=np.int64))
        n = int(graph["num_nodes"])
        if labels.ndim == 2 and labels.shape[1] > 1:
            raise ValueError(f"it has {labels.shape[1]} labels a node; here a node has one class")
        if x.ndim != 2 or len(x) != n or labels.size != n or edges.ndim != 2 or len(edges) != 2:
            raise ValueError(f"{n} nodes, features {tuple(x.shape)}, labels {labels.shape}, edges {tuple(edges.shape)}")
        y = torch.from_numpy(np.nan_to_num(labels.reshape(n), nan=-1).astype(np.int64))
        found: dict[str, Any] = {"x": x, "edge_index": edges, "y": y}
        for part, key in SPLITS.items():
            members = torch.from_numpy(np.asarray(splits[part], dtype=np.int64).reshape(-1))
            if len(members) and (int(members.min()) < 0 or int(members.max()) >= n):
                raise ValueError(f"the {part} split names node {int(members.max())}; nodes are 0 to {n - 1}")
            found[key] = torch.zeros(n, dtype=torch.bool)
            found[key][members] = True
            found[key] &= y >= 0
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ZooError(f"{folder} does not hold {name}: {error}.") from error
    return found


def _numbers(path: Path, kind: type) -> np.ndarray:
    """The numbers of a gzipped CSV without a header, (lines, columns)."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: expected one of the files of the Open Graph Benchmark.")
    try:
        return np.loadtxt(path, delimiter=",", dtype=kind, ndmin=2)
    except (ValueError, OSError, EOFError) as error:
        raise ZooError(f"{path} does not hold lines of numbers: {str(error)[:200]}") from error


def _raw(folder: Path, turned: bool) -> dict[str, Any]:
    edges = _numbers(folder / "edge.csv.gz", np.int64).reshape(-1, 2).T
    graph = {
        "edge_index": np.concatenate((edges, edges[::-1]), 1) if turned else edges,
        "num_nodes": _numbers(folder / "num-node-list.csv.gz", np.int64).sum(),
    }
    if (folder / "node-feat.csv.gz").is_file():
        graph["node_feat"] = _numbers(folder / "node-feat.csv.gz", np.float32)
    return {"graph": graph, "labels": _numbers(folder / "node-label.csv.gz", np.float64)}


def _split(folder: Path, part: str) -> np.ndarray:
    places = sorted(folder.glob(f"split/*/{part}.csv.gz"))
    if len(places) != 1:
        raise FileNotFoundError(f"{folder} needs one file split/*/{part}.csv.gz and has {len(places)}.")
    return _numbers(places[0], np.int64)
