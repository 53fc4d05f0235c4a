"""KnOTS-TIES (Stoica et al. 2025, arXiv 2410.19735): align by a joint SVD, then TIES.

[D_1 ... D_T] = U S [V_1^T ... V_T^T]; the V_i are merged by TIES and put back. The joint basis U
comes from Gram matrices of the factors, so the weight is never built. Entries of the V_i live in
the layer's input basis, on which the result depends, as published; not on the factorisation.
"""

from __future__ import annotations

import torch

from ..bases import output_basis
from ..stack import Options, Product, Stack
from .elections import elect, trim
from .method import Method


def merge(stack: Stack, options: Options) -> Product:
    basis, sigma = output_basis(stack)
    aligned = [
        (basis.mT @ up.double()) @ down.double() / sigma[:, None]
        for up, down in zip(stack.ups, stack.downs, strict=True)
    ]
    merged = elect(trim(torch.stack(aligned), options.density), stack.weight_tensor(), stack.mass)
    return (basis * sigma).float(), merged.float()


METHOD = Method(
    "knots",
    "Align by a joint SVD, then trim, elect signs and average (KnOTS-TIES).",
    merge,
    uses_density=True,
)
