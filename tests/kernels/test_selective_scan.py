"""The selective scan on all faces against its definition and loops in numpy."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import (
    ALL_FACES,
    FAST_FACES,
    assert_close,
    needs_triton,
    on_face,
    poisoned,
    position_ids_of,
    random_documents,
)
from torch import Tensor
from weft.kernels.faces import use_kernels
from weft.kernels.selective_scan import selective_scan
from weft.kernels.selective_scan.reference import SPACING, ScanInputs, scan_reference

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


def make(
    batch: int,
    length: int,
    channels: int,
    states: int,
    groups: int = 1,
    absent: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Arguments of a scan by name."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    matrix = (batch, length, groups, states) if groups > 1 else (batch, length, states)
    tensors = {
        "u": draw(batch, length, channels),
        "delta": draw(batch, length, channels),
        "A": -draw(channels, states).exp(),
        "B": draw(*matrix),
        "C": draw(*matrix),
        "D": draw(channels),
        "z": draw(batch, length, channels),
        "delta_bias": draw(channels),
        "initial_state": draw(batch, channels, states),
    }
    return {name: x.to(dtype) for name, x in tensors.items() if name not in absent}


def weights(like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.device)


def results(
    scan: Callable[..., tuple[Tensor, Tensor]], tensors: dict[str, Tensor], device: torch.device
) -> dict[str, Tensor]:
    """Outputs, and the gradient of every argument where outputs are weighted at random."""
    given_tensors = {k: x.detach().to(device).requires_grad_() for k, x in tensors.items()}
    out, final = scan(**given_tensors)
    loss = (out * weights(out, 1)).sum() + (final * weights(final, 2)).sum()
    loss.backward()
    gradients = {
        f"d{name}": torch.zeros_like(x) if x.grad is None else x.grad
        for name, x in given_tensors.items()
    }
    return {"out": out.detach(), "final": final.detach(), **gradients}


def run(face: str, tensors: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    with on_face(face) as device:
        options = {k: x.to(device) if isinstance(x, Tensor) else x for k, x in options.items()}
        scan = functools.partial(selective_scan, return_final_state=True, **options)
        return results(scan, tensors, device)


def expected(
    tensors: dict[str, Tensor], starts: Tensor | None = None, delta_softplus: bool = False
) -> dict[str, Tensor]:
    """By the definition in float64, differentiated by autograd."""

    def scan(**given: Tensor) -> tuple[Tensor, Tensor]:
        initial = given.pop("initial_state", None)
        matrices = {name: given[name] if given[name].dim() == 4 else given[name].unsqueeze(2) for name in "BC"}  # fmt: skip
        absent = dict.fromkeys(set(NAMES[:-1]) - set(given))
        inputs = ScanInputs(
            **{**given, **matrices, **absent}, starts=starts, delta_softplus=delta_softplus
        )
        return scan_reference(inputs, initial)[:2]

    return results(scan, {k: x.double() for k, x in tensors.items()}, torch.device("cpu"))


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert_close(found[name], tensor, tolerance, name)


def positions(batch: int, length: int, seed: int = 0, continues: bool = True) -> Tensor:
    """(B, L) positions in documents; the first row goes on with a document where `continues`."""
    rows = [position_ids_of(random_documents(length, 1 + length // 5, seed + b), length) for b in range(batch)]  # fmt: skip
    ids = torch.stack(rows)
    if continues and batch and length:
        end = int((ids[0] == 0).nonzero()[1]) if (ids[0] == 0).sum() > 1 else length
        ids[0, :end] += 7
    return ids


CASES = {
    "everything": ({"batch": 1, "length": 18, "channels": 2, "states": 2}, True),
    "groups": ({"batch": 2, "length": 3, "channels": 4, "states": 1, "groups": 2}, True),
    "odd": (
        {"batch": 1, "length": 17, "channels": 33, "states": 1, "absent": ("z", "initial_state")},
        True,
    ),
    "bare": (
        {"batch": 1, "length": 16, "channels": 3, "states": 3, "absent": ("D", "z", "delta_bias")},
        False,
    ),
}
SMALL = list(CASES)
CASES |= {
    "wide": ({"batch": 2, "length": 40, "channels": 33, "states": 17, "groups": 3}, True),
    "single": ({"batch": 3, "length": 33, "channels": 1, "states": 1}, True),
    "five": (
        {"batch": 5, "length": 21, "channels": 6, "states": 5, "groups": 6, "absent": ("z",)},
        True,
    ),
    "rows": ({"batch": 9, "length": 50, "channels": 512, "states": 16}, True),
    "ungated": (
        {"batch": 1, "length": 70, "channels": 8, "states": 16, "absent": ("D", "z")},
        True,
    ),
}
DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5}


# The interpreter takes seconds a case.
INTERPRETED = [(case, torch.float64) for case in SMALL] + [("everything", torch.float32)]


@pytest.mark.parametrize(
    ("face", "case", "dtype"),
    [(face, case, dtype) for face in ("reference", "cpu") for case in CASES for dtype in DTYPES]
    + [pytest.param("triton", *case, marks=needs_triton) for case in INTERPRETED],
)
def test_matches_definition(face: str, case: str, dtype: torch.dtype) -> None:
    sizes, softplus = CASES[case]
    tensors = make(**sizes, dtype=dtype)
    ids = positions(sizes["batch"], sizes["length"]) if case != "bare" else None
    if not softplus:
        tensors["delta"] = tensors["delta"].abs() / 2
    found = run(face, tensors, delta_softplus=softplus, position_ids=ids)
    assert found["out"].dtype == dtype
    wanted = expected(tensors, None if ids is None else ids == 0, softplus)
    assert_same(found, wanted, DTYPES[dtype])


@pytest.mark.parametrize("face", FAST_FACES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(face: str, dtype: torch.dtype) -> None:
    tensors = make(1, 18, 3, 2, dtype=dtype)
    for name in ("A", "D", "delta_bias", "initial_state"):
        tensors[name] = tensors[name].float()
    found = run(face, tensors, delta_softplus=True)
    assert found["out"].dtype == dtype
    assert found["final"].dtype == torch.float32
    assert all(found[f"d{name}"].dtype == tensors[name].dtype for name in tensors)
    assert_same(found, expected(tensors, None, True), 1e-2)


def by_loops(t: dict[str, np.ndarray], starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One number at a time, from the equations of the paper."""
    batch, length, channels = t["u"].shape
    out, final = np.zeros((batch, length, channels)), np.zeros(t["initial_state"].shape)
    for b in range(batch):
        for d in range(channels):
            h = list(t["initial_state"][b, d])
            for i in range(length):
                dt = np.log1p(np.exp(t["delta"][b, i, d] + t["delta_bias"][d]))
                y = t["D"][d] * t["u"][b, i, d]
                for n in range(len(h)):
                    before = 0.0 if starts[b, i] else h[n]
                    h[n] = np.exp(dt * t["A"][d, n]) * before + dt * t["B"][b, i, n] * t["u"][b, i, d]  # fmt: skip
                    y += t["C"][b, i, n] * h[n]
                z = t["z"][b, i, d]
                out[b, i, d] = y * z / (1 + np.exp(-z))
            final[b, d] = h
    return out, final


