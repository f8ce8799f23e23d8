"""On the path of the ranks of a test: a run waits before the step that its file `gate` names, so that a fault hits it there.

`gate` holds the number of steps that the first start of a job is let through, or the word `crash`: then the last rank is killed,
at every start. Without the file nothing happens. A run that waits hears signals and files as one that waits for its data does.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

POLL_S = 0.02


def _install() -> None:
    from weft.trainer import loop

    next_batch = loop._next_batch

    def wait_at_gate(run: Any, stop: Any) -> Any:
        gate = run.config.run_dir / "gate"
        is_last = run.topology.rank == run.topology.world_size - 1
        if is_last and _text(gate) == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        while run.topology.is_main and _is_shut(gate, run.state.step) and not stop.is_asked():
            time.sleep(POLL_S)
        return next_batch(run, stop)

    loop._next_batch = wait_at_gate


def _text(gate: Path) -> str:
    try:
        return gate.read_text()
    except OSError:
        return ""


def _is_shut(gate: Path, step: int) -> bool:
    text = _text(gate)
    is_first_start = os.environ.get("SLURM_RESTART_COUNT", "0") == "0"
    return is_first_start and text.isdigit() and step >= int(text)


if "train" in sys.orig_argv:
    _install()
