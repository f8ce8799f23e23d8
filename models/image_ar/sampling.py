"""Images drawn code by code from a class-conditional transformer, with classifier-free guidance.

B images, N codes an image, K codes of the tokenizer. Every image draws from a generator of its own, a function of (seed,
index), so that what an index gives depends on neither its batch nor its neighbours (but for rounding).
Source: LlamaGen, arXiv 2406.06525, section 2.4, and its released code for the order of the filters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..class_labels import check_labels
from ..errors import ConfigError
from ..multimodal.task import image_generator
from .model import ImageCache, ImageTransformer

__all__ = ["CodeSampling", "filter_logits", "guide", "sample_codes"]


@dataclass(frozen=True)
class CodeSampling:
    """How codes are chosen.

    Args:
        guidance: s of l_uncond + s (l_cond - l_uncond); 1 is the plain conditional model.
        temperature: logits are divided by it.
        top_k: keep the codes whose logits are at least the k-th largest; ties keep more than k. None keeps all.
        top_p: then keep the fewest likeliest codes whose probabilities add up to this.
        guided_codes: codes from this one on, in raster order, are drawn without guidance; None guides all.
    """

    guidance: float = 1.0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    guided_codes: int | None = None

    def __post_init__(self) -> None:
        if self.guidance < 1:
            raise ConfigError(f"guidance {self.guidance} is below 1; 1 is the plain model")
        if self.temperature <= 0:
            raise ConfigError(f"temperature {self.temperature} is not positive; 1 is the model's")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top-k {self.top_k} keeps nothing; give 1 or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top-p {self.top_p} is not in (0, 1]; 1 keeps everything")
        if self.guided_codes is not None and self.guided_codes < 0:
            raise ConfigError(f"guided-codes {self.guided_codes} is negative; 0 guides none")


def guide(conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
    """Logits moved away from those without a class."""
    return unconditional + guidance * (conditional - unconditional)


def filter_logits(logits: Tensor, sampling: CodeSampling) -> Tensor:
    """(B, K) fp32 after temperature, top-k and top-p; what is left out is -inf."""
    logits = logits.float() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1:
        ordered, places = logits.sort(dim=-1, descending=True, stable=True)
        shares = ordered.softmax(-1)
        # A code stays while what is likelier than it has not reached the mass yet; so one always stays.
        is_past = shares.cumsum(-1) - shares >= sampling.top_p
        logits = logits.masked_fill(is_past.gather(-1, places.argsort(-1)), -torch.inf)
    return logits


def _pick(logits: Tensor, uniforms: Tensor) -> Tensor:
    """(B,) int64: where `uniforms` (B,) fp64 in [0, 1) fall on the cumulative distribution of each row."""
    cumulative = logits.softmax(-1).double().cumsum(-1)
    # Scaled by the last sum, the point is below it, and the code it falls on has a positive share.
    points = uniforms[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, points, right=True)[:, 0].clamp_max(logits.shape[-1] - 1)


@torch.no_grad()
def sample_codes(
    network: nn.Module,
    labels: Tensor,
    indices: Sequence[int],
    seed: int,
    sampling: CodeSampling | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Codes of one batch of images.

    Args:
        network: an `ImageTransformer`, perhaps wrapped.
        labels: (B,) int64, a class for each.
        indices: of the images in what is generated in all; an image is a function of (label, index, seed).
        dtype: of the cache; None is the weights'.

    Returns:
        (B, N) int64 in raster order, on the device of the weights.

    Raises:
        ConfigError: labels that do not go with the indices.
        DataError: a label out of range.
    """
    model: ImageTransformer = network  # type: ignore[assignment]
    config, sampling = model.config, sampling or CodeSampling()
    if len(labels) != len(indices):
        raise ConfigError(f"{len(labels)} labels for {len(indices)} images; give one for each")
    check_labels(labels, config.classes)
    weight = model.norm.weight
    device, count = weight.device, len(labels)
    drawn = [image_generator(seed, index, 0).random(config.image_tokens) for index in indices]
    uniforms = torch.stack([torch.from_numpy(values) for values in drawn]).to(device)
    guided = config.image_tokens if sampling.guided_codes is None else sampling.guided_codes
    guided = 0 if sampling.guidance == 1 else min(guided, config.image_tokens)
    ids = labels.to(device)
    if guided:
        ids = torch.cat((ids, torch.full_like(ids, config.classes)))
    cache = ImageCache(config, len(ids), device, dtype or weight.dtype)
    codes = []
    for place in range(config.image_tokens):
        if place == guided and place:
            cache.keep(count)
            ids = ids[:count]
        logits = network(ids, cache=cache)
        if place < guided:
            logits = guide(logits[:count], logits[count:], sampling.guidance)
        picked = _pick(filter_logits(logits, sampling), uniforms[:, place])
        codes.append(picked)
        # Both branches go on with the same code.
        ids = picked.repeat(2) if place < guided else picked
    return torch.stack(codes, 1)
