"""Packed attention against a loop over documents in float64, for every backend the machine has."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from weft.kernels import PackedLayout, packed_attention
from weft.kernels.packed_attention import _attend_documents, attend_rows

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def make_layout(lengths: list[int], row_length: int, window: int | None = None) -> PackedLayout:
    borders = torch.tensor([0, *lengths]).cumsum(0).int()
    positions = torch.cat([torch.arange(n) for n in lengths])
    return PackedLayout(borders, positions, max(lengths), row_length, window)


def oracle(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], window: int | None = None
) -> Tensor:
    """Softmax written out, one document and one head at a time."""
    out, start, groups = torch.empty_like(q), 0, q.shape[1] // k.shape[1]
    for length in lengths:
        part = slice(start, start + length)
        for head in range(q.shape[1]):
            scores = q[part, head] @ k[part, head // groups].T / math.sqrt(q.shape[2])
            visible = torch.ones(length, length).tril() == 1
            if window is not None:
                visible &= torch.ones(length, length).triu(1 - window) == 1
            weights = torch.where(visible, scores.exp(), 0.0)
            out[part, head] = weights / weights.sum(1, keepdim=True) @ v[part, head // groups]
        start += length
    return out


def random_heads(
    total: int, heads: int = 4, kv_heads: int = 2, needs_gradient: bool = True
) -> list[Tensor]:
    return [
        torch.randn(total, n, 8, dtype=torch.float64, requires_grad=needs_gradient)
        for n in (heads, kv_heads, kv_heads)
    ]


LAYOUTS = {
    "whole rows": ([64, 64, 64], 64),
    "borders inside": ([64, 40, 24, 1, 63], 64),
    "many short": ([1, 2, 3] * 32, 48),
    "no rows": ([100, 31, 30], 64),
    "blocks of flex": ([300, 84, 128, 256], 384),
}


@pytest.mark.parametrize("backend", ["sdpa", "flex", "auto"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_documents_alone(backend: str, name: str) -> None:
    lengths, row_length = LAYOUTS[name]
    q, k, v = random_heads(sum(lengths), needs_gradient=backend != "flex")
    out = packed_attention(q, k, v, make_layout(lengths, row_length), backend)
    torch.testing.assert_close(out, oracle(q, k, v, lengths), rtol=1e-9, atol=1e-9)
    if backend == "flex":
        return  # torch has no gradient of it on the CPU
    seed = torch.randn_like(out)
    ours = torch.autograd.grad(out, (q, k, v), seed)
    theirs = torch.autograd.grad(oracle(q, k, v, lengths), (q, k, v), seed)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


def test_row_mask_and_document_calls_agree() -> None:
    lengths, row_length = LAYOUTS["borders inside"]
    q, k, v = random_heads(sum(lengths), 2, 2)
    layout = make_layout(lengths, row_length)
    masked = attend_rows(q, k, v, row_length, layout.row_mask)
    called = _attend_documents(q, k, v, layout.runs)
    torch.testing.assert_close(masked, called, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(masked, oracle(q, k, v, lengths), rtol=1e-9, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=5), min_size=1, max_size=4))
def test_masks_show_exactly_the_past_of_the_document(rows: list[list[int]]) -> None:
    row_length = max(sum(row) for row in rows)
    lengths = [n for row in rows for n in [*row, row_length - sum(row)] if n]
    layout = make_layout(lengths, row_length)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    index = torch.arange(len(document))
    visible = (document[:, None] == document) & (index[:, None] >= index)
    shown = torch.block_diag(*layout.row_mask[:, 0].int()).bool()
    assert torch.equal(shown, visible)
    blocks = layout.block_mask
    dense = blocks.to_dense()[0, 0].bool()
    padded = torch.zeros(dense.shape[0] * 128, dense.shape[0] * 128, dtype=torch.bool)
    padded[: len(document), : len(document)] = visible
    tiles = padded.unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
    assert torch.equal(dense, tiles.any(3).any(1))
    full = torch.zeros_like(dense)
    for i, count in enumerate(blocks.full_kv_num_blocks[0, 0]):
        full[i, blocks.full_kv_indices[0, 0, i, :count].long()] = True
    assert torch.equal(full, tiles.all(3).all(1))
    assert sum(n * count for n, count in layout.runs) == len(document)


@pytest.mark.parametrize("is_masked", [False, True])
def test_no_gradient_crosses_a_border_or_comes_from_the_future(is_masked: bool) -> None:
    lengths = [30, 34, 64]
    q, k, v = random_heads(128, 4, 4)
    layout = make_layout(lengths, 64)
    if is_masked:
        out = attend_rows(q, k, v, 64, layout.row_mask)
    else:
        out = packed_attention(q, k, v, layout)
    for gradient in torch.autograd.grad(out[40].square().sum(), (q, k, v)):
        reached = gradient.abs().sum((1, 2)) > 0
        assert not reached[:30].any()
        assert not reached[41:].any()
        assert reached[40]


def test_nan_of_one_document_stays_there_on_the_cpu() -> None:
    q, k, v = random_heads(256)
    with torch.no_grad():
        k[:100], v[:100] = float("nan"), float("nan")
    out = packed_attention(q, k, v, make_layout([100, 156], 256), "auto")
    assert out[:100].isnan().all()
    assert torch.isfinite(out[100:]).all()


def test_masks_are_built_once() -> None:
    layout = make_layout([3, 5], 8)
    assert layout.row_mask is layout.row_mask
    assert layout.block_mask is layout.block_mask
    assert layout.runs is layout.runs


def test_errors_name_what_is_wrong() -> None:
    q, k, v = random_heads(8)
    with pytest.raises(ValueError, match="unknown attention backend 'flash'; known: auto, sdpa"):
        packed_attention(q, k, v, make_layout([8], 8), "flash")
    with pytest.raises(ValueError, match="8 positions but the layout has 9"):
        packed_attention(q, k, v, make_layout([9], 9))
    with pytest.raises(ValueError, match="varlen needs CUDA and a 16-bit type"):
        packed_attention(q, k, v, make_layout([8], 8), "varlen")
    with pytest.raises(ValueError, match="flex has no gradient on the CPU"):
        packed_attention(q, k, v, make_layout([8], 8), "flex")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["sdpa", "flex", "varlen"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_backends_on_a_gpu(backend: str, name: str) -> None:
    lengths, row_length = LAYOUTS[name]
    exact = [torch.randn(sum(lengths), n, 64, dtype=torch.float64) for n in (4, 2, 2)]
    layout = make_layout(lengths, row_length)
    layout = PackedLayout(
        layout.cu_seqlens.cuda(), layout.position_ids.cuda(), layout.max_seqlen, row_length
    )
    q, k, v = (x.bfloat16().cuda().requires_grad_() for x in exact)
    out = packed_attention(q, k, v, layout, backend)
    rounded = [x.detach().double().cpu().requires_grad_() for x in (q, k, v)]
    expected = oracle(*rounded, lengths)
    torch.testing.assert_close(out.double().cpu(), expected, rtol=2e-2, atol=2e-2)
    seed = torch.randn_like(expected)
    ours = torch.autograd.grad(out, (q, k, v), seed.to(out))
    theirs = torch.autograd.grad(expected, rounded, seed)
    for got, wanted in zip(ours, theirs, strict=True):
        assert (got.double().cpu() - wanted).norm() < 2e-2 * wanted.norm()


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
@pytest.mark.parametrize("window", [1, 5, 32, 200])
@pytest.mark.parametrize("name", LAYOUTS)
def test_window_equals_documents_alone(backend: str, window: int, name: str) -> None:
    lengths, row_length = LAYOUTS[name]
    q, k, v = random_heads(sum(lengths), needs_gradient=backend != "flex")
    layout = make_layout(lengths, row_length, window)
    found, expected = packed_attention(q, k, v, layout, backend), oracle(q, k, v, lengths, window)
    torch.testing.assert_close(found, expected)
    if backend == "sdpa":
        seed = torch.randn_like(found)
        for one, other in zip(
            torch.autograd.grad(found, (q, k, v), seed),
            torch.autograd.grad(expected, (q, k, v), seed),
            strict=True,
        ):
            torch.testing.assert_close(one, other)


def test_window_as_long_as_a_row_is_none() -> None:
    assert make_layout([64], 64, 64).window is None
    assert make_layout([64], 64, 63).window == 63


def test_empty_documents_are_passed_over() -> None:
    borders = torch.tensor([0, 0, 40, 40, 60, 60]).int()
    positions = torch.cat([torch.arange(40), torch.arange(20)])
    layout = PackedLayout(borders, positions, 40, 60, longest=40)
    q, k, v = random_heads(60)
    torch.testing.assert_close(packed_attention(q, k, v, layout), oracle(q, k, v, [40, 20]))
