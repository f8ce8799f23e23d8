"""Times as ratios: ours and each peer on the same inputs, in turns, in one process.

On a GPU: CUDA events, medians, inputs that rotate through more memory than the L2 cache holds. The floor is what the
device's own copy reaches in the same run, so no data sheet enters. On the CPU: the clock, medians.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ....kernels.faces import use_kernels
from .case import Case, Inputs, Run

__all__ = ["copy_bytes_per_s", "measure_case"]

ROTATION_BYTES = 256 << 20
"""More than any L2 cache so far, several times over."""
MAX_SETS = 8
REPEATS = {"cuda": 15, "cpu": 5}
WARM_UP = {"cuda": 3, "cpu": 1}
PEER_SECONDS = 20.0
"""A peer whose first call takes longer is measured once."""


def copy_bytes_per_s(device: torch.device) -> float:
    """Read plus written bytes a second of a large copy."""
    source = torch.empty((1 << 30) if device.type == "cuda" else (64 << 20), device=device).byte()
    target = torch.empty_like(source)
    seconds = _median_seconds(lambda i: target.copy_(source), device, REPEATS[device.type])
    return 2 * source.numel() / seconds


def measure_case(case: Case, device: torch.device, copy_speed: float) -> list[dict[str, Any]]:
    """One record for each pass and peer, a record for ours first.

    Returns:
        Records with `op`, `size`, `pass`, `side`, `seconds` or `problem`; ours with `error` (relative RMS to float64),
        `bytes_per_s` and `of_copy`; peers with `ratio`, their seconds over ours.
    """
    torch.manual_seed(0)
    error = _error(case, device)
    sets = _rotation(case, device)
    records: list[dict[str, Any]] = []
    ours = _both_passes(case, case.ours, sets, device)
    for name, seconds in ours.items():
        record: dict[str, Any] = {"op": case.op, "size": case.size, "pass": name, "side": "weft"}
        record |= {"seconds": seconds, "error": error}
        count = case.forward_bytes if name == "forward" else case.backward_bytes
        if count is not None:
            speed = count(sets[0]) / seconds
            record |= {"bytes_per_s": speed, "of_copy": speed / copy_speed}
        if case.host_free and device.type == "cuda":
            record["waits"] = _host_waits(case, sets[0])
        records.append(record)
    for peer, run in case.peers.items():
        records += _peer_records(case, peer, run, sets, device, ours)
    del sets
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return records


def _peer_records(
    case: Case,
    peer: str,
    run: Run | str,
    sets: Sequence[Inputs],
    device: torch.device,
    ours: dict[str, float],
) -> list[dict[str, Any]]:
    base = {"op": case.op, "size": case.size, "side": peer}
    if isinstance(run, str):
        return [{**base, "pass": "forward", "problem": run}]
    try:
        theirs = _both_passes(case, run, sets, device)
    except Exception as error:
        # A peer that breaks is a result, not the end of the table.
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return [{**base, "pass": "forward", "problem": f"failed: {first[:120]}"}]
    return [
        {**base, "pass": name, "seconds": s, "ratio": s / ours[name]} for name, s in theirs.items()
    ]


def _rotation(case: Case, device: torch.device) -> list[Inputs]:
    first = case.make(device, False)
    size = sum(t.numel() * t.element_size() for t in first.values() if isinstance(t, Tensor))
    count = max(1, min(MAX_SETS, ROTATION_BYTES // max(1, size) + 1))
    return [first, *(case.make(device, False) for _ in range(count - 1))]


def _both_passes(
    case: Case, run: Run, sets: Sequence[Inputs], device: torch.device
) -> dict[str, float]:
    repeats = REPEATS[device.type]
    begin = time.perf_counter()
    run(sets[0])
    _wait(device)
    if time.perf_counter() - begin > PEER_SECONDS:
        repeats = 1
    found = {"forward": _median_seconds(lambda i: run(sets[i % len(sets)]), device, repeats)}
    if not case.has_backward:
        return found
    leaves = [_leaves(inputs) for inputs in sets]
    outputs: list[Tensor] = []

    def forward(i: int) -> None:
        outputs[:] = [run(sets[i % len(sets)])]

    gradient = torch.randn_like(run(sets[0]))

    def backward(i: int) -> None:
        torch.autograd.grad(outputs[0], leaves[i % len(sets)], gradient, allow_unused=True)

    found["backward"] = _median_seconds(backward, device, repeats, before=forward)
    return found


def _leaves(inputs: Inputs) -> list[Tensor]:
    return [t for t in inputs.values() if isinstance(t, Tensor) and t.requires_grad]


def _median_seconds(
    work: Callable[[int], Any],
    device: torch.device,
    repeats: int,
    before: Callable[[int], None] | None = None,
) -> float:
    times = []
    warm_up = WARM_UP[device.type] if repeats > 1 else 0
    for i in range(warm_up + repeats):
        if before is not None:
            before(i)
        times.append(_seconds(work, i, device))
    return statistics.median(times[warm_up:])


def _seconds(work: Callable[[int], Any], i: int, device: torch.device) -> float:
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        work(i)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    start = time.perf_counter()
    work(i)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _host_waits(case: Case, inputs: Inputs) -> bool:
    """Whether a pass asked the device for a value, which CUDA's own check turns into an error."""
    with _sync_is_an_error():
        try:
            out = case.ours(inputs)
            if case.has_backward:
                torch.autograd.grad(out, _leaves(inputs), torch.ones_like(out), allow_unused=True)
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            return True
    return False


@contextmanager
def _sync_is_an_error() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _error(case: Case, device: torch.device) -> float | None:
    """Largest relative RMS distance of the output and of each gradient to the definition in float64."""
    if case.oracle is None:
        return None
    inputs = case.make(device, True)
    exact = {name: _to_double(value) for name, value in inputs.items()}
    gradient = torch.randn_like(case.ours(inputs))
    found = _outputs(case, case.ours, inputs, gradient)
    if case.oracle == "face":
        with use_kernels("reference"):
            expected = _outputs(case, case.ours, exact, gradient)
    else:
        expected = _outputs(case, case.oracle, exact, gradient)
    pairs = zip(found, expected, strict=True)
    return max(_distance(a, b) for a, b in pairs if a is not None and b is not None)


def _outputs(case: Case, run: Run, inputs: Inputs, gradient: Tensor) -> list[Tensor | None]:
    """The result and, where there is one, the gradient of each leaf."""
    out = run(inputs)
    if not case.has_backward:
        return [out]
    leaves = _leaves(inputs)
    return [
        out,
        *torch.autograd.grad(out, leaves, gradient.to(out.dtype), allow_unused=True),
    ]


def _to_double(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def _distance(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach(), expected.detach()
    size = expected.double().norm()
    difference = (found.double() - expected.double()).norm()
    return float(difference / size) if size > 0 else float(difference)
