"""Who somebody is: twenty continuous identity factors, drawn from a seed."""

from __future__ import annotations

import torch
from torch import Tensor

FACTORS: tuple[str, ...] = (
    "skin_tone",
    "skin_warmth",
    "hair_colour",
    "hair_length",
    "fringe",
    "hair_volume",
    "face_width",
    "face_length",
    "jaw",
    "eye_colour",
    "eye_size",
    "eye_spacing",
    "eye_tilt",
    "brow_thickness",
    "brow_height",
    "nose_length",
    "nose_width",
    "mouth_width",
    "lip_fullness",
    "beard",
)
INDEX: dict[str, int] = {name: i for i, name in enumerate(FACTORS)}

#: Identities are split by seed range, so no held-out person can slip into training.
SPLIT_OFFSET: dict[str, int] = {"train": 0, "test": 1 << 40}
SPLIT_SIZE = 1 << 40

# Constants of the SplitMix64 finaliser (Steele, Lea and Flood, 2014), as signed 64-bit integers.
_GOLDEN = -7046029254386353131
_MIX1 = -4658895280553007687
_MIX2 = -7723592293110705685


def identities(seeds: Tensor, split: str = "train") -> Tensor:
    """Identity factors of the people with these seeds.

    Args:
        seeds: integers [N], each in 0..2**40-1.
        split: "train" or "test"; the two ranges share no person.

    Returns:
        factors [N, 20], uniform in 0..1, the same on every machine and device.
    """
    if split not in SPLIT_OFFSET:
        raise ValueError(f"split is {split!r}; expected one of {sorted(SPLIT_OFFSET)}")
    if seeds.numel() and (seeds.min() < 0 or seeds.max() >= SPLIT_SIZE):
        raise ValueError("identity seeds must lie in 0..2**40-1")
    people = (seeds.long() + SPLIT_OFFSET[split])[:, None] * len(FACTORS)
    counters = people + torch.arange(len(FACTORS), device=seeds.device)
    bits = _splitmix(counters)
    return ((bits >> 40) & 0xFFFFFF).float() / float(1 << 24)


def _splitmix(counter: Tensor) -> Tensor:
    """SplitMix64: a counter-based generator, so that person N needs no walk over persons 0..N-1."""
    z = counter * _GOLDEN + _GOLDEN
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * _MIX1
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * _MIX2
    return z ^ ((z >> 31) & ((1 << 33) - 1))
