"""The mean of the factors, (mean B)(mean A): the notation of the SELMA paper, not its code.

It is not the mean of the LoRAs: products of factors of different LoRAs come in, and for unrelated
LoRAs the result is closer to noise than to the average (cosine 1/sqrt(T)). Kept because people ask
for it; the report warns of it.

On the factors as stored, the result would depend on how each file happens to be factored:
(B G, G^-1 A) is the same LoRA with another mean. So every input is first brought to its balanced
singular value form, B = U sqrt(S) and A = sqrt(S) V^T, with a fixed rule for the signs.
"""

from __future__ import annotations

import torch

from ...gauges import canonical_factors
from ..stack import Options, Product, Stack
from .method import Method


def merge(stack: Stack, options: Options) -> Product:
    rank = min(max(stack.ranks), *stack.shape)
    downs, ups = [], []
    for up, down, weight in zip(stack.ups, stack.downs, stack.weights, strict=True):
        down, up = canonical_factors(down, up, rank, tag=stack.name)
        downs.append(down * weight)
        ups.append(up * weight)
    # both factors carry the weights, so the product carries their square
    scale = sum(stack.weights + stack.absent)
    return torch.stack(ups).sum(0) / (scale or 1.0), torch.stack(downs).sum(0)


METHOD = Method(
    "factor_average",
    "Mean of the factors, as the SELMA paper writes it; NOT the mean of the LoRAs.",
    merge,
)
