"""Plain files: pickles and torch files read without running anything that they ask for, npz archives, CSV."""

import collections
import csv
import functools
import pickle
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from zoo.core import ZooError, atomic_write

# ---- pickles ---------------------------------------------------------------------------------------------------------


class Matrix:
    """A sparse matrix as its places and values, whatever scipy stored it as; scipy itself is not needed.

    Args:
        kind: "csr", "csc" or "coo".
        arrays: by scipy's names: data and shape, with indptr and indices, or row and col.
    """

    kind = "csr"

    def __init__(self, kind: str, arrays: Mapping[str, Any]):
        self.kind = kind
        self.__setstate__(arrays)

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state[1] if isinstance(state, tuple) else state)

    @property
    def shape(self) -> tuple[int, int]:
        own = self.__dict__
        rows, columns = (int(v) for v in own["_shape" if "_shape" in own else "shape"])
        return rows, columns

    def places(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows, columns (int64) and values of what is stored, (s) each.

        Raises:
            ValueError: if the arrays do not fit together.
        """
        own = self.__dict__
        rows, columns = self.shape
        values = np.asarray(own["data"])
        if self.kind == "coo":
            at = own["coords"] if "coords" in own else (own["row"], own["col"])
            place = tuple(np.asarray(a).astype(np.int64) for a in at)
        else:
            indptr, indices = np.asarray(own["indptr"]), np.asarray(own["indices"]).astype(np.int64)
            lines = rows if self.kind == "csr" else columns
            if len(indptr) != lines + 1 or len(indices) != int(indptr[-1]) or (np.diff(indptr) < 0).any():
                raise ValueError("a sparse matrix whose arrays do not fit its shape")
            outer = np.repeat(np.arange(lines), np.diff(indptr))
            place = (outer, indices) if self.kind == "csr" else (indices, outer)
        if len(place[0]) != len(values) or len(place[1]) != len(values):
            raise ValueError("a sparse matrix whose arrays do not fit together")
        if len(values) and not (
            place[0].min() >= 0 and place[0].max() < rows and place[1].min() >= 0 and place[1].max() < columns
        ):
            raise ValueError(f"a sparse matrix with an entry outside of its shape {self.shape}")
        return place[0], place[1], values

    def dense(self) -> np.ndarray:
        """The whole matrix, float32; values of the same place are added up."""
        rows, columns, values = self.places()
        x = np.zeros(self.shape, dtype=np.float32)
        np.add.at(x, (rows, columns), values)
        return x


def _encode(text: str, encoding: str) -> bytes:
    """How Python 3 pickles bytes in protocol 2; other encodings do not occur."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding!r}")
    return text.encode("latin1")


@functools.cache
def _allowed() -> dict[tuple[str, str], Any]:
    table: dict[tuple[str, str], Any] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("collections", "defaultdict"): collections.defaultdict,
        ("_codecs", "encode"): _encode,
    }
    for module in ("numpy.core", "numpy._core"):
        table[f"{module}.multiarray", "_reconstruct"] = np.empty(0).__reduce__()[0]
        table[f"{module}.multiarray", "scalar"] = np.float64(0).__reduce__()[0]
        table[f"{module}.numeric", "_frombuffer"] = np.empty(0).__reduce_ex__(5)[0]
    for module in ("__builtin__", "builtins"):
        table |= {(module, kind.__name__): kind for kind in (list, dict, set, tuple, int, bytearray)}
    for kind in ("csr", "csc", "coo"):
        stored = type(f"_{kind}", (Matrix,), {"kind": kind})
        for module in (f"scipy.sparse.{kind}", f"scipy.sparse._{kind}"):
            table[module, f"{kind}_matrix"] = table[module, f"{kind}_array"] = stored
    return table


