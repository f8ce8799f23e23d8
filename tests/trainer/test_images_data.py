"""Sources of images from files to batches: formats, quarantine, order, crops, classes, and every refusal."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from weft.models.batch import IGNORED, IMAGES, STAND_IN, PackedBatch
from weft.models.errors import DataError
from weft.trainer.data.config import DataConfig, HeldOutConfig, RepeatFilterConfig, SourceConfig
from weft.trainer.data.dataset import Dataset, open_data
from weft.trainer.data.images.augmentation import View, decode_file, draw_view, fit_view
from weft.trainer.data.images.builtin import load_photographs, open_image_builtin, to_png
from weft.trainer.data.images.config import ImagesConfig
from weft.trainer.data.images.rows import open_rows
from weft.trainer.data.loader import PackedLoader, held_out_batches
from weft.trainer.data.prepare import plan_preparation, prepare_source
from weft.trainer.data.shards import Manifest, read_manifest, verify_prepared

LEVELS = "builtin:shapes-images:set=levels,size=16,images=60"


def picture(value: int, size: tuple[int, int] = (9, 7), kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (value, 255 - value, 7)).save(stream, format=kind)
    return stream.getvalue()


def write_folder(root: Path, count: int = 12, bad: int = 0) -> Path:
    """Two classes; the last `bad` images of the first are cut off."""
    for label, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        for i in range(count):
            raw = picture(20 * i + label)
            is_bad = label == 0 and i >= count - bad
            (root / name / f"{i:02d}.png").write_bytes(raw[:40] if is_bad else raw)
    return root


def write_tar(path: Path, rows: list[tuple[int, bytes]]) -> None:
    """A WebDataset of (class, file)."""
    with tarfile.open(path, "w") as archive:
        for i, (label, raw) in enumerate(rows):
            parts = ((".png", raw), (".cls", b"%d\n" % label), (".txt", b"a picture"))
            for ending, content in parts:
                info = tarfile.TarInfo(f"{i:03d}{ending}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def write_tars(root: Path, tars: int = 3, images: int = 40) -> Path:
    """Drawn pictures of 16 pixels in several files, each of which is a shard."""
    root.mkdir()
    made = open_image_builtin(f"builtin:shapes-images:set=levels,size=16,images={tars * images}")
    for k in range(tars):
        drawn = made.images(k * images, (k + 1) * images, 0)
        write_tar(root / f"{k}.tar", [(image.label, to_png(image.pixels)) for image in drawn])
    return root


def prepare(path: Path | str, out: Path, workers: int = 1, **images: Any) -> Manifest:
    plan = plan_preparation(
        SourceConfig(name="s", path=str(path)),
        "",
        held_out=HeldOutConfig(documents=3),
        repeats=RepeatFilterConfig(),
        images=ImagesConfig(**images),
    )
    return prepare_source(plan, out, workers=workers, quiet=True)


def open_set(tmp: Path, *paths: Path | str, **images: Any) -> Dataset:
    return open_data(
        DataConfig(
            sources=[{"name": f"s{i}", "path": str(path)} for i, path in enumerate(paths)],
            sequence_length=1,
            held_out={"documents": 3},
            cache_dir=str(tmp / "cache"),
            images={"size": 8, **images},
        )
    )


def test_a_folder_a_tar_and_parquet_give_the_same_images(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder")
    rows = [
        (label, path.read_bytes())
        for label, name in enumerate(("cat", "dog"))
        for path in sorted((folder / name).iterdir())
    ]
    write_tar(tmp_path / "a.tar", rows)
    table = {
        "image": [{"bytes": raw, "path": None} for _, raw in rows],
        "label": [r[0] for r in rows],
    }
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet", row_group_size=5)
    found = {}
    for source in (folder, tmp_path / "a.tar", tmp_path / "a.parquet"):
        out = tmp_path / f"{source.name}.out"
        manifest = prepare(source, out)
        verify_prepared(out)
        train, held_out = open_rows("s", out, manifest)
        kept = [held_out[i] for i in range(held_out.sequences)]
        found[source.name] = sorted((i.sha256, i.label) for i in kept)
        assert [train[i].raw for i in range(3)] == [
            raw for raw in (r[1] for r in rows) if raw not in {k.raw for k in kept}
        ][:3]
        assert manifest.images is not None
        assert manifest.images["class_counts"] == [12, 12]
        assert manifest.images["smallest"][:2] == [7, 9]
    # Held out by content: the same in every format.
    assert found["folder"] == found["a.tar"] == found["a.parquet"]
    assert read_manifest(tmp_path / "a.tar.out").shards[0].read_names(tmp_path / "a.tar.out")[
        0
    ] == (
        "a.tar/000",
        "a picture",
    )


def test_preparing_is_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    tars = write_tars(tmp_path / "tars", images=8)
    one, two = (prepare(tars, tmp_path / str(n), workers=n) for n in (1, 2))
    assert len(one.shards) == 3
    assert one == two


def test_unreadable_images_are_logged_and_replaced_by_the_next_of_their_class(
    tmp_path: Path,
) -> None:
    folder = write_folder(tmp_path / "folder", bad=1)
    with pytest.raises(
        DataError,
        match=r"1 of 24 images cannot be read, more than data.images.max_bad_share=0.001 allows; the first is cat/11.png",
    ):
        prepare(folder, tmp_path / "out")
    manifest = prepare(folder, tmp_path / "out", max_bad_share=0.05)
    assert manifest.images is not None
    assert manifest.documents == 24
    assert manifest.images["class_counts"] == [12, 12]
    (line,) = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    entry = json.loads(line)
    assert (entry["shard"], entry["place"], entry["name"]) == ("shard_00000", 11, "cat/11.png")
    assert entry["replaced_by"] == "cat/10.png"
    names = manifest.shards[0].read_names(tmp_path / "out")
    assert names[10] == names[11]


def test_batches_hold_what_the_design_says(tmp_path: Path) -> None:
    data = open_set(tmp_path, LEVELS, ratios={"values": [2, 4, 8], "assignment": "random"})
    with PackedLoader(data, seed=1, batch_rows=12) as loader:
        batch = loader.next_step().micro_batches[0]
    assert batch.side["pixels"].shape == (12, 3, 8, 8)
    assert batch.side["pixels"].dtype == torch.uint8
    assert batch.side["image_keys"].tolist() == [[s, 0] for s in batch.sample_ids]
    assert batch.targets.tolist() == [IGNORED] * 12
    assert (batch.target_count, batch.row_length, batch.max_seqlen) == (12, 1, 1)
    assert batch.cu_seqlens.tolist() == list(range(13))
    counts = [batch.host_counts[f"images_{ratio}"] for ratio in (2, 4, 8)]
    assert counts == torch.bincount(batch.side["ratio"].long(), minlength=3).tolist()
    assert batch.host_counts[IMAGES] == 12
    assert set(batch.tokens.tolist()) <= {0, 1, 2}


def by_sample(batches: list[PackedBatch]) -> dict[int, bytes]:
    return {
        sample: batch.side["pixels"][row].numpy().tobytes() + bytes([int(batch.side["ratio"][row])])
        for batch in batches
        for row, sample in enumerate(batch.sample_ids)
    }


def test_any_ranks_threads_and_restarts_give_the_same_samples(tmp_path: Path) -> None:
    ratios = {"values": [2, 4, 8], "assignment": "random", "shares": [0.2, 0.3, 0.5]}
    data = open_set(tmp_path, LEVELS, ratios=ratios, resize=(8, 12))

    def take(
        ranks: int, start: int = 0, threads: int = 1, micro: int | None = None
    ) -> dict[int, bytes]:
        batches = []
        for rank in range(ranks):
            with PackedLoader(
                data, seed=5, batch_rows=8, micro_batch_rows=micro, data_rank=rank, data_ranks=ranks,
                start_sample=start, end_sample=160, threads=threads,
            ) as loader:  # fmt: skip
                steps = (160 - start) // 8
                batches += [b for _ in range(steps) for b in loader.next_step().micro_batches]
        return by_sample(batches)

    whole = take(1)
    assert take(4, threads=3, micro=2) == whole
    late = take(2, start=96)
    assert late == {sample: value for sample, value in whole.items() if sample >= 96}
    # 57 images in 160 samples: the same picture comes in other crops.
    assert len(set(whole.values())) > 57


def test_views_follow_from_seed_and_sample() -> None:
    config = ImagesConfig(size=8, resize=(8, 16))
    views = [draw_view(config, 3, sample) for sample in range(200)]
    assert views == [draw_view(config, 3, sample) for sample in range(200)]
    assert {view.shorter for view in views} == set(range(8, 17))
    assert 70 < sum(view.flip for view in views) < 130
    still = ImagesConfig(size=8, crop="center", flip=False)
    assert {draw_view(still, 3, sample) for sample in range(20)} == {View(8, 0.5, 0.5, False)}


def test_squares_lie_where_their_view_says() -> None:
    pixels = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3)
    assert (fit_view(pixels, 4) == pixels[1:5]).all()
    assert (fit_view(pixels, 4, View(None, 1.0, 0.0, True)) == pixels[2:, ::-1]).all()
    assert (fit_view(pixels, 2, View(4, 0.0, 1.0)) == pixels[:2, 2:]).all()
    large = np.repeat(np.repeat(pixels, 8, 0), 8, 1)
    assert fit_view(large, 4).shape == (4, 4, 3)
    assert abs(fit_view(large, 4).astype(int) - pixels[1:5]).max() <= 6


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "I;16", "P"])
def test_kinds_of_pictures(mode: str) -> None:
    stream = io.BytesIO()
    if mode == "I;16":
        Image.fromarray(np.full((5, 6), 65535 // 2, np.uint16)).save(stream, format="PNG")
    else:
        plain = Image.new("RGB", (6, 5), (128, 128, 128))
        image = plain.quantize(4) if mode == "P" else plain.convert(mode)
        image.save(stream, format="TIFF" if mode == "CMYK" else "PNG")
    for channels in (1, 3):
        pixels = decode_file(stream.getvalue(), "x", channels)
        assert pixels.shape == (5, 6, channels)
        assert abs(pixels.astype(int) - 128).max() < 4


def test_held_out_images_are_the_middle_squares_and_ranks_give_equally_many_batches(
    tmp_path: Path,
) -> None:
    data = open_set(tmp_path, LEVELS)
    batches = [list(held_out_batches(data, "s0", 2, rank, 2)) for rank in range(2)]
    assert [len(part) for part in batches] == [1, 1]
    assert [b.sample_ids for part in batches for b in part] == [(0, 1), (2,)]
    three = [list(held_out_batches(data, "s0", 2, rank, 3)) for rank in range(3)]
    assert [b.host_counts.get(STAND_IN, 0) for part in three for b in part] == [0, 0, 1]
    assert [b.target_count for part in three for b in part] == [2, 1, 0]
    rows = data.sources[0].held_out
    expected = fit_view(decode_file(rows[0].raw, "x", 3), 8)  # type: ignore[index, attr-defined]
    assert (batches[0][0].side["pixels"][0].numpy().transpose(1, 2, 0) == expected).all()


def test_photographs_hold_out_their_right_third() -> None:
    made = open_image_builtin("builtin:photos:size=32,images=60")
    images = list(made.images(0, 60, held_out=5))
    photographs = load_photographs()
    for i, image in enumerate(images):
        top, left = map(int, image.name.split("-")[1:])
        assert (photographs[image.label][top : top + 32, left : left + 32] == image.pixels).all()
        assert image.may_be_held_out == (i < 5) == (left + 32 > 640 * 2 // 3)


def test_more_complex_shapes_have_more_detail() -> None:
    def detail(path: str) -> float:
        images = open_image_builtin(path).images(0, 20, 0)
        return float(
            np.mean([np.abs(np.diff(i.pixels.astype(int), axis=1)).mean() for i in images])
        )

    path = "builtin:shapes-images:set=levels,gradients=0,glyphs=0,complexity={}"
    assert detail(path.format(0.2)) < detail(path.format(1)) < detail(path.format(4))
    path = "builtin:shapes-images:noise=0,complexity={}"
    assert detail(path.format(1)) < detail(path.format(6))


def test_a_resume_on_other_images_or_crops_is_refused(tmp_path: Path) -> None:
    saved = json.loads(json.dumps(open_set(tmp_path, LEVELS).fingerprint))
    open_set(tmp_path, LEVELS).check_fingerprint(saved)
    with pytest.raises(DataError, match="images was"):
        open_set(tmp_path, LEVELS, flip=False).check_fingerprint(saved)
    with pytest.raises(DataError, match="source 's0' has other content"):
        open_set(tmp_path, LEVELS + ",seed=1").check_fingerprint(saved)


def test_classes_are_counted_over_all_sources(tmp_path: Path) -> None:
    only = "builtin:shapes-images:set=levels,size=16,images=40,seed={},gradients={},rectangles={},glyphs={}"
    first, last = only.format(1, 1, 1, 0), only.format(2, 0, 0, 1)
    assert open_set(tmp_path, first, last).image_data.classes == 3  # type: ignore[union-attr]
    with pytest.raises(DataError, match=r"class 2 of 0 to 2 has no images in s0"):
        open_set(tmp_path, first, classes=3)
    assert open_set(tmp_path, first, classes=3, allow_empty_classes=True).image_data is not None
    with pytest.raises(
        DataError, match=r"has an image of class 2 and data.images.classes=2 allows 0 to 1"
    ):
        open_set(tmp_path, first, last, classes=2)


def test_bad_folders_get_one_line(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder")
    (folder / "owl").mkdir()
    with pytest.raises(DataError, match=r"class 'owl' has no images; put some into"):
        prepare(folder, tmp_path / "out")
    (folder / "owl").rmdir()
    (folder / "x.png").write_bytes(picture(1))
    with pytest.raises(DataError, match=r"x.png lies beside the classes' folders"):
        prepare(folder, tmp_path / "out")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("words")
    with pytest.raises(DataError, match=r"holds no images; expected an image folder"):
        prepare(tmp_path / "text", tmp_path / "out")
    with pytest.raises(DataError, match=r"no built-in images 'python-stdlib'; there is digits"):
        prepare("builtin:python-stdlib", tmp_path / "out")


def test_settings_that_cannot_work_get_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has 16 x 16 pixels, fewer than the coarsest ratio 32"):
        open_set(tmp_path, LEVELS, size=64, ratios={"assignment": "random"})
    with pytest.raises(DataError, match=r"data.images.ratios.scores is not set"):
        open_set(tmp_path, LEVELS, ratios={"values": [2, 4, 8]})
    with pytest.raises(ValueError, match=r"size 16 is smaller than the coarsest ratio 32"):
        ImagesConfig(size=16, ratios={})
    with pytest.raises(ValueError, match=r"set data.sequence_length=1"):
        DataConfig(images={})
    prepare(LEVELS, tmp_path / "p")
    with pytest.raises(DataError, match=r"holds no encoded images and data.images.kind is latents"):
        open_set(tmp_path, tmp_path / "p", kind="latents")
