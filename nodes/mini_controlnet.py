"""Load Mini ControlNet: a ControlNet that train-controlnet has made for the mini model.

ComfyUI's own loader takes such a file, too, but tells the number of attention heads from real
models' widths, and then computes something else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.cldm.cldm
import comfy.controlnet
import comfy.model_management
import comfy.ops
import folder_paths
from comfy_api.latest import io

from ..difflora_core.errors import BadWeightsFile
from ..difflora_core.mini_world import UNET, open_part
from ..difflora_core.weights_file import read_safetensors
from . import host
from .mini_model import DTYPE, unet_config
from .sockets import CATEGORY

_PREFIX = "control_model."
_HINT = f"{_PREFIX}input_hint_block.0.weight"
_FOR_THE_UNET_ONLY = ("out_channels", "transformer_depth_output")


def load_controlnet(path: Path) -> comfy.controlnet.ControlNet:
    """A NAME_comfyui.safetensors of the mini world as ComfyUI's own ControlNet.

    Errors: BadWeightsFile for anything else.
    """
    tensors, _ = read_safetensors(path)
    config: dict[str, Any] = unet_config(open_part(UNET, host.MINI_FOLDER).config)
    for name in _FOR_THE_UNET_ONLY:
        del config[name]
    hint = tensors.get(_HINT)
    control = comfy.cldm.cldm.ControlNet(
        **config,
        hint_channels=hint.shape[1] if hint is not None and hint.ndim == 4 else 3,
        device=comfy.model_management.unet_offload_device(),
        operations=comfy.ops.disable_weight_init,
    )
    known = {k.removeprefix(_PREFIX): v.to(DTYPE) for k, v in tensors.items()}
    try:  # with dynamic VRAM the layers have no weights to compare with before
        control.load_state_dict(known)
    except RuntimeError as error:
        raise BadWeightsFile(
            f"{path.name} is no ControlNet of the mini model.",
            hint="Take a file NAME_comfyui.safetensors that train-controlnet wrote for it; "
            "ControlNets of other models go into Load ControlNet Model.",
        ) from error
    return comfy.controlnet.ControlNet(
        control, load_device=comfy.model_management.get_torch_device()
    )


class LoadMiniControlNet(io.ComfyNode):
    """A ControlNet of the mini model -> CONTROL_NET."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffLoRA_LoadMiniControlNet",
            display_name="Load Mini ControlNet",
            category=CATEGORY,
            description="Loads a ControlNet that train-controlnet has made for the mini model, for "
            "Apply ControlNet. It takes no hint: any picture will do there.",
            inputs=[
                io.Combo.Input(
                    "control_net",
                    options=folder_paths.get_filename_list("controlnet"),
                    tooltip="A file NAME_comfyui.safetensors from models/controlnet.",
                )
            ],
            outputs=[
                io.ControlNet.Output(display_name="CONTROL_NET", tooltip="For Apply ControlNet.")
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, control_net: str) -> str:
        return host.file_state(host.listed_path("controlnet", control_net))

    @classmethod
    def execute(cls, control_net: str) -> io.NodeOutput:
        return io.NodeOutput(load_controlnet(host.listed_path("controlnet", control_net)))


NODES = [LoadMiniControlNet]
