"""Few-step deterministic sampling of LoRA latents."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .diffusion import Diffusion

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(z_t [N, T, C], t [N]) -> prediction of z_0 [N, T, C]"""
Progress = Callable[[int, int], None]
"""(steps done, steps in all); whatever it raises (an interruption) passes through"""

MAX_STEPS = 50


def seeded_noise(shape: tuple[int, int], seed: int, candidates: Sequence[int]) -> Tensor:
    """Noise [N, T, C] on the CPU; that of a candidate depends on seed and its number only."""
    return torch.stack([_noise(shape, seed, number) for number in candidates])


def sample(
    denoise: Denoiser,
    noise: Tensor,
    diffusion: Diffusion,
    *,
    steps: int,
    progress: Progress | None = None,
) -> Tensor:
    """DDIM from t = 1 to 0 in equal steps; noise [N, T, C] -> z_0 [N, T, C]. Differentiable."""
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps must be 1 to {MAX_STEPS}, found {steps}")
    times = torch.linspace(1, 0, steps + 1, device=noise.device)
    z = noise
    for index in range(steps):
        t, s = (times[i].expand(len(noise)) for i in (index, index + 1))
        z = diffusion.step(denoise(z, t), z, t, s)
        if progress is not None:
            progress(index + 1, steps)
    return z


def guided(conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance on x0 predictions (Ho and Salimans 2022); 1 = conditional only."""
    return unconditional + guidance * (conditional - unconditional)


def _noise(shape: tuple[int, int], seed: int, number: int) -> Tensor:
    digest = hashlib.sha256(f"{seed}:{number}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randn(shape, generator=generator)
