"""The loss of a step: the diffusion loss, and for t < T what faces, bodies and landmarks say.

L = E_t [ l1 * L_body + l2 * L_face + (1 - l1 - l2) * L_LDM ] for t < T, L_LDM above (Gupta, Hebbar
and Mohta, 2023). With uniform t the terms would act on T / 1000 of the samples; here samples below
T are drawn more often and count less, so that the expected loss is the same and less noisy.
Ours differs from the authors' code in what was wrong there: see difflora_core/mask_aware/losses.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from difflora_core.errors import BadConfig
from difflora_core.mask_aware.landmarks import LandmarkNetwork
from difflora_core.mask_aware.losses import (
    PRESETS,
    Preset,
    Term,
    TermName,
    Weights,
    combine,
    landmark_distance,
    masked_distance,
    mean_inside,
)
from difflora_core.mask_aware.networks import FaceNetwork
from difflora_core.mask_aware.pairing import FlatFaces
from difflora_core.mask_aware.perceptual import Lpips

from ..base.noise import STEPS, NoiseSchedule
from ..base.painter import denoised
from ..base.picture_decoder import Decoded, PictureDecoder
from ..face_term import FaceTerm
from .batches import PeopleBatch
from .config import ControlnetConfig, ObjectiveConfig

AUTHORS = {"paper": "default", "second": "second", "logged": "logged", "script": "script"}
"""Variants that are settings of the authors, and their presets."""
CHANGEABLE: Mapping[str, type] = {
    "body": float, "face": float, "landmark": float, "last": int, "share": float, "min_snr": float,
}  # fmt: skip
"""Keys of the objective that the name of a variant can change."""


def draw_steps(
    count: int, objective: ObjectiveConfig, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Timesteps t [B] int64 and the weights [B] that make their mean that of uniform t."""
    place, last = torch.rand(count, device=device), objective.last
    natural, share = last / STEPS, objective.share
    if share <= natural:  # more often is what they are for, and below T = 1000 lies everything
        return (place * STEPS).long(), torch.ones(count, device=device)
    low = torch.rand(count, device=device) < share
    below, above = place * last, last + place * (STEPS - last)
    weights = torch.where(low, natural / share, (1 - natural) / (1 - share))
    return torch.where(low, below, above).long().clamp(max=STEPS - 1), weights


@dataclass(frozen=True)
class MaskAware:
    """The terms of faces, bodies and landmarks; for a baseline all weights are 0."""

    objective: ObjectiveConfig
    decoder: PictureDecoder
    network: FaceNetwork | None
    """None where no objective has the face term and none was given that knows the pictures."""
    landmarks: LandmarkNetwork | None
    """None where no objective has the landmark term."""
    lpips: Lpips | None
    """Measures bodies instead of the decoder's maps."""
    schedule: NoiseSchedule

    @property
    def faces(self) -> FaceTerm:
        """The face term with this objective's weights."""
        objective = self.objective
        assert self.network is not None  # opened where an objective has this term
        return FaceTerm(
            self.decoder, self.network, objective.tap_weights, objective.embedding_weight
        )

    @property
    def weights(self) -> Weights:
        return _weights(self.objective)

    def losses(
        self, batch: PeopleBatch, noisy: Tensor, predicted: Tensor, noise: Tensor, t: Tensor,
        weight: Tensor,
    ) -> dict[str, Tensor]:  # fmt: skip
        """The loss, and for the log the plain epsilon loss and the terms where they are present.

        noisy, predicted, noise [B, 4, h, w]; t [B]; weight [B] of the samples.
        """
        plain = self.schedule.loss(predicted, noise, t)
        ldm = plain * self.schedule.min_snr_weight(t, self.objective.min_snr)
        terms = self.terms(batch, noisy, predicted, t)
        total = (weight * combine(ldm, terms, self.weights)).mean()
        shown = {name: _mean_present(term) for name, term in terms.items()}
        return {"loss": total, "epsilon": (weight * plain).mean(), **shown}

    def terms(
        self, batch: PeopleBatch, noisy: Tensor, predicted: Tensor, t: Tensor
    ) -> dict[TermName, Term]:
        """The terms [B] of the pictures with t < T; absent for the others."""
        wanted = sum(vars(self.weights).values()) > 0
        index = (t < self.objective.last).nonzero()[:, 0] if wanted else t[:0]
        if not len(index):
            return {}
        kept = self.schedule.alpha[t[index]][:, None, None, None]
        x0 = denoised(noisy[index], predicted[index].float(), kept)
        few = self.compare(batch.rows(index), x0)
        return {name: _spread(term, index, len(batch)) for name, term in few.items()}

    def compare(self, batch: PeopleBatch, x0: Tensor) -> dict[TermName, Term]:
        """Terms [B] of estimates x0 (scaled latents) against the batch's own pictures."""
        faces, weights = batch.faces(), self.weights
        if not weights.body and not weights.landmark:
            return {"face": self.faces.of_latents(x0, batch.latents, faces)}
        ours = self.decoder(x0)
        with torch.no_grad():
            theirs = self.decoder(batch.latents)
        terms: dict[TermName, Term] = {}
        if weights.body:
            present = batch.masks.amax((1, 2, 3)) > 0
            terms["body"] = Term(self._bodies(ours, theirs, batch.masks), present)
        if weights.face:
            terms["face"] = self.faces.of_pictures(ours.pictures, theirs.pictures, faces)
        if weights.landmark:
            terms["landmark"] = self._landmarks(ours.pictures, theirs.pictures, faces)
        return terms

    def _landmarks(self, ours: Tensor, theirs: Tensor, faces: FlatFaces) -> Term:
        """Where the network reads the points of both, so that its own errors cancel."""
        assert self.landmarks is not None  # opened where an objective has this term
        with torch.no_grad():
            wanted = self.landmarks(theirs, faces)
        widths = faces.widths.to(ours.device)
        return faces.per_picture(landmark_distance(self.landmarks(ours, faces), wanted, widths))

    def _bodies(self, ours: Decoded, theirs: Decoded, masks: Tensor) -> Tensor:
        per_person = self.objective.per_person
        if self.lpips is None:
            return masked_distance(ours.maps, theirs.maps, masks, per_person)
        return mean_inside(self.lpips(ours.pictures, theirs.pictures), masks, per_person)


