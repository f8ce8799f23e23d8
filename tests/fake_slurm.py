"""Commands of SLURM as small shell scripts in a folder of their own: what they were asked is kept, what they answer is set by a test."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

COMMANDS = ("sbatch", "squeue", "scontrol", "scancel", "sacct", "srun")


class FakeSlurm:
    """Puts the commands before all others; `calls` are the words each was called with, in order."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        folder.mkdir()
        for command in COMMANDS:
            self.answer(command)
        self.answer("sbatch", "101")
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        for name in list(os.environ):
            if name.startswith(("SLURM_", "SBATCH_")):
                monkeypatch.delenv(name)

    def answer(self, command: str, output: str = "", *, error: str = "", code: int = 0) -> None:
        """What `command` says from now on; sbatch keeps the script it is given."""
        path = self.folder / command
        keep = f"cat > {shlex.quote(str(self.script))}\n" if command == "sbatch" else ""
        path.write_text(
            "#!/bin/bash\n"
            f'echo {command} "$@" >> {shlex.quote(str(self.folder / "calls"))}\n'
            f"{keep}"
            f"printf '%s' {shlex.quote(output + chr(10) if output else '')}\n"
            f"printf '%s' {shlex.quote(error)} >&2\n"
            f"exit {code}\n"
        )
        path.chmod(0o755)

    def program(self, command: str, text: str) -> None:
        """A command of one's own."""
        (self.folder / command).write_text(f"#!/bin/bash\n{text}\n")
        (self.folder / command).chmod(0o755)

    def remove(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """No scheduler on this machine."""
        monkeypatch.setenv("PATH", str(self.folder / "nowhere"))

    @property
    def script(self) -> Path:
        """The last script that was submitted."""
        return self.folder / "script"

    @property
    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.is_file() else []

    def calls_of(self, command: str) -> list[str]:
        return [call for call in self.calls if call.split()[0] == command]
