"""Whose face guidance leads, where several are painted, some are lost, or only a mask tells."""

from __future__ import annotations

import pytest
import torch

from difflora_core.errors import NoFaceFound
from difflora_core.mask_aware.guidance import GuidanceSettings
from difflora_core.mask_aware.matching import whose_face
from difflora_core.mask_aware.tracking import FaceRows, Tracker
from tests.core.guidance_parts import (
    ALWAYS,
    FACE,
    Script,
    always,
    direction_like,
    face_at,
    guide_of,
    latents,
    references,
    seen,
    similarity,
    square_mask,
)


def test_each_picture_has_its_own_references() -> None:
    x0, wanted = latents(2), references(2)
    guide = guide_of(wanted=wanted[:, None])
    guided = x0
    for _ in range(10):
        guided = guide.guide(guided, direction_like(x0), 3.0, 1.0)
    rise = similarity(guided, wanted=wanted) - similarity(x0, wanted=wanted)
    assert rise[0, 0] > rise[0, 1] + 0.1 and rise[1, 1] > rise[1, 0] + 0.1


def test_faces_of_a_picture_go_to_the_references_they_resemble() -> None:
    left, right = face_at(16, 30), face_at(120, 100)
    x0 = latents()
    # the left face already leans towards the second reference, the right one to the first
    wanted = torch.cat([seen(x0, right), seen(x0, left)]) + 0.5 * references(2)
    wanted = torch.nn.functional.normalize(wanted, dim=-1)
    guide = guide_of(wanted=wanted, finder=always(left, right))
    guided = x0
    for _ in range(8):
        guided = guide.guide(guided, direction_like(x0), 3.0, 1.0)
    for face, own in ((left, 1), (right, 0)):
        rise = similarity(guided, face, wanted) - similarity(x0, face, wanted)
        assert float(rise[0, own]) > 0.03
    assert guide.log[-1].faces == 2
    # overlapping nothing, each face is changed as if it were alone
    alone = guide_of(wanted=wanted[1:], finder=always(left)).guide(x0, direction_like(x0), 3.0, 1.0)
    both = guide_of(wanted=wanted, finder=always(left, right)).guide(
        x0, direction_like(x0), 3.0, 1.0
    )
    assert torch.allclose(both[..., :12], alone[..., :12], atol=1e-5)


def test_pictures_of_a_batch_may_have_different_faces() -> None:
    finder = Script([[face_at(10, 10), face_at(100, 100)], [], [face_at(60, 60)]])
    x0, guide = latents(3), guide_of(wanted=references(2), finder=finder)
    changed = (guide.guide(x0, direction_like(x0), 3.0, 1.0) != x0).flatten(1).any(1)
    assert changed.tolist() == [True, False, True]
    assert guide.log[0].faces == 3 and "picture 2" in guide.log[0].note


def test_more_faces_than_references_leaves_the_small_ones() -> None:
    x0, guide = latents(), guide_of(finder=always(face_at(10, 10, 20), face_at(90, 90, 60)))
    changed = guide.guide(x0, direction_like(x0), 3.0, 1.0) != x0
    assert changed[:, :, 12:, 12:].any() and not changed[:, :, :10, :10].any()


def test_mask_alone_places_a_face_in_each_area() -> None:
    mask = torch.zeros(1, 96, 96)  # half the size of the picture
    mask[:, 10:40, 6:34] = 1
    mask[:, 50:90, 50:90] = 1
    guide = guide_of(wanted=references(2), finder=None, mask=mask)
    x0 = latents()
    changed = (guide.guide(x0, direction_like(x0), 3.0, 1.0) != x0)[0].any(0)
    assert guide.log[0].faces == 2
    assert changed[3:10, 2:8].any() and changed[13:22, 13:22].any()
    assert not changed[:2].any() and not changed[:, 9:12].any()


@pytest.mark.parametrize("policy, guided_after", [("hold", True), ("skip", False)])
def test_a_face_that_is_lost(policy: str, guided_after: bool) -> None:
    finder = Script([[FACE], []])
    guide = guide_of(GuidanceSettings(window=ALWAYS, when_lost=policy), finder=finder)  # type: ignore[arg-type]
    x0 = latents()
    for _ in range(3):
        assert not torch.equal(guide.guide(x0, direction_like(x0), 3.0, 1.0), x0)
    assert finder.calls == 1
    after = guide.guide(x0, direction_like(x0), 3.0, 1.0)
    assert finder.calls == 3  # near where it was, then everywhere
    assert torch.equal(after, x0) != guided_after
    assert "no face was found in picture 1" in guide.log[-1].note


def test_a_missing_face_can_stop_the_run_once_it_should_be_there() -> None:
    settings = GuidanceSettings(window=ALWAYS, when_lost="error")
    guide, x0 = guide_of(settings, finder=always()), latents()
    assert guide.guide(x0, None, 1.0, 8.0) is x0
    with pytest.raises(NoFaceFound, match=r"picture 1 .*sigma 1\.00"):
        guide.guide(x0, None, 1.0, 1.0)


