"""Latent windows around faces, so that only they are decoded, and landmarks inside them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..face_crop import TEMPLATE, TEMPLATE_SIZE, inverted, similarity
from .decoders import Part

MARGIN = 4
"""Latents decoded around a face. With a decoder of TAESD's shape the aligned face is then within
0.1 % (rms) of that of the whole picture, and the gradient points the same way (cosine 0.999)."""
POINTS_HEIGHT, POINTS_MIDDLE = 0.34, 0.6
"""From eyes to mouth, and where the mean of the five points lies below the top, as shares of a face
box: 0.31 of drawn faces' boxes, 0.36 where a box is as high as ArcFace's crop of the face."""


@dataclass(frozen=True)
class Windows:
    """N windows of one size into a batch of latents, so that they decode as one batch."""

    picture: Tensor
    """[N] int64: which picture of the batch."""
    top: Tensor
    """[N] int64, in latents."""
    left: Tensor
    """[N] int64, in latents."""
    height: int
    width: int

    def __len__(self) -> int:
        return len(self.picture)

    def cut(self, maps: Tensor) -> Tensor:
        """[B, C, H, W] -> [N, C, height, width], copied."""
        places = zip(self.picture.tolist(), self.top.tolist(), self.left.tolist(), strict=True)
        return torch.stack(
            [maps[i, :, y : y + self.height, x : x + self.width] for i, y, x in places]
        )

    def add_back(self, maps: Tensor, parts: Tensor) -> Tensor:
        """A copy of [B, C, H, W] with [N, C, height, width] added at the windows' places."""
        total = maps.clone()
        places = zip(self.picture.tolist(), self.top.tolist(), self.left.tolist(), strict=True)
        for part, (i, y, x) in zip(parts, places, strict=True):
            total[i, :, y : y + self.height, x : x + self.width] += part
        return total

    def part(self, boxes: Tensor, upscale: int) -> Part:
        """Latents that boxes [N, 4] in pixels touch in any of their windows."""
        corner = torch.stack([self.left, self.top, self.left, self.top], -1)
        inside = boxes.detach().float().cpu() / upscale - corner
        size = torch.tensor([self.width, self.height])
        low = inside[:, :2].amin(0).floor().long().clamp(min=0).minimum(size - 1)
        high = inside[:, 2:].amax(0).ceil().long().clamp(min=1).minimum(size)
        (left, top), (right, bottom) = low.tolist(), high.tolist()
        return Part(top, bottom, left, right)

    def shifted(self, points: Tensor, upscale: int) -> Tensor:
        """Pixels of the pictures [N, K, 2] -> pixels of the decoded windows."""
        corner = torch.stack([self.left, self.top], -1).to(points)
        return points - upscale * corner[:, None]


def face_windows(
    picture: Tensor, boxes: Tensor, size: tuple[int, int], upscale: int, margin: int = MARGIN
) -> Windows:
    """Windows of one size that hold each box with `margin` latents around it.

    A window that would reach beyond the picture is moved inside; one larger than the picture is
    the picture.

    Args:
        picture: [N] which picture each box is on.
        boxes: [N, 4] x0, y0, x1, y1 in pixels; may reach beyond the picture.
        size: height and width of the latents.
        upscale: pixels per latent.
    """
    limit = torch.tensor([size[1], size[0]])
    latents = boxes.detach().float().cpu() / upscale
    low = (latents[:, :2].floor().long() - margin).clamp(min=0).minimum(limit - 1)
    high = (latents[:, 2:].ceil().long() + margin).clamp(min=1).minimum(limit)
    width, height = (high - low).amax(0).clamp(min=1).tolist()
    start = low.minimum(limit - torch.tensor([width, height])).clamp(min=0)
    return Windows(picture.cpu(), start[:, 1], start[:, 0], height, width)


def alike(boxes: Tensor, most: int, room: float = float("inf")) -> list[Tensor]:
    """Rows of boxes [N, 4] in groups that can share a window size, the largest boxes first.

    None has less than half the area of the largest in its group. A group has at most `most` rows,
    and as many boxes as its largest take at most `room` square pixels, unless it is alone.
    """
    areas: list[float] = (boxes[:, 2:] - boxes[:, :2]).prod(1).tolist()
    groups: list[list[int]] = []
    for row in sorted(range(len(areas)), key=lambda row: -areas[row]):
        group = groups[-1] if groups else []
        largest = areas[group[0]] if group else 0.0
        fits = len(group) < most and (len(group) + 1) * largest <= room
        if group and fits and areas[row] >= largest / 2:
            group.append(row)
        else:
            groups.append([row])
    return [torch.tensor(sorted(group)) for group in groups]


def crop_boxes(landmarks: Tensor) -> Tensor:
    """Upright boxes [N, 4] around ArcFace's crops of faces with these landmarks [N, 5, 2]."""
    template = torch.tensor(TEMPLATE, device=landmarks.device).expand(len(landmarks), 5, 2)
    back = inverted(similarity(landmarks, template))
    side = TEMPLATE_SIZE - 1.0
    corners = torch.tensor([[0.0, 0.0], [side, 0.0], [0.0, side], [side, side]]).to(landmarks)
    places = (back[:, None, :, :2] * corners[:, None]).sum(-1) + back[:, None, :, 2]
    return torch.cat([places.amin(1), places.amax(1)], -1)


def landmarks_of_boxes(boxes: Tensor) -> Tensor:
    """Five points [N, 5, 2] for face boxes [N, 4]: ArcFace's template in its usual place.

    For faces known by a mask alone, from hairline to chin and looking at the camera.
    """
    template = torch.tensor(TEMPLATE, device=boxes.device)
    points = template - template.mean(0)
    points = points / (points[3:, 1].mean() - points[:2, 1].mean())
    x0, y0, x1, y1 = boxes.float().unbind(-1)
    height = y1 - y0
    middle = torch.stack([(x0 + x1) / 2, y0 + POINTS_MIDDLE * height], -1)
    return middle[:, None] + points * (POINTS_HEIGHT * height)[:, None, None]


def box_masks(boxes: Tensor, size: tuple[int, int], upscale: int) -> Tensor:
    """[N, h, w] float: 1 for each latent whose pixels a box [N, 4] covers at least half."""
    y = torch.arange(size[0], device=boxes.device)
    x = torch.arange(size[1], device=boxes.device)
    scaled = boxes.float() / upscale
    wide = _overlap(x, scaled[:, 0], scaled[:, 2])
    tall = _overlap(y, scaled[:, 1], scaled[:, 3])
    return ((tall[:, :, None] * wide[:, None]) >= 0.5).float()


def latent_masks(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Pixel masks [B, H, W] in 0..1 -> latents [B, h, w]: mean of the pixels of each latent."""
    # Apple's GPUs pool into sides only that divide the mask's
    pooled = masks.float().cpu() if masks.device.type == "mps" else masks.float()
    return F.adaptive_avg_pool2d(pooled[:, None], size)[:, 0].to(masks.device)


def _overlap(start: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Covered share of unit intervals [start, start + 1] by [low, high]: [N, K]."""
    covered = torch.minimum(start + 1, high[:, None]) - torch.maximum(start, low[:, None])
    return covered.clamp(0, 1)
