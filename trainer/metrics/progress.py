"""What a person sees while a run goes: a live bar on a terminal, one line a flush elsewhere. Imports no torch.

The bar is written by hand: a rich redraw takes 700 us, forty times this one, and a step of a small model
only some 50,000. Rank 0 alone shows anything. Nothing here asks a device for a value.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, TextIO

__all__ = ["Progress", "format_count", "format_duration"]

REDRAW_S = 0.2
SMOOTHING = 0.3
"""Weight of the newest flush in the shown speed."""
BAR_CELLS = (4, 30)
_DIM, _BOLD, _GREEN, _RESET = "\x1b[2m", "\x1b[1m", "\x1b[32m", "\x1b[0m"
_CLEAR_LINE = "\r\x1b[2K"


def format_duration(seconds: float) -> str:
    """`47s`, `3m 05s`, `2h 14m`, `6d 03h`."""
    if not math.isfinite(seconds):
        return "?"
    whole = max(0, round(seconds))
    for unit, below, name, lower in (
        (86400, 3600, "d", "h"),
        (3600, 60, "h", "m"),
        (60, 1, "m", "s"),
    ):
        if whole >= unit:
            return f"{whole // unit}{name} {whole % unit // below:02d}{lower}"
    return f"{whole}s"


def format_count(value: float) -> str:
    """Three digits and a unit: `950`, `52.3K`, `1.20M`, `3.00T`."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= unit:
            scaled = value / unit
            return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f}{name}"
    return f"{value:.0f}"


class Progress:
    """Progress of one attempt at a run.

    Args:
        mode: the setting `logging.progress`.
        steps: of the whole run.
        start_step: where this attempt begins.
        is_main: whether this is rank 0; others show nothing.
        stream: where to; standard error by default, so that results can be piped.
        now: the clock, in seconds.
    """

    def __init__(
        self,
        mode: Literal["auto", "bar", "lines", "none"],
        steps: int,
        *,
        start_step: int = 0,
        is_main: bool = True,
        stream: TextIO | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stream = stream or sys.stderr
        self.mode = _resolve(mode, self.stream) if is_main else "none"
        self.steps, self.step = steps, start_step
        self._now = now
        self._next_draw = -math.inf
        self._values: Mapping[str, Any] = {}
        self._step_s: float | None = None
        self._wait_share = 0.0
        self._glyphs = _glyphs(self.stream)
        self._is_drawn = False

    def update(self, step: int) -> None:
        """A step was done. Redraws at most five times a second; else it costs well under a microsecond."""
        self.step = step
        if self.mode == "bar":
            now = self._now()
            if now >= self._next_draw:
                self._draw(now)

    def show(self, records: list[dict[str, Any]]) -> None:
        """Take the records of a flush: speeds from all of them, the rest from the last."""
        if not records or self.mode == "none":
            return
        self._take(records)
        self.step = max(self.step, int(records[-1]["step"]))
        if self.mode == "bar":
            self.update(self.step)
        else:
            self._write(f"{self._plain_line()}\n")

    def message(self, text: str) -> None:
        """One line above the bar."""
        if self.mode == "none":
            return
        self._write(f"{_CLEAR_LINE if self._is_drawn else ''}{text}\n")
        self._is_drawn = False
        self._next_draw = -math.inf

    def close(self) -> None:
        """Leave the bar as it stands, with the cursor below it."""
        if self.mode == "bar" and self._values:
            self._draw(self._now())
        if self._is_drawn:
            self._write("\n")
        self._is_drawn = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _take(self, records: list[dict[str, Any]]) -> None:
        self._values = records[-1]
        timed = [r for r in records if "step_s" in r]
        seconds = sum(r["step_s"] for r in timed)
        if seconds <= 0:
            return
        mean = seconds / len(timed)
        old = self._step_s
        self._step_s = mean if old is None else old + SMOOTHING * (mean - old)
        self._wait_share = sum(r.get("data_wait_s", 0.0) for r in timed) / seconds

    def _fields(self) -> list[tuple[str, str]]:
        """What is shown, the most important first: (name, value)."""
        values, fields = self._values, []
        for name, label in (("loss", "loss"), ("bits_per_byte", "bits/byte")):
            if name in values:
                fields.append((label, f"{values[name]:.3f}"))
        if "tokens_per_s" in values:
            fields.append(("tok/s", format_count(values["tokens_per_s"])))
        if "mfu" in values:
            fields.append(("MFU", f"{100 * values['mfu']:.1f}%"))
        if self._step_s is not None:
            fields.append(("wait", f"{100 * self._wait_share:.1f}%"))
            fields.append(("ETA", format_duration(self._eta())))
        return fields

    def _eta(self) -> float:
        return (self.steps - self.step) * (self._step_s or math.inf)

    def _plain_line(self) -> str:
        extra = [("lr", f"{self._values['lr']:.3g}")] if "lr" in self._values else []
        if "grad_norm" in self._values:
            extra.append(("grad norm", f"{self._values['grad_norm']:.3f}"))
        fields = self._fields()
        # Speeds change place least often, so they stand last.
        text = "  ".join(f"{name} {value}" for name, value in [*fields[:2], *extra, *fields[2:]])
        return f"step {self.step}/{self.steps}  {text}"

    def _draw(self, now: float) -> None:
        width = shutil.get_terminal_size((100, 24)).columns - 1
        self._write(f"\r{self._bar_line(width)}\x1b[K")
        self._is_drawn = True
        self._next_draw = now + REDRAW_S

    def _bar_line(self, width: int) -> str:
        """The line for a terminal, at most `width` cells without its colours."""
        share = min(1.0, self.step / self.steps) if self.steps else 1.0
        head = f"{self.step}/{self.steps}"
        fields = self._fields()
        while True:
            plain = "".join(f"  {name} {value}" for name, value in fields)
            cells = min(BAR_CELLS[1], width - len(head) - len(plain) - 1)
            if cells >= BAR_CELLS[0] or not fields:
                break
            # Narrow terminals lose the waiting share first, then the speeds; ETA and loss stay longest.
            fields = _without_least(fields)
        text = "".join(f"  {_DIM}{name}{_RESET} {value}" for name, value in fields)
        return f"{_bar(share, max(0, cells), self._glyphs)} {_BOLD}{head}{_RESET}{text}"

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()


def _without_least(fields: list[tuple[str, str]]) -> list[tuple[str, str]]:
    order = ("wait", "MFU", "tok/s", "ETA", "bits/byte", "loss")
    least = min(fields, key=lambda field: order.index(field[0]))
    return [field for field in fields if field is not least]


def _bar(share: float, cells: int, glyphs: tuple[str, str]) -> str:
    done = round(share * cells)
    return f"{_GREEN}{glyphs[0] * done}{_DIM}{glyphs[1] * (cells - done)}{_RESET}"


def _glyphs(stream: TextIO) -> tuple[str, str]:
    """What is done and what is left; plain ASCII where the terminal's encoding has no lines."""
    try:
        "━─".encode(getattr(stream, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return "#", "."
    return "━", "─"


def _resolve(mode: str, stream: TextIO) -> str:
    if mode != "auto":
        return mode
    is_terminal = stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb")
    return "bar" if is_terminal else "lines"
