"""Which base model the layers of a file belong to, and their canonical names in it."""

from __future__ import annotations

import re
from collections.abc import Mapping

from .errors import BadLoraFile
from .key_names import BASES, ModuleTable, Spelled, module_table
from .lora_groups import Group, counted, judge_unknown
from .lora_offsets import is_norm

_ODD = re.compile(r"__|_$|^(unet\.|base_model\.model\.|lora_unet_)\1")
"""stray underscores and doubled containers"""


def recognise(
    groups: Mapping[str, Group],
    claimed: str | None,
    warnings: list[str],
    *,
    or_none: bool,
) -> ModuleTable | None:
    """The base model in which most layers have a name and fit in shape.

    claimed: the one that the header names, if any; it decides where several fit as well.
    Where no layer has a name in any of them: None if `or_none`, else BadLoraFile.
    """
    scores = {base: _score(groups, module_table(base)) for base in BASES}
    fits, names = max(scores.values())
    if not names and or_none:
        return None
    if not names:
        raise BadLoraFile(
            f"No layer of this file is one of a known base model: {counted(list(groups), 'name')}.",
            hint="Known are Stable Diffusion 1.x, 2.x and XL, and the mini model.",
        )
    open_bases = [base for base in BASES if scores[base] == (fits, names)]
    hint = claimed or _base_told_by_prefix(groups)
    base = hint if hint in open_bases else open_bases[0]
    if len(open_bases) > 1 and hint not in open_bases:
        alike = {name: _alike(groups, module_table(name)) for name in open_bases}
        open_bases = [name for name in open_bases if alike[name] == max(alike.values())]
        base = open_bases[0]
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
        fits += any(_fits(group, table, name) for name in found)
    return fits, names


def _alike(groups: Mapping[str, Group], table: ModuleTable) -> int:
    """Factors with as many dimensions as the weight: SD 1.x projects by 1x1 convolutions."""
    return sum(
        len(group.shapes["down"]) == len(table.module_shape(name))
        for module, group in groups.items()
        if "down" in group.shapes
        for name in list(table.find(Spelled.parse(module)))[:1]
    )


def _base_told_by_prefix(groups: Mapping[str, Group]) -> str | None:
    """Text encoders alone look alike in SD 1.x and XL; kohya numbers them only for XL."""
    return (
        "sdxl" if all(module.startswith(("lora_te1_", "lora_te2_")) for module in groups) else None
    )


def _fits(group: Group, table: ModuleTable, name: str) -> bool:
    if is_norm(group):
        return name in table.norms and table.norms[name] in (
            group.shapes.get("w_norm"),
            group.shapes.get("diff"),
        )
    return group.fits(table.module_shape(name))


def canonical_groups(
    groups: Mapping[str, Group], table: ModuleTable, warnings: list[str]
) -> dict[str, Group]:
    """Groups by canonical name. Raises BadLoraFile where a layer is there twice."""
    named: dict[str, Group] = {}
    spelled_as: dict[str, str] = {}
    unknown = []
    for module, group in groups.items():
        found = list(table.find(Spelled.parse(module)))
        if not found:
            unknown += group.keys.values()
            continue
        name = next((n for n in found if _fits(group, table, n)), found[0])
        _refuse_other_module(name, group, table)
        joined = named[name].joined(group) if name in named else group
        if joined is None:
            raise BadLoraFile(
                f"The file holds {name} twice: as {spelled_as[name]} and as {module}.",
                hint="The file mixes two namings of the blocks; which one counts is not decidable.",
            )
        named[name], spelled_as[name] = joined, module
    odd = [module for module in spelled_as.values() if _ODD.search(module)]
    if odd:
        warnings.append(f"Odd names, read all the same: {counted(odd, 'name')}.")
    judge_unknown(unknown, sum(len(group.keys) for group in groups.values()), warnings)
    return named


def _refuse_other_module(name: str, group: Group, table: ModuleTable) -> None:
    """A norm has no matrix, and a matrix is no norm."""
    key = next(iter(group.keys.values()))
    if name in table.norms and group.families and not is_norm(group):
        raise BadLoraFile(f"{key} changes {name}, which is a norm, as if it were a matrix.")
    if name in table.shapes and is_norm(group):
        raise BadLoraFile(f"{key} changes {name} as if it were a norm.")
