"""The tensors of a file, grouped into the layers that their keys name; from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

import torch

from .errors import BadLoraFile
from .lora_families import NEEDED, ON_WEIGHTS, Part, family_of, is_beside, parse_among
from .lora_kinds import Misfit, Pair, exact_pair, inner_told, with_kernel
from .tensor_file import TensorSource


@dataclass
class Group:
    """The tensors of one layer as the file names it: role -> key, shape and number type."""

    keys: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)

    @cached_property
    def families(self) -> set[str]:
        """Kinds of weight difference; more than one is a mistake of the file, none means biases."""
        return family_of(self.keys)

    @cached_property
    def family(self) -> str:
        return next(iter(self.families), "")

    @cached_property
    def complete(self) -> bool:
        """Whether all that the kind of difference needs is there."""
        roles = self.keys.keys()
        return all(any(set(way) <= roles for way in ways) for ways in NEEDED.get(self.family, ()))

    @cached_property
    def weights(self) -> tuple[str, ...]:
        """Roles of the tensors that make up the weight difference, sorted."""
        return tuple(sorted(role for role in self.keys if family_of([role])))

    @cached_property
    def outline(self) -> Pair | None:
        """The two factors without values; None where the parts do not fit each other."""
        parts = {
            role: torch.empty(self.shapes[role], dtype=self.dtypes[role], device="meta")
            for role in self.weights
        }
        try:
            return exact_pair(self.family, parts)
        except Misfit:
            return None

    @cached_property
    def inner(self) -> tuple[int, ...] | None:
        """(in, kh, kw) as far as the parts tell it."""
        return inner_told(self.family, self.shapes)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether the parts make a weight of `shape`; what is incomplete fits anywhere."""
        if not self.families:
            return True
        if self.family in ON_WEIGHTS or not self.complete or self.outline is None:
            return len(shape) > 1
        if len(shape) < 2 or self.outline.sides != (shape[0], prod(shape[1:])):
            return False
        return self.inner is None or self.inner == with_kernel(shape[1:])

    def joined(self, other: Group) -> Group | None:
        """Both as one layer, where no tensor is there twice."""
        if self.keys.keys() & other.keys.keys():
            return None
        return Group(self.keys | other.keys, self.shapes | other.shapes, self.dtypes | other.dtypes)


def group_parts(
    source: TensorSource, warnings: list[str], renamed: Mapping[str, str]
) -> tuple[dict[str, Group], set[str]]:
    """Groups by layer name as spelled, and the spellings in use. Raises BadLoraFile for doubles.

    `renamed` gives keys another name, where the file's own name no layers.
    """
    groups: dict[str, Group] = {}
    adapters: dict[str, set[str]] = {}
    styles, beside, unknown = set(), [], []
    for key in source:
        part = parse_among(renamed.get(key, key), source)
        if part is None or (part.role == "scale" and prod(source.shape(key)) != 1):
            (beside if is_beside(key) else unknown).append(key)
            continue
        _add(groups.setdefault(part.module, Group()), part, key, source)
        styles.add("PEFT" if key.startswith("base_model.model.") else part.style)
        if part.style == "peft":
            adapters.setdefault(part.module, set()).add(part.adapter)
    _refuse_several_adapters(adapters)
    if beside:
        warnings.append(f"Left out, as no part of the LoRA: {counted(beside, 'key')}.")
    judge_unknown(unknown, len(source), warnings)
    return groups, styles - {""}


def _add(group: Group, part: Part, key: str, source: TensorSource) -> None:
    if part.role not in group.keys:
        group.keys[part.role] = key
        group.shapes[part.role] = source.shape(key)
        group.dtypes[part.role] = source.dtype(key)
    elif part.style != "peft":  # two PEFT adapters get a sentence of their own
        raise BadLoraFile(f"Two keys name the same tensor: {group.keys[part.role]} and {key}.")


def _refuse_several_adapters(adapters: Mapping[str, set[str]]) -> None:
    for module, names in adapters.items():
        if len(names) > 1:
            shown = ", ".join(sorted(name.strip("._") or "(without a name)" for name in names))
            raise BadLoraFile(
                f"This file holds several adapters for {module}: {shown}.",
                hint="Save each adapter in a file of its own.",
            )


def judge_unknown(unknown: Sequence[str], total: int, warnings: list[str]) -> None:
    """Some stray keys are worth a warning; more than half of them mean that this is no LoRA."""
    if len(unknown) * 2 > total:
        raise BadLoraFile(
            f"This is no LoRA file that is known here: {counted(unknown, 'key')} of {total} "
            "mean nothing to this reader.",
            hint="Known are the spellings of kohya, LyCORIS, diffusers and PEFT.",
        )
    if unknown:
        warnings.append(f"Unknown and left out: {counted(unknown, 'key')} of {total}.")


def counted(names: Sequence[str], noun: str) -> str:
    """`3 keys (a, b, c)`: the number, and the first three."""
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} {noun}{'s' if len(names) != 1 else ''} ({shown})"
