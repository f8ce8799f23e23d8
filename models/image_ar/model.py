"""A class-conditional transformer over image codes.

T packed positions of I images, N codes an image, d model width, H heads of width hd, K codes of the tokenizer, B images
under generation. Position 0 of an image is its class and predicts code 0; position i is code i - 1 and predicts code i.
Source: LlamaGen, arXiv 2406.06525, sections 2.2 and 2.3, and its released code for what the paper leaves open.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear, scaled_dot_product_attention

from ...kernels import (
    PackedLayout,
    RotaryTable,
    apply_rotary,
    attention_problem,
    linear_cross_entropy,
    packed_attention,
    rotary_frequencies,
    rotary_table,
)
from ...kernels.faces import autocast_dtype
from ..batch import PackedBatch
from ..errors import ConfigError
from ..transformer.model import MLP, RMSNorm
from .config import Config

__all__ = ["ImageCache", "ImageTransformer", "grid_rotation"]


class ImageCache:
    """Keys and values of images under generation, which are all equally far.

    Attributes:
        keys, values: for each layer (B, N, H, hd).
        used: positions filled, a host integer.
    """

    def __init__(
        self, config: Config, images: int, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        shape = (images, config.image_tokens, config.n_heads, config.head_width)
        self.keys = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.n_layers)]
        self.values = [torch.empty_like(keys) for keys in self.keys]
        self.used = 0

    def keep(self, images: int) -> None:
        """Go on with the first images alone."""
        self.keys = [keys[:images] for keys in self.keys]
        self.values = [values[:images] for values in self.values]


class _LayerCache:
    """One layer of a cache, for one position more of every image."""

    def __init__(self, cache: ImageCache, layer: int) -> None:
        self.cache, self.layer = cache, layer

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (B, H, hd) of the new position, which sees all before it and itself."""
        at = self.cache.used
        keys, values = self.cache.keys[self.layer], self.cache.values[self.layer]
        keys[:, at], values[:, at] = k.to(keys.dtype), v.to(values.dtype)
        keys, values = (store[:, : at + 1].transpose(1, 2).to(q.dtype) for store in (keys, values))
        return scaled_dot_product_attention(q[:, :, None], keys, values)[:, :, 0]


class _Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.qkv_proj = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.o_proj = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(
        self, x: Tensor, rotary: RotaryTable, context: PackedLayout | _LayerCache
    ) -> Tensor:
        heads = self.qkv_proj(x).unflatten(-1, (3, self.config.n_heads, self.config.head_width))
        q, k, v = heads.unbind(-3)
        q, k = _rotate_pairs(q, rotary), _rotate_pairs(k, rotary)
        if isinstance(context, _LayerCache):
            attended = context.attend(q, k, v)
        else:
            attended = packed_attention(q, k, v, context, self.config.attention)
        return self.o_proj(attended.flatten(-2))


