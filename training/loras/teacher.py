"""DreamBooth LoRAs of several people at once, each with its own pictures and optimiser.

The frozen U-Net runs once for all people of the group; every sample sees its own person's LoRA
beside the layers (training/base/side_path.py). Adam works element by element, so a person's LoRA
does not depend on who else is in the group.

Everybody is photographed in the same scenes and meets the same timesteps and the same noise, so
that two LoRAs differ by who the people are and not by chance.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
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
    painter: Painter, identity: Tensor, count: int, seed: int, subject: str = SUBJECT
) -> Album:
    """`count` captioned photos of each person, identity [G, 20], in the scenes of `seed`."""
    scenes = [
        sample_scenes(
            count,
            torch.Generator().manual_seed(seed),
            identity=who[None, None].expand(count, 1, -1),
            fixed={"style": "photo"},
        )
        for who in identity
    ]
    latents = [encode_images(painter.vae, render(s.to(painter.device)).images) for s in scenes]
    spoken = describe(scenes[0], random.Random(seed), subject=subject, mention=0.9)
    contexts = painter.encode(spoken).expand(len(scenes), -1, -1, -1)
    return Album(torch.stack(latents), contexts)


def train_loras(
    painter: Painter,
    space: LoraSpace,
    config: LorasConfig,
    seeds: Sequence[int],
    split: str = "train",
) -> list[Lora]:
    """One LoRA per person of `seeds`, on the painter's device."""
    people = identities(torch.tensor(list(seeds)), split)
    album = photo_album(painter, people, config.pictures, config.draws)
    prior = _prior_album(painter, seeds, config) if config.prior else None
    factors = initial_factors(space, seeds, painter.device)
    return fit_factors(painter, space, config, album, prior, factors)


def fit_factors(
    painter: Painter, space: LoraSpace, config: LorasConfig, album: Album, prior: Album | None,
    factors: dict[str, tuple[Tensor, Tensor]],
) -> list[Lora]:  # fmt: skip
    """Train given factors (name -> down [G, r, in] or [r, in], up [G, out, r]) on albums."""
    trained = [f for pair in factors.values() for f in pair if f.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=config.lr, betas=(0.9, 0.99), foreach=True)
    draws = _Draws(config, painter.device)
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
    return [_lora(space, factors, person) for person in range(len(album.latents))]


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
    """Which pictures, which timesteps, which noise, step by step: the same for everybody, and on
    every device, since a set may be begun on one machine and finished on another."""

    def __init__(self, config: LorasConfig, device: torch.device) -> None:
        self.generator = torch.Generator().manual_seed(config.draws)
        self.config, self.device = config, device
        steps = (config.steps, config.batch)
        self.t = torch.randint(1000, steps, generator=self.generator).to(device)
        order = torch.rand(config.steps, config.pictures, generator=self.generator).argsort(-1)
        self.pictures = order[:, : config.batch].to(device)

    def noise(self, shape: torch.Size) -> Tensor:
        """[batch, 4, 16, 16], another one at every call."""
        noise = torch.randn(self.config.batch, *shape, generator=self.generator)
        return noise.to(self.device)


def _losses(
    painter: Painter, schedule: NoiseSchedule, album: Album, draws: _Draws, step: int,
    factors: Factors, scale: float,
) -> Tensor:  # fmt: skip
    """Mean denoising loss of each person, [G]."""
    people, which = len(album.latents), draws.pictures[step]
    latents = album.latents[:, which].flatten(0, 1)
    context = album.contexts[:, which].flatten(0, 1)
    t = draws.t[step].repeat(people)
    noise = draws.noise(latents.shape[1:]).repeat(people, 1, 1, 1)
    scaled = {name: (down, up * scale) for name, (down, up) in factors.items()}
    with painter.side_path.using(spread_factors(scaled, len(which))):
        predicted = painter.unet(schedule.add_noise(latents, noise, t), t, context).sample
    return schedule.loss(predicted, noise, t).view(people, -1).mean(1)


def _prior_album(painter: Painter, seeds: Sequence[int], config: LorasConfig) -> Album:
    """Other people's photos captioned "a person", for prior preservation."""
    others = identities(torch.tensor([(seed + 500_009) % (1 << 40) for seed in seeds]))
    return photo_album(painter, others, config.pictures, config.draws + 1, subject="a person")


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
