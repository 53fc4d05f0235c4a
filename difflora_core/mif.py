"""Mixed Image Features: a gate network mixes a face embedding and an image embedding.

DiffLoRA (arXiv 2408.06740): the face embedding knows the person, the image embedding everything
else; a gate inspired by mixtures of experts weighs them anew for every photo. The formula is not
public. Ours: both are projected to one width, the gates are a softmax over the two sources.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from .blocks import initialise_linear, zero_weights
from .normalise import Standardise


@dataclass(frozen=True)
class MixerConfig:
    face_width: int
    """length of the face embedding"""
    image_width: int
    """length of the image embedding"""
    width: int = 256
    """length of the mixed features"""
    gate_groups: int = 256
    """channels are gated in this many groups; 1 = one weight per source"""

    def __post_init__(self) -> None:
        if self.width % self.gate_groups:
            raise ValueError(
                f"width {self.width} is not a multiple of gate_groups {self.gate_groups}"
            )


class Condition(NamedTuple):
    """What the denoiser sees of the photos."""

    vector: Tensor
    """[B, W] mixed features, for AdaLN"""
    tokens: Tensor
    """[B, 2, W] gated face and image features, for attention"""


class MixedImageFeatures(nn.Module):
    """Face and image embeddings -> Condition; a missing source is replaced by a learned vector."""

    def __init__(self, config: MixerConfig) -> None:
        super().__init__()
        width, groups = config.width, config.gate_groups
        self.groups = groups
        self.face_statistics = Standardise(config.face_width)
        self.image_statistics = Standardise(config.image_width)
        self.face_in = nn.Linear(config.face_width, width)
        self.image_in = nn.Linear(config.image_width, width)
        self.no_face = nn.Parameter(torch.empty(width))
        self.no_image = nn.Parameter(torch.empty(width))
        self.gate = nn.Sequential(
            nn.LayerNorm(2 * width), nn.Linear(2 * width, 64), nn.SiLU(), nn.Linear(64, 2 * groups)
        )
        self.refine = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.initialise()

    def initialise(self) -> None:
        """Everything about initial weights: projections keep the variance; null vectors are small;
        gates start equal and the refinement starts as the identity (zero last layers)."""
        initialise_linear(self)
        nn.init.normal_(self.no_face, std=0.02)
        nn.init.normal_(self.no_image, std=0.02)
        zero_weights(self.gate[3], self.refine[3])

    def fit(self, face: Tensor, image: Tensor) -> None:
        """Set the input statistics from embeddings face [N, Ef], image [N, Ei]."""
        self.face_statistics.fit(unit_rows(face))
        self.image_statistics.fit(unit_rows(image))

    def forward(
        self, face: Tensor, image: Tensor, has_face: Tensor, has_image: Tensor
    ) -> Condition:
        """face [B, Ef], image [B, Ei] of any length > 0; has_face, has_image [B] bool."""
        f = self.face_in(self.face_statistics(unit_rows(face)))
        i = self.image_in(self.image_statistics(unit_rows(image)))
        f = torch.where(has_face[:, None], f, self.no_face.to(f.dtype))
        i = torch.where(has_image[:, None], i, self.no_image.to(i.dtype))
        gated = self.gates(f, i) * torch.stack([f, i], dim=1)
        mixed = gated.sum(1)
        return Condition(mixed + self.refine(mixed), gated)

    def gates(self, f: Tensor, i: Tensor) -> Tensor:
        """Projected features [B, W] each -> gates [B, 2, W] that add up to 2 over the sources, so
        that equal gates leave both unchanged."""
        logits = rearrange(self.gate(torch.cat([f, i], dim=-1)), "b (s g) -> b s g", s=2)
        repeats = f.shape[-1] // self.groups
        return 2 * repeat(logits.softmax(dim=1), "b s g -> b s (g n)", n=repeats)


def unit_rows(embedding: Tensor) -> Tensor:
    """[B, E] scaled to root mean square 1 per row, the zero row kept; float32."""
    return F.normalize(embedding.float(), dim=-1) * math.sqrt(embedding.shape[-1])
