"""From identity factors to lengths and colours: the measurements that the drawing code uses."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .canvas import palette, rotate, wide
from .factors import INDEX
from .scene import Scene

SKIN = (
    (0.98, 0.87, 0.78),
    (0.92, 0.74, 0.6),
    (0.78, 0.56, 0.4),
    (0.56, 0.37, 0.25),
    (0.42, 0.27, 0.19),
)
HAIR = (
    (0.09, 0.08, 0.09),
    (0.36, 0.21, 0.12),
    (0.68, 0.27, 0.1),
    (0.9, 0.74, 0.38),
    (0.78, 0.78, 0.8),
)
EYES = (  # near to each other: two eyes painted unlike still look like a pair
    (0.22, 0.15, 0.11),
    (0.37, 0.27, 0.17),
    (0.31, 0.41, 0.28),
    (0.28, 0.41, 0.56),
    (0.45, 0.51, 0.56),
)
NECK_Y = 30.0


@dataclass(frozen=True)
class Anatomy:
    """One person per picture, B people. Lengths are [B, 1, 1] in units of the head's own frame,
    whose origin lies between the eyes and the mouth; colours are [B, 3].
    """

    skin: Tensor
    hair: Tensor
    iris: Tensor
    width: Tensor  # half width of the face
    height: Tensor  # half height of the face
    jaw: Tensor  # 0 pointed .. 1 square
    hair_length: Tensor  # 0 cropped .. 1 far below the shoulders
    hair_volume: Tensor
    hairline: Tensor  # y where the forehead ends
    fringe: Tensor
    eye_x: Tensor  # half distance of the eyes
    eye_y: Tensor
    eye_size: Tensor
    eye_tilt: Tensor
    brow_y: Tensor  # above the eye
    brow_thickness: Tensor
    nose_length: Tensor
    nose_width: Tensor
    mouth_y: Tensor
    mouth_width: Tensor
    lips: Tensor
    beard: Tensor  # 0 shaven .. 1 full

    def rows(self, index: Tensor) -> Anatomy:
        return Anatomy(**{f.name: getattr(self, f.name)[index] for f in fields(self)})


def measure(identity: Tensor) -> Anatomy:
    """Measurements of people with factors [B, 20]."""

    def factor(name: str) -> Tensor:
        return wide(identity[:, INDEX[name]])

    height = 27.5 + 7.5 * factor("face_length")
    width = 20.5 + 6.5 * factor("face_width")
    eye_y = -2.0 + 0 * height
    nose_length = 8.0 + 5.5 * factor("nose_length")
    skin = palette(identity[:, INDEX["skin_tone"]], SKIN)
    warmth = (identity[:, INDEX["skin_warmth"], None] - 0.5) * torch.tensor(
        [0.07, 0.0, -0.09], device=identity.device
    )
    return Anatomy(
        skin=(skin + warmth).clamp(0, 1),
        hair=palette(identity[:, INDEX["hair_colour"]], HAIR),
        iris=palette(identity[:, INDEX["eye_colour"]], EYES),
        width=width,
        height=height,
        jaw=factor("jaw"),
        hair_length=factor("hair_length"),
        hair_volume=factor("hair_volume"),
        hairline=-height * (0.78 - 0.5 * factor("fringe")),
        fringe=factor("fringe"),
        eye_x=(8.6 + 3.4 * factor("eye_spacing")).minimum(0.47 * width),
        eye_y=eye_y,
        eye_size=0.95 + 0.45 * factor("eye_size"),
        eye_tilt=0.3 * (factor("eye_tilt") - 0.5),
        brow_y=6.6 + 2.8 * factor("brow_height"),
        brow_thickness=0.75 + 1.25 * factor("brow_thickness"),
        nose_length=nose_length,
        nose_width=2.8 + 2.9 * factor("nose_width"),
        mouth_y=(height * 0.56).maximum(eye_y + nose_length + 6.5),
        mouth_width=(7.2 + 4.0 * factor("mouth_width")).minimum(0.44 * width),
        lips=1.3 + 1.5 * factor("lip_fullness"),
        beard=((factor("beard") - 0.55) / 0.45).clamp(0, 1),
    )


@dataclass(frozen=True)
class Pose:
    """Where a head is: frame of the head and of the body in the picture, [B, 1, 1] each."""

    x: Tensor
    y: Tensor
    scale: Tensor
    tilt: Tensor
    yaw: Tensor

    @classmethod
    def of(cls, scene: Scene, person: int) -> Pose:
        place = scene.position[:, person] * 128
        return cls(
            wide(place[:, 0]),
            wide(place[:, 1]),
            wide(scene.scale[:, person]),
            wide(scene.tilt[:, person]),
            wide(scene.yaw[:, person]),
        )

    def rows(self, index: Tensor) -> Pose:
        return Pose(
            self.x[index], self.y[index], self.scale[index], self.tilt[index], self.yaw[index]
        )

    def body(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Picture coordinates -> the upright frame with its origin at the head's centre."""
        return (x - self.x) / self.scale, (y - self.y) / self.scale

    def head(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Picture coordinates -> the frame of the head, which tilts around the neck."""
        u, v = self.body(x, y)
        u, v = rotate(u, v - NECK_Y, self.tilt)
        return u, v + NECK_Y

    def to_picture(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Points of the head's frame -> picture coordinates, [B] each."""
        u, v = rotate(wide(u), wide(v) - NECK_Y, -self.tilt)
        x, y = u * self.scale + self.x, (v + NECK_Y) * self.scale + self.y
        return x[:, 0, 0], y[:, 0, 0]

    def turned(self, u: Tensor | float, depth: float = 1.0) -> Tensor:
        """Horizontal place of a feature at u once the head has turned; depth = how far in front."""
        return u * (1 - 0.16 * self.yaw.abs()) + 3.4 * depth * self.yaw
