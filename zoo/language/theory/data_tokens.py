"""Token selection problems: random token sequences of which one token is the best for its label."""

import csv
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from zoo.core import ZooDataModule, ZooError, atomic_write

log = logging.getLogger(__name__)


class Problems(Dataset):
    """Problems in blocks: item i is block i, modulo the number of blocks, as a batch that is ready.

    Args:
        batch: tensors and lists with one entry per problem.
        block: problems in a block.
        passes: times that all blocks are gone through.
    """

    def __init__(self, batch: dict[str, Any], block: int, passes: int = 1):
        self.data, self.block, self.passes = batch, block, passes
        self.count = len(batch["x"])
        self.blocks = [{k: v[i : i + block] for k, v in batch.items()} for i in range(0, self.count, block)]

    def __len__(self) -> int:
        return len(self.blocks) * self.passes

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return dict(self.blocks[index % len(self.blocks)])


class TokenSelectionDataModule(ZooDataModule):
    """Token selection problems, each with sequences of tokens, a cross token per sequence, labels and a value head.

    Batch: "x": (b, n, t, d) float64 tokens; "z": (b, n, d) cross tokens; "y": (b, n) labels, -1 or +1; "v": (b, d)
    value vector, or (b, d, d) with head "relu"; "index": (b,) integer, the number of each problem; "name": list[str].
    Train, val and test hold the same problems: they are optimised, not generalised from.

    root=None: the random problems of the paper's notebooks, ``problems`` of them, bit for bit theirs with seed 0.

    root=DIR: a user's own problems, DIR/*.npz in the order of their names, each with X (n, T, d), Z (n, d), y (n,) and
    v (d,) or V (d, d); or all of them with a leading dimension of problems. All of one size. Licence: the user's own.

    Args:
        batch_size: problems in a batch; every batch is one gradient step for its problems.
        problems: how many to generate.
        sequences, tokens, dim: sizes n, T, d of a generated problem.
        head: "linear" (v is a unit vector) or "relu" (V of unit Frobenius norm, at least one label -1).
        iterations: passes over all problems in one training epoch.
    """

    embedded: ClassVar[str] = "the random problems of the paper, generated from the seed"
    collate = staticmethod(lambda items: items[0])

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
        problems: int = 8,
        sequences: int = 6,
        tokens: int = 8,
        dim: int = 10,
        head: Literal["linear", "relu"] = "linear",
        iterations: int = 100,
    ):
        super().__init__(root, batch_size, num_workers, seed)
        self.save_hyperparameters()
        if min(problems, sequences, tokens, dim, iterations) < 1:
            raise ValueError("problems, sequences, tokens, dim and iterations must be at least 1.")
        if head not in ("linear", "relu"):
            raise ValueError(f"head is {head!r}; expected 'linear' or 'relu'.")
        self.block = batch_size
        self.batch_size = 1  # one item of the dataset is a whole block
        self._problems: dict[str, Any] | None = None

    def problems(self) -> dict[str, Any]:
        """All problems as one batch."""
        if self._problems is None:
            hp = self.hparams
            if self.root is None:
                self._problems = generate(hp.problems, hp.sequences, hp.tokens, hp.dim, hp.head, hp.seed)
            else:
                files = sorted(self.root.glob("*.npz"))
                if not files:
                    raise FileNotFoundError(
                        f"{self.root} holds no *.npz: expected one file a problem with X, Z, y and v (see the docs)."
                    )
                found = [load_problems(path) for path in files]
                self._problems = join(found)
                if "y" not in self._problems:
                    raise ZooError(f"{self.root}: training needs the labels y in every file.")
            self._problems["index"] = torch.arange(len(self._problems["x"]))
        return self._problems

    def build(self) -> dict[str, Dataset]:
        batch = self.problems()
        return {
            "train": Problems(batch, self.block, self.hparams.iterations),
            "val": Problems(batch, self.block),
            "test": Problems(batch, self.block),
        }

    def describe(self) -> dict[str, Any]:
        """The sizes a module needs: ``problems``, ``dim`` and ``head``."""
        batch = self.problems()
        head = "linear" if batch["v"].ndim == 2 else "relu"
        return {"problems": len(batch["x"]), "dim": batch["x"].shape[-1], "head": head}

    def read(self, path: Path) -> Dataset:
        """An .npz with X, Z and v (or a folder of them): the problems that the module was trained on, in that order.

        An array ``index`` in the file says which problems of the module these are; without it they must be all.
        """
        files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
        found: list[dict[str, Any]] = []
        for file in files:
            try:
                part = load_problems(file)
                if found:
                    join([found[0], part])
            except ZooError as error:
                self.skip(file, error)
            else:
                found.append(part)
        if not found:
            return Empty()
        batch = join(found)
        batch.pop("y", None)
        return Problems(batch, self.block if "index" in batch else len(batch["x"]))

    def write(self, predictions: Iterable[dict[str, Any]], path: Path) -> list[Path]:
        """Write ``selection.csv`` (a row a sequence), ``selection.npz`` (all arrays) and ``convergence.png``.

        ``path`` is a folder for all three (the picture where matplotlib is installed and the module has a history), or
        one file with the suffix .csv, .npz or .png.
        """
        joined = merge([dict(p) for p in predictions])
        if path.suffix in (".csv", ".npz", ".png"):
            targets = [path]
        else:
            targets = [path / "selection.csv", path / "selection.npz"]
            if joined["curve_iteration"].shape[1] > 1:
                targets.append(path / "convergence.png")
        written = []
        for target in targets:
            try:
                {".csv": _write_csv, ".npz": _write_npz, ".png": _write_png}[target.suffix](joined, target)
            except ZooError as error:
                if len(targets) == 1 or "matplotlib" not in str(error):
                    raise
                log.info("No convergence.png: %s", error)
                continue
            written.append(target)
        return written


