"""The selective scan as an op: registration, compilation, checkpointing, what is kept; and inside transformers' Mamba."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from oracle import ALL_FACES, FAST_FACES, assert_close, needs_triton, on_face
from test_selective_scan import NAMES, assert_same, expected, make, positions, results, run, weights
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from weft.kernels.faces import use_kernels
from weft.kernels.selective_scan import selective_scan
from weft.kernels.selective_scan.reference import SPACING

FORWARD = torch.ops.weft.selective_scan_forward.default


def arguments_of_op(tensors: dict[str, Tensor], **options: Any) -> tuple[Any, ...]:
    four = {name: tensors[name].unsqueeze(2) for name in "BC"}
    given = {**dict.fromkeys(NAMES), **tensors, **four}
    starts = options.get("starts")
    head = tuple(given[name] for name in NAMES[:-1])
    return (*head, starts, given["initial_state"], True, options.get("keep", True))


@pytest.mark.parametrize("face", FAST_FACES)
@pytest.mark.parametrize("absent", [(), ("D", "z", "delta_bias", "initial_state")])
def test_opcheck(face: str, absent: tuple[str, ...]) -> None:
    with on_face(face) as device:
        tensors = make(1, 3, 2, 1, absent=absent, dtype=torch.float32)
        given = {k: x.to(device).requires_grad_() for k, x in tensors.items()}
        starts = torch.tensor([[False, True, False]], device=device)
        torch.library.opcheck(FORWARD, arguments_of_op(given, starts=starts))


@pytest.mark.parametrize("face", ["cpu", "reference"])
@pytest.mark.parametrize("documents", ["position_ids", "cu_seqlens", None])
def test_compiles_whole(face: str, documents: str | None) -> None:
    tensors = make(2, 20, 3, 2, dtype=torch.float32)
    borders = torch.tensor([0, 7, 20, 21, 40], dtype=torch.int32)
    known = {"position_ids": positions(2, 20), "cu_seqlens": borders, None: None}
    options = {} if documents is None else {documents: known[documents]}

    def scan(**given: Tensor) -> Any:
        return selective_scan(**given, **options, delta_softplus=True, return_final_state=True)

    torch.compiler.reset()
    with use_kernels(face):
        eager = results(scan, tensors, torch.device("cpu"))
        compiled = torch.compile(scan, fullgraph=True, backend="aot_eager")
        assert_same(results(compiled, tensors, torch.device("cpu")), eager, 1e-6)


@needs_triton
def test_too_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from weft.kernels.selective_scan import triton

    monkeypatch.setattr(triton, "MAX_GRID", 1)
    with (
        on_face("triton") as device,
        pytest.raises(ValueError, match="u has 2 rows of 1 groups, the GPU takes at most 1"),
    ):
        selective_scan(**{k: x.to(device) for k, x in make(2, 1, 1, 1).items()})


def test_face_is_picked_when_it_runs() -> None:
    """A compiled graph follows `use_kernels`, forward and backward; states of one face do for another."""
    tensors = make(1, SPACING + 3, 3, 2)
    compiled = torch.compile(
        functools.partial(selective_scan, return_final_state=True), backend="aot_eager"
    )
    wanted = expected(tensors)
    for face in ("cpu", "reference"):
        with use_kernels(face):
            given = {k: x.clone().requires_grad_() for k, x in tensors.items()}
            out, final = compiled(**given)
        with use_kernels("reference" if face == "cpu" else "cpu"):
            ((out * weights(out, 1)).sum() + (final * weights(final, 2)).sum()).backward()
        assert_close(given["A"].grad, wanted["dA"], 1e-12)


def save_scans(ctx: Any, op: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op == FORWARD else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize(
    "options",
    [
        {"use_reentrant": False},
        {
            "use_reentrant": False,
            "context_fn": functools.partial(create_selective_checkpoint_contexts, save_scans),
        },
        {"use_reentrant": True},
    ],
    ids=["plain", "selective", "reentrant"],
)
def test_activation_checkpointing(options: dict[str, Any]) -> None:
    tensors = make(2, 20, 3, 2, dtype=torch.float32)
    names = list(tensors)

    def scan(*given: Tensor) -> Any:
        arguments = dict(zip(names, given, strict=True))
        arguments["u"] = arguments["u"].sin()
        return selective_scan(**arguments, delta_softplus=True, return_final_state=True)

    def kept(**given: Tensor) -> Any:
        return scan(*given.values())

    def repeated(**given: Tensor) -> Any:
        return checkpoint(scan, *given.values(), **options)

    device = torch.device("cpu")
    assert_same(results(repeated, tensors, device), results(kept, tensors, device), 0)


class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """The states that forward ops gave."""

    def __init__(self) -> None:
        super().__init__()
        self.states: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func == FORWARD:
            self.states.append(result[2])
        return result


@pytest.mark.parametrize("face", ALL_FACES)
def test_states_are_kept_for_gradients_only(face: str) -> None:
    tensors = make(1, SPACING + 1, 2, 2, absent=("initial_state",))
    with on_face(face) as device, Recorder() as recorder:
        given = {k: x.to(device) for k, x in tensors.items()}
        selective_scan(**given)
        with torch.no_grad():
            selective_scan(**{**given, "u": given["u"].clone().requires_grad_()})
        selective_scan(**{**given, "u": given["u"].clone().requires_grad_()})
    assert [x.numel() for x in recorder.states] == [0, 0, 3 * 2 * 2]


def test_what_is_saved() -> None:
    """The inputs as they are, and the states: nothing of the size of L * D * N."""
    given = {k: x.requires_grad_() for k, x in make(1, 40, 4, 8, dtype=torch.float32).items()}
    saved: list[Tensor] = []

    def remember(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda x: x):
        selective_scan(**given)
    storages = {x.untyped_storage().data_ptr() for x in given.values()}
    new = [x for x in saved if x.untyped_storage().data_ptr() not in storages]
    assert [x.shape for x in new] == [(1, 4, 1, 8, 4)]


@pytest.fixture
def mamba() -> Iterator[Any]:
    module = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    if not hasattr(module, "mamba_selective_scan"):
        pytest.skip("this transformers has no mamba_selective_scan")
    return module


def in_transformers_layout(
    hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **options: Any
) -> Any:
    """`selective_scan` behind the signature of transformers, which has channels before positions."""
    z = options.get("z")
    out, final = selective_scan(
        *(hidden_states.mT, dt.mT, A, B.mT, C.mT),
        D=options.get("D"),
        z=None if z is None else z.mT,
        delta_bias=options.get("delta_bias"),
        delta_softplus=options.get("delta_softplus", False),
        return_final_state=True,
    )
    return (out.mT, final) if options.get("return_last_state") else out.mT


def test_matches_transformers_scan(mamba: Any) -> None:
    tensors = make(2, 37, 5, 4, absent=("initial_state",))

    def theirs(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, **rest: Tensor) -> Any:
        rest["z"] = rest["z"].mT
        out, final = mamba.mamba_selective_scan(
            *(u.mT, delta.mT, A, B.mT, C.mT),
            **rest,
            delta_softplus=True,
            return_last_state=True,
        )
        return out.mT, final

    # Their input matrix goes through fp32 whatever it was.
    assert_same(run("cpu", tensors, delta_softplus=True), results(theirs, tensors, torch.device("cpu")), 1e-6)  # fmt: skip


def test_matches_transformers_model(mamba: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole Mamba language model: logits and every gradient."""
    config = mamba.MambaConfig(
        vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=2, use_mambapy=False
    )
    torch.manual_seed(0)
    model = mamba.MambaForCausalLM(config)
    tokens = torch.randint(0, 50, (2, 30))

    def outcome() -> dict[str, Tensor]:
        model.zero_grad()
        logits = model(tokens, use_cache=False).logits
        (logits * weights(logits, 1).float()).sum().backward()
        return {"logits": logits.detach(), **{k: p.grad for k, p in model.named_parameters()}}

    wanted = outcome()
    calls = []

    def ours(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return in_transformers_layout(*args, **kwargs)

    monkeypatch.setattr(mamba, "mamba_selective_scan", ours)
    found = outcome()
    assert len(calls) == 2
    assert_same(found, wanted, 2e-5)
