"""The outlier rule of OLMo 2 32B against a plain loop, and what a withheld step leaves alone in an engine."""

from __future__ import annotations

import hashlib
import math
import random
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from test_engine_contract import OPTIMIZER, build_single, make_batch
from weft.trainer.checkpoint.config import CheckpointConfig
from weft.trainer.checkpoint.manager import CheckpointManager
from weft.trainer.checkpoint.reading import read_tensor
from weft.trainer.distributed import Topology
from weft.trainer.engines.torch_engine import TorchEngine
from weft.trainer.optimization.config import OptimizerConfig
from weft.trainer.optimization.skip_step import SkipStep

Series = list[tuple[float, float]]


def plain_rule(
    series: Series, window: int = 128, minimum: int = 64, sigmas: float = 6.0
) -> list[tuple[bool, float]]:
    """(skipped, distance of the nearer of loss and norm from its threshold, in deviations), value by value."""
    verdicts = []
    for i, newest in enumerate(series):
        earlier = series[max(0, i - window) : i]
        if len(earlier) + 1 < minimum:
            verdicts.append((False, math.inf))
            continue
        scores = []
        for kind in (0, 1):
            past = [values[kind] for values in earlier]
            deviation = statistics.stdev(past)
            scores.append((newest[kind] - statistics.fmean(past)) / deviation - sigmas)
        verdicts.append((max(scores) > 0, min(abs(score) for score in scores)))
    return verdicts


def found_by_weft(series: Series, **settings: Any) -> list[bool]:
    rule = SkipStep(OptimizerConfig(skip_step=True, **settings), torch.device("cpu"))
    return [
        rule.keep(torch.tensor(loss), torch.tensor(norm)).item() == 0.0 for loss, norm in series
    ]


def make_series(seed: int, length: int, chance: float) -> Series:
    """A loss that falls slowly and a norm that wanders; each now and then far off, up or down."""
    draw = random.Random(seed)

    def value(level: float, spread: float) -> float:
        far = draw.choice([-8, 5, 7, 10, 40]) if draw.random() < chance else 0
        # Single precision, so that both see the same numbers.
        return torch.tensor(level + spread * (draw.gauss(0, 1) + far)).item()

    return [(value(4 - 2 * i / length, 0.05), value(1.0, 0.1)) for i in range(length)]


@pytest.mark.parametrize("seed", range(6))
def test_decisions_equal_a_plain_loop(seed: int) -> None:
    series = make_series(seed, 400, chance=0.03)
    expected = plain_rule(series)
    # No case so close that rounding decides it: then the two have to agree everywhere.
    assert min(distance for _, distance in expected) > 1e-4
    skipped = [is_skipped for is_skipped, _ in expected]
    assert found_by_weft(series) == skipped
    assert 2 <= sum(skipped) <= 60, "the series tests nothing"


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    window=st.integers(3, 20),
    sigmas=st.sampled_from([1.0, 2.5, 6.0]),
    data=st.data(),
)
def test_decisions_equal_a_plain_loop_for_any_settings(
    seed: int, window: int, sigmas: float, data: st.DataObject
) -> None:
    minimum = data.draw(st.integers(3, window + 1))
    series = make_series(seed, 60, chance=0.1)
    expected = plain_rule(series, window, minimum, sigmas)
    found = found_by_weft(
        series, skip_step_window=window, skip_step_minimum=minimum, skip_step_std=sigmas
    )
    for ours, (theirs, distance) in zip(found, expected, strict=True):
        assert ours == theirs or distance < 1e-3


def steady(count: int) -> Series:
    return [(3.0 + 0.01 * (i % 5), 1.0 + 0.01 * (i % 3)) for i in range(count)]


def test_the_64th_value_is_the_first_that_is_judged() -> None:
    for held in (61, 62, 63, 64):
        *_, last = found_by_weft([*steady(held), (1000.0, 1.0)])
        # The newest counts as held.
        assert last == (held + 1 >= 64), held


@pytest.mark.parametrize(
    ("outlier", "is_skipped"),
    [
        ((1000.0, 1.0), True),
        ((3.0, 1000.0), True),
        ((1000.0, 1000.0), True),
        # Only what is too large: a sudden fall is no spike.
        ((-1000.0, 0.0), False),
        ((3.0, 1.0), False),
    ],
)
def test_the_loss_or_the_norm_is_enough(outlier: tuple[float, float], is_skipped: bool) -> None:
    *before, last = found_by_weft([*steady(100), outlier])
    assert not any(before)
    assert last == is_skipped


def test_skipped_values_stay_in_the_window_and_leave_it_after_128() -> None:
    # Three of a kind widen the deviation so much that the fourth passes, until they are 128 values old.
    far = (50.0, 1.0)
    series = [*steady(100), far, far, far, far, *steady(124), far, *steady(128), far]
    found = found_by_weft(series)
    assert [i for i, is_skipped in enumerate(found) if is_skipped] == [100, 101, 102, 357]
    assert found == [is_skipped for is_skipped, _ in plain_rule(series)]


