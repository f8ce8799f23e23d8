"""Rows of whole documents against a slow packing, id by id."""

from __future__ import annotations

from itertools import groupby, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interleaved_samples import (
    IMAGE_POSITIONS,
    Item,
    Sample,
    make_sample,
    rows_by_hand,
    spelled_documents,
)
from weft.models.batch import IGNORED
from weft.models.errors import DataError
from weft.trainer.data.config import RepeatFilterConfig
from weft.trainer.data.document_order import RowOf
from weft.trainer.data.document_packing import DocumentAssembler
from weft.trainer.data.document_rows import DocumentRows, ShardArrays
from weft.trainer.data.vocabulary import ByteVocabulary

CODES = {"image": {"kind": "codes", "codec": None, "codes": 5}}
LATENTS = {"image": {"codec": None}}


def halves(piece: list[Item]) -> tuple[list[Item], list[Item]] | None:
    """Caption and image of a whole document that is one of each, in their order there."""
    inner = piece[1:-1]
    if (
        piece[0].id != 1
        or piece[-1].id != 2
        or sum(i.modality == 1 for i in inner) != IMAGE_POSITIONS
    ):
        return None
    first = next(k for k, item in enumerate(inner) if item.modality == 1) - 1
    unit = inner[first : first + IMAGE_POSITIONS + 2]
    before, after = inner[:first], inner[first + len(unit) :]
    if any(item.modality == 2 for item in inner) or bool(before) == bool(after):
        return None
    return (before, unit) if before else (after, unit)


def arrange(piece: list[Item], image_first: bool, drops: bool) -> list[Item]:
    found = halves(piece)
    if found is None:
        return piece
    caption, unit = found
    if drops and not image_first:
        caption = []
    return [piece[0], *(unit + caption if image_first else caption + unit), piece[-1]]


def check_batch(sample: Sample, batch, rows: list[list[list[Item]]], length: int) -> None:
    """Every tensor and count of a batch against the pieces of its rows."""
    vocabulary, is_codes = sample.vocabulary, sample.config.image.kind == "codes"
    tokens, targets, positions, starts, modality, target_modality, after, spans = (
        [] for _ in range(8)
    )
    images, firsts, keys = [], [], []
    captions = 0
    marks = {*vocabulary.special_ids, vocabulary.eos_id}
    for number, row in enumerate(rows):
        base, of_row = len(tokens), 0
        for piece in row:
            starts.append(len(tokens))
            seen = False
            for k, (item, following) in enumerate(pairwise(piece)):
                if k and piece[k - 1].modality == 1 and item.modality == 0:
                    seen = True
                if item.modality == 1 and piece[k - 1].modality == 0:
                    place = len(tokens)
                    spans.append([place, place + IMAGE_POSITIONS])
                    rest = piece[k + IMAGE_POSITIONS + 1 :]
                    firsts.append(any(x.modality == 0 and x.id not in marks for x in rest))
                    images.append(item.image)
                    keys.append([batch.sample_ids[number], of_row])
                    of_row += 1
                is_ignored = not is_codes and 1 in (item.modality, following.modality)
                is_ignored |= not sample.config.score_boi and following.id == vocabulary.boi_id
                tokens.append(item.id)
                targets.append(IGNORED if is_ignored else following.id)
                positions.append(k)
                modality.append(item.modality)
                target_modality.append(0 if is_ignored else following.modality)
                after.append(seen)
                captions += seen and not is_ignored and following.modality == 0
        if len(tokens) - base < length:
            starts.append(len(tokens))
        for place in range(length - (len(tokens) - base)):
            tokens.append(vocabulary.eos_id)
            targets.append(IGNORED)
            positions.append(place)
            for values in (modality, target_modality, after):
                values.append(0)
    counted = [t != IGNORED for t in targets]
    assert batch.tokens.tolist() == tokens
    assert batch.targets.tolist() == targets
    assert batch.position_ids.tolist() == positions
    assert batch.cu_seqlens.tolist() == [*starts, len(tokens)]
    assert batch.max_seqlen == int(batch.cu_seqlens.diff().max())
    assert batch.modality.tolist() == modality
    assert batch.side["target_modality"].tolist() == target_modality
    assert batch.side["after_image"].tolist() == [bool(value) for value in after]
    assert batch.side["image_spans"].tolist() == spans
    assert batch.target_count == sum(counted)
    raw = sum(4 <= t < 260 for t in targets)
    assert batch.target_bytes == raw
    names = sample.config.modalities
    expected = {"images": len(images), "caption_targets": captions}
    for index, name in enumerate(names):
        expected[f"{name}_positions"] = modality.count(index)
        expected[f"{name}_targets"] = sum(
            c and t == index for c, t in zip(counted, target_modality, strict=True)
        )
    assert batch.host_counts == expected
    if not is_codes:
        assert batch.side["latents"][:, 0, 0, 0].tolist() == [(i - 1.0) * 2.0 for i in images]
        assert batch.side["latents"].shape == (len(images), 1, 4, 4)
        assert batch.side["image_first"].tolist() == firsts
        assert batch.side["image_keys"].tolist() == keys


