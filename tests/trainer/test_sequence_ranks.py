"""Runs whose rows are cut over ranks: the same steps as with whole rows, on any number of ranks, resumed and replayed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import weft.trainer.train as train_module
from ranks import run_ranks
from test_resume import resume, run_new
from tiny_run import write_recipe
from weft.models.errors import ConfigError
from weft.trainer.configuration.checks import check_against_world
from weft.trainer.configuration.load import load_config
from weft.trainer.distributed import Topology
from weft.trainer.replay.replay import ReplayOptions, replay_step
from weft.trainer.train import train

MODEL = {"family": "mamba", "vocab_size": 260, "d_model": 16, "n_layers": 2, "d_state": 4}
CHANGES: dict[str, Any] = {
    "model": MODEL,
    "train__steps": 4,
    "schedule__horizon_steps": 4,
    "train__micro_batch_tokens": 64,
    "data__sequence_length": 32,
    "checkpoint__every": 2,
    "eval__at_end": True,
    "optimizer__skip_step": False,
    "optimizer__eps": 1e-6,
}
EXACT = ("first_sample", "data_digest", "target_tokens", "target_bytes", "tokens")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_new(tmp_path_factory.mktemp("whole"), **CHANGES)


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def train_cut(topology: Topology, folder: str, settings: list[str]) -> int:
    """Runs on every rank."""
    patch = pytest.MonkeyPatch()
    patch.setattr(train_module, "initialise_distributed", lambda *arguments: topology)
    patch.setattr(train_module, "shutdown_distributed", lambda: None)
    recipe = Path(folder) / "tiny.yaml"
    return train(load_config(str(recipe), settings, recipe.parent).config)


def assert_same_steps(run: Path, whole: Path) -> None:
    for found, wanted in zip(records(run), records(whole), strict=True):
        assert found.keys() == wanted.keys()
        for name in EXACT:
            assert found.get(name) == wanted.get(name), name
        for name in ("loss", "grad_norm", "eval/loss", "bits_per_byte"):
            if name in wanted:
                assert found[name] == pytest.approx(wanted[name], rel=2e-5), name


@pytest.mark.parametrize(("ranks", "strategy"), [(4, "ddp"), (2, "fsdp")])
def test_two_ranks_a_row(whole: Path, tmp_path: Path, ranks: int, strategy: str) -> None:
    write_recipe(tmp_path, **CHANGES)
    settings = ["parallel.sequence_ranks=2", f"parallel.strategy={strategy}"]
    assert run_ranks(ranks, "test_sequence_ranks:train_cut", str(tmp_path), settings) == [0] * ranks
    run = tmp_path / "run"
    assert_same_steps(run, whole)
    report = replay_step(run, ReplayOptions(step=3))
    found = {c.name: (c.recorded, c.replayed) for c in report.comparisons}
    assert found["data_digest"][0] == found["data_digest"][1]
    assert found["loss"][1] == pytest.approx(found["loss"][0], rel=2e-5)
    assert resume(run, "parallel.sequence_ranks=1", "parallel.strategy=auto", "train.steps=5") == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {**MODEL, "family": "transformer", "d_ff": 24, "n_heads": 2}}, "only family mamba"),
        ({"parallel__engine": "accelerate"}, "engine accelerate gives every rank rows of its own"),
        (
            {"model": {**MODEL, "modalities": ["text", "image"], "image": {"size": 8}}},
            "continuous images stand or fall as a whole",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_cut(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    changes["model"] = {
        name: value
        for name, value in {**CHANGES, **changes}["model"].items()
        if changes.get("model", MODEL).get("family") != "transformer" or name != "d_state"
    }
    recipe = write_recipe(tmp_path, **{**CHANGES, **changes}, parallel__sequence_ranks=2)
    with pytest.raises(ConfigError, match=message):
        load_config(str(recipe), [], tmp_path)


def test_ranks_that_do_not_divide(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, **CHANGES, parallel__sequence_ranks=2)
    config = load_config(str(recipe), [], tmp_path).config
    with pytest.raises(ConfigError, match="3 ranks do not divide into groups of 2"):
        check_against_world(config, 3)
    check_against_world(config, 8)
    with pytest.raises(ConfigError, match="do not divide over 16 ranks"):
        check_against_world(config, 32)
