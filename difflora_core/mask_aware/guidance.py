"""Guidance while sampling: the estimate of x_0 steps towards a face, inside a mask only.

The gradient is taken with respect to the estimate, not through the denoiser, as MPGD does
(He et al., 2024): a decoder of a small window and a face network are all that is differentiated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import DiffLoRAError
from ..face_crop import align
from .crops import MARGIN, alike, box_masks, crop_boxes, face_windows, latent_masks
from .decoders import Decoder, frozen_clone
from .losses import face_distance
from .networks import FaceActivations
from .steps import Look, Plan, jittered, scaled_step, smoothed, unit_length
from .tiles import decode_around, decode_in_tiles
from .tracking import FaceRows, Finder, Tracker, WhenLost
from .window import WINDOWS, SigmaWindow

AT_ONCE = 4
"""Most faces that are differentiated together: the face network keeps up to 0.1 GB for each."""
LASTING = 0.3
"""Share of a step that is assumed to last at the first one."""


class Faces(Protocol):
    """A frozen face network: crops [N, 3, size, size] in 0..1 to what it sees in them."""

    size: int

    def __call__(self, crops: Tensor) -> FaceActivations: ...


@dataclass(frozen=True)
class GuidanceSettings:
    """How strongly, when and how carefully to guide."""

    strength: float = 2.5
    """Length of a step in units of what classifier-free guidance does; 0 guides nothing. Only a
    part of it lasts: what the sampler moves towards the estimate before the next one."""
    window: SigmaWindow = WINDOWS["identity"]
    """Noise levels at which steps are guided."""
    iterations: int = 2
    """Gradients per sampling step; together their steps are as long as one."""
    smoothing: float = 0.5
    """Share of a step that is smoothed over the face, 0..1: shape and colour rather than detail."""
    jitter: float = 0.1
    """Up to how much smaller than the face's crop is what a gradient sees, somewhere inside it;
    every other gradient sees it mirrored, too. What survives both is likeness, what does not is a
    pattern that pleases one network (expectation over transformation, Athalye et al., 2018)."""
    margin: int = MARGIN
    """Latents decoded around a face."""
    when_lost: WhenLost = "hold"
    """No face is found: go on where it was, skip the step, or stop with an error."""


@dataclass(frozen=True)
class GuideStep:
    """What happened at one sampling step."""

    sigma: float
    loss: float
    """1 - cosine, mean over the faces, before the step; NaN without a face."""
    similarity: float
    """Cosine to the reference as the first gradient saw it, mean over the faces; NaN without."""
    faces: int
    """Faces that were guided, over all pictures."""
    note: str = ""
    """What went otherwise than planned."""


class Guide:
    """Guides one run of a sampler; make a new one for every run.

    Args:
        decoder: see decoders.py; on the device of the latents.
        network: a frozen face network with `.size`; the gradient comes from it.
        references: unit embeddings of the same network: [R, D] for all pictures of a batch, or
            [B, R, D] for each its own.
        finder: pictures to faces (`FaceEncoder.find`); None where a mask says where they are.
        mask: [B or 1, H, W] in 0..1, any size: nothing outside changes at a step. Without a
            finder every separate area of it is a face, from left to right as the references are.
    """

    def __init__(
        self,
        decoder: Decoder,
        network: Faces,
        references: Tensor,
        settings: GuidanceSettings = GuidanceSettings(),
        finder: Finder | None = None,
        mask: Tensor | None = None,
    ) -> None:
        if finder is None and mask is None:
            raise DiffLoRAError(
                "Guidance does not know where the face is.",
                hint="Connect a face encoder, which finds it, or a mask that covers it.",
            )
        self.decoder = decoder
        self.network = _usable(network)
        self.size = network.size
        self.settings = settings
        self.log: list[GuideStep] = []
        self.strips: list[NDArray[np.uint8]] = []
        """Aligned faces of each step before it was taken, uint8 [N, size, size, 3]."""
        self._finder = finder
        with torch.inference_mode(False):
            self._references = _unit_rows(references)
            self._mask = None if mask is None else mask.detach().clone().float()
        self._tracker: Tracker | None = None
        self._before = 0.0
        self._looks = 0

    def guide(self, x0: Tensor, direction: Tensor | None, cfg: float, sigma: float) -> Tensor:
        """The estimate after guidance, of the same dtype; `x0` itself where nothing is to do.

        Args:
            x0: the sampler's estimate after classifier-free guidance, [B, C, h, w].
            direction: conditional minus unconditional estimate, or None.
            cfg: scale of classifier-free guidance.
            sigma: noise level of the step.
        """
        lasting = self._lasts(sigma)
        if not self.acts(sigma):
            return x0
        # autograd refuses tensors that were made in inference mode, copies made here are not
        with torch.inference_mode(False), torch.enable_grad():
            kept = x0.detach().clone()
            estimate = kept.float()
            plans = self.plans(estimate, direction, cfg, sigma)
            guided = self._descend(estimate, plans, sigma, lasting)
            if not plans:
                return x0
            return torch.where(guided != estimate, guided.to(kept.dtype), kept)

    def plans(
        self, estimate: Tensor, direction: Tensor | None, cfg: float, sigma: float
    ) -> list[Plan]:
        """Faces, windows, masks and lengths of a step; none where there is nothing to guide.

        Faces of like size are together, up to a picture's worth of them: a small face in the window
        of a large one would cost as much as that.
        """
        pull = None if direction is None else direction.detach().clone().float()
        faces = self._locate(estimate, sigma)
        size, upscale = (estimate.shape[-2], estimate.shape[-1]), self.decoder.upscale
        boxes = crop_boxes(faces.landmarks)
        masks = self._face_masks(faces, boxes, size)
        seen = masks.flatten(1).amax(1) > 0
        faces, boxes, masks = faces.of(seen.cpu()), boxes[seen], masks[seen]
        plans = []
        for rows in alike(boxes, AT_ONCE, upscale**2 * size[0] * size[1]):
            few, here = faces.of(rows), boxes[rows]
            windows = face_windows(few.picture, here, size, upscale, self.settings.margin)
            inside = replace(windows, picture=torch.arange(len(few))).cut(masks[rows][:, None])
            length = unit_length(windows, inside, estimate, pull, cfg, sigma)
            length = self.settings.strength * length
            plans.append(Plan(rows, few, windows, windows.part(here, upscale), inside, length))
        return plans

    def turns(self, count: int) -> range:
        """The numbers of the next looks, each of which sees the faces a little otherwise."""
        self._looks += count
        return range(self._looks - count, self._looks)

    def look(self, latents: Tensor, plan: Plan, turn: int) -> Look:
        """At a plan's windows [N, C, h, w]; differentiable."""
        plan, mirrored = self._view(plan, turn)
        pictures = self.decoder(latents, plan.part)
        points = plan.windows.shifted(plan.faces.landmarks, self.decoder.upscale)
        crops = align(pictures, points, self.size)
        own = plan.faces.picture if len(self._references) > 1 else plan.faces.picture * 0
        # of the person only an embedding is known, so the face loss compares that
        wanted = FaceActivations((), self._references[own, plan.faces.reference])
        return Look(
            face_distance(self.network(crops.flip(-1) if mirrored else crops), wanted), crops
        )

    def note(self, sigma: float, plans: Sequence[Plan], looks: Sequence[Look]) -> None:
        """Add a step to the log and its faces to the strips."""
        said = [self._tracker.note if self._tracker else "", *(look.note for look in looks)]
        if not plans:
            nothing = GuideStep(sigma, float("nan"), float("nan"), 0, said[0] or "no face to guide")
            self.log.append(nothing)
            return
        values = torch.cat([look.loss for look in looks]).detach().float()
        mean = float(values[values.isfinite()].mean())
        self.log.append(
            GuideStep(sigma, mean, 1 - mean, len(values), "; ".join(note for note in said if note))
        )
        order = torch.cat([plan.rows for plan in plans]).argsort()
        crops = torch.cat([look.crops for look in looks]).detach().float().cpu()[order]
        levels = (crops.nan_to_num().clamp(0, 1) * 255).round().byte()
        self.strips.append(rearrange(levels, "n c h w -> n h w c").numpy())

    def acts(self, sigma: float) -> bool:
        """Whether a step at this noise level can change anything."""
        if self.settings.strength == 0 or sigma not in self.settings.window:
            return False
        return self._mask is None or bool((self._mask > 0).any())

    def _view(self, plan: Plan, turn: int) -> tuple[Plan, bool]:
        """The plan with jittered landmarks, and whether the network sees faces mirrored."""
        if not self.settings.jitter:
            return plan, False
        return jittered(plan, self.settings.jitter, turn), turn % 2 == 1

    def _descend(
        self, estimate: Tensor, plans: Sequence[Plan], sigma: float, lasting: float
    ) -> Tensor:
        turns = self.turns(self.settings.iterations) if plans else range(0)
        steps = [self._step(estimate, plan, lasting, turns) for plan in plans]
        self.note(sigma, plans, [look for _, look in steps])
        for plan, (step, _) in zip(plans, steps, strict=True):
            estimate = plan.windows.add_back(estimate, step)
        return estimate

    def _step(
        self, estimate: Tensor, plan: Plan, lasting: float, turns: Sequence[int]
    ) -> tuple[Tensor, Look]:
        """What is added to a plan's windows, and what the first look saw."""
        total, looks = torch.zeros_like(plan.windows.cut(estimate)), []
        for turn in turns:
            # where the picture will be once the sampler has gone its part of the way: a gradient
            # at the end of the whole step would correct an error that is never made
            reached = plan.windows.add_back(estimate, lasting * total)
            gradient, look = self._gradient(plan.windows.cut(reached), plan, turn)
            step, note = scaled_step(gradient, plan, len(turns))
            looks.append(replace(look, note=note))
            total = total + step
        return total, looks[0]

    def _gradient(self, latents: Tensor, plan: Plan, turn: int) -> tuple[Tensor, Look]:
        leaf = latents.detach().requires_grad_(True)
        look = self.look(leaf, plan, turn)
        gradient = torch.autograd.grad(look.loss.sum(), leaf)[0]
        seen = Look(look.loss.detach(), look.crops.detach())
        return smoothed(gradient, plan, self.settings.smoothing), seen

    def _lasts(self, sigma: float) -> float:
        """The share of a change of x_0 that first-order samplers take over: 1 - next / sigma.

        The next noise level is not known; schedules change their pace slowly, so it is taken from
        the one before.
        """
        before, self._before = self._before, sigma
        return 1 - sigma / before if before > sigma > 0 else LASTING

    def _locate(self, estimate: Tensor, sigma: float) -> FaceRows:
        upscale = self.decoder.upscale
        if self._tracker is None:
            shape = (estimate.shape[-2] * upscale, estimate.shape[-1] * upscale)
            mask = self._mask
            if mask is not None:
                mask = F.interpolate(mask[:, None], shape, mode="area")[:, 0].to(estimate.device)
            self._references = self._references.to(estimate.device)
            self._tracker = Tracker(
                self._finder, self._embed, self._references, mask, self.settings.when_lost
            )

        def decode(number: int, near: Tensor | None) -> Tensor:
            one = estimate[number : number + 1]
            if near is None:
                return decode_in_tiles(self.decoder, one)[0]
            return decode_around(self.decoder, one, near)[0]

        return self._tracker.locate(len(estimate), decode, len(self.log), sigma)

    def _embed(self, pictures: Tensor, landmarks: Tensor) -> Tensor:
        with torch.no_grad():
            return self.network(align(pictures, landmarks, self.size)).embedding

    def _face_masks(self, faces: FaceRows, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        """[N, h, w]: the face's crop, within the user's mask."""
        masks = box_masks(boxes, size, self.decoder.upscale)
        if self._mask is None:
            return masks
        allowed = latent_masks(self._mask.to(masks), size)
        own = faces.picture if len(allowed) > 1 else faces.picture * 0
        return masks * allowed[own]


def _unit_rows(references: Tensor) -> Tensor:
    """[R, D] or [B, R, D] -> [B or 1, R, D] of length 1."""
    rows = F.normalize(references.detach().clone().float(), dim=-1)
    if rows.dim() not in (2, 3) or not rows.isfinite().all():
        raise DiffLoRAError(f"The references for guidance are not embeddings: {tuple(rows.shape)}.")
    return rows if rows.dim() == 3 else rows[None]


def _usable(network: Any) -> Any:
    """The network on private weights where its own were loaded in inference mode."""
    if isinstance(network, nn.Module) and any(p.is_inference() for p in network.parameters()):
        return frozen_clone(network)
    return network
