"""A run small enough to be started hundreds of times: real data path, every kind of state."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from weft.trainer.checkpoint.layout import step_folder
from weft.trainer.checkpoint.reading import read_manifest


def write_recipe(folder: Path, **changes: Any) -> Path:
    """A recipe over two generated sources in `folder`; `changes` are dotted keys with __ for dots."""
    for source, line in (("tales", "the cat sat on mat {}\n"), ("sums", "{0} + {0} = {1}\n")):
        (folder / source).mkdir(parents=True, exist_ok=True)
        for number in range(12):
            text = "".join(line.format(i * number, 2 * i * number) for i in range(20))
            (folder / source / f"{number}.txt").write_text(text)
    recipe: dict[str, Any] = {
        "run": {"name": "tiny", "dir": str(folder / "run"), "device": "cpu", "threads": 1},
        "model": {
            "vocab_size": 260,
            "n_layers": 1,
            "d_model": 16,
            "n_heads": 2,
            "d_ff": 24,
            "ngram": {"sizes": [2, 3], "rows": 101},
        },
        "data": {
            "sequence_length": 32,
            "sources": [
                {"name": "tales", "path": str(folder / "tales"), "weight": 0.7},
                {"name": "sums", "path": str(folder / "sums"), "weight": 0.3},
            ],
            "held_out": {"documents": 1},
            "cache_dir": str(folder / "cache"),
        },
        "optimizer": {"lr": 1e-2, "skip_step": True, "skip_step_minimum": 4, "skip_step_window": 8},
        "schedule": {"warmup_steps": 2},
        "train": {"steps": 30, "batch_tokens": 256, "micro_batch_tokens": 128},
        "checkpoint": {"every": 2, "keep": 2},
        "logging": {"every": 1, "progress": "none"},
        "eval": {"at_end": False},
    }
    for key, value in changes.items():
        place = recipe
        *sections, last = key.split("__")
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


EXACT = (
    "loss",
    "z_loss",
    "grad_norm",
    "skipped",
    "lr",
    "tokens",
    "first_sample",
    "data_digest",
    "bits_per_byte",
)


def trace(run: Path) -> list[tuple[Any, ...]]:
    """What every step of a run did, from its metrics; each step must be there once, in order."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    records = [r for r in records if "loss" in r]
    steps = [r["step"] for r in records]
    assert steps == list(range(1, len(steps) + 1))
    return [
        tuple(r[k] for k in (*EXACT, "source/tales/samples", "source/sums/samples"))
        for r in records
    ]


def tensors(run: Path, step: int) -> dict[str, list[str]]:
    """Checksums of every tensor in a checkpoint."""
    manifest = read_manifest(step_folder(run, step))
    return {name: [c.sha256 for c in t.chunks] for name, t in manifest.tensors.items()}


def poison(run: Path, step: int, name: str, value: float = float("nan")) -> None:
    """A wrong number at the beginning of a parameter in a checkpoint that is sound otherwise."""
    path = step_folder(run, step)
    manifest = read_manifest(path)
    stored = manifest.tensors[f"parameters/{name}"]
    chunk = stored.chunks[0]
    with open(path / chunk.file, "r+b") as file:
        file.seek(chunk.offset)
        file.write(np.float32(value).tobytes())
        file.seek(chunk.offset)
        digest = hashlib.sha256(file.read(chunk.bytes)).hexdigest()
    chunks = (dataclasses.replace(chunk, sha256=digest), *stored.chunks[1:])
    manifest.tensors[f"parameters/{name}"] = dataclasses.replace(stored, chunks=chunks)
    (path / "manifest.json").write_text(json.dumps(manifest.to_json()))
