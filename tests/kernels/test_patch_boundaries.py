"""Patch boundaries: every rule against code that shares nothing with it, prefixes, documents, overflow."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import ALL_FACES, FAST_FACES, on_face, position_ids_of, random_documents
from patching import assert_same, moved, options_of, random_patches, to_cpu
from torch import Tensor
from weft.kernels.entropy_patching import PATCH_SCHEMES, Patches, check_patches, patch_boundaries

THRESHOLD = 1.335442066192627


def starts_of_document(
    length: int, options: dict[str, Any], first: int, forced: int = 2
) -> np.ndarray:
    """(length + 1,) bool: by masks over one whole document, the byte to come included, then cut by `max_length`."""
    scheme = options["scheme"]
    mask = np.zeros(length + 1, bool)
    here = slice(first, first + length)
    if "entropy" in options:
        H = options["entropy"].float().numpy()[here]
        high = np.greater(H, np.float32(options.get("threshold", -np.inf)))
        risen = np.concatenate([[False], np.diff(H) > np.float32(options.get("rise", -np.inf))])
        mask[1:] = {"entropy": high, "rise": risen, "both": high & risen}[scheme]
    elif scheme == "stride":
        mask[forced - 1 :: options["stride"]] = True
    else:
        ids = options["tokens"].numpy()[here]
        word = np.isin(ids - 4, [*b"0123456789", *range(65, 91), *range(97, 123), *range(128, 192)])
        closes = ~word & ~np.concatenate([[False], ~word[:-1]])
        mask[1:] = closes | (ids < 4)
    mask[:forced] = True
    limit = options.get("max_length")
    if limit:
        edges = [*np.flatnonzero(mask), length + 1]
        for start, end in pairwise(edges):
            mask[start:end:limit] = True
    return mask


def by_documents(
    borders: Tensor, max_patches: int, options: dict[str, Any], forced: int = 2
) -> Patches:
    """Patches of each document alone, laid end to end; only for what fits."""
    is_start, patch_ids, decoder_ids, starts = [], [], [], []
    for first, end in pairwise(borders.tolist()):
        mask = starts_of_document(end - first, options, first, forced)
        ids = np.cumsum(mask) - 1
        decoder = ids[1:] - 1
        decoder_ids.append(np.where(decoder < 0, -1, decoder + len(starts)))
        patch_ids.append(ids[:-1] + len(starts))
        is_start.append(mask[:-1])
        starts += (np.flatnonzero(mask[:-1]) + first).tolist()
    total = int(borders[-1])
    assert len(starts) <= max_patches
    padded = torch.full((max_patches,), total, dtype=torch.int32)
    padded[: len(starts)] = torch.tensor(starts, dtype=torch.int32)
    lengths = torch.cat([padded, torch.tensor([total], dtype=torch.int32)]).diff()

    def joined(parts: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts))

    return Patches(
        joined(is_start), joined(patch_ids).int(), joined(decoder_ids).int(), padded, lengths,
        torch.tensor(len(starts)).int(), torch.tensor(0).int(),
    )  # fmt: skip


@pytest.mark.parametrize("max_length", [None, 1, 5])
@pytest.mark.parametrize("forced", [1, 2, 3])
@pytest.mark.parametrize("scheme", PATCH_SCHEMES)
@pytest.mark.parametrize("face", ALL_FACES)
def test_every_rule_by_documents(
    face: str, scheme: str, forced: int, max_length: int | None
) -> None:
    for total, documents in ((1, 1), (2, 2), (97, 7)):
        borders = random_documents(total, documents)
        options = options_of(scheme, total, max_length=max_length)
        with on_face(face) as device:
            found = patch_boundaries(
                position_ids_of(borders, total).to(device), total + 2, forced_starts=forced,
                **moved(options, device),
            )  # fmt: skip
        assert_same(found, by_documents(borders, total + 2, options, forced))
        check_patches(found)


@pytest.mark.parametrize("total", [1023, 1024, 1025, 3000])
@pytest.mark.parametrize("face", FAST_FACES)
def test_blocks_that_depend_on_what_came_before(face: str, total: int) -> None:
    """Patches, documents and cuts that span blocks of the kernel."""
    for documents, threshold, limit in ((1, 1.999, 7), (3, 1.9, 1500), (40, 0.5, None)):
        borders = random_documents(total, documents)
        options = options_of("entropy", total, max_length=limit) | {"threshold": threshold}
        with on_face(face) as device:
            found = patch_boundaries(
                position_ids_of(borders, total).int().to(device), total, **moved(options, device)
            )
        assert_same(found, by_documents(borders, total, options))


def test_tens_of_thousands_of_positions() -> None:
    total = 50_000
    borders = random_documents(total, 300)
    for scheme in PATCH_SCHEMES:
        options = options_of(scheme, total, max_length=8)
        found = patch_boundaries(position_ids_of(borders, total), total, **options)
        assert_same(found, by_documents(borders, total, options))


@pytest.mark.parametrize("face", ALL_FACES)
def test_the_published_example(face: str) -> None:
    """22 bytes and the one to come, of lengths 1 1 3 2 5 4 7; a byte reads the patch before the one of its successor."""
    starts = torch.tensor([0, 1, 2, 5, 7, 12, 16])
    entropy = torch.zeros(22)
    entropy[starts[1:] - 1] = 2.0
    with on_face(face) as device:
        found = to_cpu(
            patch_boundaries(
                torch.arange(22, device=device), 9, entropy=entropy.to(device), threshold=THRESHOLD
            )
        )
    assert found.patch_ids.tolist() == [
        0,
        1,
        2,
        2,
        2,
        3,
        3,
        4,
        4,
        4,
        4,
        4,
        5,
        5,
        5,
        5,
        6,
        6,
        6,
        6,
        6,
        6,
    ]
    assert found.decoder_ids.tolist() == [
        0,
        1,
        1,
        1,
        2,
        2,
        3,
        3,
        3,
        3,
        3,
        4,
        4,
        4,
        4,
        5,
        5,
        5,
        5,
        5,
        5,
        5,
    ]
    assert found.starts.tolist() == [*starts.tolist(), 22, 22]
    assert found.lengths.tolist() == [1, 1, 3, 2, 5, 4, 6, 0, 0]
    assert found.count.item() == 7


@pytest.mark.parametrize("max_length", [None, 4])
def test_lengths_of_the_converted_release(max_length: int | None) -> None:
    """Against transformers' port of the released model, whose lengths include the byte to come."""
    blt = pytest.importorskip("transformers.models.blt.modeling_blt")
    total = 200
    entropy = 2 * torch.rand(total)
    lengths = blt.BltPatcher.patch_lengths_from_entropies(
        entropy[None], total + 1, threshold=THRESHOLD
    )
    starts = blt.process_patch_lengths(lengths, max_length)[0].cumsum(0)[:-1]
    expected = torch.zeros(total + 1, dtype=torch.bool)
    expected[0] = True
    expected[starts] = True
    found = patch_boundaries(
        torch.arange(total), total, entropy=entropy, threshold=THRESHOLD, max_length=max_length
    )
    assert torch.equal(found.is_start, expected[:-1])
    assert torch.equal(found.decoder_ids, (expected.cumsum(0)[1:] - 2).int())


