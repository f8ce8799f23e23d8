"""What a run's model costs, counted alike for every family, from its configuration alone; imports no torch.

The FLOPs and sizes that the paper of the Byte Latent Transformer compares (arXiv 2412.09871, equations 13 to 17) leave out its entropy
model and its hashed tables; here both stand beside the rest. Two hooks are asked for, and a family without them needs none:

- `forward_flops_per_byte(context_bytes, patch_size)` of a model section: FLOPs of a forward pass by part. Other families' are
  taken from `flops_per_token`.
- `takes_model_of` of any section in it: keys that hold another run's model, frozen here; its part of the FLOPs has the name of
  the key that names that run. With `is_inside` it is a part of the model, which counts it by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ...models.section import Section

__all__ = ["Costs", "model_costs"]

TABLES = "_tables"
"""Ends the names of parts that are looked up and never multiplied."""


@dataclass(frozen=True)
class Costs:
    """Parameters and FLOPs of a model.

    Attention is counted over the keys that the causal mask leaves; lookups are free; a backward pass costs two forward passes; a
    frozen model has none.

    Args:
        parameters: without tables and auxiliary models.
        table_parameters: of hashed tables.
        auxiliary_parameters: of other runs' models that this one calls.
        forward: FLOPs of a forward pass of the model for a byte, or for a token where `per_byte` is false.
        auxiliary: the same of its auxiliary models.
        per_byte: whether ids have bytes, so that FLOPs are known a byte.
    """

    parameters: int
    table_parameters: int
    auxiliary_parameters: int
    forward: float
    auxiliary: float
    per_byte: bool

    @property
    def training(self) -> float:
        """Training FLOPs, auxiliary models included."""
        return 3 * self.forward + self.auxiliary

    @property
    def inference(self) -> float:
        """Inference FLOPs, auxiliary models included."""
        return self.forward + self.auxiliary

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, with what follows from the rest."""
        return {
            **asdict(self),
            "training": self.training,
            "training_without_auxiliary": 3 * self.forward,
            "inference": self.inference,
            "inference_without_auxiliary": self.forward,
        }


def model_costs(
    model: Any,
    sequence_length: int,
    *,
    bytes_per_token: float | None,
    patch_size: float | None = None,
) -> Costs:
    """Costs of a model.

    Args:
        model: its configuration section, with `count_parameters` and `flops_per_token`.
        sequence_length: positions of a sample.
        bytes_per_token: raw bytes that an id stands for on average; None where that is not known.
        patch_size: mean bytes a patch, as measured; None is what the configuration expects.
    """
    counts = model.count_parameters()
    tables = sum(count for name, count in counts.items() if name.endswith(TABLES))
    others = dict(_auxiliary_models(model))
    if hasattr(model, "forward_flops_per_byte"):
        parts = model.forward_flops_per_byte(sequence_length, patch_size or model.patch_size)
        auxiliary = sum(parts.pop(name, 0.0) for name in others)
        forward = sum(parts.values())
    else:
        auxiliary = sum(_forward_per_token(other, sequence_length) for other in others.values())
        forward = _forward_per_token(model, sequence_length)
    # Special ids cost like others and stand for no byte.
    share = bytes_per_token or 1.0
    return Costs(
        parameters=sum(counts.values()) - tables,
        table_parameters=tables,
        auxiliary_parameters=sum(sum(m.count_parameters().values()) for m in others.values()),
        forward=forward / share,
        auxiliary=auxiliary / share,
        per_byte=bytes_per_token is not None,
    )


def _forward_per_token(model: Any, sequence_length: int) -> float:
    """A third of the training FLOPs, with attention over as many keys as a causal position sees on average."""
    seen = min(sequence_length, getattr(model, "window", None) or sequence_length)
    return float(model.flops_per_token((seen + 1) // 2)) / 3


def _auxiliary_models(section: Section) -> Iterator[tuple[str, Any]]:
    """(key that names the run, model section) of other runs' models in a section and in those below it."""
    borrowed: dict[str, str] = getattr(section, "takes_model_of", {})
    for key in type(section).model_fields:
        value = getattr(section, key)
        if key in borrowed and value is not None:
            if not getattr(section, "is_inside", False):
                yield borrowed[key], value
        elif isinstance(value, Section):
            yield from _auxiliary_models(value)
