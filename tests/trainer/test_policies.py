"""Stop requests from signals and files, what a value that is no number leads to, and when things are due."""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from weft.models.errors import TrainingError
from weft.trainer.policies import NonFinitePolicy, StopRequest, is_due

SIGNALS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_request_and_nothing_else(tmp_path: Path, number: signal.Signals) -> None:
    with StopRequest(tmp_path) as stop:
        assert not stop.is_asked(3)
        os.kill(os.getpid(), number)
        # Still here: neither the default action nor KeyboardInterrupt.
        assert stop.is_asked(3)
        assert stop.is_asked(4)
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


def test_the_stop_file_is_looked_for_every_few_steps_and_taken_away(tmp_path: Path) -> None:
    with StopRequest(tmp_path, look_every=10) as stop:
        assert not any(stop.is_asked(step) for step in range(25))
        (tmp_path / "STOP").touch()
        # A look costs a call to a file system that may be slow, so not at every step.
        assert [step for step in range(25, 35) if stop.is_asked(step)] == [30, 31, 32, 33, 34]
        assert stop.reason == "STOP file"
        assert (tmp_path / "STOP").exists()
    assert not (tmp_path / "STOP").exists()
    with StopRequest(tmp_path) as stop:
        assert not stop.is_asked(0)


def test_a_stop_file_made_before_the_first_step_is_seen_at_it(tmp_path: Path) -> None:
    (tmp_path / "STOP").touch()
    with StopRequest(tmp_path) as stop:
        assert stop.is_asked(0)


def test_a_stop_file_that_was_not_the_reason_is_left_for_the_next_attempt(tmp_path: Path) -> None:
    with StopRequest(tmp_path) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        (tmp_path / "STOP").touch()
        assert stop.is_asked(0)
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
