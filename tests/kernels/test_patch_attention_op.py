"""Cross-attention of bytes and patches as an op: strides, gradients, compilation, nothing to do, no syncs, errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracle import ALL_FACES, needs_triton, on_face, poisoned
from patching import (
    DIRECTIONS,
    AttentionCase,
    ints,
    launches_without_values,
    rows,
    run_attention,
)
from torch import Tensor
from weft.kernels.entropy_patching import patch_attention as module
from weft.kernels.entropy_patching import patch_decoder_attention, patch_encoder_attention

Tensors = tuple[Tensor, ...]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("face", ALL_FACES)
def test_strided_expanded_and_poisoned(face: str, direction: str) -> None:
    case = AttentionCase(direction, 20, 2, 4, 2, torch.float32)
    clean = run_attention(case, face)
    strided = tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in case.tensors)
    for found, wanted in zip(run_attention(case, face, strided), clean, strict=True):
        torch.testing.assert_close(found, wanted)
    with on_face(face) as device:
        out = case.attend(*(poisoned(x.to(device)) for x in case.tensors))
        torch.testing.assert_close(out.cpu(), clean[0])
        leaves = [x.to(device).requires_grad_() for x in case.tensors]
        case.attend(*leaves).sum().backward()
    expanded = run_attention(case, face, grad=torch.ones_like(case.grad))
    for leaf, wanted in zip(leaves, expanded[1:], strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad.cpu(), wanted)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("face", ALL_FACES)
def test_gradcheck_operator_contract_and_repeats(face: str, direction: str) -> None:
    case = AttentionCase(direction, 7, 1, 2, 2, torch.float64, documents=2, max_patches=7)
    with on_face(face) as device:
        leaves = tuple(x.to(device).requires_grad_() for x in case.tensors)
        assert torch.autograd.gradcheck(case.attend, leaves, fast_mode=True)
        tables = tuple(table.to(device) for table in case.tables)
        op = getattr(torch.ops.weft, f"patch_{direction}_attention")
        torch.library.opcheck(op, (*leaves, *tables, *((2,) if direction == "decoder" else ())))
    assert all(
        torch.equal(one, other)
        for one, other in zip(run_attention(case, face), run_attention(case, face), strict=True)
    )


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("face", ALL_FACES)
def test_compiled_and_recomputed_equal_plain(face: str, direction: str) -> None:
    case = AttentionCase(direction, 12, 2, 4, 2, torch.float32)

    def total(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return case.attend(q.sin(), k, v).square().sum()

    def recomputed(*tensors: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(total, *tensors, use_reentrant=False)

    results = []
    with on_face(face) as device:
        for wrapped in (
            total,
            torch.compile(total, fullgraph=True, backend="aot_eager"),
            recomputed,
        ):
            leaves = [x.to(device).requires_grad_() for x in case.tensors]
            wrapped(*leaves).backward()
            results.append([leaf.grad for leaf in leaves])
    for other in results[1:]:
        for found, wanted in zip(other, results[0], strict=True):
            torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("face", ALL_FACES)
def test_nothing_to_attend_to(face: str) -> None:
    none, some = torch.zeros(0).int(), torch.zeros(2).int()
    with on_face(face) as device:

        def rows(count: int) -> Tensor:
            return torch.ones(count, 2, 3, device=device, requires_grad=True)

        calls: list[tuple[Tensors, Callable[..., Tensor]]] = [
            (
                (rows(4), rows(0), rows(0)),
                lambda *x: patch_encoder_attention(*x, some.to(device), some.to(device)),
            ),
            (
                (rows(0), rows(4), rows(4)),
                lambda *x: patch_decoder_attention(*x, none.to(device), 2),
            ),
            (
                (rows(2), rows(0), rows(0)),
                lambda *x: patch_decoder_attention(*x, some.to(device), 2),
            ),
        ]
        for tensors, attend in calls:
            out = attend(*tensors)
            out.sum().backward()
            assert (out == 0).all()
            assert all(x.grad is not None and (x.grad == 0).all() for x in tensors)


@needs_triton
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_host_never_waits(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from weft.kernels.entropy_patching import patch_attention_triton as kernels

    case = AttentionCase(direction, 30, 2, 4, 2, torch.float32)
    tail = (2,) if direction == "decoder" else ()
    forward, backward = getattr(module, f"_{direction}"), getattr(module, f"_{direction}_backward")
    assert (
        launches_without_values(monkeypatch, kernels, forward, (*case.tensors, *case.tables, *tail))
        == 1
    )
    kept = (case.grad,) if direction == "encoder" else ()
    lse = torch.zeros(case.grad.shape[:2])
    arguments = (case.grad, *case.tensors, *kept, lse, *case.tables, *tail)
    assert launches_without_values(monkeypatch, kernels, backward, arguments) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: patch_encoder_attention(rows(4), rows(5), rows(5), ints(0), ints(5, 0)),
            r"lengths has shape \(2,\)",
        ),
        (
            lambda: patch_encoder_attention(rows(4), rows(5), rows(5), ints(0).long(), ints(5)),
            "starts is int64",
        ),
        (
            lambda: patch_encoder_attention(rows(3), rows(5), rows(5), ints(0, 2), ints(2, 3)),
            "q has 3 rows, expected a multiple of the 2 patches of starts",
        ),
        (
            lambda: patch_encoder_attention(rows(0), rows(5), rows(5), ints(), ints()),
            "q has 0 rows, .* 0 patches",
        ),
        (
            lambda: patch_encoder_attention(rows(4)[0], rows(5), rows(5), ints(0), ints(5)),
            r"q has shape \(2, 3\)",
        ),
        (
            lambda: patch_encoder_attention(rows(4), rows(5, 2, 4), rows(5), ints(0), ints(5)),
            r"k has shape \(5, 2, 4\), expected \(\*, 2, 3\)",
        ),
        (
            lambda: patch_encoder_attention(rows(4), rows(5), rows(6), ints(0), ints(5)),
            r"v has shape \(6, 2, 3\), expected \(5, 2, 3\)",
        ),
        (
            lambda: patch_encoder_attention(rows(4), rows(5).double(), rows(5), ints(0), ints(5)),
            "k is float64, expected float32",
        ),
        (
            lambda: patch_encoder_attention(rows(4), rows(5), rows(5).half(), ints(0), ints(5)),
            "v is float16, expected float32",
        ),
        (
            lambda: patch_decoder_attention(rows(4).int(), rows(2), rows(2), ints(0, 0, 0, 0), 2),
            "q is int32",
        ),
        (
            lambda: patch_encoder_attention(
                rows(4, 0, 3), rows(5, 0, 3), rows(5, 0, 3), ints(0), ints(5)
            ),
            r"q has shape \(4, 0, 3\), expected at least one head",
        ),
        (
            lambda: patch_encoder_attention(rows(4), rows(5), rows(5), ints(0).to("meta"), ints(5)),
            "starts is on meta and q on cpu",
        ),
        (
            lambda: patch_decoder_attention(rows(4), rows(2), rows(2), ints(0), 2),
            r"patch_ids has shape \(1,\)",
        ),
        (
            lambda: patch_decoder_attention(rows(1), rows(2), rows(2), ints(0).long(), 2),
            "patch_ids is int64",
        ),
        (
            lambda: patch_decoder_attention(rows(1), rows(3), rows(3), ints(0), 2),
            "vectors is 2, expected a divisor of the 3",
        ),
        (
            lambda: patch_decoder_attention(rows(1), rows(3), rows(3), ints(0), 0),
            "vectors is 0, expected",
        ),
        (
            lambda: patch_decoder_attention(rows(4), rows(3), rows(3), ints(0, 2, -1, 1), 1),
            "patch_ids goes from 2 to 1; ids of patches must not decrease",
        ),
        (
            lambda: patch_decoder_attention(rows(1), rows(2), rows(2), ints(0).to("meta"), 2),
            "patch_ids is on meta and q on cpu",
        ),
    ],
)
def test_argument_errors(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
