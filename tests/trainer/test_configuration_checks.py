"""Settings that are fine alone and wrong together, and those that depend on the number of ranks."""

from __future__ import annotations

from typing import Any

import pytest
from weft.models.errors import ConfigError
from weft.models.transformer.config import Config, NgramConfig
from weft.trainer.configuration.checks import check_against_world, cross_field_errors
from weft.trainer.configuration.schema import TrainingConfig, list_families, model_section


def configuration(**sections: dict[str, Any]) -> TrainingConfig:
    """A small sound configuration, changed."""
    base: dict[str, dict[str, Any]] = {
        "model": {"vocab_size": 260, "n_layers": 1, "d_model": 8, "n_heads": 2},
        "data": {"sequence_length": 10},
        "train": {"steps": 100, "batch_tokens": 80},
    }
    names = {*base, *sections}
    return TrainingConfig.model_validate(
        {name: {**base.get(name, {}), **sections.get(name, {})} for name in names}
    )


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"train": {"micro_batch_tokens": 80}},
        {"schedule": {"warmup_steps": 99}},
        {"schedule": {"kind": "wsd", "warmup_steps": 90}},
        {"schedule": {"kind": "linear", "horizon_steps": 100}},
        {"schedule": {"kind": "cosine", "horizon_steps": 50}},
        {"schedule": {"kind": "constant", "warmup_steps": 1000}},
        {"model": {"vocab_size": 320}},
        {"model": {"ngram": {"rows": 5}}},
        {"data": {"vocabulary": "hf:x"}, "model": {"vocab_size": 5}},
        {"parallel": {"strategy": "hsdp", "shard_ranks": 2}},
    ],
)
def test_sound_settings_pass(sections: dict[str, Any]) -> None:
    assert cross_field_errors(configuration(**sections)) == []


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"batch_tokens": 84}}, "train.batch_tokens: 84 is not a multiple of data.sequence_length 10; the nearest is 80"),
        ({"train": {"batch_tokens": 3}}, "the nearest is 10"),
        ({"train": {"micro_batch_tokens": 15}}, "train.micro_batch_tokens: 15 is not a multiple"),
        ({"train": {"micro_batch_tokens": 160}}, "train.micro_batch_tokens: 160 is more than the whole batch"),
        ({"schedule": {"warmup_steps": 100}}, "schedule.warmup_steps: a warm-up of 100 steps does not fit in a schedule of 100 steps"),
        ({"schedule": {"warmup_tokens": 8004}}, "schedule.warmup_tokens: a warm-up of 100.0 steps"),
        ({"schedule": {"warmup_steps": 50, "horizon_tokens": 1600}}, "a schedule of 20 steps"),
        ({"schedule": {"kind": "linear", "horizon_steps": 50}}, "schedule.horizon_steps: linear reaches zero after 50 steps but train.steps is 100"),
        ({"schedule": {"kind": "wsd", "horizon_tokens": 80}}, "schedule.horizon_tokens: wsd reaches zero after 1 steps"),
        ({"schedule": {"kind": "wsd", "warmup_steps": 95}}, "schedule.decay_fraction: warm-up and a decay over 0.1"),
        ({"model": {"vocab_size": 256}}, "model.vocab_size: 256 is less than the 260 ids"),
        ({"data": {"vocabulary": "hf:x"}, "model": {"ngram": {"rows": 5}}}, "model.ngram: hashed byte n-grams need data.vocabulary=bytes, found hf:x"),
        ({"parallel": {"engine": "deepspeed", "strategy": "fsdp"}}, "parallel.strategy: fsdp belongs to engine torch; with parallel.engine=deepspeed set parallel.strategy=auto"),
        ({"parallel": {"engine": "deepspeed", "compile": True}}, "parallel.compile: DeepSpeed's hooks do not go with it"),
        ({"parallel": {"shard_ranks": 2}}, "parallel.shard_ranks: has no effect with parallel.strategy=auto"),
        ({"optimizer": {"skip_step": True, "skip_step_window": 8}}, "optimizer.skip_step_minimum: 64 values are never held"),
        ({"checkpoint": {"keep_best": 2}, "eval": {"every": None, "at_end": False}}, "checkpoint.keep_best: no step is ever evaluated"),
    ],
)  # fmt: skip
def test_wrong_together(sections: dict[str, Any], message: str) -> None:
    (found,) = cross_field_errors(configuration(**sections))
    assert message in found


def test_checks_are_left_out_where_a_value_was_wrong_already() -> None:
    config = configuration(train={"batch_tokens": 84}, model={"vocab_size": 1})
    assert len(cross_field_errors(config)) == 2
    assert len(cross_field_errors(config, broken=["data.sequence_length"])) == 1
    assert cross_field_errors(config, broken=["train", "model"]) == []


@pytest.mark.parametrize(
    ("sections", "world_size"),
    [
        ({}, 1),
        ({}, 8),
        ({"train": {"micro_batch_tokens": 20}}, 4),
        ({"parallel": {"strategy": "hsdp", "shard_ranks": 2, "replicate_ranks": 2}}, 4),
        ({"parallel": {"strategy": "hsdp", "shard_ranks": 2}}, 8),
        ({"parallel": {"strategy": "single"}}, 1),
    ],
)
def test_worlds_that_fit(sections: dict[str, Any], world_size: int) -> None:
    check_against_world(configuration(**sections), world_size)


@pytest.mark.parametrize(
    ("sections", "world_size", "message"),
    [
        ({}, 3, "8 samples of 10 tokens do not divide over 3 ranks; the nearest that does is train.batch_tokens=90"),
        ({}, 16, "train.batch_tokens=160"),
        ({"train": {"micro_batch_tokens": 40}}, 4, "train.micro_batch_tokens: 40 does not divide a rank's share of 20 tokens"),
        ({"parallel": {"strategy": "single"}}, 2, "parallel.strategy: single, but there are 2 ranks"),
        ({"parallel": {"strategy": "hsdp", "shard_ranks": 2, "replicate_ranks": 2}}, 8, "a mesh of 2 copies x 2 shards does not make up 8 ranks"),
        ({"parallel": {"strategy": "hsdp", "replicate_ranks": 3}}, 8, "a mesh of 3 copies does not make up 8 ranks"),
    ],
)  # fmt: skip
def test_worlds_that_do_not_fit(sections: dict[str, Any], world_size: int, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_against_world(configuration(**sections), world_size)
    assert message in str(caught.value)


def test_all_that_is_wrong_with_a_world_comes_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        check_against_world(configuration(parallel={"strategy": "single"}), 3)
    assert len(str(caught.value).splitlines()) == 2


def test_the_model_section_is_the_familys_own() -> None:
    config = configuration(model={"ngram": {"rows": 5}})
    assert type(config.model) is Config
    assert config.model.ngram == NgramConfig(rows=5)
    assert "transformer" in list_families()
    with pytest.raises(
        ConfigError, match=r"'trasformer' under weft\.models; did you mean transformer\?"
    ):
        model_section("trasformer")
