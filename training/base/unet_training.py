"""Trains the U-Net together with its text encoder on a pool of encoded portraits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import parallel, trained_for
from ..artifacts import read_artifact, save_artifact
from ..budget import train
from ..config import Config
from ..run_folder import RunFolder
from .config import UnetConfig
from .models import (
    TextModel,
    Unet,
    build_compact_text,
    build_unet,
    check_start,
    open_text,
    open_unet,
    open_vae,
    text_config,
    text_tensors,
    unet_config,
)
from .noise import STEPS, NoiseSchedule
from .pool import build_pool, open_pool
from .tokens import UNKNOWN, rows

_MEASURED_SEED = 99
_MEASURED_TOGETHER = 32


def train_unet(config: Config, folder: RunFolder) -> None:
    """Train on the trained VAE's latents; writes the artifacts `unet` and `text_encoder`.

    Under torchrun (see `parallel`) every process takes `batch` latents per step.
    """
    base, device = config.base, config.run.torch_device()
    if base.unet.start == "artifact":
        check_start(config, "unet", unet_config(base.unet, base.text))
        check_start(config, "text_encoder", text_config(base.text))
    part = folder.part("unet")
    trained_for.begin(part, decisive(config))
    pool = open_pool(config, part.path / "pool.safetensors", device)
    torch.manual_seed(config.run.seed)  # the same weights whether the pool was drawn or found
    unet = build_unet(unet_config(base.unet, base.text))
    unet = unet.to(device, memory_format=torch.channels_last)
    text = build_compact_text(text_config(base.text)).to(device)
    if base.unet.start == "artifact":
        unet.load_state_dict(open_unet(config).state_dict())
        text.load_state_dict(open_text(config).state_dict())
    schedule, empty = NoiseSchedule(device), rows([""]).to(device)
    denoise = torch.compile(unet) if base.unet.compile else unet

    def step(i: int) -> dict[str, Tensor]:
        latents, prompts, faces = pool.draw(base.unet.batch)
        prompts = drop_words(prompts, empty, base.unet)
        noise, t = torch.randn_like(latents), schedule.spread(len(latents))
        context = text(prompts).last_hidden_state
        predicted = denoise(schedule.add_noise(latents, noise, t), t, context).sample
        error = (predicted.float() - noise).square().mean(1)
        return unet_losses(error, faces, schedule.min_snr_weight(t, base.unet.min_snr), base.unet)

    trainer = train(
        {"unet": unet, "text": text},
        base.unet.optim,
        config.run,
        part,
        step,
        batch=base.unet.batch,
        minutes=base.unet.minutes,
    )
    if parallel.rank() > 0:
        return
    unet.load_state_dict(trainer.averaged("unet"))
    text.load_state_dict(trainer.averaged("text"))
    figures = {"pictures": len(pool), "steps": trainer.step} | measure_unet(config, unet, text)
    built_from = unet_config(base.unet, base.text)
    save_artifact(config, "unet", unet.state_dict(), built_from, figures)
    words = text_tensors(text.state_dict())
    save_artifact(config, "text_encoder", words, text_config(base.text), figures)


def decisive(config: Config) -> dict[str, Any]:
    """What the training depends on, see `trained_for`."""
    values = trained_for.settings(config, "base.unet", "base.text") | trained_for.drawings()
    values |= trained_for.inputs(config, "vae")
    values["scaling_factor"] = read_artifact(config, "vae")[1]["scaling_factor"]
    again = config.base.unet.start == "artifact"
    return values | (trained_for.start(config, "unet", "text_encoder") if again else {})


def unet_losses(
    error: Tensor, faces: Tensor, by_time: Tensor, config: UnetConfig
) -> dict[str, Tensor]:
    """The weighted loss, and the plain errors everywhere and in faces (means, to be logged).

    A weight that depends on place and time leaves the best prediction as it is; it says where a
    small network errs least. error, faces [B, H, W]; by_time [B].
    """
    weight = 1 + config.face_weight * faces
    loss = (error * weight * by_time[:, None, None]).mean() / weight.mean()
    inside = (error * faces).sum() / faces.sum().clamp(min=1)
    return {"loss": loss, "epsilon": error.mean(), "epsilon_faces": inside}


@torch.no_grad()
def measure_unet(config: Config, unet: Unet, text: TextModel) -> dict[str, float]:
    """Mean epsilon error on held-out people, everywhere and in faces.

    Pictures, timesteps and noise follow from a seed of their own, so that any two models that
    share a VAE can be compared.
    """
    device, settings = config.run.torch_device(), config.base.unet
    few = replace(settings, pool=settings.measured, styles=())
    held = build_pool(open_vae(config).to(device), few, _MEASURED_SEED, device, split="test")
    generator, schedule = torch.Generator().manual_seed(_MEASURED_SEED), NoiseSchedule(device)
    noise = torch.randn(held.latents.shape, generator=generator).to(device)
    t = torch.randint(STEPS, (len(held),), generator=generator).to(device)
    errors = []
    for rows_of in torch.arange(len(held), device=device).split(_MEASURED_TOGETHER):
        noisy = schedule.add_noise(held.latents[rows_of].float(), noise[rows_of], t[rows_of])
        context = text(held.prompts[rows_of].long()).last_hidden_state
        predicted = unet(noisy, t[rows_of], context).sample
        errors.append((predicted - noise[rows_of]).square().mean(1))
    error, faces = torch.cat(errors), held.faces.float()
    inside = (error * faces).sum() / faces.sum()
    return {"epsilon": error.mean().item(), "epsilon_faces": inside.item()}


def drop_words(prompts: Tensor, empty: Tensor, config: UnetConfig) -> Tensor:
    """Empty some prompts and make some tokens unknown; rows [B, 77]."""
    device = prompts.device
    whole = torch.rand(len(prompts), 1, device=device) < config.drop_prompt
    single = torch.rand(prompts.shape, device=device) < config.drop_token
    framed = (prompts == empty[0, 0]) | (prompts == empty[0, 1])  # start and end stay
    prompts = torch.where(single & ~framed, torch.full_like(prompts, UNKNOWN), prompts)
    return torch.where(whole, empty, prompts)
