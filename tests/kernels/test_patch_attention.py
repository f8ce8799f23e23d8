"""Cross-attention of bytes and patches against attention of each patch alone: both directions, absent patches, NaN."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import ALL_FACES, FAST_FACES, assert_close, on_face
from patching import DIRECTIONS, AttentionCase, ints, run_attention
from torch.nn.functional import scaled_dot_product_attention
from weft.kernels.entropy_patching import patch_attention as module
from weft.kernels.entropy_patching import patch_decoder_attention, patch_encoder_attention

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def check(case: AttentionCase, face: str, tolerance: float) -> None:
    exact = [x.double().requires_grad_() for x in case.tensors]
    expected = case.expected(*exact)
    grads = torch.autograd.grad(expected, exact, case.grad.double(), allow_unused=True)
    wanted = [
        expected.detach(),
        *(torch.zeros_like(x) if g is None else g for g, x in zip(grads, exact, strict=True)),
    ]
    for name, one, other in zip(
        ("out", "dq", "dk", "dv"), run_attention(case, face), wanted, strict=True
    ):
        # With one key the softmax is 1 and these gradients are exactly 0, of which a relative distance says nothing.
        if other.abs().max() < 1e-9:
            assert one.abs().max() < tolerance, name
        else:
            assert_close(one, other, tolerance, name)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("face", ALL_FACES)
def test_matches_attention_of_each_patch_alone(
    face: str, direction: str, dtype: torch.dtype
) -> None:
    for total, heads, width, vectors in ((1, 1, 1, 1), (2, 3, 4, 2), (65, 2, 5, 3)):
        check(AttentionCase(direction, total, heads, width, vectors, dtype), face, TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("total", "heads", "width"), [(63, 1, 3), (64, 1, 3), (65, 1, 3), (4, 17, 128), (5, 5, 33)]
)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("face", FAST_FACES)
def test_blocks_of_bytes_and_of_heads(
    face: str, direction: str, total: int, heads: int, width: int
) -> None:
    """17 heads of 128 channels and 2 vectors take several blocks of heads."""
    check(
        AttentionCase(
            direction, total, heads, width, 2, torch.float64, threshold=0.9, max_patches=total
        ),
        face,
        1e-12,
    )


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_thousands_of_bytes(direction: str) -> None:
    for options in ({"documents": 40}, {"threshold": 0.999, "documents": 2}):
        check(AttentionCase(direction, 3000, 2, 8, 2, torch.float64, **options), "cpu", 1e-12)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_masks_of_the_converted_release(direction: str) -> None:
    """Against the mask of transformers' port of the released model."""
    blt = pytest.importorskip("transformers.models.blt.modeling_blt")
    case = AttentionCase(direction, 40, 2, 8, 2, torch.float64, documents=1)
    ids = case.patches.patch_ids if direction == "encoder" else case.patches.decoder_ids
    mask = blt._prepare_patch_cross_attention_mask(
        ids[None].long(), case.count, 40, direction == "encoder", case.vectors, torch.float64
    )
    q, k, v = (x.transpose(0, 1)[None] for x in case.tensors)
    expected = scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)
    seen = torch.cat([queries for queries, keys in case.pairs() if len(keys)])
    assert_close(case.attend(*case.tensors)[seen], expected[seen], 1e-12)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("face", ALL_FACES)
