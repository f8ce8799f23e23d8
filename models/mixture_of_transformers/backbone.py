"""Blocks in which any part may have weights of its own for each modality, around one attention that all share.

T packed positions sorted by modality, M modalities, d model width, H query heads, K key/value heads, hd head width.
Only the attention sees positions in their order. A batch of one modality is computed exactly as the transformer family
computes it: same operations, same order, so that text alone gives the base's logits to the last bit.
Sources: Mixture-of-Transformers, arXiv 2411.04996, algorithm 1; LMFusion, arXiv 2412.15188, equations 7 to 13.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from ...kernels import (
    MixedLayout,
    PackedLayout,
    RotaryTable,
    Routing,
    apply_rotary,
    attention_problem,
    mixed_attention,
    qk_norm_rope_unpermute,
    rms_norm,
    rotary_frequencies,
    rotary_table,
)
from ...kernels.faces import autocast_dtype
from ..batch import IMAGE_SPANS, PackedBatch
from ..errors import ConfigError
from ..multimodal.generation import GenerativeBackbone
from ..multimodal.routed import RoutedLinear, RoutedRMSNorm, only_modality, touch
from ..transformer.cache import LayerCache
from .cache import KVCache
from .config import Config

__all__ = ["Block", "Context", "RoutedTransformer"]


class Context:
    """What all blocks share in a batch: who sees whom, and angles of positions in their order.

    Not a dataclass: FSDP2 rebuilds dataclasses among a block's arguments.
    """

    def __init__(self, layout: PackedLayout, rotary: RotaryTable, backend: str) -> None:
        self.layout, self.rotary, self.backend = layout, rotary, backend

    def of_layer(self, layer: int) -> Context:
        """The context of one block."""
        return self

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (T, H, hd), k and v (T, K, hd) in the order of positions to (T, H, hd)."""
        return mixed_attention(q, k, v, self.layout, self.backend)


class CachedContext(Context):
    """New positions (B t) of sequences of a cache, laid end to end, after what each has seen.

    Args:
        positions: (B, t) int64, of the new ones.
        sees_all: each of a sequence's new positions sees all of them.
    """

    def __init__(
        self,
        cache: KVCache,
        positions: Tensor,
        rotary: RotaryTable,
        *,
        sees_all: bool,
        layer: int = 0,
    ) -> None:
        self.cache, self.positions, self.rotary = cache, positions, rotary
        self.sees_all, self.layer = sees_all, layer

    def of_layer(self, layer: int) -> CachedContext:
        place = (self.cache, self.positions, self.rotary)
        return CachedContext(*place, sees_all=self.sees_all, layer=layer)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        last = self.positions[:, -1:] if self.sees_all else None
        layer = LayerCache(self.cache, self.layer, self.positions, last_seen=last)
        q, k, v = (x.unflatten(0, self.positions.shape) for x in (q, k, v))
        return layer.attend(q, k, v).flatten(0, 1)


class Attention(nn.Module):
    """Projections by modality, one attention over all positions."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        d, hd, modalities = config.d_model, config.head_width, config.modalities
        q, kv, split = config.n_heads * hd, config.kv_heads * hd, config.split
        self.q_proj = RoutedLinear(d, q, modalities, split=split.qkv)
        self.k_proj = RoutedLinear(d, kv, modalities, split=split.qkv)
        self.v_proj = RoutedLinear(d, kv, modalities, split=split.qkv)
        self.o_proj = RoutedLinear(q, d, modalities, split=split.o)
        self.q_norm: RoutedRMSNorm | None = None
        self.k_norm: RoutedRMSNorm | None = None
        if config.qk_norm != "none":
            widths = (q, kv) if config.qk_norm == "full" else (hd, hd)
            self.q_norm, self.k_norm = (
                RoutedRMSNorm(width, config.norm_eps, modalities, split=split.qkv)
                for width in widths
            )

    def forward(self, x: Tensor, routing: Routing, context: Context) -> Tensor:
        q, k, v = (layer(x, routing) for layer in (self.q_proj, self.k_proj, self.v_proj))
        only = only_modality(routing)
        if only is None:
            attended = self._attend(q, k, v, routing, context)
        else:
            attended = self._attend_plainly(q, k, v, only, context)
        return self.o_proj(attended.flatten(-2), routing)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, routing: Routing, context: Context
    ) -> Tensor:
        q, k, v = qk_norm_rope_unpermute(
            self._heads(q),
            self._heads(k),
            self._heads(v),
            routing,
            context.rotary,
            q_weights=None if self.q_norm is None else self.q_norm.weights,
            k_weights=None if self.k_norm is None else self.k_norm.weights,
            eps=self.config.norm_eps,
        )
        return routing.permute(context.attend(q, k, v))

    def _attend_plainly(
        self, q: Tensor, k: Tensor, v: Tensor, only: int, context: Context
    ) -> Tensor:
        """As `models/transformer/model.py`, operation by operation."""
        norm = self.config.qk_norm
        if norm == "full":
            q, k = _normalise(self.q_norm, q, only), _normalise(self.k_norm, k, only)
        q, k, v = self._heads(q), self._heads(k), self._heads(v)
        if norm == "head":
            q, k = _normalise(self.q_norm, q, only), _normalise(self.k_norm, k, only)
        q, k = apply_rotary(q, context.rotary), apply_rotary(k, context.rotary)
        return context.attend(q, k, v)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.config.head_width))


def _normalise(norm: RoutedRMSNorm | None, x: Tensor, only: int) -> Tensor:
    """Not by a call of the module, which sorted batches do without: under ZeRO 3 all ranks must call the same ones."""
    assert norm is not None
    weights = norm.weights
    if norm.is_split:
        x = touch(x, [weight for place, weight in enumerate(weights) if place != only])
    return rms_norm(x, weights[only], norm.eps)


class MLP(nn.Module):
    """SwiGLU by modality: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        d, f, modalities, split = config.d_model, config.d_ff, config.modalities, config.split.ffn
        self.gate_proj = RoutedLinear(d, f, modalities, split=split)
        self.up_proj = RoutedLinear(d, f, modalities, split=split)
        self.down_proj = RoutedLinear(f, d, modalities, split=split)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        gate = silu(self.gate_proj(x, routing))
        return self.down_proj(gate * self.up_proj(x, routing), routing)


