"""Entropy of the next-token distribution, from logits or straight from hidden states.

With m the largest logit, `S = sum e^(x-m)` and `W = sum (x-m) e^(x-m)`, the entropy is `H = log S - W/S`, in nats:
one pass over the logits, and no softmax in memory. Statistics are fp32 (fp64 for fp64 input) because a patch
boundary is a comparison with a threshold, and near 1.34 a bf16 step is 0.008. Gradient:
`dH/dx_v = -p_v (log p_v + H)`. Entropy as a patching signal: Byte Latent Transformer, arXiv 2412.09871, equation 1.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..checks import check_dtype, check_same_device, check_shape
from ..faces import is_interpreted, pick_face, wide_dtype

__all__ = ["linear_entropy", "token_entropy", "token_entropy_reference"]

CHUNK_LOGITS = 1 << 18
"""Logits worked on at a time by the plain paths: 1 MB in fp32, which stays in a core's cache."""
LOWEST = -1e4
"""Stands for -inf among `x - m`: its exponential is 0 in fp64 too, and `0 * LOWEST` is 0 where `0 * inf` is NaN."""


def token_entropy_reference(logits: Tensor) -> Tensor:
    """The definition `-sum p log p`, differentiated by autograd; arguments and result as in `token_entropy`."""
    log_p = logits.to(wide_dtype(logits)).log_softmax(-1)
    p = log_p.exp()
    return -(p * torch.where(p == 0, 0, log_p)).sum(-1)


