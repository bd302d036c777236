"""Plain files: what pickles may hold and what is refused, sparse matrices, npz archives, CSV."""

import collections
import csv
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from zoo.core import ZooError
from zoo.data.plain import Matrix, class_rows, csv_rows, load_npz, tensor_file, unpickle, write_csv


def dump(content: Any, path: Path, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol))
    return path


# ---- pickles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(2, 6))
def test_unpickle_reads_arrays_of_every_protocol(tmp_path: Path, protocol: int) -> None:
    content = {
        "a": np.arange(6).reshape(2, 3),
        "b": [(1, 2.5), np.float64(3)],
        "c": np.asfortranarray(np.eye(2)),
        "d": collections.defaultdict(list, {1: [2]}),
        "e": collections.OrderedDict(x={3}, y=b"\xff", z="é"),
    }
    found = unpickle(dump(content, tmp_path / "x.pkl", protocol))
    assert (found["a"] == content["a"]).all() and found["b"] == content["b"] and (found["c"] == np.eye(2)).all()
    assert found["d"] == {1: [2]} and found["e"] == content["e"]


def test_unpickle_reads_python_2s_text(tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(b"\x80\x02U\x04caf\xe9q\x00.")
    assert unpickle(tmp_path / "x.pkl") == "café"


class Calls:
    """A pickle that calls something when it is loaded."""

    def __init__(self, what: Any, *arguments: Any):
        self.what, self.arguments = what, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.what, self.arguments


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize(
    ("what", "name"), [(os.system, "posix.system"), (eval, "eval"), (os.mkdir, "posix.mkdir"), (getattr, "getattr")]
)
def test_nothing_else_is_looked_up(tmp_path: Path, what: Any, name: str, protocol: int) -> None:
    trace = tmp_path / "trace"
    arguments = {eval: (f"open({str(trace)!r}, 'w')",), os.system: (f"touch {trace}",), getattr: (1, "real")}
    nested = {"a": [1, Calls(what, *arguments.get(what, (trace,)))]}
    path = dump(nested, tmp_path / "bad.pkl", protocol)
    with pytest.raises(ZooError, match=rf"bad\.pkl cannot be read: it asks for .*{name}.*") as caught:
        unpickle(path)
    assert "\n" not in str(caught.value) and not trace.exists()
    torch.save(nested, tmp_path / "bad.pt", pickle_protocol=protocol)
    with pytest.raises(ZooError, match=rf"bad\.pt cannot be read as a file of tensors: it asks for .*{name}"):
        tensor_file(tmp_path / "bad.pt")
    assert not trace.exists()


def test_damaged_and_missing_pickles_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(b"\x80\x04broken")
    for name in ("x.pkl", "none.pkl"):
        with pytest.raises(ZooError, match=rf"{name} cannot be read: \S+") as caught:
            unpickle(tmp_path / name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("old", [False, True])
def test_tensor_files_hold_tensors_arrays_and_matrices(tmp_path: Path, old: bool) -> None:
    content = [torch.arange(4.0), np.arange(3), sp.csr_matrix(np.eye(2)), {"y": torch.tensor([True])}]
    torch.save(content, tmp_path / "x.pt", pickle_protocol=4, _use_new_zipfile_serialization=not old)
    a, b, c, d = tensor_file(tmp_path / "x.pt")
    assert a.tolist() == [0, 1, 2, 3] and b.tolist() == [0, 1, 2] and d["y"].tolist() == [True]
    assert c.dense().tolist() == [[1, 0], [0, 1]]


# ---- sparse matrices -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csr", "csc", "coo"])
@pytest.mark.parametrize("form", ["matrix", "array"])
def test_scipys_matrices(tmp_path: Path, kind: str, form: str) -> None:
    x = np.array([[0, 2, 0], [0, 0, 0], [1, 0, 3], [0, 0, 4]], dtype=np.float64)
    found = unpickle(dump(getattr(sp, f"{kind}_{form}")(x), tmp_path / "x.pkl"))
    assert isinstance(found, Matrix) and found.shape == (4, 3)
    rows, columns, values = found.places()
    assert sorted(zip(rows.tolist(), columns.tolist(), values.tolist(), strict=True)) == [
        (0, 1, 2.0), (2, 0, 1.0), (2, 2, 3.0), (3, 2, 4.0),
    ]  # fmt: skip
    assert found.dense().dtype == np.float32 and np.array_equal(found.dense(), x)


@pytest.mark.parametrize(
    ("kind", "arrays", "match"),
    [
        ("coo", {"data": [1.0], "coords": ([5], [0])}, "outside"),
        ("coo", {"data": [1.0], "row": [0], "col": [0, 1]}, "together"),
        ("csr", {"data": [1.0], "indptr": [0, 1], "indices": [0]}, "do not fit"),
        ("csr", {"data": [1.0, 2.0], "indptr": [0, 2, 1], "indices": [0]}, "do not fit"),
        ("csc", {"data": [1.0], "indptr": [0, 1, 1], "indices": [7]}, "outside"),
    ],
)
def test_matrices_check_their_arrays(kind: str, arrays: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Matrix(kind, {"shape": (2, 2), **arrays}).dense()


def test_values_of_one_place_are_added_up() -> None:
    arrays = {"shape": (1, 2), "data": [1.0, 2.0, 4.0], "indptr": [0, 3], "indices": [1, 0, 1]}
    assert Matrix("csr", arrays).dense().tolist() == [[2.0, 5.0]]


# ---- npz and CSV -----------------------------------------------------------------------------------------------------


def test_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.arange(3), names=np.array(["a", None], dtype=object))
    assert list(load_npz(tmp_path / "x.npz", ("a",))) == ["a"]
    with pytest.raises(ZooError, match=r"x\.npz lacks names, b; it holds a\."):
        load_npz(tmp_path / "x.npz", ("names", "b"))
    (tmp_path / "bad.npz").write_bytes(b"PK")
    with pytest.raises(ZooError, match=r"bad\.npz cannot be read as an npz archive"):
        load_npz(tmp_path / "bad.npz")


def test_csv_rows(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('﻿name,a\nann, 1\n\n,\n"b\nb",2\ncat\n', encoding="utf-8")
    assert csv_rows(path) == [(2, ["ann", "1"]), (6, ["b\nb", "2"]), (7, ["cat"])]
    path.write_bytes(b"name\n\xff\xfe\n")
    with pytest.raises(ZooError, match=r"x\.csv cannot be read as CSV in UTF-8"):
        csv_rows(path)
    with pytest.raises(FileNotFoundError, match=r"none\.csv is missing"):
        csv_rows(tmp_path / "none.csv")


def test_write_classes(tmp_path: Path) -> None:
    probability = torch.tensor([[0.25, 0.75], [0.9, 0.1]])
    prediction = {"name": ["a", "b,c"], "class": probability.argmax(1), "probability": probability}
    for place, target in ((tmp_path, tmp_path / "predictions.csv"), (tmp_path / "my.CSV", tmp_path / "my.CSV")):
        assert write_csv(place, ("name", "class", "p"), class_rows([prediction])) == [target]
        with open(target, newline="") as stream:
            assert list(csv.reader(stream)) == [
                ["name", "class", "p"],
                ["a", "1", "0.750000"],
                ["b,c", "0", "0.900000"],
            ]
