"""Settings, parameter counts and FLOPs of the autoregressive image family; imports no torch.

A class-conditional transformer over the codes of an image tokenizer, in raster order. The defaults are LlamaGen-B's
(arXiv 2406.06525 and its released code) at 256 codes an image.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from ..section import Section

__all__ = ["Config"]

DEBUG_LAYERS = 2
DEBUG_WIDTH = 64
DEBUG_HEAD_WIDTH = 16
DEBUG_CHUNK_TOKENS = 256


class Config(Section):
    """A decoder-only transformer that continues a class with the codes of an image."""

    family: Literal["image_ar"] = Field("image_ar", description="module under weft.models")
    codebook_size: int = Field(16384, gt=1, description="codes of the tokenizer")
    classes: int = Field(
        1000, gt=0, description="image classes; the table has one more row for none"
    )
    grid: int = Field(16, gt=0, description="codes in a row of an image; an image has grid * grid")
    n_layers: int = Field(12, gt=0, description="blocks")
    d_model: int = Field(768, gt=0, description="width of the residual stream")
    n_heads: int = Field(12, gt=0, description="attention heads")
    d_ff: int = Field(2048, gt=0, description="hidden width of the SwiGLU")
    norm_eps: float = Field(1e-5, gt=0, description="added to the mean square")
    rope_theta: float = Field(10_000.0, gt=0, description="base of the rotary wavelengths")
    class_rotation: Literal["zero", "identity"] = Field(
        "zero",
        description="what the class position's queries and keys are multiplied with: zero as in the released models, where every position scores 0 against it, or nothing",
    )
    label_dropout: float = Field(
        0.1, ge=0, le=1, description="share of the images whose class is hidden, for guidance"
    )
    dropout: float = Field(
        0.1, ge=0, lt=1, description="on embeddings, attention outputs and SwiGLU outputs"
    )
    init_std: float = Field(
        0.02, gt=0, description="standard deviation at the start; the head starts at zero"
    )
    loss_chunk_tokens: int | None = Field(
        None,
        gt=0,
        description="compute logits and loss for this many positions at a time; null is all at once",
    )
    attention: Literal["auto", "sdpa", "flex", "varlen"] = Field(
        "auto", description="attention backend; auto picks by device"
    )

    @model_validator(mode="after")
    def _check_shapes(self) -> Config:
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model {self.d_model} is not a multiple of n_heads {self.n_heads}")
        if self.head_width % 4:
            raise ValueError(
                f"head width {self.head_width} is not a multiple of 4; half of its pairs turn by row and half by column"
            )
        return self

    @property
    def head_width(self) -> int:
        return self.d_model // self.n_heads

    @property
    def image_tokens(self) -> int:
        """Codes of an image."""
        return self.grid**2

    def debug_size(self) -> Config:
        """The smallest model that still runs every part of this one; codebook, classes and grid are the data's."""
        small: dict[str, Any] = {"n_layers": min(self.n_layers, DEBUG_LAYERS)}
        if self.loss_chunk_tokens:
            small["loss_chunk_tokens"] = min(self.loss_chunk_tokens, DEBUG_CHUNK_TOKENS)
        if self.d_model > DEBUG_WIDTH:
            shrink = self.d_model / DEBUG_WIDTH
            small |= {
                "d_model": DEBUG_WIDTH,
                "n_heads": DEBUG_WIDTH // DEBUG_HEAD_WIDTH,
                "d_ff": max(16, round(self.d_ff / shrink / 16) * 16),
            }
        return Config(**{**self.model_dump(), **small})

    def count_parameters(self) -> dict[str, int]:
        """Exact parameter counts by part; the values add up to the model."""
        d = self.d_model
        return {
            "embedding": self.codebook_size * d,
            "classes": (self.classes + 1) * d,
            "blocks": self.n_layers * (4 * d * d + 3 * d * self.d_ff + 2 * d),
            "final_norm": d,
            "head": self.codebook_size * d,
        }

    def flops_per_token(self, sequence_length: int) -> float:
        """Training FLOPs of one position: `6*(blocks + norm + head) + 12*L*d*S`, no causal discount; lookups are free."""
        counts = self.count_parameters()
        multiplied = counts["blocks"] + counts["final_norm"] + counts["head"]
        return 6.0 * multiplied + 12 * self.n_layers * self.d_model * sequence_length
