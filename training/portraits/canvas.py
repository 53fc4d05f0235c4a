"""A batch of pictures to draw on, and the shapes to draw: signed distances with soft edges.

Coordinates are in units of 1/128 of the picture, whatever its size in pixels; distances are
negative inside a shape. Batched scalars are [B, 1, 1], coordinates [B, H, W] (or broadcastable).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

UNITS = 128.0


@dataclass
class Canvas:
    """Pictures [B, 3, H, W] (0..1) with the coordinates of their pixel centres.

    x [B or 1, 1, W] and y [B or 1, H, 1] in units; pixel = pixels per unit.
    """

    image: Tensor
    x: Tensor
    y: Tensor
    pixel: float

    @classmethod
    def blank(cls, n: int, size: int, device: torch.device) -> Canvas:
        axis = (torch.arange(size, device=device) + 0.5) * (UNITS / size)
        image = torch.zeros(n, 3, size, size, device=device)
        return cls(image, axis.view(1, 1, -1), axis.view(1, -1, 1), size / UNITS)

    def paint(self, cover: Tensor, colour: Tensor) -> None:
        """Lay a colour ([B, 3] or [B, 3, H, W]) over the picture where cover [B, H, W] is 1."""
        if colour.dim() == 2:
            colour = colour[:, :, None, None]
        self.image.lerp_(colour, cover.unsqueeze(1))

    def shade(self, amount: Tensor) -> None:
        """Multiply the picture by amount [B, H, W]."""
        self.image.mul_(amount.unsqueeze(1))

    def rows(self, index: Tensor) -> Canvas:
        """A copy of some pictures; `put_rows` brings it back."""
        return Canvas(self.image[index], _pick(self.x, index), _pick(self.y, index), self.pixel)

    def put_rows(self, index: Tensor, part: Canvas) -> None:
        self.image[index] = part.image

    def window(self, cx: Tensor, cy: Tensor, width: float, height: float) -> Window:
        """A copy of the part of each picture around (cx, cy) [B], in units."""
        return Window.cut(self, cx, cy, width, height)


class Window(Canvas):
    """A rectangle of a canvas: small shapes cost little when drawn in one."""

    index: tuple[Tensor, Tensor, Tensor]

    @classmethod
    def cut(cls, canvas: Canvas, cx: Tensor, cy: Tensor, width: float, height: float) -> Window:
        size = canvas.image.shape[-1]
        across = min(size, round(width * canvas.pixel))
        down = min(size, round(height * canvas.pixel))
        left = (cx * canvas.pixel - across / 2).round().long().clamp(0, size - across)
        top = (cy * canvas.pixel - down / 2).round().long().clamp(0, size - down)
        device = canvas.image.device
        columns = left[:, None] + torch.arange(across, device=device)
        rows = top[:, None] + torch.arange(down, device=device)
        batch = torch.arange(len(cx), device=device)[:, None, None]
        index = (batch, rows[:, :, None], columns[:, None, :])
        patch = canvas.image.permute(0, 2, 3, 1)[index].permute(0, 3, 1, 2).contiguous()
        x = (columns + 0.5)[:, None, :] / canvas.pixel
        y = (rows + 0.5)[:, :, None] / canvas.pixel
        window = cls(patch, x, y, canvas.pixel)
        window.index = index
        return window

    def paste(self, canvas: Canvas) -> None:
        canvas.image.permute(0, 2, 3, 1)[self.index] = self.image.permute(0, 2, 3, 1)


def _pick(axis: Tensor, index: Tensor) -> Tensor:
    return axis if axis.shape[0] == 1 else axis[index]


def blur(image: Tensor, radius: int) -> Tensor:
    """Mean over squares of 2 * radius + 1 pixels, [B, C, H, W] -> [B, C, H, W]."""
    padded = F.pad(image, (radius,) * 4, mode="replicate")
    return F.avg_pool2d(padded, 2 * radius + 1, stride=1)


def wide(value: Tensor) -> Tensor:
    """[B] -> [B, 1, 1]."""
    return value[:, None, None]


def cover(distance: Tensor, pixel: Tensor | float) -> Tensor:
    """Share of a pixel inside a shape (0..1) from the distance to its edge; pixel = px per unit."""
    return (0.5 - distance * pixel).clamp_(0, 1)


def outline(distance: Tensor, half_width: float, pixel: Tensor | float) -> Tensor:
    """As `cover`, of a line along the edge of a shape."""
    return cover(distance.abs() - half_width, pixel)


def soft(distance: Tensor, width: Tensor | float) -> Tensor:
    """As `cover`, with an edge `width` units wide: for shadows and blush."""
    return (0.5 - distance / width).clamp_(0, 1)


def ellipse(x: Tensor, y: Tensor, rx: Tensor | float, ry: Tensor | float) -> Tensor:
    """Distance to an ellipse around the origin (first order, exact on the edge)."""
    u, v = x / rx, y / ry
    level = u * u + v * v
    slope = ((u / rx) ** 2 + (v / ry) ** 2).clamp_(min=1e-8).sqrt_()
    return (level - 1) / (2 * slope)


def circle(x: Tensor, y: Tensor, radius: Tensor | float) -> Tensor:
    return (x * x + y * y).sqrt() - radius


def box(
    x: Tensor, y: Tensor, half_width: Tensor | float, half_height: Tensor | float, corner: float
) -> Tensor:
    """Distance to a rectangle with rounded corners around the origin."""
    dx = x.abs() - half_width + corner
    dy = y.abs() - half_height + corner
    outside = (dx.clamp(min=0) ** 2 + dy.clamp(min=0) ** 2).sqrt()
    return outside + torch.maximum(dx, dy).clamp(max=0) - corner


def bow(
    x: Tensor,
    y: Tensor,
    half_width: Tensor | float,
    thickness: Tensor | float,
    bend: Tensor | float,
) -> Tensor:
    """Distance to a curved stroke y = bend * (x / half_width)^2, thinner towards its ends."""
    u = x / half_width
    centre = bend * u * u
    slope = (1 + (2 * bend * u / half_width) ** 2).sqrt()
    across = (y - centre).abs() / slope - thickness * (1.0 - 0.55 * u * u)
    return torch.maximum(across, x.abs() - half_width)


def rotate(x: Tensor, y: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates in a frame turned by angle (radians, [B, 1, 1])."""
    cos, sin = angle.cos(), angle.sin()
    return x * cos + y * sin, y * cos - x * sin


def palette(position: Tensor, colours: tuple[tuple[float, float, float], ...]) -> Tensor:
    """Colours [B, 3] at positions [B] in 0..1 along a line of key colours."""
    table = torch.tensor(colours, device=position.device)
    place = position.clamp(0, 1) * (len(colours) - 1)
    low = place.floor().long().clamp(max=len(colours) - 2)
    return torch.lerp(table[low], table[low + 1], (place - low)[:, None])


def choose(index: Tensor, colours: tuple[tuple[float, float, float], ...]) -> Tensor:
    """Colours [B, 3] by index [B]."""
    return torch.tensor(colours, device=index.device)[index]
