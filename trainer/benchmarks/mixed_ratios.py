"""A diffusion transformer's step on images of several ratios: packed, padded to the longest, and one call a ratio.

All sides have the same weights and images and give the same predictions; they take turns, so that a busy machine treats
them alike, and each side's fastest turn counts.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, scaled_dot_product_attention, silu

from ...models import build_model
from ...models.dit.config import Config
from ...models.dit.network import EPS, Block, DiT, unpatchify
from ...models.multimodal.stem import patchify
from ..configuration.schema import TrainingConfig

__all__ = ["compare_layouts"]

WEIGHT_STD = 0.02


@dataclass(frozen=True)
class _Images:
    """Groups of noised images, one a ratio, with their noise levels and labels."""

    groups: list[Tensor]
    t: list[Tensor]
    labels: list[Tensor]

    @property
    def places(self) -> list[int]:
        return list(range(len(self.groups)))


def compare_layouts(
    config: TrainingConfig, device: torch.device, counts: Sequence[int], turns: int
) -> dict[str, Any]:
    """Seconds of a forward and backward pass for each layout.

    Args:
        config: of a model of family dit; in its precision on a GPU, in fp32 on a CPU.
        counts: images at each of the model's ratios.
        turns: of each side, after one that is not counted.

    Returns:
        `packed_s`, `padded_s`, `separate_s`; `padded_ratio` and `separate_ratio`, how many times as long as packed;
        `tokens`, `padded_tokens`; `images_per_s`, packed; `difference`, the largest of any prediction, relative to their
        largest.
    """
    model_config = config.model
    assert isinstance(model_config, Config)
    model = build_model(model_config, device)
    assert isinstance(model, DiT)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        # Modulations start at zero, which would leave nothing to compare.
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * WEIGHT_STD)
    images = _make_images(model_config, counts, device)
    narrow = device.type == "cuda" and config.precision.compute == "bf16"
    sides: dict[str, Callable[[], list[Tensor]]] = {
        "packed": lambda: _packed(model, images),
        "padded": lambda: _padded(model, images),
        "separate": lambda: _separate(model, images),
    }
    with torch.autocast("cuda", torch.bfloat16) if narrow else contextlib.nullcontext():
        seconds = _fastest(model, sides, device, turns)
        with torch.no_grad():
            difference = _difference(sides)
    tokens = [model_config.image_tokens(item.ratio) for item in model_config.ratios]
    return {
        **{f"{name}_s": value for name, value in seconds.items()},
        "padded_ratio": seconds["padded"] / seconds["packed"],
        "separate_ratio": seconds["separate"] / seconds["packed"],
        "images": sum(counts),
        "images_per_s": sum(counts) / seconds["packed"],
        "tokens": sum(n * count for n, count in zip(tokens, counts, strict=True)),
        "padded_tokens": max(tokens) * sum(counts),
        "difference": difference,
    }


def _make_images(config: Config, counts: Sequence[int], device: torch.device) -> _Images:
    generator = torch.Generator().manual_seed(1)
    groups, t, labels = [], [], []
    for item, count in zip(config.ratios, counts, strict=True):
        side = config.image_size // item.ratio
        shape = (count, config.channels, side, side)
        groups.append(torch.randn(shape, generator=generator).to(device))
        t.append(torch.randint(config.timesteps, (count,), generator=generator).to(device))
        labels.append(torch.randint(config.classes, (count,), generator=generator).to(device))
    return _Images(groups, t, labels)


def _fastest(
    model: DiT, sides: dict[str, Callable[[], list[Tensor]]], device: torch.device, turns: int
) -> dict[str, float]:
    """Seconds of each side's fastest turn."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(turns + 1):
        for name, side in sides.items():
            model.zero_grad()
            _wait(device)
            begin = time.perf_counter()
            torch.stack([values.float().square().sum() for values in side()]).sum().backward()
            _wait(device)
            taken[name].append(time.perf_counter() - begin)
    return {name: min(values[1:]) for name, values in taken.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _difference(sides: dict[str, Callable[[], list[Tensor]]]) -> float:
    found = [torch.cat([values.float().flatten() for values in side()]) for side in sides.values()]
    largest = max(float((other - found[0]).abs().max()) for other in found[1:])
    return largest / float(found[0].abs().max())


def _packed(model: DiT, images: _Images) -> list[Tensor]:
    return model(images.groups, torch.cat(images.t), torch.cat(images.labels), images.places)


def _separate(model: DiT, images: _Images) -> list[Tensor]:
    parts = zip(images.groups, images.t, images.labels, images.places, strict=True)
    return [model([x], t, labels, [place])[0] for x, t, labels, place in parts]


def _padded(model: DiT, images: _Images) -> list[Tensor]:
    """Every image at the length of the longest, keys past its own masked."""
    config, p = model.config, model.config.patch
    grids = [(x.shape[2] // p, x.shape[3] // p) for x in images.groups]
    lengths = [height * width for height, width in grids]
    counts = [len(x) for x in images.groups]
    longest = max(lengths)
    rows = []
    for x, grid, place in zip(images.groups, grids, images.places, strict=True):
        dtype = model.patches.weight.dtype
        positions = model.positions(grid, place, dtype)
        tokens = model.patches(patchify(x, p)).unflatten(0, (len(x), -1)) + positions
        rows.append(torch.nn.functional.pad(tokens, (0, 0, 0, longest - tokens.shape[1])))
    x = torch.cat(rows)
    condition = silu(
        model.condition(torch.cat(images.t), torch.cat(images.labels), counts, images.places)
    )
    own = [n for n, count in zip(lengths, counts, strict=True) for _ in range(count)]
    mask = torch.arange(longest, device=x.device) < torch.tensor(own, device=x.device)[:, None]
    for block in model.blocks:
        assert isinstance(block, Block)
        x = _padded_block(block, x, condition, mask[:, None, None])
    shift, scale = model.head.modulation(condition)[:, None].chunk(2, -1)
    out = model.head.output(_normalised(x) * (1 + scale) + shift).split(counts)
    parts = zip(out, lengths, grids, strict=True)
    return [unpatchify(o[:, :n].flatten(0, 1), grid, config.patch) for o, n, grid in parts]


def _padded_block(block: Block, x: Tensor, condition: Tensor, mask: Tensor) -> Tensor:
    config = block.config
    values = block.modulation(condition)[:, None].chunk(6, -1)
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = values
    h = block.qkv_proj(_normalised(x) * (1 + scale) + shift)
    heads = h.unflatten(-1, (3, config.n_heads, config.head_width)).permute(2, 0, 3, 1, 4)
    q, k, v = heads.unbind()
    attended = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    x = x + gate * block.o_proj(attended.transpose(1, 2).flatten(2))
    h = _normalised(x) * (1 + mlp_scale) + mlp_shift
    h = block.down_proj(gelu(block.up_proj(h), approximate="tanh"))
    return x + mlp_gate * h


def _normalised(x: Tensor) -> Tensor:
    return layer_norm(x, x.shape[-1:], eps=EPS)
