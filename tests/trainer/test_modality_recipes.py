"""Debug recipes of text, images and speech: each in its smallest form, and one on other numbers of ranks."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image
from tiny_run import EXACT, trace
from weft.launch.cli import cli
from weft.launch.local import LocalRanks
from weft.launch.options import load_recipe
from weft.trainer.train import train

DIGITS = "data.sources.0.path=builtin:digits-captions:images=60"
SHAPES = "data.sources.0.path=builtin:shapes:images=60"
SPOKEN = "data.sources.0.path=builtin:spoken-digits:utterances=4"
FEW = ["train.steps=8", "checkpoint.every=4", "optimizer.skip_step_minimum=4", "run.threads=1"]
needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="no espeak-ng")


def weft(*arguments: object) -> Result:
    words = [str(argument) for argument in arguments]
    return CliRunner().invoke(cli, words, standalone_mode=False)


@pytest.mark.parametrize(
    ("name", "source", "make"),
    [
        ("mixture-of-mamba/debug-transfusion", DIGITS, "--image"),
        ("mixture-of-mamba/debug-chameleon", SHAPES, "--image"),
        pytest.param("mixture-of-mamba/debug-speech", SPOKEN, "--speech", marks=needs_espeak),
        ("mixture-of-transformers/debug-transfusion", DIGITS, "--image"),
        ("mixture-of-transformers/debug-chameleon", SHAPES, "--image"),
        ("lmfusion/debug", DIGITS, "--image"),
    ],
)
def test_the_smallest_form_trains_resumes_and_generates(
    name: str, source: str, make: str, tmp_path: Path
) -> None:
    small = [source, "data.held_out.documents=6", f"data.cache_dir={tmp_path / 'cache'}", *FEW]
    done = weft("debug", name, "--keep", tmp_path / "runs", *small)
    assert done.exception is None, done.output
    assert done.return_value == 0, done.output
    assert "all checks hold" in done.output
    grid = tmp_path / "grid.png"
    run = tmp_path / "runs" / "whole"
    done = weft("generate", run, "--prompt", "three", make, "--image-steps", 2, "--out", grid)
    assert done.exception is None, done.output
    if make == "--image":
        with Image.open(grid) as picture:
            assert min(picture.size) >= 8


def test_lmfusion_in_two_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    few = [cache, "schedule.warmup_steps=1", "train.steps=3", "checkpoint.every=3"]
    text = "data.sources.0.path=builtin:digits-captions:images=60,pictures=0"
    for name, source in (("lmfusion/debug-base", text), ("lmfusion/debug", DIGITS)):
        config = load_recipe(name, [source, "data.held_out.documents=6", *few]).config
        assert train(config) == 0
    assert config.model.base.source == "runs/lmfusion-debug-base"
    done = weft("eval", "runs/lmfusion-debug")
    assert done.exception is None, done.output
    assert "caption" in done.output


def test_a_run_of_images_goes_from_two_ranks_to_one(tmp_path: Path) -> None:
    """Noise, order and losses are those of one process that was never stopped."""
    settings = [
        *(DIGITS, "data.held_out.documents=6", f"data.cache_dir={tmp_path / 'cache'}"),
        *("train.batch_tokens=512", "train.micro_batch_tokens=128", "schedule.horizon_steps=8"),
        *("checkpoint.every=4", "schedule.warmup_steps=2", "eval.at_end=false", "eval.every=null"),
        *("run.device=cpu", "run.threads=1", "logging.every=1"),
    ]
    recipe = "mixture-of-mamba/debug-transfusion"
    alone, moved = tmp_path / "alone", tmp_path / "moved"
    config = load_recipe(recipe, [*settings, "train.steps=8", f"run.dir={alone}"]).config
    assert train(config) == 0
    first = [recipe, *settings, "train.steps=4", f"run.dir={moved}"]
    group = LocalRanks(["train", *first], 2, tmp_path / "logs")
    assert group.wait() == [0, 0], group.tail(40)
    assert weft("train", "--resume", moved, "train.steps=8").exception is None
    for ours, theirs in zip(trace(moved), trace(alone), strict=True):
        for name, a, b in zip(EXACT, ours, theirs, strict=False):
            is_sum = name in ("loss", "z_loss", "grad_norm", "bits_per_byte")
            assert a == (pytest.approx(b, rel=1e-4) if is_sum else b), name
