"""The run and train sections, which belong to no single part; imports no torch."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator

from ...models.section import Section

__all__ = ["RunConfig", "TrainConfig", "WatchdogConfig"]


class WatchdogConfig(Section):
    """Seconds a phase may last before it is taken for a hang and ended with the stacks of all ranks; null is never."""

    init_s: float | None = Field(
        1800.0, gt=0, description="from the start to the first step: data, process groups, loading"
    )
    compile_s: float | None = Field(
        3600.0, gt=0, description="the first step, with its compilations"
    )
    step_s: float | None = Field(900.0, gt=0, description="a step, waiting for its data included")
    save_s: float | None = Field(
        3600.0, gt=0, description="a save, as far as training waits for it"
    )
    evaluation_s: float | None = Field(3600.0, gt=0, description="an evaluation")


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

    max_restarts: int = Field(
        10, ge=0, description="failures of a submitted job after which it is not started again"
    )
    deadline_margin_s: float = Field(
        60.0,
        ge=0,
        description="seconds before the end of the job's time, besides those a save takes, at which the run saves and ends",
    )
    watchdog: WatchdogConfig = Field(WatchdogConfig(), description="when a run hangs")

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
    non_finite: Literal["stop", "skip", "rollback"] = Field(
        "stop",
        description="what follows a loss or gradient that is not a number; its update is always withheld",
    )
    non_finite_budget: int = Field(10, ge=0, description="such steps that skip puts up with")
    leave_out: tuple[tuple[int, int], ...] = Field(
        (),
        description="ranges [first, stop) of samples of the run's order that are not trained on; a step that would touch one begins after it",
    )
    spike: Literal["ignore", "stop", "rollback"] = Field(
        "ignore",
        description="what follows a loss that stays above its past: rollback takes up the newest checkpoint before it and leaves the samples out",
    )
    spike_sigmas: float = Field(
        7.0, gt=0, description="deviations from the mean of the last 1000 losses that make a spike"
    )
    spike_steps: int = Field(
        8, gt=0, description="steps in a row above it that spike acts on; shorter ones pass"
    )
    rollback_budget: int = Field(3, ge=0, description="rollbacks of a run before it stops")

    @field_validator("leave_out")
    @classmethod
    def _are_ranges(cls, value: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        for first, stop in value:
            if not 0 <= first < stop:
                raise ValueError(
                    f"[{first}, {stop}] is no range of samples; give [first, stop] with 0 <= first < stop"
                )
        return value

    profile: str | None = Field(
        None,
        description="first:last, steps that are profiled into RUN/profile: a trace, and the memory of a GPU",
    )

    @field_validator("profile")
    @classmethod
    def _profile_is_a_range(cls, value: str | None) -> str | None:
        found = re.fullmatch(r"(\d+):(\d+)", value or "")
        if value is not None and (not found or not 1 <= int(found[1]) <= int(found[2])):
            raise ValueError(f"{value!r} is no range of steps; write first:last, such as 10:12")
        return value

    @property
    def profile_steps(self) -> tuple[int, int] | None:
        """First and last step that are profiled."""
        if self.profile is None:
            return None
        first, last = self.profile.split(":")
        return int(first), int(last)
