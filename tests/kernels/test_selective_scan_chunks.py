"""Scans that go on from a state: decoding steps, and chunks of one sequence combined, against the whole scan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import assert_close, position_ids_of
from test_selective_scan import make, weights
from torch import Tensor
from weft.kernels.selective_scan import (
    chunk_decay,
    combine_states,
    selective_scan,
    selective_scan_step,
)

ROWS = ("u", "delta", "B", "C", "z")


def leaves(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}


def gradients(out: Tensor, final: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
    loss = (out * weights(out, 1)).sum() + (final * weights(final, 2)).sum()
    found = torch.autograd.grad(loss, list(given.values()))
    return dict(zip(given, found, strict=True))


def whole(given: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    result = selective_scan(**given, **options, delta_softplus=True, return_final_state=True)
    assert isinstance(result, tuple)
    return result


def in_chunks(
    given: dict[str, Tensor], sizes: list[int], ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As ranks would do it, each with its chunk, one after the other."""
    given = dict(given)
    initial = given.pop("initial_state", None)
    parts = [
        {name: x.split(sizes, dim=1)[k] if name in ROWS else x for name, x in given.items()}
        for k in range(len(sizes))
    ]
    places = [None] * len(sizes) if ids is None else ids.split(sizes, dim=1)
    decays = torch.stack(
        [
            chunk_decay(
                part["delta"],
                part["A"],
                part["delta_bias"],
                delta_softplus=True,
                position_ids=place,
            )
            for part, place in zip(parts, places, strict=True)
        ]
    )
    ends = torch.stack(
        [whole(part, position_ids=at)[1] for part, at in zip(parts, places, strict=True)]
    )
    starts, last = combine_states(decays, ends, initial)
    outs, finals = zip(
        *(
            whole({**part, "initial_state": start}, position_ids=place)
            for part, place, start in zip(parts, places, starts, strict=True)
        ),
        strict=True,
    )
    torch.testing.assert_close(finals[-1], last, rtol=1e-12, atol=1e-12)
    return torch.cat(outs, dim=1), last


@pytest.mark.parametrize("has_initial", [False, True])
@pytest.mark.parametrize("borders", [None, [0, 5, 6, 20, 29], [0, 24]], ids=["one", "many", "two"])
@pytest.mark.parametrize(
    "sizes", [[16, 16], [8, 8, 8, 8], [1, 20, 11], [32], [0, 31, 1]], ids=lambda s: f"{len(s)}"
)
def test_chunks_make_the_whole(
    sizes: list[int], borders: list[int] | None, has_initial: bool
) -> None:
    length = sum(sizes)
    tensors = make(2, length, 4, 3, groups=2, absent=() if has_initial else ("initial_state",))
    ids = None
    if borders is not None:
        ids = position_ids_of([*borders, length], length).repeat(2, 1)
        # The second row goes on with a document, the first starts one.
        ids[1, : borders[1]] += 3
    given = leaves(tensors)
    out, final = whole(given, position_ids=ids)
    wanted = gradients(out, final, given)
    pieces, last = in_chunks(given, sizes, ids)
    torch.testing.assert_close(pieces, out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last, final, rtol=1e-12, atol=1e-12)
    for name, gradient in gradients(pieces, last, given).items():
        assert_close(gradient, wanted[name], 1e-11, name)


def test_nothing_passes_a_document_between_chunks() -> None:
    """A NaN in the first document stays there, also when chunks are combined, also in gradients."""
    tensors = make(1, 12, 2, 2, absent=("initial_state",))
    for name in ("u", "delta"):
        tensors[name][0, :5] = float("nan")
    ids = position_ids_of([0, 6, 12], 12)[None]
    given = leaves(tensors)
    out, last = in_chunks(given, [4, 4, 4], ids)
    assert out[0, :5].isnan().all()
    assert out[0, 6:].isfinite().all()
    assert last.isfinite().all()
    (gradient,) = torch.autograd.grad(out[0, 6:].sum() + last.sum(), given["delta"])
    assert gradient[0, 6:].isfinite().all()
    decays = torch.zeros(2, 1, 1, 1, requires_grad=True)
    states = torch.tensor([float("nan"), 1.0]).view(2, 1, 1, 1).requires_grad_()
    starts, final = combine_states(decays, states)
    assert starts.flatten().isnan().tolist() == [False, True]
    found = torch.autograd.grad(final.sum(), (decays, states))
    assert final.item() == 1
    assert [x.flatten().tolist() for x in found] == [[0, 0], [0, 1]]


