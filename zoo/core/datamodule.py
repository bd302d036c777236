"""`ZooDataModule`: where data comes from, in which order, and how a user's own files go in and come out."""

import inspect
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate

from zoo.core.errors import ZooError
from zoo.core.seeding import seed_from

log = logging.getLogger(__name__)


LOCAL = ("self", "root", "batch_size", "num_workers", "seed", "download")
"""Arguments of DataModules that a checkpoint does not remember."""


@dataclass(frozen=True)
class Source:
    """A file of a public dataset: address, sha256, size in bytes and name under the root."""

    url: str
    sha256: str
    bytes: int
    name: str


class ZooDataModule(lightning.LightningDataModule):
    """Data for one task, as batches of ``dict[str, Tensor]``.

    A subclass writes `build` (the datasets), and for users' own files `read` and `write`. The order of samples and
    every random draw follow from (seed, epoch, index), so that a resumed run goes on exactly where it stopped, with
    any number of workers.

    Args:
        root: folder of the public dataset in its own layout; None serves the embedded set.
        batch_size: samples a batch (per device).
        num_workers: processes that load data; 0 loads in the main process.
        seed: of the order, the augmentation and the embedded set.
        download: fetch `sources` into ``root`` where they are missing.
    Raises:
        FileNotFoundError: if ``root`` does not exist, or a piece of the layout is missing.
    """

    sources: ClassVar[tuple[Source, ...]] = ()
    embedded: ClassVar[str] = "a small generated set"
    """What ``root=None`` serves, for the log line."""
    unit: ClassVar[str] = "sample"
    """What the progress of `zoo predict` counts."""
    collate: ClassVar[Callable[[list[Any]], Any] | None] = None
    whole: bool = False
    """An item (one whole graph, say) is a batch: the same object every time, moved to a device once, and in a
    distributed run the same for every process, also in evaluation; only a user's own items are shared out."""

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
        download: bool = False,
    ):
        super().__init__()
        if batch_size < 1 or num_workers < 0:
            raise ValueError(
                f"batch_size is {batch_size} and num_workers {num_workers}; they must be at least 1 and 0."
            )
        if self.whole and batch_size != 1:
            raise ValueError(f"batch_size is {batch_size}; a batch is one whole graph, so it must be 1.")
        self.root = None if root is None else Path(root).expanduser()
        if self.root is not None and not self.root.is_dir() and not download:
            raise FileNotFoundError(
                f"Data root {self.root} is not a folder. {type(self).__name__} expects {self.layout()}"
                " Leave `root` out for the embedded set."
            )
        self.batch_size, self.num_workers, self.seed, self.download = batch_size, num_workers, seed, download
        self._sets: dict[str, Dataset] = {}
        self._epoch = -1  # counts passes where no trainer does
        self._moved: tuple[Any, torch.device, Any] | None = None  # the last whole item, and where it has gone
        self.skipped: list[tuple[Path, str]] = []

    @classmethod
    def layout(cls) -> str:
        """The first paragraph of the docstring that names the layout, for error messages."""
        parts = [" ".join(p.split()) for p in (cls.__doc__ or "").split("\n\n")]
        named = [p for p in parts if "root=DIR" in p]
        return (named[0].split("root=DIR")[1].lstrip(": ") if named else "the layout in its docstring.").rstrip(
            "."
        ) + "."

    def save_hyperparameters(self, *args: Any, ignore: Any = None, frame: Any = None, logger: bool = False) -> None:
        """As in lightning, but not logged: lightning refuses a name that the model has too, with another value."""
        current = inspect.currentframe()
        frame = frame or (current.f_back if current else None)
        super().save_hyperparameters(*args, ignore=ignore, frame=frame, logger=logger)

    # ---- what a subclass writes ---------------------------------------------------------------------------------

    def build(self) -> dict[str, Dataset]:
        """The datasets by split: ``train``, ``val``, ``test`` (any may be absent). Called once.

        A dataset has ``__len__`` and one of: ``__getitem__(index)``; ``sample(index, generator)`` where it draws at
        random; ``batch(indices, generator)`` where it builds whole batches at once.
        """
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """Sizes that a model must know, by the name of the model's hyperparameter (``num_classes``, ...).

        The command and the recipes fill with these what the user left out. Call after `setup`.
        """
        return {}

    def read(self, path: Path) -> Dataset:
        """A user's own file or folder as a dataset: the usual keys without targets, with ``name``."""
        raise ZooError(f"{type(self).__name__} cannot read a user's own files.")

    def write(self, predictions: Iterable[dict[str, Any]], path: Path) -> list[Path]:
        """Write what ``predict_step`` returned as the files a person wants back; return their paths."""
        raise ZooError(f"{type(self).__name__} cannot write predictions.")

    def aim(self, path: Path, compare: bool = False, overwrite: bool = False) -> int:
        """Make ready to `write` the predictions on a user's files to ``path``; called once after `from_files`.

        Where results are files one by one, this leaves out of the set what an earlier run finished there, unless
        ``overwrite``, and returns how many that were; here results are one piece, and none is left out.

        Args:
            compare: also write what went in, what came out and, where there is one, the reference side by side.
        Raises:
            ZooError: if that cannot be compared, or would overwrite what goes in.
        """
        if compare:
            raise ZooError(f"{type(self).__name__} has no pictures to put side by side.")
        return 0

    # ---- what travels with a checkpoint -------------------------------------------------------------------------

    def remember(self) -> dict[str, Any]:
        """What reading a user's files depends on, as JSON; travels with the checkpoints of a model fitted to this data.

        By default the arguments that differ from the defaults. Left out is what only this machine and this training
        know: the root, how data is loaded, and free text (other files' places, columns' names). A subclass that learns
        from the data (names, say) adds it, and takes it back in `recall`.
        """
        found = {}
        for name, parameter in inspect.signature(type(self).__init__).parameters.items():
            free = parameter.annotation in (str, "str", str | None, "str | None")
            if name in LOCAL or free or name not in self.hparams or self.hparams[name] == parameter.default:
                continue
            found[name] = self.hparams[name]
        return found

    @classmethod
    def recall(cls, remembered: dict[str, Any], **arguments: Any) -> Self:
        """A DataModule that reads a user's files as the one did that `remember`ed; ``arguments`` go before.

        Raises:
            ZooError: for what this class does not know.
        """
        known = inspect.signature(cls.__init__).parameters
        unknown = [name for name in remembered if name not in known or name in LOCAL]
        if unknown:
            raise ZooError(f"The checkpoint remembers {unknown[0]!r} of its data, which {cls.__name__} does not know.")
        return cls(**{**remembered, **arguments})

    # ---- files --------------------------------------------------------------------------------------------------

    def need(self, *parts: str, expected: str, get: str = "") -> Path:
        """A path under the root that must exist.

        Raises:
            FileNotFoundError: naming the path, what was expected there and where to get it.
        """
        assert self.root is not None
        path = self.root.joinpath(*parts)
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: expected {expected}.{' ' + get if get else ''}")
        return path

    def skip(self, path: Path, reason: object) -> None:
        """Note a broken file of the user's by name; the rest go on."""
        self.skipped.append((path, str(reason)))
        log.warning("Skipped %s: %s", path, reason)

    def from_files(self, path: str | Path) -> "ZooDataModule":
        """Take a user's own file or folder as the set to predict on; returns self.

        Raises:
            FileNotFoundError: if nothing is there.
            ZooError: if nothing there can be read.
        """
        path = Path(path).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist: expected a file or folder of yours to predict on.")
        self.skipped = []
        data = self.read(path)
        if len(data) == 0:  # type: ignore[arg-type]
            reasons = "; ".join(f"{p.name}: {r}" for p, r in self.skipped[:3])
            raise ZooError(f"Nothing readable in {path}{': ' + reasons.rstrip('.') if reasons else ''}.")
        self._sets["predict"] = data
        return self

    # ---- Lightning's hooks --------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Fetch missing `sources` (one process a node), each checked by its sha256 before it takes its name."""
        if not self.download:
            return
        if not self.sources or self.root is None:
            raise ZooError(
                f"{type(self).__name__} has no public address to download from, or no root to download to. "
                f"It expects {self.layout()}"
            )
        from zoo.core.download import fetch

        for source in self.sources:
            fetch(source, self.root / source.name)

    def setup(self, stage: str | None = None) -> None:
        if stage == "predict" and "predict" in self._sets:
            return  # a user's own files need no dataset beside them
        if not self._sets.keys() - {"predict"}:
            if self.root is None:
                if (name := getattr(self.hparams, "name", None)) is not None:
                    raise ZooError(
                        f"name={name!r} chooses a set under root, and no root is given. Give root, or leave name out "
                        f"for the embedded set: {self.embedded}."
                    )
                log.info("%s: no root given, serving %s.", type(self).__name__, self.embedded)
            self._sets.update(self.build())

    def dataset(self, split: str) -> Dataset:
        """The dataset of a split.

        Raises:
            ZooError: if this data has no such split.
        """
        if split not in self._sets:
            self.setup()
        if split not in self._sets:
            raise ZooError(f"{type(self).__name__} has no {split} split here; it has {', '.join(self._sets)}.")
        return self._sets[split]

    def train_dataloader(self) -> "DataLoader[Any]":
        return self.loader(self.dataset("train"), shuffle=True)

    def val_dataloader(self) -> "DataLoader[Any] | list[Any]":
        self.setup()
        return self.loader(self._sets["val"]) if "val" in self._sets else []

    def test_dataloader(self) -> "DataLoader[Any]":
        return self.loader(self.dataset("test"))

    def predict_dataloader(self) -> "DataLoader[Any]":
        return self.loader(self.dataset("predict" if "predict" in self._sets else "test"))

    # ---- order and randomness -----------------------------------------------------------------------------------

    def position(self) -> tuple[int, int]:
        """(epoch, batches already done in it), by the trainer's own counters where one is attached."""
        if self.trainer is not None and self.trainer.training:
            loop: Any = self.trainer.fit_loop
            return loop.epoch_progress.current.processed, loop.epoch_loop.batch_progress.current.ready
        self._epoch += 1
        return self._epoch, 0

    def loader(self, dataset: Dataset, shuffle: bool = False, batch_size: int | None = None) -> "DataLoader[Any]":
        """A loader whose order, with ``shuffle``, follows from (seed, epoch) and starts at the trainer's position."""
        size = batch_size or self.batch_size
        ready = hasattr(dataset, "batch")
        if self.whole:  # in training's way, which gives every process as many items: none has no graph
            shuffle = dataset is not self._sets.get("predict")
        sampler = _Order(dataset, size, self.seed, self if shuffle else None, self.trainer)
        return _Loader(
            _Seeded(dataset, self.seed),
            batch_size=size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=_identity if ready else _only if self.whole else (type(self).collate or default_collate),
            pin_memory=torch.cuda.is_available() and not self.whole,  # pinning copies: another object every time
            persistent_workers=self.num_workers > 0,
        )

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Lightning's, but a whole item that comes again is the same object on the device, too."""
        if not self.whole:
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        if self._moved is None or self._moved[0] is not batch or self._moved[1] != device:
            with torch.inference_mode(False), torch.no_grad():  # training could not use an inference tensor
                self._moved = batch, device, super().transfer_batch_to_device(batch, device, dataloader_idx)
        return self._moved[2]


