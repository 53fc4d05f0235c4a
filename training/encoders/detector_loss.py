"""Which anchors answer for which face, and what the detector is punished for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .detector_net import ANCHOR_SIZES, STRIDES, Level

#: anchors within this many octaves of a face's size answer for it; up to the second, none need to
MATCH_OCTAVES, IGNORE_OCTAVES = 0.6, 1.2


@dataclass(frozen=True)
class Targets:
    """For N anchors of a stride; boxes and landmarks in strides, as the network predicts them."""

    positive: Tensor
    """[B, N] bool: answers for a face."""
    ignored: Tensor
    """[B, N] bool: neither face nor background."""
    boxes: Tensor
    """[B, N, 4] distances to left, top, right, bottom."""
    landmarks: Tensor
    """[B, N, 10] offsets x, y of the five points."""


def assign(stride: int, side: int, boxes: Tensor, landmarks: Tensor, present: Tensor) -> Targets:
    """Targets at one stride of square pictures: boxes [B, P, 4], landmarks [B, P, 5, 2] in pixels.

    An anchor answers for a face when its size fits and its centre is near the face's centre.
    """
    axis = torch.arange(side // stride, device=boxes.device) * float(stride)
    sizes = torch.tensor(ANCHOR_SIZES[STRIDES.index(stride)], device=boxes.device)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).view(-1, 1, 2)
    anchors = grid.expand(-1, len(sizes), 2).reshape(-1, 2)
    base = sizes.repeat(len(grid))
    boxes, landmarks = boxes.nan_to_num(0.0), landmarks.nan_to_num(0.0)
    size = ((boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])).clamp(min=1).sqrt()
    # the smallest and the largest anchors also take what is beyond them
    reach = size.clamp(ANCHOR_SIZES[0][0], ANCHOR_SIZES[-1][-1])
    octaves = (reach[..., None] / base).log2().abs()
    centre = (boxes[..., :2] + boxes[..., 2:]) / 2
    distance = (anchors - centre[:, :, None]).norm(dim=-1)
    radius = (0.2 * size).clamp(0.72 * stride, 1.5 * stride)[..., None]
    here = present[..., None]
    fits = here & (octaves <= MATCH_OCTAVES) & (distance <= radius)
    near = here & (octaves <= IGNORE_OCTAVES) & (distance <= 0.4 * size[..., None] + stride)
    nearest = distance.masked_fill(~fits, torch.inf).argmin(1)
    own_box = _take(boxes, nearest)
    own_points = _take(rearrange(landmarks, "b p k d -> b p (k d)"), nearest)
    sides = torch.cat([anchors - own_box[..., :2], own_box[..., 2:] - anchors], -1)
    positive = fits.any(1)
    return Targets(
        positive,
        near.any(1) & ~positive,
        sides / stride,
        (own_points - anchors.repeat(1, 5)) / stride,
    )


def _take(values: Tensor, index: Tensor) -> Tensor:
    """values [B, P, D], index [B, N] -> [B, N, D]."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


def detector_loss(
    levels: list[Level], side: int, boxes: Tensor, landmarks: Tensor, present: Tensor
) -> dict[str, Tensor]:
    """Focal loss of scores, distance-IoU of boxes, landmarks relative to the face's size."""
    score = box = point = torch.zeros((), device=boxes.device)
    count = torch.ones((), device=boxes.device)
    for level, stride in zip(levels, STRIDES, strict=True):
        target = assign(stride, side, boxes, landmarks, present)
        weight = target.positive.float()
        count = count + weight.sum()
        score = score + (focal(level.scores.float(), weight) * ~target.ignored).sum()
        box = box + (diou_loss(level.boxes.float(), target.boxes) * weight).sum()
        scale = (target.boxes[..., :2] + target.boxes[..., 2:]).mean(-1, keepdim=True)
        error = (level.landmarks.float() - target.landmarks) / scale.clamp(min=0.5)
        point = point + (F.smooth_l1_loss(error, error * 0, beta=0.05, reduction="none").sum(-1)
                         * weight).sum()  # fmt: skip
    score, box, point = score / count, box / count, point / count
    return {"loss": score + 2 * box + 2 * point, "score": score, "box": box, "landmarks": point}


def focal(logits: Tensor, target: Tensor, gamma: float = 2.0) -> Tensor:
    """Focal loss (Lin et al., 2017) without its class weight."""
    surprise = (torch.sigmoid(logits) - target).abs()
    return surprise**gamma * F.binary_cross_entropy_with_logits(logits, target, reduction="none")


def diou_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """1 - IoU + squared distance of centres (Zheng et al., 2020): sides [B, N, 4] -> [B, N]."""
    low = torch.minimum(predicted, target)
    overlap = (low[..., 0] + low[..., 2]).clamp(min=0) * (low[..., 1] + low[..., 3]).clamp(min=0)
    union = _area(predicted) + _area(target) - overlap
    high = torch.maximum(predicted, target)
    diagonal = (high[..., 0] + high[..., 2]) ** 2 + (high[..., 1] + high[..., 3]) ** 2
    apart = (predicted - target)[..., 2:] - (predicted - target)[..., :2]
    return 1 - overlap / union.clamp(min=1e-6) + (apart**2).sum(-1) / 4 / diagonal.clamp(min=1e-6)


def _area(sides: Tensor) -> Tensor:
    width, height = sides[..., 0] + sides[..., 2], sides[..., 1] + sides[..., 3]
    return width.clamp(min=0) * height.clamp(min=0)