def test_decay_is_the_product_of_the_steps() -> None:
    delta, A = torch.randn(2, 5, 3, dtype=torch.float64), -torch.rand(3, 2, dtype=torch.float64)
    steps = torch.exp(torch.nn.functional.softplus(delta)[..., None] * A)
    torch.testing.assert_close(chunk_decay(delta, A, delta_softplus=True), steps.prod(1))
    assert torch.equal(chunk_decay(delta[:, :0], A), torch.ones(2, 3, 2, dtype=torch.float64))
    borders = torch.tensor([0, 5, 10], dtype=torch.int32)
    assert not chunk_decay(delta, A, cu_seqlens=borders).any()


def test_combining_no_chunk() -> None:
    empty, state = torch.zeros(0, 1, 2, 3), torch.randn(1, 2, 3)
    starts, final = combine_states(empty, empty, state)
    assert starts.shape == (0, 1, 2, 3)
    assert torch.equal(final, state)


@pytest.mark.parametrize("groups", [1, 2])
def test_steps_make_the_scan(groups: int) -> None:
    tensors = make(2, 7, 4, 3, groups=groups)
    given = leaves(tensors)
    out, final = whole(given)
    wanted = gradients(out, final, given)
    state, rows = given["initial_state"], []
    for t in range(7):
        at = {name: x[:, t] if name in ROWS else x for name, x in given.items()}
        at.pop("initial_state")
        row, state = selective_scan_step(state, **at, delta_softplus=True)
        rows.append(row)
    torch.testing.assert_close(torch.stack(rows, 1), out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-12)
    for name, gradient in gradients(torch.stack(rows, 1), state, given).items():
        assert_close(gradient, wanted[name], 1e-12, name)


def test_step_types_and_options() -> None:
    tensors = make(3, 1, 4, 2, dtype=torch.bfloat16)
    rows = {name: tensors[name][:, 0] for name in ("u", "delta", "B", "C")}
    state = torch.zeros(3, 4, 2)
    out, after = selective_scan_step(state, A=tensors["A"].float(), **rows)
    assert (out.dtype, after.dtype) == (torch.bfloat16, torch.float32)
    assert not state.any()
    bare = {name: tensors[name] for name in ("u", "delta", "B", "C")}
    same = selective_scan(A=tensors["A"].float(), **bare)
    assert torch.equal(out, same[:, 0])


STEP = {
    "state": torch.zeros(2, 4, 3),
    "u": torch.ones(2, 4),
    "delta": torch.ones(2, 4),
    "A": -torch.ones(4, 3),
    "B": torch.ones(2, 3),
    "C": torch.ones(2, 3),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.ones(2, 1, 4)}, r"u has shape \(2, 1, 4\), expected \(\*, \*\)"),
        ({"state": torch.ones(2, 3, 4)}, r"state has shape \(2, 3, 4\), expected \(2, 4, 3\)"),
        ({"B": torch.ones(2, 3, 3)}, "B has 3 groups, expected a divisor of the 4 channels"),
        ({"C": torch.ones(2, 2)}, r"C has shape \(2, 2\), expected \(2, 3\)"),
        ({"z": torch.ones(4)}, r"z has shape \(4,\), expected \(2, 4\)"),
        ({"D": torch.ones(4).int()}, "D is int32, expected float64"),
    ],
)
def test_step_errors(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selective_scan_step(**{**STEP, **change})


def test_chunk_errors() -> None:
    delta, A, chunks = torch.ones(2, 5, 3), -torch.ones(3, 2), torch.ones(4, 2, 3, 2)
    with pytest.raises(ValueError, match=r"A has shape \(2, 3\), expected \(3, \*\)"):
        chunk_decay(delta, A.T)
    with pytest.raises(ValueError, match=r"delta_bias has shape \(2,\), expected \(3\)"):
        chunk_decay(delta, A, torch.ones(2))
    with pytest.raises(ValueError, match=r"states has shape \(3, 2, 3, 2\), expected"):
        combine_states(chunks, chunks[1:])
    with pytest.raises(ValueError, match=r"initial_state has shape \(2, 2, 3\), expected"):
        combine_states(chunks, chunks, torch.ones(2, 2, 3))
