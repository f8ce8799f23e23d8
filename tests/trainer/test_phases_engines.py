"""Networks stepped in turn: equal on any ranks, resumed to the bit before and after each of them joins, refused where they cannot be."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import run_ranks
from weft.models import build_task
from weft.models.errors import ConfigError
from weft.models.image_tokenizer.config import Config
from weft.trainer.distributed import Topology
from weft.trainer.engines.build import build_engine
from weft.trainer.engines.config import ParallelConfig, PrecisionConfig
from weft.trainer.engines.protocol import Engine
from weft.trainer.loop import Agreement, _train_step
from weft.trainer.optimization.config import OptimizerConfig, ScheduleConfig
from weft.trainer.policies import Stop

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from pictures import ADVERSARY, CAUSAL, NESTED, SMALL, pictures

ROWS, STEPS = 4, 5
# By step, the ratio of each picture; two ranks hold two each: some have none of a ratio, and step 3 lacks the coarsest altogether.
RATIOS = ([2, 2, 0, 1], [0, 1, 2, 2], [0, 0, 1, 0], [1, 1, 0, 2], [2, 0, 2, 0])
CODES = {
    **SMALL,
    "crt": {**CAUSAL, "ramp_steps": 3, "clip_grad_norm": 0.1},
    "adversarial": {**ADVERSARY, "start_step": 3, "norm": "sync_batch", "betas": [0.5, 0.9]},
}
RATIOED = {
    **NESTED,
    "adversarial": {**ADVERSARY, "start_step": 2, "adaptive": True, "clip_grad_norm": 0.5},
}
MODELS = {"codes": CODES, "ratios": RATIOED}


def build(
    topology: Topology, model: dict[str, Any], parallel: dict[str, Any], **optimizer: Any
) -> Any:
    """What the loop needs of a run."""
    config = SimpleNamespace(
        batch_rows=ROWS,
        train=SimpleNamespace(batch_tokens=ROWS, micro_batch_tokens=None, steps=STEPS),
        data=SimpleNamespace(sequence_length=1),
        parallel=ParallelConfig(**parallel),
        precision=PrecisionConfig(compute=optimizer.pop("compute", "fp32")),
        optimizer=OptimizerConfig(lr=2e-3, weight_decay=0.1, clip_grad_norm=0.5, **optimizer),
        schedule=ScheduleConfig(kind="constant"),
        run=SimpleNamespace(seed=7),
    )
    task = build_task(Config(**model))
    engine = build_engine(task, config, topology)  # type: ignore[arg-type]
    engine.start_averages()
    return SimpleNamespace(task=task, engine=engine, config=config, topology=topology)


def run_steps(run: Any, first: int, last: int, micro_rows: int = ROWS) -> list[dict[str, float]]:
    """Values of steps `[first, last)`, from 1."""
    found = []
    engine = run.engine
    share = ROWS // engine.data_ranks
    for step in range(first, last):
        mine = list(range(engine.data_rank * share, (engine.data_rank + 1) * share))
        batches = []
        for start in range(0, share, micro_rows):
            rows = mine[start : start + micro_rows]
            ratios = [RATIOS[step - 1][row] for row in rows]
            batch = pictures([step * ROWS + row for row in rows], ratios=ratios)
            batches.append(run.task.draw(batch, 7))
        counts: dict[str, int] = {}
        for batch in batches:
            for name, count in run.task.counts(batch).items():
                counts[name] = counts.get(name, 0) + count
        totals = run.topology.sum_integers(list(counts.values()))
        counts = dict(zip(counts, totals, strict=True))
        step_batch: Any = SimpleNamespace(
            micro_batches=batches, first_sample=step * ROWS, patch_balance=None, epochs={}
        )
        agreed = Agreement(counts, 0, 0, Stop.NOT, False, None)
        values = _train_step(run, step, step_batch, batches, agreed)
        found.append({name: float(value) for name, value in values.items()})
    return found


def digests(engine: Engine) -> dict[str, str]:
    return {
        s.name: hashlib.sha256(s.tensor.contiguous().numpy().tobytes()).hexdigest()
        for s in engine.state_shards()
    }


def train_on_rank(
    topology: Topology, model: dict[str, Any], parallel: dict[str, Any], micro_rows: int
) -> list[dict[str, float]]:
    return run_steps(build(topology, model, parallel), 1, STEPS + 1, micro_rows)


_ALONE: dict[str, list[dict[str, float]]] = {}


def alone(name: str) -> list[dict[str, float]]:
    if name not in _ALONE:
        _ALONE[name] = train_on_rank(Topology(), MODELS[name], {"strategy": "single"}, ROWS)
    return _ALONE[name]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["codes", "ratios"])
def test_two_ranks_do_what_one_does(name: str, strategy: str) -> None:
    """Loss weights, image counts and synchronised norms are those of all ranks; a rank without a ratio neither waits nor drifts."""
    results = run_ranks(
        2, "test_phases_engines:train_on_rank", MODELS[name], {"strategy": strategy}, ROWS
    )
    expected = alone(name)
    for found in results:
        for step, values in enumerate(found):
            assert values.keys() == expected[step].keys()
            for key, value in values.items():
                if key not in ("data_digest", "first_sample"):
                    wanted = expected[step][key]
                    assert value == pytest.approx(wanted, rel=2e-3, abs=1e-5), (step, key)


def test_codes_are_counted_over_micro_batches() -> None:
    """Perplexities of parts would not average to it; only what needs no whole batch is compared."""
    parts = train_on_rank(Topology(), SMALL, {"strategy": "single"}, 1)
    whole = train_on_rank(Topology(), SMALL, {"strategy": "single"}, ROWS)
    for a, b in zip(parts, whole, strict=True):
        for key in ("loss", "codes_used", "code_perplexity", "code_entropy", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-4), key


def test_each_phase_updates_its_own_networks() -> None:
    run = build(Topology(), CODES, {"strategy": "single"}, ema_decay=0.9)
    networks = {"model": 0, "predictor": 0, "discriminator": 0}
    for step in range(1, STEPS + 1):
        before = digests(run.engine)
        (values,) = run_steps(run, step, step + 1)
        now = digests(run.engine)
        moved = {n.split("/")[1] for n in now if n.startswith("param") and now[n] != before[n]}
        assert moved == set(networks) - ({"discriminator"} if step < 3 else set())
        assert ("discriminator/loss" in values) == (step >= 3)
        assert ("adversarial" in values) == (step >= 3)
        assert values["predictor/grad_norm"] > 0
        assert not any(
            p.grad is not None for n in run.engine.networks.values() for p in n.parameters()
        )
    averaged = {n.split("/")[1] for n in now if n.startswith("ema/")}
    assert averaged == {"model"}
    updates = run.engine.scalar_state()["updates"]
    assert updates["discriminator"] == {"discriminator": 3}
    assert updates["train"] == {"autoencoder": 5, "codebook": 5, "predictor": 5}


def test_a_ratio_that_a_step_lacks_stays_as_it_is() -> None:
    run = build(Topology(), RATIOED, {"strategy": "single"})
    run_steps(run, 1, 3)
    before = digests(run.engine)
    run_steps(run, 3, 4)
    now = digests(run.engine)
    still = {n for n in now if now[n] == before[n]}
    kinds = ("parameters/", "optimizer/exp_avg/", "optimizer/exp_avg_sq/")
    for kind in kinds:
        own = {n for n in still if n.startswith(f"{kind}model/")}
        # Ratio 8 alone is absent: its adapters and the level and changes of size that only it passes.
        parts = ("adapters.8", "levels.3", "downs.2", "ups.2")
        wanted = {n for n in now if n.startswith(kind) and any(part in n for part in parts)}
        assert own == wanted
    assert run.engine.scalar_state()["updates"]["train"]["autoencoder_8"] == 2


@pytest.mark.parametrize("name", ["codes", "ratios"])
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_state_continues_to_the_bit(name: str, stop: int) -> None:
    """Inside the ramp, right before the discriminator joins, and after."""
    settings = {"strategy": "single"}
    straight = build(Topology(), MODELS[name], settings, ema_decay=0.9)
    expected = run_steps(straight, 1, STEPS + 1)
    first = build(Topology(), MODELS[name], settings, ema_decay=0.9)
    run_steps(first, 1, stop + 1)
    second = build(Topology(), MODELS[name], settings, ema_decay=0.9)
    held = {s.name: s.tensor for s in first.engine.state_shards()}
    for shard in second.engine.state_shards():
        shard.tensor.detach().copy_(held[shard.name])
    second.engine.load_scalar_state(first.engine.scalar_state())
    assert run_steps(second, stop + 1, STEPS + 1) == expected[stop:]
    assert digests(second.engine) == digests(straight.engine)


def test_lambda_zero_trains_the_baseline_to_the_bit() -> None:
    settings = {"strategy": "single"}
    plain = build(Topology(), {**CODES, "crt": None}, settings)
    zero = build(Topology(), {**CODES, "crt": {**CODES["crt"], "weight": 0.0}}, settings)
    for run in (plain, zero):
        run_steps(run, 1, STEPS + 1)
    found = digests(zero.engine)
    for name, digest in digests(plain.engine).items():
        assert found[name] == digest, name


def test_a_group_is_clipped_by_its_own_norm() -> None:
    """The predictor's gradient is 1000 times as long in one of two runs; what the others do is the same."""
    found = []
    for clip in (1e-4, 1e4):
        model = {**CODES, "crt": {**CODES["crt"], "clip_grad_norm": clip, "weight": 0.0}}
        run = build(Topology(), model, {"strategy": "single"})
        found.append((run_steps(run, 1, 2)[0], digests(run.engine)))
    assert found[0][0]["grad_norm"] == found[1][0]["grad_norm"]
    first, second = (digest for _, digest in found)
    moved = {n.split("/")[-2] for n in first if first[n] != second[n]}
    assert moved == {"predictor"}


