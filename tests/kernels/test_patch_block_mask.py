"""Block masks between bytes and patches, against create_block_mask and the tables; FlexAttention under them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_close
from patching import DIRECTIONS, AttentionCase, ints, random_patches, rows
from torch import Tensor
from weft.kernels.entropy_patching import (
    decoder_block_mask,
    encoder_block_mask,
    flex_patch_attention,
    patch_block_mask,
)


def blocks_of(mask: Any) -> tuple[Tensor, Tensor]:
    """(rows, columns) bool of the partial and of the full blocks."""
    rows, columns = mask.to_dense().shape[-2:]
    found = []
    for count, order in (
        (mask.kv_num_blocks, mask.kv_indices),
        (mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        dense = torch.zeros(rows, columns, dtype=torch.bool)
        for row in range(rows):
            dense[row, order[0, 0, row, : count[0, 0, row]].long()] = True
        found.append(dense)
    return found[0], found[1]


@pytest.mark.parametrize(
    "options", [{}, {"threshold": 0.995}, {"threshold": 9.0, "documents": 2}, {"max_patches": 9}]
)
@pytest.mark.parametrize("total", [1, 128, 700])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_block_masks_equal_those_of_create_block_mask(
    direction: str, total: int, options: dict[str, Any]
) -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    case = AttentionCase(direction, total, 1, 1, 2, torch.float32, **options)
    found = case.block_mask()
    queries, keys = len(case.tensors[0]), len(case.tensors[1])
    expected = create_block_mask(found.mask_mod, None, None, queries, keys, device="cpu")
    for one, other in zip(blocks_of(found), blocks_of(expected), strict=True):
        assert torch.equal(one, other)
    # The rule itself, from the tables.
    dense = torch.zeros(queries, keys, dtype=torch.bool)
    for seeing, seen in case.pairs():
        dense[seeing[:, None], seen] = True
    every = (torch.arange(queries)[:, None], torch.arange(keys))
    assert torch.equal(found.mask_mod(None, None, *every), dense)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_block_masks_of_any_intervals(data: st.DataObject) -> None:
    """Intervals in no order, empty ones and gaps included; full blocks come up with small blocks only."""
    from torch.nn.attention.flex_attention import create_block_mask

    keys = data.draw(st.integers(1, 40))
    wide = st.tuples(st.sampled_from([0, keys // 4]), st.sampled_from([keys, keys - keys // 4]))
    anything = st.tuples(st.integers(0, keys), st.integers(0, keys))
    bounds = data.draw(st.sampled_from([wide, wide | anything, anything]))
    intervals = data.draw(st.lists(bounds, min_size=1, max_size=20))
    first, end = (torch.tensor(side).int() for side in zip(*intervals, strict=True))
    found = patch_block_mask(first, end, keys, block=4)
    expected = create_block_mask(
        found.mask_mod, None, None, len(first), keys, device="cpu", BLOCK_SIZE=4
    )
    for one, other in zip(blocks_of(found), blocks_of(expected), strict=True):
        assert torch.equal(one, other)


def test_full_blocks_are_those_that_all_queries_see_whole() -> None:
    first = torch.tensor([0, 0, 0, 0, 4, 4, 3, 4, 0])
    end = torch.tensor([8, 8, 9, 8, 12, 12, 12, 11, 12])
    partial, full = blocks_of(patch_block_mask(first, end, 12, block=4))
    assert full.tolist() == [[True, True, False], [False, True, False], [False, False, False]]
    assert partial.tolist() == [[False, False, True], [True, False, True], [True, True, True]]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_flex_attention_under_the_block_mask(direction: str) -> None:
    case = AttentionCase(direction, 300, 2, 16, 2, torch.float32, documents=4)
    found = flex_patch_attention(*case.tensors, case.block_mask())
    assert_close(found, case.expected(*(x.double() for x in case.tensors)), 1e-5)


def test_building_a_block_mask_never_waits_for_values() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    patches = random_patches(600)
    with FakeTensorMode() as mode:
        starts, lengths, ids = (
            mode.from_tensor(x) for x in (patches.starts, patches.lengths, patches.decoder_ids)
        )
        encoder_block_mask(starts, lengths, 2, 600)
        decoder_block_mask(ids, 2, 603)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: patch_block_mask(ints(0), ints(1, 2), 3), r"end has shape \(2,\), expected \(1\)"),
        (
            lambda: patch_block_mask(ints(0).float(), ints(1), 3),
            "first is float32, expected int32, int64",
        ),
        (lambda: patch_block_mask(ints(), ints(), 3), "first has 0 queries and keys is 3"),
        (lambda: patch_block_mask(ints(0), ints(0), 0), "first has 1 queries and keys is 0"),
        (
            lambda: patch_block_mask(ints(0), ints(0).to("meta"), 3),
            "end is on meta and first on cpu",
        ),
        (
            lambda: flex_patch_attention(
                rows(2), rows(3), rows(3), patch_block_mask(ints(0), ints(3), 3)
            ),
            r"q has shape \(2, 2, 3\), expected \(1, \*, \*\)",
        ),
        (
            lambda: flex_patch_attention(
                rows(1, requires_grad=True), rows(3), rows(3), patch_block_mask(ints(0), ints(3), 3)
            ),
            "q is on cpu, where FlexAttention has no gradient; use patch_encoder_attention or",
        ),
    ],
)
def test_argument_errors(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
