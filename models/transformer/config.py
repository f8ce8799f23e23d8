"""Settings, parameter counts and FLOPs of the transformer family; imports no torch.

The defaults are OLMo 2's (arXiv 2501.00656): reordered norm, QK-norm over the whole projection,
SwiGLU, rotary angles with base 500000, untied embeddings. `norm: pre` and `qk_norm: none` give Llama.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, model_validator

from ..section import Section

__all__ = ["Config", "NgramConfig", "RopeScalingConfig"]

DEBUG_LAYERS = 2
DEBUG_WIDTH = 64
DEBUG_HEAD_WIDTH = 16
DEBUG_TABLE_ROWS = 4096
DEBUG_CHUNK_TOKENS = 256


class RopeScalingConfig(Section):
    """Llama 3's frequency-dependent stretching of rotary wavelengths."""

    factor: float = Field(8.0, gt=0, description="stretch of the longest wavelengths")
    low_freq_factor: float = Field(
        1.0, gt=0, description="wavelengths above original/low are stretched fully"
    )
    high_freq_factor: float = Field(
        4.0, gt=0, description="wavelengths below original/high are left alone"
    )
    original_max_positions: int = Field(8192, gt=0, description="context length before the stretch")


class NgramConfig(Section):
    """Hashed byte n-gram embeddings added to the token embedding (BLT, arXiv 2412.09871, section 3.2.1)."""

    sizes: tuple[int, ...] = Field((3, 4, 5, 6, 7, 8), description="n-gram lengths, in ids")
    rows: int = Field(500_002, gt=0, description="rows of the table of one n-gram length")
    hash_functions: int = Field(
        1, ge=1, le=10, description="independent hashes, a table for each and each length"
    )
    oldest_first: bool = Field(
        True,
        description="the hash gives the oldest id of a window power 0, as the released models have it; false is the paper's order",
    )
    short_windows: Literal["pad", "skip"] = Field(
        "pad",
        description="n-grams that reach before the start: hashed with id 0 (released models) or left out (paper)",
    )
    average: bool = Field(
        False,
        description="divide the sum of embeddings by their number, as the paper does; the released models do not",
    )
    reset_at_documents: bool = Field(
        True,
        description="ids before the document count as 0; BLT's released models let windows cross",
    )
    init_std: float | None = Field(
        None, gt=0, description="standard deviation at the start; null is d_model^-0.5"
    )

    @property
    def missing_id(self) -> int:
        """What stands in a window for ids before the start; a negative one leaves the n-gram out."""
        return 0 if self.short_windows == "pad" else -1


