"""Which training person looks most like a photo, by the recogniser that predictors see through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from difflora_core.lora import Lora
from difflora_core.recogniser import Recogniser
from training.artifacts import MissingArtifact, artifact
from training.loras.collect import read_set
from training.portraits import identities, render, sample_scenes

from .metrics import nearest_distance
from .summary import Figure, summarise

if TYPE_CHECKING:
    from .rows import Bench

PICTURES = 2
"""Photos per training person; their mean embedding stands for the person."""
CHUNK = 256


def nearest_people(bench: Bench, faces: Tensor, seeds: Tensor) -> list[int]:
    """Index of the training person (seeds [M]) nearest to each face embedding [P, D]."""
    recogniser = Recogniser.open(artifact(bench.config, "recogniser")).to(bench.painter.device)
    known = torch.cat(
        [embed_people(recogniser, part, bench.painter.device) for part in seeds.split(CHUNK)]
    )
    return most_similar(faces, known)


@torch.no_grad()
def embed_people(recogniser: Recogniser, seeds: Tensor, device: torch.device) -> Tensor:
    """Mean unit embedding of a few drawn photos of each training person: [M] -> [M, D]."""
    generator = torch.Generator().manual_seed(int(seeds[0]))
    who = identities(seeds).repeat_interleave(PICTURES, 0)[:, None]
    fixed = {"style": "photo", "framing": "portrait", "pose": "front"}
    scenes = sample_scenes(len(who), generator, identity=who, fixed=fixed, device=device)
    drawn = render(scenes)
    embeddings = recogniser.embed(drawn.images, drawn.landmarks[:, 0])
    return functional.normalize(embeddings.unflatten(0, (-1, PICTURES)).mean(1), dim=-1).cpu()


def most_similar(faces: Tensor, known: Tensor) -> list[int]:
    """Row of known [M, D] with the largest cosine to each face [P, D]."""
    cosines = functional.normalize(faces, dim=-1) @ functional.normalize(known, dim=-1).T
    return cosines.argmax(1).tolist()


def training_distance(bench: Bench, loras: Sequence[Lora]) -> Figure | None:
    """How far LoRAs are from the nearest training LoRA; None without the data set at hand.

    Vectors of gauge frozen_down are the difference of weights itself, up to rotation; in other
    gauges equal LoRAs may have unlike vectors, so nothing is claimed there.
    """
    try:
        known = read_set(bench.config)
    except MissingArtifact:
        return None
    if known.space.gauge != "frozen_down":
        return None
    vectors = torch.stack([known.space.pack(lora) for lora in loras])
    return summarise(nearest_distance(vectors, known.vectors), bench.config.eval.seed)
