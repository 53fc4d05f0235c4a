"""Many people with a few encoded pictures and photos each: what the end-to-end stage trains on."""

from __future__ import annotations

import os
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import torch
from torch import Tensor

from .. import parallel
from ..base.painter import Painter
from ..base.pool import encode_images
from ..base.tokens import rows
from ..loras.teacher import SUBJECT
from ..portraits import Scene, describe, identities, render, sample_scenes
from .conditions import Embeddings, PhotoEncoders
from .config import FinetuneTraining

_CHUNK = 256
_PARALLEL_FROM = 2_000


@dataclass(frozen=True)
class PeoplePool:
    """N people with K pictures and J photos each."""

    latents: Tensor
    """Scaled, [N, K, 4, 16, 16], half precision."""
    prompts: Tensor
    """Table rows, [N, K, 77]."""
    boxes: Tensor
    """Of faces in pixels, [N, K, 4]."""
    landmarks: Tensor
    """In pixels, [N, K, 5, 2]."""
    photos: Embeddings

    def __len__(self) -> int:
        return len(self.latents)


def build_people_pool(
    painter: Painter, encoders: PhotoEncoders, config: FinetuneTraining, seed: int
) -> PeoplePool:
    """Draw and encode everything once, on the device.

    Every process of a training must call this (see `parallel`): each makes a part.
    """
    people = identities(torch.arange(config.first, config.first + config.people))
    generator = torch.Generator().manual_seed(seed)
    scenes = [_pictures(few, config.pictures, generator) for few in people.split(_CHUNK)]
    share = parallel.share()
    prompts = _speak_all(scenes[share], range(seed, seed + len(scenes))[share])
    own = [
        (*_encoded(painter, scene), spoken)
        for scene, spoken in zip(scenes[share], prompts, strict=True)
    ]
    parts = zip(*parallel.exchange(own, len(scenes)), strict=True)
    latents, boxes, landmarks, words = (torch.cat(part).to(painter.device) for part in parts)
    shape = (config.people, config.pictures)
    return PeoplePool(
        latents.view(*shape, 4, 16, 16),
        words.short().view(*shape, -1),
        boxes.view(*shape, 4),
        landmarks.view(*shape, 5, 2),
        encoders.embed_people(people, config.photos, seed + 1, together=True),
    )


def _encoded(painter: Painter, scene: Scene) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, face boxes and landmarks, on the cpu."""
    drawn = render(scene.to(painter.device))
    latents = encode_images(painter.vae, drawn.images).half()
    return latents.cpu(), drawn.boxes[:, 0].cpu(), drawn.landmarks[:, 0].cpu()


def _pictures(identity: Tensor, count: int, generator: torch.Generator) -> Scene:
    """`count` scenes of each person; all styles, so that a personal prompt still obeys them."""
    each = identity.repeat_interleave(count, 0)[:, None]
    return sample_scenes(len(each), generator, identity=each)


def _speak_all(scenes: list[Scene], seeds: range) -> list[Tensor]:
    if sum(len(scene) for scene in scenes) < _PARALLEL_FROM:
        return [_speak(scene, seed) for scene, seed in zip(scenes, seeds, strict=True)]
    # spawn: a process that has touched a GPU must not fork
    context, count = get_context("spawn"), max(1, (os.cpu_count() or 2) - 2)
    with ProcessPoolExecutor(count, context) as workers:
        return list(workers.map(_speak, scenes, seeds))


def _speak(scene: Scene, seed: int) -> Tensor:
    return rows(describe(scene, random.Random(seed), subject=SUBJECT, mention=0.85))
