"""What mixes positions in a Mamba block: convolution and scan, of whole documents or after what is cached.

T positions of rows laid end to end, E inner channels, N states, W taps. A block calls `convolve` and `scan` of the context
it is given and knows nothing of documents; tensors are in the order of positions. `sequence_parallel.py` has the
context of sequences that are cut over ranks.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ...kernels import (
    causal_conv1d,
    causal_conv1d_step,
    selective_scan,
    selective_scan_step,
)
from .cache import KVCache

__all__ = ["CachedContext", "Context", "PackedContext"]


class Context(Protocol):
    """How the positions of a forward see each other."""

    def of_layer(self, layer: int) -> Context:
        """The context of one block."""

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """silu(causal convolution): x (T, E), weight (E, W), bias (E,) to (T, E)."""

    def scan(
        self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor | None
    ) -> Tensor:  # fmt: skip
        """The gated selective scan with step sizes softplus(delta + bias): u, delta, z (T, E), B, C (T, N) to (T, E)."""


class PackedContext:
    """Rows of whole documents, or of pieces that start one: everything begins anew where a position is 0.

    Args:
        position_ids: (T,) position inside its document.
        rows: of equal length, that T is cut into.
    """

    def __init__(self, position_ids: Tensor, rows: int) -> None:
        self.position_ids = position_ids.view(rows, -1)

    def of_layer(self, layer: int) -> PackedContext:
        return self

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows = self._in_rows(x)
        out = causal_conv1d(rows, weight, bias, "silu", position_ids=self.position_ids)
        return out.flatten(0, 1)

    def scan(
        self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor | None
    ) -> Tensor:  # fmt: skip
        u, delta, B, C, z = (self._in_rows(x) for x in (u, delta, B, C, z))
        out = selective_scan(
            *(u, delta, A, B, C, D, z, bias),
            delta_softplus=True,
            position_ids=self.position_ids,
        )
        assert isinstance(out, Tensor)
        return out.flatten(0, 1)

    def _in_rows(self, x: Tensor) -> Tensor:
        return x.unflatten(0, self.position_ids.shape)


class CachedContext:
    """New positions (b, t) of sequences of a cache, laid end to end, after what each has seen; advances its states.

    Args:
        new_lengths: (b,) int64, how many of each sequence's positions are real; None is all. The others leave no trace.
    """

    def __init__(self, cache: KVCache, length: int, new_lengths: Tensor | None, layer: int = 0):
        self.cache, self.length, self.new_lengths, self.layer = cache, length, new_lengths, layer
        self._is_padding: Tensor | None = None
        if new_lengths is not None:
            places = torch.arange(length, device=new_lengths.device)
            self._is_padding = (places >= new_lengths[:, None])[..., None]

    def of_layer(self, layer: int) -> CachedContext:
        return CachedContext(self.cache, self.length, self.new_lengths, layer)

    @property
    def _is_step(self) -> bool:
        return self.length == 1 and self.new_lengths is None

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x = self._in_rows(x)
        window = self.cache.windows[self.layer]
        if self._is_step:
            out, self.cache.windows[self.layer] = causal_conv1d_step(
                window, x[:, 0], weight, bias, "silu"
            )
            return out
        out = causal_conv1d(x, weight, bias, "silu", initial_state=window)
        joined = torch.cat((window, x.to(window.dtype)), 1)
        taps = torch.arange(window.shape[1], device=x.device).expand(len(x), -1)
        first = self.length if self.new_lengths is None else self.new_lengths[:, None]
        kept = (taps + first)[..., None].expand(-1, -1, joined.shape[2])
        self.cache.windows[self.layer] = joined.gather(1, kept)
        return out.flatten(0, 1)

    def scan(
        self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor | None
    ) -> Tensor:  # fmt: skip
        u, delta, B, C, z = (self._in_rows(x) for x in (u, delta, B, C, z))
        state = self.cache.states[self.layer]
        wide = delta.to(torch.promote_types(delta.dtype, state.dtype))
        dt = softplus(wide if bias is None else wide + bias)
        if self._is_padding is not None:
            # exp(0 A) = 1 and 0 u = 0: a step of no size leaves the state as it is.
            dt = dt.masked_fill(self._is_padding, 0.0)
        if self._is_step:
            u, dt, B, C, z = (x[:, 0] for x in (u, dt, B, C, z))
            out, self.cache.states[self.layer] = selective_scan_step(state, u, dt, A, B, C, D, z)
            return out
        out, self.cache.states[self.layer] = selective_scan(
            *(u, dt, A, B, C, D, z), initial_state=state, return_final_state=True
        )
        return out.flatten(0, 1)

    def _in_rows(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, self.length))
