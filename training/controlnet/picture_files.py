"""The picture files of the data set of people, as their annotations describe them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from difflora_core.errors import BadImage
from difflora_core.photos import DAMAGE, upright

from .people import Picture

WORKERS = 8
"""Threads that read pictures."""


class OtherSize(BadImage):
    """A picture that has not the size of its annotation."""


def read_picture(folder: Path, picture: Picture) -> Image.Image:
    """RGB pixels of the annotated size. Errors: BadImage, OtherSize.

    A file is turned as its EXIF data say only where its stored size is not the annotated one: most
    annotations were drawn on the pixels as they are stored.
    """
    path, size = folder / picture.file, (picture.width, picture.height)
    try:
        with Image.open(path) as image:
            image.load()
            turned = image if image.size == size else upright(image)
            pixels = turned.convert("RGB")
    except DAMAGE as error:
        raise BadImage(f"Cannot read the picture {path}: {error}.") from error
    if pixels.size != size:
        raise OtherSize(
            f"{path.name} is {pixels.width}x{pixels.height}, its annotation says "
            f"{picture.width}x{picture.height}.",
            hint="Are these the pictures that the annotation file is about?",
        )
    return pixels


def faults(folder: Path, pictures: Sequence[Picture]) -> list[BadImage | None]:
    """What keeps each picture from being read, or None; every file is decoded once."""

    def fault(picture: Picture) -> BadImage | None:
        try:
            read_picture(folder, picture)
        except BadImage as error:
            return error
        return None

    with ThreadPoolExecutor(WORKERS) as workers:
        return list(workers.map(fault, pictures))
