"""The same micro-batch by the kernels that would run and by their definitions, module by module."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.faces import pick_face, use_kernels
from .statistics import Visitor, float_tensors, visit_modules

__all__ = ["KernelDifference", "compare_kernels"]


@dataclass
class KernelDifference:
    """Norm of the difference over the norm of the reference, of a module's output and of the gradient that came back to it.

    Later modules inherit what earlier ones differ in: the first that differs is where to look.
    """

    name: str
    kind: str
    output: float = 0.0
    gradient: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class _Recorder(Visitor):
    """Keeps every module's output and gradient on the CPU."""

    def __init__(self) -> None:
        self.outputs: dict[str, list[Tensor]] = defaultdict(list)
        self.gradients: dict[str, list[Tensor]] = defaultdict(list)
        self.kinds: dict[str, str] = {}

    def enter(self, name: str, module: nn.Module) -> None:
        self.kinds.setdefault(name, type(module).__name__)

    def output(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        self.outputs[name] += [t.detach().to("cpu", copy=True) for t in float_tensors(output)]

    def gradient(self, name: str, module: nn.Module, grad_input: Any, grad_output: Any) -> None:
        self.gradients[name] += [
            t.detach().to("cpu", copy=True) for t in float_tensors(grad_output)
        ]


def compare_kernels(
    networks: Mapping[str, nn.Module], run: Callable[[], Any], device: torch.device
) -> tuple[str, list[KernelDifference]]:
    """Run twice and compare.

    Args:
        run: forward and backward of one micro-batch; gradients it leaves are dropped.
        device: that the kernels run on.

    Returns:
        The kernels that would run, and every module in order of execution.
    """
    recorders = []
    for face in ("auto", "reference"):
        recorder = _Recorder()
        with use_kernels(face), visit_modules(networks, recorder):
            chosen = pick_face(torch.empty(0, device=device))
            run()
        recorders.append((chosen, recorder))
        for network in networks.values():
            network.zero_grad(set_to_none=True)
    (face, ours), (_, reference) = recorders
    found = [
        KernelDifference(
            name,
            kind,
            _distance(ours.outputs[name], reference.outputs[name]),
            _distance(ours.gradients[name], reference.gradients[name]),
        )
        for name, kind in reference.kinds.items()
    ]
    return face, found


def _distance(ours: list[Tensor], reference: list[Tensor]) -> float:
    distance = size = 0.0
    for a, b in zip(ours, reference, strict=True):
        distance += float((a.double() - b.double()).square().sum())
        size += float(b.double().square().sum())
    if distance == 0:
        return 0.0
    return (distance / size) ** 0.5 if size else float("inf")
