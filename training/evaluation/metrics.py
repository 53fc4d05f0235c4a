"""Measures as pure functions of features; what a feature is, measures.py decides.

Letters: N pictures, P people, Q prompts, R references of a person, D feature width.
Cosines are raw (never rescaled to 0..1), so they can be compared with other work's raw cosines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

LOWEST_LOG_PROBABILITY = -9.2
"""log(1e-4): one surely wrong attribute must not outweigh all others."""


def reference_similarity(features: Tensor, references: Tensor, found: Tensor) -> Tensor:
    """Mean cosine of each picture to its person's references; 0 where nothing was found.

    features [P, Q, D], references [P, R, D], found [P, Q] bool -> [P, Q].
    The pairwise mean of DreamBooth's DINO and CLIP-I (Ruiz et al., 2023, section 4.2).
    """
    cosines = torch.einsum("pqd,prd->pqr", _unit(features), _unit(references))
    return torch.where(found, cosines.mean(-1), 0.0)


def text_similarity(pictures: Tensor, texts: Tensor) -> Tensor:
    """CLIP-T: cosine of each picture [..., D] and its prompt [..., D] -> [...]."""
    return (_unit(pictures) * _unit(texts)).sum(-1)


def prompt_accuracy(logits: Mapping[str, Tensor], wanted: Sequence[Mapping[str, int]]) -> Tensor:
    """Share of the attributes a prompt asks for that the attribute heads see -> [N].

    logits: attribute -> [N, values]; wanted: per picture, attribute -> value index.
    """
    seen = {name: rows.argmax(-1).tolist() for name, rows in logits.items()}
    shares = []
    for i, asked in enumerate(wanted):
        hits = [seen[name][i] == value for name, value in asked.items()]
        shares.append(sum(hits) / len(hits) if hits else 1.0)
    return torch.tensor(shares)


def asked_log_probabilities(
    logits: Mapping[str, Tensor], wanted: Sequence[Mapping[str, int]]
) -> tuple[Tensor, Tensor]:
    """Mean and least log-probability of the attributes asked for -> [N], [N] (nats, clamped)."""
    logs = {name: functional.log_softmax(rows.float(), -1).cpu() for name, rows in logits.items()}
    means, least = [], []
    for i, asked in enumerate(wanted):
        values = torch.tensor([logs[name][i, value] for name, value in asked.items()] or [0.0])
        values = values.clamp(min=LOWEST_LOG_PROBABILITY)
        means.append(values.mean())
        least.append(values.min())
    return torch.stack(means), torch.stack(least)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of two feature clouds [N, D], [M, D] seen as Gaussians.

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2): Heusel et al. 2017, equation 6.
    """
    (mean_a, cov_a), (mean_b, cov_b) = _gaussian(a), _gaussian(b)
    root = _matrix_root(cov_a)
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return float(distance)


def diversity(features: Tensor) -> Tensor:
    """Mean of 1 - cosine over all pairs of a person's pictures: [P, Q, D] -> [P].

    Stands for the face diversity of PhotoMaker (Li et al., 2024), which uses LPIPS.
    """
    unit = _unit(features)
    count = features.shape[1]
    if count < 2:
        return torch.zeros(features.shape[0])
    cosines = torch.einsum("pqd,prd->pqr", unit, unit)
    others = cosines.sum((1, 2)) - count
    return 1 - others / (count * (count - 1))


def nearest_distance(vectors: Tensor, training: Tensor) -> Tensor:
    """1 - cosine of each LoRA to its nearest training LoRA: [P, D], [M, D] -> [P].

    0 is a copy of a training LoRA at any strength.
    """
    return 1 - (_unit(vectors) @ _unit(training).T).amax(1)


def _unit(features: Tensor) -> Tensor:
    return functional.normalize(features.float(), dim=-1)


def _gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    features = features.double()
    return features.mean(0), torch.cov(features.T).reshape(features.shape[1], -1)


def _matrix_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
