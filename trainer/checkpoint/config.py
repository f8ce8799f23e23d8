"""Settings of the checkpoint section; imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ...models.section import Section

__all__ = ["CheckpointConfig"]


class CheckpointConfig(Section):
    """When to save, what to keep, where to start from."""

    every: int | None = Field(
        1000, gt=0, description="steps between saves; null saves at the end only"
    )
    keep: int = Field(2, ge=1, description="newest checkpoints kept")
    keep_best: int = Field(
        0,
        ge=0,
        description="checkpoints of the lowest held-out loss kept besides; those saved at a step that was evaluated count",
    )
    permanent_every: int | None = Field(
        None, gt=0, description="steps between checkpoints that are never removed"
    )
    asynchronous: bool = Field(
        True, description="write in the background; training goes on meanwhile"
    )
    start_from: str | None = Field(
        None, description="run folder or checkpoint whose weights a new run starts from"
    )
    start_from_parts: Literal["weights", "weights_and_optimizer"] = Field(
        "weights", description="what is taken from start_from; the data order always starts anew"
    )
    max_failed_saves: int = Field(
        3, ge=1, description="failed saves in a row after which the run stops"
    )
    timeout_s: float = Field(
        1800.0, gt=0, description="how long to wait for other ranks' files, in seconds"
    )
