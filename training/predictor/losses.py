"""Losses on LoRA weights. Vectors are [B, D] in original units, values [B, D] in standard units."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from difflora_core.lora_space import LoraSpace
from difflora_core.mask_aware.networks import without_autocast

TINY = 1e-12  # keeps roots and quotients of empty layers finite


def weight_preserved_loss(predicted: Tensor, target: Tensor, emphasis: float = 1.0) -> Tensor:
    """Reconstruction error that counts large weights more; a scalar.

    DiffLoRA (arXiv 2408.06740) adds a "weight-preserved" loss so that weights of large magnitude
    are reconstructed better; its formula is not public. Our reading: every squared error is
    weighted by 1 + emphasis * |target| / mean |target|, the mean taken over each LoRA. emphasis 0
    is the plain mean squared error. Stage train-autoencoder gives it standardised values: what
    counts is how far a weight lies from the average LoRA's, not how large it is.
    """
    magnitude = target.abs()
    relative = magnitude / magnitude.mean(-1, keepdim=True).clamp_min(TINY)
    return ((1 + emphasis * relative) * (predicted - target).square()).mean()


class DeltaTerms(NamedTuple):
    """Per LoRA and layer, [B, L] each."""

    squared: Tensor
    """||dW1 - dW2||_F^2"""
    cosine: Tensor
    """<dW1, dW2> / (||dW1|| ||dW2||)"""
    log_ratio: Tensor
    """log ||dW1|| - log ||dW2||"""


def delta_terms(space: LoraSpace, predicted: Tensor, target: Tensor) -> DeltaTerms:
    """Compare delta W of two batches of LoRA vectors [B, D] without building any delta W.

    <B1 A1, B2 A2> = <B1^T B2, A1 A2^T>: only r x r Gram matrices. With the frozen row-orthonormal A
    the second factor is the identity, so it is left out: <dW1, dW2> = s^2 <B1, B2>.
    """
    products = [_inner_products(space, a, b) for a, b in _pairs(predicted, target)]
    own, cross, other = products
    lengths = (own.clamp_min(TINY) * other.clamp_min(TINY)).sqrt()
    return DeltaTerms(
        squared=(own - 2 * cross + other).clamp_min(0),
        cosine=cross / lengths,
        log_ratio=0.5 * (own.clamp_min(TINY).log() - other.clamp_min(TINY).log()),
    )


def delta_loss(space: LoraSpace, predicted: Tensor, target: Tensor, norm: float = 0.1) -> Tensor:
    """Direction and norm of each layer's delta W: mean of 1 - cosine + norm * log_ratio^2."""
    terms = delta_terms(space, predicted, target)
    return (1 - terms.cosine + norm * terms.log_ratio.square()).mean()


def relative_delta_error(space: LoraSpace, predicted: Tensor, target: Tensor) -> Tensor:
    """||dW1 - dW2||^2 / ||dW2||^2 over all layers, mean over the batch: 0 exact, 1 for zero."""
    squared = delta_terms(space, predicted, target).squared.sum(-1)
    size = _inner_products(space, target, target).sum(-1)
    return (squared / size.clamp_min(TINY)).mean()


def _pairs(first: Tensor, second: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
    return (first, first), (first, second), (second, second)


def _inner_products(space: LoraSpace, first: Tensor, second: Tensor) -> Tensor:
    """<dW1, dW2>_F of every layer, [B, L], float32."""
    if not space.predicts_down:
        parts = (first.float() * second.float()).split(space.counts, dim=-1)
        return space.scale**2 * torch.stack([part.sum(-1) for part in parts], dim=-1)
    one, two = space.unpack_factors(first.float()), space.unpack_factors(second.float())
    inner = []
    with without_autocast(first.device.type):
        for name in one:
            (down1, up1), (down2, up2) = one[name], two[name]
            inner.append(((up1.mT @ up2) * (down1 @ down2.mT)).sum((-2, -1)))
    return space.scale**2 * torch.stack(inner, dim=-1)
