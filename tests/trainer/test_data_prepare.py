"""Preparation: the same bytes however it is done, whole or absent, and every refusal."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from weft.models.errors import DataError
from weft.trainer.data.config import HeldOutConfig, RepeatFilterConfig, SourceConfig
from weft.trainer.data.prepare import plan_preparation, prepare_source
from weft.trainer.data.shards import Manifest, read_manifest, verify_prepared
from weft.trainer.data.vocabulary import ByteVocabulary

WORDS = ["the", "weft", "goes", "over", "and", "under", "every", "thread", "of", "warp"]


def write_texts(root: Path, files: int = 40, size: int = 40_000, seed: int = 0) -> Path:
    rng = random.Random(seed)
    root.mkdir(parents=True, exist_ok=True)
    for i in range(files):
        (root / f"{i:03d}.txt").write_text(
            " ".join(rng.choices(WORDS, k=rng.randint(1, size // 5)))
        )
    return root


def prepare(
    path: Path | str, out: Path, *, held_out: int = 3, workers: int = 1, **rest: object
) -> Manifest:
    drop = bool(rest.pop("drop_repetitive", False))
    vocabulary = str(rest.pop("vocabulary", "bytes"))
    limits = {key: rest.pop(key) for key in ("min_bytes", "max_bytes") if key in rest}
    preparation = plan_preparation(
        SourceConfig(name="s", path=str(path), **rest),  # type: ignore[arg-type]
        vocabulary,
        held_out=HeldOutConfig(documents=held_out, **limits),  # type: ignore[arg-type]
        repeats=RepeatFilterConfig(),
        drop_repetitive=drop,
    )
    return prepare_source(preparation, out, workers=workers, quiet=True)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def documents(folder: Path) -> list[bytes]:
    found = []
    for shard in read_manifest(folder).shards:
        ids, ends = shard.open_ids(folder), shard.open_ends(folder)
        starts = [0, *ends[:-1].tolist()]
        found += [ids[a:b] for a, b in zip(starts, ends.tolist(), strict=True)]
    for ids in found:
        assert (int(ids[0]), int(ids[-1])) == (1, 2)
    return [ByteVocabulary().decode_bytes(ids) for ids in found]


def test_shards_hold_the_documents_and_the_manifest_counts_them(tmp_path: Path) -> None:
    root = write_texts(tmp_path / "in")
    (root / "empty.txt").write_text("")
    (root / "binary.bin").write_bytes(b"\0\1")
    manifest = prepare(root, tmp_path / "out")
    texts = [path.read_bytes() for path in sorted(root.glob("0*.txt"))]
    assert documents(tmp_path / "out") == texts
    assert (manifest.documents, manifest.bytes) == (40, sum(map(len, texts)))
    assert manifest.tokens == manifest.bytes + 2 * 40
    assert manifest.dropped == {"binary": 1, "empty": 1}
    assert verify_prepared(tmp_path / "out") == manifest
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"in", "out"}


def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path) -> None:
    root = write_texts(tmp_path / "in", files=60, size=100_000)
    manifests = [prepare(root, tmp_path / f"out{n}", workers=n) for n in (1, 3)]
    assert len(manifests[0].shards) > 2
    assert content(tmp_path / "out1") == content(tmp_path / "out3")


def test_touched_files_keep_the_fingerprint_and_edited_ones_do_not(tmp_path: Path) -> None:
    root = write_texts(tmp_path / "in")
    first = prepare(root, tmp_path / "a").fingerprint
    os.utime(root / "000.txt", (1, 1))
    assert prepare(root, tmp_path / "b").fingerprint == first
    (root / "000.txt").write_text("something else")
    assert prepare(root, tmp_path / "c").fingerprint != first


KILLED = """
import sys
from test_data_prepare import prepare
from weft.trainer.data import prepare as module, shard_writer
import time
if __name__ == "__main__":
    inner = shard_writer.write_unit
    def slow(*rest):
        time.sleep(0.2)
        inner(*rest)
    module.write_unit = slow
    print("go", flush=True)
    prepare(sys.argv[1], __import__("pathlib").Path(sys.argv[2]))
