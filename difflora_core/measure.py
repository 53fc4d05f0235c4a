"""How like a person pictures are: faces found, embedded by a judge, compared with photos."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from .errors import NoFaceFound
from .face import Face, FaceEncoder
from .likeness import Calibration, cosine
from .photos import Pixels
from .recogniser import Recogniser

ARCFACE = Calibration(
    centre=0.28, slope=18.0, same_mean=0.62, same_std=0.14, different_mean=0.02, different_std=0.07
)
"""Typical of ArcFace packs, whose usual thresholds for "the same person" lie at 0.25 to 0.3; used
where a recogniser brings no calibration of its own."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Likeness:
    """How like the person one picture is."""

    number: int
    """1 for the first picture."""
    cosine: float | None
    """-1..1, mean over the photos, of the face most like the person; None where no face was found.

    Not the cosine to the photos' mean direction: that is higher the more photos there are, while
    percentages are calibrated on pairs of pictures.
    """
    percent: float
    """0..100; 0 where no face was found."""


def measure(
    pictures: Sequence[Pixels],
    photos: Sequence[Pixels],
    encoder: FaceEncoder,
    judge: Recogniser | None = None,
    progress: Progress | None = None,
) -> list[Likeness]:
    """Compare pictures with photos of a person, both [H, W, 3] uint8.

    `judge` embeds instead of the encoder's own recogniser, which should not grade what it has
    conditioned. Errors: NoFaceFound if no photo shows a face.
    """
    known = [e for photo in photos for e in _largest(embeddings(photo, encoder, judge))]
    if not known:
        raise NoFaceFound(
            "No face was found in the photos to compare with.",
            hint="Connect the photos that the person was encoded from.",
        )
    person = torch.stack(known)
    calibration = (judge.config.calibration if judge else None) or ARCFACE
    found = []
    for number, picture in enumerate(pictures, start=1):
        scores = [float(cosine(e, person).mean()) for e in embeddings(picture, encoder, judge)]
        best = max(scores, default=None)
        percent = 0.0 if best is None else calibration.percent(best)
        found.append(Likeness(number, best, percent))
        if progress is not None:
            progress(number, len(pictures))
    return found


def best_first(found: Sequence[Likeness]) -> list[Likeness]:
    """Most like first; equal ones keep their order."""
    return sorted(found, key=lambda likeness: -likeness.percent)


def embeddings(picture: Pixels, encoder: FaceEncoder, judge: Recogniser | None) -> list[Tensor]:
    """Unit embeddings [D] of all faces of a picture, largest face first."""
    faces = sorted(encoder.faces(picture), key=lambda face: -face.area)
    return [_embed(picture, face, judge) for face in faces]


def _embed(picture: Pixels, face: Face, judge: Recogniser | None) -> Tensor:
    if judge is None:
        return torch.from_numpy(face.unit_embedding)
    image = rearrange(torch.from_numpy(np.ascontiguousarray(picture)), "h w c -> 1 c h w")
    device = next(judge.parameters()).device
    landmarks = torch.from_numpy(face.landmarks)[None].to(device)
    with torch.no_grad():
        return judge.embed(image.to(device).float() / 255, landmarks)[0].cpu()


def _largest(found: list[Tensor]) -> list[Tensor]:
    return found[:1]
