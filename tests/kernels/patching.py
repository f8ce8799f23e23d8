"""What the tests of patch ops share: random patches, and a run of an op's own code where no value exists."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from oracle import position_ids_of, random_documents
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from weft.kernels.entropy_patching import Patches, patch_boundaries
from weft.kernels.faces import use_kernels


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
