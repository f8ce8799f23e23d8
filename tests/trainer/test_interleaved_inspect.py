"""What `weft data inspect` counts and shows of documents with images and speech."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from weft.models.errors import DataError
from weft.trainer.data.config import DataConfig
from weft.trainer.data.dataset import Dataset, open_data
from weft.trainer.data.inspect import CUT_OFF, decode_pieces, render_dataset, summarise_packing
from weft.trainer.data.interleaved.inspect import write_images
from weft.trainer.data.loader import PackedLoader

CODES = {
    "modalities": ["text", "speech", "image"],
    "image": {"kind": "codes", "codec": "gray-codes", "size": 2, "codes": 4},
    "speech": {"codes": 9},
    "image_first": 0.0,
    "caption_dropout": 0.0,
}


def open_codes(tmp_path: Path, codec: str | None = "gray-codes") -> Dataset:
    documents = [[{"text": "ab"}, {"speech_codes": [1, 2, 3]}, {"image_codes": [0, 1, 2, 3]}]] * 20
    documents += [[{"text": "long " * 10}]] * 5
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"parts": parts}) + "\n" for parts in documents))
    settings = {**CODES, "image": {**CODES["image"], "codec": codec}}  # type: ignore[dict-item]
    return open_data(
        DataConfig(
            sources=[{"name": "d", "path": str(path), "format": "interleaved"}],
            sequence_length=40,
            held_out={"documents": 0},
            repeat_filter={"enabled": False},
            cache_dir=str(tmp_path / "cache"),
            interleaved=settings,
        )
    )


def test_counts_are_those_of_the_batches(tmp_path: Path) -> None:
    data = open_codes(tmp_path)
    rows = data.sources[0].sequences
    summary = summarise_packing(data, seed=0)
    # Two documents of 14 positions in a row of 40, then five of 51 that are cut after 40.
    assert (summary.samples, rows) == (20, 20)
    assert summary.modalities == {
        "text": (20 * 7 + 5 * 51, 20 * 7 + 5 * 51),
        "speech": (20 * 3, 20 * 3),
        "image": (20 * 4, 20 * 4),
    }
    assert summary.images == pytest.approx(20 / rows)
    used = 20 * 14 + 5 * 51
    assert summary.padding == pytest.approx(1 - used / (40 * rows))
    assert summary.trained == pytest.approx(used / (40 * rows))
    assert summary.cut == pytest.approx(5 / rows)
    assert summary.documents == pytest.approx((20 + 10) / rows)


def test_samples_show_marks_and_cuts(tmp_path: Path) -> None:
    data = open_codes(tmp_path)
    rows = data.sources[0].sequences
    with PackedLoader(data, seed=0, batch_rows=1, end_sample=rows) as loader:
        shown = [
            "".join(text for text, _ in decode_pieces(data, loader.next_step().micro_batches[0]))
            for _ in range(rows)
        ]
    assert sum(text.count("ab <speech 3>  <image 2x2>") for text in shown) == 20
    assert sum(CUT_OFF in text for text in shown) == 5
    assert sum("⟦padding, 12 positions⟧" in text for text in shown) == 10
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for item in render_dataset(data, samples=1):
        console.print(item)
    assert "speech: positions, targets" in console.export_text()


def test_pictures_of_codes_are_written(tmp_path: Path) -> None:
    data = open_codes(tmp_path)
    assert write_images(data, tmp_path / "x.png", seed=0, count=8) == 8
    sheet = np.asarray(Image.open(tmp_path / "x.png"))
    assert [int(sheet[y, x, 0]) for y in (10, 50) for x in (10, 50)] == [0, 85, 170, 255]
    with pytest.raises(DataError, match="nothing makes pictures of them"):
        write_images(open_codes(tmp_path, None), tmp_path / "y.png", seed=0)
