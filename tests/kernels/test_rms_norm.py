"""RMS norm against its definition and torch's, with residual and gate, in 16 bits, and on every face."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import pytest
import torch
from oracle import (
    ALL_FACES,
    CAN_RUN_TRITON,
    DEVICE,
    FAST_FACES,
    assert_close,
    needs_triton,
    on_face,
    poisoned,
)
from sm90 import compile_sm90, needs_sm90_tools
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from weft.kernels import rms_norm
from weft.kernels.rms_norm import rms_norm_reference


def test_value_by_hand() -> None:
    x = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    out = rms_norm(x, torch.tensor([1.0, 2.0], dtype=torch.float64), eps=0.5)
    root = math.sqrt(12.5 + 0.5)
    assert out.tolist()[0] == pytest.approx([3 / root, 8 / root], rel=1e-14)


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 6)])
def test_gradients_in_float64(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape[-1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: rms_norm(a, b, 1e-3), (x, weight))
    torch.testing.assert_close(
        rms_norm(x, weight, 1e-3), rms_norm_reference(x, weight, 1e-3), rtol=1e-14, atol=0
    )


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_bf16_has_fp32_statistics(weight_dtype: torch.dtype) -> None:
    # The squares of 300 overflow fp16 and lose all digits of a bf16 sum over 4096 channels.
    x = (300 + torch.randn(4, 4096)).bfloat16().requires_grad_()
    weight = (torch.rand(4096) + 0.5).to(weight_dtype).requires_grad_()
    out = rms_norm(x, weight, 1e-6)
    assert out.dtype == torch.bfloat16
    exact = rms_norm_reference(x.detach().double(), weight.detach().double(), 1e-6)
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=0)
    out.float().square().sum().backward()
    assert (x.grad.dtype, weight.grad.dtype) == (torch.bfloat16, weight_dtype)


def test_fp16_does_not_overflow() -> None:
    assert torch.isfinite(rms_norm(torch.full((1, 8), 6e4).half(), torch.ones(8), 1e-6)).all()


Options = dict[str, bool]
PLAIN: Options = {"has_residual": False, "has_gate": False}
ALL_OPTIONS = [
    pytest.param({"has_residual": r, "has_gate": g}, id=f"residual={r},gate={g}")
    for r in (False, True)
    for g in (False, True)
]


def _make(
    shape: tuple[int, ...],
    has_residual: bool,
    has_gate: bool,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    tensors = {"x": torch.randn(shape), "weight": torch.rand(shape[-1]) + 0.5}
    if has_residual:
        tensors["residual"] = torch.randn(shape)
    if has_gate:
        tensors["gate"] = 2 * torch.randn(shape)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def _torch_norm(
    x: Tensor, weight: Tensor, residual: Tensor | None = None, gate: Tensor | None = None
) -> tuple[Tensor, ...]:
    """By torch's own norm and activation."""
    total = x if residual is None else x + residual
    y = torch.nn.functional.rms_norm(total, weight.shape, weight, 1e-3)
    y = y if gate is None else y * torch.nn.functional.silu(gate)
    return (y,) if residual is None else (y, total)


def _call(
    x: Tensor, weight: Tensor, residual: Tensor | None = None, gate: Tensor | None = None
) -> tuple[Tensor, ...]:
    out = rms_norm(x, weight, 1e-3, residual=residual, gate=gate)
    return out if isinstance(out, tuple) else (out,)


def _run(
    call: Callable[..., tuple[Tensor, ...]], tensors: dict[str, Tensor], device: torch.device
) -> dict[str, Tensor]:
    """Results and the gradients of all inputs under fixed random incoming gradients."""
    leaves = {name: x.detach().to(device).requires_grad_() for name, x in tensors.items()}
    outs = call(**leaves)
    generator = torch.Generator().manual_seed(3)
    grads = [torch.randn(out.shape, generator=generator).to(out) for out in outs]
    torch.autograd.backward(outs, grads)
    found = {f"result {place}": out.detach() for place, out in enumerate(outs)}
    return found | {f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}


def _assert_all_close(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float
) -> None:
    assert found.keys() == expected.keys()
    for name, theirs in expected.items():
        assert_close(found[name], theirs, tolerance, name)


CPU = torch.device("cpu")


