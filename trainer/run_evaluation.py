"""Evaluation of a finished or running run from its folder, and the report it leaves there."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..models.errors import DataError
from .baselines import compression_bits_per_byte, held_out_documents
from .data.dataset import open_data
from .evaluation import evaluate
from .files import write_json
from .metrics.records import plain_json
from .trained import TrainedRun, open_trained

__all__ = ["evaluate_run", "evaluate_trained", "report_path"]

log = logging.getLogger("weft")


def report_path(run_dir: Path, step: int) -> Path:
    """Where the report of a step goes."""
    return run_dir / "eval" / f"step_{step:08d}.json"


def evaluate_run(
    run_dir: Path | str,
    step: int | None = None,
    overrides: Sequence[str] = (),
    *,
    with_baselines: bool = False,
) -> dict[str, Any]:
    """Collective: open a run, evaluate it on its held-out documents, write RUN/eval/step_XXXXXXXX.json.

    A folder that cannot be written costs the file and a warning, not the numbers.

    Args:
        run_dir, step, overrides: see `open_trained`.
        with_baselines: also compress the held-out documents.

    Returns:
        The report, on every rank: `step`, `overrides`, `sources` and `total` (see `Scores`), `baselines`.

    Raises:
        DataError: no source holds documents out.
    """
    with open_trained(run_dir, step, overrides) as trained:
        return evaluate_trained(trained, overrides, with_baselines=with_baselines)


def evaluate_trained(
    trained: TrainedRun, overrides: Sequence[str] = (), *, with_baselines: bool = False
) -> dict[str, Any]:
    """Collective: the same for a run that is open already."""
    config = trained.config
    data = open_data(config.data, trained.topology)
    found = evaluate(
        trained.engine,
        trained.task,
        data,
        config.eval,
        micro_batch_tokens=config.train.micro_batch_tokens,
    )
    if found is None or found.total is None:
        raise DataError(
            f"{trained.run_dir}: no source holds documents out; set data.held_out.documents above 0"
        )
    report: dict[str, Any] = {"step": trained.step, "overrides": list(overrides), **found.as_dict()}
    if with_baselines:
        report["baselines"] = compression_bits_per_byte(held_out_documents(data))
    report = plain_json(report)
    if trained.topology.is_main:
        _write_report(report_path(trained.run_dir, trained.step), report)
    return report


def _write_report(path: Path, report: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(exist_ok=True)
        write_json(path, report)
    except OSError as error:
        # A run that is someone else's to write can still be evaluated.
        log.warning("%s was not written: %s", path, error.strerror)
