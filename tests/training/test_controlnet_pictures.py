"""What a ControlNet is trained on: drawn portraits, and the pictures of the data set of people."""

from __future__ import annotations

import random
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torch import Tensor

from difflora_core.errors import BadImage
from tests.training.coco_files import overrides, write_split
from tests.training.controlnet_world import world
from training.__main__ import open_run
from training.controlnet import people_stage, read_people
from training.controlnet.base_model import open_base
from training.controlnet.config import ControlnetConfig
from training.controlnet.drawn_people import DrawnPeople
from training.controlnet.people import Person, Picture, read_index
from training.controlnet.picture_files import faults, read_picture
from training.controlnet.read_people import ReadPeople, choose_square
from training.controlnet.repaint import PaintSettings, paint


def test_a_step_draws_the_same_for_every_variant(tmp_path: Path) -> None:
    config = world(tmp_path)
    base, settings = open_base(config), config.controlnet
    people = DrawnPeople.make(base, settings, 0)
    first, again, other = people.draw(3, 4, 0), people.draw(3, 4, 0), people.draw(4, 4, 0)
    assert torch.equal(first.latents, again.latents) and first.prompts == again.prompts
    assert not torch.equal(first.latents, other.latents)
    assert len(people) == 8 and first.masks.shape == (4, 3, 64, 64)


def test_painting_starts_where_it_is_told(tmp_path: Path) -> None:
    base = open_base(world(tmp_path))
    latents, prompts = torch.randn(2, 4, 16, 16), ["a photo of a person"] * 2
    barely = paint(base, None, prompts, latents, [1, 2], PaintSettings(20, 1.0, 60))
    fresh = paint(base, None, prompts, latents, [1, 2], PaintSettings(4, 1.0))
    other = paint(base, None, prompts, latents + 1, [1, 2], PaintSettings(4, 1.0))
    assert torch.equal(fresh, other), "from pure noise the latents do not matter"
    assert not torch.equal(fresh, barely)
    with pytest.raises(ValueError, match="no step below"):
        paint(base, None, prompts, latents, [1, 2], PaintSettings(4, 1.0, 60))


@pytest.mark.parametrize(("steps", "last"), [(2, 499), (7, 142), (20, 49), (64, 15)])
def test_settings_know_the_last_step_of_painting(tmp_path: Path, steps: int, last: int) -> None:
    base = open_base(world(tmp_path))
    latents = torch.randn(1, 4, 16, 16)
    for from_step in (last, last - 1):
        settings = PaintSettings(steps, 1.0, from_step)
        refused = pytest.raises(ValueError) if from_step < last else nullcontext()
        with refused:
            ControlnetConfig(paint_steps=steps, from_step=from_step)
        with refused:
            paint(base, None, ["a person"], latents, [1], settings)


def read(tmp_path: Path, *words: str) -> tuple[ReadPeople, Any]:
    """A data set of eight drawn pictures as the stage has built it, and the truth."""
    split = write_split(tmp_path / "train", 8, seed=0)
    names = overrides("train", split.files) + overrides("validation", split.files)
    config = world(tmp_path, "people.count=8", *names, *words)
    people_stage.run(config, open_run(config, "build-people-dataset"))
    index = read_index(people_stage.index_path(config, "train"))
    return ReadPeople.open(index, open_base(config), config.controlnet), split


def test_pictures_masks_and_faces_are_read_as_they_were_drawn(tmp_path: Path) -> None:
    people, split = read(tmp_path)
    for i, picture in enumerate(people.index.pictures):
        example = people.read(picture, None)
        drawn, order = split.drawn, _by_area(split.drawn.masks[i], split.drawn.present[i])
        assert (example.pixels / 255 - drawn.images[i]).abs().max() < 0.003
        assert example.prompt == split.prompts[i]
        masks = torch.nn.functional.adaptive_avg_pool2d(drawn.masks[i, order].float(), 64)
        assert (example.masks / 255 - masks).abs().mean() < 0.01
        wide = drawn.boxes[i, order, 2] - drawn.boxes[i, order, 0] >= 12.8
        known = example.boxes.isfinite().all(1)
        assert known.tolist() == wide.tolist()
        marks = drawn.landmarks[i, order][wide]
        assert (example.landmarks[known] - marks).abs().max() < 1e-2


def _by_area(masks: Tensor, present: Tensor) -> list[int]:
    areas = masks.sum((1, 2))[present]
    return torch.argsort(areas, descending=True, stable=True).tolist()


def test_batches_depend_on_step_and_seed_only(tmp_path: Path) -> None:
    people, _ = read(tmp_path)
    first, second = people.draw(0, 3, 5), people.draw(1, 3, 5)
    afresh = ReadPeople.open(people.index, people.base, people.settings)
    assert torch.equal(afresh.draw(1, 3, 5).latents, second.latents)
    assert torch.equal(afresh.draw(0, 3, 5).latents, first.latents)
    assert first.latents.shape == (3, 4, 16, 16) and first.masks.max() <= 1


