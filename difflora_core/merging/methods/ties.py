"""TIES (Yadav et al. 2023, arXiv 2306.01708): trim, elect signs, mean of those that agree.

Works on single entries of the weight differences, so it depends on the basis of the weights, as
published: rotating a layer's inputs changes the result. It does not depend on how the LoRAs are
factored. The result has full rank and is compressed afterwards.
"""

from __future__ import annotations

from torch import Tensor

from ..stack import Options, Stack
from .elections import elect, trim
from .method import Method


def merge(stack: Stack, options: Options) -> Tensor:
    return elect(trim(stack.deltas(), options.density), stack.weight_tensor(), stack.mass)


METHOD = Method(
    "ties",
    "Trim small entries, elect signs, average those that agree.",
    merge,
    uses_density=True,
)
