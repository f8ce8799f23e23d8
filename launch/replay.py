"""`weft debug RUN --step K`: the replay's report as tables, and the way into a debugger."""

from __future__ import annotations

import json
import math
import pdb
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..models.errors import LaunchError, WeftError
from .options import print_table

if TYPE_CHECKING:
    from torch import nn

    from ..trainer.replay.report import Comparison, PhaseReport, ReplayReport
    from ..trainer.replay.statistics import TensorStatistics

__all__ = ["run_replay"]

NOTICEABLE = {"fp32": 1e-5, "bf16": 2e-2}
"""Relative differences to the reference kernels below this are rounding."""


def run_replay(
    run_dir: Path,
    overrides: list[str],
    *,
    step: int | None,
    rank: int | None,
    ranks: int | None,
    module: str | None,
    depth: int,
    top: int,
    use_pdb: bool,
    break_at: str | None,
    reference: bool,
    fp32: bool,
    stream: bool,
    no_samples: bool,
    as_json: bool,
    out: bool,
    **_: Any,
) -> int:
    """Replay, print, and write where asked to.

    Raises:
        WeftError: see `replay_step`.
    """
    from ..trainer.replay.replay import ReplayOptions, replay_step

    if stream and reference:
        raise click.UsageError("--reference needs the whole model; leave out --stream")
    options = ReplayOptions(
        step=step,
        rank=rank,
        ranks=ranks,
        fp32=fp32,
        stream=stream,
        reference=reference,
        samples=not no_samples,
        on_failure=_stop_at_failure if use_pdb else None,
        break_at=break_at,
        on_break=_stop_at_module,
    )
    try:
        report = replay_step(run_dir, options, overrides, lambda text: click.echo(text, err=True))
    except WeftError:
        raise
    except Exception:
        if not use_pdb:
            raise
        traceback.print_exc()
        pdb.post_mortem(sys.exc_info()[2])
        return 1
    # First the file: a pager that is closed early must not cost it.
    if out:
        _write(run_dir, report)
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=1))
    else:
        _print_report(report, module, depth, top)
    return 0


def _stop_at_failure(module: nn.Module, inputs: Any, output: Any) -> None:
    click.echo(
        f"a value that is not finite comes out of {type(module).__name__}: "
        "look at module, inputs, output (in a backward: the gradients that came, that went)",
        err=True,
    )
    breakpoint()


def _stop_at_module(module: nn.Module, inputs: Any, output: Any) -> None:
    click.echo(f"after {type(module).__name__}: look at module, inputs, output", err=True)
    breakpoint()


def _write(run_dir: Path, report: ReplayReport) -> None:
    from ..trainer.files import write_json

    share = "" if report.rank is None else f"_rank_{report.rank:05d}"
    path = run_dir / "debug" / f"step_{report.step:08d}{share}.json"
    try:
        path.parent.mkdir(exist_ok=True)
        write_json(path, report.to_dict())
    except OSError as error:
        raise LaunchError(f"{path} cannot be written: {error.strerror}; use --json") from error
    click.echo(f"written: {path}", err=True)


def _print_report(report: ReplayReport, part: str | None, depth: int, top: int) -> None:
    click.echo(_heading(report))
    for note in report.notes:
        click.echo(f"note: {note}")
    click.echo()
    _print_values(report)
    for phase in report.phases:
        suffix = "" if len(report.phases) == 1 else f" ({phase.phase})"
        _print_first_non_finite(phase)
        _print_modules(phase, part, depth, suffix)
        _print_parameters(phase, part, top, suffix)
    _print_samples(report, top)
    _print_kernels(report, part, top)
    click.echo(f"{report.seconds:.1f} s")


def _heading(report: ReplayReport) -> str:
    share = (
        f"all of {report.ranks} ranks"
        if report.rank is None
        else f"rank {report.rank} of {report.ranks}"
    )
    if report.ranks == 1:
        share = "1 rank"
    origin = "the start values" if report.checkpoint is None else f"checkpoint {report.checkpoint}"
    again = report.step - 1 - (report.checkpoint or 0)
    trained = f" and {_count(again, 'step')} trained again" if again else ""
    streamed = (
        f", streamed: at most {report.peak_weight_bytes / 1e6:.2f} MB of weights at a time"
        if report.peak_weight_bytes
        else ""
    )
    return (
        f"step {report.step} of {report.run_dir}: from {origin}{trained}, {share}, samples {report.first_sample} to "
        f"{report.last_sample} in {_count(report.micro_batches, 'micro-batch', 'es')}, {report.compute} on {report.device}{streamed}"
    )


def _count(number: int, thing: str, ending: str = "s") -> str:
    return f"{number} {thing}{'' if number == 1 else ending}"


def _print_values(report: ReplayReport) -> None:
    compared = {c.name: c for c in report.comparisons}
    if not compared:
        why = "only a share was replayed" if report.rank is not None else "the step has no record"
        print_table("", ("", "replayed"), list(report.values.items()), right=(1,))
        click.echo(f"not compared with the run: {why}\n")
        return
    rows = [
        (name, compared[name].recorded, value, _verdict(compared[name]))
        if name in compared
        else (name, "", value, "")
        for name, value in report.values.items()
    ]
    print_table("", ("", "recorded", "replayed", ""), rows, right=(1, 2))
    if "data_digest" in compared and not compared["data_digest"].is_equal:
        click.echo("THE DATA IS NOT WHAT THE RUN SAW: nothing below says anything about it\n")


