"""Chunks of drawn people for the encoders' pools, seeded by chunk number."""

from __future__ import annotations

import torch
from torch import Tensor

from .portraits import Portraits, Scene, identities, render, sample_scenes


def generator_for(seed: int, chunk: int) -> torch.Generator:
    """The CPU generator of a chunk; other chunks and other seeds have other streams."""
    return torch.Generator().manual_seed((seed + 1) * 1_000_003 + chunk)


def people_scenes(
    count: int,
    generator: torch.Generator,
    device: torch.device,
    *,
    people: int | str = 1,
    population: int = 1 << 30,
    split: str = "train",
) -> tuple[Scene, Tensor]:
    """Scenes of people with known numbers: scenes and the people's seeds [N, P] (on the CPU).

    population: seeds are drawn below it. split: "train" or "test" people.
    """
    slots = 3 if isinstance(people, str) else people
    seeds = torch.randint(population, (count, slots), generator=generator)
    who = identities(seeds.flatten(), split).view(count, slots, -1)
    return sample_scenes(count, generator, people=people, identity=who, device=device), seeds


def pictures_of(
    seeds: Tensor, each: int, generator: torch.Generator, device: torch.device, split: str = "test"
) -> Portraits:
    """`each` pictures of every person of `seeds` [N], in a row: N * each pictures."""
    who = identities(seeds, split).repeat_interleave(each, 0)[:, None]
    scenes = sample_scenes(len(who), generator, identity=who, device=device)
    return render_in_parts(scenes)


def somebody(drawn: Portraits, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One of the people of each picture: rows [N] and people [N], an index into [N, P, ...]."""
    device = drawn.present.device
    lots = torch.rand(drawn.present.shape, generator=generator).to(device)
    who = torch.where(drawn.present, lots, -1.0)
    return torch.arange(len(who), device=device), who.argmax(1)


def render_in_parts(scenes: Scene, size: int = 128, part: int = 512) -> Portraits:
    """As `render`, some pictures at a time, to bound the memory on a GPU."""
    done = [render(scenes[i : i + part], size) for i in range(0, len(scenes), part)]
    return Portraits(
        *(
            torch.cat([getattr(p, name) for p in done])
            for name in ("images", "boxes", "masks", "landmarks", "identity", "present")
        ),
        attributes={k: torch.cat([p.attributes[k] for p in done]) for k in done[0].attributes},
    )
