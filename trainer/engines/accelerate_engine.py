"""The engine of Hugging Face Accelerate: wrapping, precision and backward as the user's `accelerate config` says.

What is Weft's own in `TorchEngine` stays so: start values, optimizers, clipping, withheld updates, the checkpoint's names
and ranges. A run therefore changes between the two at any checkpoint.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ...models.errors import ConfigError, LaunchError
from ...models.task import Task
from ..distributed import Topology
from ..optimization.config import OptimizerConfig
from .config import ParallelConfig, PrecisionConfig
from .gradient_sync import GradientSync
from .torch_engine import TorchEngine

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["AccelerateEngine"]

PRECISIONS = {"no": "fp32", "bf16": "bf16"}
STRATEGIES = {"NO": "single", "MULTI_CPU": "ddp", "MULTI_GPU": "ddp", "FSDP": "fsdp"}
MENDS = {
    "DEEPSPEED": "set parallel.engine=deepspeed and give its JSON as parallel.deepspeed.config",
    "MEGATRON_LM": "Weft has its own models; choose multi-GPU or FSDP in accelerate config",
}


class AccelerateEngine(TorchEngine):
    """See `Engine`.

    Raises:
        LaunchError: accelerate is missing.
        ConfigError: the accelerate config contradicts the run's, or asks for what Weft does not do.
    """

    def __init__(
        self,
        task: Task,
        topology: Topology,
        *,
        parallel: ParallelConfig,
        precision: PrecisionConfig,
        optimizer: OptimizerConfig,
        seed: int,
    ) -> None:
        settings = _read_settings(parallel.accelerate.config_file)
        strategy = _check_settings(settings, parallel, precision, topology)
        self.accelerator = _make_accelerator(precision, topology)
        super().__init__(
            task,
            topology,
            parallel=parallel.model_copy(update={"strategy": strategy}),
            precision=precision,
            optimizer=optimizer,
            seed=seed,
        )

    def _build_syncs(self) -> dict[str, GradientSync]:
        """Accelerate's wrapper averages gradients; row-sparse ones are left to `TorchEngine`, which exchanges only their rows."""
        if self.strategy == "ddp" and len(self._phases) > 1:
            raise ConfigError(
                f"Accelerate's replicas train one phase a step, this model has {', '.join(self._phases)}; set parallel.engine=torch"
            )
        self._prepared: dict[str, nn.Module] = dict(self.networks)
        if self.strategy == "ddp":
            for name, network in self.networks.items():
                whole = [n.removeprefix(f"{name}/") for n in self._sparse if n.startswith(name)]
                DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(network, whole)
                self._prepared[name] = self.accelerator.prepare_model(network)
        return {} if self.strategy == "ddp" else super()._build_syncs()

    def _called_networks(self) -> Mapping[str, nn.Module]:
        return self._prepared

    def _set_sync(self, *, is_last: bool) -> None:
        super()._set_sync(is_last=is_last)
        for network in self._prepared.values():
            if isinstance(network, DistributedDataParallel):
                # What `accelerator.no_sync` switches off for all micro-batches but the last.
                network.require_backward_grad_sync = is_last

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.mesh is not None:
            return super()._autocast()
        return self.accelerator.autocast()

    def _backward(self, objective: Tensor) -> None:
        self.accelerator.backward(objective)


def _read_settings(config_file: str | None) -> dict[str, Any]:
    """distributed_type, mixed_precision, num_processes and so on: of a file, else of the environment; empty where neither speaks."""
    if config_file is None:
        env = os.environ
        found: dict[str, Any] = {}
        if "ACCELERATE_MIXED_PRECISION" in env:
            found["mixed_precision"] = env["ACCELERATE_MIXED_PRECISION"]
        steps = env.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
        found["gradient_accumulation_steps"] = int(steps) if steps.isdigit() else steps
        for kind in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
            if env.get(f"ACCELERATE_USE_{kind}", "false").lower() == "true":
                found["distributed_type"] = kind
        if found.get("distributed_type") == "FSDP":
            found["fsdp_config"] = {
                "fsdp_version": int(env.get("FSDP_VERSION", "1")),
                "fsdp_offload_params": env.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true",
            }
        return found
    if not Path(config_file).is_file():
        raise ConfigError(
            f"parallel.accelerate.config_file: there is no file {config_file}; write one with: accelerate config --config_file {config_file}"
        )
    with _package():
        from accelerate.commands.config.config_args import load_config_from_file
    try:
        return dict(load_config_from_file(config_file).to_dict())
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"parallel.accelerate.config_file: {config_file} is no accelerate config: {str(error).splitlines()[0]}"
        ) from None


