"""LoRA autoencoder, preset `paper`: 1-D convolutions over the flattened vector.

DiffLoRA (arXiv 2408.06740) compresses the flattened LoRA vector nearly 300 times with 1-D
convolutions. Kernel sizes and channels are not public; here each stage is a strided convolution and
a residual block. Ours alone: a learned position at the narrowest point of the decoder, because a
convolution cannot know which layer of the base model it is writing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..blocks import zero_weights
from ..lora_space import LoraSpace

GROUPS = 8  # of the group normalisations


@dataclass(frozen=True)
class Conv1dConfig:
    kind: Literal["conv1d"] = "conv1d"
    widths: tuple[int, ...] = (16, 32, 64, 96)
    """channels after each stage"""
    stride: int = 4
    """shortening of each stage, even; the vector is padded to a multiple of stride ** stages"""
    channels: int = 8
    """C, latent channels; compression = stride ** stages / channels"""

    def __post_init__(self) -> None:
        if self.stride % 2:
            raise ValueError(f"stride must be even, found {self.stride}")
        if any(width % GROUPS for width in self.widths):
            raise ValueError(f"every width must be a multiple of {GROUPS}, found {self.widths}")


class ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(GROUPS, width),
            nn.SiLU(),
            nn.Conv1d(width, width, 3, padding=1),
            nn.GroupNorm(GROUPS, width),
            nn.SiLU(),
            nn.Conv1d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, N] -> [B, C, N]"""
        return x + self.layers(x)


class Conv1dAutoencoder(nn.Module):
    """Values in standard units [B, D] <-> latent [B, T, C], T = D / stride^stages, rounded up."""

    def __init__(self, config: Conv1dConfig, space: LoraSpace) -> None:
        super().__init__()
        widths, stride = config.widths, config.stride
        shortening = stride ** len(widths)
        self.size = space.size
        length = math.ceil(space.size / shortening)
        self.padding = length * shortening - space.size
        self.latent_shape = (length, config.channels)
        self.encoder = nn.Sequential(
            *(_shorten(i, o, stride) for i, o in pairwise((1, *widths))),
            nn.GroupNorm(GROUPS, widths[-1]),
            nn.Conv1d(widths[-1], config.channels, 1),
        )
        self.position = nn.Parameter(torch.empty(widths[-1], length))
        self.decoder_in = nn.Conv1d(config.channels, widths[-1], 1)
        self.decoder = nn.Sequential(*(_lengthen(i, o, stride) for i, o in pairwise(widths[::-1])))
        self.decoder_out = _lengthen(widths[0], 1, stride)
        self.initialise()

    def initialise(self) -> None:
        """Everything about initial weights: convolutions as torch does; residual branches and the
        last layer of the decoder zero, so that a fresh predictor gives the average LoRA."""
        nn.init.normal_(self.position, std=0.5)
        for block in self.modules():
            if isinstance(block, ResidualBlock):
                zero_weights(block.layers[-1])
        zero_weights(self.decoder_out[-1])

    def encode(self, values: Tensor) -> Tensor:
        """[B, D] in standard units -> latent [B, T, C]"""
        padded = F.pad(values, (0, self.padding))
        return rearrange(self.encoder(padded[:, None]), "b c t -> b t c")

    def decode(self, latent: Tensor) -> Tensor:
        """latent [B, T, C] -> [B, D] in standard units"""
        x = self.decoder_in(rearrange(latent, "b t c -> b c t")) + self.position
        return self.decoder_out(self.decoder(x))[:, 0, : self.size]


def _shorten(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """[B, inputs, N] -> [B, outputs, N / stride]"""
    convolution = nn.Conv1d(inputs, outputs, 2 * stride, stride, padding=stride // 2)
    return nn.Sequential(convolution, ResidualBlock(outputs))


def _lengthen(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """[B, inputs, N] -> [B, outputs, N * stride]"""
    convolution = nn.ConvTranspose1d(inputs, outputs, 2 * stride, stride, padding=stride // 2)
    return nn.Sequential(ResidualBlock(inputs), nn.SiLU(), convolution)