@settings(max_examples=150, deadline=None)
@given(
    spelled_documents(),
    st.integers(6, 30),
    st.sampled_from([CODES, LATENTS]),
    st.sampled_from([(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)]),
    st.booleans(),
)
def test_agrees_with_packing_by_hand(spelled, length, kind, order, score_boi) -> None:
    image_first, dropout = order
    sample = make_sample(
        spelled, **kind, image_first=image_first, caption_dropout=dropout, score_boi=score_boi
    )
    rows = rows_by_hand(sample, length)
    arranged = [[arrange(p, bool(image_first), bool(dropout)) for p in row] for row in rows]
    check_batch(sample, sample.pack(length), arranged, length)


@settings(max_examples=60, deadline=None)
@given(spelled_documents(), st.integers(6, 30))
def test_every_id_is_a_target_once_and_no_image_is_split(spelled, length) -> None:
    sample = make_sample(spelled, **CODES, caption_dropout=0.0, image_first=0.5)
    batch = sample.pack(length, seed=3)
    wanted = sorted(item.id for document in sample.documents for item in document[1:])
    assert sorted(t for t in batch.targets.tolist() if t != IGNORED) == wanted
    images = sum(item.modality == 1 for d in sample.documents for item in d) // IMAGE_POSITIONS
    assert batch.host_counts["images"] == images
    for start, stop in batch.side["image_spans"].tolist():
        assert stop - start == IMAGE_POSITIONS
        assert not ((batch.cu_seqlens >= start) & (batch.cu_seqlens <= stop)).any()
        around = batch.tokens[start - 1], batch.tokens[stop]
        assert around == (sample.vocabulary.boi_id, sample.vocabulary.eoi_id)


def test_shares_of_the_order_are_those_that_were_asked_for() -> None:
    sample = make_sample([["tti"] * 2000], **CODES, image_first=0.2, caption_dropout=0.1)
    length = 40
    first = dropped = 0
    batch = sample.pack(length, seed=5)
    for start in batch.cu_seqlens[:-1].tolist():
        if batch.tokens[start] == sample.vocabulary.bos_id:
            opens = int(batch.tokens[start + 1]) == sample.vocabulary.boi_id
            has_text = int(batch.tokens[start + 3 + IMAGE_POSITIONS]) < 260 and opens
            has_text &= int(batch.targets[start + 2 + IMAGE_POSITIONS]) != sample.vocabulary.eos_id
            first += opens and has_text
            dropped += opens and not has_text
    assert first == pytest.approx(400, abs=60)
    assert dropped == pytest.approx(160, abs=45)
    other = sample.pack(length, seed=6)
    assert not np.array_equal(other.tokens.numpy(), batch.tokens.numpy())


