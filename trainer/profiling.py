"""`train.profile=10:12`: a trace of these steps, and on a GPU the history of its memory, into RUN/profile.

Nothing of torch's profiler is imported or started outside the steps that were asked for.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from .configuration.run import TrainConfig
from .distributed import Topology

__all__ = ["StepProfiler"]

MEMORY_EVENTS = 100_000
"""Allocations and frees that the memory snapshot looks back on."""

log = logging.getLogger("weft")


class StepProfiler:
    """Profiles a range of steps on this rank; told by the loop where each step begins and ends.

    Files go to `RUN/profile/rank_00000/`: `steps_00000010_00000012.json`, a Chrome trace (chrome://tracing, Perfetto), and with
    CUDA `...memory.pickle`, a memory history for pytorch.org/memory_viz. A run that ends inside the range, or was resumed in it, leaves
    what it saw.

    Args:
        config: the train section.
        run_dir: the run folder.
        topology: this process's place.
    """

    def __init__(self, config: TrainConfig, run_dir: Path, topology: Topology) -> None:
        self._range = config.profile_steps
        self._folder = run_dir / "profile" / f"rank_{topology.rank:05d}"
        self._has_cuda = topology.device.type == "cuda"
        self._profiler: Any = None
        self._seen: list[int] = []

    def begin(self, step: int) -> None:
        """Called before a step."""
        if self._range is None or not self._range[0] <= step <= self._range[1]:
            return
        if self._profiler is None:
            self._start()
        self._seen.append(step)

    def end(self, step: int) -> None:
        """Called after a step's update."""
        if self._profiler is None:
            return
        self._profiler.step()
        if self._range is not None and step >= self._range[1]:
            self.close()

    def close(self) -> None:
        """Write what was seen; may be called at any time, and more than once."""
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        if self._has_cuda:
            torch.cuda.synchronize()
        profiler.stop()
        stem = f"steps_{self._seen[0]:08d}_{self._seen[-1]:08d}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(self._folder / f"{stem}.json"))
            if self._has_cuda:
                torch.cuda.memory._dump_snapshot(str(self._folder / f"{stem}.memory.pickle"))
        except OSError as error:
            # A full disk costs the trace, not the run.
            log.warning("the profile of steps was not written: %s", error)
        finally:
            if self._has_cuda:
                torch.cuda.memory._record_memory_history(enabled=None)
            self._seen = []

    def _start(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU]
        if self._has_cuda:
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
        self._profiler = profile(activities=activities, record_shapes=True, acc_events=True)
        self._profiler.start()
