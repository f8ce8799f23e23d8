"""A run on interleaved data trains, resumes, replays and is evaluated as any other; what is drawn is drawn again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import resume, run_new, same_run
from tiny_run import trace, write_recipe
from weft.models.batch import PackedBatch
from weft.models.errors import ConfigError
from weft.models.transformer.task import TransformerTask
from weft.trainer.configuration.load import load_config
from weft.trainer.evaluation import DRAW_SEED
from weft.trainer.replay.replay import ReplayOptions, replay_step

CODES = 17
CHANGES: dict[str, Any] = {
    "run__seed": 5,
    "model__vocab_size": 260 + 4 + CODES,
    "model__ngram": None,
    "data__sequence_length": 128,
    "data__sources": [
        {"name": "tales", "path": "builtin:digits-captions:images=60", "weight": 0.6},
        {"name": "sums", "path": "builtin:shapes:images=40,size=8", "weight": 0.4},
    ],
    "data__interleaved": {
        "image": {"kind": "codes", "codec": "gray-codes", "size": 8, "codes": CODES}
    },
    "data__held_out": {"documents": 4},
    "train__steps": 10,
    "train__batch_tokens": 512,
    "train__micro_batch_tokens": 256,
    "schedule__horizon_steps": 10,
    "checkpoint__every": 4,
    "eval__every": 5,
}


@pytest.fixture(scope="module", autouse=True)
def drawing() -> Any:
    """A family that hides some image codes by chance, and notes what it was asked for."""
    seeds: set[int] = set()

    def draw(self: TransformerTask, batch: PackedBatch, seed: int) -> PackedBatch:
        seeds.add(seed)
        rows = [
            torch.rand(
                batch.row_length, generator=torch.Generator().manual_seed(97 * seed + sample)
            )
            for sample in batch.sample_ids
        ]
        assert batch.modality is not None
        hidden = (torch.cat(rows) < 0.5) & (batch.modality == 1)
        return dataclasses.replace(batch, tokens=batch.tokens.masked_fill(hidden, 3))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransformerTask, "draw", draw)
        yield seeds


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_new(tmp_path_factory.mktemp("whole"), **CHANGES)


def test_a_stopped_run_goes_on_as_if_it_had_not(run: Path, tmp_path: Path) -> None:
    other = run_new(tmp_path, "train.steps=3", **CHANGES)
    assert resume(other, "train.steps=10") == 0
    same_run(run, other)


def test_a_step_is_replayed_with_what_was_drawn(run: Path) -> None:
    report = replay_step(run, ReplayOptions(step=7))
    found = {c.name: (c.recorded, c.replayed) for c in report.comparisons}
    assert {"loss", "grad_norm", "data_digest"} <= set(found)
    assert all(was == now for was, now in found.values())
    assert len(report.samples) == 4


def test_evaluation_draws_with_a_seed_of_its_own(run: Path, drawing: set[int]) -> None:
    assert drawing == {5, DRAW_SEED}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("eval/tales/loss" in line for line in lines)
    assert len(trace(run)) == 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model__vocab_size": 270},
            "270 is less than the 281 ids .* with data.interleaved; set model.vocab_size=281",
        ),
        (
            {"data__interleaved": {"image": {"size": 8}}},
            "this model family reads ids alone, not latents",
        ),
        (
            {"data__interleaved": {"modalities": ["image", "text"]}},
            r"\[image, text\] must begin with text",
        ),
        ({"data__packing": "stream"}, "packing stream would cut images"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path: Path, change: dict, message: str) -> None:
    recipe = write_recipe(tmp_path, **{**CHANGES, **change})
    with pytest.raises(ConfigError, match=message):
        load_config(str(recipe), [], tmp_path)
