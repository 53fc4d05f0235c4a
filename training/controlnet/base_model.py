"""The frozen text-to-image model that a ControlNet is trained for: the mini one, or SD 1.5."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from difflora_core.errors import DiffLoRAError

from ..base.models import NOISE_SCHEDULE, Unet, Vae, open_text, open_unet, open_vae
from ..base.tokens import rows
from ..config import Config

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
"""Folders of a Stable Diffusion model in diffusers' layout."""
SCHEDULE: dict[str, Any] = NOISE_SCHEDULE | {
    "prediction_type": "epsilon", "trained_betas": None, "rescale_betas_zero_snr": False
}  # fmt: skip
"""Of Stable Diffusion 1, in the words of diffusers' schedulers."""


@dataclass(frozen=True)
class BaseModel:
    """VAE, U-Net and text encoder, frozen on one device; epsilon prediction on SD's schedule."""

    vae: Vae
    unet: Unet
    encode: Callable[[Sequence[str]], Tensor]
    """Prompts -> context [B, 77, width]."""
    name: str

    @property
    def device(self) -> torch.device:
        return self.unet.device


def open_base(config: Config) -> BaseModel:
    """The model of `controlnet.model`. Errors: MissingArtifact, DiffLoRAError."""
    device = config.run.torch_device()
    folder = config.controlnet.model
    base = _open_folder(Path(folder), device) if folder else _open_mini(config, device)
    for module in (base.vae, base.unet):  # convolutions are faster so, most of all on a CPU
        module.to(memory_format=torch.channels_last)
    return base


def _open_mini(config: Config, device: torch.device) -> BaseModel:
    text = open_text(config).to(device)

    @torch.no_grad()
    def encode(prompts: Sequence[str]) -> Tensor:
        return text(rows(prompts).to(device)).last_hidden_state

    return BaseModel(open_vae(config).to(device), open_unet(config).to(device), encode, "mini")


def _open_folder(folder: Path, device: torch.device) -> BaseModel:
    missing = [part for part in PARTS if not (folder / part).is_dir()]
    if missing:
        raise DiffLoRAError(
            f"{folder} is no Stable Diffusion model in diffusers' layout: it has no "
            f"{', '.join(missing)}.",
            hint="controlnet.model wants the folder that holds model_index.json.",
        )
    _check_schedule(folder / "scheduler" / "scheduler_config.json")
    vae = _opened(AutoencoderKL, folder, "vae", device)
    unet = _opened(UNet2DConditionModel, folder, "unet", device)
    _check_unet(unet, vae, folder.name)
    return BaseModel(vae, unet, _text_encoder(folder, device), folder.name)


def _text_encoder(folder: Path, device: torch.device) -> Callable[[Sequence[str]], Tensor]:
    text = _opened(CLIPTextModel, folder, "text_encoder", device)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)

    @torch.no_grad()
    def encode(prompts: Sequence[str]) -> Tensor:
        ids = tokenizer(
            list(prompts), padding="max_length", truncation=True, return_tensors="pt",
            max_length=text.config.max_position_embeddings,
        ).input_ids  # fmt: skip
        return text(ids.to(device)).last_hidden_state

    return encode


def _opened(kind: Any, folder: Path, part: str, device: torch.device) -> Any:
    try:
        module: nn.Module = kind.from_pretrained(folder / part, local_files_only=True)
    except (OSError, ValueError) as error:
        raise DiffLoRAError(f"{folder / part} cannot be opened: {error}") from error
    # diffusers' own `to` warns of a change of dtype even where there is none
    return nn.Module.to(module, device, torch.float32).requires_grad_(False).eval()


def _check_unet(unet: Unet, vae: Vae, name: str) -> None:
    """Errors: DiffLoRAError for U-Nets that are not of Stable Diffusion 1's form."""
    if found := _unlike_sd1(unet.config, vae.config.latent_channels):
        raise DiffLoRAError(
            f"The U-Net of {name} {found}, which is not how Stable Diffusion 1 is built.",
            hint="SD 1.5 and models that were trained on from it fit; SD 2, SDXL and inpainting "
            "do not.",
        )


def _unlike_sd1(config: Any, latent_channels: int) -> str:
    """In what a U-Net differs; empty where it does not."""
    if extra := config.addition_embed_type or config.class_embed_type:
        return f"wants the condition {extra!r}"
    if config.in_channels != latent_channels:
        return f"wants {config.in_channels} channels of input"
    if config.use_linear_projection:  # of Stable Diffusion 2, whose modules have the same names
        return "projects by linear layers"
    return ""


def _check_schedule(path: Path) -> None:
    """Errors: DiffLoRAError for a model of another schedule or prediction."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DiffLoRAError(f"Cannot read {path}: {error}.") from error
    found = dict(DDPMScheduler().config) | found  # what a file leaves out means diffusers' default
    wrong = {key: found[key] for key, value in SCHEDULE.items() if found[key] != value}
    if wrong:
        raise DiffLoRAError(
            f"{path.parent.parent.name} has the schedule {reprlib.repr(wrong)}, expected Stable "
            "Diffusion 1's.",
            hint="Only models that predict epsilon on it, such as SD 1.5, can be trained here.",
        )
