"""Evaluation of a finished or running run from its folder, and the report it leaves there."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..models.errors import ConfigError, DataError
from .baselines import compression_bits_per_byte, held_out_documents
from .configuration.load import load_run_config
from .data.dataset import Dataset, open_data
from .evaluation import Evaluation, Scores, evaluate
from .files import write_json
from .metrics.records import plain_json
from .noise import Noise
from .trained import TrainedRun, open_trained

__all__ = ["evaluate_noise", "evaluate_run", "evaluate_trained", "open_for_noise", "report_path"]

log = logging.getLogger("weft")


def report_path(run_dir: Path, step: int, *, noise: bool = False) -> Path:
    """Where the report of a step goes; that on noise has a file of its own."""
    return run_dir / "eval" / f"step_{step:08d}{'_noise' if noise else ''}.json"


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
    data = open_data(trained.config.data, trained.topology)
    found, _ = _scores(trained, data)
    report: dict[str, Any] = {"step": trained.step, "overrides": list(overrides), **found.as_dict()}
    if with_baselines:
        report["baselines"] = compression_bits_per_byte(held_out_documents(data))
    return _finish(trained, report, report_path(trained.run_dir, trained.step))


def open_for_noise(
    run_dir: Path | str, step: int | None = None, overrides: Sequence[str] = ()
) -> TrainedRun:
    """Collective: `open_trained`, with room for as many patches as there are bytes: noise makes more of them, and none must be lost.

    Raises:
        ConfigError: the run takes its patches from its data, where there are none of text with noise.
    """
    folder = Path(run_dir)
    config = load_run_config(folder, list(overrides)).config
    patching = getattr(config.model, "patching", None)
    if patching is None:
        return open_trained(folder, step, overrides)
    if patching.stored:
        raise ConfigError(
            f"{folder} takes its patches from its data, where text with noise has none; add model.patching.stored=false to "
            "make them with its entropy model"
        )
    room = f"model.patching.max_patches={config.data.sequence_length}"
    return open_trained(folder, step, [*overrides, room])


def evaluate_noise(
    trained: TrainedRun, noises: Sequence[Noise], overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Collective: held-out scores before and after each kind of noise; writes RUN/eval/step_XXXXXXXX_noise.json.

    Noise is put on raw text, which is then made into ids again, so any vocabulary will do. With `eval.max_tokens` the first
    documents of each source that have so many ids without noise are taken, the last of them cut, before and after alike.

    Args:
        trained: from `open_for_noise`.
        overrides: it was opened with; they are written down.

    Returns:
        `step`, `overrides`; `clean`, with `sources` and `total` (see `Scores`); `noise`, by kind: its settings and the same, with
        `bits_per_clean_byte`: the same bits over the bytes there were before.

    Raises:
        DataError: no source holds documents out.
    """
    data = open_data(trained.config.data, trained.topology)
    documents = _chosen_documents(data, trained.config.eval.max_tokens)
    clean, clean_total = _scores(trained, data.with_held_out(documents), whole=True)
    report: dict[str, Any] = {"step": trained.step, "overrides": list(overrides)}
    report |= {"clean": clean.as_dict(), "noise": {}}
    for noise in noises:
        noisy = {name: [noise(text) for text in texts] for name, texts in documents.items()}
        found, total = _scores(trained, data.with_held_out(noisy), whole=True)
        sources = {
            name: _over_clean_bytes(scores, clean.sources[name])
            for name, scores in found.sources.items()
        }
        total_numbers = _over_clean_bytes(total, clean_total)
        report["noise"][noise.kind] = {
            **noise.as_dict(),
            "sources": sources,
            "total": total_numbers,
        }
    return _finish(trained, report, report_path(trained.run_dir, trained.step, noise=True))


def _chosen_documents(data: Dataset, max_tokens: int | None) -> dict[str, list[bytes]]:
    """Held-out text by source, up to so many ids of each."""
    chosen: dict[str, list[bytes]] = {}
    for source in data.sources:
        left = max_tokens
        for ids in source.held_out_documents():
            part = ids if left is None else ids[:left]
            chosen.setdefault(source.name, []).append(data.vocabulary.decode_bytes(part))
            if left is not None:
                left -= len(part)
                if left <= 0:
                    break
    return chosen


def _over_clean_bytes(scores: Scores, clean: Scores) -> dict[str, Any]:
    numbers: dict[str, Any] = dict(scores.numbers())
    if scores.bits_per_byte is not None and clean.bytes:
        numbers["bits_per_clean_byte"] = scores.bits_per_byte * scores.bytes / clean.bytes
    return numbers


def _scores(
    trained: TrainedRun, data: Dataset, *, whole: bool = False
) -> tuple[Evaluation, Scores]:
    """Collective: scores of the held-out documents, and those of all together; `whole` looks past eval.max_tokens.

    Raises:
        DataError: there are none.
    """
    config = trained.config
    settings = config.eval.model_copy(update={"max_tokens": None}) if whole else config.eval
    found = evaluate(
        trained.engine,
        trained.task,
        data,
        settings,
        micro_batch_tokens=config.train.micro_batch_tokens,
    )
    if found is None or found.total is None:
        raise DataError(
            f"{trained.run_dir}: no source holds documents out; set data.held_out.documents above 0"
        )
    return found, found.total


def _finish(trained: TrainedRun, report: dict[str, Any], path: Path) -> dict[str, Any]:
    plain: dict[str, Any] = plain_json(report)
    if trained.topology.is_main:
        _write_report(path, plain)
    return plain


def _write_report(path: Path, report: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(exist_ok=True)
        write_json(path, report)
    except OSError as error:
        # A run that is someone else's to write can still be evaluated.
        log.warning("%s was not written: %s", path, error.strerror)
