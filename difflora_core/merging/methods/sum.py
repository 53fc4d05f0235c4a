"""The exact weighted sum of the differences: what applying all LoRAs one after another gives.

Weights are strengths, not ratios (Ilharco et al. 2023, "Editing models with task arithmetic").
"""

from __future__ import annotations

from ..stack import Options, Product, Stack
from .method import Method


def merge(stack: Stack, options: Options) -> Product:
    return stack.weighted_sum()


METHOD = Method(
    "sum",
    "Exact sum of the differences; weights are true strengths.",
    merge,
    linear=True,
    ratios=False,
)
