"""The run folder as one attempt finds it: made and locked by the first, taken up by the next, refused to a second at once."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from ..models.errors import ConfigError, LaunchError, WeftError
from .attempts import ATTEMPTS_FILE, attempts_so_far
from .configuration.load import dump_config
from .configuration.schema import TrainingConfig
from .distributed import Topology
from .files import write_text
from .run_lock import LOCK_FILE, RunLock

__all__ = ["claim_folder", "release_folder"]


def claim_folder(config: TrainingConfig, topology: Topology, lock: RunLock, *, resume: bool) -> int:
    """Collective: make the run folder, lock it and write the configuration, or refuse a folder that another run has or uses.

    A resumed run keeps its configuration until it is open: one that is refused must not spoil the next attempt.

    Returns:
        The number of this attempt, from 1.

    Raises:
        ConfigError: a new run in a used folder, or a folder that cannot be written.
        LaunchError: another job is at work on the run.
    """
    answer: dict[str, Any] = {}
    if topology.is_main:
        try:
            answer = {"number": _claim(config, lock, resume=resume)}
        except WeftError as error:
            answer = {"error": str(error), "kind": type(error).__name__}
        except OSError as error:
            answer = {
                "error": f"run folder {config.run_dir} cannot be written: {error.strerror}; set run.dir elsewhere"
            }
    answer = topology.broadcast_json(answer)
    if "error" in answer:
        raise (LaunchError if answer.get("kind") == "LaunchError" else ConfigError)(answer["error"])
    return int(answer["number"])


def _claim(config: TrainingConfig, lock: RunLock, *, resume: bool) -> int:
    folder = config.run_dir
    records = folder / "metrics.jsonl"
    has_steps = records.is_file() and records.stat().st_size > 0
    if (has_steps or (folder / "checkpoints" / "latest").exists()) and not resume:
        raise ConfigError(
            f"{folder} already holds a run; go on with it: weft train --resume {folder}, or set run.dir to a new folder"
        )
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    number = attempts_so_far(folder) + 1
    # Held before anything is written; that it can be is found out here too, and not by the first save.
    lock.acquire(number)
    if not resume:
        try:
            write_text(folder / "config.yaml", dump_config(config))
        except OSError:
            lock.release()
            release_folder(folder)
            raise
    return number


def release_folder(folder: Path) -> None:
    """Undo `claim_folder` for a run that could not be opened; what else lies there stays."""
    for name in ("config.yaml", ATTEMPTS_FILE, LOCK_FILE):
        (folder / name).unlink(missing_ok=True)
    for empty in (folder / "logs", folder):
        with contextlib.suppress(OSError):
            empty.rmdir()
