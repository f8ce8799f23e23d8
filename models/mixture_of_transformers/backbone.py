"""Blocks in which any part may have weights of its own for each modality, around one attention that all share.

T packed positions sorted by modality, M modalities, d model width, H query heads, K key/value heads, hd head width.
Only the attention sees positions in their order. A batch of one modality is computed exactly as the transformer family
computes it: same operations, same order, so that text alone gives the base's logits to the last bit.
Sources: Mixture-of-Transformers, arXiv 2411.04996, algorithm 1; LMFusion, arXiv 2412.15188, equations 7 to 13.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from ...kernels import (
    MixedLayout,
    PackedLayout,
    RotaryTable,
    Routing,
    apply_rotary,
    attention_problem,
    mixed_attention,
    rms_norm,
    rotary_frequencies,
    rotary_table,
    routed_attention,
)
from ...kernels.faces import autocast_dtype
from ..batch import IMAGE_SPANS, PackedBatch
from ..errors import ConfigError
from ..multimodal.network import Backbone
from ..multimodal.routed import RoutedLinear, RoutedRMSNorm
from .config import Config

__all__ = ["Block", "Context", "RoutedTransformer"]

Routed = RoutedLinear | RoutedRMSNorm


class Context:
    """What all blocks share in a batch.

    Not a dataclass: FSDP2 rebuilds dataclasses among a block's arguments.

    Args:
        layout: who sees whom.
        rotary: angles of positions, in their order.
        only: the modality of all positions, an index; None where there are several.
    """

    def __init__(self, layout: PackedLayout, rotary: RotaryTable, only: int | None) -> None:
        self.layout, self.rotary, self.only = layout, rotary, only


class Attention(nn.Module):
    """Projections by modality, one attention over all positions."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        d, hd, modalities = config.d_model, config.head_width, config.modalities
        q, kv = config.n_heads * hd, config.kv_heads * hd
        split = config.split
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
        q, k, v = (
            _apply(layer, x, routing, context) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        if context.only is None:
            attended = self._attend(q, k, v, routing, context)
        else:
            attended = self._attend_plainly(q, k, v, routing, context)
        return _apply(self.o_proj, attended.flatten(-2), routing, context)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, routing: Routing, context: Context
    ) -> Tensor:
        q, k, v = self._heads(q), self._heads(k), self._heads(v)
        return routed_attention(
            q,
            k,
            v,
            routing,
            context.layout,
            table=context.rotary,
            q_weights=None if self.q_norm is None else _weights(self.q_norm),
            k_weights=None if self.k_norm is None else _weights(self.k_norm),
            eps=self.config.norm_eps,
            backend=self.config.attention,
        )

    def _attend_plainly(
        self, q: Tensor, k: Tensor, v: Tensor, routing: Routing, context: Context
    ) -> Tensor:
        """As `models/transformer/model.py`, operation by operation."""
        norm = self.config.qk_norm
        if norm == "full":
            q, k = self._normalise(q, k, routing, context)
        q, k, v = self._heads(q), self._heads(k), self._heads(v)
        if norm == "head":
            q, k = self._normalise(q, k, routing, context)
        q, k = apply_rotary(q, context.rotary), apply_rotary(k, context.rotary)
        return mixed_attention(q, k, v, context.layout, self.config.attention)

    def _normalise(
        self, q: Tensor, k: Tensor, routing: Routing, context: Context
    ) -> tuple[Tensor, Tensor]:
        assert self.q_norm is not None
        assert self.k_norm is not None
        return (
            _apply(self.q_norm, q, routing, context),
            _apply(self.k_norm, k, routing, context),
        )

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.config.head_width))


