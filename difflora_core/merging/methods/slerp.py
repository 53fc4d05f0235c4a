"""Spherical interpolation between two LoRAs (Shoemake 1985), layer by layer.

The angle is the one between the two differences, from r x r Gram matrices; the result is a linear
combination of them, so it depends on no basis. Where the two point the same or the opposite way, or
one is zero, the interpolation is straight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..stack import Stack
from .method import Method

_STRAIGHT = 1e-4


def shares(stack: Stack) -> Sequence[float]:
    if len(stack.ups) < 2:
        return stack.weights
    total = sum(stack.weights)
    angle = _angle(stack)
    if min(angle, math.pi - angle) < _STRAIGHT or total == 0:
        return stack.weights
    return [math.sin(w / total * angle) / math.sin(angle) * total for w in stack.weights]


def _angle(stack: Stack) -> float:
    inner = [[_inner(stack, i, j) for j in (0, 1)] for i in (0, 1)]
    length = math.sqrt(inner[0][0] * inner[1][1])
    return math.acos(max(-1.0, min(1.0, inner[0][1] / length))) if length else 0.0


def _inner(stack: Stack, i: int, j: int) -> float:
    """<D_i, D_j> = <B_i^T B_j, A_i A_j^T>."""
    up = stack.ups[i].double().mT @ stack.ups[j].double()
    return float((up * (stack.downs[i].double() @ stack.downs[j].double().mT)).sum())


METHOD = Method(
    "slerp",
    "Spherical interpolation between two LoRAs; keeps the strength between them.",
    shares=shares,
    inputs=2,
)
