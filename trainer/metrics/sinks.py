"""Where records go besides metrics.jsonl: Weights & Biases and TensorBoard, both optional.

Each keeps one curve over all attempts of a run: W&B by one id kept in the run folder, TensorBoard by
purging the steps that will be run again.
"""

from __future__ import annotations

import logging
import math
import netrc
import os
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ...models.errors import LaunchError
from ..files import write_text
from .config import WandbConfig

__all__ = ["Sink", "TensorBoardSink", "WandbSink", "has_wandb_key"]

WANDB_ID_FILE = "wandb_id"
_logger = logging.getLogger(__name__)


class Sink(ABC):
    """Takes scalars of a step."""

    @abstractmethod
    def log(self, step: int, values: Mapping[str, float | int]) -> None:
        """Steps never decrease."""

    @abstractmethod
    def rewind(self, step: int) -> None:
        """The run went back to this step; later ones come again, with other values."""

    @abstractmethod
    def close(self, exit_code: int = 0) -> None:
        """Everything taken is on its way."""


def has_wandb_key() -> bool:
    """Whether W&B would find a key without asking for one: the environment, or the netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    path = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    try:
        return path.is_file() and netrc.netrc(str(path)).authenticators(host) is not None
    except (netrc.NetrcParseError, OSError):
        return False


class WandbSink(Sink):
    """One W&B run for the whole life of a run folder.

    Records carry their step. W&B drops a step it already has, and a resumed run repeats such steps
    exactly, so the curve stays one.
    """

    def __init__(
        self, run_dir: Path, config: WandbConfig, settings: Mapping[str, Any] | None = None
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise LaunchError(
                "logging.wandb.enabled needs the wandb package; install it with: pip install 'weft[wandb]'"
            ) from error
        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            id=_wandb_id(run_dir),
            name=run_dir.resolve().name,
            dir=str(run_dir),
            config=dict(settings or {}),
            mode=_wandb_mode(config),
            resume="allow",
            # Its console capture would fight with the progress bar; the run folder has logs of its own.
            settings=wandb.Settings(console="off", silent=True),
        )
        self._first_step = self._run.step

    @property
    def id(self) -> str:
        return self._run.id

    def log(self, step: int, values: Mapping[str, float | int]) -> None:
        # Asked for a step below its own, W&B warns for each; the values are there already.
        if step >= self._first_step:
            self._run.log(dict(values), step=step)

    def rewind(self, step: int) -> None:
        # W&B cannot take values back: its curve goes on where the run has passed the old end.
        self._first_step = self._run.step

    def close(self, exit_code: int = 0) -> None:
        self._run.finish(exit_code=exit_code)


def _wandb_mode(config: WandbConfig) -> Any:
    if config.mode != "auto":
        return config.mode
    if os.environ.get("WANDB_MODE"):
        return None
    if has_wandb_key():
        return "online"
    _logger.warning("no W&B key found, logging offline; wandb login, then wandb sync RUN/wandb/*")
    return "offline"


def _wandb_id(run_dir: Path) -> str:
    path = run_dir / WANDB_ID_FILE
    found = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    if not found:
        found = uuid.uuid4().hex[:12]
        write_text(path, f"{found}\n")
    return found


class TensorBoardSink(Sink):
    """Events under RUN/tensorboard; a resumed run purges the steps it will repeat."""

    def __init__(self, run_dir: Path, resume_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise LaunchError(
                "logging.tensorboard needs the tensorboard package; install it with: "
                "pip install 'weft[tensorboard]'"
            ) from error
        self._new_writer = partial(SummaryWriter, str(run_dir / "tensorboard"))
        self._writer = self._new_writer(purge_step=resume_step + 1)

    def log(self, step: int, values: Mapping[str, float | int]) -> None:
        for name, value in values.items():
            if math.isfinite(value):
                self._writer.add_scalar(name, value, step)

    def rewind(self, step: int) -> None:
        self._writer.close()
        self._writer = self._new_writer(purge_step=step + 1)

    def close(self, exit_code: int = 0) -> None:
        self._writer.close()
