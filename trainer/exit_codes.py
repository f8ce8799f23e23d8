"""How a process of a run ends; what the job script, `weft status` and people go by. Imports no torch.

| code | meaning | goes on by itself under `weft submit` |
| --- | --- | --- |
| 0 | finished | |
| 1 | a bug, with its traceback | within the restart budget |
| 2 | something the user can mend: configuration, data, a missing package | no |
| 3 | stopped by policy: values that are not finite, saves that fail | no |
| 4 | the machine: a rank was lost, a node is unfit | within the restart budget |
| 5 | crash loop, or the restart budget is spent | no |
| 6 | a hang; the stacks of all ranks are in the run's logs | within the restart budget |
| 75 | a person asked it to stop; saved | no |
| 76 | the job's time is nearly up; saved | yes |
| 77 | the scheduler takes the nodes back; saved | the scheduler requeues it |
| 130 | interrupted before training began | no |
"""

from __future__ import annotations

from enum import IntEnum

__all__ = ["ExitCode"]


class ExitCode(IntEnum):
    """See the module's table."""

    FINISHED = 0
    BUG = 1
    USER_ERROR = 2
    POLICY = 3
    MACHINE = 4
    CRASH_LOOP = 5
    HANG = 6
    STOPPED = 75
    TIME_LIMIT = 76
    PREEMPTED = 77
    INTERRUPTED = 130
