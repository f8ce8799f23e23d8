"""The whole trainer step against a bare PyTorch loop on the same model and batches.

The bare loop has its batches ready, measures nothing and shows nothing; what it does not do is what the trainer
costs. The two take turns, so that a busy machine slows both alike; what is compared is the first quartile, because
other people's work on a machine only ever makes a step longer.
"""

from __future__ import annotations

import os
import statistics
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...models import build_model
from ..configuration.schema import TrainingConfig
from ..distributed import Topology
from ..loop import Run, fit
from ..metrics.progress import Progress
from ..metrics.records import read_metrics
from ..opening import open_run
from ..optimization.row_sparse_adam import row_sparse_adam_
from ..policies import StopRequest
from ..run_folder import claim_folder
from ..run_lock import RunLock

__all__ = ["compare_steps"]

ROUNDS = 4
WARM_UP = 2


def compare_steps(config: TrainingConfig, topology: Topology, steps: int) -> dict[str, Any]:
    """Seconds of a step of either loop (first quartile), and their ratio.

    Args:
        config: of the run; its folder is made.
        steps: of one turn; each side has four.
    """
    total = steps * ROUNDS
    config = _with_steps(config, total)
    claim_folder(config, topology, RunLock(config.run_dir), resume=False)
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest(config.run_dir))
        run = open_run(config, topology, stop, resume=False)
        stack.callback(run.loader.close)
        quiet = stack.enter_context(open(os.devnull, "w"))
        run = replace(run, progress=Progress("bar", total, stream=quiet))
        bare = _BareLoop(run)
        ours: list[float] = []
        theirs: list[float] = []
        for turn in range(ROUNDS):
            ours += _trainer_turn(run, (turn + 1) * steps, stop)[WARM_UP:]
            theirs += bare.turn(turn * steps, steps)[WARM_UP:]
        run.recorder.close()
    records = [r for r in read_metrics(config.run_dir) if "data_wait_s" in r]
    wait = sum(r["data_wait_s"] for r in records[WARM_UP:]) / sum(
        r["step_s"] for r in records[WARM_UP:]
    )
    mine, bare_s = (statistics.quantiles(times, n=4)[0] for times in (ours, theirs))
    return {
        "trainer_step_s": mine,
        "bare_step_s": bare_s,
        "ratio": mine / bare_s,
        "data_wait_share": wait,
        "tokens_per_s": config.train.batch_tokens / mine,
        "steps_measured": len(ours),
    }


def _with_steps(config: TrainingConfig, steps: int) -> TrainingConfig:
    train = config.train.model_copy(update={"steps": steps})
    checkpoint = config.checkpoint.model_copy(update={"every": None})
    evaluation = config.eval.model_copy(update={"every": None, "at_end": False})
    return config.model_copy(update={"train": train, "checkpoint": checkpoint, "eval": evaluation})


class _NoSaves:
    """Stands in for the checkpoint manager: what saving costs is measured apart."""

    save_seconds = 0.0

    def save(self, *args: object, **kwargs: object) -> None:
        return None

    def wait(self) -> None:
        return None


def _trainer_turn(run: Run, until: int, stop: StopRequest) -> list[float]:
    begin = run.state.step
    turn = replace(run, config=_with_steps(run.config, until), checkpoints=_NoSaves())  # type: ignore[arg-type]
    fit(turn, stop)
    records = read_metrics(Path(run.config.run_dir))
    return [r["step_s"] for r in records if "step_s" in r and r["step"] > begin]


class _BareLoop:
    """Forward, backward, clip, update; nothing else."""

    def __init__(self, run: Run) -> None:
        self.run, config = run, run.config
        self.model = build_model(config.model, seed=config.run.seed, device=run.topology.device)
        groups = run.task.parameter_groups({"model": self.model})
        sparse = {n for g in groups if g.algorithm == "row_sparse_adam" for n in g.parameters}
        named = {f"model/{n}": p for n, p in self.model.named_parameters()}
        self.dense = [p for n, p in named.items() if n not in sparse]
        self.tables = [
            (p, torch.zeros_like(p), torch.zeros_like(p)) for n, p in named.items() if n in sparse
        ]
        o = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.dense, lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay, fused=True
        )
        self.updates = 0

    def turn(self, first_step: int, steps: int) -> list[float]:
        rows = self.run.config.batch_rows
        batches = [
            self.run.loader.assemble((first_step + i) * rows).micro_batches for i in range(steps)
        ]
        times = []
        for micro_batches in batches:
            begin = time.perf_counter()
            self._step(micro_batches)
            if self.run.topology.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        return times

    def _step(self, micro_batches: list[Any]) -> None:
        o, task = self.run.config.optimizer, self.run.task
        count = sum(b.target_count for b in micro_batches)
        for batch in micro_batches:
            terms = task.losses({"model": self.model}, batch.to(self.run.topology.device)).terms
            sum(t.weight * t.total / count for t in terms.values()).backward()  # type: ignore[union-attr]
        tables = [(p, m, v, p.grad.coalesce()) for p, m, v in self.tables if p.grad is not None]
        gradients = [p.grad for p in self.dense if p.grad is not None]
        squares = torch.stack(torch._foreach_norm(gradients)).square().sum()  # type: ignore[attr-defined]
        norm = (squares + sum(g.values().square().sum() for *_, g in tables)).sqrt()
        clip = (
            (o.clip_grad_norm / (norm + 1e-6)).clamp_max(1.0)
            if o.clip_grad_norm
            else torch.ones_like(norm)
        )
        torch._foreach_mul_(gradients, clip)  # type: ignore[attr-defined]
        self.optimizer.step()
        self.updates += 1
        step, keep = torch.tensor(float(self.updates), device=norm.device), torch.ones_like(norm)
        with torch.no_grad():
            for p, m, v, g in tables:
                row_sparse_adam_(
                    p,
                    m,
                    v,
                    g.indices()[0],
                    g.values() * clip,
                    step=step,
                    lr=o.lr,
                    betas=o.betas,
                    eps=o.eps,
                    keep=keep,
                )
        self.model.zero_grad(set_to_none=True)
