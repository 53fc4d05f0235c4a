"""Distances against their formulas in float64, gradients by finite differences, empty cases."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from difflora_core.errors import BadConfig
from difflora_core.mask_aware import (
    PRESETS,
    FaceActivations,
    Term,
    Weights,
    combine,
    face_distance,
    landmark_distance,
    masked_distance,
    mean_inside,
)
from difflora_core.mask_aware.losses import TermName


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def activations(count: int, seed: int, scale: float = 1.0) -> FaceActivations:
    taps = tuple(scale * random(count, c, s, s, seed=seed + c) for c, s in ((4, 6), (5, 3)))
    embedding = random(count, 7, seed=seed)
    return FaceActivations(taps, embedding / embedding.norm(dim=-1, keepdim=True))


def plain_distance(one: Tensor, other: Tensor) -> float:
    """1 - cosine of the channels, averaged over the places of [C, h, w], number by number."""
    total = 0.0
    for y in range(one.shape[1]):
        for x in range(one.shape[2]):
            a, b = one[:, y, x].tolist(), other[:, y, x].tolist()
            dot = sum(i * j for i, j in zip(a, b, strict=True))
            total += 1 - dot / math.sqrt(sum(i * i for i in a) * sum(j * j for j in b))
    return total / (one.shape[1] * one.shape[2])


def test_the_face_term_is_its_formula() -> None:
    ours, theirs = activations(3, 0), activations(3, 50)
    found = face_distance(ours, theirs, (0.5, 0.25), 2.0)
    for n in range(3):
        first, second = (
            plain_distance(a[n], b[n]) for a, b in zip(ours.taps, theirs.taps, strict=True)
        )
        cosine = float(ours.embedding[n] @ theirs.embedding[n])
        expected = (0.5 * first + 0.25 * second + 2 * (1 - cosine)) / 2.75
        assert float(found[n]) == pytest.approx(expected, abs=1e-5)


def test_without_weights_the_maps_share_one() -> None:
    ours, theirs = activations(2, 0), activations(2, 50)
    assert torch.allclose(face_distance(ours, theirs), face_distance(ours, theirs, (0.5, 0.5), 1.0))


def test_where_only_an_embedding_is_known() -> None:
    ours, theirs = activations(2, 0), activations(2, 50)
    alone = face_distance(ours, FaceActivations((), theirs.embedding))
    assert torch.allclose(alone, 1 - (ours.embedding * theirs.embedding).sum(-1))
    with pytest.raises(BadConfig, match="3 weights are given for 2 maps"):
        face_distance(ours, theirs, (1, 1, 1))


def reference_face_loss(ours: FaceActivations, theirs: FaceActivations) -> Tensor:
    """The original's: raw activations, so that the weights belong to one network's scale."""
    alphas = (0.1, 0.0025)
    pairs = zip(alphas, ours.taps, theirs.taps, strict=True)
    return torch.stack([a * (b - c).abs().sum(0).mean() for a, b, c in pairs]).sum()


@pytest.mark.parametrize("scale", [1e-3, 127.5])
def test_the_scale_of_a_network_does_not_matter_as_it_did_in_the_original(scale: float) -> None:
    ours, theirs = activations(2, 0), activations(2, 50)
    scaled = activations(2, 0, scale), activations(2, 50, scale)
    assert torch.allclose(face_distance(*scaled), face_distance(ours, theirs), rtol=1e-6)
    ratio = reference_face_loss(*scaled) / reference_face_loss(ours, theirs)
    assert float(ratio) == pytest.approx(scale)


def test_the_same_face_is_at_distance_0_with_no_gradient() -> None:
    theirs = activations(2, 0)
    taps = tuple(tap.clone().requires_grad_(True) for tap in theirs.taps)
    distance = face_distance(FaceActivations(taps, theirs.embedding), theirs)
    assert distance.abs().max() < 1e-12
    for gradient in torch.autograd.grad(distance.sum(), taps):
        assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("blank", ["in one place", "everywhere", "in both"])
def test_blank_places_have_bounded_gradients(blank: str) -> None:
    features = random(1, 4, 3, 3).float()
    features[..., 1, 1] = 0
    features = features if blank == "in one place" else features * 0
    features.requires_grad_(True)
    other = random(1, 4, 3, 3, seed=1).float() * (blank != "in both")
    distance = masked_distance([features], [other], torch.ones(1, 1, 8, 8))
    (gradient,) = torch.autograd.grad(distance.sum(), features)
    assert distance.isfinite().all() and gradient.isfinite().all() and gradient.abs().max() < 500


def plain_inside(one: Tensor, other: Tensor, mask: Tensor) -> float:
    """Mean distance of maps [C, h, h] where a mask [H, H] lies, number by number."""
    side, total, area = one.shape[-1], 0.0, 0.0
    step = mask.shape[-1] // side
    for y, x in itertools.product(range(side), range(side)):
        share = float(mask[y * step : (y + 1) * step, x * step : (x + 1) * step].mean())
        place = (slice(None), slice(y, y + 1), slice(x, x + 1))
        total += share * plain_distance(one[place], other[place])
        area += share
    return total / area


def test_the_body_term_is_its_formula_per_person_and_in_union() -> None:
    """Two levels, two overlapping people; masks that halve and quarter exactly."""
    ours, theirs = ([random(1, 3, s, s, seed=s + k) for s in (4, 2)] for k in (0, 9))
    masks = torch.zeros(1, 2, 8, 8)
    masks[0, 0, :4], masks[0, 1, 2:, 4:] = 1, 1
    for per_person in (True, False):
        people = masks[0] if per_person else masks[0].amax(0, keepdim=True)
        pairs = [
            plain_inside(a[0], b[0], m) for a, b in zip(ours, theirs, strict=True) for m in people
        ]
        expected = sum(pairs) / len(pairs)
        assert float(masked_distance(ours, theirs, masks, per_person)) == pytest.approx(
            expected, abs=1e-5
        )


def test_what_lies_outside_the_mask_has_no_say() -> None:
    features = random(1, 3, 8, 8).requires_grad_(True)
    masks = torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    masks[..., 16:40, 8:24] = True
    masked_distance([features], [random(1, 3, 8, 8, seed=1)], masks).sum().backward()
    assert features.grad is not None
    touched = features.grad.abs().sum((0, 1)) > 0
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[2:5, 1:3] = True
    assert torch.equal(touched, expected)


def test_an_empty_mask_gives_0_and_no_gradient() -> None:
    features = random(3, 4, 4, 4).requires_grad_(True)
    other = random(3, 4, 4, 4, seed=1)
    masks = torch.zeros(3, 2, 16, 16)
    masks[1, 0, :8] = 1
    for per_person in (True, False):
        found = masked_distance([features], [other], masks, per_person)
        (gradient,) = torch.autograd.grad(found.sum(), features)
        assert found[0] == 0 and found[2] == 0 and found[1] > 0
        assert gradient[0].abs().max() == 0 and gradient[2].abs().max() == 0
    # a second person who is not there does not halve the first
    alone = masked_distance([features], [other], masks[:, :1])
    assert torch.equal(alone, masked_distance([features], [other], masks))
    for per_person in (True, False):
        nobody = masked_distance([features], [other], torch.zeros(3, 0, 16, 16), per_person)
        assert torch.equal(nobody, torch.zeros(3, dtype=torch.float64))


def test_a_person_smaller_than_a_place_of_the_map_counts() -> None:
    masks = torch.zeros(1, 1, 64, 64)
    masks[0, 0, 9, 9] = 1
    distance = random(1, 2, 2).abs()
    assert float(mean_inside([distance], masks)) == pytest.approx(float(distance[0, 0, 0]))


def test_landmarks_in_face_widths() -> None:
    ours = random(2, 5, 2) * 20
    theirs = ours + torch.tensor([3.0, 4.0])
    found = landmark_distance(ours, theirs, torch.tensor([10.0, 20.0]))
    assert torch.allclose(found, torch.tensor([0.5, 0.25], dtype=torch.float64))
    ours.requires_grad_(True)
    landmark_distance(ours, ours.detach(), torch.tensor([10.0, 0.0])).sum().backward()
    assert ours.grad is not None and ours.grad.isfinite().all()


def test_gradients_by_finite_differences() -> None:
    masks = torch.rand(2, 2, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    maps = random(2, 3, 4, 4).requires_grad_(True)
    embedding = random(2, 7, seed=2).requires_grad_(True)
    theirs = activations(2, 50)
    other = random(2, 3, 4, 4, seed=3)
    points = random(2, 5, 2).requires_grad_(True)
    aims = random(2, 5, 2, seed=4)

    def whole(maps: Tensor, embedding: Tensor, points: Tensor) -> Tensor:
        ours = FaceActivations((maps,), embedding)
        face = face_distance(ours, FaceActivations((other,), theirs.embedding), (0.7,), 0.3)
        body = masked_distance([maps], [other], masks)
        marks = landmark_distance(points, aims, torch.full((2,), 4.0).double())
        here = torch.tensor([True, False])
        terms: dict[TermName, Term] = {
            "face": Term(face, here),
            "body": Term(body, ~here),
            "landmark": Term(marks, here),
        }
        return combine(maps.square().mean((1, 2, 3)), terms, Weights(0.3, 0.2, 0.1))

    # blank places are judged by a scale that is held fixed, which finite differences do not know
    assert torch.autograd.gradcheck(whole, (maps, embedding, points), atol=1e-6)


def absent(count: int = 1) -> Term:
    return Term(torch.zeros(count), torch.zeros(count, dtype=torch.bool))


def there(value: float) -> Term:
    return Term(torch.tensor([value]), torch.tensor([True]))


def reference_shares_without_face(body: float, face: float) -> tuple[float, float]:
    """The original's: the second share is divided by a sum that holds the first one's new value."""
    ldm = 1 - body - face
    ldm = ldm / (ldm + body)
    return ldm, body / (ldm + body)


@pytest.mark.parametrize(("body", "face"), [(0.2, 0.5), (0.1, 0.7)])
def test_without_a_face_the_shares_still_add_up_as_they_did_not_in_the_original(
    body: float, face: float
) -> None:
    def ours(ldm: float, value: float) -> float:
        terms: dict[TermName, Term] = {"face": absent(), "body": there(value)}
        return float(combine(torch.tensor([ldm]), terms, Weights(face, body)))

    shares = ours(1.0, 0.0), ours(0.0, 1.0)
    assert sum(shares) == pytest.approx(1)
    assert shares[1] / shares[0] == pytest.approx(body / (1 - body - face))
    assert sum(reference_shares_without_face(body, face)) < 0.86


def test_the_whole_loss() -> None:
    ldm = torch.tensor([1.0, 1.0, 1.0, 1.0])
    yes, no = True, False
    face = Term(torch.tensor([10.0, 10.0, math.nan, math.nan]), torch.tensor([yes, yes, no, no]))
    body = Term(torch.tensor([5.0, math.nan, 5.0, math.nan]), torch.tensor([yes, no, yes, no]))
    found = combine(ldm, {"face": face, "body": body}, Weights(0.5, 0.2))
    expected = [0.3 + 5 + 1, (0.3 + 5) / 0.8, 0.6 + 2, 1]
    assert found.tolist() == pytest.approx(expected)


def test_a_term_that_is_nowhere_is_like_one_that_is_not_computed() -> None:
    terms: dict[TermName, Term] = {"face": there(3.0), "body": absent()}
    both = combine(torch.ones(1), terms, Weights())
    assert torch.equal(both, combine(torch.ones(1), {"face": there(3.0)}, Weights()))
    assert float(combine(torch.ones(1) * 7, {}, Weights(1.0, 0.0))) == 7


@pytest.mark.parametrize("weights", [Weights(), Weights(0.7, 0.3)])
def test_without_terms_the_diffusion_loss_is_left_bit_for_bit(weights: Weights) -> None:
    ldm = random(50).float().abs().requires_grad_(True)
    whole = combine(ldm, {"face": absent(50), "body": absent(50)}, weights)
    assert torch.equal(whole, ldm)
    (gradient,) = torch.autograd.grad(whole.sum(), ldm)
    assert torch.equal(gradient, torch.ones(50))


def test_presets_are_the_authors_settings() -> None:
    default, logged = PRESETS["default"], PRESETS["logged"]
    assert (default.weights.body, default.weights.face, default.last_step) == (0.2, 0.5, 100)
    assert (logged.weights.body, logged.weights.face, logged.last_step) == (0.1, 0.5, 100)


@pytest.mark.parametrize("shares", [(0.7, 0.4), (-0.1, 0.2)])
def test_impossible_weights(shares: tuple[float, float]) -> None:
    with pytest.raises(BadConfig, match=rf"face {shares[0]}, body {shares[1]}"):
        Weights(*shares)
