"""Tiny seeded predictors for tests; their zero output layers are filled, so that inputs matter."""

from __future__ import annotations

import torch

from difflora_core.autoencoder.conv1d import Conv1dConfig
from difflora_core.autoencoder.tokens import TokensConfig
from difflora_core.diffusion import DiffusionConfig
from difflora_core.dit import DitConfig
from difflora_core.features import Features, fuse
from difflora_core.lora_space import LayerSpec, LoraSpace
from difflora_core.mif import MixerConfig
from difflora_core.predictor import Predictor
from difflora_core.predictor_config import EncoderInfo, PredictorConfig

FACE, IMAGE = 24, 12
KINDS = ("attn1.to_q", "attn1.to_out.0", "attn2.to_k")
SPACE = LoraSpace(
    "mini",
    tuple(
        LayerSpec(f"unet.down_blocks.{b}.transformer_blocks.0.{k}", 16, 16 * (b + 1))
        for b in range(2)
        for k in KINDS
    ),
    rank=2,
    alpha=2.0,
)


def tiny_config(preset: str = "default", space: LoraSpace = SPACE) -> PredictorConfig:
    tokens = TokensConfig(width=16, heads=2, basis=6, channels=4)
    conv = Conv1dConfig(widths=(8, 8), stride=4, channels=4)
    paper = preset == "paper"
    return PredictorConfig(
        space,
        MixerConfig(FACE, IMAGE, width=16, gate_groups=1 if paper else 16),
        conv if paper else tokens,
        DitConfig(16, 2, 2, 4, 2.0, "per_block", False, False)
        if paper
        else DitConfig(16, 2, 2, 4, 2.0),
        DiffusionConfig("linear", "x0", "uniform", "uniform") if paper else DiffusionConfig(),
        face_encoder=EncoderInfo("pack", "non-commercial"),
        image_encoder=EncoderInfo("tower", "MIT"),
        name=f"tiny-{preset}",
    )


def tiny_predictor(preset: str = "default", space: LoraSpace = SPACE) -> Predictor:
    torch.manual_seed(0)
    predictor = Predictor(tiny_config(preset, space)).eval()
    with torch.no_grad():
        for parameter in predictor.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2)
        for name, buffer in predictor.named_buffers():
            buffer.uniform_(0.5, 1.5) if name.endswith("std") else buffer.normal_(std=0.1)
    return predictor


def tiny_features(photos: int = 1, seed: int = 0) -> Features:
    g = torch.Generator().manual_seed(seed)
    ones = torch.ones(photos)
    return fuse(
        torch.randn(photos, FACE, generator=g),
        torch.randn(photos, IMAGE, generator=g),
        ones,
        ones,
        face_encoder="pack",
        image_encoder="tower",
    )
