"""The hint-less ControlNet: a trainable copy of the encoder that sees x_t, t and the prompt.

Zhang et al. 2023 add a hint to the copy's input; here there is none ("second modality" of the
seed paper), so only the zero convolutions into the frozen U-Net make it a ControlNet. While it
trains, its hint block is a zero; exported files carry a whole one whose last convolution is zero.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ControlNetModel
from torch import Tensor, nn

from ..base.models import Unet
from .base_model import BaseModel

# diffusers.ControlNetModel: its decorated methods do not survive a type checker
Control = Any


class NoHint(nn.Module):
    """Stands for the hint block: whatever the hint, it adds nothing."""

    def forward(self, conditioning: Tensor) -> Tensor:
        return conditioning.new_zeros(())


def new_control(unet: Unet, *, checkpointing: bool = False) -> Control:
    """A copy of the U-Net's encoder and middle, trainable, on its device."""
    control = without_hint(ControlNetModel.from_unet(unet))
    control = control.to(unet.device, memory_format=torch.channels_last)
    if checkpointing:
        control.enable_gradient_checkpointing()
    return control.train().requires_grad_(True)


def control_names(unet: Unet) -> list[str]:
    """Names of the weights of a U-Net's control, which is not built for them."""
    with torch.device("meta"):
        return list(ControlNetModel.from_unet(unet, load_weights_from_unet=False).state_dict())


def without_hint(control: Control) -> Control:
    """The same network with its hint block taken out."""
    control.controlnet_cond_embedding = NoHint()
    return control


def with_hint(control: Control) -> Control:
    """A copy with a whole hint block whose last convolution is zero, on the CPU in float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the inner convolutions: random, but the same in every file
        whole: Control = ControlNetModel.from_config(dict(control.config))
    weights = {key: value.detach().float().cpu() for key, value in control.state_dict().items()}
    weights |= whole.controlnet_cond_embedding.state_dict(prefix="controlnet_cond_embedding.")
    whole.load_state_dict(weights)
    return whole.requires_grad_(False).eval()


def predict_noise(
    base: BaseModel, control: Control | None, noisy: Tensor, t: Tensor, context: Tensor
) -> Tensor:
    """Epsilon [B, 4, h, w] of the frozen U-Net with the control's additions, or without any.

    noisy [B, 4, h, w], t [B] or scalar, context [B, 77, width].
    """
    if control is None:
        return base.unet(noisy, t, context).sample
    down, middle = control(noisy, t, context, controlnet_cond=noisy, return_dict=False)
    return base.unet(
        noisy,
        t,
        context,
        down_block_additional_residuals=down,
        mid_block_additional_residual=middle,
    ).sample
