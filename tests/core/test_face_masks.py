"""Masks of faces: area and place by geometry, and what mask-only guidance reads out of them."""

from __future__ import annotations

import math

import pytest
import torch

from difflora_core.mask_aware.face_masks import Shape, face_mask
from difflora_core.mask_aware.mask_areas import mask_parts

SIZE, BOX = (96, 128), (30.0, 20.0, 70.0, 80.0)


def test_a_box_is_white_inside_and_black_outside() -> None:
    mask = face_mask(SIZE, [BOX], "box")
    expected = torch.zeros(SIZE)
    expected[20:80, 30:70] = 1
    assert torch.equal(mask, expected)


def test_an_oval_has_the_area_of_an_ellipse() -> None:
    mask = face_mask(SIZE, [BOX], "oval")
    assert float(mask.sum()) == pytest.approx(math.pi * 20 * 30, rel=0.01)
    assert mask[50, 50] == 1 and mask[21, 31] == 0
    assert set(mask.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(("grow", "width"), [(0.25, 60), (0.0, 40), (-0.25, 20)])
def test_growing_moves_every_edge_by_a_share_of_the_face(grow: float, width: int) -> None:
    mask = face_mask(SIZE, [BOX], "box", grow)
    assert int(mask[50].sum()) == width


@pytest.mark.parametrize("shape", ["oval", "box"])
def test_feathering_is_soft_around_the_same_edge(shape: Shape) -> None:
    hard, soft = face_mask(SIZE, [BOX], shape), face_mask(SIZE, [BOX], shape, feather=0.4)
    assert torch.equal(soft > 0.5, hard > 0.5)
    row = soft[50, 50:]
    assert (row.diff() <= 0).all() and ((row > 0) & (row < 1)).sum() == 8  # 0.4 of half of 40
    assert row[0] == 1 and row[-1] == 0


def test_faces_join_without_adding_up() -> None:
    boxes = [BOX, (60.0, 30.0, 100.0, 70.0)]
    both = face_mask(SIZE, boxes, "box", feather=0.5)
    single = [face_mask(SIZE, [box], "box", feather=0.5) for box in boxes]
    assert torch.equal(both, torch.maximum(*single)) and both.max() <= 1


def test_a_face_beyond_the_border_is_cut_off() -> None:
    mask = face_mask(SIZE, [(-20.0, -20.0, 20.0, 20.0)], "box")
    assert int(mask.sum()) == 20 * 20 and mask[0, 0] == 1


def test_no_face_gives_an_empty_mask() -> None:
    assert not face_mask(SIZE, []).any()


@pytest.mark.parametrize("feather", [0.0, 0.5])
def test_guidance_reads_the_place_of_a_face_out_of_its_mask(feather: float) -> None:
    mask = face_mask((128, 128), [(40.0, 30.0, 80.0, 90.0)], "oval", feather=feather)
    (box,) = mask_parts(mask, 4).tolist()
    assert box == pytest.approx([40, 30, 80, 90], abs=1.5)
