"""The engine of plain PyTorch: one process, replicas (ddp), shards (fsdp), or both (hsdp).

Master weights, moments and reductions are fp32. Parameters are built on the meta device, sharded, and only then given
values, each rank filling its own range. Read `forward_backward` and `step` first.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from ... import kernels  # noqa: F401 - registers the ops named in `_KEPT`
from ...models.batch import PackedBatch
from ...models.errors import ConfigError
from ...models.initialise import fill_range
from ...models.task import LossOutput, RowGroup, Task
from ..distributed import Topology
from ..optimization.averages import WeightAverages
from ..optimization.config import OptimizerConfig
from ..optimization.skip_step import SkipStep
from ..optimization.updates import LocalParameter, Updates
from .config import ParallelConfig, PrecisionConfig
from .gradient_sync import GradientSync
from .protocol import StepResult, TensorShard
from .sharding import flat_range, local_tensor, make_mesh, pick_strategy, shard_networks
from .stepping import SteppingEngine, clip_factor

__all__ = ["TorchEngine", "wrap_blocks"]


class TorchEngine(SteppingEngine):
    """See `Engine`.

    Args:
        seed: of the start values and of everything drawn inside forward passes.
        trains: False builds no optimizer, for evaluation and generation.
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
        trains: bool = True,
    ) -> None:
        self.task, self.topology, self.optimizer_config, self.seed = task, topology, optimizer, seed
        self.precision = precision
        self._reduces_each = parallel.reduce_gradients == "each"
        self.count_of: dict[str, str] = {}
        self.vectors: dict[str, Tensor] = {}
        self._withheld: dict[str, tuple[tuple[str, ...], Tensor]] = {}
        self.strategy = pick_strategy(parallel, topology)
        self._rows = _row_group(parallel.sequence_ranks, topology) if trains else None
        with torch.device("meta"):
            self.networks = task.build_networks()
        self.groups = task.parameter_groups(self.networks)
        self._group_of = {name: group for group in self.groups for name in group.parameters}
        self._mark_frozen_and_sparse()
        self._based = self._find_based()
        blocks = task.blocks(self.networks)
        wrap_blocks(blocks, parallel)
        self.mesh = make_mesh(self.strategy, parallel, topology)
        whole = {n for n, p in self._named() if n in self._sparse or self._group_of[n].whole}
        if self.mesh is not None:
            wide = task.wide_modules(self.networks)
            kept = [p for n, p in self._named() if n in whole]
            shard_networks(self.networks, blocks, self.mesh, precision, kept, wide)
        self._whole = {n for n in whole if n not in self._sparse}
        self._materialise()
        self.parameters = {name: LocalParameter(name, p, local_tensor) for name, p in self._named()}
        self._phases = sorted({group.phase for group in self.groups})
        self._syncs = self._build_syncs()
        self._sync: GradientSync | None = None
        self.updates: dict[str, Updates] = {}
        if trains:
            self.updates = {
                phase: Updates(
                    [g for g in self.groups if g.phase == phase], self.parameters, optimizer
                )
                for phase in self._phases
            }
        self.averages = self._build_averages(optimizer.ema_decay if trains else None)
        self.skip_step = (
            SkipStep(optimizer, topology.device) if optimizer.skip_step and trains else None
        )

    # Construction

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        for network, module in self.networks.items():
            for name, parameter in module.named_parameters():
                yield f"{network}/{name}", parameter

    def _mark_frozen_and_sparse(self) -> None:
        named = dict(self._named())
        ungrouped = sorted(named.keys() ^ self._group_of.keys())
        if ungrouped:
            raise ConfigError(
                f"parameter groups and networks disagree about {ungrouped[0]}; each parameter belongs to one group"
            )
        for name, parameter in named.items():
            parameter.requires_grad_(self._group_of[name].algorithm != "frozen")
        self._sparse = {
            n: p for n, p in named.items() if self._group_of[n].algorithm == "row_sparse_adam"
        }

    def _find_based(self) -> list[str]:
        """Names of parameters whose weights stay in another run."""
        bases = self.task.base_weights(self.networks)
        names = [name for base in bases if base.stays_there for name in base.parameters]
        for name in names:
            if self._group_of[name].algorithm != "frozen":
                raise ConfigError(f"{name} is trained, so its weights cannot stay in another run")
        return names

    def _materialise(self) -> None:
        for network in self.networks.values():
            network.to_empty(device=self.topology.device)
        self._sparse = {name: p for name, p in self._named() if name in self._sparse}
        for name, parameter in self._named():
            place = flat_range(parameter, self.topology)
            local = local_tensor(parameter.detach())
            fill_range(
                local, self.task.init_spec(name), seed=self.seed, name=name, start=place.start
            )

    def _build_averages(self, decay: float | None) -> dict[str, WeightAverages]:
        """By phase; of what AdamW updates, since a copy of huge tables is not to be had for a step that touches few rows."""
        if decay is None:
            return {}
        return {
            phase: WeightAverages(
                {
                    name: self.parameters[name]
                    for group in self.groups
                    if group.phase == phase and group.algorithm == "adamw" and group.averaged
                    for name in group.parameters
                },
                decay,
            )
            for phase in self.updates
        }

    def start_averages(self) -> None:
        for averages in self.averages.values():
            averages.restart()

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for averages in self.averages.values():
                stack.enter_context(averages.in_place_of_weights())
            yield

    def _build_syncs(self) -> dict[str, GradientSync]:
        """By phase: of all dense parameters under ddp, of those that sharding leaves whole else."""
        if self.topology.world_size == 1:
            return {}
        found = {}
        for phase in self._phases:
            dense = [
                p
                for n, p in self._named()
                if p.requires_grad
                and n not in self._sparse
                and self._group_of[n].phase == phase
                and (self.mesh is None or n in self._whole)
            ]
            if dense:
                found[phase] = GradientSync(dense)
        return found

    # Training

    @property
    def data_rank(self) -> int:
        return self.topology.rank // self._rows.ranks if self._rows else self.topology.rank

    @property
    def data_ranks(self) -> int:
        ranks = self.topology.world_size
        return ranks // self._rows.ranks if self._rows else ranks

    @property
    def counts_rows(self) -> bool:
        return self._rows is None or self._rows.place == 0

    def own_part(self, batch: PackedBatch) -> PackedBatch:
        return batch if self._rows is None else self.task.cut_rows(batch, self.networks, self._rows)

    def _called_networks(self) -> Mapping[str, nn.Module]:
        return self.networks

    def _prepare(self, phase: str) -> None:
        """Networks of other phases are frozen meanwhile: gradients of theirs would be computed and thrown away."""
        self._sync = self._syncs.get(phase)
        if len(self._phases) > 1:
            for name, parameter in self._named():
                group = self._group_of[name]
                # What is sharded is not touched: it takes its first copy's word for good.
                if self.mesh is None or name in self._whole:
                    is_trained = group.algorithm != "frozen" and group.phase == phase
                    parameter.requires_grad_(is_trained)

    def step(self, phase: str, learning_rate: float, loss: Tensor | None = None) -> StepResult:
        if self._sync is not None:
            self._sync.finish()
        updates = self.updates[phase]
        updates.refresh()
        sparse = self._exchange_sparse(phase)
        names, squares = self._squared_norms(updates, sparse)
        grad_norm, alone = _norms_by_clip(updates, names, squares)
        if len(updates.groups) == 1 and alone:
            # The only group's norm is the phase's.
            grad_norm = alone[updates.groups[0].name]
        keep, clip = self._decide(grad_norm, loss)
        clips = {"": clip}
        for group in updates.clipped_alone:
            clips[group.name] = clip_factor(alone[group.name], group.clip_grad_norm)
            keep = keep * torch.isfinite(alone[group.name])
        self._remember_withheld(phase, names, squares, keep)
        left_out = {group.name for group in updates.groups if self._is_left_out(group)}
        updates.apply(learning_rate, keep, clips, sparse, left_out)
        if phase in self.averages:
            idle = {n for g in updates.groups if g.name in left_out for n in g.parameters}
            self.averages[phase].update(keep, idle)
        updates.clear_gradients()
        return StepResult(grad_norm, 1.0 - keep, alone if len(updates.groups) > 1 else {})

    def _set_sync(self, *, is_last: bool) -> None:
        """Accumulate locally until the last micro-batch, so that only its backward communicates, unless memory is short."""
        if self._sync is not None:
            self._sync.is_enabled = is_last
        for network in self.networks.values():
            if isinstance(network, FSDPModule):
                network.set_requires_gradient_sync(is_last or self._reduces_each)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        # Sharding casts what it shards by itself; what it leaves whole is fp32.
        if self.precision.compute == "fp32" or (self.mesh is not None and not self._whole):
            return contextlib.nullcontext()
        return torch.autocast(self.topology.device.type, dtype=torch.bfloat16)

    def _exchange_sparse(self, phase: str) -> dict[str, Tensor]:
        """Collective: row-sparse gradients averaged over the data ranks, coalesced, the same on every rank."""
        gradients = {}
        for name, parameter in self._sparse.items():
            if self._group_of[name].phase != phase:
                continue
            gradient = parameter.grad
            if self.topology.world_size > 1:
                gradient = _gather_sparse(gradient, parameter, self.topology.world_size)
            if gradient is not None:
                gradients[name] = gradient.coalesce()
        return gradients

    def _squared_norms(
        self, updates: Updates, sparse: Mapping[str, Tensor]
    ) -> tuple[tuple[str, ...], Tensor]:
        """Collective: logical names, and () fp32 of each whole gradient; sharded parts are summed over the shards."""
        # What is sharded comes first.
        found = updates.dense_gradients().items()
        dense = dict(sorted(found, key=lambda item: item[0] in self._whole))
        squares = torch.zeros(0, device=self.topology.device)
        if dense:
            squares = torch.stack(torch._foreach_norm(list(dense.values()))).square()  # type: ignore[attr-defined]
        if self.mesh is not None:
            # All of them and not only their sum: as fast, and the norm of each is known.
            sharded = sum(name not in self._whole for name in dense)
            if sharded:
                group = self.mesh.get_group(self.mesh.ndim - 1)
                dist.all_reduce(squares[:sharded], group=group)
        if sparse:
            rows = [gradient.values().float().square().sum() for gradient in sparse.values()]
            squares = torch.cat([squares, torch.stack(rows)])
        return (*dense, *sparse), squares

    def _remember_withheld(
        self, phase: str, names: tuple[str, ...], squares: Tensor, keep: Tensor
    ) -> None:
        """Norms of the last step that was withheld, without asking the device whether this one is."""
        known, before = self._withheld.get(phase, ((), squares))
        if known != names:
            before = torch.full_like(squares, -1.0)
        self._withheld[phase] = (names, torch.where(keep > 0, before, squares))

    def withheld_norms(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for names, squares in self._withheld.values():
            norms = torch.where(squares == -1.0, squares, squares.sqrt()).tolist()
            found |= {name: norm for name, norm in zip(names, norms, strict=True) if norm != -1.0}
        return found

    # Looking

    @torch.no_grad()
    def evaluate(self, batch: PackedBatch) -> LossOutput:
        if self._rows is not None:
            # Every rank of a group has the whole row here; the next step cuts again.
            self.task.whole_rows(self.networks)
        with self._autocast():
            return self.task.losses(self.networks, batch.to(self.topology.device))

    def network_for_generation(self, name: str) -> nn.Module:
        return self.networks[name]

    # State

    def state_shards(self) -> list[TensorShard]:
        shards: list[TensorShard] = []
        written = [0] * max(1, self.topology.world_size)
        for name, item in self.parameters.items():
            if name in self._based:
                continue
            item.refresh()
            place = flat_range(item.parameter, self.topology)
            kinds = {f"parameters/{name}": item.leaf.data}
            for updates in self.updates.values():
                kinds |= {
                    f"optimizer/{kind}/{name}": t for kind, t in updates.moments(item).items()
                }
            for averages in self.averages.values():
                if name in averages.tensors:
                    kinds[f"ema/{name}"] = averages.tensors[name]
            for kind, tensor in kinds.items():
                # Of the copies of a range, the one that has least to write so far writes it.
                writer = min(range(place.copies), key=written.__getitem__)
                written[writer] += tensor.numel()
                shards.append(
                    TensorShard(
                        kind, tuple(item.parameter.shape), place.start, tensor, writer == place.copy
                    )
                )
        return [*shards, *self._skip_step_shards()]

    def base_shards(self) -> list[TensorShard]:
        shards = []
        for name in self._based:
            item = self.parameters[name]
            item.refresh()
            start = flat_range(item.parameter, self.topology).start
            shape = tuple(item.parameter.shape)
            shards.append(TensorShard(f"parameters/{name}", shape, start, item.leaf.data, False))
        return shards

    def scalar_state(self) -> dict[str, Any]:
        return {
            "updates": {phase: updates.step_counts() for phase, updates in self.updates.items()}
        }

    def load_scalar_state(self, state: Mapping[str, Any]) -> None:
        for phase, updates in self.updates.items():
            updates.set_step_counts(state["updates"].get(phase, {}))


def _row_group(ranks: int, topology: Topology) -> RowGroup | None:
    """Collective: this rank's group of neighbours that share rows; None where each has its own."""
    if ranks == 1:
        return None
    mine = None
    for first in range(0, topology.world_size, ranks):
        # Every rank has to take part in making every group.
        group = dist.new_group(list(range(first, first + ranks)))
        if first <= topology.rank < first + ranks:
            mine = group
    return RowGroup(topology.rank % ranks, ranks, mine)


def _norms_by_clip(
    updates: Updates, names: tuple[str, ...], squares: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """() norm of what is clipped together, and by name that of each group which is clipped alone."""
    if not updates.clipped_alone:
        return squares.sum().sqrt(), {}
    group_of = {n: group.name for group in updates.clipped_alone for n in group.parameters}
    parts: dict[str, list[Tensor]] = {name: [] for name in ("", *group_of.values())}
    for name, square in zip(names, squares.unbind(), strict=True):
        parts[group_of.get(name, "")].append(square)
    nothing = torch.zeros(1, device=squares.device)
    norms = {
        name: (torch.stack(found) if found else nothing).sum().sqrt()
        for name, found in parts.items()
    }
    return norms.pop(""), norms


def _gather_sparse(gradient: Tensor | None, parameter: Tensor, ranks: int) -> Tensor | None:
    """Collective: the mean over ranks of row-sparse gradients, rows in rank order, not yet summed."""
    if gradient is None:
        rows = torch.zeros(0, dtype=torch.int64, device=parameter.device)
        values = torch.zeros(0, parameter.shape[1], device=parameter.device)
    else:
        rows, values = gradient._indices()[0], gradient._values()
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.zeros_like(count) for _ in range(ranks)]
    dist.all_gather(counts, count)
    sizes = [int(c) for c in counts]
    longest = max(sizes)
    if longest == 0:
        return None
    padded_rows = torch.zeros(longest, dtype=torch.int64, device=rows.device)
    padded_values = torch.zeros(longest, parameter.shape[1], device=rows.device, dtype=values.dtype)
    padded_rows[: len(rows)], padded_values[: len(rows)] = rows, values
    all_rows = [torch.empty_like(padded_rows) for _ in range(ranks)]
    all_values = [torch.empty_like(padded_values) for _ in range(ranks)]
    dist.all_gather(all_rows, padded_rows)
    dist.all_gather(all_values, padded_values)
    joined_rows = torch.cat([r[:n] for r, n in zip(all_rows, sizes, strict=True)])
    joined = torch.cat([v[:n] for v, n in zip(all_values, sizes, strict=True)]) / ranks
    return torch.sparse_coo_tensor(
        joined_rows[None], joined, parameter.shape, check_invariants=False
    )


_KEPT = (
    torch.ops.aten.mm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.weft.routed_linear.default,
    torch.ops.weft.selective_scan_forward.default,
)


def wrap_blocks(blocks: Sequence[nn.Module], parallel: ParallelConfig) -> None:
    """Recomputation and compilation of each block, in place, so that parameter names stay what they are."""
    for block in blocks:
        if parallel.activation_checkpointing != "none":
            contexts: dict[str, Any] = {}
            if parallel.activation_checkpointing == "selective":
                contexts = {
                    "context_fn": functools.partial(
                        create_selective_checkpoint_contexts, list(_KEPT)
                    )
                }
            block.forward = functools.partial(
                checkpoint, block.forward, use_reentrant=False, **contexts
            )  # type: ignore[method-assign]
        if parallel.compile:
            block.compile()
