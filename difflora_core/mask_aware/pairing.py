"""Which face belongs to which: any number of faces per picture, and any number of references.

Where the truth is known, faces of the real picture and of the estimate are cut out by the same
row, so that a pair can never be torn apart. Where faces were found anew, `assign` pairs them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import DiffLoRAError
from ..face_crop import TEMPLATE_SIZE, align
from .losses import Term

NOBODY = -1


@dataclass(frozen=True)
class FlatFaces:
    """The N faces of B pictures in rows; pictures may have none, or any number."""

    picture: Tensor
    """[N] int64: which picture a face is in."""
    boxes: Tensor
    """[N, 4] x1, y1, x2, y2 in pixels"""
    landmarks: Tensor
    """[N, 5, 2] in pixels"""
    pictures: int
    """B"""

    @classmethod
    def of(cls, boxes: Sequence[Tensor], landmarks: Sequence[Tensor]) -> FlatFaces:
        """From the boxes [n, 4] and landmarks [n, 5, 2] of each picture, n >= 0 its own."""
        counts = torch.tensor([len(rows) for rows in boxes])
        picture = torch.arange(len(boxes)).repeat_interleave(counts)
        return cls(picture, torch.cat(list(boxes)), torch.cat(list(landmarks)), len(boxes))

    def __len__(self) -> int:
        return len(self.picture)

    def rows(self, rows: Tensor) -> FlatFaces:
        """Some of the faces, of the same pictures."""
        return replace(
            self, picture=self.picture[rows], boxes=self.boxes[rows], landmarks=self.landmarks[rows]
        )

    @property
    def widths(self) -> Tensor:
        """[N] in pixels"""
        return self.boxes[:, 2] - self.boxes[:, 0]

    def crops(self, images: Tensor, size: int = TEMPLATE_SIZE) -> Tensor:
        """Aligned faces [N, C, size, size] of the pictures [B, C, H, W]; differentiable."""
        return align(images[self.picture.to(images.device)], self.landmarks, size)

    def per_picture(self, values: Tensor) -> Term:
        """The mean of values [N] over the faces of each picture; absent where it has none.

        The original sums them, so that a crowd outweighs everything else.
        """
        picture = self.picture.to(values.device)
        sums = values.new_zeros(self.pictures).index_add(0, picture, values)
        counts = torch.bincount(picture, minlength=self.pictures)
        return Term(sums / counts.clamp_min(1), counts > 0)


def assign(costs: Tensor) -> list[tuple[int, int]]:
    """Pairs (row, column) of least total cost, as many as the shorter side of [R, C] has.

    The Hungarian method with potentials (Kuhn, 1955; shortest augmenting paths after Jonker and
    Volgenant, 1987): exact, O(R R C). Errors: DiffLoRAError for costs that are not finite.
    """
    if not bool(costs.isfinite().all()):
        raise DiffLoRAError("Faces cannot be paired: some costs are not finite.")
    rows, columns = costs.shape
    if rows > columns:
        return sorted((row, column) for column, row in assign(costs.mT))
    table = costs.double().tolist()
    row_prices, column_prices = [0.0] * rows, [0.0] * (columns + 1)
    owner = [NOBODY] * columns
    for row in range(rows):
        _augment(table, row, row_prices, column_prices, owner)
    return sorted((row, column) for column, row in enumerate(owner) if row != NOBODY)


def _augment(
    table: list[list[float]],
    row: int,
    row_prices: list[float],
    column_prices: list[float],
    owner: list[int],
) -> None:
    """Give one more row a column, moving earlier rows along the shortest path of exchanges.

    Prices keep cost - row price - column price at 0 or more, and at 0 for pairs.
    """
    start = len(owner)  # one column more, which only the new row owns
    holder = [*owner, row]
    reach, before = [math.inf] * start, [start] * start
    open_columns, closed, column = list(range(start)), [start], start
    while (current := holder[column]) != NOBODY:
        for c in open_columns:
            cost = table[current][c] - row_prices[current] - column_prices[c]
            if cost < reach[c]:
                reach[c], before[c] = cost, column
        column = min(open_columns, key=reach.__getitem__)
        step = reach[column]
        for c in closed:
            row_prices[holder[c]] += step
            column_prices[c] -= step
        reach = [distance - step for distance in reach]
        open_columns.remove(column)
        closed.append(column)
    while column != start:
        owner[column] = holder[before[column]]
        column = before[column]
