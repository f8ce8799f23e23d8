"""Causal attention inside each document of a packed sequence, over all of it or over a sliding window.

T positions of R rows of S positions (T = R * S), H query heads, K key/value heads, hd head width.
Three backends give the same result: `sdpa` (scaled_dot_product_attention by rows or by documents),
`flex` (a block mask that skips what is masked) and `varlen` (flash attention over cu_seqlens, CUDA,
16-bit). None waits for the GPU.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .flex_blocks import flex_attend, interval_block_mask

__all__ = [
    "ATTENTION_BACKENDS",
    "PackedLayout",
    "attend_rows",
    "attention_problem",
    "packed_attention",
    "spread_heads",
]

SIXTEEN_BIT = (torch.float16, torch.bfloat16)
POSITIONS_A_CALL = 16
"""On the CPU, documents shorter than this on average are no cheaper in calls than under a mask."""


class PackedLayout:
    """Where the documents of a batch lie; masks are built on first use and shared by all layers.

    Not a dataclass: FSDP2 rebuilds dataclasses among a block's arguments, which would lose the
    shared masks. The masks are cached by hand because torch.compile cannot trace
    functools.cached_property on Python 3.11.

    Attributes:
        document_starts: (T,) int64, where the document of each position starts.
        key_starts: (T,) int64, the first position that each one sees.

    Args:
        cu_seqlens: (D + 1,) int32, every row border included.
        position_ids: (T,) int64, positions inside documents.
        max_seqlen: longest document, a host integer.
        row_length: S; where T is not a multiple of it, all of T is taken as one row.
        window: positions that each one sees, itself among them; None is all of its document before it.
        longest: bound of the length of every document that never changes; None is S. Documents may be empty.
    """

    def __init__(
        self,
        cu_seqlens: Tensor,
        position_ids: Tensor,
        max_seqlen: int,
        row_length: int,
        window: int | None = None,
        longest: int | None = None,
    ) -> None:
        self.cu_seqlens = cu_seqlens
        self.position_ids = position_ids
        self.max_seqlen = max_seqlen
        self.total = position_ids.shape[0]
        self.longest = longest or row_length
        self.row_length = row_length if self.total % row_length == 0 else self.total
        # A window that no document fills is none.
        self.window = None if window is None or window >= row_length else window
        places = torch.arange(self.total, device=position_ids.device)
        self.document_starts = self.key_starts = places - position_ids
        if self.window is not None:
            self.key_starts = torch.maximum(self.document_starts, places - self.window + 1)
        self._row_mask: Tensor | None = None
        self._block_mask: Any = None

    @property
    def rows(self) -> int:
        return self.total // self.row_length

    @property
    def is_one_document_a_row(self) -> bool:
        # Known on the host: all row borders are document borders, so equal counts mean no others.
        return self.cu_seqlens.shape[0] - 1 == self.rows

    @functools.cached_property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """(length, count) of neighbouring documents of equal length; waits for the device."""
        lengths = [length for length in self.cu_seqlens.diff().tolist() if length]
        return tuple((length, len(list(same))) for length, same in groupby(lengths))

    @property
    def row_mask(self) -> Tensor:
        """(R, 1, S, S) bool, True where a query (third) may see a key (fourth)."""
        if self._row_mask is not None:
            return self._row_mask
        keys = torch.arange(self.row_length, device=self.key_starts.device)
        starts = self.key_starts.view(self.rows, self.row_length) - (
            torch.arange(self.rows, device=keys.device)[:, None] * self.row_length
        )
        mask = (keys >= starts[:, :, None]).tril()[:, None]
        # A compiled block builds it in its own graph, where keeping it would be a side effect.
        if not torch.compiler.is_compiling():
            self._row_mask = mask
        return mask

    @property
    def block_mask(self) -> Any:
        """flex_attention's BlockMask over all of T, made from borders without any T x T mask."""
        if self._block_mask is None:
            self._block_mask = self._build_block_mask()
        return self._block_mask

    def prepare(self, backend: str) -> None:
        """Build what compiled blocks cannot build; call once a batch, outside of them."""
        if backend == "flex":
            _ = self.block_mask

    def _build_block_mask(self) -> Any:
        starts = self.key_starts

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (query >= key) & (key >= starts[query])

        ends = torch.arange(1, self.total + 1, device=starts.device)
        return interval_block_mask(starts, ends, visible)


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, backend: str = "auto"
) -> Tensor:
    """`softmax(q k^T / sqrt(hd)) v`, causal, inside documents only and inside the layout's window.

    Args:
        q: (T, H, hd).
        k, v: (T, K, hd), H a multiple of K.
        backend: `sdpa`, `flex`, `varlen`, or `auto`: varlen where it runs (CUDA, 16-bit), else
            sdpa.

    Returns:
        (T, H, hd).

    Raises:
        ValueError: unknown backend, one that does not run on this device and type, or shapes that
        do not fit the layout.
    """
    if q.shape[0] != layout.total:
        raise ValueError(f"q has {q.shape[0]} positions but the layout has {layout.total}")
    if backend == "auto":
        backend = "varlen" if _runs_varlen(q) else "sdpa"
    needs_gradient = torch.is_grad_enabled() and q.requires_grad
    problem = attention_problem(backend, q.device, q.dtype, needs_gradient)
    if problem:
        raise ValueError(problem)
    return ATTENTION_BACKENDS[backend](q, k, v, layout)


