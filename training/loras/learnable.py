"""How much of a LoRA is the person: what a predictor of any kind can hope to learn from a set."""

from __future__ import annotations

import torch
from torch import Tensor

from ..portraits import identities

FOLDS = 5
RIDGE = 20.0
"""Of identity factors in units of their spread; about one per factor."""


def explained_by_identity(vectors: Tensor, seeds: Tensor) -> float | None:
    """Share of the variance of LoRAs kept back that ridge regression from identities explains.

    vectors [N, D], seeds [N] of the training range. 1: the LoRA follows from who the person is;
    0: no better than the average LoRA; None for fewer people than folds. What differs by chance
    (other scenes, timesteps or noise for each person) cannot be explained by anything.
    """
    count = len(vectors)
    if count < FOLDS:
        return None
    people, values = identities(seeds).double(), vectors.double()
    missed = spread = torch.zeros((), dtype=torch.float64)
    for fold in range(FOLDS):
        held = torch.arange(count) % FOLDS == fold
        average = values[~held].mean(0)
        guessed = average + _ridge(people[~held], values[~held] - average, people[held])
        missed = missed + (values[held] - guessed).square().sum()
        spread = spread + (values[held] - average).square().sum()
    return float(1 - missed / spread.clamp_min(1e-12))


def _ridge(inputs: Tensor, outputs: Tensor, asked: Tensor) -> Tensor:
    """[N, F], [N, D], [M, F] -> [M, D], through an N x N system since D is far larger."""
    mean, std = inputs.mean(0), inputs.std(0).clamp_min(1e-6)
    known, new = (inputs - mean) / std, (asked - mean) / std
    kernel = known @ known.T + RIDGE * torch.eye(len(known), dtype=known.dtype)
    return new @ known.T @ torch.linalg.solve(kernel, outputs)
