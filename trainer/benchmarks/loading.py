"""Preparing and loading against Hugging Face datasets, on the same files."""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..configuration.schema import TrainingConfig
from ..data.dataset import open_data
from ..data.loader import PackedLoader

__all__ = ["compare_loading"]

SECONDS = 1.5
TURNS = 3
"""Each side is read this many times, in turns; its fastest counts, because a busy machine only ever slows."""
BATCH_ROWS = 32


def compare_loading(config: TrainingConfig) -> dict[str, Any]:
    """Bytes of text a second, prepared and loaded, by Weft and by `datasets` map and pack where it is installed."""
    with tempfile.TemporaryDirectory(prefix="weft-bench-") as folder:
        data_config = config.data.model_copy(update={"cache_dir": folder})
        begin = time.perf_counter()
        with contextlib.redirect_stderr(io.StringIO()):
            data = open_data(data_config)
        prepared_s = time.perf_counter() - begin
        size = sum(int(source.manifest.bytes) for source in data.sources)
        found: dict[str, Any] = {"bytes": size, "prepare_bytes_per_s": size / prepared_s}
        sides: dict[str, Callable[[], float]] = {"load": lambda: _load(config, data)}
        try:
            import datasets
        except ImportError:
            return found | _fastest(sides)
        seconds, packed = _peer(datasets, data, config.data.sequence_length, Path(folder))
        # What a training script does with it, and the fastest the library itself can be read.
        torch_rows = packed.with_format("torch")
        shuffled = packed.shuffle(seed=0).with_format("torch")
        sides["datasets_load"] = lambda: _drain(
            torch.utils.data.DataLoader(torch_rows, batch_size=BATCH_ROWS, shuffle=True)
        )
        sides["datasets_iter"] = lambda: _drain(shuffled.iter(batch_size=BATCH_ROWS))
        found |= _fastest(sides)
    found["datasets_prepare_bytes_per_s"] = size / seconds
    found["prepare_ratio"] = seconds / prepared_s
    found["load_ratio"] = found["load_tokens_per_s"] / found["datasets_load_tokens_per_s"]
    return found


def _fastest(sides: dict[str, Callable[[], float]]) -> dict[str, float]:
    turns = [{name: side() for name, side in sides.items()} for _ in range(TURNS)]
    return {f"{name}_tokens_per_s": max(turn[name] for turn in turns) for name in sides}


def _load(config: TrainingConfig, data: Any) -> float:
    tokens, begin = 0, time.perf_counter()
    with PackedLoader(data, seed=0, batch_rows=BATCH_ROWS, micro_batch_rows=BATCH_ROWS) as loader:
        while time.perf_counter() - begin < SECONDS:
            tokens += len(loader.next_step().micro_batches[0].tokens)
    return tokens / (time.perf_counter() - begin)


def _peer(datasets: Any, data: Any, length: int, folder: Path) -> tuple[float, Any]:
    """The usual recipe of the same documents: map to ids, concatenate, cut; seconds, and the rows.

    Rows hold what packed training needs and ours have: ids, labels, positions inside documents.
    """
    vocabulary = data.vocabulary
    texts = [vocabulary.decode_bytes(ids) for s in data.sources for ids in _documents(s)]
    datasets.disable_progress_bars()

    def pack(batch: dict[str, list[bytes]]) -> dict[str, list[Any]]:
        documents = vocabulary.encode_documents(batch["text"])
        ids = np.concatenate(documents).astype(np.int64)
        positions = np.concatenate([np.arange(len(ids)) for ids in documents])
        whole = len(ids) // length * length
        rows = {
            name: list(values[:whole].reshape(-1, length))
            for name, values in (("input_ids", ids), ("position_ids", positions))
        }
        # A model shifts its labels itself there; they are a column of their own all the same.
        return {**rows, "labels": rows["input_ids"]}

    begin = time.perf_counter()
    table = datasets.Dataset.from_dict({"text": texts})
    packed = table.map(
        pack, batched=True, remove_columns=["text"], cache_file_name=str(folder / "peer.arrow")
    )
    return time.perf_counter() - begin, packed


def _drain(batches: Iterable[dict[str, torch.Tensor]]) -> float:
    """Ids a second over at most `SECONDS` of a pass."""
    tokens, begin = 0, time.perf_counter()
    for batch in batches:
        tokens += batch["input_ids"].numel()
        if time.perf_counter() - begin >= SECONDS:
            break
    return tokens / (time.perf_counter() - begin)


def _documents(source: Any) -> Iterator[np.ndarray]:
    """Every document of a source, one array each."""
    for shard in source.manifest.shards:
        ids, begin = shard.open_ids(source.folder), 0
        for end in shard.open_ends(source.folder).tolist():
            yield ids[begin:end]
            begin = end
