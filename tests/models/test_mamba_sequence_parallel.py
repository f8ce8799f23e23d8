"""Rows cut over ranks against whole rows: logits and all gradients, at every kind of cut."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from mamba_oracle import THREE, build, mixed
from packing import packed
from ranks import run_ranks
from torch import Tensor
from weft.models.batch import LATENTS, TARGET_MODALITY, PackedBatch
from weft.models.errors import ConfigError
from weft.models.mamba.model import Mamba
from weft.models.mamba.sequence_parallel import SequenceGroup, cut_batch, even_lengths
from weft.trainer.distributed import Topology

LENGTH = 16
DOCUMENTS = [1, 2, 3, 10, 16]
KINDS = [0, 1, 1, 0, 2, 0, 1, 2] * 4


class Threads:
    """A group whose ranks are threads; autograd runs a CPU's backward on the thread that asks for it."""

    def __init__(self, ranks: int) -> None:
        self.barrier = threading.Barrier(ranks, timeout=30)
        self.parts: list[Any] = [None] * ranks

    def gather(self, place: int, tensor: Tensor) -> Tensor:
        self.parts[place] = tensor.detach().clone()
        self.barrier.wait()
        stacked = torch.stack(self.parts)
        self.barrier.wait()
        return stacked


class ThreadGroup(SequenceGroup):
    def __init__(self, lengths: tuple[int, ...], place: int, threads: Threads) -> None:
        self.lengths, self.place, self.threads = lengths, place, threads

    def gather(self, tensor: Tensor) -> Tensor:
        return self.threads.gather(self.place, tensor)


def example(names: tuple[str, ...]) -> tuple[Mamba, PackedBatch]:
    torch.manual_seed(0)
    model = build(modalities=names, blocks_per_layer=2, n_layers=1)
    with torch.no_grad():
        # Long memories, so that what passes a border matters.
        for block in model.backbone.blocks:
            block.ssm.A_log.sub_(2.0)
    batch = mixed(DOCUMENTS, [k % len(names) for k in KINDS], LENGTH, names)
    return model, batch


