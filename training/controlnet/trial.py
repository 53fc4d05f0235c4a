"""The held-out scenes of evaluate-controlnet, and what is true about them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..base.pool import decode_latents, encode_images
from ..evaluation.protocol import draw_real
from ..portraits import Portraits, Scene, describe, identities, parse_prompt, render, sample_scenes
from ..portraits.factors import SPLIT_SIZE
from .base_model import BaseModel
from .config import ControlnetEvalConfig


@dataclass(frozen=True)
class ControlTrial:
    """N pictures of people that no stage has trained on, portraits of one person first."""

    drawn: Portraits
    """The pictures with everything that is true about them, up to P people each."""
    prompts: tuple[str, ...]
    """Each picture's own, naming everything."""
    wanted: tuple[dict[str, int], ...]
    """What the prompts of the portraits ask for."""
    portraits: int
    """How many show one person."""
    latents: Tensor
    """Scaled, [N, 4, h, w]."""
    seeds: tuple[int, ...]
    """Of the painting noise, the same in every row."""
    real: Tensor
    """Freshly drawn portraits of other people for FID, [M, 3, H, W]."""

    def __len__(self) -> int:
        return len(self.prompts)


def draw_trial(settings: ControlnetEvalConfig, base: BaseModel) -> ControlTrial:
    """Everything random about an evaluation; the same on every machine."""
    generator = torch.Generator().manual_seed(settings.seed)
    portraits = _scenes(settings.portraits, 1, generator)
    halves = (settings.groups - settings.groups // 2, settings.groups // 2)
    counts = [(n, people) for n, people in zip(halves, (2, 3), strict=True) if n]
    scenes = [portraits, *(_scenes(n, people, generator) for n, people in counts)]
    prompts = [prompt for scene in scenes for prompt in describe(scene)]
    drawn = _together([render(scene.to(base.device)) for scene in scenes])
    noise = torch.randint(2**31, (len(prompts),), generator=generator).tolist()
    return ControlTrial(
        drawn,
        tuple(prompts),
        tuple(parse_prompt(prompt) for prompt in prompts[: len(portraits)]),
        len(portraits),
        encode_images(base.vae, drawn.images),
        tuple(noise),
        draw_real(settings.fid_pictures, generator, base.device),
    )


def ceiling(base: BaseModel, trial: ControlTrial) -> Tensor:
    """The true pictures through the autoencoder: no painter can come nearer."""
    return decode_latents(base.vae, trial.latents)


def _scenes(count: int, people: int, generator: torch.Generator) -> Scene:
    """Test people in combinations of attributes that were held out."""
    seeds = torch.randint(SPLIT_SIZE, (count * people,), generator=generator)
    who = identities(seeds, split="test").view(count, people, -1)
    return sample_scenes(count, generator, people=people, identity=who, split="test")


def _together(parts: list[Portraits]) -> Portraits:
    """One after the other, filled up to the largest number of people."""
    most = max(part.present.shape[1] for part in parts)

    def filled(name: str, value: float | bool) -> Tensor:
        rows = []
        for part in parts:
            tensor: Tensor = getattr(part, name)
            shape = (len(tensor), most - tensor.shape[1], *tensor.shape[2:])
            rows.append(torch.cat([tensor, tensor.new_full(shape, value)], 1))
        return torch.cat(rows)

    return Portraits(
        images=torch.cat([part.images for part in parts]),
        boxes=filled("boxes", float("nan")),
        masks=filled("masks", False),
        landmarks=filled("landmarks", float("nan")),
        identity=filled("identity", float("nan")),
        present=filled("present", False),
        attributes={k: torch.cat([p.attributes[k] for p in parts]) for k in parts[0].attributes},
    )
