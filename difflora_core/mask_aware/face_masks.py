"""Masks of the faces in a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Shape = Literal["oval", "box"]
SHAPES: tuple[Shape, ...] = ("oval", "box")


def face_mask(
    size: tuple[int, int],
    boxes: Sequence[Sequence[float]],
    shape: Shape = "oval",
    grow: float = 0.0,
    feather: float = 0.0,
) -> Tensor:
    """1 on the faces and 0 elsewhere, [height, width] float32; zeros without any face.

    Args:
        size: height and width in pixels.
        boxes: x1, y1, x2, y2 in pixels of each face; they may reach beyond the picture.
        grow: added on each side, as a share of the face's width and height; negative shrinks.
        feather: width of the soft edge as a share of the face's half size. The edge proper, where
            the mask is one half, stays where it is without.
    """
    mask = torch.zeros(size)
    # the middle of pixel i lies at i + 0.5
    y, x = torch.meshgrid(torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5, indexing="ij")
    for x1, y1, x2, y2 in boxes:
        across = (x - (x1 + x2) / 2).abs() / max((x2 - x1) * (0.5 + grow), 0.5)
        down = (y - (y1 + y2) / 2).abs() / max((y2 - y1) * (0.5 + grow), 0.5)
        # 1 on the edge, by which the rest is measured
        reach = torch.hypot(across, down) if shape == "oval" else torch.maximum(across, down)
        mask = torch.maximum(mask, _falling(reach, feather))
    return mask


def _falling(reach: Tensor, feather: float) -> Tensor:
    if feather <= 0:
        return (reach <= 1).float()
    return ((1 - reach) / feather + 0.5).clamp(0, 1)
