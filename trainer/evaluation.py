"""Held-out loss, perplexity and bits per byte, by source and in total, equal on any number of ranks.

Sums of batches go to the host in one copy a source, and every rank adds the same numbers without rounding. Bits per byte come in two kinds, see `Scores`. Read docs/evaluate.md for what is counted.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..models.batch import IGNORED, STAND_IN, PackedBatch
from ..models.task import Task
from .data.dataset import Dataset
from .data.loader import held_out_batches
from .engines.protocol import Engine
from .evaluation_config import EvalConfig

__all__ = ["Evaluation", "Scores", "evaluate"]

DEFAULT_BATCH_TOKENS = 16_384
DRAW_SEED = 0x5EED
"""Of what is random in held-out batches: the same noise at every evaluation of every run."""


@dataclass(frozen=True)
class Scores:
    """What was measured on some held-out documents.

    Args:
        loss: nats a counted target, ends of documents included.
        perplexity: exp(loss).
        bits_per_byte: all of the cross-entropy, ends of documents included, over the raw bytes: the length of
            a lossless code of these documents (BLT, arXiv 2412.09871, equation 3). None where ids have no bytes.
        bits_per_byte_with_specials: the same bits over raw bytes plus special targets, as BLT's code counts.
        tokens: counted targets.
        bytes: raw bytes they stand for.
        specials: counted targets that stand for no bytes.
        others: further losses of the model, each a mean over its own count.
    """

    loss: float
    perplexity: float
    bits_per_byte: float | None
    bits_per_byte_with_specials: float | None
    tokens: int
    bytes: int
    specials: int
    others: dict[str, float] = field(default_factory=dict)

    def numbers(self) -> dict[str, float | int]:
        """Those that are known, by name."""
        plain = {name: value for name, value in asdict(self).items() if name != "others"}
        return {
            name: value for name, value in {**plain, **self.others}.items() if value is not None
        }


@dataclass(frozen=True)
class Evaluation:
    """Scores of every source that holds documents out, and of all of them together; `total` is None without any."""

    sources: dict[str, Scores]
    total: Scores | None

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        sources = {name: scores.numbers() for name, scores in self.sources.items()}
        return {"sources": sources, "total": self.total.numbers() if self.total else None}

    def as_metrics(self) -> dict[str, float | int]:
        """Flat: `eval/loss` and so on in total, `eval/SOURCE/loss` where there are several sources."""
        if self.total is None:
            return {}
        flat = {f"eval/{name}": value for name, value in self.total.numbers().items()}
        if len(self.sources) > 1:
            for source, scores in self.sources.items():
                flat |= {f"eval/{source}/{name}": value for name, value in scores.numbers().items()}
        return flat


@dataclass
class _Sums:
    """Values of single batches; they are added in one go at the end, without rounding in between."""

    terms: dict[str, list[float]] = field(default_factory=dict)
    vectors: dict[str, list[float]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    bytes: int = 0
    specials: int = 0

    def __add__(self, other: _Sums) -> _Sums:
        names = {**self.terms, **other.terms}
        terms = {name: [*self.terms.get(name, ()), *other.terms.get(name, ())] for name in names}
        counts = {name: self.counts.get(name, 0) + other.counts.get(name, 0) for name in names}
        return _Sums(
            terms,
            _add_vectors(self.vectors, other.vectors),
            counts,
            self.tokens + other.tokens,
            self.bytes + other.bytes,
            self.specials + other.specials,
        )

    def scores(self, task: Task, *, has_bytes: bool) -> Scores:
        means = {
            name: math.fsum(values) / max(1, self.counts[name])
            for name, values in self.terms.items()
        }
        first = next(iter(means))
        loss = means.pop(first)
        bits = math.fsum(self.terms[first]) / math.log(2)
        known = has_bytes and self.bytes > 0
        vectors = {name: torch.tensor(values) for name, values in self.vectors.items()}
        means |= {name: float(value) for name, value in task.summarise(vectors).items()}
        return Scores(
            loss=loss,
            perplexity=math.exp(loss) if loss < 700 else math.inf,
            bits_per_byte=bits / self.bytes if known else None,
            bits_per_byte_with_specials=bits / (self.bytes + self.specials) if known else None,
            tokens=self.tokens,
            bytes=self.bytes,
            specials=self.specials,
            others=means,
        )


def evaluate(
    engine: Engine,
    task: Task,
    data: Dataset,
    config: EvalConfig,
    *,
    micro_batch_tokens: int | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Evaluation | None:
    """Collective: scores of the held-out documents, the same on every rank and for any number of them.

    The loss is the first term the task names; its other terms and metrics come along as `others`.

    Args:
        config: `max_tokens` of each source, `batch_tokens` a rank runs at once.
        micro_batch_tokens: used where `config.batch_tokens` is not set.
        should_stop: asked on every rank before each round of batches.

    Returns:
        None where any rank was asked to stop.
    """
    weights = engine.averaged() if config.ema else contextlib.nullcontext()
    with weights:
        return _evaluate_sources(engine, task, data, config, micro_batch_tokens, should_stop)


def _evaluate_sources(
    engine: Engine,
    task: Task,
    data: Dataset,
    config: EvalConfig,
    micro_batch_tokens: int | None,
    should_stop: Callable[[], bool] | None,
) -> Evaluation | None:
    tokens = config.batch_tokens or micro_batch_tokens or DEFAULT_BATCH_TOKENS
    rows = max(1, tokens // data.sequence_length)
    byte_lengths = data.vocabulary.token_byte_lengths()
    found: dict[str, _Sums] = {}
    for source in data.sources:
        batches = held_out_batches(
            data,
            source.name,
            rows,
            engine.data_rank,
            engine.data_ranks,
            max_tokens=config.max_tokens,
        )
        if not len(batches):
            continue
        sums = _evaluate_batches(engine, task, batches, byte_lengths, should_stop)
        if sums is None:
            return None
        found[source.name] = sums
    has_bytes = byte_lengths is not None
    total = sum(found.values(), start=_Sums()).scores(task, has_bytes=has_bytes) if found else None
    return Evaluation(
        {name: sums.scores(task, has_bytes=has_bytes) for name, sums in found.items()}, total
    )


def _evaluate_batches(
    engine: Engine,
    task: Task,
    batches: Iterable[PackedBatch],
    byte_lengths: NDArray[np.int32] | None,
    should_stop: Callable[[], bool] | None,
) -> _Sums | None:
    sums = _Sums()
    totals: list[Tensor] = []
    vectors: dict[str, Tensor] = {}
    for batch in batches:
        if _is_stop_agreed(engine, should_stop):
            return None
        # Ranks that ran out of documents are here too, with nothing to count: sharded weights are gathered by all.
        drawn = task.draw(batch, DRAW_SEED)
        output = engine.evaluate(drawn.to(engine.topology.device))
        losses = {**output.terms, **output.metrics}
        values = torch.stack([loss.total.detach().reshape(()) for loss in losses.values()])
        # A rank without images left ran one again for the others' sake; it counts for nothing.
        weight = 0 if batch.host_counts.get(STAND_IN) else 1
        totals.append(values if weight else torch.zeros_like(values))
        counts = task.counts(drawn)
        for name, loss in losses.items():
            sums.counts[name] = sums.counts.get(name, 0) + weight * counts[loss.count]
        if not weight:
            continue
        sums.tokens += batch.target_count
        sums.bytes += batch.target_bytes
        sums.specials += _count_specials(batch, byte_lengths)
        for name, vector in output.vectors.items():
            vectors[name] = vectors[name] + vector if name in vectors else vector
    columns = torch.stack(totals, dim=1).cpu().tolist()
    sums.terms = dict(zip(sums.counts, columns, strict=True))
    sums.vectors = {name: vector.tolist() for name, vector in vectors.items()}
    return _gather(engine, sums)


def _gather(engine: Engine, sums: _Sums) -> _Sums:
    """Collective: the sums of all ranks, those that share their data counted once."""
    # Floats survive JSON to the last bit.
    parts = engine.topology.gather_json([engine.data_rank, asdict(sums)])
    by_data_rank = {rank: _Sums(**part) for rank, part in parts}
    return sum(by_data_rank.values(), start=_Sums())


def _add_vectors(
    first: dict[str, list[float]], second: dict[str, list[float]]
) -> dict[str, list[float]]:
    both = {
        name: [a + b for a, b in zip(first[name], second[name], strict=True)]
        for name in first.keys() & second.keys()
    }
    return {**first, **second, **both}


def _is_stop_agreed(engine: Engine, should_stop: Callable[[], bool] | None) -> bool:
    if should_stop is None:
        return False
    return engine.topology.sum_integers([int(should_stop())])[0] > 0


def _count_specials(batch: PackedBatch, byte_lengths: NDArray[np.int32] | None) -> int:
    if byte_lengths is None:
        return 0
    targets = batch.targets.numpy()
    return int((byte_lengths[targets[targets != IGNORED]] == 0).sum())
