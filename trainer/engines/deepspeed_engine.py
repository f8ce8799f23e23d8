"""The engine of DeepSpeed: ZeRO 1, 2 and 3, with or without offloading to the host.

DeepSpeed splits, gathers, reduces and offloads; the update is Weft's own optimizer, handed over, so that clipping, withheld steps,
rates and decay are those of every other engine. Checkpoints are read and written as the flat ranges of fp32 master weights and
moments that this rank holds, under their logical names: no conversion, and no gathering. Source of ZeRO: arXiv 1910.02054.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...models.batch import PackedBatch
from ...models.errors import ConfigError, LaunchError
from ...models.initialise import fill_range
from ...models.task import LossOutput, ParameterGroup, Task
from ..distributed import Topology
from ..optimization.config import OptimizerConfig
from ..optimization.skip_step import SkipStep
from .config import ParallelConfig, PrecisionConfig
from .deepspeed_config import Expected, merge_settings
from .protocol import StepResult, TensorShard
from .stepping import SteppingEngine
from .torch_engine import wrap_blocks

__all__ = ["DeepSpeedEngine"]

PHASE = "train"


class HandedOverAdamW(torch.optim.AdamW):
    """AdamW that clips and withholds by itself, as `Updates` does, without asking the device."""

    clip: Tensor
    keep: Tensor

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        given = []
        for group in self.param_groups:
            for parameter in group["params"]:
                # A kernel that divides by the scale and does nothing where inf was found.
                self.grad_scale = self.clip.reciprocal().to(parameter.device)
                self.found_inf = (1.0 - self.keep).to(parameter.device)
                if group["left_out"]:
                    # Without a gradient nothing is decayed and no momentum followed; DeepSpeed wants its buffer back.
                    given.append((parameter, parameter.grad))
                    parameter.grad = None
        super().step(closure)
        for parameter, gradient in given:
            parameter.grad = gradient


@dataclass(frozen=True)
class HeldRange:
    """The part of one parameter's fp32 master weights and moments that this rank holds."""

    start: int
    weights: Tensor
    moments: dict[str, Tensor]