class PlainUnpickler(pickle.Unpickler):
    """Arrays, sparse matrices (as `Matrix`), lists and dictionaries; nothing else is looked up, so nothing can run."""

    more: ClassVar[dict[tuple[str, str], Any]] = {}
    """What a subclass knows beside these, by module and name."""

    def find_class(self, module: str, name: str) -> Any:
        found = self.more.get((module, name), _allowed().get((module, name)))
        if found is None:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which plain data does not need")
        return found


def unpickle(path: Path) -> Any:
    """The content of a pickle, of Python 2 or 3, that holds no more than `PlainUnpickler` knows.

    Raises:
        ZooError: naming the file, and what it asks for beyond that or why else it cannot be read.
    """
    try:
        with open(path, "rb") as stream:
            return PlainUnpickler(stream, encoding="latin1").load()
    except Exception as error:
        raise _unreadable(path, "", error) from error


def tensor_file(path: Path) -> Any:
    """What a torch file holds: tensors beside what `PlainUnpickler` knows.

    (torch's own reader with ``weights_only`` knows neither protocol 4 nor arrays.)

    Raises:
        ZooError: as `unpickle`.
    """
    import torch

    class Unpickler(PlainUnpickler):
        more: ClassVar[dict[tuple[str, str], Any]] = {
            ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2
        }

    def load(stream: Any, **options: Any) -> Any:  # files of the old format begin with several pickles
        return Unpickler(stream, **options).load()

    reader = types.ModuleType("reader")  # in place of pickle
    reader.Unpickler, reader.load = Unpickler, load  # type: ignore[attr-defined]
    try:
        return torch.load(path, map_location="cpu", pickle_module=reader, weights_only=False)
    except Exception as error:
        raise _unreadable(path, " as a file of tensors", error) from error


def _unreadable(path: Path, what: str, error: Exception) -> ZooError:
    text = (str(error).splitlines() or [type(error).__name__])[0]
    return ZooError(f"{path} cannot be read{what}: {text[:200]}")


# ---- npz archives ----------------------------------------------------------------------------------------------------


def load_npz(path: Path, keys: Iterable[str] = ()) -> dict[str, np.ndarray]:
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
                except ValueError:  # an object array: public files hold names in such, which nothing here needs
                    continue
    except Exception as error:
        raise _unreadable(path, " as an npz archive", error) from error
    missing = [key for key in keys if key not in arrays]
    if missing:
        raise ZooError(f"{path} lacks {', '.join(missing)}; it holds {', '.join(sorted(arrays)) or 'nothing'}.")
    return arrays


# ---- CSV -------------------------------------------------------------------------------------------------------------


def csv_rows(path: Path) -> list[tuple[int, list[str]]]:
    """(line number, fields) of every line after the header that is not empty.

    Raises:
        FileNotFoundError: if there is no such file.
        ZooError: if it is no text.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: expected a CSV file with a header, then a line each.")
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:
            reader = csv.reader(stream)
            rows = [(reader.line_num, [field.strip() for field in row]) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ZooError(f"{path} cannot be read as CSV in UTF-8: {error}") from error
    return [(number, row) for number, row in rows[1:] if any(row)]


def write_csv(path: str | Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[Path]:
    """Write a header and rows to ``path``, or where that is a folder to ``predictions.csv`` in it; returns the path."""
    path = Path(path)
    target = path if path.suffix.lower() == ".csv" else path / "predictions.csv"
    with atomic_write(target) as part, open(part, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(header)
        writer.writerows(rows)
    return [target]


def class_rows(predictions: Iterable[Mapping[str, Any]]) -> Iterable[tuple[str, int, str]]:
    """(name, class, probability of that class) of predictions with "name", "class" (m) and "probability" (m, c)."""
    for prediction in predictions:
        top = prediction["probability"].gather(1, prediction["class"][:, None])[:, 0].tolist()
        for name, chosen, p in zip(prediction["name"], prediction["class"].tolist(), top, strict=True):
            yield name, chosen, f"{p:.6f}"
