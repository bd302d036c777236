"""Node classification data: edges, splits, public layouts on small files, users' own graphs, refusals."""

import csv
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.unpack_planetoid import write_planetoid
from zoo.core import ZooError
from zoo.graph.node.data_nodes import NodeClassificationDataModule, block_model, clean_edges, random_split, read_npz


def graph_of(**arguments: Any) -> dict[str, Any]:
    return NodeClassificationDataModule(**arguments).dataset("train")[0]


# ---- edges and splits ------------------------------------------------------------------------------------------------


def test_edges_come_in_both_directions_once_without_loops() -> None:
    edges = torch.tensor([[0, 1, 0, 2, 3], [1, 0, 1, 2, 1]])  # 0-1 three times, a loop at 2, 3-1
    assert clean_edges(edges, 5).tolist() == [[0, 1, 1, 3], [1, 0, 3, 1]]


def test_no_edges_are_fine_and_unknown_nodes_are_not() -> None:
    assert clean_edges(torch.zeros(2, 0, dtype=torch.int64), 3).shape == (2, 0)
    with pytest.raises(ZooError, match="names node 7; nodes are 0 to 4"):
        clean_edges(torch.tensor([[0], [7]]), 5)


@pytest.mark.parametrize("wrong", [6, -1])
def test_isolated_nodes_stay_and_unknown_ones_are_named_with_their_file(tmp_path: Path, wrong: int) -> None:
    heterophilous(tmp_path)
    graph = graph_of(root=str(tmp_path))
    assert len(graph["x"]) == len(graph["y"]) == 6 and not {2, 5} & set(graph["edge_index"].flatten().tolist())
    np.savez(tmp_path / "web.npz", node_features=np.ones((6, 1)), edges=np.array([[0, 1], [2, wrong]]))
    with pytest.raises(ZooError, match=rf"web\.npz: an edge names node {wrong}; nodes are 0 to 5"):
        graph_of(root=str(tmp_path))
    folder = tmp_path / "planetoid"
    y, edges = np.arange(6) % 2, np.array([[0, 1], [2, wrong]]).T
    write_planetoid(folder, "toy", np.ones((6, 1), np.float32), y, edges, 2, 4, np.array([4, 5]))
    with pytest.raises(ZooError, match=rf"ind\.toy\.graph: an edge names node {wrong}"):
        graph_of(root=str(folder))


@pytest.mark.parametrize("classes", [2, 5])
def test_random_split_counts(classes: int) -> None:
    y = torch.arange(1800) % classes
    y[::9] = -1
    masks = random_split(y, per_class=20, seed=3)
    assert torch.bincount(y[masks["train_mask"]], minlength=classes).tolist() == [20] * classes
    assert int(masks["val_mask"].sum()) == 500
    together = sum(mask.long() for mask in masks.values())
    assert torch.equal(together, (y >= 0).long())  # every labelled node in exactly one
    again, other = random_split(y, 20, 3), random_split(y, 20, 4)
    assert torch.equal(masks["train_mask"], again["train_mask"])
    assert not torch.equal(masks["train_mask"], other["train_mask"])


def test_random_split_of_a_small_class_takes_all_of_it() -> None:
    y = torch.tensor([0] * 40 + [1] * 3)
    assert torch.bincount(y[random_split(y, 20, 0)["train_mask"]]).tolist() == [20, 3]


# ---- embedded --------------------------------------------------------------------------------------------------------


def test_block_model_plants_what_it_says() -> None:
    graph = block_model(0)
    x, y, (source, target) = graph["x"], graph["y"], graph["edge_index"]
    assert x.shape == (600, 60) and torch.bincount(y).tolist() == [150] * 4
    assert (y[source] == y[target]).float().mean() == pytest.approx(0.8, abs=0.05)
    assert len(source) / 600 == pytest.approx(3.0, abs=0.15)  # mean degree
    own = torch.arange(60) // 15 == y[:, None]
    assert x[own].mean() == pytest.approx(0.25, abs=0.02) and x[~own].mean() == pytest.approx(0.03, abs=0.01)
    counts = [int(graph[f"{split}_mask"].sum()) for split in ("train", "val", "test")]
    assert counts == [20, 100, 480]


