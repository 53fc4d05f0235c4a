"""The log of guided runs, as text and as pictures."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

from difflora_core.mask_aware.guidance import GuideStep
from difflora_core.mask_aware.pictures import crop_strip, loss_curve
from difflora_core.mask_aware.run_log import GuidanceLog, GuidedRun, describe_runs

BLUE = (44, 92, 190)


def step(sigma: float, loss: float, faces: int = 1, note: str = "") -> GuideStep:
    return GuideStep(sigma, loss, 1 - loss, faces, note)


def run_of(losses: list[float], faces: int = 1, level: int = 0) -> GuidedRun:
    steps = [step(5.0 / (i + 1), loss, faces) for i, loss in enumerate(losses)]
    strips = [np.full((faces, 112, 112, 3), level + 10 * i, np.uint8) for i in range(len(losses))]
    return GuidedRun((14.6, 5.0, 2.5, 1.0, 0.0), "VAE", "", steps, strips, 1.5, 4.0)


def nobody() -> GuidedRun:
    lost = GuideStep(3.0, math.nan, math.nan, 0, "no face was found in picture 1")
    return GuidedRun((14.6, 3.0, 0.0), "fast", "Only 1 of 2 steps", [lost])


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"))


def lowest_blue(picture: Image.Image) -> list[int]:
    """Rows of the first and the last point of the first line."""
    blue = (pixels(picture) == BLUE).all(-1)
    columns = blue.any(0).nonzero()[0]
    return [int(blue[:, column].nonzero()[0].mean()) for column in (columns[0], columns[-1])]


def test_runs_of_one_job_stay_together() -> None:
    log = GuidanceLog()
    for job, losses in (("a", [1.0]), ("b", [0.9]), ("b", [0.8])):
        log.begin(job, run_of(losses))
    assert [run.steps[0].loss for run in log.runs] == [0.9, 0.8]


def test_report_states_what_happened() -> None:
    text = describe_runs([run_of([0.9, 0.7, 0.4])])
    assert "3 guided steps, from sigma 5.00 to 1.67; the run has 4 steps. Decoder: VAE." in text
    assert "Guidance took 1.5 s of 4.0 s." in text
    assert "0.10 before the first of them, 0.60 before the last" in text
    assert text.splitlines()[-1].split() == ["1.67", "0.600", "0.400", "1"]
    assert "Run 2" in describe_runs([run_of([0.9]), run_of([0.8])]) and "Run 2" not in text


def test_report_without_faces_and_without_runs() -> None:
    text = describe_runs([nobody()])
    assert text.startswith("Only 1 of 2 steps") and "No face was guided." in text
    assert text.endswith("0  no face was found in picture 1") and "nan" not in text
    assert "No sampler has run" in describe_runs([])
    assert "None of 2 steps was guided." in describe_runs([GuidedRun((14.6, 3.0, 0.0), "VAE")])


def test_the_curve_falls_with_the_loss() -> None:
    first, last = lowest_blue(loss_curve([run_of([1.0, 0.7, 0.2])]))
    assert last > first + 100
    first, last = lowest_blue(loss_curve([run_of([0.5, 0.5])]))
    assert abs(last - first) <= 1


@pytest.mark.parametrize("runs", [[], [nobody()], [GuidedRun((1.0, 0.0), "VAE")]])
def test_pictures_of_nothing_say_so(runs: list[GuidedRun]) -> None:
    for picture in (loss_curve(runs), crop_strip(runs)):
        assert (pixels(picture) < 100).any() and not (pixels(picture) == BLUE).all(-1).any()


def test_a_step_whose_loss_is_not_finite_is_left_out_of_the_curve() -> None:
    broken = run_of([1.0, math.nan, 0.5])
    assert np.array_equal(pixels(loss_curve([broken])).shape, pixels(loss_curve([])).shape)
    assert lowest_blue(loss_curve([broken]))


def test_the_strip_has_a_column_per_step_and_a_row_per_face() -> None:
    strip = pixels(crop_strip([run_of([1.0, 0.9, 0.8], faces=2, level=50)]))
    assert strip.shape == (20 + 2 * 114, 3 * 114, 3)
    for column, level in enumerate((50, 60, 70)):
        assert (strip[20:132, column * 114 : column * 114 + 112] == level).all()
    both = pixels(crop_strip([run_of([1.0]), run_of([1.0, 0.5], faces=3)]))
    assert both.shape == (20 + 114 + 20 + 3 * 114, 2 * 114, 3)


def test_a_long_run_is_thinned_out_but_keeps_its_ends() -> None:
    strip = pixels(crop_strip([run_of([1.0] * 20, faces=10)]))
    assert strip.shape == (20 + 8 * 114, 12 * 114, 3)
    assert strip[30, 5, 0] == 0 and strip[30, -10, 0] == 190
