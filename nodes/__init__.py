"""The ComfyUI layer: thin adapters around `difflora_core`; the only package that imports comfy."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import (
    encode,
    example,
    face_mask,
    guidance,
    guidance_report,
    host,
    loaders,
    lora_files,
    merge,
    mini_controlnet,
    mini_model,
    personalize,
    predict,
    score,
)

MODULES = (
    mini_model,
    example,
    loaders,
    encode,
    predict,
    personalize,
    lora_files,
    merge,
    face_mask,
    guidance,
    guidance_report,
    mini_controlnet,
    score,
)


class DiffLoRAExtension(ComfyExtension):
    """All nodes of the pack, in the order of the menu."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [node for module in MODULES for node in module.NODES]


async def comfy_entrypoint() -> DiffLoRAExtension:
    """ComfyUI calls this once when it loads the pack."""
    host.register_folders()
    return DiffLoRAExtension()
