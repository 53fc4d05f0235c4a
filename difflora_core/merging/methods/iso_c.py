"""Iso-C (Marczak et al. 2025, arXiv 2502.04959): the sum with all singular values made equal.

The weighted sum is limited to the asked rank first, and the singular values kept are replaced by
their mean; flattening before truncating would leave nothing to truncate by. Independent of any
basis and of the factorisation. A single LoRA is flattened too: merging X with itself is not X.
"""

from __future__ import annotations

from ..stack import Options, Product, Stack
from ..truncation import decomposed
from .method import Method


def merge(stack: Stack, options: Options) -> Product:
    core = decomposed(*stack.weighted_sum())
    kept = min(options.rule.choose(core.sigma, float(core.norm)), int(core.meaningful))
    flat = core.sigma[:kept].mean()
    up = core.up @ core.left[:, :kept] * flat
    down = core.right[:, :kept].mT @ core.down / core.sigma[:kept, None]
    return up.float(), down.float()


METHOD = Method(
    "iso_c",
    "Sum with all kept singular values made equal (isotropic).",
    merge,
    chooses_rank=True,
)
