"""Checkpoints of Stable Diffusion 1.x, 2.x, XL and the mini model, parameter by parameter.

A checkpoint is one `.safetensors` (everything in original naming, or one model of a diffusers
folder) or a folder in diffusers' structure. Only headers are read when it is opened.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint_names import TEXT_COMPONENTS, Slot, parameters
from .errors import BadWeightsFile
from .key_names import BASES, module_table
from .lora_groups import counted
from .tensor_file import TensorFile, is_finite

COMPONENTS = ("unet", *TEXT_COMPONENTS)
FIRST_WEIGHT = "unet.conv_in.weight"
LABELS = {"unet": "U-Net", "text_encoder": "text encoder", "text_encoder_2": "second text encoder"}
# Where the models lie in a folder: diffusers' names, then those of the mini world.
_FILES = {
    "unet": ("unet/diffusion_pytorch_model", "unet"),
    "text_encoder": ("text_encoder/model", "text_encoder"),
    "text_encoder_2": ("text_encoder_2/model", "text_encoder_2"),
}
_TEXT_WIDTHS = {1280: "text_encoder_2"}
# What the first convolution of a U-Net takes beside the 4 channels of the noisy latent.
_SPECIAL_INPUTS = {9: "an inpainting model", 8: "an image-editing model", 5: "a depth model"}


@dataclass(frozen=True)
class Place:
    """One parameter of a checkpoint: the file, and where in it."""

    file: TensorFile
    slot: Slot

    @property
    def shape(self) -> tuple[int, ...]:
        return self.slot.shape(tuple(self.file.shape(self.slot.key)))

    def stored(self) -> Tensor:
        """The parameter as it is stored, whatever its values."""
        return self.slot.view(self.file.tensor(self.slot.key))

    def read(self) -> Tensor:
        """The parameter as it is stored. Raises BadWeightsFile for NaN and infinity."""
        tensor = self.stored()
        if not is_finite(tensor):
            raise BadWeightsFile(
                f"{self.file.path.name} holds NaN or infinite values in {self.slot.key}.",
                hint="The checkpoint is damaged; take another one.",
            )
        return tensor


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Parameters by canonical name (`unet....to_q.weight`); tensors are read when asked for."""

    path: Path
    files: tuple[TensorFile, ...]
    bases: tuple[str, ...]
    """models that it can be: several only where it holds a text encoder and no U-Net"""
    places: Mapping[str, Place]

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Read the headers. Raises BadWeightsFile for anything but a complete known model."""
        path = Path(path)
        files = _open_files(path)
        for file, _ in files:
            _refuse_other_kinds(file)
        found = {base: _places(files, base) for base in BASES}
        scores = {base: _score(places, base) for base, places in found.items()}
        best = max(scores.values())
        if best == 0:
            raise BadWeightsFile(
                f"{path.name} is no checkpoint of a known model.",
                hint="Known are Stable Diffusion 1.x, 2.x and XL, and the mini model.",
            )
        bases = tuple(base for base in BASES if scores[base] == best)
        checkpoint = cls(path, tuple(f for f, _ in files), bases, found[bases[0]])
        _refuse_incomplete(checkpoint)
        return checkpoint

    @property
    def base(self) -> str:
        return self.bases[0]

    @property
    def components(self) -> tuple[str, ...]:
        """The parts of the model that are there: U-Net, text encoders."""
        return tuple(component for component in COMPONENTS if self._of(component))

    def layers(self, component: str) -> list[str]:
        """Canonical names of the linear and convolution layers of a component, in order."""
        return [n for n in module_table(self.base).shapes if n.startswith(f"{component}.")]

    def small_parameters(self, component: str) -> list[str]:
        """Names of biases and norm parameters of a component: what a LoRA carries as offsets."""
        table = module_table(self.base)
        norms = [n for n in self._of(component) if n.rpartition(".")[0] in table.norms]
        biases = (n for n in self._of(component) if n.endswith(".bias"))
        return norms + [n for n in biases if n.removesuffix(".bias") in table.shapes]

    def other_parameters(self, component: str) -> list[str]:
        """Names of embeddings and whatever else no LoRA for the model can hold."""
        table = module_table(self.base)
        modules = {n: n.rpartition(".")[0] for n in self._of(component)}
        return [n for n, m in modules.items() if m not in table.shapes and m not in table.norms]

    def _of(self, component: str) -> list[str]:
        return [name for name in self.places if name.startswith(f"{component}.")]

    def weight(self, layer: str) -> Tensor:
        """The weight of a layer in float32, in the shape that the module table states."""
        shape = module_table(self.base).shapes[layer]
        return self.places[f"{layer}.weight"].read().float().reshape(shape)

    def misfits(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Which of these parameters (with these shapes) the checkpoint does not have.

        The first convolution may take more channels than asked for: the latent comes first.
        """
        return [name for name, shape in shapes.items() if not self._has(name, shape)]

    def _has(self, name: str, shape: tuple[int, ...]) -> bool:
        place = self.places.get(name)
        if place is None:
            return False
        if name == FIRST_WEIGHT:
            return place.shape[1] >= shape[1]
        return same_shape(place.shape, shape)

    def special_input(self) -> str | None:
        """What kind of model it is when its U-Net takes more than the latent; None: ordinary."""
        place = self.places.get(FIRST_WEIGHT)
        channels = place.shape[1] if place else 4
        return None if channels == 4 else _SPECIAL_INPUTS.get(channels, "a special model")


