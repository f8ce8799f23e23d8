"""Start values that do not depend on how a parameter is cut over ranks.

A tensor is thought of as blocks of 2^18 elements in row-major order; each block has its own
generator, seeded from (seed, name, block). Any rank can so fill just the range it holds, and
every world size starts from the same weights.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .task import InitSpec, Task

__all__ = ["fill_range", "initialise_module"]

BLOCK = 1 << 18


def fill_range(out: Tensor, spec: InitSpec, *, seed: int, name: str, start: int = 0) -> None:
    """Fill `out` with the elements `[start, start + out.numel())` of the parameter `name`.

    Args:
        out: any shape, contiguous, any device and floating type; drawn in fp32 on the CPU.
        spec: the distribution; `uniform` lies in [-std, std).
        seed: the run's seed.
        name: logical name, part of the seed.
        start: first flat element.
    """
    with torch.no_grad():
        flat = out.view(-1)
        if spec.kind == "constant":
            flat.fill_(spec.value)
            return
        if spec.kind == "log_counting":
            places = torch.arange(start, start + flat.numel(), dtype=torch.float64)
            flat.copy_(torch.log1p(places.remainder(spec.period)))
            return
        if spec.unit_rows:
            _fill_unit_rows(flat, spec, seed=seed, name=name, start=start)
            return
        position = 0
        while position < flat.numel():
            block, offset = divmod(start + position, BLOCK)
            count = min(BLOCK - offset, flat.numel() - position)
            # Drawn from the block's beginning: what a generator gives depends on what it gave.
            values = _draw(offset + count, spec, _block_seed(seed, name, block))
            flat[position : position + count].copy_(values[offset:])
            position += count


def _fill_unit_rows(flat: Tensor, spec: InitSpec, *, seed: int, name: str, start: int) -> None:
    width = spec.unit_rows
    # A range may begin or end inside a row, whose length is that of all of it.
    first, stop = start // width * width, -(-(start + flat.numel()) // width) * width
    rows = torch.empty(stop - first)
    fill_range(rows, replace(spec, unit_rows=0), seed=seed, name=name, start=first)
    rows = normalize(rows.view(-1, width)).view(-1)
    flat.copy_(rows[start - first : start - first + flat.numel()])


def _draw(count: int, spec: InitSpec, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.empty(BLOCK)
    if spec.kind == "uniform":
        values.uniform_(-spec.std, spec.std, generator=generator)
    elif spec.kind == "softplus_inverse_log_uniform":
        values.uniform_(math.log(spec.low), math.log(spec.high), generator=generator)
        steps = values.exp_().clamp_(min=spec.floor)
        values = steps + torch.log(-torch.expm1(-steps))
    elif spec.kind == "normal":
        values.normal_(0.0, spec.std, generator=generator)
    else:
        limit = spec.cut * spec.std
        torch.nn.init.trunc_normal_(values, 0.0, spec.std, -limit, limit, generator=generator)
    return values[:count]


def _block_seed(seed: int, name: str, block: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{name}/{block}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def initialise_module(module: torch.nn.Module, network: str, task: Task, seed: int) -> None:
    """Fill every parameter of an unsharded network, for library use."""
    for name, parameter in module.named_parameters():
        logical = f"{network}/{name}"
        fill_range(parameter.data, task.init_spec(logical), seed=seed, name=logical)
