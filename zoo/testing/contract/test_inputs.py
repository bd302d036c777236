"""What every method does with inputs: `predict` equals `predict_step`, and bad ones are refused in one line."""

from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.core import ZooError
from zoo.testing.contract.case import Case, arguments, case, count, every_method, replaced, rows, same, tensors

REFUSED = (ValueError, ZooError)


def one_line(error: BaseException) -> None:
    text = str(error)
    assert 10 < len(text) < 500 and "\n" not in text.strip(), f"not one clear line: {text!r}"


@every_method
def test_predict_step_equals_predict(name: str) -> None:
    one = case(name)
    model, batch = one.fitted(), one.batch("predict")
    with torch.no_grad():
        torch.manual_seed(0)
        step = model.predict_step(batch, 0)
        torch.manual_seed(0)
        out = model.predict(**arguments(model, one.batch("predict")))
    if isinstance(out, dict):
        shared = out.keys() & step.keys()
        assert shared and all(same(out[k], step[k], 1e-6) for k in shared)
    else:
        parts = out if isinstance(out, (tuple, list)) else [out]
        values = [v for v in step.values() if isinstance(v, Tensor)]
        for part in parts:
            assert any(part.shape == v.shape and same(part.to(v.dtype), v, 1e-6) for v in values), (
                "not in predict_step's dict"
            )


@every_method
def test_predict_restores_train_mode_and_leaves_no_gradient(name: str) -> None:
    one = case(name)
    model = one.fitted().train()
    out = model.predict(**arguments(model, one.batch("predict")))
    assert model.training
    values = out.values() if isinstance(out, dict) else out if isinstance(out, (tuple, list)) else [out]
    assert not any(isinstance(v, Tensor) and v.requires_grad for v in values)


def floats(one: Case) -> dict[str, Tensor]:
    return {k: v for k, v in tensors(one.batch("predict")).items() if v.is_floating_point() and v.numel()}


@every_method
def test_nan_is_refused(name: str) -> None:
    one = case(name)
    model = one.fitted()
    allowed = one.cls.nan_keys
    for key, value in floats(one).items():
        if key in allowed:
            continue
        bad = value.clone()
        bad.view(-1)[0] = torch.nan
        with pytest.raises(ValueError, match=key) as caught:
            model.on_before_batch_transfer(replaced(one.batch("predict"), key, bad), 0)
        one_line(caught.value)
        given = arguments(model, replaced(one.batch("predict"), key, bad))
        if any(isinstance(v, Tensor) and v.is_floating_point() and v.isnan().any() for v in given.values()):
            refused_or_handled(model, given)


@every_method
def test_empty_batch_is_refused(name: str) -> None:
    one = case(name)
    batch = one.batch("predict")
    if not isinstance(batch, dict) or count(batch) < 2:
        return  # a batch is one whole graph
    with pytest.raises(ValueError) as caught:
        one.tiny().on_before_batch_transfer(rows(batch, slice(0, 0)), 0)
    one_line(caught.value)


@every_method
def test_wrong_width_is_refused_or_handled(name: str) -> None:
    """One channel too many (pictures), one feature too many (anything else)."""
    one = case(name)
    model = one.fitted()
    for key, value in arguments(model, one.batch("predict")).items():
        if not (isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 2):
            continue
        dim = 1 if value.ndim == 4 else -1
        wide = torch.cat([value, value.narrow(dim, 0, 1)], dim)
        given: dict[str, Any] = {**arguments(model, one.batch("predict")), key: wide}
        refused_or_handled(model, given)


def refused_or_handled(model: Any, given: dict[str, Any]) -> None:
    """One clear line, or a result without NaN."""
    try:
        out = model.predict(**given)
    except REFUSED as error:
        one_line(error)
        return
    parts = out.values() if isinstance(out, dict) else out if isinstance(out, (tuple, list)) else [out]
    assert all(v.isfinite().all() for v in parts if isinstance(v, Tensor) and v.is_floating_point())


@every_method
def test_wrong_keys_are_refused(name: str) -> None:
    one = case(name)
    model = one.tiny()
    state = model.state_dict()
    first = next(iter(state))
    with pytest.raises(ZooError, match="do not fit") as caught:
        model.load_state_dict({**{k: v for k, v in state.items() if k != first}, "no.such.key": torch.zeros(1)})
    one_line(caught.value)
