"""Per-slot standardisation whose statistics are stored with the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Standardise(nn.Module):
    """(x - mean) / std per slot, and its inverse; the identity until fitted."""

    mean: Tensor
    std: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("std", torch.ones(shape))

    @torch.no_grad()
    def fit(self, samples: Tensor, floor: float = 0.05) -> None:
        """Set the statistics from samples [N, *shape].

        A standard deviation below `floor` times the root mean square over all slots is raised to
        that, so that a slot that hardly varies in the training set cannot explode.
        """
        samples = samples.float()
        std = samples.std(0, correction=0)
        least = floor * std.square().mean().sqrt()
        self.mean.copy_(samples.mean(0))
        self.std.copy_(std.clamp_min(float(least.clamp_min(1e-8))))

    def forward(self, x: Tensor) -> Tensor:
        """[..., *shape] in original units -> standard units (float32)."""
        return (x.float() - self.mean) / self.std

    def inverse(self, x: Tensor) -> Tensor:
        """[..., *shape] in standard units -> original units (float32)."""
        return x.float() * self.std + self.mean
