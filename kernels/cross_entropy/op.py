"""`cross_entropy_sums` and `linear_cross_entropy`: argument checks, the registered ops, and which face runs them.

Sums, not means: the trainer divides by the count over all ranks and micro-batches. The two sums have gradients of their own,
known only in the backward; so chunked logits are computed again there, rather than turned into their gradient in
the forward for one assumed ratio of the two. That costs one product of four more, and is exact. Of each token one number is kept.
Source: OLMo 2 (arXiv 2501.00656) section 3.3.3 for the z-loss; Hsu et al. (arXiv 2410.10989) section 3.2 for chunks
whose logits are overwritten by their gradient.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..checks import check_dtype, check_same_device, check_shape
from ..faces import autocast_dtype, pick_face, wide_dtype
from . import cpu, reference
from .reference import IGNORED

__all__ = ["cross_entropy_sums", "linear_cross_entropy"]

WEIGHT_ROWS = 16384
"""Rows of the weight gradient added at a time where products come in a tensor of their own, which this bounds."""


def _path(tensor: Tensor) -> ModuleType:
    """The module whose `token_losses`, `logits_grad` and `keep_counted` run on this tensor."""
    face = pick_face(tensor)
    if face == "triton":
        from . import triton

        return triton
    return reference if face == "reference" else cpu


@torch.library.custom_op("weft::cross_entropy_sums", mutates_args=())
def _sums(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The two sums, and (T,) the logsumexp of each token."""
    entropies, log_partition = _losses(_path(logits), logits.contiguous(), targets.contiguous())
    return entropies.sum(), log_partition.square().sum(), log_partition


