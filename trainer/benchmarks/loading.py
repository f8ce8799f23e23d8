"""Preparing and loading against Hugging Face datasets, on the same files."""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..configuration.schema import TrainingConfig
from ..data.dataset import open_data
from ..data.loader import PackedLoader

__all__ = ["compare_loading"]

SECONDS = 4.0
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
        found["load_tokens_per_s"] = _load(config, data)
        try:
            import datasets
        except ImportError:
            return found
        peer = _peer(datasets, data, config.data.sequence_length, Path(folder))
    found |= peer
    found["prepare_ratio"] = found["prepare_bytes_per_s"] / peer["datasets_prepare_bytes_per_s"]
    found["load_ratio"] = found["load_tokens_per_s"] / peer["datasets_load_tokens_per_s"]
    return found


def _load(config: TrainingConfig, data: Any) -> float:
    tokens, begin = 0, time.perf_counter()
    with PackedLoader(data, seed=0, batch_rows=BATCH_ROWS, micro_batch_rows=BATCH_ROWS) as loader:
        while time.perf_counter() - begin < SECONDS:
            tokens += len(loader.next_step().micro_batches[0].tokens)
    return tokens / (time.perf_counter() - begin)


def _peer(datasets: Any, data: Any, length: int, folder: Path) -> dict[str, float]:
    """The usual recipe: map to ids, concatenate and cut, shuffle, iterate as torch batches; same documents."""
    vocabulary = data.vocabulary
    texts = [vocabulary.decode_bytes(ids) for s in data.sources for ids in _documents(s)]
    size = sum(map(len, texts))
    datasets.disable_progress_bars()

    def pack(batch: dict[str, list[bytes]]) -> dict[str, list[Any]]:
        ids = np.concatenate(vocabulary.encode_documents(batch["text"])).astype(np.int64)
        whole = len(ids) // length * length
        return {"input_ids": list(ids[:whole].reshape(-1, length))}

    begin = time.perf_counter()
    table = datasets.Dataset.from_dict({"text": texts})
    packed = table.map(
        pack, batched=True, remove_columns=["text"], cache_file_name=str(folder / "peer.arrow")
    )
    prepared_s = time.perf_counter() - begin
    ordered = packed.shuffle(seed=0).with_format("torch")
    found = {"datasets_prepare_bytes_per_s": size / prepared_s}
    # What a training script does with it, and the fastest the library itself can be read.
    batches = torch.utils.data.DataLoader(
        packed.with_format("torch"), batch_size=BATCH_ROWS, shuffle=True
    )
    found["datasets_load_tokens_per_s"] = _drain(batches)
    found["datasets_iter_tokens_per_s"] = _drain(ordered.iter(batch_size=BATCH_ROWS))
    return found


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
