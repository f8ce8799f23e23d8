"""A decoder-only transformer over packed documents: OLMo 2, and Llama by configuration.

T packed positions, d model width, H query heads, K key/value heads, hd head width, V vocabulary.
Everything that touches weights happens inside `Transformer.forward` and the blocks' own, so that
sharding hooks see it.
Source: OLMo 2 (arXiv 2501.00656) section 3; Llama 3 (arXiv 2407.21783) section 3.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from ...kernels import (
    PackedLayout,
    RotaryTable,
    apply_rotary,
    attention_problem,
    following_windows,
    linear_cross_entropy,
    linear_entropy,
    packed_attention,
    rms_norm,
    rotary_frequencies,
    rotary_table,
)
from ...kernels.faces import autocast_dtype
from ..batch import PackedBatch
from ..errors import ConfigError
from .cache import KVCache, LayerCache, oldest_seen
from .config import Config
from .embedding import TokenEmbedding

__all__ = ["MLP", "Attention", "Block", "RMSNorm", "Transformer"]


class RMSNorm(nn.Module):
    """`rms_norm` with its weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Normalised, rotated attention among documents of a batch, or after what is cached."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        d, hd = config.d_model, config.head_width
        self.q_proj = nn.Linear(d, config.n_heads * hd, bias=False)
        self.k_proj = nn.Linear(d, config.kv_heads * hd, bias=False)
        self.v_proj = nn.Linear(d, config.kv_heads * hd, bias=False)
        self.o_proj = nn.Linear(config.n_heads * hd, d, bias=False)
        if config.qk_norm != "none":
            full = config.qk_norm == "full"
            self.q_norm = RMSNorm(config.n_heads * hd if full else hd, config.norm_eps)
            self.k_norm = RMSNorm(config.kv_heads * hd if full else hd, config.norm_eps)

    def project(self, x: Tensor, rotary: RotaryTable) -> tuple[Tensor, Tensor, Tensor]:
        """(..., d) to q (..., H, hd), k and v (..., K, hd)."""
        norm, width = self.config.qk_norm, self.config.head_width
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (-1, width)) for t in (q, k, v))
        if norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return apply_rotary(q, rotary), apply_rotary(k, rotary), v

    def forward(self, x: Tensor, rotary: RotaryTable, context: PackedLayout | LayerCache) -> Tensor:
        q, k, v = self.project(x, rotary)
        if isinstance(context, LayerCache):
            attended = context.attend(q, k, v)
        else:
            attended = packed_attention(q, k, v, context, self.config.attention)
        return self.o_proj(attended.flatten(-2))


