"""Settings of the deepspeed engine, and the JSON that DeepSpeed gets; imports neither torch nor deepspeed.

The user's own JSON is taken as it is, but for what the run's configuration says: there both must say the same, or the JSON `auto`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ...models.errors import ConfigError
from ...models.section import Section
from ..optimization.config import OptimizerConfig

__all__ = ["DeepSpeedConfig", "Expected", "merge_settings", "read_settings", "zero_layout"]

DEFAULT_STAGE = 2
KEY = "parallel.deepspeed.config"


class DeepSpeedConfig(Section):
    """DeepSpeed's ZeRO."""

    zero_stage: Literal[1, 2, 3] | None = Field(
        None,
        description="what is split over ranks: moments and master weights (1), gradients too (2), weights too (3); null is what the JSON says, else 2",
    )
    offload_optimizer: Literal["none", "cpu"] | None = Field(
        None, description="where master weights and moments are; null is what the JSON says"
    )
    offload_parameters: Literal["none", "cpu"] | None = Field(
        None, description="stage 3: where weights wait to be used; null is what the JSON says"
    )
    config: str | dict[str, Any] | None = Field(
        None, description="DeepSpeed's own JSON: a path, or its content"
    )


class Expected(Section):
    """What the run's configuration says about things that a DeepSpeed JSON may say too."""

    batch_rows: int
    micro_batch_rows: int
    micro_batches: int
    compute: Literal["fp32", "bf16"]
    optimizer: OptimizerConfig


