"""Diffusion transformer over LoRA latents, conditioned on time and mixed image features.

Preset `paper` (arXiv 2408.06740): plain DiT blocks, time and features enter through AdaLN only.
Preset `default`: one modulation network for all blocks (PixArt-alpha, Chen et al. 2023), the
features also as tokens, and a linear path from the features to the output, because linear
regression from an embedding is a strong predictor of LoRA weights that a transformer learns late.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from .blocks import ModulatedBlock, initialise_linear, modulate, time_features, zero_weights
from .mif import Condition

TIME_FEATURES = 128


@dataclass(frozen=True)
class DitConfig:
    width: int = 128
    """D, token width"""
    depth: int = 4
    heads: int = 4
    head_width: int = 32
    """attention has an inner width of its own: 1454 = 2 * 727 has no useful divisor"""
    mlp_ratio: float = 4.0
    modulation: Literal["per_block", "shared"] = "shared"
    """AdaLN network of its own in each block (DiT), or one for all plus an offset per block"""
    condition_tokens: bool = True
    """the features also enter as tokens"""
    direct: bool = True
    """add a linear map from the features to every latent number"""


class Dit(nn.Module):
    """(z_t, t, condition) -> network output of the shape of z_t."""

    def __init__(
        self, config: DitConfig, latent_shape: tuple[int, int], condition_width: int
    ) -> None:
        super().__init__()
        self.config = config
        (tokens, channels), width = latent_shape, config.width
        self.latent_in = nn.Linear(channels, width)
        self.position = nn.Parameter(torch.empty(tokens, width))
        self.time_in = nn.Sequential(
            nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.condition_in = nn.Sequential(
            nn.Linear(condition_width, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.blocks = nn.ModuleList(
            ModulatedBlock(width, config.heads, config.head_width, config.mlp_ratio)
            for _ in range(config.depth)
        )
        own = config.depth if config.modulation == "per_block" else 1
        self.modulations = nn.ModuleList(nn.Linear(width, 6 * width) for _ in range(own))
        self.modulation_offsets = nn.Parameter(torch.empty(config.depth, 6, width))
        self.final_norm = nn.LayerNorm(width, elementwise_affine=False)
        self.final_modulation = nn.Linear(width, 2 * width)
        self.latent_out = nn.Linear(width, channels)
        if config.condition_tokens:
            self.token_in = nn.Linear(condition_width, width)
        if config.direct:
            self.direct = nn.Linear(condition_width, tokens * channels)
        self.initialise()

    def initialise(self) -> None:
        """Everything about initial weights, after DiT's initialize_weights: Xavier for linear
        layers; random positions; all modulations zero, so that every block starts as the
        identity; output layer and direct path zero, so that a fresh network puts out zero."""
        initialise_linear(self)
        nn.init.normal_(self.position, std=0.5)
        nn.init.zeros_(self.modulation_offsets)
        zero_weights(*self.modulations, self.final_modulation, self.latent_out)
        if self.config.direct:
            zero_weights(self.direct)

    def forward(self, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """z_t [B, T, C], t [B] in 0..1, condition of B rows -> [B, T, C]"""
        c = self.time_in(time_features(t, TIME_FEATURES)) + self.condition_in(condition.vector)
        c = nn.functional.silu(c)
        x = self.latent_in(z_t) + self.position
        if self.config.condition_tokens:
            x = torch.cat([self.token_in(condition.tokens).to(x.dtype), x], dim=1)
        for block, modulation in zip(self.blocks, self._modulations(c), strict=True):
            x = block(x, modulation)
        x = x[:, -z_t.shape[1] :]
        shift, scale = self.final_modulation(c)[:, None].chunk(2, dim=-1)
        out = self.latent_out(modulate(self.final_norm(x), shift, scale))
        if self.config.direct:
            out = out + rearrange(self.direct(condition.vector), "b (t c) -> b t c", t=z_t.shape[1])
        return out

    def _modulations(self, c: Tensor) -> list[Tensor]:
        """c [B, D] -> modulation [B, 6, D] of each block."""
        made = [rearrange(layer(c), "b (six d) -> b six d", six=6) for layer in self.modulations]
        if len(made) == 1:
            made = made * self.config.depth
        return [m + offset for m, offset in zip(made, self.modulation_offsets, strict=True)]
