"""Packed batches of the i-th step, assembled ahead in the background.

A step takes the next `batch_rows` samples of the run's order; this rank gets a contiguous share of
them (or, where patches are stored, a share with as many patches as the others'), cut into micro-batches. The loader's whole state is how many samples were given out, so a
restart seeks.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...models.batch import PackedBatch
from ...models.errors import ConfigError
from ...models.task import Task
from .balance import deal_rows, rank_balance
from .dataset import Dataset, Source
from .document_order import RowOf
from .document_rows import DocumentRows
from .images.encoded_rows import EncodedRows
from .images.packing import ImageRow
from .images.rows import ImageRows
from .order import Located
from .packers import (
    document_assembler,
    image_assembler,
    open_packer,
    stream_assembler,
    stream_of,
)
from .packing import Rows

__all__ = ["HeldOutBatches", "PackedLoader", "StepBatch", "held_out_batches", "next_start"]

LOOK_S = 0.25
"""Seconds between questions to `should_stop` while a step is waited for: a signal is heard between them."""

TASK_TOKENS = 1 << 16
"""A worker assembles about this many positions before it hands over: two threads that meet cost more than a small step."""


LARGEST_THREADS = 8
"""That decode pictures where data.images.threads does not say."""


@dataclass(frozen=True)
class StepBatch:
    """What this rank trains on in one step.

    Args:
        first_sample: global index of the step's first sample.
        rows: samples of the step, over all ranks.
        micro_batches: this rank's share.
        source_counts: samples of the step by source, over all ranks.
        epochs: whole passes made over each source of the step before its last sample here.
        wait_s: how long the caller was kept waiting for it.
        patch_balance: stored patches of the fullest rank over the mean; None where none are stored.
    """

    first_sample: int
    rows: int
    micro_batches: list[PackedBatch]
    source_counts: dict[str, int]
    epochs: dict[str, int]
    wait_s: float = 0.0
    patch_balance: float | None = None


class PackedLoader:
    """Steps of a run, in order, from any sample on.

    Args:
        batch_rows: samples of one step over all ranks.
        micro_batch_rows: samples of one micro-batch of this rank; None is its whole share.
        data_rank, data_ranks: this rank among those that see different data.
        start_sample: samples given out before; `state()["samples"]` of the loader to go on from.
        end_sample: nothing is assembled from here on; None is no end.
        leave_out: ranges `[first, stop)` of samples; a step that would touch one begins after it.
        prefetch: steps assembled ahead.
        pin_memory: page-lock the batches, for asynchronous copies to a GPU.
        task: draws what is random in a micro-batch; None leaves it out.
        threads: workers; steps come out in order with any number. None is one, or what data.images.threads says.
    """

    def __init__(
        self,
        data: Dataset,
        *,
        seed: int,
        batch_rows: int,
        micro_batch_rows: int | None = None,
        data_rank: int = 0,
        data_ranks: int = 1,
        start_sample: int = 0,
        end_sample: int | None = None,
        leave_out: Sequence[tuple[int, int]] = (),
        prefetch: int | None = None,
        pin_memory: bool = False,
        task: Task | None = None,
        threads: int | None = None,
    ) -> None:
        if batch_rows % data_ranks:
            raise ConfigError(f"{batch_rows} samples a step do not divide over {data_ranks} ranks")
        self._share = batch_rows // data_ranks
        self._micro_rows = micro_batch_rows or self._share
        if self._share % self._micro_rows:
            raise ConfigError(
                f"micro-batches of {self._micro_rows} samples do not divide a share of "
                f"{self._share}"
            )
        self.data = data
        self.order = data.order(seed)
        self._task = task
        self._patches = [source.train_patches for source in data.sources]
        self._packer = open_packer(data, seed)
        self._batch_rows = batch_rows
        self._data_rank, self._data_ranks = data_rank, data_ranks
        self._pin_memory = pin_memory
        self._samples = self._next_sample = start_sample
        self._end_sample = end_sample
        self._leave_out = leave_out
        self._waited_s = 0.0
        self._ready: deque[StepBatch | BaseException] = deque()
        self._pending: deque[Future[list[StepBatch | BaseException]]] = deque()
        threads = threads or _threads_of(data)
        self._pool = ThreadPoolExecutor(threads, "weft-data")
        ahead = prefetch or data.config.prefetch_steps
        share_tokens = self._share * data.config.sequence_length
        self._steps_a_task = max(1, min(ahead // (2 * threads), TASK_TOKENS // share_tokens))
        for _ in range(-(-ahead // self._steps_a_task)):
            self._submit()

    def wait(self, should_stop: Callable[[], bool]) -> bool:
        """Until the next step is there, True, or `should_stop` says yes, False; the step stays to come in either case."""
        while not self._ready and self._pending and not self._pending[0].done():
            if should_stop():
                return False
            started = time.perf_counter()
            with contextlib.suppress(NotYet):
                self._pending[0].exception(timeout=LOOK_S)
            self._waited_s += time.perf_counter() - started
        return True

    def next_step(self) -> StepBatch:
        """The next step's micro-batches.

        Raises:
            DataError: a source is used up (`max_epochs`).
            ValueError: the loader was closed, or `end_sample` is reached.
        """
        wait_s, self._waited_s = self._waited_s, 0.0
        if not self._ready:
            if not self._pending:
                raise ValueError(
                    f"no step at sample {self._samples}: the loader is closed or at its end_sample"
                )
            started = time.perf_counter()
            self._ready.extend(self._pending.popleft().result())
            wait_s += time.perf_counter() - started
            self._submit()
        batch = self._ready.popleft()
        if isinstance(batch, BaseException):
            raise batch
        self._samples = batch.first_sample + batch.rows
        return replace(batch, wait_s=wait_s) if wait_s else batch

    def give_back(self, batch: StepBatch) -> None:
        """Undo the last `next_step`: its batch was not trained on and comes again."""
        self._ready.appendleft(batch)
        self._samples = batch.first_sample

    def state(self) -> dict[str, Any]:
        """JSON-able position; the same on all ranks."""
        return {
            "samples": self._samples,
            "seed": self.order.seed,
            "fingerprint": self.data.fingerprint,
        }

    def source_counts(self, sample_stop: int | None = None) -> dict[str, int]:
        """Samples each source has given among the first `sample_stop` (default: so far)."""
        return self.order.counts(self._samples if sample_stop is None else sample_stop)

    def source_epochs(self, sample_stop: int | None = None) -> dict[str, float]:
        """Passes made over each source."""
        counts = self.source_counts(sample_stop)
        return {source.name: counts[source.name] / source.sequences for source in self.data.sources}

    def close(self) -> None:
        """Stop assembling; the loader gives nothing after this."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()
        self._ready.clear()

    def __enter__(self) -> PackedLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def assemble(self, first_sample: int) -> StepBatch:
        """The step that begins at a sample, here and now; a pure function of it."""
        located = self.order.locate(first_sample, first_sample + self._batch_rows)
        rows, balance = self._deal(located)
        batches = [
            self._micro_batch(first_sample, located, rows[first : first + self._micro_rows])
            for first in range(0, self._share, self._micro_rows)
        ]
        names = [source.name for source in self.data.sources]
        counts = np.bincount(located.sources, minlength=len(names)).tolist()
        epochs = {
            names[j]: int(located.epochs[located.sources == j][-1])
            for j, count in enumerate(counts)
            if count
        }
        return StepBatch(
            first_sample,
            self._batch_rows,
            batches,
            dict(zip(names, counts, strict=True)),
            epochs,
            patch_balance=balance,
        )

    def _deal(self, located: Located) -> tuple[NDArray[np.int64], float | None]:
        """This rank's rows of a step: a run of them, or, where patches are stored, as evenly many patches as can be."""
        if any(stream is None for stream in self._patches):
            first = self._data_rank * self._share
            return np.arange(first, first + self._share), None
        length = self.data.sequence_length
        loads = np.array(
            [
                stream.count(sequence * length, length)
                for stream, sequence in zip(
                    (self._patches[j] for j in located.sources.tolist()),
                    located.sequences.tolist(),
                    strict=True,
                )
                if stream is not None
            ]
        )
        dealt = deal_rows(loads, self._data_ranks, self._micro_rows)
        return dealt[self._data_rank], rank_balance(loads, dealt)

    def _submit(self) -> None:
        starts: list[int] = []
        while len(starts) < self._steps_a_task:
            first = next_start(self._next_sample, self._batch_rows, self._leave_out)
            if self._end_sample is not None and first >= self._end_sample:
                break
            starts.append(first)
            self._next_sample = first + self._batch_rows
        if starts:
            self._pending.append(self._pool.submit(self._assemble_all, starts))

    def _assemble_all(self, starts: Sequence[int]) -> list[StepBatch | BaseException]:
        """The steps that begin at these samples; an error takes the place of the step that has it."""
        found: list[StepBatch | BaseException] = []
        for first in starts:
            try:
                found.append(self.assemble(first))
            except BaseException as error:
                return [*found, error]
        return found

    def _micro_batch(
        self, first_sample: int, located: Located, part: NDArray[np.int64]
    ) -> PackedBatch:
        samples = (first_sample + part).tolist()
        batch = self._packer.pack(samples, located.sources[part], located.sequences[part])
        if self._task is not None:
            batch = self._task.draw(batch, self.order.seed)
        return batch.pin_memory() if self._pin_memory else batch


