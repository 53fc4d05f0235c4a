"""Portraits of one to three people, drawn and encoded once, all of them on the device."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base.pool import encode_images
from ..drawing import generator_for
from ..portraits import Scene, describe, render, sample_scenes
from .base_model import BaseModel
from .batches import MASK_SIDE, PeopleBatch, without_small_faces
from .config import ControlnetConfig

CHUNK = 512
#: the base model was trained on other portraits of the same people: another stream of chunks
_STREAM = 5_000_000


@dataclass(frozen=True)
class DrawnPeople:
    """Encoded portraits: latents in half precision, masks as bytes."""

    latents: Tensor
    prompts: tuple[str, ...]
    masks: Tensor
    boxes: Tensor
    landmarks: Tensor

    @classmethod
    def make(cls, base: BaseModel, settings: ControlnetConfig, seed: int) -> DrawnPeople:
        """Draw `settings.pool` portraits of training people."""
        parts = []
        for chunk in range(0, settings.pool, CHUNK):
            generator = generator_for(seed, _STREAM + chunk)
            scene = sample_scenes(
                min(CHUNK, settings.pool - chunk), generator, people="mixed", device=base.device
            )
            parts.append(encoded(base, scene, settings, random.Random(seed + chunk)))
        return joined(parts)

    def __len__(self) -> int:
        return len(self.latents)

    def draw(self, step: int, count: int, seed: int) -> PeopleBatch:
        """The batch of a step: random portraits, the same for every variant of a seed."""
        index = torch.randint(len(self), (count,), generator=generator_for(seed, step))
        return self.batch(index)

    def batch(self, index: Tensor) -> PeopleBatch:
        """Some of the portraits by number."""
        there = index.to(self.latents.device)
        return PeopleBatch(
            self.latents[there].float(),
            tuple(self.prompts[i] for i in index.tolist()),
            self.masks[there].float() / 255,
            self.boxes[there],
            self.landmarks[there],
        )


def encoded(
    base: BaseModel, scene: Scene, settings: ControlnetConfig, rng: random.Random | None
) -> DrawnPeople:
    """Draw and encode scenes; `rng` None gives canonical prompts that mention everything."""
    side = settings.resolution
    drawn = render(scene, side)
    boxes = without_small_faces(drawn.boxes, drawn.landmarks, settings.smallest_face * side)
    masks = F.adaptive_avg_pool2d(drawn.masks.float(), MASK_SIDE)
    mention = 1.0 if rng is None else settings.mention
    return DrawnPeople(
        encode_images(base.vae, drawn.images).half(),
        tuple(describe(scene, rng, mention=mention)),
        (masks * 255).round().byte(),
        boxes,
        drawn.landmarks,
    )


def joined(parts: list[DrawnPeople]) -> DrawnPeople:
    """One after the other."""
    tensors = (
        torch.cat([getattr(p, name) for p in parts])
        for name in ("latents", "masks", "boxes", "landmarks")
    )
    latents, masks, boxes, landmarks = tensors
    prompts = tuple(prompt for part in parts for prompt in part.prompts)
    return DrawnPeople(latents, prompts, masks, boxes, landmarks)
