"""Batches from the pictures of build-people-dataset, read while the step before them runs."""

from __future__ import annotations

import random
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from ..base.pool import encode_images
from .base_model import BaseModel
from .batches import MASK_SIDE, PeopleBatch, without_small_faces
from .config import ControlnetConfig
from .people import Index, Person, Picture
from .picture_files import WORKERS, read_picture
from .segmentation import to_mask

MOST_PEOPLE = 8
"""People of a picture that count, the largest."""
WHOLE_FACE = 0.9
"""Share of a face box that has to lie inside the crop."""


class Square(NamedTuple):
    """A square part of a picture and how much it is magnified."""

    left: int
    top: int
    side: int
    scale: float

    def moved(self, points: Tensor) -> Tensor:
        """Pixels x, y [..., 2] of the picture as pixels of the crop."""
        return (points - torch.tensor([self.left, self.top])) * self.scale


class Example(NamedTuple):
    """One cropped picture; shapes as in PeopleBatch, pixels as bytes."""

    pixels: Tensor
    prompt: str
    masks: Tensor
    boxes: Tensor
    landmarks: Tensor


@dataclass(frozen=True)
class ReadPeople:
    """A split of the data set; pictures are read and encoded as they are needed."""

    index: Index
    base: BaseModel
    settings: ControlnetConfig
    workers: ThreadPoolExecutor
    ahead: dict[tuple[int, int, int], list[Future[Example]]]

    @classmethod
    def open(cls, index: Index, base: BaseModel, settings: ControlnetConfig) -> ReadPeople:
        return cls(index, base, settings, ThreadPoolExecutor(WORKERS), {})

    def __len__(self) -> int:
        return len(self.index.pictures)

    def draw(self, step: int, count: int, seed: int) -> PeopleBatch:
        """The batch of a step: pictures, squares and captions at random from step and seed."""
        now = self.ahead.pop((step, count, seed), None) or self._start(step, count, seed)
        self.ahead.clear()
        self.ahead[step + 1, count, seed] = self._start(step + 1, count, seed)
        return self.collate([future.result() for future in now])

    def _start(self, step: int, count: int, seed: int) -> list[Future[Example]]:
        rng = random.Random(f"{seed} {step}")
        chosen = [(rng.choice(self.index.pictures), rng.random()) for _ in range(count)]
        return [self.workers.submit(self.read, p, random.Random(r)) for p, r in chosen]

    def read(self, picture: Picture, rng: random.Random | None) -> Example:
        """One picture, cropped to a square; without `rng` the one around the largest person, and
        the first caption.

        Errors: BadImage.
        """
        square = choose_square(picture, self.settings.resolution, rng)
        people = sorted(picture.people, key=lambda person: -person.area)[:MOST_PEOPLE]
        boxes, landmarks = _faces(people, square, self.settings)
        caption = rng.choice(picture.captions) if rng else picture.captions[0]
        masks = torch.stack([_mask(person, picture, square) for person in people])
        pixels = self._pixels(picture, square)
        return Example(pixels, caption, masks, boxes, landmarks)

    def collate(self, examples: list[Example]) -> PeopleBatch:
        """Encode pictures and fill up to the largest number of people."""
        device = self.base.device
        pixels, prompts, masks, boxes, landmarks = zip(*examples, strict=True)
        parts = torch.stack(pixels).split(self.settings.batch)
        latents = [encode_images(self.base.vae, part.to(device).float() / 255) for part in parts]
        return PeopleBatch(
            torch.cat(latents),
            prompts,
            _filled(masks, 0).to(device).float() / 255,
            _filled(boxes, float("nan")).to(device),
            _filled(landmarks, float("nan")).to(device),
        )

    def _pixels(self, picture: Picture, square: Square) -> Tensor:
        side = self.settings.resolution
        box = (square.left, square.top, square.left + square.side, square.top + square.side)
        image = read_picture(self.index.folder, picture)
        resized = image.resize((side, side), Image.Resampling.LANCZOS, box)
        return rearrange(torch.from_numpy(np.array(resized)), "h w c -> c h w")


def choose_square(picture: Picture, resolution: int, rng: random.Random | None) -> Square:
    """The largest square, somewhere along the longer side, around the middle of the largest
    person if that is possible."""
    side = min(picture.width, picture.height)
    box = max(picture.people, key=lambda person: person.area).box
    left = _choose_start(picture.width, side, (box[0] + box[2]) / 2, rng)
    top = _choose_start(picture.height, side, (box[1] + box[3]) / 2, rng)
    return Square(left, top, side, resolution / side)


def _choose_start(length: int, side: int, middle: float, rng: random.Random | None) -> int:
    """First pixel of a stretch of `side` pixels out of `length` that holds `middle`."""
    if rng is None:
        return min(max(int(middle) - side // 2, 0), length - side)
    last = min(length - side, max(int(middle), 0))
    return rng.randint(min(max(0, int(middle) - side + 1), last), last)


def _faces(
    people: list[Person], square: Square, settings: ControlnetConfig
) -> tuple[Tensor, Tensor]:
    """Boxes [P, 4] and landmarks [P, 5, 2] in the crop; NaN for faces that cannot be compared."""
    nowhere = float("nan")
    boxes = torch.tensor([person.face or (nowhere,) * 4 for person in people])
    points = torch.tensor([person.landmarks or ((nowhere, nowhere),) * 5 for person in people])
    corners = square.moved(boxes.view(-1, 2, 2))
    inside = corners.clamp(0, settings.resolution)
    area, seen = (c.diff(dim=1).prod(-1)[:, 0] for c in (corners, inside))
    boxes = corners.flatten(1).masked_fill((seen < WHOLE_FACE * area)[:, None], nowhere)
    landmarks = square.moved(points)
    narrowest = settings.smallest_face * settings.resolution
    return without_small_faces(boxes, landmarks, narrowest), landmarks


def _mask(person: Person, picture: Picture, square: Square) -> Tensor:
    mask = to_mask(person.mask, picture.height, picture.width)
    part = mask[square.top : square.top + square.side, square.left : square.left + square.side]
    small = Image.fromarray(part.astype(np.uint8) * 255).resize(
        (MASK_SIDE, MASK_SIDE), Image.Resampling.BOX
    )
    return torch.from_numpy(np.array(small))


def _filled(rows: tuple[Tensor, ...], value: float) -> Tensor:
    """Stack [P_i, ...] of different P_i, filled up with a value."""
    most = max(len(row) for row in rows)
    whole = rows[0].new_full((len(rows), most, *rows[0].shape[1:]), value)
    for i, row in enumerate(rows):
        whole[i, : len(row)] = row
    return whole
