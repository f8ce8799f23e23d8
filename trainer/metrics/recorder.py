"""Records of a run, kept by rank 0: metrics.jsonl always, other sinks where they are asked for.

When a run goes on, records past the resumed step are dropped before the first new one is written, so
that each step is there once however often the run was stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ..distributed import Topology
from .config import LoggingConfig
from .records import METRICS_FILE, RecordFile, truncate_records
from .sinks import Sink, TensorBoardSink, WandbSink
from .spikes import SpikeMonitor

__all__ = ["MetricsRecorder"]


class MetricsRecorder:
    """Takes finished values, one record at a time; on ranks other than 0 it does nothing.

    Args:
        run_dir: the run folder; made if it is not there.
        config: the logging section.
        topology: this process's place.
        resume_step: the step the run goes on from; records past it are dropped. 0 starts anew.
        settings: the run's configuration, for sinks that show it.
        on_kept: given each record that stays of earlier attempts, in order.

    Raises:
        LaunchError: a sink's package is missing.
    """

    def __init__(
        self,
        run_dir: Path | str,
        config: LoggingConfig,
        topology: Topology | None = None,
        resume_step: int = 0,
        *,
        settings: Mapping[str, Any] | None = None,
        on_kept: Callable[[Mapping[str, Any]], object] | None = None,
    ) -> None:
        self.run_dir = Path(run_dir)
        self._on_kept = on_kept
        self._file: RecordFile | None = None
        self._sinks: list[Sink] = []
        self._spikes = SpikeMonitor()
        if topology is not None and not topology.is_main:
            return
        self.run_dir.mkdir(parents=True, exist_ok=True)
        # Sinks first: a missing package must not cost the old run its records.
        if config.wandb.enabled:
            self._sinks.append(WandbSink(self.run_dir, config.wandb, settings))
        if config.tensorboard:
            self._sinks.append(TensorBoardSink(self.run_dir, resume_step))
        self._open(resume_step)

    def _open(self, step: int) -> None:
        for record in truncate_records(self.path, step):
            self._spikes.restore(record)
            if self._on_kept is not None:
                self._on_kept(record)
        self._file = RecordFile(self.path)

    def rewind(self, step: int) -> None:
        """The run went back to a step: drop what was recorded after it. A resume does the same when it opens."""
        if self._file is None:
            return
        self._file.close()
        self._spikes = SpikeMonitor()
        self._open(step)
        for sink in self._sinks:
            sink.rewind(step)

    @property
    def path(self) -> Path:
        return self.run_dir / METRICS_FILE

    def log(self, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Write one record.

        Args:
            step: the update the values belong to; may repeat (training values, then evaluation) but not go back.
            values: Python numbers by name; a `step` among them is ignored.

        Returns:
            The record as written, with spike scores where there was a loss or a gradient norm.
        """
        record = {"step": step, **{name: value for name, value in values.items() if name != "step"}}
        if self._file is None:
            return record
        record |= self._spikes.judge(record)
        self._file.append(record)
        scalars = {
            name: value
            for name, value in record.items()
            if name != "step" and isinstance(value, (int, float))
        }
        for sink in self._sinks:
            sink.log(step, scalars)
        return record

    def close(self, exit_code: int = 0) -> None:
        """Flush all sinks; may be called twice."""
        if self._file is not None:
            self._file.close()
            self._file = None
        for sink in self._sinks:
            sink.close(exit_code)
        self._sinks = []

    def __enter__(self) -> MetricsRecorder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(0 if kind is None else 1)
