"""Attention in both directions inside segments."""

from __future__ import annotations

import pytest
import torch
from weft.kernels import Segments, segment_attention, segment_attention_problem

RUNS = ((3, 4), (0, 9), (2, 16), (1, 1))


def inputs(total: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(total, 2, 8, generator=generator, requires_grad=True) for _ in "qkv"]


def test_segments_of_runs() -> None:
    segments = Segments(RUNS)
    assert (segments.count, segments.total, segments.longest) == (6, 45, 16)
    assert segments.cu_seqlens.tolist() == [0, 4, 8, 12, 28, 44, 45]
    assert segments.ids.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 16 + [4] * 16 + [5]
    for runs in ((), ((0, 4),), ((2, 0),)):
        with pytest.raises(ValueError, match="hold no segment"):
            Segments(runs)


def test_runs_give_what_the_mask_gives_with_gradients() -> None:
    segments = Segments(RUNS)
    results = []
    for backend in ("runs", "mask"):
        qkv = inputs(segments.total)
        out = segment_attention(*qkv, segments, backend)
        out.square().sum().backward()
        results.append([out, *(x.grad for x in qkv)])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    qkv = [x.detach() for x in inputs(segments.total)]
    blocks = segment_attention(*qkv, segments, "flex")
    torch.testing.assert_close(blocks, results[1][0], rtol=1e-5, atol=1e-5)


def test_values_of_segments_are_broadcast_or_gathered_alike() -> None:
    few, many = Segments(RUNS), Segments([(1, length) for length in (4, 4, 4, 16, 16, 1, 1, 1, 1)])
    assert few.has_few_runs
    assert not many.has_few_runs
    for segments in (few, many):
        x = torch.randn(segments.total, 3, dtype=torch.float64)
        value = torch.randn(segments.count, 3, dtype=torch.float64, requires_grad=True)
        found = segments.apply(lambda a, b, c: a + b * c, (x, 2 * x), (value,))
        wanted = x + 2 * x * value[segments.ids]
        torch.testing.assert_close(found, wanted)
        weights = torch.randn_like(wanted)
        grads = [torch.autograd.grad((y * weights).sum(), value)[0] for y in (found, wanted)]
        torch.testing.assert_close(grads[0], grads[1])


def test_what_cannot_run_is_one_line() -> None:
    segments = Segments(RUNS)
    with pytest.raises(ValueError, match="q has 44 positions but the segments have 45"):
        segment_attention(*inputs(44), segments)
    with pytest.raises(ValueError, match="unknown attention backend 'fast'; known: auto, runs"):
        segment_attention(*inputs(45), segments, "fast")
    with pytest.raises(ValueError, match="flex has no gradient on the CPU"):
        segment_attention(*inputs(45), segments, "flex")
    assert "needs CUDA" in str(
        segment_attention_problem("varlen", torch.device("cpu"), torch.bfloat16, False)
    )
    assert segment_attention_problem("auto", torch.device("cpu"), torch.float32, True) is None
