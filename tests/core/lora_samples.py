"""Tensors and LoRAs that several tests of LoRA files share."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from difflora_core.key_names import module_table
from difflora_core.lora import Lora, LoraLayer

DATA = Path(__file__).parent.parent / "data"
DTYPES = {"BF16": torch.bfloat16, "I64": torch.int64, "F8_E4M3": torch.float8_e4m3fn}


def filled(shapes: dict[str, list[int]], seed: int = 0) -> dict[str, Tensor]:
    """Random factors and alpha 2 of the given shapes."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.tensor(2.0) if shape == [] else torch.randn(shape, generator=generator)
        for key, shape in shapes.items()
    }


def attention_lora(base: str, rank: int = 4, scale: float = 1.0, seed: int = 0) -> Lora:
    """Random LoRA on every attention projection of the U-Net of `base`."""
    names = [name for name in module_table(base).shapes if ".attn" in name and ".to_" in name]
    return random_lora(base, names, rank, scale, seed)


def random_lora(base: str, names: list[str], rank: int = 4, scale: float = 1.0, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name in names:
        out, *inner = module_table(base).shapes[name]
        down = torch.randn(rank, *inner, generator=generator) * 0.1
        up = torch.randn(out, rank, *(1,) * (len(inner) - 1), generator=generator) * 0.1
        layers[name] = LoraLayer(name, down, up, scale)
    return Lora(layers)
