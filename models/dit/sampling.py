"""Latents of images denoised from noise, with classifier-free guidance, all ratios of a batch in one packed pass.

Every image draws from a generator of its own, a function of (seed, index), so that what an index gives depends on neither
its batch nor its neighbours (but for rounding). The shape of the noise fixes the number of tokens: ratios are chosen first.
Sources: Peebles and Xie, arXiv 2212.09748, section 4; Nichol and Dhariwal, arXiv 2102.09672, section 4; DDIM, 2010.02502.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..class_labels import check_labels
from ..diffusion import spaced_timesteps
from ..errors import ConfigError
from ..multimodal.task import image_generator
from .config import Config
from .latents import diffusion_of, restored
from .network import DiT

__all__ = ["LatentSampling", "draw_ratios", "guide_noise", "sample_latents"]

RATIO_STREAM = 1
"""Number of the stream that a ratio is drawn from; noise comes from stream 0."""


@dataclass(frozen=True)
class LatentSampling:
    """How images are denoised.

    Args:
        steps: noise levels that are gone through.
        method: `ddpm` takes random steps, with the model's variances where it has learned them; `ddim` none.
        guidance: s of eps_uncond + s (eps_cond - eps_uncond); 1 is the plain conditional model.
        guided_channels: guide the first channels alone; None guides all. The released DiT models were sampled with 3.
    """

    steps: int = 250
    method: Literal["ddpm", "ddim"] = "ddpm"
    guidance: float = 1.0
    guided_channels: int | None = None

    def __post_init__(self) -> None:
        if self.guidance < 1:
            raise ConfigError(f"guidance {self.guidance} is below 1; 1 is the plain model")
        if self.steps < 1:
            raise ConfigError(f"{self.steps} sampling steps; give 1 or more")
        if self.guided_channels is not None and self.guided_channels < 1:
            raise ConfigError(f"guided-channels {self.guided_channels}: give 1 or more, or null")


@dataclass
class _Group:
    """Images of one ratio on their way from noise."""

    place: int
    members: list[int]
    x: Tensor


def draw_ratios(
    config: Config,
    labels: Tensor,
    indices: Sequence[int],
    seed: int,
    shares: Mapping[int, Sequence[float]] | None = None,
) -> list[int]:
    """A ratio for each image, from p(ratio | class).

    Args:
        labels: (I,) int64, on the CPU.
        shares: by class, how often training data has each of `config.ratios`; None is the configuration's `share` for all.

    Raises:
        ConfigError: a class without shares, or shares that are none.
    """
    ratios = [item.ratio for item in config.ratios]
    expected = [item.share for item in config.ratios]
    found = []
    for label, index in zip(labels.tolist(), indices, strict=True):
        weights = expected if shares is None else shares.get(label)
        if weights is None or len(weights) != len(ratios) or min(weights) < 0 or not sum(weights):
            raise ConfigError(
                f"class {label} has no shares of ratios {ratios}; give {len(ratios)} that are not all 0, or choose a ratio"
            )
        cumulative = np.cumsum(weights)
        point = image_generator(seed, index, RATIO_STREAM).random() * cumulative[-1]
        found.append(ratios[int(np.searchsorted(cumulative, point, side="right"))])
    return found


def guide_noise(
    conditional: Tensor, unconditional: Tensor, guidance: float, channels: int | None
) -> Tensor:
    """Noise (I, C, h, w) moved away from what the model says without a class; other than the first channels as with it."""
    guided = unconditional + guidance * (conditional - unconditional)
    if channels is None:
        return guided
    return torch.cat((guided[:, :channels], conditional[:, channels:]), 1)


@torch.no_grad()
def sample_latents(
    network: nn.Module,
    labels: Tensor,
    ratios: Sequence[int],
    indices: Sequence[int],
    seed: int,
    sampling: LatentSampling | None = None,
) -> list[Tensor]:
    """Latents of one batch of images, in the scale that the tokenizer decodes.

    Args:
        network: a `DiT`, perhaps wrapped.
        labels: (I,) int64, a class for each.
        ratios: one of the model's for each.
        indices: of the images in what is generated in all; an image is a function of (label, ratio, index, seed).

    Returns:
        For each image (C, h, w) fp32, of `config.image_size` over its ratio a side.

    Raises:
        ConfigError: a ratio that the model does not have, lists that do not go together, latents without statistics.
        DataError: a label out of range.
    """
    model: DiT = network  # type: ignore[assignment]
    config, sampling = model.config, sampling or LatentSampling()
    config.require_statistics()
    check_labels(labels, config.classes)
    if not len(labels) == len(ratios) == len(indices):
        raise ConfigError(
            f"{len(labels)} labels and {len(ratios)} ratios for {len(indices)} images; give one of each for each"
        )
    device = model.patches.weight.device
    generators = [image_generator(seed, index, 0) for index in indices]
    groups = _start(config, ratios, generators, device)
    order = [member for group in groups for member in group.members]
    _denoise(model, groups, labels[order].to(device), generators, sampling)
    found: list[Tensor] = [torch.empty(0)] * len(labels)
    for group in groups:
        latents = restored(group.x, config.ratios[group.place])
        for member, image in zip(group.members, latents, strict=True):
            found[member] = image
    return found


def _start(
    config: Config,
    ratios: Sequence[int],
    generators: Sequence[np.random.Generator],
    device: torch.device,
) -> list[_Group]:
    known = [item.ratio for item in config.ratios]
    wrong = sorted(set(ratios) - set(known))
    if wrong:
        raise ConfigError(f"ratio {wrong[0]} is none of the model's: {', '.join(map(str, known))}")
    groups = []
    for place, ratio in enumerate(known):
        members = [i for i, wanted in enumerate(ratios) if wanted == ratio]
        if members:
            side = config.image_size // ratio
            shape = (config.channels, side, side)
            groups.append(_Group(place, members, _noise(generators, members, shape, device)))
    return groups


def _noise(
    generators: Sequence[np.random.Generator],
    members: Sequence[int],
    shape: tuple[int, ...],
    device: torch.device,
) -> Tensor:
    """(n, *shape) fp32, each image's from its own generator."""
    drawn = np.stack([generators[i].standard_normal(shape, dtype=np.float32) for i in members])
    return torch.from_numpy(drawn).to(device)