def test_a_coin_belongs_to_seed_sample_and_document_alone() -> None:
    sample = make_sample([["tti", "it", "tttti"] * 40], **LATENTS, image_first=0.5)
    whole = sample.pack(30, seed=2)
    tokens = whole.tokens.view(whole.rows, -1)
    for row in range(whole.rows):
        alone = sample.pack(30, seed=2, samples=[row])
        assert alone.tokens.tolist() == tokens[row].tolist()


def test_evaluation_alternates_and_drops_nothing() -> None:
    sample = make_sample([["tti", "it", "tti", "itt"], ["ti"]], **LATENTS, caption_dropout=1.0)
    rows = rows_by_hand(sample, 12)
    numbered = iter(range(5))
    arranged = [[arrange(p, next(numbered) % 2 == 1, False) for p in row] for row in rows]
    check_batch(sample, sample.pack(12, seed=None), arranged, 12)


def test_an_image_without_room_is_refused() -> None:
    sample = make_sample([["ti"]], **LATENTS)
    assert sample.rows(IMAGE_POSITIONS + 2).sequences == 2
    with pytest.raises(
        DataError, match=r"image of 4 positions .*sequence_length=5; raise it to 6 or"
    ):
        sample.rows(IMAGE_POSITIONS + 1)


def test_an_image_over_the_end_of_its_document_is_refused() -> None:
    sample = make_sample([["ti", "t"]], **LATENTS)
    shard = sample.shards[0]
    broken = ShardArrays(shard.ids, shard.ends - np.array([3, 0]), shard.spans, shard.latents)
    with pytest.raises(DataError, match="reaches over the end of its document"):
        DocumentRows([broken], [np.arange(2)], 20, "s")


def test_text_alone_packs_whole_documents() -> None:
    ids = [[1, 5, 6, 2], [1, 7, 2], [1, *range(10, 20), 2], [2]]
    ends = np.cumsum([len(d) for d in ids])
    shard = ShardArrays(np.concatenate(ids).astype(np.uint16), ends)
    rows = DocumentRows([shard], [np.arange(4)], 5, "s")
    batch = DocumentAssembler(ByteVocabulary(), 5).pack(
        [RowOf(i, 0, rows, i) for i in range(rows.sequences)]
    )
    assert batch.tokens.view(-1, 5).tolist() == [
        [1, 5, 6, 1, 7], [1, 10, 11, 12, 13], [14, 15, 16, 17, 18], [19, 2, 2, 2, 2],
    ]  # fmt: skip
    assert batch.targets.view(-1, 5)[3].tolist() == [2, *[IGNORED] * 4]
    assert (batch.modality, batch.side, batch.host_counts) == (None, {}, {})
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 10, 15, 16, 20]
    assert (batch.target_count, batch.target_bytes) == (16, 13)


def test_the_repeat_filter_looks_at_text_alone() -> None:
    sample = make_sample([["t" * 3 + "i" * 6, "t"]], **LATENTS)
    repeats = RepeatFilterConfig(max_count=4, max_period=2)
    assert sample.pack(60, repeats=repeats).target_count > 0
    shard = sample.shards[0]
    ids = shard.ids.copy()
    ids[1:4] = 9
    repeated = ShardArrays(ids, shard.ends, shard.spans, shard.latents)
    sample.shards = [repeated]
    strict = RepeatFilterConfig(max_count=3, max_period=1)
    batch = sample.pack(60, repeats=strict)
    assert batch.target_count == 0
    assert batch.host_counts["images"] == 6
    assert len(list(groupby(batch.targets.tolist()))) == 1


def test_a_row_of_padding_alone_has_nothing() -> None:
    sample = make_sample([["ti"]], **LATENTS)
    assembler = DocumentAssembler(sample.vocabulary, 8, sample.config, sample.layout, seed=0)
    batch = assembler.pack([RowOf(0, 0, sample.rows(8), None)])
    assert batch.target_count == batch.host_counts["images"] == 0
    assert batch.cu_seqlens.tolist() == [0, 8]
    assert batch.side["latents"].shape == (0, 1, 4, 4)
    assert batch.side["image_keys"].shape == (0, 2)
    assert set(batch.tokens.tolist()) == {sample.vocabulary.eos_id}
