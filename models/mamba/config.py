"""Settings, parameter counts and FLOPs of dense Mamba and Mixture-of-Mamba; imports no torch.

d is the width of the stream, E = expand d the inner width, N states a channel, R the rank of the step sizes, M modalities.
With one modality this is Mamba (arXiv 2312.00752); with several, each has projections of its own (arXiv 2501.16295),
while convolution, states and recurrence stay common. A named layer is `blocks_per_layer` Mamba blocks in a row.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from ..multimodal.settings import MultimodalConfig
from ..section import Section

__all__ = ["Config", "SplitConfig"]

DEBUG_LAYERS = 2
DEBUG_WIDTH = 64


class SplitConfig(Section):
    """Which parameters of a block each modality has for itself."""

    in_proj: bool = Field(True, description="W_in, which makes the scan's input and the gate")
    x_proj: bool = Field(
        True, description="W_x, which makes the low-rank step size and the matrices B and C"
    )
    dt_proj: bool = Field(True, description="W_dt and the bias of the step size")
    out_proj: bool = Field(True, description="W_out, back to the stream")
    norm: bool = Field(False, description="weights of the RMS norm before the block")


NO_SPLIT = SplitConfig(in_proj=False, x_proj=False, dt_proj=False, out_proj=False, norm=False)


class Config(MultimodalConfig):
    """A stack of Mamba blocks over packed documents."""

    can_cut_rows: ClassVar[bool] = True
    """Whether `parallel.sequence_ranks` may be above 1."""
    family: Literal["mamba"] = Field("mamba", description="module under weft.models")
    n_layers: int = Field(24, gt=0, description="layers, as the size is named")
    blocks_per_layer: int = Field(
        1, gt=0, description="Mamba blocks in a layer: 1 as Mamba counts, 2 as Mixture-of-Mamba"
    )
    d_state: int = Field(16, gt=0, description="states of a channel")
    d_conv: int = Field(4, ge=2, le=4, description="taps of the causal convolution")
    expand: int = Field(2, gt=0, description="inner width over d_model")
    dt_rank: int | Literal["auto"] = Field(
        "auto", description="rank of the step sizes; auto is d_model / 16, rounded up"
    )
    split: SplitConfig | None = Field(
        None,
        description="what each modality has for itself; null is the four projections, or nothing with one modality",
    )
    rescale_out: bool = Field(
        True, description="W_out starts smaller by the root of the number of blocks"
    )
    compat_drop_dt_bias: bool = Field(
        False,
        description="leave the bias out of step sizes where dt_proj is shared, as the released Mixture-of-Mamba code does",
    )
    norm_eps: float = Field(1e-5, gt=0, description="added to the mean square")
    residual_fp32: bool = Field(
        True, description="the residual stream is fp32, whatever products are computed in"
    )
    init_std: float = Field(0.02, gt=0, description="standard deviation of embeddings at the start")
    dt_min: float = Field(1e-3, gt=0, description="smallest step size at the start")
    dt_max: float = Field(0.1, gt=0, description="largest step size at the start")
    dt_floor: float = Field(1e-4, gt=0, description="step sizes at the start are at least this")
    decay_embedding: bool = Field(
        False, description="weight decay on the input embedding; a tied one decays as the head does"
    )
    upcycle_from: str | None = Field(
        None,
        description="a run of a dense Mamba of the same size, whose weights every modality starts from",
    )

    @model_validator(mode="after")
    def _check(self) -> Config:
        if len(self.modalities) == 1 and self.split not in (None, NO_SPLIT):
            raise ValueError(
                "split is given but there is one modality; name several in modalities, or leave split out"
            )
        if self.dt_min > self.dt_max:
            raise ValueError(f"dt_min {self.dt_min} is above dt_max {self.dt_max}")
        return self

    @property
    def n_blocks(self) -> int:
        return self.n_layers * self.blocks_per_layer

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    @property
    def rank(self) -> int:
        return math.ceil(self.d_model / 16) if self.dt_rank == "auto" else self.dt_rank

    @property
    def splits(self) -> SplitConfig:
        """What is split, with the default filled in."""
        if self.split is not None:
            return self.split
        return NO_SPLIT if len(self.modalities) == 1 else SplitConfig()

    @property
    def has_dt_bias(self) -> bool:
        is_shared = not self.splits.dt_proj
        return not (self.compat_drop_dt_bias and is_shared)

    def dense(self) -> Config:
        """The same size with one set of weights."""
        changed = {
            "modalities": ("text",),
            "split": None,
            "image": None,
            "upcycle_from": None,
            "compat_drop_dt_bias": not self.has_dt_bias,
        }
        return Config(**{**self.model_dump(), **changed})

    def debug_size(self) -> Config:
        """The smallest model that still runs every part of this one, for `weft debug RECIPE`."""
        small: dict[str, Any] = {"n_layers": min(self.n_layers, DEBUG_LAYERS)}
        small |= self.shared_debug_size()
        if self.d_model > DEBUG_WIDTH:
            small["d_model"] = DEBUG_WIDTH
            if self.dt_rank != "auto":
                small["dt_rank"] = max(1, round(self.dt_rank * DEBUG_WIDTH / self.d_model))
        return Config(**{**self.model_dump(), **small})

    def projection_parameters(self) -> dict[str, int]:
        """Of one block and one modality, by the names of `split`; products with the first four are its linear work."""
        d, inner, rank = self.d_model, self.d_inner, self.rank
        return {
            "in_proj": 2 * inner * d,
            "x_proj": inner * (rank + 2 * self.d_state),
            "dt_proj": inner * rank,
            "out_proj": d * inner,
        }

    def count_parameters(self) -> dict[str, int]:
        """Exact parameter counts by part; the values add up to the model.

        Source: arXiv 2501.16295; a dense block is `6.25 d^2 + 111 d` at the usual N = 16, R = d / 16 and expand = 2.
        """
        inner = self.d_inner
        parts = {**self.projection_parameters(), "norm": self.d_model}
        parts["dt_proj"] += inner if self.has_dt_bias else 0
        copies = {name: len(self.modalities) if getattr(self.splits, name) else 1 for name in parts}
        shared = inner * (self.d_conv + 1) + inner * self.d_state + inner
        block = shared + sum(count * copies[name] for name, count in parts.items())
        return {
            **self.count_shared_parameters(),
            "blocks": self.n_blocks * block,
            "final_norm": self.d_model,
        }

    def flops_per_token(self, sequence_length: int) -> float:
        """Training FLOPs of one position, three times the forward pass: products, convolution, scan, and what is around.

        The scan is 9 E N + 4 E, the convention of Gu and Dao; routing, norms and lookups count as zero. Neither the number of
        modalities nor the length of the sequence is in it.
        """
        inner = self.d_inner
        linears = 2 * sum(self.projection_parameters().values())
        mixing = 2 * self.d_conv * inner + 9 * inner * self.d_state + 4 * inner
        return 3.0 * (self.n_blocks * (linears + mixing) + self.shared_forward_flops())
