"""The ComfyUI layer: thin adapters around `difflora_core`; the only package that imports comfy."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io
from typing_extensions import override

from . import mini_model

MODULES = (mini_model,)


class DiffLoRAExtension(ComfyExtension):
    """All nodes of the pack, in the order of the menu."""

    @override
    async def on_load(self) -> None:
        pass

    @override
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [node for module in MODULES for node in module.NODES]


async def comfy_entrypoint() -> DiffLoRAExtension:
    """ComfyUI calls this once when it loads the pack."""
    return DiffLoRAExtension()
