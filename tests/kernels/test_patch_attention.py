"""Cross-attention of bytes and patches: both directions, block masks, absent patches, documents and NaN."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import ALL_FACES, FAST_FACES, assert_close, needs_triton, on_face, poisoned
from patching import launches_without_values, random_patches
from sm90 import compile_sm90, needs_sm90_tools
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from weft.kernels.entropy_patching import (
    decoder_block_mask,
    encoder_block_mask,
    flex_patch_attention,
    patch_block_mask,
    patch_decoder_attention,
    patch_encoder_attention,
)
from weft.kernels.entropy_patching import patch_attention as module

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
DIRECTIONS = ["encoder", "decoder"]
Tensors = tuple[Tensor, ...]


class Case:
    """One direction over random patches: q, k, v, the tables that go with them, and an oracle."""

    def __init__(
        self, direction: str, total: int, heads: int, width: int, vectors: int, dtype: torch.dtype, **options: Any
    ) -> None:  # fmt: skip
        self.direction, self.vectors, self.total = direction, vectors, total
        self.patches = random_patches(total, **options)
        self.count = self.patches.starts.shape[0]

        def rows(count: int) -> Tensor:
            return torch.randn(count, heads, width, dtype=torch.float64).to(dtype)

        sizes = (
            (self.count * vectors, total)
            if direction == "encoder"
            else (total, self.count * vectors)
        )
        self.tensors = (rows(sizes[0]), rows(sizes[1]), rows(sizes[1]))
        self.grad = rows(sizes[0])
        self.tables: Tensors = (self.patches.decoder_ids,)
        if direction == "encoder":
            self.tables = (self.patches.starts, self.patches.lengths)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tables = [table.to(q.device) for table in self.tables]
        if self.direction == "encoder":
            return patch_encoder_attention(q, k, v, tables[0], tables[1])
        return patch_decoder_attention(q, k, v, tables[0], self.vectors)

    def block_mask(self) -> Any:
        if self.direction == "encoder":
            return encoder_block_mask(*self.tables, self.vectors, self.total)
        return decoder_block_mask(*self.tables, self.vectors, self.count)

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Rows of queries and of keys of each patch, read off the tables one by one."""
        found = []
        for j in range(self.count):
            vectors = torch.arange(j * self.vectors, (j + 1) * self.vectors)
            if self.direction == "encoder":
                start, length = (int(table[j]) for table in self.tables)
                found.append((vectors, torch.arange(start, start + length)))
            else:
                found.append(((self.tables[0] == j).nonzero().flatten(), vectors))
        return found

    def expected(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One dense attention for each patch alone."""
        out = torch.zeros_like(q)
        for queries, keys in self.pairs():
            if len(queries) and len(keys):
                parts = (
                    x[rows].transpose(0, 1) for x, rows in ((q, queries), (k, keys), (v, keys))
                )
                out = out.index_copy(
                    0, queries, scaled_dot_product_attention(*parts).transpose(0, 1)
                )
        return out


def run(
    case: Case, face: str, tensors: Tensors | None = None, grad: Tensor | None = None
) -> list[Tensor]:
    with on_face(face) as device:
        leaves = [x.detach().to(device).requires_grad_() for x in tensors or case.tensors]
        out = case.attend(*leaves)
        out.backward((case.grad if grad is None else grad).to(device))
    assert all(leaf.grad is not None and leaf.grad.dtype == out.dtype for leaf in leaves)
    return [out.detach().cpu(), *(leaf.grad.cpu() for leaf in leaves if leaf.grad is not None)]


def check(case: Case, face: str, tolerance: float) -> None:
    exact = [x.double().requires_grad_() for x in case.tensors]
    expected = case.expected(*exact)
    grads = torch.autograd.grad(expected, exact, case.grad.double(), allow_unused=True)
    wanted = [
        expected.detach(),
        *(torch.zeros_like(x) if g is None else g for g, x in zip(grads, exact, strict=True)),
    ]
    for name, one, other in zip(("out", "dq", "dk", "dv"), run(case, face), wanted, strict=True):
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
        check(Case(direction, total, heads, width, vectors, dtype), face, TOLERANCE[dtype])


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
        Case(direction, total, heads, width, 2, torch.float64, threshold=0.9, max_patches=total),
        face,
        1e-12,
    )


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_thousands_of_bytes(direction: str) -> None:
    for options in ({"documents": 40}, {"threshold": 0.999, "documents": 2}):
        check(Case(direction, 3000, 2, 8, 2, torch.float64, **options), "cpu", 1e-12)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_masks_of_the_converted_release(direction: str) -> None:
    """Against the mask of transformers' port of the released model."""
    blt = pytest.importorskip("transformers.models.blt.modeling_blt")
    case = Case(direction, 40, 2, 8, 2, torch.float64, documents=1)
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
        case = Case(direction, 30, 2, 4, 2, torch.float32, **options)
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
        out, dq, dk, dv = run(case, face, (q, k, v), grad)
        assert (out[~seeing] == 0).all()
        assert (dq[~seeing] == 0).all()
        assert (dk[~seen] == 0).all()
        assert (dv[~seen] == 0).all()
        assert all(torch.isfinite(tensor).all() for tensor in (out, dq, dk, dv))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("face", FAST_FACES)
def test_nan_stays_in_its_patch(face: str, direction: str) -> None:
    case = Case(direction, 20, 2, 4, 2, torch.float32)
    pairs = [(queries, keys) for queries, keys in case.pairs() if len(queries) and len(keys)]
    queries, keys = pairs[len(pairs) // 2]
    clean = run(case, face)
    for index, rows in ((0, queries), (1, keys), (2, keys)):
        tensors = [x.clone() for x in case.tensors]
        tensors[index][rows[0]] = float("nan")
        out, dq, dk, dv = run(case, face, tuple(tensors))
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
    case = Case(direction, 20, 1, 4, 2, torch.float32)
    q, k, v = case.tensors
    exact = case.expected(*(x.double() for x in (q * 100, k * 100, v)))
    assert_close(run(case, face, (q * 100, k * 100, v))[0], exact, 1e-4)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("face", ALL_FACES)
def test_strided_expanded_and_poisoned(face: str, direction: str) -> None:
    case = Case(direction, 20, 2, 4, 2, torch.float32)
    clean = run(case, face)
    strided = tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in case.tensors)
    for found, wanted in zip(run(case, face, strided), clean, strict=True):
        torch.testing.assert_close(found, wanted)
    with on_face(face) as device:
        out = case.attend(*(poisoned(x.to(device)) for x in case.tensors))
        torch.testing.assert_close(out.cpu(), clean[0])
        leaves = [x.to(device).requires_grad_() for x in case.tensors]
        case.attend(*leaves).sum().backward()
    expanded = run(case, face, grad=torch.ones_like(case.grad))
    for leaf, wanted in zip(leaves, expanded[1:], strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad.cpu(), wanted)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("face", ALL_FACES)
def test_gradcheck_operator_contract_and_repeats(face: str, direction: str) -> None:
    case = Case(direction, 7, 1, 2, 2, torch.float64, documents=2, max_patches=7)
    with on_face(face) as device:
        leaves = tuple(x.to(device).requires_grad_() for x in case.tensors)
        assert torch.autograd.gradcheck(case.attend, leaves, fast_mode=True)
        tables = tuple(table.to(device) for table in case.tables)
        op = getattr(torch.ops.weft, f"patch_{direction}_attention")
        torch.library.opcheck(op, (*leaves, *tables, *((2,) if direction == "decoder" else ())))
    assert all(
        torch.equal(one, other) for one, other in zip(run(case, face), run(case, face), strict=True)
    )


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("face", ALL_FACES)
def test_compiled_and_recomputed_equal_plain(face: str, direction: str) -> None:
    case = Case(direction, 12, 2, 4, 2, torch.float32)

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


def blocks_of(mask: Any) -> tuple[Tensor, Tensor]:
    """(rows, columns) bool of the partial and of the full blocks."""
    rows, columns = mask.to_dense().shape[-2:]
    found = []
    for count, order in (
        (mask.kv_num_blocks, mask.kv_indices),
        (mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        dense = torch.zeros(rows, columns, dtype=torch.bool)
        for row in range(rows):
            dense[row, order[0, 0, row, : count[0, 0, row]].long()] = True
        found.append(dense)
    return found[0], found[1]


@pytest.mark.parametrize(
    "options", [{}, {"threshold": 0.995}, {"threshold": 9.0, "documents": 2}, {"max_patches": 9}]
)
@pytest.mark.parametrize("total", [1, 128, 700])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_block_masks_equal_those_of_create_block_mask(
    direction: str, total: int, options: dict[str, Any]
) -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    case = Case(direction, total, 1, 1, 2, torch.float32, **options)
    found = case.block_mask()
    queries, keys = len(case.tensors[0]), len(case.tensors[1])
    expected = create_block_mask(found.mask_mod, None, None, queries, keys, device="cpu")
    for one, other in zip(blocks_of(found), blocks_of(expected), strict=True):
        assert torch.equal(one, other)
    # The rule itself, from the tables.
    dense = torch.zeros(queries, keys, dtype=torch.bool)
    for rows, columns in case.pairs():
        dense[rows[:, None], columns] = True
    every = (torch.arange(queries)[:, None], torch.arange(keys))
    assert torch.equal(found.mask_mod(None, None, *every), dense)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_block_masks_of_any_intervals(data: st.DataObject) -> None:
    """Intervals in no order, empty ones and gaps included; full blocks come up with small blocks only."""
    from torch.nn.attention.flex_attention import create_block_mask

    keys = data.draw(st.integers(1, 40))
    wide = st.tuples(st.sampled_from([0, keys // 4]), st.sampled_from([keys, keys - keys // 4]))
    anything = st.tuples(st.integers(0, keys), st.integers(0, keys))
    bounds = data.draw(st.sampled_from([wide, wide | anything, anything]))
    intervals = data.draw(st.lists(bounds, min_size=1, max_size=20))
    first, end = (torch.tensor(side).int() for side in zip(*intervals, strict=True))
    found = patch_block_mask(first, end, keys, block=4)
    expected = create_block_mask(
        found.mask_mod, None, None, len(first), keys, device="cpu", BLOCK_SIZE=4
    )
    for one, other in zip(blocks_of(found), blocks_of(expected), strict=True):
        assert torch.equal(one, other)


def test_full_blocks_are_those_that_all_queries_see_whole() -> None:
    first = torch.tensor([0, 0, 0, 0, 4, 4, 3, 4, 0])
    end = torch.tensor([8, 8, 9, 8, 12, 12, 12, 11, 12])
    partial, full = blocks_of(patch_block_mask(first, end, 12, block=4))
    assert full.tolist() == [[True, True, False], [False, True, False], [False, False, False]]
    assert partial.tolist() == [[False, False, True], [True, False, True], [True, True, True]]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_flex_attention_under_the_block_mask(direction: str) -> None:
    case = Case(direction, 300, 2, 16, 2, torch.float32, documents=4)
    found = flex_patch_attention(*case.tensors, case.block_mask())
    assert_close(found, case.expected(*(x.double() for x in case.tensors)), 1e-5)


def test_building_a_block_mask_never_waits_for_values() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    patches = random_patches(600)
    with FakeTensorMode() as mode:
        starts, lengths, ids = (
            mode.from_tensor(x) for x in (patches.starts, patches.lengths, patches.decoder_ids)
        )
        encoder_block_mask(starts, lengths, 2, 600)
        decoder_block_mask(ids, 2, 603)


@needs_triton
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_host_never_waits(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from weft.kernels.entropy_patching import patch_attention_triton as kernels

    case = Case(direction, 30, 2, 4, 2, torch.float32)
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


def rows(count: int, *shape: int, **options: Any) -> Tensor:
    return torch.zeros(count, *(shape or (2, 3)), **options)


def ints(*values: int) -> Tensor:
    return torch.tensor(values).int()


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
        (lambda: patch_block_mask(ints(0), ints(1, 2), 3), r"end has shape \(2,\), expected \(1\)"),
        (
            lambda: patch_block_mask(ints(0).float(), ints(1), 3),
            "first is float32, expected int32, int64",
        ),
        (lambda: patch_block_mask(ints(), ints(), 3), "first has 0 queries and keys is 3"),
        (lambda: patch_block_mask(ints(0), ints(0), 0), "first has 1 queries and keys is 0"),
        (
            lambda: patch_block_mask(ints(0), ints(0).to("meta"), 3),
            "end is on meta and first on cpu",
        ),
        (
            lambda: flex_patch_attention(
                rows(2), rows(3), rows(3), patch_block_mask(ints(0), ints(3), 3)
            ),
            r"q has shape \(2, 2, 3\), expected \(1, \*, \*\)",
        ),
        (
            lambda: flex_patch_attention(
                rows(1, requires_grad=True), rows(3), rows(3), patch_block_mask(ints(0), ints(3), 3)
            ),
            "q is on cpu, where FlexAttention has no gradient; use patch_encoder_attention or",
        ),
    ],
)
def test_argument_errors(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@needs_sm90_tools
def test_on_sm90_the_kernels_neither_spill_nor_use_atomics() -> None:
    from weft.kernels.entropy_patching.patch_attention_triton import patch_tiles

    _, constants = patch_tiles(2, 16, 64)
    gradients = ("p_dq", "p_dk", "p_dv")
    kernels = {
        "encoder_backward_kernel": (
            ("p_g", "p_q", "p_k", "p_v", "p_out", *gradients),
            ("p_start", "p_length"),
        ),
        "decoder_backward_kernel": (
            ("p_g", "p_q", "p_k", "p_v", *gradients),
            ("p_patch", "p_first", "p_end"),
        ),
    }
    for kernel, (names, tables) in kernels.items():
        types = {
            **dict.fromkeys(names, "*bf16"),
            **dict.fromkeys(tables, "*i32"),
            "p_lse": "*fp32",
            "H": "i32",
        }
        built = compile_sm90(
            "weft.kernels.entropy_patching.patch_attention_triton", kernel, types,
            {**constants, "WIDE": "tl.float32"}, divisible_by_16=(*names, "H"), num_warps=4,
        )  # fmt: skip
        assert built.spill_bytes == 0
        assert built.registers <= 168
        assert built.count("RED.") == built.count("ATOM") == 0


@needs_sm90_tools
def test_on_sm90_wide_heads_of_the_decoder_do_not_spill() -> None:
    from weft.kernels.entropy_patching.patch_attention_triton import bytes_tile

    names = ("p_q", "p_k", "p_v", "p_out")
    types = {
        **dict.fromkeys(names, "*bf16"),
        "p_patch": "*i32",
        "p_lse": "*fp32",
        **dict.fromkeys("TPH", "i32"),
    }
    tile = bytes_tile(torch.empty(1, 1, 128, dtype=torch.bfloat16))
    built = compile_sm90(
        "weft.kernels.entropy_patching.patch_attention_triton", "decoder_kernel", types,
        {**tile, "VECTORS": 2, "WIDE": "tl.float32"}, divisible_by_16=(*names, "H"), num_warps=4,
    )  # fmt: skip
    assert built.spill_bytes == 0
    assert built.registers <= 168


def test_scores_are_divided_by_the_root_of_the_width() -> None:
    q = torch.ones(1, 1, 4)
    k = torch.tensor([[[1.0] * 4], [[0.0] * 4]])
    v = torch.tensor([[[1.0] * 4], [[0.0] * 4]])
    out = patch_encoder_attention(q, k, v, ints(0), ints(2))
    assert math.isclose(float(out[0, 0, 0]), math.exp(2) / (math.exp(2) + 1), rel_tol=1e-6)
