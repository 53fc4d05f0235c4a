"""Settings of the evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from difflora_core.predictor import MAX_CANDIDATES
from difflora_core.sampler import MAX_STEPS

from ..run_config import MAX_SEED, at_least, at_most

ROWS = (
    "base", "average_lora", "nearest_lora", "textual_inversion", "teacher", "predicted_paper",
    "predicted", "best_of_4", "refined",
)  # fmt: skip
"""Row names, in the order of the table."""


@dataclass(frozen=True)
class EvalConfig:
    """Who and what is evaluated, and how it is painted."""

    people: int = 25
    """Held-out people, drawn from the seed."""
    prompts: int = 30
    """Held-out prompts, drawn from the seed; every person is painted once with each."""
    seed: int = 0
    """Draws people, photos, prompts and painting noise; any seed is a fresh held-out set."""
    rows: tuple[str, ...] = ROWS
    """Rows of the table, from training/evaluation/rows.py."""
    json: str = ""
    """Where to write the figures; empty: results.json in the run folder."""
    references: int = 8
    """Drawn pictures per person that a painted face is compared with."""
    predictor: str = ""
    """Predictor file of the rows predicted, best_of_4, refined; empty: predictor.safetensors."""
    steps: int = 0
    """Sampling steps of the predictor; 0 = the number stored in its file."""
    candidates: int = 1
    """Candidates of the row predicted, of which the most central is taken."""
    inputs: Literal["both", "face", "image"] = "both"
    """Which embedding of the photo predictors see; the other one counts as absent."""
    strength: float = 0.0
    """Strength of predicted LoRAs; 0 = the calibrated value stored in the predictor's file."""
    paint_steps: int = 12
    """Sampling steps of a picture."""
    guidance: float = 3.0
    """Classifier-free guidance scale of a picture."""
    batch: int = 0
    """Pictures painted at a time; 0 = 256 on cuda, 8 on cpu."""
    refine_steps: int = 30
    """Optimiser steps from the predicted LoRA in the row refined."""
    inversion_steps: int = 300
    """Optimiser steps of the row textual_inversion."""
    fid_pictures: int = 2000
    """Freshly drawn portraits that stand for real pictures in fid."""
    sheet_people: int = 8
    """People on the picture sheet; 0 = no sheet."""

    def __post_init__(self) -> None:
        at_least(0, self, "seed", "steps", "batch", "sheet_people", "guidance", "strength")
        at_least(1, self, "refine_steps", "inversion_steps")
        at_least(1, self, "people", "prompts", "references", "candidates", "paint_steps")
        at_most(MAX_STEPS, self, "steps")
        at_most(MAX_SEED, self, "seed")
        at_most(MAX_CANDIDATES, self, "candidates")
        at_least(2, self, "fid_pictures")  # a cloud of one picture has no width
