"""What is known of a person: embeddings of one or several photos, how far to trust each of them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import from_dict, to_dict
from .errors import BadWeightsFile, DiffLoRAError, LayoutMismatch
from .weights_file import header_json, read_safetensors, write_safetensors

LEAST_QUALITY = 0.05  # so that no photo loses its say by one measure alone
ODD_ONE_OUT = 0.3  # a photo this far (cosine) below the median agreement shows somebody else
STRANGERS = 0.2  # two photos below this cosine: recognisers accept from 0.3 or more on


@dataclass(frozen=True)
class PhotoNote:
    """What became of one photo. Never its path or its pixels."""

    number: int
    """1 for the first photo"""
    detection: float = 1.0
    """detection score of the face, 0..1"""
    sharpness: float = 1.0
    """of the face, in any unit; only photos of one person are compared"""
    agreement: float = 1.0
    """cosine of its face with the mean of the others"""
    weight: float = 1.0
    """share in the fused features; the weights of all photos add up to 1"""
    used: bool = True
    faces: int = 0
    """found in it; 0 where none was looked for"""
    face: int = 0
    """the one that was taken, counted from 1 at the left"""
    note: str = ""


@dataclass(frozen=True)
class Features:
    """Embeddings of P photos of one person; at least one of face and image is present."""

    face: Tensor | None
    """[P, Ef] or None"""
    image: Tensor | None
    """[P, Ei] or None"""
    weights: Tensor
    """[P], adding up to 1"""
    face_encoder: str = ""
    image_encoder: str = ""
    photos: tuple[PhotoNote, ...] = ()

    def __post_init__(self) -> None:
        if self.face is None and self.image is None:
            raise DiffLoRAError(
                "These features hold neither a face nor an image embedding.",
                hint="Connect a face encoder, an image encoder, or both.",
            )
        for what, rows in (("face", self.face), ("image", self.image)):
            if rows is not None and not rows.isfinite().all():
                raise DiffLoRAError(
                    f"The {what} embedding holds numbers that are not finite.",
                    hint="Check the photo and the encoder's file.",
                )
        if not (self.weights >= 0).all() or not 0 < float(self.weights.sum()) < math.inf:
            raise DiffLoRAError(
                "The weights of the photos must be numbers from 0 upwards, not all of them 0.",
                hint="Encode the photos again.",
            )

    def fused_face(self) -> Tensor | None:
        """[Ef] of unit length, or None"""
        return None if self.face is None else weighted_direction(self.face, self.weights)

    def fused_image(self) -> Tensor | None:
        """[Ei] of unit length, or None"""
        return None if self.image is None else weighted_direction(self.image, self.weights)

    def without_face(self) -> Features:
        """The image-only mode. Errors: DiffLoRAError if there is no image embedding."""
        return dataclasses.replace(self, face=None)

    def without_image(self) -> Features:
        """The face-only mode. Errors: DiffLoRAError if there is no face embedding."""
        return dataclasses.replace(self, image=None)

    def report(self) -> list[dict[str, Any]]:
        """One JSON-ready row per photo."""
        return [to_dict(photo) for photo in self.photos]

    def check_encoders(self, face_encoder: str, image_encoder: str) -> None:
        """Errors: LayoutMismatch where an embedding comes from another encoder than named."""
        for what, rows, mine, expected in (
            ("face", self.face, self.face_encoder, face_encoder),
            ("image", self.image, self.image_encoder, image_encoder),
        ):
            if rows is not None and mine and expected and mine != expected:
                raise LayoutMismatch(
                    f"The {what} embedding comes from {mine}; the predictor knows {expected}.",
                    hint=f"Load the {what} encoder that it was trained with, and encode again.",
                )

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write embeddings (float32) and photo notes to one safetensors file."""
        tensors = {"weights": self.weights}
        tensors |= {} if self.face is None else {"face": self.face}
        tensors |= {} if self.image is None else {"image": self.image}
        header = {
            "format": "difflora-features",
            "face_encoder": self.face_encoder,
            "image_encoder": self.image_encoder,
            "photos": json.dumps(self.report()),
        }
        float32 = {name: tensor.float().cpu().contiguous() for name, tensor in tensors.items()}
        write_safetensors(Path(path), float32, header, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | Path) -> Features:
        """Errors: BadWeightsFile."""
        tensors, header = read_safetensors(Path(path))
        if header.get("format") != "difflora-features" or "weights" not in tensors:
            raise BadWeightsFile(
                f"{Path(path).name} holds no face features.",
                hint="Choose a file written by Save Face Features.",
            )
        notes = header_json(path, header, "photos", "[]")
        if not isinstance(notes, list):
            raise BadWeightsFile(f"The photo notes of {Path(path).name} are no list.")
        rows = _rows(path, {name: tensor.float() for name, tensor in tensors.items()})
        names = header.get("face_encoder", ""), header.get("image_encoder", "")
        try:
            return cls(*rows, *names, tuple(from_dict(PhotoNote, note) for note in notes))
        except DiffLoRAError as error:
            raise BadWeightsFile(
                f"{Path(path).name} is damaged: {error.message}",
                hint="Encode the photos again and save them.",
            ) from error


