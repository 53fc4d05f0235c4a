"""From the tensors of a file to a LoRA: parts are grouped into layers, the base is told by shapes.

Everything but NaN and infinity is settled from names and shapes, before any weight is read.
Whatever does not fit is refused with the name of the layer, or left out with a warning; nothing is
dropped silently.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from statistics import median

import torch
from torch import Tensor

from .errors import BadLoraFile
from .header import base_named_in
from .key_names import ModuleTable
from .lora import LazyLayers, Lora, Naming
from .lora_families import refuse_unreadable, refuse_without_base
from .lora_foreign import naming_of, other_model, refuse_no_lora, refuse_other_model
from .lora_groups import Group, counted, group_parts
from .lora_indexed import names_by_index
from .lora_naming import canonical_groups, recognise
from .lora_offsets import is_norm, read_offsets
from .lora_plans import LayerPlan, checked_plan, layer_scale, with_scale
from .lora_scales import ConfiguredScales
from .tensor_file import TensorsInMemory, TensorSource

ODD_SCALE = 8.0
"""alpha / rank this many times above the file's median is worth a warning"""


@dataclass(frozen=True, eq=False)
class LoraReading:
    """A LoRA with what was noticed while reading it."""

    lora: Lora
    base: str
    """a base model with a module table, or the name of another model"""
    layout: str
    warnings: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Contents:
    """A file sorted into layers, before anything is asked of their weights."""

    groups: Mapping[str, Group]
    """by canonical name, or by the file's own name where there is no table"""
    table: ModuleTable | None
    naming: Naming | None
    layout: str

    @property
    def model(self) -> str:
        """The base model, or the name of a model without a table."""
        if self.table:
            return self.table.base
        return self.naming.label.rpartition(",")[0] if self.naming else ""

    @cached_property
    def checked(self) -> tuple[dict[str, LayerPlan], tuple[str, ...]]:
        """Plans of all layers with weights, at scale 1, in the order of the model; warnings."""
        plans, warnings = {}, []
        for name in self.table.shapes if self.table else self.groups:
            group = self.groups.get(name)
            if group is None:
                continue
            if not group.families or is_norm(group):
                if group.keys.keys() <= {"alpha", "scale"}:
                    warnings.append(f"{name} has an alpha but no weights; left out.")
                continue
            shape = self.table.shapes[name] if self.table else None
            if plan := checked_plan(name, group, shape, warnings):
                plans[name] = plan
        return plans, tuple(warnings)


def read_lora_tensors(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    adapter_config: Mapping | None = None,
    *,
    any_model: bool = False,
) -> LoraReading:
    """As `read_lora_source`, of tensors in memory, with all layers taken."""
    return take_layers(
        read_lora_source(TensorsInMemory(tensors), metadata, adapter_config, any_model=any_model)
    )


def read_lora_source(
    source: TensorSource,
    metadata: Mapping[str, str] | None = None,
    adapter_config: Mapping | None = None,
    *,
    any_model: bool = False,
) -> LoraReading:
    """Read any spelling of kohya, LyCORIS, diffusers (three generations) and PEFT, lazily.

    `adapter_config` is the content of PEFT's `adapter_config.json`, where there is one. `any_model`
    takes LoRAs of other models, too, under the names that the file gives their layers.
    Raises BadLoraFile, saying what the file is or which layer is wrong.
    """
    metadata, warnings = dict(metadata or {}), []
    contents = sort_contents(source, metadata, warnings, any_model=any_model, on_base=False)
    scales = ConfiguredScales(metadata, adapter_config)
    plans = plan_layers(contents, source, scales, warnings)
    offsets = {}
    for name, group in contents.groups.items():
        scale = layer_scale(name, group, source, scales) if "bias" in group.keys else 1.0
        offsets |= read_offsets(name, group, scale, contents.table, source)
    if not plans and not offsets:
        raise BadLoraFile("This file holds no layer with a rank above 0.")
    _warn_of_scales(plans, contents.groups, scales, warnings)
    layers = LazyLayers(
        {name: plan.outline for name, plan in plans.items()},
        lambda name: plans[name].read(source),
    )
    lora = Lora(layers, metadata, offsets, contents.naming)
    return LoraReading(lora, contents.model, contents.layout, tuple(warnings))


