"""Data of many graphs: packing, generated sets, the TU layout on small files, folds, users' own graphs, refusals."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.unpack_tu import read_dgcnn, write_tu
from zoo.core import ZooError
from zoo.graph.node.data_graphs import (
    GraphClassificationDataModule,
    PackedGraphs,
    matching_rings,
    read_tu,
    recall_rings,
    stratified_fold,
)

# three graphs: a path of 3, an edge, a triangle with a tail
EDGES = np.array([[0, 1], [1, 2], [3, 4], [5, 6], [6, 7], [5, 7], [7, 8]])
EDGES = np.concatenate((EDGES, EDGES[:, ::-1]))
GRAPH = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2])
NODE_LABELS = np.array([3, 5, 3, 5, 5, 3, 3, 7, 3])


@pytest.fixture
def tu(tmp_path: Path) -> Path:
    attributes = np.arange(18.0).reshape(9, 2)
    write_tu(tmp_path, "TOY", EDGES, GRAPH, np.array([1, -1, 1]), NODE_LABELS, attributes)
    return tmp_path


def edges_of(graphs: PackedGraphs, index: int) -> set[tuple[int, int]]:
    return set(map(tuple, graphs[index]["edge_index"].T.tolist()))


# ---- packing ---------------------------------------------------------------------------------------------------------


def test_batches_equal_graphs_put_together_one_by_one() -> None:
    torch.manual_seed(0)
    parts = []
    for n in (3, 1, 5, 2):
        edges = torch.randint(n, (2, 2 * n))
        parts.append((torch.randn(n, 4), edges))
    graphs = PackedGraphs.of(parts, y=torch.tensor([2, 0, 1, 2]))
    batch = graphs.batch([2, 0, 3])
    first, expected = 0, []
    for i in (2, 0, 3):
        expected.append(parts[i][1] + first)
        first += len(parts[i][0])
    assert torch.equal(batch["x"], torch.cat([parts[i][0] for i in (2, 0, 3)]))
    assert torch.equal(batch["edge_index"], torch.cat(expected, 1))
    assert batch["batch"].tolist() == [0] * 5 + [1] * 3 + [2] * 2
    assert batch["y"].tolist() == [1, 2, 2] and batch["name"] == ["2", "0", "3"]
    assert graphs.classes == 3 and len(graphs.subset(torch.tensor([1, 3]))) == 2
    assert torch.equal(graphs.subset(torch.tensor([1, 3]))[1]["x"], parts[3][0])


def test_node_labels_follow_their_nodes() -> None:
    graphs = recall_rings(0, 4)
    batch = graphs.batch([3, 1])
    sizes = [int(graphs.nodes[i]) for i in (3, 1)]
    assert len(batch["y"]) == sum(sizes) == len(batch["name"])
    assert batch["name"][0] == "3/0" and batch["name"][sizes[0]] == "1/0" and batch["name"][-1] == f"1/{sizes[1] - 1}"
    assert torch.equal(batch["y"][: sizes[0]], graphs[3]["y"])


# ---- generated -------------------------------------------------------------------------------------------------------


def test_recall_rings_plant_what_they_say() -> None:
    graphs = recall_rings(5, 50)
    for index in range(50):
        g = graphs[index]
        x, n = g["x"], len(g["x"])
        assert 16 <= n <= 40 and g["edge_index"].shape == (2, 2 * n)
        assert torch.equal(torch.bincount(g["edge_index"][1]), torch.full((n,), 2))
        shown = x[:, 4:].sum(1) == 1
        assert x[:, :4].sum(1).eq(1).all() and int(shown.sum()) == 4
        colours = {int(row[:4].argmax()): int(row[4:].argmax()) for row in x[shown]}
        assert g["y"].tolist() == [colours[int(row[:4].argmax())] for row in x]
    assert torch.bincount(graphs.y, minlength=4).min() > 0.15 * len(graphs.y)


def test_matching_rings_plant_what_they_say() -> None:
    graphs = matching_rings(5, 60)
    assert int(graphs.y.sum()) == 30
    for index in range(60):
        g = graphs[index]
        n = len(g["x"])
        places = (g["x"][:, 0] == 0).nonzero().flatten().tolist()
        assert len(places) == 2 and (places[1] - places[0]) in (n // 2, n - n // 2)
        first, second = (int(g["x"][p, 1:].argmax()) for p in places)
        assert int(g["y"]) == int(first == second)


@pytest.mark.parametrize("target", ["graph", "node"])
def test_embedded_set_follows_from_the_seed(target: str) -> None:
    first, again, other = (GraphClassificationDataModule(seed=s, target=target) for s in (1, 1, 2))
    a, b, c = (next(iter(d.train_dataloader())) for d in (first, again, other))
    assert torch.equal(a["x"], b["x"]) and a["x"].shape != c["x"].shape
    assert [len(first.dataset(s)) for s in ("train", "val", "test")] == [200, 200, 200]
    classes = {"graph": 2, "node": 4}[target]
    features = {"graph": 5, "node": 8}[target]
    assert first.describe() == {
        "in_features": features, "num_classes": classes, "edge_features": 0, "level": target
    }  # fmt: skip


def test_order_is_drawn_anew_in_every_epoch() -> None:
    data = GraphClassificationDataModule(seed=0)
    first, second = ([name for b in data.train_dataloader() for name in b["name"]] for _ in range(2))
    assert first != second and sorted(first) == sorted(second)


# ---- TU layout -------------------------------------------------------------------------------------------------------


def test_tu_layout(tu: Path) -> None:
    graphs = read_tu(tu, "TOY")
    assert len(graphs) == 3 and graphs.y.tolist() == [1, 0, 1] and graphs.classes == 2
    assert edges_of(graphs, 0) == {(0, 1), (1, 0), (1, 2), (2, 1)}
    assert edges_of(graphs, 2) == {(0, 1), (1, 0), (1, 2), (2, 1), (0, 2), (2, 0), (2, 3), (3, 2)}
    x = graphs[2]["x"]
    assert x[:, :3].tolist() == [[1, 0, 0], [1, 0, 0], [0, 0, 1], [1, 0, 0]]  # labels 3, 5, 7
    assert x[:, 3:].tolist() == [[10, 11], [12, 13], [14, 15], [16, 17]]


@pytest.mark.parametrize(("features", "width"), [("labels", 3), ("attributes", 2), ("degree", 4)])
def test_tu_features(tu: Path, features: str, width: int) -> None:
    graphs = read_tu(tu, "TOY", features=features)
    assert graphs.x.shape == (9, width)
    if features == "degree":
        assert graphs.x.argmax(1).tolist() == [1, 2, 1, 1, 1, 2, 2, 3, 1]


def test_tu_node_labels_as_targets_are_no_features(tu: Path) -> None:
    graphs = read_tu(tu, "TOY", target="node")
    assert graphs.x.shape == (9, 2) and graphs.y.tolist() == [0, 1, 0, 1, 1, 0, 0, 2, 0]
    assert graphs.batch([2])["name"] == ["2/0", "2/1", "2/2", "2/3"]


def test_tu_edge_features_stay_with_their_edges(tu: Path) -> None:
    marks = np.arange(len(EDGES))
    shuffled = np.random.default_rng(0).permutation(len(EDGES))
    write_tu(tu, "TOY", EDGES[shuffled], GRAPH, np.array([0, 1, 0]))
    (tu / "TOY_edge_attributes.txt").write_text("".join(f"{v}\n" for v in marks[shuffled]))
    graphs = read_tu(tu, "TOY", edges=True)
    first = [0, 3, 5]
    for index in range(3):
        g = graphs[index]
        for (a, b), mark in zip(g["edge_index"].T.tolist(), g["edge_attr"][:, 0].tolist(), strict=True):
            assert EDGES[int(mark)].tolist() == [a + first[index], b + first[index]]


def many(folder: Path, count: int = 40) -> None:
    """Graphs of one edge each, classes 0 and 1 in turns."""
    pairs = np.stack((2 * np.arange(count), 2 * np.arange(count) + 1), 1)
    both = np.concatenate((pairs, pairs[:, ::-1]))
    write_tu(folder / "raw", "MANY", both, np.repeat(np.arange(count), 2), np.arange(count) % 2)


def parts(root: Path, **arguments: Any) -> list[list[int]]:
    data = GraphClassificationDataModule(root=str(root), **arguments)
    return [sorted(int(n) for b in data.loader(data.dataset(s)) for n in b["name"]) for s in ("train", "val", "test")]


def test_folds_are_disjoint_stratified_and_cover_everything(tmp_path: Path) -> None:
    many(tmp_path)
    tested = []
    for seed in range(10):
        train, val, test = parts(tmp_path, seed=seed)
        assert sorted(train + val + test) == list(range(40))
        assert sum(n % 2 for n in test) == len(test) // 2 and len(val) == 4 and sum(n % 2 for n in val) == 2
        tested += test
    assert sorted(tested) == list(range(40))
    assert parts(tmp_path, seed=3)[2] == parts(tmp_path, seed=8, fold=3)[2]
    assert parts(tmp_path, seed=3)[2] == sorted(stratified_fold(torch.arange(40) % 2, 3).tolist())
    train, val, test = parts(tmp_path, val_is_test=True)
    assert val == test and sorted(train + test) == list(range(40))


def test_fold_files_decide(tmp_path: Path) -> None:
    many(tmp_path)
    (tmp_path / "10fold_idx").mkdir()
    (tmp_path / "10fold_idx" / "test_idx-3.txt").write_text("5\n9\n33\n")
    assert parts(tmp_path, fold=2)[2] == [5, 9, 33]
    (tmp_path / "10fold_idx" / "test_idx-3.txt").write_text("5\n40\n")
    with pytest.raises(ZooError, match=r"test_idx-3\.txt numbers graphs beyond the 40"):
        parts(tmp_path, fold=2)


def test_dgcnn_text() -> None:
    read = read_dgcnn("2\n3 1\n0 1 1\n2 2 0 2\n0 1 1\n2 0\n1 1 1\n1 1 0\n")
    assert read["edges"].tolist() == [[0, 1], [1, 0], [1, 2], [2, 1], [3, 4], [4, 3]]
    assert read["graph"].tolist() == [0, 0, 0, 1, 1] and read["labels"].tolist() == [1, 0]
    assert read["node_labels"].tolist() == [0, 2, 0, 1, 1] and read["node_attributes"] is None
    read = read_dgcnn("1\n2 3\n0 1 1 0.5 2\n0 1 0 1.5 -1\n")
    assert read["node_labels"] is None and read["node_attributes"].tolist() == [[0.5, 2.0], [1.5, -1.0]]


@pytest.mark.parametrize(
    ("file", "content", "match"),
    [
        ("A", "1, 2\n2, 99\n", "does not hold pairs of the 9 nodes"),
        ("A", "1, 4\n", "joins nodes of different graphs"),
        ("A", "1, zwei\n", "does not hold lines of numbers"),
        ("A", "1, 1.5\n", "not whole"),
        ("graph_indicator", "1\n" * 4 + "3\n" * 5, "does not number the 3 graphs in order"),
        ("node_labels", "1\n2\n", "2 lines of labels, 9 expected"),
    ],
)
def test_broken_files_are_named(tu: Path, file: str, content: str, match: str) -> None:
    (tu / f"TOY_{file}.txt").write_text(content)
    with pytest.raises(ZooError, match=match):
        GraphClassificationDataModule(root=str(tu)).setup()


def test_missing_files_are_named(tu: Path, tmp_path: Path) -> None:
    (tu / "TOY_graph_labels.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"TOY_graph_labels\.txt is missing.*chrsmrrs"):
        GraphClassificationDataModule(root=str(tu)).setup()
    with pytest.raises(FileNotFoundError, match=r"holds no set of graphs 'OTHER' but TOY"):
        GraphClassificationDataModule(root=str(tu), name="OTHER").setup()
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no set of graphs.*NAME_A\.txt"):
        GraphClassificationDataModule(root=str(empty)).setup()
    with pytest.raises(FileNotFoundError, match="neither TOY_edge_labels"):
        write_tu(tu, "TOY", EDGES, GRAPH, np.array([0, 1, 0]))
        GraphClassificationDataModule(root=str(tu), edges=True).setup()


def test_edges_come_in_both_directions_once_without_loops(tmp_path: Path) -> None:
    """Nodes 0 to 2 and 3 to 5; 1-0 one way, 1-2 three times, a loop at 0; 4 and 5 one way; 3 is isolated."""
    edges = np.array([[1, 0], [1, 2], [2, 1], [1, 2], [0, 0], [5, 4]])
    write_tu(tmp_path, "TOY", edges, np.array([0, 0, 0, 1, 1, 1]), np.array([0, 1]))
    np.savetxt(tmp_path / "TOY_edge_attributes.txt", np.arange(6.0), fmt="%.1f")
    graphs = read_tu(tmp_path, "TOY", edges=True)
    first, second = graphs[0], graphs[1]
    assert first["edge_index"].t().tolist() == [[1, 0], [1, 2], [2, 1], [0, 1]]
    assert first["edge_attr"].flatten().tolist() == [0, 1, 2, 0]  # the first line's; the missing way has the other's
    assert second["edge_index"].t().tolist() == [[2, 1], [1, 2]] and second["edge_attr"].flatten().tolist() == [5, 5]
    assert second["x"].argmax(1).tolist() == [0, 1, 1] and len(second["x"]) == 3  # degrees; the isolated node stays
    for pair, match in (([0, 6], "pairs of the 6 nodes"), ([-1, 0], "pairs of the 6 nodes"), ([2, 3], "different")):
        write_tu(tmp_path, "TOY", np.array([pair]), np.array([0, 0, 0, 1, 1, 1]), np.array([0, 1]))
        with pytest.raises(ZooError, match=match):
            read_tu(tmp_path, "TOY")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"target": "edge"}, "target is 'edge'"),
        ({"features": "tags"}, "features is 'tags'"),
        ({"fold": 10}, "fold is 10"),
        ({"val_fraction": 1.0}, "val_fraction 1.0"),
        ({"target": "node", "features": "labels"}, "give them away"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        GraphClassificationDataModule(**arguments)


# ---- users' own graphs -----------------------------------------------------------------------------------------------


def test_own_graphs_from_folders(tmp_path: Path) -> None:
    for name, rows in (("water", "O,8,1\nH,1,2\nG,1,2\n"), ("salt", "Na,11,0\nCl,17,1\n"), ("vast", "X,1\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "nodes.csv").write_text(f"name,a,b\n{rows}")
        edges = {"water": "O,H\nO,G\n", "salt": "Na,Cl\n", "vast": ""}[name]
        (tmp_path / name / "edges.csv").write_text(f"from,to\n{edges}")
    data = GraphClassificationDataModule().from_files(tmp_path)
    (batch,) = data.predict_dataloader()
    assert batch["name"] == ["salt", "water"] and "y" not in batch
    assert batch["batch"].tolist() == [0, 0, 1, 1, 1]
    assert [(path.name, reason) for path, reason in data.skipped] == [
        ("vast", "1 features a node, 2 in the graphs before it")
    ]
    nodes = GraphClassificationDataModule(target="node").from_files(tmp_path / "water")
    (batch,) = nodes.predict_dataloader()
    assert batch["name"] == ["water/O", "water/H", "water/G"]


def test_write(tmp_path: Path) -> None:
    probability = torch.tensor([[0.25, 0.75], [0.9, 0.1]])
    prediction = {"name": ["a", "b"], "class": probability.argmax(1), "probability": probability}
    (path,) = GraphClassificationDataModule().write([prediction], tmp_path)
    with open(path, newline="") as stream:
        assert list(csv.reader(stream)) == [
            ["name", "class", "probability"],
            ["a", "1", "0.750000"],
            ["b", "0", "0.900000"],
        ]
