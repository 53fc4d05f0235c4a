"""Eyes, brows, nose and mouth. Each is drawn in a small window, so it costs little."""

from __future__ import annotations

import torch
from torch import Tensor

from .anatomy import Anatomy, Pose
from .canvas import Canvas, Window, bow, circle, cover, ellipse, rotate, soft, wide

# Per expression, in the order of vocabulary.EXPRESSIONS:
# neutral, smiling, laughing, sad, angry, surprised
EYE_OPENING = (1.0, 0.86, 0.62, 0.84, 0.72, 1.4)
BROW_LIFT = (0.0, 0.4, 0.9, 0.3, -2.0, 3.2)
BROW_SLANT = (0.0, 0.0, -0.05, -0.4, 0.42, 0.0)  # positive = inner end down
MOUTH_BEND = (-0.1, -3.4, -3.0, 3.2, 1.5, 3.0)  # negative = corners up
MOUTH_STRETCH = (1.0, 1.2, 1.22, 0.88, 0.9, 0.6)
MOUTH_OPENING = (0.0, 0.0, 7.5, 0.0, 0.0, 6.2)
LIP = (0.76, 0.3, 0.3)
#: how far in front the mouth is: further, and it leaves the jaw of a turned head
MOUTH_DEPTH = 0.6


def _look(expression: Tensor, table: tuple[float, ...]) -> Tensor:
    return wide(torch.tensor(table, device=expression.device)[expression])


def draw_features(canvas: Canvas, who: Anatomy, pose: Pose, expression: Tensor) -> None:
    draw_nose(canvas, who, pose)
    draw_mouth(canvas, who, pose, expression)
    for side in (-1.0, 1.0):
        draw_eye(canvas, who, pose, expression, side)


def landmarks(who: Anatomy, pose: Pose, expression: Tensor) -> Tensor:
    """Five points [B, 5, 2] in units: eyes, nose tip, mouth corners; left of the picture first."""
    stretch = _look(expression, MOUTH_STRETCH) * who.mouth_width
    bend = _look(expression, MOUTH_BEND)
    zero = torch.zeros_like(who.eye_x)
    points = [
        (pose.turned(-who.eye_x), who.eye_y),
        (pose.turned(who.eye_x), who.eye_y),
        (pose.turned(zero, 1.35), who.eye_y + who.nose_length),
        (pose.turned(-stretch, MOUTH_DEPTH), who.mouth_y + bend),
        (pose.turned(stretch, MOUTH_DEPTH), who.mouth_y + bend),
    ]
    xy = [pose.to_picture(u[:, 0, 0], v[:, 0, 0]) for u, v in points]
    return torch.stack([torch.stack(p, -1) for p in xy], 1)


def _window(
    canvas: Canvas, pose: Pose, u: Tensor, v: Tensor, width: float, height: float
) -> Window:
    """The window around a point of the head's frame; sized for the largest head in the batch."""
    x, y = pose.to_picture(u[:, 0, 0], v[:, 0, 0])
    zoom = float(pose.scale.max())
    return canvas.window(x, y, width * zoom, height * zoom)


def draw_eye(canvas: Canvas, who: Anatomy, pose: Pose, expression: Tensor, side: float) -> None:
    at_u, at_v = pose.turned(side * who.eye_x), who.eye_y
    window = _window(canvas, pose, at_u, at_v - 4, 28, 32)
    u, v = pose.head(window.x, window.y)
    u, v = u - at_u, v - at_v
    pixel = window.pixel * pose.scale
    _eyeball(window, u, v, who, pose, _look(expression, EYE_OPENING), side, pixel)
    _brow(window, u, v, who, expression, side, pixel)
    window.paste(canvas)


def _eyeball(
    window: Canvas, u: Tensor, v: Tensor, who: Anatomy, pose: Pose, opening: Tensor, side: float,
    pixel: Tensor,
) -> None:  # fmt: skip
    u, v = rotate(u, v, side * -who.eye_tilt)
    half = 5.3 * who.eye_size * (1 - 0.1 * pose.yaw.abs())
    tall = 3.3 * who.eye_size * opening
    almond = ellipse(u, v, half, tall)
    window.paint(0.35 * soft(ellipse(u, v, half + 1.6, tall + 1.8), 2.5), who.skin * 0.62)
    white = cover(almond, pixel)
    window.paint(white, torch.full_like(who.skin, 0.97))
    gaze = 1.5 * pose.yaw
    size = 2.75 * who.eye_size.sqrt()
    window.paint(white * cover(circle(u - gaze, v, size), pixel), who.iris * 0.7)
    window.paint(white * cover(circle(u - gaze, v, size * 0.78), pixel), who.iris)
    window.paint(white * cover(circle(u - gaze, v, size * 0.5), pixel), who.iris * 0.08)
    glint = white * cover(circle(u - gaze + 0.9, v + 1.0, 0.75), pixel)
    window.paint(glint, torch.ones_like(who.skin))
    lid = (almond.abs() - 0.62).maximum(v - 0.4 * tall)
    window.paint(0.92 * cover(lid, pixel), who.hair * 0.25 + 0.03)