@pytest.mark.parametrize("face", ALL_FACES)
def test_matches_loops(face: str) -> None:
    tensors = make(2, 6, 3, 2)
    ids = torch.tensor([[4, 5, 0, 1, 0, 0], [0, 1, 2, 0, 1, 2]])
    out, final = by_loops({k: x.numpy() for k, x in tensors.items()}, (ids == 0).numpy())
    with on_face(face) as device:
        arguments = {k: x.to(device) for k, x in tensors.items()}
        found = selective_scan(
            **arguments, delta_softplus=True, position_ids=ids.to(device), return_final_state=True
        )
    torch.testing.assert_close(found[0].cpu(), torch.from_numpy(out), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[1].cpu(), torch.from_numpy(final), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("face", ALL_FACES)
def test_decay_by_hand(face: str) -> None:
    # With dt = 1, A = -ln 2 and an impulse, the state halves at every position.
    impulse = torch.tensor([8.0, 0, 0, 0]).view(1, 4, 1)
    ones = torch.ones(1, 4, 1)
    with on_face(face) as device:
        out = selective_scan(
            *(x.to(device) for x in (impulse, ones, -torch.tensor([[2.0]]).log(), ones, ones))
        )
    assert out.flatten().tolist() == pytest.approx([8, 4, 2, 1])


@pytest.mark.parametrize("length", [0, 1, 2, SPACING - 1, SPACING, SPACING + 1, 3000])
def test_lengths(length: int) -> None:
    tensors = make(2, length, 4, 3, dtype=torch.float32)
    ids = positions(2, length)
    found = run("cpu", tensors, delta_softplus=True, position_ids=ids)
    assert_same(found, expected(tensors, ids == 0, True), 2e-5)


@pytest.mark.parametrize("face", FAST_FACES)
@pytest.mark.parametrize("length", [0, 1, 2])
def test_short(face: str, length: int) -> None:
    tensors = make(1, length, 3, 2)
    found = run(face, tensors, delta_softplus=True)
    assert_same(found, expected(tensors, None, True), 1e-12)


@pytest.mark.parametrize(("batch", "channels"), [(0, 3), (2, 0)])
def test_nothing(batch: int, channels: int) -> None:
    tensors = make(batch, 5, channels, 2)
    found = run("cpu", tensors, delta_softplus=True)
    assert found["out"].shape == (batch, 5, channels)
    assert all(not x.any() for name, x in found.items() if name in ("dB", "dC"))


@needs_triton
@pytest.mark.parametrize("has_documents", [False, True])
def test_segments(monkeypatch: pytest.MonkeyPatch, has_documents: bool) -> None:
    """L cut in as many segments as it has chunks gives what one segment gives."""
    from weft.kernels.selective_scan import triton

    monkeypatch.setattr(triton, "SEGMENT_CHUNKS", 1)
    tensors = make(1, 2 * SPACING + 3, 2, 1)
    ids = torch.arange(3, 2 * SPACING + 6)[None]
    if has_documents:
        ids[:, SPACING + 4 :] -= SPACING + 7
    found = run("triton", tensors, delta_softplus=True, position_ids=ids)
    assert_same(found, expected(tensors, ids == 0, True), 1e-12)
    if not has_documents:
        return
    with on_face("triton") as device, torch.no_grad():
        arguments = {k: x.to(device) for k, x in tensors.items()}
        options = {"position_ids": ids.to(device), "return_final_state": True}
        out, final = selective_scan(**arguments, **options, delta_softplus=True)
    assert_close(out, found["out"], 1e-13)
    assert_close(final, found["final"], 1e-13)


@needs_triton
def test_wide_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration of many channels, with a block that is not full."""
    from weft.kernels.selective_scan import triton

    monkeypatch.setattr(triton, "MANY_FORWARD", 0)
    monkeypatch.setattr(triton, "MANY_BACKWARD", 0)
    tensors = make(1, 3, 80, 1)
    found = run("triton", tensors, delta_softplus=True)
    assert_same(found, expected(tensors, None, True), 1e-12)


@pytest.mark.parametrize("face", ["reference", "cpu"])
def test_gradcheck(face: str) -> None:
    sizes = (2, SPACING + 2, 2, 2)
    with on_face(face) as device:
        tensors = {k: x.to(device).requires_grad_() for k, x in make(*sizes).items()}
        ids = torch.arange(3, 3 + sizes[1]).repeat(sizes[0], 1).to(device)
        ids[0, sizes[1] // 2 :] -= int(ids[0, sizes[1] // 2])

        def scan(*arguments: Tensor) -> Any:
            return selective_scan(
                *arguments[:-1],
                initial_state=arguments[-1],
                delta_softplus=True,
                position_ids=ids,
                return_final_state=True,
            )

        assert torch.autograd.gradcheck(scan, tuple(tensors.values()), fast_mode=True)


EXTREMES = {
    "dt of 1e-6": (-13.8, -1.0, -1e3),
    "dt of 50": (50.0, -1.0, -1e3),
    "almost no decay": (0.0, -1e-4, -1e-4),
    "steep": (60.0, -1e-4, -1e3),
}


@pytest.mark.parametrize("face", FAST_FACES)
def test_extremes(face: str) -> None:
    """One case a channel: softplus of the first number, decays of the others; fp32 keeps its digits in each."""
    raws, *decays = torch.tensor(list(EXTREMES.values())).T
    tensors = make(1, 20, len(EXTREMES), 2, dtype=torch.float32, absent=("delta_bias",))
    tensors["delta"] = tensors["delta"] + raws
    tensors["A"] = torch.stack(decays, dim=1)
    found = run(face, tensors, delta_softplus=True)
    wanted = expected(tensors, None, True)
    assert_same(found, wanted, 3e-5)
    for channel, case in enumerate(EXTREMES):
        for name in ("out", "du", "ddelta", "dz"):
            assert_close(found[name][..., channel], wanted[name][..., channel], 3e-5, f"{name} of {case}")  # fmt: skip
        for name, rows in (("dA", found["dA"]), ("final", found["final"][0])):
            part = wanted[name] if name == "dA" else wanted[name][0]
            assert_close(rows[channel], part[channel], 3e-5, f"{name} of {case}")


@pytest.mark.parametrize("face", ALL_FACES)
@pytest.mark.parametrize(("name", "bad"), [("u", float("nan")), ("delta", float("inf"))])
def test_documents_are_sealed(face: str, name: str, bad: float) -> None:
    """A NaN inside one document reaches no other, forward or backward, nor the other row."""
    length, first, last = SPACING + 4, 5, SPACING + 1
    batch = 1 if face == "triton" else 2
    tensors = make(batch, length, 2, 1, absent=("D", "delta_bias"))
    ids = position_ids_of([0, first, last, length], length).repeat(batch, 1)
    clean = run(face, tensors, delta_softplus=True, position_ids=ids)
    tensors[name] = tensors[name].clone()
    tensors[name][0, first + 2 : last] = bad
    dirty = run(face, tensors, delta_softplus=True, position_ids=ids)
    assert not torch.isfinite(dirty["out"][0, first:last]).all()
    for key in ("out", "du", "ddelta", "dB", "dC", "dz"):
        for part in (slice(0, first), slice(last, None)):
            assert torch.equal(dirty[key][0, part], clean[key][0, part]), key
        assert torch.equal(dirty[key][1:], clean[key][1:]), key
    for key in ("final", "dinitial_state"):
        assert torch.equal(dirty[key], clean[key]), key


@pytest.mark.parametrize("face", ALL_FACES)
def test_documents_of_one_token(face: str) -> None:
    tensors = make(1, 5, 2, 2, absent=("D", "z", "delta_bias", "initial_state"))
    found = run(face, tensors, cu_seqlens=torch.arange(6, dtype=torch.int32))
    coupling = (tensors["B"] * tensors["C"]).sum(-1, keepdim=True)
    torch.testing.assert_close(
        found["out"].cpu(), tensors["delta"] * tensors["u"] * coupling, rtol=1e-12, atol=1e-12
    )
    assert not found["dA"].any()


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 24), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_packing_is_separation(lengths: list[int], seed: int) -> None:
    """Documents packed in a row give what each gives alone."""
    total = sum(lengths)
    tensors = make(1, total, 3, 2, absent=("initial_state",), seed=seed)
    borders = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    with use_kernels("cpu"):
        packed = selective_scan(**tensors, cu_seqlens=borders, delta_softplus=True)
        alone = [
            selective_scan(
                **{k: x[:, a:b] if x.dim() == 3 else x for k, x in tensors.items()},
                delta_softplus=True,
            )
            for a, b in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True)
        ]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-12, atol=1e-12)


def test_borders_and_positions_say_the_same() -> None:
    tensors = make(3, 8, 2, 2)
    borders = torch.tensor([0, 3, 8, 16, 17, 24], dtype=torch.int32)
    ids = position_ids_of(borders, 24)
    by_borders = run("cpu", tensors, cu_seqlens=borders)
    for shaped in (ids, ids.view(3, 8), ids.int()):
        assert_same(run("cpu", tensors, position_ids=shaped), by_borders, 0)
    # Every row starts a document, so that what came before does not count.
    assert not by_borders["dinitial_state"].any()


def test_initial_state_counts_where_the_row_continues() -> None:
    tensors = make(2, 4, 2, 2)
    ids = torch.tensor([[9, 10, 11, 12], [0, 1, 2, 3]])
    gradient = run("cpu", tensors, position_ids=ids)["dinitial_state"]
    assert gradient[0].all()
    assert not gradient[1].any()


@pytest.mark.parametrize("face", FAST_FACES)
def test_strided_and_expanded(face: str) -> None:
    tensors = make(2, 5, 4, 2)
    wanted = run(face, tensors, delta_softplus=True)
    with on_face(face) as device:
        twice = torch.cat([tensors["u"], tensors["z"]], dim=-1).to(device).requires_grad_()
        given = {k: x.to(device).requires_grad_() for k, x in tensors.items()}
        given["u"], given["z"] = twice.chunk(2, dim=-1)
        given["delta"] = tensors["delta"].to(device).mT.contiguous().mT
        given["B"] = tensors["B"].to(device).permute(2, 0, 1).contiguous().permute(1, 2, 0)
        out, final = selective_scan(**given, delta_softplus=True, return_final_state=True)
        loss = (out * weights(out, 1)).sum() + (final * weights(final, 2)).sum()
        loss.backward()
        assert_close(out.detach(), wanted["out"], 1e-13)
        assert_close(twice.grad, torch.cat([wanted["du"], wanted["dz"]], dim=-1), 1e-13)

        row = tensors["u"][:1, :1].to(device)
        expanded = {**given, "u": row.expand(2, 5, 4), "z": None}
        copied = {**given, "u": row.repeat(2, 5, 1), "z": None}
        with torch.no_grad():
            assert torch.equal(selective_scan(**expanded), selective_scan(**copied))


@pytest.mark.parametrize("face", FAST_FACES)
def test_gradient_of_a_sum(face: str) -> None:
    """`sum().backward()` hands in a gradient of stride 0, `[1].backward` alone none for the output."""
    tensors = make(1, 4, 3, 2)
    gradients = []
    for weight in (None, torch.ones(1, 4, 3, dtype=torch.float64)):
        with on_face(face) as device:
            given = {k: x.detach().clone().to(device).requires_grad_() for k, x in tensors.items()}
            out = selective_scan(**given)
            (out.sum() if weight is None else (out * weight.to(device)).sum()).backward()
            gradients.append(given["u"].grad)
    assert torch.equal(*gradients)
    with on_face(face) as device:
        given = {k: x.detach().clone().to(device).requires_grad_() for k, x in tensors.items()}
        selective_scan(**given, return_final_state=True)[1].sum().backward()
    assert not given["C"].grad.any()
    assert not given["z"].grad.any()
    assert given["u"].grad.any()


@pytest.mark.parametrize("face", FAST_FACES)
def test_reads_nothing_outside(face: str) -> None:
    tensors = make(1, 5, 3, 2)
    wanted = run(face, tensors, delta_softplus=True)
    found = run(face, {k: poisoned(x) for k, x in tensors.items()}, delta_softplus=True)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("face", FAST_FACES)
def test_same_bits(face: str) -> None:
    tensors = make(1, 5, 3, 2, dtype=torch.float32)
    first, second = (run(face, tensors, delta_softplus=True) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


GOOD = make(2, 4, 6, 3)
INT = {"dtype": torch.int32}
ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"u": torch.ones(2, 4)}, r"u has shape \(2, 4\), expected \(\*, \*, \*\)"),
    ({"delta": torch.ones(2, 4, 5)}, r"delta has shape \(2, 4, 5\), expected \(2, 4, 6\)"),
    ({"A": torch.ones(5, 3)}, r"A has shape \(5, 3\), expected \(6, \*\)"),
    ({"A": torch.ones(6, 0)}, r"A has shape \(6, 0\), expected at least one state"),
    ({"B": torch.ones(2, 4, 2)}, r"B has shape \(2, 4, 2\), expected \(2, 4, 3\)"),
    ({"B": torch.ones(2, 4, 4, 3)}, r"B has 4 groups, expected a divisor of the 6 channels"),
    ({"B": torch.ones(2, 4, 1, 3)}, r"C has shape \(2, 4, 3\), expected \(2, 4, 1, 3\)"),
    ({"D": torch.ones(5)}, r"D has shape \(5,\), expected \(6\)"),
    ({"z": torch.ones(2, 4, 1)}, r"z has shape \(2, 4, 1\), expected \(2, 4, 6\)"),
    ({"delta_bias": torch.ones(1)}, r"delta_bias has shape \(1,\), expected \(6\)"),
    ({"initial_state": torch.ones(2, 3, 6)}, r"initial_state has shape \(2, 3, 6\), expected"),
    ({"u": torch.ones(2, 4, 6, **INT)}, r"u is int32, expected float64"),
    ({"z": torch.ones(2, 4, 6, device="meta")}, r"z is on meta and u on cpu"),
    ({"position_ids": torch.ones(2, 4)}, "position_ids is float32, expected int64, int32"),
    ({"position_ids": torch.ones(4, **INT)}, r"position_ids has shape \(4,\), expected \(8\)"),
    ({"cu_seqlens": torch.tensor([0, 4, 8])}, r"cu_seqlens is int64 of shape \(3,\), expected"),
    ({"cu_seqlens": torch.tensor([0, 4, 7], **INT)}, r"cu_seqlens ends at 7, expected"),
    ({"cu_seqlens": torch.tensor([0, 5, 8], **INT)}, r"cu_seqlens has no border at 4, where"),
    (
        {"cu_seqlens": torch.tensor([0, 4, 8], **INT), "position_ids": torch.zeros(8, **INT)},
        "cu_seqlens and position_ids are both given",
    ),
]


@pytest.mark.parametrize(("change", "message"), ERRORS, ids=[m[:30] for _, m in ERRORS])
def test_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selective_scan(**{**GOOD, **change})