class Block(nn.Module):
    """Attention and MLP with residuals; norms stand on their inputs (pre) or outputs (reordered)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.is_reordered = config.norm == "reordered"
        norm = (config.d_model, config.norm_eps, config.modalities)
        self.attention = Attention(config)
        self.attention_norm = RoutedRMSNorm(*norm, split=config.split.norm)
        self.mlp = MLP(config)
        self.mlp_norm = RoutedRMSNorm(*norm, split=config.split.norm)

    def forward(self, x: Tensor, routing: Routing, context: Context) -> Tensor:
        """(T, d) sorted rows to (T, d)."""
        if self.is_reordered:
            x = x + self.attention_norm(self.attention(x, routing, context), routing)
            return x + self.mlp_norm(self.mlp(x, routing), routing)
        x = x + self.attention(self.attention_norm(x, routing), routing, context)
        return x + self.mlp(self.mlp_norm(x, routing), routing)


class RoutedTransformer(GenerativeBackbone):
    """Blocks and the final norm."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RoutedRMSNorm(
            config.d_model, config.norm_eps, config.modalities, split=config.split.norm
        )

    def context(self, batch: PackedBatch, routing: Routing) -> Context:
        """Layout and angles."""
        layout = self._layout(batch)
        layout.prepare(self.config.attention)
        return Context(layout, self._rotary(batch.position_ids), self.config.attention)

    def cached_context(
        self, cache: KVCache, length: int, new_lengths: Tensor | None, *, is_image: bool = False
    ) -> CachedContext:
        """See `GenerativeBackbone`."""
        places = torch.arange(length, device=cache.lengths.device)
        positions = cache.lengths[:, None] + places
        sees_all = is_image and self.config.image_attention == "bidirectional"
        rotary = self._rotary(positions.flatten())
        return CachedContext(cache, positions, rotary, sees_all=sees_all)

    def forward(self, x: Tensor, routing: Routing, context: Context) -> Tensor:
        """See `Backbone.forward`.

        Raises:
            ConfigError: the configured attention does not run on this device and type.
        """
        self._check_attention(x)
        for layer, block in enumerate(self.blocks):
            x = block(x, routing, context.of_layer(layer))
        return self.norm(x, routing)

    def _layout(self, batch: PackedBatch) -> PackedLayout:
        places = (batch.cu_seqlens, batch.position_ids, batch.max_seqlen, batch.row_length)
        sees_all = self.config.image is not None and self.config.image_attention == "bidirectional"
        spans = batch.side.get(IMAGE_SPANS) if sees_all else None
        if spans is None or not len(spans):
            return PackedLayout(*places)
        return MixedLayout(*places, image_spans=spans)

    def _rotary(self, positions: Tensor) -> RotaryTable:
        c = self.config
        stretch = c.rope_scaling.model_dump() if c.rope_scaling else {}
        # Rederived in each forward: a buffer would hold garbage after meta-device construction.
        dtype = torch.promote_types(self.norm.weights[0].dtype, torch.float32)
        frequencies = rotary_frequencies(
            c.head_width, c.rope_theta, device=positions.device, dtype=dtype, **stretch
        )
        return rotary_table(positions, frequencies)

    def _check_attention(self, x: Tensor) -> None:
        dtype = autocast_dtype(x) or x.dtype
        problem = attention_problem(self.config.attention, x.device, dtype, x.requires_grad)
        if problem:
            raise ConfigError(f"model.attention={self.config.attention}: {problem}")
