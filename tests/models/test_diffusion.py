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


def test_a_shift_divides_the_signal_to_noise_ratio() -> None:
    plain, shifted = Diffusion(1000, "linear"), Diffusion(1000, "linear", shift=2.0)
    ratios = [(d.alphas_bar / (1 - d.alphas_bar)).sqrt() for d in (plain, shifted)]
    torch.testing.assert_close(ratios[0] / 2, ratios[1])


def test_the_variational_term_is_the_divergence_of_two_normal_distributions() -> None:
    """Against torch.distributions on posteriors from Bayes' rule, one level at a time."""
    diffusion = Diffusion(50, "linear")
    generator = torch.Generator().manual_seed(0)
    x0, noise, eps = torch.randn(3, 3, 2, 4, 4, generator=generator, dtype=torch.float64)
    fraction = torch.rand(3, 2, 4, 4, generator=generator, dtype=torch.float64) * 2 - 1
    t = torch.tensor([1, 20, 49])
    x_t = diffusion.noised(x0, noise, t)
    found = diffusion.variational_bits(x0, x_t, t, eps, fraction)
    guess, _ = diffusion.split(eps, x_t, t)
    for i, level in enumerate(t.tolist()):
        before, now = diffusion.alphas_bar[level - 1], diffusion.alphas_bar[level]
        alpha = now / before
        precision = alpha / (1 - alpha) + 1 / (1 - before)

        def mean(image: torch.Tensor, a=alpha, b=before, p=precision, i: int = i) -> torch.Tensor:
            return (a.sqrt() * x_t[i] / (1 - a) + b.sqrt() * image / (1 - b)) / p

        log_variance = diffusion.step_log_variance(fraction[i], level, level - 1)
        truth = torch.distributions.Normal(mean(x0[i]), precision**-0.5)
        model = torch.distributions.Normal(mean(guess[i]), (0.5 * log_variance).exp())
        bits = torch.distributions.kl_divergence(truth, model).mean() / math.log(2)
        torch.testing.assert_close(found[i], bits)


def test_the_term_of_the_last_step_is_a_likelihood_of_bins() -> None:
    diffusion = Diffusion(1000, "linear")
    values = (torch.arange(256, dtype=torch.float64) * 2 - 255) / 255
    # One image a value, all with the same x_t and prediction: the bins' shares add up to one.
    x0 = values.view(-1, 1, 1, 1)
    x_t, eps = torch.full_like(x0, 0.2), torch.full_like(x0, 0.3)
    bits = diffusion.variational_bits(
        x0, x_t, torch.zeros(256, dtype=torch.int64), eps, torch.zeros_like(x0)
    )
    assert (2.0**-bits).sum().item() == pytest.approx(1, abs=1e-6)


def test_the_variational_term_trains_variances_alone() -> None:
    diffusion = Diffusion(1000, "linear")
    x0, noise, eps, fraction = torch.randn(4, 2, 1, 2, 2).unbind()
    eps.requires_grad_()
    fraction.requires_grad_()
    t = torch.tensor([0, 500])
    x_t = diffusion.noised(x0, noise, t)
    diffusion.variational_bits(x0, x_t, t, eps, fraction).sum().backward()
    assert eps.grad is None
    assert fraction.grad.abs().min() > 0


def test_a_step_takes_a_learned_variance() -> None:
    diffusion = Diffusion(1000, "linear")
    x0, eps = torch.zeros(2, 1, dtype=torch.float64)
    one = torch.ones_like(x0)
    for fraction, variance in (
        (1.0, 1 - diffusion.alphas_bar[600] / diffusion.alphas_bar[560]),
        (-1.0, diffusion.step(x0, eps, 600, 560, eta=1, noise=one)[0] ** 2),
    ):
        learned = diffusion.step_log_variance(fraction * one, 600, 560)
        step = diffusion.step(x0, eps, 600, 560, eta=1, noise=one, log_variance=learned)
        torch.testing.assert_close(step[0] ** 2, variance)
