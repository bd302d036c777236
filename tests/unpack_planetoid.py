"""Cora and CiteSeer from compact arrays into Planetoid's own files, ``ind.NAME.*``, with Geom-GCN's splits."""

import pickle
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

PARTS = ("x", "y", "tx", "ty", "allx", "ally", "graph")


def write_planetoid(
    folder: Path,
    name: str,
    x: np.ndarray,
    y: np.ndarray,
    edges: np.ndarray,
    train: int,
    known: int,
    test: np.ndarray,
) -> None:
    """Write the eight files of Planetoid.

    Args:
        x: (n, f) features; y: (n) labels, -1 for none; edges: (2, any), each undirected edge once.
        train: the first so many nodes are the training nodes.
        known: the first so many nodes are in ``allx``.
        test: numbers of the test nodes, at least ``known``, in the order in which ``tx`` lists them.
    """
    from scipy.sparse import csr_matrix

    one_hot = np.eye(int(y.max()) + 1, dtype=np.int32)
    labels = np.where(y[:, None] >= 0, one_hot[np.maximum(y, 0)], 0)
    lists: defaultdict[int, list[int]] = defaultdict(list)
    for node in range(len(x)):
        lists[node] = []
    for a, b in edges.T.tolist():
        lists[a].append(b)
        lists[b].append(a)
    parts: dict[str, Any] = {
        "x": csr_matrix(x[:train]),
        "y": labels[:train],
        "tx": csr_matrix(x[test]),
        "ty": labels[test],
        "allx": csr_matrix(x[:known]),
        "ally": labels[:known],
        "graph": lists,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for key in PARTS:
        with open(folder / f"ind.{name}.{key}", "wb") as stream:
            pickle.dump(parts[key], stream, protocol=2)
    (folder / f"ind.{name}.test.index").write_text("".join(f"{i}\n" for i in test.tolist()))


def unpack_planetoid(source: Path, target: Path) -> None:
    """``NAME.npz`` and ``NAME_geom_splits.npz`` in ``source`` -> ``target/NAME/ind.NAME.*`` and ``splits/``."""
    for name in ("cora", "citeseer"):
        with np.load(source / f"{name}.npz") as arrays:
            data = dict(arrays)
        n, f = (int(v) for v in data["x_shape"])
        x = np.zeros((n, f), dtype=np.float32)
        x[np.repeat(np.arange(n), np.diff(data["x_indptr"])), data["x_indices"]] = data["x_data"]
        test = np.sort(data["test_idx"].astype(np.int64))
        known = int(test[0])
        train = np.sort(data["train_idx"])
        if not (train == np.arange(len(train))).all() or n != int(test[-1]) + 1:
            raise ValueError(f"{name}: the nodes are not in Planetoid's order")
        shuffled = np.random.default_rng(0).permutation(test)  # the published files list them in no order either
        y = data["y"].astype(np.int64)
        write_planetoid(target / name, name, x, y, data["edges"].astype(np.int64), len(train), known, shuffled)
        splits = target / name / "splits"
        splits.mkdir(exist_ok=True)
        with np.load(source / f"{name}_geom_splits.npz") as packed:
            masks = {
                key: np.unpackbits(packed[f"{key}s"], axis=1)[:, :n] for key in ("train_mask", "val_mask", "test_mask")
            }
        for fold in range(len(masks["train_mask"])):
            arrays = {key: value[fold] for key, value in masks.items()}
            np.savez_compressed(splits / f"{name}_split_0.6_0.2_{fold}.npz", **arrays)
