"""Prompts in ComfyUI's API format."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Prompt = dict[str, dict[str, Any]]
SHIPPED = "mini (ships with DiffLoRA)"


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


def predicted(seed: int = 0, red_faces: str = "one", **settings: Any) -> Prompt:
    """Nodes from a test photo to a LORA_MODEL at ["lora", 0]."""
    options = {"strength": 1.0, "seed": seed, "candidates": 1, "steps": 0, "guidance": 0.0}
    return {
        "photo": node("TestPhoto", faces=red_faces),
        "faces": node("TestFaces"),
        "images": node("DiffLoRA_LoadImageEncoder", encoder=SHIPPED, architecture="from the file"),
        "predictor": node("DiffLoRA_LoadPredictor", predictor=SHIPPED),
        "features": node(
            "DiffLoRA_EncodeFaceFeatures",
            photos=["photo", 0],
            face_encoder=["faces", 0],
            image_encoder=["images", 0],
            face="largest",
            face_number=1,
            weights="",
        ),
        "lora": node(
            "DiffLoRA_PredictLora",
            predictor=["predictor", 0],
            features=["features", 0],
            **{**options, **settings},
        ),
    }


def kept(prompt: dict[str, Any], **values: Any) -> dict[str, Any]:
    extra = {f"keep_{k}": node("TestCapture", value=v, name=k) for k, v in values.items()}
    return {**prompt, **extra}


def saved_lora(host: Any) -> str:
    """Write the predicted LoRA without rounding; its name in the list of LoRAs."""
    save = node(
        "DiffLoRA_SaveLora",
        lora=["lora", 0],
        filename_prefix="test/person",
        folder="models/loras",
        precision="fp32",
        trigger="",
    )
    path = host.run(kept({**predicted(), "save": save}, path=["save", 0]))["path"]
    assert Path(path).is_file() and not list(Path(path).parent.glob(".*"))
    return str(Path(path).relative_to(host.base / "models" / "loras"))


def with_lora_file(file: str) -> Prompt:
    """Core's "Load LoRA" on the mini model, at ["apply", 0]."""
    inputs = {"model": ["mini", 0], "clip": ["mini", 1], "lora_name": file}
    return {"apply": node("LoraLoader", **inputs, strength_model=1.0, strength_clip=1.0)}


MIDDLE = (0.25, 0.25, 0.75, 0.75)
"""A face in the middle of the picture, in shares of its width and height."""


def guidance(boxes: Sequence[Sequence[float]] = (MIDDLE,), **changes: Any) -> Prompt:
    """Nodes for a guided model at ["guide", 0]; faces are found at `boxes`, in every picture."""
    inputs = {
        "model": ["mini", 0],
        "vae": ["mini", 2],
        "features": ["person", 0],
        "face_encoder": ["faces", 0],
        "strength": 2.0,
        "window": "custom",
        "start": 0.0,
        "end": 1.0,
        "decoder": "VAE",
        "when_lost": "hold",
        "iterations": 1,
        "smoothing": 0.0,
        "jitter": 0.0,
        **changes,
    }
    return {
        "person": node("TestPerson", encoder="mini", seed=0),
        "faces": node("TestPlacedFaces", boxes=json.dumps(boxes)),
        "guide": node(
            "DiffLoRA_MaskAwareGuidance", **{k: v for k, v in inputs.items() if v is not None}
        ),
    }


def guided(
    more: Prompt, *, seed: int = 1, side: int = 64, batch: int = 1, **sampler: Any
) -> Prompt:
    """Small pictures from the model at ["guide", 0]; keeps latents, pictures and the log."""
    prompt = text_to_image(seed, model=["guide", 0], more=more)
    return kept(small(prompt, side, batch, **sampler), latents=["sample", 0], log=["guide", 1])


def unguided(*, seed: int = 1, side: int = 64, batch: int = 1, **sampler: Any) -> Prompt:
    """The same without guidance."""
    return kept(small(text_to_image(seed), side, batch, **sampler), latents=["sample", 0])


def small(prompt: Prompt, side: int, batch: int, **sampler: Any) -> Prompt:
    """Smaller pictures, or more of them, or another sampler."""
    prompt["empty"]["inputs"] |= {"width": side, "height": side, "batch_size": batch}
    prompt["sample"]["inputs"] |= sampler
    return prompt
