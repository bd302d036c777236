"""The base data module: order, randomness, ranks, errors."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.core import ZooDataModule, ZooError, seed_from
from zoo.core.datamodule import _Order

from .dummies import LineDataModule, Noisy


def values(data: ZooDataModule) -> list[float]:
    return torch.cat([b["x"][:, 0] for b in data.train_dataloader()]).tolist()


def test_order_and_draws_follow_from_seed_and_epoch() -> None:
    a, b = LineDataModule(seed=3), LineDataModule(seed=3, num_workers=1)
    first, second = values(a), values(a)
    assert first != second, "every pass draws anew"
    assert [first, second] == [values(b), values(b)], "workers change nothing"
    assert values(LineDataModule(seed=4)) != first


def test_evaluation_is_the_same_every_time() -> None:
    data = LineDataModule()
    data.setup()
    passes = [torch.cat([b["x"] for b in data.val_dataloader()]) for _ in range(2)]
    assert torch.equal(*passes)


class FakeTrainer:
    training = False

    def __init__(self, rank: int, world: int):
        self.global_rank, self.world_size = rank, world


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 40), world=st.integers(1, 5), batch=st.integers(1, 7), shuffle=st.booleans())
def test_ranks_share_the_samples(size: int, world: int, batch: int, shuffle: bool) -> None:
    data = LineDataModule()
    parts = []
    for rank in range(world):
        data._epoch = -1
        order = _Order(Noisy(size), batch, 0, data if shuffle else None, FakeTrainer(rank, world))
        parts.append([index for index, _ in order])
        assert len(parts[-1]) == len(order)
    if shuffle:  # equally many steps on every rank, every sample seen
        assert len({len(p) for p in parts}) == 1 and {i for p in parts for i in p} == set(range(size))
    else:  # each sample once and once only
        assert sorted(i for p in parts for i in p) == list(range(size))


def test_seeds_of_neighbours_are_unrelated() -> None:
    seeds = {seed_from(0, e, i) for e in range(20) for i in range(20)}
    assert len(seeds) == 400 and all(0 <= s < 2**63 for s in seeds)


def test_wrong_roots_and_sizes_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"not a folder.*points\.csv"):
        LineDataModule(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"points\.csv is missing: expected the points. Make one."):
        LineDataModule(str(tmp_path)).setup()
    with pytest.raises(ValueError, match="batch_size is 0"):
        LineDataModule(batch_size=0)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        LineDataModule().from_files(tmp_path / "nothing")
    with pytest.raises(ZooError, match="cannot read"):
        LineDataModule().from_files(tmp_path)


# ---- what travels with a checkpoint ----------------------------------------------------------------------------------


class Remembering(ZooDataModule):
    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 8,
        size: int = 32,
        names: list[str] = [],  # noqa: B006
        place: str = "here",
        extra: str | None = None,
    ):
        super().__init__(root, batch_size)
        self.save_hyperparameters()


def test_what_reading_depends_on_is_remembered(tmp_path: Path) -> None:
    data = Remembering(str(tmp_path), 4, size=64, names=["a"], place="/mnt", extra="x")
    assert data.remember() == {"size": 64, "names": ["a"]}  # neither the default's, nor places
    again = Remembering.recall(data.remember(), names=["b"])
    assert again.hparams.size == 64 and again.hparams.names == ["b"] and again.root is None
    for hostile in ("root", "colour", "self"):
        with pytest.raises(ZooError, match=f"remembers '{hostile}' of its data, which Remembering does not know"):
            Remembering.recall({hostile: "/etc"})


def test_a_name_without_a_root_is_not_ignored() -> None:
    """Else who forgets the root trains on the embedded set, and takes it for the one that was named."""
    data = LineDataModule()
    data.save_hyperparameters({"name": "cora"})
    with pytest.raises(ZooError, match="name='cora' chooses a set under root, and no root is given"):
        data.setup()
