"""`Trainer`: lightning's, with the defaults a user of the zoo would pick and no new methods."""

import io
import logging
import os
import random
import signal
import threading
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
import torch.distributed
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from zoo.core.errors import ZooError, first_line
from zoo.core.files import atomic_write
from zoo.core.seeding import seed_from

log = logging.getLogger(__name__)


class Trainer(lightning.Trainer):
    """A `lightning.Trainer` that saves the best and the last checkpoint and resumes exactly.

    One folder a run: ``<default_root_dir>/{checkpoints/{best,last}.ckpt, metrics.csv, events...}``. A fresh fit moves
    an earlier run out of the way; ``ckpt_path="last"`` goes on with it, and is an error where there is none.

    Args:
        default_root_dir: folder of the run; ``runs/<class of the model>`` by default.
        seed: of dropout and other draws during training, per step; the one of ``seed_everything`` by default, else 0.
        logger: as in lightning; by default a CSV file and TensorBoard.
        callbacks: as in lightning; a ModelCheckpoint of the user's stands in for ours.
        kwargs: as in `lightning.Trainer`.
    """

    def __init__(
        self,
        default_root_dir: str | Path | None = None,
        seed: int | None = None,
        logger: Logger | Iterable[Logger] | bool | None = True,
        callbacks: list[Callback] | Callback | None = None,
        **kwargs: Any,
    ) -> None:
        self._named = default_root_dir is not None
        root = str(default_root_dir or "runs")
        callbacks = [*callbacks] if isinstance(callbacks, (list, tuple)) else [callbacks] if callbacks else []
        if kwargs.get("enable_checkpointing", True) and not any(isinstance(c, Checkpoint) for c in callbacks):
            callbacks.append(BestAndLast())
        callbacks.insert(0, Reseed(seed))
        if logger is True:
            logger = [CSVLogger(root, name="", version=""), TensorBoardLogger(root, name="", version="")]
        # our modules check batches there, whatever data module they are given: nothing is overridden by mistake
        warnings.filterwarnings("ignore", ".*overridden `on_before_batch_transfer`.*")
        kwargs.setdefault("log_every_n_steps", 10)
        kwargs.setdefault("use_distributed_sampler", False)  # our loaders share samples among ranks themselves
        super().__init__(default_root_dir=root, logger=logger, callbacks=callbacks, **kwargs)
        if type(self.strategy.checkpoint_io) is TorchCheckpointIO:  # neither the user's own nor an accelerator's
            self.strategy.checkpoint_io = WholeCheckpoints()
        if type(self.strategy) is DDPStrategy:  # by whatever name: "auto", "ddp", "ddp_spawn", ...
            self.strategy.__class__ = GradientsOrSums

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return Path(self.default_root_dir)

    def fit(  # type: ignore[override]
        self,
        model: lightning.LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: lightning.LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = True,
    ) -> None:
        """As in lightning; ``ckpt_path`` loads with ``weights_only=True``.

        Raises:
            ZooError: if ``ckpt_path="last"`` finds no checkpoint in the run's folder.
        """
        if not self._named:
            self._settle(Path("runs") / type(model).__name__)
        if ckpt_path == "last":
            ckpt_path = self.folder / "checkpoints" / "last.ckpt"
            if not ckpt_path.is_file():
                raise ZooError(f"Nothing to resume: {ckpt_path} does not exist. Leave ckpt_path out to start afresh.")
        if ckpt_path is not None and not Path(str(ckpt_path)).exists():
            raise ZooError(f"Checkpoint {ckpt_path} does not exist.")
        if ckpt_path is not None and weights_only and Path(ckpt_path).is_file():
            _check_run(Path(ckpt_path))
        if not getattr(self, "fast_dev_run", False):
            _make_room(self.folder, fresh=ckpt_path is None)
        super().fit(model, train_dataloaders, val_dataloaders, datamodule, ckpt_path, weights_only)

    def _settle(self, folder: Path) -> None:
        """Point the run, known only now by its model, to its folder."""
        self._default_root_dir = str(folder)
        for logger in self.loggers:
            if isinstance(logger, CSVLogger | TensorBoardLogger) and logger.name == "":
                logger._root_dir = str(folder)
                if isinstance(logger, CSVLogger):
                    logger._save_dir = str(folder)

    def validate(self, *args: Any, **kwargs: Any) -> Any:
        return super().validate(*args, **{"weights_only": True, **kwargs})

    def test(self, *args: Any, **kwargs: Any) -> Any:
        return super().test(*args, **{"weights_only": True, **kwargs})

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        return super().predict(*args, **{"weights_only": True, **kwargs})


