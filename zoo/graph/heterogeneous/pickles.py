"""Reading pickles of arrays and sparse matrices without running anything that they ask for."""

import collections
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from zoo.core import ZooError


class Matrix:
    """A sparse matrix as its places and values, whatever it was stored as.

    Shapes:
        rows, columns: (s) int64; values: (s); shape: of the matrix
    """

    kind = ""

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state[1] if isinstance(state, tuple) else state)

    def places(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows, columns and values.

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

    @property
    def shape(self) -> tuple[int, int]:
        found = self.__dict__.get("_shape", self.__dict__.get("shape"))
        rows, columns = (int(v) for v in found)
        return rows, columns


def _allowed() -> dict[tuple[str, str], Any]:
    reconstruct = np.empty(0).__reduce__()[0]
    scalar = np.float64(0).__reduce__()[0]
    table: dict[tuple[str, str], Any] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("_codecs", "encode"): _encode,
    }
    for module in ("numpy.core", "numpy._core"):
        table[f"{module}.multiarray", "_reconstruct"] = reconstruct
        table[f"{module}.multiarray", "scalar"] = scalar
        table[f"{module}.numeric", "_frombuffer"] = np.empty(0).__reduce_ex__(5)[0]
    for module in ("__builtin__", "builtins"):
        table |= {(module, kind.__name__): kind for kind in (list, dict, set, tuple, int, bytearray)}
    for kind in ("csr", "csc", "coo"):
        stored = type(f"_{kind}", (Matrix,), {"kind": kind})
        for module in (f"scipy.sparse.{kind}", f"scipy.sparse._{kind}"):
            table[module, f"{kind}_matrix"] = table[module, f"{kind}_array"] = stored
    return table


def _encode(text: str, encoding: str) -> bytes:
    """How Python 3 pickles bytes in protocol 2; other encodings do not occur."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding!r}")
    return text.encode("latin1")


class _Unpickler(pickle.Unpickler):
    """Arrays, sparse matrices, lists and dictionaries; nothing else is looked up, so nothing else can run."""

    def find_class(self, module: str, name: str) -> Any:
        found = _allowed().get((module, name))
        if found is None:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no array, matrix or list")
        return found


def unpickle(path: Path) -> Any:
    """The content of a pickle of arrays, sparse matrices (as `Matrix`), lists and dictionaries.

    Raises:
        ZooError: if it cannot be read or asks for anything else.
    """
    try:
        with open(path, "rb") as stream:
            return _Unpickler(stream, encoding="latin1").load()
    except Exception as error:
        raise ZooError(f"{path} cannot be read: {error}") from error
