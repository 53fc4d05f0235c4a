"""Where the faces are that are being painted, and whose they are to become."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from ..errors import DiffLoRAError, NoFaceFound
from ..face import Face
from ..photos import Pixels
from .crops import landmarks_of_boxes, mask_parts
from .pairing import assign

WhenLost = Literal["hold", "skip", "error"]
Finder = Callable[[Pixels], Sequence[Face]]
Embed = Callable[[Tensor, Tensor], Tensor]
"""Pictures [N, 3, H, W] and landmarks [N, 5, 2] to unit embeddings [N, D]."""

FIND_EVERY = 3
"""Guided steps between two looks for faces; in between they are where they were."""
CLEAR_SIGMA = 1.5
"""Below it an estimate is clear enough that a face which is not found is not there."""
PLACE_WEIGHT = 1.0
"""What a shift by one face width costs, in units of cosine, when a face is matched again."""


@dataclass(frozen=True)
class FaceRows:
    """N faces of a batch of pictures."""

    picture: Tensor
    """[N] int64"""
    reference: Tensor
    """[N] int64: which of the picture's references each face is to resemble."""
    landmarks: Tensor
    """[N, 5, 2] in pixels"""

    def __len__(self) -> int:
        return len(self.picture)

    def of(self, rows: Tensor) -> FaceRows:
        """Some of the faces, by index or by a bool per face."""
        return FaceRows(self.picture[rows], self.reference[rows], self.landmarks[rows])


@dataclass
class Tracker:
    """Finds faces by detector, or places them by mask, and keeps hold of them over the steps."""

    finder: Finder | None
    embed: Embed
    references: Tensor
    """[B or 1, R, D] unit embeddings."""
    mask: Tensor | None
    """[B or 1, H, W] at the size of the decoded picture."""
    when_lost: WhenLost
    held: dict[int, dict[int, Tensor]] = field(default_factory=dict)
    """Picture -> reference -> landmarks [5, 2] on the CPU."""
    note: str = ""
    """What the last look had to say."""

    def locate(self, count: int, decode: Callable[[], Tensor], step: int, sigma: float) -> FaceRows:
        """Faces of `count` pictures at a guided step; `decode` gives them, [B, 3, H, W].

        Errors: NoFaceFound where `when_lost` asks for it.
        """
        self.note = ""
        if self.finder is None:
            self._place_by_mask(count)
        elif step % FIND_EVERY == 0 or len(self.held) < count:
            self._look(decode(), self.finder, sigma)
        return self._rows()

    def _place_by_mask(self, count: int) -> None:
        if self.mask is None:
            raise DiffLoRAError(
                "Guidance does not know where the face is.",
                hint="Connect a face encoder, which finds it, or a mask that covers it.",
            )
        for picture in range(count):
            if picture not in self.held:
                self.held[picture] = self._mask_faces(picture)

    def _mask_faces(self, picture: int) -> dict[int, Tensor]:
        mask = self._mask_of(picture)
        if mask is None:
            return {}
        boxes = mask_parts(mask, self.references.shape[1])
        return dict(enumerate(landmarks_of_boxes(boxes).cpu()))

    def _look(self, pictures: Tensor, finder: Finder, sigma: float) -> None:
        for number, picture in enumerate(pictures):
            faces = [face for face in finder(to_pixels(picture)) if self._inside(face, number)]
            found = self._match(picture, faces, number) if faces else {}
            if found:
                self.held[number] = {**self.held.get(number, {}), **found}
            else:
                self._lost(number, sigma)

    def _lost(self, number: int, sigma: float) -> None:
        self.note = f"no face found in picture {number + 1}"
        if self.when_lost == "error" and sigma <= CLEAR_SIGMA:
            raise NoFaceFound(
                f"No face was found in picture {number + 1} while it was being painted "
                f"(sigma {sigma:.2f}).",
                hint="Ask for a face in the prompt, mask where it is, or choose hold or skip.",
            )
        if self.when_lost == "skip":
            self.held.pop(number, None)
        elif number not in self.held and (faces := self._mask_faces(number)):
            self.held[number] = faces

    def _inside(self, face: Face, number: int) -> bool:
        """Whether the middle of a face lies in the picture's mask."""
        mask = self._mask_of(number)
        if mask is None:
            return True
        x, y = (
            int(min(max(c, 0), s - 1)) for c, s in zip(face.centre, mask.shape[::-1], strict=True)
        )
        return bool(mask[y, x] > 0)

    def _match(self, picture: Tensor, faces: Sequence[Face], number: int) -> dict[int, Tensor]:
        """Reference -> landmarks, by likeness at first and by place too once faces are held."""
        count = self.references.shape[1]
        largest = sorted(faces, key=lambda face: -face.area)[:count]
        points = torch.stack([torch.from_numpy(face.landmarks) for face in largest])
        same = picture.expand(len(points), *picture.shape)
        wanted = self.references[number if len(self.references) > 1 else 0]
        costs = 1 - (self.embed(same, points.to(picture.device)) @ wanted.T).nan_to_num().cpu()
        for reference, before in self.held.get(number, {}).items():
            width = (before[1] - before[0]).norm().clamp(min=1.0)
            moved = (points.mean(1) - before.mean(0)).norm(dim=-1) / width
            costs[:, reference] += PLACE_WEIGHT * moved
        return {reference: points[face] for face, reference in assign(costs)}

    def _mask_of(self, number: int) -> Tensor | None:
        if self.mask is None:
            return None
        return self.mask[number if len(self.mask) > 1 else 0]

    def _rows(self) -> FaceRows:
        rows = [
            (p, r, points) for p in sorted(self.held) for r, points in sorted(self.held[p].items())
        ]
        device = self.references.device
        pictures, references = ([row[i] for row in rows] for i in (0, 1))
        points = torch.stack([row[2] for row in rows]) if rows else torch.zeros(0, 5, 2)
        index = torch.tensor([pictures, references], dtype=torch.int64).view(2, -1)
        return FaceRows(index[0], index[1], points.float().to(device))


def to_pixels(picture: Tensor) -> Pixels:
    """[3, H, W] about 0..1 -> uint8 [H, W, 3]; what is not finite becomes black."""
    levels = (picture.detach().float().nan_to_num().clamp(0, 1) * 255).round().byte().cpu()
    return rearrange(levels, "c h w -> h w c").contiguous().numpy()
