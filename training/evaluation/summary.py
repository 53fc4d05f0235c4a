"""Mean and confidence interval: bootstrap over people, because a person's pictures are kin."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

import torch
from torch import Tensor

RESAMPLES = 2000
"""Bootstrap resamples."""


class Figure(TypedDict):
    """One cell of the table."""

    mean: float
    ci95: list[float]
    n: int


def summarise(values: Tensor, seed: int = 0) -> Figure:
    """Mean of [P] or [P, Q] values with the percentile bootstrap over people (Efron, 1979)."""
    people = values.double().reshape(values.shape[0], -1).mean(1)
    means = people[_resamples(len(people), RESAMPLES, seed)].mean(1)
    return _figure(float(people.mean()), means, values.numel())


def summarise_ratio(above: Tensor, below: Tensor, seed: int = 0) -> Figure:
    """Ratio of two means over the same people ([P] or [P, Q] each), resampled together."""
    a, b = (v.double().reshape(v.shape[0], -1).mean(1) for v in (above, below))
    index = _resamples(len(a), RESAMPLES, seed)
    ratios = a[index].mean(1) / b[index].mean(1)
    return _figure(float(a.mean() / b.mean()), ratios, above.numel())


def summarise_difference(one: Tensor, other: Tensor, seed: int = 0) -> Figure:
    """Mean of `one` above that of `other`, over the same people ([P, Q] each, person by person)."""
    return summarise(one.double().mean(1) - other.double().mean(1), seed)


def summarise_statistic(
    statistic: Callable[[Tensor], float], values: Tensor, resamples: int, seed: int = 0
) -> Figure:
    """A statistic of all pictures [P, Q, D] (as FID), resampled over people.

    Resampling repeats people, which biases a distance between clouds upwards; the interval is
    therefore shifted to have the statistic itself as its mean.
    """
    whole = statistic(values)
    index = _resamples(values.shape[0], resamples, seed)
    drawn = torch.tensor([statistic(values[people]) for people in index], dtype=torch.float64)
    return _figure(whole, drawn - drawn.mean() + whole, values.shape[0] * values.shape[1])


def _resamples(people: int, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(people, (count, people), generator=generator)


def _figure(mean: float, resampled: Tensor, n: int) -> Figure:
    low, high = torch.quantile(resampled.double(), torch.tensor([0.025, 0.975]).double()).tolist()
    return {"mean": mean, "ci95": [low, high], "n": n}
