"""The whole configuration of a run: each part's own section, composed.

A section's class stands beside the code that reads it; `model` is whatever `Config` the family's
`weft.models.FAMILY.config` has. Checks that span sections are in `checks.py`.
"""

from __future__ import annotations

import importlib
import importlib.util
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
from .recipes import DEFAULT_FAMILY
from .run import RunConfig, TrainConfig

__all__ = ["TrainingConfig", "list_families", "model_section"]


def list_families() -> list[str]:
    """Model families: packages under `weft.models` that have a `config` module."""
    package = importlib.import_module("...models", package=__package__)
    return sorted(
        item.name
        for item in pkgutil.iter_modules(package.__path__)
        if item.ispkg and importlib.util.find_spec(f"{package.__name__}.{item.name}.config")
    )


def model_section(family: str) -> type[Section]:
    """The configuration class of a model family: `Config` in `weft.models.FAMILY.config`.

    Raises:
        ConfigError: there is no such family.
    """
    families = list_families()
    if family not in families:
        near = get_close_matches(family, families, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there is {', '.join(families)}"
        raise ConfigError(
            f"model.family: there is no model family {family!r} under weft.models; {hint}"
        )
    return importlib.import_module(f"...models.{family}.config", package=__package__).Config


class TrainingConfig(Section):
    """Everything a run is made of."""

    run: RunConfig = Field(RunConfig(), description="the run itself")
    model: SerializeAsAny[Section] = Field(..., description="what is trained, by family")
    data: DataConfig = Field(DataConfig(), description="what it is trained on")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="how weights are updated")
    schedule: ScheduleConfig = Field(ScheduleConfig(), description="learning rate over time")
    train: TrainConfig = Field(TrainConfig(), description="how long and how much at a time")
    parallel: ParallelConfig = Field(
        ParallelConfig(), description="how the run is spread over ranks"
    )
    precision: PrecisionConfig = Field(PrecisionConfig(), description="number formats")
    checkpoint: CheckpointConfig = Field(
        CheckpointConfig(), description="when to save, what to keep"
    )
    logging: LoggingConfig = Field(LoggingConfig(), description="where measurements go")
    eval: EvalConfig = Field(EvalConfig(), description="held-out evaluation")

    @field_validator("model", mode="before")
    @classmethod
    def _dispatch_model(cls, value: Any) -> Any:
        if isinstance(value, Section):
            return value
        data = dict(value or {})
        return model_section(data.get("family", DEFAULT_FAMILY)).model_validate(data)

    @property
    def run_dir(self) -> Path:
        return Path(self.run.folder)

    @property
    def batch_rows(self) -> int:
        """Samples of one update, over all ranks."""
        return self.train.batch_tokens // self.data.sequence_length

    def dump(self) -> dict[str, Any]:
        """Plain data (no tuples), complete, in the order of the sections."""
        return self.model_dump(mode="json")