def run(model: Mamba, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradients of a loss that weighs every one of them."""
    logits = model(batch, output="logits")
    weights = torch.cos(torch.arange(logits.shape[1]) + batch.tokens[:, None].double())
    (logits.double() * weights).sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


def run_cut(model: Mamba, batch: PackedBatch, group: SequenceGroup) -> Any:
    model.backbone.sequence_group = group
    return run(model, cut_batch(batch, group.lengths, group.place, model.config.modalities))


def joined(parts: list[Tensor], lengths: tuple[int, ...]) -> Tensor:
    rows = [part.unflatten(0, (2, length)) for part, length in zip(parts, lengths, strict=True)]
    return torch.cat(rows, 1).flatten(0, 1)


CUTS = [
    *((cut, LENGTH - cut) for cut in range(LENGTH + 1)),
    (1, 1, 1, 13),
    (2, 1, 2, 11),
    (7, 1, 1, 7),
    (3, 0, 0, 13),
    (4, 4, 4, 4),
    (1,) * LENGTH,
]


@pytest.mark.parametrize("lengths", CUTS, ids=str)
def test_any_cut_gives_the_whole(lengths: tuple[int, ...]) -> None:
    """Cuts right at, and one to three positions behind, the starts of documents; shards of fewer positions than taps."""
    names = THREE if len(lengths) == 4 else ("text",)
    model, batch = example(names)
    if names == ("text",):
        batch = replace(batch, modality=None)
    models = [copy.deepcopy(model) for _ in lengths]
    expected, gradients = run(model, batch)
    threads, found = Threads(len(lengths)), {}

    def work(place: int) -> None:
        found[place] = run_cut(models[place], batch, ThreadGroup(lengths, place, threads))

    workers = [threading.Thread(target=work, args=(place,)) for place in range(len(lengths))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    logits = joined([found[place][0] for place in range(len(lengths))], lengths)
    torch.testing.assert_close(logits, expected)
    for name, gradient in gradients.items():
        total = sum(found[place][1][name] for place in range(len(lengths)))
        torch.testing.assert_close(total, gradient, msg=lambda m, name=name: f"{name}: {m}")


def on_ranks(topology: Topology) -> list[float]:
    """Largest distances of logits and gradients from the whole rows', on 4 ranks and on 2 groups of 2."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    found = []
    for group, lengths in [
        (None, (5, 1, 1, 9)),
        (None, even_lengths(LENGTH, 4)),
        (pairs[topology.rank // 2], (4, 12)),
    ]:
        model, batch = example(THREE)
        expected, gradients = run(copy.deepcopy(model), batch)
        shards = SequenceGroup(lengths, group)
        logits, mine = run_cut(model, batch, shards)
        start = sum(lengths[: shards.place])
        own = expected.unflatten(0, (-1, LENGTH))[:, start : start + lengths[shards.place]]
        found.append(float((logits - own.flatten(0, 1)).abs().max()))
        for name, gradient in gradients.items():
            total = mine[name].clone()
            dist.all_reduce(total, group=group)
            scale = gradient.abs().max().clamp(min=1.0)
            found.append(float((total - gradient).abs().max() / scale))
    return found


def test_gloo_ranks_two_and_four() -> None:
    for found in run_ranks(4, "test_mamba_sequence_parallel:on_ranks"):
        assert max(found) < 1e-5


def test_a_nan_stays_in_its_document_across_ranks() -> None:
    model, batch = example(("text",))
    batch = replace(batch, modality=None, tokens=batch.tokens % 40)
    broken = batch.tokens.clone()
    broken[6] = 49
    with torch.no_grad():
        model.embedding.tokens.weight[49] = float("nan")
    batch = replace(batch, tokens=broken)
    lengths, found = (7, 9), {}
    threads, models = Threads(2), [copy.deepcopy(model) for _ in range(2)]

    def work(place: int) -> None:
        group = ThreadGroup(lengths, place, threads)
        models[place].backbone.sequence_group = group
        with torch.no_grad():
            part = cut_batch(batch, lengths, place, ("text",))
            found[place] = models[place](part, output="logits")

    workers = [threading.Thread(target=work, args=(place,)) for place in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    whole = joined([found[0], found[1]], lengths)
    # Position 6 begins the row's fourth document, which goes on to its end, and is the last of the first rank.
    assert whole[:6].isfinite().all()
    assert whole[6:16].isnan().all()
    assert whole[16:].isfinite().all()


def test_a_cut_batch_counts_its_own_positions() -> None:
    _, batch = example(THREE)
    kinds = torch.zeros_like(batch.modality)
    kinds[3] = 1
    batch = replace(batch, side={TARGET_MODALITY: kinds})
    parts = [cut_batch(batch, (5, 11), place, THREE) for place in range(2)]
    assert joined([p.tokens for p in parts], (5, 11)).tolist() == batch.tokens.tolist()
    assert sum(part.target_count for part in parts) == batch.target_count
    for name, count in batch.host_counts.items():
        assert sum(part.host_counts[name] for part in parts) == count
    assert [part.host_counts["image_targets"] for part in parts] == [1, 0]
    assert parts[1].cu_seqlens.tolist() == [0, 1, 11, 22]
    assert even_lengths(10, 4) == (3, 3, 2, 2)
    continuous = replace(batch, side={LATENTS: torch.zeros(1, 2, 4, 4)})
    with pytest.raises(ConfigError, match="continuous images cannot be cut"):
        cut_batch(continuous, (5, 11), 0, THREE)


def test_a_group_knows_its_size() -> None:
    whole = packed(torch.zeros(4, dtype=torch.int64), [4], 4)
    part = cut_batch(whole, (1, 3), 1, ("text",))
    assert (part.row_length, part.max_seqlen, part.position_ids.tolist()) == (3, 3, [1, 2, 3])