def test_values_that_are_no_numbers_never_enter_the_window() -> None:
    bad = [(math.nan, 1.0), (3.0, math.inf), (math.nan, math.nan)]
    series = steady(80)
    mixed = [*series[:40], bad[0], *series[40:70], bad[1], bad[2], *series[70:], (1000.0, 1.0)]
    found = found_by_weft(mixed)
    assert found[-1], "an outlier after a NaN was not seen"
    kept = [f for values, f in zip(mixed, found, strict=True) if all(map(math.isfinite, values))]
    assert kept == found_by_weft([*series, (1000.0, 1.0)])


def test_one_earlier_value_has_no_deviation_to_judge_by() -> None:
    with pytest.raises(ValidationError, match="skip_step_minimum"):
        OptimizerConfig(skip_step=True, skip_step_minimum=2)


# In an engine: a small model, a window of 8 that judges from the 4th value on.
SETTINGS = OPTIMIZER.model_copy(
    update={"skip_step": True, "skip_step_minimum": 4, "skip_step_window": 8}
)
WINDOW = "optimizer/skip_step/"


def digests(engine: TorchEngine) -> dict[str, str]:
    return {
        shard.name: hashlib.sha256(shard.tensor.numpy().tobytes()).hexdigest()
        for shard in engine.state_shards()
    }


def one_step(engine: TorchEngine, number: int, loss: float | None = None, scale: int = 1) -> bool:
    """A real step, told a loss of our choice; gradients are `scale` times too large. Whether it was skipped."""
    batch = make_batch(list(range(number * 8, number * 8 + 8)))
    tokens = max(1, batch.target_count // scale)
    engine.forward_backward("train", [batch], {"tokens": tokens})
    told = torch.tensor(3.0 + 0.01 * (number % 3) if loss is None else loss)
    return engine.step("train", 1e-2, told).skipped.item() == 1.0


OUTLIERS = {"loss": {"loss": 1000.0}, "norm": {"scale": 60}}


@pytest.mark.parametrize("kind", OUTLIERS)
def test_a_skipped_step_leaves_all_but_the_window(kind: str) -> None:
    engine = build_single(optimizer=SETTINGS)
    assert [one_step(engine, i) for i in range(6)] == [False] * 6
    before, counts = digests(engine), engine.scalar_state()
    assert one_step(engine, 6, **OUTLIERS[kind])
    after = digests(engine)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {f"{WINDOW}values", f"{WINDOW}count"}
    assert engine.scalar_state() == counts
    # Weights, both moments and decay of every kind of parameter were looked at.
    for part in ("parameters/", "optimizer/exp_avg/", "optimizer/exp_avg_sq/"):
        assert f"{part}model/embedding.ngrams.weight" in before
        assert f"{part}model/embedding.tokens.weight" in before
        assert f"{part}model/norm.weight" in before


def test_after_a_skipped_step_training_goes_on_as_without_it() -> None:
    """The next update has the number and bias correction it would have had."""
    with_outlier, without = build_single(optimizer=SETTINGS), build_single(optimizer=SETTINGS)
    for engine in (with_outlier, without):
        assert not any(one_step(engine, i) for i in range(6))
    assert one_step(with_outlier, 6, loss=1000.0)
    for engine in (with_outlier, without):
        assert not one_step(engine, 7)
    ours, theirs = digests(with_outlier), digests(without)
    assert {n: d for n, d in ours.items() if not n.startswith(WINDOW)} == {
        n: d for n, d in theirs.items() if not n.startswith(WINDOW)
    }
    assert with_outlier.scalar_state() == without.scalar_state()


def test_the_window_is_in_the_checkpoint_and_decides_after_a_resume(tmp_path: Path) -> None:
    engine = build_single(optimizer=SETTINGS)
    losses = [3.0, 3.5, 2.5, 3.2, 2.9]
    for i, loss in enumerate(losses):
        assert not one_step(engine, i, loss=loss)
    manager = CheckpointManager(tmp_path, CheckpointConfig(), Topology())
    manager.save(5, engine.state_shards(), {"engine": engine.scalar_state()}, {}, blocking=True)
    path = manager.find_latest()
    assert path is not None
    stored = read_tensor(path, f"{WINDOW}values")
    assert sorted(stored[0].tolist()) == pytest.approx(sorted([*losses, 0.0, 0.0, 0.0]))
    assert read_tensor(path, f"{WINDOW}count").item() == len(losses)
    resumed, forgetful = build_single(optimizer=SETTINGS), build_single(optimizer=SETTINGS)
    for other in (resumed, forgetful):
        shards = other.state_shards()
        if other is forgetful:
            shards = [s for s in shards if not s.name.startswith(WINDOW)]
        loaded = CheckpointManager(tmp_path, CheckpointConfig(), Topology()).load(path, shards)
        other.load_scalar_state(loaded.state["engine"])
    decisions = [one_step(e, 5, loss=40.0) for e in (engine, resumed, forgetful)]
    # Without the window nothing could have told that 40 is far off.
    assert decisions == [True, True, False]
    assert digests(resumed) == digests(engine)
