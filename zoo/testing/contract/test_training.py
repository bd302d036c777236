"""Training of every method's tiny variant on its embedded data: fit, resume, save, load, gradients, prediction."""

import math
from fnmatch import fnmatch
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from zoo.core import ZooError
from zoo.testing.contract.case import (
    Case,
    Run,
    Watch,
    attach,
    case,
    count,
    every_method,
    quietly,
    replaced,
    rows,
    same,
    tensors,
    trainer,
)


@pytest.fixture
def run(name: str) -> Run:
    return case(name).run


@every_method
def test_fit_changes_the_weights_and_logs_its_monitor(name: str, run: Run) -> None:
    assert not same(run.start, run.state)
    assert all(p.isfinite().all() for p in run.model.parameters())
    logged = run.metrics
    if run.one.cls.monitor not in logged:  # several optimiser steps a batch: stopped before the first validation
        with quietly():
            (logged,) = run.trainer.validate(run.model, datamodule=run.one.data(), verbose=False)
    assert run.one.cls.monitor in logged
    losses = [k for k in run.metrics if k.startswith("train/")]
    assert all(math.isfinite(float(run.metrics[k])) for k in losses)


@every_method
def test_every_parameter_gets_a_gradient(name: str, run: Run) -> None:
    excused = run.one.facts.get("no_gradient", {})
    trainable = {n for n, p in run.model.named_parameters() if p.requires_grad}
    if not run.watch.stepped:  # the method has its own way of training
        assert not run.model.configure_optimizers(), "optimisers, but no step"
        run.watch.moved = {n for n in trainable if not same(run.start[n], run.state[n])}
    assert not run.watch.broken, f"not finite: {sorted(run.watch.broken)[:5]}"
    missing = {n for n in trainable - run.watch.moved if not any(fnmatch(n, pattern) for pattern in excused)}
    assert not missing, f"no gradient in three steps, and not in [no_gradient]: {sorted(missing)[:5]}"


@every_method
def test_resumes_bit_for_bit(name: str, run: Run) -> None:
    assert run.watch.checkpoint is not None, "fewer than two batches were trained"
    again = run.one.tiny(seed=1)  # everything must come from the checkpoint
    with quietly():
        trainer(run.folder / "resumed").fit(again, datamodule=run.one.data(), ckpt_path=run.watch.checkpoint)
    wrong = [k for k, v in run.state.items() if not same(v, again.state_dict()[k])]
    assert not wrong, f"differ after resuming: {wrong[:5]}"


@every_method
def test_checkpoint_loads_without_running_code(name: str, run: Run) -> None:
    content = torch.load(run.folder / "unbroken" / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True)
    again = run.one.tiny(seed=1)
    again.load_state_dict(content["state_dict"])
    kept = run.model.saved_state_dict().keys()
    assert same({k: run.state[k] for k in kept}, {k: v for k, v in again.state_dict().items() if k in kept})


@every_method
def test_saves_and_loads_bit_for_bit(name: str, run: Run) -> None:
    run.model.save_pretrained(run.folder / "saved")
    again = run.one.cls.from_pretrained(run.folder / "saved")
    assert not again.training
    assert again.hyperparameters == run.model.hyperparameters
    assert same(dict(run.model.state_dict()), dict(again.state_dict()))


@every_method
def test_predicts(name: str, run: Run) -> None:
    with quietly():
        out = run.trainer.predict(run.model, datamodule=run.one.data())
    assert out and isinstance(out[0], dict) and out[0].get("name"), "predict_step returns a dict with 'name'"
    assert all(isinstance(n, str) for n in out[0]["name"])
    for key, value in out[0].items():
        assert not (isinstance(value, Tensor) and value.requires_grad), key
        assert not (isinstance(value, Tensor) and value.is_floating_point() and value.isnan().any()), key


@every_method
def test_changed_head_trains(name: str, run: Run) -> None:
    if not run.one.cls.head:
        return
    changes = _head_argument(run.one)
    run.model.save_pretrained(run.folder / "for_head")
    changed = run.one.cls.from_pretrained(run.folder / "for_head", **changes)
    old, new = run.model.state_dict(), {k: v.clone() for k, v in changed.state_dict().items()}
    differ = [k for k in new if k not in old or old[k].shape != new[k].shape]
    assert differ and all(k.startswith(run.one.cls.head) for k in differ)
    assert all(same(old[k], new[k]) for k in new if not k.startswith(run.one.cls.head))
    with quietly():
        try:
            trainer(run.folder / "head", max_steps=1).fit(changed, datamodule=run.one.data())
        except RuntimeError:  # the data are of the old size
            wide = _widened(run.one, changes)
            trainer(run.folder / "wide", max_steps=1).fit(changed, train_dataloaders=wide, val_dataloaders=wide)
    assert not same({k: new[k] for k in differ}, {k: changed.state_dict()[k] for k in differ})


