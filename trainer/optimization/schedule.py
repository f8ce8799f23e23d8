"""The learning rate of a step: a pure function, so that a resumed run cannot drift.

The first update is step 1 and is given `t = step * batch_tokens`, as OLMo and OLMo-core do, hence no
update ever runs at rate 0 during warm-up.
"""

from __future__ import annotations

import math

from .config import ScheduleConfig

__all__ = ["learning_rate"]


def learning_rate(
    schedule: ScheduleConfig, peak: float, step: int, batch_tokens: int, steps: int
) -> float:
    """Rate of update `step` (the first is 1).

    Args:
        peak: the optimizer's learning rate.
        batch_tokens: tokens of one step.
        steps: the run's length, the horizon where the schedule names none.
    """
    t = float(step * batch_tokens)
    warmup = _in_tokens(schedule.warmup_steps, schedule.warmup_tokens, batch_tokens, 0)
    horizon = _in_tokens(schedule.horizon_steps, schedule.horizon_tokens, batch_tokens, steps)
    if t < warmup:
        return peak * t / warmup
    if schedule.kind == "constant":
        return peak
    if schedule.kind == "cosine":
        floor = schedule.final_fraction * peak
        progress = min(1.0, (t - warmup) / max(1.0, horizon - warmup))
        return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2
    if schedule.kind == "linear":
        return peak * max(0.0, 1.0 - (t - warmup) / max(1.0, horizon - warmup))
    decay = schedule.decay_fraction * horizon
    return peak * min(1.0, max(0.0, (horizon - t) / decay))


def _in_tokens(
    in_steps: int | None, in_tokens: int | None, batch_tokens: int, default_steps: int
) -> float:
    if in_tokens is not None:
        return float(in_tokens)
    return float((default_steps if in_steps is None else in_steps) * batch_tokens)
