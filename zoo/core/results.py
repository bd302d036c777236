"""Measured evidence: ``results/<Name>[@dataset].json``, written by commands, shipped with the package.

One file holds what ``zoo reproduce`` found (claim, checks, every value) and, for the method itself, what
``python -m benchmarks parity`` and ``speed`` found. Nothing here is written by hand.
"""

import ast
import datetime
import functools
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import re
import time
import tokenize
from pathlib import Path
from typing import Any

from zoo.core import catalogue
from zoo.core.files import atomic_write

FOLDER = catalogue.ROOT / "results"
PACKAGES = ("torch", "lightning", "timm", "transformers", "torchmetrics", "torch_geometric", "peft", "numpy")


def path(name: str, folder: Path | None = None) -> Path:
    """Where the evidence of ``Name`` or ``Name@dataset`` stands."""
    return (folder or FOLDER) / f"{name}.json"


def read(name: str, folder: Path | None = None) -> dict[str, Any]:
    """The evidence, ``{}`` where there is none."""
    file = path(name, folder)
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def of(name: str) -> dict[str, dict[str, Any]]:
    """Everything measured of a method, by ``Name`` and ``Name@dataset``."""
    files = sorted((*FOLDER.glob(f"{name}.json"), *FOLDER.glob(f"{name}@*.json")))
    return {file.stem: read(file.stem) for file in files}


def claims(name: str) -> dict[str, dict[str, Any]]:
    """What `zoo reproduce` found of a method, by its label."""
    return {label: evidence for label, evidence in of(name).items() if "holds" in evidence}


def recipe_of(label: str) -> dict[str, Any]:
    """The recipe of ``Name`` or ``Name@dataset`` as it stands now; ``{}`` where there is none any more."""
    name, _, dataset = label.partition("@")
    return catalogue.entry(name).recipes.get(dataset or "default", {})


def record(file: Path, content: dict[str, Any], drop: tuple[str, ...] = ()) -> None:
    """Write ``content`` over the keys that a file has; its other sections stay, less those to ``drop``."""
    old = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    old = {key: value for key, value in old.items() if key not in drop}
    with atomic_write(file) as part:
        part.write_text(json.dumps({**old, **content}, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def fingerprint(name: str) -> str:
    """Hash of the code that makes a method, without comments and docstrings.

    That is its file, its DataModule's, and what these import from their family's folder, from `zoo.nn`, `zoo.data` and
    `zoo.engines`, and so on.
    """
    entry = catalogue.entry(name)
    files = [entry.toml.with_suffix(".py")]
    module = catalogue.datamodules().get(entry.facts["datamodule"])
    if module is not None and module.startswith("zoo."):
        files.append(_file(module))
    package = entry.module.rpartition(".")[0]
    parts = rf"{re.escape(package)}\.\w+|zoo\.(?:nn|data|engines)(?:\.\w+)+"
    digest = hashlib.sha256()
    for file in files:  # grows while it runs
        code = bare(file.read_text(encoding="utf-8")) if file.is_file() else ""
        digest.update(code.encode())
        for used in re.findall(rf"^ *from ({parts}) import", code, re.M):
            folder, _, stem = used.rpartition(".")
            other = entry.toml.with_name(f"{stem}.py") if folder == package else _file(used)
            files += [other] if other not in files else []
    return digest.hexdigest()[:16]


def _file(module: str) -> Path:
    """Where a module of the zoo stands; a package's is its ``__init__.py``."""
    place = catalogue.ROOT.joinpath(*module.split(".")[1:])
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


@functools.lru_cache(maxsize=256)  # every label of a method asks for the same files
def bare(source: str) -> str:
    """Python source without comments, docstrings, blank lines and trailing whitespace.

    They are cut out of the text by their positions, so that every version of Python gives the same.
    """
    lines, tree = source.split("\n"), ast.parse(source)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    cuts = [(t.start, t.end) for t in tokens if t.type == tokenize.COMMENT]
    inside: set[int] = set()  # rows that end within a string: their whitespace counts
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            first, last = node.lineno, node.end_lineno or node.lineno  # ast counts columns in bytes
            start = len(lines[first - 1].encode()[: node.col_offset].decode())
            cuts.append(((first, start), (last, len(lines[last - 1].encode()[: node.end_col_offset].decode()))))
        elif isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str)):
            inside.update(range(node.lineno, node.end_lineno or node.lineno))
    for (first, start), (last, end) in sorted(cuts, reverse=True):
        inside.difference_update(range(first, last))
        lines[first - 1 : last] = [lines[first - 1][:start] + lines[last - 1][end:], *[""] * (last - first)]
    kept = [line if row in inside else line.rstrip() for row, line in enumerate(lines, 1)]
    return "\n".join(line for row, line in enumerate(kept, 1) if line or row in inside)


def recipe_digest(table: dict[str, Any]) -> str:
    """Hash of a recipe, less the cause of its outcome, which is written afterwards."""
    table = {key: value for key, value in table.items() if key != "cause"}
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()[:16]


def is_stale(label: str, evidence: dict[str, Any]) -> bool:
    """Whether the method's files, or the recipe that was run, changed since the evidence was recorded."""
    if not evidence:
        return False
    if "recipe" in evidence and evidence["recipe"] != recipe_digest(recipe_of(label)):
        return True
    seen = (evidence.get("files"), evidence.get("confirmed", {}).get("files"))
    return fingerprint(label.partition("@")[0]) not in seen


@functools.cache
def circumstances() -> dict[str, Any]:
    """Versions and hardware of this run."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"versions": versions, "hardware": _hardware(), "date": datetime.date.today().isoformat()}


def _hardware() -> dict[str, Any]:
    import torch

    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].split(":", 1)[1].strip() if lines else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: dict[str, Any] = {"cpu": model, "cores": cores, "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


class Clock:
    """Seconds since construction."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start
