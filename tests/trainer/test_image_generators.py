"""Image generators under what engines put around them: several ranks, autocast, compilation, recomputation, FSDP2."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from image_batches import code_batch, latent_batch
from ranks import run_ranks
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from weft.models import build_model, build_task
from weft.models.batch import PackedBatch
from weft.models.dit.config import Config as DiTConfig
from weft.models.dit.config import RatioConfig
from weft.models.image_ar.config import Config as ImageARConfig
from weft.trainer.distributed import Topology
from weft.trainer.engines.build import build_engine
from weft.trainer.engines.config import ParallelConfig, PrecisionConfig
from weft.trainer.optimization.config import OptimizerConfig

RATIOS = tuple(RatioConfig(ratio=r, mean=(0.2,), std=(1.5,)) for r in (8, 16, 32))
MODELS: dict[str, Any] = {
    "image_ar": ImageARConfig(
        codebook_size=20, classes=4, grid=2, n_layers=2, d_model=16, n_heads=2, d_ff=24, dropout=0.0
    ),
    "dit": DiTConfig(
        channels=2,
        patch=1,
        image_size=32,
        classes=4,
        n_layers=2,
        d_model=16,
        n_heads=2,
        ratios=RATIOS,
    ),
}
# Of each image of a step, in order: the ranks of a step see other ratios, and the second of two never the first.
MIX = (8, 16, 8, 16, 32, 32, 16, 32)
ROWS = len(MIX)


def make_batch(family: str, samples: list[int]) -> PackedBatch:
    """Images that depend on their sample alone, with what is drawn for them."""
    labels = torch.tensor([sample % 4 for sample in samples])
    generators = [torch.Generator().manual_seed(sample) for sample in samples]
    task = build_task(MODELS[family])
    if family == "image_ar":
        codes = torch.stack([torch.randint(20, (4,), generator=g) for g in generators])
        batch = code_batch(codes, labels, first=samples[0])
        return task.draw(batch, 0)
    moments: dict[int, list[Tensor]] = {}
    places: dict[int, list[int]] = {}
    for row, (sample, generator) in enumerate(zip(samples, generators, strict=True)):
        ratio = MIX[sample % ROWS]
        shape = (4, 32 // ratio, 32 // ratio)
        moments.setdefault(ratio, []).append(torch.randn(shape, generator=generator))
        places.setdefault(ratio, []).append(row)
    stacked = {ratio: torch.stack(images) for ratio, images in moments.items()}
    return task.draw(latent_batch(stacked, places, labels, first=samples[0]), 0)


def lively(model: nn.Module) -> nn.Module:
    """Weights that leave no part of the model without effect."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.normal_(0.1, 0.2, generator=generator)
    return model