def test_embedded_set_follows_from_the_seed_and_is_one_object() -> None:
    data = NodeClassificationDataModule(seed=5)
    first, second = (next(iter(data.train_dataloader())) for _ in range(2))
    assert first is second is next(iter(data.test_dataloader()))
    assert torch.equal(first["x"], graph_of(seed=5)["x"]) and not torch.equal(first["x"], graph_of(seed=6)["x"])
    assert data.describe() == {"in_features": 60, "num_classes": 4}
    assert first["name"][:2] == ["0", "1"]


# ---- Planetoid -------------------------------------------------------------------------------------------------------

N, KNOWN, TRAIN = 12, 7, 3
EDGES = np.array([[0, 1, 1, 2, 9, 4], [1, 2, 0, 2, 11, 10]])  # 0-1 twice, a loop at 2


@pytest.fixture
def planetoid(tmp_path: Path) -> Path:
    """12 nodes, the test range 7 to 11 with a hole at 8, the rows of tx in another order."""
    generator = np.random.default_rng(0)
    x = (generator.random((N, 6)) < 0.5).astype(np.float32)
    x[8] = 0
    y = np.array([0, 1, 2, 0, 1, 2, 0, 1, -1, 2, 0, 1])
    test = np.array([10, 7, 11, 9])
    write_planetoid(tmp_path, "toy", x, y, EDGES, TRAIN, KNOWN, test)
    np.savez(tmp_path / "expected.npz", x=x, y=y)
    (tmp_path / "expected.npz").rename(tmp_path / "expected")  # no graph of the root's
    return tmp_path


def test_planetoid_layout(planetoid: Path) -> None:
    with np.load(planetoid / "expected") as expected:
        x, y = expected["x"], expected["y"]
    data = NodeClassificationDataModule(root=str(planetoid))
    graph = data.dataset("train")[0]
    assert np.array_equal(graph["x"].numpy(), x) and np.array_equal(graph["y"].numpy(), y)
    assert graph["edge_index"].tolist() == [[0, 1, 1, 2, 4, 9, 10, 11], [1, 0, 2, 1, 10, 11, 4, 9]]
    assert graph["train_mask"].nonzero().flatten().tolist() == [0, 1, 2]
    assert graph["val_mask"].nonzero().flatten().tolist() == [3, 4, 5, 6]
    assert graph["test_mask"].nonzero().flatten().tolist() == [7, 9, 10, 11]  # 8 has no label
    assert data.describe() == {"in_features": 6, "num_classes": 3}


def test_planetoid_in_raw_and_random_split(planetoid: Path) -> None:
    raw = planetoid / "raw"
    raw.mkdir()
    for file in planetoid.glob("ind.*"):
        file.rename(raw / file.name)
    graph = graph_of(root=str(planetoid), split="random", per_class=1)
    assert int(graph["train_mask"].sum()) == 3 and not graph["test_mask"][8]


def test_missing_file_is_named(planetoid: Path) -> None:
    (planetoid / "ind.toy.graph").unlink()
    with pytest.raises(FileNotFoundError, match=r"ind\.toy\.graph is missing.*github\.com/kimiyoung/planetoid"):
        graph_of(root=str(planetoid))


@pytest.mark.parametrize("part", ["tx", "graph", "test.index"])
def test_broken_file_is_named(planetoid: Path, part: str) -> None:
    (planetoid / f"ind.toy.{part}").write_bytes(b"\x80\x02nonsense")
    with pytest.raises(ZooError, match="toy"):
        graph_of(root=str(planetoid))


