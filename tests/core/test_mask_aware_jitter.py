"""Every gradient sees the face a little otherwise, so that no single view is fitted."""

from __future__ import annotations

import torch
from torch import Tensor

from difflora_core.mask_aware.crops import crop_boxes
from difflora_core.mask_aware.guidance import GuidanceSettings, Guide
from difflora_core.mask_aware.networks import FaceActivations
from difflora_core.mask_aware.steps import jittered
from tests.core.guidance_parts import (
    ALWAYS,
    FACE,
    TinyFaceNetwork,
    always,
    direction_like,
    face_at,
    guide_of,
    latents,
    references,
    tiny_decoder,
)

LEFT, RIGHT = face_at(16, 30), face_at(120, 100, 40)
JITTERED = GuidanceSettings(window=ALWAYS, margin=8)


class Watching(TinyFaceNetwork):
    """A face network that keeps what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[Tensor] = []

    def forward(self, crops: Tensor) -> FaceActivations:
        self.shown.append(crops.detach())
        return super().forward(crops)


def test_looks_differ_and_lie_inside_the_crop() -> None:
    x0 = latents()
    guide = guide_of(wanted=references(2), finder=always(LEFT, RIGHT))
    (plan,) = guide.plans(x0, direction_like(x0), 3.0, 1.0)
    assert len(plan.faces) == 2
    before = crop_boxes(plan.faces.landmarks)
    looks = [jittered(plan, 0.1, turn) for turn in range(20)]
    boxes = torch.stack([crop_boxes(look.faces.landmarks) for look in looks])
    assert (boxes[..., :2] >= before[:, :2] - 1e-3).all()
    assert (boxes[..., 2:] <= before[:, 2:] + 1e-3).all()
    sides = (boxes[..., 2:] - boxes[..., :2]) / (before[:, 2:] - before[:, :2])
    assert 0.9 <= sides.min() < 0.93 < 0.97 < sides.max()
    assert torch.equal(jittered(plan, 0.1, 3).faces.landmarks, looks[3].faces.landmarks)


def test_every_other_look_is_mirrored() -> None:
    x0, network = latents(), Watching()
    guide = Guide(tiny_decoder(), network, references(1), JITTERED, always(FACE))
    guide.guide(x0, direction_like(x0), 3.0, 1.0)
    first, second = network.shown[-2:]
    strip = torch.from_numpy(guide.strips[0]).permute(0, 3, 1, 2) / 255
    assert (first.clamp(0, 1) - strip).abs().max() < 0.01
    assert (second.flip(-1) - first).abs().mean() < (second - first).abs().mean()


def test_a_run_can_be_repeated_and_faces_keep_to_themselves() -> None:
    x0, wanted = latents(), references(1)
    alone, again = (
        guide_of(JITTERED, finder=always(LEFT)).guide(x0, direction_like(x0), 3.0, 1.0)
        for _ in range(2)
    )
    assert torch.equal(alone, again) and not torch.equal(alone, x0)
    guide = guide_of(JITTERED, wanted=wanted.repeat(2, 1), finder=always(LEFT, RIGHT))
    both = guide.guide(x0, direction_like(x0), 3.0, 1.0)
    assert guide.log[0].faces == 2
    torch.testing.assert_close(both[..., :12], alone[..., :12], atol=1e-5, rtol=0)
