"""The scale of a layer: alpha / rank, from wherever a file keeps alpha."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from .errors import BadLoraFile
from .header import json_field


def scale_from_alpha(name: str, alpha: Tensor, rank: int) -> float:
    """Scale of a layer with its own alpha tensor: any numeric type with exactly one element.

    A stored 0 means no effect, as in ComfyUI. Raises BadLoraFile for anything else.
    """
    value = float(alpha.double()) if alpha.numel() == 1 else math.nan
    if not abs(value) <= torch.finfo(torch.float32).max:  # nor where it is no number
        raise BadLoraFile(
            f"The alpha of {name} is not one finite number: shape {list(alpha.shape)}.",
            hint="Save the LoRA again, with alpha in float32.",
        )
    return value / rank


def rank_of_scale(family: str, shapes: Mapping[str, Sequence[int]]) -> int | None:
    """The r of alpha / r; None where no factor has a rank, and alpha is only a placeholder."""
    split = {
        "lora": ("up",),
        "loha": ("hada_w1_b",),
        "lokr": ("lokr_w2_b", "lokr_w1_b"),
        "glora": ("b1",),
    }.get(family, ())
    role = next((role for role in split if role in shapes), None)
    if role is None or len(shapes[role]) < 2:
        return None
    if family == "glora":  # [out, r], and in older files [r, in]
        return shapes[role][1 if tuple(shapes["b2"][:1]) == tuple(shapes[role][1:2]) else 0]
    return shapes[role][1 if family == "lora" else 0]


def scale_of(
    name: str,
    family: str,
    shapes: Mapping[str, Sequence[int]],
    told: Mapping[str, Tensor],
    scales: ConfiguredScales,
) -> float:
    """alpha / rank of one layer, by its tensors or by a configuration; 1 without either.

    `shapes` are those of its parts by role; `told` holds its tensors `alpha` and `scale`, if any.
    Raises BadLoraFile for an alpha that is no finite number, where it counts.
    """
    if family == "full":
        return 1.0
    if "scale" in told:  # the web UI's own spelling, which takes the place of alpha / rank
        return scale_from_alpha(name, told["scale"], 1)
    rank = rank_of_scale(family, shapes)
    if "alpha" in told:
        return scale_from_alpha(name, told["alpha"], rank) if rank else 1.0
    configured = scales.scale(name, rank)
    return 1.0 if configured is None else configured


class ConfiguredScales:
    """Scales of files without alpha tensors.

    PEFT keeps them in `adapter_config.json` beside the file, diffusers since 2025 in the header
    field `lora_adapter_metadata`, whose keys carry the component. Without either the scale is 1.
    """

    def __init__(self, metadata: Mapping[str, str], adapter_config: Mapping | None = None) -> None:
        self._by_component: dict[str, dict] = {}
        for key, value in json_field(metadata, "lora_adapter_metadata").items():
            component, _, field = key.partition(".")
            self._by_component.setdefault(component, {})[field] = value
        self._otherwise = dict(adapter_config or {})

    def scale(self, name: str, rank: int | None) -> float | None:
        """Scale of the layer with canonical `name`; None where nothing is configured.

        `rank` None: no factor of the layer has one (LoKr of two whole matrices).
        """
        component, _, path = name.partition(".")
        config = self._by_component.get(component) or self._otherwise
        alpha = config.get("lora_alpha", config.get("alpha"))  # LoRA's name, LoHa's and LoKr's
        alpha = _by_pattern(config.get("alpha_pattern"), path, alpha)
        if rank is None:
            rank = _by_pattern(config.get("rank_pattern"), path, config.get("r"))
        if not _is_number(alpha) or not _is_number(rank) or rank <= 0:
            return None
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

    @property
    def otherwise(self) -> Mapping:
        """The configuration beside the file."""
        return self._otherwise


def _is_number(value: object) -> TypeGuard[float]:
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:  # a whole number that no float can be
        return False


def _by_pattern(patterns: object, path: str, default: object) -> Any:
    """PEFT's rule: a pattern names the end of a module path, and may be a regular expression."""
    if not isinstance(patterns, dict):
        return default
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", path):
                return value
        except re.error:
            continue
    return default
