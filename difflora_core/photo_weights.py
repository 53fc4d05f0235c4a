"""The user's say in how much each photo of a person counts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

from .errors import BadConfig
from .features import Features


def reweighted(features: Features, weights: Sequence[float]) -> Features:
    """Multiply the weights that the photos' quality gives by the user's, one per photo.

    Missing ones are 1; a photo with 0 is left out. Errors: BadConfig for negative or infinite
    numbers, more numbers than photos, or nothing left.
    """
    if not weights:
        return features
    count = len(features.weights)
    usable = all(math.isfinite(weight) and weight >= 0 for weight in weights)
    if len(weights) > count or not usable:
        raise BadConfig(
            f"{len(weights)} photo weights were given for {count} photos"
            + ("." if usable else ", one of them negative or no number."),
            hint="Give one number from 0 upwards per photo, such as 1, 0.5.",
        )
    given = torch.tensor([*weights, *[1.0] * (count - len(weights))])
    product = features.weights * given
    if float(product.sum()) <= 0:
        raise BadConfig("All photos have the weight 0.", hint="Keep at least one photo.")
    product = product / product.sum()
    notes = tuple(
        dataclasses.replace(note, weight=float(weight), used=bool(weight > 0))
        for note, weight in zip(features.photos, product, strict=True)
    )
    return dataclasses.replace(features, weights=product, photos=notes)
