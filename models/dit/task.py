"""Diffusion transformers as a task: every image counts once, whatever the number of its tokens.

Objective: squared error of the noise, a mean over an image's values, and with learned variances the variational bound's
term, both divided by the global number of images (arXiv 2212.09748, section 3.1; arXiv 2102.09672, section 3.1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from ..batch import IMAGES, TIMESTEPS, PackedBatch
from ..class_labels import LABEL_DROPPED, check_labels, image_keys
from ..errors import DataError
from ..multimodal.task import image_generator
from ..task import InitSpec, LossOutput, LossTerm, ParameterGroup, Task
from .config import Config
from .latents import diffusion_of, posterior_sample, standardised
from .network import DiT

__all__ = ["DiTTask", "build_task", "moments_of", "noise_of", "place_of", "posterior_of"]


MOMENTS = "moments_"


def moments_of(ratio: int) -> str:
    """Side tensor of encoded images: (n, 2C, h, w) fp32, means and log variances of those at a ratio."""
    return f"{MOMENTS}{ratio}"


def place_of(ratio: int) -> str:
    """Side tensor of encoded images: (n,) int64, the row of the batch of each one at a ratio."""
    return f"place_{ratio}"


def posterior_of(ratio: int) -> str:
    """Side tensor that `draw` adds: (n, C, h, w) fp32, what latents are sampled with."""
    return f"posterior_{ratio}"


def noise_of(ratio: int) -> str:
    """Side tensor that `draw` adds: (n, C, h, w) fp32, what latents are noised with."""
    return f"noise_{ratio}"


@dataclass(frozen=True)
class _Group:
    """Images of a batch at one ratio."""

    ratio: int
    clean: Tensor
    noise: Tensor
    noised: Tensor
    t: Tensor
    labels: Tensor


class DiTTask(Task):
    """One network, `model`; decay on matrices, not on biases and tables."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.diffusions = [diffusion_of(config, item) for item in config.ratios]

    def build_networks(self) -> dict[str, nn.Module]:
        return {"model": DiT(self.config)}

    def init_spec(self, name: str) -> InitSpec:
        """Linear layers by Xavier, tables and the MLP of noise levels normal; modulations and the output zero."""
        layer, _, kind = name.removeprefix("model/").rpartition(".")
        if layer in ("classes", "ratios") or (layer.startswith("time.") and kind == "weight"):
            return InitSpec("normal", std=0.02)
        if kind == "bias" or layer.endswith("modulation") or layer == "head.output":
            return InitSpec("constant", value=0.0)
        return InitSpec("uniform", std=math.sqrt(6 / sum(self._shape(layer))))

    def _shape(self, layer: str) -> tuple[int, int]:
        c, d = self.config, self.config.d_model
        shapes = {
            "patches": (c.patch**2 * c.channels, d),
            "qkv_proj": (d, 3 * d),
            "o_proj": (d, d),
            "up_proj": (d, c.d_ff),
            "down_proj": (c.d_ff, d),
        }
        return shapes[layer.rpartition(".")[2]]

    def parameter_groups(self, networks: Mapping[str, nn.Module]) -> list[ParameterGroup]:
        chosen: dict[bool, list[str]] = {True: [], False: []}
        for name, parameter in networks["model"].named_parameters():
            is_table = name.partition(".")[0] in ("classes", "ratios")
            chosen[parameter.dim() > 1 and not is_table].append(f"model/{name}")
        return [
            ParameterGroup("decay", tuple(chosen[True])),
            ParameterGroup("no_decay", tuple(chosen[False]), weight_decay=False),
        ]

    def blocks(self, networks: Mapping[str, nn.Module]) -> list[nn.Module]:
        return list(networks["model"].blocks)  # type: ignore[arg-type]

    def counts(self, batch: PackedBatch) -> dict[str, int]:
        found = {"tokens": batch.target_count, IMAGES: batch.target_count}
        if len(self.config.ratios) > 1:
            for item in self.config.ratios:
                places = batch.side.get(place_of(item.ratio), ())
                found[f"images_{item.ratio}"] = len(places) if batch.target_count else 0
        return found

    def draw(self, batch: PackedBatch, seed: int) -> PackedBatch:
        """Hidden labels, noise levels, noise and posterior samples, from (seed, sample, number of the image).

        Raises:
            ConfigError: latents of a ratio have no statistics.
            DataError: latents or labels that the model does not take.
        """
        self.config.require_statistics()
        check_labels(batch.tokens, self.config.classes)
        self._check_latents(batch)
        keys = image_keys(batch, batch.rows)
        generators = [image_generator(seed, *key) for key in keys]
        share, timesteps = self.config.label_dropout, self.config.timesteps
        side = dict(batch.side)
        side[LABEL_DROPPED] = torch.tensor([g.random() < share for g in generators])
        side[TIMESTEPS] = torch.tensor([int(g.integers(timesteps)) for g in generators])
        for item in self.config.ratios:
            if moments_of(item.ratio) not in side:
                continue
            moments = side[moments_of(item.ratio)]
            shape = (len(moments), 2, self.config.channels, *moments.shape[2:])
            drawn = np.empty(shape, np.float32)
            for values, row in zip(drawn, side[place_of(item.ratio)].tolist(), strict=True):
                generators[row].standard_normal(out=values, dtype=np.float32)
            posterior, noise = torch.from_numpy(drawn).unbind(1)
            side[posterior_of(item.ratio)] = posterior.contiguous()
            side[noise_of(item.ratio)] = noise.contiguous()
        return replace(batch, side=side)

    def _check_latents(self, batch: PackedBatch) -> None:
        known = {moments_of(item.ratio) for item in self.config.ratios}
        extra = sorted(n for n in batch.side if n.startswith(MOMENTS) and n not in known)
        if extra:
            ratios = ", ".join(str(item.ratio) for item in self.config.ratios)
            raise DataError(
                f"the data have {extra[0]} and the model knows ratios {ratios}; add it to model.ratios, or encode without it"
            )
        found = 0
        for name in known & batch.side.keys():
            count, doubled = batch.side[name].shape[:2]
            found += count
            if doubled != 2 * self.config.channels:
                raise DataError(
                    f"the data's latents have {doubled // 2} channels and the model takes {self.config.channels}; "
                    f"set model.channels={doubled // 2}, or give the latents meant for it"
                )
        if found != batch.rows:
            raise DataError(
                f"{batch.rows} images of the batch have {found} latents; encode them with weft data encode for model.family=dit"
            )

    def losses(
        self, networks: Mapping[str, nn.Module], batch: PackedBatch, phase: str = "train"
    ) -> LossOutput:
        is_training = torch.is_grad_enabled() and networks["model"].training
        groups = self._groups(batch, is_training)
        predicted = networks["model"](
            [group.noised for group in groups],
            torch.cat([group.t for group in groups]),
            torch.cat([group.labels for group in groups]),
            [group.ratio for group in groups],
        )
        # A rank without images of its own runs others', which count for nothing.
        scale = 1.0 if batch.target_count else 0.0
        errors: dict[int, Tensor] = {}
        bits = []
        for group, values in zip(groups, predicted, strict=True):
            eps, *fraction = values.float().split(self.config.channels, 1)
            error = (eps - group.noise).square().flatten(1).mean(1)
            errors[group.ratio] = scale * error.sum()
            if fraction:
                diffusion = self.diffusions[group.ratio]
                term = diffusion.variational_bits(
                    group.clean, group.noised, group.t, eps, fraction[0]
                )
                bits.append(scale * term.sum())
        terms = {"denoising": LossTerm(torch.stack(list(errors.values())).sum(), IMAGES)}
        if bits:
            weight = self.config.variational_weight
            terms["variational"] = LossTerm(torch.stack(bits).sum(), IMAGES, weight=weight)
        return LossOutput(terms, self._metrics(errors, groups if batch.target_count else []))

    def _groups(self, batch: PackedBatch, is_training: bool) -> list[_Group]:
        if TIMESTEPS not in batch.side:
            raise DataError("the batch's images have no noise; pass it through Task.draw first")
        labels = batch.tokens
        if is_training:
            labels = labels.masked_fill(batch.side[LABEL_DROPPED], self.config.classes)
        groups = []
        for place, item in enumerate(self.config.ratios):
            moments = batch.side.get(moments_of(item.ratio))
            if moments is None or not len(moments):
                continue
            rows, noise = batch.side[place_of(item.ratio)], batch.side[noise_of(item.ratio)]
            latents = posterior_sample(moments, batch.side[posterior_of(item.ratio)])
            clean, t = standardised(latents, item), batch.side[TIMESTEPS][rows]
            noised = self.diffusions[place].noised(clean, noise, t)
            groups.append(_Group(place, clean, noise, noised, t, labels[rows]))
        return groups

    def _metrics(self, errors: dict[int, Tensor], groups: list[_Group]) -> dict[str, LossTerm]:
        """The error by ratio; tokens and 10^9 multiplications of an image, in the mean."""
        first = next(iter(errors.values()))
        found = {}
        if len(self.config.ratios) > 1:
            for place, item in enumerate(self.config.ratios):
                total = errors.get(place, torch.zeros_like(first))
                found[f"denoising_{item.ratio}"] = LossTerm(total, f"images_{item.ratio}")
        sizes = [
            (len(g.clean), math.prod(g.clean.shape[2:]) // self.config.patch**2) for g in groups
        ]
        tokens = sum(count * n for count, n in sizes)
        macs = sum(count * self.config.forward_macs(n) for count, n in sizes)
        for name, value in (("image_tokens", tokens), ("image_gmacs", macs / 1e9)):
            found[name] = LossTerm(torch.full_like(first, value, requires_grad=False), IMAGES)
        return found

    def flops_per_token(self, sequence_length: int) -> float:
        return self.config.flops_per_token(sequence_length)


def build_task(config: Config) -> DiTTask:
    return DiTTask(config)