class Block(nn.Module):
    """Attention and SwiGLU with residuals, norms on their inputs.

    `context` is what positions attend to: a packed batch's layout, or a layer of a cache; x is (T, d) or (B, d).
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = _Attention(config)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = MLP(config.d_model, config.d_ff)

    def forward(
        self,
        x: Tensor,
        rotary: RotaryTable,
        context: PackedLayout | _LayerCache,
        drop: float = 0.0,
    ) -> Tensor:
        attended = self.attention(self.attention_norm(x), rotary, context)
        x = x + _dropped(attended, drop)
        return x + _dropped(self.mlp(self.mlp_norm(x)), drop)


class ImageTransformer(nn.Module):
    """Tables of codes and classes, blocks, final norm, head."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.codes = nn.Embedding(config.codebook_size, config.d_model)
        self.classes = nn.Embedding(config.classes + 1, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = nn.Linear(config.d_model, config.codebook_size, bias=False)

    def forward(
        self,
        batch: PackedBatch | Tensor,
        labels: Tensor | None = None,
        *,
        output: str = "losses",
        drop: float = 0.0,
        cache: ImageCache | None = None,
    ) -> Any:
        """Losses or logits of a packed batch; or logits after one position more of images under generation.

        Args:
            batch: every document an image: its class (whatever the id says), then codes. Or (B,) int64: labels where the
                cache is empty, else the newest code of each image.
            labels: (I,) int64 of a packed batch; `config.classes` is none.
            output: `losses` gives the sum of cross-entropies over counted targets, () fp32; `logits` (T, K) fp32.
            drop: share of activations that dropout zeroes.
            cache: filled and advanced; with it the result is (B, K) fp32.

        Raises:
            ConfigError: the configured attention does not run on this device and type.
        """
        if isinstance(batch, Tensor):
            assert cache is not None
            return self._forward_cached(batch, cache)
        assert labels is not None
        layout = PackedLayout(
            batch.cu_seqlens, batch.position_ids, batch.max_seqlen, batch.row_length
        )
        layout.prepare(self.config.attention)
        x = _dropped(self._embed(batch, labels), drop)
        self._check_attention(x)
        rotary = self._rotation(batch.position_ids)
        for block in self.blocks:
            x = block(x, rotary, layout, drop)
        x = self.norm(x)
        if output == "logits":
            return self.head(x).float()
        chunk = self.config.loss_chunk_tokens
        return linear_cross_entropy(x, self.head.weight, batch.targets, chunk)[0]

    def _embed(self, batch: PackedBatch, labels: Tensor) -> Tensor:
        """(T, d): classes where documents begin, codes elsewhere."""
        classes = self.classes(labels)
        starts = batch.cu_seqlens[:-1].long()
        return self.codes(batch.tokens).index_copy(0, starts, classes)

    def _forward_cached(self, ids: Tensor, cache: ImageCache) -> Tensor:
        x = self.codes(ids) if cache.used else self.classes(ids)
        rotary = self._rotation(torch.full((1,), cache.used, device=ids.device))
        for layer, block in enumerate(self.blocks):
            x = block(x, rotary, _LayerCache(cache, layer))
        cache.used += 1
        return linear(self.norm(x), self.head.weight).float()

    def _rotation(self, positions: Tensor) -> RotaryTable:
        # Rederived in each forward: a buffer would hold garbage after meta-device construction.
        return grid_rotation(self.config, positions, self.norm.weight.dtype)

    def _check_attention(self, x: Tensor) -> None:
        dtype = autocast_dtype(x) or x.dtype
        problem = attention_problem(self.config.attention, x.device, dtype, x.requires_grad)
        if problem:
            raise ConfigError(f"model.attention={self.config.attention}: {problem}")


def grid_rotation(config: Config, positions: Tensor, dtype: torch.dtype) -> RotaryTable:
    """Rotary angles of positions (...,) inside images: half of the pairs turn by row, half by column.

    Returns:
        Table of (..., hd / 2), in fp32 or fp64; the class position is all zeros, or turns by nothing.
    """
    wide = torch.promote_types(dtype, torch.float32)
    frequencies = rotary_frequencies(
        config.head_width // 2, config.rope_theta, device=positions.device, dtype=wide
    )
    places = (positions - 1).clamp(min=0)
    rows = rotary_table(places // config.grid, frequencies)
    columns = rotary_table(places % config.grid, frequencies)
    cos, sin = (torch.cat(pair, -1) for pair in ((rows.cos, columns.cos), (rows.sin, columns.sin)))
    if config.class_rotation == "zero":
        is_code = (positions > 0)[..., None]
        cos, sin = cos * is_code, sin * is_code
    return RotaryTable(cos, sin)


def _rotate_pairs(x: Tensor, table: RotaryTable) -> Tensor:
    """Rotation of neighbouring values; what comes out is sorted by place in the pair, which no product of two such vectors sees."""
    return apply_rotary(torch.cat((x[..., 0::2], x[..., 1::2]), -1), table)


def _dropped(x: Tensor, share: float) -> Tensor:
    return dropout(x, share) if share else x
