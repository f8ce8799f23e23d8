"""The transformer under what engines put around it: autocast, compilation, recomputation, FSDP2."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from packing import packed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from weft.models import build_model
from weft.models.batch import PackedBatch
from weft.models.transformer.cache import KVCache
from weft.models.transformer.config import Config, NgramConfig

CONFIG = Config(
    vocab_size=64,
    n_layers=2,
    d_model=32,
    n_heads=4,
    n_kv_heads=2,
    d_ff=48,
    init_std=0.1,
    ngram=NgramConfig(sizes=(2, 3), rows=97),
)
BORDERS = [[20, 12, 32], [32, 5, 27], [32, 32], [7, 9, 16, 30, 2]]


def make_batch(lengths: list[int]) -> PackedBatch:
    return packed(torch.arange(64) * 7 % 64, lengths, 32)


def gradients(model: nn.Module, lengths: list[int]) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    sums = model(make_batch(lengths))
    loss = sums["cross_entropy"] + 0.1 * sums["z_loss"]
    loss.backward()
    return loss.item(), {n: p.grad.to_dense().clone() for n, p in model.named_parameters()}


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    for lengths in BORDERS:
        loss, grads = gradients(ours, lengths)
        expected_loss, expected = gradients(theirs, lengths)
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        torch.testing.assert_close(grads, expected, atol=2e-5, rtol=1e-4)


def test_compiled_blocks_are_whole_graphs_and_share_them() -> None:
    graphs = []

    def count_and_run(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    model = build_model(CONFIG)
    for block in model.blocks:
        block.compile(fullgraph=True, backend=count_and_run)
    assert_same(model, build_model(CONFIG))
    # One for rows with borders inside, its form for any number of documents, one for rows without
    # borders.
    assert len(graphs) <= 3


def test_recomputed_blocks_give_the_same_gradients() -> None:
    model = build_model(CONFIG)
    for block in model.blocks:
        plain = block.forward
        block.forward = lambda *a, plain=plain: checkpoint(plain, *a, use_reentrant=False)
    assert_same(model, build_model(CONFIG))


def test_bf16_autocast_stays_close_with_fp32_losses() -> None:
    model = build_model(CONFIG)
    exact = model(make_batch(BORDERS[0]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(make_batch(BORDERS[0]))
        logits = model(make_batch(BORDERS[0]), output="logits")
    assert logits.dtype == rough["cross_entropy"].dtype == rough["z_loss"].dtype == torch.float32
    for term, value in rough.items():
        assert value.item() == pytest.approx(exact[term].item(), rel=1e-2)
        assert value.item() != exact[term].item()
    rough["cross_entropy"].backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_fsdp2_gathers_in_every_forward_and_leaves_angles_alone(dtype: torch.dtype | None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    plain, model = build_model(CONFIG), build_model(CONFIG)
    options = {
        "mesh": init_device_mesh("cpu", (1,)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype),
        "reshard_after_forward": True,
    }
    for block in model.blocks:
        fully_shard(block, **options)
    fully_shard(model, ignored_params={model.embedding.ngrams.weight}, **options)
    seen = []
    for block in model.blocks:
        block.attention.register_forward_pre_hook(lambda _, a: seen.append((a[0].dtype, *a[1:])))
    sums, expected = model(make_batch(BORDERS[0])), plain(make_batch(BORDERS[0]))
    for term, value in sums.items():
        rel = 1e-6 if dtype is None else 1e-2
        assert value.item() == pytest.approx(expected[term].item(), rel=rel)
    assert [x for x, *_ in seen] == [dtype or torch.float32] * 2
    assert all(rotary.cos.dtype == torch.float32 for _, rotary, _ in seen)
    assert seen[0][2] is seen[1][2], "layers must share one layout, and with it its masks"
    sums["cross_entropy"].backward()
    assert model.embedding.ngrams.weight.grad.is_sparse
    with torch.no_grad():
        tokens = torch.randint(0, 64, (2, 5))
        ours, theirs = (
            m.forward_cached(tokens, None, KVCache(CONFIG, 2, 5)) for m in (model, plain)
        )
    torch.testing.assert_close(ours, theirs, atol=1e-5 if dtype is None else 5e-2, rtol=1e-2)