class DeepSpeedEngine(SteppingEngine):
    """See `Engine`.

    Args:
        expected_rows: (samples of a step, of a micro-batch, micro-batches of a rank), to be checked against the user's JSON.

    Raises:
        LaunchError: deepspeed is missing.
        ConfigError: the JSON contradicts the run, or the task asks for what ZeRO does not do.
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
        expected_rows: tuple[int, int, int],
    ) -> None:
        self.task, self.topology, self.seed = task, topology, seed
        self.optimizer_config = optimizer
        self.count_of: dict[str, str] = {}
        self.vectors: dict[str, Tensor] = {}
        rows, micro_rows, micro_batches = expected_rows
        self._settings = merge_settings(
            parallel.deepspeed,
            Expected(
                batch_rows=rows,
                micro_batch_rows=micro_rows,
                micro_batches=micro_batches,
                compute=precision.compute,
                optimizer=optimizer,
            ),
        )
        self.stage: int = self._settings["zero_optimization"]["stage"]
        _import_deepspeed(topology)
        _join_alone(topology)
        self.networks = self._build_networks()
        wrap_blocks(task.blocks(self.networks), parallel)
        self.groups = [g for g in task.parameter_groups(self.networks) if g.parameters]
        self._trained, self._frozen = self._split_groups()
        self._adamw = self._build_optimizer()
        self._engine = self._initialise()
        self._link_state()
        self._fill_masters()
        self.skip_step = SkipStep(optimizer, topology.device) if optimizer.skip_step else None

    # Construction

    def _build_networks(self) -> dict[str, nn.Module]:
        """Modules without values; under stage 3 each is split as soon as it is made, so that no rank holds the whole."""
        import deepspeed

        inside: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self.stage == 3:
            inside = deepspeed.zero.Init(config_dict_or_path=self._settings)
        with torch.device(self.topology.device), inside:
            return self.task.build_networks()

    def _split_groups(self) -> tuple[list[ParameterGroup], set[str]]:
        """Groups that are trained, and names that are not.

        Raises:
            ConfigError: what ZeRO does not do.
        """
        frozen = {n for g in self.groups if g.algorithm == "frozen" for n in g.parameters}
        trained = [g for g in self.groups if g.algorithm != "frozen"]
        sparse = next((g.name for g in trained if g.algorithm == "row_sparse_adam"), None)
        if sparse is not None:
            raise ConfigError(
                f"the {sparse} tables are updated row by row, which ZeRO does not do; set parallel.engine=torch, whose fsdp keeps them whole"
            )
        networks = {n.partition("/")[0] for g in trained for n in g.parameters}
        phases = {g.phase for g in trained}
        if len(networks) != 1 or phases != {PHASE}:
            raise ConfigError(
                f"DeepSpeed trains one network in one phase, this model has {', '.join(sorted(networks))}; set parallel.engine=torch"
            )
        special = next((g.name for g in trained if g.clip_grad_norm or g.whole), None)
        if special is not None:
            raise ConfigError(
                f"the group {special} is clipped alone or kept whole, which DeepSpeed does not do; set parallel.engine=torch"
            )
        (self._network_name,) = networks
        for name, parameter in self._named():
            parameter.requires_grad_(name not in frozen)
        based = {
            name
            for base in self.task.base_weights(self.networks)
            if base.stays_there
            for name in base.parameters
        }
        inside = sorted(n for n in frozen - based if n.startswith(f"{self._network_name}/"))
        if inside:
            raise ConfigError(
                f"{inside[0]} is frozen inside a network that DeepSpeed trains, and its weights would be kept in the compute type only; set parallel.engine=torch"
            )
        return trained, frozen

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        for network, module in self.networks.items():
            for name, parameter in module.named_parameters():
                yield f"{network}/{name}", parameter

    def _build_optimizer(self) -> HandedOverAdamW:
        c, named = self.optimizer_config, dict(self._named())
        groups: list[dict[str, Any]] = [
            {
                "params": [named[name] for name in group.parameters],
                "weight_decay": c.weight_decay if group.weight_decay else 0.0,
                "lr_scale": group.lr_scale,
                "betas": group.betas or c.betas,
                "left_out": False,
            }
            for group in self._trained
        ]
        return HandedOverAdamW(groups, lr=c.lr, betas=c.betas, eps=c.eps, fused=True)

    def _initialise(self) -> Any:
        import deepspeed

        engine, *_ = deepspeed.initialize(
            model=self.networks[self._network_name],
            optimizer=self._adamw,
            config=self._settings,
            dist_init_required=False,
        )
        return engine

    def _link_state(self) -> None:
        """Moments from the start, so that a checkpoint can be loaded before the first step."""
        flats = (
            self._zero.fp32_partitioned_groups_flat
            if self.stage == 3
            else self._zero.single_partition_of_fp32_groups
        )
        for flat in flats:
            self._adamw.state[flat] = {
                "step": torch.zeros((), device=flat.device),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }
        if self.stage != 3:
            self._zero._lazy_init_hp_params_optimizer_state()

    def _fill_masters(self) -> None:
        """Start values, each rank its own ranges, in fp32: the same as under any other engine."""
        for name, item in self._held():
            spec = self.task.init_spec(name)
            fill_range(item.weights, spec, seed=self.seed, name=name, start=item.start)
        for name, parameter in self._named():
            if not name.startswith(f"{self._network_name}/"):
                fill_range(parameter.data, self.task.init_spec(name), seed=self.seed, name=name)
        self.after_load()

    @property
    def _zero(self) -> Any:
        return self._engine.optimizer

    def _held(self) -> Iterator[tuple[str, HeldRange]]:
        """Every trained parameter, with the part of it that this rank holds, which may be empty."""
        for name, parameter in self._named():
            if name not in self._frozen:
                find = self._in_stage_3 if self.stage == 3 else _in_partition
                yield name, find(parameter)

    def _in_stage_3(self, parameter: Any) -> HeldRange:
        group, offset, length = self._zero.grad_position[self._zero.get_param_id(parameter)]
        start = min(self.topology.rank * length, parameter.ds_numel)
        count = min(length, parameter.ds_numel - start)
        flat = self._zero.fp32_partitioned_groups_flat[group]
        state = self._adamw.state[flat]
        return HeldRange(
            start,
            flat.data.narrow(0, offset, count),
            {kind: state[kind].narrow(0, offset, count) for kind in ("exp_avg", "exp_avg_sq")},
        )

    # Training

    def _called_networks(self) -> dict[str, nn.Module]:
        return {**self.networks, self._network_name: self._engine}

    def _set_sync(self, *, is_last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(is_last)

    def _backward(self, objective: Any) -> None:
        self._engine.backward(objective, scale_wrt_gas=False)

    def step(self, phase: str, learning_rate: float, loss: Tensor | None = None) -> StepResult:
        grad_norm = self._grad_norm()
        keep, clip = self._decide(grad_norm, loss)
        self._adamw.clip, self._adamw.keep = clip, keep
        for settings, group in zip(self._adamw.param_groups, self._trained, strict=True):
            settings["lr"] = learning_rate * settings["lr_scale"]
            settings["left_out"] = self._is_left_out(group)
        self._engine.step()
        if self.stage == 3 and self._zero.overflow:
            # A step that DeepSpeed gave up left parameters ungathered that the next one expects to be there.
            self.after_load()
        return StepResult(grad_norm, 1.0 - keep)

    def _grad_norm(self) -> Tensor:
        """Collective: () fp32. DeepSpeed says -1 for what is no number."""
        if self.stage == 3:
            groups = self._zero._get_norm_groups()
        else:
            groups = [self._zero.scaled_global_norm()]
        norms = torch.stack([torch.as_tensor(g).float().reshape(()) for g in groups])
        norms = norms.to(self.topology.device)
        whole = norms.square().sum().sqrt()
        return torch.where((norms < 0).any(), torch.full_like(whole, torch.nan), whole)

    # Looking

    @torch.no_grad()
    def evaluate(self, batch: PackedBatch) -> LossOutput:
        return self.task.losses(self._called_networks(), batch.to(self.topology.device))

    def network_for_generation(self, name: str) -> nn.Module:
        if self.stage == 3:
            raise ConfigError(
                "weights are split over ranks under ZeRO 3; generate from the run folder: weft generate RUN"
            )
        return self.networks[name]

    # State

    def state_shards(self) -> list[TensorShard]:
        shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self._named()}
        shards = []
        for name, item in self._held():
            kinds = {f"parameters/{name}": item.weights}
            kinds |= {f"optimizer/{kind}/{name}": t for kind, t in item.moments.items()}
            shards += [TensorShard(k, shapes[name], item.start, t, True) for k, t in kinds.items()]
        return [*shards, *self._skip_step_shards()]

    def base_shards(self) -> list[TensorShard]:
        return [
            TensorShard(f"parameters/{name}", *self._frozen_part(parameter), False)
            for name, parameter in self._named()
            if name in self._frozen
        ]

    def _frozen_part(self, parameter: Any) -> tuple[tuple[int, ...], int, Tensor]:
        """Shape, first element and values of what this rank holds, in the compute type where DeepSpeed has it."""
        if not hasattr(parameter, "ds_tensor"):
            return tuple(parameter.shape), 0, parameter.data.view(-1)
        part = parameter.ds_tensor
        start = min(self.topology.rank * part.ds_numel, parameter.ds_numel)
        count = min(part.ds_numel, parameter.ds_numel - start)
        return tuple(parameter.ds_shape), start, part.data.view(-1).narrow(0, 0, count)

    @torch.no_grad()
    def after_load(self) -> None:
        """Weights in the compute type from the master weights, on all ranks."""
        if self.stage != 3:
            self._zero.update_lp_params()
            return
        # What is still gathered would be computed with as it is.
        self._zero._partition_all_parameters()
        for group in range(len(self._zero.fp16_groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        if self._zero.persistent_parameters:
            self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)

    def scalar_state(self) -> dict[str, Any]:
        counts = {g.name: int(steps[0]) for g, steps in self._steps().items()}
        return {"updates": {PHASE: counts}}

    def load_scalar_state(self, state: Mapping[str, Any]) -> None:
        counts = state["updates"].get(PHASE, {})
        for group, steps in self._steps().items():
            for step in steps:
                step.fill_(counts.get(group.name, 0))

    def _steps(self) -> dict[ParameterGroup, list[Tensor]]:
        """The step counters of each group's parts."""
        zero = self._zero
        found: dict[ParameterGroup, list[Tensor]] = {group: [] for group in self._trained}
        if self.stage != 3:
            flats = zip(self._trained, zero.single_partition_of_fp32_groups, strict=True)
        else:
            owners = [zero.sub_group_to_group_id[i] for i in range(len(zero.fp16_groups))]
            flats = zip(
                [self._trained[owner] for owner in owners],
                zero.fp32_partitioned_groups_flat,
                strict=True,
            )
        for group, flat in flats:
            found[group].append(self._adamw.state[flat]["step"])
        return found


