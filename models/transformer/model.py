"""A decoder-only transformer over packed documents: OLMo 2, and Llama by configuration.

T packed positions, d model width, H query heads, K key/value heads, hd head width, V vocabulary. Everything that
touches weights happens inside `Transformer.forward`, so that sharding hooks see it.
Source: OLMo 2 (arXiv 2501.00656) section 3; Llama 3 (arXiv 2407.21783) section 3.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from ...kernels import (
    PackedLayout,
    apply_rotary,
    linear_cross_entropy,
    packed_attention,
    rms_norm,
    rotary_angles,
    rotary_frequencies,
)
from ..batch import PackedBatch
from .cache import KVCache
from .config import Config
from .embedding import TokenEmbedding

__all__ = ["Attention", "Block", "Transformer"]


class RMSNorm(nn.Module):
    """`rms_norm` with its weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Queries, keys and values, normalised and rotated, around whichever attention the caller runs."""

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

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., d) to q (..., H, hd), k and v (..., K, hd)."""
        norm, width = self.config.qk_norm, self.config.head_width
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (-1, width)) for t in (q, k, v))
        if norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return apply_rotary(q, cos, sin), apply_rotary(k, cos, sin), v

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout: PackedLayout) -> Tensor:
        q, k, v = self.project(x, cos, sin)
        return self.o_proj(packed_attention(q, k, v, layout, self.config.attention).flatten(-2))

    def forward_cached(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache, layer: int, positions: Tensor) -> Tensor:
        """(B, t, d) new positions against everything cached, themselves included."""
        q, k, v = self.project(x, cos, sin)
        rows = torch.arange(len(x), device=x.device)[:, None]
        cache.keys[layer][rows, positions] = k.to(cache.keys[layer].dtype)
        cache.values[layer][rows, positions] = v.to(cache.values[layer].dtype)
        keys, values = (t[layer][:, : cache.used].transpose(1, 2).to(q.dtype) for t in (cache.keys, cache.values))
        groups = self.config.n_heads // self.config.kv_heads
        if groups > 1:
            keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
        mask = torch.arange(cache.used, device=x.device) <= positions[:, None, :, None]
        out = scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=mask)
        return self.o_proj(out.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention and MLP with residuals; the norms stand on the outputs (reordered) or on the inputs (pre)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.is_reordered = config.norm == "reordered"
        self.attention = Attention(config)
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = MLP(config)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout: PackedLayout) -> Tensor:
        if self.is_reordered:
            x = x + self.attention_norm(self.attention(x, cos, sin, layout))
            return x + self.mlp_norm(self.mlp(x))
        x = x + self.attention(self.attention_norm(x), cos, sin, layout)
        return x + self.mlp(self.mlp_norm(x))

    def forward_cached(self, x: Tensor, *place: Any) -> Tensor:
        if self.is_reordered:
            x = x + self.attention_norm(self.attention.forward_cached(x, *place))
            return x + self.mlp_norm(self.mlp(x))
        x = x + self.attention.forward_cached(self.attention_norm(x), *place)
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """Embedding, blocks, final norm, head."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = TokenEmbedding(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        return self.embedding.tokens.weight if self.head is None else self.head.weight

    def forward(self, batch: PackedBatch | Tensor, output: str = "losses", **cached: Any) -> Any:
        """Losses or logits of a packed batch, or logits of new positions against a cache.

        Args:
            batch: a packed batch; with `output="cached"`, (B, t) int64 ids and the arguments of `forward_cached`.
            output: `losses` gives `{"cross_entropy", "z_loss"}`, () fp32 sums over the counted targets; `logits` (T, V) fp32.
        """
        if output == "cached":
            return self._forward_cached(batch, **cached)
        layout = PackedLayout(batch.cu_seqlens, batch.position_ids, batch.max_seqlen, batch.row_length)
        cos, sin = self._angles(batch.position_ids)
        windows = self.embedding.windows(batch.tokens, batch.position_ids, batch.row_length)
        x = self.embedding(batch.tokens, windows)
        for block in self.blocks:
            x = block(x, cos, sin, layout)
        x = self.norm(x)
        if output == "logits":
            return linear(x, self.head_weight).float()
        entropy, z = linear_cross_entropy(x, self.head_weight, batch.targets, self.config.loss_chunk_tokens)
        return {"cross_entropy": entropy, "z_loss": z}

    def forward_cached(self, tokens: Tensor, cache: KVCache, counts: Tensor | None = None) -> Tensor:
        """Logits of new positions after what the cache holds; fills and advances the cache.

        Args:
            tokens: (B, t) int64, padded on the right with anything.
            cache: of this batch.
            counts: (B,) int64, how many of each sequence's tokens are real; None is all.

        Returns:
            (B, t, V) fp32; rows past a sequence's count mean nothing.
        """
        return self(tokens, output="cached", cache=cache, counts=counts)

    def _forward_cached(self, tokens: Tensor, cache: KVCache, counts: Tensor | None) -> Tensor:
        batch, length = tokens.shape
        if counts is None:
            counts = torch.full((batch,), length, dtype=torch.int64, device=tokens.device)
        cache.reserve(length)
        positions = cache.lengths[:, None] + torch.arange(length, device=tokens.device)
        cos, sin = self._angles(positions)
        x = self.embedding(tokens, self._cached_windows(tokens, cache, positions))
        for layer, block in enumerate(self.blocks):
            x = block.forward_cached(x, cos, sin, cache, layer, positions)
        cache.remember(tokens, counts)
        return linear(self.norm(x), self.head_weight).float()

    def _cached_windows(self, tokens: Tensor, cache: KVCache, positions: Tensor) -> Tensor | None:
        tables = self.embedding.ngrams
        if tables is None:
            return None
        joined = torch.cat((cache.recent, tokens), dim=1)
        count, longest = tokens.shape[1], tables.longest
        rows = [joined[:, longest - 1 - lag : longest - 1 - lag + count] for lag in range(longest)]
        lags = torch.arange(longest, device=tokens.device)[:, None, None]
        return torch.where(lags <= positions, torch.stack(rows), 0)

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        c = self.config
        stretch = c.rope_scaling.model_dump() if c.rope_scaling else {}
        # Rederived in each forward: a buffer would hold garbage after meta-device construction.
        frequencies = rotary_frequencies(c.head_width, c.rope_theta, device=positions.device, **stretch)
        if self.norm.weight.dtype == torch.float64:
            frequencies = frequencies.double()
        return rotary_angles(positions, frequencies)
