"""A replayed step is the step the run made: on any number of ranks, from any checkpoint, streamed or not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_base_weights import LOOKED_AT, BasedTask
from tiny_run import poison, write_recipe
from weft.launch.local import LocalRanks
from weft.models.errors import CheckpointError, ConfigError
from weft.trainer import opening
from weft.trainer.checkpoint.layout import step_folder
from weft.trainer.checkpoint.reading import read_manifest, read_tensor
from weft.trainer.configuration.load import load_config, load_run_config
from weft.trainer.replay import replay as replay_module
from weft.trainer.replay.replay import ReplayOptions, replay_step
from weft.trainer.replay.report import ReplayReport
from weft.trainer.train import train

STEPS, EVERY = 8, 3
CHANGES: dict[str, Any] = {
    "train__steps": STEPS,
    "checkpoint__every": EVERY,
    "checkpoint__keep": 9,
    "model__n_layers": 3,
    "model__d_ff": 40,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps on one rank; checkpoints at 3, 6 and 8."""
    folder = tmp_path_factory.mktemp("whole")
    config = load_config(str(write_recipe(folder, **CHANGES)), [], folder).config
    assert train(config) == 0
    return config.run_dir


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on two ranks that share the weights."""
    folder = tmp_path_factory.mktemp("sharded")
    recipe = write_recipe(folder, **CHANGES, parallel__strategy="fsdp")
    group = LocalRanks(["train", str(recipe)], 2, folder / "out")
    assert group.wait() == [0, 0], group.tail()
    return folder / "run"


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


def replay(run: Path, step: int | None, *overrides: str, **options: Any) -> ReplayReport:
    return replay_step(run, ReplayOptions(step=step, **options), overrides)


def contents(run: Path) -> dict[str, tuple[int, bytes]]:
    files = (p for p in run.rglob("*") if p.is_file())
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in files}


@pytest.mark.parametrize(("step", "checkpoint"), [(1, None), (3, None), (4, 3), (6, 3), (8, 6)])
def test_a_step_of_one_rank_is_replayed_to_the_bit(
    run: Path, step: int, checkpoint: int | None
) -> None:
    report = replay(run, step)
    assert report.checkpoint == checkpoint
    names = {c.name for c in report.comparisons}
    assert names >= {"loss", "z_loss", "grad_norm", "skipped", "lr", "data_digest"}
    assert [c.name for c in report.comparisons if not c.is_equal] == []
    assert report.notes == []


def test_nothing_in_the_run_folder_is_touched(run: Path) -> None:
    before = contents(run)
    replay(run, 5, reference=True)
    replay(run, 4, stream=True)
    assert contents(run) == before


def test_a_step_of_two_sharded_ranks_is_replayed_in_one_process(sharded: Path) -> None:
    report = replay(sharded, 5)
    assert report.ranks == 2
    assert report.micro_batches == 2
    found = {c.name: c for c in report.comparisons}
    assert found["data_digest"].is_equal
    assert found["loss"].relative_difference < 1e-6
    assert found["grad_norm"].relative_difference < 1e-5


def test_the_shares_of_the_ranks_make_up_the_step(sharded: Path) -> None:
    whole = replay(sharded, 5)
    shares = [replay(sharded, 5, rank=rank) for rank in range(2)]
    targets = [share.values["target_tokens"] for share in shares]
    loss = sum(s.values["loss"] * t for s, t in zip(shares, targets, strict=True)) / sum(targets)
    assert loss == pytest.approx(whole.values["loss"], rel=1e-6)
    assert shares[0].last_sample + 1 == shares[1].first_sample
    assert (shares[0].first_sample, shares[1].last_sample) == (
        whole.first_sample,
        whole.last_sample,
    )
    assert not shares[0].comparisons
    with pytest.raises(ConfigError, match=r"no rank 2.*ranks 0 to 1"):
        replay(sharded, 5, rank=2)


def test_the_number_of_ranks_cuts_the_micro_batches(run: Path) -> None:
    report = replay(run, 4, "train.micro_batch_tokens=null", ranks=4)
    assert report.micro_batches == 4
    with pytest.raises(ConfigError, match=r"8 samples a step do not divide over 3 ranks"):
        replay(run, 4, ranks=3)


@pytest.mark.parametrize(
    ("step", "message"),
    [(0, "no step 0"), (-1, "no step -1"), (9, "has 8 steps; the last recorded one is 8")],
)
def test_steps_that_never_were(run: Path, step: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replay(run, step)


def test_a_module_that_is_not_there(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"no module 'model.blocks.9.mlp'; there is model.blocks"):
        replay(run, 4, break_at="model.blocks.9.mlp")


def test_without_a_step_it_is_the_last_recorded_one(copy: Path) -> None:
    assert replay(copy, None).step == STEPS
    (copy / "metrics.jsonl").unlink()
    with pytest.raises(ConfigError, match="no recorded step yet"):
        replay(copy, None)


def test_without_records_the_order_gives_the_samples(run: Path, copy: Path) -> None:
    (copy / "metrics.jsonl").unlink()
    found, expected = replay(copy, 5), replay(run, 5)
    assert found.comparisons == []
    assert found.values == expected.values


def test_samples_that_a_rollback_left_out_are_left_out_without_records(copy: Path) -> None:
    (copy / "metrics.jsonl").unlink()
    path = step_folder(copy, STEPS)
    manifest = read_manifest(path)
    manifest.state["train"]["left_out"] = [[24, 32]]
    (path / "manifest.json").write_text(json.dumps(manifest.to_json()))
    assert replay(copy, 4).first_sample == 32


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(run: Path, copy: Path) -> None:
    file = next(step_folder(copy, 6).glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(bytes(data))
    report = replay(copy, 8)
    assert report.checkpoint == 3
    assert any("step_00000006 is damaged" in note for note in report.notes)
    assert all(c.is_equal for c in report.comparisons)


def test_a_batch_that_was_changed_midway_goes_by_the_records(copy: Path) -> None:
    for late in (6, 8):
        shutil.rmtree(step_folder(copy, late))
    (copy / "checkpoints" / "latest").write_text("step_00000003\n")
    config = load_run_config(copy, ["train.batch_tokens=512", "optimizer.lr=0.002"]).config
    assert train(config, copy, resume=True) == 0
    early, late_report = replay(copy, 2), replay(copy, 7)
    assert (early.last_sample, late_report.last_sample) == (15, 24 + 4 * 16 - 1)
    assert [c.name for c in (*early.comparisons, *late_report.comparisons) if not c.is_equal] == []
    assert any("step 2 had 8 samples, but config.yaml says 16" in note for note in early.notes)
    assert any("learning rates" in note for note in early.notes)
    assert late_report.notes == []


def test_a_run_of_gpus_is_replayed_on_a_cpu_with_a_note(copy: Path) -> None:
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(
        text.replace("device: cpu", "device: cuda").replace("strategy: auto", "strategy: fsdp")
    )
    report = replay(copy, 4)
    assert any("run.device is cuda" in note for note in report.notes) == (report.device == "cpu")
    assert all(c.is_equal for c in report.comparisons if report.device == "cpu")


def test_bf16_is_replayed_in_bf16_or_in_fp32(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, **CHANGES, precision__compute="bf16")
    assert train(load_config(str(recipe), [], tmp_path).config) == 0
    same = replay(tmp_path / "run", 5)
    assert all(c.is_equal for c in same.comparisons)
    plain = replay(tmp_path / "run", 5, fp32=True)
    assert not {c.name: c for c in plain.comparisons}["loss"].is_equal
    assert any("computed in bf16" in note for note in plain.notes)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("parameter", "module", "own"),
    [
        ("model/blocks.1.mlp.up_proj.weight", "model.blocks.1.mlp.up_proj", False),
        ("model/blocks.0.attention.k_norm.weight", "model.blocks.0.attention.k_norm", False),
        ("model/norm.weight", "model.norm", False),
        ("model/head.weight", "model", True),
    ],
)
def test_a_weight_that_is_not_a_number_names_its_module(
    copy: Path, parameter: str, module: str, own: bool, stream: bool
) -> None:
    poison(copy, 3, parameter)
    report = replay(copy, 4, stream=stream)
    first = report.phases[0].first_non_finite
    assert first is not None
    assert (first.where, first.module, first.own) == ("forward", module, own)
    assert first.parameters == (parameter.replace("/", "."),)
    bad = [p.name for p in report.phases[0].parameters if p.weight_non_finite]
    assert bad == [parameter]


def test_the_losses_of_samples_add_up_to_the_step(run: Path) -> None:
    report = replay(run, 5)
    targets = sum(s.targets for s in report.samples)
    total = sum(s.loss * s.targets for s in report.samples if s.loss is not None)
    assert total / targets == pytest.approx(report.values["loss"], rel=1e-6)
    assert sorted(s.sample for s in report.samples) == list(range(32, 40))
    losses = [s.loss for s in report.samples if s.loss is not None]
    assert losses == sorted(losses, reverse=True)
    assert {report.source_names[s.source] for s in report.samples} <= {"tales", "sums"}
    assert any("cat" in report.excerpt(s) for s in report.samples)


def test_modules_come_in_order_of_execution_with_outputs_and_gradients(run: Path) -> None:
    (phase,) = replay(run, 5).phases
    names = [m.name for m in phase.modules]
    assert names[:3] == ["model", "model.embedding", "model.embedding.tokens"]
    assert names.index("model.blocks.0.mlp") < names.index("model.blocks.1") < len(names) - 1
    block = phase.modules[names.index("model.blocks.1")]
    assert block.output.count == block.gradient.count == 8 * 32 * 16
    assert block.output.abs_max >= block.output.std > 0
    assert phase.first_non_finite is None


def test_updates_are_measured_against_weights(run: Path) -> None:
    (phase,) = replay(run, 5).phases
    by_name = {p.name: p for p in phase.parameters}
    head, table = by_name["model/head.weight"], by_name["model/embedding.ngrams.weight"]
    assert head.update_ratio is not None
    assert 1e-4 < head.update_ratio < 1
    assert table.update_ratio is not None
    assert table.update_ratio > 0
    assert table.gradient is not None
    assert table.gradient.count < np.prod(table.shape)
    total = sum(p.gradient_norm**2 for p in phase.parameters if p.gradient_norm) ** 0.5
    assert total == pytest.approx({**replay(run, 5).values}["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("rank", [None, 0])
def test_a_streamed_replay_is_the_same_with_one_block_of_weights(
    run: Path, rank: int | None
) -> None:
    whole, streamed = replay(run, 7, rank=rank), replay(run, 7, rank=rank, stream=True)
    for name in ("loss", "z_loss", "data_digest"):
        assert streamed.values[name] == whole.values[name]
    assert streamed.values["grad_norm"] == pytest.approx(whole.values["grad_norm"], rel=1e-6)
    ours, theirs = whole.to_dict()["phases"][0], streamed.to_dict()["phases"][0]
    assert ours["modules"] == theirs["modules"]
    assert whole.samples == streamed.samples
    measured = ("weight_norm", "gradient_norm", "gradient")
    expected = {p["name"]: [p[key] for key in measured] for p in ours["parameters"]}
    assert {p["name"]: [p[key] for key in measured] for p in theirs["parameters"]} == expected
    sizes = {p.name: 4 * int(np.prod(p.shape)) for p in whole.phases[0].parameters}
    block = sum(size for name, size in sizes.items() if ".0." in name or "/blocks.0." in name)
    outside = sum(size for name, size in sizes.items() if "blocks." not in name)
    assert streamed.peak_weight_bytes == outside + block


def test_one_micro_batch_is_streamed_without_files(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = replay(run, 7, "train.micro_batch_tokens=null")
    monkeypatch.delattr(torch, "from_file")
    streamed = replay(run, 7, "train.micro_batch_tokens=null", stream=True)
    norms = [
        {p.name: p.gradient_norm for p in report.phases[0].parameters}
        for report in (whole, streamed)
    ]
    assert norms[0] == norms[1]


def test_bf16_is_streamed_as_it_is_trained(copy: Path) -> None:
    override = "precision.compute=bf16"
    whole, streamed = replay(copy, 4, override), replay(copy, 4, override, stream=True)
    assert whole.values["loss"] == streamed.values["loss"]
    assert whole.compute == "bf16"


@pytest.mark.parametrize(("step", "nearest"), [(6, 7), (3, 4), (1, 4)])
def test_only_a_step_right_after_a_checkpoint_is_streamed(
    run: Path, step: int, nearest: int
) -> None:
    with pytest.raises(CheckpointError, match=rf"the nearest is --step {nearest}, or leave out"):
        replay(run, step, stream=True)


def test_the_reference_kernels_agree_with_those_that_ran(run: Path) -> None:
    report = replay(run, 5, reference=True)
    assert report.kernels in ("cpu", "triton")
    names = [d.name for d in report.kernel_differences]
    assert names[0] == "model"
    assert "model.blocks.2.mlp_norm" in names
    worst = max(max(d.output, d.gradient) for d in report.kernel_differences)
    assert worst < 1e-4
    # The step itself was not disturbed by the two passes before it.
    assert all(c.is_equal for c in report.comparisons)


def test_the_report_is_strict_json(copy: Path) -> None:
    poison(copy, 3, "model/norm.weight")
    found = json.loads(json.dumps(replay(copy, 4).to_dict(), allow_nan=False))
    assert found["values"]["loss"] == "NaN"
    assert found["phases"][0]["first_non_finite"]["module"] == "model.norm"
    assert found["samples"][0]["text"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_weights_that_stay_in_another_run_are_found_there(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    class Task(BasedTask):
        source = str(run)

    for module in (opening, replay_module):
        monkeypatch.setattr(module, "build_task", Task)
    recipe = write_recipe(tmp_path, **CHANGES)
    assert train(load_config(str(recipe), [], tmp_path).config) == 0
    expected = read_tensor(step_folder(run, STEPS), f"parameters/model/{LOOKED_AT}")
    Task.seen = None
    report = replay(tmp_path / "run", 4, stream=stream)
    assert Task.seen is not None
    assert torch.equal(Task.seen, expected)
    assert {c.name: c for c in report.comparisons}["loss"].is_equal
    Task.source = str(step_folder(run, EVERY))
    with pytest.raises((CheckpointError, ConfigError), match=r"model.base holds other weights"):
        replay(tmp_path / "run", 4, stream=stream)
