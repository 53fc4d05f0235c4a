"""Distances between what is drawn and what is wanted, on faces and inside masks, and their sum.

After "Improving Latent Diffusion with Perceptual Mask-aware Loss" (Gupta, Hebbar, Mohta, 2023):
L = l1 * L_body + l2 * L_face + (1 - l1 - l2) * L_LDM. Features are compared at unit length per
place, as in LPIPS (Zhang et al., 2018), so that every distance lies in 0..2 and a weight means the
same for every network; the original compares raw activations, whose scale its weights depend on.
All functions are pure and differentiable; what is empty counts 0 and has no gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import reduce
from torch import Tensor

from ..errors import BadConfig
from .networks import FaceActivations

TermName = Literal["face", "body", "landmark"]
FAINT = 1e-6
"""share of a map's mean squared length below which a place counts as blank, not as a direction"""
TINY = 1e-12


class Term(NamedTuple):
    """One term of the loss for each of B pictures."""

    value: Tensor
    """[B]"""
    present: Tensor
    """[B] bool; False where a picture has nothing to compare."""


@dataclass(frozen=True)
class Weights:
    """Shares of the terms in the whole loss; what they leave of 1 goes to the diffusion loss."""

    face: float = 0.5
    """lambda 2"""
    body: float = 0.2
    """lambda 1"""
    landmark: float = 0.0

    def __post_init__(self) -> None:
        shares = vars(self)
        if not (min(shares.values()) >= 0 and sum(shares.values()) <= 1 + 1e-9):  # NaN neither
            given = ", ".join(f"{name} {share}" for name, share in shares.items())
            raise BadConfig(
                f"The weights {given} are impossible.",
                hint="Expected 0 or more each, at most 1 together.",
            )


@dataclass(frozen=True)
class Preset:
    """Weights and the noise below which they hold."""

    weights: Weights
    last_step: int
    """T: the terms count only at steps t < T of 1000."""


PRESETS: Mapping[str, Preset] = {
    "default": Preset(Weights(0.5, 0.2), 100),
    "second": Preset(Weights(0.5, 0.2), 400),
    "logged": Preset(Weights(0.5, 0.1), 100),
    "script": Preset(Weights(0.7, 0.1), 100),
}
"""The authors' settings: called best and second best, the run with the published FID, and the
defaults of their script."""


def face_distance(
    ours: FaceActivations,
    theirs: FaceActivations,
    tap_weights: Sequence[float] | None = None,
    embedding_weight: float = 1.0,
) -> Tensor:
    """Weighted mean of the distances of maps and embeddings, 0..2 for each of N faces: [N].

    L_face = sum_l a_l ||FE_l(c) - FE_l(c')|| / sum_l a_l. tap_weights: a_l per map; None shares a
    weight of 1 among them. Without maps in `theirs`, where only an embedding is known, embeddings
    are compared alone. Errors: BadConfig when the weights are not one per map.
    """
    taps = list(zip(ours.taps, theirs.taps, strict=True)) if theirs.taps else []
    weights = [1 / len(taps) for _ in taps] if tap_weights is None else list(tap_weights)
    if len(weights) != len(taps):
        raise BadConfig(f"{len(weights)} weights are given for {len(taps)} maps of the face.")
    distance = embedding_weight * (1 - (ours.embedding * theirs.embedding).sum(-1))
    for weight, (mine, other) in zip(weights, taps, strict=True):
        distance = distance + weight * place_distance(mine, other).mean((1, 2))
    return distance / max(sum(weights, embedding_weight), TINY)


def masked_distance(
    ours: Sequence[Tensor], theirs: Sequence[Tensor], masks: Tensor, per_person: bool = True
) -> Tensor:
    """Mean distance of feature maps [B, C, h, w] inside masks [B, P, H, W] (0..1): [B], 0..2.

    L_body, with the features of any network: see `mean_inside` for the masks.
    """
    levels = [place_distance(a, b) for a, b in zip(ours, theirs, strict=True)]
    return mean_inside(levels, masks, per_person)


def place_distance(ours: Tensor, theirs: Tensor) -> Tensor:
    """1 - cosine of the channels at each place: [B, C, h, w] twice -> [B, h, w], 0..2."""
    return 0.5 * direction_difference(ours, theirs).square().sum(1)


def direction_difference(ours: Tensor, theirs: Tensor) -> Tensor:
    """Features [B, C, h, w], each with unit channels at every place, subtracted.

    Blank places have the direction 0 and a finite gradient. What is blank depends on the maps, so
    that no common factor on the features matters.
    """
    least = torch.promote_types(ours.dtype, torch.float32)
    ours, theirs = ours.to(least), theirs.to(least)
    lengths = [features.square().sum(1, keepdim=True) for features in (ours, theirs)]
    mean = torch.stack(lengths).detach().mean((0, 3, 4))[..., None, None]
    faint = (FAINT * mean).clamp_min(1e-20)  # where all is blank: its -1.5th power is a slope
    return ours * (lengths[0] + faint).rsqrt() - theirs * (lengths[1] + faint).rsqrt()


def mean_inside(levels: Sequence[Tensor], masks: Tensor, per_person: bool = True) -> Tensor:
    """Distances [B, h, w] of several levels averaged inside masks [B, P, H, W] (0..1): [B].

    At each level the masks are resized by area and the distance divided by what they cover; levels
    count alike. per_person: the mean over persons, so that the small count as much as the large;
    else their union is one mask, as in the original code. Empty masks are left out.
    """
    masks = masks.to(levels[0].dtype)
    masks = masks if per_person else 1 - (1 - masks).prod(1, keepdim=True)
    return torch.stack([_mean_inside(level, masks) for level in levels]).mean(0)


def _mean_inside(distance: Tensor, masks: Tensor) -> Tensor:
    height, width = distance.shape[-2:]
    masks = F.adaptive_avg_pool2d(masks, (height, width))
    area = reduce(masks, "b p h w -> b p", "sum")
    inside = reduce(masks * distance[:, None], "b p h w -> b p", "sum") / area.clamp_min(TINY)
    return inside.sum(1) / (area > 0).sum(1).clamp_min(1)


def landmark_distance(ours: Tensor, theirs: Tensor, widths: Tensor) -> Tensor:
    """Mean distance of points [N, K, 2] in units of the faces' widths [N] (pixels): [N]."""
    away = torch.linalg.vector_norm(ours - theirs, dim=-1).mean(1)
    return away / widths.clamp_min(1.0)


def combine(ldm: Tensor, terms: Mapping[TermName, Term], weights: Weights) -> Tensor:
    """The whole loss [B] from the diffusion loss [B] and the terms.

    L = l1 * body + l2 * face + (1 - l1 - l2) * LDM. Where a picture lacks a term, its weight goes
    to the others in proportion to theirs: without a face, 0.2 and 0.5 become 0.4 * body +
    0.6 * LDM. Where it lacks all of them, as it does from step T on, the diffusion loss is left.
    """
    left = 1 - sum(vars(weights).values())
    loss, given = left * ldm, torch.zeros_like(ldm)
    for name, (value, present) in terms.items():
        weight = getattr(weights, name) * present.to(ldm.dtype)
        given = given + weight
        loss = loss + weight * torch.where(present, value, 0.0)
    return torch.where(given > 0, loss / (left + given).clamp_min(TINY), ldm)