def test_a_mask_stands_in_for_a_face_that_is_not_found() -> None:
    x0, guide = latents(), guide_of(finder=always(), mask=square_mask())
    assert not torch.equal(guide.guide(x0, direction_like(x0), 3.0, 1.0), x0)


def test_faces_outside_the_mask_do_not_count() -> None:
    x0, guide = latents(), guide_of(finder=always(face_at(140, 140)), mask=square_mask())
    changed = guide.guide(x0, direction_like(x0), 3.0, 1.0) != x0
    assert not changed[:, :, 14:].any()


@pytest.mark.parametrize("policy, faces", [("hold", 2), ("skip", 1)])
def test_one_of_two_faces_is_lost(policy: str, faces: int) -> None:
    left, right = face_at(10, 10), face_at(120, 120)
    settings = GuidanceSettings(window=ALWAYS, when_lost=policy)  # type: ignore[arg-type]
    guide = guide_of(settings, wanted=references(2), finder=Script([[left, right], [left]]))
    x0 = latents()
    for _ in range(3):
        guide.guide(x0, direction_like(x0), 3.0, 1.0)
        assert guide.log[-1].faces == 2 and not guide.log[-1].note
    changed = (guide.guide(x0, direction_like(x0), 3.0, 1.0) != x0)[..., 14:, 14:].any()
    assert guide.log[-1].faces == faces and bool(changed) == (policy == "hold")
    assert guide.log[-1].note == "1 of 2 faces were lost in picture 1"


def test_one_of_two_faces_that_is_lost_can_stop_the_run() -> None:
    settings = GuidanceSettings(window=ALWAYS, when_lost="error")
    finder = Script([[face_at(10, 10), face_at(120, 120)], [face_at(10, 10)]])
    guide, x0 = guide_of(settings, wanted=references(2), finder=finder), latents()
    for _ in range(3):
        guide.guide(x0, None, 1.0, 1.0)
    with pytest.raises(NoFaceFound, match=r"1 of 2 faces were lost in picture 1 .*sigma 1\.00"):
        guide.guide(x0, None, 1.0, 1.0)


def test_one_face_is_led_to_one_of_several_references_and_stays_with_it() -> None:
    asked: list[int] = []

    def likeness(faces: list[int]) -> torch.Tensor:
        asked.append(len(faces))
        return torch.rand(len(faces), 3, generator=torch.Generator().manual_seed(len(asked)))

    held: dict[int, torch.Tensor] = {}
    first = None
    for step in range(6):  # it wanders, and looks a little more like somebody else each time
        points = torch.from_numpy(face_at(60 + 6 * step, 70).landmarks)[None]
        chosen = whose_face(points, held, 3, likeness)
        first = chosen if first is None else first
        assert chosen == first and len(chosen) == 1
        held = {reference: points[face] for reference, face in chosen.items()}
    assert asked == [1]
    far = torch.from_numpy(face_at(0, 0).landmarks)[None]
    assert whose_face(far, held, 3, likeness) == first


def test_a_face_more_goes_to_a_reference_that_has_none() -> None:
    left, right, third = (torch.from_numpy(face_at(x, 20).landmarks) for x in (0.0, 60.0, 120.0))
    likeness = lambda faces: torch.zeros(len(faces), 3)  # noqa: E731
    held = {2: left, 0: right}
    found = whose_face(torch.stack([third, right + 3, left - 3]), held, 3, likeness)
    assert found == {2: 2, 0: 1, 1: 0}


def test_faces_swap_places_and_stay_who_they_are_where_they_were() -> None:
    left, right = (torch.from_numpy(face_at(x, 20).landmarks) for x in (0.0, 120.0))
    likeness = lambda faces: torch.tensor([[0.0, 1.0], [1.0, 0.0]])[faces]  # noqa: E731
    assert whose_face(torch.stack([left, right]), {}, 2, likeness) == {1: 0, 0: 1}
    assert whose_face(torch.stack([left, right]), {0: left, 1: right}, 2, likeness) == {0: 0, 1: 1}


def test_later_looks_decode_what_is_near_and_all_of_it_where_a_face_is_gone() -> None:
    seen: list[torch.Tensor | None] = []

    def decode(number: int, near: torch.Tensor | None) -> torch.Tensor:
        seen.append(near)
        return torch.zeros(3, 192, 192)

    here, there = face_at(20, 20, 40), face_at(120, 120, 40)
    tracker = Tracker(
        Script([[here], [here], [], [there]]), lambda p, k: references(len(k)), references(1)[None],
        None, "hold",
    )  # fmt: skip
    for step in (0, 3, 6):
        rows = tracker.locate(1, decode, step, 1.0)
    assert [near is None for near in seen] == [True, False, False, True]
    assert seen[1] is not None and torch.allclose(seen[1], torch.tensor([20.0, 20, 60, 60]), atol=1)
    assert torch.allclose(rows.landmarks[0], torch.from_numpy(there.landmarks))
    assert not tracker.note


