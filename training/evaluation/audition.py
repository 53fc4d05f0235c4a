"""Best of N: each candidate LoRA paints a few pictures, the most recognisable one is taken.

The judge is the recogniser that predictors are conditioned on, never the one that measures.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from difflora_core.lora import Lora
from training.base.painter import Painter
from training.base.side_path import spread_factors, stack_loras

from .judges import Judges
from .protocol import TRIGGER

PROMPTS = (f"a photo of {TRIGGER}, facing the camera", f"a photo of {TRIGGER}, smiling")
SEEDS = (11, 12)
"""Noise of the auditions; one picture per prompt and seed."""
STEPS, GUIDANCE = 10, 3.0


def choose_candidates(
    painter: Painter, judges: Judges, candidates: Sequence[Sequence[Lora]], faces: Tensor
) -> list[Lora]:
    """The best of each person's candidates; `faces` [P, D] are the photos' embeddings."""
    count = len(candidates[0])
    scores = audition(painter, judges, [lora for own in candidates for lora in own], faces)
    best = scores.unflatten(0, (len(candidates), count)).argmax(1).tolist()
    return [own[index] for own, index in zip(candidates, best, strict=True)]


def audition(painter: Painter, judges: Judges, loras: Sequence[Lora], faces: Tensor) -> Tensor:
    """Mean cosine of each LoRA's pictures to its person's photo, no face counting as 0 -> [N].

    Consecutive LoRAs belong to one person: N is a multiple of len(faces).
    """
    shots = [(prompt, seed) for prompt in PROMPTS for seed in SEEDS]
    prompts = [prompt for prompt, _ in shots] * len(loras)
    seeds = [seed for _, seed in shots] * len(loras)
    factors = spread_factors(stack_loras(loras, painter.device), len(shots))
    pictures = painter.paint(prompts, seeds, factors, STEPS, GUIDANCE)
    embeddings, found = judges.condition_faces(pictures)
    wanted = faces.repeat_interleave(len(prompts) // len(faces), 0)
    cosines = functional.cosine_similarity(embeddings, wanted, dim=-1)
    return torch.where(found, cosines, 0.0).unflatten(0, (len(loras), len(shots))).mean(1)
