"""Settings of the evaluation of guidance."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from difflora_core.errors import BadConfig, DiffLoRAError
from difflora_core.mask_aware.window import WINDOWS, SigmaWindow, window_below
from training.run_config import MAX_SEED, at_least, at_most

Mode = Literal["guided", "full", "predicted"]


@dataclass(frozen=True)
class GuidanceConfig:
    """Stage evaluate-guidance; how pictures are painted and compared stands under [eval]."""

    people: int = 25
    """Held-out people, drawn from the seed; each gives one photo."""
    prompts: int = 4
    """Held-out prompts, drawn from the seed."""
    seed: int = 0
    """Draws people, photos, prompts and painting noise; any seed is a fresh held-out set."""
    windows: tuple[str, ...] = ("identity", "detail", "paper", "T=200", "T=400")
    """When to guide: identity, detail, paper, T=N for all timesteps up to N, or HIGH..LOW in
    sigma."""
    strengths: tuple[float, ...] = (1.5, 2.5)
    """How strongly; every window with every strength is a row."""
    modes: tuple[Mode, ...] = ("guided", "full", "predicted")
    """Kinds of rows: guided is the whole grid; full is the gradient through the denoiser, and
    predicted a predicted LoRA without and with guidance, both at the first window only."""
    iterations: int = 2
    """Gradients per sampling step; not of the rows full."""
    smoothing: float = 0.5
    """Share of a step that is smoothed over the face, 0..1; not of the rows full."""
    jitter: float = 0.1
    """Up to how much closer a gradient's crop of the face is; every other one is mirrored."""
    factor_pictures: int = 1500
    """Drawn portraits that the reader of identity factors is fitted on."""
    sheet_people: int = 6
    """People on the picture sheet; 0 = no sheet."""

    def __post_init__(self) -> None:
        at_least(0, self, "seed", "strengths", "sheet_people")
        at_most(MAX_SEED, self, "seed")
        at_least(1, self, "prompts", "iterations")
        at_least(2, self, "people")  # for an interval
        at_least(0, self, "smoothing", "jitter")
        at_most(1, self, "smoothing")
        at_most(0.5, self, "jitter")
        at_least(4, self, "factor_pictures")  # one chooses what is fitted on three


def read_window(text: str) -> SigmaWindow:
    """A preset's name, "T=200", or "5..0.4". Errors: BadConfig."""
    if text in WINDOWS:
        return WINDOWS[text]
    if match := re.fullmatch(r"T=(\d+)", text):
        return window_below(float(match[1]))
    high, dots, low = text.partition("..")
    try:
        return SigmaWindow(float(high), float(low) if dots else 0.0)
    except (ValueError, DiffLoRAError) as error:
        raise BadConfig(
            f"guidance.windows has {text!r}.",
            hint=f"A window is one of {', '.join(WINDOWS)}, T=200, or 5..0.4 in sigma.",
        ) from error
