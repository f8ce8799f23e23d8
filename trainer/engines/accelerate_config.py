"""Settings of the accelerate engine; imports neither torch nor accelerate."""

from __future__ import annotations

from pydantic import Field

from ...models.section import Section

__all__ = ["AccelerateConfig"]


class AccelerateConfig(Section):
    """What Weft takes from Hugging Face Accelerate."""

    config_file: str | None = Field(
        None,
        description="file that `accelerate config` wrote; null is what `accelerate launch` put into the environment",
    )