def token_entropy(logits: Tensor) -> Tensor:
    """`H = -sum_v p_v log p_v` with `p = softmax(logits)`, in nats.

    A logit of -inf is a token that cannot come and adds nothing; a single possible token gives exactly 0. A row with
    NaN, +inf or nothing but -inf gives NaN.

    Args:
        logits: (..., V), any floating type.

    Returns:
        (...), fp32 (fp64 for fp64 logits). Differentiable once.

    Raises:
        ValueError: logits that are not floating, or without a last dimension of at least 1.
    """
    check_dtype("logits", logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits has shape {tuple(logits.shape)}, expected (..., V) with V >= 1")
    rows = logits.reshape(math.prod(logits.shape[:-1]), logits.shape[-1])
    entropy, _, _ = torch.ops.weft.token_entropy(rows)
    return entropy.view(logits.shape[:-1])


def linear_entropy(hidden: Tensor, weight: Tensor) -> Tensor:
    """`token_entropy(hidden @ weight.T)` without keeping the logits, which stay fp32 whatever the input type.

    Args:
        hidden: (T, D), any floating type.
        weight: (V, D) of the type of `hidden`; meant for small V (a byte vocabulary).

    Returns:
        (T,), fp32 (fp64 for fp64 input). Differentiable once; logits are computed again in the backward pass.

    Raises:
        ValueError: shapes, types or devices that do not fit.
    """
    check_dtype("hidden", hidden)
    check_shape("hidden", hidden, (None, None))
    check_shape("weight", weight, (None, hidden.shape[1]))
    check_dtype("weight", weight, (hidden.dtype,))
    check_same_device(hidden=hidden, weight=weight)
    if weight.shape[0] == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected (V, D) with V >= 1")
    entropy, _, _ = torch.ops.weft.linear_entropy(hidden, weight)
    return entropy


def _statistics(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """H, m and log S of wide logits (T, V), which are overwritten."""
    peak = logits.amax(-1)
    # A row without a finite peak becomes NaN here and stays NaN: clamping keeps it.
    shifted = logits.sub_(peak[:, None]).clamp_(min=LOWEST)
    exponentials = shifted.exp()
    total = exponentials.sum(-1)
    log_total = total.log()
    return log_total - exponentials.mul_(shifted).sum(-1) / total, peak, log_total


def _logit_gradient(
    grad: Tensor, logits: Tensor, entropy: Tensor, peak: Tensor, log_total: Tensor
) -> Tensor:
    """`-p (log p + H) grad` for wide logits (T, V), which are overwritten."""
    log_p = logits.sub_(peak[:, None]).sub_(log_total[:, None]).clamp_(min=LOWEST)
    p = log_p.exp()
    return log_p.add_(entropy[:, None]).mul_(p).mul_(-grad[:, None])


def _rows_of_chunk(vocabulary: int) -> int:
    return max(1, CHUNK_LOGITS // vocabulary)


def _empty_statistics(like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = wide_dtype(like)
    entropy, peak, log_total = (
        torch.empty(like.shape[0], dtype=dtype, device=like.device) for _ in range(3)
    )
    return entropy, peak, log_total


@torch.library.custom_op("weft::token_entropy", mutates_args=())
def _token_entropy(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    out = _empty_statistics(logits)
    if logits.shape[0] == 0:
        return out
    face = pick_face(logits)
    if face == "triton":
        from .token_entropy_triton import launch_token_entropy

        launch_token_entropy(logits.contiguous(), *out)
        return out
    if face == "reference":
        _, peak, log_total = _statistics(logits.to(wide_dtype(logits), copy=True))
        return token_entropy_reference(logits), peak, log_total
    step = _rows_of_chunk(logits.shape[1])
    for start in range(0, logits.shape[0], step):
        rows = slice(start, start + step)
        # `copy`: the statistics overwrite their input.
        for whole, part in zip(
            out, _statistics(logits[rows].to(wide_dtype(logits), copy=True)), strict=True
        ):
            whole[rows] = part
    return out


@_token_entropy.register_fake
def _(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_statistics(logits)


@torch.library.custom_op("weft::token_entropy_backward", mutates_args=())
def _token_entropy_backward(
    grad: Tensor, logits: Tensor, entropy: Tensor, peak: Tensor, log_total: Tensor
) -> Tensor:
    logits_grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if logits.shape[0] == 0:
        return logits_grad
    face = pick_face(logits)
    if face == "triton":
        from .token_entropy_triton import launch_token_entropy_backward

        launch_token_entropy_backward(
            grad.contiguous(), logits.contiguous(), entropy, peak, log_total, logits_grad
        )
        return logits_grad
    step = _rows_of_chunk(logits.shape[1]) if face == "cpu" else logits.shape[0]
    for start in range(0, logits.shape[0], step):
        rows = slice(start, start + step)
        wide = logits[rows].to(entropy.dtype, copy=True)
        logits_grad[rows] = _logit_gradient(
            grad[rows], wide, entropy[rows], peak[rows], log_total[rows]
        ).to(logits.dtype)
    return logits_grad


@_token_entropy_backward.register_fake
def _(grad: Tensor, logits: Tensor, entropy: Tensor, peak: Tensor, log_total: Tensor) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _keep_logits(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0], *output)
    ctx.mark_non_differentiable(output[1], output[2])


def _logits_backward(ctx: Any, grad: Tensor, _peak: Tensor, _log_total: Tensor) -> Tensor:
    return torch.ops.weft.token_entropy_backward(grad.contiguous(), *ctx.saved_tensors)


_token_entropy.register_autograd(_logits_backward, setup_context=_keep_logits)


@torch.library.custom_op("weft::linear_entropy", mutates_args=())
def _linear_entropy(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    out = _empty_statistics(hidden)
    if hidden.shape[0] == 0:
        return out
    face = pick_face(hidden)
    # The tensor cores of the fused kernel are for fp32 and narrower.
    if face == "triton" and (hidden.dtype != torch.float64 or is_interpreted()):
        from .token_entropy_triton import launch_linear_entropy

        launch_linear_entropy(hidden.contiguous(), weight.contiguous(), *out)
        return out
    dtype = wide_dtype(hidden)
    transposed = weight.to(dtype).T
    if face == "reference":
        _, peak, log_total = _statistics(hidden.to(dtype) @ transposed)
        return token_entropy_reference(hidden.to(dtype) @ transposed), peak, log_total
    step = _rows_of_chunk(weight.shape[0])
    for start in range(0, hidden.shape[0], step):
        rows = slice(start, start + step)
        for whole, part in zip(out, _statistics(hidden[rows].to(dtype) @ transposed), strict=True):
            whole[rows] = part
    return out


@_linear_entropy.register_fake
def _(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_statistics(hidden)


@torch.library.custom_op("weft::linear_entropy_backward", mutates_args=())
def _linear_entropy_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, entropy: Tensor, peak: Tensor, log_total: Tensor
) -> tuple[Tensor, Tensor]:
    """Chunks of logits in wide type on every face: a patcher is frozen, so this is for study, not for speed."""
    hidden_grad = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    wide_weight = weight.to(entropy.dtype)
    weight_grad = torch.zeros(weight.shape, dtype=entropy.dtype, device=weight.device)
    step = _rows_of_chunk(weight.shape[0])
    if hidden.is_cuda:
        step *= 64
    for start in range(0, hidden.shape[0], step):
        rows = slice(start, start + step)
        wide = hidden[rows].to(entropy.dtype)
        logits_grad = _logit_gradient(
            grad[rows], wide @ wide_weight.T, entropy[rows], peak[rows], log_total[rows]
        )
        hidden_grad[rows] = (logits_grad @ wide_weight).to(hidden.dtype)
        weight_grad.addmm_(logits_grad.T, wide)
    return hidden_grad, weight_grad.to(weight.dtype)


@_linear_entropy_backward.register_fake
def _(
    grad: Tensor, hidden: Tensor, weight: Tensor, entropy: Tensor, peak: Tensor, log_total: Tensor
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device),
        torch.empty(weight.shape, dtype=weight.dtype, device=weight.device),
    )


def _keep_hidden(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1], output[2])


def _hidden_backward(
    ctx: Any, grad: Tensor, _peak: Tensor, _log_total: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.ops.weft.linear_entropy_backward(grad.contiguous(), *ctx.saved_tensors)


_linear_entropy.register_autograd(_hidden_backward, setup_context=_keep_hidden)
