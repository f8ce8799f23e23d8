"""Denoising diffusion: noise schedules, targets, and steps back from noise; for any tensors with images first.

x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps with t from 0 to T - 1; t = 0 has a little noise already. I images.
Sources: Ho et al., arXiv 2006.11239; Nichol and Dhariwal, arXiv 2102.09672 (cosine, learned variances); Salimans and Ho,
arXiv 2202.00512 (v); Song et al., arXiv 2010.02502 (DDIM).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Diffusion", "alphas_bar", "spaced_timesteps"]

Prediction = Literal["epsilon", "v"]
COSINE_OFFSET = 0.008
LARGEST_BETA = 0.999
LINEAR_BETAS = (1e-4, 0.02)
"""Of 1000 steps; other numbers of steps scale them, as in improved diffusion."""
HALF_BIN = 1 / 255
"""Half the width that the likelihood at t = 0 gives a value: 8 bits over [-1, 1]; published code takes it for latents too."""
OPEN_BIN = 0.999
"""Bins beyond it are open."""
LEAST_PROBABILITY = 1e-12


def alphas_bar(schedule: Literal["cosine", "linear"], timesteps: int) -> Tensor:
    """(T,) fp64 on the CPU, whatever the default device: the share of signal variance at each noise level.

    cosine: f(u) = cos^2((u + s)/(1 + s) pi/2), beta_i = min(1 - f((i+1)/T)/f(i/T), 0.999); arXiv 2102.09672, equation 17.
    linear: beta from 1e-4 to 0.02 at T = 1000; arXiv 2006.11239, section 4.
    """
    if schedule == "linear":
        scale = 1000 / timesteps
        low, high = (min(scale * beta, LARGEST_BETA) for beta in LINEAR_BETAS)
        betas = torch.linspace(low, high, timesteps, dtype=torch.float64, device="cpu")
    else:
        at = torch.arange(timesteps + 1, dtype=torch.float64, device="cpu") / timesteps
        signal = torch.cos((at + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2) ** 2
        betas = (1 - signal[1:] / signal[:-1]).clamp(max=LARGEST_BETA)
    return torch.cumprod(1 - betas, 0)


def spaced_timesteps(timesteps: int, count: int) -> list[int]:
    """`count` noise levels from T - 1 down to 0, evenly spaced.

    Raises:
        ValueError: fewer than one, or more than there are.
    """
    if not 1 <= count <= timesteps:
        raise ValueError(
            f"{count} sampling steps of {timesteps} noise levels; take 1 to {timesteps}"
        )
    if count == 1:
        return [timesteps - 1]
    return [round((timesteps - 1) * (1 - i / (count - 1))) for i in range(count)]


class Diffusion:
    """A schedule with what a model predicts on it.

    Args:
        timesteps: T.
        schedule: see `alphas_bar`.
        prediction: `epsilon`, the noise, or `v` = sqrt(abar) eps - sqrt(1 - abar) x_0.
        shift: sqrt(abar / (1 - abar)) is divided by it at every noise level: more noise where there is more to average over.
    """

    def __init__(
        self,
        timesteps: int = 1000,
        schedule: Literal["cosine", "linear"] = "cosine",
        prediction: Prediction = "epsilon",
        shift: float = 1.0,
    ) -> None:
        self.timesteps = timesteps
        self.prediction = prediction
        self.alphas_bar = alphas_bar(schedule, timesteps)
        if shift != 1:
            self.alphas_bar = 1 / (1 + shift**2 * (1 / self.alphas_bar - 1))
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._posterior: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def scales(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar_t) and sqrt(1 - abar_t), (I, 1, ...) with as many dimensions as `like`, fp32 or fp64."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        key = (t.device, dtype)
        if key not in self._tables:
            roots = (self.alphas_bar.sqrt(), (1 - self.alphas_bar).sqrt())
            self._tables[key] = (roots[0].to(*key), roots[1].to(*key))
        shape = (-1, *[1] * (like.dim() - 1))
        signal, noise = (table[t].view(shape) for table in self._tables[key])
        return signal, noise

    def noised(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t of images (I, ...) at noise levels t (I,) int64."""
        signal, spread = self.scales(t, x0)
        return signal * x0 + spread * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the model is to predict from x_t."""
        if self.prediction == "epsilon":
            return noise
        signal, spread = self.scales(t, x0)
        return signal * noise - spread * x0

    def split(
        self,
        predicted: Tensor,
        x_t: Tensor,
        t: Tensor,
        bounds: tuple[float, float] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(x_0, eps) that a prediction stands for.

        Args:
            bounds: x_0 is cut to them and eps follows from it. At the highest noise level x_0 is a quotient by 5e-5 of what
                epsilon leaves over, so sampling with `epsilon` needs them.
        """
        signal, spread = self.scales(t, x_t)
        if self.prediction == "v":
            x0 = signal * x_t - spread * predicted
            eps = spread * x_t + signal * predicted
        else:
            x0, eps = (x_t - spread * predicted) / signal, predicted
        if bounds is not None:
            x0 = x0.clamp(*bounds)
            eps = (x_t - signal * x0) / spread
        return x0, eps

    def step(
        self,
        x0: Tensor,
        eps: Tensor,
        t: int,
        t_next: int | None,
        *,
        eta: float = 0.0,
        noise: Tensor | None = None,
        log_variance: Tensor | None = None,
    ) -> Tensor:
        """From noise level t to a lower one: DDIM (arXiv 2010.02502, equation 12).

        Args:
            x0, eps: of `split`.
            t_next: None is the end, which gives x0.
            eta: 0 is DDIM and needs no noise; 1 is the ancestral step of DDPM with the smaller of its two variances.
            noise: standard normal, of the shape of x0; needed above eta 0.
            log_variance: of the random part, instead of what follows from eta; see `step_log_variance`.
        """
        if t_next is None:
            return x0
        before, after = float(self.alphas_bar[t]), float(self.alphas_bar[t_next])
        variance = eta**2 * (1 - after) / (1 - before) * (1 - before / after)
        result = math.sqrt(after) * x0 + math.sqrt(max(0.0, 1 - after - variance)) * eps
        if variance == 0:
            return result
        if noise is None:
            raise ValueError(f"eta is {eta}: a random step needs noise")
        if log_variance is not None:
            return result + (0.5 * log_variance).exp() * noise
        return result + math.sqrt(variance) * noise

    def step_log_variance(self, fraction: Tensor, t: int, t_next: int) -> Tensor:
        """Log variance of an ancestral step, between its two bounds (arXiv 2102.09672, equation 15).

        Args:
            fraction: what the model says: -1 is the variance of q(x_next | x_t, x_0), 1 that of q(x_t | x_next).
        """
        before, after = float(self.alphas_bar[t]), float(self.alphas_bar[t_next])
        beta = 1 - before / after
        low, high = math.log(beta * (1 - after) / (1 - before)), math.log(beta)
        return low + (fraction + 1) / 2 * (high - low)

    def variational_bits(
        self, x0: Tensor, x_t: Tensor, t: Tensor, predicted: Tensor, fraction: Tensor
    ) -> Tensor:
        """Bits a value of the variational bound's term at t, which trains variances (arXiv 2102.09672, section 3.1).

        KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), at t = 0 the negative log-likelihood of x_0 in 8-bit bins. The mean
        gets no gradient.

        Args:
            x0, x_t: (I, ...), with t (I,).
            predicted: of the mean, as `split` takes it.
            fraction: of the log variance, as `step_log_variance` takes it.

        Returns:
            (I,), means over each image's values.
        """
        low, high, of_x0, of_xt = self._posterior_terms(t, x0)
        log_variance = low + (fraction + 1) / 2 * (high - low)
        guess, _ = self.split(predicted.detach(), x_t, t)
        gap = of_x0 * (x0 - guess)
        divergence = 0.5 * (
            log_variance - low - 1 + (low - log_variance).exp() + gap**2 * (-log_variance).exp()
        )
        surprise = _binned_surprise(x0, of_x0 * guess + of_xt * x_t, log_variance)
        is_first = (t == 0).view(-1, *[1] * (x0.dim() - 1))
        return torch.where(is_first, surprise, divergence).flatten(1).mean(1) / math.log(2)

    def _posterior_terms(self, t: Tensor, like: Tensor) -> tuple[Tensor, ...]:
        """(I, 1, ...) each: log variance of q(x_{t-1} | x_t, x_0) and of q(x_t | x_{t-1}), weights of x_0 and x_t in the first's mean.

        The variance at t = 0 is none; that of t = 1 stands in its place.
        """
        key = (t.device, torch.promote_types(like.dtype, torch.float32))
        if key not in self._posterior:
            now = self.alphas_bar
            before = torch.cat((torch.ones_like(now[:1]), now[:-1]))
            alpha = now / before
            variance = (1 - alpha) * (1 - before) / (1 - now)
            low = torch.cat((variance[1:2], variance[1:])).log()
            of_x0 = before.sqrt() * (1 - alpha) / (1 - now)
            of_xt = alpha.sqrt() * (1 - before) / (1 - now)
            self._posterior[key] = torch.stack((low, (1 - alpha).log(), of_x0, of_xt)).to(*key)
        shape = (4, -1, *[1] * (like.dim() - 1))
        return self._posterior[key][:, t].view(shape).unbind()


def _binned_surprise(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """-ln of the probability that a normal number falls into the 8-bit bin of x."""
    scale = (-0.5 * log_variance).exp()
    above = torch.special.ndtr(scale * (x - mean + HALF_BIN))
    below = torch.special.ndtr(scale * (x - mean - HALF_BIN))
    share = torch.where(x < -OPEN_BIN, above, torch.where(x > OPEN_BIN, 1 - below, above - below))
    return -share.clamp(min=LEAST_PROBABILITY).log()
