"""What the allocator keeps."""

import os
import subprocess
import sys

import pytest

from zoo.core.memory import hold_memory

FAULTS = """
import resource, sys
from zoo.core.memory import hold_memory
if len(sys.argv) > 1:
    assert hold_memory()
def step():
    blocks = [bytearray(40 << 20) for _ in range(4)]
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*given: str, **env: str) -> int:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    call = [sys.executable, "-c", FAULTS, *given]
    return int(subprocess.run(call, capture_output=True, text=True, check=True, env={**clean, **env}).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux") or not hold_memory(), reason="needs Linux with glibc")
def test_freed_memory_is_not_faulted_in_again() -> None:
    pages = 5 * 4 * (40 << 20) // os.sysconf("SC_PAGESIZE")
    assert faults("hold") < pages / 20 < pages / 2 < faults()


def test_the_environments_settings_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert not hold_memory()
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    assert not hold_memory()
