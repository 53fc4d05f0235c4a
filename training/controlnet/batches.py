"""What one step sees: latents, context, masks of people, boxes and landmarks of their faces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from difflora_core.mask_aware.pairing import FlatFaces

MASK_SIDE = 64
"""Side of the masks: as fine as the latents of a picture of 512 px."""


@dataclass(frozen=True)
class PeopleBatch:
    """B pictures with up to P people each, on one device."""

    latents: Tensor
    """Scaled, [B, 4, h, w] float32."""
    prompts: tuple[str, ...]
    masks: Tensor
    """Covered share of each cell, [B, P, 64, 64] in 0..1; zeros for absent people."""
    boxes: Tensor
    """Of faces, x0, y0, x1, y1 in pixels, [B, P, 4]; NaN where no face can be compared."""
    landmarks: Tensor
    """Five per face in pixels, [B, P, 5, 2]; NaN likewise."""

    def __len__(self) -> int:
        return len(self.latents)

    def rows(self, index: Tensor) -> PeopleBatch:
        """Some of the pictures."""
        return PeopleBatch(
            self.latents[index],
            tuple(self.prompts[i] for i in index.tolist()),
            self.masks[index],
            self.boxes[index],
            self.landmarks[index],
        )

    def faces(self) -> FlatFaces:
        """All faces that can be compared, in rows."""
        usable = self.landmarks.isfinite().all((2, 3)) & self.boxes.isfinite().all(2)
        boxes = [box[ok] for box, ok in zip(self.boxes, usable, strict=True)]
        points = [marks[ok] for marks, ok in zip(self.landmarks, usable, strict=True)]
        return FlatFaces.of(boxes, points)


class People(Protocol):
    """A source of batches; the same step and seed give the same batch."""

    def draw(self, step: int, count: int, seed: int) -> PeopleBatch: ...


def without_small_faces(boxes: Tensor, landmarks: Tensor, narrowest: float) -> Tensor:
    """Boxes [..., 4] with NaN for faces narrower than so many pixels, or without landmarks."""
    wide = boxes[..., 2] - boxes[..., 0] >= narrowest
    known = landmarks.isfinite().all(-1).all(-1)
    return boxes.masked_fill(~(wide & known)[..., None], float("nan"))
