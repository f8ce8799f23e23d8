"""A SLURM cluster on this one host: a controller and a few node daemons, all in a folder of their own.

    eval "$(python tests/slurm/cluster.py start)"     # exports SLURM_CONF; sinfo, sbatch and weft submit work now
    python tests/slurm/cluster.py status
    python tests/slurm/cluster.py stop                # jobs, daemons and folder are gone

It needs the packages slurm-wlm and munge, no rights, no systemd and no network but the loopback. Every interval is as short
as it goes, and two partitions preempt a third, so that what takes minutes on a cluster takes seconds. Plain Python, for any machine.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

MARK = "WEFT_SLURM_CLUSTER"
"""In the environment of the daemons, and so of the steps they start; not of the shells that use the cluster."""
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo")
START_S, STOP_S = 60.0, 15.0
MOST_JOBS = 100_000
"""Above the first job's number, which is drawn below it."""

CONFIG = """\
ClusterName=onehost
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
# Weft's jobs meet at a port made from their number, and other clusters of this host number theirs too.
FirstJobId={first_job}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A job that was requeued waits for its old credential to expire (120 s where nothing is said).
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge

StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log

# A container has neither cgroups nor a task affinity of its own to give away.
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
PropagateResourceLimits=NONE
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# Nodes have the CPUs they claim, not those of this host.
SlurmdParameters=config_overrides

JobRequeue=1
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait={kill_wait}
SlurmdTimeout={node_timeout}
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1,requeue_delay=1

{nodes}
PartitionName=normal Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=grace Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20
"""


class ClusterError(Exception):
    """One line: what was found, what to do."""


def missing_programs() -> list[str]:
    """Programs of SLURM and MUNGE that are not on this machine."""
    return [name for name in PROGRAMS if _which(name) is None]


def _which(name: str) -> str | None:
    # The daemons are where only root looks.
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")


class Cluster:
    """Starts, looks at and stops the cluster of a folder.

    Args:
        folder: holds everything; made by `start`, removed by `stop`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.conf = self.folder / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        """Variables under which SLURM's commands, and weft, talk to this cluster."""
        return {**os.environ, "SLURM_CONF": str(self.conf)}

    def start(
        self, nodes: int = 2, *, cpus: int = 8, kill_wait: int = 10, node_timeout: int = 12
    ) -> None:
        """Start MUNGE, the controller and `nodes` node daemons, and wait until all nodes are idle.

        Args:
            cpus: that each node claims to have; this host's own are shared.
            kill_wait: seconds between SIGTERM and SIGKILL at a job's end.
            node_timeout: seconds of silence after which a node counts as down.

        Raises:
            ClusterError: a program is missing, the folder is in use, or a daemon did not start.
        """
        if missing := missing_programs():
            raise ClusterError(
                f"{', '.join(missing)} not found; on Debian or Ubuntu: apt-get install slurm-wlm munge"
            )
        if self.conf.exists():
            raise ClusterError(
                f"{self.folder} holds a cluster already; stop it first, or give another folder"
            )
        if len(str(self.folder)) > 80:
            raise ClusterError(
                f"{self.folder} is too long a name for a socket in it; give a shorter folder"
            )
        for name in ("state", "spool"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._write_config(nodes, cpus, kill_wait, node_timeout)
        try:
            self._start_munge()
            self._daemon("slurmctld", "-c", "-D")
            self._until(lambda: self.ask("scontrol", "ping").returncode == 0, "slurmctld")
            for number in range(1, nodes + 1):
                self.start_node(f"n{number}")
            self._until(
                lambda: self.node_states() == {f"n{i + 1}": "idle" for i in range(nodes)},
                "slurmd-n1",
            )
        except BaseException:
            self.stop(keep_folder=True)
            self.conf.unlink()
            raise

    def _write_config(self, nodes: int, cpus: int, kill_wait: int, node_timeout: int) -> None:
        ports = _free_ports(nodes + 1)
        lines = [
            f"NodeName=n{i} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[i]} CPUs={cpus} RealMemory=1000"
            for i in range(1, nodes + 1)
        ]
        # The controller wants to find its own name in the file.
        self.conf.write_text(
            CONFIG.format(
                host=socket.gethostname().partition(".")[0],
                ports=ports,
                first_job=random.SystemRandom().randrange(1, MOST_JOBS),
                user=_user(),
                folder=self.folder,
                nodes="\n".join(lines),
                kill_wait=kill_wait,
                node_timeout=node_timeout,
            )
        )

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        paths = {
            name: f"--{name}-file={self.folder}/munge.{name}"
            for name in ("key", "seed", "pid", "log")
        }
        # --force: folders below /tmp may be written by others, which it would refuse.
        self._daemon(
            "munged",
            "--foreground",
            "--force",
            f"--socket={self.folder}/munge.socket",
            *paths.values(),
        )
        self._until((self.folder / "munge.socket").exists, "munged")

    def start_node(self, name: str) -> None:
        """Start the daemon of a node, or start it again."""
        self._daemon("slurmd", "-D", "-N", name, log=f"slurmd-{name}")

    def _daemon(self, program: str, *arguments: str, log: str | None = None) -> None:
        path = _which(program)
        assert path is not None
        name = log or program
        with open(self.folder / f"{name}.out", "ab") as out:
            process = subprocess.Popen(
                [path, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env={**self.environment, MARK: f"{self.folder}/{name}"},
                cwd=self.folder,
                start_new_session=True,
            )
        (self.folder / f"{name}.started").write_text(f"{process.pid}\n")

    def _until(self, is_ready: object, log: str) -> None:
        until = time.monotonic() + START_S
        while not is_ready():  # type: ignore[operator]
            if time.monotonic() > until:
                words = [
                    (self.folder / f"{log}{end}").read_text(errors="replace")
                    for end in (".out", ".log")
                    if (self.folder / f"{log}{end}").is_file()
                ]
                raise ClusterError(
                    f"{log} did not start within {START_S:.0f} s; the end of its log:\n"
                    + "\n".join(words)[-1500:]
                )
            time.sleep(0.1)

    def ask(self, *command: str, timeout_s: float = 30.0) -> subprocess.CompletedProcess[str]:
        """Run a command of SLURM against this cluster."""
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=timeout_s
        )

    def node_states(self) -> dict[str, str]:
        """State of each node in sinfo's words, such as idle, mixed, down*."""
        rows = self.ask(
            "sinfo", "--noheader", "--Node", "--partition=normal", "--format=%N %T"
        ).stdout
        return dict(line.split()[:2] for line in rows.splitlines() if line.strip())  # type: ignore[misc]

    def node_daemon(self, name: str) -> int:
        """Process id of a node's daemon."""
        return int((self.folder / f"slurmd-{name}.started").read_text())

    def kill_node(self, name: str) -> None:
        """What a power cut does to a node: its daemon, its step daemons and their processes die of SIGKILL at once."""
        for pid in _family(self.folder, name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stop(self, *, keep_folder: bool = False) -> None:
        """End all jobs and daemons, then remove the folder."""
        if (self.folder / "slurmctld.started").exists():
            with contextlib.suppress(subprocess.TimeoutExpired, OSError):
                self.ask("scancel", f"--user={_user()}", timeout_s=5)
                until = time.monotonic() + STOP_S
                while (
                    self.ask("squeue", "--noheader", timeout_s=5).stdout.strip()
                    and time.monotonic() < until
                ):
                    time.sleep(0.2)
        for sign in (signal.SIGTERM, signal.SIGKILL):
            family = _family(self.folder)
            for pid in family:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, sign)
            until = time.monotonic() + 5
            while any(map(_is_running, family)) and time.monotonic() < until:
                time.sleep(0.05)
        if not keep_folder:
            shutil.rmtree(self.folder, ignore_errors=True)


def _user() -> str:
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]


