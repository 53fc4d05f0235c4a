"""How much two faces are alike: cosine of embeddings, a percentage anybody can read, best of N.

The percentage is a logistic of the cosine, fitted on held-out people: it is the probability that
two pictures show the same person when, before looking, either was equally likely. The fit belongs
to one recogniser and is stored in the header of its file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Calibration:
    """From cosine to percent for one recogniser."""

    centre: float
    """Cosine at which same and different are equally probable (50 %)."""
    slope: float
    """Steepness: log-odds per unit of cosine."""
    same_mean: float
    """Mean cosine of two pictures of one held-out person."""
    same_std: float
    """Its standard deviation."""
    different_mean: float
    """Mean cosine of pictures of two people."""
    different_std: float
    """Its standard deviation."""

    def percent(self, cosine: float) -> float:
        """Likeness in percent, 0..100."""
        odds = max(-60.0, min(60.0, self.slope * (cosine - self.centre)))
        return 100.0 / (1.0 + math.exp(-odds))


def fit_calibration(same: Tensor, different: Tensor, steps: int = 100) -> Calibration:
    """Logistic regression of "same person" on the cosine, both classes weighted alike.

    Newton's method on two parameters, with a little ridge so that classes that do not overlap
    give a finite slope. Args: cosines, [N] and [M].
    """
    x = torch.cat([same, different]).double()
    label = torch.cat([torch.ones(len(same)), torch.zeros(len(different))]).double().to(x.device)
    weight = torch.where(label > 0, 0.5 / len(same), 0.5 / len(different))
    design = torch.stack([x, torch.ones_like(x)], -1)
    ridge = torch.diag(torch.tensor([1e-7, 1e-9], dtype=x.dtype, device=x.device))
    beta = torch.zeros(2, dtype=x.dtype, device=x.device)
    for _ in range(steps):
        p = torch.sigmoid(design @ beta)
        gradient = design.T @ (weight * (p - label)) + ridge @ beta
        curvature = (design * (weight * p * (1 - p))[:, None]).T @ design + ridge
        step = torch.linalg.solve(curvature, gradient)
        beta = beta - step * min(1.0, 5.0 / float(step.norm().clamp(min=1e-9)))
    slope, offset = beta.tolist()
    figures = [f(v) for v in (same, different) for f in (torch.mean, torch.std)]
    return Calibration(-offset / slope, slope, *(float(f) for f in figures))


def cosine(first: Tensor, second: Tensor) -> Tensor:
    """Cosine of embeddings [..., D]; raw or normalised."""
    return F.cosine_similarity(first.float(), second.float(), dim=-1)
