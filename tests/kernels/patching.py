"""What the tests of patch ops share: random patches, rules and cases, and a run of an op's own code without values."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from oracle import on_face, position_ids_of, random_documents
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from weft.kernels.entropy_patching import (
    Patches,
    decoder_block_mask,
    encoder_block_mask,
    patch_boundaries,
    patch_decoder_attention,
    patch_encoder_attention,
)
from weft.kernels.faces import use_kernels

DIRECTIONS = ["encoder", "decoder"]


def random_patches(
    total: int, documents: int = 3, max_patches: int | None = None, seed: int = 0, **options: Any
) -> Patches:
    """Entropy patches of random documents, with some room to spare unless told otherwise."""
    borders = random_documents(total, documents, seed)
    entropy = torch.rand(total, generator=torch.Generator().manual_seed(seed))
    options = {"threshold": 0.7, **options}
    return patch_boundaries(
        position_ids_of(borders, total), max_patches or total + 3, entropy=entropy, **options
    )


class LaunchRecorder:
    """Stands for a Triton kernel: takes every launch, runs none."""

    def __init__(self) -> None:
        self.launches = 0

    def __getitem__(self, grid: object) -> Callable[..., None]:
        def launch(*arguments: object, **constants: object) -> None:
            self.launches += 1

        return launch


def launches_without_values(
    patch: pytest.MonkeyPatch, kernels: ModuleType, op: Any, arguments: tuple[Any, ...]
) -> int:
    """Run the code of a custom op on its Triton face with tensors that hold nothing; gives the launches.

    Anything that would wait for a GPU (`item`, `tolist`, `nonzero`, a boolean mask) raises here.
    """
    recorders = []
    for name in [name for name in vars(kernels) if name.endswith("_kernel")]:
        recorders.append(LaunchRecorder())
        patch.setattr(kernels, name, recorders[-1])
    with FakeTensorMode() as mode, use_kernels("triton"):
        op._init_fn(*(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in arguments))
    return sum(recorder.launches for recorder in recorders)


def to_cpu(patches: Patches) -> Patches:
    return Patches(*(tensor.cpu() for tensor in patches))


def options_of(
    scheme: str, total: int, seed: int = 0, max_length: int | None = None
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {"scheme": scheme, "max_length": max_length}
    if scheme in ("entropy", "rise", "both"):
        options["entropy"] = 2 * torch.rand(total, generator=generator)
    if scheme in ("entropy", "both"):
        options["threshold"] = 1.3
    if scheme in ("rise", "both"):
        options["rise"] = 0.2
    if scheme == "stride":
        options["stride"] = 4
    if scheme == "space":
        options["tokens"] = torch.randint(0, 260, (total,), generator=generator)
    return options


def moved(options: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {key: x.to(device) if isinstance(x, Tensor) else x for key, x in options.items()}


def assert_same(found: Patches, expected: Patches) -> None:
    for name, one, other in zip(Patches._fields, found, expected, strict=True):
        assert one.dtype == other.dtype, name
        assert torch.equal(one.cpu(), other), name


class AttentionCase:
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
        self.tables: tuple[Tensor, ...] = (self.patches.decoder_ids,)
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


def run_attention(
    case: AttentionCase,
    face: str,
    tensors: tuple[Tensor, ...] | None = None,
    grad: Tensor | None = None,
) -> list[Tensor]:
    with on_face(face) as device:
        leaves = [x.detach().to(device).requires_grad_() for x in tensors or case.tensors]
        out = case.attend(*leaves)
        out.backward((case.grad if grad is None else grad).to(device))
    assert all(leaf.grad is not None and leaf.grad.dtype == out.dtype for leaf in leaves)
    return [out.detach().cpu(), *(leaf.grad.cpu() for leaf in leaves if leaf.grad is not None)]


def rows(count: int, *shape: int, **options: Any) -> Tensor:
    return torch.zeros(count, *(shape or (2, 3)), **options)


def ints(*values: int) -> Tensor:
    return torch.tensor(values).int()
