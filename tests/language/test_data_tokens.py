"""TokenSelectionDataModule: the generator, a user's own problems, and what is written."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from zoo.core import ZooError
from zoo.language.theory.attention_svm import AttentionSVM
from zoo.language.theory.data_tokens import TokenSelectionDataModule, generate, load_problems


def save(path: Path, seed: int = 0, **change) -> Path:
    one = {k: v[0].numpy() for k, v in generate(1, 3, 4, 6, seed=seed).items() if k != "name"}
    arrays = {"X": one["x"], "Z": one["z"], "y": one["y"], "v": one["v"], **change}
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return path


@pytest.mark.parametrize("head", ["linear", "relu"])
def test_generator_by_the_notebook_in_words(head: str) -> None:
    made = generate(5, 3, 4, 6, head)
    assert torch.allclose(made["x"].norm(dim=-1), torch.ones(5, 3, 4).double(), atol=1e-6)
    assert torch.allclose(made["z"].norm(dim=-1), torch.ones(5, 3).double(), atol=1e-6)
    assert torch.allclose(made["v"].flatten(1).norm(dim=1), torch.ones(5).double(), atol=1e-6)
    assert set(made["y"].unique().tolist()) == {-1.0, 1.0}
    if head == "relu":
        assert (made["y"] == -1).any(1).all()
        assert made["v"].shape == (5, 6, 6)
    assert not torch.equal(generate(5, 3, 4, 6, head, seed=1)["x"], made["x"])
    assert torch.equal(generate(2, 3, 4, 6, head)["x"], made["x"][:2])


def test_batches() -> None:
    data = TokenSelectionDataModule(problems=5, batch_size=2, sequences=3, tokens=4, dim=6, iterations=3)
    data.setup()
    batches = list(data.test_dataloader())
    assert [len(b["x"]) for b in batches] == [2, 2, 1]
    assert [i for b in batches for i in b["index"].tolist()] == list(range(5))
    assert batches[0]["x"].dtype == torch.float64 and batches[0]["name"] == ["seed00000", "seed00001"]
    seen = [b["index"].tolist() for b in data.train_dataloader()]
    assert len(seen) == 9 and sorted(map(tuple, seen)) == sorted([(0, 1), (2, 3), (4,)] * 3)
    assert data.describe() == {"problems": 5, "dim": 6, "head": "linear"}


def test_root_with_single_problems(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / f"p{i}.npz", seed=i)
    data = TokenSelectionDataModule(root=str(tmp_path), batch_size=8)
    data.setup()
    (batch,) = data.test_dataloader()
    assert batch["name"] == ["p0", "p1", "p2"] and batch["x"].shape == (3, 3, 4, 6)
    assert data.describe() == {"problems": 3, "dim": 6, "head": "linear"}


def test_root_with_all_in_one_file(tmp_path: Path) -> None:
    made = generate(4, 3, 4, 6, "relu")
    np.savez(tmp_path / "all.npz", X=made["x"], Z=made["z"], y=made["y"], V=made["v"])
    data = TokenSelectionDataModule(root=str(tmp_path))
    assert data.describe() == {"problems": 4, "dim": 6, "head": "relu"}
    assert torch.equal(data.problems()["x"], made["x"]) and data.problems()["name"][3] == "all_0003"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": None}, "lacks v; it holds X, Z, y"),
        ({"X": np.zeros((3, 4))}, "X has shape"),
        ({"Z": np.zeros((2, 6))}, r"z has shape \(2, 6\); with this X it must be \(3, 6\)"),
        ({"y": np.array([0.0, 1.0, 1.0])}, "labels y must be -1 or"),
        ({"X": np.full((3, 4, 6), np.nan)}, "x must be finite"),
        ({"extra": np.zeros(1)}, "holds extra"),
        ({"v": np.array(["a"] * 6)}, "v must be finite numbers"),
        ({"v": np.array([None] * 6, dtype=object)}, "no .npz of plain arrays"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, change: dict, message: str) -> None:
    save(tmp_path / "bad.npz", **change)
    with pytest.raises(ZooError, match=rf"bad\.npz.*{message}"):
        TokenSelectionDataModule(root=str(tmp_path)).setup()


def test_other_files_are_told_apart_in_one_line(tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", np.ones((3, 4, 6)))
    data = TokenSelectionDataModule()
    with pytest.raises(ZooError) as caught:
        load_problems(tmp_path / "tokens.npy")
    assert str(caught.value) == (
        "tokens.npy is a single array (.npy); expected an .npz of several: np.savez('tokens.npz', X=X, Z=Z, y=y, v=v)."
    )
    with pytest.raises(ZooError, match="tokens.npy.*is a single array"):  # as `zoo predict` reads it
        list(data.from_files(tmp_path / "tokens.npy"))
    with pytest.raises(FileNotFoundError, match=r"holds no \*\.npz"):
        TokenSelectionDataModule(root=str(tmp_path)).setup()
    save(tmp_path / "whole.npz")
    whole = (tmp_path / "whole.npz").read_bytes()
    for name, content, reason in (
        ("text.npz", b"hello", "text.npz is no .npz of plain arrays"),
        ("cut.npz", whole[: len(whole) // 2], "cut.npz is damaged; write it anew"),
        ("empty.npz", b"", "empty.npz is damaged; write it anew"),
        ("gone.npz", None, "gone.npz cannot be read: No such file"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ZooError, match=reason) as caught:
            load_problems(tmp_path / name)
        assert "pickle" not in str(caught.value) and "\n" not in str(caught.value)


def test_root_needs_files_of_one_size_and_labels(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no \*\.npz"):
        TokenSelectionDataModule(root=str(tmp_path)).setup()
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        TokenSelectionDataModule(root=str(tmp_path / "nowhere"))
    save(tmp_path / "a.npz", y=None)
    with pytest.raises(ZooError, match="needs the labels y"):
        TokenSelectionDataModule(root=str(tmp_path)).setup()
    save(tmp_path / "a.npz")
    save(tmp_path / "b.npz", X=np.ones((3, 5, 6)))
    with pytest.raises(ZooError, match="one size"):
        TokenSelectionDataModule(root=str(tmp_path)).setup()


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 cut off"])
def test_own_files_go_on_past_broken_ones(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    save(tmp_path / "b.npz")
    save(tmp_path / "c.npz", X=np.ones((3, 5, 6)))  # another size
    data = TokenSelectionDataModule().from_files(tmp_path)
    (batch,) = data.predict_dataloader()
    assert batch["name"] == ["b"] and "y" not in batch and "index" not in batch
    assert [path.name for path, _ in data.skipped] == ["a.npz", "c.npz"]
    with pytest.raises(ZooError, match=r"Nothing readable .*a\.npz"):
        TokenSelectionDataModule().from_files(tmp_path / "a.npz")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        TokenSelectionDataModule().from_files(tmp_path / "none.npz")


def test_own_files_to_tables_and_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    made = generate(4, 3, 4, 6)
    np.savez(tmp_path / "mine.npz", X=made["x"][1:3], Z=made["z"][1:3], v=made["v"][1:3], index=np.array([1, 2]))
    data = TokenSelectionDataModule(batch_size=1).from_files(tmp_path / "mine.npz")
    model = AttentionSVM(problems=4, dim=6)
    model.record()
    predictions = [model.predict_step(batch, i) for i, batch in enumerate(data.predict_dataloader())]
    assert len(predictions) == 2  # blocks of batch_size
    written = data.write(predictions, tmp_path / "out")
    assert [p.name for p in written] == ["selection.csv", "selection.npz", "convergence.png"]
    with open(written[0], newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 6 and rows[0]["name"] == "mine_0000" and rows[5]["name"] == "mine_0001"
    whole = model.predict(made["x"], made["z"], made["v"])
    for i in range(3):
        assert int(rows[i]["selected"]) == int(whole["selected"][1, i])
        assert float(rows[i]["svm_margin"]) == pytest.approx(float(whole["margin"][1]), rel=1e-6)
        assert float(rows[i]["correlation"]) == pytest.approx(float(whole["correlation"][1]), rel=1e-5, abs=1e-8)
        assert sum(float(rows[i][f"probability_{t}"]) for t in range(4)) == pytest.approx(1, abs=1e-6)
    with np.load(written[1]) as arrays:
        assert np.array_equal(arrays["selected"], whole["selected"][1:3].numpy())
        assert arrays["probabilities"].shape == (2, 3, 4) and arrays["name"].tolist() == ["mine_0000", "mine_0001"]
    assert written[2].read_bytes()[:4] == b"\x89PNG"
    assert data.write(predictions, tmp_path / "only.csv") == [tmp_path / "only.csv"]


def test_write_without_a_history_leaves_the_picture_out(tmp_path: Path) -> None:
    made = generate(2, 3, 4, 6)
    model = AttentionSVM(problems=2, dim=6, history=0)
    predictions = [model.predict_step(made, 0)]
    data = TokenSelectionDataModule()
    assert [p.name for p in data.write(predictions, tmp_path)] == ["selection.csv", "selection.npz"]
    with pytest.raises(ZooError, match="No convergence to draw"):
        data.write(predictions, tmp_path / "c.png")
    with pytest.raises(ZooError, match="No predictions"):
        data.write([], tmp_path)


@pytest.mark.parametrize(("change", "message"), [({"problems": 0}, "at least 1"), ({"head": "tanh"}, "head is 'tanh'")])
def test_constructor_refuses(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenSelectionDataModule(**change)