@pytest.mark.parametrize("face", ALL_FACES)
def test_the_comparison_is_strict_and_in_fp32(face: str) -> None:
    at = torch.tensor(THRESHOLD, dtype=torch.float32)
    above = torch.nextafter(at, torch.tensor(9.0))
    entropy = torch.stack(
        [at, at, at, above, at, torch.tensor(float("nan")), at, torch.tensor(float("inf")), at]
    )
    with on_face(face) as device:
        found = patch_boundaries(
            torch.arange(9, device=device), 9, entropy=entropy.to(device), threshold=THRESHOLD
        )
        wide = patch_boundaries(
            torch.arange(9, device=device),
            9,
            entropy=entropy.double().to(device) + 1e-12,
            threshold=THRESHOLD,
        )
    assert found.is_start.tolist() == [True, True, False, False, True, False, False, False, True]
    assert torch.equal(found.is_start, wide.is_start)


@pytest.mark.parametrize("face", ALL_FACES)
def test_no_comparison_over_a_border(face: str) -> None:
    """A rise from the last byte of a document to the first of the next is none."""
    entropy = torch.tensor([1.0, 0.0, 0.0, 5.0, 5.0, 5.0])
    with on_face(face) as device:
        found = patch_boundaries(
            torch.tensor([0, 1, 2, 0, 1, 2], device=device), 6, "rise",
            entropy=entropy.to(device), rise=0.5, forced_starts=1,
        )  # fmt: skip
    assert found.is_start.tolist() == [True, False, False, True, False, False]
    assert found.decoder_ids.tolist() == [-1] * 6


def test_a_text_by_spaces() -> None:
    text = "It is, naïve 42!\nEnd"
    tokens = torch.tensor([1, *(byte + 4 for byte in text.encode()), 2, 1])
    found = patch_boundaries(torch.arange(len(tokens)), len(tokens), "space", tokens=tokens)
    pieces = tokens.tensor_split(found.starts[1 : int(found.count)].long())
    words = [
        bytes(i - 4 for i in piece.tolist() if i >= 4).decode(errors="replace") for piece in pieces
    ]
    # A lead byte closes a patch like a space, which cuts a character in two; the marker after a special id is a start.
    assert words == ["", "It ", "is,", " na\ufffd", "\ufffdve ", "42!", "\nEnd", ""]