def _brow(
    window: Canvas, u: Tensor, v: Tensor, who: Anatomy, expression: Tensor, side: float,
    pixel: Tensor,
) -> None:  # fmt: skip
    slant = _look(expression, BROW_SLANT)
    height = who.brow_y + _look(expression, BROW_LIFT)
    u, v = rotate(u, v + height, -side * slant)
    stroke = bow(u, v + 0.6, 6.4, who.brow_thickness, 1.7)
    window.paint(0.95 * cover(stroke, pixel), who.hair * 0.62)


def draw_nose(canvas: Canvas, who: Anatomy, pose: Pose) -> None:
    at_u = pose.turned(torch.zeros_like(who.eye_x), 1.35)
    tip = who.eye_y + who.nose_length
    window = _window(canvas, pose, at_u, tip - 5, 26, 30)
    u, v = pose.head(window.x, window.y)
    pixel = window.pixel * pose.scale
    bridge = pose.turned(torch.zeros_like(who.eye_x), 0.9)
    along = ((v - who.eye_y) / who.nose_length).clamp(0, 1)
    ridge = u - torch.lerp(bridge, at_u, along) - (0.35 + 0.4 * along) * who.nose_width
    inside = (along * (1 - along) * 4).clamp(0, 1) * (v < tip)
    window.paint(0.32 * soft(ridge.abs() - 0.6, 2.2) * inside, who.skin * 0.55)
    window.paint(
        0.5 * soft(ellipse(u - at_u, v - tip, who.nose_width + 0.8, 2.4), 2.0), who.skin * 0.8
    )
    ball = ellipse(u - at_u, v - tip + 0.8, who.nose_width * 0.72, 2.0)
    window.paint(0.55 * soft(ball, 2.4), (who.skin * 1.06).clamp(0, 1))
    for side in (-1.0, 1.0):
        hole = ellipse(u - at_u - side * who.nose_width * 0.55, v - tip - 0.9, 1.25, 0.75)
        window.paint(0.8 * cover(hole, pixel), who.skin * 0.36)
    window.paste(canvas)


def draw_mouth(canvas: Canvas, who: Anatomy, pose: Pose, expression: Tensor) -> None:
    at_u = pose.turned(torch.zeros_like(who.eye_x), MOUTH_DEPTH)
    window = _window(canvas, pose, at_u, who.mouth_y + 2, 40, 30)
    u, v = pose.head(window.x, window.y)
    u, v = u - at_u, v - who.mouth_y
    pixel = window.pixel * pose.scale
    half = who.mouth_width * _look(expression, MOUTH_STRETCH) * (1 - 0.08 * pose.yaw.abs())
    bend = _look(expression, MOUTH_BEND)
    opening = _look(expression, MOUTH_OPENING)
    lip = torch.tensor(LIP, device=u.device) * (0.55 + 0.45 * who.skin)
    s = (u / half).clamp(-1, 1)
    swell = 1 - s * s
    line = bend * s * s
    slope = (1 + (2 * bend * s / half) ** 2).sqrt()
    upper = (line - v) / slope - who.lips * 0.95 * swell * (1 - 0.25 * torch.exp(-18 * s * s))
    floor = line + opening * swell
    lower = (v - floor) / slope - who.lips * 1.25 * swell
    inside_width = u.abs() - half
    window.paint(cover(torch.maximum(torch.maximum(upper, lower), inside_width), pixel), lip)
    _mouth_opening(window, u, v, line, floor, opening, inside_width, pixel)
    seam = torch.maximum((v - line).abs() / slope - 0.5, inside_width) + 3.0 * (opening > 0)
    window.paint(0.85 * cover(seam, pixel), lip * 0.35)
    window.paste(canvas)


def _mouth_opening(
    window: Canvas, u: Tensor, v: Tensor, line: Tensor, floor: Tensor, opening: Tensor,
    inside_width: Tensor, pixel: Tensor,
) -> None:  # fmt: skip
    hole = torch.maximum(torch.maximum(line - v, v - floor), inside_width)
    gap = cover(hole, pixel) * (opening > 0)
    device, n = u.device, len(u)
    window.paint(gap, torch.tensor([0.25, 0.05, 0.06], device=device).expand(n, 3))
    # a whole grin of teeth: rows of teeth, gap, tongue and lips read as two mouths at 128 px
    teeth = cover(hole + 0.8, pixel) * (opening > 7)
    window.paint(teeth, torch.tensor([0.97, 0.96, 0.93], device=device).expand(n, 3))
