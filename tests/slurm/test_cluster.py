"""The cluster on one host as its page says: started, looked at, used, stopped, and nothing left of it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import PROGRAMS, Cluster, ClusterError, _family, missing_programs

SCRIPT = Path(__file__).with_name("cluster.py")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "slurm-on-one-host.md"


@pytest.fixture
def folder() -> Iterator[Path]:
    if missing := missing_programs():
        pytest.skip(f"SLURM is not on this machine ({missing[0]} is missing)")
    folder = Path(tempfile.mkdtemp(prefix="weft-slurm-"))
    yield folder
    if folder.exists():
        Cluster(folder).stop()


def script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_started_used_and_stopped(folder: Path) -> None:
    started = script("start", str(folder))
    assert started.returncode == 0, started.stderr
    name, _, conf = shlex.split(started.stdout)[1].partition("=")
    assert (name, conf) == ("SLURM_CONF", str(folder / "slurm.conf"))

    environment = {**os.environ, name: conf}
    names = ["srun", "-N2", "-n2", "bash", "-c", "echo $SLURMD_NODENAME"]
    out = subprocess.run(names, env=environment, capture_output=True, text=True, timeout=60).stdout
    assert sorted(out.split()) == ["n1", "n2"]
    # A job that nobody waits for goes with the cluster.
    left = ["sbatch", "--output=/dev/null", "--wrap=sleep 1000"]
    subprocess.run(left, env=environment, capture_output=True, check=True, timeout=60)

    again = script("start", str(folder))
    assert (again.returncode, again.stdout) == (2, "")
    assert "holds a cluster already; stop it first" in again.stderr
    status = script("status", str(folder))
    assert re.search(r"^n1 (mixed|idle)\nn2 idle$", status.stdout, re.M), status.stdout

    assert script("stop", str(folder)).returncode == 0
    assert not folder.exists()
    assert _family(folder) == []
    gone = script("status", str(folder))
    assert gone.returncode == 2
    assert "start one with" in gone.stderr


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster._which", lambda name: None)
    assert missing_programs() == list(PROGRAMS)
    with pytest.raises(ClusterError, match=r"munged, slurmctld, .* not found; .*apt-get install"):
        Cluster(tmp_path / "none").start()
    assert not (tmp_path / "none").exists()


def test_the_page_has_every_verb_and_option_of_the_script() -> None:
    page, help_text = PAGE.read_text(), script("--help").stdout
    for word in ("start", "status", "stop", "--nodes", "--cpus"):
        assert word in help_text
        assert word in page
    assert set(re.findall(r"cluster\.py (\w+)", page)) == {"start", "stop"}
