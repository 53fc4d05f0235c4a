"""Which face belongs to which: exact assignment, and pictures with any number of faces."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from difflora_core.errors import DiffLoRAError
from difflora_core.face_crop import TEMPLATE
from difflora_core.mask_aware import FlatFaces, assign


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def total(costs: Tensor, pairs: list[tuple[int, int]]) -> float:
    return sum(float(costs[row, column]) for row, column in pairs)


@pytest.mark.parametrize("shape", [(1, 1), (3, 3), (2, 5), (5, 2), (6, 6), (1, 7), (4, 6)])
def test_no_other_pairing_costs_less(shape: tuple[int, int]) -> None:
    for seed in range(20):
        costs = random(*shape, seed=seed)
        pairs = assign(costs)
        tall = costs if shape[0] <= shape[1] else costs.mT
        best = min(
            total(tall, list(enumerate(columns)))
            for columns in itertools.permutations(range(tall.shape[1]), tall.shape[0])
        )
        assert total(costs, pairs) == pytest.approx(best, abs=1e-6)
        assert len(pairs) == min(shape)
        assert all(len(set(side)) == len(pairs) for side in zip(*pairs, strict=True))


@pytest.mark.parametrize("kind", ["continuous", "tied", "constant"])
def test_agrees_with_scipy_on_many_faces(kind: str) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    numbers = np.random.default_rng(0)
    for _ in range(50):
        shape = numbers.integers(1, 17, 2)
        costs = {
            "continuous": numbers.normal(size=shape),
            "tied": numbers.integers(0, 3, shape).astype(float),
            "constant": np.ones(shape),
        }[kind]
        expected = costs[optimize.linear_sum_assignment(costs)].sum()
        assert total(torch.from_numpy(costs), assign(torch.from_numpy(costs))) == pytest.approx(
            expected
        )


def test_taking_the_best_pair_first_is_not_enough() -> None:
    likeness = torch.tensor([[0.9, 0.8], [0.8, 0.1]])
    assert assign(-likeness) == [(0, 1), (1, 0)]


def test_nothing_to_pair() -> None:
    assert assign(torch.zeros(0, 3)) == assign(torch.zeros(3, 0)) == []


def test_costs_that_are_not_finite() -> None:
    with pytest.raises(DiffLoRAError, match="some costs are not finite"):
        assign(torch.tensor([[0.0, math.nan]]))


def reference_pairs(real: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
    """The original's: put together, then cut to 6, then halved."""
    both = torch.cat([real, drawn])[:6]
    first, second = both.chunk(2)
    return first, second


def pictures_with(counts: list[int]) -> tuple[Tensor, FlatFaces]:
    """Noise of 160 x 160 and turned, shifted templates in it."""
    boxes, landmarks = [], []
    for number, count in enumerate(counts):
        shift = 20 * random(count, 1, 2, seed=number) + 40
        points = torch.tensor(TEMPLATE) * 0.6 + shift
        landmarks.append(points)
        boxes.append(torch.cat([points.amin(1) - 8, points.amax(1) + 8], 1))
    return random(len(counts), 3, 160, 160).sigmoid(), FlatFaces.of(boxes, landmarks)


@pytest.mark.parametrize("count", [1, 3, 5, 6, 7])
def test_any_number_of_faces_is_paired_rightly_as_it_was_not_in_the_original(count: int) -> None:
    real, faces = pictures_with([count])
    drawn = (real + 0.05 * random(*real.shape, seed=9)).requires_grad_(True)
    ours, theirs = faces.crops(drawn, 28), faces.crops(real, 28)
    apart = (ours - theirs).abs().flatten(1).mean(1)
    assert len(apart) == count and float(apart.detach().max()) < 0.06
    assert torch.autograd.grad(apart.sum(), drawn, retain_graph=True)[0].abs().max() > 0
    first, second = reference_pairs(theirs, ours)
    wrong = (first - second).abs().flatten(1).mean(1)
    right = len(wrong) == count and float(wrong.detach().max()) < 0.06
    assert right == (count <= 3)
    (gradient,) = torch.autograd.grad(wrong.sum(), drawn)
    assert bool(gradient.any()) == (count < 6)  # from 6 on, real faces meet real faces


def test_ragged_batches() -> None:
    counts = [2, 0, 7, 1]
    images, faces = pictures_with(counts)
    assert len(faces) == 10 and faces.pictures == 4
    assert faces.picture.tolist() == [0, 0, 2, 2, 2, 2, 2, 2, 2, 3]
    crops = faces.crops(images, 28)
    alone = torch.cat(
        [
            FlatFaces.of([faces.boxes[rows]], [faces.landmarks[rows]]).crops(images[i : i + 1], 28)
            for i in range(4)
            if len(rows := (faces.picture == i).nonzero()[:, 0])
        ]
    )
    assert torch.equal(crops, alone)
    mean, present = faces.per_picture(torch.arange(10.0))
    assert mean.tolist() == pytest.approx([0.5, 0, 5, 9])
    assert present.tolist() == [True, False, True, True]
    assert torch.allclose(faces.widths, torch.full((10,), 0.6 * (73.5318 - 38.2946) + 16))


def test_no_face_in_any_picture() -> None:
    images, faces = pictures_with([0, 0])
    crops = faces.crops(images.requires_grad_(True))
    assert crops.shape == (0, 3, 112, 112)
    value, present = faces.per_picture(crops.flatten(1).sum(1))
    assert value.tolist() == [0, 0] and present.tolist() == [False, False]
    (gradient,) = torch.autograd.grad(value.sum(), images)
    assert gradient.abs().max() == 0
