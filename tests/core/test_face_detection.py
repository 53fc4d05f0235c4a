"""Two looks of a detector put together: close-ups from further away, the rest from near."""

from __future__ import annotations

import numpy as np
import pytest

from difflora_core.face_detection import Detections, detect, joined, shared


def detections(*boxes: tuple[float, ...]) -> Detections:
    """Boxes x0, y0, x1, y1, score; a box's points are all its first corner."""
    rows = np.float32(boxes).reshape(-1, 5)
    return rows, np.repeat(rows[:, None, :2], 5, 1)


SMALL, LARGE = (10, 10, 40, 50, 0.9), (50, 0, 150, 120, 0.8)


def test_each_face_is_taken_from_the_look_that_suits_its_size() -> None:
    near = detections(SMALL, (60, 10, 130, 100, 0.95))  # of the large face it sees a part
    far = detections((12, 12, 38, 47, 0.7), LARGE)
    boxes, points = joined(near, far, largest=60)
    assert np.allclose(boxes, [SMALL, LARGE])
    assert np.allclose(points[:, 0], [[10, 10], [50, 0]])


def test_what_only_the_near_look_sees_stays() -> None:
    near = detections(SMALL, LARGE)
    assert np.allclose(joined(near, detections(), largest=60)[0], [SMALL, LARGE])
    assert np.allclose(joined(near, detections(SMALL), largest=60)[0], [SMALL, LARGE])


def test_a_less_sure_box_around_a_face_is_no_face() -> None:
    far = detections(LARGE, (40, -10, 180, 150, 0.6))
    assert np.allclose(joined(detections(SMALL), far, largest=60)[0], [SMALL, LARGE])


@pytest.mark.parametrize(
    ("other", "share"),
    [((0, 0, 10, 10), 1.0), ((5, 0, 15, 10), 0.5), ((2, 2, 4, 4), 1.0), ((10, 10, 20, 20), 0.0)],
)
def test_shared_is_of_the_smaller_box(other: tuple[float, ...], share: float) -> None:
    boxes = np.float32([[0, 0, 10, 10]])
    assert shared(boxes, np.float32([other]))[0, 0] == pytest.approx(share)
    assert shared(boxes, np.zeros((0, 5), np.float32)).shape == (1, 0)


class Saturated:
    """Finds one square, whose box is never longer than 256 pixels of the detector's field."""

    def detect(self, bgr: np.ndarray, input_size: tuple[int, int]) -> Detections:
        y, x = ((bgr == 255).all(-1).any(axis) for axis in (1, 0))
        low = np.float32([np.flatnonzero(x)[0], np.flatnonzero(y)[0]])
        side = np.flatnonzero(x)[-1] + 1 - low[0]
        side = min(side, 256 * max(bgr.shape[:2]) / input_size[0])
        return detections((*low, *(low + side), 0.9))


@pytest.mark.parametrize("side", [128, 512, 1024])
def test_a_close_up_is_found_whole_in_pictures_of_any_size(side: int) -> None:
    picture = np.zeros((side, side, 3), np.uint8)
    picture[side // 4 : side * 7 // 8, side // 4 : side * 7 // 8] = 255
    (box,), _ = detect(Saturated(), picture)
    assert np.allclose(box[:4] / side, [0.25, 0.25, 0.875, 0.875], atol=0.01)
