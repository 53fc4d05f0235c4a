"""What goes into a merge: LoRAs with weights, checked to fit each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..errors import BadConfig, LayoutMismatch
from ..key_names import detect_base
from ..lora import Lora
from .blocks import block_of
from .rules import RankRule


@dataclass(frozen=True, eq=False)
class MergeInput:
    """One LoRA with its weight; `blocks` multiplies the weight in some blocks (see `block_of`)."""

    lora: Lora
    title: str
    weight: float = 1.0
    blocks: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class MergeSettings:
    """How to merge.

    method: a key of METHODS. rule: limit of the rank. weighting: `given` weights as they are;
    `norm_matched` brings all LoRAs to the same norm first; `equal_energy` does so layer by layer.
    total: what the weights shall add up to (default: 1 for methods with ratios, else as given).
    density: share of entries kept by methods that trim or drop. dtype: of the result's factors,
    which the certificates account for.
    """

    method: str = "average"
    rule: RankRule = field(default_factory=RankRule)
    weighting: str = "given"
    total: float | None = None
    density: float = 1.0
    seed: int = 0
    dtype: torch.dtype = torch.float32


def common_base(loras: Sequence[Lora], titles: Sequence[str]) -> str | None:
    """The base model of all LoRAs; None for models without a module table.

    Raises LayoutMismatch, naming both, when two LoRAs are for different models or spell the layers
    of an unknown one differently.
    """
    first, *others = (_kind(lora) for lora in loras)
    for kind, title in zip(others, titles[1:], strict=True):
        if kind != first:
            raise LayoutMismatch(
                f"{titles[0]} and {title} do not fit together: {first[1]} and {kind[1]}.",
                hint="LoRAs of one base model can be merged; those of models unknown here only "
                "when both files name the layers alike.",
            )
    return first[0]


def check_shapes(loras: Sequence[Lora], titles: Sequence[str]) -> None:
    """Raises LayoutMismatch when two LoRAs change one layer at different shapes."""
    seen: dict[str, tuple[tuple[int, ...], str]] = {}
    for lora, title in zip(loras, titles, strict=True):
        for name, outline in lora.outline.items():
            shape, owner = seen.setdefault(name, (outline.weight_shape, title))
            if shape != outline.weight_shape:
                raise LayoutMismatch(
                    f"{name} has the shape {list(shape)} in {owner} and "
                    f"{list(outline.weight_shape)} in {title}.",
                    hint="They were made for different base models.",
                )


def check_blocks(inputs: Sequence[MergeInput]) -> None:
    """Raises BadConfig for a block weight of a block that the LoRA does not have."""
    for entry in inputs:
        known = {block_of(name) for name in entry.lora.outline}
        strange = [block for block in entry.blocks if not _covers(block, known)]
        if strange:
            raise BadConfig(
                f"{entry.title} has no block {strange[0]!r}.",
                hint=f"Its blocks: {', '.join(sorted(known))}.",
            )


def block_factor(blocks: Mapping[str, float], block: str) -> float:
    """Factor of a block: of the longest entry that is the block itself or a level above it."""
    fitting = [name for name in blocks if block == name or block.startswith(f"{name}.")]
    return blocks[max(fitting, key=len)] if fitting else 1.0


def _covers(name: str, blocks: set[str]) -> bool:
    return any(block == name or block.startswith(f"{name}.") for block in blocks)


def _kind(lora: Lora) -> tuple[str | None, str]:
    """(base, words) of a LoRA; equal for LoRAs whose layers can be told to be the same."""
    if lora.naming:
        return None, lora.naming.label
    base = detect_base(lora)
    return base, base or "an unknown model"
