"""Prompts to pictures with the mini model, in batches, with a LoRA per picture if wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from difflora_core.lora import Lora

from ..config import Config
from .models import NOISE_SCHEDULE, TextModel, Unet, Vae, open_text, open_unet, open_vae
from .pool import decode_latents
from .side_path import Factors, SidePath, repeat_factors, stack_loras
from .tokens import rows

LATENT = (4, 16, 16)
STEPS = 16
GUIDANCE = 4.0


@dataclass(frozen=True)
class Estimate:
    """What a hook sees of one sampling step, before the sampler takes it; B pictures."""

    x0: Tensor
    """The estimate of the picture after classifier-free guidance, scaled latents [B, 4, h, w]."""
    direction: Tensor
    """Its conditional minus its unconditional half."""
    guidance: float
    """Scale of classifier-free guidance."""
    sigma: float
    """Noise per signal."""
    noisy: Tensor
    """x_t on the variance-preserving schedule."""
    denoise: Callable[[Tensor], Tensor]
    """x_t -> x0, by the same prompts at the same step; differentiable."""


#: the estimate that the sampler goes on with
Steer = Callable[[Estimate], Tensor]


@dataclass
class Painter:
    """The mini model, ready to sample; all parts frozen on one device."""

    vae: Vae
    unet: Unet
    text: TextModel
    side_path: SidePath

    @classmethod
    def open(cls, config: Config) -> Painter:
        """From the artifacts of a run, or the shipped weights."""
        device = config.run.torch_device()
        unet = open_unet(config).to(device)
        return cls(open_vae(config).to(device), unet, open_text(config).to(device), SidePath(unet))

    @property
    def device(self) -> torch.device:
        return self.unet.device

    def paint(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        lora: Lora | Sequence[Lora] | Factors | None = None,
        steps: int = STEPS,
        guidance: float = GUIDANCE,
        batch: int | None = None,
    ) -> Tensor:
        """Pictures [N, 3, 128, 128] in 0..1, float32 on the CPU.

        Args:
            prompts, seeds: one of each per picture; a picture depends on its own only.
            lora: for all pictures, or one per picture, or batched factors (see side_path).
            steps: of DPM-Solver++ 2M (Lu et al. 2022).
            guidance: classifier-free guidance against the empty prompt.
            batch: pictures at a time; by default what suits the device.
        """
        batch = batch or (256 if self.device.type == "cuda" else 8)
        parts = []
        for i in range(0, len(prompts), batch):
            few = slice(i, i + batch)
            factors = self._factors(lora, few, len(prompts[few]))
            latents = self.sample(prompts[few], seeds[few], factors, steps, guidance)
            parts.append(decode_latents(self.vae, latents).cpu())
        return torch.cat(parts) if parts else torch.zeros(0, 3, 128, 128)

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], factors: Factors, steps: int,
        guidance: float, steer: Steer | None = None,
    ) -> Tensor:  # fmt: skip
        """Scaled latents [B, 4, 16, 16] on the device; `steer` may change every estimate of x0."""
        scheduler = DPMSolverMultistepScheduler(**NOISE_SCHEDULE, timestep_spacing="trailing")
        scheduler.set_timesteps(steps, device=self.device)
        context = self.encode([*prompts, *[""] * len(prompts)])
        kept = scheduler.alphas_cumprod.to(self.device)
        latents = torch.stack([_noise(seed) for seed in seeds]).to(self.device)
        with self.side_path.using(repeat_factors(factors, 2)):
            for t in scheduler.timesteps:
                noise, difference = self._predict(latents, t, context, guidance)
                if steer is not None:
                    denoise = partial(self._denoise, t, context, guidance, kept[t])
                    x0 = denoised(latents, noise, kept[t])
                    # x0 falls by noise / signal times what the noise rises
                    ratio = float((1 / kept[t] - 1).sqrt())
                    seen = Estimate(x0, -ratio * difference, guidance, ratio, latents, denoise)
                    noise = noise + (x0 - steer(seen)) / ratio
                latents = scheduler.step(noise, t, latents, return_dict=False)[0]
        return latents

    def _predict(
        self, latents: Tensor, t: Tensor, context: Tensor, guidance: float
    ) -> tuple[Tensor, Tensor]:
        """The noise in latents, and its conditional minus its unconditional half."""
        wanted, plain = self.unet(torch.cat([latents] * 2), t, context).sample.chunk(2)
        return plain + guidance * (wanted - plain), wanted - plain

    def _denoise(
        self, t: Tensor, context: Tensor, guidance: float, kept: Tensor, latents: Tensor
    ) -> Tensor:
        return denoised(latents, self._predict(latents, t, context, guidance)[0], kept)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> context [B, 77, width]."""
        return self.text(rows(prompts).to(self.device)).last_hidden_state

    def _factors(
        self, lora: Lora | Sequence[Lora] | Factors | None, few: slice, count: int
    ) -> Factors:
        if not lora:
            return {}
        if isinstance(lora, Lora):
            return stack_loras([lora] * count, self.device)
        if isinstance(lora, Sequence):
            return stack_loras(list(lora[few]), self.device)
        return {k: (d[few] if d.dim() == 3 else d, u[few]) for k, (d, u) in lora.items()}


def denoised(latents: Tensor, noise: Tensor, kept: Tensor) -> Tensor:
    """x0 of x_t and its noise; `kept` is the cumulative product of 1 - beta (Ho et al., 2020)."""
    return (latents - (1 - kept).sqrt() * noise) / kept.sqrt()


def _noise(seed: int) -> Tensor:
    """Starting noise of one picture, from a CPU generator as ComfyUI draws it."""
    return torch.randn(LATENT, generator=torch.Generator().manual_seed(int(seed)))
