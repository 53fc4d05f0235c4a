"""A Stable Diffusion model of SD 1.5's layout with random weights, a few hundred kilobytes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from training.base.models import NOISE_SCHEDULE

WIDTH = 16


def write_tiny_sd(folder: Path) -> Path:
    """Write unet, vae, text_encoder, tokenizer and scheduler as diffusers saves them."""
    torch.manual_seed(0)
    UNet2DConditionModel(
        block_out_channels=(16, 32, 48, 48), norm_num_groups=8, cross_attention_dim=WIDTH,
        attention_head_dim=4, sample_size=16,
    ).save_pretrained(folder / "unet")  # fmt: skip
    AutoencoderKL(
        block_out_channels=(8, 8, 16, 16), norm_num_groups=8, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ).save_pretrained(folder / "vae")  # fmt: skip
    words = write_tokenizer(folder / "tokenizer")
    CLIPTextModel(
        CLIPTextConfig(
            vocab_size=words, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=77, eos_token_id=words - 1,
            bos_token_id=words - 2, pad_token_id=words - 1,
        )
    ).save_pretrained(folder / "text_encoder")  # fmt: skip
    DDPMScheduler(**NOISE_SCHEDULE).save_pretrained(folder / "scheduler")
    return folder


def write_tokenizer(folder: Path) -> int:
    """A CLIP tokenizer that knows letters only; its number of tokens."""
    folder.mkdir(parents=True)
    letters = [chr(c) for c in range(33, 127)]
    tokens = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return len(tokens)
