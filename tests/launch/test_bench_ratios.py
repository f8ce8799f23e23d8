"""`weft bench ratios` measures what it reports, and that its sides compute the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from weft.launch.bench import command
from weft.models.errors import ConfigError

SMALL = ("run.device=cpu", "model.n_layers=1", "model.d_model=64", "model.n_heads=2")


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(command, ["ratios", *arguments], standalone_mode=False)


def test_it_measures_three_sides_of_the_same(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    done = bench(
        "dit/cat-ref-s-2", *SMALL, "--images", "1,3,2", "--turns", "1", "--json", str(path)
    )
    assert done.exception is None, done.output
    found = json.loads(path.read_text())
    assert (found["image_tokens"], found["image_counts"]) == ([256, 64, 16], [1, 3, 2])
    assert (found["tokens"], found["padded_tokens"]) == (256 + 3 * 64 + 2 * 16, 6 * 256)
    assert found["difference"] < 1e-5
    for side in ("padded", "separate"):
        assert found[f"{side}_ratio"] == pytest.approx(found[f"{side}_s"] / found["packed_s"])
    assert found["images_per_s"] == pytest.approx(6 / found["packed_s"])
    # A third of the tokens; the bar is low enough for a machine that others use too.
    assert found["padded_ratio"] > 1.2
    words = done.stdout.split()
    assert "padded" in words
    assert f"{found['padded_ratio']:.2f}" in words
    assert "images/s" in words


def test_what_it_cannot_measure_is_one_line() -> None:
    done = bench("image-ar/b")
    assert isinstance(done.exception, ConfigError)
    assert "is of family image_ar; give a recipe of family dit" in str(done.exception)
    for images in ("1,2", "1,0,2", "1,b,2"):
        done = bench("dit/cat-ref-s-2", "--images", images)
        assert "is not 3 numbers of images" in str(done.exception)
