"""One cluster for all tests of this folder, and one run that nothing happened to."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, missing_programs
from lab import Job, Lab


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    if missing := missing_programs():
        pytest.skip(
            f"SLURM is not on this machine ({missing[0]} is missing): apt-get install slurm-wlm munge"
        )
    # A path that is short enough for a socket.
    cluster = Cluster(Path(tempfile.mkdtemp(prefix="weft-slurm-")))
    cluster.start(nodes=6, kill_wait=10, node_timeout=8)
    try:
        yield Lab(cluster, tmp_path_factory.mktemp("lab"))
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def undisturbed(lab: Lab) -> Job:
    """A run that was submitted and left alone."""
    job = lab.submit("undisturbed")
    lab.finish(job)
    return job
