"""The checker of prompts: what a portrait shows, in the words of the drawn world."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difflora_core.config import from_dict, to_dict
from difflora_core.errors import BadWeightsFile
from difflora_core.weights_file import expecting, header_json, read_safetensors, write_safetensors

from ..portraits import ATTRIBUTES, FACTORS, parse_prompt

SIDE = 128


@dataclass(frozen=True)
class PortraitNetConfig:
    """What the header of a checker's or a self-supervised network's file says."""

    widths: tuple[int, ...] = (24, 48, 80, 128)
    """Channels of the stages; the first is at half the resolution."""
    outputs: dict[str, int] = field(default_factory=dict)
    """Numbers of outputs by head; none for self-supervised features."""
    figures: dict[str, float] = field(default_factory=dict)
    """Measured on held-out pictures."""


class Stage(nn.Module):
    """Half the resolution, then a residual block."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False)
        self.norm1, self.norm2, self.norm3 = (nn.BatchNorm2d(outputs) for _ in range(3))
        self.conv1 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.down(x)))
        y = F.relu(self.norm2(self.conv1(x)))
        return F.relu(x + self.norm3(self.conv2(y)))


class PortraitNet(nn.Module):
    """Pictures [B, 3, 128, 128] in 0..1 -> features [B, 3 W] -> one head per output."""

    def __init__(self, config: PortraitNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = (3, *config.widths)
        self.stages = nn.Sequential(
            *(Stage(inputs, outputs) for inputs, outputs in pairwise(widths))
        )
        side = SIDE // 2 ** len(config.widths)
        self.places = nn.Conv2d(widths[-1], 2 * widths[-1], side, groups=widths[-1])
        self.heads = nn.ModuleDict(
            {name: nn.Linear(3 * widths[-1], size) for name, size in config.outputs.items()}
        )

    @classmethod
    def open(cls, path: str | Path) -> PortraitNet:
        """Read a file: float32, in evaluation mode, frozen. Errors: BadWeightsFile."""
        tensors, metadata = read_safetensors(path)
        if "config" not in metadata:
            raise BadWeightsFile(f"{Path(path).name} has no config in its header.")
        with expecting(path, "a checker of ours", "Take one that train-encoders wrote."):
            found = header_json(path, metadata, "config")
            net = cls(from_dict(PortraitNetConfig, found, "portrait_net"))
            state = {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
            net.load_state_dict(state)
        return net.eval().requires_grad_(False)

    def save(self, path: str | Path) -> None:
        """Write fp16 weights and the config in the header, over an older file."""
        state = self.state_dict()
        state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
        metadata = {"config": json.dumps(to_dict(self.config))}
        write_safetensors(path, state, metadata, overwrite=True)

    def features(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in 0..1 -> [B, 3 W]: means of the last map, and it weighted by place."""
        if images.shape[-2:] != (SIDE, SIDE):
            images = F.interpolate(images, (SIDE, SIDE), mode="bilinear", antialias=True)
        maps = self.stages(images * 2 - 1)
        return torch.cat([maps.mean((2, 3)), self.places(maps).flatten(1)], -1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Raw outputs by head: logits of attributes, values of identity factors."""
        features = self.features(images)
        return {name: head(features) for name, head in self.heads.items()}


def checker_outputs() -> dict[str, int]:
    """Heads of the checker: one per attribute of the vocabulary, and the identity factors."""
    return {name: len(values) for name, values in ATTRIBUTES.items()} | {"identity": len(FACTORS)}


@torch.no_grad()
def prompt_accuracy(net: PortraitNet, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Share of what each prompt asks for that its picture [B, 3, H, W] shows: [B], 0..1.

    Attributes that a prompt does not mention do not count; a prompt that asks for nothing that
    the checker knows gives NaN.
    """
    found = {name: values.argmax(-1).tolist() for name, values in net(images).items()}
    shares = []
    for i, prompt in enumerate(prompts):
        asked = parse_prompt(prompt)
        hits = [float(found[name][i] == value) for name, value in asked.items()]
        shares.append(sum(hits) / len(hits) if hits else float("nan"))
    return torch.tensor(shares)
