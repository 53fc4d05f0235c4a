"""Reads identity factors off pictures: the truth about a drawn person, and no recogniser's view.

A recogniser that guides can be fooled by its own gradient, and another one partly with it. The
drawn world knows what makes a person, so painted pictures are also judged by that: by a ridge
regression on the features of networks that guidance never looks through.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from difflora_core.face_crop import align
from training.drawing import generator_for, people_scenes, render_in_parts
from training.evaluation.judges import Judges

RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
"""Tried on held-out portraits, in units of the mean squared input."""
HELD_OUT = 4
"""One portrait in so many chooses the ridge and measures what can be read."""
CLOSE = 128
"""Side of a face when it is looked at from close, in pixels: as large as a whole portrait."""


@dataclass(frozen=True)
class FactorReader:
    """Linear maps from features to identity factors, each factor weighted by how well it reads."""

    judges: Judges
    mean: Tensor
    deviation: Tensor
    weights: Tensor
    """[D, F]"""
    middle: Tensor
    """Mean of each factor, [F]."""
    trust: Tensor
    """R^2 of each factor on held-out portraits, at least 0: [F]."""

    @classmethod
    def fit(cls, judges: Judges, pictures: int, seed: int) -> FactorReader:
        """Fit on portraits of training people."""
        scenes, _ = people_scenes(pictures, generator_for(seed, 7), judges.device)
        drawn = render_in_parts(scenes)
        inputs, truth = _features(judges, drawn.images), drawn.identity[:, 0].double().cpu()
        held = torch.arange(pictures) % HELD_OUT == 0
        mean = inputs[~held].nanmean(0)
        deviation = (inputs[~held] - mean).square().nanmean(0).sqrt().clamp(min=1e-6)
        x, middle = _scaled(inputs, mean, deviation), truth[~held].mean(0)
        fits = [_ridge(x[~held], truth[~held] - middle, ridge) for ridge in RIDGES]
        spread = (truth[held] - middle).square().mean(0)
        scores = [1 - (truth[held] - middle - x[held] @ w).square().mean(0) / spread for w in fits]
        best = max(range(len(RIDGES)), key=lambda i: float(scores[i].mean()))
        return cls(judges, mean, deviation, fits[best], middle, scores[best].clamp(min=0))

    def read(self, pictures: Tensor) -> Tensor:
        """Pictures [N, 3, H, W] -> factors above the mean, [N, F]."""
        return _scaled(_features(self.judges, pictures), self.mean, self.deviation) @ self.weights

    def likeness(self, pictures: Tensor, identity: Tensor) -> Tensor:
        """Cosine of the factors read off pictures [P, Q, 3, H, W] and the true ones [P, F]: [P, Q].

        Factors count by how well they can be read.
        """
        people = pictures.shape[0]
        read = rearrange(self.read(pictures.flatten(0, 1)), "(p q) f -> p q f", p=people)
        true = identity.double().cpu()[:, None] - self.middle
        weight = self.trust.sqrt()
        return functional.cosine_similarity(read * weight, true * weight, dim=-1).float()


def _features(judges: Judges, pictures: Tensor) -> Tensor:
    """What the networks see in pictures and, from close, in the face of each: [N, D].

    Eyes, nose and mouth of a whole portrait are too small for them. NaN where no face is found.
    """
    landmarks, found = judges.find_faces(pictures)
    whole = judges.look_past_faces(pictures)
    close = judges.look_past_faces(align(pictures.cpu(), landmarks, CLOSE))
    face = torch.cat([close.attributes, close.self_supervised], -1)
    face = torch.where(found[:, None], face, float("nan"))
    return torch.cat([whole.attributes, whole.self_supervised, whole.clip, face], -1).double()


def _scaled(inputs: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """In standard deviations; what was not seen counts as average."""
    return ((inputs - mean) / deviation).nan_to_num()


def _ridge(inputs: Tensor, targets: Tensor, ridge: float) -> Tensor:
    """Weights [D, F] of a linear map without a constant: [N, D], [N, F]."""
    square = inputs.T @ inputs
    penalty = ridge * square.diagonal().mean() * torch.eye(len(square), dtype=square.dtype)
    return torch.linalg.solve(square + penalty, inputs.T @ targets)
