"""Fourteen backgrounds: seven plain walls and seven places."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .canvas import Canvas, blur, circle, soft, wide
from .vocabulary import BACKGROUNDS, PLAIN_COLOURS

WALLS = (
    (0.8, 0.22, 0.22), (0.25, 0.45, 0.82), (0.3, 0.64, 0.38), (0.94, 0.84, 0.36),
    (0.56, 0.36, 0.72), (0.55, 0.56, 0.58), (0.94, 0.94, 0.93),
)  # fmt: skip


#: blur of places in units, as behind a portrait lens: faces are what the models shall spend on
_OUT_OF_FOCUS = 2


def draw_background(canvas: Canvas, background: Tensor, texture: Tensor) -> None:
    """Fill the pictures: background [B] indexes the vocabulary, texture [B, 8] varies it."""
    for i, name in enumerate(BACKGROUNDS):
        index = (background == i).nonzero()[:, 0]
        if len(index):
            part = canvas.rows(index)
            t = [wide(texture[index, k]) for k in range(texture.shape[1])]
            if i < len(PLAIN_COLOURS):
                _wall(part, WALLS[i], t)
            else:
                PLACES[name](part, t)
                radius = max(1, round(_OUT_OF_FOCUS * part.pixel))
                part.image = blur(blur(part.image, radius), radius)
            canvas.put_rows(index, part)


def _fill(c: Canvas, cover: Tensor | float, rgb: tuple[float, float, float]) -> None:
    colour = torch.tensor(rgb, device=c.image.device).expand(len(c.image), 3)
    shape = (len(c.image), *c.image.shape[2:])
    full = (
        cover if isinstance(cover, Tensor) else torch.full((1, 1, 1), cover, device=colour.device)
    )
    c.paint(full.expand(shape), colour)


def _gradient(
    c: Canvas, top: tuple[float, float, float], bottom: tuple[float, float, float]
) -> None:
    _fill(c, 1.0, top)
    _fill(c, (c.y / 128).clamp(0, 1), bottom)


def _hills(c: Canvas, base: Tensor | float, height: float, width: float, phase: Tensor) -> Tensor:
    """Cover of rolling ground whose rim waves around y = base."""
    wave = torch.sin(c.x / width + 6.28 * phase) + 0.5 * torch.sin(c.x * 2.3 / width + 11 * phase)
    return soft(base + height * wave - c.y, 1.0)


def _wall(c: Canvas, rgb: tuple[float, float, float], t: list[Tensor]) -> None:
    _fill(c, 1.0, rgb)
    lamp = soft(circle(c.x - 30 - 68 * t[0], c.y - 30, 40.0), 90.0)
    c.shade(0.84 + 0.16 * lamp + 0.1 * (t[1] - 0.5))


def _corner(where: Tensor) -> Tensor:
    """x of what stands in the sky, left or right of heads; where in 0..1."""
    return 13 + 10 * where + 92 * (where > 0.5)


def _beach(c: Canvas, t: list[Tensor]) -> None:
    _gradient(c, (0.36, 0.66, 0.93), (0.8, 0.92, 0.98))
    horizon = 58 + 10 * t[0]
    _fill(c, soft(horizon - c.y + 0 * c.x, 1.0), (0.12, 0.5, 0.7))
    foam = (torch.remainder(c.y + torch.sin(c.x / 7 + 6 * t[1]), 8.0) - 4).abs() - 0.5
    _fill(c, soft(foam, 1.0) * (c.y > horizon) * 0.5, (0.85, 0.95, 1.0))
    _fill(c, _hills(c, horizon + 26, 2.0, 20.0, t[2]), (0.93, 0.83, 0.6))
    _fill(c, soft(circle(c.x - _corner(t[3]), c.y - 16, 9.0), 1.5), (1.0, 0.96, 0.7))


def _forest(c: Canvas, t: list[Tensor]) -> None:
    _gradient(c, (0.62, 0.82, 0.66), (0.2, 0.42, 0.2))
    for row, (gap, green) in enumerate(((17.0, (0.2, 0.45, 0.22)), (25.0, (0.08, 0.28, 0.13)))):
        x = torch.remainder(c.x + gap * t[row] + 7 * row, gap) - gap / 2
        trunk = torch.maximum(x.abs() - 1.6 - row, 46 - c.y)
        _fill(c, soft(trunk, 1.0), (0.3, 0.2, 0.12))
        crown = torch.maximum(
            x.abs() - torch.remainder(c.y + 9 * row, 18.0) * 0.36 - 1, c.y - 78 - 14 * row
        )
        _fill(c, soft(crown, 1.2), green)
    _fill(c, _hills(c, 108.0, 2.0, 12.0, t[2]), (0.16, 0.34, 0.14))


def _mountains(c: Canvas, t: list[Tensor]) -> None:
    _gradient(c, (0.5, 0.72, 0.95), (0.86, 0.93, 1.0))
    for k, (grey, rise) in enumerate(((0.62, 16.0), (0.45, 34.0))):
        period = 52.0 + 14 * k
        x = torch.remainder(c.x + period * t[k], period) - period / 2
        peak = rise + x.abs() * 1.25
        _fill(c, soft(peak - c.y, 1.2), (grey * 0.9, grey * 0.95, grey * 1.1))
        cap = torch.maximum(peak - c.y, c.y - rise - 12 - 3 * torch.sin(c.x * 0.9))
        _fill(c, soft(cap, 1.2), (0.97, 0.98, 1.0))
    _fill(c, _hills(c, 92.0, 3.0, 22.0, t[2]), (0.36, 0.56, 0.3))


def _city(c: Canvas, t: list[Tensor]) -> None:
    _gradient(c, (0.05, 0.06, 0.18), (0.22, 0.16, 0.36))
    _fill(c, soft(circle(c.x - _corner(t[0]), c.y - 15, 6.5), 1.0), (0.95, 0.94, 0.82))
    for k, (wide_, base, tone) in enumerate(((19.0, 34.0, 0.16), (27.0, 52.0, 0.09))):
        x = c.x + wide_ * t[1 + k]
        block = torch.floor(x / wide_)
        roof = base + 14 * torch.sin(block * 2.4 + 9 * t[3])
        inside = torch.remainder(x, wide_)
        tower = torch.maximum(roof - c.y, (inside - wide_ / 2).abs() - wide_ / 2 + 1)
        _fill(c, soft(tower, 1.0), (tone, tone, tone * 1.8))
        pane = (
            torch.maximum(
                (torch.remainder(inside, 6.0) - 3).abs(), (torch.remainder(c.y, 7.0) - 3.5).abs()
            )
            - 1.3
        )
        lit = (
            torch.sin(
                torch.floor(inside / 6) * 5 + torch.floor(c.y / 7) * 3 + block * 7 + 20 * t[4]
            )
            > 0.1
        )
        _fill(c, soft(torch.maximum(pane, tower + 1.5), 0.8) * lit, (0.98, 0.85, 0.45))


def _sunset(c: Canvas, t: list[Tensor]) -> None:
    _gradient(c, (0.42, 0.2, 0.5), (1.0, 0.6, 0.25))
    band = soft(
        (torch.remainder(c.y + 3 * torch.sin(c.x / 22 + 6 * t[0]), 19.0) - 9.5).abs() - 2.0, 4.0
    )
    _fill(c, 0.35 * band * (c.y < 80), (1.0, 0.45, 0.42))
    _fill(c, soft(circle(c.x - 16 - 96 * t[1], c.y - 70, 15.0), 1.5), (1.0, 0.9, 0.5))
    _fill(c, _hills(c, 88.0, 4.0, 24.0, t[2]), (0.24, 0.1, 0.24))


def _snow(c: Canvas, t: list[Tensor]) -> None:
    _gradient(c, (0.68, 0.77, 0.88), (0.86, 0.9, 0.95))
    x = torch.remainder(c.x + 30 * t[0], 30.0) - 15
    tree = torch.maximum(x.abs() - torch.remainder(c.y, 15.0) * 0.45 - 0.5, (c.y - 62).abs() - 30)
    _fill(c, soft(tree, 1.2), (0.22, 0.4, 0.38))
    _fill(c, _hills(c, 90.0, 3.0, 25.0, t[1]), (0.97, 0.98, 1.0))
    for k in range(2):
        fx = torch.remainder(c.x + 17 * torch.floor(c.y / 16) + 40 * t[2 + k], 16.0) - 8
        fy = torch.remainder(c.y + 8 * k, 16.0) - 8
        _fill(c, soft(circle(fx, fy, 1.5 - 0.4 * k), 0.8), (1.0, 1.0, 1.0))


def _library(c: Canvas, t: list[Tensor]) -> None:
    _fill(c, 1.0, (0.34, 0.2, 0.11))
    shelf = 25.0
    y = torch.remainder(c.y + 8 * t[0], shelf)
    row = torch.floor((c.y + 8 * t[0]) / shelf)
    x = c.x + 6.5 * row + 7 * t[1]
    book = torch.floor(x / 7.0)
    tall = 16 + 4 * torch.sin(book * 3.7 + row * 5)
    inside = torch.maximum((torch.remainder(x, 7.0) - 3.5).abs() - 3.0, shelf - 1.5 - tall - y)
    inside = torch.maximum(inside, y - shelf + 2.5)
    hue = book * 2.4 + row * 1.7 + 6 * t[2]
    spine = torch.stack([0.45 + 0.3 * torch.sin(hue + k * 2.1) for k in range(3)], 1)
    c.paint(soft(inside, 0.8), spine)
    _fill(c, soft((y - shelf + 1).abs() - 1.4, 0.8) + 0 * c.x, (0.5, 0.31, 0.17))


PLACES: dict[str, Callable[[Canvas, list[Tensor]], None]] = {
    "beach": _beach,
    "forest": _forest,
    "mountains": _mountains,
    "city": _city,
    "sunset": _sunset,
    "snow": _snow,
    "library": _library,
}
