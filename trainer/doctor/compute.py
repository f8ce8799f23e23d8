"""Whether torch sees the GPUs, whether they multiply right and fast, and whether Triton compiles."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from .context import Context
from .findings import Finding, fail, ok, skipped

__all__ = ["check_cuda", "check_matmul", "check_triton", "devices_of", "time_work"]

CPU_SIZE, GPU_SIZE = 512, 4096
REPEATS, QUICK_REPEATS = 12, 5


def devices_of(context: Context) -> list[torch.device]:
    """All GPUs of a single process, or this rank's own; the CPU where there is none."""
    if not torch.cuda.is_available():
        return [torch.device("cpu")]
    count = torch.cuda.device_count()
    if context.place.world_size == 1:
        return [torch.device("cuda", i) for i in range(count)]
    # One task a node looks at all of its GPUs, one a GPU at its own.
    if context.place.local_world_size == 1:
        return [torch.device("cuda", i) for i in range(count)]
    return [torch.device("cuda", min(context.place.local_rank, count - 1))]


def check_cuda(context: Context) -> Finding:
    count = torch.cuda.device_count()
    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi") is None:
            return skipped("cuda", "no GPU")
        built = torch.version.cuda or "no CUDA"
        return fail(
            "cuda",
            f"nvidia-smi is there, but torch {torch.__version__} (built for {built}) sees no GPU",
            "install the torch build that the driver can run: https://pytorch.org/get-started/locally",
            "configuration",
        )
    place = context.place
    # One GPU shown to each task is the scheduler's doing.
    has_own = count == 1 and "SLURM_PROCID" in context.environment
    if count < place.local_world_size and place.world_size > 1 and not has_own:
        return fail(
            "cuda",
            f"{place.local_world_size} ranks on {place.host}, but torch sees {count} GPUs there",
            "start as many tasks a node as it has GPUs, or fewer",
            "configuration",
        )
    nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    cuda = torch.version.cuda or torch.version.hip or "?"
    found = f"torch sees {count} GPUs, CUDA {cuda}, NCCL {nccl}"
    return ok("cuda", found, CUDA=cuda, NCCL=nccl)


def check_matmul(context: Context) -> Finding:
    """A product on every device against the same product in float64."""
    devices = devices_of(context)
    speeds = []
    for device in devices:
        error = _matmul_error(device)
        if not error < 1e-4:
            return fail(
                "matmul",
                f"{device} multiplies wrongly: relative error {error:.1e}",
                "leave this node out and tell its operators: it would spoil a run without a word",
            )
        seconds = time_work(context, device)
        size = GPU_SIZE if device.type == "cuda" else CPU_SIZE
        speeds.append(2 * size**3 / seconds / 1e12)
    kind = "bf16" if devices[0].type == "cuda" else "fp32"
    slowest, fastest = min(speeds), max(speeds)
    names = f"{len(devices)} GPUs" if len(devices) > 1 else str(devices[0])
    found = f"{names} right to 1e-4, {slowest:.3g}{f' to {fastest:.3g}' if len(devices) > 1 else ''} TFLOP/s in {kind}"
    if slowest < fastest / 1.3:
        index = speeds.index(slowest)
        return fail(
            "matmul",
            f"{found}: {devices[index]} is the slow one",
            "look at its clocks and temperature (nvidia-smi -q -d PERFORMANCE); leave the node out",
        )
    return ok("matmul", found)


def _matmul_error(device: torch.device) -> float:
    """Largest relative RMS distance of an fp32 product from float64's, over a few draws."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for _ in range(3):
        a, b = (torch.randn(256, 256, generator=generator) for _ in range(2))
        exact = a.double() @ b.double()
        product = (a.to(device) @ b.to(device)).cpu().double()
        distance = ((product - exact).norm() / exact.norm()).item()
        worst = max(worst, distance) if distance == distance else float("inf")
    return worst


def time_work(context: Context, device: torch.device) -> float:
    """Median seconds of one product on this device alone; no other rank is waited for."""
    is_cuda = device.type == "cuda"
    size, dtype = (GPU_SIZE, torch.bfloat16) if is_cuda else (CPU_SIZE, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(2 + (QUICK_REPEATS if context.is_quick else REPEATS)):
        if is_cuda:
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        torch.mm(a, b)
        if is_cuda:
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[2:])


_KERNEL = """
import torch, triton, triton.language as tl

@triton.jit
def double(x, n, block: tl.constexpr):
    i = tl.arange(0, block)
    tl.store(x + i, tl.load(x + i, mask=i < n) * 2, mask=i < n)

x = torch.ones(60, device="cuda")
double[(1,)](x, 60, block=64)
assert x.eq(2).all()
"""


def check_triton(context: Context) -> Finding:
    """A kernel compiled into an empty cache, in a process of its own: a broken compiler may take its process down."""
    if not torch.cuda.is_available():
        return skipped("triton", "no GPU")
    if context.is_quick:
        return skipped("triton", "--quick")
    device = devices_of(context)[0]
    with tempfile.TemporaryDirectory(prefix="weft_doctor_") as folder:
        script = Path(folder) / "kernel.py"
        script.write_text(_KERNEL)
        begin = time.perf_counter()
        done = subprocess.run(
            [sys.executable, str(script)],
            capture_output=True,
            text=True,
            timeout=context.limit_s,
            check=False,
            env={
                **os.environ,
                "TRITON_CACHE_DIR": folder,
                "CUDA_VISIBLE_DEVICES": _visible(device),
            },
        )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return fail(
            "triton",
            f"a kernel does not compile or run: {reason}",
            "Triton needs a C compiler and Python's headers (gcc, python3-dev) and a torch that matches it",
            "configuration",
        )
    return ok("triton", f"a kernel compiled and ran in {time.perf_counter() - begin:.1f} s")


def _visible(device: torch.device) -> str:
    """The outer number of a device that is already one of those made visible to this process."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return visible.split(",")[device.index] if visible else str(device.index)