def _denoise(
    model: DiT,
    groups: list[_Group],
    labels: Tensor,
    generators: Sequence[np.random.Generator],
    sampling: LatentSampling,
) -> None:
    """Bring the groups' images from the highest noise level to none."""
    config = model.config
    if sampling.steps > config.timesteps:
        raise ConfigError(
            f"{sampling.steps} sampling steps of {config.timesteps} noise levels; take 1 to {config.timesteps}"
        )
    diffusions = {g.place: diffusion_of(config, config.ratios[g.place]) for g in groups}
    levels = spaced_timesteps(config.timesteps, sampling.steps)
    for t, t_next in zip(levels, [*levels[1:], None], strict=True):
        for group, values in zip(groups, _predict(model, groups, labels, t, sampling), strict=True):
            eps, *fraction = values.split(config.channels, 1)
            diffusion = diffusions[group.place]
            level = torch.full((1,), t, device=group.x.device)
            x0, eps = diffusion.split(eps, group.x, level)
            if t_next is None or sampling.method == "ddim":
                group.x = diffusion.step(x0, eps, t, t_next)
                continue
            noise = _noise(generators, group.members, tuple(group.x.shape[1:]), group.x.device)
            spread = diffusion.step_log_variance(fraction[0], t, t_next) if fraction else None
            group.x = diffusion.step(x0, eps, t, t_next, eta=1.0, noise=noise, log_variance=spread)


def _predict(
    model: DiT, groups: list[_Group], labels: Tensor, t: int, sampling: LatentSampling
) -> list[Tensor]:
    """(n, C or 2C, h, w) fp32 of each group, guided; variances are those with the class."""
    config = model.config
    images, places = [group.x for group in groups], [group.place for group in groups]
    if sampling.guidance == 1:
        levels = torch.full_like(labels, t)
        return [values.float() for values in model(images, levels, labels, places)]
    sizes = [len(group.members) for group in groups]
    both = [torch.cat((x, x)) for x in images]
    nothing = torch.full_like(labels, config.classes)
    halves = [
        torch.cat(pair) for pair in zip(labels.split(sizes), nothing.split(sizes), strict=True)
    ]
    doubled = torch.cat(halves)
    predicted = model(both, torch.full_like(doubled, t), doubled, places)
    found = []
    for values in predicted:
        conditional, without = values.float().chunk(2)
        eps = guide_noise(
            conditional[:, : config.channels],
            without[:, : config.channels],
            sampling.guidance,
            sampling.guided_channels,
        )
        found.append(torch.cat((eps, conditional[:, config.channels :]), 1))
    return found
