"""Attention in both directions inside each segment of a packed sequence, such as the patches of one image.

T positions of I segments laid end to end, H heads of width hd. Segments of equal length that stand together form a run,
known on the host: attention of a run is one dense call without a mask, so a batch of few lengths needs no special
kernel. Backends that give the same: `runs` (that), `flex` (a block mask), `varlen` (flash attention over cu_seqlens,
CUDA, 16-bit), `mask` (one dense call under a T x T mask, the definition). None waits for the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .flex_blocks import flex_attend, interval_block_mask

__all__ = ["SEGMENT_BACKENDS", "Segments", "segment_attention", "segment_attention_problem"]

SIXTEEN_BIT = (torch.float16, torch.bfloat16)
MOST_RUNS = 8
"""With more, a gather of values by segment is cheaper than a call for each run."""


class Segments:
    """Where the segments of a packed sequence lie; an opaque object, so that FSDP2 leaves it as it is.

    Attributes:
        runs: (segments, length of each) of neighbours of equal length, host integers.
        total: T.
        count: I.
        ids: (T,) int64, the segment of each position.
        cu_seqlens: (I + 1,) int32.

    Args:
        runs: as above; runs without segments are left out.
        longest: bound of every length that never changes, for compiled code; None is the longest there is.

    Raises:
        ValueError: no segment at all, or one without positions.
    """

    def __init__(
        self,
        runs: Sequence[tuple[int, int]],
        device: torch.device | str = "cpu",
        longest: int | None = None,
    ) -> None:
        self.runs = tuple((count, length) for count, length in runs if count)
        if not self.runs or min(length for _, length in self.runs) < 1:
            raise ValueError(f"runs {list(runs)} hold no segment, or one without positions")
        self.count = sum(count for count, _ in self.runs)
        self.total = sum(count * length for count, length in self.runs)
        self.longest = max(longest or 0, *(length for _, length in self.runs))
        lengths = torch.tensor([n for count, n in self.runs for _ in range(count)])
        borders = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        ids = torch.repeat_interleave(torch.arange(self.count), lengths)
        self.cu_seqlens = borders.to(device, non_blocking=True)
        self.ids = ids.to(device, non_blocking=True)
        self._block_mask: Any = None

    @property
    def has_few_runs(self) -> bool:
        """Whether to work run by run; never in compiled code, which would be compiled anew for other counts."""
        return len(self.runs) <= MOST_RUNS and not torch.compiler.is_compiling()

    def split(self, x: Tensor) -> list[Tensor]:
        """(T, ...) as one (segments, length, ...) view a run."""
        parts = x.split([count * length for count, length in self.runs])
        return [p.unflatten(0, run) for p, run in zip(parts, self.runs, strict=True)]

    def split_segments(self, values: Tensor) -> list[Tensor]:
        """(I, ...) as one (segments, 1, ...) view a run, which goes with `split`."""
        parts = values.split([count for count, _ in self.runs])
        return [part[:, None] for part in parts]

    def apply(
        self, change: Callable[..., Tensor], positions: Sequence[Tensor], values: Sequence[Tensor]
    ) -> Tensor:
        """`change(*positions, *values)`, elementwise, of (T, d) each with (I, d) each of their segments.

        Run by run values are broadcast, and their gradient is a plain sum; else they are gathered by segment.
        """
        if not self.has_few_runs:
            return change(*positions, *(value[self.ids] for value in values))
        parts = [self.split(x) for x in positions] + [self.split_segments(v) for v in values]
        done = [change(*run).flatten(0, 1) for run in zip(*parts, strict=True)]
        return done[0] if len(done) == 1 else torch.cat(done)

    @property
    def block_mask(self) -> Any:
        """flex_attention's BlockMask."""
        if self._block_mask is None:
            ids, borders = self.ids, self.cu_seqlens.long()

            def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                return ids[query] == ids[key]

            self._block_mask = interval_block_mask(borders[ids], borders[ids + 1], visible)
        return self._block_mask

    def prepare(self, backend: str) -> None:
        """Build what compiled blocks cannot build; call once a batch, outside of them."""
        if backend == "flex":
            _ = self.block_mask


def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, backend: str = "auto"
) -> Tensor:
    """`softmax(q k^T / sqrt(hd)) v` inside each segment.

    Args:
        q, k, v: (T, H, hd).
        backend: `auto` is varlen where it runs, else runs.

    Returns:
        (T, H, hd).

    Raises:
        ValueError: unknown backend, one that does not run on this device and type, or shapes that do not fit.
    """
    if q.shape[0] != segments.total:
        raise ValueError(f"q has {q.shape[0]} positions but the segments have {segments.total}")
    if backend == "auto":
        backend = "varlen" if _runs_varlen(q) else "runs"
    problem = segment_attention_problem(
        backend, q.device, q.dtype, torch.is_grad_enabled() and q.requires_grad
    )
    if problem:
        raise ValueError(problem)
    return SEGMENT_BACKENDS[backend](q, k, v, segments)


def segment_attention_problem(
    backend: str, device: torch.device, dtype: torch.dtype, needs_gradient: bool
) -> str | None:
    """Why `backend` cannot run on this device and type, in one line; None if it can."""
    if backend != "auto" and backend not in SEGMENT_BACKENDS:
        return f"unknown attention backend {backend!r}; known: auto, {', '.join(SEGMENT_BACKENDS)}"
    if backend == "varlen" and (device.type != "cuda" or dtype not in SIXTEEN_BIT):
        found = f"{device.type} and {str(dtype).removeprefix('torch.')}"
        return f"attention backend varlen needs CUDA and a 16-bit type, not {found}; use auto"
    if backend == "flex" and device.type == "cpu" and needs_gradient:
        return "attention backend flex has no gradient on the CPU; use auto"
    return None


def _runs_varlen(q: Tensor) -> bool:
    if not q.is_cuda or q.dtype not in SIXTEEN_BIT or q.shape[-1] % 8:
        return False
    return torch.version.hip is None and torch.cuda.get_device_capability(q.device) >= (8, 0)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Of (segments, length, H, hd)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def _runs(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    parts = zip(*(segments.split(x) for x in (q, k, v)), strict=True)
    done = [_attend(*qkv).flatten(0, 1) for qkv in parts]
    return done[0] if len(done) == 1 else torch.cat(done)


def _mask(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    return _attend(q[None], k[None], v[None], segments.ids[:, None] == segments.ids)[0]


def _flex(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    return flex_attend(q, k, v, segments.block_mask)


def _varlen(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    borders, longest = segments.cu_seqlens, segments.longest
    out = varlen_attn(q, k, v, borders, borders, longest, longest)
    assert isinstance(out, Tensor)  # a pair only where return_aux asks for it
    return out


SEGMENT_BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Segments], Tensor]] = {
    "runs": _runs,
    "flex": _flex,
    "varlen": _varlen,
    "mask": _mask,
}