@pytest.mark.parametrize("face", ALL_FACES)
@pytest.mark.parametrize("options", ALL_OPTIONS)
@pytest.mark.parametrize("shape", [(1,), (2, 3), (3, 5, 33), (40, 64), (2, 4097)])
def test_faces_equal_torch_in_float64(face: str, options: Options, shape: tuple[int, ...]) -> None:
    tensors = _make(shape, **options, dtype=torch.float64)
    expected = _run(_torch_norm, tensors, CPU)
    with on_face(face) as device:
        _assert_all_close(_run(_call, tensors, device), expected, 1e-12)
        single = {name: x.float() for name, x in tensors.items()}
        # One channel alone is always 1: its gradient is a difference of rounding errors.
        if shape[-1] > 1:
            _assert_all_close(_run(_call, single, device), expected, 1e-5)


@pytest.mark.parametrize("face", FAST_FACES)
@pytest.mark.parametrize("rows", [1, 3])
def test_rows_wider_than_registers(face: str, rows: int) -> None:
    tensors = _make((rows, 8193), True, True, torch.float64)
    expected = _run(_torch_norm, tensors, CPU)
    with on_face(face) as device:
        _assert_all_close(_run(_call, tensors, device), expected, 1e-12)


@needs_triton
def test_more_rows_than_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    from weft.kernels.rms_norm import triton as kernels

    for channels, blocks in ((16, 1), (16, 2)):
        monkeypatch.setattr(
            kernels,
            "tile_of",
            lambda _, c=channels, b=blocks: kernels.Tile(2, c, b, 4, 3),
        )
        tensors = _make((15, channels * blocks - 1), True, True, torch.float64)
        expected = _run(_torch_norm, tensors, CPU)
        with on_face("triton") as device:
            _assert_all_close(_run(_call, tensors, device), expected, 1e-12)


@pytest.mark.parametrize("options", ALL_OPTIONS)
def test_gradcheck(options: Options) -> None:
    tensors = _make((3, 4), **options, dtype=torch.float64)
    names = list(tensors)
    leaves = tuple(x.requires_grad_() for x in tensors.values())
    assert torch.autograd.gradcheck(lambda *a: _call(**dict(zip(names, a, strict=True))), leaves)


