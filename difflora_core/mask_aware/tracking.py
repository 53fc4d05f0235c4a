"""Where the faces are that are being painted, and whose they are to become."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from ..errors import DiffLoRAError, NoFaceFound
from ..face import FoundFace
from ..photos import Pixels
from .crops import crop_boxes, landmarks_of_boxes
from .mask_areas import mask_parts
from .matching import whose_face

WhenLost = Literal["hold", "skip", "error"]
Finder = Callable[[Pixels], Sequence[FoundFace]]
Embed = Callable[[Tensor, Tensor], Tensor]
"""Pictures [N, 3, H, W] and landmarks [N, 5, 2] to unit embeddings [N, D]."""
Decode = Callable[[int, Tensor | None], Tensor]
"""Number of a picture to the picture [3, H, W]; only what is near a box [4] in pixels, if given."""

FIND_EVERY = 3
"""Guided steps between two looks for faces; in between they are where they were."""
CLEAR_SIGMA = 1.5
"""Below it an estimate is clear enough that a face which is not found is not there."""
LEAST_COVERED = 0.1
"""Share of a face's box that a mask covers where the face is meant although its middle is not."""
LARGEST_STAND_IN = 0.5
"""Share of the picture that an area may take and still say where a face is."""


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
    standing_in: set[int] = field(default_factory=set)
    """Pictures whose places are those of the mask, since no face has been seen there yet."""
    searched: dict[int, float] = field(default_factory=dict)
    """Picture -> sigma of its last look."""
    note: str = ""
    """What the last look had to say."""

    def locate(self, count: int, decode: Decode, step: int, sigma: float) -> FaceRows:
        """Faces of `count` pictures at a guided step.

        Errors: NoFaceFound where `when_lost` asks for it.
        """
        self.note = ""
        if self.finder is None:
            self._place_by_mask(count, sigma)
            return self._rows()
        for number in range(count):
            # that a clear picture shows nobody need not be found out again at once
            unclear = self.searched.get(number, math.inf) > CLEAR_SIGMA
            if step % FIND_EVERY == 0 or (number not in self.held and unclear):
                self._look(number, decode, self.finder, sigma)
                self.searched[number] = sigma
        return self._rows()

    def _place_by_mask(self, count: int, sigma: float) -> None:
        if self.mask is None:
            raise DiffLoRAError(
                "Guidance does not know where the face is.",
                hint="Connect a face encoder, which finds it, or a mask that covers it.",
            )
        for number in range(count):
            if number not in self.held:
                boxes = self._mask_boxes(number)
                self.held[number] = dict(enumerate(landmarks_of_boxes(boxes).cpu()))
            self._note_empty(number, sigma)

    def _note_empty(self, number: int, sigma: float) -> None:
        """Say how many references have no area. Errors: NoFaceFound where none has one."""
        wanted, areas = self.references.shape[1], len(self.held[number])
        if areas == wanted:
            return
        self._add_note(
            f"no area in the mask of picture {number + 1} for {wanted - areas} of {wanted} faces"
        )
        if not areas and self.when_lost == "error":
            raise NoFaceFound(
                f"The mask of picture {number + 1} is empty (sigma {sigma:.2f}).",
                hint="Mask where the face is to be, or choose hold or skip.",
            )

    def _mask_boxes(self, number: int) -> Tensor:
        mask = self._mask_of(number)
        most = self.references.shape[1]
        return torch.zeros(0, 4) if mask is None else mask_parts(mask, most)

    def _stand_ins(self, number: int) -> dict[int, Tensor]:
        """Places for faces that no look has found yet, where the mask says where they are."""
        mask = self._mask_of(number)
        if mask is None:
            return {}
        boxes = self._mask_boxes(number)
        share = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / mask.numel()
        return dict(enumerate(landmarks_of_boxes(boxes[share <= LARGEST_STAND_IN]).cpu()))

    def _look(self, number: int, decode: Decode, finder: Finder, sigma: float) -> None:
        def faces_of(picture: Tensor) -> list[FoundFace]:
            return self._in_mask(finder(to_pixels(picture)), number)

        # places of the mask are nobody's: the faces that are found are matched as at first
        before = {} if number in self.standing_in else self.held.get(number, {})
        self._forget(number)
        near = _bounds(before) if len(before) == self.references.shape[1] else None
        picture = decode(number, near)
        faces = faces_of(picture)
        if near is not None and len(faces) < len(before):  # they may have gone further
            picture = decode(number, None)
            faces = faces_of(picture)
        found = self._match(picture, faces, before, number) if faces else {}
        gone = {r: points for r, points in before.items() if r not in found}
        if gone or not found:
            gone = self._lost(number, gone, len(found), sigma)
        if not found and not gone and self.when_lost != "skip":
            gone = self._stand_ins(number)
            self.standing_in |= {number} if gone else set()
        if found or gone:
            self.held[number] = found | gone

    def _forget(self, number: int) -> None:
        self.held.pop(number, None)
        self.standing_in.discard(number)

    def _add_note(self, note: str) -> None:
        self.note = "; ".join(part for part in (self.note, note) if part)

    def _lost(
        self, number: int, gone: dict[int, Tensor], found: int, sigma: float
    ) -> dict[int, Tensor]:
        """What to go on with in place of faces that are gone. Errors: NoFaceFound."""
        what = (
            f"{len(gone)} of {len(gone) + found} faces were lost" if found else "no face was found"
        )
        self._add_note(f"{what} in picture {number + 1}")
        if self.when_lost == "error" and sigma <= CLEAR_SIGMA:
            raise NoFaceFound(
                f"{what[0].upper()}{what[1:]} in picture {number + 1} while it was being painted "
                f"(sigma {sigma:.2f}).",
                hint="Ask for a face in the prompt, mask where it is, or choose hold or skip.",
            )
        return {} if self.when_lost == "skip" else gone

    def _in_mask(self, faces: Sequence[FoundFace], number: int) -> list[FoundFace]:
        """Faces whose middle lies in the picture's mask; where they are too few for the references,
        those, too, of which it covers a part: only a mouth, say, or the hair."""
        mask = self._mask_of(number)
        if mask is None:
            return list(faces)
        shares = [_covered(mask, face.box.tolist()) for face in faces]
        middles = [_covered(mask, [*face.centre, *face.centre]) > 0 for face in faces]
        inside = [face for face, middle in zip(faces, middles, strict=True) if middle]
        if len(inside) >= self.references.shape[1]:
            return inside
        sides = zip(faces, middles, shares, strict=True)
        return inside + [face for face, m, share in sides if not m and share >= LEAST_COVERED]

    def _match(
        self, picture: Tensor, faces: Sequence[FoundFace], before: dict[int, Tensor], number: int
    ) -> dict[int, Tensor]:
        """Reference -> landmarks of its face."""
        largest = sorted(faces, key=lambda face: -face.area)
        points = torch.stack([torch.from_numpy(face.landmarks) for face in largest])
        wanted = self.references[number if len(self.references) > 1 else 0]

        def likeness(chosen: list[int]) -> Tensor:
            same = picture.expand(len(chosen), *picture.shape)
            return self.embed(same, points[chosen].to(picture.device)) @ wanted.T

        found = whose_face(points, before, len(wanted), likeness)
        return {reference: points[face] for reference, face in found.items()}

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


def _covered(mask: Tensor, box: Sequence[float]) -> float:
    """Share of a box x1, y1, x2, y2 that lies in the mask [H, W]; at least a pixel is looked at."""
    (x1, x2), (y1, y2) = (
        (min(max(int(low), 0), size - 1), min(max(math.ceil(high), 1), size))
        for low, high, size in zip(box[:2], box[2:], mask.shape[::-1], strict=True)
    )
    return float((mask[y1 : max(y2, y1 + 1), x1 : max(x2, x1 + 1)] > 0).float().mean())


def _bounds(faces: dict[int, Tensor]) -> Tensor:
    """The box [4] in pixels around the crops of faces."""
    boxes = crop_boxes(torch.stack(list(faces.values())).float())
    return torch.cat([boxes[:, :2].amin(0), boxes[:, 2:].amax(0)])


def to_pixels(picture: Tensor) -> Pixels:
    """[3, H, W] about 0..1 -> uint8 [H, W, 3]; what is not finite becomes black."""
    levels = (picture.detach().float().nan_to_num().clamp(0, 1) * 255).round().byte().cpu()
    return rearrange(levels, "c h w -> h w c").contiguous().numpy()