"""


def test_killed_at_any_time_it_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    root = write_texts(tmp_path / "in", files=150, size=160_000)
    expected = prepare(root, tmp_path / "whole")
    assert len(expected.shards) >= 5
    (tmp_path / "killed.py").write_text(KILLED)
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    kept_before = 0
    # By what is there, not by the clock: a busy machine is killed no sooner.
    for units in (0, 1, 3):
        process = subprocess.Popen(
            [sys.executable, str(tmp_path / "killed.py"), str(root), str(out)],
            stdout=subprocess.PIPE,
            env=environment,
        )
        assert process.stdout is not None
        process.stdout.readline()
        deadline = time.monotonic() + 60
        while len(list((tmp_path / ".out.partial").glob("*.record"))) < units:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.kill()
        process.wait()
        assert not out.exists()
        kept = len(list((tmp_path / ".out.partial").glob("*.record")))
        assert kept >= kept_before
        kept_before = kept
    assert kept_before > 0
    records = {
        path.name: path.stat().st_mtime_ns for path in (tmp_path / ".out.partial").glob("*.ids")
    }
    assert prepare(root, out).fingerprint == expected.fingerprint
    assert content(out) == content(tmp_path / "whole")
    kept_files = [
        name for name, stamp in records.items() if (out / name).stat().st_mtime_ns == stamp
    ]
    assert len(kept_files) >= kept_before
    assert not (tmp_path / ".out.partial").exists()


def test_stopped_between_manifest_and_name_it_is_finished(tmp_path: Path) -> None:
    root = write_texts(tmp_path / "in")
    expected = prepare(root, tmp_path / "out")
    os.rename(tmp_path / "out", tmp_path / ".out.partial")
    (tmp_path / ".out.partial" / "shard_00000.record").write_text("{}")
    assert prepare(root, tmp_path / "out") == expected
    assert not list((tmp_path / "out").glob("*.record"))


def _prepare_in_process(root: str, out: str) -> None:
    prepare(root, Path(out))


def test_two_at_once_make_one_dataset(tmp_path: Path) -> None:
    root = write_texts(tmp_path / "in", files=60, size=100_000)
    context = multiprocessing.get_context("spawn")
    both = [
        context.Process(target=_prepare_in_process, args=(str(root), str(tmp_path / "out")))
        for _ in range(2)
    ]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    verify_prepared(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}


def test_held_out_documents_are_fixed_by_their_names(tmp_path: Path) -> None:
    root = write_texts(tmp_path / "in", files=60, size=500)

    def held_out(out: str, **rest: object) -> set[bytes]:
        manifest = prepare(root, tmp_path / out, **rest)  # type: ignore[arg-type]
        all_documents = documents(tmp_path / out)
        assert len(manifest.shards) == 1
        assert all(len(all_documents[d]) == size for _, d, size in manifest.held_out)
        return {all_documents[document] for _, document, _ in manifest.held_out}

    first = held_out("a", held_out=5)
    assert len(first) == 5
    assert first == held_out("b", held_out=5, workers=3)
    assert first < held_out("c", held_out=6)
    assert len(held_out("d", held_out=50)) == 6, "at most a tenth"
    assert all(
        200 <= len(text) <= 400 for text in held_out("e", held_out=4, min_bytes=200, max_bytes=400)
    )
    assert held_out("f", held_out=0) == set()


def test_copies_of_a_record_are_held_out_together(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"record {i % 30}"}) for i in range(90)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    manifest = prepare(tmp_path / "in.jsonl", tmp_path / "out", held_out=2)
    found = documents(tmp_path / "out")
    texts = [found[document] for _, document, _ in manifest.held_out]
    assert len(texts) == 6
    assert len(set(texts)) == 2


def test_repetitive_documents_can_be_dropped(tmp_path: Path) -> None:
    root = write_texts(tmp_path / "in", files=20, size=300)
    (root / "ruler.txt").write_text("title\n" + "-" * 32)
    (root / "almost.txt").write_text("title\n" + "-" * 31)
    assert prepare(root, tmp_path / "kept").dropped == {}
    manifest = prepare(root, tmp_path / "dropped", drop_repetitive=True)
    assert manifest.dropped == {"repetitive": 1}
    assert b"title\n" + b"-" * 31 in documents(tmp_path / "dropped")
    assert manifest.documents == 21


def test_formats_with_the_same_texts_give_the_same_documents(tmp_path: Path) -> None:
    import gzip

    import pyarrow
    import pyarrow.parquet

    root = write_texts(tmp_path / "in", files=30, size=300)
    texts = [path.read_text() for path in sorted(root.iterdir())]
    raw = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "a.jsonl").write_text(raw)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(raw.encode()))
    pyarrow.parquet.write_table(
        pyarrow.table({"text": texts}), tmp_path / "c.parquet", row_group_size=7
    )
    expected = [text.encode() for text in texts]
    fingerprints = set()
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet"):
        fingerprints.add(prepare(tmp_path / name, tmp_path / f"out-{name}").fingerprint)
        assert documents(tmp_path / f"out-{name}") == expected
    assert len(fingerprints) == 1


def test_token_files_stay_in_place(tmp_path: Path) -> None:
    texts = [f"document number {i} ".encode() * (i + 1) for i in range(40)]
    ids = np.concatenate(ByteVocabulary().encode_documents(texts))
    ids.tofile(tmp_path / "part-0.npy")
    manifest = prepare(tmp_path / "part-0.npy", tmp_path / "out", token_dtype="uint16")
    assert documents(tmp_path / "out") == texts
    assert manifest.bytes == sum(map(len, texts))
    assert len(manifest.held_out) == 3
    assert all(size == len(texts[document]) for _, document, size in manifest.held_out)
    assert not list((tmp_path / "out").glob("*.ids"))
    verify_prepared(tmp_path / "out")
    edited = bytearray((tmp_path / "part-0.npy").read_bytes())
    edited[10] ^= 1
    (tmp_path / "part-0.npy").write_bytes(edited)
    with pytest.raises(DataError, match=r"part-0\.npy does not match its checksum"):
        verify_prepared(tmp_path / "out")


def test_a_hugging_face_vocabulary_is_part_of_the_dataset(tmp_path: Path) -> None:
    from test_vocabulary import train_tokenizer

    root = write_texts(tmp_path / "in", files=20, size=300)
    spec = f"hf:{train_tokenizer(tmp_path / 'tokenizer')}"
    manifest = prepare(root, tmp_path / "out", vocabulary=spec, workers=2)
    assert manifest.vocabulary["kind"] == "hf"
    assert manifest.shards[0].dtype == "<u2"
    assert manifest.tokens < manifest.bytes
    assert manifest.fingerprint != prepare(root, tmp_path / "bytes").fingerprint


def assert_refused(tmp_path: Path, message: str, path: Path | str, **rest: object) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=message):
        prepare(path, tmp_path / "out", **rest)  # type: ignore[arg-type]
    assert sorted(tmp_path.rglob("*")) == before, "nothing half-written"


def test_bad_input_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    assert_refused(tmp_path, r"bad\.jsonl line 2 is not JSON", tmp_path / "bad.jsonl")
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n')
    assert_refused(
        tmp_path, r"no documents with text in them \(1 empty\)", tmp_path / "blank.jsonl"
    )
    assert_refused(tmp_path, r"gone does not exist", tmp_path / "gone")
    (tmp_path / "bad.jsonl.gz").write_bytes(b"\x1f\x8b not gzip")
    assert_refused(tmp_path, r"not a whole gzip file", tmp_path / "bad.jsonl.gz")
    assert_refused(
        tmp_path, r"no tokenizer at", tmp_path / "blank.jsonl", vocabulary=f"hf:{tmp_path}"
    )


def test_bad_input_in_a_pool_is_named_too(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.jsonl").write_text('{"text": "fine"}\n' if i < 2 else "{")
    with pytest.raises(DataError, match=r"2\.jsonl line 1 is not JSON"):
        prepare(tmp_path / "*.jsonl", tmp_path / "out", workers=2)
    assert not (tmp_path / "out").exists()


def test_an_occupied_place_is_refused(tmp_path: Path) -> None:
    root = write_texts(tmp_path / "in", files=12, size=300)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    assert_refused(tmp_path, "out exists and is not a prepared dataset; give another --out", root)
    other = write_texts(tmp_path / "other", files=12, size=300, seed=1)
    prepare(root, tmp_path / "taken")
    with pytest.raises(DataError, match="taken holds a dataset made from other files or settings"):
        prepare(other, tmp_path / "taken")


def test_a_full_disk_is_seen_before_and_while_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_texts(tmp_path / "in", files=12, size=300)
    monkeypatch.setattr("weft.trainer.data.prepare.free_bytes", lambda path: 1000)
    assert_refused(
        tmp_path, r"needs about 0\.02 GB and .* has 0\.00 GB free; free some space", root
    )
    monkeypatch.undo()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("weft.trainer.data.hashed_file.os.fsync", full)
    assert_refused(tmp_path, r"no space left in .*; free some and run the same command again", root)


def test_a_damaged_dataset_is_named(tmp_path: Path) -> None:
    prepare(write_texts(tmp_path / "in"), tmp_path / "out")
    ids = tmp_path / "out" / "shard_00000.ids"
    whole = ids.read_bytes()
    ids.write_bytes(whole[:-2])
    with pytest.raises(
        DataError, match=r"shard_00000\.ids has \d+ bytes, not \d+: the dataset changed"
    ):
        read_manifest(tmp_path / "out")
    ids.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    read_manifest(tmp_path / "out")
    with pytest.raises(DataError, match=r"shard_00000\.ids does not match its checksum"):
        verify_prepared(tmp_path / "out")
    ids.unlink()
    with pytest.raises(DataError, match=r"shard_00000\.ids is missing"):
        read_manifest(tmp_path / "out")
    with pytest.raises(
        DataError,
        match=r"not a prepared dataset \(no manifest\.json\); make one with: weft data prepare",
    ):
        read_manifest(tmp_path / "in")
    (tmp_path / "out" / "manifest.json").write_text('{"format": "other"}')
    with pytest.raises(DataError, match="not a weft-dataset manifest of version 1"):
        read_manifest(tmp_path / "out")


def test_workers_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    import psutil

    (tmp_path / "parent.py").write_text(
        "import os, sys, time\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from multiprocessing import get_context\n"
        "from weft.trainer.data.prepare import _start_worker\n"
        "if __name__ == '__main__':\n"
        "    pool = ProcessPoolExecutor(1, get_context('spawn'), _start_worker, (os.getpid(),))\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "parent.py")], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    worker = psutil.Process(int(process.stdout.readline()))
    worker.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert worker.is_running()
    process.kill()
    process.wait()
    worker.wait(timeout=10)