def _threads_of(data: Dataset) -> int:
    """Pictures are decoded without holding Python's lock, so threads help there; ids are copied faster by one."""
    images = data.config.images
    if images is None or images.kind != "pixels":
        return 1
    return images.threads or min(LARGEST_THREADS, len(os.sched_getaffinity(0)))


def next_start(sample: int, rows: int, leave_out: Sequence[tuple[int, int]]) -> int:
    """Where the next step of `rows` samples begins, at `sample` or after the ranges `[first, stop)` it would touch."""
    for first, stop in sorted(leave_out):
        if sample < stop and sample + rows > first:
            sample = stop
    return sample


class HeldOutBatches:
    """The held-out documents of one source as batches; every rank gives the same number of them.

    Full rows come first, `micro_batch_rows` at a time; what is left over of a stream is one shorter row in a
    batch of its own. A rank that has nothing at its turn gives a batch whose targets are all
    ignored, because a sharded model's forward needs every rank.

    Args:
        max_tokens: look at no more positions than this (rounded down to whole rows), over all
            ranks.
    """

    def __init__(
        self,
        dataset: Dataset,
        source: Source,
        micro_batch_rows: int,
        data_rank: int = 0,
        data_ranks: int = 1,
        max_tokens: int | None = None,
    ) -> None:
        self._source, self._held_out = source, source.held_out
        self._length = dataset.sequence_length
        self._micro_rows, self._rank, self._ranks = micro_batch_rows, data_rank, data_ranks
        self._tail = 0
        if isinstance(self._held_out, ImageRows | EncodedRows):
            self._images = image_assembler(dataset, None)
            self._rows = self._held_out.sequences
            if max_tokens is not None:
                self._rows = min(self._rows, max(1, max_tokens // self._length))
            return
        if isinstance(self._held_out, DocumentRows):
            self._documents = document_assembler(dataset, None)
            self._rows = self._held_out.sequences
            if max_tokens is not None:
                self._rows = min(self._rows, max(1, max_tokens // self._length))
            return
        self._patches = source.held_out_patches
        self._assembler = stream_assembler(dataset, is_training=False)
        tokens = self._held_out.tokens
        self._rows = self._held_out.sequences(self._length)
        self._tail = max(0, tokens - 1 - self._rows * self._length)
        if max_tokens is not None and max_tokens < tokens - 1:
            self._rows, self._tail = min(self._rows, max(1, max_tokens // self._length)), 0

    @property
    def _rounds(self) -> int:
        return -(-self._rows // (self._micro_rows * self._ranks))

    def __len__(self) -> int:
        return self._rounds + (1 if self._tail else 0)

    def __iter__(self) -> Iterator[PackedBatch]:
        for turn in range(self._rounds):
            first = (turn * self._ranks + self._rank) * self._micro_rows
            rows = list(range(first, min(first + self._micro_rows, self._rows)))
            if isinstance(self._held_out, DocumentRows):
                yield self._document_batch(self._held_out, rows)
            elif isinstance(self._held_out, ImageRows | EncodedRows):
                yield self._image_batch(self._held_out, rows)
            else:
                yield self._batch(rows or [0], self._length, ignore_all=not rows)
        if self._tail:
            yield self._batch([self._rows], self._tail, ignore_all=self._rank != 0)

    def _document_batch(self, held_out: DocumentRows, rows: list[int]) -> PackedBatch:
        """Some rows; padding alone where there are none left."""
        index = self._source.index
        return self._documents.pack(
            [RowOf(row, index, held_out, row) for row in rows] or [RowOf(0, index, held_out, None)]
        )

    def _image_batch(self, held_out: ImageRows | EncodedRows, rows: list[int]) -> PackedBatch:
        """Some images; the first once more, as a stand-in, where there are none left."""
        wanted = [ImageRow(row, self._source.index, held_out, row) for row in rows or [0]]
        return self._images.pack(wanted, is_stand_in=not rows)

    def _batch(self, rows: list[int], length: int, *, ignore_all: bool) -> PackedBatch:
        stream = stream_of(self._held_out)
        ids = np.empty((len(rows), length + 1), stream.dtype)
        starts = [row * self._length for row in rows]
        borders = stream.read_rows(ids, range(len(rows)), starts)
        bits = None
        if self._patches is not None:
            bits = np.stack([self._patches.read(start, length) for start in starts])
        return self._assembler.pack(
            Rows(ids, borders, tuple(rows), (self._source.index,) * len(rows), bits),
            ignore_all=ignore_all,
        )


def held_out_batches(
    dataset: Dataset,
    source: str,
    micro_batch_rows: int,
    data_rank: int = 0,
    data_ranks: int = 1,
    *,
    max_tokens: int | None = None,
) -> HeldOutBatches:
    """Batches of a source's held-out documents for evaluation; sized, and iterable more than once.

    Raises:
        DataError: no such source.
    """
    return HeldOutBatches(
        dataset, dataset.source(source), micro_batch_rows, data_rank, data_ranks, max_tokens
    )
