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
one, folder, strategy, devices, samples = case(sys.argv[1]), *sys.argv[2:4], *map(int, sys.argv[4:])
model = one.tiny()
with quietly():
    run = trainer(folder, devices=devices, strategy=strategy, max_steps=2)
    run.fit(model, datamodule=one.data(**({"batch_size": samples} if samples else {})))
found = {k: v.detach() for k, v in model.state_dict().items()}
torch.save(found, f"{folder}/rank{run.global_rank}.pt")
"""


def fitted(one: Case, folder: Path, strategy: str, devices: int, samples: int = 0) -> list[dict[str, Tensor]]:
    """The states that the processes of a fit end with; ``samples`` a batch each, where that can be chosen."""
    folder.mkdir()
    script = folder / "worker.py"
    script.write_text(WORKER)
    done = subprocess.run(
        [sys.executable, str(script), one.name, str(folder), strategy, str(devices), str(samples)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [torch.load(folder / f"rank{r}.pt", weights_only=True) for r in range(devices)]


@every_method
def test_two_processes_end_with_equal_weights(name: str, tmp_path: Path) -> None:
    """A method without a parameter to train ends with what one process makes of all data, also in its buffers."""
    one = case(name)

    def proof() -> None:
        model = one.tiny()
        trained = any(p.requires_grad for p in model.parameters())
        kept = dict(model.named_parameters()) if trained else model.state_dict()
        strategy = one.facts.get("trainer", {}).get("strategy", "ddp")
        states = fitted(one, tmp_path / "two", strategy, devices=2)
        first, second = ({key: state[key] for key in kept} for state in states)
        assert same(first, second)
        assert not same({key: value.detach() for key, value in kept.items()}, first)
        if not trained:
            samples = 2 * one.sample.batch_size if not one.sample.whole else 0
            (alone,) = fitted(one, tmp_path / "one", "auto", devices=1, samples=samples)
            assert same(first, alone, 1e-4), "two processes fit something else than one"

    one.capability("ddp", proof)
