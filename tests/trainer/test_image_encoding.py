"""Encoding a source with a tokenizer: the same for any processes, resumable, refused where it does not fit; and its batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_images_data import open_set, prepare, write_tars
from weft.models.batch import IMAGES, STAND_IN
from weft.models.errors import ConfigError, DataError
from weft.trainer.data.config import DataConfig
from weft.trainer.data.dataset import Dataset, open_data
from weft.trainer.data.images.augmentation import decode_file, fit_view
from weft.trainer.data.images.encoded_format import read_encoded, verify_encoded
from weft.trainer.data.images.encoding import (
    EncodeOptions,
    encode_shards,
    finish_encoding,
    plan_encoding,
    view_of,
)
from weft.trainer.data.images.parts import part_of
from weft.trainer.data.images.rows import all_rows
from weft.trainer.data.images.scorers import JPEGScorer
from weft.trainer.data.images.scoring import ScoreOptions, finish_scores, score_shards
from weft.trainer.data.images.source_opening import check_tokenizer
from weft.trainer.data.loader import PackedLoader, held_out_batches
from weft.trainer.data.shards import read_manifest
from weft.trainer.opening import settle_encoded

RATIOS = (2, 4, 8)
IMAGES_IN_ALL = 60


class Blocks:
    """A tokenizer of 8 x 8 pictures by arithmetic: brightness of blocks as codes, or their means and a constant variance."""

    size, channels = 8, 3

    def __init__(self, kind: str = "codes", name: str = "a", codes: int = 100) -> None:
        self.kind: Any = kind
        self.ratios = (4,) if kind == "codes" else RATIOS
        self.codes = codes if kind == "codes" else None
        self.name, self.calls = name, 0

    @property
    def identity(self) -> dict[str, Any]:
        return {"fingerprint": self.name * 64, "run": "somewhere"}

    def encode(self, pixels: np.ndarray, ratio: int) -> np.ndarray:
        self.calls += 1
        side = self.size // ratio
        blocks = pixels.reshape(len(pixels), side, ratio, side, ratio, 3).astype(np.float32)
        means = blocks.mean(axis=(2, 4)).transpose(0, 3, 1, 2) / 255
        if self.codes is not None:
            return (means.mean(axis=1) * (self.codes - 1)).astype(np.int64).reshape(len(pixels), -1)
        return np.concatenate([means[:, :2], np.full_like(means[:, :2], -4.0)], axis=1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    prepare(write_tars(root / "tars", images=IMAGES_IN_ALL // 3), root / "source")
    return root / "source"


@pytest.fixture(scope="module")
def scores(source: Path) -> Path:
    out = source.with_name("scores")
    score_shards(JPEGScorer(16), source, out)
    finish_scores(JPEGScorer(16), source, out, ScoreOptions(RATIOS, (0.2, 0.3, 0.5), None, 1000))
    return out


def encode(tokenizer: Blocks, source: Path, out: Path, parts: int = 1, **options: Any) -> dict:
    given = EncodeOptions(**{"shard_images": 25, "batch_images": 4, **options})
    plan = plan_encoding(tokenizer, source, given)
    for k in reversed(range(parts)):
        encode_shards(tokenizer, plan, source, out, scores=given.scores, part=(k, parts))
    made = finish_encoding(out, read_manifest(source).images["classes"])  # type: ignore[index]
    assert made is not None
    return made


def open_encoded(out: Path, kind: str, length: int = 1, **images: Any) -> Dataset:
    return open_data(
        DataConfig(
            sources=[{"name": "e", "path": str(out)}],
            sequence_length=length,
            images={"kind": kind, **images},
        )
    )


def first_batch(data: Dataset, rows: int = 12, seed: int = 1):
    with PackedLoader(data, seed=seed, batch_rows=rows) as loader:
        return loader.next_step().micro_batches[0]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_any_number_of_processes_gives_the_same_bytes(tmp_path: Path, source: Path) -> None:
    encode(Blocks(), source, tmp_path / "one", views="ten-crop")
    encode(Blocks(), source, tmp_path / "three", parts=3, views="ten-crop")
    assert files_of(tmp_path / "one") == files_of(tmp_path / "three")
    verify_encoded(tmp_path / "one")


def test_a_killed_job_goes_on_at_the_shard_it_stopped_in(tmp_path: Path, source: Path) -> None:
    class Dies(Blocks):
        def encode(self, pixels: np.ndarray, ratio: int) -> np.ndarray:
            if self.calls == 20:
                raise KeyboardInterrupt
            return super().encode(pixels, ratio)

    out, options = tmp_path / "out", EncodeOptions(shard_images=25, batch_images=4)
    plan = plan_encoding(Blocks(), source, options)
    with pytest.raises(KeyboardInterrupt):
        encode_shards(Dies(), plan, source, out)
    assert finish_encoding(out, None) is None
    with pytest.raises(DataError, match=r"is not finished: 1 of 3 shards are encoded"):
        read_encoded(out)
    assert not list(out.glob("*.tmp"))
    seen: list[int] = []
    done = encode_shards(Blocks(), plan, source, out, advance=lambda shard, _: seen.append(shard))
    assert (done, seen) == (35, [1, 2])
    whole = tmp_path / "whole"
    encode(Blocks(), source, whole)
    finish_encoding(out, None)
    assert files_of(out) == files_of(whole)
    # A shard that was damaged since is made again.
    (out / "shard_00001.codes").write_bytes(b"short")
    with pytest.raises(DataError, match=r"shard_00001.codes has 5 bytes, not"):
        read_encoded(out)
    assert encode_shards(Blocks(), plan, source, out) == 25
    assert files_of(out) == files_of(whole)


def test_codes_are_those_of_each_view(tmp_path: Path, source: Path) -> None:
    out, tokenizer = tmp_path / "out", Blocks()
    encode(tokenizer, source, out, views="ten-crop")
    plan, manifest = read_encoded(out)
    stored = np.fromfile(out / "shard_00001.codes", "<u2").reshape(
        -1, 10, *manifest["shapes"]["codes"]
    )
    rows = all_rows("s", source, read_manifest(source))
    pixels = decode_file(rows[30].raw, "x", 3)
    for number, name in enumerate(plan.views):
        square = fit_view(pixels, 8, view_of(name, 8, 1.1))
        assert (stored[5, number] == tokenizer.encode(square[None], 4)[0]).all()
    assert plan.views[:2] == ("center", "center-flip")
    assert len(set(plan.views)) == 10


def test_large_codebooks_take_four_bytes(tmp_path: Path, source: Path) -> None:
    wide = plan_encoding(Blocks(codes=70_000), source, EncodeOptions())
    assert wide.dtype == "uint32"
    assert plan_encoding(Blocks(codes=1 << 16), source, EncodeOptions()).dtype == "uint16"
    bad = Blocks(codes=100)
    bad.encode = lambda pixels, ratio: np.full((len(pixels), 4), 100)  # type: ignore[method-assign]
    with pytest.raises(DataError, match="gave code 100 and says it has 100"):
        encode(bad, source, tmp_path / "out")


def test_rows_of_codes(tmp_path: Path, source: Path) -> None:
    encode(Blocks(), source, tmp_path / "out")
    data = open_encoded(tmp_path / "out", "codes", 4)
    batch = first_batch(data)
    tokens, targets = batch.tokens.view(12, 4), batch.targets.view(12, 4)
    assert (tokens[:, 1:] == targets[:, :-1]).all()
    assert (tokens[:, 0] == 0).all()
    assert batch.cu_seqlens.tolist() == list(range(0, 49, 4))
    assert (batch.row_length, batch.max_seqlen, batch.target_count) == (4, 4, 48)
    assert batch.host_counts[IMAGES] == 12
    train = data.sources[0].train
    located = data.order(1).locate(0, 12)
    for row, number in enumerate(located.sequences.tolist()):
        views = [train.values(number, view).tolist() for view in (0, 1)]  # type: ignore[union-attr]
        assert targets[row].tolist() in views
        assert batch.side["labels"][row] == train.label(number)  # type: ignore[union-attr]
    assert data.sources[0].sequences == IMAGES_IN_ALL - 3
    held_out = list(held_out_batches(data, "e", 2, 0, 1))
    assert sum(b.rows for b in held_out) == 3
    assert [b.host_counts.get(STAND_IN, 0) for b in held_out_batches(data, "e", 1, 3, 4)] == [1]


@pytest.mark.parametrize("stores", ["scored", "all"])
def test_rows_of_latents(tmp_path: Path, source: Path, scores: Path, stores: str) -> None:
    out = tmp_path / "out"
    made = encode(Blocks("moments"), source, out, scores=str(scores), ratios=stores)
    assert made["shapes"] == {
        "moments_2": [4, 4, 4],
        "moments_4": [4, 2, 2],
        "moments_8": [4, 1, 1],
    }
    batch = first_batch(open_encoded(out, "latents"), 20)
    train = open_encoded(out, "latents").sources[0].train
    rows = all_rows("s", source, read_manifest(source))
    by_digest = {rows[i].sha256: rows[i].raw for i in range(rows.sequences)}
    seen: list[int] = []
    for ratio in RATIOS:
        moments, places = batch.side[f"moments_{ratio}"], batch.side[f"place_{ratio}"]
        assert moments.shape[1:] == tuple(made["shapes"][f"moments_{ratio}"])
        assert batch.host_counts[f"images_{ratio}"] == len(places)
        seen += places.tolist()
        for values, place in zip(moments, places.tolist(), strict=True):
            number = int(open_encoded(out, "latents").order(1).locate(0, 20).sequences[place])
            digest = train._rows["sha256"][train._numbers[number]].tobytes()  # type: ignore[union-attr]
            pixels = fit_view(decode_file(by_digest[digest], "x", 3), 8)
            expected = [
                Blocks("moments").encode(p[None], ratio)[0] for p in (pixels, pixels[:, ::-1])
            ]
            assert any(np.array_equal(values.numpy(), e) for e in expected)
    assert sorted(seen) == list(range(20))


def test_a_fixed_ratio_has_no_others(tmp_path: Path, source: Path) -> None:
    encode(Blocks("moments"), source, tmp_path / "out")
    fixed = {"values": RATIOS, "fixed": 4}
    batch = first_batch(open_encoded(tmp_path / "out", "latents", ratios=fixed), 6)
    assert batch.side["place_4"].tolist() == list(range(6))
    assert "moments_2" not in batch.side
    with pytest.raises(DataError, match="was encoded without scores"):
        open_encoded(tmp_path / "out", "latents")
    with pytest.raises(DataError, match=r"was encoded at ratios \[2, 4, 8\]"):
        open_encoded(tmp_path / "out", "latents", ratios={"values": [8, 16, 32], "fixed": 8})


def test_statistics_are_those_of_sampled_latents(tmp_path: Path, source: Path) -> None:
    made = encode(Blocks("moments"), source, tmp_path / "out")
    data = open_encoded(tmp_path / "out", "latents", ratios={"values": RATIOS, "fixed": 2})
    train = data.sources[0].train
    stored = np.stack([train.values(i, 0, 2) for i in range(train.sequences)])  # type: ignore[union-attr]
    draw = np.random.default_rng(0)
    means = stored[:, :2].astype(np.float64)
    sampled = means + np.exp(-2.0) * draw.standard_normal((200, *means.shape))
    found = data.image_data.statistics[2]  # type: ignore[union-attr]
    assert found["mean"] == pytest.approx(sampled.mean(axis=(0, 1, 3, 4)).tolist(), abs=2e-3)
    assert found["std"] == pytest.approx(sampled.std(axis=(0, 1, 3, 4)).tolist(), abs=2e-3)
    assert found["images"] == IMAGES_IN_ALL - 3
    assert made["statistics"]["2"] == found


def test_another_tokenizer_is_refused(tmp_path: Path, source: Path) -> None:
    for name in "ab":
        encode(Blocks(name=name), source, tmp_path / name)
    with pytest.raises(
        DataError, match=r"was begun with another tokenizer \(aaaaaaaaaaaa, now bbbbbbbbbbbb\)"
    ):
        encode(Blocks(name="b"), source, tmp_path / "a")
    with pytest.raises(
        DataError,
        match=r"source 'e' is of another tokenizer: fingerprint aaaaaaaaaaaa, and the run goes by bbb",
    ):
        open_encoded(tmp_path / "a", "codes", 4, tokenizer="b" * 64)
    sources = [{"name": name, "path": str(tmp_path / name)} for name in "ab"]
    with pytest.raises(DataError, match="were encoded with different tokenizers"):
        open_data(DataConfig(sources=sources, sequence_length=4, images={"kind": "codes"}))
    check_tokenizer("a" * 64, "a" * 64, "the decoder")
    record = tmp_path / "a" / "manifest.json"
    changed = json.loads(record.read_text())
    changed["shards"][1]["tokenizer"] = "c" * 64
    record.write_text(json.dumps(changed))
    with pytest.raises(DataError, match="shard 1 is of another tokenizer"):
        open_encoded(tmp_path / "a", "codes", 4)


def test_a_run_keeps_the_fingerprint_and_the_statistics(tmp_path: Path, source: Path) -> None:
    from weft.models.section import Section

    class Ratio(Section):
        ratio: int
        mean: tuple[float, ...] | None = None
        std: tuple[float, ...] | None = None

    class Model(Section):
        ratios: tuple[Ratio, ...] = (Ratio(ratio=2), Ratio(ratio=4, mean=(1.0,), std=(2.0,)))

    class Config(Section):
        data: DataConfig
        model: Model

    encode(Blocks("moments"), source, tmp_path / "out")
    data = open_encoded(tmp_path / "out", "latents", ratios={"values": RATIOS, "fixed": 2})
    settled = settle_encoded(Config(data=data.config, model=Model()), data.image_data)  # type: ignore[arg-type]
    assert settled.data.images.tokenizer == "a" * 64  # type: ignore[union-attr]
    measured, given = settled.model.ratios  # type: ignore[attr-defined]
    assert measured.mean == tuple(data.image_data.statistics[2]["mean"])  # type: ignore[union-attr]
    assert (given.mean, given.std) == ((1.0,), (2.0,))


def test_options_that_do_not_fit_get_one_line(tmp_path: Path, source: Path, scores: Path) -> None:
    with pytest.raises(ConfigError, match="codes have one ratio; leave --scores"):
        plan_encoding(Blocks(), source, EncodeOptions(scores=str(scores)))
    with pytest.raises(ConfigError, match="--ratios scored needs --scores"):
        plan_encoding(Blocks("moments"), source, EncodeOptions(ratios="scored"))
    coarse = Blocks("moments")
    coarse.ratios = (8, 16, 32)
    with pytest.raises(DataError, match="16 x 16 pixels, fewer than the coarsest ratio 32"):
        plan_encoding(coarse, source, EncodeOptions())
    encode(Blocks(), source, tmp_path / "out")
    with pytest.raises(DataError, match=r"set data.sequence_length=4"):
        open_encoded(tmp_path / "out", "codes", 16)
    with pytest.raises(
        DataError, match=r"holds codes and data.images.kind is latents; set it to codes"
    ):
        open_encoded(tmp_path / "out", "latents")
    with pytest.raises(DataError, match=r"holds encoded images and data.images.kind is pixels"):
        open_set(tmp_path, tmp_path / "out")


def test_parts_of_arrays_and_ranks() -> None:
    assert part_of("2/8") == (1, 8)
    assert part_of(None, {}) == (0, 1)
    array = {
        f"SLURM_ARRAY_TASK_{k}": v
        for k, v in (("ID", "7"), ("MIN", "4"), ("MAX", "9"), ("STEP", "1"))
    }
    assert part_of(None, array) == (3, 6)
    ranks = {"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}
    assert part_of(None, ranks) == (1, 4)
    assert part_of(None, array | ranks) == (13, 24)
    with pytest.raises(ConfigError, match="--part 9/8 is not K/N"):
        part_of("9/8")
