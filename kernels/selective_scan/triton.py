"""Launches the Triton kernels of the selective scan: layouts, configurations, partial sums.

Sums over channels (dB, dC) and over rows (dA, dD, the gradient of the bias) leave the kernels as one part a program and
are added in a fixed order, so that runs give the same bits. Where rows times channels are too few to fill a GPU, L is cut
in segments: their effect on a state is found first, combined, and every segment then starts from its own state.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..faces import is_interpreted
from .reference import SPACING, Gradients, ScanInputs, channels_last, kept_states
from .triton_backward import backward_kernel, reduction_asm
from .triton_forward import combine_kernel, forward_kernel, local_kernel

__all__ = ["BACKWARD_CONFIGS", "FORWARD_CONFIGS", "backward_triton", "forward_triton"]


class Config(NamedTuple):
    """A launch: channels a program (one warp), positions a chunk."""

    block: int
    rows: int


FORWARD_CONFIGS = {"few": Config(block=32, rows=SPACING), "many": Config(block=64, rows=SPACING)}
BACKWARD_CONFIGS = {"few": Config(block=32, rows=8), "many": Config(block=64, rows=8)}
"""By rows times channels: `many` from MANY_* on. A forward chunk is the spacing of the kept states."""

MANY_FORWARD = 1 << 16
MANY_BACKWARD = 1 << 15
"""Sooner: there two channels a thread halve the price of the sums over channels."""
PROGRAMS = 512
"""L is cut while a launch has fewer programs: one a scheduler of an H100 or H200 has ..."""
SEGMENT_CHUNKS = 8
"""... into segments of no fewer chunks than this: each costs its positions' exponentials again."""
COMBINE_BLOCK = 128
MAX_GRID = 65535
"""CUDA's limit for the outer dimensions of a launch."""