def _head_argument(one: Case) -> dict[str, Any]:
    """The hyperparameters that change only the head: each integer one step up, each list of names one longer."""
    with torch.device("meta"):
        base = {k: v.shape for k, v in one.cls(**one.sizes).state_dict().items()}
        for key, value in one.sizes.items():
            if isinstance(value, int) and not isinstance(value, bool):
                more: Any = value + 1
            elif isinstance(value, list) and value and all(isinstance(v, str) for v in value):
                more = [*value, "another"]
            else:
                continue
            # names that are as many as the number go with it
            names = {
                k: [*v, "another"]
                for k, v in one.sizes.items()
                if isinstance(v, list) and len(v) == value and all(isinstance(n, str) for n in v)
            }
            changes = {**names, key: more}
            try:
                other = {k: v.shape for k, v in one.cls(**{**one.sizes, **changes}).state_dict().items()}
            except (ValueError, TypeError, RuntimeError, ZooError):
                continue
            differ = [k for k in base.keys() | other.keys() if base.get(k) != other.get(k)]
            if differ and all(k.startswith(one.cls.head) for k in differ):
                return changes
    raise AssertionError(f"head = {one.cls.head}, but no hyperparameter changes these parameters alone")


def _widened(one: Case, changes: dict[str, Any]) -> DataLoader:
    """One training batch as a loader of the user's own: what was as wide as the data gets the changed width."""
    batch, sizes = one.batch("train"), one.sample.describe()
    for key, value in changes.items():
        for name, tensor in tensors(batch).items():
            for dim in range(1, tensor.ndim):
                if isinstance(value, int) and tensor.shape[dim] == sizes.get(key):
                    tensor = torch.cat([tensor, tensor.narrow(dim, 0, value - tensor.shape[dim])], dim)
            batch = replaced(batch, name, tensor)
    return DataLoader([batch], batch_size=None, collate_fn=lambda item: item)


@every_method
def test_same_seed_same_numbers(name: str) -> None:
    one = case(name)
    assert same(dict(one.tiny(7).state_dict()), dict(one.tiny(7).state_dict()))
    first, second = one.batch("train"), next(iter(one.data().train_dataloader()))
    if isinstance(first, dict):
        assert same(first, second)
    else:
        assert same(first.to_dict(), second.to_dict())


@every_method
def test_loss_on_the_meta_device(name: str) -> None:
    """Finds tensors that are not buffers, and data-dependent work in the step."""
    one = case(name)

    def proof() -> None:
        batch = one.batch("train")
        with torch.device("meta"):
            model = one.cls(**one.sizes)
        attach(model, one.sample)
        moved = (
            {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in batch.items()}
            if isinstance(batch, dict)
            else batch.to("meta")
        )
        if not model.automatic_optimization:
            found = model.configure_optimizers()
            found = found["optimizer"] if isinstance(found, dict) else found
            model.optimizers = lambda *a, **k: found  # type: ignore[method-assign]
            model.manual_backward = lambda loss, *a, **k: loss.backward()  # type: ignore[method-assign]
        with quietly():
            loss = model.training_step(moved, 0)
        loss = loss["loss"] if isinstance(loss, dict) else loss
        assert loss is None or (loss.is_meta and loss.ndim == 0)

    one.capability("meta", proof)


@every_method
def test_three_samples_equal_three_times_one(name: str) -> None:
    one = case(name)

    def proof() -> None:
        batch = one.batch("predict")
        assert isinstance(batch, dict) and count(batch) >= 2, "the batch is one sample"
        model = one.fitted()
        with torch.no_grad():
            torch.manual_seed(0)
            whole = model.predict_step(batch, 0)
            parts = []
            for i in range(count(batch)):
                torch.manual_seed(0)
                parts.append(model.predict_step(rows(batch, slice(i, i + 1)), 0))
        for key, value in whole.items():
            pieces = [p[key] for p in parts]
            if isinstance(value, Tensor) and value.ndim and len(value) == count(batch):
                assert same(torch.cat(pieces), value, 1e-5), key
            elif isinstance(value, (list, tuple)):
                assert same([x for p in pieces for x in p], list(value), 1e-5), key

    one.capability("batch", proof)


@every_method
def test_fine_tuning_runs_in_train_mode_and_freezing_holds(name: str, run: Run) -> None:
    run.model.save_pretrained(run.folder / "tune")
    model = run.one.cls.from_pretrained(run.folder / "tune")
    watch = Watch()
    with quietly():
        trainer(run.folder / "tuned", max_steps=1, limit_val_batches=0, callbacks=[watch]).fit(
            model, datamodule=run.one.data()
        )
    assert all(watch.training), "from_pretrained hands out eval mode, and fit kept it"
    frozen = [
        n for n, _ in model.named_children() if any(p.requires_grad for p in model.get_submodule(n).parameters())
    ][:1]
    for child in frozen:
        model.freeze(child)
        model.train()
        assert not model.get_submodule(child).training
        assert not any(p.requires_grad for p in model.get_submodule(child).parameters())
        model.unfreeze(child)
        assert model.get_submodule(child).training
