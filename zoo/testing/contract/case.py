"""A method as the contract sees it: its facts, its tiny variant, its embedded data. Nothing here knows any method."""

import contextlib
import copy
import functools
import inspect
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from zoo.core import Trainer, catalogue
from zoo.core.recipe import build

NAMES = catalogue.names()
_folder = tempfile.TemporaryDirectory(prefix="zoo-contract-")  # removed at exit
every_method = pytest.mark.parametrize("name", NAMES)


class Case:
    """One method and its embedded data, three samples a batch; data and first batches are made once."""

    def __init__(self, name: str):
        self.name, self.facts = name, catalogue.facts(name)
        self.cls: Any = catalogue.load_class(name)
        self.data_cls: Any = catalogue.load_datamodule(name)
        self._batches: dict[str, Any] = {}

    def data(self, **changes: Any) -> Any:
        """The method's DataModule with its embedded set."""
        known = inspect.signature(self.data_cls).parameters
        given = {k: v for k, v in {"seed": 0, **changes}.items() if k in known}
        if "batch_size" not in known:
            return self.data_cls(**given)
        try:
            return self.data_cls(**{"batch_size": 3, **given})
        except ValueError as error:  # a batch is one whole graph
            if "batch_size" not in str(error):
                raise
            return self.data_cls(**given)

    @functools.cached_property
    def sample(self) -> Any:
        """A DataModule to look at, set up."""
        data = self.data()
        data.setup("fit")
        return data

    def tiny(self, seed: int = 0, **changes: Any) -> Any:
        """The tiny variant with the sizes that the data know."""
        torch.manual_seed(seed)
        return build(self.cls, self.sample, {"variant": "tiny", **changes})

    @property
    def sizes(self) -> dict[str, Any]:
        """All hyperparameters of the tiny variant on this data."""
        return dict(self.tiny().hyperparameters)

    @functools.cached_property
    def run(self) -> "Run":
        """One fit of a few batches, shared by the tests."""
        return Run(self, Path(tempfile.mkdtemp(prefix=f"{self.name}-", dir=_folder.name)))

    def fitted(self) -> Any:
        """A copy of the model after that fit, in eval mode."""
        model = self.tiny()
        model.load_state_dict(self.run.state)
        for key, value in vars(self.run.model).items():  # what a fit leaves beside the weights, such as a graph
            if isinstance(value, Tensor):
                setattr(model, key, value)
        return model.eval()

    def batch(self, split: str) -> Any:
        """A copy of the first batch of a split."""
        if split not in self._batches:
            loader = getattr(self.sample, f"{split}_dataloader")()
            self._batches[split] = next(iter(loader))
        return copy.deepcopy(self._batches[split])

    def capability(self, flag: str, proof: Callable[[], None]) -> None:
        """A listed capability must hold; one listed as missing is tried, and must not hold."""
        listed = self.facts["capabilities"][flag]
        if listed is True:
            proof()
            return
        try:
            proof()
        except Exception:
            return
        pytest.fail(f"{self.name} lists {flag} as missing ({listed}), but it works: set `{flag} = true` in its toml.")


@functools.cache
def case(name: str) -> Case:
    return Case(name)


def trainer(folder: Path, **given: Any) -> Trainer:
    """A quiet Trainer on the CPU for a few steps; methods without optimiser steps stop by their epochs."""
    defaults: dict[str, Any] = {
        "default_root_dir": folder,
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 3,
        "max_epochs": 3,
        "limit_train_batches": 3,
        "limit_val_batches": 1,
        "limit_test_batches": 1,
        "limit_predict_batches": 1,
        "num_sanity_val_steps": 0,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**{**defaults, **given})


class Watch(Callback):
    """Notes gradients and modes, and saves after the second batch, wherever in an epoch that is."""

    def __init__(self, folder: Path | None = None):
        self.moved: set[str] = set()
        self.broken: set[str] = set()
        self.stepped = False
        self.training: list[bool] = []
        self.folder, self.checkpoint = folder, None

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.training.append(module.training)

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.stepped = True
        for name, p in module.named_parameters():
            if p.grad is not None:
                grad = p.grad.coalesce().values() if p.grad.is_sparse else p.grad
                if not bool(grad.isfinite().all()):
                    self.broken.add(name)
                if bool(grad.any()):
                    self.moved.add(name)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if len(self.training) == 2 and self.folder is not None:
            self.checkpoint = self.folder / "second.ckpt"
            trainer.save_checkpoint(self.checkpoint)


