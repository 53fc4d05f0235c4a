"""Runs of guidance as pictures: how the loss fell, and the faces that it was measured on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .run_log import GuidedRun

_INK, _PAPER, _FAINT = (35, 35, 40), (255, 255, 255), (215, 215, 220)
_COLOURS = ((44, 92, 190), (200, 60, 50), (40, 140, 80), (150, 90, 170))
_WIDTH, _HEIGHT, _LEFT, _EDGE, _BOTTOM = 520, 300, 48, 16, 44
_TEXT, _LINE = 14, 20
_MOST_COLUMNS, _MOST_ROWS = 12, 8
_GAP = 2


def loss_curve(runs: Sequence[GuidedRun]) -> Image.Image:
    """1 - cosine over the guided steps, a line for each run; noise levels below."""
    image = Image.new("RGB", (_WIDTH, _HEIGHT), _PAPER)
    draw = _pen(image)
    lines = [[step for step in run.with_faces if math.isfinite(step.loss)] for run in runs]
    lines = [line for line in lines if line]
    if not lines:
        draw.text((_EDGE, _EDGE), "No face was guided.", _INK)
        return image
    losses = [step.loss for line in lines for step in line]
    top = max(1.0, *losses)
    draw.text((_LEFT, 4), "loss (1 - cosine) of each guided step", _INK)
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = _height(share * top, top)
        draw.line((_LEFT, y, _WIDTH - _EDGE, y), _FAINT)
        draw.text((8, y - 8), f"{share * top:.2f}", _INK)
    for number, line in enumerate(lines):
        points = [(_place(i, len(line)), _height(s.loss, top)) for i, s in enumerate(line)]
        colour = _COLOURS[number % len(_COLOURS)]
        draw.line(points, colour, 2)
        for x, y in points:
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), colour)
    _sigmas(draw, [step.sigma for step in lines[-1]], " in the last run" * (len(lines) > 1))
    return image


def crop_strip(runs: Sequence[GuidedRun]) -> Image.Image:
    """Faces as the guiding network saw them: a column per step, a row per face, runs below."""
    strips = [_strip(run) for run in runs if run.strips]
    if not strips:
        image = Image.new("RGB", (_WIDTH, 2 * _EDGE + _LINE), _PAPER)
        _pen(image).text((_EDGE, _EDGE), "No face was guided.", _INK)
        return image
    width = max(strip.width for strip in strips)
    image = Image.new("RGB", (width, sum(strip.height for strip in strips)), _PAPER)
    y = 0
    for strip in strips:
        image.paste(strip, (0, y))
        y += strip.height
    return image


def _strip(run: GuidedRun) -> Image.Image:
    chosen = _spread(len(run.strips), _MOST_COLUMNS)
    faces = [run.strips[i][:_MOST_ROWS] for i in chosen]
    side = faces[0].shape[1]
    rows = max(len(crops) for crops in faces)
    cell = side + _GAP
    image = Image.new("RGB", (cell * len(faces), _LINE + cell * rows), _PAPER)
    draw = _pen(image)
    for column, (i, crops) in enumerate(zip(chosen, faces, strict=True)):
        draw.text((column * cell + 2, 1), f"sigma {run.with_faces[i].sigma:.2f}", _INK)
        for row, crop in enumerate(crops):
            image.paste(Image.fromarray(crop), (column * cell, _LINE + row * cell))
    return image


def _pen(image: Image.Image) -> ImageDraw.ImageDraw:
    draw = ImageDraw.Draw(image)
    draw.font = ImageFont.load_default(_TEXT)
    return draw


def _spread(count: int, most: int) -> list[int]:
    """Indices of at most so many of `count` things, evenly, the first and the last among them."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()


def _place(step: int, count: int) -> float:
    return _LEFT + (_WIDTH - _LEFT - _EDGE - 16) * (step / max(count - 1, 1)) + 8


def _height(loss: float, top: float) -> float:
    high, low = _LINE + _EDGE, _HEIGHT - _BOTTOM
    return low - (low - high) * loss / top


def _sigmas(draw: ImageDraw.ImageDraw, sigmas: Sequence[float], of_which: str) -> None:
    for i in _spread(len(sigmas), 8):
        x = _place(i, len(sigmas))
        draw.text((x - 12, _HEIGHT - _BOTTOM + 6), f"{sigmas[i]:.2f}", _INK)
    draw.text((_LEFT, _HEIGHT - 20), f"sigma, the noise left{of_which}", _INK)
