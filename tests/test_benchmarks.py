"""What the measuring scripts ask of the zoo: they run for hours, and not in CI."""

import ast
import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SCRIPTS = sorted(BENCHMARKS.rglob("*.py"))


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.relative_to(BENCHMARKS).as_posix())
def test_what_a_script_imports_is_there(file: Path) -> None:
    """Also within functions, which may come to it after hours only."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in ("zoo", "benchmarks"):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")
