"""Token files used in place: raw and real .npy, cut at documents, checked against the vocabulary."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from weft.models.errors import DataError
from weft.trainer.data.sources import InputFile, Unit
from weft.trainer.data.token_files import index_range, open_ids, read_layout
from weft.trainer.data.vocabulary import ByteVocabulary

VOCABULARY = ByteVocabulary()


def as_input(path: Path) -> InputFile:
    return InputFile(str(path), path.name, path.stat().st_size, 0)


def documents(seed: int = 0, count: int = 40) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.concatenate([[*rng.integers(4, 260, rng.integers(0, 30)), 2] for _ in range(count)])


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("header", [False, True])
def test_layouts(tmp_path: Path, dtype: str, header: bool) -> None:
    ids, path = documents().astype(dtype), tmp_path / "part.npy"
    np.save(path, ids) if header else ids.tofile(path)
    layout = read_layout(as_input(path), dtype)
    assert (layout.count, np.dtype(layout.dtype)) == (len(ids), np.dtype(dtype))
    assert (layout.offset > 0) == header
    assert open_ids(str(path), layout).tolist() == ids.tolist()


@pytest.mark.parametrize("step", [1, 5, 64, 10**6])
@pytest.mark.parametrize("closed", [True, False])
def test_ranges_hold_each_document_once(tmp_path: Path, step: int, closed: bool) -> None:
    ids = documents() if closed else np.append(documents(), [7, 8])
    path = tmp_path / "part.npy"
    ids.astype("<u2").tofile(path)
    layout = read_layout(as_input(path), "uint16")
    ends: list[int] = []
    covered = 0
    total_bytes = 0
    for start in range(0, len(ids), step):
        unit = Unit(0, (as_input(path),), 0, start, min(start + step, len(ids)))
        found = index_range(as_input(path), layout, unit, VOCABULARY)
        assert found.start == covered
        covered = found.stop
        assert (
            found.sha256
            == hashlib.sha256(ids[found.start : found.stop].astype("<u2").tobytes()).hexdigest()
        )
        ends.extend((found.ends + found.start).tolist())
        assert found.byte_ends is not None
        total_bytes += int(found.byte_ends[-1]) if len(found.byte_ends) else 0
    expected = (np.flatnonzero(ids == 2) + 1).tolist() + ([] if closed else [len(ids)])
    assert ends == expected
    assert covered == len(ids)
    assert total_bytes == int((ids >= 4).sum())


def test_bad_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "part.npy"
    path.write_bytes(b"12345")
    with pytest.raises(
        DataError,
        match=r"5 bytes, which is no multiple of 4 \(uint32\); it is truncated or token_dtype",
    ):
        read_layout(as_input(path), "uint32")
    np.save(path, np.zeros((3, 4), np.uint16))
    with pytest.raises(
        DataError, match=r"uint16 with shape \(3, 4\); token files are one-dimensional"
    ):
        read_layout(as_input(path), "uint16")
    np.save(path, np.zeros(100, np.uint16))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match="truncated: its header promises 100 ids"):
        read_layout(as_input(path), "uint16")


def test_ids_of_another_vocabulary_or_type_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "part.npy"
    documents().astype("<u4").tofile(path)
    layout = read_layout(as_input(path), "uint32")
    index_range(as_input(path), layout, Unit(0, (as_input(path),), 0, 0, layout.count), VOCABULARY)
    ids = documents()
    ids[5] = 300
    ids.astype("<u2").tofile(path)
    layout = read_layout(as_input(path), "uint16")
    with pytest.raises(
        DataError,
        match=r"id 300 at position 5 is outside the vocabulary of 260 ids; check .*token_dtype",
    ):
        index_range(
            as_input(path), layout, Unit(0, (as_input(path),), 0, 0, layout.count), VOCABULARY
        )
