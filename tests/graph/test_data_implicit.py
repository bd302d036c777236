"""ImplicitCFDataModule: the three layouts, splits, negatives, odd data, users' own files."""

import csv
import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from zoo.core import ZooError
from zoo.graph.recommendation.data_implicit import ImplicitCFDataModule, communities, interests
from zoo.graph.recommendation.nescl import NESCL


def lightgcn(folder: Path, train: str, test: str, **files: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in {"train": train, "test": test, **files}.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


TRAIN = "0 1 2 3\n1 0 2\n2 4\n"
TEST = "0 4\n1\n2 0 5\n"


def pairs(data: ImplicitCFDataModule) -> set[tuple[int, int]]:
    return {tuple(p) for p in data.interactions().T.tolist()}


def held_out(data: ImplicitCFDataModule, split: str) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    loader = data.test_dataloader() if split == "test" else data.val_dataloader()
    for batch in loader:
        for name, row in zip(batch["name"], batch["target"].tolist(), strict=True):
            found[name] = {i for i in row if i >= 0}
    return found


# ---- LightGCN's layout -----------------------------------------------------------------------------------------------


def test_lightgcn_layout(tmp_path):
    data = ImplicitCFDataModule(str(lightgcn(tmp_path / "d", TRAIN, TEST)), val_fraction=0.0)
    assert data.describe() == {"num_users": 3, "num_items": 6, "num_interactions": 6}
    assert pairs(data) == {(0, 1), (0, 2), (0, 3), (1, 0), (1, 2), (2, 4)}
    assert held_out(data, "test") == {"0": {4}, "2": {0, 5}}  # user 1 has no test item: not evaluated
    assert data.val_dataloader() == []


def test_lightgcn_validation_file_names_and_overlap(tmp_path, caplog):
    extra = {"val": "0 5\n", "user_list": "org_id remap_id\nann 0\nbob 1\ncy d 2\n"}
    root = lightgcn(tmp_path / "d", TRAIN, "0 4 1\n2 0\n", **extra)
    with caplog.at_level(logging.WARNING):
        data = ImplicitCFDataModule(str(root))
        assert held_out(data, "test") == {"ann": {4}, "cy d": {0}}  # item 1 of user 0 is in training
    assert "1 of 3 test pairs are also in training" in caplog.text
    assert held_out(data, "val") == {"ann": {5}}
    batch = next(iter(data.test_dataloader()))
    assert batch["seen"].tolist() == [[5], [-1]]  # validation items leave the test ranking


def test_lightgcn_validation_share(tmp_path):
    train = "".join(f"{u} " + " ".join(str(i) for i in range(10)) + "\n" for u in range(4))
    root = lightgcn(tmp_path / "d", train, "0 10\n")
    data = ImplicitCFDataModule(str(root), val_fraction=0.2)
    assert data.describe()["num_interactions"] == 32
    val = held_out(data, "val")
    assert all(len(v) == 2 for v in val.values()) and len(val) == 4
    assert not {(int(u), i) for u, items in val.items() for i in items} & pairs(data)
    again = ImplicitCFDataModule(str(root), val_fraction=0.2)
    other = ImplicitCFDataModule(str(root), val_fraction=0.2, seed=1)
    assert held_out(again, "val") == val != held_out(other, "val")


def test_lightgcn_repeats_count_once(tmp_path, caplog):
    root = lightgcn(tmp_path / "d", "0 1 1 2\n1 2 0\n", TEST)
    with caplog.at_level(logging.WARNING), pytest.raises(ZooError, match="1 users have no training item"):
        ImplicitCFDataModule(str(root), val_fraction=0.0).setup()
    assert "1 of 5 training pairs are repeated; counted once" in caplog.text


def test_lightgcn_user_limit(tmp_path):
    data = ImplicitCFDataModule(str(lightgcn(tmp_path / "d", TRAIN, TEST)), val_fraction=0.0, user_limit=2)
    assert data.describe() == {"num_users": 2, "num_items": 4, "num_interactions": 5}
    assert data.item_names == ["0", "1", "2", "3"]
    assert "test" not in data._sets  # the one test item is not among those of the two users' training


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ("0 1 x\n", TEST, "train.txt, line 1: expected whole numbers"),
        ("0 1 2\n1 -3\n", TEST, "train.txt, line 2: expected whole numbers"),
        ("0 1 2\n0 3\n", TEST, "train.txt, line 2: user 0 was already in line 1"),
        ("0 1\n2 3\n", TEST, r"1 users have no training item \(first: \[1\]\)"),
        ("0 1 2\n1\n", "0 3\n", r"1 users have no training item \(first: \[1\]\)"),
        ("0 0 1\n1 0\n", "0 0\n", r"1 users have every one of the 2 items \(first: \[0\]\)"),
        ("\n", "", "holds no interaction"),
    ],
)
def test_lightgcn_odd_data_is_named(tmp_path, train, test, message):
    data = ImplicitCFDataModule(str(lightgcn(tmp_path / "d", train, test)), val_fraction=0.0)
    with pytest.raises(ZooError, match=message):
        data.setup()


