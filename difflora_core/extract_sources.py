"""Where the weight differences of an extraction come from: two checkpoints, or a LoRA on one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from .checkpoints import FIRST_WEIGHT, LABELS, Checkpoint, same_bits, same_shape
from .errors import BadLoraFile, LayoutMismatch
from .header import without_weight_facts
from .key_names import module_table
from .lora import Lora
from .lora_groups import counted
from .lora_on_base import LoraOnBase, open_lora_needing_base
from .shell import naming
from .tensor_file import is_finite


class Source(Protocol):
    """Differences to one base model, layer by layer, in float32 and in the table's shapes."""

    @property
    def base(self) -> str: ...

    @property
    def layers(self) -> Sequence[str]:
        """Canonical names of the layers that may differ."""
        ...

    def delta(self, layer: str) -> Tensor | None:
        """The difference of a weight; None where there is none."""
        ...

    def offsets(self) -> dict[str, Tensor]:
        """Differences of biases and norm parameters that differ, by parameter name."""
        ...

    def identity(self) -> list:
        """JSON values that change when the inputs do."""
        ...

    def metadata(self) -> Mapping[str, str]:
        """Header fields to take over."""
        ...

    def warnings(self) -> list[str]: ...


@dataclass(frozen=True, eq=False)
class CheckpointDifference:
    """A tuned checkpoint minus its base, of the chosen components."""

    tuned: Checkpoint
    original: Checkpoint
    components: tuple[str, ...]

    @classmethod
    def open(cls, tuned: str | Path, base: str | Path, text_encoders: bool) -> CheckpointDifference:
        """Raises LayoutMismatch when the two cannot be compared, BadWeightsFile for bad files."""
        first, second = Checkpoint.open(tuned), Checkpoint.open(base)
        if first.path.resolve() == second.path.resolve():
            raise LayoutMismatch(
                f"{first.path.name} was given as the tuned and as the base checkpoint.",
                hint="Give the base that it was tuned from.",
            )
        _refuse_different_models(first, second)
        return cls(first, second, _components(first, second, text_encoders))

    @property
    def base(self) -> str:
        return _common_bases(self.tuned, self.original)[0]

    @property
    def layers(self) -> list[str]:
        table = module_table(self.base)
        return [
            name
            for component in self.components
            for name in self.original.layers(component)
            if all(self._fits(c, name, table.shapes[name]) for c in (self.tuned, self.original))
        ]

    def delta(self, layer: str) -> Tensor | None:
        difference = self._difference(f"{layer}.weight")
        if difference is None:
            return None
        return difference.reshape(module_table(self.base).shapes[layer])

    def offsets(self) -> dict[str, Tensor]:
        names = [
            name
            for component in self.components
            for name in sorted(self.original.small_parameters(component))
            if name in self.tuned.places
        ]
        found = {name: self._difference(name) for name in names}
        return {name: offset for name, offset in found.items() if offset is not None}

    def identity(self) -> list:
        files = (*self.tuned.files, *self.original.files)
        return [[*self.components], *(file_identity(file.path) for file in files)]

    def metadata(self) -> dict[str, str]:
        return {}

    def warnings(self) -> list[str]:
        left_out = [c for c in self._shared() if c not in self.components and self._differs(c)]
        hint = "--text-encoders takes it in"
        warnings = [f"The {LABELS[component]} differs too; {hint}." for component in left_out]
        if self.original.special_input() and self._changed(FIRST_WEIGHT):
            warnings.append("unet.conv_in differs too; no LoRA for an ordinary U-Net can hold it.")
        others = [name for name in self._others() if self._changed(name)]
        if others:
            warnings.append(f"No LoRA can hold what differs in {counted(others, 'parameter')}.")
        return warnings

    def _difference(self, name: str) -> Tensor | None:
        """Of one parameter; None where it is equal up to rounding."""
        if not self._changed(name):
            return None
        ours, theirs = self.tuned.places[name].read(), self.original.places[name].read()
        if not same_shape(ours.shape, theirs.shape):
            raise LayoutMismatch(
                f"{name} has the shape {list(ours.shape)} in {self.tuned.path.name}, but "
                f"{list(theirs.shape)} in {self.original.path.name}.",
                hint="Give the checkpoint that the tuned one was made from.",
            )
        return ours.float() - theirs.float().reshape(ours.shape)

    def _changed(self, name: str) -> bool:
        ours, theirs = self.tuned.places[name].stored(), self.original.places[name].stored()
        if not same_shape(ours.shape, theirs.shape):
            return True
        theirs = theirs.reshape(ours.shape)
        return not same_bits(ours, theirs) and not _alike(ours, theirs)

    def _shared(self) -> list[str]:
        return [c for c in self.original.components if c in self.tuned.components]

    def _differs(self, component: str) -> bool:
        names = [f"{layer}.weight" for layer in self.original.layers(component)]
        return any(self._changed(name) for name in names if name in self.tuned.places)

    def _others(self) -> list[str]:
        """Parameters of the chosen components that no LoRA can hold."""
        found = (n for c in self.components for n in self.original.other_parameters(c))
        return [name for name in found if name in self.tuned.places]

    @staticmethod
    def _fits(checkpoint: Checkpoint, layer: str, shape: tuple[int, ...]) -> bool:
        place = checkpoint.places.get(f"{layer}.weight")
        return place is not None and place.shape[:2] == shape[:2]


