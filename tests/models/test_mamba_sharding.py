"""Mixture-of-Mamba with sharded weights: what stays fp32, and a rank that has no image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mamba_oracle import THREE, mixed
from ranks import run_ranks
from weft.models import build_task
from weft.models.mamba.config import Config
from weft.trainer.distributed import Topology
from weft.trainer.engines.config import ParallelConfig, PrecisionConfig
from weft.trainer.engines.torch_engine import TorchEngine
from weft.trainer.optimization.config import OptimizerConfig

MODEL = Config(vocab_size=50, d_model=16, n_layers=2, d_state=4, modalities=THREE[:2])
KINDS = {0: [0, 1, 1, 0, 0, 0, 1, 0], 1: [0] * 8}


def train(topology: Topology, strategy: str, compute: str) -> dict[str, Any]:
    """Two steps on a row of two modalities and one of text; each rank has its share of the rows."""
    engine = TorchEngine(
        build_task(MODEL),
        topology,
        parallel=ParallelConfig(strategy=strategy),
        precision=PrecisionConfig(compute=compute),
        optimizer=OptimizerConfig(lr=1e-2, eps=1e-6),
        seed=7,
    )
    seen: dict[str, str] = {}
    block = engine.networks["model"].backbone.blocks[0]
    for name, module in (("ssm", block.ssm), ("in_proj", block.in_proj)):
        module.register_forward_hook(
            lambda m, args, out, name=name: seen.update(
                {name: str(next(m.parameters()).dtype), f"{name} out": str(out.dtype)}
            )
        )
    torch.manual_seed(0)
    rows = [mixed([3, 5], KINDS[i], 8, THREE[:2]) for i in range(2)]
    mine = [rows[i] for i in range(topology.rank, 2, topology.world_size)]
    each = [engine.task.counts(row) for row in rows]
    counts = {name: sum(count[name] for count in each) for name in each[0]}
    losses, norms = [], []
    for _ in range(2):
        sums = engine.forward_backward("train", mine, counts)
        for name, item in engine.parameters.items():
            assert item.parameter.grad is not None, name
        total = engine.sum_over_ranks({"loss": sums["cross_entropy"]})["loss"]
        losses.append(float(total) / counts["tokens"])
        norms.append(float(engine.step("train", 1e-2).grad_norm))
    return {"losses": losses, "norms": norms, "seen": seen}


def train_each_way(topology: Topology) -> dict[str, Any]:
    ways = [("fsdp", "fp32"), ("ddp", "fp32"), ("fsdp", "bf16")]
    return {" ".join(way): train(topology, *way) for way in ways}


@pytest.fixture(scope="module")
def on_two_ranks() -> list[dict[str, Any]]:
    return run_ranks(2, "test_mamba_sharding:train_each_way")


def test_a_rank_without_images_neither_hangs_nor_changes_the_step(
    on_two_ranks: list[dict[str, Any]],
) -> None:
    single = train(Topology(), "single", "fp32")
    for rank in on_two_ranks:
        for way in ("fsdp fp32", "ddp fp32"):
            assert rank[way]["losses"] == pytest.approx(single["losses"], rel=1e-5)
            assert rank[way]["norms"] == pytest.approx(single["norms"], rel=1e-4)


def test_the_recurrence_stays_fp32_where_products_are_bf16(
    on_two_ranks: list[dict[str, Any]],
) -> None:
    seen = {
        "ssm": "torch.float32",
        "in_proj": "torch.bfloat16",
        "ssm out": "torch.bfloat16",
        "in_proj out": "torch.bfloat16",
    }
    exact = train(Topology(), "single", "fp32")
    for rank in on_two_ranks:
        assert rank["fsdp bf16"]["seen"] == seen
        assert rank["fsdp bf16"]["losses"] == pytest.approx(exact["losses"], rel=1e-2)
    under_autocast = train(Topology(), "single", "bf16")
    assert under_autocast["seen"] == {**seen, "in_proj": "torch.float32"}
    assert under_autocast["losses"] == pytest.approx(exact["losses"], rel=1e-2)
