"""Settings of the logging section; imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ...models.section import Section

__all__ = ["LoggingConfig", "WandbConfig"]


class WandbConfig(Section):
    """Weights & Biases; the run keeps one id over all its attempts."""

    enabled: bool = Field(False, description="send metrics to Weights & Biases")
    project: str = Field("weft", min_length=1, description="project name")
    entity: str | None = Field(None, description="team or user; null is the key's own")
    mode: Literal["auto", "online", "offline"] = Field(
        "auto",
        description="auto: WANDB_MODE where it is set, else online with a key and offline without",
    )


class LoggingConfig(Section):
    """How often values leave the device, and where they go besides metrics.jsonl."""

    every: int = Field(
        10, gt=0, description="steps between flushes; every step gets its own record all the same"
    )
    progress: Literal["auto", "bar", "lines", "none"] = Field(
        "auto", description="live bar on a terminal, one line a flush elsewhere"
    )
    wandb: WandbConfig = Field(WandbConfig(), description="Weights & Biases")
    tensorboard: bool = Field(False, description="write TensorBoard events to RUN/tensorboard")