class Empty(Dataset):
    """No problems at all."""

    def __len__(self) -> int:
        return 0


# ---- the paper's generator --------------------------------------------------------------------------------------


def generate(count: int, n: int, t: int, d: int, head: str = "linear", seed: int = 0) -> dict[str, Any]:
    """Random problems as in the authors' notebooks: same draws in the same order, one generator a problem.

    Problem j draws from ``seed * 10_000 + j``; with head "relu" counting from 1 and passing over problems without a
    label -1, as they do. Drawn in float32, handed out in float64.

    Shapes:
        returns x (count, n, t, d) and z (count, n, d) with unit rows, y (count, n), v (count, d) or (count, d, d), name
    """
    keys: dict[str, list[Any]] = {name: [] for name in ("x", "z", "y", "v", "name")}
    number = seed * 10_000 + (head == "relu")
    while len(keys["x"]) < count:
        g = torch.Generator().manual_seed(number)
        v = torch.randn((d,) if head == "linear" else (d, d), generator=g)
        if head == "linear":
            y = torch.randn(n, generator=g)
            x = torch.randn((n, t, d), generator=g)
        else:
            x = torch.randn((n, t, d), generator=g)
            y = torch.randn(n, generator=g)
        z = torch.randn((n, d), generator=g)
        y = torch.where(y > 0, 1.0, -1.0)
        if head == "linear" or bool((y < 0).any()):
            x, z = x / x.norm(dim=-1, keepdim=True), z / z.norm(dim=-1, keepdim=True)
            for name, value in (("x", x), ("z", z), ("y", y), ("v", v / v.norm())):
                keys[name].append(value.double())
            keys["name"].append(f"seed{number:05d}")
        number += 1
    return {name: torch.stack(values) if name != "name" else values for name, values in keys.items()}


# ---- a user's own files -----------------------------------------------------------------------------------------


