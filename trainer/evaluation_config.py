"""Settings of the eval section; imports no torch."""

from __future__ import annotations

from pydantic import Field

from ..models.section import Section

__all__ = ["EvalConfig"]


class EvalConfig(Section):
    """Held-out evaluation, during training and by `weft eval`."""

    every: int | None = Field(None, gt=0, description="steps between evaluations; null is never")
    at_end: bool = Field(True, description="evaluate after the last step")
    ema: bool = Field(
        True,
        description="use the averages of weights where the run keeps them (optimizer.ema_decay); generation goes by this too",
    )
    max_tokens: int | None = Field(
        None, gt=0, description="positions evaluated of each source; null is all"
    )
    batch_tokens: int | None = Field(
        None,
        gt=0,
        description="positions a rank runs at once; null is train.micro_batch_tokens, or 16384",
    )
