"""The plan against the measured peak of real steps on real ranks, and the measuring itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run_ranks
from weft.launch.options import load_recipe
from weft.trainer.benchmarks import memory
from weft.trainer.distributed import Topology

# 5M parameters, 61 MB of state: large enough that small change does not count.
SHAPE = (
    "model.d_model=256",
    "model.d_ff=768",
    "model.n_layers=5",
    "model.n_kv_heads=4",
    "model.vocab_size=2048",
    "data.vocabulary=bytes",
    "run.device=cpu",
    "run.threads=1",
)


def measure(topology: Topology, overrides: list[str]) -> dict[str, Any]:
    return memory.measure_memory(load_recipe("olmo2/debug", overrides).config, topology)


def measured(ranks: int, *overrides: str) -> dict[str, Any]:
    settings = [*SHAPE, f"train.batch_tokens={512 * ranks}", *overrides]
    if ranks == 1:
        return measure(Topology(), settings)
    return max(
        run_ranks(ranks, "test_memory_benchmark:measure", settings),
        key=lambda one: one["peak_bytes"],
    )


@pytest.mark.parametrize("recomputation", ["none", "block", "selective"])
@pytest.mark.parametrize("micro", [512, 256])
def test_one_process(recomputation: str, micro: int) -> None:
    found = measured(
        1,
        f"parallel.activation_checkpointing={recomputation}",
        f"train.micro_batch_tokens={micro}",
    )
    assert found["peak_bytes"] > 70e6
    assert found["ratio"] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (2, ["parallel.strategy=ddp", "parallel.activation_checkpointing=block"]),
        (2, ["parallel.strategy=fsdp", "train.micro_batch_tokens=256"]),
        (
            2,
            [
                "parallel.strategy=fsdp",
                "train.micro_batch_tokens=256",
                "parallel.reduce_gradients=each",
            ],
        ),
    ],
)
def test_several_ranks(ranks: int, overrides: list[str]) -> None:
    found = measured(ranks, *overrides)
    assert found["ratio"] == pytest.approx(1, abs=0.1)


def test_the_measure_counts_every_byte_torch_allocates() -> None:
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        kept = torch.empty(1 << 20)
        gone = torch.empty(1 << 18)
        del gone
    tree = profile.profiler.kineto_results.experimental_event_tree()  # type: ignore[union-attr]
    changes = [change for _, _, change in sorted(memory._allocations(tree))]
    assert changes == [4 << 20, 1 << 20, -(1 << 20)]
    assert kept.numel() == 1 << 20


def test_blocks_whose_release_was_not_seen_are_not_counted_for_ever() -> None:
    # Steps end at 20 and 30. Address 2 is given out again without a release; 3 is never released.
    events = [(1, 1, 100), (11, 2, 50), (12, 2, 50), (13, 2, -50), (14, 3, 60), (21, 4, 70)]
    assert memory._least_peak([*events, (31, 5, 9000)], [10, 20, 30]) == (160, 100)
