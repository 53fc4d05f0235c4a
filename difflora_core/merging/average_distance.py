"""How far a merge is from the exact average, for methods that only sound like it."""

from __future__ import annotations

from collections.abc import Mapping

from ..lora import LoraLayer
from .certificate import lost_squared
from .job import Job


def distance_to_average(job: Job, layers: Mapping[str, LoraLayer]) -> float:
    """|result - average| / |average| over all layers together, at the weights of the job.

    Reads the inputs a second time. Infinite where the average is zero and the result is not.
    """
    lost = energy = 0.0
    for batch in job.batches():
        ups, downs = batch.weighted_sums(batch.weights)
        for name, up, down in zip(
            batch.names, ups.double().cpu(), downs.double().cpu(), strict=True
        ):
            squared = ((up.mT @ up) * (down @ down.mT)).sum().clamp_min(0)
            result = layers[name]
            written = result.up.double().flatten(1) * result.scale
            parts = (written, result.down.double().flatten(1))
            lost += float(lost_squared(up, down, *parts, squared.sqrt()))
            energy += float(squared)
    if not energy:
        return float("inf") if lost else 0.0
    return (lost / energy) ** 0.5