def test_missing_files_say_what_is_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match="expects one of four layouts"):
        ImplicitCFDataModule(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"expected train.txt and test.txt \(LightGCN\).*found none of them"):
        ImplicitCFDataModule(str(tmp_path)).setup()
    (tmp_path / "train.txt").write_text(TRAIN)
    with pytest.raises(FileNotFoundError, match=r"test.txt is missing: expected held-out items"):
        ImplicitCFDataModule(str(tmp_path)).setup()


# ---- tables ----------------------------------------------------------------------------------------------------------


def table(path: Path, header: str, rows: list[str]) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return str(path.parent)


def test_own_csv_with_times(tmp_path):
    rows = [f"{u},i{(u_n + j) % 12},{100 - j}" for u_n, u in enumerate(("zoe", "al")) for j in range(10)]
    root = table(tmp_path / "d" / "mine.csv", "user,item,time", rows)
    data = ImplicitCFDataModule(root, split="time", test_fraction=0.2, val_fraction=0.1)
    data.setup()
    assert data.user_names == ["zoe", "al"]
    names = {u: {data.item_names[i] for i in items} for u, items in held_out(data, "test").items()}
    assert names == {"zoe": {"i0", "i1"}, "al": {"i1", "i2"}}  # the latest two
    names = {u: {data.item_names[i] for i in items} for u, items in held_out(data, "val").items()}
    assert names == {"zoe": {"i2"}, "al": {"i3"}}
    assert data.describe()["num_interactions"] == 14
    data = ImplicitCFDataModule(root, split="leave_one_out")
    assert {u: {data.item_names[i] for i in v} for u, v in held_out(data, "test").items()} == {
        "zoe": {"i0"},
        "al": {"i1"},
    }


def test_own_csv_repeats_keep_the_latest(tmp_path, caplog):
    root = table(tmp_path / "d" / "m.csv", "user_id,item_id,timestamp", ["a,x,1", "a,y,2", "a,x,3", "b,z,1", "a,z,0"])
    with caplog.at_level(logging.WARNING):
        data = ImplicitCFDataModule(root, split="leave_one_out", val_fraction=0.0)
        assert held_out(data, "test") == {"a": {data.item_names.index("x")}}
    assert "1 of 5 given pairs are repeated" in caplog.text
    assert (1, 2) in pairs(data)  # b has one interaction: it trains


def test_random_split_shares(tmp_path):
    rows = [f"{u},{i}" for u in range(5) for i in range(u, u + 20)]
    data = ImplicitCFDataModule(table(tmp_path / "d" / "m.csv", "user,item", rows))
    assert data.describe()["num_interactions"] == 5 * 14
    assert all(len(v) == 4 for v in held_out(data, "test").values())
    assert all(len(v) == 2 for v in held_out(data, "val").values())


