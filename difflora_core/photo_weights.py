"""The user's say in how much each photo of a person counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from .encode import encode_photos
from .errors import BadConfig
from .face import Choice, FaceEncoder
from .features import Features, PhotoNote
from .image_encoder import ImageEncoder
from .photos import Pixels


def encode_weighted(
    photos: Sequence[Pixels],
    weights: Sequence[float],
    face_encoder: FaceEncoder | None,
    image_encoder: ImageEncoder | None,
    choice: Choice | str = "largest",
) -> Features:
    """As `encode_photos`, with the weights of quality times the user's, one per photo.

    Missing ones are 1. A photo with 0 is left out before anything is looked for in it: it need not
    show a face, has no say in which of the others shows somebody else, and gets a note only.
    Errors: those of `encode_photos`; BadConfig for negative or infinite numbers, more numbers than
    photos, or nothing left.
    """
    given = _given(weights, len(photos))
    kept = given.nonzero().flatten().tolist()
    if photos and not kept:
        raise BadConfig("All photos have the weight 0.", hint="Keep at least one photo.")
    features = encode_photos(
        [photos[k] for k in kept], face_encoder, image_encoder, choice, [k + 1 for k in kept]
    )
    shares = features.weights.double() * given[kept].double()  # no product is 0 or infinite there
    product = (shares / shares.sum()).to(features.weights) if weights else features.weights
    return dataclasses.replace(
        features, weights=product, photos=_notes(features.photos, product, len(photos))
    )


def _given(weights: Sequence[float], count: int) -> Tensor:
    """[P], filled up with ones. Errors: BadConfig."""
    given = torch.tensor([*weights, *[1.0] * (count - len(weights))])
    usable = bool((given.isfinite() & (given >= 0)).all())
    if len(weights) > count or not usable:
        raise BadConfig(
            f"{len(weights)} photo weights were given for {count} photos"
            + ("." if usable else ", one of them negative, too large or no number."),
            hint="Give one number from 0 upwards per photo, such as 1, 0.5.",
        )
    return given


def _notes(used: Sequence[PhotoNote], weights: Tensor, count: int) -> tuple[PhotoNote, ...]:
    """What became of each photo after all, those that were left out included."""
    pairs = zip(used, weights.tolist(), strict=True)
    found = {note.number: dataclasses.replace(note, weight=weight) for note, weight in pairs}
    nothing = {"detection": 0.0, "sharpness": 0.0, "agreement": 0.0, "weight": 0.0, "used": False}
    numbers = range(1, count + 1)
    return tuple(found[n] if n in found else PhotoNote(n, **nothing) for n in numbers)
