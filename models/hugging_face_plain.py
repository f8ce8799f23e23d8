"""What a family's `hugging_face` module says whose checkpoints are one network, stored as ours is; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar

from .section import Section

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["arrange", "companion_runs", "companions", "with_companions"]

Config = TypeVar("Config", bound=Section)


def companions(config: Section) -> dict[str, Section]:
    """Networks whose weights are runs of their own: none."""
    return {}


def companion_runs(config: Section) -> dict[str, str]:
    """Where those runs are: nowhere."""
    return {}


def with_companions(config: Config, runs: Mapping[str, str]) -> Config:
    """The configuration itself."""
    return config


def arrange(name: str, tensor: Tensor, config: Section, *, to_theirs: bool) -> Tensor:
    """The values of a parameter as the other side orders them: the same."""
    return tensor