def _is_running(pid: int) -> bool:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def _family(folder: Path, node: str | None = None) -> list[int]:
    """The daemons (or that of a node), the step daemons they left, and everything below those."""
    parents = dict(_processes())
    mark = f"{MARK}={folder}/{f'slurmd-{node}' if node else ''}".encode()
    marked = {pid for pid in parents if _is_marked(pid, mark, is_whole=node is not None)}
    children: dict[int, list[int]] = {}
    for pid, parent in parents.items():
        children.setdefault(parent, []).append(pid)
    found, todo = set(), sorted(marked)
    while todo:
        pid = todo.pop()
        if pid not in found:
            found.add(pid)
            todo += children.get(pid, [])
    return sorted(found - {os.getpid()})


def _processes() -> Iterator[tuple[int, int]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                yield (
                    int(entry.name),
                    int((entry / "stat").read_text().rpartition(")")[2].split()[1]),
                )


def _is_marked(pid: int, mark: bytes, *, is_whole: bool) -> bool:
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(v == mark if is_whole else v.startswith(mark) for v in variables)


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=("start", "stop", "status"))
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        default=Path(tempfile.gettempdir()) / f"weft-slurm-{os.getuid()}",
    )
    parser.add_argument("--nodes", type=int, default=2, metavar="N", help="nodes, n1 to nN (2)")
    parser.add_argument(
        "--cpus", type=int, default=8, metavar="N", help="CPUs each node claims to have (8)"
    )
    args = parser.parse_args(None if arguments is None else list(arguments))
    cluster = Cluster(args.folder)
    try:
        if args.verb == "start":
            cluster.start(args.nodes, cpus=args.cpus)
            print(f"export SLURM_CONF={shlex.quote(str(cluster.conf))}")
        elif not cluster.conf.exists():
            raise ClusterError(
                f"there is no cluster in {cluster.folder}; start one with: {sys.argv[0]} start"
            )
        elif args.verb == "status":
            print(f"export SLURM_CONF={shlex.quote(str(cluster.conf))}")
            print(*(f"{name} {state}" for name, state in cluster.node_states().items()), sep="\n")
        else:
            cluster.stop()
    except ClusterError as error:
        print(f"cluster: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
