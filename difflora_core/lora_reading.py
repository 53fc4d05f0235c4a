"""From the tensors of a file to a LoRA: parts are grouped into layers, the base is told by shapes.

Whatever does not fit is refused with the name of the layer, or left out with a warning; nothing is
dropped silently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from .errors import BadLoraFile
from .header import base_named_in
from .key_names import BASES, ModuleTable, Spelled, module_table
from .lora import Lora, LoraLayer
from .lora_families import build_layer, factor_shape, refuse_other_families
from .lora_foreign import refuse_foreign
from .lora_groups import Group, counted, group_parts, judge_unknown
from .lora_scales import ConfiguredScales, scale_from_alpha

ODD_SCALE = 8.0
"""alpha / rank this many times above the file's median is worth a warning"""
REFINER_TEXT_WIDTH = 1280


@dataclass(frozen=True, eq=False)
class LoraReading:
    """A LoRA with what was noticed while reading it."""

    lora: Lora
    base: str
    layout: str
    warnings: tuple[str, ...]


def read_lora_tensors(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    adapter_config: Mapping | None = None,
) -> LoraReading:
    """Read kohya, diffusers (three generations) and PEFT spellings, in any known block naming.

    `adapter_config` is the content of PEFT's `adapter_config.json`, where there is one.
    Raises BadLoraFile, saying what the file is or which layer is wrong.
    """
    metadata = dict(metadata or {})
    if not tensors:
        raise BadLoraFile("This file holds no tensors.")
    refuse_foreign(tensors)
    refuse_other_families(tensors)
    warnings: list[str] = []
    groups, styles = group_parts(tensors, warnings)
    table = _recognise(groups, metadata, warnings)
    named = _named(groups, table, warnings)
    scales = ConfiguredScales(metadata, adapter_config)
    layers = {}
    for name in (name for name in table.shapes if name in named):
        layer = _layer(name, named[name], table, scales, warnings)
        if layer:
            layers[name] = layer
    if not layers:
        raise BadLoraFile("This file holds no layer with a rank above 0.")
    _warn_of_odd_scales(list(layers.values()), warnings)
    layout = _layout(styles, groups)
    return LoraReading(Lora(layers, metadata), table.base, layout, tuple(warnings))


def _recognise(
    groups: Mapping[str, Group], metadata: Mapping[str, str], warnings: list[str]
) -> ModuleTable:
    """The base model in which most layers have a name and fit in shape."""
    scores = {base: _score(groups, module_table(base)) for base in BASES}
    fits, names = max(scores.values())
    if not names:
        raise BadLoraFile(
            f"No layer of this file is one of a known base model: {counted(list(groups), 'name')}.",
            hint="Known are Stable Diffusion 1.x, 2.x and XL, and the mini model.",
        )
    open_bases = [base for base in BASES if scores[base] == (fits, names)]
    hint = base_named_in(metadata) or _base_told_by_prefix(groups)
    base = hint if hint in open_bases else open_bases[0]
    if len(open_bases) > 1 and hint not in open_bases:
        warnings.append(f"The layers fit {' and '.join(open_bases)}; read as {base}.")
    if hint and hint not in open_bases:
        warnings.append(f"The header says {hint}, but the layers are those of {base}.")
    return module_table(base)


def _score(groups: Mapping[str, Group], table: ModuleTable) -> tuple[int, int]:
    """Layers that fit in name and shape, and those that fit in name."""
    fits = names = 0
    for module, group in groups.items():
        found = list(table.find(Spelled.parse(module)))
        names += bool(found)
        fits += any(_fits(group, table.shapes[name]) for name in found)
    return fits, names


def _base_told_by_prefix(groups: Mapping[str, Group]) -> str | None:
    """Text encoders alone look alike in SD 1.x and XL; kohya numbers them only for XL."""
    return (
        "sdxl" if all(module.startswith(("lora_te1_", "lora_te2_")) for module in groups) else None
    )


def _fits(group: Group, shape: tuple[int, ...]) -> bool:
    """Whether the factors make a weight of `shape`; a layer that is incomplete fits anywhere."""
    if not group.complete or any(t.ndim not in (2, 4) for t in group.factors):
        return True
    made = factor_shape(group.tensors)
    same_kernel = tuple(made[2:] or (1, 1)) == tuple(shape[2:] or (1, 1))
    return made[:2] == shape[:2] and same_kernel


def _named(
    groups: Mapping[str, Group], table: ModuleTable, warnings: list[str]
) -> dict[str, Group]:
    """Groups by canonical name."""
    named: dict[str, Group] = {}
    spelled_as: dict[str, str] = {}
    unknown = []
    for module, group in groups.items():
        found = list(table.find(Spelled.parse(module)))
        if not found:
            unknown += group.keys.values()
            continue
        name = next((n for n in found if _fits(group, table.shapes[n])), found[0])
        if name in named:
            raise BadLoraFile(
                f"The file holds {name} twice: as {spelled_as[name]} and as {module}.",
                hint="The file mixes two namings of the blocks; which one counts is not decidable.",
            )
        named[name], spelled_as[name] = group, module
    judge_unknown(unknown, sum(len(group.keys) for group in groups.values()), warnings)
    return named


