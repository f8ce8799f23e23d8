"""What metrics.jsonl says of a run against the same training written by hand, on one rank and on two."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny_run import tensors, trace, write_recipe
from weft.launch.local import LocalRanks
from weft.models.batch import IGNORED, PackedBatch
from weft.models.build import build_model
from weft.trainer import train as train_module
from weft.trainer.checkpoint.reading import list_checkpoints
from weft.trainer.configuration.load import load_config, load_run_config
from weft.trainer.configuration.schema import TrainingConfig
from weft.trainer.data.dataset import Dataset, open_data
from weft.trainer.data.loader import PackedLoader, held_out_batches
from weft.trainer.distributed import Topology
from weft.trainer.engines.torch_engine import TorchEngine
from weft.trainer.exit_codes import ExitCode
from weft.trainer.loop import _pack, _unpack
from weft.trainer.train import train

STEPS, EVERY = 8, 4
LENGTH, ROWS = 32, 8
# Records of three steps are written at a time; evaluations and saves come between.
CHANGES: dict[str, Any] = {
    "train__steps": STEPS,
    "schedule__horizon_steps": 10,
    "optimizer__skip_step": False,
    "optimizer__clip_grad_norm": 0.5,
    "logging__every": 3,
    "checkpoint__every": EVERY,
    "eval__every": EVERY,
}
SAME_ON_ALL_RANKS = (
    "step",
    "tokens",
    "flops",
    "lr",
    "target_tokens",
    "target_bytes",
    "first_sample",
    "last_sample",
    "data_digest",
    "source/tales/samples",
    "source/sums/samples",
    "epoch/tales",
    "epoch/sums",
)


def configure(folder: Path, *overrides: str, **changes: Any) -> TrainingConfig:
    recipe = write_recipe(folder, **{**CHANGES, **changes})
    return load_config(str(recipe), list(overrides), folder).config


def records(run: Path, key: str = "loss") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in lines if key in record]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainingConfig:
    """Of a run that has been trained."""
    config = configure(tmp_path_factory.mktemp("whole"))
    assert train(config) == 0
    return config


@pytest.fixture(scope="module")
def data(config: TrainingConfig) -> Dataset:
    return open_data(config.data)


def scheduled(step: int) -> float:
    """Two steps of warm-up to 0.01, then half a cosine to a tenth of it at step 10."""
    return 5e-3 * step if step < 2 else 1e-3 + 4.5e-3 * (1 + math.cos(math.pi * (step - 2) / 8))


def sums_of(model: torch.nn.Module, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy and squared logsumexp, summed over the targets."""
    logits, kept = model(batch, output="logits"), batch.targets != IGNORED
    entropy = torch.nn.functional.cross_entropy(logits[kept], batch.targets[kept], reduction="sum")
    return entropy, logits[kept].logsumexp(-1).square().sum()


