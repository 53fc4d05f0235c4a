"""One step of guidance: on which faces, in which direction, how far."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from einops import einsum
from torch import Tensor

from .crops import Windows, crop_boxes
from .decoders import Part
from .tracking import FaceRows

FACE_GRAIN = 1 / 7
"""Reach of smoothing, standard deviation per side of the face's crop."""

FALLBACK, FALLBACK_POWER, FALLBACK_SIGMA = 0.19, 0.75, 10.0
"""Without classifier-free guidance a step is FALLBACK sigma^FALLBACK_POWER times the spread of the
estimate: what scale 2 does in the mini world, within a quarter from sigma 10 down to 0.4. More
noise than that makes it no longer: schedules that begin in pure noise know no bound."""


@dataclass(frozen=True)
class Plan:
    """What one step works on: N faces of the batch, of like size."""

    rows: Tensor
    """[N] int64: their numbers among all faces of the step."""
    faces: FaceRows
    windows: Windows
    part: Part
    """What of the windows the face network sees."""
    mask: Tensor
    """[N, 1, height, width] 0..1, where each face's window may change."""
    length: Tensor
    """[N] root mean square of the step within the mask."""


@dataclass(frozen=True)
class Look:
    """What a face network saw of a plan's faces."""

    loss: Tensor
    """[N]"""
    crops: Tensor
    """The aligned faces [N, 3, size, size]."""
    note: str = ""
    """What went otherwise than planned."""


def jittered(plan: Plan, share: float, turn: int) -> Plan:
    """The plan with crops smaller by up to `share`, anywhere inside the crops that they were.

    `turn` is the seed: a run can be repeated, and no face depends on the others.
    """
    points = plan.faces.landmarks
    boxes = crop_boxes(points)
    shrink, *place = torch.rand(3, generator=torch.Generator().manual_seed(turn)).tolist()
    middle, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    shift = share * shrink * half * (2 * torch.tensor(place).to(half) - 1)
    # landmarks nearer to the middle of a crop make ArcFace's crop smaller about it
    moved = points + shift[:, None] - share * shrink * (points - middle[:, None])
    return replace(plan, faces=replace(plan.faces, landmarks=moved))


def unit_length(
    windows: Windows, inside: Tensor, estimate: Tensor, direction: Tensor | None, cfg: float,
    sigma: float,
) -> Tensor:  # fmt: skip
    """Length [N] of a step of strength 1 in windows with masks `inside`.

    As long as what classifier-free guidance does there (FreeDoM, Yu et al., 2023).
    """
    if direction is not None and cfg not in (0, 1) and bool((direction != 0).any()):
        return cfg * masked_rms(windows.cut(direction), inside)
    spread = estimate - estimate.mean((2, 3), keepdim=True)
    share = FALLBACK * min(sigma, FALLBACK_SIGMA) ** FALLBACK_POWER
    return share * masked_rms(windows.cut(spread), inside)


def scaled_step(gradient: Tensor, plan: Plan, parts: int = 1) -> tuple[Tensor, str]:
    """A step [N, C, h, w] down the gradient, as long as planned, weighted by the mask.

    Faces whose gradient is zero or not finite stay as they are; a note says so.
    """
    inside = torch.where(plan.mask > 0, gradient, 0.0)
    size = masked_rms(inside, plan.mask)  # of the bare gradient: a grey mask makes a shorter step
    sound = size.isfinite() & (size > 0) & plan.length.isfinite()
    scale = torch.where(sound, plan.length / size, 0.0) / parts
    step = torch.where(
        sound[:, None, None, None], -inside * plan.mask * scale[:, None, None, None], 0.0
    )
    broken = int((~size.isfinite() | ~plan.length.isfinite()).sum())
    return step, f"gradient of {broken} face(s) not finite: left alone" if broken else ""


def smoothed(gradient: Tensor, plan: Plan, share: float) -> Tensor:
    """A gradient [N, C, h, w] and what a Gaussian over the face leaves of it, both at length 1.

    Preconditioning by a smooth prior: a gradient with respect to x_0 lacks the covariance of x_0
    given x_t, which a gradient through the denoiser has, and which is large for what is smooth.
    """
    if not share:
        return gradient
    inside = torch.where(plan.mask > 0, gradient, 0.0)
    rows, columns = (_blur(plan.mask, axis) for axis in (2, 3))
    soft = torch.where(
        plan.mask > 0, einsum(rows, inside, columns, "n i j, n c j k, n l k -> n c i l"), 0.0
    )
    return (1 - share) * _unit(inside, plan.mask) + share * _unit(soft, plan.mask)


def _blur(mask: Tensor, axis: int) -> Tensor:
    """Gaussians [N, K, K] along an axis of masks [N, 1, h, w], as wide as each face asks for."""
    side = (mask > 0).any(5 - axis).sum(-1).float()  # of the mask along that axis, [N, 1]
    place = torch.arange(mask.shape[axis], device=mask.device, dtype=mask.dtype)
    away = (place[:, None] - place) / (FACE_GRAIN * side.clamp(min=1))[..., None]
    return torch.softmax(-0.5 * away.square(), -1)


def _unit(maps: Tensor, mask: Tensor) -> Tensor:
    return maps / masked_rms(maps, mask).clamp(min=1e-30)[:, None, None, None]


def masked_rms(maps: Tensor, mask: Tensor) -> Tensor:
    """Root mean square of [N, C, h, w] where mask [N, 1, h, w] is above zero: [N]."""
    inside = (mask > 0).to(maps)
    total = torch.where(mask > 0, maps.square(), 0.0).sum((1, 2, 3))
    return (total / (inside.sum((1, 2, 3)) * maps.shape[1]).clamp(min=1)).sqrt()