def _check_run(path: Path) -> None:
    """Refuse a file that training cannot go on from, before anything is moved or begun; the tensors stay on disk.

    Raises:
        ZooError: naming the file.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch would advise to load with code
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        text = first_line(error)
        raise ZooError(f"{path} cannot be read as a checkpoint: {text[:200]}") from error
    if not isinstance(content, dict) or not {"state_dict", "loops", "optimizer_states"} <= content.keys():
        raise ZooError(f"{path} holds no run to go on with. To start from its weights, give a folder to `--from`.")


class GradientsOrSums(DDPStrategy):
    """Lightning's strategy for several processes, also for a model without a parameter to train.

    DistributedDataParallel refuses such a model, and Lightning's strategy wraps whatever it fits. Without gradients to
    be averaged it stays unwrapped here, and all processes start from the first one's tensors, as Lightning does it for
    testing. Each process sees its share of the data. So the method must add up by itself what it fits, as with
    ``self.trainer.strategy.reduce``, and says that it does by the class attribute ``adds_up = True``.
    """

    def configure_ddp(self) -> None:
        """Wrap a model that has gradients.

        Raises:
            ZooError: for a model without any, whose processes would each keep a result of their own.
        """
        model: Any = self.model
        if any(p.requires_grad for p in model.parameters()):
            return super().configure_ddp()
        if not getattr(model, "adds_up", False):
            raise ZooError(
                f"{type(model).__name__} is fitted without gradients, by one process that sees all data; "
                f"there are {self.world_size}. Set devices=1 and num_nodes=1."
            )
        for tensor in (*model.parameters(), *model.buffers()):
            torch.distributed.broadcast(tensor.data, 0)


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it.

    Lightning's own moves it there from the system's temporary folder: from another disk that is a copy, which a kill or
    a full disk breaks off half-way, and the checkpoint before it is lost.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if storage_options is not None or "://" in str(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        buffer = io.BytesIO()  # written straight to a full disk, torch.save would hide the system's error
        torch.save(checkpoint, buffer)
        with atomic_write(path) as part:
            part.write_bytes(buffer.getbuffer())


@rank_zero_only
def _make_room(folder: Path, fresh: bool) -> None:
    """Nothing of an earlier run is lost: it moves aside, or its metrics do where it is resumed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied")
        if fresh and ((folder / "checkpoints").is_dir() or (folder / "metrics.csv").is_file()):
            aside = _free(folder)
            folder.rename(aside)
            folder.mkdir()
            log.info("The earlier run in %s is now in %s.", folder, aside)
        elif (folder / "metrics.csv").is_file():  # CSVLogger would start it anew
            (folder / "metrics.csv").rename(_free(folder / "metrics.csv"))
    except OSError as error:
        raise ZooError(f"Cannot write to {folder}: {error.strerror}. Set another default_root_dir.") from error


