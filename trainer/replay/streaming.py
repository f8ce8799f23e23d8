"""Networks that are larger than memory: each block's weights are read from a checkpoint when they are needed, and dropped.

Every parameter is a tensor with an empty storage, which is filled before its block runs, and again before its block is recomputed
for the backward pass. What stands outside of blocks (embeddings, head) stays. Memory: that, two blocks at the most (one is still
there while the next is read), the input of every block, and the activations inside one.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...models.batch import PackedBatch
from ...models.errors import CheckpointError
from ...models.task import LossOutput, Task
from ..base_weights import weights_digest
from ..checkpoint.layout import StoredTensor
from ..checkpoint.reading import find_checkpoint, read_manifest, read_range
from ..configuration.schema import TrainingConfig
from ..seeding import seed_micro_batch
from .parameters import ParameterReport, named_parameters, weight_report
from .statistics import is_backward

__all__ = ["StreamedNetworks"]


class StreamedNetworks:
    """Forward and backward of one step out of a checkpoint; nothing can be updated.

    Args:
        path: the checkpoint, already verified.

    Attributes:
        peak_bytes: the most bytes of weights that were held at a time.
        count_of: which global count divides each sum that `forward_backward` gave so far.

    Raises:
        CheckpointError: a parameter is not in the checkpoint, or has another shape.
    """

    def __init__(
        self, task: Task, config: TrainingConfig, path: Path, device: torch.device
    ) -> None:
        self.task, self.device, self.seed = task, device, config.run.seed
        self._compute = config.precision.compute
        with torch.device("meta"):
            self.networks = task.build_networks()
        self._places = self._find_places(path)
        self._empty_parameters()
        self.reports: dict[str, ParameterReport] = {}
        self.count_of: dict[str, str] = {}
        self.peak_bytes = self._held_bytes = 0
        self._gradients = _FileGradients()
        self._is_single = True
        self._loaded: nn.Module | None = None
        self._names = {id(p): n for n, p in named_parameters(self.networks).items()}
        blocks = task.blocks(self.networks)
        for block in blocks:
            self._stream(block)
        inside = {id(p) for block in blocks for p in block.parameters()}
        for parameter in named_parameters(self.networks).values():
            if id(parameter) not in inside:
                self._read(parameter)
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._take_gradient)

    def forward_backward(
        self, phase: str, micro_batches: Sequence[PackedBatch], counts: Mapping[str, int]
    ) -> dict[str, Tensor]:
        """See `Engine.forward_backward`. Gradients are measured into `reports` and dropped."""
        self._is_single = len(micro_batches) == 1
        sums: dict[str, Tensor] = {}
        with self._gradients:
            for batch in micro_batches:
                seed_micro_batch(self.seed, batch.sample_ids[0])
                with self._autocast():
                    output = self.task.losses(self.networks, batch.to(self.device), phase)
                objective = sum(
                    t.weight * t.total.float() / (counts[t.count] or 1)
                    for t in output.terms.values()
                )
                objective.backward()  # type: ignore[union-attr]
                self._drop()
                for name, term in {**output.terms, **output.metrics}.items():
                    self.count_of[name] = term.count
                    total = term.total.detach().float()
                    sums[name] = sums[name] + total if name in sums else total
            for name in self._gradients.names():
                self.reports[name].take_gradient(self._gradients.get(name))
        return sums

    @torch.no_grad()
    def evaluate(self, batch: PackedBatch) -> LossOutput:
        """Losses of one batch without gradients."""
        with self._autocast():
            return self.task.losses(self.networks, batch.to(self.device))

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self._compute == "fp32":
            return contextlib.nullcontext()
        # Its cache would keep a bf16 copy of every block.
        return torch.autocast(self.device.type, dtype=torch.bfloat16, cache_enabled=False)

    def _empty_parameters(self) -> None:
        groups = self.task.parameter_groups(self.networks)
        frozen = {n for g in groups if g.algorithm == "frozen" for n in g.parameters}
        made: dict[int, nn.Parameter] = {}
        names = {id(p): n for n, p in named_parameters(self.networks).items()}
        for network in self.networks.values():
            for module in network.modules():
                for name, old in module._parameters.items():
                    if old is None:
                        continue
                    if id(old) not in made:
                        logical = names[id(old)]
                        self._check(logical, old)
                        new = nn.Parameter(
                            torch.empty(old.shape, device=self.device), logical not in frozen
                        )
                        new.untyped_storage().resize_(0)
                        made[id(old)] = new
                    module._parameters[name] = made[id(old)]

    def _find_places(self, path: Path) -> dict[str, tuple[Path, StoredTensor]]:
        """Folder and entry of each parameter: in the run's checkpoint, or in that of another run where its weights stay."""
        manifest = read_manifest(path)
        found = {
            name.removeprefix("parameters/"): (path, stored)
            for name, stored in manifest.tensors.items()
            if name.startswith("parameters/")
        }
        known = manifest.state.get("base_weights", {})
        for base in self.task.base_weights(self.networks):
            if not base.stays_there:
                continue
            source = find_checkpoint(Path(base.source))
            if source is None:
                raise CheckpointError(f"{base.key}: {base.source} holds no complete checkpoint")
            theirs = read_manifest(source)
            if weights_digest(theirs, base.parameters) != known.get(base.key):
                raise CheckpointError(
                    f"{base.key} holds other weights than this run was trained with; point it to those"
                )
            for ours, name in base.parameters.items():
                if f"parameters/{name}" in theirs.tensors:
                    found[ours] = (source, theirs.tensors[f"parameters/{name}"])
        return found

    def _check(self, name: str, parameter: Tensor) -> None:
        stored = self._places[name][1] if name in self._places else None
        if stored is None or stored.shape != tuple(parameter.shape):
            found = "nothing" if stored is None else f"shape {list(stored.shape)}"
            raise CheckpointError(
                f"the checkpoint holds {found} for {name}, which has shape {list(parameter.shape)}; "
                "is the model section the one it was saved with?"
            )

    def _stream(self, block: nn.Module) -> None:
        forward = block.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            self._load(block)
            return forward(*args, **kwargs)

        def streamed(*args: Any, **kwargs: Any) -> Any:
            output = checkpoint(run, *args, use_reentrant=False, **kwargs)
            if not is_backward():
                self._drop()
            return output

        block.forward = streamed  # type: ignore[method-assign]

    def _load(self, block: nn.Module) -> None:
        if self._loaded is block:
            return
        # Backward passes run in the order of the blocks, so the one that was loaded is done with.
        self._drop()
        for parameter in block.parameters():
            self._read(parameter)
        self._loaded = block

    def _drop(self) -> None:
        if self._loaded is not None:
            for parameter in self._loaded.parameters():
                self._held_bytes -= parameter.untyped_storage().nbytes()
                parameter.untyped_storage().resize_(0)
        self._loaded = None

    def _read(self, parameter: nn.Parameter) -> None:
        name = self._names[id(parameter)]
        parameter.untyped_storage().resize_(parameter.numel() * parameter.element_size())
        # `.data` has a version counter of its own: to autograd the weights are the same as ever.
        flat = parameter.data.view(-1)
        read_range(*self._places[name], 0, flat)
        self._held_bytes += parameter.untyped_storage().nbytes()
        self.peak_bytes = max(self.peak_bytes, self._held_bytes)
        if name not in self.reports:
            self.reports[name] = weight_report(name, parameter.data)

    def _take_gradient(self, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        name = self._names[id(parameter)]
        if self._is_single:
            self.reports[name].take_gradient(gradient)
        else:
            self._gradients.add(name, gradient)


class _FileGradients:
    """Sums of gradients over micro-batches, in files that are mapped: the system may write them out when memory is short."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> _FileGradients:
        self._folder = tempfile.TemporaryDirectory(prefix="weft-gradients-")
        return self

    def __exit__(self, *exception: object) -> None:
        self._sums.clear()
        assert self._folder is not None
        self._folder.cleanup()

    def names(self) -> list[str]:
        return list(self._sums)

    def get(self, name: str) -> Tensor:
        return self._sums[name]

    def add(self, name: str, gradient: Tensor) -> None:
        """Dense gradients are summed on the CPU; row-sparse ones keep their rows only."""
        if gradient.is_sparse:
            held = self._sums.get(name)
            self._sums[name] = gradient if held is None else (held + gradient).coalesce()
            return
        if name not in self._sums:
            assert self._folder is not None
            path = Path(self._folder.name) / str(len(self._sums))
            size = gradient.numel()
            mapped = torch.from_file(str(path), shared=True, size=size, dtype=torch.float32)
            self._sums[name] = mapped.view(gradient.shape).zero_()
        self._sums[name] += gradient.to("cpu", torch.float32)
