"""Epsilon prediction on Stable Diffusion's schedule: noising, loss weight, training loss."""

from __future__ import annotations

import torch
from torch import Tensor

from .models import alphas

STEPS = 1000
"""Timesteps of the schedule."""


class NoiseSchedule:
    """Tables [1000] on one device; t are integer timesteps [B]."""

    def __init__(self, device: torch.device) -> None:
        self.alpha = alphas(device)
        self.signal = self.alpha.sqrt()
        self.noise = (1 - self.alpha).sqrt()

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t [B, 4, H, W] (Ho et al. 2020, eq. 4)."""
        return _wide(self.signal[t]) * latents + _wide(self.noise[t]) * noise

    def min_snr_weight(self, t: Tensor, gamma: float) -> Tensor:
        """min(SNR, gamma) / SNR, the epsilon form of Hang et al. 2023, eq. 5; ones for gamma 0."""
        snr = self.alpha[t] / (1 - self.alpha[t])
        return snr.clamp(max=gamma) / snr if gamma else torch.ones_like(snr)

    def spread(self, count: int) -> Tensor:
        """One random timestep out of each of `count` equal parts of the schedule, int64 [count].

        Every t is as likely as under independent draws, and the loss of a batch varies less
        (Kingma et al. 2021, "Variational Diffusion Models", appendix I.1).
        """
        device = self.alpha.device
        parts = torch.arange(count, device=device) + torch.rand(count, device=device)
        return (parts * (STEPS / count)).long().clamp(max=STEPS - 1)

    def loss(self, predicted: Tensor, noise: Tensor, t: Tensor, gamma: float = 0.0) -> Tensor:
        """Squared error per sample [B], weighted."""
        error = (predicted.float() - noise).square().mean((1, 2, 3))
        return error * self.min_snr_weight(t, gamma)


def _wide(value: Tensor) -> Tensor:
    return value[:, None, None, None]
