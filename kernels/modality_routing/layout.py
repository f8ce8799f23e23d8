"""What may see what in a packed batch of text and images: two intervals, not a mask.

Position i sees j when both lie in one document and j <= i, or both lie in one image. So a query
sees one run of keys [key_starts, key_ends), and a key is seen by one run of queries
[query_starts, query_ends): four int32 numbers a position say all that T x T booleans would.
Source: Zhou et al., Transfusion, arXiv 2408.11039, figure 4.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_cu_seqlens, check_same_device, check_shape
from ..flex_blocks import interval_block_mask
from ..packed_attention import PackedLayout

__all__ = ["MixedLayout"]

Spans = Tensor | Sequence[Sequence[int]]


class MixedLayout(PackedLayout):
    """A `PackedLayout` with images, whose positions see each other both ways.

    Built once a batch, outside of compiled code, and shared by all layers.

    Attributes:
        key_starts, key_ends: (T,) int32, the keys that each query sees.
        query_starts, query_ends: (T,) int32, the queries that each key is seen by.

    Args:
        cu_seqlens: (D + 1,) int32, every row border included.
        position_ids: (T,) int64, positions inside documents.
        max_seqlen: longest document, a host integer.
        row_length: S; where T is not a multiple of it, all of T is taken as one row.
        image_spans: (I, 2) first position and end of each image, in ascending order; pairs of host
            integers or a tensor. Empty spans are no images, so that a batch can be filled up to a
            number of images that never changes.

    Raises:
        ValueError: borders that do not fit, or spans that overlap, leave the batch or reach over a
            document's border. What is only known on a GPU is checked by an assertion of the
            device, which does not wait and ends the process when it fails.
    """

    def __init__(
        self,
        cu_seqlens: Tensor,
        position_ids: Tensor,
        max_seqlen: int,
        row_length: int,
        image_spans: Spans = (),
    ) -> None:
        check_cu_seqlens(cu_seqlens, position_ids.shape[0])
        super().__init__(cu_seqlens, position_ids, max_seqlen, row_length)
        host_spans, spans = _as_tensors(image_spans, cu_seqlens.device)
        check_same_device(cu_seqlens=cu_seqlens, position_ids=position_ids, image_spans=spans)
        self.image_spans = spans
        self.is_causal = spans.shape[0] == 0 or self.total == 0
        if host_spans is not None:
            _check_order(host_spans, self.total)
            if cu_seqlens.device.type == "cpu":
                _check_borders(host_spans, cu_seqlens.tolist())
        position = torch.arange(self.total, device=cu_seqlens.device, dtype=torch.int32)
        # The first border above a position ends its document.
        document = torch.searchsorted(cu_seqlens, position, right=True, out_int32=True)
        self.key_starts = cu_seqlens[document - 1]
        self.query_ends = cu_seqlens[document]
        self.key_ends, self.query_starts = position + 1, position
        if not self.is_causal:
            starts, ends = self._open_images(position)
            if spans.device.type != "cpu":
                self._assert_spans(starts, ends)

    def _open_images(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Widen the intervals of positions inside images; gives the images' starts and ends."""
        starts, ends = self.image_spans.t().contiguous()
        image = torch.searchsorted(ends, position, right=True, out_int32=True)
        image = image.clamp(max=ends.shape[0] - 1)
        start, end = starts[image], ends[image]
        is_inside = (position >= start) & (position < end)
        self.key_ends = torch.where(is_inside, end, self.key_ends)
        self.query_starts = torch.where(is_inside, start, self.query_starts)
        return starts, ends

    def _assert_spans(self, starts: Tensor, ends: Tensor) -> None:
        """What the host cannot look at, as an assertion in the device's own queue."""
        in_order = (ends >= starts).all() & (starts[1:] >= ends[:-1]).all()
        in_batch = (starts[0] >= 0) & (ends[-1] <= self.total)
        before_end = (self.key_ends <= self.query_ends).all()
        after_start = (self.query_starts >= self.key_starts).all()
        message = "MixedLayout: image spans overlap, leave the batch or cross a document's border"
        torch._assert_async(in_order & in_batch & before_end & after_start, message)

    @functools.cached_property
    def mixed_runs(self) -> tuple[tuple[int, int, bool], ...]:
        """(length, count, has images) of neighbouring documents alike; waits for the device."""
        images = [start for start, end in self.image_spans.tolist() if end > start]
        documents, next_image = [], 0
        for start, end in itertools.pairwise(self.cu_seqlens.tolist()):
            first = next_image
            while next_image < len(images) and images[next_image] < end:
                next_image += 1
            documents.append((end - start, next_image > first))
        alike = ((document, len(list(same))) for document, same in itertools.groupby(documents))
        return tuple((length, count, has_images) for (length, has_images), count in alike)

    @property
    def row_mask(self) -> Tensor:
        """(R, 1, S, S) bool, True where a query (third) may see a key (fourth)."""
        if self._row_mask is not None:
            return self._row_mask
        mask = self.mask_of(0, self.total, self.rows)
        if not torch.compiler.is_compiling():
            self._row_mask = mask
        return mask

    def mask_of(self, start: int, end: int, count: int) -> Tensor:
        """(count, 1, n, n) bool masks of `count` equal stretches from position start to end."""
        device = self.key_starts.device
        key = torch.arange(start, end, device=device, dtype=torch.int32).view(count, 1, 1, -1)
        first = self.key_starts[start:end].view(count, 1, -1, 1)
        last = self.key_ends[start:end].view(count, 1, -1, 1)
        return (key >= first) & (key < last)

    def prepare(self, backend: str) -> None:
        """Build what compiled blocks cannot build; call once a batch, outside of them."""
        is_flex = backend == "auto" and self.key_starts.is_cuda and not self.is_causal
        if self.total:
            super().prepare("flex" if is_flex else backend)

    def _build_block_mask(self) -> Any:
        key_starts, key_ends = self.key_starts, self.key_ends

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key >= key_starts[query]) & (key < key_ends[query])

        return interval_block_mask(key_starts, key_ends, visible)


