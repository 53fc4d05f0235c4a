"""The exact weighted sum with all factors kept, rank sum r_i: PEFT's `cat`.

The same as `sum` without a limit of rank, and it refuses one.
"""

from __future__ import annotations

from ..stack import Options, Product, Stack
from .method import Method


def merge(stack: Stack, options: Options) -> Product:
    return stack.weighted_sum()


METHOD = Method(
    "concat",
    "Exact sum with all ranks kept; the file grows with every LoRA.",
    merge,
    linear=True,
    ratios=False,
)
