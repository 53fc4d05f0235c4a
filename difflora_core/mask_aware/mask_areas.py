"""The separate areas of a mask, one per face, told apart to the pixel."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

FINEST = 512
"""Pixels along the longer side that are told apart; larger masks are reduced to them."""


class Run(NamedTuple):
    """Neighbouring pixels of a row: `start` to `stop`, without the last."""

    row: int
    start: int
    stop: int


Area = list[Run]


def mask_parts(mask: Tensor, most: int) -> Tensor:
    """Boxes [K, 4] in pixels around the separate areas of a mask [H, W], from left to right.

    At most `most` of them, the largest. An area ends where the mask falls to half of its peak, so
    a soft edge moves nothing, and areas that touch with soft edges only are two.
    """
    coarse = max(1, math.ceil(max(mask.shape) / FINEST))
    grid = F.max_pool2d(mask.float()[None], coarse, ceil_mode=True)[0].cpu().numpy()
    half = np.full_like(grid, np.inf)
    for area in areas(grid > 0):
        peak = max(grid[row, start:stop].max() for row, start, stop in area)
        for row, start, stop in area:
            half[row, start:stop] = 0.5 * peak
    largest = sorted(areas(grid >= half), key=_size, reverse=True)[:most]
    boxes = torch.tensor(sorted(map(_box, largest)), dtype=torch.float32).view(-1, 4) * coarse
    height, width = mask.shape
    return boxes.minimum(torch.tensor([width, height, width, height]))


def areas(grid: NDArray[np.bool_]) -> list[Area]:
    """Areas of a bool grid whose pixels touch along their sides."""
    labels: list[int] = []  # of every run; a label points to another until it points to itself
    runs, above = [], range(0)
    for row in _rows(grid):
        here = range(len(runs), len(runs) + len(row))
        runs += row
        labels += here
        for one, other in _touching(runs, above, here):
            labels[_root(labels, other)] = _root(labels, one)
        above = here
    found: dict[int, Area] = {}
    for number, run in enumerate(runs):
        found.setdefault(_root(labels, number), []).append(run)
    return list(found.values())


def _rows(grid: NDArray[np.bool_]) -> Iterator[list[Run]]:
    """The runs of every row."""
    edges = np.diff(np.pad(grid.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    for row, changes in enumerate(edges):
        ends = np.flatnonzero(changes).tolist()
        yield [Run(row, *pair) for pair in zip(ends[::2], ends[1::2], strict=True)]


def _touching(runs: Area, above: range, here: range) -> Iterator[tuple[int, int]]:
    """Pairs of runs, one of each row, that share a column; both rows go from left to right."""
    i, j = above.start, here.start
    while i < above.stop and j < here.stop:
        if runs[i].start < runs[j].stop and runs[j].start < runs[i].stop:
            yield i, j
        if runs[i].stop <= runs[j].stop:
            i += 1
        else:
            j += 1


def _root(labels: list[int], number: int) -> int:
    while labels[number] != number:
        labels[number] = labels[labels[number]]
        number = labels[number]
    return number


def _size(area: Area) -> int:
    return sum(run.stop - run.start for run in area)


def _box(area: Area) -> list[int]:
    return [
        min(run.start for run in area), min(run.row for run in area),
        max(run.stop for run in area), max(run.row for run in area) + 1,
    ]  # fmt: skip
