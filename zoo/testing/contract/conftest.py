"""What the contract brings along, wherever it runs: no network, and the second tier only on demand."""

import os
from pathlib import Path

for _threads in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_threads, "1")  # tiny models: more threads only wait for each other

import pytest  # noqa: E402

from zoo.testing.offline import no_network  # noqa: E402

__all__ = ["no_network"]  # a fixture for every test here


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: the second tier (bf16, compile, export, ONNX, two processes); -m slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where the project's own settings don't choose with ``-m``: the first tier only."""
    if not config.option.markexpr:
        here = Path(__file__).parent
        late = [i for i in items if i.path.is_relative_to(here) and i.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=late)
        items[:] = [i for i in items if i not in late]
