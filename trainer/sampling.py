"""From logits to the next id: greedy, temperature, top-k and top-p, reproducible row by row.

Each row draws from a generator of its own, and its number picks a place on the cumulative distribution
in the order of the vocabulary. So what a prompt gives depends on neither its batch nor its neighbours.
B rows, V vocabulary.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.errors import ConfigError

__all__ = ["Sampling", "filter_probabilities", "pick_ids", "row_generator"]


@dataclass(frozen=True)
class Sampling:
    """How ids are chosen.

    Args:
        temperature: 0 takes the likeliest id.
        top_p: keep the fewest likeliest ids whose probabilities add up to this.
        top_k: keep this many of the likeliest ids; None keeps all. Applied before `top_p`.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ConfigError(
                f"temperature {self.temperature} is negative; 0 is greedy, 1 the model's own"
            )
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top-p {self.top_p} is not in (0, 1]; 1 keeps everything")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top-k {self.top_k} keeps nothing; give 1 or more")


def row_generator(seed: int, prompt: str, occurrence: int) -> torch.Generator:
    """The random numbers of one prompt; `occurrence` tells equal prompts of a call apart."""
    digest = hashlib.sha256(f"{seed}/{occurrence}/".encode() + prompt.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def filter_probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """(B, V) fp64 probabilities after temperature, top-k and top-p, each row summing to 1."""
    scaled = logits.double() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        kept = scaled.topk(sampling.top_k, dim=-1).indices
        mask = torch.ones_like(scaled, dtype=torch.bool).scatter_(-1, kept, False)
        scaled = scaled.masked_fill(mask, -torch.inf)
    probabilities = scaled.softmax(dim=-1)
    if sampling.top_p < 1:
        ordered, places = probabilities.sort(dim=-1, descending=True, stable=True)
        # An id stays while what is likelier than it has not reached the mass yet; so one always stays.
        is_past = ordered.cumsum(dim=-1) - ordered >= sampling.top_p
        dropped = torch.zeros_like(is_past).scatter_(-1, places, is_past)
        probabilities = probabilities.masked_fill(dropped, 0.0)
    return probabilities / probabilities.sum(dim=-1, keepdim=True)


def pick_ids(logits: Tensor, sampling: Sampling, uniforms: Tensor | None) -> Tensor:
    """The next id of each row.

    Args:
        logits: (B, V).
        uniforms: (B,) fp64 in [0, 1); None where the temperature is 0.

    Returns:
        (B,) int64.
    """
    if sampling.temperature == 0 or uniforms is None:
        return logits.argmax(dim=-1)
    cumulative = filter_probabilities(logits, sampling).cumsum(dim=-1)
    # Scaled by the last sum, the point is below it, and the id it falls on has a positive share.
    points = uniforms.to(cumulative.device)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, points, right=True)[:, 0].clamp_max(logits.shape[-1] - 1)