@dataclass(frozen=True, eq=False)
class LoraOnCheckpoint:
    """What a LoRA of any kind does to one base model: DoRA and its like depend on its weights."""

    lora: LoraOnBase
    path: Path
    checkpoint: Checkpoint

    @classmethod
    def open(cls, lora: str | Path, base: str | Path) -> LoraOnCheckpoint:
        """Raises LayoutMismatch when the LoRA is for another model, and for bad files."""
        path = Path(lora)
        with naming(path):
            opened = open_lora_needing_base(path)
        checkpoint = Checkpoint.open(base)
        strange = checkpoint.misfits(changed_shapes(opened))
        if checkpoint.special_input() and "unet.conv_in" in opened.deltas:
            strange.append(FIRST_WEIGHT)
        if strange:
            absent = {n.partition(".")[0] for n in strange} - {*checkpoint.components}
            raise LayoutMismatch(
                f"{path.name} does not fit {checkpoint.path.name}, which is of {checkpoint.base}: "
                f"{counted(strange, 'parameter')} of the LoRA have no place there.",
                hint=f"The file holds no {LABELS[min(absent)]}; give a whole checkpoint."
                if absent
                else "The LoRA was made for another model.",
            )
        return cls(opened, path, checkpoint)

    @property
    def base(self) -> str:
        return self.lora.base if self.lora.base in self.checkpoint.bases else self.checkpoint.base

    @property
    def layers(self) -> list[str]:
        return [name for name in module_table(self.base).shapes if name in self.lora.deltas]

    def delta(self, layer: str) -> Tensor | None:
        delta = self.lora.deltas[layer](self.checkpoint.weight(layer))
        return self._checked(layer, delta) if bool(delta.any()) else None

    def offsets(self) -> dict[str, Tensor]:
        found = {
            n: f(self.checkpoint.places[n].read().float()) for n, f in self.lora.offsets.items()
        }
        return {name: self._checked(name, delta) for name, delta in found.items() if delta.any()}

    def identity(self) -> list:
        paths = [self.path, self.path.with_name("adapter_config.json")]
        paths += [file.path for file in self.checkpoint.files]
        return [file_identity(path) for path in paths if path.is_file()]

    def metadata(self) -> dict[str, str]:
        return without_weight_facts(self.lora.metadata)

    def warnings(self) -> list[str]:
        return list(self.lora.warnings)

    def _checked(self, name: str, delta: Tensor) -> Tensor:
        if not is_finite(delta):
            raise BadLoraFile(
                f"{self.path.name} gives no finite difference for {name}.",
                hint="Is this the base model that it was trained on?",
            )
        return delta


def changed_shapes(lora: Lora | LoraOnBase) -> dict[str, tuple[int, ...]]:
    """Shapes of all differences, by parameter name."""
    if isinstance(lora, Lora):
        shapes = {f"{name}.weight": one.weight_shape for name, one in lora.outline.items()}
        return shapes | {name: tuple(offset.shape) for name, offset in lora.offsets.items()}
    table = module_table(lora.base)
    shapes = {f"{name}.weight": table.shapes[name] for name in lora.deltas}
    modules = {name: name.rpartition(".")[0] for name in lora.offsets}
    return shapes | {name: table.module_shape(module)[:1] for name, module in modules.items()}


def file_identity(path: Path) -> list:
    """Path, size and time of a file: other values mean another file."""
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def _alike(ours: Tensor, theirs: Tensor) -> bool:
    """Equal, or equal up to the rounding of the coarser of the two number formats."""
    order = sorted((ours, theirs), key=lambda t: (t.element_size(), t.dtype != torch.bfloat16))
    coarse, fine = order
    return torch.equal(fine.to(coarse.dtype).float(), coarse.float())


def _common_bases(first: Checkpoint, second: Checkpoint) -> list[str]:
    return [base for base in first.bases if base in second.bases]


def _refuse_different_models(tuned: Checkpoint, base: Checkpoint) -> None:
    if not _common_bases(tuned, base):
        raise LayoutMismatch(
            f"{tuned.path.name} is of {tuned.base}, {base.path.name} is of {base.base}.",
            hint="Give the checkpoint that the tuned one was made from.",
        )
    kinds = [checkpoint.special_input() or "an ordinary model" for checkpoint in (tuned, base)]
    if kinds[0] != kinds[1]:
        raise LayoutMismatch(
            f"{tuned.path.name} is {kinds[0]}, {base.path.name} is {kinds[1]}: "
            "their first layers (unet.conv_in) have different shapes.",
            hint="Give a base of the same kind.",
        )


def _components(tuned: Checkpoint, base: Checkpoint, text_encoders: bool) -> tuple[str, ...]:
    """What is compared. Raises LayoutMismatch where one of the two lacks it."""
    wanted = ["unet"]
    if text_encoders:
        table = module_table(_common_bases(tuned, base)[0])
        wanted += [c for c in table.spellings if c != "unet"]
    elif "unet" not in tuned.components and "unet" not in base.components:
        wanted = [c for c in tuned.components if c in base.components]
    for checkpoint in (tuned, base):
        for component in wanted:
            if component not in checkpoint.components:
                raise LayoutMismatch(
                    f"{checkpoint.path.name} holds no {LABELS[component]}.",
                    hint="Give a whole checkpoint, or leave --text-encoders away."
                    if component != "unet"
                    else "Give a whole checkpoint.",
                )
    return tuple(wanted)