def _verdict(found: Comparison) -> str:
    if found.is_equal:
        return "equal"
    difference = found.relative_difference
    return f"differs by {difference:.1e}" if math.isfinite(difference) else "differs"


def _print_first_non_finite(phase: PhaseReport) -> None:
    first = phase.first_non_finite
    if first is not None:
        own = "; none of its submodules is to blame: its own computation" if first.own else ""
        bad = f"; not finite in it: {', '.join(first.parameters)}" if first.parameters else ""
        click.echo(f"FIRST NOT FINITE: {first.where} of {first.module}{own}{bad}\n")
    elif phase.first_bad_gradient is not None:
        click.echo(
            f"FIRST NOT FINITE: the gradient that comes back to {phase.first_bad_gradient}, from what follows it\n"
        )
    else:
        click.echo("every module's output and gradient is finite\n")


def _print_modules(phase: PhaseReport, part: str | None, depth: int, suffix: str) -> None:
    shown = [m for m in phase.modules if (m.depth <= depth or part) and (part or "") in m.name]
    rows = [(m.name, m.kind, *_cells(m.output), *_cells(m.gradient)) for m in shown]
    numbers = ("mean", "std", "max", "zeros", "bad")
    columns = ("module", "kind", *numbers, *(f"grad {n}" for n in numbers))
    print_table(f"Modules{suffix}", columns, rows, right=range(2, len(columns)))
    hidden = len(phase.modules) - len(shown)
    if hidden and not part:
        click.echo(f"{hidden} deeper modules: --depth, --module or --json\n")


def _cells(values: TensorStatistics) -> tuple[str, ...]:
    if not values.count:
        return ("",) * 5
    if values.count == values.non_finite:
        return ("nan", "nan", "nan", "", str(values.non_finite))
    return (
        f"{values.mean:.2e}",
        f"{values.std:.2e}",
        f"{values.abs_max:.2e}",
        f"{values.zero_fraction:.1%}" if values.zeros else "0",
        str(values.non_finite),
    )


def _print_parameters(phase: PhaseReport, part: str | None, top: int, suffix: str) -> None:
    wanted = [p for p in phase.parameters if (part or "") in p.name.replace("/", ".")]
    bad = [p.name for p in wanted if p.weight_non_finite]
    if bad:
        click.echo(f"weights that are not finite: {', '.join(bad)}\n")
    without = [p.name for p in wanted if p.gradient is None]
    ranked = sorted((p for p in wanted if p.gradient is not None), key=_rank, reverse=True)
    rows = [
        (
            p.name,
            f"{p.gradient_norm:.3e}",
            f"{p.weight_norm:.3e}",
            "" if p.update_ratio is None else f"{p.update_ratio:.2e}",
            f"{p.gradient.zero_fraction:.1%}" if p.gradient else "",
            p.gradient.non_finite if p.gradient else "",
        )
        for p in ranked[:top]
    ]
    columns = ("parameter", "grad norm", "weight norm", "update / weight", "grad zeros", "grad bad")
    title = f"Largest gradients{suffix}: {len(rows)} of {len(ranked)} parameters"
    print_table(title, columns, rows, right=range(1, len(columns)))
    if without:
        click.echo(f"no gradient: {', '.join(without)}\n")


def _rank(parameter: Any) -> float:
    norm = parameter.gradient_norm
    return float("inf") if norm != norm else norm


def _print_samples(report: ReplayReport, top: int) -> None:
    rows = [
        (
            s.sample,
            report.source_names[s.source],
            "no target" if s.loss is None else f"{s.loss:.4f}",
            s.targets,
            report.excerpt(s),
        )
        for s in report.samples[:top]
    ]
    if rows:
        title = f"Highest losses: {len(rows)} of {len(report.samples)} samples"
        columns = ("sample", "source", "loss", "targets", "begins with")
        print_table(title, columns, rows, right=(0, 2, 3))


def _print_kernels(report: ReplayReport, part: str | None, top: int) -> None:
    if report.kernels is None:
        return
    found = [d for d in report.kernel_differences if (part or "") in d.name]
    limit = NOTICEABLE[report.compute]
    first = next((d.name for d in found if d.output > limit), "none")
    backward = next((d.name for d in reversed(found) if d.gradient > limit), "none")
    click.echo(f"{report.kernels} kernels against the reference, on the first micro-batch:")
    click.echo(f"  first output that differs by more than {limit:g}: {first}")
    click.echo(f"  first gradient that does, coming from the loss: {backward}")
    worst = sorted(found, key=lambda d: max(d.output, d.gradient), reverse=True)[:top]
    rows = [(d.name, d.kind, f"{d.output:.1e}", f"{d.gradient:.1e}") for d in worst]
    print_table(
        "", ("module", "kind", "output differs by", "gradient differs by"), rows, right=(2, 3)
    )
