"""Bad steps are taken back: the newest checkpoint before them, without their samples, on all ranks alike."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from test_resume import poison, resume, run_new
from tiny_run import trace, write_recipe
from weft.models.errors import ConfigError, TrainingError
from weft.trainer import train as train_module
from weft.trainer.attempts import read_attempts
from weft.trainer.checkpoint.reading import list_checkpoints
from weft.trainer.configuration.load import load_config
from weft.trainer.data.loader import next_start
from weft.trainer.distributed import Topology
from weft.trainer.policies import SpikePolicy
from weft.trainer.train import train

BACK = "train.non_finite=rollback"


def steps_of(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [r for r in rows if "loss" in r]


def test_a_step_that_is_not_finite_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(monkeypatch, {40})
    run = run_new(tmp_path, BACK, "checkpoint.every=4", "logging.progress=lines")
    rows = steps_of(run)
    assert [r["step"] for r in rows] == list(range(1, 31))
    # Samples 40 to 47 were step 6; the newest checkpoint before it is of step 4.
    firsts = [8 * step for step in range(31) if step != 5]
    assert [r["first_sample"] for r in rows] == firsts
    assert all(math.isfinite(float(r["loss"])) for r in rows)
    assert (
        "rolled back to step 4: loss and grad_norm not finite at step 6" in capsys.readouterr().err
    )
    report = json.loads((run / "logs" / "not_finite_step_00000006.json").read_text())
    assert (report["first_sample"], report["last_sample"]) == (40, 47)
    norms = report["gradient_norms"]
    assert "model/blocks.0.mlp.up_proj.weight" in norms
    assert report["parameters_not_finite"] == [n for n in norms if norms[n] == "NaN"]
    assert report["parameters_not_finite"]


def test_the_run_is_that_of_an_order_without_the_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        poison(patch, {40})
        run = run_new(tmp_path / "a", BACK, "train.steps=12", "schedule.horizon_steps=30")
    # A resume later on knows what was left out.
    assert resume(run, "train.steps=30") == 0
    whole = train_module.open_run
    plain = tmp_path / "b"

    def without(*args: Any, **kwargs: Any) -> Any:
        opened = whole(*args, **kwargs)
        opened.state.left_out.append([40, 48])
        opened.loader.close()
        from weft.trainer.opening import open_loader

        opened.loader = open_loader(
            opened.loader.data,
            opened.task,
            opened.engine,
            opened.config,
            opened.state,
            opened.topology,
        )
        return opened

    monkeypatch.setattr(train_module, "open_run", without)
    other = run_new(plain, "schedule.horizon_steps=30")
    assert trace(run) == trace(other)


def test_samples_can_be_left_out_by_hand(tmp_path: Path) -> None:
    run = run_new(tmp_path / "a", "train.steps=5", "schedule.horizon_steps=30")
    assert resume(run, "train.steps=10", "train.leave_out=[[44, 47], [64, 72]]") == 0
    firsts = [r["first_sample"] for r in steps_of(run)]
    assert firsts == [0, 8, 16, 24, 32, 47, 55, 72, 80, 88]
    with pytest.raises(ConfigError, match=r"train\.leave_out.*\[9, 3\] is no range of samples"):
        resume(run, "train.leave_out=[[9, 3]]")


def test_a_budget_and_a_place_to_go_back_to_are_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {40, 80})
    with pytest.raises(
        TrainingError, match=r"rolled back 1 times already, train.rollback_budget=1"
    ):
        run_new(tmp_path / "a", BACK, "train.rollback_budget=1")
    with pytest.raises(TrainingError, match="no checkpoint from before it"):
        run_new(tmp_path / "b", BACK, "checkpoint.every=null")
    (attempt,) = read_attempts(tmp_path / "a" / "run")
    assert (attempt.outcome, attempt.exit_code) == ("policy", 3)


def spike_on_rank(topology: Topology, recipe: str, policy: str) -> Any:
    """Losses of samples 200 to 231 are tripled, so four steps stand out; the window is short enough to judge them."""
    patch = pytest.MonkeyPatch()
    patch.setattr(train_module, "initialise_distributed", lambda *arguments: topology)
    patch.setattr(train_module, "shutdown_distributed", lambda: None)
    from weft.models.task import LossOutput, LossTerm
    from weft.models.transformer.task import TransformerTask
    from weft.trainer import opening

    whole = TransformerTask.losses

    def losses(self: Any, networks: Any, batch: Any, phase: str = "train") -> LossOutput:
        output = whole(self, networks, batch, phase)
        if not 200 <= batch.sample_ids[0] < 232:
            return output
        terms = {n: LossTerm(3 * t.total, t.count, t.weight) for n, t in output.terms.items()}
        return LossOutput(terms)

    patch.setattr(TransformerTask, "losses", losses)
    patch.setattr(
        opening,
        "SpikePolicy",
        lambda sigmas, steps: SpikePolicy(sigmas, steps, window=12, minimum=6),
    )
    config = load_config(recipe, [f"train.spike={policy}"], Path(recipe).parent).config
    try:
        return train(config)
    except TrainingError as error:
        return str(error)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_spike_is_taken_back_on_all_ranks(tmp_path: Path, ranks: int) -> None:
    settings = {
        "train__steps": 36,
        "train__spike_steps": 3,
        "train__spike_sigmas": 5.0,
        "checkpoint__every": 5,
        "checkpoint__keep": 3,
        "logging__every": 1,
        "optimizer__lr": 1e-3,
        "optimizer__skip_step": False,
    }
    recipe = write_recipe(tmp_path, **settings)
    assert run_ranks(ranks, "test_rollback:spike_on_rank", str(recipe), "rollback") == [0] * ranks
    run = tmp_path / "run"
    rows = steps_of(run)
    firsts = [r["first_sample"] for r in rows]
    assert [r["step"] for r in rows] == list(range(1, 37))
    # Rank 0 knows with the third high step, the others one step later; the fourth may spike on its own and pass.
    assert firsts[:25] == list(range(0, 200, 8))
    assert firsts[25] in (224, 232)
    assert firsts[26:] == list(range(firsts[25] + 8, firsts[25] + 88, 8))
    assert [i.step for i in list_checkpoints(run)][-1] == 36
    told = run_ranks(
        ranks,
        "test_rollback:spike_on_rank",
        str(write_recipe(tmp_path / "stop", **settings)),
        "stop",
    )
    assert all("go on from before it with: weft train --resume" in t for t in told)
    assert "the loss rose at step 26" in told[0]


@pytest.mark.parametrize(
    ("sample", "ranges", "expected"),
    [
        (0, [], 0),
        (0, [(8, 16)], 0),
        (4, [(8, 16)], 16),
        (8, [(8, 16)], 16),
        (15, [(8, 16)], 16),
        (16, [(8, 16)], 16),
        (0, [(20, 28), (4, 16)], 28),
        (0, [(24, 28), (4, 16)], 16),
    ],
)
def test_where_a_step_of_eight_begins(
    sample: int, ranges: list[tuple[int, int]], expected: int
) -> None:
    assert next_start(sample, 8, ranges) == expected