def same_bits(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors are equal bit by bit, told eight bytes at a time where possible."""
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return False
    pieces = [tensor.flatten().view(torch.uint8) for tensor in (ours, theirs)]
    if len(pieces[0]) % 8 == 0 and all(p.storage_offset() % 8 == 0 for p in pieces):
        pieces = [piece.view(torch.int64) for piece in pieces]
    return torch.equal(*pieces)


def same_shape(ours: Iterable[int], theirs: Iterable[int]) -> bool:
    """Equal shapes, where a 1x1 convolution and a linear layer are the same thing."""
    return _without_kernel(ours) == _without_kernel(theirs)


def _without_kernel(shape: Iterable[int]) -> tuple[int, ...]:
    shape = tuple(shape)
    return shape[:2] if shape[2:] == (1, 1) else shape


def _open_files(path: Path) -> Sequence[tuple[TensorFile, str | None]]:
    """Files with the component that they hold (None: their keys tell)."""
    if not path.is_dir():
        file = TensorFile(path)
        return [(file, _component_of_one_model(file))]
    files = [
        (TensorFile(found), component)
        for component, names in _FILES.items()
        for found in _first_present(path, names)
    ]
    if not files:
        raise BadWeightsFile(
            f"The folder {path} holds no model in diffusers' structure.",
            hint="Expected unet/diffusion_pytorch_model.safetensors in it.",
        )
    return files


def _first_present(folder: Path, names: tuple[str, ...]) -> list[Path]:
    """The file of a model, or all its shards; half-precision variants count when alone."""
    for name in names:
        for ending in (".safetensors", ".fp16.safetensors"):
            if (found := folder / f"{name}{ending}").is_file():
                return [found]
        index = folder / f"{name}.safetensors.index.json"
        if index.is_file():
            return _shards(index)
    return []


def _shards(index: Path) -> list[Path]:
    """The files that an index of diffusers names."""
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [index.parent / Path(name).name for name in dict.fromkeys(names)]
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise BadWeightsFile(
            f"{index.name} is no index of a model in several files: {error!r}.",
            hint="Download the folder again.",
        ) from error


def _component_of_one_model(file: TensorFile) -> str | None:
    """A text encoder alone, in transformers' names, is told apart by its width."""
    stem = "encoder.layers.0.self_attn.q_proj.weight"
    for key in (stem, f"text_model.{stem}"):
        if key in file:
            return _TEXT_WIDTHS.get(file.shape(key)[0], "text_encoder")
    return None


_WHOLE_WEIGHTS = "Take the 16-bit checkpoint that it was made from."


def _refuse_other_kinds(file: TensorFile) -> None:
    keys = list(file)
    if any(key.endswith((".lora_down.weight", ".lora_A.weight", ".alpha")) for key in keys):
        raise BadWeightsFile(f"{file.path.name} is a LoRA, not a checkpoint.")
    if any(key.endswith((".scale_weight", ".weight_scale", "scaled_fp8")) for key in keys):
        raise BadWeightsFile(
            f"{file.path.name} holds scaled 8-bit weights, which are not supported.",
            hint=_WHOLE_WEIGHTS,
        )
    weights = (key for key in keys if key.endswith(".weight"))
    if code := next((key for key in weights if not file.dtype(key).is_floating_point), None):
        raise BadWeightsFile(
            f"{file.path.name} holds weights as whole numbers ({code}), which are codes of another "
            "program and not supported.",
            hint=_WHOLE_WEIGHTS,
        )


def _places(files: Iterable[tuple[TensorFile, str | None]], base: str) -> dict[str, Place]:
    return {
        name: Place(file, slot)
        for file, component in files
        for key in file
        for name, slot in parameters(key, base, component)
        if slot.fits(file.shape(key))
    }


def _score(places: Mapping[str, Place], base: str) -> int:
    """Layers of `base` that are there with their shapes."""
    shapes = module_table(base).shapes
    names = ((places.get(f"{layer}.weight"), shape) for layer, shape in shapes.items())
    return sum(place is not None and same_shape(place.shape, shape) for place, shape in names)


def _fits(layer: str, shape: tuple[int, ...], stated: tuple[int, ...]) -> bool:
    """Whether a weight has the stated shape; the first convolution may take other inputs."""
    if f"{layer}.weight" == FIRST_WEIGHT and len(shape) == len(stated):
        shape = (shape[0], stated[1], *shape[2:])
    return same_shape(shape, stated)


def _refuse_incomplete(checkpoint: Checkpoint) -> None:
    """Every component that is there must be whole; only the first convolution may be wider."""
    shapes = module_table(checkpoint.base).shapes
    layers = [layer for part in checkpoint.components for layer in checkpoint.layers(part)]
    name = checkpoint.path.name
    missing = [layer for layer in layers if f"{layer}.weight" not in checkpoint.places]
    missing = [layer for layer in missing if not layer.endswith("text_projection")]
    if missing:
        raise BadWeightsFile(
            f"{name} lacks {counted(missing, 'layer')} of {len(layers)} of {checkpoint.base}.",
            hint="The checkpoint is incomplete, or is of a model that is not known here.",
        )
    found = {layer: checkpoint.places.get(f"{layer}.weight") for layer in layers}
    for layer, place in found.items():
        if place and not _fits(layer, place.shape, shapes[layer]):
            raise BadWeightsFile(
                f"{layer} of {name} has the shape {list(place.shape)}.",
                hint=f"The {checkpoint.base} layer has the weight {list(shapes[layer])}.",
            )
