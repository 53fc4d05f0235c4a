"""The preference score: which of two pictures serves its prompt better, as log-odds.

ImageReward (Xu et al., 2023) is fitted to human choices, which the drawn world does not have. It
does know the truth, so the score here is fitted to that: a logistic regression tells drawn
portraits with their own prompt from the same portraits with a prompt that differs in one to three
attributes. Its inputs are the mean and the least log-probability that the attribute heads give to
what the prompt asks for, and CLIP-T. 0 = as likely a mismatch as a match; it knows nothing of
beauty, and a picture's likeness to a person does not enter.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from training.portraits import ATTRIBUTES, Scene, describe, parse_prompt, render, sample_scenes

PictureFacts = Callable[[Tensor, Sequence[str], Sequence[Mapping[str, int]]], Tensor]
"""(pictures [N, 3, H, W], prompts, wanted) -> the inputs of the score [N, 3]."""


@dataclass(frozen=True)
class Preference:
    """A fitted score: standardised inputs times weights plus a constant."""

    mean: Tensor
    deviation: Tensor
    weights: Tensor
    constant: float

    def __call__(self, inputs: Tensor) -> Tensor:
        """Log-odds of a match, [N, 3] -> [N]."""
        return (inputs.double() - self.mean) / self.deviation @ self.weights + self.constant


def fit_preference(
    facts: PictureFacts, pictures: int, seed: int, device: torch.device
) -> Preference:
    """Fit the score on freshly drawn portraits and their right and wrong prompts."""
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    scenes = sample_scenes(pictures, generator, people=1)
    images = render(scenes.to(device)).images
    right = describe(scenes, rng)
    wrong = describe(_altered(scenes, generator), rng)
    inputs = [facts(images, texts, [parse_prompt(t) for t in texts]) for texts in (right, wrong)]
    # a phrase that says nothing new leaves two equal prompts: such a pair teaches nothing
    differ = torch.tensor(
        [parse_prompt(a) != parse_prompt(b) for a, b in zip(right, wrong, strict=True)]
    )
    matches = torch.cat([torch.ones(int(differ.sum())), torch.zeros(int(differ.sum()))])
    return fit_logistic(torch.cat([rows[differ] for rows in inputs]), matches)


def fit_logistic(
    inputs: Tensor, labels: Tensor, ridge: float = 1e-2, steps: int = 25
) -> Preference:
    """Logistic regression [N, K], [N] by Newton's method with a ridge on the weights."""
    inputs, labels = inputs.double(), labels.double()
    mean, deviation = inputs.mean(0), inputs.std(0).clamp(min=1e-6)
    x = torch.cat([(inputs - mean) / deviation, torch.ones(len(inputs), 1).double()], 1)
    penalty = torch.full((x.shape[1],), ridge * len(x)).double()
    penalty[-1] = 1e-9
    solution = torch.zeros(x.shape[1]).double()
    for _ in range(steps):
        p = torch.sigmoid(x @ solution)
        gradient = x.T @ (p - labels) + penalty * solution
        curvature = x.T @ (x * (p * (1 - p))[:, None]) + torch.diag(penalty)
        solution = solution - torch.linalg.solve(curvature, gradient)
    return Preference(mean, deviation, solution[:-1], float(solution[-1]))


def _altered(scenes: Scene, generator: torch.Generator) -> Scene:
    """The scenes with one to three attributes changed to another value."""
    count = torch.randint(1, 4, (len(scenes), 1), generator=generator)
    order = torch.rand(len(scenes), len(ATTRIBUTES), generator=generator).argsort(1).argsort(1)
    changed = order < count
    fields = {}
    for column, (name, values) in enumerate(ATTRIBUTES.items()):
        old = getattr(scenes, name)
        shift = torch.randint(1, len(values), (len(scenes),), generator=generator)
        shift = shift * changed[:, column]
        fields[name] = (old + shift.reshape(-1, *[1] * (old.dim() - 1))) % len(values)
    return replace(scenes, **fields)
