"""Files that are no LoRA of a Stable Diffusion U-Net, told by their keys."""

from __future__ import annotations

from collections.abc import Iterable

from .errors import BadLoraFile
from .lora import Naming
from .lora_families import first_key

_CONTAINERS = (
    r"^(?:(?:transformer|diffusion_model|base_model\.model|model)\."
    r"|lora_unet_|lora_transformer_|lycoris_|oft_unet_)*"
)
# The first match decides, so the telling ones come first.
_NO_LORA = (
    (r"^lora_controlnet$|controlnet_cond_embedding|input_hint_block", "a ControlNet LoRA"),
    (r"_attn\.norm\.(key|query)_norm\.scale$", "a Flux control LoRA (it replaces whole weights)"),
    (r"^lllite_", "ControlNet-LLLite weights"),
    (r"motion_modules|temporal_transformer", "an AnimateDiff motion LoRA"),
    (r"^(first_stage_model|cond_stage_model|conditioner)\.", "a full checkpoint"),
    (r"^model\.diffusion_model\.(?!.*lora).*\.weight$", "a full checkpoint"),
    (r"^\d+\.to_\w+_lora\.|^ip_adapter|^image_proj", "an IP-Adapter file"),
    (r"^(unet|text_encoder)\[\d+\]$", "a list of tensors without layer names (cloneofsimo's .pt)"),
)
_OTHER_MODELS = (
    (r"(double|single)_blocks[._]|single_transformer_blocks[._]|guidance_in[._]", "Flux"),
    (r"joint_blocks[._]", "SD3"),
    (_CONTAINERS + r"transformer_blocks[._]\d", "a transformer (Flux, SD3, Qwen-Image)"),
    (_CONTAINERS + r"(blocks|layers)[._]\d", "a transformer (Wan, Anima, Krea or similar)"),
)
# Whose names they are, by the beginning of most keys.
_NAMES = (
    ("lora_unet_", "kohya"),
    ("lora_transformer_", "OneTrainer"),
    ("lycoris_", "LyCORIS"),
    ("transformer.", "diffusers"),
    ("base_model.model.", "PEFT"),
    ("diffusion_model.", "ComfyUI"),
    ("", "plain"),
)
_KNOWN = "Expected a LoRA of a Stable Diffusion 1.x, 2.x or XL model, or of the mini model."


def refuse_no_lora(keys: str) -> None:
    """Raises BadLoraFile, saying what the file is, when any key is of no LoRA of a whole model.

    `keys` are those of a file, one per line.
    """
    for pattern, kind in _NO_LORA:
        found = first_key(pattern, keys)
        if found:
            raise BadLoraFile(f"This file is {kind} (key {found}).", hint=_KNOWN)


def other_model(keys: str) -> tuple[str, str] | None:
    """The model without a module table that a file is for, and a key that tells so."""
    for pattern, model in _OTHER_MODELS:
        found = first_key(pattern, keys)
        if found:
            return model, found
    return None


def refuse_other_model(found: tuple[str, str]) -> None:
    """Raises BadLoraFile with what `other_model` found."""
    model, key = found
    of = model if model.startswith("a ") else f"the model {model}"
    raise BadLoraFile(f"This file is a LoRA of {of} (key {key}).", hint=_KNOWN)


def naming_of(model: str, modules: Iterable[str], styles: Iterable[str]) -> Naming:
    """How a file of `model` spells layers; `styles` are the spellings of its factors, see Part."""
    modules = list(modules)
    counts = {who: sum(m.startswith(start) for m in modules) for start, who in _NAMES if start}
    who = max(counts, key=lambda name: counts[name]) if any(counts.values()) else "plain"
    known = {"PEFT": "peft", "lycoris": "kohya", "processor": "diffusers"}
    suffix = next((known.get(style, style) for style in sorted(styles)), "kohya")
    return Naming(f"{model}, {who} names", suffix)
