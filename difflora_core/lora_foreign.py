"""Files that are no LoRA of a Stable Diffusion U-Net, told by their keys."""

from __future__ import annotations

import re
from collections.abc import Iterable

from .errors import BadLoraFile

_CONTAINERS = (
    r"^(?:(?:transformer|diffusion_model|base_model\.model|model)\."
    r"|lora_unet_|lora_transformer_|lycoris_|oft_unet_)*"
)
# The first match decides, so the telling ones come first.
_FOREIGN = (
    (r"^lora_controlnet$|controlnet_cond_embedding|input_hint_block", "a ControlNet LoRA"),
    (r"^lllite_", "ControlNet-LLLite weights"),
    (r"motion_modules|temporal_transformer", "an AnimateDiff motion LoRA"),
    (r"^(first_stage_model|cond_stage_model|conditioner)\.", "a full checkpoint"),
    (r"^model\.diffusion_model\.(?!.*lora).*\.weight$", "a full checkpoint"),
    (r"^\d+\.to_\w+_lora\.|^ip_adapter|^image_proj", "an IP-Adapter file"),
    (r"^(unet|text_encoder):\d+:", "a LoRA without layer names (cloneofsimo's first layout)"),
    (r"(double|single)_blocks[._]|single_transformer_blocks[._]|guidance_in[._]", "a Flux LoRA"),
    (r"joint_blocks[._]", "an SD3 LoRA"),
    (_CONTAINERS + r"transformer_blocks[._]\d", "a LoRA of a transformer (Flux, SD3, Qwen-Image)"),
    (
        _CONTAINERS + r"(blocks|layers)[._]\d",
        "a LoRA of a transformer (Wan, Anima, Krea or similar)",
    ),
)
_KNOWN = "Expected a LoRA of a Stable Diffusion 1.x, 2.x or XL model, or of the mini model."


def refuse_foreign(keys: Iterable[str]) -> None:
    """Raises BadLoraFile, saying what the file is, when any key is of another kind of model."""
    for pattern, kind in _FOREIGN:
        found = next((key for key in keys if re.search(pattern, key)), None)
        if found:
            raise BadLoraFile(f"This file is {kind} (key {found}).", hint=_KNOWN)
