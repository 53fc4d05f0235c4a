"""Transformer parts of autoencoder and denoiser. B batch, T tokens, D token width."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

LOWEST_FREQUENCY = 1e-4  # of the sinusoidal time embedding, as in DDPM (Ho et al. 2020)


class Attention(nn.Module):
    """Self-attention whose inner width heads * head_width may differ from the token width."""

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * heads * head_width)
        self.out = nn.Linear(heads * head_width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]"""
        q, k, v = rearrange(self.qkv(x), "b t (three h d) -> three b h t d", three=3, h=self.heads)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(rearrange(mixed, "b h t d -> b t (h d)"))


class Mlp(nn.Sequential):
    def __init__(self, width: int, ratio: float) -> None:
        inner = int(width * ratio)
        super().__init__(
            nn.Linear(width, inner), nn.GELU(approximate="tanh"), nn.Linear(inner, width)
        )


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, width // heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, mlp_ratio)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]"""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ModulatedBlock(nn.Module):
    """adaLN-zero block (Peebles and Xie 2023, section 3.2)."""

    def __init__(self, width: int, heads: int, head_width: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = Attention(width, heads, head_width)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = Mlp(width, mlp_ratio)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """x [B, T, D], modulation [B, 6, D] = shift, scale, gate of attention, then of the MLP."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation[:, :, None].unbind(1)
        x = x + gate1 * self.attention(modulate(self.norm1(x), shift1, scale1))
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x [B, T, D], shift and scale [B, 1, D]."""
    return x * (1 + scale) + shift


def time_features(t: Tensor, width: int) -> Tensor:
    """Sinusoidal features [B, width] of times t [B] in 0..1."""
    half = width // 2
    steps = torch.arange(half, device=t.device, dtype=torch.float32) / half
    angles = 1000.0 * t.float()[:, None] * torch.exp(math.log(LOWEST_FREQUENCY) * steps)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


@torch.no_grad()
def initialise_linear(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for every linear layer below `module` (as in DiT)."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)


@torch.no_grad()
def zero_weights(*layers: nn.Module) -> None:
    """Zero every parameter of `layers`: output layers that a fresh network must not feel."""
    for layer in layers:
        for parameter in layer.parameters():
            parameter.zero_()
