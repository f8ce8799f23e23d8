"""Every format gives the same documents; what cannot be read is named with its place."""

from __future__ import annotations

import gzip
import json
import os
import sys
from pathlib import Path

import pytest
from weft.models.errors import DataError, LaunchError
from weft.trainer.data.readers import read_documents
from weft.trainer.data.sources import InputFile, Unit

TEXTS = [
    "first",
    "second\nwith a line",
    "naïve 東京",
    "last \ud83d\ude42".encode("utf-16", "surrogatepass").decode("utf-16"),
]


def unit(path: Path, start: int = 0, stop: int | None = None) -> Unit:
    info = path.stat()
    file = InputFile(str(path), path.name, info.st_size, info.st_mtime_ns)
    return Unit(0, (file,), info.st_size, start, info.st_size if stop is None else stop)


def jsonl(texts: list[str], key: str = "text") -> bytes:
    return b"".join(
        json.dumps({"id": i, key: text}).encode() + b"\n" for i, text in enumerate(texts)
    )


def texts_of(kind: str, what: Unit, key: str = "text") -> list[str]:
    return [(document.text or b"").decode() for document in read_documents(kind, what, key)]


def write_compressed(path: Path, raw: bytes) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(raw))
    elif path.suffix == ".zst":
        import zstandard

        half = len(raw) // 2
        frames = [zstandard.ZstdCompressor().compress(part) for part in (raw[:half], raw[half:])]
        path.write_bytes(b"".join(frames))
    else:
        path.write_bytes(raw)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("key", ["text", "content"])
def test_jsonl(tmp_path: Path, name: str, key: str) -> None:
    path = write_compressed(tmp_path / name, b"\n" + jsonl(TEXTS * 50, key).rstrip(b"\n"))
    assert texts_of("jsonl", unit(path), key) == TEXTS * 50


def test_jsonl_parts_give_every_line_once(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl([f"document {i} " + "x" * (i % 17) for i in range(60)]))
    whole = texts_of("jsonl", unit(path))
    for step in (1, 7, 100, 333):
        parts = [
            text
            for start in range(0, path.stat().st_size, step)
            for text in texts_of("jsonl", unit(path, start, min(start + step, path.stat().st_size)))
        ]
        assert parts == whole


def test_parquet_row_groups(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(
        pyarrow.table({"n": range(4), "text": TEXTS}), path, row_group_size=3
    )
    assert texts_of("parquet", unit(path, 0, 2)) == TEXTS
    assert texts_of("parquet", unit(path, 1, 2)) == TEXTS[3:]
    with pytest.raises(DataError, match=r"has no column 'body' \(it has: n, text\); set text_key"):
        texts_of("parquet", unit(path, 0, 1), "body")
    with pytest.raises(DataError, match=r"column 'n' is int64, not text"):
        texts_of("parquet", unit(path, 0, 1), "n")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"a\.parquet is not a whole Parquet file"):
        texts_of("parquet", unit(path, 0, 1))


def test_text_files_are_documents_and_binaries_are_not(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 \xff")
    (tmp_path / "b.bin").write_bytes(b"PK\x00\x01")
    assert [d.text for d in read_documents("text", unit(tmp_path / "a.txt"), "")] == [
        b"caf\xe9 \xff"
    ]
    assert [(d.key, d.text) for d in read_documents("text", unit(tmp_path / "b.bin"), "")] == [
        (b"b.bin", None)
    ]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_bad_lines_are_named(tmp_path: Path, name: str) -> None:
    good = jsonl(TEXTS)
    cases = [
        (b'{"text": "cut of\n', r"line 5 is not JSON: .*mend the line"),
        (
            b'{"body": "x", "id": 3}\n',
            r"line 5 has no field 'text' \(it has: body, id\); set text_key",
        ),
        (b'["x"]\n', r"line 5 has no field 'text' \(it has: list\)"),
        (b'{"text": 3}\n', r"line 5: field 'text' is int, not text"),
    ]
    for line, message in cases:
        path = write_compressed(tmp_path / name, good + line + good)
        with pytest.raises(DataError, match=rf"{name} {message}"):
            texts_of("jsonl", unit(path))
        if name == "a.jsonl":
            with pytest.raises(DataError, match=message):
                texts_of("jsonl", unit(path, len(good) - 3))


def test_null_text_is_empty(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": null}\n')
    assert texts_of("jsonl", unit(tmp_path / "a.jsonl")) == [""]


@pytest.mark.parametrize(("name", "what"), [("a.jsonl.gz", "gzip"), ("a.jsonl.zst", "zstd")])
def test_truncated_and_damaged_archives_are_named(tmp_path: Path, name: str, what: str) -> None:
    raw = os.urandom(300_000).hex().encode()
    path = write_compressed(tmp_path / name, b'{"text": "' + raw + b'"}\n' + jsonl(TEXTS))
    whole = path.read_bytes()
    assert len(texts_of("jsonl", unit(path))) == 5
    for damaged in (whole[:-5], whole[: len(whole) // 3], b"not an archive at all"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"{name} is not a whole {what} file"):
            texts_of("jsonl", unit(path))


def test_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("x")
    what = unit(tmp_path / "a.txt")

    def refuse(path: str, *rest: object, **more: object) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(DataError, match=r"cannot read .*a\.txt: Permission denied"):
        list(read_documents("text", what, ""))


@pytest.mark.parametrize(
    ("name", "kind", "package"),
    [("a.jsonl.zst", "jsonl", "zstandard"), ("a.parquet", "parquet", "pyarrow")],
)
def test_missing_extras_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str, package: str
) -> None:
    (tmp_path / name).write_bytes(b"anything")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        LaunchError, match=rf"{package} package; install it with: pip install 'weft\[data\]'"
    ):
        list(read_documents(kind, unit(tmp_path / name, 0, 1), "text"))
