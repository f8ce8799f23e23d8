"""What a save costs training: the stall of a background save against a save that is waited for."""

from __future__ import annotations

import statistics
import time
from typing import Any

from ...models import build_task
from ..checkpoint.manager import CheckpointManager
from ..configuration.schema import TrainingConfig
from ..distributed import Topology
from ..engines.build import build_engine

__all__ = ["compare_saves"]

REPEATS = 3


def compare_saves(config: TrainingConfig, topology: Topology) -> dict[str, Any]:
    """Median seconds that training stands still for either kind of save, in turns."""
    engine = build_engine(build_task(config.model), config, topology)
    settings = config.checkpoint.model_copy(update={"keep": 1})
    manager = CheckpointManager(config.run_dir, settings, topology)
    shards = engine.state_shards()
    size = sum(s.tensor.numel() * s.tensor.element_size() for s in shards if s.is_writer)
    waited: list[float] = []
    stalled: list[float] = []
    step = 0
    # The first save also allocates the host buffers; a run does that once.
    for turn in range(REPEATS + 1):
        for times, blocking in ((waited, True), (stalled, False)):
            step += 1
            begin = time.perf_counter()
            manager.save(step, shards, {}, {}, blocking=blocking)
            if turn:
                times.append(time.perf_counter() - begin)
            manager.wait()
    sync_s, stall_s = statistics.median(waited), statistics.median(stalled)
    return {
        "bytes": size,
        "sync_s": sync_s,
        "async_stall_s": stall_s,
        "ratio": stall_s / sync_s,
        "sync_bytes_per_s": size / sync_s,
    }
