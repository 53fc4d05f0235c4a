"""One LoRA file, one picture: diffusers with PEFT draws what ComfyUI draws."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from comfy_host import Host
from diffusers.loaders import StableDiffusionLoraLoaderMixin as LoraMixin
from mini_files import build_text_encoder, build_unet, build_vae
from prompts import saved_lora, with_lora_file
from torch import Tensor, nn

from difflora_core.mini_world import TEXT_ENCODER, UNET, VAE, open_part

STEPS, GUIDANCE, TOLERANCE = 4, 4.0, 2e-4
PROMPT = "a photo of sks person smiling"


def test_same_picture_in_diffusers_with_peft(host: Host, world: Path, base_prompt: Any) -> None:
    file = saved_lora(host)
    extra = with_lora_file(file)
    theirs = host.run(base_prompt(7, model=["apply", 0], more=extra, steps=STEPS))["picture"]
    base = host.run(base_prompt(7, steps=STEPS))["picture"]
    assert (draw(host, world, None) - base).abs().max() < TOLERANCE
    path = host.base / "models" / "loras" / file
    assert (draw(host, world, path) - theirs).abs().max() < TOLERANCE
    assert (base - theirs).abs().max() > 50 * TOLERANCE


@torch.inference_mode()
def draw(host: Host, world: Path, lora: Path | None) -> Tensor:
    """Text encoder, U-Net and VAE of transformers and diffusers; ComfyUI gives sigmas and noise."""
    import comfy.sample
    import comfy.samplers

    sampling = host.module("nodes.mini_model").load_model(world).get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", STEPS)
    latent = torch.zeros(1, 4, 16, 16)
    x = comfy.sample.prepare_noise(latent, 7) * (1 + sigmas[0] ** 2).sqrt()
    unet = opened(UNET, build_unet, world)
    if lora is not None:
        state, alphas = LoraMixin.lora_state_dict(lora)
        LoraMixin.load_lora_into_unet(state, alphas, unet)
    context = encode(host, world, [PROMPT, ""])
    for sigma, following in pairwise(sigmas):
        time = sampling.timestep(sigma[None]).float().expand(2)
        scaled = (x / (1 + sigma**2).sqrt()).expand(2, -1, -1, -1)
        positive, negative = unet(scaled, time, context).sample.chunk(2)
        x = x + (negative + GUIDANCE * (positive - negative)) * (following - sigma)
    scale = open_part(VAE, world).config["scaling_factor"]
    picture = opened(VAE, build_vae, world).decode(x / scale).sample
    return (picture.movedim(1, -1) / 2 + 0.5).clamp(0, 1)


def encode(host: Host, world: Path, prompts: list[str]) -> Tensor:
    """[B, 77, width] by transformers, on the ids of ComfyUI's tokenizer."""
    clip = host.module("nodes.mini_model").load_clip(world)
    ids = [[token for token, _ in clip.tokenize(prompt)["l"][0]] for prompt in prompts]
    return opened(TEXT_ENCODER, build_text_encoder, world)(torch.tensor(ids)).last_hidden_state


def opened(name: str, build: Any, world: Path) -> nn.Module:
    tensors, config = open_part(name, world)
    model = build(config)
    model.load_state_dict(tensors)
    return model
