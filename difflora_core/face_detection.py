"""Where the faces of a picture are: InsightFace's detector at several sizes, close-ups twice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .photos import Pixels

Detections = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Boxes with scores [N, 5] and landmarks [N, 5, 2], in pixels of the picture."""

#: tried in turn until a face is found: a detector misses faces that fill its whole field
DETECTION_SIZES = (640, 448, 320, 256, 192, 128)
#: small pictures are not enlarged beyond this, where a detector only sees blur
MAX_ENLARGEMENT = 2.5
#: pixels, at the size of the detector, of the largest face that it places well; of larger ones the
#: mini world's often finds a part only
LARGEST_FACE = 192
#: a second look for faces larger than that is taken at a size so many times smaller at least
FARTHER = 2.5
#: two boxes are of one face where they share so much of the smaller one
_SAME_FACE = 0.5
#: border added on each side, as a share of the longer side, when no size finds a face
CLOSE_UP_BORDER = 0.5
#: longest side in pixels with that border; a wide one around a large picture would take gigabytes
CLOSE_UP_SIDE = 2 * max(DETECTION_SIZES)


def detect(detector: Any, bgr: Pixels, sizes: Sequence[int] = DETECTION_SIZES) -> Detections:
    """The faces of a picture [H, W, 3], uint8 BGR; none if no size, with a border or not, has any.

    Args:
        detector: as InsightFace has them, with `detect(picture, input_size=)`.
        sizes: of the detector's square field, in the order in which they are tried.
    """
    found = _at_sizes(detector, bgr, sizes)
    if len(found[0]):
        return found
    small, scale = _shrunk(bgr, round(CLOSE_UP_SIDE / (1 + 2 * CLOSE_UP_BORDER)))
    border = round(max(small.shape[:2]) * CLOSE_UP_BORDER)
    padded = np.pad(small, ((border, border), (border, border), (0, 0)))
    boxes, points = _at_sizes(detector, padded, sizes)
    boxes[:, :4] = (boxes[:, :4] - border) * np.tile(scale, 2)
    return boxes, (points - border) * scale


def _at_sizes(detector: Any, bgr: Pixels, sizes: Sequence[int]) -> Detections:
    longest, shortest = max(bgr.shape[:2]), min(bgr.shape[:2])
    limit = max(MAX_ENLARGEMENT * longest, min(sizes))
    # of a thin strip nothing is left at the size of the detector, which then fails
    usable = [s for s in sizes if s <= limit and s * shortest >= 2 * longest]
    for size in usable:
        near = _at(detector, bgr, size)
        if len(near[0]):
            smaller = [s for s in usable if s * FARTHER <= size]
            far = _at(detector, bgr, max(smaller)) if smaller else _nothing()
            return joined(near, far, LARGEST_FACE * longest / size)
    return _nothing()


def joined(near: Detections, far: Detections, largest: float) -> Detections:
    """What two looks see: faces longer than `largest` pixels as the far one does, which they fill
    less, the others as the near one. What only the near one sees stays, whatever its size.
    """
    sure = ~(_above(far[0]) & (shared(far[0], far[0]) >= _SAME_FACE)).any(1)
    big = sure & ((far[0][:, 2:4] - far[0][:, :2]).max(1) > largest)
    boxes, points = far[0][big], far[1][big]
    alone = ~(shared(near[0], boxes) >= _SAME_FACE).any(1)
    return np.concatenate([near[0][alone], boxes]), np.concatenate([near[1][alone], points])


def _above(boxes: NDArray[np.float32]) -> NDArray[np.bool_]:
    """[N, N]: whether the score of the second box is above that of the first."""
    return boxes[None, :, 4] > boxes[:, None, 4]


def shared(some: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float32]:
    """What boxes x0, y0, x1, y1 share, of the smaller one: [N, 4 or more], [M, ...] -> [N, M]."""
    low = np.maximum(some[:, None, :2], others[None, :, :2])
    high = np.minimum(some[:, None, 2:4], others[None, :, 2:4])
    areas = [(boxes[:, 2:4] - boxes[:, :2]).clip(0).prod(1) for boxes in (some, others)]
    smaller = np.minimum(areas[0][:, None], areas[1][None])
    return (high - low).clip(0).prod(2) / np.maximum(smaller, np.finfo(np.float32).tiny)


def _at(detector: Any, bgr: Pixels, size: int) -> Detections:
    # the size must be an argument: since insightface 1.0 the attribute is ignored
    boxes, points = detector.detect(bgr, input_size=(size, size))
    if points is None or not len(boxes):
        return _nothing()
    return boxes.astype(np.float32), points.astype(np.float32)


def _nothing() -> Detections:
    return np.zeros((0, 5), np.float32), np.zeros((0, 5, 2), np.float32)


def _shrunk(bgr: Pixels, longest: int) -> tuple[Pixels, NDArray[np.float32]]:
    """The picture with no side above `longest`, and the factors of x and y back to the old one."""
    height, width = bgr.shape[:2]
    share = min(1.0, longest / max(height, width))
    size = max(1, round(width * share)), max(1, round(height * share))
    small = np.asarray(Image.fromarray(bgr).resize(size)) if share < 1 else bgr
    return small, np.array([width / size[0], height / size[1]], np.float32)
