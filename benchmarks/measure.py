"""Differences, and time and memory of a few calls beside each other."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor


def error(ours: Tensor, theirs: Tensor) -> float:
    """max |ours - theirs| / max |theirs|."""
    ours, theirs = ours.detach(), theirs.detach()
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12))


@contextlib.contextmanager
def float64(wanted: bool = True) -> Iterator[None]:
    """New tensors and networks are of double precision within, if ``wanted``."""
    torch.set_default_dtype(torch.float64 if wanted else torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def in_turns(runs: Mapping[str, Callable[[], Any]], device: str = "cpu", rounds: int = 3) -> dict[str, float]:
    """Median milliseconds and peak MiB of each call: ``{"ours_ms": ..., "ours_mib": ..., "authors_ms": ...}``."""
    times = timed(runs, device, rounds)
    return times | {f"{who}_mib": peak(run, device) for who, run in runs.items()}


def without(run: Callable[[], Any], changes: Mapping[str, tuple[Any, str, Any]]) -> dict[str, Callable[[], Any]]:
    """A call with one change taken back each time, for `in_turns`, whose rows then say what each change gains.

    ``changes``: by name an object, its attribute, and the plain form that ours replaced.
    """

    def back(change: tuple[Any, str, Any]) -> Callable[[], None]:
        def call() -> None:
            with mock.patch.object(*change):
                run()

        return call

    return {f"without_{name}": back(change) for name, change in changes.items()}


def timed(runs: Mapping[str, Callable[[], Any]], device: str = "cpu", rounds: int = 3) -> dict[str, float]:
    """Median milliseconds of each call, after two to warm up: ``{"ours_ms": ..., "authors_ms": ...}``.

    The calls take turns, so that a change of the machine's load falls on all. On the CPU with one thread it is the
    process's own time, which others' load does not enter.
    """
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {who: [] for who in runs}
    for turn in range(rounds + 2):
        for who, run in runs.items():
            start = clock()
            run()
            if device != "cpu":
                torch.cuda.synchronize()
            if turn > 1:
                times[who].append(1e3 * (clock() - start))
    return {f"{who}_ms": statistics.median(values) for who, values in times.items()}


def peak(run: Callable[[], Any], device: str = "cpu") -> float:
    """Peak MiB of a call above what was held before, on the CPU by the allocator's records. Warm it up first."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    held = most = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most / 2**20
