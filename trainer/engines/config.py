"""Settings of the parallel and precision sections; imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ...models.section import Section
from .accelerate_config import AccelerateConfig
from .deepspeed_config import DeepSpeedConfig

__all__ = ["ParallelConfig", "PrecisionConfig"]


class ParallelConfig(Section):
    """How the run is spread over ranks."""

    engine: Literal["torch", "deepspeed", "accelerate"] = Field(
        "torch", description="what runs the step"
    )
    strategy: Literal["auto", "single", "ddp", "fsdp", "hsdp"] = Field(
        "auto", description="auto: single for one rank, ddp on CPU, fsdp on several GPUs"
    )
    shard_ranks: int | None = Field(
        None, gt=0, description="hsdp: ranks that share one copy of the weights"
    )
    replicate_ranks: int | None = Field(
        None, gt=0, description="hsdp: number of copies of the weights"
    )
    sequence_ranks: int = Field(
        1,
        gt=0,
        description="ranks that share every row, each with a stretch of it, for long sequences (engine torch, family mamba)",
    )
    reduce_gradients: Literal["last", "each"] = Field(
        "last",
        description="fsdp, hsdp: after the last micro-batch only, which keeps whole gradients on every rank till then, or after each, which communicates more and keeps a part",
    )
    activation_checkpointing: Literal["none", "block", "selective"] = Field(
        "none",
        description="recompute nothing, whole blocks, or all but matrix products, attention and scans",
    )
    compile: bool = Field(False, description="torch.compile each block")
    timeout_s: float = Field(1800.0, gt=0, description="longest wait of a collective, in seconds")
    deepspeed: DeepSpeedConfig = Field(DeepSpeedConfig(), description="engine deepspeed")
    accelerate: AccelerateConfig = Field(AccelerateConfig(), description="engine accelerate")


class PrecisionConfig(Section):
    """Master weights, moments and reductions are always fp32."""

    compute: Literal["fp32", "bf16"] = Field(
        "fp32", description="type of activations and matrix products"
    )