def gradients(family: str, model: nn.Module, samples: list[int]) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    terms = build_task(MODELS[family]).losses({"model": model}, make_batch(family, samples)).terms
    loss = torch.stack([term.total for term in terms.values()]).sum()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(family: str, ours: nn.Module, theirs: nn.Module) -> None:
    for samples in ([0, 1, 2, 3, 4], [4, 5, 6, 7]):
        (loss, grads), (wanted, expected) = (gradients(family, m, samples) for m in (ours, theirs))
        assert loss == pytest.approx(wanted, rel=1e-5)
        torch.testing.assert_close(grads, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", MODELS)
def test_compiled_blocks_are_whole_graphs(family: str) -> None:
    graphs = []

    def count_and_run(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = lively(build_model(MODELS[family]))
    for block in model.blocks:
        block.compile(fullgraph=True, backend=count_and_run)
    assert_same(family, model, lively(build_model(MODELS[family])))
    # One for each mix, and perhaps one for any number of positions; blocks share them.
    assert len(graphs) <= 3


@pytest.mark.parametrize("family", MODELS)
def test_recomputed_blocks_give_the_same_gradients(family: str) -> None:
    model = lively(build_model(MODELS[family]))
    for block in model.blocks:
        plain = block.forward
        block.forward = lambda *a, plain=plain: checkpoint(plain, *a, use_reentrant=False)
    assert_same(family, model, lively(build_model(MODELS[family])))


@pytest.mark.parametrize("family", MODELS)
def test_bf16_autocast_stays_close_with_fp32_losses(family: str) -> None:
    model = lively(build_model(MODELS[family]))
    task, batch = build_task(MODELS[family]), make_batch(family, [0, 1, 2, 3, 4])
    exact = task.losses({"model": model}, batch).terms
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = task.losses({"model": model}, batch).terms
    for name, term in rough.items():
        assert term.total.dtype == torch.float32
        assert term.total.item() == pytest.approx(exact[name].total.item(), rel=3e-2)
        assert term.total.item() != exact[name].total.item()


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_fsdp2_gathers_in_every_forward(family: str, dtype: torch.dtype | None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    plain, model = (lively(build_model(MODELS[family])) for _ in range(2))
    mesh = init_device_mesh("cpu", (1,))
    policy = MixedPrecisionPolicy(param_dtype=dtype)
    for block in [*model.blocks, model]:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    (loss, _), (wanted, _) = (gradients(family, m, [0, 1, 2, 3, 4]) for m in (model, plain))
    assert loss == pytest.approx(wanted, rel=1e-5 if dtype is None else 3e-2)


def train_on_rank(topology: Topology, family: str, settings: dict[str, Any]) -> list[Any]:
    """Gradient norm of each step, and the squares of this rank's weights after them, summed."""
    config: Any = SimpleNamespace(
        batch_rows=ROWS,
        train=SimpleNamespace(micro_batch_tokens=2),
        data=SimpleNamespace(sequence_length=1),
        parallel=ParallelConfig(**settings),
        precision=PrecisionConfig(compute="fp32"),
        optimizer=OptimizerConfig(lr=1e-2, eps=1e-6),
        run=SimpleNamespace(seed=7),
    )
    engine = build_engine(build_task(MODELS[family]), config, topology)
    share, found = ROWS // topology.world_size, []
    for step in range(3):
        mine = [step * ROWS + topology.rank * share + i for i in range(share)]
        batches = [make_batch(family, mine[i : i + 2]) for i in range(0, share, 2)]
        counts = [engine.task.counts(batch) for batch in batches]
        names = sorted(counts[0])
        own = [sum(count[name] for count in counts) for name in names]
        every = dict(zip(names, topology.sum_integers(own), strict=True))
        engine.forward_backward("train", batches, every)
        found.append(float(engine.step("train", 1e-2).grad_norm))
    sums = {}
    for shard in engine.state_shards():
        if shard.name.startswith("parameters/"):
            total = float(shard.tensor.double().square().sum())
            sums[shard.name] = sums.get(shard.name, 0.0) + total
    return [found, sums]


@pytest.mark.parametrize(
    ("family", "strategy"), [("image_ar", "fsdp"), ("dit", "ddp"), ("dit", "fsdp")]
)
def test_two_ranks_with_other_mixes_train_as_one(family: str, strategy: str) -> None:
    alone, weights = train_on_rank(Topology(), family, {"strategy": "single"})
    arguments = (family, {"strategy": strategy})
    ranks = run_ranks(2, "test_image_generators:train_on_rank", *arguments)
    for found, _ in ranks:
        assert found == pytest.approx(alone, rel=1e-4)
    if strategy == "ddp":
        assert ranks[0][1] == ranks[1][1]
    together = ranks[0][1] if strategy == "ddp" else add(ranks[0][1], ranks[1][1])
    assert together.keys() == weights.keys()
    for name, total in together.items():
        assert total == pytest.approx(weights[name], rel=1e-4, abs=1e-7), name


def add(first: dict[str, float], second: dict[str, float]) -> dict[str, float]:
    return {n: first.get(n, 0) + second.get(n, 0) for n in first | second}