@pytest.mark.parametrize(
    ("engine", "model", "settings"),
    [
        ("deepspeed", {**RATIOED, "adversarial": None}, {"deepspeed": {"zero_stage": 1}}),
        ("accelerate", CODES, {}),
    ],
    ids=["deepspeed", "accelerate"],
)
def test_other_engines_train_what_they_can(
    engine: str, model: dict[str, Any], settings: dict[str, Any]
) -> None:
    pytest.importorskip(engine)
    arguments = (model, {"engine": engine, **settings}, ROWS)
    (found,) = run_ranks(1, "test_phases_engines:train_on_rank", *arguments)
    expected = train_on_rank(Topology(), model, {"strategy": "single"}, ROWS)
    for step, values in enumerate(found):
        assert values == pytest.approx(expected[step], rel=1e-3, abs=1e-5)


def refused(topology: Topology, engine: str) -> str:
    with pytest.raises(ConfigError) as caught:
        build(topology, CODES, {"engine": engine})
    return str(caught.value)


@pytest.mark.parametrize(
    ("engine", "ranks", "told"),
    [
        ("deepspeed", 1, "trains one network in one phase"),
        ("accelerate", 2, "replicas train one phase a step"),
    ],
)
def test_engines_that_cannot_say_so(engine: str, ranks: int, told: str) -> None:
    pytest.importorskip(engine)
    for message in run_ranks(ranks, "test_phases_engines:refused", engine):
        assert told in message
        assert "parallel.engine=torch" in message


def test_mixed_precision_keeps_lookups_and_losses_in_fp32() -> None:
    run = build(Topology(), CODES, {"strategy": "single"}, compute="bf16")
    for values in run_steps(run, 1, STEPS + 1):
        assert values["codes_used"] >= 1
        assert all(torch.isfinite(torch.tensor(value)) for value in values.values())
