"""The learning rate against the published rates of the OLMo 2 runs, and against what any schedule must be."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from weft.launch.options import RECIPES
from weft.models.errors import ConfigError
from weft.trainer.configuration.load import load_config
from weft.trainer.configuration.schema import TrainingConfig
from weft.trainer.optimization.config import ScheduleConfig
from weft.trainer.optimization.schedule import learning_rate

# Update -> rate, worked out apart from Weft from the released configurations, with t = step * batch tokens.
PUBLISHED = {
    "olmo2/1b": {
        2000: 2e-4,
        4000: 4e-4,
        100_000: 3.98556949e-4,
        1_000_000: 2.65610026e-4,
        1_907_359: 7.448729e-5,
    },
    "olmo2/7b": {
        1000: 1.5e-4,
        2000: 3e-4,
        100_000: 2.9550768e-4,
        500_000: 1.99207520e-4,
        928_646: 6.135114e-5,
    },
    "olmo2/13b": {
        500: 4.5e-4,
        1000: 9e-4,
        100_000: 8.45926602e-4,
        300_000: 4.91842348e-4,
        596_057: 9.0e-5,
    },
    "olmo2/32b": {
        1000: 3e-4,
        2000: 6e-4,
        100_000: 5.78858681e-4,
        500_000: 2.11704878e-4,
        721_901: 6.62323e-5,
    },
}
# The last update of stage 1 and the rate at which stage 2 was published to begin.
STAGE_2_STARTS = {
    "olmo2/1b": (1_907_359, 7.4487e-5, 1e-4),
    "olmo2/7b": (928_646, 6.1499e-5, 3e-3),
    "olmo2/13b": (596_057, 9e-5, 1e-6),
}
ANNEAL_7B = {1000: 5.634009e-5, 5960: 3.075190e-5, 11_000: 4.75099e-6, 11_920: 4.79e-9}


def recipe(name: str, *overrides: str) -> TrainingConfig:
    return load_config(name, list(overrides), RECIPES).config


def rate(config: TrainingConfig, step: int) -> float:
    return learning_rate(
        config.schedule, config.optimizer.lr, step, config.train.batch_tokens, config.train.steps
    )


@pytest.mark.parametrize(
    ("name", "step", "published"),
    [(name, step, value) for name, rows in PUBLISHED.items() for step, value in rows.items()],
)
def test_the_recipes_follow_the_published_rates(name: str, step: int, published: float) -> None:
    assert rate(recipe(name), step) == pytest.approx(published, rel=2e-7)


@pytest.mark.parametrize("name", STAGE_2_STARTS)
def test_stage_1_ends_where_stage_2_was_published_to_begin(name: str) -> None:
    last, published, tolerance = STAGE_2_STARTS[name]
    config = recipe(name)
    assert config.train.steps == last
    assert rate(config, last) == pytest.approx(published, rel=tolerance)


@pytest.mark.parametrize("name", ["olmo2/1b", "olmo2/7b", "olmo2/32b"])
def test_these_cosines_are_cut_off_before_their_end(name: str) -> None:
    config = recipe(name)
    floor = 0.1 * config.optimizer.lr
    assert rate(config, config.train.steps) > 1.05 * floor
    # Trained on past the horizon, the rate would stay on the floor.
    assert rate(config, 3 * config.train.steps) == pytest.approx(floor, rel=1e-12)


def test_13b_comes_to_the_end_of_its_cosine() -> None:
    config = recipe("olmo2/13b")
    assert rate(config, config.train.steps) == pytest.approx(9e-5, rel=1e-6)


ANNEAL_OVERRIDES = (
    "schedule.kind=linear",
    "schedule.warmup_tokens=null",
    "schedule.horizon_tokens=50_000_000_000",
    "optimizer.lr=6.1499e-5",
)


def test_the_7b_anneal_follows_the_published_rates() -> None:
    config = recipe("olmo2/7b", *ANNEAL_OVERRIDES, "train.steps=11920")
    for step, published in ANNEAL_7B.items():
        assert rate(config, step) == pytest.approx(published, rel=1e-3 if step == 11_920 else 1e-6)
    assert rate(config, 11_921) == 0.0
    assert rate(config, 11_931) == 0.0


def test_a_linear_run_of_1000_steps_by_hand() -> None:
    schedule = ScheduleConfig(kind="linear", horizon_steps=1000)
    for step in (1, 250, 999, 1000, 1001):
        expected = 2e-3 * max(0.0, 1 - step / 1000)
        assert learning_rate(schedule, 2e-3, step, 7, 1) == pytest.approx(expected, abs=1e-15)


def test_wsd_by_hand() -> None:
    """Warm-up over 10, constant to 80, then linear to nothing at 100."""
    schedule = ScheduleConfig(kind="wsd", warmup_steps=10, decay_fraction=0.2)
    corners = {1: 0.1, 5: 0.5, 10: 1.0, 11: 1.0, 80: 1.0, 85: 0.75, 90: 0.5, 99: 0.05, 100: 0.0}
    for step, share in corners.items():
        found = learning_rate(schedule, 3e-4, step, 512, 100)
        assert found == pytest.approx(3e-4 * share, rel=1e-12, abs=1e-18), step
    assert learning_rate(schedule, 3e-4, 150, 512, 100) == 0.0


def test_constant_is_constant_after_its_warm_up() -> None:
    schedule = ScheduleConfig(kind="constant", warmup_steps=4)
    found = [learning_rate(schedule, 8.0, step, 512, 10) for step in (1, 2, 3, 4, 5, 10, 10_000)]
    assert found == [2.0, 4.0, 6.0, 8.0, 8.0, 8.0, 8.0]


def test_the_horizon_is_the_runs_length_where_none_is_named() -> None:
    named = ScheduleConfig(kind="cosine", warmup_steps=3, horizon_steps=40)
    unnamed = ScheduleConfig(kind="cosine", warmup_steps=3)
    for step in range(1, 60):
        assert learning_rate(unnamed, 1.0, step, 64, 40) == learning_rate(named, 1.0, step, 64, 9)
    assert learning_rate(unnamed, 1.0, 40, 64, 40) == pytest.approx(0.1, rel=1e-12)


def test_two_units_for_one_length_are_refused() -> None:
    for what in ("warmup", "horizon"):
        with pytest.raises(ConfigError, match=f"give {what}_steps or {what}_tokens, not both"):
            recipe("olmo2/debug", f"schedule.{what}_steps=5", f"schedule.{what}_tokens=10240")


@st.composite
def schedules(draw: st.DrawFn) -> tuple[ScheduleConfig, int, int, int]:
    """(a schedule that the checks of a recipe let through, warm-up, horizon, tokens of a step)."""
    kind = draw(st.sampled_from(["cosine", "linear", "wsd", "constant"]))
    horizon = draw(st.integers(2, 100_000))
    warmup = draw(st.integers(0, horizon - 1))
    decay = draw(st.floats(0.01, 1.0))
    assume(kind != "wsd" or warmup + decay * horizon <= horizon)
    schedule = ScheduleConfig(
        kind=kind,
        warmup_steps=warmup,
        horizon_steps=horizon,
        final_fraction=draw(st.floats(0, 1)),
        decay_fraction=decay,
    )
    return schedule, warmup, horizon, draw(st.sampled_from([1, 512, 8_388_608]))


@given(drawn=schedules(), place=st.floats(0, 1.2))
def test_steps_and_tokens_give_the_same(
    drawn: tuple[ScheduleConfig, int, int, int], place: float
) -> None:
    schedule, warmup, horizon, batch = drawn
    in_tokens = schedule.model_copy(
        update={
            "warmup_steps": None,
            "horizon_steps": None,
            "warmup_tokens": warmup * batch,
            "horizon_tokens": horizon * batch,
        }
    )
    step = max(1, int(place * horizon))
    assert learning_rate(schedule, 0.3, step, batch, 1) == learning_rate(
        in_tokens, 0.3, step, batch, 1
    )


@given(drawn=schedules(), place=st.floats(0, 1.2), peak=st.floats(1e-8, 10))
def test_a_rate_lies_within_bounds_and_does_not_jump(
    drawn: tuple[ScheduleConfig, int, int, int], place: float, peak: float
) -> None:
    schedule, warmup, horizon, batch = drawn
    # Where the pieces meet is where a jump would be.
    decay_start = int(horizon - schedule.decay_fraction * horizon)
    for step in {max(1, int(place * horizon)), max(1, warmup), horizon, max(1, decay_start)}:
        here, after = (learning_rate(schedule, peak, s, batch, 1) for s in (step, step + 1))
        assert 0 <= here <= peak * (1 + 1e-12)
        # The steepest piece: the warm-up, half a wave's middle, or a straight way down.
        steepest = max(
            1 / max(1, warmup),
            math.pi / 2 / (horizon - warmup),
            1 / (schedule.decay_fraction * horizon) if schedule.kind == "wsd" else 0,
        )
        assert abs(after - here) <= peak * min(1.0, steepest) * (1 + 1e-9)


@given(drawn=schedules())
def test_no_update_of_the_warm_up_runs_at_rate_0(
    drawn: tuple[ScheduleConfig, int, int, int],
) -> None:
    schedule, warmup, _, batch = drawn
    assume(warmup >= 1)
    rates = [learning_rate(schedule, 1.0, s, batch, 1) for s in range(1, min(warmup, 50) + 1)]
    assert rates[0] == pytest.approx(1 / warmup)
    assert all(a < b for a, b in itertools.pairwise(rates))