@_sums.register_fake
def _(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_sums(logits)


def _fake_sums(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = wide_dtype(rows)
    sizes: tuple[Any, ...] = ((), (), (rows.shape[0],))
    entropy, square, log_partition = (rows.new_empty(size, dtype=dtype) for size in sizes)
    return entropy, square, log_partition


def _losses(path: ModuleType, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    if logits.numel() == 0:
        nothing = logits.new_zeros(logits.shape[0], dtype=wide_dtype(logits))
        return nothing, nothing.clone()
    losses: tuple[Tensor, Tensor] = path.token_losses(logits, targets)
    return losses


@torch.library.custom_op("weft::cross_entropy_sums_backward", mutates_args=())
def _sums_backward(
    entropy_grad: Tensor,
    square_grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    log_partition: Tensor,
) -> Tensor:
    out = logits.new_empty(logits.shape)
    if logits.numel():
        _path(logits).logits_grad(
            logits.contiguous(),
            targets.contiguous(),
            log_partition,
            entropy_grad.contiguous(),
            square_grad.contiguous(),
            out,
        )
    return out


@_sums_backward.register_fake
def _(
    entropy_grad: Tensor,
    square_grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    log_partition: Tensor,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup_sums(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*inputs, output[2])


def _sums_gradient(ctx: Any, entropy_grad: Tensor, square_grad: Tensor, _: Any) -> Any:
    logits, targets, log_partition = ctx.saved_tensors
    grad = torch.ops.weft.cross_entropy_sums_backward(
        entropy_grad, square_grad, logits, targets, log_partition
    )
    return grad, None


_sums.register_autograd(_sums_gradient, setup_context=_setup_sums)


@torch.library.custom_op("weft::linear_cross_entropy", mutates_args=())
def _linear(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `_sums`, and the logits (T, V) in `dtype`, which products are computed in; empty where chunked.

    `chunk_tokens` is 0 where all logits are kept.
    """
    path, targets = _path(hidden), targets.contiguous()
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    # Autocast would reach into the products here, and narrow the wide ones.
    with torch.autocast(hidden.device.type, enabled=False):
        hidden, columns = hidden.to(dtype), weight.to(dtype).T
        if not chunk_tokens:
            logits = hidden @ columns
            entropies, log_partition = _losses(path, logits, targets)
            return entropies.sum(), log_partition.square().sum(), log_partition, logits
        entropies = hidden.new_empty(tokens, dtype=wide_dtype(hidden))
        log_partition = torch.empty_like(entropies)
        buffer = hidden.new_empty(chunk_tokens, vocabulary)
        for start in range(0, tokens, chunk_tokens):
            part = slice(start, min(start + chunk_tokens, tokens))
            logits = buffer[: part.stop - start]
            torch.mm(hidden[part], columns, out=logits)
            entropies[part], log_partition[part] = _losses(path, logits, targets[part])
    return entropies.sum(), log_partition.square().sum(), log_partition, hidden.new_empty(0)


@_linear.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kept = (0,) if chunk_tokens else (hidden.shape[0], weight.shape[0])
    return *_fake_sums(hidden), hidden.new_empty(kept, dtype=dtype)


@torch.library.custom_op("weft::linear_cross_entropy_backward", mutates_args=())
def _linear_backward(
    entropy_grad: Tensor,
    square_grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    log_partition: Tensor,
    logits: Tensor,
    chunk_tokens: int,
    wants_hidden: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden and weight, in their types; empty where not wanted."""
    path, targets, dtype = _path(hidden), targets.contiguous(), logits.dtype
    entropy_grad, square_grad = entropy_grad.contiguous(), square_grad.contiguous()
    hidden_grad = hidden.new_empty(hidden.shape if wants_hidden else 0)
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    if not (tokens and vocabulary):
        return hidden_grad, weight.new_zeros(weight.shape if wants_weight else 0)
    with torch.autocast(hidden.device.type, enabled=False):
        narrow_hidden, narrow_weight = hidden.to(dtype), weight.to(dtype)
        size = chunk_tokens or tokens
        weight_sum = _WeightSum(weight, dtype, is_whole=not chunk_tokens)
        buffer = narrow_hidden.new_empty(size, vocabulary)
        for start in range(0, tokens, size):
            part = slice(start, min(start + size, tokens))
            grad, rows, wanted = buffer[: part.stop - start], narrow_hidden[part], targets[part]
            if chunk_tokens:
                source = torch.mm(rows, narrow_weight.T, out=grad)
            else:
                source = logits[part]
            sums = (log_partition[part], entropy_grad, square_grad)
            path.logits_grad(source, wanted, *sums, grad)
            if wants_hidden and hidden.dtype == dtype:
                torch.mm(grad, narrow_weight, out=hidden_grad[part])
            elif wants_hidden:
                hidden_grad[part] = grad @ narrow_weight
            if wants_weight:
                weight_sum.add(grad, path.keep_counted(rows, wanted))
        return hidden_grad, weight_sum.result() if wants_weight else weight.new_empty(0)


@_linear_backward.register_fake
def _(
    entropy_grad: Tensor,
    square_grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    log_partition: Tensor,
    logits: Tensor,
    chunk_tokens: int,
    wants_hidden: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape if wants_hidden else (0,)),
        weight.new_empty(weight.shape if wants_weight else (0,)),
    )


class _WeightSum:
    """The weight gradient over chunks: in fp32 (fp64 for fp64) until the last is added, whatever the weight's type."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, *, is_whole: bool) -> None:
        self.weight = weight
        # A single product in the weight's own type is rounded once anyway.
        self.is_plain = is_whole and weight.dtype == dtype
        self.sum: Tensor | None = None

    def add(self, grad: Tensor, hidden: Tensor) -> None:
        if self.is_plain:
            self.sum = grad.T @ hidden
            return
        is_first = self.sum is None
        if self.sum is None:
            self.sum = self.weight.new_empty(self.weight.shape, dtype=wide_dtype(self.weight))
        if grad.dtype == self.sum.dtype:
            torch.addmm(self.sum, grad.T, hidden, beta=0 if is_first else 1, out=self.sum)
            return
        for rows, columns in zip(
            self.sum.split(WEIGHT_ROWS), grad.split(WEIGHT_ROWS, dim=1), strict=True
        ):
            product = _wide_product(columns.T, hidden)
            if is_first:
                rows.copy_(product)
            else:
                rows.add_(product)

    def result(self) -> Tensor:
        assert self.sum is not None
        return self.sum.to(self.weight.dtype)


def _wide_product(left: Tensor, right: Tensor) -> Tensor:
    """The product of 16-bit matrices in fp32."""
    if left.is_cuda and torch.version.hip is None:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _setup_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, targets, ctx.chunk_tokens, _ = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(hidden, weight, targets, *output[2:])


def _linear_gradient(ctx: Any, entropy_grad: Tensor, square_grad: Tensor, *_: Any) -> Any:
    wants_hidden, wants_weight, *_ = ctx.needs_input_grad
    hidden_grad, weight_grad = torch.ops.weft.linear_cross_entropy_backward(
        entropy_grad, square_grad, *ctx.saved_tensors, ctx.chunk_tokens, wants_hidden, wants_weight
    )
    return (
        hidden_grad if wants_hidden else None,
        weight_grad if wants_weight else None,
        None,
        None,
        None,
    )


_linear.register_autograd(_linear_gradient, setup_context=_setup_linear)


def cross_entropy_sums(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of `logsumexp(l) - l[target]` and `logsumexp(l)^2` over targets that are not `IGNORED`.

    Args:
        logits: (T, V), any floating type; computed in fp32 (fp64 stays).
        targets: (T,) int64. Outside 0 to V - 1 and not `IGNORED`, one is an error on the CPU; Triton's sum becomes NaN.

    Returns:
        Two scalars, fp32 (fp64 for fp64 logits).

    Raises:
        ValueError: shapes, types or devices that do not fit; on the CPU, a target outside the vocabulary.
    """
    check_shape("logits", logits, (None, None))
    check_dtype("logits", logits)
    _check_targets(targets, *logits.shape)
    check_same_device(logits=logits, targets=targets)
    entropy, square, _ = torch.ops.weft.cross_entropy_sums(logits, targets)
    return entropy, square


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """`cross_entropy_sums(hidden @ weight.T, targets)`, holding the logits of one chunk at a time.

    Products are computed in autocast's type where that is on. The weight gradient of chunks is summed in fp32 and only then
    rounded to the weight's type.

    Args:
        hidden: (T, D). What it holds where the target is ignored changes nothing, NaN included.
        weight: (V, D), of the type of `hidden` unless autocast is on.
        targets: (T,) int64, as in `cross_entropy_sums`.
        chunk_tokens: positions a chunk; None keeps all logits. Chunks are recomputed in the
            backward pass.

    Returns:
        Two scalars, fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: shapes, types or devices that do not fit, a chunk below one token; on the CPU, a target outside the vocabulary.
    """
    check_shape("hidden", hidden, (None, None))
    check_dtype("hidden", hidden)
    check_shape("weight", weight, (None, hidden.shape[1]))
    check_dtype("weight", weight)
    _check_targets(targets, hidden.shape[0], weight.shape[0])
    check_same_device(hidden=hidden, weight=weight, targets=targets)
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}, expected at least 1, or None")
    dtype = _product_dtype(hidden, weight)
    chunk = 0 if chunk_tokens is None or chunk_tokens >= hidden.shape[0] else chunk_tokens
    if not chunk and _keeps_softmax(hidden, weight, dtype):
        return cpu.LinearCrossEntropy.apply(hidden, weight, targets)
    entropy, square, *_ = torch.ops.weft.linear_cross_entropy(hidden, weight, targets, chunk, dtype)
    return entropy, square


def _keeps_softmax(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether to run eagerly on the CPU, in the accumulators' own type and keeping the softmax instead of the logits."""
    is_eager = not torch.compiler.is_compiling() and type(hidden) is Tensor
    is_eager = is_eager and hidden.numel() > 0 and weight.numel() > 0
    return is_eager and dtype == wide_dtype(hidden) and pick_face(hidden) == "cpu"


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    narrow = autocast_dtype(hidden)
    if narrow is not None and torch.float64 not in (hidden.dtype, weight.dtype):
        return narrow
    if hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden is {str(hidden.dtype).removeprefix('torch.')} and weight "
            f"{str(weight.dtype).removeprefix('torch.')}, expected one type for both, or autocast"
        )
    return hidden.dtype


def _check_targets(targets: Tensor, tokens: int, vocabulary: int) -> None:
    """The values are looked at on the CPU only, as a GPU would have to be waited for."""
    check_shape("targets", targets, (tokens,))
    check_dtype("targets", targets, (torch.int64,))
    # Compilers and planners trace with tensors that hold no values.
    if torch.compiler.is_compiling() or type(targets) is not Tensor or not targets.numel():
        return
    if targets.device.type != "cpu":
        return
    low, high = torch.where(targets == IGNORED, 0, targets).aminmax()
    if low < 0 or high >= max(vocabulary, 1):
        wrong = int(low if low < 0 else high)
        raise ValueError(
            f"targets holds {wrong}, expected 0 to {vocabulary - 1}, or {IGNORED} to ignore"
        )
