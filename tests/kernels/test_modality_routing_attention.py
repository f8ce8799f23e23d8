"""Masks as intervals against their definition, and routed attention against a softmax written out."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import ALL_FACES, assert_close, on_face
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils.checkpoint import checkpoint
from weft.kernels import (
    PackedLayout,
    apply_rotary,
    packed_attention,
    rotary_frequencies,
    rotary_table,
)
from weft.kernels.modality_routing import (
    MixedLayout,
    Routing,
    mixed_attention,
    route_by_modality,
    routed_attention,
    routed_linear,
    routed_rms_norm,
)
from weft.kernels.modality_routing.reference import mixed_attention_reference
from weft.kernels.rms_norm import rms_norm_reference
from weft.kernels.rotary import RotaryTable

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

EPS = 1e-5


@dataclasses.dataclass
class Pack:
    """Documents as lists of (length, is image), of rows of equal length."""

    documents: list[list[tuple[int, bool]]]
    row_length: int = 0

    def __post_init__(self) -> None:
        lengths = [sum(n for n, _ in document) for document in self.documents]
        self.total = sum(lengths)
        self.row_length = self.row_length or max(1, self.total)
        self.borders = torch.tensor([0, *lengths]).cumsum(0).int()
        self.positions = torch.cat([torch.arange(n) for n in (*lengths, 0)])
        self.max_seqlen = max(lengths, default=0)
        parts = list(itertools.chain(*self.documents))
        ends = list(itertools.accumulate(n for n, _ in parts))
        spans = [(e - n, e) for e, (n, is_image) in zip(ends, parts, strict=True) if is_image]
        self.spans = spans
        self.modality = torch.zeros(self.total, dtype=torch.uint8)
        for start, end in spans:
            self.modality[start:end] = 1

    def layout(self, **changes: Any) -> MixedLayout:
        given = {
            "cu_seqlens": self.borders,
            "position_ids": self.positions,
            "max_seqlen": self.max_seqlen,
            "row_length": self.row_length,
            "image_spans": self.spans,
        }
        return MixedLayout(**{**given, **changes})

    def packed(self) -> PackedLayout:
        return PackedLayout(self.borders, self.positions, self.max_seqlen, self.row_length)

    def visible(self) -> Tensor:
        """(T, T) by the definition: one document, and the past or the same image."""
        document = torch.bucketize(torch.arange(self.total), self.borders, right=True)
        image = torch.full((self.total,), -1)
        for index, (start, end) in enumerate(self.spans):
            image[start:end] = index
        place = torch.arange(self.total)
        same_image = (image[:, None] == image) & (image[:, None] >= 0)
        return (document[:, None] == document) & ((place <= place[:, None]) | same_image)


PACKS = {
    "text and images": Pack([[(5, False), (6, True), (3, False)], [(4, False), (9, True)]]),
    "image first and last": Pack([[(4, True), (1, False)], [(2, True), (3, True)]]),
    "only images": Pack([[(8, True)], [(1, True)], [(3, True), (4, True)]]),
    "rows": Pack([[(3, False), (5, True)], [(2, True), (2, False)], [(4, False)]], row_length=8),
    "single positions": Pack([[(1, False)], [(1, True)], [(1, False)], [(1, True), (1, False)]]),
    "alike": Pack([[(2, False), (3, True)]] * 3 + [[(5, False)]] * 2),
    "blocks of flex": Pack([[(60, False), (200, True), (41, False)], [(130, True), (7, False)]]),
}


def packs(longest: int) -> st.SearchStrategy[Pack]:
    stretches = st.lists(st.tuples(st.integers(1, longest), st.booleans()), min_size=1, max_size=4)
    return st.lists(stretches, min_size=1, max_size=5).map(Pack)


@settings(max_examples=60, deadline=None)
@given(pack=packs(90))
def test_intervals_are_the_definition(pack: Pack) -> None:
    layout, visible = pack.layout(), pack.visible()
    place = torch.arange(pack.total)
    by_query = (place >= layout.key_starts[:, None]) & (place < layout.key_ends[:, None])
    by_key = (place >= layout.query_starts[:, None]) & (place < layout.query_ends[:, None])
    assert torch.equal(by_query, visible)
    assert torch.equal(by_key.T, visible)
    intervals = (layout.key_starts, layout.key_ends, layout.query_starts, layout.query_ends)
    assert {x.dtype for x in intervals} == {torch.int32}
    assert torch.equal(layout.row_mask[0, 0], visible)
    assert layout.row_mask is layout.row_mask
    assert sum(n * count for n, count, _ in layout.mixed_runs) == pack.total
    # Spans from the host, from a tensor, and filled up with empty ones are the same.
    filled = [*pack.spans, (pack.total, pack.total)]
    for spans in (torch.tensor(filled), filled):
        other = pack.layout(image_spans=spans)
        assert torch.equal(other.key_ends, layout.key_ends)
        assert torch.equal(other.query_starts, layout.query_starts)
        assert other.mixed_runs == layout.mixed_runs


def blocks_of(mask: Any) -> tuple[Tensor, Tensor]:
    """(n, n) bool: blocks seen in part, and in full."""

    def dense(counts: Tensor, indices: Tensor) -> Tensor:
        out = torch.zeros(indices.shape[-2:], dtype=torch.bool)
        for row, count in enumerate(counts[0, 0].tolist()):
            out[row, indices[0, 0, row, :count].long()] = True
        return out

    partial = dense(mask.kv_num_blocks, mask.kv_indices)
    return partial, dense(mask.full_kv_num_blocks, mask.full_kv_indices)


def transposed_blocks_of(mask: Any) -> tuple[Tensor, ...]:
    return (mask.q_num_blocks, mask.q_indices, mask.full_q_num_blocks, mask.full_q_indices)


@settings(max_examples=25, deadline=None)
@given(pack=packs(90))
def test_block_mask_is_torchs(pack: Pack) -> None:
    layout, visible = pack.layout(), pack.visible()
    theirs = create_block_mask(
        lambda b, h, q, k: visible[q, k], None, None, pack.total, pack.total, device="cpu"
    )
    for ours, wanted in zip(blocks_of(layout.block_mask), blocks_of(theirs), strict=True):
        assert torch.equal(ours, wanted)
    for ours, wanted in zip(
        transposed_blocks_of(layout.block_mask), transposed_blocks_of(theirs), strict=True
    ):
        assert torch.equal(ours, wanted)
    assert layout.block_mask.seq_lengths == theirs.seq_lengths
    place = torch.arange(pack.total)
    mask_mod = layout.block_mask.mask_mod
    assert torch.equal(mask_mod(None, None, place[:, None], place[None]), visible)


def test_without_images_the_layout_is_packed() -> None:
    pack = Pack([[(300, False)], [(84, False)], [(1, False)]])
    mixed, packed = pack.layout(), pack.packed()
    assert mixed.is_causal
    assert torch.equal(mixed.key_starts, packed.document_starts.int())
    assert torch.equal(mixed.row_mask, packed.row_mask)
    for ours, theirs in zip(blocks_of(mixed.block_mask), blocks_of(packed.block_mask), strict=True):
        assert torch.equal(ours, theirs)


def oracle(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """One head and one query at a time, over the keys it sees."""
    groups, rows = q.shape[1] // k.shape[1], []
    for i in range(q.shape[0]):
        heads = []
        for head in range(q.shape[1]):
            keys, values = k[visible[i], head // groups], v[visible[i], head // groups]
            weights = torch.softmax(keys @ q[i, head] / q.shape[2] ** 0.5, 0)
            heads.append(weights @ values)
        rows.append(torch.stack(heads))
    return torch.stack(rows)


def random_heads(total: int, heads: tuple[int, int, int] = (4, 2, 8)) -> list[Tensor]:
    n_q, n_k, width = heads
    return [torch.randn(total, n, width, dtype=torch.float64) for n in (n_q, n_k, n_k)]


def gradients(
    run: Callable[..., Tensor], inputs: list[Tensor], seed: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    out = run(*leaves)
    return out.detach(), torch.autograd.grad(out, leaves, seed)


@pytest.mark.parametrize("name", [name for name in PACKS if name != "blocks of flex"])
def test_attention_and_gradients_are_the_oracles(name: str) -> None:
    pack = PACKS[name]
    layout, inputs = pack.layout(), random_heads(pack.total)
    seed = torch.randn_like(inputs[0])
    expected = gradients(lambda q, k, v: oracle(q, k, v, pack.visible()), inputs, seed)
    found = gradients(lambda q, k, v: mixed_attention(q, k, v, layout), inputs, seed)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    intervals = (layout.key_starts, layout.key_ends)
    found = gradients(lambda q, k, v: mixed_attention_reference(q, k, v, *intervals), inputs, seed)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@settings(max_examples=30, deadline=None)
@given(pack=packs(8))
def test_attention_of_random_packs(pack: Pack) -> None:
    layout, inputs = pack.layout(), random_heads(pack.total, (2, 1, 4))
    seed = torch.randn_like(inputs[0])
    intervals = (layout.key_starts, layout.key_ends)
    expected = gradients(
        lambda q, k, v: mixed_attention_reference(q, k, v, *intervals), inputs, seed
    )
    found = gradients(lambda q, k, v: mixed_attention(q, k, v, layout), inputs, seed)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    if not pack.spans:
        return
    # With images, documents are computed apart: a NaN in the first reaches no other.
    end = int(pack.borders[1])
    for value in inputs:
        value[:end] = float("nan")
    out, grads = gradients(lambda q, k, v: mixed_attention(q, k, v, layout), inputs, seed)
    assert all(torch.isfinite(value[end:]).all() for value in (out, *grads))


@pytest.mark.parametrize("name", PACKS)
def test_flex_sees_the_same(name: str) -> None:
    pack = PACKS[name]
    q, k, v = random_heads(pack.total)
    layout = pack.layout()
    layout.prepare("flex")
    out = mixed_attention(q, k, v, layout, "flex")
    torch.testing.assert_close(out, mixed_attention(q, k, v, layout), rtol=1e-10, atol=1e-10)


def test_thousands_of_positions() -> None:
    documents = [[(90, False), (160, True), (53, False)]] * 3 + [[(700, True), (400, False)]]
    pack = Pack(documents)
    q, k, v = (value.float() for value in random_heads(pack.total))
    found = mixed_attention(q, k, v, pack.layout())
    keys, values = (x.double().repeat_interleave(2, 1).transpose(0, 1) for x in (k, v))
    scores = q.double().transpose(0, 1) @ keys.transpose(1, 2) / 8**0.5
    exact = scores.masked_fill(~pack.visible(), -torch.inf).softmax(-1) @ values
    assert_close(found, exact.transpose(0, 1), 1e-5)


@pytest.mark.parametrize("backend", ["auto", "sdpa", "flex"])
def test_no_positions_keep_all_three_in_the_graph(backend: str) -> None:
    leaves = [value.requires_grad_() for value in random_heads(0)]
    out = mixed_attention(*leaves, Pack([]).layout(), backend)
    assert out.shape == (0, 4, 8)
    assert all(grad.shape[0] == 0 for grad in torch.autograd.grad(out.sum(), leaves))


def test_a_batch_without_images_runs_as_packed_attention_does() -> None:
    pack = Pack([[(40, False)], [(24, False)], [(64, False)]], row_length=64)
    q, k, v = (value.float() for value in random_heads(128))
    expected = packed_attention(q, k, v, pack.packed())
    assert torch.equal(mixed_attention(q, k, v, pack.layout()), expected)
    assert torch.equal(mixed_attention(q, k, v, pack.packed()), expected)


def test_nan_of_one_document_stays_there() -> None:
    pack = Pack([[(4, False), (3, True)], [(5, True), (2, False)], [(7, True)]])
    inputs = random_heads(pack.total)
    for value in inputs:
        value[7:14] = float("nan")
    out, grads = gradients(
        lambda q, k, v: mixed_attention(q, k, v, pack.layout()),
        inputs,
        torch.ones(21, 4, 8).double(),
    )
    others = torch.tensor([*range(7), *range(14, 21)])
    for value in (out, *grads):
        assert torch.isfinite(value[others]).all()
        assert value[7:14].isnan().any()


def test_no_gradient_comes_from_what_is_hidden() -> None:
    pack = PACKS["text and images"]
    visible = pack.visible()
    for query in (2, 7, 12, 20):
        leaves = [value.requires_grad_() for value in random_heads(pack.total)]
        out = mixed_attention(*leaves, pack.layout())
        _, *grads = torch.autograd.grad(out[query].square().sum(), leaves)
        for grad in grads:
            assert torch.equal(grad.flatten(1).any(1), visible[query])


class Model:
    """Everything a routed attention takes, of a pack."""

    def __init__(self, pack: Pack, norm: str = "head", dtype: torch.dtype = torch.float64) -> None:
        self.pack = pack
        self.heads = [value.to(dtype) for value in random_heads(pack.total)]
        sizes = {"none": [], "head": [8, 8], "row": [32, 16]}[norm]
        self.weights = [(torch.rand(2, n) + 0.5).to(dtype) for n in sizes]
        self.frequencies = rotary_frequencies(8, 1e4, dtype=dtype)
        self.seed = torch.randn_like(self.heads[0])

    def routing(self, device: torch.device | str = "cpu") -> Routing:
        return route_by_modality(self.pack.modality, 2).to(device)

    def table(self) -> RotaryTable:
        return rotary_table(self.pack.positions, self.frequencies)


@pytest.mark.parametrize("face", ALL_FACES)
@pytest.mark.parametrize("norm", ["none", "head", "row"])
@pytest.mark.parametrize("name", ["text and images", "image first and last"])
def test_routed_attention_is_its_parts(face: str, norm: str, name: str) -> None:
    pack = PACKS[name]
    model, routing, visible = Model(pack, norm), Model(pack).routing(), pack.visible()

    def parts(q: Tensor, k: Tensor, v: Tensor, *weights: Tensor) -> Tensor:
        turned = []
        for x, w in zip((q, k), weights or (None, None), strict=True):
            x = routing.restore(x)
            if w is not None:
                rows = x if norm == "head" else x.flatten(1)
                normal = [rms_norm_reference(rows, w[m], EPS) for m in range(2)]
                is_image = (pack.modality == 1).view(-1, *[1] * (rows.dim() - 1))
                x = torch.where(is_image, normal[1], normal[0]).view(x.shape)
            turned.append(apply_rotary(x, model.table()))
        return routing.permute(oracle(*turned, routing.restore(v), visible))

    inputs = [*model.heads, *model.weights]
    expected = gradients(parts, inputs, model.seed)
    with on_face(face) as device:
        moved, spans = model.routing(device), torch.tensor(pack.spans, device=device)
        layout = pack.layout(
            cu_seqlens=pack.borders.to(device),
            position_ids=pack.positions.to(device),
            image_spans=spans,
        )
        table = RotaryTable(model.table().cos.to(device), model.table().sin.to(device))

        def run(q: Tensor, k: Tensor, v: Tensor, *weights: Tensor) -> Tensor:
            q_w, k_w = weights or (None, None)
            named = {"table": table, "q_weights": q_w, "k_weights": k_w, "eps": EPS}
            # Flex takes no float64; what is tested here is the rest.
            return routed_attention(q, k, v, moved, layout, backend="sdpa", **named)

        given = [value.to(device) for value in inputs]
        found = gradients(run, given, model.seed.to(device))
    out, grads = found
    assert_close(out.cpu(), expected[0], 1e-10)
    for ours, theirs in zip(grads, expected[1], strict=True):
        assert_close(ours.cpu(), theirs, 1e-10)


def test_equal_weights_in_all_modalities_are_the_dense_block() -> None:
    pack = PACKS["text and images"]
    model, weight = Model(pack), torch.rand(8, dtype=torch.float64)
    routing, layout = model.routing(), pack.layout()
    heads = [routing.permute(value) for value in model.heads]
    rows = [weight, weight]
    named = {"table": model.table(), "q_weights": rows, "k_weights": rows, "eps": EPS}
    routed = routing.restore(routed_attention(*heads, routing, layout, **named))
    q, k = (
        apply_rotary(rms_norm_reference(x, weight, EPS), model.table()) for x in model.heads[:2]
    )
    dense = mixed_attention(q, k, model.heads[2], layout)
    torch.testing.assert_close(routed, dense, rtol=1e-13, atol=1e-13)


def layer(x: Tensor, parts: dict[str, Any], routing: Routing, layout: PackedLayout) -> Tensor:
    """The attention half of a Mixture-of-Transformers layer."""
    normal = routed_rms_norm(x, parts["norm"], routing, EPS)
    q, k, v = routed_linear(normal, parts["qkv"], routing).split([32, 16, 16], 1)
    heads = [value.unflatten(1, (-1, 8)) for value in (q, k, v)]
    named = {"q_weights": parts["q"], "k_weights": parts["k"], "table": parts["table"]}
    out = routed_attention(*heads, routing, layout, **named)
    return x + routed_linear(out.flatten(1), parts["out"], routing)


def parts_of(pack: Pack, device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    def make(*shape: int) -> list[Tensor]:
        made = [(torch.randn(shape) / 4).to(device, dtype) for _ in range(2)]
        return [value.requires_grad_() for value in made]

    frequencies = rotary_frequencies(8, 1e4, device=torch.device(device))
    table = rotary_table(pack.positions.to(device), frequencies)
    weights = {
        "norm": make(24),
        "qkv": make(64, 24),
        "q": make(8),
        "k": make(16),
        "out": make(24, 32),
    }
    return {**weights, "table": table}


def leaves_of(parts: dict[str, Any]) -> list[Tensor]:
    return [weight for value in parts.values() if isinstance(value, list) for weight in value]


@pytest.mark.parametrize(
    "pack",
    [Pack([[(6, False)], [(3, False)]]), Pack([[(5, True)]]), Pack([])],
    ids=["no image", "no text", "no position"],
)
def test_an_absent_modality_has_a_gradient_of_zeros(pack: Pack) -> None:
    parts = parts_of(pack)
    x = torch.randn(pack.total, 24, requires_grad=True)
    routing = route_by_modality(pack.modality, 2)
    out = layer(x, parts, routing, pack.layout())
    out.square().sum().backward()
    present = set(pack.modality.tolist())
    for name, weights in parts.items():
        for m, weight in enumerate(weights if isinstance(weights, list) else []):
            assert weight.grad is not None, name
            assert bool(weight.grad.any()) == (m in present), name
    assert x.grad.shape == x.shape


def test_a_layer_compiled_and_checkpointed_is_the_same() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for name in ("text and images", "rows"):
        pack = PACKS[name]
        parts, x = parts_of(pack), torch.randn(pack.total, 24, requires_grad=True)
        routing, layout = route_by_modality(pack.modality, 2), pack.layout()
        leaves = [x, *leaves_of(parts)]
        plain = layer(x, parts, routing, layout)
        expected = torch.autograd.grad(plain.square().sum(), leaves)
        again = checkpoint(layer, x, parts, routing, layout, use_reentrant=False)
        for found in (compiled(x, parts, routing, layout), again):
            torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)
            ours = torch.autograd.grad(found.square().sum(), leaves)
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_the_path_of_a_device_never_waits_for_it() -> None:
    """Meta tensors have no values: reading one, as every wait for a GPU does, is an error."""
    pack = PACKS["blocks of flex"]
    device, parts = "meta", parts_of(pack, "meta")
    sizes = pack.modality.long().bincount(minlength=2).tolist()
    routing = route_by_modality(pack.modality.to(device), 2, sizes)
    borders, positions = pack.borders.to(device), pack.positions.to(device)
    for spans in (pack.spans, torch.tensor(pack.spans, device=device)):
        layout = pack.layout(cu_seqlens=borders, position_ids=positions, image_spans=spans)
        layout.prepare("flex")
        assert layout.block_mask.kv_num_blocks.device.type == device
        x = torch.randn(pack.total, 24, device=device, requires_grad=True)
        out = layer(x, parts, routing, layout)
        assert out.shape == x.shape
        out.sum().backward()
        assert all(weight.grad.shape == weight.shape for weight in leaves_of(parts))


def test_prepare_builds_what_the_device_needs() -> None:
    layout = PACKS["rows"].layout()
    layout.prepare("auto")
    assert layout._block_mask is None
    Pack([]).layout().prepare("flex")
    layout.prepare("flex")
    assert layout._block_mask is not None


ROUTING = route_by_modality(torch.tensor([0, 1, 1, 0]), 2)
SMALL = Pack([[(1, False), (2, True), (1, False)]])
SMALL_HEADS = [value.float() for value in random_heads(4)]
ERRORS: dict[str, Callable[[], object]] = {
    "image_spans\\[0\\] = \\(1, 3\\) reaches over the document border at 2; an image lies in one": (
        lambda: SMALL.layout(cu_seqlens=torch.tensor([0, 2, 4]).int())
    ),
    "image_spans\\[1\\] = \\(2, 3\\) starts before the one ahead of it ends, at 3; sort them": (
        lambda: SMALL.layout(image_spans=[(1, 3), (2, 3)])
    ),
    "image_spans\\[0\\] = \\(3, 5\\) is no stretch of the batch's 4": (
        lambda: SMALL.layout(image_spans=[(3, 5)])
    ),
    "image_spans\\[0\\] = \\(3, 2\\) is no stretch": lambda: SMALL.layout(image_spans=[(3, 2)]),
    "image_spans\\[0\\] = \\(-1, 2\\) is no stretch": lambda: SMALL.layout(image_spans=[(-1, 2)]),
    "image_spans holds a span that is not a pair": lambda: SMALL.layout(image_spans=[(1, 2, 3)]),
    "image_spans has shape \\(2,\\), expected \\(\\*, 2\\)": (
        lambda: SMALL.layout(image_spans=torch.tensor([1, 3]))
    ),
    "image_spans is float32, expected int32, int64": (
        lambda: SMALL.layout(image_spans=torch.tensor([[1.0, 3.0]]))
    ),
    "image_spans is on meta and cu_seqlens on cpu": (
        lambda: SMALL.layout(image_spans=torch.zeros(1, 2, device="meta").int())
    ),
    "position_ids is on meta and cu_seqlens on cpu": (
        lambda: SMALL.layout(position_ids=torch.zeros(4, device="meta"))
    ),
    "cu_seqlens is int64 of shape": lambda: SMALL.layout(cu_seqlens=torch.tensor([0, 4])),
    "cu_seqlens ends at 3": lambda: SMALL.layout(cu_seqlens=torch.tensor([0, 3]).int()),
    "the routing has 4 positions but the layout has 16": (
        lambda: routed_attention(
            *SMALL_HEADS, ROUTING, PACKS["only images"].layout(image_spans=[(0, 8)])
        )
    ),
    "q has shape \\(4, 4, 8\\), expected \\(16, \\*, \\*\\)": (
        lambda: mixed_attention(*SMALL_HEADS, PACKS["only images"].layout())
    ),
    "unknown attention backend 'flash'; known: auto, sdpa": (
        lambda: mixed_attention(*SMALL_HEADS, SMALL.layout(), "flash")
    ),
    "attention backend varlen is causal and the batch has images; use auto": (
        lambda: mixed_attention(*SMALL_HEADS, SMALL.layout(), "varlen")
    ),
    "attention backend flex has no gradient on the CPU": (
        lambda: mixed_attention(
            SMALL_HEADS[0].clone().requires_grad_(), *SMALL_HEADS[1:], SMALL.layout(), "flex"
        )
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_what_is_wrong(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ERRORS[message]()


@pytest.mark.parametrize(
    "spans", [[(2, 4), (1, 2)], [(1, 3), (2, 4)], [(1, 3)], [(3, 9)], [(-2, 1)]]
)
def test_a_device_asserts_what_the_host_cannot_see(
    spans: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asserted: list[bool] = []
    monkeypatch.setattr(torch, "_assert_async", lambda fits, _: asserted.append(bool(fits)))
    layout = SMALL.layout(cu_seqlens=torch.tensor([0, 2, 4]).int(), image_spans=[(0, 2), (2, 3)])
    for tried in (spans, [(0, 2), (2, 3)]):
        layout.image_spans = torch.tensor(tried).int()
        layout.key_ends = torch.arange(1, 5).int()
        layout.query_starts = torch.arange(4).int()
        layout._assert_spans(*layout._open_images(torch.arange(4).int()))
    assert asserted == [False, True]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", PACKS)
def test_flex_on_a_gpu(name: str) -> None:
    pack = PACKS[name]
    exact = [value.bfloat16().double() for value in random_heads(pack.total, (4, 2, 64))]
    layout = pack.layout(cu_seqlens=pack.borders.cuda(), position_ids=pack.positions.cuda())
    seed = torch.randn_like(exact[0])
    expected = gradients(lambda q, k, v: mixed_attention(q, k, v, pack.layout()), exact, seed)
    found = gradients(
        lambda q, k, v: mixed_attention(q, k, v, layout),
        [value.bfloat16().cuda() for value in exact],
        seed.bfloat16().cuda(),
    )
    for ours, theirs in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
        assert_close(ours.cpu(), theirs, 2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_batch_on_a_gpu_never_waits() -> None:
    pack = PACKS["blocks of flex"]
    parts, x = parts_of(pack, "cuda"), torch.randn(pack.total, 24, device="cuda")
    modality, sizes = pack.modality.cuda(), pack.modality.long().bincount(minlength=2).tolist()
    borders, positions = pack.borders.cuda(), pack.positions.cuda()

    def step() -> None:
        routing = route_by_modality(modality, 2, sizes)
        layout = pack.layout(cu_seqlens=borders, position_ids=positions)
        layer(x, parts, routing, layout).sum().backward()

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
