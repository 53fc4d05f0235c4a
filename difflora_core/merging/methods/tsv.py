"""TSV-Merge (Gargiulo et al. 2025, arXiv 2412.00081): singular vectors orthogonal across tasks.

U = [U_1 ... U_T] and V likewise are replaced by the nearest matrices with orthonormal columns
(Procrustes), U (U^T U)^(-1/2), and the singular values stay. Orthogonal LoRAs are added, equal ones
count once. Weights are ratios, and equal ones mean strength 1 for each, as published. Independent
of any basis and of the factorisation. Where the ranks together exceed the layer, every LoRA keeps
its largest share of them.
"""

from __future__ import annotations

import torch

from ..bases import inverse_root
from ..stack import Options, Product, Stack
from ..truncation import decomposed
from .method import Method


def merge(stack: Stack, options: Options) -> Product:
    count = len(stack.weights) + len(stack.absent)
    most = min(stack.shape) // count or 1
    lefts, rights, scales = [], [], []
    for up, down, weight in zip(stack.ups, stack.downs, stack.weights, strict=True):
        core = decomposed(up, down)
        if core.norm == 0:
            continue
        kept = min(most, int(core.meaningful))
        lefts.append(core.up @ core.left[:, :kept])
        rights.append((core.right[:, :kept].mT @ core.down).mT / core.sigma[:kept])
        scales.append(core.sigma[:kept] * weight * count)
    if not scales:
        return stack.weighted_sum()
    left, right = torch.cat(lefts, 1), torch.cat(rights, 1)
    up = left @ inverse_root(left.mT @ left) * torch.cat(scales)
    return up.float(), (right @ inverse_root(right.mT @ right)).mT.float()


METHOD = Method("tsv", "Singular vectors made orthogonal between the LoRAs, then added.", merge)
