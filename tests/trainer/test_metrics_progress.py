"""The bar and the lines, their widths and their cost; step times and rates."""

from __future__ import annotations

import io
import re
import time
from typing import Any

import pytest
from weft.trainer.metrics.progress import Progress, format_count, format_duration
from weft.trainer.metrics.throughput import StepClock, add_rates, peak_flops


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def records(step: int, **more: Any) -> list[dict[str, Any]]:
    values = {"step": step, "loss": 1.2345, "bits_per_byte": 1.781, "tokens_per_s": 52_300.0}
    return [{**values, "step_s": 0.5, "data_wait_s": 0.005, "lr": 0.003, "grad_norm": 0.25, **more}]


def visible(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*[mK]", "", text)


def test_a_pipe_gets_one_line_a_flush() -> None:
    stream = io.StringIO()
    progress = Progress("auto", 100, stream=stream)
    for step in range(1, 11):
        progress.update(step)
    progress.show(records(10))
    progress.message("saved")
    progress.close()
    assert stream.getvalue() == (
        "step 10/100  loss 1.234  bits/byte 1.781  lr 0.003  grad norm 0.250  tok/s 52.3K  wait 1.0%  ETA 45s\n"
        "saved\n"
    )


def test_a_terminal_gets_a_bar_with_everything_in_80_columns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    progress = Progress("auto", 1000, stream=stream)
    progress.show(records(250))
    line = visible(stream.getvalue()).strip()
    for part in (
        "250/1000",
        "loss 1.234",
        "bits/byte 1.781",
        "tok/s 52.3K",
        "wait 1.0%",
        "ETA 6m 15s",
    ):
        assert part in line
    assert len(line) < 80
    assert "\n" not in line


@pytest.mark.parametrize("width", [20, 40, 60, 120, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    progress = Progress("bar", 1000, stream=Terminal())
    progress.show(records(999, mfu=0.512))
    assert len(visible(progress._bar_line(width))) <= width


def test_redraws_are_limited_and_close_shows_the_end() -> None:
    now = [0.0]
    stream = Terminal()
    progress = Progress("bar", 1000, stream=stream, now=lambda: now[0])
    progress.show(records(1))
    for step in range(2, 1001):
        now[0] += 0.01
        progress.update(step)
    assert 40 <= stream.getvalue().count("\r") <= 52
    progress.close()
    assert "1000/1000" in stream.getvalue().split("\r")[-1]
    assert stream.getvalue().endswith("\n")


def test_other_ranks_and_none_are_silent() -> None:
    for mode, is_main in (("bar", False), ("lines", False), ("none", True)):
        stream = Terminal()
        progress = Progress(mode, 10, stream=stream, is_main=is_main)  # type: ignore[arg-type]
        progress.update(1)
        progress.show(records(1))
        progress.message("text")
        progress.close()
        assert stream.getvalue() == ""


def test_an_update_costs_under_50_microseconds() -> None:
    stream = Terminal()
    progress = Progress("bar", 20_000, stream=stream)
    progress.show(records(1))
    costs = []
    for _ in range(5):
        begin = time.perf_counter()
        for step in range(4000):
            progress.update(step)
        costs.append((time.perf_counter() - begin) / 4000)
    assert min(costs) < 50e-6
    begin = time.perf_counter()
    for _ in range(200):
        progress._draw(0.0)
    assert (time.perf_counter() - begin) / 200 < 500e-6


def test_units() -> None:
    assert [format_count(v) for v in (950, 1200, 52_300, 1.2e6, 345e9)] == [
        "950",
        "1.20K",
        "52.3K",
        "1.20M",
        "345B",
    ]
    shown = [
        format_duration(s) for s in (4, 65, 3600 * 2 + 60 * 14, 86400 * 6 + 3600 * 3, float("inf"))
    ]
    assert shown == ["4s", "1m 05s", "2h 14m", "6d 03h", "?"]


def test_clock_leaves_out_what_was_no_step() -> None:
    now = [100.0]
    clock = StepClock(1000.0, now=lambda: now[0])
    now[0] = 102.0
    assert clock.lap(0.5) == {"step_s": 2.0, "data_wait_s": 0.5, "seconds": 1002.0}
    now[0] = 150.0
    clock.restart_lap()
    now[0] = 151.0
    assert clock.lap(0.0) == {"step_s": 1.0, "data_wait_s": 0.0, "seconds": 1051.0}
    assert clock.total() == 1051.0


def test_rates_are_those_of_the_flush() -> None:
    some: list[dict[str, Any]] = [{"step_s": 1.0}, {"step_s": 3.0}]
    add_rates(some, tokens=1000, flops=4e12, peak=8e12)
    assert some[0] == {"step_s": 1.0, "tokens_per_s": 500.0, "mfu": 0.25}
    assert some[1]["mfu"] == 0.25
    add_rates(some[:1], tokens=1000, flops=4e12, peak=None)
    assert some[0]["tokens_per_s"] == 1000.0


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("NVIDIA H200", 989.5e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A10", 125e12),
        ("Some CPU", None),
        (None, None),
    ],
)
def test_peaks_by_name(name: str | None, peak: float | None) -> None:
    assert peak_flops(name) == peak
