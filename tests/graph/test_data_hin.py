"""The heterogeneous DataModules: layouts written here, edges cleaned, bad files refused, own graphs, real sets."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from zoo.core import ZooError
from zoo.graph.heterogeneous.data_hin import Content, HINDataModule, HINRecommendationDataModule
from zoo.graph.heterogeneous.restruct import ReStruct


def dump(content: Any, path: Path, protocol: int = 4) -> None:
    with open(path, "wb") as stream:
        pickle.dump(content, stream, protocol)


def write_restruct(folder: Path, form: str = "csr", protocol: int = 4) -> Path:
    """Four papers, three authors, two subjects; paper 3 has no author."""
    folder.mkdir(parents=True, exist_ok=True)
    pa = np.array([[0, 0, 1, 2], [4, 5, 5, 6]])
    ps = np.array([[0, 1, 2, 3], [7, 7, 8, 8]])
    make = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "coo": sp.coo_matrix}[form]
    matrices = [make((np.ones(4, dtype=np.float32), tuple(p)), shape=(9, 9)) for p in (pa, pa[::-1], ps, ps[::-1])]
    dump(matrices, folder / "edges.pkl", protocol)
    np.save(folder / "node_types.npy", np.array([0] * 4 + [1] * 3 + [2] * 2))
    dump([[(0, 1), (1, 0)], [(2, 1)], [(3, 0)]], folder / "labels.pkl", protocol)
    x = np.zeros((9, 5), dtype=np.float64)
    x[0, 2], x[3, 4], x[6, 1] = 2.0, 0.5, -1.0
    dump(x, folder / "node_features.pkl", protocol)
    return folder


def graph(folder: Path, **given: Any) -> tuple[HINDataModule, dict[str, Any]]:
    data = HINDataModule(root=str(folder), **given)
    data.setup()
    return data, data.dataset("train")[0]  # type: ignore[index]


@pytest.mark.parametrize(("form", "protocol"), [("csr", 4), ("csc", 2), ("coo", 5)])
def test_the_authors_layout(tmp_path: Path, form: str, protocol: int) -> None:
    data, g = graph(write_restruct(tmp_path / "ACM", form, protocol))
    assert g["types"] == ["P", "A", "S"] and g["relations"] == [["P", "A"], ["P", "S"]]
    assert g["edge_index"].tolist() == [[0, 0, 1, 2, 0, 1, 2, 3], [4, 5, 5, 6, 7, 7, 8, 8]]  # both directions are one
    assert g["edge_type"].tolist() == [0] * 4 + [1] * 4
    assert g["node_type"].tolist() == [0] * 4 + [1] * 3 + [2] * 2
    assert g["node"].tolist() == [0, 1, 2, 3] and g["y"].tolist() == [1, 0, 1, 0]
    assert [g[f"{s}_mask"].tolist() for s in ("train", "val", "test")] == [
        [True, True, False, False],
        [False, False, True, False],
        [False, False, False, True],
    ]
    assert g["x"].tolist() == [2.0, 0.5, -1.0] and g["x_index"].tolist() == [[0, 3, 6], [2, 4, 1]]
    assert g["x"].dtype == torch.float32 and g["name"] == ["0", "1", "2", "3"]
    found = data.describe()
    assert found["ends"] == ["P", "P"] and found["in_features"] == [5, 5, 5] and found["num_classes"] == 2
    assert found["words"]["P-A"] == "Is Written By" and found["task"] == "classification"
    model = ReStruct(**found, generations=0, hidden=4)
    assert model.predict(*(g[k] for k in ("x", "x_index", "node_type", "edge_index", "edge_type", "node"))).shape == (
        4,
        2,
    )


def test_types_of_an_unknown_set_are_letters(tmp_path: Path) -> None:
    _, g = graph(write_restruct(tmp_path / "mine"))
    assert g["types"] == ["A", "B", "C"]


def test_without_features_nodes_have_their_own_numbers(tmp_path: Path) -> None:
    folder = write_restruct(tmp_path / "acm")
    (folder / "node_features.pkl").unlink()
    data, g = graph(folder)
    assert data.describe()["in_features"] == [4, 3, 2]
    assert g["x"].tolist() == [1.0] * 9 and g["x_index"].tolist() == [list(range(9)), [0, 1, 2, 3, 0, 1, 2, 0, 1]]


def test_sparse_features_are_the_same(tmp_path: Path) -> None:
    folder = write_restruct(tmp_path / "acm")
    _, dense = graph(folder)
    x = np.zeros((9, 5), dtype=np.float32)
    x[0, 2], x[3, 4], x[6, 1] = 2.0, 0.5, -1.0
    dump(sp.csr_matrix(x), folder / "node_features.pkl")
    _, sparse = graph(folder)
    assert torch.equal(dense["x"], sparse["x"]) and torch.equal(dense["x_index"], sparse["x_index"])


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/never",)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("edges.pkl", Evil(), "asks for posix.system"),
        ("edges.pkl", [np.eye(9)], "no sparse"),
        ("edges.pkl", [sp.csr_matrix((3, 3))], r"no sparse \(9, 9\)"),
        ("edges.pkl", [sp.csr_matrix(([1, 1], ([0, 4], [4, 0])), shape=(9, 9))], "several pairs of types"),
        ("edges.pkl", [sp.csr_matrix((9, 9))], "no edges"),
        ("labels.pkl", [[(0, 1)], [(2, 1)]], "2 parts"),
        ("labels.pkl", [[(0, 1), (77, 0)], [(2, 1)], [(3, 0)]], "do not exist"),
        ("labels.pkl", [[(0, 1), (4, 0)], [(2, 1)], [(3, 0)]], "several types"),
        ("labels.pkl", [[(0, 1), (1, 0)], [(0, 1)], [(3, 0)]], "twice"),
        ("node_features.pkl", np.zeros((8, 5)), "8 rows for 9"),
        ("node_features.pkl", np.zeros(9), "shape"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, name: str, content: Any, match: str) -> None:
    folder = write_restruct(tmp_path / "acm")
    dump(content, folder / name)
    with pytest.raises(ZooError, match=match) as caught:
        graph(folder)
    assert "\n" not in str(caught.value) and (str(folder) in str(caught.value) or match == "no edges")
    assert not Path("/tmp/never").exists()


def test_missing_files_are_named(tmp_path: Path) -> None:
    for name in ("node_types.npy", "labels.pkl"):
        folder = write_restruct(tmp_path / name.split(".")[0])
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=name):
            graph(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no heterogeneous graph"):
        graph(tmp_path / "empty")
    folder = write_restruct(tmp_path / "mixed")
    np.save(folder / "node_types.npy", np.array([0, 1] * 4 + [2]))
    with pytest.raises(ZooError, match="does not ascend"):
        graph(folder)
    (folder / "edges.pkl").write_bytes(b"\x80\x04broken")
    with pytest.raises(ZooError, match="cannot be read"):
        graph(folder)


def test_edges_are_cleaned() -> None:
    content = Content(
        {"U": 3, "I": 2},
        {
            ("U", "I"): np.array([[0, 0, 2], [1, 1, 0]]),  # twice the same
            ("I", "U"): np.array([[1, 0], [0, 1]]),  # once more, turned round, and a new one
            ("U", "U"): np.array([[0, 1, 2, 0], [1, 0, 2, 2]]),  # both directions, and a self-loop
        },
    )
    g = content.batch()
    assert g["relations"] == [["U", "I"], ["U", "U"]]
    assert g["edge_index"].t().tolist() == [[0, 4], [1, 3], [2, 3], [0, 1], [0, 2]]
    assert g["edge_type"].tolist() == [0, 0, 0, 1, 1]
    with pytest.raises(ZooError, match="names node 7 of I, which has 2"):
        Content({"U": 3, "I": 2}, {("U", "I"): np.array([[0], [7]])}).batch()
    with pytest.raises(ZooError, match="names node -1"):
        Content({"U": 3, "I": 2}, {("U", "I"): np.array([[0], [-1]])}).batch()
    with pytest.raises(ZooError, match="type 'X'"):
        Content({"U": 3}, {("U", "X"): np.array([[0], [0]])}).batch()
    with pytest.raises(ZooError, match="target is 'Z'"):
        Content({"U": 3}, {}, target="Z").rows()


def write_heco(folder: Path) -> Path:
    folder.mkdir()
    (folder / "pa.txt").write_text("0\t0\n0\t1\n1\t1\n2\t2\n")
    (folder / "ps.txt").write_text("0 0\n1 0\n2 1\n")
    np.save(folder / "labels.npy", np.array([0, 1, 0, 1]))  # paper 3 has no edges
    for split, members in (("train", [0, 1]), ("val", [2]), ("test", [3])):
        np.save(folder / f"{split}_20.npy", np.array(members))
    sp.save_npz(folder / "p_feat.npz", sp.csr_matrix(np.diag([1.0, 2.0, 3.0, 4.0])))
    return folder


def test_hecos_layout(tmp_path: Path) -> None:
    data, g = graph(write_heco(tmp_path / "acm"))
    assert g["types"] == ["P", "A", "S"] and g["relations"] == [["P", "A"], ["P", "S"]]
    assert g["edge_index"].tolist() == [[0, 0, 1, 2, 0, 1, 2], [4, 5, 5, 6, 7, 7, 8]]
    assert data.describe()["in_features"] == [4, 3, 2] and g["y"].tolist() == [0, 1, 0, 1]
    assert g["x"].tolist() == [1.0, 2.0, 3.0, 4.0, 1, 1, 1, 1, 1]
    assert g["train_mask"].tolist() == [True, True, False, False]
    with pytest.raises(FileNotFoundError, match="train_40"):
        graph(tmp_path / "acm", per_class=40)
    (tmp_path / "acm" / "pa.txt").write_text("0 x\n")
    with pytest.raises(ZooError, match=r"pa\.txt"):
        graph(tmp_path / "acm")


def test_a_hetero_data(tmp_path: Path) -> None:
    geometric = pytest.importorskip("torch_geometric.data")
    stored = geometric.HeteroData()
    stored["paper"].x = torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.0, 0.0]])
    stored["paper"].y = torch.tensor([0, 1, 1])
    for k, split in enumerate(("train", "val", "test")):
        stored["paper"][f"{split}_mask"] = torch.arange(3) == k
    stored["author"].num_nodes = 2
    stored["paper", "by", "author"].edge_index = torch.tensor([[0, 1, 2], [0, 0, 1]])
    stored["author", "wrote", "paper"].edge_index = torch.tensor([[0, 1], [0, 2]])
    for k, content in enumerate((stored, stored.to_dict())):
        folder = tmp_path / str(k)
        folder.mkdir()
        torch.save(content, folder / "data.pt")
        data, g = graph(folder)
        assert g["types"] == ["paper", "author"] and g["relations"] == [["paper", "author"]]
        assert g["edge_index"].tolist() == [[0, 1, 2], [3, 3, 4]] and data.describe()["in_features"] == [2, 2]
        assert g["x"].tolist() == [1.0, 2.0, 1.0, 1.0] and g["y"].tolist() == [0, 1, 1]
    torch.save({"paper": Evil()}, tmp_path / "0" / "data.pt")
    with pytest.raises(ZooError, match="cannot be read as a HeteroData"):
        graph(tmp_path / "0")


def write_csv(folder: Path) -> Path:
    folder.mkdir()
    rows = [f"m{i},M,{i}.5,1" for i in range(3)] + ["d0,D,,", "d1,D", "m9,M,x,1", "a0,,1"]
    (folder / "nodes.csv").write_text("name,type,f,g\n" + "\n".join(rows) + "\n")
    (folder / "edges.csv").write_text("a,b\nm0,d0\nd0,m1\nm2,d1\nm0,d0\nm0,nobody\n")
    return folder


def test_users_own_csv(tmp_path: Path) -> None:
    data = HINDataModule().from_files(write_csv(tmp_path / "mine"))
    g = data.dataset("predict")[0]  # type: ignore[index]
    assert g["name"] == ["m0", "m1", "m2"] and g["types"] == ["M", "D"] and "y" not in g
    assert g["edge_index"].tolist() == [[0, 1, 2], [3, 3, 4]]
    assert [reason.split(" lines")[0] for _, reason in data.skipped] == ["2", "1"]
    model = ReStruct(
        types=["D", "M"], relations=[["D", "M"]], ends=["M", "M"], in_features=[2, 2], generations=0, hidden=4
    )
    batch = next(iter(data.predict_dataloader()))
    out = model.predict_step(model.on_before_batch_transfer(batch, 0), 0)
    (path,) = data.write([out], tmp_path / "out")
    lines = path.read_text().splitlines()
    assert lines[0] == "node,class,probability" and [line.split(",")[0] for line in lines[1:]] == ["m0", "m1", "m2"]
    embedded = HINDataModule()
    embedded.setup()
    assert embedded.remember() == {"target": "M"}  # a checkpoint then knows what to classify in files without labels
    assert HINDataModule.recall({"target": "D"}).from_files(tmp_path / "mine").dataset("predict")[0]["name"] == [  # type: ignore[index]
        "d0",
        "d1",
    ]
    (tmp_path / "mine" / "nodes.csv").write_text("name,type\nm0,M\nm0,M\n")
    with pytest.raises(ZooError, match="comes twice"):
        HINDataModule().from_files(tmp_path / "mine")


def write_pairs(folder: Path) -> Path:
    folder.mkdir()
    matrices = {
        "1": sp.coo_matrix((np.ones(3), ([0, 1, 2], [3, 4, 3])), shape=(7, 7)),
        "2": sp.coo_matrix((np.ones(2), ([3, 4], [5, 6])), shape=(7, 7)),
    }
    dump(matrices, folder / "adjs_offset.pkl")
    np.save(folder / "node_types.npy", np.array([0, 0, 0, 1, 1, 2, 2]))
    good = {"train": np.array([[0, 4]]), "val": np.array([[1, 3]]), "test": np.array([[2, 4]])}
    bad = {"train": np.array([[1, 3]]), "val": np.array([[2, 4]]), "test": np.array([[0, 4]])}
    np.savez(folder / "pos_pairs_offset_larger_than_2_2.npz", **good)
    np.savez(folder / "neg_pairs_offset_for_pos_larger_than_2_2.npz", **bad)
    return folder


def test_the_authors_recommendation_layout(tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "amazon_small")
    data = HINRecommendationDataModule(root=str(folder))
    data.setup()
    g = data.dataset("test")[0]  # type: ignore[index]
    assert g["node"].tolist() == [[0, 4], [1, 3], [2, 4], [1, 3], [2, 4], [0, 4]]
    assert g["y"].tolist() == [1, 1, 1, 0, 0, 0] and g["train_mask"].tolist() == [True, False, False] * 2
    found = data.describe()
    assert found["types"] == ["U", "I", "B"] and found["ends"] == ["U", "I"] and found["task"] == "recommendation"
    assert found["in_features"] == [3, 2, 2] and "num_classes" not in found
    model = ReStruct(**found, generations=0, hidden=4)
    out = model.predict_step(g, 0)
    (path,) = data.write([out], tmp_path / "scores.csv")
    assert path.read_text().splitlines()[0] == "pair,score" and len(path.read_text().splitlines()) == 7
    np.savez(folder / "pos_pairs_offset_larger_than_2_2.npz", train=np.array([[0, 1]]), val=g["node"], test=g["node"])
    with pytest.raises(ZooError, match="same two types"):
        HINRecommendationDataModule(root=str(folder)).setup()
    (folder / "neg_pairs_offset_for_pos_larger_than_2_2.npz").unlink()
    with pytest.raises(FileNotFoundError, match="neg_pairs"):
        HINRecommendationDataModule(root=str(folder)).setup()


def test_users_own_pairs(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "nodes.csv").write_text("name,type\nann,U\nbob,U\ncup,I\npen,I\n")
    (folder / "edges.csv").write_text("a,b\nann,cup\nbob,pen\nbob,cup\n")
    with pytest.raises(ZooError, match=r"pairs\.csv"):
        HINRecommendationDataModule().from_files(folder)
    (folder / "pairs.csv").write_text("user,item\nann,pen\nann,nobody\n")
    g = HINRecommendationDataModule().from_files(folder).dataset("predict")[0]  # type: ignore[index]
    assert g["node"].tolist() == [[0, 3]] and g["name"] == ["ann pen"]
    folder = write_pairs(tmp_path / "layout")
    (folder / "pairs.csv").write_text("user,item\n0,4\n99,4\n")
    data = HINRecommendationDataModule().from_files(folder)
    assert data.dataset("predict")[0]["node"].tolist() == [[0, 4]] and len(data.skipped) == 1  # type: ignore[index]


def test_embedded_graphs_hold_what_they_say() -> None:
    data = HINDataModule(seed=3)
    data.setup()
    g = data.dataset("train")[0]  # type: ignore[index]
    m, d = (g["edge_index"][:, g["edge_type"] == 0]).tolist()
    assert len(m) == 300 and sorted(m) == list(range(300))
    votes: dict[int, list[int]] = {}
    for movie, director in zip(m, d, strict=True):
        votes.setdefault(director, []).append(int(g["y"][movie]))
    agree = sum(max(v.count(c) for c in set(v)) for v in votes.values()) / 300
    assert 0.8 < agree < 0.95
    parts = [g[f"{s}_mask"] for s in ("train", "val", "test")]
    assert bool((torch.stack(parts).sum(0) == 1).all())
    for cls in (HINDataModule, HINRecommendationDataModule):
        with pytest.raises(ValueError, match="whole graph"):
            cls(batch_size=2)
    shop = HINRecommendationDataModule(seed=3)
    shop.setup()
    g = shop.dataset("train")[0]  # type: ignore[index]
    bought = {tuple(e) for e in g["edge_index"][:, g["edge_type"] == 0].t().tolist()}
    assert not bought & {tuple(p) for p in g["node"].tolist()}  # what is asked for is not in the graph
    assert int(g["y"].sum()) * 2 == len(g["y"])


DATA = os.environ.get("ZOO_DATA", "")
REAL = {
    "acm": (HINDataModule, [3025, 5912, 57], [600, 300, 2125]),
    "dblp": (HINDataModule, [2957, 4328, 20], [600, 300, 2057]),
    "heco_acm": (HINDataModule, [4019, 7167, 60], [60, 1000, 1000]),
    "heco_dblp": (HINDataModule, [4057, 14328, 20, 7723], [80, 1000, 1000]),
    "amazon": (HINRecommendationDataModule, [6170, 2753, 334, 22, 3857], [103428, 34476, 34478]),
}


@pytest.mark.parametrize("name", REAL)
def test_real_sets(name: str) -> None:
    folder = Path(DATA) / name
    if not DATA or not folder.is_dir():
        pytest.skip(f"$ZOO_DATA/{name} is not there")
    cls, sizes, splits = REAL[name]
    data = cls(root=str(folder))
    data.setup()
    g = data.dataset("train")[0]
    assert torch.bincount(g["node_type"]).tolist() == sizes
    assert [int(g[f"{s}_mask"].sum()) for s in ("train", "val", "test")] == splits