def train_by_hand(config: TrainingConfig, data: Dataset) -> tuple[list[dict[str, float]], Any]:
    """The run with torch's own optimizers and no more: values of each step, held-out loss at the evaluations."""
    model = build_model(config.model, seed=config.run.seed)
    table, tokens = model.embedding.ngrams.weight, model.embedding.tokens.weight
    dense = [p for p in model.parameters() if p is not table]
    groups = [
        {"params": [p for p in dense if p is not tokens]},
        {"params": [tokens], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    sparse = torch.optim.SparseAdam([table], betas=(0.9, 0.95), eps=1e-8)
    steps, held_out = [], {}
    with PackedLoader(data, seed=config.run.seed, batch_rows=ROWS) as loader:
        batches = [loader.assemble(step * ROWS).micro_batches for step in range(STEPS)]
    for step, (batch,) in enumerate(batches, 1):
        entropy, z = sums_of(model, batch)
        count = int((batch.targets != IGNORED).sum())
        ((entropy + 1e-5 * z) / count).backward()
        gradients = [*(p.grad for p in dense), table.grad.coalesce().values()]
        norm = torch.cat([g.flatten() for g in gradients]).norm().item()
        clip = min(1.0, 0.5 / norm)
        for p in dense:
            p.grad.mul_(clip)
        table.grad = table.grad.coalesce() * clip
        for group in (*adamw.param_groups, *sparse.param_groups):
            group["lr"] = scheduled(step)
        adamw.step(), sparse.step()
        model.zero_grad()
        steps.append({"loss": entropy.item() / count, "z_loss": z.item() / count, "norm": norm})
        if step % EVERY == 0:
            held_out[step] = {s.name: score_by_hand(model, data, s.name) for s in data.sources}
    return steps, held_out


@torch.no_grad()
def score_by_hand(model: torch.nn.Module, data: Dataset, source: str) -> tuple[float, int, int]:
    """(nats, targets, bytes) of a source's held-out documents."""
    nats = targets = size = 0.0
    for batch in held_out_batches(data, source, 1):
        nats += sums_of(model, batch)[0].item()
        targets += int((batch.targets != IGNORED).sum())
        size += int((batch.targets >= 4).sum())
    return nats, int(targets), int(size)


@pytest.fixture(scope="module")
def by_hand(config: TrainingConfig, data: Dataset) -> tuple[list[dict[str, float]], Any]:
    return train_by_hand(config, data)


def test_losses_and_norms_are_those_of_the_training_by_hand(
    config: TrainingConfig, by_hand: tuple[list[dict[str, float]], Any]
) -> None:
    found = records(config.run_dir)
    assert [r["step"] for r in found] == list(range(1, STEPS + 1))
    for record, expected in zip(found, by_hand[0], strict=True):
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert record["z_loss"] == pytest.approx(expected["z_loss"], rel=1e-5)
        assert record["grad_norm"] == pytest.approx(expected["norm"], rel=1e-4)
        assert record["skipped"] == 0.0
    # The clip was at work, and something was learnt: else a wrong update might pass.
    assert any(expected["norm"] > 0.5 for expected in by_hand[0])
    assert found[-1]["loss"] < found[0]["loss"] - 0.2


def test_counts_follow_from_the_batches(config: TrainingConfig, data: Dataset) -> None:
    model = build_model(config.model, seed=0)
    embedding = model.embedding
    lookups = embedding.tokens.weight.numel() + embedding.ngrams.weight.numel()
    multiplied = sum(p.numel() for p in model.parameters()) - lookups
    # OLMo-core: 6 (parameters - embedding) + 12 L H hd S.
    flops_per_token = 6 * multiplied + 12 * 1 * 2 * 8 * LENGTH
    samples = {"tales": 0, "sums": 0}
    clock = 0.0
    with PackedLoader(data, seed=config.run.seed, batch_rows=ROWS) as loader:
        for step, record in enumerate(records(config.run_dir), 1):
            (batch,) = loader.assemble(ROWS * (step - 1)).micro_batches
            targets = batch.targets[batch.targets != IGNORED]
            # Byte b is id b + 4; what is below stands for no byte.
            size = int((targets >= 4).sum())
            assert record["tokens"] == step * ROWS * LENGTH
            assert record["flops"] == step * ROWS * LENGTH * flops_per_token
            assert (record["target_tokens"], record["target_bytes"]) == (len(targets), size)
            bits = record["loss"] * len(targets) / math.log(2)
            assert record["bits_per_byte"] == pytest.approx(bits / size, rel=1e-9)
            assert record["lr"] == pytest.approx(scheduled(step), rel=1e-12)
            assert (record["first_sample"], record["last_sample"]) == (
                ROWS * (step - 1),
                ROWS * step - 1,
            )
            for source in batch.source_ids:
                samples[data.sources[source].name] += 1
            assert samples == {name: record[f"source/{name}/samples"] for name in samples}
            for source in data.sources:
                passes = (samples[source.name] - 1) // source.sequences
                assert record.get(f"epoch/{source.name}", passes) == passes
            assert record["step_s"] > 0
            assert record["data_wait_s"] >= 0
            assert record["seconds"] > clock
            clock = record["seconds"]


def test_evaluations_come_when_due_and_see_the_weights_of_their_step(
    config: TrainingConfig, by_hand: tuple[list[dict[str, float]], Any]
) -> None:
    found = records(config.run_dir, "eval/loss")
    assert [r["step"] for r in found] == [4, 8]
    for record in found:
        by_source = by_hand[1][record["step"]]
        for name, (nats, targets, size) in by_source.items():
            assert record[f"eval/{name}/loss"] == pytest.approx(nats / targets, rel=1e-5)
            bits = nats / math.log(2) / size
            assert record[f"eval/{name}/bits_per_byte"] == pytest.approx(bits, rel=1e-5)
        nats, targets, _ = (sum(column) for column in zip(*by_source.values(), strict=True))
        assert record["eval/loss"] == pytest.approx(nats / targets, rel=1e-5)
        assert record["eval/tokens"] == targets
    assert found[0]["eval/loss"] > found[1]["eval/loss"]


@pytest.mark.parametrize("micro", [32, 64, 256, None])
def test_micro_batches_do_not_change_the_losses(
    config: TrainingConfig, tmp_path: Path, micro: int | None
) -> None:
    other = configure(tmp_path, train__micro_batch_tokens=micro, eval__every=None)
    assert train(other) == 0
    ours, theirs = records(other.run_dir), records(config.run_dir)
    for key in SAME_ON_ALL_RANKS:
        assert [r.get(key) for r in ours] == [r.get(key) for r in theirs], key
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_another_seed_has_another_data_digest(config: TrainingConfig, tmp_path: Path) -> None:
    other = configure(tmp_path, run__seed=1)
    assert train(other) == 0
    ours, theirs = records(other.run_dir), records(config.run_dir)
    assert all(a["data_digest"] != b["data_digest"] for a, b in zip(ours, theirs, strict=True))


def test_two_ranks_see_the_same_data_and_lose_the_same(
    config: TrainingConfig, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, **CHANGES)
    group = LocalRanks(["train", str(recipe)], 2, tmp_path / "logs" / "two")
    assert group.wait() == [0, 0], group.tail()
    ours, theirs = records(tmp_path / "run"), records(config.run_dir)
    assert len(ours) == STEPS
    for key in SAME_ON_ALL_RANKS:
        assert [r.get(key) for r in ours] == [r.get(key) for r in theirs], key
    for kind in ("loss", "eval/loss"):
        ours, theirs = records(tmp_path / "run", kind), records(config.run_dir, kind)
        for a, b in zip(ours, theirs, strict=True):
            assert a[kind] == pytest.approx(b[kind], rel=1e-5)


def signal_in_evaluation(patch: pytest.MonkeyPatch, at_batch: int) -> list[int]:
    """SIGTERM comes while the first evaluation runs its `at_batch`-th batch."""
    whole, seen = TorchEngine.evaluate, [0]

    def evaluate(self: TorchEngine, batch: PackedBatch) -> Any:
        seen[0] += 1
        if seen[0] == at_batch:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(self, batch)

    patch.setattr(TorchEngine, "evaluate", evaluate)
    return seen


def test_a_stop_in_an_evaluation_saves_and_leaves_no_trace(
    config: TrainingConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stopped = configure(tmp_path, checkpoint__every=None)
    with monkeypatch.context() as patch:
        seen = signal_in_evaluation(patch, at_batch=2)
        assert train(stopped) == ExitCode.STOPPED
        assert seen == [2], "the evaluation went on after the signal"
    assert f"stopped by SIGTERM after step {EVERY}" in capsys.readouterr().out
    run = stopped.run_dir
    assert [info.step for info in list_checkpoints(run)] == [EVERY]
    # Half an evaluation is no evaluation; it is made up for by the next attempt.
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines] == [1, 2, 3, 4]
    assert all("loss" in r for r in lines)
    assert train(load_run_config(run, []).config, run, resume=True) == 0
    assert trace(run) == trace(config.run_dir)
    assert tensors(run, STEPS) == tensors(config.run_dir, STEPS)


def stop_rank_1_in_evaluation(topology: Topology, recipe: str) -> list[int]:
    """(exit code, steps saved) of a run in which rank 1 alone is told to stop."""
    patch = pytest.MonkeyPatch()
    patch.setattr(train_module, "initialise_distributed", lambda *arguments: topology)
    patch.setattr(train_module, "shutdown_distributed", lambda: None)
    if topology.rank == 1:
        signal_in_evaluation(patch, at_batch=2)
    config = load_config(recipe, [], Path(recipe).parent).config
    code = train(config)
    topology.barrier()
    return [code, *(info.step for info in list_checkpoints(config.run_dir))]


def test_a_stop_of_one_rank_in_an_evaluation_stops_all(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, **{**CHANGES, "checkpoint__every": None})
    found = run_ranks(2, "test_loop:stop_rank_1_in_evaluation", str(recipe))
    assert found == [[ExitCode.STOPPED, EVERY]] * 2


def stop_rank_1_in_a_wait_for_data(topology: Topology, recipe: str) -> list[float]:
    """(exit code, seconds from the signal to the end) of a run in which rank 1's data never comes and it is told to stop."""
    patch = pytest.MonkeyPatch()
    patch.setattr(train_module, "initialise_distributed", lambda *arguments: topology)
    patch.setattr(train_module, "shutdown_distributed", lambda: None)
    never, asked = threading.Event(), []
    whole = PackedLoader.assemble

    def assemble(self: PackedLoader, first_sample: int) -> Any:
        if topology.rank == 1 and first_sample >= 3 * ROWS:
            if not asked:
                # By then the steps before are done, and the loop waits for this one.
                time.sleep(1)
                asked.append(time.monotonic())
                os.kill(os.getpid(), signal.SIGTERM)
            never.wait(30)
        return whole(self, first_sample)

    patch.setattr(PackedLoader, "assemble", assemble)
    patch.setattr(PackedLoader, "close", lambda self: never.set())
    config = load_config(recipe, ["data.prefetch_steps=1"], Path(recipe).parent).config
    code = train(config)
    return [code, time.monotonic() - asked[0] if asked else 0.0]


def test_a_stop_is_heard_while_data_is_waited_for(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, **{**CHANGES, "checkpoint__every": None})
    found = run_ranks(2, "test_loop:stop_rank_1_in_a_wait_for_data", str(recipe))
    assert [code for code, _ in found] == [ExitCode.STOPPED] * 2
    assert found[1][1] < 10
    assert [info.step for info in list_checkpoints(tmp_path / "run")] == [3]


def test_an_evaluation_that_a_stop_cut_short_is_made_up_for(
    config: TrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = configure(tmp_path, checkpoint__every=None)
    with monkeypatch.context() as patch:
        signal_in_evaluation(patch, at_batch=2)
        assert train(stopped) == ExitCode.STOPPED
    run = stopped.run_dir
    assert records(run, "eval/loss") == []
    assert train(load_run_config(run, []).config, run, resume=True) == 0
    assert records(run, "eval/loss") == records(config.run_dir, "eval/loss")


def test_a_save_file_saves_and_the_run_goes_on(tmp_path: Path) -> None:
    config = configure(tmp_path, checkpoint__every=None, checkpoint__keep=3)
    config.run_dir.mkdir()
    (config.run_dir / "SAVE").touch()
    assert train(config) == 0
    assert [info.step for info in list_checkpoints(config.run_dir)] == [1, STEPS]
    assert not (config.run_dir / "SAVE").exists()


@pytest.mark.parametrize("ranks", [1, 7, 4096, 2**20 - 1])
def test_flags_of_any_number_of_ranks_are_summed_in_one_integer(ranks: int) -> None:
    for stops in ([1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1], [0, 0, 0]):
        for wants_save, goes_back in ((False, False), (True, False), (False, True), (True, True)):
            packed = _pack(wants_save, goes_back, stops) + (ranks - 1) * _pack(False, False, stops)
            assert packed < 2**63
            assert _unpack(packed) == (wants_save, goes_back, [ranks * s for s in stops])