def load_problems(path: Path) -> dict[str, Any]:
    """The problems of one .npz: x, v, name and, where present, z, y, index; with a leading dimension.

    Raises:
        ZooError: saying what is wrong with the file.
    """
    try:
        with open(path, "rb") as stream:
            single = stream.read(6) == b"\x93NUMPY"
        if single:
            raise ZooError(
                f"{path.name} is a single array (.npy); expected an .npz of several: "
                f"np.savez('{path.stem}.npz', X=X, Z=Z, y=y, v=v)."
            )
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except ZooError:
        raise
    except OSError as error:
        raise ZooError(f"{path.name} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:  # numpy's word for arrays of Python objects, and for anything that it does not know
        raise ZooError(
            f"{path.name} is no .npz of plain arrays; expected numbers, written by np.savez(path, X=X, Z=Z, y=y, v=v)."
        ) from error
    except Exception as error:  # zipfile's own classes, and what a torn file raises
        raise ZooError(f"{path.name} is damaged; write it anew, or leave it out.") from error
    names = {"X": "x", "Z": "z", "V": "v"}
    found = {names.get(key, key): value for key, value in arrays.items()}
    lost = [key for key in ("x", "v") if key not in found]
    if lost:
        raise ZooError(
            f"{path.name} lacks {' and '.join(lost)}; it holds {', '.join(arrays) or 'nothing'}. Expected X, Z, y, v."
        )
    strange = [key for key in found if key not in ("x", "z", "y", "v", "index")]
    if strange:
        raise ZooError(f"{path.name} holds {', '.join(strange)}; expected X, Z, y, v and index only.")
    bad = [key for key, value in found.items() if value.dtype.kind not in "fiu" or not np.isfinite(value).all()]
    if bad:
        raise ZooError(f"{path.name}: {', '.join(bad)} must be finite numbers.")
    if found["x"].ndim == 3:
        found = {key: np.asarray(value)[None] for key, value in found.items()}
    x = found["x"]
    if x.ndim != 4 or 0 in x.shape:
        raise ZooError(
            f"{path.name}: X has shape {np.shape(arrays.get('X', x))}; expected (n, T, d) or (problems, n, T, d)."
        )
    s, n, _, d = x.shape
    shapes = {"z": [(s, n, d)], "y": [(s, n)], "v": [(s, d), (s, d, d)], "index": [(s,)]}
    for key, allowed in shapes.items():
        if key in found and found[key].shape not in allowed:
            wanted = " or ".join(str(a[1:] if s == 1 else a) for a in allowed)
            shape = found[key].shape[s == 1 :]
            raise ZooError(f"{path.name}: {key} has shape {shape}; with this X it must be {wanted}.")
    if "y" in found and not np.isin(found["y"], (-1, 1)).all():
        raise ZooError(f"{path.name}: the labels y must be -1 or +1.")
    floats = {key: np.asarray(value, dtype=np.float64) for key, value in found.items() if key != "index"}
    batch: dict[str, Any] = {key: torch.from_numpy(value) for key, value in floats.items()}
    if "index" in found:
        batch["index"] = torch.from_numpy(found["index"].astype(np.int64))
    batch["name"] = [path.stem] if s == 1 else [f"{path.stem}_{i:04d}" for i in range(s)]
    return batch


def join(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Files' problems as one batch.

    Raises:
        ZooError: if they differ in size or in the arrays that they hold.
    """
    first = parts[0]
    for part in parts[1:]:
        ours, theirs = ({k: tuple(v.shape[1:]) for k, v in p.items() if isinstance(v, Tensor)} for p in (first, part))
        if ours != theirs:
            raise ZooError(f"all problems must have one size: {theirs} came after {ours}.")
    keys = [key for key in first if key != "name"]
    return {key: torch.cat([p[key] for p in parts]) for key in keys} | {"name": [n for p in parts for n in p["name"]]}


def merge(predictions: list[dict[str, Any]]) -> dict[str, Any]:
    """What ``predict_step`` returned, batch by batch, as one dict of numpy arrays and the names.

    Raises:
        ZooError: if there is nothing.
    """
    if not predictions:
        raise ZooError("No predictions to write.")
    length = min(p["curve_iteration"].shape[1] for p in predictions)
    joined: dict[str, Any] = {"name": [name for p in predictions for name in p["name"]]}
    for key in predictions[0]:
        if key != "name":
            parts = [p[key].detach().cpu() for p in predictions]
            joined[key] = torch.cat([q[:, :length] if key.startswith("curve_") else q for q in parts]).numpy()
    return joined


def _write_csv(joined: dict[str, Any], path: Path) -> None:
    tokens = joined["probabilities"].shape[-1]
    heads = ["name", "sequence", "selected", "score", "sequence_margin", "svm_margin", "correlation", "feasible"]
    with atomic_write(path) as part, open(part, "w", newline="", encoding="utf-8") as stream:
        rows = csv.writer(stream)
        rows.writerow([*heads, *(f"probability_{i}" for i in range(tokens))])
        for p, name in enumerate(joined["name"]):
            for i in range(joined["selected"].shape[1]):
                by_sequence = [joined[key][p, i] for key in ("score", "sequence_margin")]
                values = (*by_sequence, joined["margin"][p], joined["correlation"][p])
                rows.writerow(
                    [name, i, int(joined["selected"][p, i]), *(f"{v:.9g}" for v in values), bool(joined["feasible"][p])]
                    + [f"{v:.9g}" for v in joined["probabilities"][p, i]]
                )


def _write_npz(joined: dict[str, Any], path: Path) -> None:
    arrays = {key: np.asarray(value) for key, value in joined.items()}
    with atomic_write(path) as part, open(part, "wb") as stream:
        np.savez_compressed(stream, **arrays)


def _write_png(joined: dict[str, Any], path: Path) -> None:
    from zoo.language.theory.attention_svm import draw_curves

    if joined["curve_iteration"].shape[1] < 2:
        raise ZooError("No convergence to draw: the module holds no history. Train it with history > 1.")
    keep = joined["feasible"]
    curves = {
        "Softmax probability": torch.from_numpy(joined["curve_probability"][keep]),
        "own SVM": torch.from_numpy(joined["curve_correlation"][keep]),
    }
    draw_curves(torch.from_numpy(joined["curve_iteration"][0]), curves, path)
