"""A run that is killed, stopped, damaged or moved goes on as if nothing had happened, or says why it cannot."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import tensors, trace, write_recipe
from weft.models.errors import CheckpointError, ConfigError, DataError, TrainingError, WeftError
from weft.models.task import LossOutput, LossTerm
from weft.models.transformer.task import TransformerTask
from weft.trainer.checkpoint.reading import list_checkpoints
from weft.trainer.configuration.load import load_config, load_run_config
from weft.trainer.exit_codes import ExitCode
from weft.trainer.train import train

KILLS = 25


def run_new(folder: Path, *overrides: str, **changes: Any) -> Path:
    recipe = write_recipe(folder, **changes)
    config = load_config(str(recipe), list(overrides), recipe.parent).config
    assert train(config) == 0
    return config.run_dir


def resume(run: Path, *overrides: str) -> int:
    return train(load_run_config(run, list(overrides)).config, run, resume=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_new(tmp_path_factory.mktemp("undisturbed"))


def same_run(run: Path, other: Path) -> None:
    """Every step's numbers and every tensor at the end, to the bit."""
    steps = trace(run)
    assert steps == trace(other)
    assert tensors(run, len(steps)) == tensors(other, len(steps))


# A process that has imported everything forks attempts and kills each of them: while it opens the run, or within some
# steps of its first. What either takes is measured first, so that a slow machine kills no sooner.
ATTEMPTS = """
import json, os, random, signal, sys, time
sys.path[:0] = {path!r}
import torch
torch.set_num_threads(1)
from pathlib import Path
import weft.trainer.checkpoint.manager, weft.trainer.engines.torch_engine, weft.trainer.train as module
from weft.trainer.configuration.load import load_config, load_run_config

recipe, kills, chance = {recipe!r}, {kills}, random.Random(20)
config = load_config(recipe, [], Path(recipe).parent).config
run, fit = config.run_dir, module.fit

def start(config, resume):
    "A child that trains, and a pipe that says when its first step is done."
    stepped, say = os.pipe()
    child = os.fork()
    if child == 0:
        def watched(run, stop):
            log = run.recorder.log
            run.recorder.log = lambda *record: (os.write(say, b"x"), log(*record))[1]
            return fit(run, stop)
        module.fit = watched
        os._exit(module.train(config, resume=resume))
    os.close(say)
    return child, stepped

def measure():
    elsewhere = config.run.model_copy(update={{"dir": str(run.parent / "measured")}})
    begin = time.monotonic()
    child, stepped = start(config.model_copy(update={{"run": elsewhere}}), False)
    os.read(stepped, 1)
    middle = time.monotonic()
    os.waitpid(child, 0)
    return middle - begin, (time.monotonic() - middle) / config.train.steps

first_s, step_s = measure()
outcomes = []
while len(outcomes) < kills:
    resume = (run / "config.yaml").exists()
    child, stepped = start(load_run_config(run, []).config if resume else config, resume)
    if chance.random() < 0.3:
        time.sleep(chance.uniform(0, first_s))
    else:
        os.read(stepped, 1)
        time.sleep(chance.uniform(0, 6 * step_s))
    os.close(stepped)
    os.kill(child, signal.SIGKILL)
    outcomes.append(os.waitpid(child, 0)[1])
print(json.dumps(outcomes))
"""


