"""The diffusion process over LoRA latents: one wrapper used by training and by sampling alike.

Time t runs from 0 (clean) to 1 (noise): z_t = alpha(t) z_0 + sigma(t) noise with
alpha^2 + sigma^2 = 1. Latents have unit variance, so the network input needs no further scaling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

BETA_MIN, BETA_MAX = 0.1, 20.0  # continuous form of DDPM's linear betas (Song et al. 2021, eq. 32)
MAX_WEIGHT = 5.0  # as gamma in min-SNR weighting (Hang et al. 2023)


@dataclass(frozen=True)
class DiffusionConfig:
    schedule: Literal["cosine", "linear"] = "cosine"
    target: Literal["x0", "v"] = "v"
    """what the network puts out"""
    weight: Literal["uniform", "snr"] = "snr"
    """weight of the x0 error: 1, or min(1 / sigma^2, 5) which is the plain v loss, capped"""
    times: Literal["uniform", "noisy"] = "noisy"
    """training times: uniform, or half of them near pure noise, where few-step sampling decides"""


class Diffusion:
    """Scalings, targets and weights; holds no parameters."""

    def __init__(self, config: DiffusionConfig) -> None:
        self.config = config

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """t [B] in 0..1 -> alpha, sigma [B, 1, 1], float32."""
        t = rearrange(t.float(), "b -> b 1 1")
        if self.config.schedule == "cosine":
            return torch.cos(t * math.pi / 2), torch.sin(t * math.pi / 2)
        log_alpha = -0.25 * (BETA_MAX - BETA_MIN) * t**2 - 0.5 * BETA_MIN * t
        return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()

    def add_noise(self, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """z_0, noise [B, T, C], t [B] -> z_t [B, T, C]"""
        alpha, sigma = self.alpha_sigma(t)
        return alpha * z0 + sigma * noise

    def to_x0(self, output: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """Network output [B, T, C] -> prediction of z_0 (float32).

        v = alpha noise - sigma z_0 (Salimans and Ho 2022), hence z_0 = alpha z_t - sigma v.
        """
        if self.config.target == "x0":
            return output.float()
        alpha, sigma = self.alpha_sigma(t)
        return alpha * z_t - sigma * output.float()

    def to_noise(self, x0: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """The noise that z_t holds if z_0 is x0; t > 0."""
        alpha, sigma = self.alpha_sigma(t)
        return (z_t - alpha * x0) / sigma

    def step(self, x0: Tensor, z_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Deterministic DDIM step (Song et al. 2020, eq. 12 with eta 0) from t down to s < t."""
        return self.add_noise(x0, self.to_noise(x0, z_t, t), s)

    def sample_times(self, count: int, generator: torch.Generator, device: str = "cpu") -> Tensor:
        """Training times [count] in (0, 1], drawn on the generator's device, moved to `device`."""
        u = 1 - torch.rand(count, generator=generator, device=generator.device)
        if self.config.times == "noisy":
            late = torch.rand(count, generator=generator, device=generator.device) < 0.5
            u = torch.where(late, 1 - 0.2 * u, u)
        return u.clamp(1e-3, 1.0).to(device)

    def weight(self, t: Tensor) -> Tensor:
        """Weight of the squared error of x0, [B, 1, 1]."""
        _, sigma = self.alpha_sigma(t)
        if self.config.weight == "uniform":
            return torch.ones_like(sigma)
        return (1 / sigma.square()).clamp(max=MAX_WEIGHT)

    def loss(self, x0: Tensor, z0: Tensor, t: Tensor) -> Tensor:
        """Weighted mean squared error of the prediction x0 against z0, a scalar."""
        return (self.weight(t) * (x0.float() - z0.float()).square()).mean()
