"""When to guide: sigmas against an independent schedule, and the warning for too few steps."""

from __future__ import annotations

import pytest
import torch

from difflora_core.errors import DiffLoRAError
from difflora_core.mask_aware.window import (
    WINDOWS,
    SigmaWindow,
    timestep_sigma,
    window_below,
    window_between,
    window_named,
    window_of_percent,
)

#: of a 20-step karras schedule for SD 1.5 (rho 7, 14.615 to 0.0292), and the final zero
KARRAS = [
    *(14.615 ** (1 / 7) + torch.linspace(0, 1, 20) * (0.0292 ** (1 / 7) - 14.615 ** (1 / 7)))
    .pow(7)
    .tolist(),
    0.0,
]


def test_sigma_of_a_timestep_is_that_of_stable_diffusion() -> None:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = (1 - betas).cumprod(0)
    for t in (0, 100, 500, 999):
        assert timestep_sigma(t) == pytest.approx(float(((1 - kept[t]) / kept[t]).sqrt()))
    assert timestep_sigma(100) == pytest.approx(0.344, abs=1e-3)
    assert timestep_sigma(100) < timestep_sigma(100.5) < timestep_sigma(101)
    assert timestep_sigma(2000) == timestep_sigma(999)


def test_steps_inside_count_what_is_sampled() -> None:
    assert window_below(100).steps_inside(KARRAS) == 6
    assert WINDOWS["paper"] == window_below(100)
    assert SigmaWindow(100.0).steps_inside(KARRAS) == 20
    assert SigmaWindow(100.0, 15.0).steps_inside(KARRAS) == 0


def test_few_steps_are_warned_of() -> None:
    uniform = [timestep_sigma(t) for t in range(999, 0, -50)] + [0.0]
    warning = window_named("paper").warning(uniform)
    assert "Only 2 of 20 steps" in warning and "0.344" in warning
    assert window_named("identity").warning(uniform) == ""


def test_percent_goes_through_the_model() -> None:
    assert window_of_percent(0.25, 0.75, lambda p: 8 * (1 - p)) == SigmaWindow(6.0, 2.0)
    with pytest.raises(DiffLoRAError, match="80% to 20%"):
        window_of_percent(0.8, 0.2, lambda p: 1 - p)


def test_timesteps_and_the_end_of_the_run() -> None:
    assert window_between(100, 0) == WINDOWS["paper"]
    window = window_between(400, 100)
    assert (window.high, window.low) == (timestep_sigma(400), timestep_sigma(100))
    for first, last in ((100, 400), (100, -1)):
        with pytest.raises(DiffLoRAError, match=f"from timestep {first} down to {last} is empty"):
            window_between(first, last)


def test_impossible_windows_are_refused() -> None:
    with pytest.raises(DiffLoRAError, match="empty"):
        SigmaWindow(1.0, 2.0)
    with pytest.raises(DiffLoRAError, match="identity, detail, paper"):
        window_named("early")  # pyright: ignore[reportArgumentType]


def test_edges_belong_to_the_window() -> None:
    window = SigmaWindow(5.0, 0.4)
    assert 5.0 in window and 0.4 in window and 5.01 not in window and 0.39 not in window
