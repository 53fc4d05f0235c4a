"""Paints with a ControlNet: from noise, or on from a true picture that was noised (SDEdit).

A ControlNet without a hint has no reference, so it is compared by repainting: the latents of a
true picture are noised to a high timestep (Meng et al. 2022), which leaves the arrangement but
hardly a face, and denoised with the picture's own prompt. What was there is then known: whose
face, which expression, where eyes and mouth were, which pixels are body.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from ..base.models import NOISE_SCHEDULE
from ..base.noise import NoiseSchedule
from ..base.pool import decode_latents
from .base_model import BaseModel
from .control import Control, predict_noise


@dataclass(frozen=True)
class PaintSettings:
    """How pictures are painted."""

    steps: int
    """From pure noise to a picture."""
    guidance: float
    """Classifier-free guidance scale."""
    from_step: int = 1000
    """Timestep that true latents are noised to; 1000 = start from pure noise."""


@torch.no_grad()
def paint(
    base: BaseModel,
    control: Control | None,
    prompts: Sequence[str],
    latents: Tensor,
    seeds: Sequence[int],
    settings: PaintSettings,
) -> Tensor:
    """Pictures [B, 3, H, W] in 0..1 on the device.

    latents [B, 4, h, w]: scaled, of true pictures; from pure noise only their shape counts.
    seeds: one per picture, for its noise. Errors: ValueError when no step is left.
    """
    scheduler = DPMSolverMultistepScheduler(**NOISE_SCHEDULE, timestep_spacing="trailing")
    scheduler.set_timesteps(settings.steps, device=base.device)
    first = int((scheduler.timesteps > settings.from_step).sum())
    if first == len(scheduler.timesteps):
        raise ValueError(f"no step below timestep {settings.from_step}: steps are too few")
    context = base.encode([*prompts, *[""] * len(prompts)])
    noise = torch.stack([own_noise(seed, latents.shape[1:]) for seed in seeds]).to(base.device)
    times = scheduler.timesteps[first:]
    scheduler.set_begin_index(first)
    x = NoiseSchedule(base.device).add_noise(latents, noise, times[:1]) if first else noise
    for t in times:
        steps = t.expand(2 * len(x))
        wanted, plain = predict_noise(base, control, torch.cat([x, x]), steps, context).chunk(2)
        guided = plain + settings.guidance * (wanted - plain)
        x = scheduler.step(guided, t, x, return_dict=False)[0]
    return decode_latents(base.vae, x)


def own_noise(seed: int | Tensor, shape: torch.Size) -> Tensor:
    """Noise of one picture, from a CPU generator as ComfyUI draws it."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(int(seed)))