@pytest.mark.parametrize("max_patches", [1, 2, 3, 6, 8])
@pytest.mark.parametrize("face", ALL_FACES)
def test_overflow_is_reported_and_never_leaks(face: str, max_patches: int) -> None:
    borders = torch.tensor([0, 5, 6, 12])
    options = {"scheme": "stride", "stride": 2}  # patches 0 1-2 3-4 | 5 | 6 7-8 9-10 11
    whole = by_documents(borders, 12, options)
    with on_face(face) as device:
        found = to_cpu(
            patch_boundaries(position_ids_of(borders, 12).to(device), max_patches, **options)  # type: ignore[arg-type]
        )
    assert found.count == min(8, max_patches)
    assert found.overflow == max(0, 8 - max_patches)
    if found.overflow:
        with pytest.raises(
            ValueError, match=f"max_patches is {max_patches} but the batch has 8 patches; raise"
        ):
            check_patches(found)
    else:
        check_patches(found)
    document = torch.tensor([0] * 5 + [1] + [2] * 6)
    for t in range(12):
        patch = int(found.patch_ids[t])
        first = int(whole.patch_ids[document == document[t]].min())
        assert patch == (
            max_patches if first >= max_patches else min(int(whole.patch_ids[t]), max_patches - 1)
        )
        read = int(found.decoder_ids[t])
        if read >= 0:
            # What is read lies in the same document, and is complete before the next byte.
            inside = found.patch_ids == read
            assert document[inside].eq(document[t]).all()
            assert inside.nonzero().max() <= t
    for patch in range(max_patches):
        inside = (found.patch_ids == patch).nonzero().flatten()
        assert found.lengths[patch] == len(inside)
        assert found.starts[patch] == (inside[0] if len(inside) else 12)
    assert torch.equal(found.is_start.nonzero().flatten().int(), found.starts[: int(found.count)])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_boundaries_of_a_prefix_never_change(data: st.DataObject) -> None:
    total = data.draw(st.integers(1, 40))
    scheme = data.draw(st.sampled_from(PATCH_SCHEMES))
    limit = data.draw(st.sampled_from([None, 1, 2, 5]))
    options = options_of(scheme, total, data.draw(st.integers(0, 99)), limit)
    options["forced_starts"] = data.draw(st.integers(1, 3))
    room = data.draw(st.sampled_from([2, 5, total + 1]))
    borders = random_documents(total, data.draw(st.integers(1, 6)), data.draw(st.integers(0, 99)))
    positions = position_ids_of(borders, total)
    whole = patch_boundaries(positions, room, **options)
    seen = data.draw(st.integers(1, total))
    part = patch_boundaries(
        positions[:seen],
        room,
        **{k: v[:seen] if isinstance(v, Tensor) else v for k, v in options.items()},
    )
    assert torch.equal(part.is_start, whole.is_start[:seen])
    assert torch.equal(part.patch_ids, whole.patch_ids[:seen])
    is_inside = seen == total or positions[seen] != 0
    # With room for it, what the last byte reads is known before the next byte; at an overflow it may be merged instead.
    upto = seen if is_inside and not whole.overflow else seen - 1
    assert torch.equal(part.decoder_ids[:upto], whole.decoder_ids[:upto])


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_faces_agree_and_patches_tile_the_documents(data: st.DataObject) -> None:
    total = data.draw(st.integers(1, 60))
    scheme = data.draw(st.sampled_from(PATCH_SCHEMES))
    limit = data.draw(st.sampled_from([None, 1, 3, 8]))
    options = options_of(scheme, total, data.draw(st.integers(0, 99)), limit)
    options["forced_starts"] = data.draw(st.integers(1, 3))
    room = data.draw(st.sampled_from([1, 3, total]))
    borders = random_documents(total, data.draw(st.integers(1, 9)), data.draw(st.integers(0, 99)))
    positions = position_ids_of(borders, total)
    with on_face("reference"):
        expected = patch_boundaries(positions, room, **options)
    with on_face("cpu"):
        assert_same(patch_boundaries(positions, room, **options), expected)
    count = int(expected.count)
    ends = expected.starts + expected.lengths
    assert (expected.lengths[:count] > 0).all()
    assert (expected.lengths[count:] == 0).all()
    assert torch.equal(ends[: count - 1], expected.starts[1:count])
    if not expected.overflow:
        assert ends[count - 1] == total
        assert torch.isin(borders[:-1], expected.starts).all()
        if limit:
            assert expected.lengths.max() <= limit


def test_random_patches_has_padding() -> None:
    """The other tests of this folder rely on it."""
    found = random_patches(50)
    assert found.count < 53
    assert (found.lengths == 0).any()
