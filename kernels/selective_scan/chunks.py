"""A scan cut along its length, for sequences that are spread over ranks.

A chunk acts on the state it is given as h -> decay * h + end. So every rank finds its decay (`chunk_decay`) and the end
state of a scan from zeros; `combine_states` of all of these, gathered, gives every chunk its initial state, and the scan
from there is the whole scan's. All of it is differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_dtype, check_same_device, check_shape
from .op import document_starts
from .reference import ScanInputs, step_sizes

__all__ = ["chunk_decay", "combine_states"]


def chunk_decay(
    delta: Tensor,
    A: Tensor,
    delta_bias: Tensor | None = None,
    *,
    delta_softplus: bool = False,
    cu_seqlens: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Tensor:
    """What is left of a state behind a chunk: the product over its positions of exp(dt_t A), as exp(A sum_t dt_t).

    Args:
        delta: (B, L, D). A: (D, N). delta_bias: (D,). All as in `selective_scan`.
        cu_seqlens, position_ids: documents; a chunk that holds the start of one passes nothing. Give the positions
            inside whole documents where a chunk continues one: borders say that every row starts a document.

    Returns:
        (B, D, N), fp32 or fp64: exactly 0 for rows that hold the start of a document, 1 for chunks of no position.

    Raises:
        ValueError: shapes, types, devices or borders that do not fit.
    """
    check_shape("delta", delta, (None, None, None))
    batch, length, channels = delta.shape
    check_shape("A", A, (channels, None))
    named = {"delta": delta, "A": A}
    if delta_bias is not None:
        check_shape("delta_bias", delta_bias, (channels,))
        named["delta_bias"] = delta_bias
    for name, tensor in named.items():
        check_dtype(name, tensor)
    check_same_device(**named)
    starts = document_starts(batch, length, cu_seqlens, position_ids, delta.device)
    matrix = delta.new_empty((batch, length, 1, A.shape[1]))
    inputs = ScanInputs(
        delta, delta, A, matrix, matrix, None, None, delta_bias, starts, delta_softplus
    )
    total = step_sizes(inputs).sum(1)
    if starts is None:
        return torch.exp(total[..., None] * A.to(inputs.wide))
    # Selected on both sides of the exponential: its gradient must not see the NaN of a document either.
    is_cut = starts.any(1)
    total = total.masked_fill(is_cut[:, None], 0.0)
    return torch.exp(total[..., None] * A.to(inputs.wide)).masked_fill(is_cut[:, None, None], 0.0)


def combine_states(
    decays: Tensor, states: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The state before each chunk, h_{k+1} = decay_k h_k + state_k, and the one behind the last.

    Args:
        decays: (chunks, B, D, N), of `chunk_decay`. Where it is 0 nothing passes, not even a NaN.
        states: (chunks, B, D, N), each chunk's final state from an initial state of zeros.
        initial_state: (B, D, N), what the first chunk continues from; None is zeros.

    Returns:
        Initial states (chunks, B, D, N) and the final state (B, D, N), in the type of `states`.

    Raises:
        ValueError: shapes, types or devices that do not fit.
    """
    check_shape("decays", decays, (None, None, None, None))
    check_shape("states", states, tuple(decays.shape))
    if initial_state is not None:
        check_shape("initial_state", initial_state, tuple(decays.shape[1:]))
    for name, tensor in (("decays", decays), ("states", states)):
        check_dtype(name, tensor)
    check_same_device(decays=decays, states=states, initial_state=initial_state)
    if initial_state is None:
        state = states.new_zeros(states.shape[1:])
    else:
        state = initial_state.to(states.dtype)
    before = []
    for decay, end in zip(decays, states, strict=True):
        before.append(state)
        state = decay.to(states.dtype) * state.masked_fill(decay == 0, 0.0) + end
    if not before:
        return torch.zeros_like(states), state.clone()
    return torch.stack(before), state
