"""Likeness in percent and best of N."""

from __future__ import annotations

import math

import pytest
import torch

from difflora_core.likeness import fit_calibration


def test_two_normal_distributions_give_the_known_logistic() -> None:
    """Equal variance s^2 and means m1, m0: log-odds are (m1 - m0) / s^2 * (x - (m1 + m0) / 2)."""
    generator = torch.Generator().manual_seed(0)
    same = 0.6 + 0.1 * torch.randn(40000, generator=generator)
    different = 0.2 + 0.1 * torch.randn(60000, generator=generator)
    fit = fit_calibration(same, different)
    assert fit.centre == pytest.approx(0.4, abs=0.01)
    assert fit.slope == pytest.approx(40, rel=0.05)
    assert fit.same_mean == pytest.approx(0.6, abs=0.01)
    assert fit.percent(0.4) == pytest.approx(50, abs=3)
    assert fit.percent(0.5) == pytest.approx(100 / (1 + math.exp(-4)), abs=2)


def test_percent_rises_from_0_to_100() -> None:
    fit = fit_calibration(torch.tensor([0.8, 0.9]), torch.tensor([0.0, 0.1]))
    values = [fit.percent(c / 10) for c in range(-10, 11)]
    assert values == sorted(values)
    assert values[0] < 1 and values[-1] > 99 and math.isfinite(fit.slope)
