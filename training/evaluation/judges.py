"""The networks that look at pictures for the measures, and those that predictors see through.

Faces are measured by a recogniser of its own (other architecture, seed and pictures than the one
that conditions, but the same people and the same teachers: the identity factors), and prompts,
pictures and variety by networks that no painter was trained with.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from difflora_core.encode import encode_photos
from difflora_core.errors import NoFaceFound
from difflora_core.face import Face, FaceEncoder, choose_face
from difflora_core.features import Features
from difflora_core.image_encoder import ImageEncoder
from difflora_core.photos import Pixels
from difflora_core.recogniser import Recogniser
from training.artifacts import artifact
from training.config import Config
from training.encoders.attributes_net import PortraitNet
from training.encoders.face_pack import open_face_encoder

logger = logging.getLogger(__name__)

NETWORKS = ("metric_recogniser", "image_encoder", "attribute_heads", "self_supervised")
"""Artifacts that judge, beside the face pack."""
CHUNK = 256
"""Pictures looked at together."""


@dataclass(frozen=True)
class Looks:
    """What the judges see in N pictures, on the CPU."""

    face: Tensor
    """Unit embeddings of the metric recogniser [N, D]; zeros without a face."""
    found: Tensor
    """[N] bool: whether a face was found."""
    self_supervised: Tensor
    """[N, D]"""
    attributes: Tensor
    """Features under the attribute heads, [N, D]."""
    clip: Tensor
    """Unit embeddings of the image-text model [N, D]."""
    logits: dict[str, Tensor]
    """Attribute -> [N, values]."""


@dataclass(frozen=True)
class Judges:
    """All networks, frozen; those in torch on one device."""

    face_encoder: FaceEncoder
    metric: Recogniser
    image_encoder: ImageEncoder
    attributes: PortraitNet
    self_supervised: PortraitNet
    device: torch.device

    @classmethod
    def open(cls, config: Config) -> Judges:
        """From the artifacts of a run, or the shipped weights. Errors: MissingArtifact."""
        device = config.run.torch_device()
        return cls(
            open_face_encoder(config),
            Recogniser.open(artifact(config, "metric_recogniser")).to(device),
            ImageEncoder.open(artifact(config, "image_encoder")).to(device),
            PortraitNet.open(artifact(config, "attribute_heads")).to(device),
            PortraitNet.open(artifact(config, "self_supervised")).to(device),
            device,
        )

    def look(self, pictures: Tensor, landmarks: Tensor | None = None) -> Looks:
        """Look at pictures [N, 3, H, W] in 0..1; landmarks [N, 5, 2] where they are known."""
        if landmarks is None:
            landmarks, found = self.find_faces(pictures)
        else:
            found = torch.ones(len(pictures), dtype=torch.bool)
        face = self.embed_faces(pictures, landmarks) * found[:, None]
        return self._look(pictures, face, found)

    def look_past_faces(self, pictures: Tensor) -> Looks:
        """The same without looking for faces; `found` is False everywhere."""
        nowhere = torch.zeros(len(pictures), dtype=torch.bool)
        return self._look(pictures, torch.zeros(len(pictures), 1), nowhere)

    def attribute_logits(self, pictures: Tensor) -> dict[str, Tensor]:
        """Attribute -> [N, values] for pictures [N, 3, H, W] in 0..1."""
        outputs = _in_chunks(self._attributes, pictures, self.device)
        return {name: logits for name, logits in outputs.items() if name != "features"}

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Unit embeddings of prompts [N, D] by the image-text model."""
        unique = list(dict.fromkeys(prompts))
        rows = torch.cat([self.image_encoder.encode_text(unique[i : i + CHUNK]).cpu()
                          for i in range(0, len(unique), CHUNK)])  # fmt: skip
        place = {prompt: i for i, prompt in enumerate(unique)}
        return rows[[place[prompt] for prompt in prompts]]

    def find_faces(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Landmarks [N, 5, 2] of the largest face of each picture, and whether there is one [N]."""
        faces = self._largest_faces(pictures)
        points = [torch.zeros(5, 2) if f is None else torch.from_numpy(f.landmarks) for f in faces]
        return torch.stack(points), torch.tensor([f is not None for f in faces])

    def features(self, photo: Pixels, whose: str = "of a person") -> Features:
        """What a predictor sees of a photo; without a face in it, of the photo alone."""
        try:
            return encode_photos([photo], self.face_encoder, self.image_encoder)
        except NoFaceFound:
            logger.warning("no face was found in the photo %s", whose)
            return encode_photos([photo], None, self.image_encoder)

    def condition_faces(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Unit embeddings [N, D] by the face pack's recogniser, and whether there is a face."""
        faces = self._largest_faces(pictures)
        width = next((len(f.embedding) for f in faces if f is not None), 1)
        rows = [
            torch.zeros(width) if f is None else torch.from_numpy(f.unit_embedding) for f in faces
        ]
        return torch.stack(rows), torch.tensor([f is not None for f in faces])

    @torch.no_grad()
    def embed_faces(self, pictures: Tensor, landmarks: Tensor) -> Tensor:
        """Unit embeddings [N, D] of the metric recogniser."""
        parts = zip(pictures.split(CHUNK), landmarks.split(CHUNK), strict=True)
        rows = [self.metric.embed(p.to(self.device), m.to(self.device)).cpu() for p, m in parts]
        return torch.cat(rows).nan_to_num()

    def _largest_faces(self, pictures: Tensor) -> list[Face | None]:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as workers:
            return list(workers.map(self._largest_face, pictures))

    def _largest_face(self, picture: Tensor) -> Face | None:
        try:
            return choose_face(self.face_encoder.faces(to_pixels(picture)))
        except NoFaceFound:
            return None

    def _look(self, pictures: Tensor, face: Tensor, found: Tensor) -> Looks:
        outputs = _in_chunks(self._attributes, pictures, self.device)
        return Looks(
            face=face,
            found=found,
            self_supervised=_in_chunks(self._self_supervised, pictures, self.device)["features"],
            attributes=outputs.pop("features"),
            clip=_in_chunks(self._clip, pictures, self.device)["embedding"],
            logits=outputs,
        )

    def _attributes(self, pictures: Tensor) -> dict[str, Tensor]:
        features = self.attributes.features(pictures)
        heads = {name: head(features) for name, head in self.attributes.heads.items()}
        return heads | {"features": features}

    def _self_supervised(self, pictures: Tensor) -> dict[str, Tensor]:
        return {"features": self.self_supervised.features(pictures)}

    def _clip(self, pictures: Tensor) -> dict[str, Tensor]:
        return {"embedding": functional.normalize(self.image_encoder.encode(pictures)[0], dim=-1)}


def to_pixels(picture: Tensor) -> Pixels:
    """[3, H, W] in 0..1 -> uint8 [H, W, 3]."""
    levels = (picture.detach().float().clamp(0, 1) * 255).round().byte().cpu()
    return rearrange(levels, "c h w -> h w c").contiguous().numpy()


@torch.no_grad()
def _in_chunks(
    look: Callable[[Tensor], dict[str, Tensor]], pictures: Tensor, device: torch.device
) -> dict[str, Tensor]:
    parts = [look(chunk.to(device)) for chunk in pictures.split(CHUNK)]
    return {name: torch.cat([part[name].float().cpu() for part in parts]) for name in parts[0]}