def attention_problem(
    backend: str, device: torch.device, dtype: torch.dtype, needs_gradient: bool
) -> str | None:
    """Why `backend` cannot run on this device and type of queries, in one line; None if it can."""
    if backend != "auto" and backend not in ATTENTION_BACKENDS:
        known = ", ".join(ATTENTION_BACKENDS)
        return f"unknown attention backend {backend!r}; known: auto, {known}"
    if backend == "varlen" and (device.type != "cuda" or dtype not in SIXTEEN_BIT):
        found = f"{device.type} and {str(dtype).removeprefix('torch.')}"
        return f"attention backend varlen needs CUDA and a 16-bit type, not {found}; use auto"
    if backend == "flex" and device.type == "cpu" and needs_gradient:
        return "attention backend flex has no gradient on the CPU; use auto"
    return None


def _runs_varlen(q: Tensor) -> bool:
    if not q.is_cuda or q.dtype not in SIXTEEN_BIT:
        return False
    return torch.version.hip is None and torch.cuda.get_device_capability(q.device) >= (8, 0)


def spread_heads(q: Tensor, kv: Tensor) -> Tensor:
    """Key or value heads repeated for their group of query heads."""
    groups = q.shape[1] // kv.shape[1]
    return kv if groups == 1 else kv.repeat_interleave(groups, dim=1)


def attend_rows(q: Tensor, k: Tensor, v: Tensor, row_length: int, mask: Tensor | None) -> Tensor:
    """Attention in each of the rows: under `mask`, or causal where that is None."""

    def by_row(x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, row_length)).transpose(1, 2)

    out = scaled_dot_product_attention(
        by_row(q), by_row(k), by_row(v), attn_mask=mask, is_causal=mask is None
    )
    return out.transpose(1, 2).flatten(0, 1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
    k, v = spread_heads(q, k), spread_heads(q, v)
    if layout.window is not None:
        return _attend_window(q, k, v, layout)
    if layout.is_one_document_a_row:
        return attend_rows(q, k, v, layout.row_length, None)
    # Document lengths are shapes: free to read on the CPU, but a wait on a GPU and a
    # recompilation when compiled.
    has_free_lengths = q.device.type == "cpu" and not torch.compiler.is_compiling()
    if has_free_lengths and len(layout.runs) * POSITIONS_A_CALL <= layout.total:
        return _attend_documents(q, k, v, layout.runs)
    return attend_rows(q, k, v, layout.row_length, layout.row_mask)


def _attend_documents(q: Tensor, k: Tensor, v: Tensor, runs: tuple[tuple[int, int], ...]) -> Tensor:
    """One causal call for each run of equally long documents: computes only what is visible."""
    sizes = [length * count for length, count in runs]
    parts = zip(q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
    lengths = (length for length, _ in runs)
    return torch.cat([attend_rows(*qkv, n, None) for qkv, n in zip(parts, lengths, strict=True)])


def _attend_window(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
    """Chunks of a window's length, each of which sees itself and the chunk before it: linear in T, under masks."""
    assert layout.window is not None
    width, total = layout.window, layout.total
    padding = -total % width

    def chunks(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, 0, 0, 0, 0, padding)).unflatten(0, (-1, width))

    def with_chunk_before(x: Tensor) -> Tensor:
        own = chunks(x)
        before = torch.cat((torch.zeros_like(own[:1]), own[:-1]))
        return torch.cat((before, own), dim=1).transpose(1, 2)

    places = torch.arange(total + padding, device=q.device).view(-1, width)
    # What fills the last chunk sees itself alone: a query needs at least one key.
    starts = torch.cat((layout.key_starts, places.flatten()[total:])).view(-1, width)
    keys = torch.cat((places - width, places), dim=1)
    mask = (keys[:, None] >= starts[..., None]) & (keys[:, None] <= places[..., None])
    out = scaled_dot_product_attention(
        chunks(q).transpose(1, 2), with_chunk_before(k), with_chunk_before(v), mask[:, None]
    )
    return out.transpose(1, 2).flatten(0, 1)[:total]


def _flex(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
    return flex_attend(q, k, v, layout.block_mask)


@functools.cache
def _varlen_takes_groups() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _varlen(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    borders = layout.cu_seqlens
    # It bounds every document and never changes, so that compiled blocks need no guard on it.
    longest = layout.longest
    before = -1 if layout.window is None else layout.window - 1
    groups: dict[str, Any] = {}
    if q.shape[1] != k.shape[1]:
        if _varlen_takes_groups():
            groups["enable_gqa"] = True
        else:
            k, v = spread_heads(q, k), spread_heads(q, v)
    out = varlen_attn(
        q, k, v, borders, borders, longest, longest, window_size=(before, 0), **groups
    )
    assert isinstance(out, Tensor)  # a pair only where return_aux asks for it
    return out


ATTENTION_BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, PackedLayout], Tensor]] = {
    "sdpa": _sdpa,
    "flex": _flex,
    "varlen": _varlen,
}
