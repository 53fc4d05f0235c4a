"""Face networks that losses look through: frozen, with gradients to the picture.

Whatever the file, a network takes aligned crops in 0..1 and gives the maps at the ends of its
stages and a unit embedding; the normalisation that it was trained with is inside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import BadWeightsFile
from ..face import TRAINING_FIELD
from ..face_crop import TEMPLATE_SIZE, align
from ..recogniser import IResNet, Recogniser
from ..tensor_file import is_finite
from .folding import folded_layers
from .onnx_network import MISFITS, RECOGNISER, read_onnx


class FaceActivations(NamedTuple):
    """What a face network sees in N crops."""

    taps: tuple[Tensor, ...]
    """Maps [N, C, h, w], the last of each resolution, shallow to deep."""
    embedding: Tensor
    """[N, D], unit length."""

    def first(self, count: int) -> FaceActivations:
        """What it sees in the first `count` crops."""
        return FaceActivations(tuple(tap[:count] for tap in self.taps), self.embedding[:count])


class FaceNetwork(nn.Module):
    """A recogniser whose stages can be compared; frozen, in float32."""

    def __init__(
        self, name: str, trunk: nn.Module, *, takes_bytes: bool = False, training_name: str = ""
    ) -> None:
        """trunk: normalised crops -> an iterator over the tensors through which all information
        passes, the raw embedding [N, D] last. It takes 0..255, or -1..1 as ArcFace was trained.
        training_name: which training its file says it comes from.

        Errors: BadWeightsFile when it does not run or does not end in an embedding.
        """
        super().__init__()
        self.name, self.size = name, TEMPLATE_SIZE
        self.training_name = training_name
        self.scale, self.shift = (255.0, 0.0) if takes_bytes else (2.0, -1.0)
        self.trunk = trunk.float().eval().requires_grad_(False)
        self.batched = self._checked()

    def forward(self, crops: Tensor) -> FaceActivations:
        """Aligned crops [N, 3, 112, 112] in 0..1, N >= 0 -> maps and embedding. Differentiable."""
        if not len(crops):  # operations differ in what they make of an empty batch
            return self(torch.cat([crops, crops.new_zeros(1, 3, self.size, self.size)])).first(0)
        if self.batched:
            return self._look(crops)
        taps, embeddings = zip(*(self._look(crop) for crop in crops.split(1)), strict=True)
        joined = tuple(torch.cat(maps) for maps in zip(*taps, strict=True))
        return FaceActivations(joined, torch.cat(embeddings))

    def embed(self, images: Tensor, landmarks: Tensor) -> Tensor:
        """Pictures [N, 3, H, W] in 0..1, landmarks [N, 5, 2] in pixels -> unit [N, D]."""
        return self(align(images, landmarks, self.size)).embedding

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FaceNetwork:
        """Moved to a device within inference mode, weights would lose the way to gradients."""
        with torch.inference_mode(False):
            return super()._apply(fn, recurse)

    def _look(self, crops: Tensor) -> FaceActivations:
        maps: dict[int, Tensor] = {}
        passed = normalised = crops.float() * self.scale + self.shift
        with without_autocast(crops.device.type):
            for passed in self.trunk(normalised):
                if passed.ndim == 4 and passed.shape[-1] > 1 and passed.shape[1] > 3:
                    maps[passed.shape[-1]] = passed
        return FaceActivations(tuple(maps.values()), F.normalize(passed.flatten(1), dim=-1))

    def _checked(self) -> bool:
        """Whether crops can be looked at together. Errors: BadWeightsFile without embeddings."""
        together = self._trial(2)
        count = 2 if len(together) == 2 else 1
        embedding = together if count == 2 else self._trial(1)
        rows, width = embedding.shape
        if rows != count or width < 2:
            raise BadWeightsFile(
                f"{self.name} gives {rows} x {width} numbers for {count} crops, expected an "
                "embedding each.",
                hint=RECOGNISER.hint,
            )
        if not is_finite(embedding):
            raise BadWeightsFile(
                f"{self.name} gives numbers that are not finite.", hint=RECOGNISER.hint
            )
        return count == 2

    @torch.no_grad()
    def _trial(self, count: int) -> Tensor:
        """Embeddings of grey crops; none where a file takes one crop but not several."""
        try:
            return self._look(torch.full((count, 3, self.size, self.size), 0.5)).embedding
        except MISFITS as error:
            if count > 1:
                return torch.zeros(0)
            reason = str(error).splitlines()[0].rstrip(".")
            raise BadWeightsFile(
                f"{self.name} cannot be run: {reason}.", hint=RECOGNISER.hint
            ) from error


def without_autocast(device: str) -> AbstractContextManager[object]:
    """Rounded to 8 bits, the gradient of a cosine near 1 would be noise, and so would points."""
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


class Chain(nn.Sequential):
    """Modules in a row; yields what each gives."""

    def forward(self, input: Tensor) -> Iterator[Tensor]:
        for module in self:
            yield (input := module(input))


def open_face_network(path: str | Path) -> FaceNetwork:
    """A recogniser of ours (.safetensors), or any that has ArcFace's form (.onnx).

    ONNX files of InsightFace's packs, AuraFace and their like are read as they are. Made outside
    inference mode even where the caller is in it, so that gradients can pass. Errors:
    BadWeightsFile, saying what is wrong; DiffLoRAError when the package onnx is missing.
    """
    path = Path(path)
    with torch.inference_mode(False):
        if path.suffix == ".safetensors":
            recogniser = Recogniser.open(path)
            name = recogniser.config.name or path.stem
            return FaceNetwork(name, as_chain(recogniser.network))
        if path.suffix == ".onnx":
            network = read_onnx(path, RECOGNISER)
            training_name = network.fields.get(TRAINING_FIELD, "")
            return FaceNetwork(
                path.stem, network, takes_bytes=network.takes_bytes, training_name=training_name
            )
    raise BadWeightsFile(
        f"{path.name} is no face recogniser: expected a .safetensors or .onnx file.",
        hint=RECOGNISER.hint,
    )


def as_chain(network: nn.Module) -> Chain:
    """What a trained recogniser's network computes, block by block."""
    if isinstance(network, IResNet):
        return Chain(*folded_layers(network))
    return Chain(*network.body, network.places, nn.Flatten(), network.fc)  # type: ignore[misc]
