"""What this process's allocator does with memory that is freed."""

import ctypes
import os
import sys

TRIM, MMAP = -1, -3
"""glibc's M_TRIM_THRESHOLD, and M_MMAP_THRESHOLD: larger blocks are the system's own, and go back to it at once."""


def hold_memory(mib: int = 1024) -> bool:
    """Let the process keep up to so much freed memory, in blocks of up to a quarter of it, instead of asking the system
    for it anew at every step.

    On a CPU the pages of a large network's gradients and temporaries are otherwise faulted in again and again: a round
    of two clients of TwinSight with ResNet-18s took 1.4 s, and 1.0 s since. The command calls this; a program of your
    own may. Linux with glibc: nothing happens elsewhere, nor where the environment has settings of its own
    (``MALLOC_...``, ``GLIBC_TUNABLES``).

    Returns:
        whether it is so now.
    """
    own = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if own or not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(TRIM, mib * 2**20)) and bool(mallopt(MMAP, mib * 2**18))
