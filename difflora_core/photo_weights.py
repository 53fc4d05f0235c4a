"""The user's say in how much each photo of a person counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import BadConfig
from .features import Features, PhotoNote, fuse


def reweighted(features: Features, weights: Sequence[float]) -> Features:
    """Multiply the weights that the photos' quality gives by the user's, one per photo.

    Missing ones are 1. A photo with 0 is left out, and has no say in which of the others shows
    somebody else. Errors: BadConfig for negative or infinite numbers, more numbers than photos, or
    nothing left.
    """
    if not weights:
        return features
    given = _given(weights, len(features.weights))
    kept = given.nonzero().flatten()
    if not len(kept):
        raise BadConfig("All photos have the weight 0.", hint="Keep at least one photo.")
    judged = _fused_anew(features, kept)
    shares = judged.weights.double() * given[kept].double()  # no product is 0 or infinite there
    product = torch.zeros_like(features.weights)
    product[kept] = (shares / shares.sum()).to(product.dtype)
    anew = dict(zip(kept.tolist(), judged.photos, strict=True))
    notes = tuple(
        _note(before, anew.get(k), float(product[k])) for k, before in enumerate(features.photos)
    )
    return dataclasses.replace(features, weights=product, photos=notes)


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


def _fused_anew(features: Features, kept: Tensor) -> Features:
    """As if there had been no photos but those that are kept."""
    face, image = (rows if rows is None else rows[kept] for rows in (features.face, features.image))
    notes = [features.photos[k] for k in kept.tolist()]
    detection = torch.tensor([note.detection for note in notes])
    return fuse(face, image, detection, torch.tensor([note.sharpness for note in notes]))


def _note(before: PhotoNote, anew: PhotoNote | None, weight: float) -> PhotoNote:
    """What became of a photo after all; `anew` is None for one that is left out."""
    if anew is None:
        return dataclasses.replace(before, weight=0.0, used=False, note="")
    return dataclasses.replace(
        anew, number=before.number, weight=weight, faces=before.faces, face=before.face
    )