def read_settings(config: DeepSpeedConfig) -> dict[str, Any]:
    """The user's JSON; empty where there is none.

    Raises:
        ConfigError: no such file, or no JSON object in it.
    """
    if config.config is None:
        return {}
    if isinstance(config.config, dict):
        return copy.deepcopy(config.config)
    path = Path(config.config)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{KEY}: {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{KEY}: {path} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{KEY}: {path} holds a {type(found).__name__}, expected a JSON object")
    return found


def merge_settings(config: DeepSpeedConfig, expected: Expected) -> dict[str, Any]:
    """The JSON for `deepspeed.initialize`.

    Raises:
        ConfigError: the user's JSON says something else than the run's configuration, or what Weft does not do.
    """
    settings = read_settings(config)
    _check_batch(settings, expected)
    _check_optimizer(settings, expected.optimizer)
    _check_precision(settings, expected.compute)
    _merge_zero(config, settings)
    return settings | {
        # Weft calls backward for each micro-batch and tells DeepSpeed which one is the last.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # Clipping and withholding happen in the optimizer that Weft hands over.
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": expected.compute == "bf16"},
        # Weft reduces in fp32 whatever it computes in.
        "communication_data_type": "fp32",
        "steps_per_print": settings.get("steps_per_print", 2**31),
    }


def zero_layout(config: DeepSpeedConfig) -> tuple[int, str]:
    """(ZeRO stage, what lives on the host: `none`, `optimizer` or `all`), for a plan.

    Raises:
        ConfigError: as `merge_settings`.
    """
    zero = _merge_zero(config, read_settings(config))
    if "offload_param" in zero:
        return zero["stage"], "all"
    return zero["stage"], "optimizer" if "offload_optimizer" in zero else "none"


def _merge_zero(config: DeepSpeedConfig, settings: dict[str, Any]) -> dict[str, Any]:
    zero: dict[str, Any] = settings.setdefault("zero_optimization", {})
    stage = _agree(
        "zero_optimization.stage",
        zero.get("stage"),
        "parallel.deepspeed.zero_stage",
        config.zero_stage,
    )
    zero["stage"] = DEFAULT_STAGE if stage is None else stage
    if zero["stage"] not in (1, 2, 3):
        raise ConfigError(
            f"{KEY}: zero_optimization.stage is {zero['stage']}; choose 1, 2 or 3, or parallel.engine=torch, which is stage 0 as ddp"
        )
    _offload(zero, "offload_optimizer", "offload_optimizer", config.offload_optimizer)
    _offload(zero, "offload_param", "offload_parameters", config.offload_parameters)
    if "offload_param" in zero and zero["stage"] != 3:
        raise ConfigError(
            f"parallel.deepspeed.offload_parameters needs stage 3, this is stage {zero['stage']}; set parallel.deepspeed.zero_stage=3"
        )
    return zero


def _agree(theirs_name: str, theirs: Any, ours_name: str, ours: Any) -> Any:
    """What both say, or the one that says anything.

    Raises:
        ConfigError: they differ.
    """
    if theirs is None or theirs == "auto":
        return ours
    if ours is not None and theirs != ours:
        raise ConfigError(
            f'{KEY}: {theirs_name} is {theirs} but {ours_name} is {ours}; make them equal, or write "auto" in the JSON'
        )
    return theirs


def _check_batch(settings: dict[str, Any], expected: Expected) -> None:
    for name, ours_name, ours in (
        ("train_batch_size", "train.batch_tokens / data.sequence_length", expected.batch_rows),
        (
            "train_micro_batch_size_per_gpu",
            "train.micro_batch_tokens / data.sequence_length",
            expected.micro_batch_rows,
        ),
        (
            "gradient_accumulation_steps",
            "the number of micro-batches of a rank and step",
            expected.micro_batches,
        ),
    ):
        _agree(name, settings.pop(name, None), ours_name, ours)


def _check_optimizer(settings: dict[str, Any], ours: OptimizerConfig) -> None:
    if settings.pop("scheduler", None) not in (None, {}):
        raise ConfigError(f"{KEY}: it has a scheduler; Weft's is the schedule section: take it out")
    clip = settings.pop("gradient_clipping", None)
    _agree("gradient_clipping", clip, "optimizer.clip_grad_norm", ours.clip_grad_norm or 0.0)
    optimizer = settings.pop("optimizer", None)
    if not optimizer:
        return
    kind = str(optimizer.get("type", "AdamW"))
    if kind.lower() not in ("adam", "adamw"):
        raise ConfigError(f"{KEY}: optimizer.type is {kind}; Weft trains with AdamW: take it out")
    parameters = optimizer.get("params", {})
    for name, ours_name, value in (
        ("lr", "optimizer.lr", ours.lr),
        ("eps", "optimizer.eps", ours.eps),
        ("weight_decay", "optimizer.weight_decay", ours.weight_decay),
        ("betas", "optimizer.betas", list(ours.betas)),
    ):
        _agree(f"optimizer.params.{name}", parameters.get(name), ours_name, value)


def _check_precision(settings: dict[str, Any], compute: str) -> None:
    if _is_on(settings.pop("fp16", None)):
        raise ConfigError(
            f"{KEY}: fp16 is enabled; Weft computes in fp32 or bf16 with fp32 master weights: take it out and set precision.compute=bf16"
        )
    section = settings.pop("bf16", settings.pop("bfloat16", None))
    if isinstance(section, Mapping) and section.get("enabled") not in (None, "auto"):
        _agree("bf16.enabled", _is_on(section), "precision.compute=bf16", compute == "bf16")


def _is_on(section: Any) -> bool:
    return isinstance(section, Mapping) and str(section.get("enabled", False)).lower() == "true"


def _offload(zero: dict[str, Any], theirs: str, ours: str, value: str | None) -> None:
    section = dict(zero.get(theirs) or {})
    name = f"zero_optimization.{theirs}.device"
    device = _agree(name, section.get("device"), f"parallel.deepspeed.{ours}", value) or "none"
    if device == "none":
        zero.pop(theirs, None)
        return
    if device != "cpu":
        raise ConfigError(
            f"{KEY}: {name} is {device}; Weft offloads to the cpu: choose cpu or none"
        )
    zero[theirs] = section | {"device": device}
