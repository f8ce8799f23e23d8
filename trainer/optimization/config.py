"""Settings of the optimizer and the learning-rate schedule; imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ...models.section import Section

__all__ = ["OptimizerConfig", "ScheduleConfig"]


class OptimizerConfig(Section):
    """AdamW with decoupled decay; the defaults are OLMo 2's."""

    lr: float = Field(4e-4, gt=0, description="peak learning rate")
    betas: tuple[float, float] = Field(
        (0.9, 0.95), description="decay of the first and second moment"
    )
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(0.1, ge=0, description="decoupled: p *= 1 - lr * weight_decay")
    clip_grad_norm: float | None = Field(
        1.0, gt=0, description="largest global gradient norm; null is no clipping"
    )
    ema_decay: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="decay of a moving average of the weights, which evaluation and generation then use; null keeps none",
    )
    sparse_lr_scale: float = Field(1.0, gt=0, description="factor on the rate of row-sparse tables")
    skip_step: bool = Field(
        False, description="withhold updates whose loss or gradient norm is an outlier (OLMo 2 32B)"
    )
    skip_step_window: int = Field(
        128, ge=2, description="earlier steps an outlier is measured against"
    )
    skip_step_minimum: int = Field(
        64, ge=3, description="values held, the newest included, before the rule applies"
    )
    skip_step_std: float = Field(
        6.0, gt=0, description="standard deviations above the mean that make an outlier"
    )


class ScheduleConfig(Section):
    """Learning rate as a function of tokens; exactly one unit (steps or tokens) for each length."""

    kind: Literal["cosine", "linear", "wsd", "constant"] = Field(
        "cosine",
        description="cosine to final_fraction, linear to zero, warm-up/stable/decay, or constant",
    )
    warmup_steps: int | None = Field(None, ge=0, description="linear warm-up, in steps")
    warmup_tokens: int | None = Field(None, ge=0, description="linear warm-up, in tokens")
    horizon_steps: int | None = Field(
        None, gt=0, description="length of the schedule in steps; null is train.steps"
    )
    horizon_tokens: int | None = Field(None, gt=0, description="length of the schedule in tokens")
    final_fraction: float = Field(
        0.1, ge=0, le=1, description="share of the peak that cosine ends on"
    )
    decay_fraction: float = Field(
        0.1, gt=0, le=1, description="share of the horizon that wsd decays over, to zero"
    )

    @model_validator(mode="after")
    def _one_unit(self) -> ScheduleConfig:
        for what in ("warmup", "horizon"):
            if (
                getattr(self, f"{what}_steps") is not None
                and getattr(self, f"{what}_tokens") is not None
            ):
                raise ValueError(f"give {what}_steps or {what}_tokens, not both")
        return self