def _as_tensors(spans: Spans, device: torch.device) -> tuple[list[list[int]] | None, Tensor]:
    """The spans on the host where they are known there, and (I, 2) int32 on the device."""
    if isinstance(spans, Tensor):
        check_shape("image_spans", spans, (None, 2))
        if spans.dtype not in (torch.int32, torch.int64):
            found = str(spans.dtype).removeprefix("torch.")
            raise ValueError(f"image_spans is {found}, expected int32, int64")
        if spans.device.type != "cpu":
            return None, spans.int()
    elif any(len(span) != 2 for span in spans):
        raise ValueError("image_spans holds a span that is not a pair of start and end")
    host = torch.as_tensor(spans, dtype=torch.int32).reshape(-1, 2)
    pinned = host.pin_memory() if device.type == "cuda" else host
    return host.tolist(), pinned.to(device, non_blocking=True)


def _shown(image: int, start: int, end: int) -> str:
    return f"image_spans[{image}] = ({start}, {end})"


def _check_order(spans: list[list[int]], total: int) -> None:
    before = 0
    for image, (start, end) in enumerate(spans):
        if end < start or start < 0 or end > total:
            shown = _shown(image, start, end)
            raise ValueError(f"{shown} is no stretch of the batch's {total} positions")
        if start < before:
            shown = _shown(image, start, end)
            raise ValueError(
                f"{shown} starts before the one ahead of it ends, at {before}; sort them"
            )
        before = end


def _check_borders(spans: list[list[int]], borders: list[int]) -> None:
    for image, (start, end) in enumerate(spans):
        border = borders[min(bisect.bisect_right(borders, start), len(borders) - 1)]
        if start < end and end > border:
            raise ValueError(
                f"{_shown(image, start, end)} reaches over the document border at {border}; "
                "an image lies in one document"
            )