def _free(path: Path) -> Path:
    number = 1
    while (other := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    return other


class BestAndLast(ModelCheckpoint):
    """Keeps ``best.ckpt`` by the method's own `monitor` and ``last.ckpt`` of wherever training stands.

    Lightning's own would skip methods that take no optimiser step, write ``last`` only where the best improved, and
    lose everything since the last validation on Ctrl-C. Here the first Ctrl-C ends the step, saves, and stops; a
    second one stops at once.
    """

    SAVE_EVERY = 600.0
    """Seconds between saves of ``last.ckpt`` within a long epoch."""
    SAVE_AGAIN = 5.0
    """Seconds that validations must lie apart for each to save ``last.ckpt``: an epoch may take milliseconds."""

    def __init__(self) -> None:
        super().__init__(
            filename="best",
            save_top_k=1,
            save_weights_only=False,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
            auto_insert_metric_name=False,
        )
        self._interrupted = False
        self._previous: Any = None
        self._saved_at = 0.0

    @property
    def state_key(self) -> str:
        return type(self).__name__  # lightning's holds the monitor, which is not known yet when state is restored

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        if stage == "fit":
            self.dirpath = os.path.join(trainer.default_root_dir, "checkpoints")
            self.monitor = getattr(pl_module, "monitor", None)
            self.mode = getattr(pl_module, "mode", "min")
            if not self.best_k_models:  # else a resumed run's
                self.kth_value = torch.tensor(torch.inf if self.mode == "min" else -torch.inf)
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._saved_at = (
            -float("inf") if not os.path.exists(os.path.join(str(self.dirpath), "last.ckpt")) else time.monotonic()
        )
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._interrupt)

    def _interrupt(self, *_: Any) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True
        log.warning("Stopping after this step and saving; press Ctrl-C again to stop at once.")

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *args: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *args)
        # the very last step of `max_steps`: what follows would count the broken-off epoch as done
        final = trainer.max_steps > 0 and trainer.global_step >= trainer.max_steps
        if self._interrupted or final or self._due(trainer, self.SAVE_EVERY):
            self._save_last(trainer)
        if self._interrupted:
            raise KeyboardInterrupt

    def _due(self, trainer: lightning.Trainer, gap: float) -> bool:
        due = time.monotonic() - self._saved_at > gap
        return bool(trainer.strategy.broadcast(due)) if trainer.world_size > 1 else due

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        limits = (trainer.current_epoch + 1, trainer.max_epochs), (trainer.global_step, trainer.max_steps)
        final = trainer.should_stop or any(limit is not None and 0 < limit <= now for now, limit in limits)
        if final or self._due(trainer, self.SAVE_AGAIN):
            self._save_last(trainer)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        final = trainer.max_steps > 0 and trainer.global_step >= trainer.max_steps
        ending = trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs
        if not _validates(trainer) and not final and (ending or self._due(trainer, self.SAVE_AGAIN)):
            self._save_last(trainer)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if not self.best_model_path and self.last_model_path:  # never validated: the last is the best there is
            self.best_model_path = self.last_model_path

    def on_exception(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: Any) -> None:
        super().on_exception(trainer, pl_module, exception)
        if isinstance(exception, SIGTERMException):
            self._save_last(trainer)

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None
        self._interrupted = False

    def _should_skip_saving_checkpoint(self, trainer: lightning.Trainer) -> bool:
        if trainer.global_step == 0:  # a method without optimiser steps has fitted something all the same
            self._last_global_step_saved = -1
        return super()._should_skip_saving_checkpoint(trainer)

    def _save_last(self, trainer: lightning.Trainer) -> None:
        if getattr(trainer, "fast_dev_run", False):
            return
        path = os.path.join(str(self.dirpath), "last.ckpt")
        self.last_model_path = path
        try:
            trainer.save_checkpoint(path, weights_only=False)
        except OSError as error:
            raise ZooError(
                f"Cannot write {path}: {error.strerror or error}. What was saved before still stands."
            ) from error
        self._saved_at = time.monotonic()


def _validates(trainer: lightning.Trainer) -> bool:
    """Whether validation really runs: a DataModule may have a loader for it with nothing in it."""
    batches = trainer.num_val_batches
    return bool(trainer.enable_validation and sum(batches if isinstance(batches, list) else [batches]) > 0)


class Reseed(Callback):
    """Seeds every step from (seed, rank, epoch, step), so that a resumed run draws what an unbroken one draws."""

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed

    def _seed(self, trainer: lightning.Trainer, *where: object) -> None:
        seed = self.seed if self.seed is not None else int(os.environ.get("PL_GLOBAL_SEED", 0))
        value = seed_from(seed, trainer.global_rank, *where)
        torch.manual_seed(value)
        random.seed(value)
        np.random.seed(value & 0xFFFFFFFF)

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        self._seed(trainer, stage)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._seed(trainer, "train", trainer.current_epoch, batch_idx)

    def on_validation_batch_start(
        self, trainer: lightning.Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._seed(trainer, "val", dataloader_idx, batch_idx)

    def on_test_batch_start(
        self, trainer: lightning.Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._seed(trainer, "test", dataloader_idx, batch_idx)