def _rows(
    path: str | Path, tensors: Mapping[str, Tensor]
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Face, image and weights of a file, one row per photo. Errors: BadWeightsFile."""
    face, image, weights = tensors.get("face"), tensors.get("image"), tensors["weights"]
    parts = [part for part in (face, image) if part is not None]
    rows = {tuple(part.shape[:1]) for part in [weights, *parts]}
    if any(part.ndim != 2 for part in parts) or weights.ndim != 1 or len(rows) != 1:
        raise BadWeightsFile(f"The tensors of {Path(path).name} do not belong together.")
    return face, image, weights


def fuse(
    face: Tensor | None,
    image: Tensor | None,
    detection: Tensor,
    sharpness: Tensor,
    *,
    face_encoder: str = "",
    image_encoder: str = "",
) -> Features:
    """Weigh the photos of one person against each other.

    face [P, Ef] or None, image [P, Ei] or None, detection [P] in 0..1, sharpness [P] > 0 in any
    unit. A photo weighs detection * sharpness^0.5 * agreement; from three photos on, one that shows
    somebody else (its face agrees far less than the median photo) is left out. Of two that disagree
    nobody knows which is wrong, so both are kept, with a note.
    """
    count = len(detection)
    agreement = torch.ones(count) if face is None else agreements(face)
    odd = odd_ones_out(agreement)
    clear = (sharpness / sharpness.max().clamp_min(1e-8)).sqrt()
    quality = torch.stack([detection, clear, agreement]).clamp_min(LEAST_QUALITY).prod(0)
    quality = torch.where(odd, torch.zeros_like(quality), quality)
    weights = quality / quality.sum()
    notes = tuple(
        PhotoNote(
            number=k + 1,
            detection=float(detection[k]),
            sharpness=float(sharpness[k]),
            agreement=float(agreement[k]),
            weight=float(weights[k]),
            used=not odd[k],
            note=_remark(float(agreement[k]), count, left_out=bool(odd[k])),
        )
        for k in range(count)
    )
    return Features(face, image, weights, face_encoder, image_encoder, notes)


def _remark(agreement: float, count: int, *, left_out: bool) -> str:
    if left_out:
        return "left out: looks like another person than the other photos"
    if count == 2 and agreement < STRANGERS:
        return "looks like another person than the other photo; both are used"
    return ""


def agreements(face: Tensor) -> Tensor:
    """[P, E] -> [P]: cosine of each face with the mean of the others; 1 for a single photo."""
    if len(face) == 1:
        return torch.ones(1)
    unit = F.normalize(face.float(), dim=-1)
    return F.cosine_similarity(unit, unit.sum(0) - unit, dim=-1)


def odd_ones_out(agreement: Tensor) -> Tensor:
    """[P] bool; never more than a minority of the photos, and none of fewer than three."""
    if len(agreement) < 3:
        return torch.zeros(len(agreement), dtype=torch.bool)
    return agreement < agreement.median() - ODD_ONE_OUT


def weighted_direction(rows: Tensor, weights: Tensor) -> Tensor:
    """Mean direction of rows [P, E] under weights [P], unit length [E]."""
    return F.normalize(weights @ F.normalize(rows.float(), dim=-1), dim=-1)
