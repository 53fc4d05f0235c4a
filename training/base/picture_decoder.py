"""Decodes latents with the frozen VAE and keeps the decoder's maps on the way.

The maps are what LPL compares (Berrada et al. 2025): they cost nothing beyond the decoding that
the face term needs anyway. Nothing is clamped, since a clamp has no gradient where it acts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from .models import Vae

COMPARED = 3
"""Stages of the decoder whose maps are compared; the last one is little else than the picture."""


class Decoded(NamedTuple):
    """What a decoder makes of B latents."""

    pictures: Tensor
    """[B, 3, H, W], about 0..1."""
    maps: tuple[Tensor, ...]
    """Outputs of the first stages, [B, C, h, w], small to large."""


@dataclass(frozen=True)
class PictureDecoder:
    """diffusers' AutoencoderKL as a differentiable function of scaled latents."""

    vae: Vae

    @property
    def upscale(self) -> int:
        """Pixels per latent cell, each way."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def __call__(self, latents: Tensor) -> Decoded:
        """Scaled latents [B, 4, h, w] -> pictures and maps."""
        maps: list[Tensor] = []

        def keep(module: Any, inputs: Any, output: Tensor) -> None:
            maps.append(output)

        stages = list(self.vae.decoder.up_blocks)[:COMPARED]
        hooks = [stage.register_forward_hook(keep) for stage in stages]
        try:
            pictures = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        finally:
            for hook in hooks:
                hook.remove()
        return Decoded(pictures.float() / 2 + 0.5, tuple(maps))
