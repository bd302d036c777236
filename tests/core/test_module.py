"""The base module: JSON hyperparameters, strict loading, heads, freezing, train mode."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from zoo.core import Trainer, ZooError, ZooModule, unwrap

from .dummies import Line, LineDataModule


def test_hyperparameters_are_whole_and_plain() -> None:
    model = Line.from_variant("tiny", lr=1)
    assert model.hyperparameters == {"width": 3, "outputs": 1, "lr": 1, "note": None}
    with pytest.raises(KeyError, match="paper, tiny"):
        Line.from_variant("huge")


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"widht": 3}, "Did you mean 'width'"),
        ({"width": nn.Linear(1, 1)}, "plain JSON"),
        ({"width": "many"}, "expected int"),
        ({"lr": float("nan")}, "plain JSON"),
    ],
)
def test_what_is_no_hyperparameter_is_refused(values: dict, error: str) -> None:
    with pytest.raises(TypeError, match=error):
        Line(**values)


def test_save_and_load_is_bit_exact_and_in_eval_mode(tmp_path: Path) -> None:
    model = Line(width=5)
    model.save_pretrained(tmp_path / "ckpt")
    assert sorted(p.name for p in (tmp_path / "ckpt").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    again = Line.from_pretrained(tmp_path / "ckpt")
    assert not again.training and again.hyperparameters == model.hyperparameters
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))


def test_a_changed_head_is_new_and_only_the_head(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = Line()
    model.save_pretrained(tmp_path)
    with caplog.at_level("INFO"):
        other = Line.from_pretrained(tmp_path, outputs=7)
    assert "initialised anew for your task: out.weight, out.bias" in caplog.text
    assert other.out.weight.shape == (7, 4)
    assert torch.equal(other.body[0].weight, model.body[0].weight)
    with pytest.raises(ZooError, match="do not fit"):
        Line.from_pretrained(tmp_path, width=9)


def test_unchanged_shapes_load_the_head_too(tmp_path: Path) -> None:
    model = Line()
    model.save_pretrained(tmp_path)
    assert torch.equal(Line.from_pretrained(tmp_path, lr=1.0).out.weight, model.out.weight)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"format_version": 99}, "Update"),
        ({"format_version": "1"}, "wrong type"),
        ({"class": "Other"}, "holds Other"),
        ({"hyperparameters": {"width": 10**9}}, "another shape"),
        ({"hyperparameters": {"width": -1}}, "does not build|do not fit"),
        ({"hyperparameters": {"width": [4]}}, "expected int"),
        ({"hyperparameters": {"width": 4, "exec": "rm"}}, "no hyperparameter 'exec'"),
    ],
)
def test_a_hostile_config_is_one_line(tmp_path: Path, change: dict, error: str) -> None:
    Line().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ZooError, match=error) as caught:
        Line.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_fit_after_loading_trains(tmp_path: Path) -> None:
    Line().save_pretrained(tmp_path / "ckpt")
    model = Line.from_pretrained(tmp_path / "ckpt")
    before = model.body[1].running_mean.clone()
    Trainer(tmp_path, accelerator="cpu", enable_progress_bar=False, max_steps=2).fit(model, datamodule=LineDataModule())
    assert model.body[1].training and not torch.equal(model.body[1].running_mean, before)


def test_frozen_parts_stay_as_they_are(tmp_path: Path) -> None:
    model = Line().freeze("body")
    before = {k: v.clone() for k, v in model.body.state_dict().items()}
    Trainer(tmp_path, accelerator="cpu", enable_progress_bar=False, max_steps=2).fit(model, datamodule=LineDataModule())
    assert all(torch.equal(v, before[k]) for k, v in model.body.state_dict().items())
    model.unfreeze().train()
    assert model.body[1].training and all(p.requires_grad for p in model.parameters())


def test_predict_restores_the_mode() -> None:
    model = Line().train()
    model.body[1].eval()
    model.predict(torch.zeros(1, 2))
    assert model.training and not model.body[1].training and model.body[2].training


def test_nan_in_a_batch_is_one_line(tmp_path: Path) -> None:
    model = Line()
    with pytest.raises(ValueError, match="'x' holds 1 values that are NaN"):
        model.on_before_batch_transfer({"x": torch.tensor([[1.0, float("nan")]])}, 0)
    with pytest.raises(ValueError, match="batch is empty"):
        model.on_before_batch_transfer({"x": torch.zeros(0, 2)}, 0)


def test_a_submodule_called_module_is_refused(tmp_path: Path) -> None:
    class Wrapped(ZooModule):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(1, 1)

    with pytest.raises(ZooError, match="called 'module'"):
        Wrapped().save_pretrained(tmp_path / "ckpt")
    assert not (tmp_path / "ckpt").exists()


def test_checkpoints_hold_tensors_only_and_say_their_class(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, accelerator="cpu", enable_progress_bar=False, max_steps=1)
    trainer.fit(Line(width=6), datamodule=LineDataModule())
    content = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    own = {"class": "Line", "hyperparameters": Line(width=6).hyperparameters}
    assert content["zoo"] == {**own, "data": {"class": "LineDataModule", **LineDataModule().remember()}}


@pytest.mark.parametrize("wrap", [{}, {"params": 1}, {"state_dict": 1}, {"model": 1}])
def test_unwrap_takes_off_the_usual_wrappers(wrap: dict) -> None:
    tensors = {"module.a": torch.ones(1), "module.b": torch.zeros(1)}
    content = {next(iter(wrap)): tensors, "epoch": 3} if wrap else tensors
    assert sorted(unwrap(content)) == ["a", "b"]


def test_unwrap_prefers_averaged_weights() -> None:
    content = {"params": {"a": torch.ones(1)}, "params_ema": {"a": torch.zeros(1)}}
    assert unwrap(content)["a"] == 0
    with pytest.raises(ZooError, match="No tensors"):
        unwrap({"epoch": 1})


def test_tied_weights_survive(tmp_path: Path) -> None:
    class Tied(ZooModule):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)
            self.b.weight = self.a.weight

    model = Tied()
    model.save_pretrained(tmp_path)
    again = Tied.from_pretrained(tmp_path)
    assert again.b.weight is again.a.weight and torch.equal(again.a.weight, model.a.weight)