class Config(Section):
    """A decoder-only transformer over packed documents."""

    family: Literal["transformer"] = Field("transformer", description="module under weft.models")
    vocab_size: int = Field(
        100352, gt=0, description="rows of the embedding table and of the output head"
    )
    n_layers: int = Field(16, gt=0, description="blocks")
    d_model: int = Field(2048, gt=0, description="width of the residual stream")
    n_heads: int = Field(16, gt=0, description="query heads")
    n_kv_heads: int | None = Field(None, gt=0, description="key and value heads; null is n_heads")
    head_dim: int | None = Field(
        None, gt=0, description="width of a head; null is d_model / n_heads"
    )
    d_ff: int = Field(8192, gt=0, description="hidden width of the SwiGLU")
    norm: Literal["reordered", "pre"] = Field(
        "reordered",
        description="where the norms stand: on sub-layer outputs (OLMo 2) or inputs (Llama)",
    )
    qk_norm: Literal["full", "head", "none"] = Field(
        "full",
        description="RMS norm of queries and keys: over the whole projection, a head, or none",
    )
    norm_eps: float = Field(1e-6, gt=0, description="added to the mean square")
    rope_theta: float = Field(500_000.0, gt=0, description="base of the rotary wavelengths")
    rope_scaling: RopeScalingConfig | None = Field(
        None, description="Llama 3 stretching of the wavelengths"
    )
    tie_embeddings: bool = Field(False, description="the output head is the embedding table")
    init_std: float = Field(
        0.02, gt=0, description="standard deviation of linears and embeddings at the start"
    )
    init_cut: float = Field(
        3.0, gt=0, description="the start is cut at this many standard deviations"
    )
    z_loss: float = Field(1e-5, ge=0, description="factor on mean(logsumexp(logits)^2)")
    loss_chunk_tokens: int | None = Field(
        None,
        gt=0,
        description="compute logits and loss for this many positions at a time; null is all at once",
    )
    attention: Literal["auto", "sdpa", "flex", "varlen"] = Field(
        "auto", description="attention backend; auto picks by device"
    )
    window: int | None = Field(
        None,
        gt=0,
        description="positions that each one attends to, itself among them; null is its whole document so far",
    )
    ngram: NgramConfig | None = Field(
        None, description="hashed n-gram embeddings; for byte vocabularies"
    )

    @model_validator(mode="after")
    def _check_shapes(self) -> Config:
        if self.head_dim is None and self.d_model % self.n_heads:
            raise ValueError(f"d_model {self.d_model} is not a multiple of n_heads {self.n_heads}")
        if self.n_heads % self.kv_heads:
            raise ValueError(
                f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.kv_heads}"
            )
        if self.head_width % 2:
            raise ValueError(f"head width {self.head_width} must be even for rotary positions")
        return self

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def head_width(self) -> int:
        return self.head_dim or self.d_model // self.n_heads

    def debug_size(self) -> Config:
        """The smallest model that still runs every part of this one, for `weft debug RECIPE`.

        At most 2 blocks, and 64 wide with heads of at most 16. What makes the architecture is kept: the query heads that
        share a key head, the widths of attention and MLP against the stream's, norms, tying, the vocabulary. Every family's
        `Config` has this method.
        """
        small: dict[str, Any] = {"n_layers": min(self.n_layers, DEBUG_LAYERS)}
        if self.loss_chunk_tokens:
            small["loss_chunk_tokens"] = min(self.loss_chunk_tokens, DEBUG_CHUNK_TOKENS)
        if self.ngram:
            small["ngram"] = {
                **self.ngram.model_dump(),
                "rows": min(self.ngram.rows, DEBUG_TABLE_ROWS),
            }
        if self.d_model > DEBUG_WIDTH:
            shrink = self.d_model / DEBUG_WIDTH
            head = min(self.head_width, DEBUG_HEAD_WIDTH)
            group = self.n_heads // self.kv_heads
            wanted = max(1, round(self.n_heads * self.head_width / shrink / head))
            kv_heads = max(1, wanted // group)
            small |= {
                "d_model": DEBUG_WIDTH,
                "head_dim": head,
                "n_heads": kv_heads * group,
                "n_kv_heads": None if self.n_kv_heads is None else kv_heads,
                # A multiple of 16, as real widths are: kernels take their usual path.
                "d_ff": max(16, round(self.d_ff / shrink / 16) * 16),
            }
        return Config(**{**self.model_dump(), **small})

    def count_parameters(self) -> dict[str, int]:
        """Exact parameter counts by part; the values add up to the model.

        Source: OLMo 2, `2*V*d + L*(d*H*hd + 2*d*K*hd + H*hd*d + (H+K)*hd + 3*d*f + 2*d) + d`.
        """
        d, hd, heads, kv = self.d_model, self.head_width, self.n_heads, self.kv_heads
        qk = {"full": (heads + kv) * hd, "head": 2 * hd, "none": 0}[self.qk_norm]
        attention = d * heads * hd + 2 * d * kv * hd + heads * hd * d + qk
        tables = 0
        if self.ngram:
            tables = len(self.ngram.sizes) * self.ngram.hash_functions * self.ngram.rows * d
        return {
            "embedding": self.vocab_size * d,
            "ngram_tables": tables,
            "blocks": self.n_layers * (attention + 3 * d * self.d_ff + 2 * d),
            "final_norm": d,
            "head": 0 if self.tie_embeddings else self.vocab_size * d,
        }

    def flops_per_token(self, sequence_length: int) -> float:
        """Training FLOPs of one position: `6*(parameters - embedding) + 12*L*H*hd*S`, no causal discount.

        Source: OLMo-core's definition. Lookups (embedding, n-gram tables) count as zero; a tied head is counted. S is the
        window where that is shorter.
        """
        seen = min(sequence_length, self.window or sequence_length)
        counts = self.count_parameters()
        multiplied = counts["blocks"] + counts["final_norm"] + self.vocab_size * self.d_model
        attention = 12 * self.n_layers * self.n_heads * self.head_width * seen
        return 6.0 * multiplied + attention

    @property
    def table_width(self) -> int:
        """Values in a row of the n-gram tables."""
        return self.d_model

    def ngram_init_std(self) -> float:
        assert self.ngram is not None
        return self.ngram.init_std or 1.0 / math.sqrt(self.d_model)
