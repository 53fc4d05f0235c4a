"""Random LoRAs of a model without a module table, and the dense arithmetic to judge merges by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from difflora_core.lora import Lora, LoraLayer, Naming
from difflora_core.merging import MergeInput

SHAPES = [(24, 17), (40, 96), (64, 64), (12, 8, 3, 3), (30, 20, 1, 1)]
NAMES = [f"lora_unet_double_blocks_{i}_linear" for i in range(len(SHAPES))]
FOREIGN = Naming("Flux, kohya names", "kohya")


def random_lora(seed: int, dtype: torch.dtype = torch.float32, decay: float = 0.0) -> Lora:
    """Random ranks and scales on every shape, of a model without a module table."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name, (out, *inner) in zip(NAMES, SHAPES, strict=True):
        rank = int(torch.randint(1, 9, (1,), generator=generator))
        fade = torch.logspace(0, -decay, rank)
        down = torch.randn(rank, *inner, generator=generator).to(dtype)
        up = torch.randn(out, rank, generator=generator) * fade
        up = up.view(out, rank, *(1,) * (len(inner) - 1)).to(dtype)
        scale = float(torch.rand(1, generator=generator)) * 2 + 0.05
        layers[name] = LoraLayer(name, down, up, scale)
    return Lora(layers, naming=FOREIGN)


def inputs_of(loras: Sequence[Lora], weights: Sequence[float] | None = None) -> list[MergeInput]:
    weights = weights or [1.0] * len(loras)
    return [
        MergeInput(x, f"lora {i}", w) for i, (x, w) in enumerate(zip(loras, weights, strict=True))
    ]


def dense(layer: LoraLayer) -> Tensor:
    """The difference in float64, as a matrix."""
    return layer.up.double().flatten(1) @ layer.down.double().flatten(1) * layer.scale


def dense_sum(loras: Sequence[Lora], weights: Sequence[float], name: str) -> Tensor:
    return torch.stack(
        [w * dense(x.layers[name]) for x, w in zip(loras, weights, strict=True)]
    ).sum(0)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def best_error(matrix: Tensor, rank: int) -> float:
    sigma = torch.linalg.svdvals(matrix)
    return float(sigma[rank:].norm() / sigma.norm())


def refactored(lora: Lora, seed: int) -> Lora:
    """The same LoRA with other factors: (B G, G^-1 A) with a well-conditioned random G."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for layer in lora:
        rank = layer.rank
        g = torch.randn(rank, rank, generator=generator, dtype=torch.float64)
        g = torch.linalg.qr(g)[0] * torch.logspace(-1, 1, rank, dtype=torch.float64)
        up = (layer.up.double().flatten(1) @ g).view(layer.up.shape)
        down = torch.linalg.solve(g, layer.down.double().flatten(1)).view(layer.down.shape)
        layers[layer.name] = LoraLayer(layer.name, down, up, layer.scale)
    return Lora(layers, naming=lora.naming)
