"""The code of an attempt, kept with the run: what is edited after the submission does not change the job.

    RUN/slurm/code/3f9c20d1a7b4/weft/...        the package, when it runs from a checkout
                                source.json     version, git commit, whether it was changed
                                changes.diff    what was changed since the commit

The folder is named by its content, so the same code submitted again is kept once. A package installed from a wheel is not
copied: its version names it. Imports no torch.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import __version__
from ...models.errors import LaunchError
from ...trainer.files import write_json, write_text

__all__ = ["CodeSource", "find_code"]

FLOORS = ("kernels", "models", "trainer", "launch")
_LEFT_OUT = {"__pycache__", ".git", ".mypy_cache", ".ruff_cache", ".pytest_cache"}
GIT_TIMEOUT_S = 20


@dataclass(frozen=True)
class CodeSource:
    """The package as it is now: its files by their place in the snapshot; none where it is installed."""

    files: dict[str, Path]
    digest: str
    commit: str | None
    changes: str

    @property
    def is_copied(self) -> bool:
        return bool(self.files)

    def folder(self, parent: Path) -> Path | None:
        """Where the snapshot below `parent` (RUN/slurm/code) is, or None for an installed package."""
        return parent / self.digest if self.is_copied else None

    def describe(self) -> dict[str, Any]:
        return {
            "version": __version__,
            "commit": self.commit,
            "changed": bool(self.changes),
            "snapshot": self.digest if self.is_copied else None,
        }

    def write(self, parent: Path) -> Path | None:
        """Copy the code below `parent`, whole or not at all."""
        target = self.folder(parent)
        if target is None or target.is_dir():
            return target
        temporary = parent / f".{self.digest}.{os.getpid()}.tmp"
        try:
            for place, source in self.files.items():
                (temporary / place).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, temporary / place)
            write_json(temporary / "source.json", self.describe())
            if self.changes:
                write_text(temporary / "changes.diff", self.changes)
            os.replace(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return target


def find_code() -> CodeSource:
    """The code that runs now."""
    floors = {name: _folder_of(name) for name in FLOORS}
    if _is_installed(floors["launch"]):
        return CodeSource({}, "", None, "")
    files = {f"weft/{name}.py": _folder_of("") / f"{name}.py" for name in ("__init__", "__main__")}
    # In a checkout the root package's own files lie below launch.
    own = floors["launch"] / "weft"
    for floor, folder in floors.items():
        inner = (f for f in _files_below(folder) if own not in f.parents)
        files |= {f"weft/{floor}/{file.relative_to(folder).as_posix()}": file for file in inner}
    digest = hashlib.sha256()
    for place in sorted(files):
        digest.update(place.encode() + b"\0" + files[place].read_bytes() + b"\0")
    commit = _git(floors["launch"], "rev-parse", "HEAD")
    paths = [str(folder) for folder in floors.values()]
    changes = _git(floors["launch"], "diff", "HEAD", "--", *paths) if commit else None
    return CodeSource(files, digest.hexdigest()[:12], commit and commit.strip(), changes or "")


def _folder_of(floor: str) -> Path:
    # Found without being imported: the floors of a checkout are four folders side by side.
    package = __package__.partition(".")[0]
    spec = importlib.util.find_spec(f"{package}.{floor}" if floor else package)
    if spec is None or spec.origin is None:
        raise LaunchError(f"the package {package} has no files to be found; install it anew")
    return Path(spec.origin).resolve().parent


def _is_installed(folder: Path) -> bool:
    places = {sysconfig.get_paths()[name] for name in ("purelib", "platlib")}
    return any(folder.is_relative_to(Path(place).resolve()) for place in places)


def _files_below(folder: Path) -> Iterator[Path]:
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in _LEFT_OUT)
        yield from (Path(here) / n for n in sorted(names) if not n.endswith((".pyc", ".tmp")))


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=GIT_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
