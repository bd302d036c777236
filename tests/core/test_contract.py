"""The contract on another package's method, run as its authors run it: from their own folder, on what is installed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def contract(folder: Path, *options: str) -> tuple[int, set[str], str]:
    """Exit status, the tests that failed, and what was printed."""
    command = [sys.executable, "-m", "pytest", "--pyargs", "zoo.testing.contract", "-k", "Affine", "-rf", "-q"]
    done = subprocess.run([*command, *options], cwd=folder, capture_output=True, text=True, timeout=280)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    return done.returncode, {line.split("::")[1].split("[")[0] for line in lines}, done.stdout + done.stderr


@pytest.mark.parametrize(("options", "count"), [((), 20), pytest.param(("-m", "slow"), 5, marks=pytest.mark.slow)])
def test_a_method_of_another_package_passes(extern: Path, tmp_path: Path, options: tuple[str, ...], count: int) -> None:
    status, failed, text = contract(tmp_path, *options)
    assert (status, failed) == (0, set()), text
    assert int(text.split(" passed")[0].split()[-1]) >= count and "skipped" not in text


def test_planted_defects_are_found(extern: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(extern, tmp_path / "zoo_dummy")
    file = tmp_path / "zoo_dummy" / "affine.py"
    code = file.read_text()
    for old, new in (
        ("x = self.norm(x)", "x = self.norm(x).detach()"),
        ('"logits": logits,', '"logits": logits + 1e-3,'),
    ):
        assert old in code
        code = code.replace(old, new)
    file.write_text(code)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}")
    status, failed, text = contract(tmp_path)
    assert status == 1, text
    assert failed == {"test_every_parameter_gets_a_gradient", "test_predict_step_equals_predict"}, text
