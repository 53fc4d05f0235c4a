"""Chooses the default strength of a predictor on people that no stage trains on.

Regression shrinks a LoRA towards the mean, so a predicted one is often best at a strength above 1.
The choice looks at the conditioning recogniser, never at the one that evaluation measures with.
"""

from __future__ import annotations

import dataclasses
import logging

import torch
from torch import Tensor

from difflora_core.predictor import Predictor

from ..base.painter import Painter
from ..base.side_path import Factors
from ..config import Config
from ..evaluation.judges import Judges
from ..evaluation.metrics import prompt_accuracy
from ..evaluation.protocol import draw_prompts, personal
from ..portraits import identities, parse_prompt
from .conditions import PhotoEncoders

logger = logging.getLogger(__name__)


def calibrate(config: Config, predictor: Predictor) -> dict[str, float]:
    """Set `predictor.config.sampling.strength`; returns what was measured.

    The highest similarity wins among the strengths whose prompt accuracy stays within
    `lost_accuracy` of the base model's, else the mildest is taken.
    """
    trial = _Trial(config, predictor)
    floor = trial.base_accuracy() - config.predictor.calibration.lost_accuracy
    scores = {s: trial.score(s) for s in config.predictor.calibration.strengths}
    good = [s for s, (_, accuracy) in scores.items() if accuracy >= floor]
    best = max(good or [min(scores)], key=lambda s: scores[s][0])
    for strength, (similarity, accuracy) in scores.items():
        logger.info("strength %g: similarity %.3f, prompts %.3f", strength, similarity, accuracy)
    sampling = dataclasses.replace(predictor.config.sampling, strength=best)
    predictor.config = dataclasses.replace(predictor.config, sampling=sampling)
    similarity, accuracy = scores[best]
    return {
        "strength": best,
        "calibration_similarity": similarity,
        "calibration_accuracy": accuracy,
        "calibration_base_accuracy": floor + config.predictor.calibration.lost_accuracy,
    }


class _Trial:
    """People, photos, prompts and noise: the same for every strength."""

    def __init__(self, config: Config, predictor: Predictor) -> None:
        self.settings, self.predictor = config.predictor.calibration, predictor
        self.painter, self.judges = Painter.open(config), Judges.open(config)
        people, first = self.settings.people, self.settings.first
        identity = identities(torch.arange(first, first + people))
        photos = PhotoEncoders(config).embed_people(identity, 1, first)
        self.faces, self.images = photos.face[:, 0], photos.image[:, 0]
        generator = torch.Generator().manual_seed(first)
        count = people * self.settings.prompts
        self.prompts = draw_prompts(count, first, generator, split="train")
        self.seeds = torch.randint(2**31, (count,), generator=generator).tolist()
        self.vectors = self._vectors()

    def base_accuracy(self) -> float:
        return self._accuracy(self.painter.paint(self.prompts, self.seeds))

    def score(self, strength: float) -> tuple[float, float]:
        """Similarity to the photo (0 where no face is found) and prompt accuracy."""
        prompts = [personal(prompt) for prompt in self.prompts]
        pictures = self.painter.paint(prompts, self.seeds, self._factors(strength))
        faces, found = self.judges.condition_faces(pictures)
        wanted = self.faces.repeat_interleave(self.settings.prompts, 0).to(faces.device)
        similarity = torch.cosine_similarity(faces, wanted) * found.to(faces.device)
        return similarity.mean().item(), self._accuracy(pictures)

    def _accuracy(self, pictures: Tensor) -> float:
        wanted = [parse_prompt(prompt) for prompt in self.prompts]
        logits = self.judges.attribute_logits(pictures)
        return prompt_accuracy(logits, wanted).nanmean().item()

    @torch.no_grad()
    def _vectors(self) -> Tensor:
        """Predicted vectors [people, D] at strength 1, with the sampling that `predict` uses."""
        predictor, present = self.predictor, torch.ones(len(self.faces), dtype=torch.bool)
        present = present.to(predictor.device)
        condition = predictor.condition(
            self.faces.to(predictor.device), self.images.to(predictor.device), present, present
        )
        generator = torch.Generator().manual_seed(self.settings.first)
        noise = torch.randn(len(present), *predictor.latent_shape, generator=generator)
        sampling = predictor.config.sampling
        return predictor.decode(
            predictor.sample_latents(noise.to(predictor.device), condition, sampling)
        )

    def _factors(self, strength: float) -> Factors:
        space, times = self.predictor.space, self.settings.prompts
        pairs = space.unpack_factors(self.vectors.repeat_interleave(times, 0))
        return {name: (down, up * space.scale * strength) for name, (down, up) in pairs.items()}
