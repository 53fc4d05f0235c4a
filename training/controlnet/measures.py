"""What repainted and freshly painted pictures are measured by, each value per picture [N].

Repainted pictures (see repaint.py) are compared with the true ones: every true face that the
detector finds in the true picture is looked for in the painted one, and matched by place.

face_sim        cosine of both faces in the metric recogniser, both cut out by the points that
                the detector finds; 0 where it finds none
landmark_error  mean distance of the five points that the detector finds in both, in face widths,
                at most LOST, which stands for a face that was not found. (Drawn faces have true
                points, but the detector is 0.06 of a width off them even in true pictures.)
faces_found     share of the true faces found again
body_distance   distance of a self-supervised network's maps inside the masks of people, 0..2
identity        cosine of the identity factors read off the picture and the true ones, and
expression, prompt_accuracy: of the attribute heads; these three on portraits of one person

No network here was looked at in training. Pictures painted from noise have no true picture: fid,
clip_t, prompt_accuracy and expression are measured, and faces_found against the prompt's number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from difflora_core.face import Face
from difflora_core.mask_aware.losses import landmark_distance, masked_distance
from difflora_core.mask_aware.pairing import assign

from ..evaluation.judges import Judges, to_pixels
from ..evaluation.metrics import prompt_accuracy, text_similarity
from ..guidance.factors import FactorReader
from ..portraits import ATTRIBUTES
from .trial import ControlTrial

LOST = 0.5
"""Landmark error of a face that was not found, in face widths."""
NEAR = 0.75
"""Farthest that the middle of a found face lies from its true one, in face widths."""
CHUNK = 64

Values = dict[str, Tensor]
"""Measure -> one value per picture, NaN where it does not apply."""


@dataclass(frozen=True)
class FoundFaces:
    """The faces of N pictures by the place of the true ones, [N, P]."""

    seen: Tensor
    """[N, P] bool"""
    landmarks: Tensor
    """[N, P, 5, 2] in pixels; NaN where unseen."""
    counts: Tensor
    """[N]: all faces of a picture, wherever they are."""


@dataclass(frozen=True)
class Ruler:
    """Judges, and what they see in the true pictures; made once for all rows."""

    judges: Judges
    trial: ControlTrial
    true: FoundFaces
    true_faces: Tensor
    """Embeddings of the true faces [N, P, D]."""
    texts: Tensor
    """Of the prompts [N, D]."""
    factors: FactorReader

    @classmethod
    def make(cls, judges: Judges, trial: ControlTrial, factors: FactorReader) -> Ruler:
        """Look at the true pictures."""
        images = trial.drawn.images
        true = find_faces(judges, images, trial)
        faces = embed(judges, images, true.landmarks)
        return cls(judges, trial, true, faces, judges.texts(trial.prompts), factors)

    def repainted(self, pictures: Tensor) -> Values:
        """Measures of repainted pictures [N, 3, H, W] in 0..1."""
        found = find_faces(self.judges, pictures, self.trial)
        there = self.true.seen & found.seen
        cosines = (embed(self.judges, pictures, found.landmarks) * self.true_faces).sum(-1)
        boxes = self.trial.drawn.boxes.cpu()
        widths = boxes[..., 2] - boxes[..., 0]
        ours, theirs = (faces.landmarks.flatten(0, 1) for faces in (found, self.true))
        errors = landmark_distance(ours, theirs, widths.flatten()).view_as(widths).clamp(max=LOST)
        return {
            "face_sim": self._per_picture(torch.where(there, cosines, 0.0)),
            "landmark_error": self._per_picture(torch.where(there, errors, LOST)),
            "faces_found": self._per_picture(there.float()),
            "body_distance": body_distance(self.judges, pictures, self.trial),
            **self.attributes(pictures),
        }

    def fresh(self, pictures: Tensor) -> Values:
        """Measures of pictures painted from noise [N, 3, H, W] in 0..1."""
        looks = self.judges.look_past_faces(pictures)
        expected = self.trial.drawn.present.sum(1).cpu()
        counts = count_faces(self.judges, pictures).minimum(expected)
        attributes = self.attributes(pictures)
        return {
            "clip_t": text_similarity(looks.clip, self.texts),
            "prompt_accuracy": attributes["prompt_accuracy"],
            "expression": attributes["expression"],
            "faces_found": counts / expected,
        }

    def attributes(self, pictures: Tensor) -> Values:
        """What the attribute heads say of portraits; NaN for groups."""
        alone = slice(self.trial.portraits)
        logits = self.judges.attribute_logits(pictures[alone])
        wanted = self.trial.drawn.attributes["expression"][alone].cpu()
        identity = self.trial.drawn.identity[alone, 0].cpu()
        values = {
            "expression": (logits["expression"].argmax(-1) == wanted).float(),
            "identity": self.factors.likeness(pictures[alone, None], identity)[:, 0],
            "prompt_accuracy": prompt_accuracy(_known(logits), self.trial.wanted),
        }
        rest = torch.full((len(self.trial) - self.trial.portraits,), torch.nan)
        return {name: torch.cat([value, rest]) for name, value in values.items()}

    def _per_picture(self, values: Tensor) -> Tensor:
        """Means [N] over the true faces of [N, P]; NaN for a picture without any."""
        return torch.where(self.true.seen, values, torch.nan).nanmean(1)


def find_faces(judges: Judges, pictures: Tensor, trial: ControlTrial) -> FoundFaces:
    """Detect faces and give each the nearest true one, by exact assignment."""
    boxes = trial.drawn.boxes.cpu()
    seen = torch.zeros(boxes.shape[:2], dtype=torch.bool)
    landmarks = torch.full((*boxes.shape[:2], 5, 2), torch.nan)
    counts = torch.zeros(len(boxes))
    for i, picture in enumerate(pictures):
        faces = judges.face_encoder.faces(to_pixels(picture))
        counts[i] = len(faces)
        for place, face in match(boxes[i], faces):
            seen[i, place] = True
            landmarks[i, place] = torch.from_numpy(faces[face].landmarks)
    return FoundFaces(seen, landmarks, counts)


def count_faces(judges: Judges, pictures: Tensor) -> Tensor:
    """Faces in each picture [N]."""
    counts = [len(judges.face_encoder.faces(to_pixels(picture))) for picture in pictures]
    return torch.tensor(counts)


def match(boxes: Tensor, faces: Sequence[Face]) -> list[tuple[int, int]]:
    """Pairs (true, found) of faces whose middles are near; boxes [P, 4], NaN for nobody."""
    present = boxes.isfinite().all(1).nonzero()[:, 0]
    if not len(present) or not faces:
        return []
    true = boxes[present]
    middles = (true[:, :2] + true[:, 2:]) / 2
    found = torch.from_numpy(np.array([face.centre for face in faces], np.float32))
    away = torch.cdist(middles, found) / (true[:, 2] - true[:, 0])[:, None]
    pairs = [(row, column) for row, column in assign(away) if away[row, column] <= NEAR]
    return [(int(present[row]), column) for row, column in pairs]


def embed(judges: Judges, pictures: Tensor, landmarks: Tensor) -> Tensor:
    """Unit embeddings [N, P, D] of faces with landmarks [N, P, 5, 2]; zeros for NaN."""
    known = landmarks.isfinite().all((2, 3))
    which = known.nonzero()[:, 0]
    faces = judges.embed_faces(pictures.cpu()[which], landmarks[known])
    rows = faces.new_zeros(*known.shape, faces.shape[-1])
    rows[known] = faces
    return rows


@torch.no_grad()
def body_distance(judges: Judges, pictures: Tensor, trial: ControlTrial) -> Tensor:
    """Distance [N] to the true pictures inside people's masks, 0..2."""
    parts, net, device = [], judges.self_supervised, judges.device
    for rows in torch.arange(len(trial)).split(CHUNK):
        images = (pictures[rows], trial.drawn.images[rows.to(trial.drawn.images.device)])
        ours, theirs = (_maps(net.stages, image.to(device)) for image in images)
        masks = trial.drawn.masks[rows.to(trial.drawn.masks.device)].to(device)
        parts.append(masked_distance(ours, theirs, masks).cpu())
    return torch.cat(parts)


def _maps(stages: torch.nn.Module, images: Tensor) -> list[Tensor]:
    maps, x = [], images * 2 - 1
    for stage in stages.children():
        x = stage(x)
        maps.append(x)
    return maps


def _known(logits: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: values for name, values in logits.items() if name in ATTRIBUTES}
