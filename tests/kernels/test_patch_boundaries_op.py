"""Patch boundaries as an op: strides, nothing to do, compilation, repeats, no syncs, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import ALL_FACES, needs_triton, on_face, poisoned, position_ids_of, random_documents
from patching import assert_same, launches_without_values, moved, options_of, to_cpu
from torch import Tensor
from weft.kernels.entropy_patching import PATCH_SCHEMES, Patches, patch_boundaries
from weft.kernels.entropy_patching.patch_boundaries import _patch_boundaries


@pytest.mark.parametrize("face", ALL_FACES)
def test_a_slice_from_inside_a_document_and_strided_input(face: str) -> None:
    """A row that begins inside a document begins a patch all the same, and its first difference is undefined."""
    options = options_of("rise", 20)
    wide = torch.stack([options["entropy"], torch.full((20,), float("nan"))], dim=1)
    with on_face(face) as device:
        plain = patch_boundaries(torch.arange(20, device=device), 20, **moved(options, device))
        sliced = patch_boundaries(torch.arange(9, 29, device=device), 20, **moved(options, device))
        strided = patch_boundaries(
            torch.arange(40, device=device)[::2] // 2,
            20,
            **(moved(options, device) | {"entropy": wide[:, 0].to(device)}),
        )
        dirty = patch_boundaries(
            poisoned(torch.arange(20, device=device)), 20,
            **(moved(options, device) | {"entropy": poisoned(options["entropy"].to(device))}),
        )  # fmt: skip
    for other in (sliced, strided, dirty):
        assert_same(other, to_cpu(plain))


@pytest.mark.parametrize("face", ALL_FACES)
def test_nothing_to_patch(face: str) -> None:
    with on_face(face) as device:
        found = patch_boundaries(
            torch.empty(0, dtype=torch.int64, device=device),
            3,
            entropy=torch.empty(0, device=device),
            threshold=1.0,
        )
    assert found.is_start.shape == found.patch_ids.shape == (0,)
    assert found.starts.tolist() == found.lengths.tolist() == [0, 0, 0]
    assert found.count == found.overflow == 0


@pytest.mark.parametrize("scheme", PATCH_SCHEMES)
@pytest.mark.parametrize("face", ALL_FACES)
def test_operator_contract_and_compiled(face: str, scheme: str) -> None:
    total = 12
    options = options_of(scheme, total, max_length=3)

    def run(positions: Tensor) -> Patches:
        return patch_boundaries(positions, 8, **moved(options, positions.device))

    with on_face(face) as device:
        positions = position_ids_of(random_documents(total, 3), total).to(device)
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        assert_same(compiled(positions), to_cpu(run(positions)))
        torch.library.opcheck(
            torch.ops.weft.patch_boundaries,
            (
                positions,
                *(options.get(name, torch.zeros(total)).to(device) for name in ("entropy",)),
                options.get("tokens", torch.zeros(total).long()).to(device),
                scheme, 8, 1.3, 0.2, 4, 3, 2, 4,
            ),
        )  # fmt: skip


@pytest.mark.parametrize("face", ALL_FACES)
def test_repeated_runs_give_the_same_bits_and_leave_no_gradient(face: str) -> None:
    options = options_of("entropy", 50)
    options["entropy"].requires_grad_()
    with on_face(face) as device:
        first, second = (
            to_cpu(patch_boundaries(torch.arange(50, device=device), 60, **moved(options, device)))
            for _ in range(2)
        )
    assert_same(first, second)
    assert not any(tensor.requires_grad for tensor in first)


@needs_triton
@pytest.mark.parametrize("scheme", PATCH_SCHEMES)
def test_the_host_never_waits(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from weft.kernels.entropy_patching import patch_boundaries_triton

    positions = torch.arange(3000)
    options = options_of(scheme, 3000)
    arguments = (
        positions,
        options.get("entropy"),
        options.get("tokens"),
        scheme,
        800,
        1.3,
        0.2,
        4,
        8,
        2,
        4,
    )
    assert (
        launches_without_values(monkeypatch, patch_boundaries_triton, _patch_boundaries, arguments)
        == 2
    )


def positions(total: int = 4) -> Tensor:
    return torch.arange(total)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (
            (positions(), 4, "topk"),
            {},
            "unknown patch scheme 'topk'; known: entropy, rise, both, stride, space",
        ),
        (
            (positions(), 4),
            {"entropy": torch.zeros(4)},
            "threshold is None; patch scheme 'entropy' needs it",
        ),
        (
            (positions(), 4, "both"),
            {"threshold": 1.0, "entropy": torch.zeros(4)},
            "rise is None; patch scheme 'both'",
        ),
        ((positions(), 4, "stride"), {}, "stride is None; patch scheme 'stride' needs it"),
        (
            (positions(), 4, "stride"),
            {"stride": 2, "threshold": 1.0},
            "threshold is 1.0, but .* no use for it",
        ),
        (
            (positions(), 4),
            {"threshold": float("nan"), "entropy": torch.zeros(4)},
            "threshold is NaN",
        ),
        ((positions(), 4), {"threshold": 1.0}, "entropy is None; patch scheme 'entropy' needs it"),
        ((positions(), 4, "space"), {}, "tokens is None; patch scheme 'space' needs it"),
        ((positions(), 0, "stride"), {"stride": 2}, "max_patches is 0, expected 1 to"),
        ((positions(), 4, "stride"), {"stride": 0}, "stride is 0, expected 1 to"),
        (
            (positions(), 4, "stride"),
            {"stride": 2, "max_length": 0},
            "max_length is 0, expected 1 to",
        ),
        (
            (positions(), 4, "stride"),
            {"stride": 2, "forced_starts": 0},
            "forced_starts is 0, expected 1 to",
        ),
        (
            (positions()[None], 4, "stride"),
            {"stride": 2},
            r"position_ids has shape \(1, 4\), expected \(\*\)",
        ),
        (
            (torch.zeros(4), 4, "stride"),
            {"stride": 2},
            "position_ids is float32, expected int64, int32",
        ),
        (
            (torch.empty(2**31, dtype=torch.int32, device="meta"), 4, "stride"),
            {"stride": 2},
            "position_ids has 2147483648 positions, expected at most",
        ),
        (
            (positions(), 4),
            {"threshold": 1.0, "entropy": torch.zeros(3)},
            r"entropy has shape \(3,\), expected \(4\)",
        ),
        (
            (positions(), 4),
            {"threshold": 1.0, "entropy": positions()},
            "entropy is int64, expected float64",
        ),
        (
            (positions(), 4, "space"),
            {"tokens": positions(5)},
            r"tokens has shape \(5,\), expected \(4\)",
        ),
        (
            (positions(), 4, "space"),
            {"tokens": torch.zeros(4)},
            "tokens is float32, expected int64, int32",
        ),
        (
            (positions(), 4, "space"),
            {"tokens": positions().to("meta")},
            "tokens is on meta and position_ids on cpu",
        ),
    ],
)
def test_argument_errors(arguments: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        patch_boundaries(*arguments, **options)
