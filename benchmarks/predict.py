"""What a prediction costs, in seconds and in denoising steps of the model it personalises."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import UNet2DConditionModel

from difflora_core.features import fuse
from difflora_core.lora_space import LoraSpace
from difflora_core.predictor import Predictor
from difflora_core.presets import preset

from .measuring import Case, alternate, case, in_own_process

FACE, IMAGE = 512, 1024
ROUNDS = 3
#: stabilityai/stable-diffusion-xl-base-1.0, unet/config.json, where it differs from the defaults
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}


def run() -> list[Case]:
    return [in_own_process(mini), in_own_process(sdxl_alone), in_own_process(sdxl)]


def mini() -> Case:
    """The default preset at the mini model's size, random weights, four steps."""
    return case("predict/mini/default", alternate({"ours": predictor_run("mini")}, ROUNDS))


def sdxl_alone() -> Case:
    """The default preset at SDXL's size: its memory, without that of a U-Net beside it."""
    return case("predict/sdxl/default alone", alternate({"ours": predictor_run("sdxl")}, ROUNDS))


def sdxl() -> Case:
    """The default preset at SDXL's size against one classifier-free-guidance step of SDXL."""
    sides = {"ours": predictor_run("sdxl"), "sdxl_cfg_step_1024": sdxl_step()}
    return case("predict/sdxl/default", alternate(sides, 1))


def predictor_run(base: str) -> Callable[[], object]:
    """A call that predicts one LoRA from the features of one photo."""
    predictor = Predictor(preset("default", LoraSpace.for_base(base), FACE, IMAGE)).eval()
    ones = torch.ones(1)
    features = fuse(torch.randn(1, FACE), torch.randn(1, IMAGE), ones, ones)
    return lambda: predictor.predict(features, seed=0)


def sdxl_step() -> Callable[[], object]:
    """A call that runs SDXL's U-Net once on a batch of two (conditional, unconditional), 1024 px.

    Weights are noise, the sizes are the real ones: 2.57 billion parameters in single precision.
    """
    unet = UNet2DConditionModel(**SDXL).eval().requires_grad_(False)
    extra = {"text_embeds": torch.randn(2, 1280), "time_ids": torch.zeros(2, 6)}
    latents, context = torch.randn(2, 4, 128, 128), torch.randn(2, 77, 2048)
    return lambda: unet(latents, torch.tensor(500), context, added_cond_kwargs=extra).sample
