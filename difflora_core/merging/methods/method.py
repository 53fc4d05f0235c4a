"""What a merging method is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
    merge: Callable[[Stack, Options], Exact]
    linear: bool = False
    """the result is a weighted sum of the inputs"""
    ratios: bool = True
    """weights are ratios and are brought to a sum of 1; otherwise they are strengths"""
    uses_density: bool = False
    chooses_rank: bool = False
    """the method itself applies the limit of rank"""
    inputs: int | None = None
    """how many LoRAs it takes; None: any number"""
