"""What a merging method is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..stack import Options, Product, Stack

Exact = Product | Tensor
"""the merged layer before any limit of rank: as factors, or as a matrix [out, in]"""


@dataclass(frozen=True)
class Method:
    """One way to merge the layers of several LoRAs into one."""

    name: str
    summary: str
    """one line for menus and help"""
    merge: Callable[[Stack, Options], Exact] | None = None
    """the merged layer; None for a method that is a weighted sum"""
    shares: Callable[[Stack], Sequence[float]] | None = None
    """the weight of every input, for a method that is a weighted sum"""
    ratios: bool = True
    """weights are ratios and are brought to a sum of 1; otherwise they are strengths"""
    uses_density: bool = False
    chooses_rank: bool = False
    """the method itself applies the limit of rank"""
    inputs: int | None = None
    """how many LoRAs it takes; None: any number"""

    def exact(self, stack: Stack, options: Options) -> Exact:
        if self.shares:
            return stack.weighted_sum(self.shares(stack))
        if stack.is_zero:  # nothing to trim, to vote on or to divide by
            return torch.zeros_like(stack.up[:, :1]), torch.zeros_like(stack.down[:1])
        assert self.merge  # a method has one or the other
        return self.merge(stack, options)


def as_given(stack: Stack) -> Sequence[float]:
    """Shares of a method that takes the weights as they are."""
    return stack.weights
