"""The run and train sections, which belong to no single part; imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ...models.section import Section

__all__ = ["RunConfig", "TrainConfig"]


class RunConfig(Section):
    """The run itself."""

    name: str = Field(
        "run",
        min_length=1,
        description="name of the run; its folder is runs/NAME unless run.dir is set",
    )
    dir: str | None = Field(None, description="run folder; null is runs/NAME")
    seed: int = Field(0, ge=0, description="everything random derives from it")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto is CUDA where there is one"
    )
    threads: int | None = Field(
        None, gt=0, description="CPU threads of one rank; null leaves it to torch"
    )

    @property
    def folder(self) -> str:
        return self.dir or f"runs/{self.name}"


class TrainConfig(Section):
    """How long and how much at a time."""

    steps: int = Field(1000, gt=0, description="updates of the whole run")
    batch_tokens: int = Field(524_288, gt=0, description="positions of one update, over all ranks")
    micro_batch_tokens: int | None = Field(
        None, gt=0, description="positions a rank runs at once; null is its whole share"
    )
    non_finite: Literal["stop", "skip"] = Field(
        "stop",
        description="what follows a loss or gradient that is not a number; its update is always withheld",
    )
    non_finite_budget: int = Field(10, ge=0, description="such steps that skip puts up with")
