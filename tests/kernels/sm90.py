"""What Triton makes of a kernel for sm_90 (H100, H200): registers, spills and machine code, without a GPU.

Numbers don't betray a kernel whose rows landed across lanes or whose accumulators spilled: it is right, and three
times slower. Compilations run in forks of one process without TRITON_INTERPRET, because Triton chooses between its
interpreter and its compiler once, when it is imported.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

__all__ = ["Sm90", "compile_sm90", "needs_sm90_tools", "sm90_problem"]

_TOOLS = ("ptxas", "cuobjdump", "nvdisasm")
_SERVER = """
import importlib, json, os, resource, sys, traceback
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def cpu_seconds():
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def compile(job, kernel):
    # A cached result would report the time of reading it.
    os.environ["TRITON_CACHE_DIR"] = job["scratch"]
    constants = {
        name: getattr(tl, value[3:]) if isinstance(value, str) and value.startswith("tl.") else value
        for name, value in job["constants"].items()
    }
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else job["types"][name] for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in job["divisible_by_16"]}
    begun = cpu_seconds()
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", 90, 32),
        options=job["options"],
    )
    seconds = cpu_seconds() - begun
    with open(job["scratch"] + "/kernel.cubin", "wb") as file:
        file.write(compiled.asm["cubin"])
    return {"seconds": seconds, "shared_bytes": compiled.metadata.shared}


for line in sys.stdin:
    job = json.loads(line)
    kernel = getattr(importlib.import_module(job["module"]), job["kernel"])
    if os.fork() == 0:
        try:
            report = compile(job, kernel)
        except BaseException:
            report = {"error": traceback.format_exc()}
        with open(job["scratch"] + "/report.json", "w") as file:
            json.dump(report, file)
        os._exit(0)
    os.wait()
    print(flush=True)
"""


@functools.cache
def _server() -> subprocess.Popen[str]:
    """Imports Triton and the kernels once and forks for each compilation; ends with this process, whose pipe it reads."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    )


@functools.cache
def _tools_folder() -> Path | None:
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "backends" / "nvidia" / "bin"


def sm90_problem() -> str | None:
    """Why nothing can be compiled for sm_90 here, in one line; None if it can."""
    folder = _tools_folder()
    if folder is None:
        return "Triton is not installed"
    missing = [tool for tool in _TOOLS if not (folder / tool).exists()]
    return f"this Triton brings no {', '.join(missing)}" if missing else None


needs_sm90_tools = pytest.mark.skipif(
    sm90_problem() is not None, reason=f"compiling for sm_90: {sm90_problem()}"
)


@dataclass(frozen=True)
class Sm90:
    """One kernel compiled for sm_90.

    Attributes:
        registers: a thread.
        spill_bytes: local memory and stack a thread; anything but 0 is a spill (or an indexed local array).
        shared_bytes: shared memory a program.
        seconds: compile time, of the processor and not of the clock, so that a busy machine does not count.
        sass: (address, instruction) of the machine code, predicates included.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    seconds: float
    sass: tuple[tuple[int, str], ...]

    def count(self, opcode: str, code: Sequence[str] | None = None) -> int:
        """Instructions whose opcode starts with `opcode` (SHFL, BAR, MUFU.EX2, RED ...), in `code` or everywhere."""
        code = self.code if code is None else code
        return sum(opcode_of(line).startswith(opcode) for line in code)

    @property
    def code(self) -> list[str]:
        return [line for _, line in self.sass]

    @property
    def loops(self) -> list[list[str]]:
        """The body of every loop, innermost (shortest) first: what lies between a backward branch and its target."""
        found = []
        for address, line in self.sass:
            target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", line)
            if target and (start := int(target[1], 16)) < address:
                found.append([code for at, code in self.sass if start <= at <= address])
        return sorted(found, key=len)

    def innermost(self, opcode: str) -> list[str]:
        """The shortest loop that holds an instruction of this opcode.

        Raises:
            LookupError: no loop does.
        """
        for body in self.loops:
            if self.count(opcode, body):
                return body
        raise LookupError(f"no loop holds {opcode}")


def opcode_of(line: str) -> str:
    """`FFMA` of `@!P0 FFMA R1, R2, R3, R4`."""
    return re.sub(r"^@!?U?P\d+\s+", "", line).split(" ", 1)[0]


@functools.cache
def _compile(job_text: str) -> Sm90:
    folder = _tools_folder()
    assert folder is not None
    with tempfile.TemporaryDirectory() as scratch:
        report = _compiled_by_server({**json.loads(job_text), "scratch": scratch})
        if "error" in report:
            raise RuntimeError(f"compiling for sm_90 failed:\n{report['error'][-4000:]}")
        cubin = os.path.join(scratch, "kernel.cubin")
        usage = _run(folder / "cuobjdump", "-res-usage", cubin)
        listing = _run(folder / "nvdisasm", "-c", "-hex", cubin)
    sizes = {name: int(size) for name, size in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return Sm90(
        registers=sizes["REG"],
        spill_bytes=sizes["STACK"] + sizes["LOCAL"],
        shared_bytes=report["shared_bytes"],
        seconds=report["seconds"],
        sass=_parse(listing),
    )


def _compiled_by_server(job: Mapping[str, Any]) -> dict[str, Any]:
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    print(json.dumps(job), file=server.stdin, flush=True)
    server.stdout.readline()
    report = Path(job["scratch"]) / "report.json"
    return json.loads(report.read_text()) if report.exists() else {"error": "the compiler died"}


def _run(*command: object) -> str:
    return subprocess.run(
        [str(part) for part in command], check=True, capture_output=True, text=True
    ).stdout


def _parse(listing: str) -> tuple[tuple[int, str], ...]:
    """Labels of branches become addresses, so that a loop can be told from a forward branch."""
    labels: dict[str, int] = {}
    waiting: list[str] = []
    lines: list[tuple[int, str]] = []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_[\w.]+):", line):
            waiting.append(label[1])
        elif code := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(.+?)\s*;", line):
            address = int(code[1], 16)
            labels.update(dict.fromkeys(waiting, address))
            waiting.clear()
            lines.append((address, code[2]))
    resolved = []
    for address, line in lines:
        named = re.search(r"`\((\.L_[\w.]+)\)", line)
        if named and named[1] in labels:
            line = line.replace(named[0], hex(labels[named[1]]))
        resolved.append((address, line))
    return tuple(resolved)


def compile_sm90(
    module: str,
    kernel: str,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    divisible_by_16: Sequence[str] = (),
    num_warps: int = 1,
    num_stages: int = 1,
    max_registers: int | None = None,
) -> Sm90:
    """Compile `module.kernel` for sm_90; the result is kept for the process.

    Args:
        types: Triton's type of every argument that is not a constant: `*fp32`, `*bf16`, `i32`, `i64`, `fp32` ...
        constants: values of the tl.constexpr arguments (and None for absent pointers); `"tl.float32"` names a type.
        divisible_by_16: pointers that are aligned to 16 bytes, integers that are multiples of 16.

    Raises:
        RuntimeError: it does not compile; the end of Triton's message.
    """
    job = {
        "module": module,
        "kernel": kernel,
        "types": dict(types),
        "constants": dict(constants),
        "divisible_by_16": list(divisible_by_16),
        "options": {
            "num_warps": num_warps,
            "num_stages": num_stages,
            "maxnreg": max_registers,
            "enable_fp_fusion": True,
        },
    }
    return _compile(json.dumps(job, sort_keys=True))
