"""What ops ask before they choose a path: the type that autocast gives, also of a trace."""

from __future__ import annotations

import torch
from torch import Tensor
from weft.kernels.faces import autocast_dtype


def test_type_of_autocast() -> None:
    x = torch.ones(2)
    assert autocast_dtype(x) is None
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            assert autocast_dtype(x) == dtype
            assert autocast_dtype(x.to("meta")) is None
            with torch.autocast("cpu", enabled=False):
                assert autocast_dtype(x) is None


def test_a_compiler_traces_the_question_without_a_break() -> None:
    @torch.compile(fullgraph=True, backend="eager")
    def cast(x: Tensor) -> Tensor:
        return x.to(autocast_dtype(x) or x.dtype)

    x = torch.ones(2)
    assert cast(x).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert cast(x).dtype == torch.bfloat16
