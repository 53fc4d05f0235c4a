"""COCO's two kinds of masks, polygons and run lengths, as pixels.

Run lengths go down the columns and begin with the pixels outside; the compressed form writes each
length, less the one two places before it, in groups of five bits (cocoapi, maskApi.c). Polygons
fill the pixels that they cover by half or more; cocoapi decides some pixels of the edge otherwise.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from difflora_core.errors import DiffLoRAError

Mask = NDArray[np.bool_]
_FIRST_CHARACTER = 48
#: polygons are drawn this many times larger, since PIL fills every pixel that an edge touches
_FINER = 4


class BadSegmentation(DiffLoRAError):
    """A mask that is neither polygons nor run lengths, or does not fit its picture."""


def to_mask(segmentation: Any, height: int, width: int) -> Mask:
    """The pixels [H, W] inside a segmentation of an annotation file. Errors: BadSegmentation."""
    if isinstance(segmentation, dict):
        return _from_runs(segmentation, height, width)
    if isinstance(segmentation, list) and segmentation:
        return _from_polygons(segmentation, height, width)
    raise BadSegmentation(
        f"A segmentation must be a list of polygons or a table of run lengths, "
        f"found {_shortened(segmentation)}."
    )


def to_runs(mask: Mask) -> dict[str, Any]:
    """A mask [H, W] as compressed run lengths."""
    flat = np.concatenate([[False], mask.T.ravel(), [False]])
    edges = [0, *np.flatnonzero(flat[1:] != flat[:-1]).tolist(), mask.size]
    counts = [after - before for before, after in pairwise(edges)]
    if len(counts) > 1 and counts[-1] == 0:
        counts.pop()
    return {"size": list(mask.shape), "counts": _compressed(counts)}


def _from_runs(runs: dict[str, Any], height: int, width: int) -> Mask:
    if list(runs.get("size", ())) != [height, width]:
        raise BadSegmentation(
            f"Run lengths are of a picture of size {runs.get('size')}, "
            f"the picture has [{height}, {width}]."
        )
    counts = runs.get("counts")
    lengths = _uncompressed(counts) if isinstance(counts, str) else counts
    if not isinstance(lengths, list) or not all(isinstance(n, int) and n >= 0 for n in lengths):
        raise BadSegmentation(f"Run lengths must be whole numbers, found {_shortened(counts)}.")
    if sum(lengths) != height * width:
        raise BadSegmentation(
            f"Run lengths cover {sum(lengths)} pixels, the picture has {height * width}."
        )
    inside = np.arange(len(lengths)) % 2 == 1
    return np.repeat(inside, lengths).reshape(width, height).T


def _from_polygons(polygons: list[Any], height: int, width: int) -> Mask:
    canvas = Image.new("L", (_FINER * width, _FINER * height))
    pen = ImageDraw.Draw(canvas)
    for polygon in polygons:
        numbers = isinstance(polygon, list) and all(isinstance(v, int | float) for v in polygon)
        if not numbers or len(polygon) < 6 or len(polygon) % 2 or not np.isfinite(polygon).all():
            raise BadSegmentation(
                "A polygon must be a list of at least three pairs of numbers, "
                f"found {_shortened(polygon)}."
            )
        # COCO counts from the corner of the picture, PIL from the middle of the first pixel
        points = np.asarray(polygon, float) * _FINER - 0.5
        pen.polygon(points.tolist(), fill=255)
    return np.asarray(canvas.reduce(_FINER)) > 127


def _uncompressed(text: str) -> list[int]:
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - _FIRST_CHARACTER
        if not 0 <= bits < 64:
            raise BadSegmentation(f"{character!r} cannot stand in compressed run lengths.")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:  # negative: the sign reaches all higher bits
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    if shift:
        raise BadSegmentation("Compressed run lengths end in the middle of a number.")
    return counts


def _compressed(counts: list[int]) -> str:
    text = []
    for i, count in enumerate(counts):
        value, more = count - (counts[i - 2] if i > 2 else 0), True
        while more:
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)
            text.append(chr((bits | 32 if more else bits) + _FIRST_CHARACTER))
    return "".join(text)


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
