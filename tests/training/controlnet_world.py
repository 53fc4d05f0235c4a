"""A tiny run of the ControlNet's stages on a world of random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.training.tiny_world import write_world
from training.config import Config, load_config
from training.controlnet.base_model import BaseModel

FEW = [
    "run.device=cpu", "run.log_every=1", "run.checkpoint_every=2", "controlnet.pool=8",
    "controlnet.batch=4", "controlnet.check=2", "controlnet.optim.steps=4",
    "controlnet.paint_steps=2", "controlnet.optim.warmup=1",
]  # fmt: skip


def world(folder: Path, *words: str) -> Config:
    """The tiny world in a folder, written on the first call, with some settings changed."""
    file = folder / "tiny.toml"
    if not file.exists():
        file.write_text(f'[run]\nroot = "{folder / "run"}"\n')
        write_world(load_config(file, FEW))
    return load_config(file, [*FEW, *words])


def randomised(control: Any) -> Any:
    """A control whose zero convolutions are not zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in control.named_parameters():
            if name.startswith("controlnet_"):
                parameter.normal_(std=0.1, generator=generator)
    return control


def inputs(base: BaseModel) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents, timesteps and context of two pictures."""
    torch.manual_seed(1)
    context = base.encode(["a photo of a person", "two people"])
    return torch.randn(2, 4, 16, 16), torch.tensor([40, 700]), context
