"""Statistics of tensors and of modules, gathered by hooks while a step runs.

Hooks see values and never change them. A forward that recomputation runs a second time is not counted again.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

__all__ = [
    "ModuleStatistics",
    "NonFinite",
    "StatisticsVisitor",
    "TensorStatistics",
    "Visitor",
    "float_tensors",
    "is_backward",
    "visit_modules",
]

_EXPECTED_WARNINGS = (
    # A network that returns a dictionary of losses has no gradient of its own to show.
    "For backward hooks to be called",
    # Embeddings take ids.
    "Full backward hook is firing",
)


@dataclass
class TensorStatistics:
    """Moments of all elements that were added; those that are not finite are counted and otherwise left out."""

    count: int = 0
    non_finite: int = 0
    zeros: int = 0
    mean: float = 0.0
    abs_max: float = 0.0
    squares: float = 0.0
    """Sum of squared distances from the mean."""

    def add(self, tensor: Tensor) -> None:
        """Take in all elements of a tensor; of a sparse one, those of the rows it has."""
        values = tensor.detach()
        values = (values.coalesce().values() if values.is_sparse else values).float().reshape(-1)
        self.count += values.numel()
        finite = torch.isfinite(values)
        if not finite.all():
            values = values[finite]
            self.non_finite += finite.numel() - values.numel()
        if not values.numel():
            return
        self.zeros += values.numel() - int(values.count_nonzero())
        self.abs_max = max(self.abs_max, float(values.abs().max()))
        variance, mean = torch.var_mean(values, correction=0)
        before, now = self.count - self.non_finite - values.numel(), values.numel()
        distance = float(mean) - self.mean
        # Chan, Golub, LeVeque 1979: joining moments of parts without a second pass.
        self.squares += float(variance) * now + distance**2 * before * now / (before + now)
        self.mean += distance * now / (before + now)

    @property
    def std(self) -> float:
        finite = self.count - self.non_finite
        return math.sqrt(self.squares / finite) if finite else 0.0

    @property
    def zero_fraction(self) -> float:
        return self.zeros / self.count if self.count else 0.0

    def to_dict(self) -> dict[str, float | int]:
        return {
            "count": self.count,
            "mean": self.mean,
            "std": self.std,
            "abs_max": self.abs_max,
            "zero_fraction": self.zero_fraction,
            "non_finite": self.non_finite,
        }


@dataclass
class ModuleStatistics:
    """One module: what it put out, and the gradient that came back to it."""

    name: str
    kind: str
    output: TensorStatistics = field(default_factory=TensorStatistics)
    gradient: TensorStatistics = field(default_factory=TensorStatistics)

    @property
    def depth(self) -> int:
        """0 for a network."""
        return self.name.count(".")

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": self.kind,
            "output": self.output.to_dict(),
            "gradient": self.gradient.to_dict(),
        }


@dataclass(frozen=True)
class NonFinite:
    """The first module that made a value which is not finite out of finite ones.

    Args:
        where: `forward` or `backward`.
        own: no submodule of it did: its own computation, or a parameter it uses directly.
        parameters: those of its own, or of its submodules, that hold such values.
    """

    module: str
    where: str
    own: bool
    parameters: tuple[str, ...] = ()


class Visitor:
    """Sees every module's values; override what is wanted."""

    def enter(self, name: str, module: nn.Module) -> None:
        """Before a forward."""

    def output(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        """After a forward; `inputs` is (args, kwargs)."""

    def gradient(self, name: str, module: nn.Module, grad_input: Any, grad_output: Any) -> None:
        """After a module's backward, parameters aside."""


def float_tensors(values: Any) -> list[Tensor]:
    """Floating tensors anywhere in nested tuples, lists and dictionaries."""
    return [t for t in tree_leaves(values) if isinstance(t, Tensor) and t.is_floating_point()]


def is_backward() -> bool:
    """Whether autograd is running a backward pass on this thread."""
    return torch._C._current_graph_task_id() != -1


@contextlib.contextmanager
def visit_modules(networks: Mapping[str, nn.Module], visitor: Visitor) -> Iterator[None]:
    """Show a visitor every module of the networks, called `NETWORK.dotted.name`.

    An exception that leaves a forward gets a note that names the innermost module. What the visitor computes is not recorded for
    autograd: inside a recomputed block it would count as part of the block.
    """
    handles: list[Any] = []
    running: list[str] = []
    for network, root in networks.items():
        for dotted, module in root.named_modules():
            handles += _hook(f"{network}.{dotted}".rstrip("."), module, visitor, running)
    try:
        with warnings.catch_warnings():
            for message in _EXPECTED_WARNINGS:
                warnings.filterwarnings("ignore", message=message)
            yield
    except Exception as error:
        if running:
            error.add_note(f"in module {running[-1]}")
        raise
    finally:
        for handle in handles:
            handle.remove()


def _hook(name: str, module: nn.Module, visitor: Visitor, running: list[str]) -> list[Any]:
    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        if not is_backward():
            running.append(name)
            with torch.no_grad():
                visitor.enter(name, module)

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not is_backward():
            with torch.no_grad():
                visitor.output(name, module, (args, kwargs), output)
            running.pop()

    def backward(module: nn.Module, grad_input: Any, grad_output: Any) -> None:
        with torch.no_grad():
            visitor.gradient(name, module, grad_input, grad_output)

    return [
        module.register_forward_pre_hook(enter, with_kwargs=True),
        module.register_forward_hook(leave, with_kwargs=True),
        module.register_full_backward_hook(backward),
    ]


Stop = Callable[[nn.Module, Any, Any], None]


class StatisticsVisitor(Visitor):
    """Statistics by module in order of execution, and the first module that made a value that is not finite.

    Args:
        on_failure: called with (module, inputs, outputs), or with (module, output gradients, input gradients), at the module
            that is to blame.
        break_at: called with (module, inputs, outputs) after the forward of the module of this name.
    """

    def __init__(
        self,
        on_failure: Stop | None = None,
        break_at: str | None = None,
        on_break: Stop | None = None,
    ) -> None:
        self.modules: dict[str, ModuleStatistics] = {}
        self.first: NonFinite | None = None
        self.first_bad_gradient: str | None = None
        self._on_failure, self._break_at, self._on_break = on_failure, break_at, on_break

    def enter(self, name: str, module: nn.Module) -> None:
        self.modules.setdefault(name, ModuleStatistics(name, type(module).__name__))

    def output(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        tensors = float_tensors(output)
        for tensor in tensors:
            self.modules[name].output.add(tensor)
        # Inner modules end first, so the first one to blame is the innermost.
        if self.first is None and _is_bad(tensors) and not _is_bad(float_tensors(inputs)):
            self._blame(name, module, "forward", inputs, output)
        if name == self._break_at and self._on_break is not None:
            self._on_break(module, inputs, output)

    def gradient(self, name: str, module: nn.Module, grad_input: Any, grad_output: Any) -> None:
        received, passed_on = float_tensors(grad_output), float_tensors(grad_input)
        for tensor in received:
            self.modules[name].gradient.add(tensor)
        if self.first is not None and self.first.where == "forward":
            return
        if self.first is None and _is_bad(passed_on) and not _is_bad(received):
            self._blame(name, module, "backward", grad_output, grad_input)
        if self.first_bad_gradient is None and _is_bad(received):
            self.first_bad_gradient = name

    def _blame(self, name: str, module: nn.Module, where: str, came: Any, went: Any) -> None:
        bad = tuple(
            f"{name}.{dotted}"
            for dotted, parameter in module.named_parameters()
            if parameter.untyped_storage().size() and not torch.isfinite(parameter).all()
        )
        has_children = next(module.children(), None) is not None
        self.first = NonFinite(name, where, has_children, bad)
        if self._on_failure is not None:
            self._on_failure(module, came, went)


def _is_bad(tensors: list[Tensor]) -> bool:
    return any(not torch.isfinite(t).all() for t in tensors)