def _in_partition(parameter: Any) -> HeldRange:
    """Of stages 1 and 2, whose partitions cut anywhere."""
    place = getattr(parameter, "_hp_mapping", None)
    if place is None:
        nothing = torch.empty(0, device=parameter.device)
        return HeldRange(0, nothing, {"exp_avg": nothing, "exp_avg_sq": nothing})
    return HeldRange(
        place.lp_fragment_address.start,
        place.hp_fragment.data.view(-1),
        {kind: place.get_optim_state_fragment(kind) for kind in ("exp_avg", "exp_avg_sq")},
    )


def _import_deepspeed(topology: Topology) -> None:
    """DeepSpeed decides by the environment what it runs on, once, when it is imported."""
    if topology.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError as error:
        raise LaunchError(
            "parallel.engine=deepspeed needs the deepspeed package; install it with: pip install 'weft[deepspeed]'"
        ) from error
    deepspeed.utils.logger.setLevel(logging.ERROR)
    # On a CPU it would compile an exchange through shared memory when it starts; gloo is there.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _join_alone(topology: Topology) -> None:
    """DeepSpeed wants a process group, even of one; and torchrun's words for this process's place."""
    place = {
        "RANK": topology.rank,
        "WORLD_SIZE": topology.world_size,
        "LOCAL_RANK": topology.local_rank,
    }
    for name, value in place.items():
        os.environ.setdefault(name, str(value))
    if not dist.is_initialized():
        backend = "cuda:nccl,cpu:gloo" if topology.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    from deepspeed import comm

    if not comm.is_initialized():
        comm.init_distributed(dist_init_required=False, auto_mpi_discovery=False, verbose=False)
