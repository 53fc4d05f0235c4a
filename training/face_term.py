"""How far faces of estimated pictures are from those of the real ones, in a recogniser's eyes.

The truth is known in training, so both faces are cut out by the same landmarks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from difflora_core.mask_aware.crops import MARGIN, alike, crop_boxes, face_windows
from difflora_core.mask_aware.losses import Term, face_distance
from difflora_core.mask_aware.networks import FaceActivations, FaceNetwork
from difflora_core.mask_aware.pairing import FlatFaces

from .base.picture_decoder import PictureDecoder


@dataclass(frozen=True)
class FaceTerm:
    """The face term of the mask-aware loss, on latents or on pictures already decoded."""

    decoder: PictureDecoder
    network: FaceNetwork
    tap_weights: Sequence[float] = ()
    """Of the network's stages, shallow to deep; empty: alike, 1 together."""
    embedding_weight: float = 1.0
    """Of the embedding beside them."""

    def of_latents(self, ours: Tensor, theirs: Tensor, faces: FlatFaces) -> Term:
        """Scaled latents [B, 4, h, w] twice -> [B]; gradients reach `ours`.

        Only windows around the faces are decoded, of both in the same way, and faces of like size
        together: a small one in the window of a large one would cost as much as that.
        """
        if not len(faces):
            nothing = ours.new_zeros(len(ours))
            return Term(nothing, nothing > 0)
        groups = alike(crop_boxes(faces.landmarks), len(faces))
        parts = [self._in_windows(ours, theirs, faces.rows(rows)) for rows in groups]
        return faces.per_picture(torch.cat(parts)[torch.cat(groups).argsort()])

    def _in_windows(self, ours: Tensor, theirs: Tensor, faces: FlatFaces) -> Tensor:
        """Distances [N] of faces, each seen in a window of the latents."""
        size, upscale = (ours.shape[-2], ours.shape[-1]), self.decoder.upscale
        boxes = crop_boxes(faces.landmarks)
        windows = face_windows(faces.picture, boxes, size, upscale, MARGIN)
        moved = replace(
            faces,
            picture=torch.arange(len(faces)),
            landmarks=windows.shifted(faces.landmarks, upscale),
        )
        estimate = self.decoder(windows.cut(ours)).pictures
        with torch.no_grad():
            truth = self.decoder(windows.cut(theirs)).pictures
        return self._distance(moved.crops(estimate), moved.crops(truth))

    def of_pictures(self, ours: Tensor, theirs: Tensor, faces: FlatFaces) -> Term:
        """Pictures [B, 3, H, W] in 0..1 twice -> [B]."""
        return faces.per_picture(self._distance(faces.crops(ours), faces.crops(theirs)))

    def _distance(self, ours: Tensor, theirs: Tensor) -> Tensor:
        with torch.no_grad():
            wanted: FaceActivations = self.network(theirs)
        taps = self.tap_weights or None
        return face_distance(self.network(ours), wanted, taps, self.embedding_weight)
