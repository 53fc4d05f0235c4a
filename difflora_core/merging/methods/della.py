"""DELLA (Deep et al. 2024, arXiv 2406.11617): drop small entries more often than large ones.

Within each row the drop probability falls linearly with the rank of the magnitude (MAGPRUNE); what
stays is rescaled by its own probability, then signs are elected and agreeing entries averaged.
Works on single entries, so it depends on the basis of the weights, as published, and not on how
the LoRAs are factored. Seeded per layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..stack import Options, Stack
from .elections import elect, uniform
from .method import Method

#: widest spread of the drop probability around its mean
_SPREAD = 0.15


def merge(stack: Stack, options: Options) -> Tensor:
    deltas = stack.deltas()
    keep = keep_probability(deltas, options.density)
    kept = uniform(deltas.shape, options.seed, stack.name, deltas.device) < keep
    return elect(torch.where(kept, deltas / keep, 0.0), stack.weight_tensor(), stack.mass)


def keep_probability(deltas: Tensor, density: float) -> Tensor:
    """[T, rows, columns]: density in the mean of every row, more for larger magnitudes."""
    spread = min(_SPREAD, 2 * density, 2 * (1 - density))
    place = deltas.abs().argsort(-1).argsort(-1).to(deltas.dtype) / max(deltas.shape[-1] - 1, 1)
    return density + spread * (place - 0.5)


METHOD = Method(
    "della",
    "Drop entries at random, small ones more often, elect signs, average.",
    merge,
    uses_density=True,
)
