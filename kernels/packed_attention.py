"""Causal attention inside each document of a packed sequence.

T positions of R rows of S positions (T = R * S), H query heads, K key/value heads, hd head width. Three backends give the same
result: `sdpa` (rows as the batch, one boolean mask a batch), `flex` (a block mask that skips what is
masked), and `varlen` (flash attention over cu_seqlens, CUDA, 16-bit).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["PackedLayout", "packed_attention"]


@dataclass(eq=False)
class PackedLayout:
    """Where the documents of a batch lie; masks are built once and shared by all layers.

    Args:
        cu_seqlens: (D + 1,) int32, every row border included.
        position_ids: (T,) int64, positions inside documents.
        max_seqlen: longest document, a host integer.
        row_length: S.
    """

    cu_seqlens: Tensor
    position_ids: Tensor
    max_seqlen: int
    row_length: int

    @property
    def rows(self) -> int:
        return len(self.position_ids) // self.row_length

    @property
    def is_one_document_a_row(self) -> bool:
        # Known on the host: every row border is a document border, so equal counts mean no other borders.
        return len(self.cu_seqlens) - 1 == self.rows

    @functools.cached_property
    def document_ids(self) -> Tensor:
        """(T,) int64."""
        return (self.position_ids == 0).cumsum(0)

    @functools.cached_property
    def row_mask(self) -> Tensor:
        """(R, 1, S, S) bool, True where a query (third) may see a key (fourth)."""
        documents = self.document_ids.view(self.rows, self.row_length)
        same = documents[:, :, None] == documents[:, None, :]
        return same.tril()[:, None]

    @functools.cached_property
    def block_mask(self) -> Any:
        from torch.nn.attention.flex_attention import create_block_mask

        documents = self.document_ids

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (query >= key) & (documents[query] == documents[key])

        total = len(self.position_ids)
        return create_block_mask(visible, None, None, total, total, device=str(self.position_ids.device))


def packed_attention(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, backend: str = "auto") -> Tensor:
    """`softmax(q k^T / sqrt(hd)) v`, causal, inside documents only.

    Args:
        q: (T, H, hd).
        k, v: (T, K, hd), H a multiple of K.
        backend: `sdpa`, `flex`, `varlen`, or `auto`: varlen where it runs, flex on other CUDA types, else sdpa.

    Returns:
        (T, H, hd).

    Raises:
        ValueError: unknown backend, or shapes that do not fit the layout.
    """
    if len(q) != len(layout.position_ids) or len(q) % layout.row_length:
        raise ValueError(f"q has {len(q)} positions, the layout {len(layout.position_ids)} in rows of {layout.row_length}")
    if backend == "auto":
        backend = _pick(q)
    if backend not in _BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}; known: auto, {', '.join(_BACKENDS)}")
    return _BACKENDS[backend](q, k, v, layout)


def _pick(q: Tensor) -> str:
    if not q.is_cuda:
        return "sdpa"
    return "varlen" if q.dtype in (torch.float16, torch.bfloat16) else "flex"


def _spread_heads(q: Tensor, kv: Tensor) -> Tensor:
    """Key or value heads repeated for their group of query heads."""
    groups = q.shape[1] // kv.shape[1]
    return kv if groups == 1 else kv.repeat_interleave(groups, dim=1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
    def by_row(x: Tensor) -> Tensor:
        return x.view(layout.rows, layout.row_length, *x.shape[1:]).transpose(1, 2)

    k, v = _spread_heads(q, k), _spread_heads(q, v)
    plain = layout.is_one_document_a_row
    mask = None if plain else layout.row_mask
    out = scaled_dot_product_attention(by_row(q), by_row(k), by_row(v), attn_mask=mask, is_causal=plain)
    return out.transpose(1, 2).reshape(q.shape)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def _flex(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    attend = _compiled_flex() if q.is_cuda else flex_attention
    k, v = _spread_heads(q, k), _spread_heads(q, v)
    out = attend(*(x.transpose(0, 1)[None] for x in (q, k, v)), block_mask=layout.block_mask)
    return out[0].transpose(0, 1)


def _varlen(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    k, v = _spread_heads(q, k), _spread_heads(q, v)
    borders, longest = layout.cu_seqlens, layout.max_seqlen
    return varlen_attn(q, k, v, borders, borders, longest, longest, window_size=(-1, 0))


_BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, PackedLayout], Tensor]] = {
    "sdpa": _sdpa,
    "flex": _flex,
    "varlen": _varlen,
}