class MLP(nn.Module):
    """SwiGLU by modality: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        d, f, modalities, split = config.d_model, config.d_ff, config.modalities, config.split.ffn
        self.gate_proj = RoutedLinear(d, f, modalities, split=split)
        self.up_proj = RoutedLinear(d, f, modalities, split=split)
        self.down_proj = RoutedLinear(f, d, modalities, split=split)

    def forward(self, x: Tensor, routing: Routing, context: Context) -> Tensor:
        gate = silu(_apply(self.gate_proj, x, routing, context))
        return _apply(
            self.down_proj, gate * _apply(self.up_proj, x, routing, context), routing, context
        )


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

        def norm(layer: RoutedRMSNorm, rows: Tensor) -> Tensor:
            return _apply(layer, rows, routing, context)

        # First and not last: what a block returns must not be a view, for FSDP2's sake.
        x = _touch_others(self, x, context)
        if self.is_reordered:
            x = x + norm(self.attention_norm, self.attention(x, routing, context))
            return x + norm(self.mlp_norm, self.mlp(x, routing, context))
        x = x + self.attention(norm(self.attention_norm, x), routing, context)
        return x + self.mlp(norm(self.mlp_norm, x), routing, context)


class RoutedTransformer(Backbone):
    """Blocks and the final norm."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RoutedRMSNorm(
            config.d_model, config.norm_eps, config.modalities, split=config.split.norm
        )

    def context(self, batch: PackedBatch, routing: Routing) -> Context:
        """Layout, angles, and whether there is but one modality.

        Raises:
            ConfigError: the configured attention does not run on this device.
        """
        layout = self._layout(batch)
        layout.prepare(self.config.attention)
        present = [place for place, size in enumerate(routing.sizes) if size]
        only = present[0] if len(present) == 1 else None
        return Context(layout, self._rotary(batch.position_ids), only)

    def forward(self, x: Tensor, routing: Routing, context: Context) -> Tensor:
        self._check_attention(x)
        for block in self.blocks:
            x = block(x, routing, context)
        x = _touch_others(self.norm, x, context)
        return _apply(self.norm, x, routing, context)

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
        dtype = torch.promote_types(_weight(self.norm, 0).dtype, torch.float32)
        frequencies = rotary_frequencies(
            c.head_width, c.rope_theta, device=positions.device, dtype=dtype, **stretch
        )
        return rotary_table(positions, frequencies)

    def _check_attention(self, x: Tensor) -> None:
        dtype = autocast_dtype(x) or x.dtype
        problem = attention_problem(self.config.attention, x.device, dtype, x.requires_grad)
        if problem:
            raise ConfigError(f"model.attention={self.config.attention}: {problem}")


def _weight(layer: Routed, modality: int) -> Tensor:
    weight = layer.weight
    if isinstance(weight, nn.ParameterDict):
        return weight[layer.modalities[modality]]
    return weight


def _weights(layer: Routed) -> list[Tensor]:
    """One for each modality, which may be the same."""
    return [_weight(layer, place) for place in range(len(layer.modalities))]


def _apply(layer: Routed, x: Tensor, routing: Routing, context: Context) -> Tensor:
    """A layer on sorted rows; where all are of one modality, as if it had no other."""
    if context.only is None:
        return layer(x, routing)
    weight = _weight(layer, context.only)
    if isinstance(layer, RoutedRMSNorm):
        return rms_norm(x, weight, layer.eps)
    return linear(x, weight)


class _Touch(torch.autograd.Function):
    """Nothing forward; backward, zeros for weights that met no row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.like = [(weight.shape, weight.dtype, weight.device) for weight in weights]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[1:]
        return grad, *(
            torch.zeros(shape, dtype=dtype, device=device) if wanted else None
            for wanted, (shape, dtype, device) in zip(needs, ctx.like, strict=True)
        )


def _touch_others(module: nn.Module, x: Tensor, context: Context) -> Tensor:
    """Put the weights of modalities without rows into x's graph: a rank that lacks a modality, or a whole step, has zero
    gradients and joins every collective, even where nothing else is trained.
    """
    if context.only is None or not torch.is_grad_enabled():
        return x
    others = [
        weight
        for layer in module.modules()
        if isinstance(layer, (RoutedLinear, RoutedRMSNorm)) and layer.is_split
        for place, weight in enumerate(_weights(layer))
        if place != context.only and weight.requires_grad
    ]
    return _Touch.apply(x, *others) if others else x
