"""LoRA files of any kind as changes of a base model's parameters, DoRA and OFT included."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from .base_kinds import bias_difference, weight_difference
from .errors import BadLoraFile
from .lora_families import MAGNITUDES, ON_WEIGHTS
from .lora_groups import Group
from .lora_offsets import is_norm, read_offsets
from .lora_plans import layer_scale, plan_layer, read_parts
from .lora_reading import sort_contents
from .lora_scales import ConfiguredScales
from .tensor_file import TensorFile, TensorSource
from .weights_file import adapter_config

Change = Callable[[Tensor], Tensor]
"""parameter of the base model -> what is added to it, float32 of its shape"""


@dataclass(frozen=True, eq=False)
class LoraOnBase:
    """What a file changes in its base model. Nothing is read before a change is called.

    `deltas` are by layer name (`unet....to_q`) and take the layer's weight; `offsets` are by
    parameter name (`unet....to_q.bias`, `unet....norm1.weight`) and take that parameter.
    Calling one raises BadLoraFile for NaN, infinity and tensors that do not fit.
    """

    base: str
    layout: str
    metadata: Mapping[str, str]
    warnings: tuple[str, ...]
    deltas: Mapping[str, Change]
    offsets: Mapping[str, Change]


def open_lora_needing_base(path: str | Path) -> LoraOnBase:
    """Any LoRA file for a base model with a module table: plain kinds and those on its weights.

    Raises BadWeightsFile or BadLoraFile.
    """
    file = TensorFile(path)
    return lora_on_base(file, file.metadata, adapter_config(file.path, file))


def lora_on_base(
    source: TensorSource, metadata: Mapping[str, str], config: Mapping | None
) -> LoraOnBase:
    """As `open_lora_needing_base`; `config` is PEFT's, None where there is none."""
    scales, warnings = ConfiguredScales(metadata, config), []
    contents = sort_contents(source, metadata, warnings, any_model=False, on_base=True)
    assert contents.table is not None  # other models have been refused
    table = contents.table
    deltas, offsets = {}, {}
    for name in (n for n in (*table.shapes, *table.norms) if n in contents.groups):
        group = contents.groups[name]
        lengths = any(role in group.keys for role in MAGNITUDES)
        matrix = (lengths or group.families) and not is_norm(group)
        if matrix and _is_whole(name, group, table.shapes[name], source, scales, warnings):
            deltas[name] = partial(_delta, name, group, source, scales)
        scale = layer_scale(name, group, source, scales) if "bias" in group.keys else 1.0
        for parameter, tensor in read_offsets(name, group, scale, table, source).items():
            offsets[parameter] = partial(_constant, tensor)
        if "ia3_l" in group.keys and group.shapes["ia3_l"][:1] != (1,) and table.bias_shape(name):
            offsets[f"{name}.bias"] = partial(_bias, group, source)
    if config is None and any("oft_R" in group.keys for group in contents.groups.values()):
        warnings.append("There is no adapter_config.json: PEFT's default series is assumed.")
    if not deltas and not offsets:
        raise BadLoraFile("This file changes nothing.")
    return LoraOnBase(table.base, contents.layout, metadata, tuple(warnings), deltas, offsets)


def _is_whole(
    name: str,
    group: Group,
    shape: tuple[int, ...],
    source: TensorSource,
    scales: ConfiguredScales,
    warnings: list[str],
) -> bool:
    """Whether there is a difference at all. Raises BadLoraFile for what does not fit."""
    if group.family and group.family not in ON_WEIGHTS:
        return plan_layer(name, group, shape, source, scales, warnings) is not None
    if len(group.families) != 1 or not group.complete:
        found = ", ".join(group.keys.values())
        raise BadLoraFile(f"{name} is incomplete: only {found} is there.")
    return True


def _delta(
    name: str, group: Group, source: TensorSource, scales: ConfiguredScales, weight: Tensor
) -> Tensor:
    return weight_difference(name, read_parts(group.keys, source), weight, scales)


def _constant(tensor: Tensor, parameter: Tensor) -> Tensor:
    return tensor.float().reshape(parameter.shape)


def _bias(group: Group, source: TensorSource, bias: Tensor) -> Tensor:
    difference = bias_difference(read_parts(group.keys, source), bias)
    return difference if difference is not None else bias.float() * 0