def _two_areas() -> torch.Tensor:
    mask = torch.zeros(1, 192, 192)
    mask[:, 10:60, 10:60] = 1
    mask[:, 110:170, 110:170] = 1
    return mask


def _located(tracker: Tracker, sigmas: list[float]) -> list[FaceRows]:
    return [
        tracker.locate(1, lambda number, near: torch.zeros(3, 192, 192), step, sigma)
        for step, sigma in zip(range(0, 3 * len(sigmas), 3), sigmas, strict=True)
    ]


def test_places_of_the_mask_decide_nothing_about_who_is_who() -> None:
    """The first look finds nobody; at the second one the left face is like the second person."""
    left, right = face_at(15, 15, 40), face_at(120, 120, 40)
    alike = references(2).flip(0)
    tracker = Tracker(
        Script([[], [left, right]]), lambda p, k: alike[k[:, 0, 0].gt(90).long()],
        references(2)[None], _two_areas(), "hold",
    )  # fmt: skip
    first, second = _located(tracker, [8.0, 2.0])
    assert len(first) == 2  # the mask stands in
    whose = dict(zip(second.reference.tolist(), second.landmarks[:, 0, 0].gt(90), strict=True))
    assert (bool(whose[0]), bool(whose[1])) == (True, False)


def test_a_stand_in_that_nobody_takes_is_not_lost() -> None:
    tracker = Tracker(
        Script([[], [face_at(15, 15, 40)]]), lambda p, k: references(2)[: len(k)],
        references(2)[None], _two_areas(), "error",
    )  # fmt: skip
    _, second = _located(tracker, [8.0, 1.0])
    assert len(second) == 1 and not tracker.note


def test_a_mask_of_the_whole_picture_stands_in_for_nothing() -> None:
    x0, guide = latents(), guide_of(finder=always(), mask=torch.ones(1, 192, 192))
    assert torch.equal(guide.guide(x0, direction_like(x0), 3.0, 1.0), x0)


def test_references_without_an_area_are_told_of() -> None:
    tracker = Tracker(None, lambda p, k: p, references(2)[None], square_mask(), "hold")
    (rows,) = _located(tracker, [1.0])
    assert len(rows) == 1
    assert tracker.note == "no area in the mask of picture 1 for 1 of 2 faces"


def test_an_empty_mask_is_an_error_where_that_is_asked_for() -> None:
    tracker = Tracker(None, lambda p, k: p, references(1)[None], torch.zeros(1, 192, 192), "error")
    with pytest.raises(NoFaceFound, match="mask of picture 1 is empty"):
        _located(tracker, [1.0])


@pytest.mark.parametrize("sigma, calls", [(5.0, 6), (1.0, 3)])
def test_a_clear_picture_without_a_face_is_not_searched_at_every_step(
    sigma: float, calls: int
) -> None:
    finder = Script([[]])
    tracker = Tracker(finder, lambda p, k: p, references(1)[None], None, "hold")
    for step in range(1, 7):
        tracker.locate(1, lambda number, near: torch.zeros(3, 64, 64), step, sigma)
    assert finder.calls == calls  # at once, then every third step


@pytest.mark.parametrize(
    "area", [(60, 112, 132, 140), (60, 60, 132, 85), (60, 60, 90, 132)], ids=str
)
def test_a_mask_of_a_part_of_a_face_means_that_face(area: tuple[int, int, int, int]) -> None:
    """Its mouth, its hair, a side of it; the middle of its box is outside."""
    face, mask = face_at(60, 60, 72), torch.zeros(1, 192, 192)
    mask[:, area[1] : area[3], area[0] : area[2]] = 1
    tracker = Tracker(always(face), lambda p, k: references(1), references(1)[None], mask, "error")
    (rows,) = _located(tracker, [1.0])
    assert torch.equal(rows.landmarks[0], torch.from_numpy(face.landmarks))


def test_a_face_in_the_mask_goes_before_one_at_its_edge() -> None:
    inside, edge = face_at(20, 20, 40), face_at(70, 10, 90)
    mask = torch.zeros(1, 192, 192)
    mask[:, :, :90] = 1
    tracker = Tracker(
        always(inside, edge), lambda p, k: references(2)[: len(k)], references(1)[None], mask,
        "error",
    )  # fmt: skip
    (rows,) = _located(tracker, [1.0])
    assert torch.equal(rows.landmarks[0], torch.from_numpy(inside.landmarks))


def test_a_face_that_hardly_touches_the_mask_is_another() -> None:
    mask = torch.zeros(1, 192, 192)
    mask[:, :, :24] = 1
    tracker = Tracker(
        always(face_at(20, 20, 80)), lambda p, k: references(1), references(1)[None], mask, "error"
    )
    with pytest.raises(NoFaceFound):
        _located(tracker, [1.0])
