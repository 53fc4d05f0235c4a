"""Telling the areas of a mask apart: order, soft edges, narrow gaps, noise."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from difflora_core.mask_aware.mask_areas import areas, mask_parts


def test_separate_areas_of_a_mask_come_from_left_to_right() -> None:
    mask = torch.zeros(192, 256)
    mask[40:100, 150:210] = 0.3
    mask[60:140, 20:90] = 1
    mask[5:8, 240:243] = 1
    wanted = [[20, 60, 90, 140], [150, 40, 210, 100]]
    assert mask_parts(mask, 2).tolist() == wanted
    assert mask_parts(mask, 9).tolist() == [*wanted, [240, 5, 243, 8]]
    assert mask_parts(mask, 1).tolist() == wanted[:1]
    assert mask_parts(torch.zeros(64, 64), 3).shape == (0, 4)


def test_areas_with_soft_edges_that_touch_are_two() -> None:
    y, x = torch.meshgrid(torch.arange(512.0), torch.arange(512.0), indexing="ij")
    distances = [((x - cx) / 40).square() + ((y - 200) / 50).square() for cx in (150.0, 245.0)]
    soft = torch.stack([(1.5 - d.sqrt()).clamp(0, 1) for d in distances]).amax(0)
    assert (soft[200, 150:245] > 0).all()  # the edges meet
    (left, right) = mask_parts(soft, 2).tolist()
    assert left[2] < right[0]
    assert left == [110, 150, 191, 251] and right == [205, 150, 286, 251]


def test_a_gap_of_a_few_pixels_is_a_gap() -> None:
    for side, gap in ((512, 1), (1024, 4)):
        mask = torch.zeros(side, side)
        mask[100:200, 101:201] = 1
        mask[100:200, 201 + gap : 300] = 1
        assert len(mask_parts(mask, 5)) == 2


def test_large_masks_are_reduced_and_boxes_stay_in_the_picture() -> None:
    mask = torch.zeros(1500, 2000)
    mask[1300:, 1801:] = 1
    (box,) = mask_parts(mask, 3)
    assert torch.allclose(box, torch.tensor([1801.0, 1300, 2000, 1500]), atol=4)
    assert box[2] <= 2000 and box[3] <= 1500


def test_areas_agree_with_a_flood_over_pixels() -> None:
    for seed in range(20):
        grid = torch.rand(17, 23, generator=torch.Generator().manual_seed(seed)) < 0.55
        expected = _flooded(grid)
        found = torch.zeros(17, 23, dtype=torch.int64)
        for number, area in enumerate(areas(np.asarray(grid)), start=1):
            for row, start, stop in area:
                found[row, start:stop] = number
        pairs = set(zip(expected.flatten().tolist(), found.flatten().tolist(), strict=True))
        assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


def _flooded(grid: torch.Tensor) -> torch.Tensor:
    """Every pixel's area as the largest number in it, by spreading numbers to neighbours."""
    numbers = torch.arange(1.0, grid.numel() + 1).view_as(grid) * grid
    while True:
        padded = F.pad(numbers, (1, 1, 1, 1))
        near = [padded[1:-1, :-2], padded[1:-1, 2:], padded[:-2, 1:-1], padded[2:, 1:-1], numbers]
        spread = torch.stack(near).amax(0) * grid
        if torch.equal(spread, numbers):
            return numbers.long()
        numbers = spread