def test_kill_9_at_random_instants_leaves_no_trace(tmp_path: Path) -> None:
    undisturbed = run_new(tmp_path / "undisturbed", "train.steps=60")
    recipe = write_recipe(tmp_path, train__steps=60)
    script = ATTEMPTS.format(path=sys.path, recipe=str(recipe), kills=KILLS)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout.splitlines()[-1])
    assert outcomes.count(signal.SIGKILL) >= KILLS // 2, outcomes
    run = tmp_path / "run"
    before = list_checkpoints(run)
    assert before, "no attempt came as far as its first save"
    if before[-1].step < 60:
        assert resume(run) == 0
    same_run(run, undisturbed)
    assert not list((run / "checkpoints").glob("*.tmp-*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_saves_and_stops(
    tmp_path: Path, undisturbed: Path, number: signal.Signals
) -> None:
    recipe = write_recipe(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "weft", "train", str(recipe), "checkpoint.every=null"],
        stdout=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (metrics.is_file() and metrics.stat().st_size):
        time.sleep(0.002)
    process.send_signal(number)
    # A second signal must not interrupt the save the first one asked for.
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("the run was over before the signal came")
    assert process.returncode == ExitCode.STOPPED
    assert f"stopped by {number.name} after step" in out
    assert "weft train --resume" in out
    run = tmp_path / "run"
    (saved,) = list_checkpoints(run)
    assert len(trace(run)) == saved.step < 30
    assert resume(run) == 0
    same_run(run, undisturbed)


def test_a_stop_file_stops_once(tmp_path: Path, undisturbed: Path) -> None:
    recipe = write_recipe(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    (run / "STOP").touch()
    config = load_config(str(recipe), [], tmp_path).config
    assert train(config) == ExitCode.STOPPED
    assert not (run / "STOP").exists()
    assert resume(run) == 0
    same_run(run, undisturbed)


def test_a_damaged_newest_checkpoint_costs_only_its_steps(
    tmp_path: Path, undisturbed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # The schedule follows train.steps, so a comparable run has to know it from the start.
    run = run_new(tmp_path, "schedule.horizon_steps=30", "train.steps=15")
    newest = list_checkpoints(run)[-1]
    file = next(newest.path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    assert resume(run, "train.steps=30") == 0
    assert f"{newest.path} is damaged" in caplog.text
    same_run(run, undisturbed)


def test_a_folder_that_holds_a_run_is_not_started_anew(tmp_path: Path) -> None:
    run = run_new(tmp_path, "train.steps=4")
    before = sorted((p.name, p.stat().st_mtime_ns) for p in run.rglob("*") if p.is_file())
    with pytest.raises(
        ConfigError, match=r"already holds a run; go on with it: weft train --resume"
    ):
        run_new(tmp_path, "train.steps=6")
    assert sorted((p.name, p.stat().st_mtime_ns) for p in run.rglob("*") if p.is_file()) == before
    with pytest.raises(ConfigError, match=r"is finished: it stands at step 4"):
        resume(run)


def test_changed_data_is_refused_unless_asked_for(tmp_path: Path) -> None:
    run = run_new(tmp_path, "train.steps=4")
    (tmp_path / "tales" / "3.txt").write_text("something else entirely\n" * 30)
    with pytest.raises(DataError, match="tales"):
        resume(run, "train.steps=6")
    # A refused resume leaves the run's configuration as it was.
    assert load_run_config(run, []).config.train.steps == 4
    assert resume(run, "train.steps=6", "data.allow_changed=true") == 0
    assert len(trace(run)) == 6


def test_another_seed_or_model_is_refused(tmp_path: Path) -> None:
    run = run_new(tmp_path, "train.steps=4")
    with pytest.raises(WeftError, match=r"seed"):
        resume(run, "train.steps=6", "run.seed=1")
    with pytest.raises(CheckpointError, match=r"shape"):
        resume(run, "train.steps=6", "model.d_ff=32")


@pytest.mark.parametrize("parts", ["weights", "weights_and_optimizer"])
def test_a_new_run_starts_from_another(tmp_path: Path, parts: str) -> None:
    first = run_new(tmp_path / "a", "train.steps=6")
    second = run_new(
        tmp_path / "b",
        "train.steps=2",
        f"checkpoint.start_from={first}",
        f"checkpoint.start_from_parts={parts}",
        "run.seed=5",
        "optimizer.lr=1e-30",
        "schedule.warmup_steps=0",
    )
    old, new = tensors(first, 6), tensors(second, 2)
    weights = [
        n for n in old if n.startswith("parameters/") and "norm" not in n and "ngrams" not in n
    ]
    # At a vanishing rate the weights stay what they were: start_from was honoured.
    assert all(old[n] == new[n] for n in weights)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        run_new(tmp_path / "c", f"checkpoint.start_from={tmp_path / 'nowhere'}")


def poison(monkeypatch: pytest.MonkeyPatch, samples: set[int]) -> None:
    """Losses of micro-batches that begin with these samples are not numbers."""
    whole = TransformerTask.losses

    def losses(
        self: TransformerTask, networks: Any, batch: Any, phase: str = "train"
    ) -> LossOutput:
        output = whole(self, networks, batch, phase)
        if batch.sample_ids[0] not in samples:
            return output
        terms = {
            n: LossTerm(t.total * float("nan"), t.count, t.weight) for n, t in output.terms.items()
        }
        return LossOutput(terms)

    monkeypatch.setattr(TransformerTask, "losses", losses)


def test_a_loss_that_is_not_a_number_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {40})
    with pytest.raises(
        TrainingError, match=r"loss and grad_norm not finite at step 6 \(samples 40 to 47\)"
    ):
        run_new(tmp_path)
    # Nothing poisoned was saved.
    assert [i.step for i in list_checkpoints(tmp_path / "run")] == [2, 4]


def test_such_steps_can_be_skipped_within_a_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {40, 80})
    run = run_new(tmp_path / "a", "train.non_finite=skip", "train.non_finite_budget=2")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if r.get("skipped")][:2] == [6, 11]
    assert torch.isfinite(torch.tensor(float(rows[-1]["loss"])))
    with pytest.raises(TrainingError, match="non_finite_budget=1"):
        run_new(tmp_path / "b", "train.non_finite=skip", "train.non_finite_budget=1")


def test_failed_saves_are_survived_up_to_a_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from weft.trainer.checkpoint import manager

    free = manager.free_bytes
    room = {"left": 2}

    def sometimes(path: Path) -> int:
        room["left"] -= 1
        return 0 if room["left"] in (0, -1) else free(path)

    monkeypatch.setattr(manager, "free_bytes", sometimes)
    run = run_new(tmp_path, "checkpoint.keep=20")
    steps = [i.step for i in list_checkpoints(run)]
    assert 30 in steps
    assert len(steps) == 13
    monkeypatch.setattr(manager, "free_bytes", lambda path: 0)
    with pytest.raises(TrainingError, match="could not be saved"):
        run_new(tmp_path / "full")


def test_the_best_checkpoints_outlive_the_newest(tmp_path: Path) -> None:
    settings = ["eval.every=4", "checkpoint.every=4", "checkpoint.keep=1", "checkpoint.keep_best=2"]
    run = run_new(tmp_path, *settings, "optimizer.lr=0.1")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = {r["step"]: r["eval/loss"] for r in rows if "eval/loss" in r}
    assert sorted(scores) == list(range(4, 31, 4))
    best = sorted(scores, key=lambda step: (scores[step], step))[:2]
    kept = list_checkpoints(run)
    assert [i.step for i in kept] == sorted({*best, 30})
    assert all(i.score == scores.get(i.step) for i in kept)


def test_a_run_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="cannot be written"):
        run_new(tmp_path, f"run.dir={tmp_path / 'file' / 'run'}")


def test_too_few_samples_are_refused_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="max_epochs"):
        run_new(tmp_path, "data.sources.0.max_epochs=0.01")
    assert not (tmp_path / "run").exists()
