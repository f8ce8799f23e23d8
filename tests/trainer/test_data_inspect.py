"""What `weft data inspect` counts and shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from weft.trainer.data.config import DataConfig, HeldOutConfig, SourceConfig
from weft.trainer.data.dataset import Dataset, open_data
from weft.trainer.data.inspect import (
    BORDER,
    CUT_OFF,
    NO_LOSS,
    decode_pieces,
    render_dataset,
    summarise_lengths,
    summarise_packing,
)
from weft.trainer.data.loader import PackedLoader


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    root = tmp_path / "in"
    root.mkdir()
    for i in range(40):
        (root / f"{i:02d}.txt").write_text(
            f"document {i:02d}. " + ("=" * 100 if i % 10 == 0 else "words " * 4)
        )
    return open_data(
        DataConfig(
            sources=(SourceConfig(name="small", path=str(root)),),
            sequence_length=80,
            held_out=HeldOutConfig(documents=2),
            cache_dir=str(tmp_path / "cache"),
        )
    )


def test_lengths_fall_into_powers_of_two() -> None:
    summary = summarise_lengths(np.array([3, 4, 7, 8, 100]))
    assert summary.histogram == ((4, 1), (8, 2), (16, 1), (32, 0), (64, 0), (128, 1))
    assert (summary.documents, summary.mean, summary.longest) == (5, 24.4, 100)
    assert summary.percentiles == (3, 3, 7, 100, 100)


def test_packing_is_what_the_loader_gives(data: Dataset) -> None:
    summary = summarise_packing(data, seed=0, samples=10_000)
    rows = data.sources[0].sequences
    assert summary.samples == rows
    with PackedLoader(data, seed=0, batch_rows=1, end_sample=rows) as loader:
        batches = [loader.next_step().micro_batches[0] for _ in range(rows)]
    assert summary.trained == pytest.approx(sum(b.target_count for b in batches) / (80 * rows))
    assert summary.filtered == pytest.approx(sum(b.target_count == 0 for b in batches) / rows)
    assert 0 < summary.filtered < 0.5
    assert summary.documents == pytest.approx(sum(len(b.cu_seqlens) - 1 for b in batches) / rows)
    assert 0 < summary.cut <= 1


def test_samples_show_their_borders(data: Dataset) -> None:
    with PackedLoader(data, seed=0, batch_rows=1, end_sample=data.sources[0].sequences) as loader:
        batches = [loader.next_step().micro_batches[0] for _ in range(data.sources[0].sequences)]
    for batch in batches:
        texts = [text for text, _ in decode_pieces(data, batch)]
        assert sum(BORDER in text for text in texts) == len(batch.cu_seqlens) - 2
        assert any(CUT_OFF in text for text in texts) == (int(batch.tokens[-1]) != 2)
        assert any(NO_LOSS in text for text in texts) == (batch.target_count == 0)
    assert any("document" in text for text, _ in decode_pieces(data, batches[0]))


def test_everything_is_rendered(data: Dataset) -> None:
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for item in render_dataset(data, samples=2):
        console.print(item)
    text = console.export_text()
    assert "Sources, vocabulary bytes (260 ids)" in text
    assert "small" in text
    assert "Document lengths of small" in text
    assert "rows silenced by the repeat filter" in text
    assert "sample 1 from small" in text
    assert data.sources[0].manifest.fingerprint[:12] in text