@pytest.mark.parametrize("face", ALL_FACES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(face: str, dtype: torch.dtype) -> None:
    tensors = _make((6, 40), True, True, dtype)
    # A residual stream in fp32 beside a branch in 16 bits.
    tensors["residual"] = torch.randn(6, 40)
    tensors["weight"] = tensors["weight"].float()
    expected = _run(_torch_norm, {name: x.double() for name, x in tensors.items()}, CPU)
    with on_face(face) as device:
        found = _run(_call, tensors, device)
    assert found["result 0"].dtype == dtype
    assert found["result 1"].dtype == torch.float32
    for name, tensor in tensors.items():
        assert found[f"gradient of {name}"].dtype == tensor.dtype
    _assert_all_close(found, expected, 1e-2)


@pytest.mark.parametrize("face", ALL_FACES)
def test_the_result_is_the_norm_of_the_returned_sum(face: str) -> None:
    """Whose rounding shows where x is far below the last digit of the residual."""
    x = torch.full((2, 8), 1.0).bfloat16()
    residual = torch.full((2, 8), 1024.0).bfloat16()
    x[:, ::2], residual[:, ::2] = -1, -512
    weight = torch.ones(8).bfloat16()
    with on_face(face) as device:
        inputs = [t.to(device) for t in (x, weight, residual)]
        y, total = rms_norm(inputs[0], inputs[1], 1e-6, residual=inputs[2])
        again = rms_norm(total, inputs[1], 1e-6)
    assert_close(y, again, 1e-6)
    assert torch.equal(total.cpu(), residual)


@pytest.mark.parametrize("face", ALL_FACES)
def test_the_gate_comes_after_the_norm(face: str) -> None:
    """A gate before it would be divided out of a row it scales as a whole."""
    x, gate = torch.randn(1, 8), torch.full((1, 8), 3.0)
    with on_face(face) as device:
        weight = torch.ones(8, device=device)
        plain = rms_norm(x.to(device), weight, 0.0)
        gated = rms_norm(x.to(device), weight, 0.0, gate=gate.to(device))
    assert_close(gated, plain * 3 / (1 + math.exp(-3)), 1e-6)


def test_transformers_norm_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    # In the root of a checkout transformers would take the folder `kernels` for a package of that name, and run it.
    monkeypatch.setitem(sys.modules, "kernels", None)
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    theirs = llama.LlamaRMSNorm(24, eps=1e-5)
    theirs.weight.data.uniform_(0.5, 1.5)
    x = torch.randn(3, 24)
    assert_close(rms_norm(x, theirs.weight, 1e-5), theirs(x), 1e-6)


@pytest.mark.parametrize("face", ALL_FACES)
@pytest.mark.parametrize("options", ALL_OPTIONS)
def test_a_nan_stays_in_its_row(face: str, options: Options) -> None:
    tensors = _make((5, 6), **options)
    tensors["x"][2, 1] = float("nan")
    others = [0, 1, 3, 4]
    with on_face(face) as device:
        found = _run(_call, tensors, device)
    for name, value in found.items():
        if name != "gradient of weight":
            assert torch.isfinite(value[others]).all(), name
    assert torch.isnan(found["result 0"][2]).all()


@pytest.mark.parametrize("face", ALL_FACES)
def test_extreme_values(face: str) -> None:
    x = torch.tensor([[1e18, -1e18], [1e-30, 1e-30], [0, 0]])
    gate = torch.tensor([[1e4, -1e4], [1e30, -1e30], [0, 0]])
    with on_face(face) as device:
        found = _run(_call, {"x": x, "weight": torch.ones(2), "gate": gate}, device)
    assert all(torch.isfinite(value).all() for value in found.values())
    assert found["result 0"][0].tolist() == pytest.approx([1e4, 0])


@pytest.mark.parametrize("face", ALL_FACES)
@pytest.mark.parametrize("options", ALL_OPTIONS)
def test_strided_inputs_and_poisoned_memory(face: str, options: Options) -> None:
    tensors = _make((3, 4, 6), **options)
    expected = _run(_torch_norm, {name: x.double() for name, x in tensors.items()}, CPU)

    def halves(x: Tensor) -> Tensor:
        return torch.cat([torch.full_like(x, float("nan")), x], -1)[..., x.shape[-1] :]

    def turned(x: Tensor) -> Tensor:
        return x.transpose(0, -1).contiguous().transpose(0, -1)

    for stride in (halves, turned, poisoned):
        with on_face(face) as device:
            strided = lambda f=stride, **a: _call(**{k: f(v) for k, v in a.items()})  # noqa: E731
            if stride is poisoned:
                strided = _call
                tensors = {name: poisoned(x) for name, x in tensors.items()}
            _assert_all_close(_run(strided, tensors, device), expected, 1e-5)


@pytest.mark.parametrize("face", ALL_FACES)
def test_expanded_input_and_gradient(face: str) -> None:
    x, weight = torch.randn(1, 6), torch.rand(6)
    with on_face(face) as device:
        leaf = x.clone().to(device).requires_grad_()
        y, total = rms_norm(leaf.expand(4, 6), weight.to(device), 1e-3, residual=leaf.expand(4, 6))
        (y.sum() + total.sum()).backward()
    double = x.double().requires_grad_()
    outs = _torch_norm(double.expand(4, 6), weight.double(), double.expand(4, 6))
    sum(out.sum() for out in outs).backward()
    assert_close(leaf.grad, double.grad, 1e-5)


@pytest.mark.parametrize("face", ALL_FACES)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 4)])
def test_empty_inputs(face: str, shape: tuple[int, ...]) -> None:
    with on_face(face) as device:
        for options in ({"has_residual": True, "has_gate": True}, PLAIN):
            found = _run(_call, _make(shape, **options), device)
            assert found["result 0"].shape == shape
            assert (found["gradient of weight"] == 0).all()


@pytest.mark.parametrize("face", ALL_FACES)
def test_runs_repeat_to_the_bit(face: str) -> None:
    tensors = _make((37, 24), True, True)
    with on_face(face) as device:
        first, second = (_run(_call, tensors, device) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("face", FAST_FACES)
@pytest.mark.parametrize("options", ALL_OPTIONS)
def test_registration(face: str, options: Options) -> None:
    tensors = {name: x.requires_grad_() for name, x in _make((3, 5), **options).items()}
    with on_face(face) as device:
        arguments = [
            None if name not in tensors else tensors[name].detach().to(device).requires_grad_()
            for name in ("x", "weight", "residual", "gate")
        ]
        torch.library.opcheck(torch.ops.weft.rms_norm.default, (*arguments, 1e-3))


@pytest.mark.parametrize("face", FAST_FACES)
@pytest.mark.parametrize(
    "options", [PLAIN, {"has_residual": True, "has_gate": True}], ids=["plain", "all"]
)
def test_compiled_equals_eager(face: str, options: Options) -> None:
    tensors = _make((4, 6), **options)

    def call(x: Tensor, **others: Tensor) -> tuple[Tensor, ...]:
        return tuple(out + 1 for out in _call(2 * x, **others))

    with on_face(face) as device:
        compiled = torch.compile(call, fullgraph=True)
        _assert_all_close(_run(compiled, tensors, device), _run(call, tensors, device), 1e-6)


@pytest.mark.parametrize("face", FAST_FACES)
@pytest.mark.parametrize("options", ALL_OPTIONS)
def test_recomputed_equals_kept(face: str, options: Options) -> None:
    tensors = _make((4, 6), **options)
    with on_face(face) as device:
        plain = _run(_call, tensors, device)
        again = _run(lambda **a: checkpoint(_call, **a, use_reentrant=False), tensors, device)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.parametrize("options", ALL_OPTIONS)
def test_one_number_a_row_is_kept(options: Options) -> None:
    tensors = {name: x.requires_grad_() for name, x in _make((64, 50), **options).items()}
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.numel()) or x, lambda x: x
    ):
        _call(**tensors)
    assert sum(kept) == 64 + 50 + 64 * 50 * (1 + options["has_gate"])


