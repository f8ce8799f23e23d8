"""The causal convolution on every face: against torch's own by documents, in state, gradient and isolation."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import (
    ALL_FACES,
    DEVICE,
    FAST_FACES,
    assert_close,
    on_face,
    poisoned,
    position_ids_of,
    random_documents,
)
from sm90 import compile_sm90, needs_sm90_tools
from torch import Tensor
from torch.nn.functional import conv1d, pad, silu
from torch.utils.checkpoint import checkpoint
from weft.kernels.causal_conv1d import (
    causal_conv1d,
    causal_conv1d_reference,
    causal_conv1d_step,
)


def by_documents(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, borders: Tensor
) -> Tensor:
    """torch's grouped convolution over one document at a time."""
    outs = []
    for document in x.flatten(0, 1).split(borders.diff().tolist()):
        padded = pad(document.T[None], (weight.shape[1] - 1, 0))
        outs.append(conv1d(padded, weight[:, None], bias, groups=x.shape[2])[0].T)
    out = torch.cat(outs).view(x.shape) if outs else x
    return silu(out) if activation else out


def make(
    rows: int, length: int, channels: int, width: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(rows, length, channels, dtype=dtype),
        torch.randn(channels, width, dtype=dtype) / 2,
        torch.randn(channels, dtype=dtype),
    )


def with_row_borders(borders: Tensor, rows: int, length: int) -> Tensor:
    ends = torch.arange(0, rows * length + 1, length) if length else torch.zeros(1)
    return torch.cat([borders, ends]).unique().int()


