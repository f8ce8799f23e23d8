"""Cross-attention between bytes and patches: each patch vector sees the bytes of its patch, and the other way round.

N rows, H heads of hd channels, T bytes, P patches of K vectors each (vector c of patch j is row j * K + c). No
positions, no grouped heads. Source: Byte Latent Transformer, arXiv 2412.09871, section 3.2.2 and 3.3.1.

`attend_under_mask` in patch_attention_plain.py is the definition. Bytes of a patch are contiguous, so nothing here
needs atomics. For FlexAttention see patch_block_mask.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import check_dtype, check_same_device, check_shape
from ..faces import pick_face, wide_dtype
from .patch_attention_plain import (
    attend_by_bytes,
    attend_by_bytes_backward,
    attend_under_mask,
    attend_under_mask_backward,
    pool_bytes,
    pool_bytes_backward,
)
from .segment_pool import check_segments, segment_of_rows

__all__ = ["patch_decoder_attention", "patch_encoder_attention"]


def patch_encoder_attention(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, lengths: Tensor
) -> Tensor:
    """`softmax(q k^T / sqrt(hd)) v`, where vector j * K + c sees the bytes of patch j alone.

    Args:
        q: (P * K, H, hd), any floating type; statistics and sums are fp32 (fp64 for fp64).
        k, v: (T, H, hd) of the type of `q`.
        starts: (P,) int32, not decreasing; patches must not overlap. As `patch_boundaries` gives them.
        lengths: (P,) int32; the vectors of an empty patch come out as 0 and take no gradient.

    Returns:
        (P * K, H, hd) in the type of `q`. Differentiable once.

    Raises:
        ValueError: shapes, types or devices that do not fit.
    """
    check_segments(starts, lengths)
    _check_heads(q, k, v)
    patches = starts.shape[0]
    if patches == 0 or q.shape[0] % patches or q.shape[0] == 0:
        raise ValueError(
            f"q has {q.shape[0]} rows, expected a multiple of the {patches} patches of starts, at least one for each"
        )
    check_same_device(q=q, k=k, v=v, starts=starts, lengths=lengths)
    out, _ = torch.ops.weft.patch_encoder_attention(q, k, v, starts, lengths)
    return out


def patch_decoder_attention(
    q: Tensor, k: Tensor, v: Tensor, patch_ids: Tensor, vectors: int
) -> Tensor:
    """`softmax(q k^T / sqrt(hd)) v`, where byte t sees the K vectors of patch `patch_ids[t]` alone.

    Args:
        q: (T, H, hd), any floating type; statistics and sums are fp32 (fp64 for fp64).
        k, v: (P * K, H, hd) of the type of `q`.
        patch_ids: (T,) int32, the patch that each byte reads (`Patches.decoder_ids` for a language model). Ids outside
            0 to P - 1 read nothing: 0 comes out and no gradient goes back. The others must not decrease, which is
            looked at on the CPU only.
        vectors: K.

    Returns:
        (T, H, hd) in the type of `q`. Differentiable once.

    Raises:
        ValueError: shapes, types or devices that do not fit, or ids that decrease.
    """
    _check_heads(q, k, v)
    check_shape("patch_ids", patch_ids, (q.shape[0],))
    check_dtype("patch_ids", patch_ids, (torch.int32,))
    if vectors < 1 or k.shape[0] % vectors:
        raise ValueError(f"vectors is {vectors}, expected a divisor of the {k.shape[0]} rows of k")
    check_same_device(q=q, k=k, v=v, patch_ids=patch_ids)
    _check_sorted(patch_ids, k.shape[0] // vectors)
    out, _ = torch.ops.weft.patch_decoder_attention(q, k, v, patch_ids, vectors)
    return out


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    check_shape("q", q, (None, None, None))
    check_dtype("q", q)
    check_shape("k", k, (None, *q.shape[1:]))
    check_shape("v", v, tuple(k.shape))
    for name, tensor in (("k", k), ("v", v)):
        check_dtype(name, tensor, (q.dtype,))
    if q.shape[1] == 0 or q.shape[2] == 0:
        raise ValueError(
            f"q has shape {tuple(q.shape)}, expected at least one head and one channel"
        )


def _check_sorted(patch_ids: Tensor, patches: int) -> None:
    if patch_ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    known = patch_ids[(patch_ids >= 0) & (patch_ids < patches)]
    falls = (known.diff() < 0).nonzero()
    if len(falls):
        before, after = known[falls[0, 0]], known[falls[0, 0] + 1]
        raise ValueError(
            f"patch_ids goes from {int(before)} to {int(after)}; ids of patches must not decrease"
        )


def bytes_of_patches(patch_ids: Tensor, patches: int) -> tuple[Tensor, Tensor]:
    """(P,) first and end of the range of bytes that holds all readers of each patch; bytes that read nothing are
    counted to the range they lie in."""
    is_known = (patch_ids >= 0) & (patch_ids < patches)
    upto = torch.where(is_known, patch_ids, -1).cummax(0).values
    every = torch.arange(patches, device=patch_ids.device, dtype=torch.int32)
    first = torch.searchsorted(upto, every, out_int32=True)
    return first, torch.searchsorted(upto, every, right=True, out_int32=True)


def _sees(query_patch: Tensor, key_patch: Tensor, patches: int) -> Tensor:
    """(queries, keys) bool mask of the definition."""
    is_known = (query_patch >= 0) & (query_patch < patches)
    return is_known[:, None] & (query_patch[:, None] == key_patch)


def _vector_patch(rows: int, patches: int, like: Tensor) -> Tensor:
    """(P * K,) the patch of each vector."""
    return torch.arange(rows, device=like.device) // (rows // patches)


def _new_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    """(N, H, hd) results and (N, H) logarithms of the softmax sums, 0 where nothing is seen."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return out, torch.empty(q.shape[:2], dtype=wide_dtype(q), device=q.device)