class Run:
    """One fit of a few batches: the state before and after, what was logged, a checkpoint from its middle."""

    def __init__(self, one: Case, folder: Path):
        self.one, self.folder = one, folder
        self.start = {k: v.clone() for k, v in one.tiny().state_dict().items()}
        self.model, self.watch = one.tiny(), Watch(folder)
        with quietly():
            self.trainer = trainer(folder / "unbroken", callbacks=[self.watch])
            self.trainer.fit(self.model, datamodule=one.data())
        self.metrics = dict(self.trainer.callback_metrics)
        self.state = {k: v.detach().clone() for k, v in self.model.state_dict().items()}


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without lightning's hints on loaders, loggers and hardware."""
    names = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")
    levels = [logging.getLogger(n).level for n in names]
    for n in names:
        logging.getLogger(n).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for n, level in zip(names, levels, strict=True):
                logging.getLogger(n).setLevel(level)


def tensors(batch: Any) -> dict[str, Tensor]:
    """The tensors of a batch by key."""
    content = batch.to_dict() if hasattr(batch, "to_dict") and not isinstance(batch, dict) else batch
    return {key: value for key, value in content.items() if isinstance(value, Tensor)}


def replaced(batch: Any, key: str, value: Tensor) -> Any:
    """The batch with another tensor under a key."""
    changed = copy.deepcopy(batch)
    if isinstance(changed, dict):
        changed[key] = value
    else:
        setattr(changed, key, value)
    return changed


def rows(batch: dict[str, Any], which: slice) -> dict[str, Any]:
    """Some samples of a batch: of every tensor and list as long as the batch."""
    size = count(batch)
    return {
        key: value[which] if isinstance(value, (Tensor, list, tuple)) and len(value) == size else value
        for key, value in batch.items()
        if not (isinstance(value, Tensor) and value.ndim == 0)
    }


def count(batch: dict[str, Any]) -> int:
    """Samples in a batch."""
    if "name" in batch:
        return len(batch["name"])
    return len(next(v for v in batch.values() if isinstance(v, Tensor) and v.ndim))


def arguments(model: Any, batch: Any) -> dict[str, Any]:
    """What `predict` takes out of a batch: the keys of its parameters' names.

    Where it names an input differently, because it takes more (a text or tokens, say), the parameter of `forward` at
    its place gives the key. Fails if there is none: model and data must share their names.
    """
    given = batch if isinstance(batch, dict) else tensors(batch)
    own, inner = (
        [p for n, p in inspect.signature(getattr(type(model), call)).parameters.items() if n != "self"]
        for call in ("predict", "forward")
    )
    if any(p.kind is p.VAR_POSITIONAL for p in own):
        own = inner
    found = {}
    for place, p in enumerate(own):
        key = p.name if p.name in given or place >= len(inner) else inner[place].name
        if key in given:
            found[p.name] = given[key]
        else:
            assert p.default is not p.empty, f"predict() takes {p.name!r}, which no batch holds ({', '.join(given)})"
    return found


def same(a: Any, b: Any, tolerance: float = 0.0) -> bool:
    """Equal tensors, also inside dicts and sequences; floats to ``tolerance`` times their largest value."""
    if isinstance(a, Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        if tolerance and a.is_floating_point() and a.numel():
            bound = tolerance * max(float(b[b.isfinite()].abs().max()) if b.isfinite().any() else 0.0, 1e-12)
            close = (a - b).abs() <= bound
            return bool((close | (a == b) | (a.isnan() & b.isnan())).all())
        return bool(torch.equal(torch.nan_to_num(a.detach()), torch.nan_to_num(b.detach())))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k], tolerance) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y, tolerance) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def attach(model: Any, data: Any = None) -> Any:
    """Give a step that is called by hand a trainer to look at; what it logs goes nowhere."""
    with quietly():
        watched = lightning.Trainer(barebones=True, accelerator="cpu", max_steps=10)
    watched.datamodule = data
    watched.state.fn = "fit"
    model.trainer = watched
    model.log = lambda *a, **k: None
    model.log_dict = lambda *a, **k: None
    return model
