"""DARE (Yu et al. 2024, arXiv 2311.03099): drop entries at random, rescale the rest, average.

Works on single entries, so it depends on the basis of the weights, as published, and not on how
the LoRAs are factored. Seeded per layer: equal seeds give equal files.
"""

from __future__ import annotations

from torch import Tensor

from ..stack import Options, Stack
from .elections import uniform
from .method import Method


def merge(stack: Stack, options: Options) -> Tensor:
    deltas = stack.deltas()
    kept = uniform(deltas.shape, options.seed, stack.name, deltas.device) < options.density
    return (deltas * kept * stack.weight_tensor()).sum(0) / options.density


METHOD = Method(
    "dare", "Drop entries at random, rescale the rest, average.", merge, uses_density=True
)
