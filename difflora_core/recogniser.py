"""Differentiable face recognisers in torch, built from the config in the header of their file.

`IResNet` is the network of ArcFace (Deng et al., 2019; insightface's arcface_torch/iresnet.py),
down to widths that suit drawn faces. `ConvNeXtFace` has nothing in common with it but the crop:
the recogniser that measures must not be a twin of the one that conditions.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .config import from_dict, to_dict
from .errors import BadWeightsFile
from .face_crop import TEMPLATE_SIZE, align
from .likeness import Calibration
from .weights_file import expecting, header_json, read_safetensors, write_safetensors

HINT = "Pass recogniser.safetensors or a file that train-encoders wrote."


@dataclass(frozen=True)
class IResNetConfig:
    """Shape of an IResNet; InsightFace's R50 has widths 64..512 and layers 3, 4, 14, 3."""

    kind: Literal["iresnet"] = "iresnet"
    """Tells the architectures apart."""
    stem: int = 16
    """Channels of the first convolution."""
    stem_stride: int = 2
    """Its stride; 1 in ArcFace, 2 where speed on a CPU counts."""
    widths: tuple[int, ...] = (32, 48, 64)
    """Channels of the stages; each halves the resolution."""
    layers: tuple[int, ...] = (1, 1, 1)
    """Residual blocks per stage."""
    embedding: int = 128
    """Length of the embedding."""


@dataclass(frozen=True)
class ConvNeXtConfig:
    """Shape of a small ConvNeXt (Liu et al., 2022)."""

    kind: Literal["convnext"] = "convnext"
    """Tells the architectures apart."""
    widths: tuple[int, ...] = (40, 80, 144)
    """Channels of the stages; the first is at a quarter of the resolution, each next halves it."""
    layers: tuple[int, ...] = (2, 3, 2)
    """Blocks per stage."""
    embedding: int = 128
    """Length of the embedding."""


@dataclass(frozen=True)
class RecogniserConfig:
    """What the header of a recogniser's file says."""

    network: IResNetConfig | ConvNeXtConfig
    """The architecture."""
    calibration: Calibration | None = None
    """From cosine to percent, measured on held-out people; None before training has ended."""
    name: str = ""
    """What the recogniser is called in reports."""


class ResidualBlock(nn.Module):
    """IBasicBlock: norm, conv, norm, PReLU, conv, norm, plus the input."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.prelu = nn.PReLU(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        return self.bn3(self.conv2(y)) + self.downsample(x)


class IResNet(nn.Module):
    """ArcFace's residual network: [B, 3, 112, 112] in -1..1 -> raw embedding [B, D]."""

    def __init__(self, config: IResNetConfig) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, config.stem, 3, config.stem_stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(config.stem)
        self.prelu = nn.PReLU(config.stem)
        blocks: list[nn.Module] = []
        width = config.stem
        for outputs, count in zip(config.widths, config.layers, strict=True):
            strides = [2] + [1] * (count - 1)
            blocks += [ResidualBlock(width if s == 2 else outputs, outputs, s) for s in strides]
            width = outputs
        self.blocks = nn.Sequential(*blocks)
        self.bn2 = nn.BatchNorm2d(width)
        side = TEMPLATE_SIZE // (config.stem_stride * 2 ** len(config.widths))
        self.fc = nn.Linear(width * side * side, config.embedding)
        self.features = nn.BatchNorm1d(config.embedding)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.prelu(self.bn1(self.conv1(x))))
        return self.features(self.fc(torch.flatten(self.bn2(x), 1)))


class ChannelNorm(nn.Module):
    """Layer norm over the channels of [B, C, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(self.norm(rearrange(x, "b c h w -> b h w c")), "b h w c -> b c h w")


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, layer norm, two-layer perceptron, plus the input (scaled, starting small)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = ChannelNorm(channels)
        self.expand = nn.Conv2d(channels, 3 * channels, 1)
        self.project = nn.Conv2d(3 * channels, channels, 1)
        self.scale = nn.Parameter(torch.full((channels, 1, 1), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x))
        return x + self.scale * self.project(F.gelu(self.expand(y)))


class ConvNeXtFace(nn.Module):
    """[B, 3, 112, 112] in -1..1 -> raw embedding [B, D]; a learnt weighting of places, not a mean.

    The position of features is what tells faces apart, so the last map is weighted per channel
    and place (a depthwise convolution as large as the map) before the linear layer.
    """

    def __init__(self, config: ConvNeXtConfig) -> None:
        super().__init__()
        widths = config.widths
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 6, 4, 1), ChannelNorm(widths[0])]
        for i, (width, count) in enumerate(zip(widths, config.layers, strict=True)):
            if i:
                layers += [ChannelNorm(widths[i - 1]), nn.Conv2d(widths[i - 1], width, 2, 2)]
            layers += [ConvNeXtBlock(width) for _ in range(count)]
        self.body = nn.Sequential(*layers, ChannelNorm(widths[-1]))
        side = TEMPLATE_SIZE // (4 * 2 ** (len(widths) - 1))
        self.places = nn.Conv2d(widths[-1], 4 * widths[-1], side, groups=widths[-1])
        self.fc = nn.Linear(4 * widths[-1], config.embedding)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.places(self.body(x)), 1))


def build(config: IResNetConfig | ConvNeXtConfig) -> nn.Module:
    """The untrained network of a config."""
    return IResNet(config) if isinstance(config, IResNetConfig) else ConvNeXtFace(config)


class Recogniser(nn.Module):
    """A network with its alignment: pictures and landmarks to embeddings, with gradients."""

    def __init__(self, config: RecogniserConfig) -> None:
        super().__init__()
        self.config = config
        self.network = build(config.network)

    @classmethod
    def open(cls, path: str | Path) -> Recogniser:
        """Read a recogniser's file: float32, in evaluation mode, frozen. Errors: BadWeightsFile."""
        tensors, metadata = read_safetensors(path)
        if "config" not in metadata:
            raise BadWeightsFile(
                f"{Path(path).name} is not a recogniser of ours: its header has no config.",
                hint=HINT,
            )
        with expecting(path, "a recogniser of ours", HINT):
            found = header_json(path, metadata, "config")
            model = cls(from_dict(RecogniserConfig, found, "recogniser"))
        try:
            model.network.load_state_dict({k: v.float() for k, v in tensors.items()})
        except RuntimeError as error:
            first = str(error).splitlines()[-1].strip()
            raise BadWeightsFile(
                f"{Path(path).name} does not fit the config in its header: {first}"
            ) from error
        return model.eval().requires_grad_(False)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the weights as fp16 (counters and statistics too), the config in the header."""
        state = {k: v.half() for k, v in self.network.state_dict().items() if v.is_floating_point()}
        counters = {k: v for k, v in self.network.state_dict().items() if k not in state}
        metadata = {"config": json.dumps(to_dict(self.config))}
        write_safetensors(path, state | counters, metadata, overwrite=overwrite)

    def forward(self, crops: Tensor) -> Tensor:
        """Aligned crops [B, 3, 112, 112] in 0..1 -> raw embeddings [B, D]."""
        return self.network(crops * 2 - 1)

    def embed(self, images: Tensor, landmarks: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in 0..1, landmarks [B, 5, 2] in pixels -> unit [B, D]."""
        return F.normalize(self(align(images, landmarks)), dim=-1)

    def percent(self, cosine: float) -> float:
        """Likeness in percent. Errors: BadWeightsFile when the file carries no calibration."""
        if self.config.calibration is None:
            raise BadWeightsFile("This recogniser carries no calibration from cosine to percent.")
        return self.config.calibration.percent(cosine)
