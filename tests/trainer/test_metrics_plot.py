"""The plot is a PNG with a fair curve; a run without records is an error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from weft.models.errors import DataError
from weft.trainer.metrics.config import LoggingConfig
from weft.trainer.metrics.plot import _curve, _limits, _smooth, plot_run
from weft.trainer.metrics.recorder import MetricsRecorder
from weft.trainer.metrics.records import read_metrics


def make_run(folder: Path, key: str) -> None:
    with MetricsRecorder(folder, LoggingConfig()) as recorder:
        for step in range(1, 31):
            value = float("nan") if step == 7 else 1 + 5 / step
            recorder.log(
                step, {key: value, "lr": 0.1, "grad_norm": 1.0 / step, "tokens": 64 * step}
            )
        recorder.log(30, {f"eval/{key}": 1.3})


@pytest.mark.parametrize("key", ["loss", "bits_per_byte"])
def test_a_png_is_written(tmp_path: Path, key: str) -> None:
    make_run(tmp_path, key)
    path = plot_run(tmp_path, baselines={"gzip -9": 2.1, "xz -9": 1.7})
    assert path == tmp_path / "plots" / "loss.png"
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    assert (width, height) == (1350, 990)
    assert [item.name for item in path.parent.iterdir()] == ["loss.png"]


def test_curves_leave_out_what_is_not_finite_and_join_evaluations(tmp_path: Path) -> None:
    make_run(tmp_path, "loss")
    records = read_metrics(tmp_path)
    tokens, values = _curve(records, "loss")
    assert len(tokens) == 29
    assert 7 * 64 not in tokens
    assert values[0] == 6.0
    np.testing.assert_array_equal(_curve(records, "eval/loss"), ([30 * 64.0], [1.3]))


def test_smoothing_keeps_lines_straight_and_limits_show_the_baselines() -> None:
    line = np.linspace(5, 1, 400)
    np.testing.assert_allclose(_smooth(line)[:390], line[:390])
    low, high = _limits(_smooth(line), np.array([0.9]), [7.0])
    assert low < 0.9
    assert high > 7.0


def test_no_records_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no training steps"):
        plot_run(tmp_path)
