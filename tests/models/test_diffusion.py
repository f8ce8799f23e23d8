"""Noise schedules and steps back from noise."""

from __future__ import annotations

import math

import pytest
import torch
from weft.models.diffusion import Diffusion, alphas_bar, spaced_timesteps


def test_the_cosine_schedule_is_the_paper_s() -> None:
    table = alphas_bar("cosine", 1000)
    assert table.dtype == torch.float64

    def signal(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    product = 1.0
    for i in range(1000):
        product *= 1 - min(1 - signal((i + 1) / 1000) / signal(i / 1000), 0.999)
        assert table[i].item() == pytest.approx(product, rel=1e-9)
    assert math.sqrt(table[999]) == pytest.approx(4.9e-5, rel=0.02)
    assert table[0] == pytest.approx(0.99996, abs=1e-5)


def test_the_linear_schedule_is_ddpm_s() -> None:
    table = alphas_bar("linear", 1000)
    assert table[0] == pytest.approx(1 - 1e-4)
    assert table[999] == pytest.approx(4.0e-5, rel=0.02)
    assert table[500] == pytest.approx(0.0775, rel=0.01)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_a_perfect_prediction_gives_back_image_and_noise(schedule: str, prediction: str) -> None:
    diffusion = Diffusion(1000, schedule, prediction)
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 5, 1, 4, 4, generator=generator, dtype=torch.float64)
    t = torch.tensor([0, 10, 500, 900, 990])
    x_t = diffusion.noised(x0, noise, t)
    back, eps = diffusion.split(diffusion.target(x0, noise, t), x_t, t)
    torch.testing.assert_close(back, x0, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(eps, noise, rtol=1e-8, atol=1e-8)
    cut, eps = diffusion.split(diffusion.target(x0, noise, t), x_t, t, bounds=(-0.5, 0.5))
    assert cut.abs().max() <= 0.5
    torch.testing.assert_close(diffusion.noised(cut, eps, t), x_t)


def test_ddim_steps_with_a_known_image_arrive_at_it() -> None:
    diffusion = Diffusion()
    x0 = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    x = torch.randn_like(x0)
    steps = spaced_timesteps(1000, 20)
    for t, t_next in zip(steps, [*steps[1:], None], strict=True):
        signal, spread = diffusion.scales(torch.tensor([t]), x)
        x = diffusion.step(x0, (x - signal * x0) / spread, t, t_next)
    torch.testing.assert_close(x, x0)


def test_the_ancestral_step_has_the_posterior_s_mean_and_variance() -> None:
    """Of q(x_s | x_t, x_0) by Bayes' rule on the two Gaussians, independent of the closed form."""
    diffusion = Diffusion(1000, "linear")
    t, s = 600, 560
    before, after = diffusion.alphas_bar[t].item(), diffusion.alphas_bar[s].item()
    x0, x_t = 0.7, -0.4
    ratio = before / after
    precision = 1 / (1 - after) + ratio / (1 - ratio)
    mean = (math.sqrt(after) * x0 / (1 - after) + math.sqrt(ratio) * x_t / (1 - ratio)) / precision
    eps = (x_t - math.sqrt(before) * x0) / math.sqrt(1 - before)
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    image, noise = x0 * one, eps * one
    assert diffusion.step(image, noise, t, s, eta=1, noise=zero).item() == pytest.approx(mean)
    spread = diffusion.step(image, noise, t, s, eta=1, noise=one).item() - mean
    assert spread**2 == pytest.approx(1 / precision)
    with pytest.raises(ValueError, match="needs noise"):
        diffusion.step(image, noise, t, s, eta=1)


def test_spaced_timesteps() -> None:
    assert spaced_timesteps(1000, 1000) == list(range(999, -1, -1))
    steps = spaced_timesteps(1000, 250)
    assert steps[0] == 999
    assert steps[-1] == 0
    assert len(set(steps)) == 250
    assert spaced_timesteps(1000, 1) == [999]
    with pytest.raises(ValueError, match="take 1 to 1000"):
        spaced_timesteps(1000, 1001)
