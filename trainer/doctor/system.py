"""The node's software and limits: versions, packages, names, shared memory, open files, SLURM, W&B."""

from __future__ import annotations

import netrc
import os
import platform
import resource
import shutil
import socket
import subprocess
from importlib import metadata, util
from pathlib import Path

from .context import Context
from .findings import Finding, fail, ok, skipped, warn

__all__ = [
    "check_hostname",
    "check_limits",
    "check_packages",
    "check_shared_memory",
    "check_slurm",
    "check_versions",
    "check_wandb",
]

OPTIONAL = {
    "deepspeed": "deepspeed",
    "accelerate": "accelerate",
    "wandb": "wandb",
    "transformers": "hf",
    "datasets": "hf",
    "mamba_ssm": "mamba",
}
"""Package -> the extra of weft that brings it."""
OPEN_FILES = 4096
SHARED_MEMORY_BYTES = 1 << 30


def check_versions(context: Context) -> Finding:
    from ... import __version__

    versions = {"Python": platform.python_version(), "weft": __version__}
    for package in ("torch", "triton", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "none"
    if versions["torch"] == "none":
        return fail(
            "versions",
            "torch is not installed",
            "pip install weft again in this environment",
            "configuration",
        )
    # An installed torch may still not load: a missing library, a wrong driver, a broken file system.
    import torch

    versions["torch"] = torch.__version__
    return ok("versions", ", ".join(f"{k} {v}" for k, v in versions.items()), **versions)


def check_packages(context: Context) -> Finding:
    present, absent = [], []
    versions = dict.fromkeys(OPTIONAL, "absent")
    for package, extra in OPTIONAL.items():
        if util.find_spec(package) is None:
            absent.append(f"{package} (pip install 'weft[{extra}]')")
        else:
            versions[package] = _version_of(package)
            present.append(f"{package} {versions[package]}")
    engine = context.wants("parallel", "engine")
    if engine in OPTIONAL and util.find_spec(engine) is None:
        return fail(
            "packages",
            f"the run's parallel.engine is {engine}, which is not installed",
            f"pip install 'weft[{OPTIONAL[engine]}]'",
            "configuration",
        )
    found = f"present: {', '.join(present) or 'none'}; absent: {', '.join(absent) or 'none'}"
    return ok("packages", found, **versions)


def _version_of(package: str) -> str:
    try:
        return metadata.version(package.replace("_", "-"))
    except metadata.PackageNotFoundError:
        return "?"


def check_hostname(context: Context) -> Finding:
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        return fail(
            "hostname",
            f"{name} does not resolve: {error.strerror or error}",
            f"add {name} to /etc/hosts or to DNS; ranks find each other by name",
        )
    if address.startswith("127.") and len(context.place.nodes) > 1:
        return warn(
            "hostname",
            f"{name} resolves to {address}, which other nodes cannot reach",
            "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the network between nodes (ip -br addr)",
        )
    return ok("hostname", f"{name} is {address}")


def check_shared_memory(context: Context) -> Finding:
    if not Path("/dev/shm").is_dir():
        return skipped("shared memory", "no /dev/shm")
    usage = shutil.disk_usage("/dev/shm")
    found = f"{usage.free / 1e9:.1f} GB free of {usage.total / 1e9:.1f} GB in /dev/shm"
    if usage.free < SHARED_MEMORY_BYTES:
        return warn(
            "shared memory",
            f"{found}; NCCL and loader workers want 1 GB",
            "in a container: --shm-size=16g or --ipc=host; else remove what lies in /dev/shm",
        )
    return ok("shared memory", found)


def check_limits(context: Context) -> Finding:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    found = f"open files {_limit(files)}, locked memory {_limit(locked, 'B')}"
    if 0 <= files < OPEN_FILES:
        return warn(
            "limits",
            f"{found}; {OPEN_FILES} open files are wanted",
            f"ulimit -n {OPEN_FILES} in the job's setup, or raise nofile in limits.conf",
        )
    has_fabric = any(Path("/sys/class/infiniband").glob("*"))
    if has_fabric and 0 <= locked < 1 << 30:
        return warn(
            "limits",
            f"{found}; InfiniBand needs unlimited locked memory",
            "set memlock unlimited in limits.conf and PropagateResourceLimitsExcept=MEMLOCK in slurm.conf",
        )
    return ok("limits", found)


def _limit(value: int, unit: str = "") -> str:
    if value == resource.RLIM_INFINITY:
        return "unlimited"
    return (
        f"{value / 1e9:.1f} GB"
        if unit and value >= 1e9
        else f"{value:,}{' ' if unit else ''}{unit}"
    )


def check_slurm(context: Context) -> Finding:
    if shutil.which("sinfo") is None and shutil.which("sbatch") is None:
        return skipped("slurm", "no SLURM client")
    if shutil.which("sbatch") is None:
        return warn(
            "slurm",
            "sinfo is there but sbatch is not",
            "submit from a login node, or load the site's slurm module",
        )
    done = subprocess.run(
        ["sbatch", "--version"], capture_output=True, text=True, timeout=20, check=False
    )
    version = done.stdout.strip() or done.stderr.strip().splitlines()[-1]
    if done.returncode:
        return warn(
            "slurm",
            f"sbatch does not run: {version}",
            "load the site's slurm module, or set SLURM_CONF",
        )
    job = context.environment.get("SLURM_JOB_ID")
    return ok("slurm", f"{version}, sbatch found" + (f", in job {job}" if job else ""))


def check_wandb(context: Context) -> Finding:
    wants = context.wants("logging", "wandb", "enabled")
    if util.find_spec("wandb") is None:
        if wants:
            return fail(
                "wandb",
                "the run logs to W&B, but wandb is not installed",
                "pip install 'weft[wandb]'",
                "configuration",
            )
        return skipped("wandb", "not installed")
    offline = (
        context.environment.get("WANDB_MODE") == "offline"
        or context.wants("logging", "wandb", "mode") == "offline"
    )
    if offline:
        return ok("wandb", "offline: runs are kept for wandb sync")
    if context.environment.get("WANDB_API_KEY") or _has_netrc_entry():
        return ok("wandb", "a key is there")
    if not wants:
        return ok("wandb", "no key; none is needed before logging.wandb.enabled=true")
    return fail(
        "wandb",
        "the run logs to W&B, but there is no key",
        "wandb login on a node with this home folder, or export WANDB_MODE=offline",
        "configuration",
    )


def _has_netrc_entry() -> bool:
    path = os.environ.get("NETRC") or Path.home() / ".netrc"
    try:
        return any("wandb" in host for host in netrc.netrc(str(path)).hosts)
    except (OSError, netrc.NetrcParseError):
        return False
