"""The Open Graph Benchmark's layout on small files, for the two DataModules that read it."""

import gzip
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from zoo.core import ZooError
from zoo.graph.node.data_nodes import NodeClassificationDataModule
from zoo.graph.node.data_tokens import LargeGTTokenDataModule
from zoo.graph.node.ogb import read_ogb

X = np.arange(12.0, dtype=np.float32).reshape(6, 2)
EDGES = np.array([[0, 1], [2, 1], [1, 2], [3, 3], [0, 1], [4, 0]])  # 1-2 both ways, a loop at 3, 0-1 twice, 5 isolated
LABELS = np.array([[0.0], [2], [1], [np.nan], [2], [0]])
SPLITS = {"train": [0, 1, 3], "valid": [2], "test": [5, 4]}
FAST = {"tokens": 3, "hops": 1, "pos_enc": 0}


def write(path: Path, rows: Any, form: str = "%d") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") as stream:
        np.savetxt(stream, np.asarray(rows), fmt=form, delimiter=",")


def write_ogb(root: Path, name: str = "ogbn_arxiv", split: str = "time") -> Path:
    folder = root / name
    write(folder / "raw" / "edge.csv.gz", EDGES)
    write(folder / "raw" / "node-feat.csv.gz", X, "%.6f")
    write(folder / "raw" / "node-label.csv.gz", LABELS, "%.1f")
    write(folder / "raw" / "num-node-list.csv.gz", [6])
    write(folder / "raw" / "num-edge-list.csv.gz", [len(EDGES)])
    for part, members in SPLITS.items():
        write(folder / "split" / split / f"{part}.csv.gz", members)
    return folder


def graph_of(root: Path, **arguments: Any) -> dict[str, Any]:
    return NodeClassificationDataModule(root=str(root), **arguments).dataset("train")[0]


@pytest.fixture(autouse=True)
def no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ogb.nodeproppred", None)


@pytest.mark.parametrize("place", ["around", "itself"])
@pytest.mark.parametrize("name", [None, "ogbn-arxiv"])
def test_the_raw_layout(tmp_path: Path, place: str, name: str | None) -> None:
    folder = write_ogb(tmp_path)
    data = NodeClassificationDataModule(root=str(tmp_path if place == "around" else folder), name=name)
    graph = data.dataset("train")[0]
    assert np.array_equal(graph["x"].numpy(), X) and graph["y"].tolist() == [0, 2, 1, -1, 2, 0]
    assert graph["edge_index"].tolist() == [[0, 0, 1, 1, 2, 4], [1, 4, 0, 2, 1, 0]]  # both ways, once, no loop
    masks = [graph[f"{split}_mask"].nonzero().flatten().tolist() for split in ("train", "val", "test")]
    assert masks == [[0, 1], [2], [4, 5]]  # 3 has no label
    assert data.describe() == {"in_features": 2, "num_classes": 3} and graph["name"][5] == "5"


def test_the_processed_form(tmp_path: Path) -> None:
    folder = write_ogb(tmp_path)
    expected = graph_of(tmp_path)
    graph = {"edge_index": EDGES.T, "edge_feat": None, "node_feat": X, "node_year": np.zeros((6, 1)), "num_nodes": 6}
    (folder / "processed").mkdir()
    torch.save({"graph": graph, "labels": LABELS}, folder / "processed" / "data_processed", pickle_protocol=4)
    for file in (folder / "raw").iterdir():
        file.unlink()
    found = graph_of(tmp_path)
    assert all(torch.equal(found[key], expected[key]) for key in expected if key != "name")


def test_directions(tmp_path: Path) -> None:
    write_ogb(tmp_path)
    write_ogb(tmp_path, "ogbn_products", "sales_ranking")
    assert read_ogb("ogbn-arxiv", tmp_path)["edge_index"].tolist() == EDGES.T.tolist()
    both = np.concatenate((EDGES, EDGES[:, ::-1]))  # products lists every edge once
    assert read_ogb("ogbn-products", tmp_path)["edge_index"].tolist() == both.T.tolist()


def test_sequences_keep_the_directions(tmp_path: Path) -> None:
    write_ogb(tmp_path)
    for name in (None, "ogbn-arxiv"):
        data = LargeGTTokenDataModule(root=str(tmp_path), name=name, cache=str(tmp_path / "cache"), **FAST)
        train = data.dataset("train")
        assert [data.dataset(s).chosen.tolist() for s in ("train", "val", "test")] == [[0, 1], [2], [4, 5]]
        assert set(train.tokens[0, 1:].tolist()) == {1, 2}  # 0 -> 1 -> 2; 4 -> 0 is not the way to 4
        assert train.y.tolist() == [0, 2, 1, -1, 2, 0]
    half = LargeGTTokenDataModule(root=str(tmp_path), name="ogbn-arxiv", split="half", form="graph")
    (batch,) = half.train_dataloader()
    assert int(batch["train_mask"].sum()) == 2 and batch["edge_index"].tolist() == EDGES.T.tolist()


