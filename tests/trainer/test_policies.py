"""Stop requests from signals and files, what a value that is no number leads to, and when things are due."""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from weft.models.errors import TrainingError
from weft.trainer.deadline import Deadline
from weft.trainer.policies import NonFinitePolicy, SpikePolicy, Stop, StopRequest, is_due

SIGNALS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_request_and_nothing_else(tmp_path: Path, number: signal.Signals) -> None:
    with StopRequest(tmp_path) as stop:
        assert not stop.is_asked()
        os.kill(os.getpid(), number)
        # Still here: neither the default action nor KeyboardInterrupt.
        assert stop.is_asked()
        assert stop.is_asked()
        assert stop.reason == number.name


def test_further_signals_change_nothing(tmp_path: Path) -> None:
    with StopRequest(tmp_path) as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        for number in SIGNALS:
            os.kill(os.getpid(), number)
            assert stop.reason == "SIGUSR1"


@pytest.mark.parametrize("number", SIGNALS)
def test_handlers_are_put_back(tmp_path: Path, number: signal.Signals) -> None:
    heard: list[int] = []
    before = signal.signal(number, lambda n, frame: heard.append(n))
    try:
        with contextlib.suppress(ZeroDivisionError), StopRequest(tmp_path):
            os.kill(os.getpid(), number)
            raise ZeroDivisionError
        assert heard == []
        os.kill(os.getpid(), number)
        assert heard == [number]
    finally:
        signal.signal(number, before)


def test_the_stop_file_is_looked_for_once_a_second_and_taken_away(tmp_path: Path) -> None:
    clock = [100.0]
    with StopRequest(tmp_path, now=lambda: clock[0]) as stop:
        assert not stop.is_asked()
        (tmp_path / "STOP").touch()
        # A look costs a call to a file system that may be slow, so not at every step.
        clock[0] += 0.9
        assert not stop.is_asked()
        clock[0] += 0.2
        assert stop.is_asked()
        assert (stop.reason, stop.kind) == ("STOP file", Stop.ASKED)
        assert (tmp_path / "STOP").exists()
    assert not (tmp_path / "STOP").exists()
    with StopRequest(tmp_path) as stop:
        assert not stop.is_asked()


def test_only_one_process_of_a_run_looks_at_files(tmp_path: Path) -> None:
    for name in ("STOP", "SAVE"):
        (tmp_path / name).touch()
    with StopRequest(tmp_path, looks=False) as stop:
        assert not stop.is_asked()
        assert not stop.take_save()
    assert (tmp_path / "SAVE").exists()


def test_a_save_file_asks_once_and_is_taken_away(tmp_path: Path) -> None:
    clock = [0.0]
    with StopRequest(tmp_path, now=lambda: clock[0]) as stop:
        assert not stop.is_asked()
        assert not stop.take_save()
        (tmp_path / "SAVE").touch()
        clock[0] += 2
        assert not stop.is_asked()
        assert not (tmp_path / "SAVE").exists()
        assert [stop.take_save(), stop.take_save()] == [True, False]


@pytest.mark.parametrize(
    ("number", "outcome", "code"),
    [
        (signal.SIGTERM, "preempted", 77),
        (signal.SIGUSR2, "time_limit", 76),
        (signal.SIGUSR1, "stopped", 75),
        (signal.SIGINT, "stopped", 75),
    ],
)
def test_under_a_scheduler_signals_have_its_meaning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, outcome: str, code: int
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with StopRequest(tmp_path) as stop:
        os.kill(os.getpid(), number)
        assert stop.is_asked()
        assert (stop.kind.outcome, stop.kind.exit_code) == (outcome, code)
        # What a person says goes before what a scheduler says, whichever came first.
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.kind is Stop.ASKED


def test_the_end_of_the_jobs_time_stops_early_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEFT_JOB_END_TIME", str(time.time() + 100))
    clock = [0.0]
    with StopRequest(tmp_path, now=lambda: clock[0]) as stop:
        stop.deadline = Deadline(margin_s=60)
        assert not stop.is_asked()
        stop.reserve_s = 39.0
        clock[0] += 2
        assert not stop.is_asked()
        # A save was measured to take longer.
        stop.reserve_s = 41.0
        clock[0] += 2
        assert stop.is_asked()
        assert stop.kind is Stop.TIME_LIMIT


def test_a_stop_file_made_before_the_first_step_is_seen_at_it(tmp_path: Path) -> None:
    (tmp_path / "STOP").touch()
    with StopRequest(tmp_path) as stop:
        assert stop.is_asked()


def test_a_stop_file_that_was_not_the_reason_is_left_for_the_next_attempt(tmp_path: Path) -> None:
    with StopRequest(tmp_path) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        (tmp_path / "STOP").touch()
        assert stop.is_asked()
        assert stop.reason == "SIGTERM"
    assert (tmp_path / "STOP").exists()


