"""The batch script of a job, rendered from job.sbatch.j2. Imports no torch."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...models.errors import ConfigError
from ...trainer.slurm import FIRST_PORT, PORT_STRIDE, PORTS
from .cluster import ClusterConfig

__all__ = ["JobScript"]

TEMPLATE = "job.sbatch.j2"


@dataclass(frozen=True)
class JobScript:
    """Everything a script says; paths are absolute.

    Args:
        name: of the job, for the queue.
        runs: run folders; more than one, or an `array`, makes a job array.
        folder: where the output of the batch shell goes.
        code: the snapshot to run from, or None for the installed package.
        cwd: where relative paths of the configuration start.
        python: the interpreter of the ranks.
        array: which runs, as sbatch's --array takes it; None is no array.
    """

    name: str
    runs: Sequence[Path]
    folder: Path
    code: Path | None
    cwd: Path
    python: str
    cluster: ClusterConfig
    array: str | None = None

    def render(self) -> str:
        """The script.

        Raises:
            ConfigError: a path that the script or the container cannot hold.
        """
        from jinja2 import Environment, PackageLoader, StrictUndefined

        self._check_paths()
        environment = Environment(
            loader=PackageLoader(__package__, "."),
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
            undefined=StrictUndefined,
        )
        environment.filters["sh"] = lambda value: shlex.quote(str(value))
        cluster, command = self.cluster, self._command()
        srun = [*self._container_of_srun(), *map(_quoted, cluster.srun)]
        return environment.get_template(TEMPLATE).render(
            title=self.name,
            nodes=cluster.nodes,
            ranks=cluster.ranks,
            cpus_per_task=cluster.cpus_per_task,
            options=list(self._options()),
            array=self.array is not None,
            runs=self.runs,
            python=self.python,
            code=self.code,
            modules=cluster.modules,
            setup=cluster.setup,
            environment=cluster.environment,
            first_port=FIRST_PORT,
            port_stride=PORT_STRIDE,
            ports=PORTS,
            srun=srun,
            command=command,
            judge=self._judge(command),
        )

    def _options(self) -> Iterator[str]:
        """Lines of #SBATCH, in the order people look for them."""
        cluster = self.cluster
        yield f"--job-name={_quote(self.name)}"
        yield f"--nodes={cluster.nodes}"
        yield f"--ntasks-per-node={cluster.ranks}"
        yield from self._gpus()
        given = {
            "cpus-per-task": cluster.cpus_per_task,
            "mem": cluster.mem,
            "time": cluster.time,
            "partition": cluster.partition,
            "account": cluster.account,
            "qos": cluster.qos,
            "constraint": cluster.constraint,
            "exclude": cluster.exclude,
            "dependency": cluster.dependency,
            "array": self.array,
        }
        for name, value in given.items():
            if value is not None:
                yield f"--{name}={_quote(str(value))}"
        yield from map(_quoted, cluster.sbatch)
        yield "--requeue"
        yield "--open-mode=append"
        # Without B: the ranks are signalled directly, not this shell. USR2, because NCCL and others use USR1.
        yield f"--signal=USR2@{cluster.signal_s}"
        yield f"--chdir={_quote(str(self.cwd))}"
        pattern = "%A_%a.out" if self.array is not None else "%j.out"
        yield f"--output={_quote(f'{_percent(self.folder)}/{pattern}')}"

    def _gpus(self) -> Iterator[str]:
        cluster = self.cluster
        if not cluster.gpus_per_node or cluster.gpu_option == "none":
            return
        kind = f"{cluster.gpu_type}:" if cluster.gpu_type else ""
        option = "gpus-per-node=" if cluster.gpu_option == "gpus-per-node" else "gres=gpu:"
        yield f"--{option}{kind}{cluster.gpus_per_node}"

    def _mounts(self) -> list[str]:
        folders = {self.cwd, *self.runs, *([self.code] if self.code else [])}
        outer = sorted(f for f in folders if not folders & set(f.parents))
        return [*(f"{f}:{f}" for f in outer), *self.cluster.container_mounts]

    def _container_of_srun(self) -> list[str]:
        """Options of srun that put a rank into its container."""
        cluster = self.cluster
        if cluster.container is None or cluster.container_runtime != "pyxis":
            return []
        options = {
            "image": cluster.container,
            "mounts": ",".join(self._mounts()),
            "workdir": str(self.cwd),
        }
        return [f"--container-{name}={shlex.quote(value)}" for name, value in options.items()]

    def _command(self) -> str:
        cluster = self.cluster
        if cluster.container is None or cluster.container_runtime != "apptainer":
            return '"$python"'
        nv = ["--nv"] if cluster.gpus_per_node else []
        words = ["apptainer", "exec", *nv, "--bind", ",".join(self._mounts())]
        words += ["--pwd", str(self.cwd), cluster.container]
        return f'{shlex.join(words)} "$python"'

    def _judge(self, command: str) -> str:
        """How the batch shell calls weft: in the container, if that is where weft is."""
        container = self._container_of_srun()
        if not container:
            return command
        return " ".join(["srun --nodes=1 --ntasks=1 --overlap", *container, command])

    def _check_paths(self) -> None:
        paths = [self.cwd, self.folder, *self.runs]
        if bad := next((p for p in paths if any(c in str(p) for c in "\n\r\\")), None):
            raise ConfigError(
                f"{str(bad)!r} cannot stand in a batch script; rename that folder without line breaks and backslashes"
            )
        if self.cluster.container is not None and (
            bad := next((p for p in paths if any(c in str(p) for c in ":,")), None)
        ):
            raise ConfigError(
                f"{bad} cannot be mounted in a container: a colon or comma divides mounts; rename that folder"
            )


def _percent(path: Path) -> str:
    """In file names of SLURM a percent sign begins a field."""
    return str(path).replace("%", "%%")


def _quoted(option: str) -> str:
    name, equals, value = option.partition("=")
    return f"{name}={_quote(value)}" if equals else option


def _quote(value: str) -> str:
    # sbatch divides its lines as a shell would, but knows no escapes: `'"'"'` is three parts to both.
    return shlex.quote(value)
