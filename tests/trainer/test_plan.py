"""The plan's arithmetic against sums worked out by hand, and that it needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from weft.launch.options import load_recipe
from weft.models.errors import ConfigError
from weft.trainer.plan import Hardware, Plan, plan_run, plan_scaling

P7, BLOCK7, VOCABULARY = 7_298_617_344, 202_391_552, 100_352 * 4096


def plan(recipe: str, gpus: int | None = None, *overrides: str, **hardware: float) -> Plan:
    return plan_run(load_recipe(recipe, overrides).config, gpus, Hardware(**hardware))


def test_sharded_state_of_the_7b() -> None:
    found = plan("olmo2/7b", 64)
    assert (found.strategy, found.shard_ranks) == ("fsdp", 64)
    assert found.memory.parameters == found.memory.gradients == pytest.approx(4 * P7 / 64, abs=4)
    assert found.memory.optimizer == pytest.approx(8 * P7 / 64, abs=8)
    assert found.checkpoint_bytes == 12 * P7
    # Two blocks, embedding, head and final norm in bf16, and the ends' gradient in bf16 and fp32.
    ends = 2 * VOCABULARY + 4096
    assert found.memory.compute_copies == 2 * (2 * BLOCK7 + ends) + 6 * ends


def test_time_is_flops_over_speed() -> None:
    found = plan("olmo2/7b", 256, mfu=0.5)
    tokens = 928_646 * 4_194_304
    flops = tokens * 47_767_904_256
    assert found.tokens == tokens
    assert found.flops == pytest.approx(flops, rel=1e-12)
    assert found.seconds == pytest.approx(flops / (256 * 0.5 * 989.5e12), rel=1e-12)
    # Published for this rate: 10K tokens/s a GPU is 48.3 % of the peak.
    assert plan("olmo2/7b", 1, mfu=0.483).tokens_per_second_per_gpu == pytest.approx(
        10_000, rel=2e-3
    )


def test_unsharded_state_of_the_debug_model() -> None:
    found = plan("olmo2/debug", 2, "parallel.strategy=ddp")
    parameters = sum(found.parameters.values())
    assert found.memory.parameters == 4 * parameters
    assert found.memory.optimizer == 8 * parameters
    assert found.memory.compute_copies == 0
    half = plan("olmo2/debug", 2, "parallel.strategy=ddp", "precision.compute=bf16")
    assert half.memory.compute_copies == 2 * parameters


def test_hashed_tables_are_whole_and_their_gradient_sparse() -> None:
    found = plan("olmo2/quickstart", 2, "parallel.strategy=fsdp")
    tables = 6 * 65_536 * 128
    dense = sum(found.parameters.values()) - tables
    assert found.memory.parameters == pytest.approx(4 * (dense / 2 + tables), abs=4)
    assert found.memory.gradients == pytest.approx(4 * (dense / 2 + 2048 * 6 * 128), abs=4)


def test_hybrid_sharding_splits_over_one_group() -> None:
    found = plan("olmo2/32b", 256)
    assert (found.strategy, found.shard_ranks) == ("hsdp", 64)
    assert found.memory.parameters == pytest.approx(4 * 32_234_279_936 / 64, abs=4)
    assert found.micro_batches * found.micro_batch_tokens * 256 == 8_388_608


def test_fewest_gpus_that_hold_the_run() -> None:
    found = plan("olmo2/7b")
    config = load_recipe("olmo2/7b").config
    assert found.fits
    smaller = [p for p in plan_scaling(config, Hardware()) if p.gpus < found.gpus]
    assert smaller
    assert not any(p.fits for p in smaller)
    assert plan("olmo2/7b", memory_bytes=40e9).gpus > found.gpus
    assert not plan("olmo2/7b", memory_bytes=1e9).fits


def test_recomputation_and_smaller_micro_batches_need_less() -> None:
    most = plan("olmo2/7b", 64, "parallel.activation_checkpointing=none").memory.total
    some = plan("olmo2/7b", 64).memory.total
    least = plan("olmo2/7b", 64, "parallel.activation_checkpointing=block").memory.total
    assert most > some > least
    assert plan("olmo2/7b", 64, "train.micro_batch_tokens=4096").memory.total < some


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="3 ranks"):
        plan("olmo2/7b", 3)
    with pytest.raises(ConfigError, match="mesh"):
        plan("olmo2/32b", 8)


def test_json_has_the_totals() -> None:
    found = plan("olmo2/1b", 8)
    data = json.loads(json.dumps(found.to_dict()))
    assert data["memory"]["total"] == found.memory.total
    assert data["flops"] == found.flops
    assert data["fits"] is True


def test_answers_without_torch() -> None:
    code = (
        "import sys; from weft.launch.cli import main; sys.argv = ['weft', 'plan', 'olmo2/32b']\n"
        "try: main()\nfinally: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("False")
    assert "32,234,279,936" in done.stdout
