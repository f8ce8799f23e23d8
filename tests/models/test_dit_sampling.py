"""Latents denoised from noise: guidance, steps, ratios, independence of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from test_dit_network import MIXED, RATIOS, random_model
from weft.models.diffusion import Diffusion, spaced_timesteps
from weft.models.dit.config import Config
from weft.models.dit.sampling import LatentSampling, draw_ratios, guide_noise, sample_latents
from weft.models.errors import ConfigError, DataError
from weft.models.multimodal.task import image_generator

INDICES = [3, 4, 5, 6, 7]
RATIOS_OF = [16, 8, 32, 16, 32]
LABELS = torch.tensor([0, 1, 2, 3, 4])


class Knows(torch.nn.Module):
    """Predicts exactly the noise in images whose clean form is one number a class."""

    def __init__(self, config: Config, fraction: float = -1.0) -> None:
        super().__init__()
        self.config = config
        self.patches = torch.nn.Linear(1, 1)
        self.diffusion = Diffusion(config.timesteps, config.schedule)
        self.fraction = fraction

    def forward(
        self, images: Sequence[torch.Tensor], t: torch.Tensor, labels: torch.Tensor, ratios: Any
    ) -> list[torch.Tensor]:
        found, start = [], 0
        for x in images:
            part = slice(start, start := start + len(x))
            signal, spread = self.diffusion.scales(t[part], x)
            clean = (labels[part] * 0.2 - 0.5).view(-1, 1, 1, 1)
            eps = (x - signal * clean) / spread
            found.append(torch.cat((eps, torch.full_like(x, self.fraction)), 1))
        return found


@pytest.mark.parametrize("method", ["ddim", "ddpm"])
@pytest.mark.parametrize("fraction", [-1.0, 1.0])
def test_a_model_that_knows_the_images_draws_them(method: str, fraction: float) -> None:
    config = Config(**MIXED)
    sampling = LatentSampling(steps=20, method=method)
    found = sample_latents(Knows(config, fraction), LABELS, RATIOS_OF, INDICES, 0, sampling)
    for latents, label, ratio in zip(found, LABELS.tolist(), RATIOS_OF, strict=True):
        item = next(r for r in RATIOS if r.ratio == ratio)
        assert tuple(latents.shape) == (3, 64 // ratio, 64 // ratio)
        wanted = (label * 0.2 - 0.5) * item.std[0] + item.mean[0]
        torch.testing.assert_close(latents, torch.full_like(latents, wanted), atol=1e-3, rtol=0)


@pytest.mark.parametrize("method", ["ddim", "ddpm"])
def test_an_image_does_not_depend_on_its_batch(method: str) -> None:
    config = Config(**MIXED)
    model = random_model(config, std=0.1)
    sampling = LatentSampling(steps=8, method=method, guidance=2.0)
    whole = sample_latents(model, LABELS, RATIOS_OF, INDICES, 0, sampling)
    for chosen in ([1], [4, 0, 3]):
        part = sample_latents(
            model,
            LABELS[chosen],
            [RATIOS_OF[i] for i in chosen],
            [INDICES[i] for i in chosen],
            0,
            sampling,
        )
        for i, latents in zip(chosen, part, strict=True):
            scale = whole[i].abs().max().item()
            torch.testing.assert_close(latents, whole[i], rtol=1e-3, atol=1e-3 * scale)
    other = sample_latents(model, LABELS, RATIOS_OF, INDICES, 1, sampling)
    assert (other[0] - whole[0]).abs().max() > 0.1


def test_a_guided_image_by_hand() -> None:
    """One image, DDIM, with the class and without it in passes of their own."""
    config = Config(**MIXED)
    model = random_model(config, std=0.1)
    sampling = LatentSampling(steps=5, method="ddim", guidance=3.0, guided_channels=2)
    found = sample_latents(model, torch.tensor([2]), [32], [9], 4, sampling)[0]
    drawn = image_generator(4, 9, 0).standard_normal((3, 2, 2), dtype=np.float32)
    x = torch.from_numpy(drawn)[None]
    diffusion = Diffusion(1000, "linear")
    levels = spaced_timesteps(1000, 5)
    with torch.no_grad():
        for t, t_next in zip(levels, [*levels[1:], None], strict=True):
            level = torch.tensor([t])
            given, without = (model([x], level, torch.tensor([c]), [2])[0] for c in (2, 5))
            eps = without + 3.0 * (given - without)
            eps = torch.cat((eps[:, :2], given[:, 2:3]), 1)
            signal, spread = diffusion.scales(level, x)
            clean = (x - spread * eps) / signal
            if t_next is None:
                x = clean
            else:
                signal, spread = diffusion.scales(torch.tensor([t_next]), x)
                x = signal * clean + spread * eps
    wanted = x[0] * RATIOS[2].std[0] + RATIOS[2].mean[0]
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())


def test_guidance_of_all_and_of_the_first_channels() -> None:
    given, without = torch.ones(1, 4, 1, 1), torch.zeros(1, 4, 1, 1)
    assert guide_noise(given, without, 2.5, None).flatten().tolist() == [2.5] * 4
    assert guide_noise(given, without, 2.5, 3).flatten().tolist() == [2.5, 2.5, 2.5, 1.0]


def test_ratios_are_drawn_by_class_and_index() -> None:
    config = Config(**MIXED)
    labels = torch.zeros(600, dtype=torch.int64)
    shares = {0: [1, 2, 1], 1: [0, 0, 5]}
    drawn = draw_ratios(config, labels, range(600), 0, shares)
    counts = [drawn.count(r) for r in (8, 16, 32)]
    assert [c / 600 for c in counts] == pytest.approx([0.25, 0.5, 0.25], abs=0.06)
    assert draw_ratios(config, labels[:5], range(100, 105), 0, shares) == drawn[100:105]
    assert draw_ratios(config, labels[:3] + 1, range(3), 0, shares) == [32] * 3
    assert set(draw_ratios(config, labels, range(600), 0)) == {8, 16, 32}
    with pytest.raises(ConfigError, match="class 2 has no shares of ratios"):
        draw_ratios(config, torch.tensor([2]), [0], 0, shares)


def test_what_cannot_be_sampled_is_one_line() -> None:
    config = Config(**MIXED)
    model = Knows(config)
    with pytest.raises(ConfigError, match="ratio 4 is none of the model's: 8, 16, 32"):
        sample_latents(model, LABELS[:1], [4], [0], 0)
    with pytest.raises(ConfigError, match="2 labels and 1 ratios for 1 images"):
        sample_latents(model, LABELS[:2], [8], [0], 0)
    with pytest.raises(DataError, match="class 9"):
        sample_latents(model, torch.tensor([9]), [8], [0], 0)
    with pytest.raises(ConfigError, match="2000 sampling steps of 1000"):
        sample_latents(model, LABELS[:1], [8], [0], 0, LatentSampling(steps=2000))
    with pytest.raises(ConfigError, match="mean and std"):
        sample_latents(Knows(Config(image_size=64)), LABELS[:1], [8], [0], 0)
    for settings in ({"guidance": 0.0}, {"steps": 0}, {"guided_channels": 0}):
        with pytest.raises(ConfigError):
            LatentSampling(**settings)
