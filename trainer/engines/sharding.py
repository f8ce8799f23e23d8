"""Where parameters live: whole on every rank, or cut along their first dimension over a mesh (FSDP2).

The local part of a parameter is always a contiguous flat range of it, which is what a checkpoint stores.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ...models.errors import ConfigError
from ..distributed import Topology
from .config import ParallelConfig, PrecisionConfig

__all__ = [
    "FlatRange",
    "flat_range",
    "local_tensor",
    "make_mesh",
    "pick_strategy",
    "shard_networks",
]


@dataclass(frozen=True)
class FlatRange:
    """The part of a parameter held here. `copies` ranks hold the same part; this is number `copy` of them."""

    start: int
    count: int
    copy: int
    copies: int


def pick_strategy(config: ParallelConfig, topology: Topology) -> str:
    """The strategy `auto` means here."""
    if config.strategy != "auto":
        return config.strategy
    if topology.world_size == 1:
        return "single"
    return "fsdp" if topology.device.type == "cuda" else "ddp"


def make_mesh(strategy: str, config: ParallelConfig, topology: Topology) -> DeviceMesh | None:
    """The mesh of a sharded strategy: (shard) or (replicate, shard); None where nothing is sharded.

    Raises:
        ConfigError: the mesh does not fit the world.
    """
    world, kind = topology.world_size, topology.device.type
    if strategy in ("fsdp", "hsdp") and world == 1 and not torch.distributed.is_initialized():
        # Sharding over one rank: the same code path on one device, without a launcher.
        store = torch.distributed.HashStore()
        backend = "cuda:nccl,cpu:gloo" if kind == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    if strategy == "fsdp":
        return init_device_mesh(kind, (world,), mesh_dim_names=("shard",))
    if strategy != "hsdp":
        return None
    shard = config.shard_ranks or world // (config.replicate_ranks or 1)
    copies = config.replicate_ranks or max(1, world // shard)
    if shard * copies != world:
        raise ConfigError(
            f"parallel: a mesh of {copies} copies x {shard} shards is {copies * shard} ranks, the world has {world}; "
            f"set parallel.shard_ranks and parallel.replicate_ranks to a product of {world}"
        )
    return init_device_mesh(kind, (copies, shard), mesh_dim_names=("replicate", "shard"))


def shard_networks(
    networks: Mapping[str, nn.Module],
    blocks: Sequence[nn.Module],
    mesh: DeviceMesh,
    precision: PrecisionConfig,
    whole: Iterable[nn.Parameter],
    wide: Sequence[nn.Module] = (),
) -> None:
    """Shard each block, then what is left of each network; `whole` parameters stay as they are on every rank.

    Args:
        wide: modules inside blocks that are gathered in fp32, by themselves.
    """
    compute = torch.bfloat16 if precision.compute == "bf16" else torch.float32
    # Inputs are not cast: batches hold ids, angles stay fp32.
    wide_policy, policy = (
        MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        for dtype in (torch.float32, compute)
    )
    kept = set(whole)
    for module in wide if compute != torch.float32 else ():
        fully_shard(module, mesh=mesh, mp_policy=wide_policy)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    for network in networks.values():
        if kept.issuperset(network.parameters()):
            continue
        fully_shard(network, mesh=mesh, mp_policy=policy, ignored_params=kept or None)


def local_tensor(tensor: Tensor) -> Tensor:
    """What this rank holds of a parameter or gradient."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def flat_range(parameter: Tensor, topology: Topology) -> FlatRange:
    """Which flat range of the whole parameter `local_tensor` is."""
    if not isinstance(parameter, DTensor):
        return FlatRange(0, parameter.numel(), topology.rank, topology.world_size)
    mesh = parameter.device_mesh
    is_mixed = mesh.ndim == 2
    shards = mesh.size(mesh.ndim - 1)
    place = mesh.get_local_rank(mesh.ndim - 1)
    rows = parameter.shape[0]
    # FSDP2 cuts as torch.chunk does: all parts equal but the last ones, which may be short or empty.
    start = min(place * -(-rows // shards), rows)
    per_row = parameter.numel() // rows if rows else 0
    local = parameter.to_local()
    return FlatRange(
        start * per_row,
        local.numel(),
        mesh.get_local_rank(0) if is_mixed else 0,
        mesh.size(0) if is_mixed else 1,
    )
