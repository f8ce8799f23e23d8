"""Values stay on the device until a flush, which fetches them in one copy."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from weft.trainer.metrics.accumulator import MetricsAccumulator


class CountOperations(TorchDispatchMode):
    """Names of all tensor operations, reads of a single value among them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_add_runs_nothing_and_flush_stacks_once_a_type() -> None:
    accumulator = MetricsAccumulator()
    losses = [torch.tensor(float(i)) for i in range(8)]
    counts = [torch.tensor([i * 2**40]) for i in range(8)]
    with CountOperations() as operations:
        for step in range(8):
            accumulator.add(step, {"loss": losses[step], "count": counts[step], "lr": 0.1})
        assert operations.names == []
        records = accumulator.flush()
    assert operations.names.count("stack") == 2
    assert "_local_scalar_dense" not in operations.names
    assert records == [
        {"step": i, "loss": float(i), "count": i * 2**40, "lr": 0.1} for i in range(8)
    ]
    assert list(records[0]) == ["step", "loss", "count", "lr"]


def test_steps_may_have_different_values_and_a_flush_forgets() -> None:
    accumulator = MetricsAccumulator()
    accumulator.add(1, {"a": torch.tensor(1.5, requires_grad=True)})
    accumulator.add(2, {"b": torch.tensor(2.5, dtype=torch.float64), "c": 3})
    assert len(accumulator) == 2
    assert accumulator.flush() == [{"step": 1, "a": 1.5}, {"step": 2, "b": 2.5, "c": 3}]
    assert accumulator.flush() == []
