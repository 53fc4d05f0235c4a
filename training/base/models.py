"""Builds the parts of the mini model from their configs and opens trained ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from difflora_core.errors import BadConfig
from difflora_core.weights_file import expecting

from ..artifacts import artifact, read_artifact
from ..config import Config
from .config import NORM_GROUPS, SIDE, TextConfig, UnetConfig, VaeConfig
from .tokens import CONTEXT, END, START, known_tokens, token_index

#: Stable Diffusion's noise schedule, which ComfyUI assumes for models of the SD 1.5 kind
NOISE_SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
# AutoencoderKL, UNet2DConditionModel and CLIPTextModel: the annotations of the packages do not
# survive a type checker (decorated methods, dictionaries with attributes, tuples or classes)
Vae = Unet = TextModel = Any
TOKEN_TABLE = "embeddings.token_embedding.weight"


def vae_config(config: VaeConfig) -> dict[str, Any]:
    levels = len(config.channels)
    return {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": list(config.channels),
        "layers_per_block": 1,
        "norm_num_groups": config.groups,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "sample_size": SIDE,
    }


def unet_config(config: UnetConfig, text: TextConfig) -> dict[str, Any]:
    levels = len(config.channels)
    return {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": list(config.channels),
        "layers_per_block": config.layers,
        "cross_attention_dim": text.width,
        "attention_head_dim": config.heads,  # diffusers' name for the number of heads
        "norm_num_groups": NORM_GROUPS,
        "down_block_types": ["CrossAttnDownBlock2D"] * levels,
        "up_block_types": ["CrossAttnUpBlock2D"] * levels,
    }


def text_config(config: TextConfig) -> dict[str, Any]:
    return {
        "vocab_size": len(token_index()),
        "hidden_size": config.width,
        "intermediate_size": 4 * config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "max_position_embeddings": CONTEXT,
        "hidden_act": "quick_gelu",
        "bos_token_id": START,
        "eos_token_id": END,
        "pad_token_id": END,
    }


def build_vae(config: dict[str, Any]) -> Vae:
    return AutoencoderKL(**config)


def start_residuals_at_zero(vae: Vae) -> None:
    """Every residual branch starts as nothing (Goyal et al. 2017, section 5.1).

    The fresh network is then nearly linear and learns to copy several times sooner.
    """
    for name, module in vae.named_modules():
        if name.endswith(("conv2", "to_out.0")) and isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.zeros_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def build_unet(config: dict[str, Any]) -> Unet:
    return UNet2DConditionModel(**config)


def build_compact_text(config: dict[str, Any]) -> TextModel:
    """A text model whose token table has only the rows of `tokens.rows`.

    The ids it sees are table rows, so its end token is a row number too.
    """
    end = int(token_index()[END])
    compact: dict[str, Any] = config | {
        "vocab_size": len(known_tokens()) + 1,
        "bos_token_id": int(token_index()[START]),
        "eos_token_id": end,
        "pad_token_id": end,
    }
    return CLIPTextModel(CLIPTextConfig(**compact))


def text_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict of a compact text model -> tensors of the weights file."""
    table = state[TOKEN_TABLE]
    rest = {k: v for k, v in state.items() if k != TOKEN_TABLE and not k.endswith("position_ids")}
    return rest | {"token_rows": table, "token_index": token_index()}


def open_vae(config: Config) -> Vae:
    return _opened(config, "vae", build_vae)


def open_unet(config: Config) -> Unet:
    return _opened(config, "unet", build_unet)


def open_text(config: Config) -> TextModel:
    """The trained text encoder over compact rows (see `tokens.rows`)."""
    return _opened(config, "text_encoder", build_compact_text)


def check_start(config: Config, name: str, wanted: dict[str, Any]) -> None:
    """Whether artifact `name` has the sizes that this configuration asks for. Errors: BadConfig."""
    _, found = read_artifact(config, name)
    unlike = sorted(key for key in wanted if found.get(key) != wanted[key])
    if unlike:
        told = ", ".join(f"{key} {found.get(key)} there and {wanted[key]} here" for key in unlike)
        raise BadConfig(
            f"Training cannot start from the artifact {name}, which is built otherwise: {told}.",
            hint="Set the sizes as they were, or start=fresh.",
        )


def _opened(config: Config, name: str, build: Callable[[dict[str, Any]], nn.Module]) -> Any:
    tensors, built_from = read_artifact(config, name)
    if "token_rows" in tensors:
        rows = {k: v for k, v in tensors.items() if not k.startswith("token_")}
        tensors = rows | {TOKEN_TABLE: tensors["token_rows"]}
    with expecting(artifact(config, name), f"a {name} of ours", "Take one that train-base wrote."):
        module = build(built_from)
        module.load_state_dict({k: v.float() for k, v in tensors.items()})
    return module.requires_grad_(False).eval()


def alphas(device: torch.device) -> Tensor:
    """Cumulative products of 1 - beta, [1000] float32."""
    start, end = NOISE_SCHEDULE["beta_start"] ** 0.5, NOISE_SCHEDULE["beta_end"] ** 0.5
    betas = (
        torch.linspace(start, end, NOISE_SCHEDULE["num_train_timesteps"], dtype=torch.float64) ** 2
    )
    return (1 - betas).cumprod(0).float().to(device)
