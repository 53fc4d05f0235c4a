"""LoRA autoencoder, preset `default`: one token per layer with module-aware heads.

A flat vector hides which value belongs to which layer, and with a frozen A every layer has its own
basis, so heads shared between layers cannot fit. Each layer therefore owns `basis` directions; the
encoder projects onto them and the decoder adds them up (tied weights, like a principal component
analysis per layer that is learned). Transformer blocks mix the layers in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..blocks import Block, initialise_linear, zero_weights
from ..lora_space import LoraSpace


@dataclass(frozen=True)
class TokensConfig:
    kind: Literal["tokens"] = "tokens"
    width: int = 128
    """D, token width of the transformer blocks"""
    encoder_depth: int = 1
    decoder_depth: int = 1
    heads: int = 4
    mlp_ratio: float = 4.0
    basis: int = 32
    """directions per layer"""
    channels: int = 16
    """C, latent numbers per layer"""

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")


class LayerHeads(nn.Module):
    """Own linear maps between the values of each layer and `basis` coefficients.

    Layers with equally many values share one stacked parameter, so that a few batched products
    serve hundreds of layers.
    """

    def __init__(self, counts: Sequence[int], basis: int) -> None:
        super().__init__()
        self.counts = list(counts)
        members: dict[int, list[int]] = {}
        for index, count in enumerate(counts):
            members.setdefault(count, []).append(index)
        self.members = members
        self.directions = nn.ParameterDict(
            {str(n): torch.empty(len(group), n, basis) for n, group in members.items()}
        )
        self.offsets = nn.ParameterDict(
            {str(n): torch.empty(len(group), n) for n, group in members.items()}
        )

    def initialise(self) -> None:
        """Random directions of about unit length; offsets zero (the mean is in the statistics)."""
        for count, weight in self.directions.items():
            nn.init.normal_(weight, std=int(count) ** -0.5)
        for offset in self.offsets.values():
            nn.init.zeros_(offset)

    @torch.no_grad()
    def fit(self, values: Tensor) -> None:
        """Start at each layer's principal directions in LoRAs [N, D]; with fewer of them than
        `basis`, the other directions stay."""
        parts = values.float().split(self.counts, dim=-1)
        for count, group in self.members.items():
            weight = self.directions[str(count)]
            for row, i in enumerate(group):
                found = torch.linalg.svd(parts[i], full_matrices=False).Vh[: weight.shape[-1]]
                weight[row, :, : len(found)] = found.mT

    def compress(self, values: Tensor) -> Tensor:
        """[B, D] -> coefficients [B, L, basis]"""
        parts = values.split(self.counts, dim=-1)
        found: list[Tensor] = [values] * len(parts)
        for count, group in self.members.items():
            stacked = torch.stack([parts[i] for i in group])  # [G, B, n]
            stacked = stacked - self.offsets[str(count)][:, None]
            made = torch.bmm(stacked, self.directions[str(count)])
            for i, coefficients in zip(group, made, strict=True):
                found[i] = coefficients
        return torch.stack(found, dim=1)

    def expand(self, coefficients: Tensor) -> Tensor:
        """[B, L, basis] -> [B, D]"""
        parts: list[Tensor] = [coefficients] * len(self.counts)
        for count, group in self.members.items():
            chosen = torch.stack([coefficients[:, i] for i in group])  # [G, B, basis]
            offset = self.offsets[str(count)][:, None]
            made = torch.bmm(chosen, self.directions[str(count)].mT) + offset
            for i, values in zip(group, made, strict=True):
                parts[i] = values
        return torch.cat(parts, dim=-1)


class LayerPosition(nn.Module):
    """Embedding of each layer: that of its block plus that of its kind of projection."""

    def __init__(self, names: Sequence[str], width: int) -> None:
        super().__init__()
        pairs = [split_layer_name(name) for name in names]
        blocks, kinds = (list(dict.fromkeys(side)) for side in zip(*pairs, strict=True))
        self.block_rows = [blocks.index(block) for block, _ in pairs]
        self.kind_rows = [kinds.index(kind) for _, kind in pairs]
        self.blocks = nn.Parameter(torch.empty(len(blocks), width))
        self.kinds = nn.Parameter(torch.empty(len(kinds), width))

    def initialise(self) -> None:
        nn.init.normal_(self.blocks, std=0.5)
        nn.init.normal_(self.kinds, std=0.5)

    def forward(self) -> Tensor:
        """[L, D]"""
        return self.blocks[self.block_rows] + self.kinds[self.kind_rows]


class TokensAutoencoder(nn.Module):
    """Values in standard units [B, D] <-> latent [B, L, C], one latent token per layer."""

    def __init__(self, config: TokensConfig, space: LoraSpace) -> None:
        super().__init__()
        width, names = config.width, [spec.name for spec in space.layers]
        self.latent_shape = (len(names), config.channels)
        self.layer_heads = LayerHeads(space.counts, config.basis)
        self.encoder_position = LayerPosition(names, width)
        self.encoder_in = nn.Linear(config.basis, width)
        self.encoder_blocks = _blocks(config, config.encoder_depth)
        self.encoder_out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, config.channels))
        self.decoder_position = LayerPosition(names, width)
        self.decoder_in = nn.Linear(config.channels, width)
        self.decoder_blocks = _blocks(config, config.decoder_depth)
        self.decoder_out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, config.basis))
        self.initialise()

    def initialise(self) -> None:
        """Everything about initial weights: linear layers by Xavier; the residual branches of the
        blocks at zero, so that a fresh trunk is linear; the last layer of the decoder at zero, so
        that a fresh predictor gives the average LoRA."""
        initialise_linear(self)
        for position in (self.encoder_position, self.decoder_position):
            position.initialise()
        self.layer_heads.initialise()
        for part in self.modules():
            if isinstance(part, Block):
                zero_weights(part.attention.out, part.mlp[2])
        zero_weights(self.decoder_out[1])

    def encode(self, values: Tensor) -> Tensor:
        """[B, D] in standard units -> latent [B, L, C]"""
        tokens = self.encoder_in(self.layer_heads.compress(values)) + self.encoder_position()
        return self.encoder_out(self.encoder_blocks(tokens))

    def decode(self, latent: Tensor) -> Tensor:
        """latent [B, L, C] -> [B, D] in standard units"""
        tokens = self.decoder_in(latent) + self.decoder_position()
        return self.layer_heads.expand(self.decoder_out(self.decoder_blocks(tokens)))


def split_layer_name(name: str) -> tuple[str, str]:
    """ "unet...transformer_blocks.0.attn1.to_out.0" -> ("unet...transformer_blocks.0",
    "attn1.to_out.0"); names without an attention level are cut before their last part."""
    for marker in (".attn1.", ".attn2.", ".self_attn."):
        if marker in name:
            block, kind = name.rsplit(marker, 1)
            return block, marker.strip(".") + "." + kind
    block, _, kind = name.rpartition(".")
    return block, kind


def _blocks(config: TokensConfig, depth: int) -> nn.Sequential:
    return nn.Sequential(
        *(Block(config.width, config.heads, config.mlp_ratio) for _ in range(depth))
    )