@contextlib.contextmanager
def _package() -> Any:
    try:
        yield
    except ImportError as error:
        raise LaunchError(
            "parallel.engine=accelerate needs the accelerate package; install it with: pip install 'weft[accelerate]'"
        ) from error


def _check_settings(
    settings: Mapping[str, Any],
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    topology: Topology,
) -> str:
    """The strategy the accelerate config means.

    Raises:
        ConfigError: it says something else than the run's configuration, or what Weft does not do.
    """
    mixed = str(settings.get("mixed_precision") or "no")
    if mixed not in PRECISIONS:
        raise ConfigError(
            f"accelerate's mixed_precision is {mixed}; Weft computes in fp32 or bf16 with fp32 masters: choose no or bf16 in accelerate config"
        )
    if "mixed_precision" in settings and PRECISIONS[mixed] != precision.compute:
        raise ConfigError(
            f"accelerate's mixed_precision is {mixed} but precision.compute is {precision.compute}; set precision.compute={PRECISIONS[mixed]}, or change accelerate config"
        )
    steps = settings.get("gradient_accumulation_steps", 1)
    if steps not in (1, "auto", None):
        raise ConfigError(
            f"accelerate's gradient_accumulation_steps is {steps}; Weft accumulates by train.micro_batch_tokens: leave it 1"
        )
    processes = settings.get("num_processes", -1)
    if processes not in (-1, topology.world_size):
        raise ConfigError(
            f"accelerate's num_processes is {processes} but {topology.world_size} were started; start with: accelerate launch --num-processes {processes} -m weft train ..."
        )
    default = "MULTI_GPU" if topology.device.type == "cuda" else "MULTI_CPU"
    kind = str(settings.get("distributed_type") or (default if topology.world_size > 1 else "NO"))
    if topology.world_size == 1 and kind.startswith("MULTI_"):
        kind = "NO"
    if topology.world_size > 1 and kind == "NO":
        kind = default
    if kind not in STRATEGIES:
        mend = MENDS.get(kind, "choose multi-CPU, multi-GPU or FSDP in accelerate config")
        raise ConfigError(f"accelerate's distributed_type is {kind}; {mend}")
    if kind == "FSDP":
        _check_fsdp(settings.get("fsdp_config") or {})
    strategy = STRATEGIES[kind]
    if parallel.strategy not in ("auto", strategy):
        raise ConfigError(
            f"parallel.strategy is {parallel.strategy} but accelerate's distributed_type is {kind}; leave parallel.strategy=auto, or change accelerate config"
        )
    return strategy


def _check_fsdp(fsdp: Mapping[str, Any]) -> None:
    if int(fsdp.get("fsdp_version", 1)) != 2:
        raise ConfigError(
            "accelerate's fsdp_version is 1; Weft shards with FSDP2: set fsdp_version: 2 in accelerate config"
        )
    if fsdp.get("fsdp_offload_params") in (True, "true"):
        raise ConfigError(
            "accelerate's fsdp_offload_params is true; Weft offloads through parallel.engine=deepspeed: set it false in accelerate config"
        )


def _make_accelerator(precision: PrecisionConfig, topology: Topology) -> Accelerator:
    with _package():
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import DistributedDataParallelKwargs
    # Under srun Weft finds its place by itself; accelerate looks for torchrun's words.
    place = {
        "RANK": topology.rank,
        "WORLD_SIZE": topology.world_size,
        "LOCAL_RANK": topology.local_rank,
        "LOCAL_WORLD_SIZE": topology.local_world_size,
    }
    if topology.world_size > 1:
        for name, value in place.items():
            os.environ.setdefault(name, str(value))
    # Weft shards by itself, so accelerate must not be told to.
    quiet = {name: os.environ.pop(name, None) for name in ("ACCELERATE_USE_FSDP",)}
    try:
        # State that outlived another engine of this process would be taken for ours.
        AcceleratorState._reset_state(reset_partial_state=True)
        return Accelerator(
            cpu=topology.device.type == "cpu",
            mixed_precision="bf16" if precision.compute == "bf16" else "no",
            kwargs_handlers=[
                # Looking for unused parameters keeps the wrapper from laying its buckets out anew after the first step, by which
                # the step after a resume would differ in its last bits. Start values are the same on all ranks already.
                DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
            ],
        )
    finally:
        os.environ.update({name: value for name, value in quiet.items() if value is not None})
