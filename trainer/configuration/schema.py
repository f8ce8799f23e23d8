"""The whole configuration of a run: each part's own section, and the checks that span several."""

from __future__ import annotations

import importlib
import importlib.util
import json
import pkgutil
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import Field, SerializeAsAny, field_validator

from ...models.errors import ConfigError
from ...models.section import Section
from ..checkpoint.config import CheckpointConfig
from ..data.config import DataConfig
from ..engines.config import ParallelConfig, PrecisionConfig
from ..evaluation_config import EvalConfig
from ..metrics.config import LoggingConfig
from ..optimization.config import OptimizerConfig, ScheduleConfig
from .run import RunConfig, TrainConfig

__all__ = ["TrainingConfig", "check_against_world", "cross_field_errors", "model_section"]

BYTE_VOCABULARY_SIZE = 260


def model_section(family: str) -> type[Section]:
    """The configuration class of a model family: `Config` in `weft.models.FAMILY.config`.

    Raises:
        ConfigError: there is no such family.
    """
    package = importlib.import_module("...models", package=__package__)
    families = sorted(
        item.name
        for item in pkgutil.iter_modules(package.__path__)
        if item.ispkg and importlib.util.find_spec(f"{package.__name__}.{item.name}.config")
    )
    if family not in families:
        near = get_close_matches(family, families, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(families)}"
        raise ConfigError(f"model.family {family!r} does not exist; {hint}")
    return importlib.import_module(f"{package.__name__}.{family}.config").Config


class TrainingConfig(Section):
    """Everything a run is made of."""

    run: RunConfig = Field(RunConfig(), description="the run itself")
    model: SerializeAsAny[Section] = Field(..., description="the model, by family")
    data: DataConfig = Field(DataConfig(), description="what is trained on")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="updates")
    schedule: ScheduleConfig = Field(ScheduleConfig(), description="learning rate over time")
    train: TrainConfig = Field(TrainConfig(), description="how long and how much at a time")
    parallel: ParallelConfig = Field(ParallelConfig(), description="how the run is spread over ranks")
    precision: PrecisionConfig = Field(PrecisionConfig(), description="number formats")
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="when to save, what to keep")
    logging: LoggingConfig = Field(LoggingConfig(), description="where measurements go")
    eval: EvalConfig = Field(EvalConfig(), description="held-out evaluation")

    @field_validator("model", mode="before")
    @classmethod
    def _dispatch_model(cls, value: Any) -> Any:
        if isinstance(value, Section):
            return value
        data = dict(value or {})
        return model_section(data.get("family", "transformer")).model_validate(data)

    @property
    def run_dir(self) -> Path:
        return Path(self.run.folder)

    @property
    def batch_rows(self) -> int:
        """Samples of one update, over all ranks."""
        return self.train.batch_tokens // self.data.sequence_length

    def dump(self) -> dict[str, Any]:
        """Plain data, complete, in the order of the sections."""
        return json.loads(self.model_dump_json())


def cross_field_errors(config: TrainingConfig) -> list[str]:
    """What cannot work although each value alone is fine; one line each, naming the key first."""
    found = []
    train, data, schedule = config.train, config.data, config.schedule
    if train.batch_tokens % data.sequence_length:
        near = max(1, round(train.batch_tokens / data.sequence_length)) * data.sequence_length
        found.append(
            f"train.batch_tokens: {train.batch_tokens} is not a multiple of data.sequence_length "
            f"{data.sequence_length}; the nearest is {near}"
        )
    if train.micro_batch_tokens and train.micro_batch_tokens % data.sequence_length:
        found.append(
            f"train.micro_batch_tokens: {train.micro_batch_tokens} is not a multiple of "
            f"data.sequence_length {data.sequence_length}"
        )
    total = train.steps * train.batch_tokens
    warmup = schedule.warmup_tokens or (schedule.warmup_steps or 0) * train.batch_tokens
    horizon = schedule.horizon_tokens or (schedule.horizon_steps or train.steps) * train.batch_tokens
    if warmup >= horizon:
        found.append(f"schedule.warmup: {warmup} tokens of warm-up do not fit in a horizon of {horizon} tokens")
    if schedule.kind in ("linear", "wsd") and horizon < total:
        found.append(
            f"schedule.horizon: {schedule.kind} reaches zero after {horizon} tokens but the run has {total}; "
            "raise the horizon or lower train.steps"
        )
    vocab_size = getattr(config.model, "vocab_size", None)
    if data.vocabulary == "bytes" and vocab_size is not None and vocab_size < BYTE_VOCABULARY_SIZE:
        found.append(f"model.vocab_size: {vocab_size} is less than the {BYTE_VOCABULARY_SIZE} ids of data.vocabulary bytes")
    if getattr(config.model, "ngram", None) and data.vocabulary != "bytes":
        found.append("model.ngram: hashed byte n-grams need data.vocabulary=bytes")
    if config.parallel.strategy != "hsdp" and (config.parallel.shard_ranks or config.parallel.replicate_ranks):
        found.append("parallel.shard_ranks: shard_ranks and replicate_ranks need parallel.strategy=hsdp")
    return found


def check_against_world(config: TrainingConfig, world_size: int) -> None:
    """Check what depends on the number of ranks.

    Raises:
        ConfigError: the mesh or the batch does not divide.
    """
    rows = config.batch_rows
    if rows % world_size:
        raise ConfigError(
            f"train.batch_tokens: {rows} samples of {config.data.sequence_length} do not divide over "
            f"{world_size} ranks; use a multiple of {world_size * config.data.sequence_length} tokens"
        )
    share = rows // world_size * config.data.sequence_length
    micro = config.train.micro_batch_tokens
    if micro and share % micro:
        raise ConfigError(
            f"train.micro_batch_tokens: {micro} does not divide a rank's share of {share} tokens on {world_size} ranks"
        )
    parallel = config.parallel
    if parallel.strategy == "single" and world_size > 1:
        raise ConfigError(f"parallel.strategy=single but there are {world_size} ranks; use ddp, fsdp, hsdp or auto")
    if parallel.strategy == "hsdp":
        shard = parallel.shard_ranks or world_size // (parallel.replicate_ranks or 1)
        copies = parallel.replicate_ranks or world_size // shard
        if shard * copies != world_size:
            raise ConfigError(
                f"parallel: a mesh of {copies} copies x {shard} shards is {copies * shard} ranks "
                f"but the world has {world_size}; set shard_ranks and replicate_ranks to a product of {world_size}"
            )
