"""Steps of a run as packed batches, assembled ahead in a background thread.

The loader has no state of its own: it is told which sample comes first and seeks there at once. All ranks walk the
same global order; each takes a contiguous share of every step.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from ...models.batch import PackedBatch
from ...models.errors import DataError
from .dataset import Dataset, Source
from .order import SampleOrder
from .packing import collate, read_row

__all__ = ["PackedLoader", "StepBatch", "held_out_batches"]


@dataclass(frozen=True)
class StepBatch:
    """This rank's micro-batches of one step.

    Args:
        first_sample: global index of the step's first sample.
        rows: samples of the step over all ranks.
        micro_batches: in order.
        source_counts: samples of the step by source, over all ranks.
        epochs: passes each source has been through whole, at the step's last sample of it.
        wait_s: how long the loop waited for this step, in seconds.
    """

    first_sample: int
    rows: int
    micro_batches: list[PackedBatch]
    source_counts: dict[str, int]
    epochs: dict[str, int]
    wait_s: float = field(default=0.0, compare=False)


class PackedLoader:
    """Iterates over steps from any sample on.

    Args:
        data: opened sources.
        seed: of the order.
        batch_rows: samples of a step, over all ranks.
        micro_batch_rows: samples a rank runs at once; divides its share.
        data_rank, data_ranks: this rank's share.
        start_sample: the first sample to give.
        end_sample: where to stop assembling ahead; None is never.
        pin_memory: page-locked tensors, for copies that do not block.
    """

    def __init__(
        self,
        data: Dataset,
        *,
        seed: int,
        batch_rows: int,
        micro_batch_rows: int,
        data_rank: int = 0,
        data_ranks: int = 1,
        start_sample: int = 0,
        end_sample: int | None = None,
        pin_memory: bool = False,
    ) -> None:
        self.data, self.batch_rows, self.micro_batch_rows = data, batch_rows, micro_batch_rows
        self.data_rank, self.data_ranks, self.pin_memory = data_rank, data_ranks, pin_memory
        self.order = order_of(data, seed)
        self._byte_lengths = data.vocabulary.token_byte_lengths()
        self._next, self._end = start_sample, end_sample
        self._queue: queue.Queue[StepBatch | BaseException] = queue.Queue(data.config.prefetch_steps)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._assemble_ahead, name="weft-loader", daemon=True)
        self._thread.start()

    def next_step(self) -> StepBatch:
        """The next step; waits for it if need be.

        Raises:
            DataError: what went wrong while it was assembled.
        """
        begin = time.perf_counter()
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        object.__setattr__(item, "wait_s", time.perf_counter() - begin)
        return item

    def close(self) -> None:
        """Stop the background thread."""
        self._closing.set()
        while self._thread.is_alive():
            try:
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)

    def __enter__(self) -> PackedLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def assemble(self, first_sample: int) -> StepBatch:
        """The step that begins at a sample; a pure function of it."""
        samples = np.arange(first_sample, first_sample + self.batch_rows)
        located = self.order.locate(samples)
        share = self.batch_rows // self.data_ranks
        mine = slice(self.data_rank * share, (self.data_rank + 1) * share)
        length = self.data.config.sequence_length
        rows = [
            read_row(self.data.sources[s].train, int(k), length, sample=int(i), source=int(s))
            for i, s, k in zip(samples[mine], located.source[mine], located.sequence[mine], strict=True)
        ]
        cut = self.micro_batch_rows
        batches = [
            collate(rows[i : i + cut], self.data.config.repeat_filter, self._byte_lengths) for i in range(0, share, cut)
        ]
        if self.pin_memory:
            batches = [batch.pin_memory() for batch in batches]
        names = self.order.names
        counts = np.bincount(located.source, minlength=len(names))
        epochs = {names[s]: int(located.epoch[located.source == s].max()) for s in np.unique(located.source)}
        return StepBatch(first_sample, self.batch_rows, batches, dict(zip(names, counts.tolist(), strict=True)), epochs)

    def _assemble_ahead(self) -> None:
        # Tensors are filled by numpy; torch's own threads would only take cores from the step.
        torch.set_num_threads(1) if torch.cuda.is_available() else None
        try:
            while not self._closing.is_set() and (self._end is None or self._next < self._end):
                self._put(self.assemble(self._next))
                self._next += self.batch_rows
        except BaseException as error:  # noqa: BLE001 - handed to the consumer, who raises it
            self._put(error)

    def _put(self, item: StepBatch | BaseException) -> None:
        while not self._closing.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue


def order_of(data: Dataset, seed: int) -> SampleOrder:
    """The order of a run over its sources."""
    length = data.config.sequence_length
    weights = [source.weight for source in data.sources if source.weight is not None]
    return SampleOrder([s.name for s in data.sources], [s.sequences(length) for s in data.sources], weights or None, seed)


def check_epochs(data: Dataset, order: SampleOrder, total_samples: int) -> None:
    """Check that no source is repeated more often than it allows.

    Raises:
        DataError: one would be.
    """
    for place, source in enumerate(data.sources):
        epochs = total_samples * order.share(place) / source.sequences(data.config.sequence_length)
        if source.max_epochs is not None and epochs > source.max_epochs:
            raise DataError(
                f"data source {source.name!r}: too few samples: the run would go through it {epochs:.2f} times, its max_epochs is "
                f"{source.max_epochs:g}; shorten the run, lower its weight or raise max_epochs"
            )


def held_out_batches(data: Dataset, source: Source, rows: int, max_tokens: int | None = None) -> Iterator[PackedBatch]:
    """A source's held-out documents, every target once; the short rest of the stream is a batch of its own."""
    length, stream = data.config.sequence_length, source.held_out
    whole = max(0, (len(stream) - 1) // length)
    if max_tokens is not None:
        whole = min(whole, max(1, max_tokens // length))
    byte_lengths = data.vocabulary.token_byte_lengths()
    for first in range(0, whole, rows):
        chunk = [read_row(stream, k, length, sample=k) for k in range(first, min(first + rows, whole))]
        yield collate(chunk, None, byte_lengths)
    rest = len(stream) - 1 - whole * length
    if rest > 0 and max_tokens is None:
        yield collate([read_row(stream, whole, length, sample=whole)], None, byte_lengths)