def test_another_split(tmp_path: Path) -> None:
    write_ogb(tmp_path)
    graph = graph_of(tmp_path, split="random", per_class=1)
    assert int(graph["train_mask"].sum()) == 3 and not graph["train_mask"][3]


def test_several_need_a_name(tmp_path: Path) -> None:
    write_ogb(tmp_path)
    np.savez(tmp_path / "web.npz", node_features=X, edges=EDGES, node_labels=np.arange(6) % 2)
    with pytest.raises(ZooError, match="holds ogbn-arxiv, web: choose one with name="):
        graph_of(tmp_path)
    assert graph_of(tmp_path, name="web")["y"].tolist() == [0, 1] * 3


@pytest.mark.parametrize(
    ("file", "rows", "match"),
    [
        ("raw/edge.csv.gz", [[0, 6]], "names node 6; nodes are 0 to 5"),
        ("raw/edge.csv.gz", [[0, -1]], "names node -1"),
        ("raw/node-label.csv.gz", [[1], [0]], r"does not hold ogbn-arxiv: 6 nodes, .*labels \(2, 1\)"),
        ("raw/node-label.csv.gz", np.ones((6, 3)), "3 labels a node"),
        ("raw/num-node-list.csv.gz", [7], r"7 nodes, features \(6, 2\)"),
        ("split/time/test.csv.gz", [9], "test split names node 9; nodes are 0 to 5"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, file: str, rows: Any, match: str) -> None:
    write(write_ogb(tmp_path) / file, rows)
    with pytest.raises(ZooError, match=match) as caught:
        graph_of(tmp_path)
    assert "\n" not in str(caught.value)


def test_files_that_are_missing_or_broken_are_named(tmp_path: Path) -> None:
    folder = write_ogb(tmp_path)
    (folder / "raw" / "node-feat.csv.gz").rename(folder / "kept")
    with pytest.raises(ZooError, match="its nodes have no features"):
        graph_of(tmp_path)
    (folder / "raw" / "node-feat.csv.gz").write_bytes(b"no gzip")
    with pytest.raises(ZooError, match=r"node-feat\.csv\.gz does not hold lines of numbers"):
        graph_of(tmp_path)
    (folder / "kept").replace(folder / "raw" / "node-feat.csv.gz")
    (folder / "split" / "time" / "valid.csv.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"needs one file split/\*/valid\.csv\.gz and has 0"):
        graph_of(tmp_path)
    (folder / "raw" / "num-node-list.csv.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"num-node-list\.csv\.gz is missing"):
        graph_of(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"ogbn_products holds neither raw/edge.* pip install ogb"):
        graph_of(tmp_path, name="ogbn-products")


def test_the_processed_form_runs_nothing(tmp_path: Path) -> None:
    folder = write_ogb(tmp_path)
    (folder / "processed").mkdir()
    trace = tmp_path / "trace"

    class Sprung:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (trace,)

    torch.save({"graph": Sprung()}, folder / "processed" / "data_processed")
    with pytest.raises(ZooError, match="data_processed cannot be read as a file of tensors: it asks for"):
        graph_of(tmp_path)
    assert not trace.exists()


@pytest.mark.parametrize("cls", [NodeClassificationDataModule, LargeGTTokenDataModule])
def test_the_package_serves_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cls: Any) -> None:
    class Stub:
        def __init__(self, name: str, root: str):
            assert (name, root) == ("ogbn-small", str(tmp_path))

        def __getitem__(self, index: int) -> Any:
            return {"node_feat": X, "edge_index": EDGES.T, "num_nodes": 6}, LABELS

        def get_idx_split(self) -> Any:
            return {part: np.array(members) for part, members in SPLITS.items()}

    module = types.ModuleType("ogb.nodeproppred")
    module.NodePropPredDataset = Stub  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ogb", types.ModuleType("ogb"))
    monkeypatch.setitem(sys.modules, "ogb.nodeproppred", module)
    data = cls(root=str(tmp_path), name="ogbn-small", **(FAST if cls is LargeGTTokenDataModule else {}))
    assert data.describe()["num_classes"] == 3 and data.describe()["in_features"] == 2
