"""From painted pictures to figures: judges look, metrics.py computes, summary.py adds intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .judges import Judges, Looks
from .metrics import (
    asked_log_probabilities,
    diversity,
    frechet_distance,
    prompt_accuracy,
    reference_similarity,
    text_similarity,
)
from .preference import Preference, fit_preference
from .protocol import Trial
from .summary import Figure, summarise, summarise_statistic

PREFERENCE_PICTURES = 512
"""Drawn portraits that the preference score is fitted on."""
FID_RESAMPLES = 40
"""Bootstrap resamples of a Fréchet distance: each costs two matrix roots."""


@dataclass(frozen=True)
class Measured:
    """One row's figures, and the measures of every picture for comparisons between rows."""

    figures: dict[str, Figure]
    values: dict[str, Tensor]
    """Measure -> [P, Q]."""


@dataclass(frozen=True)
class Yardstick:
    """What pictures are measured against; made once for all rows."""

    judges: Judges
    trial: Trial
    references: Looks
    """Of the P * R reference pictures."""
    texts: Tensor
    """Embeddings of the prompts [Q, D], about "a person"."""
    real: Tensor
    """Pooled attribute features of freshly drawn portraits [M, W]."""
    preference: Preference
    seed: int

    @classmethod
    def make(cls, judges: Judges, trial: Trial, seed: int) -> Yardstick:
        """Look at the references and real pictures, and fit the preference score."""

        def facts(
            pictures: Tensor, prompts: Sequence[str], wanted: Sequence[Mapping[str, int]]
        ) -> Tensor:
            looks = judges.look_past_faces(pictures)
            return preference_inputs(looks, judges.texts(prompts), wanted)

        return cls(
            judges,
            trial,
            judges.look(trial.references.flatten(0, 1), trial.landmarks.flatten(0, 1)),
            judges.texts(trial.prompts),
            pooled(judges.look_past_faces(trial.real).attributes),
            fit_preference(facts, PREFERENCE_PICTURES, seed, judges.device),
            seed,
        )


def measure(yardstick: Yardstick, pictures: Tensor) -> Measured:
    """All figures of one row's pictures [P, Q, 3, H, W]."""
    people, count = pictures.shape[:2]
    looks = yardstick.judges.look(pictures.flatten(0, 1))
    values = per_picture(yardstick, looks, people, count)
    seed = yardstick.seed
    figures = {name: summarise(value, seed) for name, value in values.items()}
    attributes = looks.attributes.unflatten(0, (people, count))
    figures["diversity"] = summarise(diversity(attributes), seed)
    figures["fid"] = summarise_statistic(
        lambda rows: frechet_distance(rows.flatten(0, 1), yardstick.real),
        pooled(attributes),
        FID_RESAMPLES,
        seed,
    )
    return Measured(figures, values)


def pooled(features: Tensor) -> Tensor:
    """The first third of an attribute network's features: channel means, as FID takes them."""
    return features[..., : features.shape[-1] // 3]


def per_picture(yardstick: Yardstick, looks: Looks, people: int, count: int) -> dict[str, Tensor]:
    """The measures that every picture has, each [P, Q]."""
    references = yardstick.references

    def similarity(name: str, found: Tensor) -> Tensor:
        own = getattr(looks, name).unflatten(0, (people, count))
        return reference_similarity(
            own, getattr(references, name).unflatten(0, (people, -1)), found
        )

    found = looks.found.unflatten(0, (people, count))
    everywhere = torch.ones_like(found)
    texts = yardstick.texts.repeat(people, 1)
    wanted = list(yardstick.trial.wanted) * people
    flat = {
        "clip_t": text_similarity(looks.clip, texts),
        "preference": yardstick.preference(preference_inputs(looks, texts, wanted)),
        "prompt_accuracy": prompt_accuracy(looks.logits, wanted),
    }
    return {
        "face_sim": similarity("face", found),
        "dino": similarity("self_supervised", everywhere),
        "clip_i": similarity("clip", everywhere),
        **{name: value.unflatten(0, (people, count)) for name, value in flat.items()},
    }


def preference_inputs(looks: Looks, texts: Tensor, wanted: Sequence[Mapping[str, int]]) -> Tensor:
    """Mean and least log-probability of what is asked for, and CLIP-T: [N, 3]."""
    mean, least = asked_log_probabilities(looks.logits, wanted)
    return torch.stack([mean, least, text_similarity(looks.clip, texts)], -1)
