"""How fast a run goes: step times, tokens a second, waiting share, and FLOPs against the hardware's peak.

Rates belong to a flush, not to a step: a host that queues work for a GPU sees step times that mean
little alone and add up to the truth. Imports no torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["StepClock", "add_rates", "peak_flops"]

PEAK_BF16_FLOPS = (
    ("B200", 2250e12),
    ("GH200", 989.5e12),
    ("H200", 989.5e12),
    ("H100 PCIE", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989.5e12),
    ("H800", 989.5e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("L40S", 362e12),
    ("A40", 149.7e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("A6000", 154.8e12),
    ("RTX 4090", 165.2e12),
    ("RTX 3090", 71e12),
    ("L4", 121e12),
    ("MI300X", 1307.4e12),
    ("V100", 125e12),
)
"""Dense matrix peak by a part of the device's name, first match; vendors' data sheets, without sparsity."""


def peak_flops(device_name: str | None) -> float | None:
    """Dense bf16 peak of one device, in FLOP/s.

    Args:
        device_name: as `torch.cuda.get_device_name` gives it; None on CPU.

    Returns:
        None for a CPU or an unknown device, for which no MFU is reported.
    """
    words = (device_name or "").upper()
    return next((peak for part, peak in PEAK_BF16_FLOPS if part in words), None)


class StepClock:
    """Wall time of steps, and of the run over all its attempts.

    Args:
        seconds: what earlier attempts took.
        now: the clock, in seconds.
    """

    def __init__(self, seconds: float = 0.0, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._start = now() - seconds
        self._last = now()

    def total(self) -> float:
        """Seconds of the run so far, earlier attempts included."""
        return self._now() - self._start

    def lap(self, wait_s: float) -> dict[str, float]:
        """Values of the step that ends now; `wait_s` of it went on waiting for data."""
        now = self._now()
        step_s, self._last = now - self._last, now
        return {"step_s": step_s, "data_wait_s": wait_s, "seconds": now - self._start}

    def restart_lap(self) -> None:
        """The next step begins now: what came since the last one (an evaluation, a save) was no step."""
        self._last = self._now()


def add_rates(
    records: Sequence[dict[str, Any]], tokens: int, flops: float, peak: float | None
) -> None:
    """Add `tokens_per_s`, and `mfu` where a peak is known, to the records of one flush.

    Args:
        records: with `step_s` each.
        tokens: positions of one step over all ranks.
        flops: of one step over all ranks.
        peak: FLOP/s of all devices together, None where it is not known.
    """
    seconds = sum(record["step_s"] for record in records)
    if seconds <= 0:
        return
    steps_per_s = len(records) / seconds
    rates = {"tokens_per_s": steps_per_s * tokens}
    if peak:
        rates["mfu"] = steps_per_s * flops / peak
    for record in records:
        record.update(rates)
