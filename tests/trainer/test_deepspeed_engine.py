"""The deepspeed engine: withheld steps, the user's JSON, and runs that go through several engines and numbers of ranks."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import test_engine_contract as contract
import torch
from ranks import run_ranks
from test_resume import resume, run_new
from tiny_run import EXACT, trace, write_recipe
from weft.launch.local import LocalRanks
from weft.models.errors import ConfigError
from weft.trainer.configuration.load import load_run_config
from weft.trainer.distributed import Topology
from weft.trainer.engines.deepspeed_config import DeepSpeedConfig, Expected, merge_settings
from weft.trainer.optimization.config import OptimizerConfig

EXPECTED = Expected(
    batch_rows=16, micro_batch_rows=2, micro_batches=4, compute="fp32", optimizer=OptimizerConfig()
)


def merge(content: dict[str, Any], **settings: Any) -> dict[str, Any]:
    expected = EXPECTED.model_copy(update={"compute": settings.pop("compute", "fp32")})
    return merge_settings(DeepSpeedConfig(config=content, **settings), expected)


def test_what_the_json_says_passes_through() -> None:
    content = {
        "zero_optimization": {"stage": 3, "overlap_comm": False, "reduce_bucket_size": 1000},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}},
        "train_batch_size": "auto",
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": "auto"},
        "wall_clock_breakdown": True,
    }
    before = json.dumps(content)
    found = merge(content, compute="bf16")
    assert found["zero_optimization"] == content["zero_optimization"]
    assert found["wall_clock_breakdown"] is True
    assert found["bf16"] == {"enabled": True}
    assert "optimizer" not in found
    assert (found["gradient_clipping"], found["gradient_accumulation_steps"]) == (0.0, 1)
    assert json.dumps(content) == before
    assert merge({})["zero_optimization"] == {"stage": 2}


def test_offloading_from_either_side(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(
        '{"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", "buffer_count": 7}}}'
    )
    found = merge_settings(DeepSpeedConfig(config=str(path), offload_optimizer="cpu"), EXPECTED)
    assert found["zero_optimization"]["offload_param"] == {"device": "cpu", "buffer_count": 7}
    assert found["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        (
            {"train_batch_size": 32},
            {},
            "train_batch_size is 32 but train.batch_tokens / data.sequence_length is 16",
        ),
        (
            {"gradient_accumulation_steps": 8},
            {},
            "gradient_accumulation_steps is 8 but the number of micro-batches",
        ),
        (
            {"gradient_clipping": 0.5},
            {},
            "gradient_clipping is 0.5 but optimizer.clip_grad_norm is 1.0",
        ),
        ({"optimizer": {"type": "Lamb"}}, {}, "optimizer.type is Lamb; Weft trains with AdamW"),
        ({"optimizer": {"params": {"lr": 1}}}, {}, "optimizer.params.lr is 1 but optimizer.lr is"),
        (
            {"scheduler": {"type": "WarmupLR"}},
            {},
            "it has a scheduler; Weft's is the schedule section",
        ),
        ({"fp16": {"enabled": True}}, {}, "fp16 is enabled; Weft computes in fp32 or bf16"),
        (
            {"bf16": {"enabled": True}},
            {},
            "bf16.enabled is True but precision.compute=bf16 is False",
        ),
        (
            {"zero_optimization": {"stage": 3}},
            {"zero_stage": 2},
            "stage is 3 but parallel.deepspeed.zero_stage is 2",
        ),
        ({"zero_optimization": {"stage": 0}}, {}, "stage is 0; choose 1, 2 or 3"),
        (
            {},
            {"offload_parameters": "cpu"},
            "needs stage 3, this is stage 2; set parallel.deepspeed.zero_stage=3",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            {},
            "is nvme; Weft offloads to the cpu",
        ),
    ],
)
def test_what_contradicts_the_run_is_refused_in_one_line(
    content: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        merge(content, **settings)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_file_that_is_no_json_is_named(tmp_path: Path) -> None:
    for text, said in (
        (None, "cannot be read: No such file"),
        ("{", "is no JSON"),
        ("[]", "holds a list"),
    ):
        path = tmp_path / "ds.json"
        if text is not None:
            path.write_text(text)
        with pytest.raises(ConfigError, match=rf"parallel\.deepspeed\.config: .*ds\.json {said}"):
            merge_settings(DeepSpeedConfig(config=str(path)), EXPECTED)


def withhold_on_rank(topology: Topology, settings: dict[str, Any]) -> list[Any]:
    """A step whose gradient is no number, then an outlier, between good ones: what changed by each, and the step counts."""
    optimizer = contract.OPTIMIZER.model_copy(
        update={"skip_step": True, "skip_step_minimum": 4, "skip_step_window": 8}
    )
    engine = contract.build(topology, "deepspeed", {"deepspeed": settings}, optimizer=optimizer)
    found: list[Any] = []
    batch = contract.make_batch([topology.rank])
    for step in range(7):
        before = contract.state_digest(engine)
        # Dividing by what is no number is what makes this gradient none.
        count = math.nan if step == 2 else batch.target_count * topology.world_size
        sums = engine.forward_backward("train", [batch], {"tokens": count})
        loss = torch.tensor(1000.0 if step == 6 else 3.0 + 0.01 * step)
        result = engine.step("train", 1e-3, loss)
        after = contract.state_digest(engine)
        changed = {n for n in before if before[n] != after[n] and "skip_step" not in n}
        (updates,) = {tuple(engine.scalar_state()["updates"]["train"].values())}
        found.append([result.skipped.item(), len(changed) > 0, max(updates)])
        assert torch.isfinite(sums["cross_entropy"])
    return found


@pytest.mark.parametrize(
    ("settings", "ranks"),
    [
        ({"zero_stage": 1}, 1),
        ({"zero_stage": 2}, 2),
        ({"zero_stage": 3}, 2),
        ({"zero_stage": 2, "offload_optimizer": "cpu"}, 1),
    ],
)
def test_withheld_steps_leave_everything_as_it_was(settings: dict[str, Any], ranks: int) -> None:
    for found in run_ranks(ranks, "test_deepspeed_engine:withhold_on_rank", settings):
        good = [[0.0, True, n] for n in range(1, 6)]
        assert found == [*good[:2], [1.0, False, 2], *good[2:5], [1.0, False, 5]]


def train_in_bf16(topology: Topology, stage: int) -> list[Any]:
    settings = {"deepspeed": {"zero_stage": stage}}
    engine = contract.build(topology, "deepspeed", settings, precision={"compute": "bf16"})
    values = contract.run_steps(engine, 0, 2)
    return [values, sorted({str(s.tensor.dtype) for s in engine.state_shards()})]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_keeps_fp32_weights_and_moments(stage: int) -> None:
    for values, types in run_ranks(2, "test_deepspeed_engine:train_in_bf16", stage):
        assert types == ["torch.float32"]
        torch.testing.assert_close(
            torch.tensor(values)[:, 0],
            torch.tensor(contract.expected_of("deepspeed"))[:2, 0],
            rtol=3e-2,
            atol=3e-2,
        )


def recompute_on_rank(topology: Topology, stage: int) -> list[Any]:
    settings = {"activation_checkpointing": "block", "deepspeed": {"zero_stage": stage}}
    return contract.run_steps(contract.build(topology, "deepspeed", settings), 0, 2)


@pytest.mark.parametrize("stage", [2, 3])
def test_recomputation_changes_nothing(stage: int) -> None:
    (values,) = run_ranks(1, "test_deepspeed_engine:recompute_on_rank", stage)
    torch.testing.assert_close(
        torch.tensor(values),
        torch.tensor(contract.expected_of("deepspeed"))[:2],
        rtol=1e-5,
        atol=1e-5,
    )


def refuse_on_rank(topology: Topology) -> str:
    """What is said of tables that are updated row by row."""
    from weft.models.build import build_task
    from weft.trainer.engines.deepspeed_engine import DeepSpeedEngine

    config = contract.ParallelConfig(engine="deepspeed", deepspeed={"zero_stage": 3})
    try:
        DeepSpeedEngine(
            build_task(contract.MODEL),
            topology,
            parallel=config,
            precision=contract.PrecisionConfig(),
            optimizer=contract.OPTIMIZER,
            seed=0,
            expected_rows=(8, 2, 4),
        )
    except ConfigError as error:
        return str(error)
    return "accepted"


def test_row_sparse_tables_are_refused() -> None:
    (said,) = run_ranks(1, "test_deepspeed_engine:refuse_on_rank")
    assert (
        "the ngrams tables are updated row by row, which ZeRO does not do; set parallel.engine=torch"
        in said
    )


STEPS = 12
PLAIN = {
    "model__ngram": None,
    "train__steps": STEPS,
    "checkpoint__every": 4,
    "schedule__horizon_steps": STEPS,
    "train__micro_batch_tokens": 64,
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_new(tmp_path_factory.mktemp("undisturbed"), **PLAIN)


def attempt(run: Path, ranks: int, number: int, *arguments: str) -> None:
    group = LocalRanks(["train", *arguments], ranks, run.parent / "logs" / str(number))
    assert group.wait() == [0] * ranks, group.tail(40)


def test_a_run_goes_from_fsdp_on_four_ranks_to_zero_3_on_two_to_one_process(
    tmp_path: Path, undisturbed: Path
) -> None:
    recipe = write_recipe(tmp_path, **{**PLAIN, "train__steps": 4})
    run = tmp_path / "run"
    attempt(run, 4, 1, str(recipe), "parallel.strategy=fsdp")
    zero = [
        "parallel.engine=deepspeed",
        "parallel.strategy=auto",
        "parallel.deepspeed.zero_stage=3",
    ]
    attempt(run, 2, 2, "--resume", str(run), "train.steps=8", *zero)
    config = load_run_config(run, []).config
    assert (config.parallel.engine, config.parallel.deepspeed.zero_stage) == ("deepspeed", 3)
    attempt(run, 1, 3, *["--resume", str(run), f"train.steps={STEPS}", "parallel.engine=torch"])
    for ours, theirs in zip(trace(run), trace(undisturbed), strict=True):
        for name, a, b in zip(EXACT, ours, theirs, strict=False):
            is_sum = name in ("loss", "z_loss", "grad_norm", "bits_per_byte")
            assert a == (pytest.approx(b, rel=1e-5) if is_sum else b), name


def test_a_zero_run_resumes_to_the_bit_and_is_evaluated_by_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zero = ["parallel.engine=deepspeed", "parallel.deepspeed.zero_stage=2"]
    whole = write_recipe(tmp_path / "whole", **PLAIN)
    attempt(tmp_path / "whole" / "run", 2, 1, str(whole), *zero)
    parts = write_recipe(tmp_path / "parts", **{**PLAIN, "train__steps": 8})
    run = tmp_path / "parts" / "run"
    attempt(run, 2, 1, str(parts), *zero)
    attempt(run, 2, 2, "--resume", str(run), f"train.steps={STEPS}")
    assert trace(run) == trace(tmp_path / "whole" / "run")
    from weft.trainer.run_evaluation import evaluate_run

    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    report = evaluate_run(run)
    assert report["step"] == STEPS
    assert 0 < report["total"]["loss"] < 10
    assert "DS_ACCELERATOR" not in os.environ


def test_one_process_without_a_launcher_trains(tmp_path: Path, undisturbed: Path) -> None:
    recipe = write_recipe(tmp_path, **PLAIN)
    attempt(tmp_path / "run", 1, 1, str(recipe), "parallel.engine=deepspeed")
    for ours, theirs in zip(trace(tmp_path / "run"), trace(undisturbed), strict=True):
        assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    assert resume(tmp_path / "run", "train.steps=14", "parallel.engine=torch") == 0