def take_layers(reading: LoraReading) -> LoraReading:
    """The same reading with all weights in memory, and a warning of layers that change nothing."""
    layers = {name: reading.lora.layers[name] for name in reading.lora.layers}
    still = sum(not layer.up.any() for layer in layers.values())
    warnings = reading.warnings
    if still:
        warnings += (f"{still} of {len(layers)} layers change nothing (up is zero).",)
    return replace(reading, lora=replace(reading.lora, layers=layers), warnings=warnings)


def sort_contents(
    source: TensorSource,
    metadata: Mapping[str, str],
    warnings: list[str],
    *,
    any_model: bool,
    on_base: bool,
) -> Contents:
    """Layers by name; `on_base` lets kinds pass that need the base model's weights."""
    outline = tuple((key, source.shape(key), source.dtype(key)) for key in source)
    contents, noticed = _sorted(outline, base_named_in(metadata), any_model, on_base)
    warnings += noticed
    return contents


# LoRAs that are merged or compared mostly come from one trainer, with equal keys and shapes.
@lru_cache(maxsize=4)
def _sorted(
    outline: tuple[tuple[str, tuple[int, ...], torch.dtype], ...],
    claimed: str | None,
    any_model: bool,
    on_base: bool,
) -> tuple[Contents, tuple[str, ...]]:
    """Contents and warnings, from keys, shapes and number types alone."""
    if not outline:
        raise BadLoraFile("This file holds no tensors.")
    source = TensorsInMemory({k: torch.empty(s, dtype=d, device="meta") for k, s, d in outline})
    warnings: list[str] = []
    keys = "\n".join(source)
    refuse_no_lora(keys)
    other = other_model(keys)
    if other and not any_model:
        refuse_other_model(other)
    refuse_unreadable(keys)
    if not on_base:
        refuse_without_base(source, can_extract=other is None)
    groups, styles = group_parts(source, warnings, names_by_index(source))
    layout = _layout(styles, groups)
    table = None if other else recognise(groups, claimed, warnings, or_none=any_model)
    if table:
        groups = canonical_groups(groups, table, warnings)
        return Contents(groups, table, None, layout), tuple(warnings)
    model = other[0] if other else "another model"
    return Contents(groups, None, naming_of(model, groups, styles), layout), tuple(warnings)


def plan_layers(
    contents: Contents, source: TensorSource, scales: ConfiguredScales, warnings: list[str]
) -> dict[str, LayerPlan]:
    """Plans of all layers with weights, in the order of the model."""
    plans, noticed = contents.checked
    warnings += noticed
    return {
        name: with_scale(plan, contents.groups[name], source, scales, warnings)
        for name, plan in plans.items()
    }


def _warn_of_scales(
    plans: Mapping[str, LayerPlan],
    groups: Mapping[str, Group],
    scales: ConfiguredScales,
    warnings: list[str],
) -> None:
    by_name = {name: abs(plan.outline.scale) for name, plan in plans.items()}
    usual = median(by_name.values()) if by_name else 0
    odd = [name for name, scale in by_name.items() if usual and scale > ODD_SCALE * usual]
    if odd:
        warnings.append(
            f"alpha / rank is more than {ODD_SCALE:g} times that of the other layers in "
            f"{counted(odd, 'layer')}: an alpha kept from before the rank was changed?"
        )
    ranked = [name for name, plan in plans.items() if plan.family != "full"]
    told = {"alpha", "scale"}
    if ranked and not any(
        groups[name].keys.keys() & told or scales.scale(name, 1) is not None for name in ranked
    ):
        warnings.append("The file says nothing of alpha; it is taken to be the rank.")
    if any("scale" in groups[name].keys for name in plans):
        warnings.append("Scales are read as A1111's web UI does; ComfyUI ignores them.")


def _layout(styles: set[str], groups: Mapping[str, Group]) -> str:
    """In words: whose spelling, of what kinds, and for the U-Net which block names."""
    words = {
        "kohya": "kohya",
        "diffusers": "diffusers",
        "processor": "diffusers (attention processors)",
        "peft": "diffusers (PEFT suffixes)",
        "PEFT": "PEFT",
        "lycoris": "LyCORIS",
        "xlabs": "XLabs",
    }
    kinds = {"loha": "LoHa", "lokr": "LoKr", "full": "whole differences"}
    families = {family for group in groups.values() for family in group.families}
    told = [" and ".join(words[style] for style in sorted(styles)) or "kohya"]
    told += [word for family, word in kinds.items() if family in families]
    if any("put_blocks" in module or "middle_block" in module for module in groups):
        told.append("original block names")
    return ", ".join(told)
