"""Every error a user can cause, as one hierarchy.

It lives on the models' floor because that is the lowest one that meets user input. The command
line prints the message alone (no traceback) and exits with `exit_code`; a message says what was
found, what was expected, and the next thing to do, in one line. Anything else that escapes is a bug.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "LaunchError",
    "RankLostError",
    "TrainingError",
    "WeftError",
]


class WeftError(Exception):
    """Base of all errors with a one-line message for the person at the keyboard."""

    exit_code = 2


class ConfigError(WeftError):
    """A recipe, an override or a combination of settings that cannot work."""


class DataError(WeftError):
    """A dataset that is missing, empty, unreadable, changed or too small."""


class CheckpointError(WeftError):
    """A checkpoint that is missing, damaged, incompatible or cannot be written."""


class LaunchError(WeftError):
    """Processes, devices, schedulers or optional packages that are not as they need to be."""


class RankLostError(LaunchError):
    """Another process of the run went away; what ended it stands in that one's own log."""

    exit_code = 4


class TrainingError(WeftError):
    """A run that has to stop by policy: non-finite values, or too many failed saves."""

    exit_code = 3
