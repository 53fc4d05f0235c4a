"""Who and what is evaluated: people, photos, references and prompts, all drawn from one seed.

People come from the test range of identity seeds, which no training stage sees. Prompts are written
for held-out combinations of attributes, which the base model is not trained on (albums of photos,
for teachers and predictors, show all); but a prompt mentions some of its attributes only, so most
could also be of a combination that is.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from training.portraits import describe, identities, parse_prompt, render, sample_scenes
from training.portraits.factors import SPLIT_SIZE

from .config import EvalConfig

TRIGGER = "sks person"
"""What a personal LoRA's person is called in prompts."""
PLAIN = "a person"
"""What the base model's person is called."""
MENTION = 0.7
"""Probability that a prompt mentions an attribute of the scene it was drawn from."""


@dataclass(frozen=True)
class Trial:
    """One evaluation: P people with their pictures, Q prompts, one noise seed per picture."""

    person_seeds: Tensor
    """[P], in the test range."""
    identity: Tensor
    """[P, F] in 0..1."""
    photos: Tensor
    """The photo that a person gives, [P, 3, 128, 128] in 0..1."""
    references: Tensor
    """Other pictures of the same people, [P, R, 3, 128, 128]; only measures see them."""
    landmarks: Tensor
    """Their true landmarks, [P, R, 5, 2] in pixels."""
    prompts: tuple[str, ...]
    """Q prompts about "a person"."""
    wanted: tuple[dict[str, int], ...]
    """What each prompt asks for."""
    noise_seeds: Tensor
    """[P, Q], the same in every row of the table."""
    real: Tensor
    """Freshly drawn portraits of other people for FID, [M, 3, 128, 128]."""

    def personal_prompts(self) -> list[str]:
        """The prompts with the trigger words for the person."""
        return [personal(prompt) for prompt in self.prompts]


def personal(prompt: str) -> str:
    """A prompt about "a person" as a prompt about the LoRA's person."""
    return re.sub(rf"\b{PLAIN}\b", TRIGGER, prompt, count=1)


def draw_trial(settings: EvalConfig, device: torch.device) -> Trial:
    """Everything random about an evaluation, on `device`; the same on every machine."""
    generator = torch.Generator().manual_seed(settings.seed)
    seeds = torch.randint(SPLIT_SIZE, (settings.people,), generator=generator)
    identity = identities(seeds, split="test")
    prompts = draw_prompts(settings.prompts, settings.seed, generator)
    photos = draw_photos(identity, 1, generator, device)
    references, landmarks = draw_references(identity, settings.references, generator, device)
    noise_shape = (settings.people, settings.prompts)
    return Trial(
        person_seeds=seeds,
        identity=identity,
        photos=photos[:, 0],
        references=references,
        landmarks=landmarks,
        prompts=tuple(prompts),
        wanted=tuple(parse_prompt(prompt) for prompt in prompts),
        noise_seeds=torch.randint(2**31, noise_shape, generator=generator),
        real=draw_real(settings.fid_pictures, generator, device),
    )


def draw_prompts(
    count: int, seed: int, generator: torch.Generator, split: str = "test"
) -> list[str]:
    """`count` different prompts; split "test": held-out combinations of attributes."""
    rng = random.Random(seed)
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        scenes = sample_scenes(count, generator, people=1, split=split)
        prompts |= dict.fromkeys(describe(scenes, rng, subject=PLAIN, mention=MENTION))
    return list(prompts)[:count]


def draw_photos(
    identity: Tensor, count: int, generator: torch.Generator, device: torch.device
) -> Tensor:
    """Photos of each person in random scenes: [P, F] -> [P, count, 3, 128, 128]."""
    return draw_references(identity, count, generator, device)[0]


def draw_references(
    identity: Tensor, count: int, generator: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Photos of each person in random scenes, and their true landmarks.

    [P, F] -> [P, count, 3, 128, 128], [P, count, 5, 2].
    """
    who = identity.repeat_interleave(count, 0)[:, None]
    fixed = {"style": "photo"}
    scenes = sample_scenes(len(who), generator, people=1, identity=who, fixed=fixed, device=device)
    drawn = render(scenes)
    shape = (len(identity), count)
    return drawn.images.unflatten(0, shape), drawn.landmarks[:, 0].unflatten(0, shape)


def draw_real(count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Portraits of other test people in held-out scenes, as the prompts are: [count, 3, H, W]."""
    seeds = torch.randint(SPLIT_SIZE, (count,), generator=generator)
    who = identities(seeds, split="test")[:, None]
    scenes = sample_scenes(count, generator, people=1, identity=who, split="test", device=device)
    return torch.cat([render(scenes[i : i + 256]).images for i in range(0, count, 256)])


def draw_album(
    identity: Tensor, count: int, seed: int, device: torch.device
) -> tuple[Tensor, list[list[str]]]:
    """Captioned photos of each person to train on: [P, count, 3, H, W] and P lists of prompts."""
    generator, rng = torch.Generator().manual_seed(seed + 1), random.Random(seed)
    who = identity.repeat_interleave(count, 0)[:, None]
    scenes = sample_scenes(len(who), generator, identity=who, fixed={"style": "photo"})
    prompts = describe(scenes, rng, subject=TRIGGER, mention=0.9)
    images = render(scenes.to(device)).images
    own = [prompts[i : i + count] for i in range(0, len(prompts), count)]
    return rearrange(images, "(p k) c h w -> p k c h w", k=count), own
