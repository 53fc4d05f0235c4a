"""DreamBooth LoRAs of several people at once, each with its own pictures, noise and optimiser.

The frozen U-Net runs once for all people of the group; every sample sees its own person's LoRA
beside the layers (training/base/side_path.py). Adam works element by element, so a person's LoRA
does not depend on who else is in the group.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from difflora_core.lora import Lora, LoraLayer
from difflora_core.lora_space import LoraSpace

from ..base.noise import NoiseSchedule
from ..base.painter import Painter
from ..base.pool import encode_images
from ..base.side_path import Factors, spread_factors
from ..portraits import describe, identities, render, sample_scenes
from .config import LorasConfig

SUBJECT = "sks person"
_WARMUP = 10


@dataclass(frozen=True)
class Album:
    """Encoded pictures of G people: latents [G, K, 4, 16, 16], contexts [G, K, 77, width]."""

    latents: Tensor
    contexts: Tensor


def photo_album(
    painter: Painter, identity: Tensor, seeds: Sequence[int], count: int, subject: str = SUBJECT
) -> Album:
    """`count` captioned photos of each person, identity [G, 20]; they follow from its seed."""
    scenes = [
        sample_scenes(
            count,
            torch.Generator().manual_seed(_album_seed(seed)),
            identity=who[None, None].expand(count, 1, -1),
            fixed={"style": "photo"},
        )
        for seed, who in zip(seeds, identity, strict=True)
    ]
    spoken = [
        describe(scene, random.Random(seed), subject=subject, mention=0.9)
        for seed, scene in zip(seeds, scenes, strict=True)
    ]
    latents = [encode_images(painter.vae, render(s.to(painter.device)).images) for s in scenes]
    contexts = [painter.encode(prompts) for prompts in spoken]
    return Album(torch.stack(latents), torch.stack(contexts))


def train_loras(
    painter: Painter,
    space: LoraSpace,
    config: LorasConfig,
    seeds: Sequence[int],
    split: str = "train",
) -> list[Lora]:
    """One LoRA per person of `seeds`, on the painter's device."""
    people = identities(torch.tensor(list(seeds)), split)
    album = photo_album(painter, people, seeds, config.pictures)
    prior = _prior_album(painter, seeds, config) if config.prior else None
    factors = initial_factors(space, seeds, painter.device)
    return fit_factors(painter, space, config, album, prior, factors, seeds)


def fit_factors(
    painter: Painter, space: LoraSpace, config: LorasConfig, album: Album, prior: Album | None,
    factors: dict[str, tuple[Tensor, Tensor]], seeds: Sequence[int],
) -> list[Lora]:  # fmt: skip
    """Train given factors (name -> down [G, r, in] or [r, in], up [G, out, r]) on albums."""
    trained = [f for pair in factors.values() for f in pair if f.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=config.lr, betas=(0.9, 0.99), foreach=True)
    draws = _Draws(seeds, config, painter.device)
    schedule = NoiseSchedule(painter.device)
    with half_precision(painter):
        for step in range(config.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            losses = _losses(painter, schedule, album, draws, step, factors, space.scale)
            if prior:
                losses = losses + config.prior * _losses(
                    painter, schedule, prior, draws, step, factors, space.scale
                )
            optimizer.zero_grad(set_to_none=True)
            losses.sum().backward()  # a sum: each person's gradient is that of its own mean loss
            optimizer.step()
    return [_lora(space, factors, person) for person in range(len(seeds))]


def learning_rate(config: LorasConfig, step: int) -> float:
    """Up in ten steps, then down to nothing in a straight line."""
    return config.lr * min(1.0, (step + 1) / _WARMUP) * (1 - step / config.steps)


def initial_factors(
    space: LoraSpace, seeds: Sequence[int], device: torch.device
) -> dict[str, tuple[Tensor, Tensor]]:
    """Where training starts: B zero, A as the gauge says (and trained unless it is frozen)."""
    people = len(seeds)
    own = space.gauge == "free"
    downs = [space.initial_downs(seed) for seed in seeds] if own else [space.downs()]
    factors = {}
    for spec in space.layers:
        up = torch.zeros(people, spec.out_features, space.rank, device=device, requires_grad=True)
        down = torch.stack([d[spec.name] for d in downs]).to(device)
        if space.predicts_down:
            down = down.expand(people, -1, -1).clone().requires_grad_()
        else:
            down = down[0]
        factors[spec.name] = (down, up)
    return factors


class _Draws:
    """Which picture, which timestep, which noise: drawn per person from its own seed."""

    def __init__(self, seeds: Sequence[int], config: LorasConfig, device: torch.device) -> None:
        self.generators = [torch.Generator(device).manual_seed(_draw_seed(s)) for s in seeds]
        self.config, self.device = config, device
        shape = (config.steps, config.batch)
        self.t = self._each(lambda g: torch.randint(1000, shape, generator=g, device=device))
        self.pictures = self._each(
            lambda g: torch.rand(config.steps, config.pictures, generator=g, device=device)
        ).argsort(-1)[..., : config.batch]

    def _each(self, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        return torch.stack([draw(g) for g in self.generators])

    def noise(self, shape: torch.Size) -> Tensor:
        """[G * batch, 4, 16, 16], each person's from its own stream."""
        return torch.cat(
            [
                torch.randn(self.config.batch, *shape, generator=g, device=self.device)
                for g in self.generators
            ]
        )


def _losses(
    painter: Painter, schedule: NoiseSchedule, album: Album, draws: _Draws, step: int,
    factors: Factors, scale: float,
) -> Tensor:  # fmt: skip
    """Mean denoising loss of each person, [G]."""
    people = torch.arange(len(album.latents), device=painter.device)[:, None]
    which = draws.pictures[:, step]
    latents = album.latents[people, which].flatten(0, 1)
    context = album.contexts[people, which].flatten(0, 1)
    t = draws.t[:, step].flatten()
    noise = draws.noise(latents.shape[1:])
    scaled = {name: (down, up * scale) for name, (down, up) in factors.items()}
    with painter.side_path.using(spread_factors(scaled, which.shape[1])):
        predicted = painter.unet(schedule.add_noise(latents, noise, t), t, context).sample
    return schedule.loss(predicted, noise, t).view(len(people), -1).mean(1)


def _prior_album(painter: Painter, seeds: Sequence[int], config: LorasConfig) -> Album:
    """Other people's photos captioned "a person", for prior preservation."""
    others = identities(torch.tensor([(seed + 500_009) % (1 << 40) for seed in seeds]))
    return photo_album(
        painter, others, [seed + 1 for seed in seeds], config.pictures, subject="a person"
    )


@contextmanager
def half_precision(painter: Painter) -> Iterator[None]:
    """bf16 autocast on cuda, nothing on the CPU."""
    device = painter.device.type
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        yield


def _lora(space: LoraSpace, factors: Factors, person: int) -> Lora:
    layers = {}
    for name, (down, up) in factors.items():
        own = down[person] if down.dim() == 3 else down
        layers[name] = LoraLayer(
            name, own.detach().float().cpu().clone(), up[person].detach().float().cpu(), space.scale
        )
    return Lora(layers, {})


def _album_seed(seed: int) -> int:
    return (seed * 2_654_435_761 + 17) % (1 << 62)


def _draw_seed(seed: int) -> int:
    return (seed * 2_246_822_519 + 29) % (1 << 62)