@pytest.mark.parametrize(("width", "height"), [(300, 120), (120, 300)])
def test_squares_hold_the_largest_person(width: int, height: int) -> None:
    box = (0.8 * width - 10, 0.8 * height - 10, 0.8 * width + 10, 0.8 * height + 10)
    people = (Person(box, 400.0, None), Person((0, 0, 5, 5), 25.0, None))
    picture = Picture("a.png", width, height, ("a",), people)
    lefts = set()
    for seed in range(60):
        square = choose_square(picture, 64, random.Random(seed))
        assert square.side == 120 and square.scale == 64 / 120
        assert 0 <= square.left <= width - 120 and 0 <= square.top <= height - 120
        assert square.left <= 0.8 * width <= square.left + 120
        assert square.top <= 0.8 * height <= square.top + 120
        lefts.add((square.left, square.top))
    assert len(lefts) > 10
    middle = choose_square(picture, 64, None)
    assert middle == choose_square(picture, 64, None)


def test_a_wide_picture_is_cropped_with_all_that_belongs_to_it(tmp_path: Path) -> None:
    """A white patch stands for a person: mask, box and landmarks must lie where it is seen."""
    pixels = np.zeros((100, 220, 3), np.uint8)
    pixels[40:80, 150:200] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    patch, points = (150, 40, 200, 80), ((150, 40), (200, 40), (175, 60), (150, 80), (200, 80))
    corners = [150, 40, 200, 40, 200, 80, 150, 80]
    person = Person(patch, 2000.0, [corners], patch, points)
    picture = Picture("wide.png", 220, 100, ("a patch",), (person,))
    settings = ControlnetConfig(resolution=128, smallest_face=0.05)
    index = read_people.Index(tmp_path, (picture,))
    people = ReadPeople.open(index, open_base(world(tmp_path)), settings)
    example = people.read(picture, None)
    seen = (example.pixels.float().mean(0) > 127).nonzero()
    low, high = seen.amin(0).flip(0), seen.amax(0).flip(0) + 1
    assert (example.boxes[0, :2] - low).abs().max() <= 1
    assert (example.boxes[0, 2:] - high).abs().max() <= 1
    assert torch.equal(example.landmarks[0, 0], example.boxes[0, :2])
    small = (example.masks[0].float() > 127).nonzero()
    assert (small.amin(0).flip(0) * 2 - low).abs().max() <= 2


def test_faces_that_are_cut_off_are_not_compared(tmp_path: Path) -> None:
    face, points = (0.0, 10.0, 60.0, 70.0), ((10.0, 20.0),) * 5
    body = Person((150, 0, 220, 100), 7000.0, [[150, 0, 220, 0, 220, 100]], None, None)
    cut = Person((0, 0, 70, 100), 6000.0, [[0, 0, 70, 0, 70, 100]], face, points)
    picture = Picture("absent.png", 220, 100, ("a",), (body, cut))
    square = choose_square(picture, 128, None)
    assert square.left > 60
    boxes, _ = read_people._faces([body, cut], square, ControlnetConfig())
    assert not boxes.isfinite().any()


def test_pictures_of_another_size_and_broken_ones_are_explained(tmp_path: Path) -> None:
    people, _ = read(tmp_path)
    picture = people.index.pictures[0]
    with pytest.raises(BadImage, match="its annotation says 100x128"):
        people.read(_narrow(picture), None)
    (people.index.folder / picture.file).write_bytes(b"no picture")
    with pytest.raises(BadImage, match="Cannot read the picture"):
        people.read(picture, None)


def test_a_picture_is_turned_where_only_that_gives_the_annotated_size(tmp_path: Path) -> None:
    pixels = np.zeros((96, 128, 3), np.uint8)
    pixels[:, :64] = 255  # the left half: turned to the right, it is above
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif)
    for width, height, white in ((96, 128, np.s_[:60]), (128, 96, np.s_[:, :60])):
        picture = Picture("a.jpg", width, height, ("a",), ())
        assert faults(tmp_path, [picture]) == [None]
        assert np.asarray(read_picture(tmp_path, picture))[white].min() > 200
    fault = faults(tmp_path, [Picture("a.jpg", 96, 96, ("a",), ())])[0]
    assert "its annotation says 96x96" in str(fault)


def _narrow(picture: Picture) -> Picture:
    people = tuple(
        replace(p, mask=[[0, 0, 50, 0, 50, 50]], face=None, landmarks=None) for p in picture.people
    )
    return replace(picture, width=100, people=people)
