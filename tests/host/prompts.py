"""Prompts in ComfyUI's API format."""

from __future__ import annotations

from typing import Any

Prompt = dict[str, dict[str, Any]]


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def text_to_image(
    seed: int, *, model: list[Any] | None = None, more: Prompt | None = None, steps: int = 4
) -> Prompt:
    """The stock graph on the mini model; `model` is the link to sample from, `more` extra nodes."""
    return {
        "mini": node("DiffLoRA_LoadMiniModel"),
        "yes": node("CLIPTextEncode", clip=["mini", 1], text="a photo of sks person smiling"),
        "no": node("CLIPTextEncode", clip=["mini", 1], text=""),
        "empty": node("EmptyLatentImage", width=128, height=128, batch_size=1),
        "sample": node(
            "KSampler",
            model=model or ["mini", 0],
            positive=["yes", 0],
            negative=["no", 0],
            latent_image=["empty", 0],
            seed=seed,
            steps=steps,
            cfg=4.0,
            sampler_name="euler",
            scheduler="normal",
            denoise=1.0,
        ),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["mini", 2]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="test"),
        "keep": node("TestCapture", value=["decode", 0], name="picture"),
        **(more or {}),
    }
