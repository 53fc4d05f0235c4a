"""Photos of drawn people and their embeddings: what a predictor is conditioned on in training.

In use, landmarks come from a detector; here from the ground truth, moved about as a detector errs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from difflora_core.image_encoder import ImageEncoder
from difflora_core.recogniser import Recogniser

from .. import parallel
from ..artifacts import artifact
from ..config import Config
from ..portraits import Scene, render, sample_scenes

#: standard deviation of a detector's landmark error, in pixels of a 128 px picture
LANDMARK_ERROR = 0.7
_CHUNK = 1024


@dataclass(frozen=True)
class Embeddings:
    """Of N people with J photos each: face [N, J, Ef], image [N, J, Ei], unit length."""

    face: Tensor
    image: Tensor

    def pick(self, people: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """One random photo of each person [B]: face [B, Ef], image [B, Ei]."""
        photos = self.face.shape[1]
        j = torch.randint(photos, people.shape, generator=generator, device=people.device)
        return self.face[people, j], self.image[people, j]


class PhotoEncoders:
    """The conditioning recogniser and the image encoder, frozen, on one device."""

    def __init__(self, config: Config) -> None:
        self.device = config.run.torch_device()
        self.recogniser = Recogniser.open(artifact(config, "recogniser")).to(self.device)
        self.image_encoder = ImageEncoder.open(artifact(config, "image_encoder")).to(self.device)

    @property
    def widths(self) -> tuple[int, int]:
        """Lengths of face and image embeddings."""
        return self.recogniser.config.network.embedding, self.image_encoder.config.model[
            "embed_dim"
        ]

    @torch.no_grad()
    def embed(self, scene: Scene, error: Tensor) -> tuple[Tensor, Tensor]:
        """Face and image embeddings of the first person of each picture, on the cpu.

        `error` [B, 5, 2]: by how much landmarks are off, in pixels.
        """
        drawn = render(scene.to(self.device))
        points = drawn.landmarks[:, 0] + error.to(self.device)
        face = self.recogniser.embed(drawn.images, points)
        return face.cpu(), self.image_encoder.encode(drawn.images)[0].cpu()

    def embed_people(
        self, identity: Tensor, photos: int, seed: int, together: bool = False
    ) -> Embeddings:
        """`photos` random photos of each person, identity [N, 20].

        `together`: every process calls this, embeds its share of the photos and gets all.
        """
        generator = torch.Generator().manual_seed(seed)
        groups = identity.cpu().split(max(1, _CHUNK // photos))
        drafts = [_draft(few.repeat_interleave(photos, 0), generator) for few in groups]
        share = parallel.share() if together else slice(None)
        parts = [self.embed(*draft) for draft in drafts[share]]
        if together:
            parts = parallel.exchange(parts, len(drafts))
        face, image = (torch.cat(part).to(self.device) for part in zip(*parts, strict=True))
        return Embeddings(*(rows.view(len(identity), photos, -1) for rows in (face, image)))


def _draft(identity: Tensor, generator: torch.Generator) -> tuple[Scene, Tensor]:
    """A photo of each person that is not drawn yet, and its landmarks' errors."""
    scene = sample_photos(identity, generator)
    return scene, torch.randn(len(identity), 5, 2, generator=generator) * LANDMARK_ERROR


def sample_photos(identity: Tensor, generator: torch.Generator) -> Scene:
    """Scenes of one person each as people photograph themselves: photos, no sunglasses."""
    n = len(identity)
    scene = sample_scenes(
        n, generator, identity=identity[:, None], fixed={"style": "photo", "framing": "portrait"}
    )
    # accessory 2 is sunglasses: a photo that hides the eyes cannot tell their colour
    scene.accessory[scene.accessory == 2] = 0
    return scene
