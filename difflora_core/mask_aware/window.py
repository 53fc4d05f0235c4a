"""When to guide: a range of noise levels, said as sigma, as a share of the run, or as a timestep.

Sigma is the ratio of noise to signal, x_t = x_0 + sigma * noise, as k-diffusion and ComfyUI count
it for models of Stable Diffusion. A flow model at time t has the ratio t / (1 - t).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from ..errors import DiffLoRAError

LEAST_STEPS = 3
"""Fewer guided steps than this hardly change a picture."""
PAPER_T = 100
"""The threshold T of "Improving Latent Diffusion with Perceptual Mask-aware Loss"."""
TIMESTEPS = 1000
BETA_START, BETA_END = 0.00085, 0.012

WindowName = Literal["identity", "detail", "paper"]


@dataclass(frozen=True)
class SigmaWindow:
    """Noise levels low <= sigma <= high in which steps are guided."""

    high: float
    """Sigma at which guidance starts; sampling runs from high to low."""
    low: float = 0.0
    """Sigma below which it ends."""

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high:
            raise DiffLoRAError(
                f"A guidance window from sigma {self.high:g} down to {self.low:g} is empty.",
                hint="It starts at the higher sigma and ends at the lower one.",
            )

    def __contains__(self, sigma: float) -> bool:
        return self.low <= sigma <= self.high

    def steps_inside(self, sigmas: Sequence[float]) -> int:
        """How many steps of a schedule are guided; its last entry, 0, is where the run ends."""
        return sum(sigma in self for sigma in list(sigmas)[:-1])

    def warning(self, sigmas: Sequence[float]) -> str:
        """A sentence where too few steps of the schedule would be guided, else empty."""
        inside, total = self.steps_inside(sigmas), len(sigmas) - 1
        if inside >= LEAST_STEPS:
            return ""
        return (
            f"Only {inside} of {total} steps lie in the guidance window "
            f"(sigma {self.high:.3g} to {self.low:.3g}), which hardly changes a picture: "
            "widen the window, take more steps, or choose a schedule with more of them there."
        )


def timestep_sigma(t: float) -> float:
    """Sigma of timestep t (0..999) on Stable Diffusion's schedule (scaled linear betas).

    Log-linear between timesteps, as k-diffusion interpolates. t = 100 has sigma 0.344.
    """
    place = min(max(t, 0.0), TIMESTEPS - 1.0)
    first = min(int(place), TIMESTEPS - 2)
    low, high = (math.log(_sigmas()[i]) for i in (first, first + 1))
    return math.exp(low + (place - first) * (high - low))


def window_below(t: float) -> SigmaWindow:
    """All steps at or below timestep t: "t < T" of the loss, said to a sampler."""
    return window_between(t, 0)


def window_between(first: float, last: float) -> SigmaWindow:
    """Timesteps from `first` down to `last`, both guided. Errors: DiffLoRAError when empty."""
    if not first >= last >= 0:
        raise DiffLoRAError(
            f"A guidance window from timestep {first:g} down to {last:g} is empty.",
            hint="It starts at the higher timestep and ends at the lower one, 0 at least.",
        )
    return SigmaWindow(timestep_sigma(first), timestep_sigma(last) if last else 0.0)


def window_of_percent(
    start: float, end: float, percent_to_sigma: Callable[[float], float]
) -> SigmaWindow:
    """From shares of the run, 0 (pure noise) to 1 (finished), by the model's own conversion.

    Errors: DiffLoRAError when start lies after end.
    """
    if not 0 <= start <= end <= 1:
        raise DiffLoRAError(
            f"Guidance cannot run from {start:.0%} to {end:.0%} of the steps.",
            hint="Start and end lie between 0 and 1, and start comes first.",
        )
    return SigmaWindow(percent_to_sigma(start), percent_to_sigma(end))


def window_named(name: WindowName) -> SigmaWindow:
    """A preset: what it changes is in its name. Errors: DiffLoRAError."""
    if name not in WINDOWS:
        raise DiffLoRAError(
            f"There is no guidance window {name!r}.", hint=f"Choose one of {', '.join(WINDOWS)}."
        )
    return WINDOWS[name]


def _sigmas() -> list[float]:
    """Of all timesteps: sqrt((1 - alpha_bar) / alpha_bar)."""
    roots = [BETA_START**0.5, BETA_END**0.5]
    kept, sigmas = 1.0, []
    for i in range(TIMESTEPS):
        root = roots[0] + (roots[1] - roots[0]) * i / (TIMESTEPS - 1)
        kept *= 1 - root * root
        sigmas.append(math.sqrt((1 - kept) / kept))
    return sigmas


WINDOWS: dict[str, SigmaWindow] = {
    "identity": SigmaWindow(10.0, 0.4),
    "detail": SigmaWindow(0.57),
    "paper": window_below(PAPER_T),
}
"""identity: who it is, from the first estimates that show a face to the last that the denoiser
still tidies up; detail: late steps, which mostly please the guiding network; paper: T."""
