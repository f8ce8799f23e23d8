"""The plan's arithmetic against sums worked out by hand, and that it needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_run import write_recipe
from weft.launch.options import load_recipe
from weft.models.errors import ConfigError
from weft.models.transformer.config import Config as TransformerConfig
from weft.trainer.configuration.load import load_config
from weft.trainer.plan import Hardware, Plan, plan_run, plan_scaling, propose, propose_more

P7, BLOCK7, VOCABULARY = 7_298_617_344, 202_391_552, 100_352 * 4096


def plan(recipe: str, gpus: int | None = None, *overrides: str, **hardware: float) -> Plan:
    return plan_run(load_recipe(recipe, overrides).config, gpus, Hardware(**hardware))


def test_sharded_state_of_the_7b() -> None:
    found = plan("olmo2/7b", 64)
    assert (found.strategy, found.shard_ranks) == ("fsdp", 64)
    assert found.memory.parameters == pytest.approx(4 * P7 / 64, abs=4)
    assert found.memory.optimizer == pytest.approx(8 * P7 / 64, abs=8)
    assert found.checkpoint_bytes == 12 * P7
    # Embedding, head and final norm stay gathered in bf16, and one block is.
    ends = 2 * VOCABULARY + 4096
    assert found.memory.compute_copies == 2 * (BLOCK7 + ends)
    # Whole fp32 gradients wait for the last of eight micro-batches, and the head's new one in bf16 comes to them.
    assert found.micro_batches == 8
    assert found.memory.gradients == 4 * P7 + 2 * VOCABULARY


def test_one_micro_batch_needs_no_whole_gradients() -> None:
    found = plan("olmo2/7b", 512)
    assert found.micro_batches == 1
    assert found.memory.gradients == 2 * VOCABULARY


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
    multiplied = half.parameters["blocks"] + half.parameters["head"]
    assert half.memory.compute_copies == 2 * multiplied


def test_hashed_tables_are_whole_and_their_gradient_sparse() -> None:
    found = plan("olmo2/quickstart", 2, "parallel.strategy=fsdp")
    tables = 6 * 65_536 * 128
    dense = sum(found.parameters.values()) - tables
    assert found.memory.parameters == pytest.approx(4 * (dense / 2 + tables), abs=4)
    rows = 2048 * 6 * 128
    assert found.memory.gradients >= 4 * rows
    assert found.communication.rows == 4 * rows + 8 * rows // 128


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


def test_bytes_sent_by_rings() -> None:
    dense = 4 * P7
    sent = plan("olmo2/7b", 512).communication
    blocks, ends = 6_476_529_664, P7 - 6_476_529_664
    # Blocks are gathered twice in bf16, the ends once; gradients are scattered once in fp32.
    assert sent.gather == pytest.approx(511 / 512 * 2 * (2 * blocks + ends), rel=1e-9)
    assert sent.scatter == pytest.approx(511 / 512 * dense, rel=1e-9)
    assert sent.reduce == 0
    sent = plan("olmo2/7b", 256, "parallel.strategy=ddp").communication
    assert (sent.gather, sent.reduce) == (0, pytest.approx(2 * 255 / 256 * dense, rel=1e-9))
    hybrid = plan("olmo2/7b", 512, "parallel.strategy=hsdp", "parallel.shard_ranks=8").communication
    assert hybrid.reduce == pytest.approx(2 * 63 / 64 * dense / 8, rel=1e-9)
    assert plan("olmo2/190m", 1).communication.total == 0


def test_a_shard_within_a_node_goes_over_its_fast_links() -> None:
    overrides = ("parallel.strategy=hsdp", "parallel.shard_ranks=8")
    inside = plan("olmo2/7b", 512, *overrides)
    across = plan("olmo2/7b", 512, *overrides, gpus_per_node=4)
    assert inside.communication.total == across.communication.total
    assert inside.communication_seconds < across.communication_seconds / 2


def test_deepspeed_stages() -> None:
    stages = [plan("olmo2/7b", 64, zero_stage=stage) for stage in (0, 1, 2, 3)]
    assert [p.strategy for p in stages] == ["ddp", "zero1", "zero2", "zero3"]
    # arXiv 1910.02054, section 5: weights and gradients in 16 bits, 12 bytes of optimizer a parameter over all ranks.
    first, second, third = (p.memory for p in stages[1:])
    assert first.parameters == second.parameters == 2 * P7
    assert third.parameters == pytest.approx(2 * P7 / 64, abs=2)
    assert first.optimizer == pytest.approx(12 * P7 / 64, abs=12)
    totals = [p.memory.total for p in stages]
    assert totals == sorted(totals, reverse=True)
    # Stage 3 sends half as much again as stages 1 and 2 in one micro-batch (section 7).
    one = "train.micro_batch_tokens=65536"
    sent = [plan("olmo2/7b", 64, one, zero_stage=s).communication.total for s in (1, 2, 3)]
    assert sent[0] == sent[1]
    assert sent[2] == pytest.approx(1.5 * sent[0], rel=1e-9)


def test_offload_moves_bytes_to_the_host() -> None:
    device = plan("olmo2/7b", 64, zero_stage=3).memory
    host = plan("olmo2/7b", 64, zero_stage=3, offload="optimizer").memory
    everything = plan("olmo2/7b", 64, zero_stage=3, offload="all").memory
    assert device.host == 0
    # Master weights, two moments and gradients: 16 bytes a parameter of this rank's part; then its bf16 weights.
    assert host.host == pytest.approx(16 * P7 / 64, abs=16)
    assert everything.host == pytest.approx(18 * P7 / 64, abs=18)
    assert device.total > host.total > everything.total


def test_proposals_fit_as_typed_and_come_fastest_first() -> None:
    config = load_recipe("olmo2/7b").config
    hardware = Hardware(memory_bytes=50e9)
    found = propose(config, 64, hardware)
    assert not plan("olmo2/7b", 64, memory_bytes=50e9).fits
    assert 1 <= len(found) <= 3
    times = [p.plan.step_seconds for p in found]
    assert times == sorted(times)
    for proposal in found:
        typed = plan("olmo2/7b", 64, *proposal.overrides.split(), memory_bytes=50e9)
        assert typed == proposal.plan
        assert typed.fits
    assert propose(config, 8, Hardware(memory_bytes=8e9)) == []
    more = propose_more(config, 8, hardware)
    assert more is not None
    assert more.plan.gpus > 8


LMFUSION: dict[str, Any] = {
    "family": "mixture_of_transformers",
    "modalities": ["text", "image"],
    "image": {"channels": 4, "size": 8},
    "special_ids": [260, 261],
    "base": {
        "source": "nowhere",
        "architecture": {"vocab_size": 260, "n_layers": 2, "d_model": 64, "n_heads": 4, "d_ff": 96},
    },
}


def test_a_frozen_base_has_weights_and_nothing_else(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, model=LMFUSION)
    base = TransformerConfig(**LMFUSION["base"]["architecture"]).count_parameters()
    for strategy in ("single", "ddp", "fsdp"):
        gpus = 1 if strategy == "single" else 2
        overrides = [f"parallel.strategy={strategy}", "train.micro_batch_tokens=null"]
        found = plan_run(load_config(str(recipe), overrides, tmp_path).config, gpus, Hardware())
        total, frozen = sum(found.parameters.values()), sum(base.values())
        shards = gpus if strategy == "fsdp" else 1
        assert found.memory.parameters == pytest.approx(4 * total / shards, abs=4)
        assert found.memory.optimizer == pytest.approx(8 * (total - frozen) / shards, abs=8)
        assert found.checkpoint_bytes == 12 * (total - frozen)
        sent = found.communication
        assert sent.reduce + sent.scatter == pytest.approx(
            4 * (total - frozen) * (strategy != "single") / (2 if shards > 1 else 1), abs=8
        )
    zero = plan_run(load_config(str(recipe), [], tmp_path).config, 2, Hardware(zero_stage=1))
    assert zero.memory.optimizer == pytest.approx(12 * (total - frozen) / 2, abs=12)
    assert zero.memory.parameters == 4 * total
