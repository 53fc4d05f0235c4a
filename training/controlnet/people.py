"""Pictures of people as the data set keeps them: one JSON line per picture.

The first line of an index names its format and the folder of the pictures; masks stay as small as
the annotation file has them and become pixels when a picture is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from difflora_core.errors import DiffLoRAError

from ..run_folder import write_whole

FORMAT = "difflora-people-1"
Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels."""
Points = tuple[tuple[float, float], ...]
"""x, y in pixels: eyes, nose tip, mouth corners; left of the picture first."""


class BadIndex(DiffLoRAError):
    """An index of a data set of people that cannot be read."""


@dataclass(frozen=True)
class Person:
    """One person of a picture."""

    box: Box
    area: float
    """Pixels of the person."""
    mask: Any
    """COCO's polygons or run lengths, see segmentation.py."""
    face: Box | None = None
    landmarks: Points | None = None
    """Of the face; only faces that have them can be aligned and compared."""


@dataclass(frozen=True)
class Picture:
    """One picture with what is known about it."""

    file: str
    """Relative to the folder of the pictures."""
    width: int
    height: int
    captions: tuple[str, ...]
    people: tuple[Person, ...]

    @cached_property
    def coverage(self) -> float:
        """Share of the picture that its people cover, 0..1."""
        covered = sum(person.area for person in self.people)
        return min(covered / (self.width * self.height), 1.0)


@dataclass(frozen=True)
class Index:
    """A split of the data set."""

    folder: Path
    """Where the pictures lie."""
    pictures: tuple[Picture, ...]


def write_index(path: Path, folder: str, pictures: Iterable[Picture]) -> None:
    """Write an index whole or not at all."""
    lines = [json.dumps({"format": FORMAT, "folder": folder})]
    lines += [json.dumps(asdict(picture), separators=(",", ":")) for picture in pictures]
    write_whole(path, "\n".join(lines) + "\n")


def read_index(path: Path) -> Index:
    """Read what `write_index` wrote. Errors: BadIndex."""
    try:
        first, *rest = path.read_text(encoding="utf-8").splitlines()
        header = json.loads(first)
        if header["format"] != FORMAT:
            raise ValueError(f"its format is {header['format']!r}")
        pictures = tuple(_picture(json.loads(line)) for line in rest)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadIndex(
            f"{path.name} is not an index of people: {error}.",
            hint="Make it anew with `python -m training build-people-dataset`.",
        ) from error
    return Index(Path(header["folder"]), pictures)


def _picture(record: dict[str, Any]) -> Picture:
    people = tuple(_person(person) for person in record.pop("people"))
    captions = tuple(record.pop("captions"))
    return Picture(**record, captions=captions, people=people)


def _person(record: dict[str, Any]) -> Person:
    box, face, landmarks = record.pop("box"), record.pop("face"), record.pop("landmarks")
    return Person(
        box=as_box(box),
        face=None if face is None else as_box(face),
        landmarks=None if landmarks is None else tuple((x, y) for x, y in landmarks),
        **record,
    )


def as_box(numbers: Sequence[float]) -> Box:
    """Four numbers as a box. Errors: ValueError."""
    x0, y0, x1, y1 = numbers
    return (x0, y0, x1, y1)