class MLP(nn.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_ff, bias=False)
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention and MLP with residuals; norms stand on their outputs (reordered) or inputs (pre).

    `context` is what positions attend to: a packed batch's layout, for x (T, d), or a layer of a
    cache, for x (B, t, d).
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.is_reordered = config.norm == "reordered"
        self.attention = Attention(config)
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = MLP(config.d_model, config.d_ff)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)

    def forward(self, x: Tensor, rotary: RotaryTable, context: PackedLayout | LayerCache) -> Tensor:
        if self.is_reordered:
            x = x + self.attention_norm(self.attention(x, rotary, context))
            return x + self.mlp_norm(self.mlp(x))
        x = x + self.attention(self.attention_norm(x), rotary, context)
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """Embedding, blocks, final norm, head."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = TokenEmbedding(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head: nn.Linear | None = None
        if not config.tie_embeddings:
            self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        return self.embedding.tokens.weight if self.head is None else self.head.weight

    def forward(self, batch: PackedBatch | Tensor, output: str = "losses", **cached: Any) -> Any:
        """Losses or logits of a packed batch, or logits of new positions against a cache.

        Args:
            batch: a packed batch; or (B, t) int64 ids, with the other arguments of
                `forward_cached`, which comes this way so that hooks on the root run.
            output: `losses` gives `{"cross_entropy", "z_loss"}`, () fp32 sums over the counted
                targets; `logits` (T, V) fp32, and what a cached forward gives by default; `entropy` (T,) fp32 nats of each position's prediction,
                without keeping the logits.

        Raises:
            ConfigError: the configured attention does not run on this device and type.
        """
        if isinstance(batch, Tensor):
            return self._forward_cached(batch, output, **cached)
        layout = PackedLayout(
            batch.cu_seqlens,
            batch.position_ids,
            batch.max_seqlen,
            batch.row_length,
            self.config.window,
        )
        layout.prepare(self.config.attention)
        rotary = self._rotary(batch.position_ids)
        windows = self.embedding.windows(batch.tokens, batch.position_ids, batch.row_length)
        x = self.embedding(batch.tokens, windows)
        self._check_attention(x)
        for block in self.blocks:
            x = block(x, rotary, layout)
        x = self.norm(x)
        if output == "logits":
            return linear(x, self.head_weight).float()
        if output == "entropy":
            return self._entropy(x)
        entropy, z = linear_cross_entropy(
            x, self.head_weight, batch.targets, self.config.loss_chunk_tokens
        )
        return {"cross_entropy": entropy, "z_loss": z}

    def forward_cached(self, tokens: Tensor, new_lengths: Tensor | None, cache: KVCache) -> Tensor:
        """Logits of new positions after what the cache holds; fills and advances the cache.

        Args:
            tokens: (B, t) int64, padded on the right with anything.
            new_lengths: (B,) int64, how many of each sequence's tokens are real; None is all.
            cache: of this batch.

        Returns:
            (B, t, V) fp32; rows past a sequence's new length mean nothing.

        Raises:
            ConfigError: the cache is full.
        """
        return self(tokens, new_lengths=new_lengths, cache=cache)

    def entropy_cached(
        self,
        tokens: Tensor,
        new_lengths: Tensor | None,
        cache: KVCache,
        first_seen: Tensor | None = None,
    ) -> Tensor:
        """Like `forward_cached`, but (B, t) fp32 nats: the entropy of each position's prediction.

        Args:
            first_seen: (B, t) int64, the first position that each one knows of; None is the sequence's first.
        """
        settings = {"new_lengths": new_lengths, "cache": cache, "first_seen": first_seen}
        return self(tokens, output="entropy", **settings)

    def _forward_cached(
        self,
        tokens: Tensor,
        output: str,
        new_lengths: Tensor | None,
        cache: KVCache,
        first_seen: Tensor | None = None,
    ) -> Tensor:
        batch, length = tokens.shape
        if new_lengths is None:
            new_lengths = torch.full((batch,), length, dtype=torch.int64, device=tokens.device)
        cache.reserve(length)
        positions = cache.lengths[:, None] + torch.arange(length, device=tokens.device)
        rotary = self._rotary(positions)
        x = self.embedding(tokens, self._following_windows(tokens, cache, positions, first_seen))
        window, oldest = self.config.window, oldest_seen(positions, self.config.window)
        for layer, block in enumerate(self.blocks):
            place = LayerCache(
                cache, layer, positions, window, first_seen=first_seen, oldest=oldest
            )
            x = block(x, rotary, place)
        cache.remember(tokens, new_lengths)
        x = self.norm(x)
        return self._entropy(x) if output == "entropy" else linear(x, self.head_weight).float()

    def _following_windows(
        self, tokens: Tensor, cache: KVCache, positions: Tensor, first_seen: Tensor | None
    ) -> Tensor | None:
        ngram = self.config.ngram
        if ngram is None:
            return None
        windows = following_windows(cache.recent, tokens)
        if first_seen is None or not ngram.reset_at_documents:
            return windows
        lags = torch.arange(len(windows), device=tokens.device)[:, None, None]
        return torch.where(lags <= positions - first_seen, windows, ngram.missing_id)

    def _entropy(self, x: Tensor) -> Tensor:
        """(...) fp32 nats, from normalised states (..., d)."""
        return linear_entropy(x.flatten(0, -2), self.head_weight.to(x.dtype)).view(x.shape[:-1])

    def _check_attention(self, x: Tensor) -> None:
        dtype = autocast_dtype(x) or x.dtype
        problem = attention_problem(self.config.attention, x.device, dtype, x.requires_grad)
        if problem:
            raise ConfigError(f"model.attention={self.config.attention}: {problem}")

    def _rotary(self, positions: Tensor) -> RotaryTable:
        c = self.config
        stretch = c.rope_scaling.model_dump() if c.rope_scaling else {}
        # Rederived in each forward: a buffer would hold garbage after meta-device construction.
        dtype = torch.promote_types(self.norm.weight.dtype, torch.float32)
        frequencies = rotary_frequencies(
            c.head_width, c.rope_theta, device=positions.device, dtype=dtype, **stretch
        )
        return rotary_table(positions, frequencies)