def run(
    call: Callable[..., Tensor | tuple[Tensor, Tensor]], *inputs: Tensor, device: torch.device
) -> list[Tensor]:
    """Outputs and the gradients of all inputs under fixed random incoming gradients."""
    leaves = [x.detach().to(device).requires_grad_() for x in inputs]
    outs = call(*leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    generator = torch.Generator().manual_seed(7)
    grads = [torch.randn(o.shape, generator=generator).to(o) for o in outs]
    torch.autograd.backward(outs, grads)
    return [*(out.detach() for out in outs), *(leaf.grad for leaf in leaves)]


def assert_all_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for place, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert_close(ours, theirs, tolerance, f"result {place}")


@pytest.mark.parametrize("face", ALL_FACES)
@pytest.mark.parametrize(
    ("length", "channels", "width", "activation"),
    [(1, 1, 4, None), (2, 3, 2, "silu"), (17, 33, 3, "silu"), (30, 3, 4, "silu")],
)
def test_equals_torch_by_documents(
    face: str, length: int, channels: int, width: int, activation: str | None
) -> None:
    x, weight, bias = make(2, length, channels, width)
    borders = with_row_borders(random_documents(2 * length, length // 2), 2, length)
    expected = run(
        lambda *a: by_documents(*a, activation, borders),
        *(t.double() for t in (x, weight, bias)),
        device=torch.device("cpu"),
    )
    with on_face(face) as device:
        found = run(
            lambda *a: causal_conv1d(*a, activation, cu_seqlens=borders.to(device)),
            *(x, weight, bias),
            device=device,
        )
    assert_all_close(found, expected, 1e-5)


@pytest.mark.parametrize("face", ALL_FACES)
def test_no_borders_is_torch_with_zeros_before_the_row(face: str) -> None:
    x, weight, _ = make(2, 9, 5, 4)
    rows = torch.tensor([0, 9, 18])
    with on_face(face) as device:
        found = run(lambda *a: causal_conv1d(*a), x, weight, device=device)
    double = (x.double(), weight.double())
    assert_all_close(
        found, run(lambda *a: by_documents(*a, None, None, rows), *double, device=x.device), 1e-5
    )


@pytest.mark.parametrize("face", FAST_FACES)
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("length", [1, 2, 3, 19])
def test_states_in_float64_equal_the_definition(face: str, width: int, length: int) -> None:
    x, weight, bias = make(2, length, 3, width, torch.float64)
    state = torch.randn(2, width - 1, 3, dtype=torch.float64)
    # The first row goes on from its state, the second starts a document.
    positions = torch.randint(0, 3, (2, length))
    positions[:, 0] = torch.tensor([5, 0])
    expected = run(
        lambda *a: causal_conv1d_reference(
            *a[:3], "silu", position_ids=positions, initial_state=a[3]
        ),
        *(x, weight, bias, state),
        device=torch.device("cpu"),
    )
    with on_face(face) as device:
        found = run(
            lambda *a: causal_conv1d(
                *a[:3],
                "silu",
                position_ids=positions.to(device),
                initial_state=a[3],
                return_final_state=True,
            ),
            *(x, weight, bias, state),
            device=device,
        )
    assert_all_close(found, expected, 1e-12)
    assert (found[-1][1] == 0).all() or width > length, "a state that nothing saw has a gradient"


@pytest.mark.parametrize("face", FAST_FACES)
@pytest.mark.parametrize("length", [15, 16, 17, 29, 30])
def test_every_chunk_length_of_the_kernels(face: str, length: int) -> None:
    x, weight, bias = make(1, length, 2, 4, torch.float64)
    positions = position_ids_of(random_documents(length, 5, seed=length), length)
    expected = run(
        lambda *a: causal_conv1d_reference(*a, "silu", position_ids=positions)[0],
        *(x, weight, bias),
        device=torch.device("cpu"),
    )
    with on_face(face) as device:
        found = run(
            lambda *a: causal_conv1d(*a, "silu", position_ids=positions.to(device)),
            *(x, weight, bias),
            device=device,
        )
    assert_all_close(found, expected, 1e-12)


def test_definition_passes_gradcheck() -> None:
    x, weight, bias = (t.requires_grad_() for t in make(2, 5, 2, 3, torch.float64))
    state = torch.randn(2, 2, 2, dtype=torch.float64, requires_grad=True)
    positions = torch.tensor([[3, 4, 0, 1, 2], [0, 0, 1, 0, 1]])

    def call(x: Tensor, w: Tensor, b: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return causal_conv1d(
            x, w, b, "silu", position_ids=positions, initial_state=s, return_final_state=True
        )

    for face in ("reference", "cpu"):
        with on_face(face):
            assert torch.autograd.gradcheck(call, (x, weight, bias, state))


def test_transformers_mamba_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    # In the root of a checkout transformers would take the folder `kernels` for a package of that name, and run it.
    monkeypatch.setitem(sys.modules, "kernels", None)
    mamba = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    config = mamba.MambaConfig(hidden_size=8, expand=2, conv_kernel=4, num_hidden_layers=1)
    mixer = mamba.MambaMixer(config, layer_idx=0)
    x = torch.randn(2, 11, 16)
    theirs = mixer.act(mixer.conv1d(x.transpose(1, 2))[..., :11]).transpose(1, 2)
    ours = causal_conv1d(x, mixer.conv1d.weight[:, 0], mixer.conv1d.bias, "silu")
    assert_close(ours, theirs, 1e-6)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    width=st.integers(2, 4),
    has_bias=st.booleans(),
)
def test_any_packing_on_the_cpu(lengths: list[int], width: int, has_bias: bool) -> None:
    total = sum(lengths)
    borders = torch.tensor([0, *lengths]).cumsum(0).int()
    x, weight, bias = make(1, total, 3, width, torch.float64)
    chosen = bias if has_bias else None
    expected = by_documents(x, weight, chosen, "silu", borders)
    positions = position_ids_of(borders, total)
    for given_borders in ({"cu_seqlens": borders}, {"position_ids": positions.int()}):
        out = causal_conv1d(x, weight, chosen, "silu", **given_borders)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_thousands_of_tokens_on_the_cpu() -> None:
    x, weight, bias = make(2, 3000, 24, 4)
    borders = with_row_borders(random_documents(6000, 400), 2, 3000)
    call = {"device": torch.device("cpu")}
    found = run(lambda *a: causal_conv1d(*a, "silu", cu_seqlens=borders), x, weight, bias, **call)
    double = [t.double() for t in (x, weight, bias)]
    expected = run(lambda *a: by_documents(*a, "silu", borders), *double, **call)
    assert_all_close(found, expected, 1e-5)


@pytest.mark.parametrize("face", ALL_FACES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(face: str, dtype: torch.dtype) -> None:
    x, weight, bias = make(1, 12, 6, 4)
    positions = position_ids_of([0, 5, 12], 12)
    expected = run(
        lambda *a: causal_conv1d_reference(*a, "silu", position_ids=positions)[0],
        *(x.to(dtype).double(), weight.double(), bias.double()),
        device=torch.device("cpu"),
    )
    with on_face(face) as device:
        found = run(
            lambda *a: causal_conv1d(*a, "silu", position_ids=positions.to(device)),
            *(x.to(dtype), weight, bias),
            device=device,
        )
    assert [t.dtype for t in found] == [dtype, dtype, torch.float32, torch.float32]
    assert_all_close(found, expected, 1e-2)


@pytest.mark.parametrize("face", ALL_FACES)
@pytest.mark.parametrize("spoiled", ["x", "state", "grad"])
def test_nan_never_crosses_a_border(face: str, spoiled: str) -> None:
    """NaN in the second of three documents, or in a state that no document sees."""
    x, weight, bias = make(2, 12, 3, 4)
    positions = position_ids_of([0, 5, 9, 12], 12).expand(2, 12)
    state, grad = torch.zeros(2, 3, 3), torch.ones(2, 12, 3)
    clean = torch.ones(2, 12, dtype=torch.bool)
    if spoiled == "state":
        state[:] = float("nan")
    else:
        (x if spoiled == "x" else grad)[:, 5:9] = float("nan")
        clean[:, 5:9] = False
    with on_face(face) as device:
        x, weight, bias, state = (t.to(device).requires_grad_() for t in (x, weight, bias, state))
        out, last = causal_conv1d(
            x,
            weight,
            bias,
            "silu",
            position_ids=positions.to(device),
            initial_state=state,
            return_final_state=True,
        )
        out.backward(grad.to(device))
        assert torch.isfinite(last).all()
        assert torch.isfinite(out[clean]).all()
        assert torch.isfinite(x.grad[clean]).all()
        assert (state.grad == 0).all()
        if spoiled == "state":
            assert torch.isfinite(weight.grad).all()
        if spoiled == "x":
            assert not torch.isfinite(out[~clean]).any()


@pytest.mark.parametrize("face", ALL_FACES)
def test_extreme_values_stay_finite(face: str) -> None:
    x = torch.tensor([1e30, -1e30, 3e4, -3e4, 0.0]).view(1, 5, 1)
    with on_face(face) as device:
        found = run(
            lambda *a: causal_conv1d(*a, activation="silu"),
            x,
            torch.tensor([[0.0, 1.0]]),
            device=device,
        )
    assert torch.isfinite(torch.cat([t.flatten() for t in found[:2]])).all()
    assert_close(found[0].cpu().flatten(), torch.tensor([1e30, 0, 3e4, 0, 0]), 1e-6)


@pytest.mark.parametrize("face", ALL_FACES)
def test_memory_around_the_inputs_is_not_read(face: str) -> None:
    x, weight, bias = make(1, 7, 3, 4)
    positions = position_ids_of([0, 4, 7], 7)
    expected = causal_conv1d_reference(x, weight, bias, position_ids=positions)[0]
    with on_face(face) as device:
        inputs = [poisoned(t.to(device)) for t in (x, weight, bias)]
        out = causal_conv1d(*inputs, position_ids=poisoned(positions.to(device)))
    assert_close(out, expected, 1e-6)


@pytest.mark.parametrize("face", ALL_FACES)
def test_strided_and_expanded_inputs(face: str) -> None:
    wide = torch.randn(2, 10, 8)
    weight, _, _ = torch.randn(4, 3), None, None
    views = [
        wide[:, ::2, :4],
        wide[..., 4:].flip(0)[:, 1:6],
        wide[:, :4, :5].transpose(1, 2)[..., :4],
        wide[:1, :5, :4].expand(2, 5, 4),
        wide[:, :5, ::2],
    ]
    for x in views:
        expected = run(
            lambda *a: causal_conv1d_reference(*a, activation="silu")[0],
            *(x.double(), weight.double()),
            device=torch.device("cpu"),
        )
        with on_face(face) as device:
            moved = x.to(device).requires_grad_()
            out = causal_conv1d(moved, weight.to(device), activation="silu")
            out.sum().backward()
        assert_close(out, expected[0], 1e-5)
        ones = run(
            lambda *a: causal_conv1d(*a, activation="silu").sum(),
            *(x.double(), weight.double()),
            device=torch.device("cpu"),
        )
        generator = torch.Generator().manual_seed(7)
        scale = torch.randn((), generator=generator, dtype=torch.float32)
        assert_close(moved.grad * scale, ones[1], 1e-5)


@pytest.mark.parametrize("face", ALL_FACES)
@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (2, 4, 0)])
def test_empty_inputs(face: str, shape: tuple[int, int, int]) -> None:
    rows, _, channels = shape
    with on_face(face) as device:
        x, weight = torch.randn(shape, device=device), torch.randn(channels, 4, device=device)
        state = torch.randn(rows, 3, channels, device=device)
        found = run(
            lambda x, w, s: causal_conv1d(x, w, initial_state=s, return_final_state=True),
            *(x, weight, state),
            device=device,
        )
    assert found[0].shape == shape
    assert found[1].shape == state.shape
    assert (found[3] == 0).all()
    if shape[1] == 0:
        assert torch.equal(found[1], state)


@pytest.mark.parametrize("face", ALL_FACES)
def test_runs_repeat_to_the_bit(face: str) -> None:
    x, weight, bias = make(1, 33, 5, 4)
    positions = torch.randint(0, 6, (1, 33))
    with on_face(face) as device:
        first, second = (
            run(
                lambda *a: causal_conv1d(*a, "silu", position_ids=positions.to(device)),
                *(x, weight, bias),
                device=device,
            )
            for _ in range(2)
        )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_steps_equal_the_whole(width: int, activation: str | None) -> None:
    x, weight, bias = make(2, 9, 3, width)
    whole, last = causal_conv1d(x, weight, bias, activation, return_final_state=True)
    _, state = causal_conv1d(x[:, :4], weight, bias, activation, return_final_state=True)
    for place in range(4, 9):
        out, state = causal_conv1d_step(state, x[:, place], weight, bias, activation)
        assert_close(out, whole[:, place], 1e-6)
    assert torch.equal(state, last)


@pytest.mark.parametrize("face", ALL_FACES)
def test_pieces_joined_by_states_equal_the_whole(face: str) -> None:
    x, weight, bias = make(1, 11, 3, 4)
    positions = position_ids_of([0, 3, 7, 11], 11)[None]
    with on_face(face) as device:
        x, weight, bias, positions = (t.to(device) for t in (x, weight, bias, positions))
        whole = causal_conv1d(x, weight, bias, "silu", position_ids=positions)
        state, outs = None, []
        for start, end in ((0, 1), (1, 3), (3, 8), (8, 11)):
            out, state = causal_conv1d(
                x[:, start:end],
                weight,
                bias,
                "silu",
                position_ids=positions[:, start:end],
                initial_state=state,
                return_final_state=True,
            )
            outs.append(out)
    assert_close(torch.cat(outs, 1), whole, 1e-6)


@pytest.mark.parametrize("face", FAST_FACES)
def test_registration(face: str) -> None:
    with on_face(face) as device:
        x, weight, bias = (t.to(device).requires_grad_() for t in make(2, 5, 3, 4))
        state = torch.randn(2, 3, 3, device=device, requires_grad=True)
        positions = torch.tensor([[0, 1, 2, 0, 1], [2, 3, 0, 0, 1]], device=device)
        op = torch.ops.weft.causal_conv1d.default
        torch.library.opcheck(op, (x, weight, bias, state, positions, True, True))
        turned = torch.randn(2, 3, 5, device=device).transpose(1, 2).requires_grad_()
        torch.library.opcheck(op, (turned, weight, None, None, None, False, False))


@pytest.mark.parametrize("face", FAST_FACES)
def test_compiled_equals_eager(face: str) -> None:
    x, weight, bias = make(2, 6, 3, 4)
    borders = torch.tensor([0, 2, 6, 7, 12], dtype=torch.int32)

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return causal_conv1d(x * 2, weight, bias, "silu", cu_seqlens=borders.to(x.device)) + 1

    with on_face(face) as device:
        compiled = torch.compile(call, fullgraph=True)
        found = run(compiled, x, weight, bias, device=device)
        expected = run(call, x, weight, bias, device=device)
    assert_all_close(found, expected, 1e-6)


@pytest.mark.parametrize("face", FAST_FACES)
def test_recomputed_equals_kept(face: str) -> None:
    x, weight, bias = make(1, 6, 3, 4)
    with on_face(face) as device:
        plain = run(lambda *a: causal_conv1d(*a, "silu"), x, weight, bias, device=device)
        again = run(
            lambda *a: checkpoint(causal_conv1d, *a, "silu", use_reentrant=False),
            *(x, weight, bias),
            device=device,
        )
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


X, WEIGHT = torch.randn(2, 4, 3), torch.randn(3, 4)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        (r"x has shape \(4, 3\), expected \(\*, \*, \*\)", {"x": X[0]}),
        ("x is int64", {"x": X.long()}),
        (r"weight has shape \(2, 4\), expected \(3, \*\)", {"weight": WEIGHT[:2]}),
        ("weight has 1 taps, expected 2, 3 or 4", {"weight": WEIGHT[:, :1]}),
        ("weight has 5 taps, expected 2, 3 or 4", {"weight": torch.randn(3, 5)}),
        (r"bias has shape \(4,\), expected \(3\)", {"bias": torch.zeros(4)}),
        ("activation is 'relu', expected None or 'silu'", {"activation": "relu"}),
        (r"initial_state has shape \(2, 4, 3\), expected \(2, 3, 3\)", {"initial_state": X}),
        (
            "cu_seqlens and position_ids are both given",
            {"cu_seqlens": torch.tensor([0, 8]).int(), "position_ids": torch.zeros(8).long()},
        ),
        (
            r"position_ids has shape \(7,\), expected \(8\)",
            {"position_ids": torch.zeros(7).long()},
        ),
        (
            r"position_ids has shape \(4, 2\), expected \(2, 4\)",
            {"position_ids": torch.zeros(4, 2).long()},
        ),
        ("position_ids is float32, expected int64, int32", {"position_ids": torch.zeros(8)}),
        ("cu_seqlens is int64 of shape", {"cu_seqlens": torch.tensor([0, 4, 8])}),
        ("cu_seqlens ends at 7", {"cu_seqlens": torch.tensor([0, 4, 7]).int()}),
        (
            "cu_seqlens has no border at 4, where a row of 4 tokens starts",
            {"cu_seqlens": torch.tensor([0, 3, 8]).int()},
        ),
        ("weight is on meta and x on cpu", {"weight": WEIGHT.to("meta")}),
    ],
)
def test_argument_errors(message: str, arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**{"x": X, "weight": WEIGHT, **arguments})


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        (r"x has shape \(2, 4, 3\), expected \(\*, \*\)", {"x": X}),
        (r"state has shape \(2, 4, 3\), expected \(2, 3, 3\)", {"state": X}),
        ("state is int64", {"state": X[:, :3].long()}),
        ("activation is 'gelu'", {"activation": "gelu"}),
    ],
)
def test_step_argument_errors(message: str, arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=message):
        causal_conv1d_step(**{"state": X[:, :3], "x": X[:, 0], "weight": WEIGHT, **arguments})


