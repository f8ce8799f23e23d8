"""Settings of the eval section; imports no torch."""

from __future__ import annotations

from pydantic import Field

from ..models.section import Section

__all__ = ["EvalConfig"]


class EvalConfig(Section):
    """Held-out evaluation during training."""

    every: int | None = Field(None, gt=0, description="steps between evaluations; null is never")
    at_end: bool = Field(True, description="evaluate after the last step")
    max_tokens: int | None = Field(None, gt=0, description="positions evaluated of each source; null is all")
