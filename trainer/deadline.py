"""When the job's time is over, as the scheduler says, so that a run saves and ends before it is ended. Imports no torch."""

from __future__ import annotations

import os
import re
import subprocess
import time
from datetime import datetime

__all__ = ["Deadline", "job_end_time"]

ASK_AGAIN_S = 600.0
"""The end may be moved while the job runs; asking costs the scheduler's controller something."""


def job_end_time() -> float | None:
    """Unix seconds at which this job is ended, or None where nothing says so.

    `WEFT_JOB_END_TIME` goes first, for schedulers this does not know; then SLURM's own word.
    """
    given = os.environ.get("WEFT_JOB_END_TIME")
    if given:
        return _number(given)
    if "SLURM_JOB_ID" not in os.environ:
        return None
    asked = _ask_slurm(os.environ["SLURM_JOB_ID"])
    return asked or _number(os.environ.get("SLURM_JOB_END_TIME", ""))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _ask_slurm(job: str) -> float | None:
    """What `scontrol` says now: a time limit that was changed since the start is in it."""
    try:
        done = subprocess.run(
            ["scontrol", "show", "job", "-o", job],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"\bEndTime=(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)", done.stdout)
    return datetime.fromisoformat(found[1]).timestamp() if found else None


class Deadline:
    """Whether it is time to save and end.

    Args:
        margin_s: kept free besides what is asked for at each look.
    """

    def __init__(self, margin_s: float) -> None:
        self._margin_s = margin_s
        self._end = job_end_time()
        self._asked = time.monotonic()

    def is_near(self, reserve_s: float) -> bool:
        """Whether less than the margin and `reserve_s` seconds are left."""
        if self._end is None:
            return False
        if not self._is_within(reserve_s):
            if time.monotonic() - self._asked > ASK_AGAIN_S:
                self._ask()
            return False
        # Asked once more before the run ends for it: the limit may have been raised.
        self._ask()
        return self._is_within(reserve_s)

    def _ask(self) -> None:
        self._end, self._asked = job_end_time() or self._end, time.monotonic()

    def _is_within(self, reserve_s: float) -> bool:
        return self._end is not None and time.time() > self._end - self._margin_s - reserve_s
