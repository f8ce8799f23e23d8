"""Runs a function of a test module on several gloo ranks, each a process of its own."""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
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
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    command = [sys.executable, __file__, function, json.dumps(args)]
    processes = [
        subprocess.Popen(
            command,
            env={
                **environment,
                "RANK": str(r),
                "LOCAL_RANK": str(r),
                "LOCAL_WORLD_SIZE": str(ranks),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(ranks)
    ]
    results = []
    try:
        for rank, process in enumerate(processes):
            out, err = process.communicate(timeout=timeout_s)
            assert process.returncode == 0, (
                f"rank {rank} of {ranks} failed:\n{err[-4000:]}\n{out[-1000:]}"
            )
            results.append(json.loads(out.strip().splitlines()[-1]))
    finally:
        for process in processes:
            process.kill()
    return results


def _main() -> None:
    from weft.trainer.distributed import initialise_distributed, shutdown_distributed

    module, _, name = sys.argv[1].partition(":")
    topology = initialise_distributed("cpu", timeout_s=60)
    result = getattr(importlib.import_module(module), name)(topology, *json.loads(sys.argv[2]))
    print(json.dumps(result))
    sys.stdout.flush()
    shutdown_distributed()


if __name__ == "__main__":
    _main()
