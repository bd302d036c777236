"""The second tier: bf16, torch.compile, torch.export, ONNX, two processes. What is listed as missing is tried too."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.testing.contract.case import Case, case, every_method, quietly, same, trainer

pytestmark = pytest.mark.slow


def flat(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    values = out.values() if isinstance(out, dict) else out
    return [t for v in values for t in flat(v)] if isinstance(out, (dict, list, tuple)) else []


def traced(one: Case) -> tuple[Any, tuple[Any, ...], list[Tensor]]:
    """The tiny model in eval mode, arguments of its forward, and what eager gives."""
    model = one.fitted()
    inputs = model.example_inputs()
    with torch.no_grad():
        return model, inputs, flat(model(*inputs))


def close(found: list[Tensor], wanted: list[Tensor], tolerance: float = 1e-4) -> None:
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert same(a.to(b.dtype), b, tolerance), float((a.double() - b.double()).abs().max())


@every_method
def test_trains_in_bf16(name: str, tmp_path: Path) -> None:
    one = case(name)

    def proof() -> None:
        model = one.tiny()
        with quietly():
            trainer(tmp_path, precision="bf16-mixed", max_steps=2).fit(model, datamodule=one.data())
        assert all(p.isfinite().all() for p in model.parameters())

    one.capability("bf16", proof)


@every_method
def test_compiles(name: str) -> None:
    one = case(name)

    def proof() -> None:
        model, inputs, wanted = traced(one)
        torch.compiler.reset()
        compiled = torch.compile(model.forward)
        with torch.no_grad():
            close(flat(compiled(*inputs)), wanted)

    one.capability("compile", proof)


@every_method
def test_exports(name: str, tmp_path: Path) -> None:
    one = case(name)

    def proof() -> None:
        model, inputs, wanted = traced(one)
        torch.export.save(torch.export.export(model, inputs), tmp_path / "graph.pt2")
        loaded = torch.export.load(tmp_path / "graph.pt2").module()
        with torch.no_grad():
            close(flat(loaded(*inputs)), wanted)

    one.capability("export", proof)


@every_method
def test_exports_to_onnx(name: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    one = case(name)

    def proof() -> None:
        model, inputs, wanted = traced(one)
        path = tmp_path / "graph.onnx"
        torch.onnx.export(model, inputs, str(path), dynamo=True, external_data=False, verbose=False)
        session = onnxruntime.InferenceSession(str(path))
        given = [t for t in inputs if isinstance(t, Tensor)]
        feed = {slot.name: t.numpy() for slot, t in zip(session.get_inputs(), given, strict=True)}
        close([torch.from_numpy(a) for a in session.run(None, feed)], wanted)

    one.capability("onnx", proof)


WORKER = """
import sys, torch
from zoo.testing.contract.case import case, quietly, trainer
one = case(sys.argv[1])
model = one.tiny()
with quietly():
    run = trainer(sys.argv[2], devices=2, strategy=sys.argv[3], max_steps=2)
    run.fit(model, datamodule=one.data())
torch.save({k: v.detach() for k, v in model.named_parameters()}, f"{sys.argv[2]}/rank{run.global_rank}.pt")
"""


@every_method
def test_two_processes_end_with_equal_weights(name: str, tmp_path: Path) -> None:
    one = case(name)

    def proof() -> None:
        script = tmp_path / "worker.py"
        script.write_text(WORKER)
        strategy = one.facts.get("trainer", {}).get("strategy", "ddp")
        done = subprocess.run(
            [sys.executable, str(script), name, str(tmp_path), strategy],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        first, second = (torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1))
        assert same(first, second)
        start = dict(one.tiny().named_parameters())
        assert not same({k: v.detach() for k, v in start.items()}, first)

    one.capability("ddp", proof)