def _new_gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q_grad, k_grad, v_grad = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)
    )
    return q_grad, k_grad, v_grad


def _contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.contiguous() for tensor in tensors)


@torch.library.custom_op("weft::patch_encoder_attention", mutates_args=())
def _encoder(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    out, lse = _new_outputs(q)
    if k.shape[0] == 0:
        return out.zero_(), lse.zero_()
    face = pick_face(q)
    if face == "triton":
        from .patch_attention_triton import launch_encoder

        launch_encoder(out, lse, *_contiguous(q, k, v, starts, lengths))
        return out, lse
    patch = segment_of_rows(starts, lengths, k.shape[0])
    if face == "cpu":
        found = pool_bytes(q, k, v, patch, starts.shape[0])
    else:
        patches = starts.shape[0]
        found = attend_under_mask(
            q, k, v, _sees(_vector_patch(q.shape[0], patches, q), patch, patches)
        )
    return out.copy_(found[0]), lse.copy_(found[1])


@_encoder.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    return _new_outputs(q)


@torch.library.custom_op("weft::patch_encoder_attention_backward", mutates_args=())
def _encoder_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grads = _new_gradients(q, k, v)
    if k.shape[0] == 0:
        grads[0].zero_()
        return grads
    face = pick_face(q)
    if face == "triton":
        from .patch_attention_triton import launch_encoder_backward

        # Bytes in no patch are written by no program.
        grads[1].zero_()
        grads[2].zero_()
        launch_encoder_backward(*grads, *_contiguous(grad, q, k, v, out, lse, starts, lengths))
        return grads
    patch, patches = segment_of_rows(starts, lengths, k.shape[0]), starts.shape[0]
    if face == "cpu":
        found = pool_bytes_backward(grad, q, k, v, out, lse, patch, patches)
    else:
        mask = _sees(_vector_patch(q.shape[0], patches, q), patch, patches)
        found = attend_under_mask_backward(grad, q, k, v, mask)
    for whole, part in zip(grads, found, strict=True):
        whole.copy_(part)
    return grads


@_encoder_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _new_gradients(q, k, v)


@torch.library.custom_op("weft::patch_decoder_attention", mutates_args=())
def _decoder(
    q: Tensor, k: Tensor, v: Tensor, patch_ids: Tensor, vectors: int
) -> tuple[Tensor, Tensor]:
    out, lse = _new_outputs(q)
    if q.shape[0] == 0 or k.shape[0] == 0:
        return out.zero_(), lse.zero_()
    face, patches = pick_face(q), k.shape[0] // vectors
    if face == "triton":
        from .patch_attention_triton import launch_decoder

        launch_decoder(out, lse, vectors, *_contiguous(q, k, v, patch_ids))
        return out, lse
    if face == "cpu":
        found = attend_by_bytes(q, k, v, patch_ids, vectors)
    else:
        mask = _sees(patch_ids, _vector_patch(k.shape[0], patches, q), patches)
        found = attend_under_mask(q, k, v, mask)
    return out.copy_(found[0]), lse.copy_(found[1])


@_decoder.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, patch_ids: Tensor, vectors: int) -> tuple[Tensor, Tensor]:
    return _new_outputs(q)


@torch.library.custom_op("weft::patch_decoder_attention_backward", mutates_args=())
def _decoder_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, patch_ids: Tensor, vectors: int
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grads = _new_gradients(q, k, v)
    if q.shape[0] == 0 or k.shape[0] == 0:
        for whole in grads:
            whole.zero_()
        return grads
    face, patches = pick_face(q), k.shape[0] // vectors
    if face == "triton":
        from .patch_attention_triton import launch_decoder_backward

        # Bytes that read nothing before the first patch or after the last are written by no program.
        grads[0].zero_()
        first, end = bytes_of_patches(patch_ids, patches)
        tensors = _contiguous(grad, q, k, v, lse, patch_ids, first, end)
        launch_decoder_backward(*grads, vectors, *tensors)
        return grads
    if face == "cpu":
        found = attend_by_bytes_backward(grad, q, k, v, lse, patch_ids, vectors)
    else:
        mask = _sees(patch_ids, _vector_patch(k.shape[0], patches, q), patches)
        found = attend_under_mask_backward(grad, q, k, v, mask)
    for whole, part in zip(grads, found, strict=True):
        whole.copy_(part)
    return grads


@_decoder_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, patch_ids: Tensor, vectors: int
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _new_gradients(q, k, v)


def _keep_encoder(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:])


def _encoder_gradient(ctx: Any, grad: Tensor, _lse: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.weft.patch_encoder_attention_backward(grad.contiguous(), *ctx.saved_tensors)
    return (*grads, None, None)


def _keep_decoder(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.vectors = inputs[4]
    # All that a byte sees is at hand in the backward pass: it needs no result for its row sums.
    ctx.save_for_backward(*inputs[:3], output[1], inputs[3])


def _decoder_gradient(ctx: Any, grad: Tensor, _lse: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.weft.patch_decoder_attention_backward(
        grad.contiguous(), *ctx.saved_tensors, ctx.vectors
    )
    return (*grads, None, None)


_encoder.register_autograd(_encoder_gradient, setup_context=_keep_encoder)
_decoder.register_autograd(_decoder_gradient, setup_context=_keep_decoder)