def _layer(
    name: str,
    group: Group,
    table: ModuleTable,
    scales: ConfiguredScales,
    warnings: list[str],
) -> LoraLayer | None:
    """One layer; None, with a warning, where the file gives it no weights."""
    if set(group.tensors) == {"alpha"}:
        warnings.append(f"{name} has an alpha but no weights; left out.")
        return None
    _refuse_incomplete(name, group, table.shapes[name])
    if group.tensors["down"].shape[0] == 0:
        warnings.append(f"{name} has rank 0; left out.")
        return None
    _refuse_misfits(name, group, table)
    tensors = {
        role: _usable(group.keys[role], tensor)
        for role, tensor in group.tensors.items()
        if role != "alpha"
    }
    rank = tensors["up"].shape[1]
    if "alpha" in group.tensors:
        scale = scale_from_alpha(name, group.tensors["alpha"], rank)
    else:
        scale = scales.scale(name, rank)
    if scale == 0:
        warnings.append(f"{name} has alpha 0: no effect here, full effect in kohya's programs.")
    return build_layer(name, table.shapes[name], tensors, 1.0 if scale is None else scale)


def _refuse_incomplete(name: str, group: Group, shape: tuple[int, ...]) -> None:
    if group.complete:
        return
    (role, tensor), *_ = ((r, t) for r, t in group.tensors.items() if r != "alpha")
    hint = "The file is damaged; get it again or save it again."
    if role == "down" and tuple(tensor.shape) == shape:
        hint = "The one tensor has the shape of the whole weight: a full-rank difference."
    raise BadLoraFile(f"{name} is incomplete: only {group.keys[role]} is there.", hint=hint)


def _refuse_misfits(name: str, group: Group, table: ModuleTable) -> None:
    down, up = group.tensors["down"], group.tensors["up"]
    shape = table.shapes[name]
    found = f"{group.keys['down']} {list(down.shape)}, {group.keys['up']} {list(up.shape)}"
    if any(tensor.ndim not in (2, 4) for tensor in group.factors):
        raise BadLoraFile(f"The factors of {name} are no matrices: {found}.")
    inner = group.tensors["mid"].shape[0] if "mid" in group.tensors else down.shape[0]
    if inner != up.shape[1]:
        raise BadLoraFile(
            f"The ranks of {name} differ: {found}.",
            hint="Expected down [rank, in] and up [out, rank].",
        )
    if not _fits(group, shape):
        hint = f"The {table.base} layer has the weight {list(shape)}."
        if name.endswith(("attn2.to_k", "attn2.to_v")) and down.shape[1] == REFINER_TEXT_WIDTH:
            hint += " Text of width 1280 is that of the SDXL refiner, which is not supported."
        raise BadLoraFile(f"{name} has the wrong shape: {found}.", hint=hint)


def _usable(key: str, tensor: Tensor) -> Tensor:
    """The tensor, raised from 8 to 16 bits (exact); raises BadLoraFile for NaN and infinity."""
    if tensor.is_floating_point() and tensor.element_size() == 1:
        tensor = tensor.to(torch.float16)
    if not bool(torch.isfinite(tensor).all()):
        raise BadLoraFile(
            f"{key} holds NaN or infinite values.",
            hint="The training broke down; use an earlier checkpoint of it.",
        )
    return tensor


def _warn_of_odd_scales(layers: Sequence[LoraLayer], warnings: list[str]) -> None:
    usual = median(abs(layer.scale) for layer in layers)
    odd = [layer.name for layer in layers if usual and abs(layer.scale) > ODD_SCALE * usual]
    if odd:
        warnings.append(
            f"alpha / rank is more than {ODD_SCALE:g} times that of the other layers in "
            f"{counted(odd, 'layer')}: an alpha kept from before the rank was changed?"
        )
    still = sum(not layer.up.any() for layer in layers)
    if still:
        warnings.append(f"{still} of {len(layers)} layers change nothing (up is zero).")


def _layout(styles: set[str], groups: Mapping[str, Group]) -> str:
    """In words: whose spelling, and for the U-Net which block names."""
    words = {
        "kohya": "kohya",
        "diffusers": "diffusers",
        "processor": "diffusers (attention processors)",
        "peft": "diffusers (PEFT suffixes)",
        "PEFT": "PEFT",
    }
    original = any("put_blocks" in module or "middle_block" in module for module in groups)
    return " and ".join(words[style] for style in sorted(styles)) + (
        ", original block names" if original else ""
    )
