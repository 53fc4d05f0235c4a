"""Steps that TIES, DELLA, KnOTS and the core-space merge share, on tensors [T, rows, columns]."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def trim(values: Tensor, density: float) -> Tensor:
    """Zero all but the largest share `density` of each input's entries, by magnitude."""
    if density >= 1:
        return values
    flat = values.abs().flatten(1)
    kept = max(1, round(density * flat.shape[1]))
    limit = flat.kthvalue(flat.shape[1] - kept + 1, dim=1).values[:, None, None]
    return torch.where(values.abs() >= limit, values, 0.0)


def elect(values: Tensor, weights: Tensor, total: float) -> Tensor:
    """Disjoint mean: every entry is the weighted mean of those inputs that share its elected sign.

    The sign of an entry is that of the weighted sum (Yadav et al. 2023, "TIES-Merging",
    algorithm 1). The mean is multiplied by `total`, the sum of the weights' magnitudes over all
    inputs, those that lack the layer too. [T, ...] -> [...].
    """
    weighted = values * weights
    sign = weighted.sum(0).sign()
    agree = (weighted.sign() == sign) & (sign != 0)
    mass = torch.where(agree, weights.abs(), 0.0).sum(0)
    mean = torch.where(agree, weighted, 0.0).sum(0) / torch.where(mass > 0, mass, 1.0)
    return mean * total


def uniform(shape: torch.Size, seed: int, name: str, device: torch.device) -> Tensor:
    """Numbers in 0..1 of one layer, equal on every device and whatever the order of layers."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.rand(shape, generator=generator).to(device)
