"""What a run needs to match a baseline, on curves whose answer is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_compare import SMALL, make_run
from weft.models.errors import ConfigError, DataError
from weft.trainer.matching import Matched, Matching, match_baseline
from weft.trainer.metrics.compare_plot import plot_matching

STEPS = 100
BASE = [2.0 - step / STEPS for step in range(1, STEPS + 1)]
FAST = [2.0 - min(1.2, 2 * step / STEPS) for step in range(1, STEPS + 1)]
SLOW = [2.0 - 0.5 * step / STEPS for step in range(1, STEPS + 1)]
WIDE = {**SMALL, "d_ff": 64}


def match(tmp_path: Path, **runs: list[float]) -> Matching:
    folders = [make_run(tmp_path / "base", BASE)]
    for name, values in runs.items():
        model = SMALL if name == "control" else WIDE
        folders.append(make_run(tmp_path / name, values, model=model))
    return match_baseline(folders, folders[0], ["bits_per_byte"], against="tokens")


def only(found: Matching) -> Matched:
    (one,) = found.matches
    return one


def test_a_run_twice_as_fast_needs_half(tmp_path: Path) -> None:
    found = match(tmp_path, fast=FAST)
    # The mean of the last five of a hundred, 2 - 0.98.
    assert found.targets["bits_per_byte"] == pytest.approx(1.02)
    assert only(found).share == pytest.approx(0.49)
    assert only(found).slope == pytest.approx(0.5)
    assert only(found).final == pytest.approx(0.8)
    assert "no control" in found.notes[0]


def test_a_run_that_never_gets_there(tmp_path: Path) -> None:
    found = only(match(tmp_path, slow=SLOW))
    assert found.share is None
    assert found.slope == pytest.approx(2.0)
    assert only(match(tmp_path / "b", flat=[3.0] * STEPS)).slope is None


def test_a_value_touched_once_counts_as_reached(tmp_path: Path) -> None:
    values = [1.9] * STEPS
    values[29] = 1.0
    found = only(match(tmp_path, spike=values))
    assert found.share == pytest.approx((29 + 0.88 / 0.9) / STEPS, rel=1e-3)


def test_the_same_model_is_the_control(tmp_path: Path) -> None:
    found = match(tmp_path, fast=FAST, control=BASE)
    by_name = {item.run: item for item in found.matches}
    assert by_name["control"].is_control
    assert not by_name["fast"].is_control
    assert by_name["control"].slope == pytest.approx(1.0)
    assert found.notes == []


def test_what_is_refused(tmp_path: Path) -> None:
    base, other = make_run(tmp_path / "a", BASE), make_run(tmp_path / "b", FAST)
    with pytest.raises(ConfigError, match="is to be one of the runs"):
        match_baseline([base, other], tmp_path, ["loss"])
    with pytest.raises(
        DataError, match=r"has no finite eval/image_loss; it has bits_per_byte, loss"
    ):
        match_baseline([base, other], base, ["eval/image_loss"])


def test_picture_and_json(tmp_path: Path) -> None:
    found = match(tmp_path, fast=FAST, slow=SLOW)
    assert plot_matching(found, tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")
    data = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert data["matches"][1]["share"] is None
    assert len(data["curves"]) == 3
