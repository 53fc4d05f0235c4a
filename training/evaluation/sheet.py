"""A labelled sheet of pictures: one line per kind of picture, one column per person."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from difflora_core.whole_file import whole_file

MARGIN = 4
TITLE_HEIGHT = 18


def draw_sheet(lines: Mapping[str, Tensor], titles: list[str] | None = None) -> Image.Image:
    """Lay out pictures: label -> [columns, 3, H, W] in 0..1; `titles` stand over the columns.

    Errors: ValueError when the lines differ in shape.
    """
    shapes = {tuple(pictures.shape) for pictures in lines.values()}
    if len(shapes) != 1:
        raise ValueError(f"every line of a sheet needs the same shape, found {sorted(shapes)}")
    columns, _, height, width = shapes.pop()
    top = TITLE_HEIGHT if titles else MARGIN
    font = ImageFont.load_default(size=13)
    left = 2 * MARGIN + math.ceil(max(font.getlength(label) for label in lines))
    size = (left + columns * (width + MARGIN), top + len(lines) * (height + MARGIN))
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles or []):
        pen.text((left + column * (width + MARGIN), 2), title, fill="black", font=font)
    for line, (label, pictures) in enumerate(lines.items()):
        y = top + line * (height + MARGIN)
        pen.text((MARGIN, y + height // 2 - 8), label, fill="black", font=font)
        for column, picture in enumerate(pictures):
            sheet.paste(to_image(picture), (left + column * (width + MARGIN), y))
    return sheet


def to_image(picture: Tensor) -> Image.Image:
    """[3, H, W] in 0..1 to an 8-bit picture."""
    array = (picture.detach().float().clamp(0, 1) * 255).round().byte().cpu()
    return Image.fromarray(rearrange(array, "c h w -> h w c").numpy())


def save_sheet(path: Path, lines: Mapping[str, Tensor], titles: list[str] | None = None) -> Path:
    """Draw and write a sheet as PNG."""
    return save_png(path, draw_sheet(lines, titles))


def save_png(path: Path, image: Image.Image) -> Path:
    """Write a picture whole or not at all. Errors: OSError."""
    with whole_file(path) as file:
        image.save(file, "png")
    return path
