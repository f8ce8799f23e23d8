"""How long a part of the steps takes on the device, without waiting for it: events on a GPU, the clock elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch

__all__ = ["PartTimer"]

EVERY = 8
"""Calls a GPU is timed once in: an event is cheap and not free."""


class PartTimer:
    """Times some of the calls of one part of a step; the others are taken to be alike."""

    def __init__(self) -> None:
        self._calls = self._timed = 0
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def measure(self, device: torch.device) -> Iterator[None]:
        """Count what runs inside, and perhaps time it."""
        self._calls += 1
        if device.type != "cuda":
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started
            self._timed += 1
            return
        if (self._calls - 1) % EVERY or torch.cuda.is_current_stream_capturing():
            yield
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        self._events.append((start, end))

    def take(self) -> float:
        """Seconds of all calls since the last `take`; asks for events that have happened, and waits for none."""
        for start, end in self._events:
            if end.query():
                self._seconds += start.elapsed_time(end) / 1e3
                self._timed += 1
        seconds = self._seconds / self._timed * self._calls if self._timed else 0.0
        self._calls = self._timed = 0
        self._seconds, self._events = 0.0, []
        return seconds
