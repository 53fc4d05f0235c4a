"""Which of the faces that were found is whose, now and at every later look."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .pairing import assign

SAME_PLACE = 1.0
"""How far a face may move between two looks and be the same one, in distances of its eyes."""
PLACE_WEIGHT = 1.0
"""What a move by one distance of the eyes costs, in units of cosine."""

Likeness = Callable[[list[int]], Tensor]
"""Faces by number to their cosines with all references, [n, R]."""


def whose_face(
    points: Tensor, held: Mapping[int, Tensor], references: int, likeness: Likeness
) -> dict[int, int]:
    """Reference -> number of its face; no face twice, no reference twice.

    A face that is where one was keeps its reference, so a second look decides nothing anew. Others
    go to references whose face is gone, by likeness and place, and only then to references that
    have had none, by likeness; of too many the first.

    Args:
        points: landmarks of the faces, the largest first, [N, 5, 2] in pixels, N > 0.
        held: reference -> landmarks [5, 2] of its face at the last look.
        references: how many there are.
    """
    chosen = _in_place(points, held)
    gone = [r for r in held if r not in chosen]
    new = [r for r in range(references) if r not in held]
    for group, most in ((gone, len(points)), (new, len(new))):
        free = [face for face in range(len(points)) if face not in chosen.values()][:most]
        if not free or not group:
            continue
        costs = 1 - likeness(free)[:, group].nan_to_num().cpu()
        if group is gone:
            costs += PLACE_WEIGHT * _moves(points[free], [held[r] for r in group])
        chosen |= {group[column]: free[row] for row, column in assign(costs)}
    return chosen


def _in_place(points: Tensor, held: Mapping[int, Tensor]) -> dict[int, int]:
    """Reference -> face, for faces that are where they were."""
    if not held:
        return {}
    # beyond the limit all places are alike, so that a far one never costs a near pair its match
    moves = _moves(points, list(held.values())).clamp(max=2 * SAME_PLACE)
    pairs = ((face, reference) for face, reference in assign(moves))
    order = list(held)
    return {order[column]: face for face, column in pairs if moves[face, column] <= SAME_PLACE}


def _moves(points: Tensor, before: Sequence[Tensor]) -> Tensor:
    """[N, len(before)]: how far each face is from where others were, in distances of the eyes."""
    places = torch.stack(list(before))
    eyes = (places[:, 1] - places[:, 0]).norm(dim=-1).clamp(min=1.0)
    return (points.mean(1)[:, None] - places.mean(1)).norm(dim=-1) / eyes