def objectives_of(settings: ControlnetConfig) -> dict[str, ObjectiveConfig]:
    """Variant -> its objective. Errors: BadConfig."""
    return {name: objective_of(name, settings.objective) for name in settings.variants}


def objective_of(variant: str, own: ObjectiveConfig) -> ObjectiveConfig:
    """The objective of a variant: a name, or changes "key=value key=value" of `own`.

    Errors: BadConfig.
    """
    if variant == "baseline":
        return checked(replace(own, body=0.0, face=0.0, landmark=0.0))
    if variant in AUTHORS:
        return _authors(own, PRESETS[AUTHORS[variant]])
    if variant == "mask_aware":
        return checked(own)
    changes = {}
    for word in variant.split() or [""]:
        key, _, text = word.partition("=")
        try:
            changes[key] = CHANGEABLE[key](text)
        except (KeyError, ValueError) as error:
            raise BadConfig(
                f"controlnet.variants has {variant!r}, of which {word!r} cannot be understood.",
                hint=f"Expected baseline, mask_aware, {', '.join(AUTHORS)}, or changes of "
                f"{', '.join(CHANGEABLE)}.",
            ) from error
    return checked(replace(own, **changes))


def checked(objective: ObjectiveConfig) -> ObjectiveConfig:
    """The same objective. Errors: BadConfig for impossible values."""
    _weights(objective)
    if not 0 <= objective.min_snr < float("inf"):
        raise BadConfig(
            f"controlnet.objective.min_snr is {objective.min_snr}; expected 0 for none, or more."
        )
    if not 0 <= objective.share < 1 or not 0 < objective.last <= STEPS:
        raise BadConfig(
            f"controlnet.objective.share is {objective.share} and last {objective.last}; "
            f"expected 0 to below 1, and 1 to {STEPS}."
        )
    return objective


def _authors(own: ObjectiveConfig, preset: Preset) -> ObjectiveConfig:
    """As the authors trained: their weights and T, uniform timesteps, no weight by noise, one mask
    of all people, and of the face network its stages only."""
    return replace(
        own,
        face=preset.weights.face,
        body=preset.weights.body,
        landmark=preset.weights.landmark,
        last=preset.last_step,
        share=0.0,
        min_snr=0.0,
        per_person=False,
        embedding_weight=0.0,
    )


def _weights(objective: ObjectiveConfig) -> Weights:
    return Weights(objective.face, objective.body, objective.landmark)


def _spread(term: Term, index: Tensor, count: int) -> Term:
    """A term of some of `count` pictures as one of all of them."""
    value = term.value.new_zeros(count).index_copy(0, index, term.value)
    present = torch.zeros(count, dtype=torch.bool, device=index.device)
    return Term(value, present.index_copy(0, index, term.present.to(index.device)))


def _mean_present(term: Term) -> Tensor:
    """The mean where the term is present, 0 where it is nowhere."""
    return (term.value * term.present).sum() / term.present.sum().clamp_min(1)
