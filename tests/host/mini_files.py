"""A mini world of random weights, written as the shipped one is: for parity, not for pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

UNET_CONFIG = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [64, 128],
    "layers_per_block": 1,
    "cross_attention_dim": 128,
    "attention_head_dim": 4,
    "norm_num_groups": 32,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
VAE_CONFIG = {
    "block_out_channels": [64, 64, 96, 96],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.9,
}
TEXT_CONFIG = {
    "vocab_size": 49408,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 49407,
}
KNOWN_TOKENS = 64


def build_unet(config: dict[str, Any]) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_config(config).eval()


def build_vae(config: dict[str, Any]) -> AutoencoderKL:
    return AutoencoderKL.from_config(config).eval()


def build_text_encoder(config: dict[str, Any]) -> CLIPTextModel:
    return CLIPTextModel(CLIPTextConfig(**config)).eval()


def write_random_world(folder: Path, seed: int = 0) -> None:
    """Write unet, vae and text_encoder files into `folder`."""
    torch.manual_seed(seed)
    _write(folder / "unet.safetensors", build_unet(UNET_CONFIG), UNET_CONFIG)
    _write(folder / "vae.safetensors", build_vae(VAE_CONFIG), VAE_CONFIG)
    encoder = build_text_encoder(TEXT_CONFIG)
    _write(folder / "text_encoder.safetensors", encoder, TEXT_CONFIG)


def _write(path: Path, model: nn.Module, config: dict[str, Any]) -> None:
    tensors = {key: value.contiguous() for key, value in model.state_dict().items()}
    if isinstance(model, CLIPTextModel):
        tensors = _compact({key.removeprefix("text_model."): t for key, t in tensors.items()})
    halves = {key: t.half() if t.is_floating_point() else t for key, t in tensors.items()}
    save_file(halves, path, {"config": json.dumps(config)})


def _compact(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    table = tensors.pop("embeddings.token_embedding.weight")
    tensors.pop("embeddings.position_ids", None)
    index = torch.randint(KNOWN_TOKENS, (len(table),), dtype=torch.int32)
    return {"token_rows": table[:KNOWN_TOKENS].clone(), "token_index": index, **tensors}
