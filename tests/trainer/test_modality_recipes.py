"""Debug recipes of text, images and speech: a few steps of each, and one of them on other numbers of ranks."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from PIL import Image
from weft.launch.cli import cli
from weft.launch.local import LocalRanks
from weft.launch.options import load_recipe
from weft.trainer.train import train

DOCS = Path(__file__).parents[2] / "docs"
DIGITS = "data.sources.0.path=builtin:digits-captions:images=60"
SHAPES = "data.sources.0.path=builtin:shapes:images=60"
SPOKEN = "data.sources.0.path=builtin:spoken-digits:utterances=4"
FEW = [
    *("train.steps=3", "checkpoint.every=3", "schedule.warmup_steps=1", "eval.every=null"),
    *("data.held_out.documents=6", "run.device=cpu", "run.threads=1"),
]
needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="no espeak-ng")


def weft(*arguments: object) -> Result:
    words = [str(argument) for argument in arguments]
    return CliRunner().invoke(cli, words, standalone_mode=False)


@pytest.mark.parametrize("page", ["mixture-of-mamba.md", "lmfusion.md"])
def test_the_page_from_top_to_bottom(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = re.findall(r"^\$ weft (.*)$", (DOCS / page).read_text(), re.M)
    assert lines
    for words in map(shlex.split, lines):
        few = [f"data.cache_dir={tmp_path / 'cache'}", *FEW]
        if "lmfusion/debug-base" in words:
            few.append(f"{DIGITS},pictures=0")
        elif words[0] == "train":
            few.append(DIGITS)
        else:
            few = ["--image-steps", "2"]
        done = weft(*words, *few)
        assert done.exception is None, f"{words}: {done.exception}\n{done.output}"
    assert list(tmp_path.glob("runs/*/samples/step_00000003.png"))


@pytest.mark.parametrize(
    ("name", "source", "make"),
    [
        ("mixture-of-mamba/debug-chameleon", SHAPES, "--image"),
        pytest.param("mixture-of-mamba/debug-speech", SPOKEN, "--speech", marks=needs_espeak),
        ("mixture-of-transformers/debug-transfusion", DIGITS, "--image"),
        ("mixture-of-transformers/debug-chameleon", SHAPES, "--image"),
    ],
)
def test_a_debug_recipe_trains_is_evaluated_and_generates(
    name: str, source: str, make: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    changes = [source, f"data.cache_dir={tmp_path / 'cache'}", f"run.dir={run}", *FEW]
    assert train(load_recipe(name, changes).config) == 0
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"eval/text_loss", "eval/denoising"} & set(last)
    grid = tmp_path / "grid.png"
    done = weft("generate", run, "--prompt", "three", make, "--image-steps", 2, "--out", grid)
    assert done.exception is None, done.output
    if make == "--image":
        with Image.open(grid) as picture:
            assert min(picture.size) >= 8


def test_a_run_of_images_goes_from_two_ranks_to_one(tmp_path: Path) -> None:
    """Noise, order and losses are those of one process that was never stopped."""
    settings = [
        *(DIGITS, f"data.cache_dir={tmp_path / 'cache'}", *FEW, "schedule.horizon_steps=6"),
        *("train.batch_tokens=512", "train.micro_batch_tokens=128", "eval.at_end=false"),
        "logging.every=1",
    ]
    recipe = "mixture-of-mamba/debug-transfusion"
    alone, moved = tmp_path / "alone", tmp_path / "moved"
    config = load_recipe(recipe, [*settings, "train.steps=6", f"run.dir={alone}"]).config
    assert train(config) == 0
    first = [recipe, *settings, f"run.dir={moved}"]
    group = LocalRanks(["train", *first], 2, tmp_path / "logs")
    assert group.wait() == [0, 0], group.tail(40)
    assert weft("train", "--resume", moved, "train.steps=6").exception is None
    ours, theirs = steps_of(moved), steps_of(alone)
    assert [record["step"] for record in ours] == [1, 2, 3, 4, 5, 6]
    for mine, other in zip(ours, theirs, strict=True):
        for name in ("lr", "tokens", "first_sample", "data_digest"):
            assert mine[name] == other[name]
        for name in ("loss", "denoising", "text_loss", "grad_norm"):
            assert mine[name] == pytest.approx(other[name], rel=1e-4), name


def steps_of(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]
