"""Layouts of a run that fit, fastest first. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ...models.errors import ConfigError
from ..configuration.checks import check_against_world
from ..configuration.schema import TrainingConfig

if TYPE_CHECKING:
    from ..plan import Plan

__all__ = ["change_config", "describe", "propose_layouts"]

RECOMPUTATION = ("none", "selective", "block")


def propose_layouts(
    config: TrainingConfig, gpus: int, plan: Callable[[TrainingConfig, int], Plan], most: int = 3
) -> list[tuple[dict[str, Any], Plan]]:
    """Changes to the configuration that make the run fit, with their plans, fastest first.

    For each strategy and recomputation the largest micro-batch that fits stands for all smaller ones, which send more.
    """
    found: list[tuple[dict[str, Any], Plan]] = []
    for strategy in _strategies(gpus):
        for recompute in RECOMPUTATION:
            base = {**strategy, "parallel.activation_checkpointing": recompute}
            first = next(_fitting(config, gpus, base, plan), None)
            if first is not None:
                found.append(first)
    found.sort(
        key=lambda item: (item[1].step_seconds, item[1].communication.total, item[1].memory.total)
    )
    return found[:most]


def _fitting(
    config: TrainingConfig,
    gpus: int,
    base: dict[str, Any],
    plan: Callable[[TrainingConfig, int], Plan],
) -> Iterator[tuple[dict[str, Any], Plan]]:
    share, length = config.train.batch_tokens // gpus, config.data.sequence_length
    rows = share // length
    for count in (n for n in range(rows, 0, -1) if rows % n == 0):
        changes = {**base, "train.micro_batch_tokens": count * length}
        changed = change_config(config, changes)
        try:
            check_against_world(changed, gpus)
        except ConfigError:
            continue
        made = plan(changed, gpus)
        if made.fits:
            yield changes, made


def _strategies(gpus: int) -> Iterator[dict[str, Any]]:
    if gpus == 1:
        yield _strategy("single")
        return
    yield _strategy("ddp")
    yield _strategy("fsdp")
    shard = 2
    while shard < gpus:
        if gpus % shard == 0:
            yield _strategy("hsdp", shard)
        shard *= 2


def _strategy(name: str, shard_ranks: int | None = None) -> dict[str, Any]:
    return {
        "parallel.strategy": name,
        "parallel.shard_ranks": shard_ranks,
        "parallel.replicate_ranks": None,
    }


def change_config(config: TrainingConfig, changes: dict[str, Any]) -> TrainingConfig:
    """The configuration with some dotted keys replaced."""
    for key, value in changes.items():
        section, name = key.split(".")
        part = getattr(config, section).model_copy(update={name: value})
        config = config.model_copy(update={section: part})
    return config


def describe(config: TrainingConfig, changes: dict[str, Any]) -> str:
    """The changes as overrides to type; what the configuration has already is left out."""
    words = []
    for key, value in changes.items():
        section, name = key.split(".")
        if getattr(getattr(config, section), name) != value:
            words.append(f"{key}={'null' if value is None else value}")
    return " ".join(words)
