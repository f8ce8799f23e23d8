"""What people type once about their cluster: a profile file, changed by the options of `weft submit`.

A profile is ~/.config/weft/clusters/NAME.yaml; `default.yaml` is taken where none is named. Imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError, field_validator

from ...models.errors import ConfigError
from ...models.section import Section
from ...trainer.configuration.documents import read_document
from ...trainer.configuration.messages import describe
from ...trainer.configuration.recipes import Layers, leaves

__all__ = ["ClusterConfig", "ClusterInForce", "load_cluster", "profile_folder"]

OWNED = (
    "array",
    "chdir",
    "error",
    "job-name",
    "ntasks",
    "ntasks-per-node",
    "open-mode",
    "output",
    "requeue",
    "no-requeue",
    "signal",
)
"""Options of sbatch that the script sets itself and a profile may not change."""


class ClusterConfig(Section):
    """Where jobs go and what they need; each key can be set in a profile."""

    # `mem: 0` and `NCCL_DEBUG: 1` are meant as the text they look like.
    model_config = ConfigDict(coerce_numbers_to_str=True)

    partition: str | None = Field(None, description="partition, or several with commas")
    account: str | None = Field(None, description="account that is charged")
    qos: str | None = Field(None, description="quality of service")
    constraint: str | None = Field(None, description="features nodes must have")
    time: str | None = Field(None, description="time limit of one start, as sbatch takes it")
    nodes: int = Field(1, gt=0, description="nodes")
    gpus_per_node: int = Field(0, ge=0, description="GPUs a node, one rank each; 0 trains on CPUs")
    gpu_option: Literal["gpus-per-node", "gres", "none"] = Field(
        "gpus-per-node",
        description="how GPUs are asked for; none where whole nodes are given out",
    )
    gpu_type: str | None = Field(None, description="kind of GPU, as in --gres=gpu:KIND:8")
    ranks_per_node: int | None = Field(
        None, gt=0, description="ranks a node on CPUs; with GPUs it is their number"
    )
    cpus_per_task: int | None = Field(None, gt=0, description="CPUs of one rank")
    mem: str | None = Field(None, description="memory a node, as sbatch takes it; 0 is all")
    dependency: str | None = Field(None, description="jobs to wait for, such as afterok:123")
    exclude: str | None = Field(None, description="nodes to leave out, with commas")
    signal_s: int = Field(
        120, ge=10, le=65535, description="seconds before the time limit at which ranks are warned"
    )
    modules: tuple[str, ...] = Field((), description="environment modules to load")
    setup: tuple[str, ...] = Field((), description="shell lines before the run starts")
    environment: dict[str, str] = Field({}, description="environment variables of the job")
    container: str | None = Field(None, description="image the ranks run in")
    container_runtime: Literal["pyxis", "apptainer"] = Field(
        "pyxis", description="pyxis (srun --container-image) or apptainer (apptainer exec)"
    )
    container_mounts: tuple[str, ...] = Field(
        (), description="SOURCE:TARGET folders, beside the run and the working folder"
    )
    python: str | None = Field(
        None, description="interpreter; null is the one of weft submit, in a container python3"
    )
    sbatch: tuple[str, ...] = Field(
        (), description="further options of sbatch, such as --exclusive"
    )
    srun: tuple[str, ...] = Field((), description="further options of srun, such as --mpi=none")

    @field_validator("*")
    @classmethod
    def _one_line(cls, value: Any) -> Any:
        texts = [value] if isinstance(value, str) else value
        if isinstance(texts, (list, tuple)) and any("\n" in str(text) for text in texts):
            raise ValueError("should be one line; further lines are further items of setup")
        return value

    @field_validator("environment")
    @classmethod
    def _names(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not name.isidentifier():
                raise ValueError(f"{name!r} cannot be the name of a variable")
        return value

    @field_validator("sbatch")
    @classmethod
    def _not_owned(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for option in value:
            name = option.lstrip("-").partition("=")[0].partition(" ")[0]
            if not option.startswith("-"):
                raise ValueError(f"{option!r} is no option; write --NAME=VALUE")
            if name in OWNED:
                raise ValueError(f"--{name} is set by weft submit itself; leave it out")
        return value

    @property
    def ranks(self) -> int:
        """Ranks of one node."""
        return self.gpus_per_node or self.ranks_per_node or 1

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks


class ClusterInForce:
    """A checked profile and where each value came from (`default`, FILE:LINE or `option`)."""

    def __init__(self, config: ClusterConfig, origins: dict[str, str]) -> None:
        self.config, self.origins = config, origins

    def describe(self) -> str:
        """The profile as YAML, each value's origin beside it."""
        from ...trainer.configuration.documents import dump_value

        lines = [
            (f"{k}: {dump_value(v)}", k) for k, v in self.config.model_dump(mode="json").items()
        ]
        column = max(len(text) for text, _ in lines if len(text) < 50) + 2
        return "".join(f"{text:<{column}}# {self.origins.get(k, 'default')}\n" for text, k in lines)


def profile_folder() -> Path:
    home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(home) / "weft" / "clusters"


def load_cluster(name: str | None, options: Mapping[str, Any]) -> ClusterInForce:
    """The profile NAME (else of WEFT_CLUSTER, else `default` if there is one) with options over it.

    Args:
        name: of a profile, or a path to a YAML file.
        options: values by key; None is left as it is.

    Raises:
        ConfigError: no such profile, or a value that cannot be; one line each, with file and key.
    """
    path = _find(name)
    data: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if path is not None:
        document = read_document(path)
        data = dict(document.data)
        origins = {f"cluster.{k}": f"{path}:{document.lines.get(k, 1)}" for k in leaves(data)}
        origins |= {f"cluster.{k}": f"{path}:{document.lines.get(k, 1)}" for k in data}
    given = {key: value for key, value in options.items() if value is not None}
    origins |= {f"cluster.{key}": _flag(key) for key in given}
    layers = Layers({**data, **given}, origins)
    try:
        config = ClusterConfig.model_validate(layers.data)
    except ValidationError as error:
        found = describe(error, ClusterConfig, "cluster", layers)
        raise ConfigError("\n".join(line for _, line in found)) from None
    if config.gpus_per_node and config.ranks_per_node not in (None, config.gpus_per_node):
        raise ConfigError(
            f"cluster.ranks_per_node: {config.ranks_per_node} ranks for {config.gpus_per_node} GPUs a node; "
            "with GPUs each has one rank: leave --ranks-per-node out, or set --gpus-per-node 0"
        )
    return ClusterInForce(config, {k.removeprefix("cluster."): v for k, v in origins.items()})


def _flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def _find(name: str | None) -> Path | None:
    folder = profile_folder()
    wanted = name or os.environ.get("WEFT_CLUSTER")
    if wanted is None:
        path = folder / "default.yaml"
        return path if path.is_file() else None
    path = Path(wanted) if wanted.endswith((".yaml", ".yml")) else folder / f"{wanted}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.yaml"))) or "none yet"
        asked = "--cluster" if name else "WEFT_CLUSTER"
        raise ConfigError(f"{asked} {wanted}: there is no {path}; profiles in {folder}: {known}")
    return path
