"""Resuming is bit-exact on the CPU: in mid-epoch, at an epoch's end, with and without workers."""

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from zoo.core import Trainer, ZooError

from .dummies import Fitted, Line, LineDataModule


def run(folder: Path, ckpt_path: str | None = None, workers: int = 0, **limits: int) -> tuple[Line, Trainer]:
    lightning.seed_everything(1, verbose=False)
    model, data = Line(), LineDataModule(num_workers=workers)
    trainer = Trainer(folder, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, **limits)
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
    return model, trainer


@pytest.mark.parametrize(
    ("first", "whole"),
    [
        ({"max_steps": 8}, {"max_steps": 17}),  # in mid-epoch: 6 batches an epoch
        ({"max_steps": 6}, {"max_steps": 14}),  # exactly at an epoch's end
        ({"max_epochs": 2}, {"max_epochs": 4}),
        ({"max_steps": 3}, {"max_epochs": 2}),
    ],
    ids=str,
)
def test_resumed_equals_unbroken(tmp_path: Path, first: dict[str, int], whole: dict[str, int]) -> None:
    unbroken, _ = run(tmp_path / "a", **whole)
    started, _ = run(tmp_path / "b", **first)
    resumed, trainer = run(tmp_path / "b", "last", **whole)
    assert started.seen + resumed.seen == unbroken.seen, "not the same batches in the same order"
    for (name, a), b in zip(unbroken.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert trainer.checkpoint_callback.best_model_path.endswith("best.ckpt")


def test_resumed_with_workers_equals_unbroken_without(tmp_path: Path) -> None:
    unbroken, _ = run(tmp_path / "a", max_steps=9)
    run(tmp_path / "b", workers=1, max_steps=4)
    resumed, _ = run(tmp_path / "b", "last", workers=1, max_steps=9)
    assert all(map(torch.equal, unbroken.state_dict().values(), resumed.state_dict().values()))


def test_nothing_to_resume_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match="Nothing to resume"):
        run(tmp_path, "last", max_steps=1)


def test_a_fresh_run_moves_the_earlier_one_aside(tmp_path: Path) -> None:
    run(tmp_path / "run", max_steps=1)
    run(tmp_path / "run", max_steps=2)
    assert (tmp_path / "run.1" / "checkpoints" / "last.ckpt").is_file()
    content = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["global_step"] == 2


def test_resuming_keeps_the_earlier_metrics(tmp_path: Path) -> None:
    run(tmp_path, max_epochs=1)
    run(tmp_path, "last", max_epochs=2)
    assert (tmp_path / "metrics.1.csv").is_file() and (tmp_path / "metrics.csv").is_file()


def test_resuming_with_another_data_seed_is_refused(tmp_path: Path) -> None:
    run(tmp_path, max_steps=2)
    trainer = Trainer(tmp_path, accelerator="cpu", enable_progress_bar=False, max_steps=4)
    with pytest.raises(ZooError, match="data seed 0"):
        trainer.fit(Line(), datamodule=LineDataModule(seed=5), ckpt_path="last")


def test_last_is_written_also_where_the_best_did_not_improve(tmp_path: Path) -> None:
    class Worse(Line):
        def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
            self.log("val/loss", float(self.trainer.current_epoch))

    trainer = Trainer(tmp_path, accelerator="cpu", enable_progress_bar=False, max_epochs=3)
    trainer.fit(Worse(), datamodule=LineDataModule())
    best, last = (torch.load(tmp_path / "checkpoints" / f"{n}.ckpt", weights_only=True) for n in ("best", "last"))
    assert (best["epoch"], last["epoch"]) == (0, 2)


@pytest.mark.parametrize("sanity", [0, 2])
def test_the_best_is_kept_where_the_first_epochs_are_not_validated(tmp_path: Path, sanity: int) -> None:
    class Worse(Line):
        def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
            self.log("val/loss", float(self.trainer.current_epoch))

    limits = {"max_epochs": 6, "check_val_every_n_epoch": 2, "num_sanity_val_steps": sanity}
    trainer = Trainer(tmp_path, accelerator="cpu", enable_progress_bar=False, **limits)
    trainer.fit(Worse(), datamodule=LineDataModule())
    best, last = (torch.load(tmp_path / "checkpoints" / f"{n}.ckpt", weights_only=True) for n in ("best", "last"))
    assert (best["epoch"], last["epoch"]) == (1, 5)
    assert trainer.checkpoint_callback.best_model_score == 1


def test_without_validation_the_last_is_the_best(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, accelerator="cpu", enable_progress_bar=False, max_epochs=2, limit_val_batches=0)
    trainer.fit(Line(), datamodule=LineDataModule())
    assert trainer.checkpoint_callback.best_model_path.endswith("last.ckpt")

    class NoneHeldOut(LineDataModule):
        def val_dataloader(self) -> Any:
            return torch.utils.data.DataLoader([])

    trainer = Trainer(tmp_path / "empty", accelerator="cpu", enable_progress_bar=False, max_epochs=2)
    trainer.fit(Line(), datamodule=NoneHeldOut())
    assert trainer.checkpoint_callback.best_model_path.endswith("last.ckpt")
    assert (tmp_path / "empty" / "checkpoints" / "last.ckpt").is_file()


def test_a_method_without_optimiser_steps_gets_best_and_last(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, accelerator="cpu", enable_progress_bar=False, max_epochs=2)
    trainer.fit(Fitted(), datamodule=LineDataModule())
    assert trainer.global_step == 0
    best = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["state_dict"]["count"] == 44


def test_a_users_own_checkpoint_callback_stands_in_for_ours(tmp_path: Path) -> None:
    mine = ModelCheckpoint(tmp_path / "mine", filename="x")
    trainer = Trainer(tmp_path, accelerator="cpu", enable_progress_bar=False, max_epochs=1, callbacks=[mine])
    assert trainer.checkpoint_callbacks == [mine]
    trainer.fit(Line(), datamodule=LineDataModule())
    assert (tmp_path / "mine" / "x.ckpt").is_file() and not (tmp_path / "checkpoints").exists()


def test_the_run_is_named_after_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Trainer(accelerator="cpu", enable_progress_bar=False, max_steps=1).fit(Line(), datamodule=LineDataModule())
    assert (tmp_path / "runs" / "Line" / "checkpoints" / "last.ckpt").is_file()
    assert (tmp_path / "runs" / "Line" / "hparams.yaml").is_file()


def test_plain_lightning_trainer_works_too(tmp_path: Path) -> None:
    lightning.seed_everything(1, verbose=False)
    trainer = lightning.Trainer(default_root_dir=tmp_path, accelerator="cpu", max_steps=8, enable_progress_bar=False)
    model = Line()
    trainer.fit(model, datamodule=LineDataModule())
    zoo, _ = run(tmp_path / "zoo", max_steps=8)
    assert [s[2] for s in model.seen] == [s[2] for s in zoo.seen]
