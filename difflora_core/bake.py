"""LoRAs into a checkpoint: the same file, with the changed weights replaced, tensor by tensor."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import __version__
from .checkpoint_names import Slot
from .checkpoints import FIRST_WEIGHT, LABELS, Checkpoint
from .errors import BadWeightsFile, LayoutMismatch
from .extract_parts import refuse_full_disk
from .extract_sources import changed_shapes
from .header import without_weight_facts
from .lora import Lora
from .lora_groups import counted
from .lora_on_base import LoraOnBase
from .tensor_file import TensorFile, is_finite
from .tensor_writing import TensorOutline, in_order, write_tensors

Progress = Callable[[int, int], None]

HASH = "modelspec.hash_sha256"


@dataclass(frozen=True, eq=False)
class BakeInput:
    """One LoRA with the strength that it gets."""

    lora: Lora | LoraOnBase
    title: str
    weight: float = 1.0


def bake(
    base: Path,
    inputs: Sequence[BakeInput],
    out: Path,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict:
    """Write `base` with all LoRAs added; returns a report of JSON values.

    Sums are made in float32 and rounded once, to the type that each tensor has; every other tensor
    is copied bit for bit. Raises LayoutMismatch when a LoRA is for another model, BadWeightsFile
    for bad files, a full disk, and weights that do not fit their number type any more.
    """
    begin = time.perf_counter()
    checkpoint = _open_single(base)
    refuse_full_disk(out, base.stat().st_size)
    warnings: list[str] = []
    changes = _changes(checkpoint, inputs, warnings)
    file = checkpoint.files[0]
    outlines = {key: TensorOutline(file.dtype(key), file.shape(key)) for key in file}
    write_tensors(
        out,
        outlines,
        _baked(file, in_order(outlines), changes, progress),
        _header(checkpoint, inputs),
        overwrite,
        hash_field=HASH,
    )
    return {
        "file": str(out),
        "bytes": out.stat().st_size,
        "base": checkpoint.base,
        "inputs": [{"title": one.title, "weight": one.weight} for one in inputs],
        "tensors": len(outlines),
        "changed": len(changes),
        "warnings": warnings,
        "seconds": round(time.perf_counter() - begin, 3),
    }


def _open_single(path: Path) -> Checkpoint:
    if path.is_dir():
        raise BadWeightsFile(
            f"{path} is a folder; a LoRA is baked into one file.",
            hint="Give the file of the U-Net in it, then that of each text encoder.",
        )
    return Checkpoint.open(path)


@dataclass(frozen=True, eq=False)
class Change:
    """What one LoRA adds to one parameter."""

    name: str
    shape: tuple[int, ...]
    """of the parameter as the LoRA has it"""
    slot: Slot
    given: BakeInput

    def add(self, total: Tensor, before: Tensor) -> None:
        """Add the difference to `total`, which stands for the tensor that was `before`."""
        place, original = self.slot.view(total), self.slot.view(before)
        if self.name == FIRST_WEIGHT:  # the latent comes first in a wider input
            place, original = place[:, : self.shape[1]], original[:, : self.shape[1]]
        delta = self._delta(original.float().reshape(self.shape))
        place += self.given.weight * delta.reshape(place.shape)

    def _delta(self, original: Tensor) -> Tensor:
        lora, layer = self.given.lora, self.name.removesuffix(".weight")
        if isinstance(lora, Lora):
            layers = lora.layers
            return lora.offsets[self.name] if self.name in lora.offsets else layers[layer].delta()
        change = lora.offsets.get(self.name) or lora.deltas[layer]
        return change(original)


def _changes(
    checkpoint: Checkpoint, inputs: Sequence[BakeInput], warnings: list[str]
) -> dict[str, list[Change]]:
    """Changes by the key of the tensor in the file."""
    changes: dict[str, list[Change]] = {}
    for given in inputs:
        shapes = changed_shapes(given.lora)
        for name in _usable(checkpoint, given, shapes, warnings) if given.weight else ():
            slot = checkpoint.places[name].slot
            changes.setdefault(slot.key, []).append(Change(name, shapes[name], slot, given))
    return changes


def _usable(
    checkpoint: Checkpoint,
    given: BakeInput,
    shapes: Mapping[str, tuple[int, ...]],
    warnings: list[str],
) -> list[str]:
    """Parameters of the LoRA that the checkpoint has. Raises LayoutMismatch for another model."""
    absent = {name.partition(".")[0] for name in shapes} - {*checkpoint.components}
    names = [name for name in shapes if name.partition(".")[0] not in absent]
    strange = checkpoint.misfits({name: shapes[name] for name in names})
    if strange or not names:
        found = counted(strange or list(shapes), "parameter")
        raise LayoutMismatch(
            f"{given.title} does not fit {checkpoint.path.name}, which is of {checkpoint.base}: "
            f"{found} of the LoRA have no place there.",
            hint="The LoRA was made for another model, or for a part that the file does not hold.",
        )
    warnings += [
        f"{checkpoint.path.name} holds no {LABELS.get(component, component)}; "
        f"what {given.title} changes there was left out."
        for component in sorted(absent)
    ]
    return names


def _header(checkpoint: Checkpoint, inputs: Sequence[BakeInput]) -> dict[str, str]:
    """The fields of the checkpoint that are still true, and what went in."""
    baked = [{"title": one.title, "weight": one.weight} for one in inputs]
    return {
        **without_weight_facts(checkpoint.files[0].metadata),
        "modelspec.merged_from": ", ".join(one.title for one in inputs),
        "difflora.version": __version__,
        "difflora.baked": json.dumps(baked, ensure_ascii=False),
    }


def _baked(
    file: TensorFile,
    order: Sequence[str],
    changes: Mapping[str, list[Change]],
    progress: Progress | None,
) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the file, one at a time."""
    for done, key in enumerate(order, 1):
        tensor = file.tensor(key)
        yield key, _changed(key, tensor, changes[key]) if key in changes else tensor
        if progress:
            progress(done, len(order))


def _changed(key: str, tensor: Tensor, changes: Sequence[Change]) -> Tensor:
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    total = tensor.to(wide, copy=True)
    for change in changes:
        change.add(total, tensor)
    result = total.to(tensor.dtype)
    if not is_finite(result):
        raise BadWeightsFile(
            f"{key} is not finite in {str(tensor.dtype).removeprefix('torch.')} any more.",
            hint="The weights are too big, or the checkpoint holds NaN.",
        )
    return result
