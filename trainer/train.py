"""One attempt at a run: open everything, take up where the run stands, train, leave a clean folder.

The same function serves a new run and a resumed one, one process and many. However an attempt ends, its folder says how.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ..models.errors import RankLostError, TrainingError, WeftError
from .attempts import AttemptLog
from .configuration.checks import check_against_world
from .configuration.load import dump_config
from .configuration.schema import TrainingConfig
from .deadline import Deadline
from .distributed import Topology, explain_lost_rank, initialise_distributed, shutdown_distributed
from .exit_codes import ExitCode
from .files import write_text
from .loop import Run, Supervision, fit
from .opening import open_run
from .policies import Stop, StopRequest
from .run_folder import claim_folder, release_folder
from .run_lock import RunLock
from .watchdog import Watchdog

__all__ = ["train"]


def train(config: TrainingConfig, run_dir: Path | None = None, *, resume: bool = False) -> int:
    """Collective: run until the last step or a request to stop.

    Args:
        run_dir: the run folder, if it is not the configured one.
        resume: go on with the run in the configured folder; otherwise the folder must not hold one.

    Returns:
        The exit code, see `weft.trainer.exit_codes`: 0 finished; 75, 76, 77 stopped with everything saved.

    Raises:
        WeftError: any error the user can mend.
    """
    if run_dir is not None and run_dir != config.run_dir:
        config = config.model_copy(
            update={"run": config.run.model_copy(update={"dir": str(run_dir)})}
        )
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    # Signals count from here on: a stop asked for while the run is opened is honoured before the first step.
    with StopRequest(config.run_dir) as stop:
        topology = initialise_distributed(config.run.device, config.parallel.timeout_s)
        stop.looks = topology.is_main
        is_lost = False
        try:
            return _attempt(config, topology, stop, resume=resume)
        except RankLostError:
            is_lost = True
            raise
        finally:
            # Leaving a group whose other ranks are gone may wait for them for ever.
            if not is_lost:
                shutdown_distributed()


def _attempt(config: TrainingConfig, topology: Topology, stop: StopRequest, *, resume: bool) -> int:
    """Collective: one entry in the run's history, whatever way it ends."""
    check_against_world(config, topology.world_size)
    lock = RunLock(config.run_dir)
    number = claim_folder(config, topology, lock, resume=resume)
    history = AttemptLog(config.run_dir, number)
    if topology.is_main:
        history.write("start", **_identity(config, topology, lock))
        stop.deadline = Deadline(config.run.deadline_margin_s)

    def end(outcome: str, code: int, reason: str, **values: Any) -> None:
        """What rank 0 says of the attempt, and what any other rank says of its own failure."""
        with contextlib.suppress(OSError):
            if topology.is_main:
                history.write("end", outcome=outcome, exit_code=code, reason=reason, **values)
            elif code not in (0, ExitCode.MACHINE, *(s.exit_code for s in Stop)):
                history.write("failed", rank=topology.rank, exit_code=code, reason=reason)

    def beat() -> None:
        if topology.is_main and not lock.beat():
            print(
                f"weft: error: {config.run_dir} was taken over by another job; this one ends without writing to it",
                file=sys.stderr,
                flush=True,
            )
            os._exit(ExitCode.USER_ERROR)

    watchdog = Watchdog(
        config.run.watchdog,
        config.run_dir / "logs",
        attempt=number,
        rank=topology.rank,
        world_size=topology.world_size,
        on_hang=lambda reason: end("hang", ExitCode.HANG, reason),
        beat=beat,
    )
    try:
        with watchdog:
            supervision = Supervision(
                watchdog.enter,
                history.write if topology.is_main else _ignore,
                process_start(),
            )
            reason, step, seconds = _run(config, topology, stop, supervision, resume=resume)
    except WeftError as error:
        end(_outcome_of(error), error.exit_code, str(error))
        if not resume and topology.is_main and error.exit_code == ExitCode.USER_ERROR:
            release_folder(config.run_dir)
        raise
    except BaseException as error:
        end("error", ExitCode.BUG, f"{type(error).__name__}: {error}".splitlines()[0])
        raise
    else:
        why = "" if reason is Stop.NOT else f"stopped by {stop.reason or 'another rank'}"
        end(reason.outcome, reason.exit_code, why, step=step, train_seconds=seconds)
        if reason and topology.is_main:
            print(f"{why} after step {step}; go on with: weft train --resume {config.run_dir}")
        return reason.exit_code
    finally:
        lock.release()


def _run(
    config: TrainingConfig,
    topology: Topology,
    stop: StopRequest,
    supervision: Supervision,
    *,
    resume: bool,
) -> tuple[Stop, int, float]:
    """Collective: open, train, close; (why it stopped, last step, training seconds)."""
    run: Run | None = None
    is_lost = False
    try:
        run = open_run(config, topology, stop, resume=resume, supervision=supervision)
        if (resume or run.config != config) and topology.is_main:
            write_text(config.run_dir / "config.yaml", dump_config(run.config))
        with run.progress:
            reason = fit(run, stop)
        return reason, run.state.step, run.state.seconds
    except Exception as error:
        lost = explain_lost_rank(error)
        if lost is None:
            raise
        is_lost = True
        step = run.state.step if run else 0
        raise RankLostError(
            f"{lost} after step {step}; why it went stands in its own log; go on with: weft train --resume {config.run_dir}"
        ) from error
    finally:
        if run is not None:
            run.loader.close()
            run.recorder.close()
            run.profiler.close()
            run.checkpoints.close(abandon=is_lost)


def _ignore(event: str, **values: Any) -> None:
    """Rank 0 alone writes the history."""


def _outcome_of(error: WeftError) -> str:
    if isinstance(error, RankLostError):
        return "rank_lost"
    return "policy" if isinstance(error, TrainingError) else "error"


def _identity(config: TrainingConfig, topology: Topology, lock: RunLock) -> dict[str, Any]:
    """Who makes this attempt, and where."""
    env = os.environ
    return {
        "job_id": env.get("SLURM_ARRAY_JOB_ID") or env.get("SLURM_JOB_ID"),
        "array_task_id": env.get("SLURM_ARRAY_TASK_ID"),
        "restart": int(env.get("SLURM_RESTART_COUNT") or 0),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "nodes": env.get("SLURM_JOB_NODELIST"),
        "world_size": topology.world_size,
        "engine": config.parallel.engine,
        "strategy": config.parallel.strategy,
        "log_dir": env.get("WEFT_LOG_DIR"),
        "previous_alive": lock.previous_alive,
    }


def process_start() -> float:
    """Unix seconds at which this process was started, the interpreter's own start included where the system tells it."""
    try:
        ticks = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        up = float(Path("/proc/uptime").read_text().split()[0])
        return time.time() - up + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return time.time()
