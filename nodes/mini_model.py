"""Load Mini Model: the small text-to-image model that ships with DiffLoRA, as ComfyUI models.

The model config class is used directly and never enters ComfyUI's list of supported models, so
the detection of real checkpoints is what it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import comfy.diffusers_convert
import comfy.latent_formats
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import folder_paths
import torch
from comfy.ldm.modules.diffusionmodules import model as autoencoder_layers
from comfy_api.latest import io

from ..difflora_core.errors import BadWeightsFile
from ..difflora_core.mini_world import TEXT_ENCODER, UNET, VAE, Part, open_part
from . import host
from .sockets import CATEGORY

# The whole model is smaller than a preview picture's decoder: single precision everywhere.
DTYPE = torch.float32


class MiniSD15(comfy.supported_models.SD15):
    """Stable Diffusion 1.5 with narrower layers; the widths come from the weights file."""

    memory_usage_factor = 0.2

    def __init__(self, unet_config: dict[str, Any], scaling_factor: float) -> None:
        super().__init__(unet_config)
        self.unet_config |= {"num_heads": unet_config["num_heads"], "num_head_channels": -1}
        self.latent_format = comfy.latent_formats.SD15(scaling_factor)
        self.latent_format.taesd_decoder_name = None


class ChannelRatio(Fraction):
    """A channel multiplier such as 3/2 that gives a whole number when a width is multiplied."""

    def __rmul__(self, width: int) -> int:
        return int(super().__rmul__(width))


def load_model(folder: Path) -> comfy.model_patcher.ModelPatcher:
    """The U-Net, renamed from diffusers' names by ComfyUI's own table."""
    part = open_part(UNET, folder)
    scaling_factor = open_part(VAE, folder).config["scaling_factor"]
    config = MiniSD15(unet_config(part.config), scaling_factor)
    config.set_inference_dtype(DTYPE, None)
    model = config.get_model({}, "", device=comfy.model_management.unet_offload_device())
    _load_strict(model.diffusion_model, _renamed(part, config.unet_config), UNET)
    return comfy.model_patcher.ModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def load_clip(folder: Path) -> comfy.sd.CLIP:
    """The text encoder behind ComfyUI's own SD 1 tokenizer."""
    part = open_part(TEXT_ENCODER, folder)
    width = part.config["hidden_size"]
    encoder = partial(
        comfy.sd1_clip.SDClipModel,
        textmodel_json_config=part.config,
        return_projected_pooled=False,
    )
    target = comfy.supported_models_base.ClipTarget(
        partial(
            comfy.sd1_clip.SD1Tokenizer,
            tokenizer=partial(comfy.sd1_clip.SDTokenizer, embedding_size=width),
        ),
        partial(comfy.sd1_clip.SD1ClipModel, clip_model=encoder),
    )
    clip = comfy.sd.CLIP(
        target,
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        model_options={"dtype": DTYPE},
    )
    tensors = {f"text_model.{key}": tensor for key, tensor in part.tensors.items()}
    # ComfyUI's class has a projection that SD 1 never uses; it must still hold numbers.
    tensors["text_projection.weight"] = torch.eye(width, dtype=DTYPE)
    _load_strict(clip.cond_stage_model.clip_l.transformer, tensors, TEXT_ENCODER)
    return clip


def load_vae(folder: Path) -> comfy.sd.VAE:
    """The autoencoder, renamed from diffusers' names by ComfyUI's own table."""
    part = open_part(VAE, folder)
    tensors = comfy.diffusers_convert.convert_vae_state_dict(part.tensors)
    with _group_norms(part.config["norm_num_groups"]):
        vae = comfy.sd.VAE(sd=tensors, config={"params": _vae_params(part.config)}, dtype=DTYPE)
    _refuse_others(set(vae.first_stage_model.state_dict()) ^ set(tensors), VAE)
    return vae


@contextmanager
def _group_norms(groups: int) -> Iterator[None]:
    """While the autoencoder is built: normalisations of `groups` groups. ComfyUI's class fixes
    them at 32, which narrow layers cannot have."""
    original = autoencoder_layers.ops

    class GroupNorm(original.GroupNorm):
        def __init__(self, num_groups: int, num_channels: int, **settings: Any) -> None:
            super().__init__(groups, num_channels, **settings)

    autoencoder_layers.ops = type("Operations", (original,), {"GroupNorm": GroupNorm})
    try:
        yield
    finally:
        autoencoder_layers.ops = original


def unet_config(config: dict[str, Any]) -> dict[str, Any]:
    """ComfyUI's U-Net settings for a diffusers config with attention on every level."""
    widths, blocks = config["block_out_channels"], config["layers_per_block"]
    levels = len(widths)
    return {
        "image_size": 32,
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": widths[0],
        "channel_mult": [width // widths[0] for width in widths],
        "num_res_blocks": [blocks] * levels,
        "transformer_depth": [1] * (blocks * levels),
        "transformer_depth_middle": 1,
        "transformer_depth_output": [1] * ((blocks + 1) * levels),
        "context_dim": config["cross_attention_dim"],
        "num_heads": config["attention_head_dim"],
        "use_spatial_transformer": True,
        "use_linear_in_transformer": False,
        "use_temporal_attention": False,
        "adm_in_channels": None,
        "legacy": False,
        "dtype": DTYPE,
    }


def _renamed(part: Part, unet_config: dict[str, Any]) -> dict[str, torch.Tensor]:
    table = comfy.utils.unet_to_diffusers(unet_config)
    return {table.get(key, key): tensor for key, tensor in part.tensors.items()}


def _vae_params(config: dict[str, Any]) -> dict[str, Any]:
    widths, channels = config["block_out_channels"], config["latent_channels"]
    layers = {
        "double_z": True,
        "z_channels": channels,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": widths[0],
        "ch_mult": [ChannelRatio(width, widths[0]) for width in widths],
        "num_res_blocks": config["layers_per_block"],
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    return {"ddconfig": layers, "embed_dim": channels}


def _load_strict(module: torch.nn.Module, tensors: dict[str, torch.Tensor], name: str) -> None:
    """What is there is known after loading only: with dynamic VRAM ComfyUI's layers have no
    weights before.
    """
    wrong = module.load_state_dict(tensors, strict=False)
    _refuse_others({*wrong.missing_keys, *wrong.unexpected_keys}, name)


def _refuse_others(keys: set[str], name: str) -> None:
    if keys:
        raise BadWeightsFile(
            f"{name} does not fit the mini model: {len(keys)} tensors are missing or unknown "
            f"({', '.join(sorted(keys)[:3])}).",
            hint="Install DiffLoRA again, so that its files and its code have the same version.",
        )


class LoadMiniModel(io.ComfyNode):
    """MODEL, CLIP and VAE of the mini world."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffLoRA_LoadMiniModel",
            display_name="Load Mini Model",
            category=CATEGORY,
            description="Loads the small drawn-portrait model that ships with DiffLoRA. It makes "
            "128 x 128 pictures in seconds on any CPU, to try everything without a download.",
            outputs=[
                io.Model.Output(
                    display_name="MODEL", tooltip="The mini diffusion model, for a KSampler."
                ),
                io.Clip.Output(
                    display_name="CLIP", tooltip="Its text encoder, for CLIP Text Encode."
                ),
                io.Vae.Output(
                    display_name="VAE", tooltip="Its autoencoder, for VAE Decode and VAE Encode."
                ),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        folder = host.MINI_FOLDER
        return io.NodeOutput(load_model(folder), load_clip(folder), load_vae(folder))


NODES = [LoadMiniModel]