def test_what_runs_when(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of the module: the op for residual, gate and where Triton is asked for; else none."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    def runs_op(face: str | None, **options: bool) -> bool:
        seen.clear()
        tensors = _make((2, 4), **options)
        with Watch():
            if face is None:
                _call(**tensors)
            else:
                with on_face(face) as device:
                    _call(**{name: x.to(device) for name, x in tensors.items()})
        return "weft::rms_norm" in seen

    for name in (None, "auto", "cpu", "reference"):
        assert not runs_op(name, **PLAIN)
    assert runs_op(None, has_residual=True, has_gate=False)
    assert runs_op(None, has_residual=False, has_gate=True)
    if CAN_RUN_TRITON:
        assert runs_op("triton", **PLAIN)
        monkeypatch.setenv("WEFT_KERNELS", "triton")
        assert runs_op(None, **PLAIN) or DEVICE.type == "cuda"


X = torch.randn(3, 4)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        (r"x has no dimensions, expected \(..., D\)", {"x": torch.tensor(1.0)}),
        ("x is int64", {"x": X.long()}),
        (r"weight has shape \(3,\), expected \(4\)", {"weight": X[:, 0]}),
        ("weight is bool", {"weight": torch.ones(4).bool()}),
        (r"residual has shape \(4,\), expected \(3, 4\)", {"residual": X[0]}),
        ("residual is int32", {"residual": X.int()}),
        (r"gate has shape \(3, 2\), expected \(3, 4\)", {"gate": X[:, :2]}),
        ("gate is int32", {"gate": X.int()}),
        ("gate is on meta and x on cpu", {"gate": X.to("meta")}),
    ],
)
def test_argument_errors(message: str, arguments: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=message):
        rms_norm(**{"x": X, "weight": torch.ones(4), "eps": 1e-6, **arguments})


@needs_sm90_tools
@pytest.mark.parametrize("channels", [64, 8192, 16384])
@pytest.mark.parametrize("kernel", ["forward_kernel", "backward_kernel"])
def test_machine_code_of_sm90(kernel: str, channels: int) -> None:
    from weft.kernels.rms_norm import triton as kernels

    tile = kernels.tile_of(channels)
    if kernel == "forward_kernel":
        narrow = ["p_x", "p_weight", "p_residual", "p_gate", "p_y", "p_total"]
        wide, sizes = ["p_scale"], ["stride_x", "stride_residual", "stride_gate"]
    else:
        narrow = ["p_grad", "p_total_grad", "p_total", "p_weight", "p_gate", "p_dtotal", "p_dgate"]
        wide, sizes = ["p_scale", "p_partial"], ["stride_total", "stride_gate", "programs"]
    types = {
        **dict.fromkeys(narrow, "*bf16"),
        **dict.fromkeys(wide, "*fp32"),
        **dict.fromkeys([*sizes, "R", "D"], "i32"),
    }
    if kernel == "forward_kernel":
        types["eps"] = "fp32"
    built = compile_sm90(
        kernels.__name__,
        kernel,
        types,
        {
            "BR": tile.rows,
            "BD": tile.channels,
            "BLOCKS": tile.blocks,
            "HAS_RESIDUAL": True,
            "HAS_GATE": True,
            "WIDE": "tl.float32",
        },
        divisible_by_16=[*narrow, *wide, "D", *(name for name in sizes if name != "programs")],
        num_warps=tile.warps,
    )
    assert built.spill_bytes == 0
    assert built.registers * tile.warps * 32 <= 65536
    assert built.count("RED") == built.count("ATOM") == 0
    wide_loads = [line for line in built.code if "LDG" in line and ".128" in line]
    # All loads of tiles are of 16 bytes; those left over are of one number a row.
    assert len(wide_loads) >= built.count("LDG") - 3
