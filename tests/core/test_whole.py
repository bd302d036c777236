"""DataModules whose items are batches: the same object every time, on every process, on any device."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from zoo.core import ZooDataModule
from zoo.core.datamodule import Items


class One(ZooDataModule):
    """One item. root=DIR: nothing."""

    whole = True

    def build(self) -> dict[str, Dataset]:
        items = Items([{"x": torch.arange(3.0)}])
        return {"train": items, "val": items, "test": items}

    def read(self, path: Path) -> Items:
        return Items([{"x": torch.full((1,), float(i))} for i in range(3)])


class Rank:
    """What a DataModule asks a trainer of a distributed run."""

    training, world_size = False, 2

    def __init__(self, rank: int):
        self.global_rank = rank


def test_every_batch_is_the_item_itself() -> None:
    data = One(batch_size=1)
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader(), data.train_dataloader())
    batches: list[Any] = [batch for loader in loaders for batch in loader]
    assert len(batches) == 4 and all(batch is data.dataset("train")[0] for batch in batches)
    assert not any(loader.pin_memory for loader in loaders)


def test_more_than_one_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size is 2; a batch is one whole graph, so it must be 1"):
        One(batch_size=2)


@pytest.mark.parametrize("rank", [0, 1])
def test_every_process_gets_the_item_but_a_users_are_shared_out(tmp_path: Path, rank: int) -> None:
    data = One(batch_size=1)
    data.trainer = Rank(rank)  # type: ignore[assignment]
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        assert [batch is data.dataset("test")[0] for batch in loader] == [True]
    mine = [int(batch["x"]) for batch in data.from_files(tmp_path).predict_dataloader()]
    assert mine == [[0, 2], [1]][rank]


def test_an_item_is_moved_once_and_trains_after_evaluation() -> None:
    data = One(batch_size=1)
    item, other = data.dataset("train")[0], {"x": torch.ones(1)}
    with torch.inference_mode():
        moved = data.transfer_batch_to_device(item, torch.device("meta"), 0)
    assert moved["x"].device.type == "meta" and not moved["x"].is_inference()
    assert data.transfer_batch_to_device(item, torch.device("meta"), 0) is moved
    assert data.transfer_batch_to_device(other, torch.device("meta"), 0) is not moved
    assert data.transfer_batch_to_device(item, torch.device("cpu"), 0)["x"].device.type == "cpu"
