"""Core-space TIES (Panariello et al. 2025, "Accurate and efficient low-rank model merging in core
space"): TIES on the small matrices C_i = U^T D_i V.

The paper takes U and V from SVDs of the stacked factors, which depend on how each LoRA is factored.
Here they are the joint singular bases of the differences themselves (`bases`), so the result does
not; it depends on no basis of the weights either. Nothing is lost in the change of basis.
"""

from __future__ import annotations

import torch

from ..bases import input_basis, output_basis
from ..stack import Options, Product, Stack
from .elections import elect, trim
from .method import Method


def merge(stack: Stack, options: Options) -> Product:
    left, _ = output_basis(stack)
    right, _ = input_basis(stack)
    cores = [
        (left.mT @ up.double()) @ (down.double() @ right)
        for up, down in zip(stack.ups, stack.downs, strict=True)
    ]
    merged = elect(trim(torch.stack(cores), options.density), stack.weight_tensor(), stack.mass)
    return (left @ merged).float(), right.mT.float()


METHOD = Method(
    "core_space",
    "TIES on small core matrices in the LoRAs' joint basis.",
    merge,
    uses_density=True,
)
