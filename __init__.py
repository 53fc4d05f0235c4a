"""ComfyUI's entry point of DiffLoRA; nothing else may live here (pytest imports this file too)."""

from __future__ import annotations

from importlib.util import find_spec

WEB_DIRECTORY = "./web"

if find_spec("comfy_api") is not None:
    from .nodes import comfy_entrypoint

    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
