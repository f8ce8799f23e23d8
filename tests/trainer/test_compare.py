"""Comparisons of hand-made runs, whose numbers are known, and what is refused or said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from weft.models.blt.config import Config as BltConfig
from weft.models.errors import ConfigError, DataError
from weft.models.transformer.config import Config as TransformerConfig
from weft.trainer.compare import Comparison, compare_runs
from weft.trainer.metrics.compare_plot import plot_comparison
from weft.trainer.metrics.costs import model_costs
from weft.trainer.metrics.curves import Curve, crossover, first_reach, smoothed

SMALL = {
    "family": "transformer",
    "vocab_size": 260,
    "n_layers": 1,
    "d_model": 16,
    "n_heads": 2,
    "d_ff": 32,
}
STEP_TOKENS = 100


def make_run(
    folder: Path,
    values: list[float],
    *,
    model: dict[str, Any] | None = None,
    bytes_per_token: float = 1.0,
    vocabulary: str = "bytes",
    path: str = "corpus",
    key: str = "bits_per_byte",
    sequence_length: int = 64,
) -> Path:
    """A run folder of 100 tokens and 2 seconds a step, with one value of `key` a step."""
    folder.mkdir(parents=True)
    config = {
        "model": model or SMALL,
        "data": {
            "sources": [{"name": "text", "path": path}],
            "vocabulary": vocabulary,
            "sequence_length": sequence_length,
        },
        "train": {"steps": max(1, len(values)), "batch_tokens": sequence_length},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    lines = [
        {
            "step": step,
            "tokens": step * STEP_TOKENS,
            "seconds": 2.0 * step,
            "loss": 1.0,
            key: value,
            "target_tokens": STEP_TOKENS,
            "target_bytes": round(bytes_per_token * STEP_TOKENS),
        }
        for step, value in enumerate(values, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def compare(*folders: Path, **options: Any) -> Comparison:
    return compare_runs(list(folders), **{"window": 1, **options})


def curve(x: list[float], y: list[float]) -> Curve:
    return Curve(np.array(x, float), np.array(y, float))


def test_first_reach_lies_on_the_line_between_two_records() -> None:
    falling = curve([10, 20, 40], [8, 6, 2])
    assert first_reach(falling, 6) == 20
    assert first_reach(falling, 3) == 35
    assert first_reach(falling, 9) == 10
    assert first_reach(falling, 1) is None


def test_the_first_time_counts_and_not_the_last() -> None:
    assert first_reach(curve([1, 2, 3, 4], [5, 3, 5, 1]), 4) == 1.5


def test_crossover_is_the_last_one() -> None:
    a, b = curve([0, 10, 20, 30], [5, 1, 5, 1]), curve([0, 30], [3, 3])
    found = crossover(a, b)
    assert found is not None
    assert (found.x, found.y, found.leader, found.count) == (25.0, 3.0, 0, 3)
    mirrored = crossover(b, a)
    assert mirrored is not None
    assert (mirrored.x, mirrored.leader) == (25.0, 1)


def test_curves_may_touch_lie_apart_or_share_no_cost() -> None:
    flat = curve([0, 10], [2, 2])
    apart = crossover(flat, curve([0, 10], [3, 3]))
    touching = crossover(flat, curve([0, 5, 10], [3, 2, 3]))
    assert apart is not None
    assert touching is not None
    assert (apart.x, apart.leader, apart.count) == (None, 0, 0)
    assert (touching.x, touching.leader, touching.count) == (None, 0, 0)
    same = crossover(flat, flat)
    assert same is not None
    assert same.leader is None
    assert crossover(flat, curve([11, 12], [1, 1])) is None


def test_equal_for_a_while_they_part_where_that_ends() -> None:
    a, b = curve([0, 10, 20, 30], [4, 2, 2, 0]), curve([0, 10, 20, 30], [3, 2, 2, 2])
    found = crossover(a, b)
    assert found is not None
    assert (found.x, found.leader, found.count) == (20.0, 0, 1)


def test_smoothing_does_not_move_a_line() -> None:
    line = curve(list(range(50)), [50 - i for i in range(50)])
    np.testing.assert_allclose(smoothed(line, 10).y[:45], line.y[:45])
    np.testing.assert_array_equal(smoothed(line, 1).y, line.y)


def test_flops_to_match_and_the_ratio(tmp_path: Path) -> None:
    slow = make_run(tmp_path / "slow", [8, 6, 5, 4])
    fast = make_run(tmp_path / "fast", [7, 3, 2])
    found = compare(slow, fast)
    per_byte = found.runs[0].costs.training
    by_pair = {(match.run, match.other): match for match in found.matches}
    match = by_pair["fast", "slow"]
    # 7 at 100 bytes, 3 at 200: 4 is reached at 175 of the 400 that the other took.
    assert match.value == 4
    assert match.at == pytest.approx(175 * per_byte)
    assert match.other_at == pytest.approx(400 * per_byte)
    assert match.ratio == pytest.approx(175 / 400)
    assert by_pair["slow", "fast"].at is None
    assert by_pair["slow", "fast"].ratio is None
    assert found.final(1) == found.best(1) == 2
    assert found.frontier == ["fast"]


def test_a_value_there_from_the_start_is_a_bound(tmp_path: Path) -> None:
    found = compare(make_run(tmp_path / "a", [3, 2]), make_run(tmp_path / "b", [9, 5]))
    match = next(match for match in found.matches if match.run == "a")
    assert match.is_first
    assert match.at == found.runs[0].training_flops[0]


def test_every_axis_has_its_unit(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", [8, 4], bytes_per_token=4, vocabulary="hf:none")
    b = make_run(tmp_path / "b", [8, 6, 4])
    at = {}
    for axis in ("tokens", "bytes", "seconds", "training-flops"):
        found = compare(a, b, against=axis)
        at[axis] = found.smooth[0].x.tolist()
    assert at["tokens"] == [100, 200]
    assert at["bytes"] == [400, 800]
    assert at["seconds"] == [2, 4]
    tokens = TransformerConfig(**SMALL).flops_per_token(32)
    assert at["training-flops"] == pytest.approx([100 * tokens, 200 * tokens])


def test_against_inference_a_run_is_a_point(tmp_path: Path) -> None:
    wide = {**SMALL, "d_model": 32}
    small = make_run(tmp_path / "small", [8, 4])
    better = make_run(tmp_path / "better", [8, 3], model=wide)
    worse = make_run(tmp_path / "worse", [8, 5], model=wide)
    found = compare(small, better, worse, against="inference-flops")
    assert found.frontier == ["small", "better"]
    assert found.matches == []
    assert found.crossings == []
    assert set(found.smooth[0].x) == {found.runs[0].costs.inference}
    assert plot_comparison(found, tmp_path / "points.png").read_bytes().startswith(b"\x89PNG")


def test_loss_of_different_vocabularies_is_refused(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", [8, 4])
    b = make_run(tmp_path / "b", [8, 4], vocabulary="hf:none")
    for metric in ("loss", "eval/loss", "eval/text/perplexity"):
        with pytest.raises(ConfigError, match="different vocabularies") as error:
            compare(a, b, metric=metric)
        assert "\n" not in str(error.value)
    assert compare(a, b).metric == "bits_per_byte"


def test_ids_without_bytes_are_compared_on_loss_and_tokens(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", [8, 4], bytes_per_token=0, key="loss")
    b = make_run(tmp_path / "b", [9, 5], bytes_per_token=0, key="loss")
    found = compare(a, b)
    assert found.metric == "loss"
    assert not found.runs[0].costs.per_byte
    with pytest.raises(ConfigError, match="does not know its bytes"):
        compare(a, b, against="bytes")


def test_unequal_data_are_said(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", [8, 4])
    b = make_run(tmp_path / "b", [8, 4], path="other", sequence_length=128)
    assert compare(a, make_run(tmp_path / "c", [8, 4])).notes == []
    notes = compare(a, b).notes
    assert notes == [
        "a and b read different data: corpus and other",
        "a and b see samples of different lengths: 64 and 128 positions",
    ]


def test_what_cannot_be_compared_is_one_line(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", [8, 4])
    b = make_run(tmp_path / "b", [8, 4])
    empty = make_run(tmp_path / "empty", [])
    with pytest.raises(ConfigError, match="two or more different"):
        compare(a)
    with pytest.raises(ConfigError, match="two or more different"):
        compare(a, a)
    with pytest.raises(DataError, match="no training steps"):
        compare(a, empty)
    with pytest.raises(DataError, match=r"no finite bits_per_bite; it has bits_per_byte, loss$"):
        compare(a, b, metric="bits_per_bite")


def test_values_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", [8, 4])
    b = make_run(tmp_path / "b", [8, 5, 3])
    lines = (
        (b / "metrics.jsonl").read_text().replace('"bits_per_byte": 5', '"bits_per_byte": "NaN"')
    )
    (b / "metrics.jsonl").write_text(lines)
    assert compare(a, b).curves[1].y.tolist() == [8, 3]


def test_all_of_it_is_json_and_a_picture(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a", [8, 6, 3]), make_run(tmp_path / "b", [9, 5, 4])
    found = compare(a, b)
    written = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert [run["final"] for run in written["runs"]] == [3, 4]
    assert [item["leader"] for item in written["crossings"]] == ["a"]
    path = plot_comparison(found, tmp_path / "new" / "plot.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_transformer_costs_what_the_papers_formula_says() -> None:
    model = TransformerConfig(
        n_layers=24, d_model=1280, n_heads=10, d_ff=3413, vocab_size=32000, qk_norm="none"
    )
    # BLT's check: Llama 2 470M, 8k bytes of context at 3.7 bytes a token, 3.14e8 FLOPs a byte.
    costs = model_costs(model, round(8192 / 3.7), bytes_per_token=3.7)
    assert costs.forward == pytest.approx(3.14e8, rel=0.005)
    assert costs.auxiliary == 0
    assert costs.training == 3 * costs.inference


def test_blts_entropy_model_and_tables_stand_apart() -> None:
    entropy = TransformerConfig(
        vocab_size=260, n_layers=14, d_model=768, n_heads=12, d_ff=2048, norm="pre", window=512
    )
    patching = {"scheme": "entropy", "threshold": 1.3, "entropy_model": "e", "entropy": entropy}
    model = BltConfig(patching=patching)
    costs = model_costs(model, 8192, bytes_per_token=1.0, patch_size=4.5)
    counts = model.count_parameters()
    assert costs.table_parameters == counts["ngram_tables"] == 6 * 500_002 * 1024
    assert costs.parameters == sum(counts.values()) - counts["ngram_tables"]
    assert costs.auxiliary_parameters == sum(entropy.count_parameters().values())
    # The specification's table: 9.24e8 at 4.5 bytes a patch, and another 2.1e8 of the entropy model.
    assert costs.forward == pytest.approx(9.24e8, rel=0.005)
    assert costs.auxiliary == pytest.approx(2.1e8, rel=0.02)
    assert costs.training == 3 * costs.forward + costs.auxiliary
    assert costs.inference == costs.forward + costs.auxiliary
    longer = model_costs(model, 8192, bytes_per_token=1.0, patch_size=8.0)
    assert longer.forward == pytest.approx(6.43e8, rel=0.005)
