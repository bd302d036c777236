"""What all tests share: a Hub on loopback instead of the internet, no network, and where real data lies.

The environment is set here, before anything imports huggingface_hub: the client reads it once.
"""

import importlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

for _threads in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_threads, "1")
# Lightning's progress bars and tips would drown what a failing test prints.
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
assert "huggingface_hub" not in sys.modules, "a plugin imported huggingface_hub before this file could set it up"

import pytest  # noqa: E402

from zoo.testing import LoopbackHub  # noqa: E402
from zoo.testing.offline import no_network  # noqa: E402

__all__ = ["no_network"]  # a fixture for every test here

_home = tempfile.TemporaryDirectory(prefix="zoo-tests-")  # removed at exit
_server = LoopbackHub().start()
os.environ.update(_server.environ(_home.name))
for _name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
    os.environ.pop(_name, None)


# ---- the Hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hf_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty client cache for this test and the processes it starts."""
    from huggingface_hub import constants

    home = tmp_path / "hf"
    for name, value in _server.environ(home).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "HF_HOME", str(home))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    return home


@pytest.fixture
def hub(hf_home: Path) -> Iterator[LoopbackHub]:
    """The Hub that the client of this process talks to, empty and without faults, with an empty client cache."""
    _server.clear()
    yield _server
    _server.clear()


# ---- a method of another package -------------------------------------------------------------------------------------

EXTERN = Path(__file__).parent / "extern"


@pytest.fixture
def extern(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Registers `zoo_dummy` through the entry point for one test, here and in the processes that the test starts."""
    from zoo.core import catalogue

    site = tmp_path_factory.mktemp("site")
    info = site / "zoo_dummy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: zoo-dummy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[zoo.methods]\nAffine = zoo_dummy.affine:Affine\n")
    for path in (EXTERN, site):
        monkeypatch.syspath_prepend(path)
    python = os.pathsep.join([str(site), str(EXTERN), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", python.rstrip(os.pathsep))
    catalogue.entries.cache_clear()
    catalogue.datamodules.cache_clear()
    yield EXTERN / "zoo_dummy"
    monkeypatch.undo()
    catalogue.entries.cache_clear()
    catalogue.datamodules.cache_clear()


@pytest.fixture
def Affine(extern: Path) -> Any:
    """The class of `zoo_dummy`."""
    return importlib.import_module("zoo_dummy.affine").Affine


@pytest.fixture
def python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs code in a process of its own, with this test's environment and more."""

    def run(code: str, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env={**os.environ, **environ},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


# ---- data and markers ------------------------------------------------------------------------------------------------


@pytest.fixture
def zoo_data() -> Callable[[str], Path]:
    """``zoo_data("cora")``: the folder of a real dataset under ``$ZOO_DATA``; skips the test where it is missing."""

    def find(name: str) -> Path:
        root = os.environ.get("ZOO_DATA")
        if not root:
            pytest.skip(f"needs the real data set {name!r}: ZOO_DATA is not set")
        folder = Path(root).expanduser() / name
        if not folder.is_dir() or not any(folder.iterdir()):
            pytest.skip(f"needs the real data set {name!r}: {folder} is missing or empty")
        return folder

    return find


def pytest_configure(config: pytest.Config) -> None:
    """The markers of pyproject.toml, for a run with another configuration file."""
    known = {line.partition(":")[0] for line in config.getini("markers")}
    for name, meaning in (("slow", "the second tier; run with -m slow"), ("gpu", "needs an accelerator")):
        if name not in known:
            config.addinivalue_line("markers", f"{name}: {meaning}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none; leave out methods that are not this run's turn."""
    if config.getoption("--second-tier") == "changed":
        chosen = _chosen(config.getoption("--since"))
        for item in items:
            name = getattr(getattr(item, "callspec", None), "params", {}).get("name")
            if item.get_closest_marker("slow") and isinstance(name, str) and name[:1].isupper() and name not in chosen:
                item.add_marker(pytest.mark.skip(reason="not this run's turn in the second tier"))
    needy = [item for item in items if item.get_closest_marker("gpu")]
    if needy:
        import torch

        if not torch.cuda.is_available():
            for item in needy:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


# ---- which methods the second tier runs on ---------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--second-tier",
        choices=("all", "changed"),
        default="all",
        help="slow tests of all methods, or of those whose files changed since --since and a tenth of the others",
    )
    parser.addoption("--since", help="the commit that `--second-tier=changed` compares with; by default a day ago's")


REFERENCE = {"Regformer", "LAGNN", "NESCL", "GlocalIB", "AttentionSVM", "HRP", "LocalPrompt"}
"""Seven methods of seven shapes: what a change to the base is tried on."""


def _chosen(since: str | None) -> set[str]:
    """Methods for the second tier: changed ones, the reference ones after a change to shared code, a tenth in turn."""
    import subprocess
    import time

    from zoo.core import catalogue

    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True).stdout

    since = since or git("rev-list", "-1", "--before=1 day ago", "HEAD").strip()
    changed = git("diff", "--name-only", since).split() if since else None
    names = catalogue.names()
    if changed is None:  # nothing older to compare with
        return set(names)
    turn = int(time.time() // 86_400) % 10
    chosen = set(names[turn::10])
    if any(path.startswith(("zoo/core/", "zoo/nn/", "zoo/testing/")) for path in changed):
        chosen |= REFERENCE & set(names)
    for name in names:
        toml = catalogue.entry(name).toml
        folder = str(toml.parent.relative_to(root)) if toml.is_relative_to(root) else None
        if folder and any(path.startswith(f"{folder}/{toml.stem}.") or f"{folder}/data_" in path for path in changed):
            chosen.add(name)
    return chosen


@pytest.hookimpl(trylast=True)
def pytest_report_header(config: pytest.Config) -> str | None:
    if config.getoption("--second-tier") == "changed":
        return f"second tier: {', '.join(sorted(_chosen(config.getoption('--since'))))}"
    return None
