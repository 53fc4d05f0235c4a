"""Stage build-people-dataset: COCO's annotation files to two indices of pictures full of people.

One threshold on the share of a picture that its people cover makes both splits. It is given, or
found so that a wanted number of training pictures passes; the validation split then has what it
has. The paper's subset of MS COCO has 37,470 and 1,565 pictures, 58 % of those that show people.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from difflora_core.errors import BadConfig, DiffLoRAError
from training.artifacts import MissingArtifact, artifacts_folder
from training.config import Config
from training.run_folder import RunFolder

from .coco import Survey, survey
from .config import PeopleFiles
from .people import Index, Picture, read_index, write_index
from .picture_files import OtherSize, faults
from .segmentation import BadSegmentation, to_mask

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation")
#: why a picture is left out
UNREADABLE, OTHER_SIZE = "unreadable pictures", "pictures of another size"
#: thresholds of the table in the report
_SHOWN = tuple(round(0.05 * i, 2) for i in range(20))


@dataclass(frozen=True)
class Selection:
    """A threshold and what it does."""

    threshold: float
    """Least share of a picture that its people cover."""
    count: int
    """Pictures that pass."""


def run(config: Config, folder: RunFolder) -> None:
    """Write `people/train.jsonl` and `people/validation.jsonl` and a report of their sizes."""
    surveys = {name: _survey(_files(config, name), name) for name in SPLITS}
    coverages = {name: coverage(found.pictures) for name, found in surveys.items()}
    settings = config.people
    selection = choose(coverages["train"], settings.count, settings.threshold)
    kept = {
        name: select(found, selection.threshold, _files(config, name), name)
        for name, found in surveys.items()
    }
    # not before both are whole: a new split beside an old one would be of two thresholds
    report: dict[str, Any] = {"threshold": selection.threshold}
    for name, found in surveys.items():
        write_index(index_path(config, name), _files(config, name).pictures, kept[name])
        report[name] = summary(found, kept[name], coverages[name])
        logger.info("%s: %d of %d pictures kept", name, len(kept[name]), len(found.pictures))
    folder.write_text("report.json", json.dumps(report, indent=2) + "\n")


def select(found: Survey, threshold: float, files: PeopleFiles, name: str) -> list[Picture]:
    """The pictures of a split that pass and can be used; the others are counted in `found`.

    Errors: BadConfig, BadSegmentation, DiffLoRAError.
    """
    passed = [p for p in found.pictures if p.coverage >= threshold]
    if not passed:
        raise BadConfig(
            f"No {name} picture passes: people cover {threshold:.2f} of none of the "
            f"{len(found.pictures)}.",
            hint="Lower people.threshold, or raise people.count.",
        )
    check_masks(passed)
    check_files(passed, Path(files.pictures))
    return usable(passed, Path(files.pictures), found.left_out)


def index_path(config: Config, split: str) -> Path:
    """Where the index of a split is written."""
    return artifacts_folder(config) / "people" / f"{split}.jsonl"


def open_split(config: Config, split: str) -> Index:
    """Read a split that this stage wrote. Errors: MissingArtifact, BadIndex."""
    path = index_path(config, split)
    if not path.exists():
        raise MissingArtifact(
            f"There is no data set of people in {config.run.root} yet.",
            hint="Run `python -m training build-people-dataset --config ...` first.",
        )
    return read_index(path)


def coverage(pictures: Sequence[Picture]) -> np.ndarray:
    """Covered share of every picture, ascending."""
    return np.sort([picture.coverage for picture in pictures])


def choose(ascending: np.ndarray, count: int, threshold: float) -> Selection:
    """The given threshold, or with `count` > 0 the one that lets nearest to `count` pictures pass.

    Pictures of equal coverage pass together, so the number may be missed by their number.
    Errors: BadConfig when fewer pictures than that have people.
    """
    total = len(ascending)
    if not count:
        return Selection(threshold, passing(ascending, threshold))
    if count > total:
        raise BadConfig(
            f"people.count asks for {count} pictures, only {total} show people.",
            hint="Lower people.count, or set it to 0 and give people.threshold.",
        )
    value = ascending[total - count]
    above = ascending[ascending > value]
    candidates = [float(value), *([float(above[0])] if len(above) else [])]
    best = min(candidates, key=lambda limit: abs(passing(ascending, limit) - count))
    return Selection(best, passing(ascending, best))


def passing(ascending: np.ndarray, threshold: float) -> int:
    """How many pictures reach a threshold."""
    return int(len(ascending) - np.searchsorted(ascending, threshold, side="left"))


def check_masks(pictures: Sequence[Picture]) -> None:
    """Errors: BadSegmentation for the first mask that cannot be drawn, naming its picture."""
    for picture in pictures:
        for person in picture.people:
            try:
                to_mask(person.mask, picture.height, picture.width)
            except BadSegmentation as error:
                raise BadSegmentation(f"{picture.file}: {error.message}") from error


def check_files(pictures: Sequence[Picture], folder: Path) -> None:
    """Errors: DiffLoRAError when files are missing, with their number and the first three."""
    missing = [p.file for p in pictures if not (folder / p.file).is_file()]
    if missing:
        raise DiffLoRAError(
            f"{len(missing)} of {len(pictures)} pictures are not in {folder}: "
            f"{', '.join(missing[:3])}.",
            hint="Unpack COCO's pictures there, or correct people.*.pictures.",
        )


def usable(pictures: Sequence[Picture], folder: Path, left_out: Counter[str]) -> list[Picture]:
    """Those that can be read and have the annotated size; the others are counted by reason.

    Errors: DiffLoRAError when there is none.
    """
    found = faults(folder, pictures)
    broken = [fault for fault in found if fault]
    if len(broken) == len(pictures):
        raise DiffLoRAError(
            f"None of the {len(pictures)} pictures in {folder} can be used: {broken[0].message}",
            hint="Are these the pictures that the annotation file is about?",
        )
    left_out.update(OTHER_SIZE if isinstance(f, OtherSize) else UNREADABLE for f in broken)
    if broken:
        named = " ".join(fault.message for fault in broken[:3])
        logger.warning("%d pictures cannot be used and are left out: %s", len(broken), named)
    return [picture for picture, fault in zip(pictures, found, strict=True) if not fault]


def summary(found: Survey, kept: Sequence[Picture], ascending: np.ndarray) -> dict[str, Any]:
    """What the report says of a split."""
    people = [person for picture in kept for person in picture.people]
    return {
        "pictures_with_people": len(found.pictures),
        "pictures": len(kept),
        "share": len(kept) / max(len(found.pictures), 1),
        "people": len(people),
        "faces": sum(person.landmarks is not None for person in people),
        "left_out": dict(found.left_out),
        "pictures_by_threshold": {f"{limit:.2f}": passing(ascending, limit) for limit in _SHOWN},
    }


def _files(config: Config, name: str) -> PeopleFiles:
    return getattr(config.people, name)


def _survey(files: PeopleFiles, name: str) -> Survey:
    if not files.instances or not files.captions:
        raise BadConfig(
            f"people.{name}.instances and people.{name}.captions must name COCO's files.",
            hint="As in training/configs/sd15_controlnet.toml.",
        )
    faces = Path(files.wholebody) if files.wholebody else None
    found = survey(Path(files.instances), Path(files.captions), faces)
    if not found.pictures:
        raise DiffLoRAError(f"{Path(files.instances).name} has no captioned picture of people.")
    return found
