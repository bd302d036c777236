"""Recommendation sets as archived (npz) into the layouts that ImplicitCFDataModule reads."""

from pathlib import Path

import numpy as np

LIGHTGCN = {
    "gowalla": "gowalla.npz",
    "libcml_ml-100k": "libcml_ml-100k.npz",
    "libcml_steam-200k": "libcml_steam-200k.npz",
}


def unpack_recsys(source: Path, target: Path) -> None:
    """``source/*.npz`` -> ``target/<set>/{train,val,test}.txt`` and ``target/ml-100k/ml-100k.inter``.

    Args:
        source: folder with the npz files: interaction matrices in CSR, ``<split>_indptr`` and ``<split>_indices``.
        target: folder that gets one folder a set.
    """
    for name, file in LIGHTGCN.items():
        if (source / file).exists():
            with np.load(source / file) as arrays:
                content = {key: arrays[key] for key in arrays.files}
            folder = target / name
            folder.mkdir(parents=True, exist_ok=True)
            for split in ("train", "val", "test"):
                if f"{split}_indptr" in content:
                    lines = _lines(content[f"{split}_indptr"], content[f"{split}_indices"])
                    (folder / f"{split}.txt").write_text("".join(lines), encoding="utf-8")
    if (source / "ml100k_ratings.npz").exists():
        with np.load(source / "ml100k_ratings.npz") as arrays:
            rows = arrays[arrays.files[0]]
        folder = target / "ml-100k"
        folder.mkdir(parents=True, exist_ok=True)
        header = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
        body = "".join(f"{u}\t{i}\t{r}\t{t}\n" for u, i, r, t in rows.tolist())
        (folder / "ml-100k.inter").write_text(header + body, encoding="utf-8")


def _lines(indptr: np.ndarray, indices: np.ndarray) -> list[str]:
    """One line a user, "user item item ..."."""
    items = indices.tolist()
    ends = indptr.tolist()
    return [" ".join(map(str, [user, *items[ends[user] : ends[user + 1]]])) + "\n" for user in range(len(ends) - 1)]