class _Launch:
    """Everything that the kernels of one scan share."""

    def __init__(self, inputs: ScanInputs, config: Config) -> None:
        self.inputs, self.config = inputs, config
        self.batch, self.length, self.channels = inputs.u.shape
        self.groups, self.states = inputs.B.shape[2:]
        self.group_channels = self.channels // self.groups
        if self.batch * self.groups > MAX_GRID:
            raise ValueError(
                f"u has {self.batch} rows of {self.groups} groups, the GPU takes at most {MAX_GRID} groups in all"
            )
        self.blocks = triton.cdiv(self.group_channels, config.block)
        self.chunks = triton.cdiv(self.length, SPACING)
        programs = self.batch * self.groups * self.blocks
        wanted = min(triton.cdiv(PROGRAMS, programs), max(1, self.chunks // SEGMENT_CHUNKS))
        self.segment_chunks = triton.cdiv(self.chunks, wanted)
        self.segments = triton.cdiv(self.chunks, self.segment_chunks)
        self.grid = (self.blocks, self.segments, self.batch * self.groups)
        wide = inputs.wide
        A = inputs.A.to(wide).unflatten(0, (self.groups, self.group_channels))
        # (G, N, D/G), in powers of two; B and C (B, G, N, L) with whole chunks of positions.
        self.A = (A.transpose(1, 2) * math.log2(math.e)).contiguous()
        self.padded = self.chunks * SPACING
        self.B, self.C = self.by_state(inputs.B), self.by_state(inputs.C)
        self.u, self.delta = _rows(inputs.u), _rows(inputs.delta)
        self.z = None if inputs.z is None else _rows(inputs.z)
        self.starts = None
        if inputs.starts is not None:
            self.starts = inputs.starts.contiguous().view(torch.int8)
        self.uses_ptx = not is_interpreted() and torch.version.hip is None and wide == torch.float32
        z_strides = (0, 0) if self.z is None else self.z.stride()[:2]
        self.strides = (*self.u.stride()[:2], *self.delta.stride()[:2], *z_strides, self.padded)
        self.shared: dict[str, Any] = {
            "N": self.states,
            "T": config.rows,
            "BD": config.block,
            "SOFTPLUS": inputs.delta_softplus,
            # Terms of a series in at most 1/9, to the last digit.
            "TERMS": 8 if wide == torch.float32 else 17,
            "USES_PTX": self.uses_ptx,
            "num_warps": 1,
            # The steps are fused multiply-adds; Triton 3.10 no longer makes them unasked.
            "enable_fp_fusion": True,
        }

    def by_state(self, matrix: Tensor) -> Tensor:
        shape = (self.batch, self.groups, self.states, self.padded)
        out = self.inputs.empty(shape)
        out[..., : self.length].copy_(matrix.permute(0, 2, 3, 1))
        out[..., self.length :].zero_()
        return out

    def part(self, *inner: int) -> Tensor:
        """(B, segments, G, ..., N, D/G)."""
        return self.inputs.empty(
            (self.batch, self.segments, self.groups, *inner, self.states, self.group_channels)
        )

    def combine(
        self, matrix: Tensor, dout: Tensor | None, start: Tensor, out: Tensor, slots: int
    ) -> None:
        """Fill `out` (B, slots, G, N, D/G) with what segments start from: states, or their gradients from `dout`."""
        local, decay = self.part().zero_(), self.part()
        local_kernel[self.grid](
            self.u,
            self.delta,
            self.z,
            dout,
            self.A,
            matrix,
            self.inputs.delta_bias,
            self.starts,
            local,
            decay,
            *self.strides,
            self.length,
            self.group_channels,
            self.groups,
            self.segment_chunks * (SPACING // self.config.rows),
            self.segments,
            ADJOINT=dout is not None,
            **self.shared,
        )
        size = self.channels * self.states
        combine_kernel[(triton.cdiv(size, COMBINE_BLOCK), self.batch)](
            local,
            decay,
            start,
            out,
            start.stride(0),
            out.stride(0),
            self.segments,
            slots,
            size,
            BLOCK=COMBINE_BLOCK,
            REVERSE=dout is not None,
            num_warps=1,
        )


def _rows(x: Tensor) -> Tensor:
    """Channels side by side; rows may lie apart, as in the half of a projection's output."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _on(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device_of(x) if x.is_cuda else contextlib.nullcontext()


def _config(table: dict[str, Config], many: int, inputs: ScanInputs) -> Config:
    # Two channels a thread only where both lie in one aligned load. Elsewhere the loads and stores of a state may be
    # given to different threads, and a state must stay with its own.
    is_aligned = inputs.group_channels >= 64 and inputs.group_channels % 16 == 0
    is_many = inputs.u.shape[0] * inputs.u.shape[2] >= many
    return table["many" if is_many and is_aligned else "few"]


def forward_triton(
    inputs: ScanInputs, initial_state: Tensor | None, keep_states: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(out, final state (B, D, N), kept states or None)."""
    u = inputs.u
    with _on(u):
        launch = _Launch(inputs, _config(FORWARD_CONFIGS, MANY_FORWARD, inputs))
        out = torch.empty(u.shape, dtype=u.dtype, device=u.device)
        states = kept_states(inputs, initial_state, every=keep_states)
        if launch.segments > 1:
            start = states[:, 0]
            if not keep_states:
                states = launch.part()
            slots = launch.segment_chunks if keep_states else 1
            launch.combine(launch.B, None, start, states, slots)
        forward_kernel[launch.grid](
            launch.u,
            launch.delta,
            launch.z,
            launch.A,
            launch.B,
            launch.C,
            inputs.D,
            inputs.delta_bias,
            launch.starts,
            states,
            out,
            *launch.strides,
            launch.length,
            launch.group_channels,
            launch.groups,
            launch.segment_chunks,
            launch.segments,
            KEEP=keep_states,
            **launch.shared,
        )
        return out, channels_last(states[:, -1]), states if keep_states else None


def backward_triton(
    inputs: ScanInputs, states: Tensor, grad_out: Tensor, grad_final: Tensor | None
) -> Gradients:
    u = inputs.u
    with _on(u):
        launch = _Launch(inputs, _config(BACKWARD_CONFIGS, MANY_BACKWARD, inputs))
        batch, length, groups = launch.batch, launch.length, launch.groups
        q = launch.part()
        start = inputs.zeros((batch, groups, launch.states, launch.group_channels))
        if grad_final is not None:
            start.copy_(grad_final.unflatten(1, (groups, -1)).transpose(2, 3))
        if launch.segments > 1:
            launch.combine(launch.C, grad_out, start, q, 1)
        else:
            q[:, 0].copy_(start)
        sub = SPACING // launch.config.rows
        scratch = launch.part(sub - 1)
        du, ddelta, dz = (
            None if x is None else torch.empty(u.shape, dtype=x.dtype, device=u.device)
            for x in (u, inputs.delta, inputs.z)
        )
        assert du is not None
        assert ddelta is not None
        dA = launch.part().zero_()
        dD, dbias = (
            None if x is None else inputs.empty((batch, launch.segments, launch.channels))
            for x in (inputs.D, inputs.delta_bias)
        )
        sums = inputs.empty((groups, launch.blocks, 2, batch, launch.states, launch.padded))
        asm, constraints = None, None
        if launch.uses_ptx:
            asm, constraints = reduction_asm(launch.config.rows, launch.config.block // 32)
        backward_kernel[launch.grid](
            launch.u,
            launch.delta,
            launch.z,
            grad_out,
            launch.A,
            launch.B,
            launch.C,
            inputs.D,
            inputs.delta_bias,
            launch.starts,
            states,
            scratch,
            q,
            du,
            ddelta,
            dz,
            dA,
            dD,
            dbias,
            sums,
            *launch.strides,
            length,
            batch,
            launch.group_channels,
            groups,
            launch.segment_chunks,
            launch.segments,
            SUB=sub,
            ASM=asm,
            CONSTRAINTS=constraints,
            **launch.shared,
        )
        # (B, L, G, N): blocks of a group are added in their order.
        dB, dC = (sums[:, :, i].sum(1)[..., :length].permute(1, 3, 0, 2) for i in range(2))
        return Gradients(
            u=du,
            delta=ddelta,
            A=dA.sum((0, 1)).transpose(1, 2).flatten(0, 1),
            B=dB,
            C=dC,
            D=None if dD is None else dD.sum((0, 1)),
            z=dz,
            delta_bias=None if dbias is None else dbias.sum((0, 1)),
            initial_state=channels_last(q[:, 0]),
        )