class Sprung:
    """A pickle that would write a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickles_run_nothing(planetoid: Path, tmp_path: Path) -> None:
    trace = tmp_path / "sprung"
    (planetoid / "ind.toy.y").write_bytes(pickle.dumps(Sprung(trace), protocol=2))
    with pytest.raises(ZooError, match=r"ind\.toy\.y cannot be read: it asks for .*which plain data does not need"):
        graph_of(root=str(planetoid))
    assert not trace.exists()


def test_files_that_do_not_fit_together_are_refused(planetoid: Path) -> None:
    (planetoid / "ind.toy.test.index").write_text("7\n9\n")
    with pytest.raises(ZooError, match=r"do not fit together.*test\.index"):
        graph_of(root=str(planetoid))


def test_geom_splits(planetoid: Path) -> None:
    splits = planetoid / "splits"
    splits.mkdir()
    masks = {key: np.zeros(N, dtype=np.uint8) for key in ("train_mask", "val_mask", "test_mask")}
    masks["train_mask"][:5] = masks["val_mask"][5:7] = masks["test_mask"][7:] = 1
    np.savez(splits / "toy_split_0.6_0.2_4.npz", **masks)
    graph = graph_of(root=str(planetoid), split="geom", fold=4)
    assert [int(graph[key].sum()) for key in masks] == [5, 2, 4]  # node 8 has no label
    with pytest.raises(FileNotFoundError, match=r"toy_split_0\.6_0\.2_5\.npz is missing.*geom-gcn"):
        graph_of(root=str(planetoid), split="geom", fold=5)
    np.savez(splits / "toy_split_0.6_0.2_6.npz", **{key: mask[:4] for key, mask in masks.items()})
    with pytest.raises(ZooError, match=r"train_mask has shape \(4,\), the graph 12 nodes"):
        graph_of(root=str(planetoid), split="geom", fold=6)


# ---- npz -------------------------------------------------------------------------------------------------------------


def heterophilous(folder: Path) -> Path:
    masks = np.zeros((2, 6), dtype=bool)
    masks[0, :2] = masks[1, 2:4] = True
    np.savez(
        folder / "web.npz",
        node_features=np.arange(18).reshape(6, 3),
        node_labels=np.array([0, 1, 0, 1, 0, 1]),
        edges=np.array([[0, 1], [1, 0], [2, 2], [3, 4]]),
        train_masks=masks,
        val_masks=~masks,
        test_masks=masks,
    )
    return folder / "web.npz"


def test_heterophilous_layout(tmp_path: Path) -> None:
    heterophilous(tmp_path)
    graph = graph_of(root=str(tmp_path), name="web", fold=1)
    assert graph["edge_index"].tolist() == [[0, 1, 3, 4], [1, 0, 4, 3]]
    assert graph["train_mask"].nonzero().flatten().tolist() == [2, 3]
    with pytest.raises(ZooError, match="fold 2 of 6 nodes"):
        graph_of(root=str(tmp_path), name="web", fold=2)


def test_gnn_benchmark_layout(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "amazon_photo.npz",
        adj_data=np.ones(2),
        adj_indices=np.array([1, 2]),
        adj_indptr=np.array([0, 1, 2, 2]),
        adj_shape=np.array([3, 3]),
        attr_data=np.array([1.0, 2.0]),
        attr_indices=np.array([0, 3]),
        attr_indptr=np.array([0, 1, 1, 2]),
        attr_shape=np.array([3, 4]),
        labels=np.array([0, 1, 1]),
        node_names=np.array(["a", None], dtype=object),  # the public files hold such arrays; they are pickles
    )
    graph = graph_of(root=str(tmp_path), per_class=1)
    assert graph["x"].tolist() == [[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 2]]
    assert graph["edge_index"].tolist() == [[0, 1, 1, 2], [1, 0, 2, 1]]
    assert int(graph["train_mask"].sum()) == 2


def test_several_graphs_need_a_name(tmp_path: Path) -> None:
    heterophilous(tmp_path)
    np.savez(tmp_path / "other.npz", z=np.zeros(1))
    with pytest.raises(ZooError, match="holds other, web: choose one with name="):
        graph_of(root=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no graph 'third'"):
        graph_of(root=str(tmp_path), name="third")
    with pytest.raises(ZooError, match=r"other\.npz holds z; expected node_features and edges"):
        graph_of(root=str(tmp_path), name="other")


def test_empty_root(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no graph"):
        graph_of(root=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        graph_of(root=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"split": "public"}, "split is 'public'"), ({"batch_size": 2}, "batch_size is 2"), ({"fold": -1}, "fold is -1")],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NodeClassificationDataModule(**arguments)


# ---- users' own graphs -----------------------------------------------------------------------------------------------


def own_graph(folder: Path, nodes: str, edges: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nodes.csv").write_text(nodes)
    (folder / "edges.csv").write_text(edges)
    return folder


def test_csv_graph(tmp_path: Path) -> None:
    folder = own_graph(tmp_path / "own", "id,a,b\nann,1,0\nbob,0,1\ncat,1,1\n", "from,to\nann,bob\nbob,ann\ncat,cat\n")
    data = NodeClassificationDataModule().from_files(folder)
    batch = next(iter(data.predict_dataloader()))
    assert batch["name"] == ["ann", "bob", "cat"] and batch["x"].tolist() == [[1, 0], [0, 1], [1, 1]]
    assert batch["edge_index"].tolist() == [[0, 1], [1, 0]]
    assert not data.skipped


def test_bad_lines_are_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    nodes = "id,a\nann,1\nbob,x\ncat,3\ndan,nan\n"
    folder = own_graph(tmp_path / "own", nodes, "from,to\nann,cat\nann,bob\nann\n")
    data = NodeClassificationDataModule().from_files(folder)
    batch = next(iter(data.predict_dataloader()))
    assert batch["name"] == ["ann", "cat"] and batch["edge_index"].tolist() == [[0, 1], [1, 0]]
    assert [(p.name, reason.split(" (")[0]) for p, reason in data.skipped] == [
        ("nodes.csv", "2 lines"),
        ("edges.csv", "2 lines"),
    ]
    assert "the first: 3" in data.skipped[0][1]


def test_folder_of_graphs_and_write(tmp_path: Path) -> None:
    own_graph(tmp_path / "in" / "one", "id,a\nx,1\n", "from,to\n")
    own_graph(tmp_path / "in" / "two", "id,a\n", "from,to\n")
    heterophilous(tmp_path / "in")
    data = NodeClassificationDataModule().from_files(tmp_path / "in")
    names = [batch["name"] for batch in data.predict_dataloader()]
    assert names == [["x"], ["0", "1", "2", "3", "4", "5"]] and [p.name for p, _ in data.skipped] == ["two"]
    prediction = {
        "name": ["x", "y"],
        "class": torch.tensor([1, 0]),
        "probability": torch.tensor([[0.25, 0.75], [0.5, 0.5]]),
    }
    (path,) = data.write([prediction, prediction], tmp_path / "out")
    with open(path, newline="") as stream:
        rows = list(csv.reader(stream))
    assert path.name == "predictions.csv" and len(rows) == 5
    assert rows[:3] == [["node", "class", "probability"], ["x", "1", "0.750000"], ["y", "0", "0.500000"]]
    assert data.write([prediction], tmp_path / "mine.csv") == [tmp_path / "mine.csv"]


def test_nothing_readable(tmp_path: Path) -> None:
    own_graph(tmp_path / "own", "id,a\nann,1\nann,2\n", "from,to\n")
    with pytest.raises(ZooError, match="'ann' comes twice"):
        NodeClassificationDataModule().from_files(tmp_path / "own")
    (tmp_path / "bad.npz").write_bytes(b"PK")
    with pytest.raises(ZooError, match=r"bad\.npz cannot be read"):
        read_npz(tmp_path / "bad.npz")


# ---- the real sets ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "nodes", "features", "edges", "train", "isolated"),
    [("cora", 2708, 1433, 10556, 140, 0), ("citeseer", 3327, 3703, 9104, 120, 48)],
)
def test_real(zoo_data: Any, name: str, nodes: int, features: int, edges: int, train: int, isolated: int) -> None:
    graph = graph_of(root=str(zoo_data(name)))
    assert graph["x"].shape == (nodes, features) and graph["edge_index"].shape == (2, edges)
    assert [int(graph[f"{s}_mask"].sum()) for s in ("train", "val", "test")] == [train, 500, 1000]
    degree = torch.bincount(graph["edge_index"][0], minlength=nodes)
    assert int((degree == 0).sum()) == isolated
