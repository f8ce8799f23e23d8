"""Denoising diffusion: noise schedules, targets, and steps back from noise; for any tensors with images first.

x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps with t from 0 to T - 1; t = 0 has a little noise already. I images.
Sources: Ho et al., arXiv 2006.11239; Nichol and Dhariwal, arXiv 2102.09672 (cosine); Salimans and Ho, arXiv 2202.00512
(v); Song et al., arXiv 2010.02502 (DDIM).
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
    """

    def __init__(
        self,
        timesteps: int = 1000,
        schedule: Literal["cosine", "linear"] = "cosine",
        prediction: Prediction = "epsilon",
    ) -> None:
        self.timesteps = timesteps
        self.prediction = prediction
        self.alphas_bar = alphas_bar(schedule, timesteps)
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

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
    ) -> Tensor:
        """From noise level t to a lower one: DDIM (arXiv 2010.02502, equation 12).

        Args:
            x0, eps: of `split`.
            t_next: None is the end, which gives x0.
            eta: 0 is DDIM and needs no noise; 1 is the ancestral step of DDPM with the smaller of its two variances.
            noise: standard normal, of the shape of x0; needed above eta 0.
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
        return result + math.sqrt(variance) * noise