def test_without_triton_the_choice_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weft.kernels.faces.is_interpreted", lambda: False)
    if DEVICE.type == "cpu":
        with on_face("triton"), pytest.raises(RuntimeError, match="Triton runs on CUDA tensors"):
            causal_conv1d(X, WEIGHT)


@needs_sm90_tools
@pytest.mark.parametrize(
    ("kernel", "dtype", "aligned", "registers"),
    [
        ("forward_kernel", "bf16", True, 96),
        ("backward_kernel", "bf16", True, 168),
        ("backward_kernel", "fp32", False, 200),
    ],
)
def test_machine_code_of_sm90(kernel: str, dtype: str, aligned: bool, registers: int) -> None:
    from weft.kernels.causal_conv1d import triton as kernels

    is_forward = kernel == "forward_kernel"
    walk = (kernels.FORWARD if is_forward else kernels.BACKWARD)["large"]
    values = ("p_x", "p_out") if is_forward else ("p_grad", "p_x", "p_dx")
    wide = ("p_weight", "p_bias") if is_forward else ("p_weight", "p_bias", "p_partial")
    sizes = ("L", "D", "stride_b", "stride_l", "chunks", "blocks_d")
    absent = {"p_state": None} if is_forward else {"p_state": None, "p_dstate": None}
    built = compile_sm90(
        kernels.__name__,
        kernel,
        {
            **dict.fromkeys(values, f"*{dtype}"),
            **dict.fromkeys(wide, "*fp32"),
            **dict.fromkeys(sizes, "i32"),
            "p_positions": "*i64",
        },
        {
            **absent,
            "W": 4,
            "BD": kernels.CHANNELS,
            "CHUNK": walk.chunk,
            "ROWS": walk.rows,
            "HAS_BIAS": True,
            "HAS_STATE": False,
            "HAS_POSITIONS": True,
            "HAS_SILU": True,
            "WIDE": "tl.float32",
        },
        divisible_by_16=[*values, *wide, "p_positions"]
        + (["D", "L", "stride_b", "stride_l"] if aligned else []),
        num_warps=1,
    )
    assert built.spill_bytes == 0
    assert built.registers <= registers
    if aligned:
        body = max(built.loops, key=len)
        assert built.count("SHFL") == built.count("BAR") == built.count("LDS") == 0
        # One exponential and one reciprocal an element; one load a row and position, two in the backward.
        assert built.count("MUFU", body) == 2 * walk.rows * kernels.CHANNELS // 32
        assert built.count("LDG", body) == walk.rows * (2 if is_forward else 3)