def record(step: int, **values: float) -> dict[str, float]:
    return {"step": step, "first_sample": 8 * step - 8, "last_sample": 8 * step - 1, **values}


GOOD = {"loss": 2.5, "grad_norm": 0.1}
BAD = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["loss"], "loss"),
        (["grad_norm"], "grad_norm"),
        (["loss", "grad_norm"], "loss and grad_norm"),
    ],
)
def test_stop_names_the_values_the_step_and_the_samples(
    value: float, names: list[str], said: str
) -> None:
    policy = NonFinitePolicy("stop", budget=10)
    policy.check(record(6, **GOOD))
    expected = (
        f"{said} not finite at step 7 (samples 48 to 55); the update was withheld and the weights are intact; "
        "set train.non_finite=skip to go on without such steps"
    )
    with pytest.raises(TrainingError, match=f"^{re.escape(expected)}$") as caught:
        policy.check(record(7, **{**GOOD, **dict.fromkeys(names, value)}))
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("value", BAD)
def test_skip_puts_up_with_its_budget_and_no_more(value: float) -> None:
    policy = NonFinitePolicy("skip", budget=2)
    for step in (1, 2):
        policy.check(record(step, **{**GOOD, "grad_norm": value}))
        policy.check(record(step, **GOOD))
        assert policy.seen == step
    with pytest.raises(
        TrainingError,
        match=r"loss not finite at step 3 \(samples 16 to 23\).* 3 such .*non_finite_budget=2",
    ):
        policy.check(record(3, **{**GOOD, "loss": value}))


def test_the_budget_counts_what_earlier_attempts_saw() -> None:
    policy = NonFinitePolicy("skip", budget=3, seen=3)
    policy.check(record(1, **GOOD))
    with pytest.raises(TrainingError, match="non_finite_budget=3"):
        policy.check(record(2, loss=math.nan))


def test_other_values_are_nobodys_business() -> None:
    policy = NonFinitePolicy("stop", budget=0)
    policy.check(record(1, **GOOD, z_loss=math.nan, bits_per_byte=math.inf))
    policy.check(record(1))
    assert policy.seen == 0


@given(every=st.integers(1, 50), last=st.integers(0, 300))
def test_what_is_due_every_n_steps_comes_n_steps_apart(every: int, last: int) -> None:
    due = [step for step in range(1, last + 1) if is_due(every, step)]
    assert due == list(range(every, last + 1, every))


def test_never_is_never() -> None:
    assert not any(is_due(None, step) for step in range(1, 100))


def steady(count: int) -> list[float]:
    return [2.0 + 0.01 * math.sin(step) for step in range(count)]


def first_verdict(losses: list[float], **settings: int) -> tuple[int, Any] | None:
    policy = SpikePolicy(sigmas=7.0, steps=4, **settings)
    for step, loss in enumerate(losses, 1):
        verdict = policy.watch(record(step, loss=loss))
        if verdict is not None:
            return step, verdict
    return None


def test_a_rise_that_lasts_is_a_spike_from_its_first_step() -> None:
    found = first_verdict([*steady(200), *[3.0] * 10])
    assert found is not None
    step, verdict = found
    # Complete with its fourth step; all of its samples are named.
    assert step == 204
    assert (verdict.step, verdict.first_sample, verdict.stop_sample) == (201, 1600, 1632)
    assert "rose at step 201" in verdict.reason


@pytest.mark.parametrize(
    "losses",
    [
        [*steady(200), 3.0, 3.0, 3.0, 2.0, 3.0, 3.0, 3.0, *steady(50)],
        [*steady(100), *[3.0] * 20],
        [*steady(200), *[1.0] * 50],
        [5 - step / 100 for step in range(400)],
        [*steady(150), math.nan, math.nan, math.nan, math.nan, math.nan],
    ],
    ids=["short", "too early to judge", "better", "falling", "no number"],
)
def test_what_is_no_spike(losses: list[float]) -> None:
    assert first_verdict(losses) is None


def test_a_spike_does_not_become_the_new_normal() -> None:
    policy = SpikePolicy(sigmas=7.0, steps=50)
    verdicts = [
        policy.watch(record(s, loss=x)) for s, x in enumerate([*steady(200), *[2.5] * 60], 1)
    ]
    assert [s for s, v in enumerate(verdicts, 1) if v] == list(range(250, 261))


@pytest.mark.parametrize("value", BAD)
def test_rollback_names_the_step_and_its_samples(value: float) -> None:
    policy = NonFinitePolicy("rollback", budget=0)
    assert policy.check(record(6, **GOOD)) is None
    verdict = policy.check(record(7, **{**GOOD, "loss": value}))
    assert verdict is not None
    assert (verdict.step, verdict.first_sample, verdict.stop_sample) == (7, 48, 56)
    assert verdict.reason == "loss not finite at step 7 (samples 48 to 55)"
