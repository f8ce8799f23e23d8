"""Image tokenizers as a task: an autoencoder and its causal predictor in one phase, their discriminator in the next.

The phase `train` runs the generator's side; the pictures it made are carried to the phase `discriminator`, so that no
forward pass is run twice. Before `adversarial.start_step` that phase is left out altogether. R pictures a micro-batch; of
nested models they are sorted by ratio on the way in, n pictures then (more than R where each is trained at every ratio).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from ..batch import IMAGE_KEYS, IMAGES, PIXELS, RATIO, PackedBatch, images_at
from ..errors import DataError
from ..multimodal.task import image_generator
from ..task import InitSpec, LossOutput, LossTerm, ParameterGroup, Task
from .autoencoder import Autoencoder, Reconstruction, split_by_sizes
from .config import Config
from .discriminator import Discriminator, hinge_loss
from .measures import code_measures, psnr
from .perceptual import Perceptual, open_perceptual
from .pixel_losses import adaptive_weight, attach_gradient, measure
from .predictor import Predictor, causal_loss

__all__ = ["POSTERIOR_NOISE", "ImageTokenizerTask", "build_task"]

POSTERIOR_NOISE = "posterior_noise"
"""Side tensor that `draw` adds: fp32, the noise (z, h, w) of each picture's latent, all of them flat and end to end,
sorted by ratio."""
MADE = "made"
"""Side tensor that the phase `train` hands on: (n, C, S, S) made pictures."""
DISCRIMINATOR = "discriminator"
STD = 0.02
KERNEL = 3
"""Of the decoder's last convolution."""


def _images_from(stride: int) -> str:
    """Name of the count of images at this ratio or a coarser one."""
    return f"images_from_{stride}"


