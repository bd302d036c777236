"""Heterogeneous graphs from one npz each into public layouts: ReStruct's pickles, HeCo's text files and arrays."""

import pickle
from pathlib import Path

import numpy as np
import scipy.sparse as sp

RESTRUCT = {"acm": "restruct_acm", "imdb": "restruct_imdb", "amazon": "restruct_amazon_rec", "dblp": "hgsl_dblp"}
HECO = ("acm", "dblp", "freebase")


def _dump(content: object, path: Path) -> None:
    with open(path, "wb") as stream:
        pickle.dump(content, stream)


def write_restruct(archive: Path, folder: Path) -> None:
    """The authors' layout of either task: pickled matrices over all nodes, labels or pairs, features as an array."""
    with np.load(archive) as stored:
        z = {key: stored[key] for key in stored.files}
    folder.mkdir(parents=True, exist_ok=True)
    n = len(z["node_types"])
    np.save(folder / "node_types.npy", z["node_types"].astype(np.int32))
    matrices = {
        key.removeprefix("edge_"): sp.csr_matrix(
            (np.ones(pairs.shape[1], dtype=np.float32), tuple(pairs)), shape=(n, n)
        )
        for key, pairs in z.items()
        if key.startswith("edge_")
    }
    if "pos_train" in z:
        _dump(matrices, folder / "adjs_offset.pkl")
        for kind, name in (
            ("pos", "pos_pairs_offset_larger_than_2_2"),
            ("neg", "neg_pairs_offset_for_pos_larger_than_2_2"),
        ):
            np.savez(folder / f"{name}.npz", **{s: z[f"{kind}_{s}"].astype(np.int64) for s in ("train", "val", "test")})
        return
    _dump(list(matrices.values()), folder / "edges.pkl")
    labels = [[tuple(row) for row in z[f"labels_{split}"].tolist()] for split in ("train", "val", "test")]
    _dump(labels, folder / "labels.pkl")
    if "x_indptr" in z:
        _dump(_csr(z, "x").toarray(), folder / "node_features.pkl")


def _csr(z: dict[str, np.ndarray], name: str) -> sp.csr_matrix:
    indices = z[f"{name}_indices"]
    data = z.get(f"{name}_data", np.ones(len(indices), dtype=np.float32))
    return sp.csr_matrix((data, indices, z[f"{name}_indptr"]), shape=tuple(z[f"{name}_shape"]))


def write_heco(archive: Path, folder: Path) -> None:
    """HeCo's layout: ``pa.txt`` with two numbers a line, ``p_feat.npz`` as scipy stores it, arrays of labels."""
    with np.load(archive) as stored:
        z = {key: stored[key] for key in stored.files}
    folder.mkdir(parents=True, exist_ok=True)
    for key, value in z.items():
        if key.startswith("edge_"):
            np.savetxt(folder / f"{key.removeprefix('edge_')}.txt", value.T, fmt="%d", delimiter="\t")
        elif key.endswith("_feat_indptr"):
            name = key.removesuffix("_indptr")
            sp.save_npz(folder / f"{name}.npz", _csr(z, name))
        elif key == "labels" or key.startswith(("train_", "val_", "test_")):
            np.save(folder / f"{key}.npy", value.astype(np.int64))


def unpack_hin(source: Path, target: Path) -> None:
    """``restruct_*.npz`` and ``hgsl_dblp.npz`` -> ``target/{acm,imdb,amazon,dblp}``, the authors' layout;
    ``heco_*.npz`` -> ``target/heco_{acm,dblp,freebase}``, HeCo's."""
    for name, archive in RESTRUCT.items():
        write_restruct(source / f"{archive}.npz", target / name)
    for name in HECO:
        write_heco(source / f"heco_{name}.npz", target / f"heco_{name}")
