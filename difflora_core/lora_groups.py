"""The tensors of a file, grouped into the layers that their keys name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from .errors import BadLoraFile
from .lora_families import Part, is_beside, parse_part


@dataclass
class Group:
    """The tensors of one layer as the file names it."""

    keys: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return "down" in self.tensors and "up" in self.tensors

    @property
    def factors(self) -> list[Tensor]:
        return [tensor for role, tensor in self.tensors.items() if role != "alpha"]


def group_parts(
    tensors: Mapping[str, Tensor], warnings: list[str]
) -> tuple[dict[str, Group], set[str]]:
    """Groups by layer name as spelled, and the spellings in use. Raises BadLoraFile for doubles."""
    groups: dict[str, Group] = {}
    adapters: dict[str, set[str]] = {}
    styles, beside, unknown = set(), [], []
    for key, tensor in tensors.items():
        part = parse_part(key)
        if part is None:
            (beside if is_beside(key) else unknown).append(key)
            continue
        _add(groups, part, key, tensor)
        styles.add("PEFT" if key.startswith("base_model.model.") else part.style)
        if part.style == "peft":
            adapters.setdefault(part.module, set()).add(part.adapter)
    _refuse_several_adapters(adapters)
    if beside:
        warnings.append(f"Left out, as no part of the LoRA: {counted(beside, 'key')}.")
    judge_unknown(unknown, len(tensors), warnings)
    return groups, styles - {""}


def _add(groups: dict[str, Group], part: Part, key: str, tensor: Tensor) -> None:
    group = groups.setdefault(part.module, Group())
    if part.role not in group.keys:
        group.keys[part.role] = key
        group.tensors[part.role] = tensor
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
            hint="Known are the spellings of kohya, diffusers and PEFT.",
        )
    if unknown:
        warnings.append(f"Unknown and left out: {counted(unknown, 'key')} of {total}.")


def counted(names: Sequence[str], noun: str) -> str:
    """`3 keys (a, b, c)`: the number, and the first three."""
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} {noun}{'s' if len(names) != 1 else ''} ({shown})"
