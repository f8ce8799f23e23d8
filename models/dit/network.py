"""A diffusion transformer over images of any sizes, packed without padding.

I images in groups of one size, N tokens an image, T tokens in all, C channels, p patch, d model width, H heads of width
hd. Tokens of all images lie end to end; attention stays inside each image, and a block's shift, scale and gate belong to
an image. Source: Peebles and Xie, arXiv 2212.09748, section 3.2 (adaLN-Zero).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, silu

from ...kernels import Segments, segment_attention, segment_attention_problem
from ...kernels.faces import autocast_dtype
from ..errors import ConfigError, DataError
from ..multimodal.stem import TimeEmbedding, patchify
from .config import TIME_WAVES, Config

__all__ = ["DiT", "grid_positions", "unpatchify"]

EPS = 1e-6
LONGEST_PERIOD = 10_000.0


class Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by what its image is conditioned on."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        d = config.d_model
        self.modulation = nn.Linear(d, 6 * d)
        self.qkv_proj = nn.Linear(d, 3 * d)
        self.o_proj = nn.Linear(d, d)
        self.up_proj = nn.Linear(d, config.d_ff)
        self.down_proj = nn.Linear(config.d_ff, d)

    def forward(self, x: Tensor, condition: Tensor, segments: Segments) -> Tensor:
        """Tokens (T, d) of images with conditions (I, d)."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(condition).chunk(6, -1)
        h = segments.apply(_modulated, (_normalised(x),), (shift, scale))
        x = segments.apply(_add_gated, (x, self._attend(h, segments)), (gate,))
        h = segments.apply(_modulated, (_normalised(x),), (mlp_shift, mlp_scale))
        h = self.down_proj(gelu(self.up_proj(h), approximate="tanh"))
        return segments.apply(_add_gated, (x, h), (mlp_gate,))

    def _attend(self, x: Tensor, segments: Segments) -> Tensor:
        heads = self.qkv_proj(x).unflatten(-1, (3, self.config.n_heads, self.config.head_width))
        q, k, v = heads.unbind(1)
        attended = segment_attention(q, k, v, segments, self.config.attention)
        return self.o_proj(attended.flatten(1))


