"""Stored patches: bits beside the ids, the loader that reads them, and every refusal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_prepare import write_texts
from torch import Tensor
from weft.models.batch import NEXT_STARTS_PATCH, PackedBatch
from weft.models.errors import DataError
from weft.trainer.data import prepare as prepare_module
from weft.trainer.data.balance import deal_rows, rank_balance
from weft.trainer.data.config import DataConfig, HeldOutConfig, RepeatFilterConfig, SourceConfig
from weft.trainer.data.dataset import Dataset, open_data
from weft.trainer.data.loader import PackedLoader, held_out_batches
from weft.trainer.data.patches import PROGRESS, BitStream, PatchJob
from weft.trainer.data.prepare import plan_preparation, prepare_source
from weft.trainer.data.shards import Manifest, read_manifest, verify_prepared
from weft.trainer.data.spans import Span

LENGTH = 64


@dataclass
class AfterVowels:
    """A patcher that needs a document's past: every second vowel of a document's part in a row ends a patch."""

    name: str = "vowels"
    dies_after: int = 10**9
    seen: list[int] = field(default_factory=list)

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"scheme": self.name, "weights": "a" * 64}

    def next_starts(self, batch: PackedBatch) -> Tensor:
        if len(self.seen) >= self.dies_after:
            raise KeyboardInterrupt
        self.seen.append(len(batch.tokens))
        is_vowel = torch.isin(batch.tokens, torch.tensor([ord(c) + 4 for c in "aeiou"])).int()
        total = is_vowel.cumsum(0)
        starts = torch.arange(len(total)) - batch.position_ids
        before = total[starts] - is_vowel[starts]
        return (is_vowel > 0) & ((total - before) % 2 == 0)


def prepare(
    path: Path, out: Path, patcher: AfterVowels | None, length: int = LENGTH, tokens: int = 500
) -> Manifest:
    preparation = plan_preparation(
        SourceConfig(name="s", path=str(path)),
        "bytes",
        held_out=HeldOutConfig(documents=3),
        repeats=RepeatFilterConfig(),
        patches=PatchJob(patcher.identity, lambda sample: patcher, length, tokens)
        if patcher
        else None,
    )
    return prepare_source(preparation, out, workers=1, quiet=True)


def open_prepared(*folders: Path, length: int = LENGTH) -> Dataset:
    sources = tuple(SourceConfig(name=folder.name, path=str(folder)) for folder in folders)
    return open_data(DataConfig(sources=sources, sequence_length=length))


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return write_texts(tmp_path / "texts", files=12, size=1500)


def test_the_loader_brings_what_patching_its_batches_gives(texts: Path, tmp_path: Path) -> None:
    prepare(texts, tmp_path / "data", AfterVowels())
    data = open_prepared(tmp_path / "data")
    assert data.patches == {**AfterVowels().identity, "sequence_length": LENGTH}
    rows = 0
    with PackedLoader(data, seed=1, batch_rows=6, micro_batch_rows=3) as loader:
        for _ in range(12):
            for batch in loader.next_step().micro_batches:
                stored = batch.side[NEXT_STARTS_PATCH]
                assert stored.dtype == torch.bool
                assert stored.tolist() == AfterVowels().next_starts(batch).tolist()
                rows += batch.rows
    assert rows == 72
    batches = list(held_out_batches(data, "data", 2))
    assert len(batches) > 2  # with a short row at the end
    for batch in batches:
        assert batch.side[NEXT_STARTS_PATCH].tolist() == AfterVowels().next_starts(batch).tolist()


def test_patches_are_the_same_however_many_are_made_at_a_time(texts: Path, tmp_path: Path) -> None:
    few = prepare(texts, tmp_path / "few", AfterVowels(), tokens=1)
    many = prepare(texts, tmp_path / "many", AfterVowels(), tokens=10_000)
    assert few.fingerprint == many.fingerprint
    assert verify_prepared(tmp_path / "few") == few


def test_datasets_without_patches_are_what_they_were(texts: Path, tmp_path: Path) -> None:
    plain = prepare(texts, tmp_path / "plain", None)
    content = json.loads((tmp_path / "plain" / "manifest.json").read_text())
    assert content["version"] == 1
    assert "patches" not in content
    assert "patches" not in content["shards"][0]
    patched = prepare(texts, tmp_path / "patched", AfterVowels())
    assert json.loads((tmp_path / "patched" / "manifest.json").read_text())["version"] == 2
    other = prepare(texts, tmp_path / "other", AfterVowels("other"))
    assert len({plain.fingerprint, patched.fingerprint, other.fingerprint}) == 3
    size = sum(path.stat().st_size for path in (tmp_path / "patched").glob("*.patches"))
    assert size == sum(-(-shard.tokens // 8) for shard in patched.shards)
    batch = PackedLoader(open_prepared(tmp_path / "plain"), seed=0, batch_rows=1).assemble(0)
    assert batch.micro_batches[0].side == {}


def test_an_interrupted_pass_goes_on_where_it_was(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weft.trainer.data.patches.SAVE_EVERY_S", 0.0)
    whole = AfterVowels()
    expected = prepare(texts, tmp_path / "whole", whole)
    killed = AfterVowels(dies_after=len(whole.seen) - 3)
    with pytest.raises(KeyboardInterrupt):
        prepare(texts, tmp_path / "data", killed)
    assert (tmp_path / ".data.partial" / PROGRESS).is_file()
    assert not (tmp_path / "data").exists()
    rest = AfterVowels()
    assert prepare(texts, tmp_path / "data", rest) == expected
    assert len(rest.seen) == 3
    assert {path.suffix for path in (tmp_path / "data").iterdir()} == {
        ".ids", ".ends", ".patches", ".json",
    }  # fmt: skip


def test_damage_is_named(texts: Path, tmp_path: Path) -> None:
    prepare(texts, tmp_path / "data", AfterVowels())
    path = tmp_path / "data" / "shard_00000.patches"
    raw = bytearray(path.read_bytes())
    raw[5] ^= 8
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"shard_00000\.patches does not match its checksum"):
        verify_prepared(tmp_path / "data")
    path.write_bytes(raw[:-1])
    with pytest.raises(DataError, match=r"shard_00000\.patches has \d+ bytes, not"):
        read_manifest(tmp_path / "data")


def test_what_does_not_fit_is_refused(texts: Path, tmp_path: Path) -> None:
    prepare(texts, tmp_path / "one", AfterVowels())
    prepare(texts, tmp_path / "two", AfterVowels("other"))
    prepare(texts, tmp_path / "bare", None)
    with pytest.raises(DataError, match=r"patched for data\.sequence_length=64 .* is 32; set it"):
        open_prepared(tmp_path / "one", length=32)
    with pytest.raises(DataError, match=r"'one' and 'two' were patched .*scheme other, not vowels"):
        _ = open_prepared(tmp_path / "one", tmp_path / "two").patches
    with pytest.raises(DataError, match=r"'one' has stored patches and 'bare' has none"):
        _ = open_prepared(tmp_path / "bare", tmp_path / "one").patches
    with pytest.raises(DataError, match="made from other files or settings"):
        prepare(texts, tmp_path / "one", AfterVowels("other"))
    assert prepare_module._is_prepared(tmp_path / "one")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_bits_go_in_and_come_out_anywhere(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=3))
    packed = [np.zeros(-(-size // 8), np.uint8) for size in sizes]
    spans, expected = [], np.zeros(0, np.bool_)
    for shard, size in enumerate(sizes):
        start = data.draw(st.integers(0, size - 1))
        spans.append(Span(shard, start, data.draw(st.integers(start + 1, size))))
        expected = np.append(expected, np.zeros(spans[-1].stop - start, np.bool_))
    stream = BitStream(packed, spans)
    for _ in range(4):
        start = data.draw(st.integers(0, len(expected) - 1))
        count = data.draw(st.integers(0, len(expected) - start))
        bits = np.array(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)), bool)
        stream.write(start, bits)
        expected[start : start + count] = bits
    assert stream.read(0, len(expected)).tolist() == expected.tolist()
    assert sum(int(np.unpackbits(part).sum()) for part in packed) == expected.sum()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 50), min_size=8, max_size=8),
    st.sampled_from([(1, 8), (2, 2), (4, 1), (2, 4)]),
)
def test_rows_are_dealt_once_and_evenly(loads: list[int], shape: tuple[int, int]) -> None:
    ranks, micro = shape
    dealt = deal_rows(np.array(loads), ranks, micro)
    assert sorted(np.concatenate(dealt).tolist()) == list(range(8))
    assert {len(rows) for rows in dealt} == {8 // ranks}
    totals = [sum(loads[row] for row in rows) for rows in dealt]
    # The last row a rank was dealt went to the least of them.
    assert max(totals) - min(totals) <= 2 * max(loads)
    expected = max(totals) * ranks / sum(loads) if any(loads) else 1.0
    assert rank_balance(np.array(loads), dealt) == pytest.approx(expected)


def test_ranks_share_patches_evenly_and_steps_keep_their_rows(texts: Path, tmp_path: Path) -> None:
    # Half of the documents have no vowels: rows differ much in patches.
    for path in sorted(texts.iterdir())[::2]:
        path.write_text("x" * len(path.read_text()))
    prepare(texts, tmp_path / "data", AfterVowels())
    data = open_prepared(tmp_path / "data")
    for first in range(0, 64, 16):
        steps = {
            ranks: [
                PackedLoader(data, seed=2, batch_rows=16, micro_batch_rows=2, data_rank=rank, data_ranks=ranks).assemble(first)
                for rank in range(ranks)
            ]
            for ranks in (1, 2, 4)
        }  # fmt: skip
        rows = {
            ranks: sorted(i for step in found for batch in step.micro_batches for i in batch.sample_ids)
            for ranks, found in steps.items()
        }  # fmt: skip
        assert rows[1] == rows[2] == rows[4] == list(range(first, first + 16))
        for ranks, found in steps.items():
            totals = [
                sum(int(b.side[NEXT_STARTS_PATCH].sum()) for b in s.micro_batches) for s in found
            ]
            assert {step.patch_balance for step in found} == {max(totals) / (sum(totals) / ranks)}
            assert max(totals) <= 1.3 * sum(totals) / ranks
