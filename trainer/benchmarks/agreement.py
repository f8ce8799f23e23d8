"""What it costs that ranks agree on a stop before every step, and that a watchdog looks after them."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from ..configuration.run import WatchdogConfig
from ..distributed import Topology
from ..policies import StopRequest
from ..watchdog import Watchdog

__all__ = ["measure_agreement"]

COUNTS = 3
"""Integers of a step that travel anyway: a count of targets, bytes, the data's digest."""
FLAGS = 1
"""What stopping, saving and going back add to them, packed."""
REDUCTIONS = 1000
ROUNDS, CALLS = 15, 40


def measure_agreement(topology: Topology) -> dict[str, float]:
    """Collective: seconds a step, medians; both reductions take turns call by call, so that a noisy machine treats them alike."""
    plain, whole = [1] * COUNTS, [1] * (COUNTS + FLAGS)
    without, with_flags = [], []
    for _ in range(REDUCTIONS):
        without.append(_seconds(lambda: topology.sum_integers(plain), 1))
        with_flags.append(_seconds(lambda: topology.sum_integers(whole), 1))
    with tempfile.TemporaryDirectory() as folder, StopRequest(Path(folder)) as stop:
        limits = WatchdogConfig()
        with Watchdog(limits, Path(folder), attempt=1) as watchdog:

            def look() -> None:
                watchdog.enter("step")
                stop.is_asked()
                stop.take_save()

            looks = [_seconds(look, CALLS) for _ in range(ROUNDS)]
    return {
        "reduction_s": statistics.median(with_flags),
        "reduction_without_s": statistics.median(without),
        "look_s": statistics.median(looks),
    }


def _seconds(call: Callable[[], object], times: int) -> float:
    begin = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - begin) / times