def test_what_sees_nothing_is_zero_and_takes_no_gradient(face: str, direction: str) -> None:
    """Padding patches, an overflow, and documents whose first bytes have no patch to read, all full of NaN outside."""
    for options in ({"max_patches": 4, "documents": 4}, {"forced_starts": 1, "threshold": 0.8}):
        case = AttentionCase(direction, 30, 2, 4, 2, torch.float32, **options)
        pairs = [(queries, keys) for queries, keys in case.pairs() if len(queries) and len(keys)]
        seeing = torch.zeros(len(case.tensors[0]), dtype=torch.bool)
        seen = torch.zeros(len(case.tensors[1]), dtype=torch.bool)
        for queries, keys in pairs:
            seeing[queries] = seen[keys] = True
        assert not seeing.all() or not seen.all()
        q, k, v = (x.clone() for x in case.tensors)
        grad = case.grad.clone()
        if face != "reference":  # under a dense mask 0 * NaN is NaN
            for tensor, rows in ((q, ~seeing), (grad, ~seeing), (k, ~seen), (v, ~seen)):
                tensor[rows] = float("nan")
        out, dq, dk, dv = run_attention(case, face, (q, k, v), grad)
        assert (out[~seeing] == 0).all()
        assert (dq[~seeing] == 0).all()
        assert (dk[~seen] == 0).all()
        assert (dv[~seen] == 0).all()
        assert all(torch.isfinite(tensor).all() for tensor in (out, dq, dk, dv))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("face", FAST_FACES)
def test_nan_stays_in_its_patch(face: str, direction: str) -> None:
    case = AttentionCase(direction, 20, 2, 4, 2, torch.float32)
    pairs = [(queries, keys) for queries, keys in case.pairs() if len(queries) and len(keys)]
    queries, keys = pairs[len(pairs) // 2]
    clean = run_attention(case, face)
    for index, rows in ((0, queries), (1, keys), (2, keys)):
        tensors = [x.clone() for x in case.tensors]
        tensors[index][rows[0]] = float("nan")
        out, dq, dk, dv = run_attention(case, face, tuple(tensors))
        assert out.isnan().any()
        others = torch.ones(len(out), dtype=torch.bool)
        others[queries] = False
        rest = torch.ones(len(dk), dtype=torch.bool)
        rest[keys] = False
        for found, wanted, mask in (
            (out, clean[0], others),
            (dq, clean[1], others),
            (dk, clean[2], rest),
            (dv, clean[3], rest),
        ):
            torch.testing.assert_close(found[mask], wanted[mask])


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("face", ALL_FACES)
def test_large_scores(face: str, direction: str) -> None:
    case = AttentionCase(direction, 20, 1, 4, 2, torch.float32)
    q, k, v = case.tensors
    exact = case.expected(*(x.double() for x in (q * 100, k * 100, v)))
    assert_close(run_attention(case, face, (q * 100, k * 100, v))[0], exact, 1e-4)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_ids_match_the_definition(data: st.DataObject) -> None:
    """Ids that skip patches, with bytes that read nothing anywhere between."""
    vectors, patches = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    ids = sorted(data.draw(st.lists(st.integers(0, patches - 1), min_size=1, max_size=20)))
    for at in data.draw(st.lists(st.integers(0, len(ids)), max_size=4)):
        ids.insert(at, data.draw(st.sampled_from([-1, patches, 99])))
    table = torch.tensor(ids).int()
    tensors = [
        torch.randn(n, 2, 3, dtype=torch.float64)
        for n in (len(ids), patches * vectors, patches * vectors)
    ]
    results = []
    for face in ("reference", "cpu"):
        with on_face(face):
            leaves = [x.clone().requires_grad_() for x in tensors]
            out = patch_decoder_attention(leaves[0], leaves[1], leaves[2], table, vectors)
            out.square().sum().backward()
            results.append([out, *(leaf.grad for leaf in leaves)])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted)
    first, end = module.bytes_of_patches(table, patches)
    for j in range(patches):
        readers = (table == j).nonzero().flatten()
        assert all(first[j] <= reader < end[j] for reader in readers)


def test_scores_are_divided_by_the_root_of_the_width() -> None:
    q = torch.ones(1, 1, 4)
    k = torch.tensor([[[1.0] * 4], [[0.0] * 4]])
    v = torch.tensor([[[1.0] * 4], [[0.0] * 4]])
    out = patch_encoder_attention(q, k, v, ints(0), ints(2))
    assert math.isclose(float(out[0, 0, 0]), math.exp(2) / (math.exp(2) + 1), rel_tol=1e-6)
