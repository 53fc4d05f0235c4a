"""Merges and comparisons as pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping

from PIL import Image, ImageDraw, ImageFont

from .blocks import block_of
from .certificate import Certificate
from .comparison import Comparison
from .engine import Merged

_INK, _PAPER, _FAINT = (35, 35, 40), (255, 255, 255), (205, 205, 210)
_BLUE, _RED = (44, 92, 190), (200, 60, 50)
_ROW, _CELL, _MARGIN, _LABEL = 22, 34, 14, 250
_CHART, _NOTE = 460, 130
_TEXT = 14
#: ratio of the smallest singular value drawn to the largest
_DEPTH = 1e-4


def heat_map(comparison: Comparison) -> Image.Image:
    """Cosine (left) and overlap (right) of every pair, one row per block and one for everything."""
    pairs = _pairs(len(comparison.titles))
    rows = [("everything", comparison.total_cosine, comparison.total_overlap)]
    rows += list(zip(comparison.blocks, comparison.cosine, comparison.overlap, strict=True))
    half = len(pairs) * _CELL + _MARGIN
    legend = [f"{i + 1} {title}" for i, title in enumerate(comparison.titles)]
    top = _MARGIN + _ROW * (len(legend) + 2)
    width = _LABEL + max(2 * half, 300) + _MARGIN
    image = Image.new("RGB", (width, top + _CELL * len(rows) + _MARGIN), _PAPER)
    draw = _pen(image)
    for i, line in enumerate(legend):
        draw.text((_MARGIN, _MARGIN + i * _ROW), line, _INK)
    for column, word in enumerate(("cosine", "overlap")):
        left = _LABEL + column * half
        draw.text((left, top - 2 * _ROW), word, _INK)
        for k, (i, j) in enumerate(pairs):
            draw.text((left + k * _CELL + 3, top - _ROW), f"{i + 1}:{j + 1}", _INK)
        for row, (block, *figures) in enumerate(rows):
            y = top + row * _CELL
            draw.text((_MARGIN, y + 8), block, _INK)
            for k, (i, j) in enumerate(pairs):
                _cell(draw, left + k * _CELL, y, float(figures[column][i, j]))
    return image


def spectrum_picture(merged: Merged) -> Image.Image:
    """Singular values of each block's strongest layer, and where they were cut, logarithmic."""
    strongest = _strongest(merged.certificates)
    height = _MARGIN * 2 + _ROW * (len(strongest) + 2)
    image = Image.new("RGB", (_LABEL + _CHART + _NOTE, max(height, 80)), _PAPER)
    draw = _pen(image)
    facts = merged.report
    headline = f"{facts['method']}: energy kept {facts['energy']:.4f}, error {facts['error']:.2e}"
    draw.text((_MARGIN, _MARGIN), headline, _INK)
    for row, (block, certificate) in enumerate(strongest.items()):
        y = _MARGIN + (row + 2) * _ROW
        draw.text((_MARGIN, y), block, _INK)
        _bars(draw, y, certificate)
        note = f"rank {certificate.rank} of {certificate.full_rank}"
        draw.text((_LABEL + _CHART + 8, y), note, _INK)
    return image


def _pen(image: Image.Image) -> ImageDraw.ImageDraw:
    draw = ImageDraw.Draw(image)
    draw.font = ImageFont.load_default(_TEXT)
    return draw


def _pairs(count: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(count) for j in range(i + 1, count)]


def _cell(draw: ImageDraw.ImageDraw, x: int, y: int, value: float) -> None:
    """A square from white (0) to blue (1) or red (-1) with the value in percent; faint: nothing."""
    if math.isnan(value):
        draw.rectangle((x, y, x + _CELL - 2, y + _CELL - 2), outline=_FAINT)
        return
    colour, share = (_BLUE if value >= 0 else _RED), min(abs(value), 1.0)
    fill = tuple(round(255 + (c - 255) * share) for c in colour)
    draw.rectangle((x, y, x + _CELL - 2, y + _CELL - 2), fill=fill, outline=_FAINT)
    percent = str(round(100 * value))  # no minus before a zero
    draw.text((x + 4, y + 8), percent, _PAPER if share > 0.55 else _INK)


def _strongest(certificates: Mapping[str, Certificate]) -> dict[str, Certificate]:
    found: dict[str, Certificate] = {}
    for name, certificate in certificates.items():
        block = block_of(name)
        if block not in found or certificate.norm > found[block].norm:
            found[block] = certificate
    return found


def _bars(draw: ImageDraw.ImageDraw, y: int, certificate: Certificate) -> None:
    sigma = [s for s in certificate.singular_values if s > 0]
    if not sigma:
        draw.text((_LABEL, y), "exact, not decomposed", _FAINT)
        return
    step = _CHART / len(sigma)
    for k, s in enumerate(sigma):
        share = max(0.0, 1 - math.log(s / sigma[0]) / math.log(_DEPTH))
        colour = _BLUE if k < certificate.rank else _FAINT
        x = _LABEL + k * step
        box = (x, y + (_ROW - 3) * (1 - share), x + max(step - 1, 0.5), y + _ROW - 3)
        draw.rectangle(box, fill=colour)
