"""Timing two sides in turn, and peak memory in a process of its own."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

Case = dict[str, Any]
"""One row: name, seconds, peak_mb, error, ratio {peer: peer's seconds / ours}, overhead."""


def in_own_process(run: Callable[[], Case]) -> Case:
    """Run a benchmark in a fresh process and add its peak resident memory in MB."""
    with ProcessPoolExecutor(1, get_context("spawn")) as worker:
        return worker.submit(_with_peak, run).result()


def alternate(
    sides: Mapping[str, Callable[[], object]], rounds: int, *, warm_up: bool = True
) -> dict[str, float]:
    """Median seconds of each side; one unmeasured round, then the sides in turn."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + warm_up):
        for name, run in sides.items():
            begin = time.perf_counter()
            run()
            if number >= warm_up:
                times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def case(name: str, seconds: Mapping[str, float], **facts: Any) -> Case:
    """A row from the seconds of "ours" and of the peers."""
    ours = seconds["ours"]
    ratio = {peer: value / ours for peer, value in seconds.items() if peer != "ours"}
    return {"name": name, "seconds": ours, "error": None, "ratio": ratio, "overhead": None, **facts}


def _with_peak(run: Callable[[], Case]) -> Case:
    result = run()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {**result, "peak_mb": round(peak)}
