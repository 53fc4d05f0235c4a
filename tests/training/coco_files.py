"""Annotation files of COCO's and COCO-WholeBody's format, made from drawn portraits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from training.controlnet.config import PeopleFiles
from training.controlnet.segmentation import to_runs
from training.evaluation.sheet import to_image
from training.portraits import Portraits, describe, render, sample_scenes

FIRST_PICTURE, FIRST_PERSON = 1000, 7


@dataclass(frozen=True)
class CocoSplit:
    """A split on disk, and the truth that it was written from."""

    files: PeopleFiles
    drawn: Portraits
    prompts: list[str]


def write_split(folder: Path, count: int, seed: int) -> CocoSplit:
    """`count` pictures of one to three people; every second mask is run lengths."""
    (folder / "pictures").mkdir(parents=True)
    scenes = sample_scenes(count, torch.Generator().manual_seed(seed), people="mixed")
    drawn, prompts = render(scenes), describe(scenes)
    images, people, faces, captions = [], [], [], []
    for i in range(count):
        name, number = f"{i:012d}.png", FIRST_PICTURE + i
        to_image(drawn.images[i]).save(folder / "pictures" / name)
        images.append({"id": number, "file_name": name, "width": 128, "height": 128})
        captions.append({"id": i, "image_id": number, "caption": f" {prompts[i]}\n"})
        for p in drawn.present[i].nonzero()[:, 0].tolist():
            people.append(_person(drawn, i, p, len(people)))
            faces.append(people[-1] | _face(drawn, i, p))
    categories = [{"id": 3, "name": "car"}, {"id": 1, "name": "person"}]
    tables: dict[str, Any] = {"images": images, "categories": categories}
    write(folder / "instances.json", tables | {"annotations": people})
    write(folder / "wholebody.json", tables | {"annotations": faces})
    write(folder / "captions.json", {"images": images, "annotations": captions})
    return CocoSplit(files_in(folder), drawn, prompts)


def files_in(folder: Path) -> PeopleFiles:
    names = ("instances.json", "captions.json", "wholebody.json", "pictures")
    return PeopleFiles(*(str(folder / name) for name in names))


def overrides(split: str, files: PeopleFiles) -> list[str]:
    """The files as words of the command line."""
    return [f"people.{split}.{key}={value}" for key, value in vars(files).items()]


def write(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data), encoding="utf-8")


def change(path: Path, table: str, entry: int, **values: Any) -> None:
    """Overwrite keys of one entry of an annotation file; None deletes a key."""
    data = json.loads(path.read_text(encoding="utf-8"))
    record = data[table][entry] | values
    data[table][entry] = {key: value for key, value in record.items() if value is not None}
    write(path, data)


def _person(drawn: Portraits, i: int, p: int, number: int) -> dict[str, Any]:
    mask = drawn.masks[i, p].numpy()
    rows, columns = mask.nonzero()
    x, y = int(columns.min()), int(rows.min())
    crowded = number % 2 == 1
    return {
        "id": FIRST_PERSON + number,
        "image_id": FIRST_PICTURE + i,
        "category_id": 1,
        "iscrowd": 0,
        "area": float(mask.sum()),
        "bbox": [x, y, int(columns.max()) + 1 - x, int(rows.max()) + 1 - y],
        "segmentation": to_runs(mask) if crowded else polygons(mask),
    }


def polygons(mask: np.ndarray) -> list[list[float]]:
    """Outlines of a mask in COCO's coordinates, by OpenCV on a finer grid."""
    fine = np.kron(mask.astype(np.uint8), np.ones((4, 4), np.uint8))
    outlines, _ = cv2.findContours(fine, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return [((c[:, 0] + 0.5) / 4).ravel().tolist() for c in outlines if len(c) > 2]


def _face(drawn: Portraits, i: int, p: int) -> dict[str, Any]:
    """68 points that have ours where 300-W has them: eyes, nose tip, mouth corners."""
    points = np.zeros((68, 3))
    points[:, 2] = 1.0
    eyes, ring = drawn.landmarks[i, p].numpy(), np.linspace(0, 2 * np.pi, 6, endpoint=False)
    circle = np.stack([2 * np.cos(ring), np.sin(ring)], 1)
    points[36:42, :2], points[42:48, :2] = eyes[0] + circle, eyes[1] + circle
    points[30, :2], points[48, :2], points[54, :2] = eyes[2], eyes[3], eyes[4]
    x0, y0, x1, y1 = drawn.boxes[i, p].tolist()
    return {
        "face_box": [x0, y0, x1 - x0, y1 - y0],
        "face_kpts": points.ravel().tolist(),
        "face_valid": True,
    }