class Head(nn.Module):
    """The last normalisation, modulated, and a linear map to the values of a patch."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.modulation = nn.Linear(config.d_model, 2 * config.d_model)
        self.output = nn.Linear(config.d_model, config.patch**2 * config.out_channels)

    def forward(self, x: Tensor, condition: Tensor, segments: Segments) -> Tensor:
        shift, scale = self.modulation(condition).chunk(2, -1)
        return self.output(segments.apply(_modulated, (_normalised(x),), (shift, scale)))


class DiT(nn.Module):
    """Patches, conditions, blocks, head."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        d = config.d_model
        self.patches = nn.Linear(config.patch**2 * config.channels, d)
        self.time = TimeEmbedding(TIME_WAVES, d, config.time_includes_longest)
        self.classes = nn.Embedding(config.classes + 1, d)
        self.ratios = nn.Embedding(len(config.ratios), d) if len(config.ratios) > 1 else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.head = Head(config)
        self._known_positions: dict[tuple[int, int, int, torch.device], Tensor] = {}

    def forward(
        self, images: Sequence[Tensor], t: Tensor, labels: Tensor, ratios: Sequence[int]
    ) -> list[Tensor]:
        """What the model makes of noised images: of each value its noise, then the fraction of its log variance.

        Args:
            images: groups (I_g, C, h, w) of one size and ratio each.
            t: (I,) int64, noise levels, in the order of the groups.
            labels: (I,) int64; `config.classes` is none.
            ratios: of each group, an index into `config.ratios`.

        Returns:
            Groups (I_g, 2 C, h, w), C without learned variances, in the type that the head computes in.

        Raises:
            ConfigError: the configured attention does not run on this device and type.
            DataError: images that patches do not divide, or of other channels.
        """
        grids = [self._grid(group) for group in images]
        counts = [len(group) for group in images]
        runs = [(n, height * width) for n, (height, width) in zip(counts, grids, strict=True)]
        segments = Segments(runs, t.device)
        x = self._embed(images, grids, ratios)
        self._check_attention(x)
        segments.prepare(self.config.attention)
        condition = silu(self.condition(t, labels, counts, ratios))
        for block in self.blocks:
            x = block(x, condition, segments)
        rows = self.head(x, condition, segments).split([count * n for count, n in runs])
        groups = zip(rows, grids, strict=True)
        return [unpatchify(part, grid, self.config.patch) for part, grid in groups]

    def _grid(self, group: Tensor) -> tuple[int, int]:
        """Tokens of a group's images, down and across."""
        channels, height, width = group.shape[1:]
        p = self.config.patch
        if channels != self.config.channels:
            raise DataError(
                f"the latents have {channels} channels and the model takes {self.config.channels}; "
                f"set model.channels={channels}, or give the latents meant for it"
            )
        if height % p or width % p:
            raise DataError(
                f"latents of {height} x {width} do not divide into patches of {p}; "
                f"encode images whose sides are multiples of the ratio times {p}"
            )
        return height // p, width // p

    def _embed(
        self, images: Sequence[Tensor], grids: Sequence[tuple[int, int]], ratios: Sequence[int]
    ) -> Tensor:
        dtype = self.patches.weight.dtype
        rows = [patchify(group, self.config.patch).to(dtype) for group in images]
        places = [
            self.positions(grid, ratio, dtype).repeat(len(group), 1)
            for group, grid, ratio in zip(images, grids, ratios, strict=True)
        ]
        return self.patches(torch.cat(rows)) + torch.cat(places)

    def positions(self, grid: tuple[int, int], ratio: int, dtype: torch.dtype) -> Tensor:
        """(N, d), positions of a grid; made on first use, as a buffer would hold garbage after meta-device construction."""
        c, device = self.config, self.patches.weight.device
        key = (*grid, ratio, device)
        if key not in self._known_positions:
            step = 1.0
            if c.positions == "plane":
                step = c.ratios[ratio].ratio / c.reference_ratio
            self._known_positions[key] = grid_positions(*grid, c.d_model, step).to(device)
        return self._known_positions[key].to(dtype)

    def condition(
        self, t: Tensor, labels: Tensor, counts: Sequence[int], ratios: Sequence[int]
    ) -> Tensor:
        """(I, d): what images at these noise levels and of these labels, in groups of `counts` at `ratios`, are told."""
        condition = self.time(t) + self.classes(labels)
        if self.ratios is None:
            return condition
        places = [r for r, count in zip(ratios, counts, strict=True) for _ in range(count)]
        chosen = torch.tensor(places, dtype=torch.int64).to(t.device, non_blocking=True)
        return condition + self.ratios(chosen)

    def _check_attention(self, x: Tensor) -> None:
        dtype = autocast_dtype(x) or x.dtype
        problem = segment_attention_problem(self.config.attention, x.device, dtype, x.requires_grad)
        if problem:
            raise ConfigError(f"model.attention={self.config.attention}: {problem}")


def grid_positions(height: int, width: int, d: int, step: float = 1.0) -> Tensor:
    """(height * width, d) fp32 in raster order: half of the values for the column, half for the row, sines before cosines.

    Args:
        step: distance of neighbours; token i of an axis lies at (i + 0.5) * step - 0.5, the middle of its part of the image.
    """
    frequencies = LONGEST_PERIOD ** -(torch.arange(d // 4, dtype=torch.float64) / (d // 4))

    def waves(count: int) -> Tensor:
        places = (torch.arange(count, dtype=torch.float64) + 0.5) * step - 0.5
        angles = places[:, None] * frequencies
        return torch.cat((angles.sin(), angles.cos()), 1)

    rows, columns = waves(height), waves(width)
    across = columns[None].expand(height, -1, -1)
    down = rows[:, None].expand(-1, width, -1)
    return torch.cat((across, down), -1).flatten(0, 1).float()


def unpatchify(rows: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """(I N, p p c), channels last in a patch, to (I, c, h, w)."""
    height, width = grid
    cut = rows.reshape(-1, height, width, patch, patch, rows.shape[1] // patch**2)
    images = cut.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
    # What a model gives must be no view where FSDP2 hooks its gradient.
    return images.clone(memory_format=torch.contiguous_format)


def _normalised(x: Tensor) -> Tensor:
    return layer_norm(x, x.shape[-1:], eps=EPS)


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


def _add_gated(x: Tensor, change: Tensor, gate: Tensor) -> Tensor:
    return x + gate * change
