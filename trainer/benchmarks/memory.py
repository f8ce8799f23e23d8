"""Peak bytes of real engine steps on one rank, beside what `weft plan` says of the same run.

On a GPU the allocator counts for itself. On a CPU nothing does, and the process's resident memory has the interpreter, the
libraries and what malloc holds back in it; there the profiler is told of every allocation torch makes, which gives the same
figure as `torch.cuda.max_memory_allocated`. Buffers inside gloo, oneDNN and MKL are torch's on neither.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ...models import build_task
from ...models.batch import PackedBatch
from ..configuration.checks import check_against_world
from ..configuration.schema import TrainingConfig
from ..distributed import Topology
from ..engines.build import build_engine
from ..plan import Hardware, plan_run

__all__ = ["measure_memory"]

STEPS = 3


def measure_memory(config: TrainingConfig, topology: Topology) -> dict[str, Any]:
    """Collective: peak bytes of this rank over whole steps, and the plan's bytes for it.

    Batches are made up: one document a row, every position a target.

    Returns:
        `peak_bytes`, `held_bytes` (between steps), `planned_bytes`, `ratio` (planned / measured), and what was measured.

    Raises:
        ConfigError: the batch or the mesh does not divide over these ranks.
    """
    check_against_world(config, topology.world_size)
    is_cuda = topology.device.type == "cuda"
    peak, held = (_on_cuda if is_cuda else _on_cpu)(config, topology)
    plan = plan_run(config, topology.world_size, Hardware())
    planned = plan.memory.allocated
    return {
        "strategy": plan.strategy,
        "ranks": topology.world_size,
        "recomputation": config.parallel.activation_checkpointing,
        "micro_batches": plan.micro_batches,
        "parameters": sum(plan.parameters.values()),
        "peak_bytes": peak,
        "held_bytes": held,
        "planned_bytes": planned,
        "ratio": planned / peak,
        "device": torch.cuda.get_device_name() if is_cuda else "cpu",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _steps(config: TrainingConfig, topology: Topology) -> Iterator[None]:
    """Build the engine, then run steps; yields when it is built and after each step."""
    task = build_task(config.model)
    engine = build_engine(task, config, topology)
    yield
    rows = config.batch_rows // engine.data_ranks
    length = config.data.sequence_length
    micro = (config.train.micro_batch_tokens or rows * length) // length
    for step in range(STEPS):
        first = step * config.batch_rows + engine.data_rank * rows
        batches = [
            _make_batch(config, first + i, min(micro, rows - i)) for i in range(0, rows, micro)
        ]
        counts = {
            name: engine.data_ranks * sum(task.counts(batch)[name] for batch in batches)
            for name in task.counts(batches[0])
        }
        for phase in task.phases(step + 1):
            engine.forward_backward(phase, batches, counts)
            engine.step(phase, 1e-4)
        yield


def _make_batch(config: TrainingConfig, first_sample: int, rows: int) -> PackedBatch:
    length = config.data.sequence_length
    model: Any = config.model
    generator = torch.Generator().manual_seed(first_sample)
    ids = torch.randint(0, model.vocab_size, (rows, length + 1), generator=generator)
    return PackedBatch(
        tokens=ids[:, :-1].flatten(),
        targets=ids[:, 1:].flatten(),
        position_ids=torch.arange(length).repeat(rows),
        cu_seqlens=torch.arange(0, rows * length + 1, length, dtype=torch.int32),
        max_seqlen=length,
        row_length=length,
        sample_ids=tuple(range(first_sample, first_sample + rows)),
        source_ids=(0,) * rows,
        target_count=rows * length,
    )


def _on_cuda(config: TrainingConfig, topology: Topology) -> tuple[int, int]:
    steps = _steps(config, topology)
    next(steps)
    torch.cuda.reset_peak_memory_stats()
    for _ in steps:
        torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()


def _on_cpu(config: TrainingConfig, topology: Topology) -> tuple[int, int]:
    """Follow each block of memory through the profiler's record of allocations and releases."""
    marks: list[int] = []
    profile = torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    )
    with _quiet():
        profile.start()
    try:
        for _ in _steps(config, topology):
            marks.append(time.time_ns())
    finally:
        with _quiet():
            profile.stop()
    tree = profile.profiler.kineto_results.experimental_event_tree()  # type: ignore[union-attr]
    return _least_peak(sorted(_allocations(tree)), marks)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Standard error goes nowhere: the profiler announces its start and stop there, from C++."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _least_peak(events: Sequence[tuple[int, int, int]], marks: Sequence[int]) -> tuple[int, int]:
    """(the smallest of the steps' peaks, what is held as they begin).

    gloo lets go of its buffers in threads of its own, and where it is the last to do so the profiler does not see it. A block whose
    address is given out anew is known to be gone, and so is, when a step ends, all that was not there when the first
    began. What is left of this within a step is by chance, and only adds.

    Args:
        events: (time, address, bytes; negative for a release), in order.
        marks: when the engine was built, and when each step ended.
    """
    live: dict[int, int] = {}
    total, peaks = 0, list[int]()
    lasting: dict[int, int] | None = None
    ends = iter([*marks, float("inf")])
    end = next(ends)
    for moment, address, change in events:
        while moment > end:
            end = next(ends)
            lasting = dict(live) if lasting is None else lasting
            live, total = dict(lasting), sum(lasting.values())
            peaks.append(total)
        total -= live.pop(address, 0)
        if change > 0:
            live[address] = change
            total += change
        if peaks:
            peaks[-1] = max(peaks[-1], total)
    return min(peaks[: len(marks) - 1]), sum((lasting or {}).values())


def _allocations(tree: list[Any]) -> Iterator[tuple[int, int, int]]:
    """(time, address, bytes; negative for a release) of every one on the host, in no order."""
    waiting = list(tree)
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        fields = event.extra_fields
        if hasattr(fields, "total_allocated") and fields.device.type == "cpu":
            yield event.start_time_ns, fields.ptr, fields.alloc_size
