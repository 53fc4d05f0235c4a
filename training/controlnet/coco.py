"""Reads COCO's annotation files, and COCO-WholeBody's, which have faces.

instances: who is where, with masks (Lin et al. 2014). captions: five sentences per picture.
wholebody: for the same annotation numbers a face box and 68 points in the order of 300-W
(Jin et al. 2020). All three count pixels from the top left corner; boxes are x, y, width, height.
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from difflora_core.errors import DiffLoRAError

from .people import Box, Person, Picture, Points

logger = logging.getLogger(__name__)

PERSON = "person"
#: points of the 68 that make up each of our five: both eyes, nose tip, both mouth corners
FIVE_OF_68 = (range(36, 42), range(42, 48), (30,), (48,), (54,))
_FACE_POINTS = 68


class BadAnnotations(DiffLoRAError):
    """An annotation file that cannot be read, or that is not of COCO's format."""


@dataclass
class Survey:
    """Pictures with people, and what was left out on the way, by reason."""

    pictures: list[Picture] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


Face = tuple[Box, Points]


def survey(instances: Path, captions: Path, wholebody: Path | None) -> Survey:
    """Every captioned picture that shows at least one person. Errors: BadAnnotations."""
    found = Survey()
    spoken = _captions(captions)
    faces = _faces(wholebody, found) if wholebody else {}
    images, people = _instances(instances, faces, found)
    for number, image in images.items():
        if number not in people:
            continue
        if not spoken.get(number):
            found.left_out["pictures without a caption"] += 1
            continue
        found.pictures.append(_picture(image, spoken[number], people[number], instances.name))
    return found


def _instances(
    path: Path, faces: Mapping[int, Face], found: Survey
) -> tuple[dict[int, dict[str, Any]], dict[int, list[Person]]]:
    data = _read(path, ("images", "annotations", "categories"))
    wanted = {_entry(c, "id", int, path) for c in data["categories"] if c.get("name") == PERSON}
    if not wanted:
        raise BadAnnotations(f"{path.name} has no category {PERSON!r}.")
    images = {_entry(image, "id", int, path): image for image in data["images"]}
    people: dict[int, list[Person]] = {}
    for annotation in data["annotations"]:
        if _entry(annotation, "category_id", int, path) not in wanted:
            continue
        number = _entry(annotation, "image_id", int, path)
        if number not in images:
            found.left_out["people of unknown pictures"] += 1
        elif annotation.get("iscrowd"):
            found.left_out["crowds"] += 1
        else:
            person = _person(annotation, faces, path, found)
            if person is not None:
                people.setdefault(number, []).append(person)
    return images, people


def _person(
    annotation: dict[str, Any], faces: Mapping[int, Face], path: Path, found: Survey
) -> Person | None:
    area = _entry(annotation, "area", (int, float), path)
    x, y, width, height = _numbers(annotation, "bbox", 4, path)
    mask = _without_lines(annotation.get("segmentation"))
    if not (area > 0 and width > 0 and height > 0 and mask):
        found.left_out["people without area"] += 1
        return None
    face = faces.get(_entry(annotation, "id", int, path))
    return Person(
        box=(x, y, x + width, y + height),
        area=float(area),
        mask=mask,
        face=face[0] if face else None,
        landmarks=face[1] if face else None,
    )


def _without_lines(segmentation: Any) -> Any:
    """A segmentation without polygons of fewer than three corners, which no pixel can lie in."""
    if not isinstance(segmentation, list):
        return segmentation
    return [polygon for polygon in segmentation if not _is_line(polygon)]


def _is_line(polygon: Any) -> bool:
    numbers = isinstance(polygon, list) and all(isinstance(v, int | float) for v in polygon)
    return numbers and len(polygon) < 6


def _captions(path: Path) -> dict[int, list[str]]:
    spoken: dict[int, list[str]] = {}
    for annotation in _read(path, ("annotations",))["annotations"]:
        text = " ".join(_entry(annotation, "caption", str, path).split())
        if text:
            spoken.setdefault(_entry(annotation, "image_id", int, path), []).append(text)
    return spoken


def _faces(path: Path, found: Survey) -> dict[int, Face]:
    """Annotation number -> face box and five points, where the file calls the face valid."""
    faces: dict[int, Face] = {}
    for annotation in _read(path, ("annotations",))["annotations"]:
        if not annotation.get("face_valid"):
            continue
        x, y, width, height = _numbers(annotation, "face_box", 4, path)
        points = _five_points(_numbers(annotation, "face_kpts", 3 * _FACE_POINTS, path))
        if width > 0 and height > 0 and points is not None:
            faces[_entry(annotation, "id", int, path)] = ((x, y, x + width, y + height), points)
        else:
            found.left_out["faces without box or points"] += 1
    return faces


def _five_points(numbers: Sequence[float]) -> Points | None:
    """68 triples x, y, visibility -> five points; None when one of the needed ones is missing."""
    points = []
    for group in FIVE_OF_68:
        if any(numbers[3 * i + 2] <= 0 for i in group):
            return None
        x = sum(numbers[3 * i] for i in group) / len(group)
        y = sum(numbers[3 * i + 1] for i in group) / len(group)
        points.append((x, y))
    return tuple(points)


def _picture(
    image: dict[str, Any], captions: Iterable[str], people: Iterable[Person], file: str
) -> Picture:
    width, height = (image.get(key) for key in ("width", "height"))
    if not (isinstance(width, int) and isinstance(height, int) and min(width, height) > 0):
        raise BadAnnotations(f"{file}: picture {image.get('id')} has the size {width} x {height}.")
    name = _entry(image, "file_name", str, Path(file))
    return Picture(name, width, height, tuple(captions), tuple(people))


def _read(path: Path, tables: Iterable[str]) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadAnnotations(f"Cannot read {path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise BadAnnotations(
            f"{path.name} is not JSON: {error}.", hint="Was the download complete?"
        ) from error
    for table in tables:
        entries = data.get(table) if isinstance(data, dict) else None
        if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
            raise BadAnnotations(
                f"{path.name} is no annotation file of COCO's format: it has no list {table!r}."
            )
    return data


def _entry(record: dict[str, Any], key: str, kind: Any, path: Path) -> Any:
    value = record.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise BadAnnotations(f"{path.name}: entry {record.get('id')} has {key} {value!r}.")
    return value


def _numbers(record: dict[str, Any], key: str, count: int, path: Path) -> list[float]:
    values = record.get(key)
    if isinstance(values, list) and len(values) == count:
        numbers = [float(v) for v in values if isinstance(v, int | float) and math.isfinite(v)]
        if len(numbers) == count:
            return numbers
    raise BadAnnotations(
        f"{path.name}: entry {record.get('id')} needs {count} numbers under {key}."
    )