class Items(Dataset):
    """A list as a dataset; an item is the very object, so that who gets it again may know it again."""

    def __init__(self, items: Sequence[Any]):
        self.items = list(items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def _identity(batch: Any) -> Any:
    return batch


def _only(items: list[Any]) -> Any:
    return items[0]


class _Seeded(Dataset):
    """Calls a dataset with (index, epoch) and gives its random draws a generator of their own."""

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def generator(self, index: int, epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed_from(self.seed, epoch, index))

    def __getitem__(self, item: tuple[int, int]) -> Any:
        index, epoch = item
        if hasattr(self.dataset, "sample"):
            return self.dataset.sample(index, self.generator(index, epoch))
        return self.dataset[index]

    def __getitems__(self, items: list[tuple[int, int]]) -> Any:
        if hasattr(self.dataset, "batch"):
            return self.dataset.batch([index for index, _ in items], self.generator(*items[0]))
        return [self[item] for item in items]


def epoch_order(size: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch's samples, (size,) long."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed_from(seed, epoch)))


class _Order(DistributedSampler):
    """Yields (index, epoch). Shards over ranks itself; being a DistributedSampler, Lightning leaves it alone."""

    def __init__(self, dataset: Dataset, batch_size: int, seed: int, source: ZooDataModule | None, trainer: Any):
        rank, world = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        super().__init__(dataset, num_replicas=world, rank=rank, shuffle=source is not None, seed=seed)
        self.batch_size, self.source = batch_size, source

    def __len__(self) -> int:
        size = len(self.dataset)  # type: ignore[arg-type]
        if self.source is not None:  # ranks take equally many training steps
            return math.ceil(size / self.num_replicas)
        return len(range(self.rank, size, self.num_replicas))  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[tuple[int, int]]:  # type: ignore[override]
        size = len(self.dataset)  # type: ignore[arg-type]
        if self.source is None:
            yield from ((index, 0) for index in range(self.rank, size, self.num_replicas))  # type: ignore[arg-type]
            return
        epoch, done = self.source.position()
        order = epoch_order(size, self.seed, epoch)
        total = len(self) * self.num_replicas
        order = order.repeat(math.ceil(total / size))[self.rank : total : self.num_replicas]
        for index in order[done * self.batch_size :].tolist():
            yield index, epoch


class _Loader(DataLoader):
    """A DataLoader that starts at its first batch and not before.

    Lightning makes the iterator before it has put its counters right on resuming, and keeps one over an epoch that
    was complete; asked at the first batch, the counters say exactly which batch comes.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        yield from super().__iter__()

    def state_dict(self) -> dict[str, int]:
        """Tells Lightning that mid-epoch resuming is exact here."""
        return {"seed": self.sampler.seed} if isinstance(self.sampler, _Order) else {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if isinstance(self.sampler, _Order) and state.get("seed", self.sampler.seed) != self.sampler.seed:
            raise ZooError(
                f"The run was started with data seed {state['seed']} and cannot go on with {self.sampler.seed}. "
                "Resume with the same seed."
            )