def test_recbole_layout_needs_a_threshold_for_ratings(tmp_path):
    rows = ["1\t10\t5\t100", "1\t11\t2\t101", "1\t12\t4\t102", "2\t10\t4\t50", "2\t12\t3\t60", "2\t13\t4\t70"]
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
    root = table(tmp_path / "d" / "ml.inter", header, rows)
    with pytest.raises(ZooError, match="has ratings; implicit feedback is yes or no"):
        ImplicitCFDataModule(root).setup()
    data = ImplicitCFDataModule(root, min_rating=4, split="leave_one_out", val_fraction=0.0)
    data.setup()
    assert data.item_names == ["10", "12", "13"] and data.user_names == ["1", "2"]
    assert held_out(data, "test") == {"1": {1}, "2": {2}}
    assert ImplicitCFDataModule(root, min_rating=0, split="leave_one_out").describe()["num_items"] == 4


@pytest.mark.parametrize(
    ("header", "rows", "arguments", "message"),
    [
        ("person,item", ["a,b"], {}, "no column 'user'"),
        ("user,item,time", ["a,b,1", "a,c,then"], {}, "line 3: cannot read 'a,c,then'"),
        ("user,item", ["a,b", "a"], {}, "line 3: cannot read"),
        ("user,item", ["a,b", ",c"], {}, "line 3: cannot read"),
        ("user,item,rating", ["a,b,2"], {"min_rating": 3}, "no interaction rated 3 or higher"),
        ("user,item", ["a,b", "b,c"], {"split": "time"}, "needs a time column"),
        ("user,item", [], {}, "holds no interaction"),
    ],
)
def test_bad_tables_are_named(tmp_path, header, rows, arguments, message):
    data = ImplicitCFDataModule(table(tmp_path / "d" / "m.csv", header, rows), **arguments)
    with pytest.raises(ZooError, match=message):
        data.setup()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "chrono"}, "expected random, time, leave_one_out"),
        ({"test_fraction": 0.6, "val_fraction": 0.5}, "together less than 1"),
        ({"user_limit": 0}, "user_limit is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ImplicitCFDataModule(**arguments)


# ---- the generated set and negatives ---------------------------------------------------------------------------------


def test_embedded_set_has_communities():
    drawn = communities(0)
    assert drawn.shape == (2, 9000)
    assert len(torch.unique(drawn[0] * 400 + drawn[1])) == 9000
    inside = float((drawn[0] % 8 == drawn[1] % 8).float().mean())
    assert 0.8 < inside < 0.9
    assert torch.equal(drawn, communities(0)) and not torch.equal(drawn, communities(1))
    data = ImplicitCFDataModule()
    assert data.describe() == {"num_users": 600, "num_items": 400, "num_interactions": 6600}
    for split, size in (("val", 1), ("test", 3)):
        assert {len(v) for v in held_out(data, split).values()} == {size}


def test_training_batches_and_negatives():
    data = ImplicitCFDataModule(batch_size=1000)
    known = pairs(data)
    batches = list(data.train_dataloader())
    assert [len(b["user"]) for b in batches] == [1000] * 6 + [600]
    drawn = {(int(u), int(i)) for b in batches for u, i in zip(b["user"], b["item"], strict=True)}
    assert drawn == known  # every pair once an epoch
    assert not {(int(u), int(i)) for b in batches for u, i in zip(b["user"], b["negative"], strict=True)} & known
    assert all(b["graph"] is batches[0]["graph"] or torch.equal(b["graph"], batches[0]["graph"]) for b in batches)


def test_negatives_are_uniform_over_what_the_user_has_not(tmp_path):
    root = lightgcn(tmp_path / "d", "0 0 1 2 3 4 5 6\n1 9\n", "0 9\n")
    data = ImplicitCFDataModule(str(root), val_fraction=0.0)
    data.setup()
    draws = data.dataset("train").negatives(torch.zeros(30000, dtype=torch.int64), torch.Generator().manual_seed(0))
    share = torch.bincount(draws, minlength=10) / 30000
    assert share[:7].sum() == 0
    assert torch.allclose(share[7:], torch.full((3,), 1 / 3), atol=0.02)


def test_workers_draw_the_same_batches():
    one = next(iter(ImplicitCFDataModule(batch_size=50).train_dataloader()))
    two = next(iter(ImplicitCFDataModule(batch_size=50, num_workers=1).train_dataloader()))
    assert all(torch.equal(one[key], two[key]) for key in ("user", "item", "negative"))


# ---- a user's own files ----------------------------------------------------------------------------------------------


def test_predicting_for_own_users_end_to_end(tmp_path, caplog):
    rows = [f"{u},{i}" for k, u in enumerate(("ann", "bob", "cyd")) for i in [f"film {(k + j) % 9}" for j in range(5)]]
    data = ImplicitCFDataModule(table(tmp_path / "d" / "m.csv", "user,item", rows), val_fraction=0.0)
    model = NESCL(**data.describe(), dim=4, layers=1, top_k=20).set_graph(data.interactions())
    asked = tmp_path / "who.csv"
    asked.write_text("user,city\nbob,Ulm\nnobody,Rom\nbob,Ulm\nann,Bonn\n", encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        data.from_files(asked)
    assert "1 users are not in the training data: nobody" in caplog.text
    predictions = [model.predict_step(b, i) for i, b in enumerate(data.predict_dataloader())]
    assert [n for p in predictions for n in p["name"]] == ["bob", "ann"]
    (path,) = data.write(predictions, tmp_path / "out")
    with open(path, newline="", encoding="utf-8") as stream:
        found = list(csv.DictReader(stream))
    assert list(found[0]) == ["user", "rank", "item", "score"]
    trained = {(data.user_names[u], data.item_names[i]) for u, i in data.interactions().T.tolist()}
    assert not {(row["user"], row["item"]) for row in found} & trained
    for user in ("ann", "bob"):
        mine = [row for row in found if row["user"] == user]
        assert [int(row["rank"]) for row in mine] == list(range(1, len(data.item_names) - 4 + 1))
        scores = [float(row["score"]) for row in mine]
        assert scores == sorted(scores, reverse=True)


def test_plain_list_of_users_and_nothing_readable(tmp_path):
    data = ImplicitCFDataModule()
    (tmp_path / "who.txt").write_text("user3\nuser5\n", encoding="utf-8")
    data.from_files(tmp_path / "who.txt")
    batch = next(iter(data.predict_dataloader()))
    assert batch["name"] == ["user3", "user5"] and batch["user"].tolist() == [3, 5]
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    with pytest.raises(ZooError, match=r"Nothing readable in .*no column 'user'"):
        data.from_files(tmp_path / "bad.csv")
    (tmp_path / "who.txt").write_text("stranger\n", encoding="utf-8")
    with pytest.raises(ZooError, match="1 users are not in the training data: stranger"):
        data.from_files(tmp_path / "who.txt")


# ---- archives and real data ------------------------------------------------------------------------------------------


def test_unpack_round_trip(tmp_path):
    from tests.unpack_recsys import unpack_recsys

    source = tmp_path / "source"
    source.mkdir()
    arrays = {
        "train_indptr": [0, 2, 3], "train_indices": [1, 2, 0], "val_indptr": [0, 1, 1], "val_indices": [3],
        "test_indptr": [0, 1, 2], "test_indices": [0, 3],
    }  # fmt: skip
    np.savez(source / "libcml_ml-100k.npz", **{k: np.array(v) for k, v in arrays.items()}, n_users=2, n_items=4)
    np.savez(source / "ml100k_ratings.npz", rows=np.array([[1, 2, 5, 9], [1, 3, 4, 8], [2, 3, 3, 7], [2, 4, 4, 6]]))
    unpack_recsys(source, tmp_path)
    data = ImplicitCFDataModule(str(tmp_path / "libcml_ml-100k"))
    assert pairs(data) == {(0, 1), (0, 2), (1, 0)}
    assert held_out(data, "val") == {"0": {3}} and held_out(data, "test") == {"0": {0}, "1": {3}}
    rated = ImplicitCFDataModule(str(tmp_path / "ml-100k"), min_rating=4)
    assert rated.describe() == {"num_users": 2, "num_items": 3, "num_interactions": 3}


@pytest.mark.skipif(
    not (Path(os.environ.get("ZOO_DATA", "none")) / "gowalla").is_dir(), reason="needs $ZOO_DATA/gowalla"
)
def test_gowalla_is_the_published_split():
    data = ImplicitCFDataModule(str(Path(os.environ["ZOO_DATA"]) / "gowalla"), val_fraction=0.0)
    assert data.describe() == {"num_users": 29858, "num_items": 40981, "num_interactions": 810128}
    assert sum(len(v) for v in held_out(data, "test").values()) == 217242


# ---- LibCML's layout -------------------------------------------------------------------------------------------------


def test_libcml_layout_splits_as_its_authors(tmp_path, caplog):
    rows = [list(range(u, u + 5 + u)) for u in range(6)]
    lines = "".join(f"{len(r)} {' '.join(map(str, reversed(r)))}\n" for r in [*rows, [0, 1]])
    (tmp_path / "users.dat").write_text(lines)
    with caplog.at_level(logging.WARNING):
        data = ImplicitCFDataModule(str(tmp_path), seed=5)
        assert data.describe()["num_users"] == 6 and data.describe()["num_items"] == 15
    assert "1 of 7 users have fewer than 5 items; left out" in caplog.text
    np.random.seed(1234)  # theirs, step by step
    for user, row in enumerate(rows):
        np.random.shuffle(row)
        a, b = int(len(row) * 3 / 5), int(len(row) * 1 / 5)
        assert {i for u, i in pairs(data) if u == user} == set(row[:a])
        assert held_out(data, "val")[str(user)] == set(row[a : a + b])
        assert held_out(data, "test")[str(user)] == set(row[a + b :])


@pytest.mark.parametrize("line", ["3 1 2\n", "x 1\n", "2 1 -4\n"])
def test_libcml_odd_lines_are_named(tmp_path, line):
    (tmp_path / "users.dat").write_text("5 0 1 2 3 4\n" + line)
    with pytest.raises(ZooError, match=r"users.dat, line 2: expected 'count item item ...'"):
        ImplicitCFDataModule(str(tmp_path)).setup()
    (tmp_path / "users.dat").write_text("2 0 1\n")
    with pytest.raises(ZooError, match="holds no user with 5 items"):
        ImplicitCFDataModule(str(tmp_path)).setup()


def test_validation_items_can_be_ranked(tmp_path):
    root = lightgcn(tmp_path / "d", TRAIN, TEST, val="0 5\n")
    hidden, ranked = ImplicitCFDataModule(str(root)), ImplicitCFDataModule(str(root), hide_validation=False)
    assert next(iter(hidden.test_dataloader()))["seen"].tolist() == [[5], [-1]]
    assert next(iter(ranked.test_dataloader()))["seen"].shape == (2, 0)


# ---- planted interests -----------------------------------------------------------------------------------------------


def test_planted_interests_are_distinct_and_unequal():
    found, minor = interests(seed=3, users=40)
    assert found.shape == (2, 40 * 22) and minor.shape == (40 * 22,)
    assert len({tuple(p) for p in found.T.tolist()}) == 40 * 22
    for user in range(40):
        mine = found[0] == user
        clusters = found[1, mine] % 18
        counts = torch.bincount(clusters, minlength=18).sort(descending=True).values
        assert counts[counts > 0].tolist() == ([16, 6] if user % 2 == 0 else [13, 5, 4])
        largest = torch.bincount(clusters, minlength=18).argmax()
        assert torch.equal(minor[mine], clusters != largest)
    assert torch.equal(interests(seed=3, users=40)[0], found) and not torch.equal(interests(4, users=40)[0], found)


def test_minority_marks_the_lesser_interests():
    data = ImplicitCFDataModule(planted="interests", val_fraction=0.2, batch_size=600)
    assert data.describe() == {"num_users": 600, "num_items": 360, "num_interactions": 600 * 14}
    batch = next(iter(data.test_dataloader()))
    both = torch.zeros(600, 18, dtype=torch.int64)
    for row in data.interactions().T.tolist():
        both[row[0], row[1] % 18] += 1
    largest = both.argmax(1)  # by training items: for nearly all users also the planted one
    real = batch["target"] >= 0
    assert batch["minority"].shape == batch["target"].shape and not batch["minority"][~real].any()
    agree = batch["minority"] == (batch["target"] % 18 != largest[batch["user"], None])
    assert float(agree[real].float().mean()) > 0.97
    assert "minority" not in next(iter(ImplicitCFDataModule().test_dataloader()))
    with pytest.raises(ValueError, match="planted is 'taste'; expected communities or interests"):
        ImplicitCFDataModule(planted="taste")


@pytest.mark.skipif("ZOO_DATA" not in os.environ, reason="needs $ZOO_DATA/libcml_ml-100k")
@pytest.mark.parametrize(("name", "sizes"), [("ml-100k", (938, 1675, 32844)), ("steam-200k", (3757, 5113, 67653))])
def test_published_libcml_splits(name, sizes):
    root = Path(os.environ["ZOO_DATA"]) / f"libcml_{name}"
    if not root.is_dir():
        pytest.skip(f"{root} is not there")
    data = ImplicitCFDataModule(str(root), hide_validation=False)
    assert tuple(data.describe().values()) == sizes
    assert data.val_dataloader() and data.test_dataloader()


# ---- what a checkpoint remembers -------------------------------------------------------------------------------------


def clicks(folder: Path) -> Path:
    folder.mkdir()
    rows = [f"u{u},book{(u + k) % 7}" for u in range(6) for k in range(4)]
    (folder / "clicks.csv").write_text("user,item\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return folder


def test_a_checkpoint_recommends_without_its_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from zoo import Trainer
    from zoo.cli import main
    from zoo.graph import NESCL

    data = ImplicitCFDataModule(str(clicks(tmp_path / "data")), batch_size=8)
    data.setup()
    model = NESCL.from_variant("tiny", **data.describe())
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0, "accelerator": "cpu"}
    Trainer(tmp_path / "run", max_steps=2, **quiet).fit(model, datamodule=data)
    expected = model.predict([4, 2])["item"]
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "asked.csv").write_text("user\nu4\nu2\n", encoding="utf-8")
    for number, where in enumerate((tmp_path / "saved", tmp_path / "run" / "checkpoints" / "last.ckpt")):
        out = tmp_path / f"{number}.csv"
        call = ["predict", "NESCL", "--ckpt_path", where, "--input", tmp_path / "asked.csv", "--output", out]
        assert main([str(c) for c in call]) == 0, capsys.readouterr().err
        rows = [row.split(",") for row in out.read_text(encoding="utf-8").splitlines()[1:]]
        kept = expected >= 0
        assert [row[0] for row in rows] == ["u4"] * int(kept[0].sum()) + ["u2"] * int(kept[1].sum())
        assert [row[2] for row in rows] == [data.item_names[i] for i in expected[kept].tolist()]
        assert "no root given" not in capsys.readouterr().err
    remembered = json.loads((tmp_path / "saved" / "config.json").read_text())["data"]
    names = {"user_names": data.user_names, "item_names": data.item_names}
    assert remembered == {"class": "ImplicitCFDataModule", **names}


def test_ids_of_other_data_are_refused(tmp_path: Path) -> None:
    remembered = ImplicitCFDataModule(str(clicks(tmp_path / "one"))).remember()
    other = clicks(tmp_path / "other")
    (other / "clicks.csv").write_text((other / "clicks.csv").read_text().replace("book", "film"))
    (tmp_path / "asked.txt").write_text("u1\n")
    data = ImplicitCFDataModule.recall(remembered, root=str(other))
    with pytest.raises(ZooError, match="fitted to other users and items"):
        data.from_files(tmp_path / "asked.txt")
    assert len(ImplicitCFDataModule.recall(remembered).from_files(tmp_path / "asked.txt").predict_dataloader()) == 1


def test_ids_that_are_numbers_are_remembered_by_their_count(tmp_path: Path) -> None:
    lines = [f"{u} {u % 3} {(u + 1) % 3}" for u in range(5)]
    (tmp_path / "train.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "test.txt").write_text("0 2\n")
    remembered = ImplicitCFDataModule(str(tmp_path)).remember()
    assert remembered == {"user_names": 5, "item_names": 3}
    data = ImplicitCFDataModule.recall(remembered)
    (tmp_path / "asked.txt").write_text("4\n")
    data.from_files(tmp_path / "asked.txt")
    assert next(iter(data.predict_dataloader()))["name"] == ["4"]
