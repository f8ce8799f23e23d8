"""Groups that need what no rank's part of a step has: left as they are, by every engine alike."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import pytest
import test_engine_contract as contract
import torch
from ranks import run_ranks
from torch import nn
from weft.models.batch import PackedBatch
from weft.models.task import LossOutput, LossTerm, ParameterGroup
from weft.models.transformer.task import TransformerTask
from weft.trainer.distributed import Topology

IMAGES = [1, 0, 1, 1]
"""How many of the run's ranks have an image in each step."""


class NeedyTask(TransformerTask):
    """The tiny transformer, whose last block is an image tower: it learns from samples marked as images alone."""

    def parameter_groups(self, networks: Mapping[str, nn.Module]) -> list[ParameterGroup]:
        names = [f"model/{name}" for name, _ in networks["model"].named_parameters()]
        tower = tuple(n for n in names if n.startswith("model/blocks.1."))
        tables = tuple(n for n in names if n.endswith("ngrams.weight"))
        rest = tuple(n for n in names if n not in tower + tables)
        groups = [ParameterGroup("rest", rest), ParameterGroup("tower", tower, needs="images")]
        if tables:
            kind: Any = "row_sparse_adam"
            groups.append(ParameterGroup("tables", tables, algorithm=kind, needs="images"))
        return groups

    def counts(self, batch: PackedBatch) -> dict[str, int]:
        return {"tokens": batch.target_count, "images": int(batch.side["images"].sum())}

    def losses(
        self, networks: Mapping[str, nn.Module], batch: PackedBatch, phase: str = "train"
    ) -> LossOutput:
        found = super().losses(networks, batch, phase)
        images = batch.side["images"].sum() * found.terms["cross_entropy"].total
        return LossOutput({**found.terms, "image": LossTerm(images, "images")})


def digest(engine: Any) -> dict[str, str]:
    """Of the tower's weights and moments, and of the tables'."""
    return {
        s.name: hashlib.sha256(s.tensor.contiguous().numpy().tobytes()).hexdigest()
        for s in engine.state_shards()
        if "blocks.1." in s.name or "ngrams" in s.name
    }


def train_on_rank(topology: Topology, name: str, settings: dict[str, Any]) -> list[Any]:
    """Of each step: whether everything of the tower, and anything of the rest, changed, and the tower's step count."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contract, "build_task", NeedyTask)
        engine = contract.build(topology, name, settings)
    found = []
    for step, having in enumerate(IMAGES):
        batch = contract.make_batch([step * topology.world_size + topology.rank])
        mine = int(topology.rank < having)
        batch.side["images"] = torch.full((1,), mine)
        counts = topology.sum_integers(list(engine.task.counts(batch).values()))
        before, weights = digest(engine), whole(engine)
        named = dict(zip(("tokens", "images"), counts, strict=True))
        engine.forward_backward("train", [batch], named)
        engine.step("train", 1e-2)
        changed = [before[n] != now for n, now in digest(engine).items()]
        updates = engine.scalar_state()["updates"]["train"]
        found.append([any(changed), whole(engine) != weights, updates["tower"], updates["rest"]])
    return found


def whole(engine: Any) -> list[float]:
    return [
        float(s.tensor.double().abs().sum())
        for s in engine.state_shards()
        if s.name.startswith("parameters/") and "blocks.0." in s.name
    ]


@pytest.mark.parametrize(
    ("engine", "settings", "ranks"),
    [
        ("torch", {"strategy": "single"}, 1),
        ("torch", {"strategy": "ddp"}, 2),
        ("torch", {"strategy": "fsdp"}, 2),
        ("deepspeed", {"deepspeed": {"zero_stage": 2, "offload_optimizer": "cpu"}}, 1),
        ("deepspeed", {"deepspeed": {"zero_stage": 3}}, 2),
    ],
    ids=lambda value: str(value),
)
def test_it_stays_as_it_is(engine: str, settings: dict[str, Any], ranks: int) -> None:
    arguments = (engine, settings)
    if engine == "torch" and ranks == 1:
        results = [train_on_rank(Topology(), *arguments)]
    else:
        results = run_ranks(ranks, "test_left_out_groups:train_on_rank", *arguments)
    for found in results:
        assert found == [
            [True, True, 1, 1],
            [False, True, 1, 2],
            [True, True, 2, 3],
            [True, True, 3, 4],
        ]
