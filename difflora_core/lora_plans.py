"""What a layer of a file will be, settled from header facts; its weights are read later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from .errors import BadLoraFile
from .lora import LayerOutline, LoraLayer
from .lora_groups import Group
from .lora_kinds import Misfit, exact_pair
from .lora_scales import ConfiguredScales, scale_of
from .tensor_file import TensorSource, is_finite

REFINER_TEXT_WIDTH = 1280
LARGEST = 2**18
"""features of one side of a layer of any model; a Kronecker product can claim far more"""
_DAMAGED = "The file is damaged; get it again or save it again."


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """Where the parts of one layer are, and what they make."""

    name: str
    family: str
    keys: Mapping[str, str]
    """role -> key, of the weights alone"""
    outline: LayerOutline

    def read(self, source: TensorSource) -> LoraLayer:
        """The layer with its weights. Raises BadLoraFile for NaN and infinity."""
        parts = read_parts(self.keys, source)
        try:
            pair = exact_pair(self.family, parts)
        except Misfit as error:
            raise BadLoraFile(f"The factors of {self.name} do not fit: {error}.") from error
        out, *inner = self.outline.weight_shape
        down = pair.down.reshape(pair.rank, *inner).contiguous()
        up = pair.up.reshape(out, pair.rank, *(1,) * (len(inner) - 1)).contiguous()
        if self.family in ("loha", "lokr"):
            refuse_not_finite(self.name, down)
            refuse_not_finite(self.name, up)
        return LoraLayer(self.name, down, up, self.outline.scale)


def read_parts(keys: Mapping[str, str], source: TensorSource) -> dict[str, Tensor]:
    """Tensors by role, 8 bits raised to 16 (exact). Raises BadLoraFile for NaN and infinity."""
    parts = {}
    for role, key in keys.items():
        tensor = source.tensor(key)
        if tensor.is_floating_point() and tensor.element_size() == 1:
            tensor = tensor.to(torch.float16)
        refuse_not_finite(key, tensor)
        parts[role] = tensor
    return parts


def refuse_not_finite(key: str, tensor: Tensor) -> None:
    """Raises BadLoraFile for NaN and infinity."""
    if not is_finite(tensor):
        raise BadLoraFile(
            f"{key} holds NaN or infinite values.",
            hint="The training broke down; use an earlier checkpoint of it.",
        )


def plan_layer(
    name: str,
    group: Group,
    shape: tuple[int, ...] | None,
    source: TensorSource,
    scales: ConfiguredScales,
    warnings: list[str],
) -> LayerPlan | None:
    """One layer; None, with a warning, where the file gives it no weights.

    `shape` is that of the base model's weight, None for a model without a table. Raises BadLoraFile
    for what is incomplete or does not fit.
    """
    plan = checked_plan(name, group, shape, warnings)
    return plan and with_scale(plan, group, source, scales, warnings)


def checked_plan(
    name: str, group: Group, shape: tuple[int, ...] | None, warnings: list[str]
) -> LayerPlan | None:
    """The plan as far as names and shapes tell it, at scale 1."""
    _refuse_incomplete(name, group, shape)
    if _rank_is_zero(group):
        warnings.append(f"{name} has rank 0; left out.")
        return None
    _refuse_numbers(name, group)
    _refuse_misfits(name, group, shape)
    pair = group.outline
    assert pair is not None  # the line above has refused what does not fit
    dtype = torch.float16 if pair.up.dtype.itemsize == 1 else pair.up.dtype
    weight = shape or _own_shape(group, pair.sides)
    keys = {role: group.keys[role] for role in group.weights}
    return LayerPlan(name, group.family, keys, LayerOutline(pair.rank, weight, dtype))


def with_scale(
    plan: LayerPlan,
    group: Group,
    source: TensorSource,
    scales: ConfiguredScales,
    warnings: list[str],
) -> LayerPlan:
    """The plan at the scale that the file gives the layer."""
    scale = layer_scale(plan.name, group, source, scales)
    if scale == plan.outline.scale:
        return plan
    if scale == 0:
        warnings.append(
            f"{plan.name} has alpha 0: no effect here, full effect in kohya's programs."
        )
    return replace(plan, outline=replace(plan.outline, scale=scale))


def layer_scale(name: str, group: Group, source: TensorSource, scales: ConfiguredScales) -> float:
    """alpha / rank; only the numbers that say so are read."""
    told = {
        role: source.tensor(group.keys[role])
        if prod(group.shapes[role]) == 1
        else torch.empty(group.shapes[role], device="meta")  # refused by its shape, unread
        for role in ("alpha", "scale")
        if role in group.keys
    }
    return scale_of(name, group.family, group.shapes, told, scales)


def _own_shape(group: Group, sides: tuple[int, int]) -> tuple[int, ...]:
    """The shape of a weight without a table: linear, or a convolution where the parts say so."""
    told = group.inner
    four = any(len(group.shapes[role]) == 4 for role in group.weights)
    return (sides[0], *told) if four and told and len(told) == 3 else sides


def _rank_is_zero(group: Group) -> bool:
    return all(prod(group.shapes[role]) == 0 for role in group.weights) or (
        group.outline is not None and group.outline.rank == 0
    )


def _refuse_incomplete(name: str, group: Group, shape: tuple[int, ...] | None) -> None:
    if len(group.families) > 1:
        kinds = " and ".join(sorted(group.families))
        raise BadLoraFile(
            f"{name} holds differences of several kinds at once: {kinds}.", hint=_DAMAGED
        )
    if group.complete:
        return
    role = group.weights[0]
    hint = _DAMAGED
    if role == "down" and group.shapes[role] == shape:
        hint = "The one tensor has the shape of the whole weight: a full-rank difference."
    raise BadLoraFile(f"{name} is incomplete: only {group.keys[role]} is there.", hint=hint)


def _refuse_numbers(name: str, group: Group) -> None:
    for role in group.weights:
        if not group.dtypes[role].is_floating_point:
            kind = str(group.dtypes[role]).removeprefix("torch.")
            raise BadLoraFile(f"{group.keys[role]} holds {kind} numbers, which are no weights.")


def _refuse_misfits(name: str, group: Group, shape: tuple[int, ...] | None) -> None:
    if group.family == "lora":
        _refuse_ranks(name, group)
    if group.outline is None:
        found = _found(group)
        raise BadLoraFile(f"The factors of {name} do not fit each other: {found}.", hint=_DAMAGED)
    sides = list(group.outline.sides)
    if shape is None and max(sides) > LARGEST:
        raise BadLoraFile(f"{name} is larger than any layer: {sides}: {_found(group)}.")
    if shape is not None and not group.fits(shape):
        hint = f"The layer has the weight {list(shape)} in this base model."
        text = group.shapes.get("down", (0, 0))[1]
        if name.endswith(("attn2.to_k", "attn2.to_v")) and text == REFINER_TEXT_WIDTH:
            hint += " Text of width 1280 is that of the SDXL refiner, which is not supported."
        raise BadLoraFile(f"{name} has the wrong shape: {_found(group)}.", hint=hint)


def _refuse_ranks(name: str, group: Group) -> None:
    down, up = group.shapes["down"], group.shapes["up"]
    if not {len(down), len(up)} <= {2, 4, 5}:
        raise BadLoraFile(f"The factors of {name} are no matrices: {_found(group)}.")
    inner = group.shapes["mid"][:1] if "mid" in group.shapes else down[:1]
    if inner != up[1:2]:
        raise BadLoraFile(
            f"The ranks of {name} differ: {_found(group)}.",
            hint="Expected down [rank, in] and up [out, rank].",
        )


def _found(group: Group) -> str:
    """Keys and shapes of the weights, for a message."""
    return ", ".join(f"{group.keys[role]} {list(group.shapes[role])}" for role in group.weights)