class ImageTokenizerTask(Task):
    """Networks: `model`, and where configured `predictor` and `discriminator`."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._perceptual = open_perceptual(config.reconstruction)
        self._step = 1
        with torch.device("meta"):
            networks = self.build_networks()
        self._shapes = {
            f"{network}/{name}": tuple(parameter.shape)
            for network, module in networks.items()
            for name, parameter in module.named_parameters()
        }

    def build_networks(self) -> dict[str, nn.Module]:
        c = self.config
        networks: dict[str, nn.Module] = {"model": Autoencoder(c)}
        if c.crt is not None:
            networks["predictor"] = Predictor(c.crt, c.quantizer.width, c.tokens)
        if c.adversarial is not None:
            networks[DISCRIMINATOR] = Discriminator(c.adversarial, c.in_channels)
        return networks

    def init_spec(self, name: str) -> InitSpec:
        """Convolutions start as torch's do; the discriminator's and the predictor's from N(0, 0.02)."""
        network, _, own = name.partition("/")
        layer, _, kind = own.rpartition(".")
        if "norm" in own:
            return InitSpec("constant", value=1.0 if kind == "weight" else 0.0)
        if own == "quantizer.codebook":
            q = self.config.quantizer
            return InitSpec("uniform", std=1 / q.codes, unit_rows=q.width if q.normalise else 0)
        if network != "model":
            return InitSpec("constant") if kind == "bias" else InitSpec("normal", std=STD)
        fan_in = math.prod(self._shapes[f"model/{layer}.weight"][1:])
        return InitSpec("uniform", std=fan_in**-0.5)

    # Groups and counts

    def parameter_groups(self, networks: Mapping[str, nn.Module]) -> list[ParameterGroup]:
        found: dict[str | None, list[str]] = {None: []}
        for name, _ in networks["model"].named_parameters():
            if name != "quantizer.codebook":
                found.setdefault(self._needs(name), []).append(f"model/{name}")
        groups = [
            ParameterGroup(
                "autoencoder" if needs is None else f"autoencoder_{needs.removeprefix('images_')}",
                tuple(names),
                weight_decay=False,
                needs=needs,
            )
            for needs, names in found.items()
        ]
        if self.config.kind == "vq":
            codebook = ("model/quantizer.codebook",)
            groups.append(ParameterGroup("codebook", codebook, weight_decay=False, whole=True))
        if self.config.crt is not None:
            crt = self.config.crt
            groups.append(
                ParameterGroup(
                    "predictor",
                    _named(networks, "predictor"),
                    lr_scale=crt.lr_scale,
                    averaged=False,
                    betas=crt.betas,
                    clip_grad_norm=crt.clip_grad_norm,
                )
            )
        if self.config.adversarial is not None:
            gan = self.config.adversarial
            groups.append(
                ParameterGroup(
                    DISCRIMINATOR,
                    _named(networks, DISCRIMINATOR),
                    weight_decay=False,
                    lr_scale=gan.lr_scale,
                    phase=DISCRIMINATOR,
                    averaged=False,
                    betas=gan.betas,
                    clip_grad_norm=gan.clip_grad_norm,
                    whole=True,
                )
            )
        return groups

    def _needs(self, name: str) -> str | None:
        """The count without which a step teaches a parameter of the autoencoder nothing."""
        if self.config.ratios is None:
            return None
        _, kind, *place = name.split(".")
        if kind == "adapters":
            return images_at(int(place[0]))
        if kind not in ("levels", "downs", "ups"):
            return None
        # A change of size lies between its own level and the next coarser one, which is why it is there.
        level = int(place[0]) + (kind != "levels")
        return _images_from(2**level) if 2**level > self.config.ratios[0] else None

    def blocks(self, networks: Mapping[str, nn.Module]) -> list[nn.Module]:
        model = networks["model"]
        assert isinstance(model, Autoencoder)
        encoder, decoder = model.encoder, model.decoder
        found = [*encoder.levels, *encoder.adapters.values(), encoder.middle]
        found += [decoder.middle, *decoder.adapters.values(), *reversed(decoder.levels)]
        if "predictor" in networks:
            found.extend(networks["predictor"].blocks)  # type: ignore[arg-type]
        return found

    def counts(self, batch: PackedBatch) -> dict[str, int]:
        ratios, sizes = self.config.all_ratios, self._sizes(batch)
        found = {"tokens": batch.target_count, IMAGES: sum(sizes)}
        if self.config.ratios is not None:
            found |= {images_at(r): size for r, size in zip(ratios, sizes, strict=True)}
            for level in range(1, len(self.config.channels)):
                passing = zip(ratios, sizes, strict=True)
                found[_images_from(2**level)] = sum(n for r, n in passing if r >= 2**level)
        return found

    def _sizes(self, batch: PackedBatch) -> list[int]:
        """Images of each ratio; the host knows.

        Raises:
            DataError: the data do not say.
        """
        c, images = self.config, _count_images(batch)
        if c.ratios is None:
            return [images]
        if c.every_ratio:
            return [images] * len(c.ratios)
        sizes = [batch.host_counts.get(images_at(r), 0) for r in c.ratios]
        if sum(sizes) != images:
            raise DataError(
                f"{images} pictures and ratios for {sum(sizes)}: the data say no ratio in {list(c.ratios)} for the others; set "
                f"data.images.ratios.values={list(c.ratios)}"
            )
        return sizes

    # What is random

    def draw(self, batch: PackedBatch, seed: int) -> PackedBatch:
        """Noise of posteriors, from (seed, key of the image)."""
        if self.config.kind == "vq":
            return batch
        keys = batch.side[IMAGE_KEYS][: _count_images(batch)].tolist()
        generators = [image_generator(seed, sample, image) for sample, image in keys]
        sizes = self._sizes(batch)
        order = self._host_order(batch)
        strides = [
            r for r, size in zip(self.config.all_ratios, sizes, strict=True) for _ in range(size)
        ]
        noise = [
            generators[row].standard_normal(self._latent_values(ratio), dtype=np.float32)
            for row, ratio in zip(order, strides, strict=True)
        ]
        flat = torch.from_numpy(np.concatenate(noise)) if noise else torch.zeros(0)
        return replace(batch, side={**batch.side, POSTERIOR_NOISE: flat})

    def _latent_values(self, ratio: int) -> int:
        return self.config.latent_channels * self.config.side(ratio) ** 2

    def _host_order(self, batch: PackedBatch) -> list[int]:
        rows = list(range(_count_images(batch)))
        if self.config.ratios is None:
            return rows
        if self.config.every_ratio:
            return rows * len(self.config.ratios)
        return np.argsort(batch.side[RATIO][: len(rows)].numpy(), kind="stable").tolist()

    # Losses

    def begin_step(self, step: int) -> None:
        self._step = step

    def phases(self, step: int) -> Sequence[str]:
        return ("train", DISCRIMINATOR) if self._has_adversary(step) else ("train",)

    def _has_adversary(self, step: int) -> bool:
        gan = self.config.adversarial
        return gan is not None and step >= gan.start_step

    def losses(
        self, networks: Mapping[str, nn.Module], batch: PackedBatch, phase: str = "train"
    ) -> LossOutput:
        x, sizes = self._pixels(batch), self._sizes(batch)
        if phase == DISCRIMINATOR:
            return self._discriminator_losses(networks[DISCRIMINATOR], x, batch.side[MADE], sizes)
        is_training = torch.is_grad_enabled()
        found: Reconstruction = networks["model"](x, sizes, self._noise(batch, sizes, is_training))
        output = self._picture_losses(networks, x, found, sizes, is_training)
        if found.quantized is not None:
            self._add_codes(output, found)
        else:
            self._add_kl(output, found)
        if self.config.crt is not None:
            self._add_causal(output, networks["predictor"], found)
        if is_training and self._has_adversary(self._step):
            output.carried[MADE] = found.pixels.detach()
        return output

    def _pixels(self, batch: PackedBatch) -> Tensor:
        """(n, C, S, S) fp32 from -1 to 1, sorted by ratio.

        Raises:
            DataError: none, or of another shape.
        """
        c = self.config
        if PIXELS not in batch.side:
            raise DataError("the data bring no pictures; set data.images")
        pixels = batch.side[PIXELS]
        channels, height, width = pixels.shape[1:]
        if (height, width) != (c.size, c.size):
            raise DataError(
                f"the data's pictures are {height} x {width} pixels and model.size is {c.size}; set model.size to match"
            )
        if channels not in (1, c.in_channels):
            raise DataError(
                f"the data's pictures have {channels} channels and model.in_channels is {c.in_channels}; set it to match"
            )
        order = self._order(batch)
        pixels = pixels[: _count_images(batch)] if order is None else pixels[order]
        return pixels.expand(-1, c.in_channels, -1, -1).float() / 127.5 - 1

    def _order(self, batch: PackedBatch) -> Tensor | None:
        """(n,) int64, which row each sorted picture is; None where they are as they came."""
        c, images = self.config, _count_images(batch)
        if c.ratios is None:
            return None
        if c.every_ratio:
            return torch.arange(images, device=batch.tokens.device).repeat(len(c.ratios))
        return batch.side[RATIO][:images].argsort(stable=True)

    def _noise(
        self, batch: PackedBatch, sizes: Sequence[int], is_training: bool
    ) -> list[Tensor] | None:
        """By ratio (n_r, z, h, w); None decodes the means, as evaluation does."""
        c = self.config
        if c.kind == "vq" or not is_training:
            return None
        if POSTERIOR_NOISE not in batch.side:
            raise DataError("the batch's pictures have no noise; pass it through Task.draw first")
        values = [n * self._latent_values(r) for r, n in zip(c.all_ratios, sizes, strict=True)]
        parts = batch.side[POSTERIOR_NOISE].split(values)
        return [
            part.view(n, c.latent_channels, c.side(r), c.side(r))
            for part, r, n in zip(parts, c.all_ratios, sizes, strict=True)
        ]

    def _picture_losses(
        self,
        networks: Mapping[str, nn.Module],
        x: Tensor,
        found: Reconstruction,
        sizes: Sequence[int],
        is_training: bool,
    ) -> LossOutput:
        made = found.pixels
        if is_training:
            gradient, values = measure(lambda y: self._reconstruction(x, y), made)
            total = attach_gradient(made, values[0].sum(), gradient)
        else:
            values = self._reconstruction(x, made.float())
            total = values[0].sum()
        terms = {"reconstruction": LossTerm(total, IMAGES)}
        metrics = {}
        if len(values) > 2:
            metrics["pixel_error"] = LossTerm(values[1].sum(), IMAGES)
            metrics["perceptual"] = LossTerm(values[2].sum(), IMAGES)
        if is_training and self._has_adversary(self._step):
            gan, weights = self.config.adversarial, self._ratio_weights(sizes, x.device)
            assert gan is not None
            critic = networks[DISCRIMINATOR]
            slope, (scores,) = measure(lambda y: (-critic(y).float().mean((1, 2)) * weights,), made)
            if gan.adaptive:
                factor = adaptive_weight(found.features.detach(), KERNEL, gradient, slope)
                metrics["adaptive_weight"] = LossTerm(factor * len(x), IMAGES)
                slope = slope * factor
            adversarial = attach_gradient(made, scores.sum(), slope)
            terms["adversarial"] = LossTerm(adversarial, IMAGES, weight=gan.weight)
        squares = (x - made.detach().float()).square().mean((1, 2, 3))
        return LossOutput(terms, metrics | self._picture_metrics(values[1], squares, sizes))

    def _reconstruction(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """(n,) loss of each picture, its error of pixels, and where one is wanted its perceptual distance."""
        c = self.config.reconstruction
        difference = x - y
        each = difference.square() if c.error == "mse" else difference.abs()
        errors = each.mean((1, 2, 3)) if c.reduction == "mean" else each.sum((1, 2, 3))
        if self._perceptual is None:
            return errors, errors
        distances = self._features(x.device)(x, y)
        # Of sums each element has the picture's distance, as LDM adds it.
        share = 1 if c.reduction == "mean" else math.prod(x.shape[1:])
        return errors + c.perceptual_weight * share * distances, errors, distances

    def _features(self, device: torch.device) -> Perceptual:
        assert self._perceptual is not None
        if any(w.device != device for stage in self._perceptual.stages for w, _ in stage):
            self._perceptual = self._perceptual.to(device)
        return self._perceptual

    def _picture_metrics(
        self, errors: Tensor, squares: Tensor, sizes: Sequence[int]
    ) -> dict[str, LossTerm]:
        decibels = psnr(squares)
        found = {"psnr": LossTerm(decibels.sum(), IMAGES)}
        if self.config.ratios is not None:
            by_ratio = zip(
                self.config.ratios,
                split_by_sizes(errors, sizes),
                split_by_sizes(decibels, sizes),
                strict=True,
            )
            for ratio, error, decibel in by_ratio:
                found[f"pixel_error_{ratio}"] = LossTerm(error.sum(), images_at(ratio))
                found[f"psnr_{ratio}"] = LossTerm(decibel.sum(), images_at(ratio))
        return found

    def _ratio_weights(self, sizes: Sequence[int], device: torch.device) -> Tensor:
        """(n,) factor on a picture's KL and adversarial terms."""
        weights = self.config.latent.ratio_weights
        parts = [
            torch.full((n,), weights.get(r, 1.0), device=device)
            for r, n in zip(self.config.all_ratios, sizes, strict=True)
        ]
        return torch.cat(parts)

    def _add_codes(self, output: LossOutput, found: Reconstruction) -> None:
        assert found.quantized is not None
        assert found.encoded is not None
        q, c = found.quantized, self.config.quantizer
        output.terms["codebook"] = LossTerm(q.codebook.sum(), IMAGES, weight=c.codebook_weight)
        output.terms["commitment"] = LossTerm(q.commitment.sum(), IMAGES, weight=c.commitment)
        z = found.encoded.detach().float()
        output.metrics["latent_length"] = LossTerm(z.norm(dim=1).mean((1, 2)).sum(), IMAGES)
        codes = q.codes.flatten()
        used = torch.zeros(c.codes, dtype=torch.int64, device=codes.device)
        output.vectors["codes"] = used.scatter_add_(0, codes, torch.ones_like(codes))

    def _add_kl(self, output: LossOutput, found: Reconstruction) -> None:
        latent, sizes = self.config.latent, [len(mean) for mean in found.means]
        parts = []
        for mean, logvar in zip(found.means, found.logvars, strict=True):
            each = (mean.square() + logvar.exp() - 1 - logvar) / 2
            parts.append(
                each.mean((1, 2, 3)) if latent.kl_norm == "per_element" else each.sum((1, 2, 3))
            )
        divergence = torch.cat(parts)
        weighted = (divergence * self._ratio_weights(sizes, divergence.device)).sum()
        output.terms["kl"] = LossTerm(weighted, IMAGES, weight=latent.kl_weight)

    def _add_causal(self, output: LossOutput, predictor: nn.Module, found: Reconstruction) -> None:
        crt, quantized = self.config.crt, found.quantized
        assert crt is not None
        assert quantized is not None
        assert found.encoded is not None
        latents = quantized.latents if crt.space == "normalized" else found.encoded.float()
        loss = causal_loss(
            predictor,
            latents,
            encoder_weight=crt.weight_at(self._step),
            reduction=crt.reduction,
            target_stopgrad=crt.target_stopgrad,
            input_stopgrad=crt.input_stopgrad,
        )
        output.terms["crt"] = LossTerm(loss.sum(), IMAGES)
        rows = latents.detach().movedim(1, -1).flatten(0, -2)
        count = rows.new_full((1,), float(len(rows)))
        output.vectors["latents"] = torch.cat((rows.sum(0), rows.square().sum(0), count))

    def _discriminator_losses(
        self, critic: nn.Module, x: Tensor, made: Tensor, sizes: Sequence[int]
    ) -> LossOutput:
        gan = self.config.adversarial
        assert gan is not None
        real, fake = critic(x), critic(made.float())
        loss = hinge_loss(real, fake)
        weight = 1.0 if gan.adaptive else gan.weight
        metrics = {}
        with torch.no_grad():
            right = ((real > 0).float().mean((1, 2)) + (fake < 0).float().mean((1, 2))) / 2
        metrics["accuracy"] = LossTerm(right.sum(), IMAGES)
        if self.config.ratios is not None:
            for ratio, part in zip(self.config.ratios, split_by_sizes(right, sizes), strict=True):
                metrics[f"accuracy_{ratio}"] = LossTerm(part.sum(), images_at(ratio))
        return LossOutput({"hinge": LossTerm(loss.sum(), IMAGES, weight=weight)}, metrics)

    # What is told of a step

    def summarise(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = code_measures(vectors["codes"]) if "codes" in vectors else {}
        if "latents" in vectors:
            sums, squares = vectors["latents"][:-1].chunk(2)
            count = vectors["latents"][-1].clamp_min(1.0)
            found["latent_variance"] = (squares / count - (sums / count).square()).mean()
        return found

    def review(self, record: Mapping[str, float], positions: int) -> dict[str, float]:
        """With the regulariser: lambda, and the share of the latents' variance that it leaves unexplained."""
        crt = self.config.crt
        if crt is None or "crt" not in record:
            return {}
        found = {"crt_weight": crt.weight_at(int(record["step"]))}
        if crt.reduction == "mean_all" and record.get("latent_variance", 0.0) > 0:
            found["crt_unexplained"] = record["crt"] / record["latent_variance"]
        return found

    def facts(self) -> dict[str, object]:
        return {} if self._perceptual is None else {"perceptual": self._perceptual.facts}

    def flops_per_token(self, sequence_length: int) -> float:
        return self.config.flops_per_token(sequence_length)


def _count_images(batch: PackedBatch) -> int:
    """Rows that are pictures; those that only fill a round of evaluation come last and are left out."""
    return batch.host_counts.get(IMAGES, batch.rows)


def _named(networks: Mapping[str, nn.Module], network: str) -> tuple[str, ...]:
    return tuple(f"{network}/{name}" for name, _ in networks[network].named_parameters())


def build_task(config: Config) -> ImageTokenizerTask:
    return ImageTokenizerTask(config)
