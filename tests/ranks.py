"""Runs a function of a test module on several gloo ranks, each a process of its own.

The processes are forks of a server that has imported torch and the trainer; it runs no kernel and joins no group itself.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import socket
import sys
import tempfile
import time
import traceback
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def run_ranks(ranks: int, function: str, *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """Call `module:name(topology, *args)` on every rank; JSON-able arguments and results, in rank order.

    Raises:
        AssertionError: a rank failed, with its output.
    """
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    context = _server(environment["PYTHONPATH"])
    with tempfile.TemporaryDirectory(prefix="weft-ranks-") as folder:
        places = [Path(folder) / str(rank) for rank in range(ranks)]
        processes = []
        for rank, place in enumerate(places):
            own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(
                context.Process(target=_work, args=(own, function, json.dumps(args), place))
            )
            processes[-1].start()
        until = time.monotonic() + timeout_s
        try:
            for rank, (process, place) in enumerate(zip(processes, places, strict=True)):
                process.join(max(0.0, until - time.monotonic()))
                assert process.exitcode == 0, (
                    f"rank {rank} of {ranks} ended with {process.exitcode}:\n{_said(place)}"
                )
        finally:
            for process in processes:
                process.kill()
                process.join()
        return [json.loads(place.with_suffix(".json").read_text()) for place in places]


def _said(place: Path) -> str:
    path = place.with_suffix(".log")
    return path.read_text(errors="replace")[-5000:] if path.exists() else ""


def _server(path: str) -> ForkServerContext:
    """The context whose first process starts the server, which finds its modules by the environment alone."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = path
    try:
        multiprocessing.forkserver.ensure_running()  # type: ignore[attr-defined]
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return context


def _work(environment: dict[str, str], function: str, args: str, place: Path) -> None:
    """The life of a rank; its exit code says how it went, its files the rest."""
    log = os.open(place.with_suffix(".log"), os.O_WRONLY | os.O_CREAT, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.environ.clear()
    os.environ.update(environment)
    code = 1
    try:
        from weft.trainer.distributed import initialise_distributed, shutdown_distributed

        module, _, name = function.partition(":")
        topology = initialise_distributed("cpu", timeout_s=60)
        result = getattr(importlib.import_module(module), name)(topology, *json.loads(args))
        place.with_suffix(".json").write_text(json.dumps(result))
        shutdown_distributed()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
