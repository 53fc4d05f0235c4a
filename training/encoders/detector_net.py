"""A small SCRFD (Guo et al., 2021): faces with five landmarks at strides 8, 16 and 32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

STRIDES = (8, 16, 32)
#: sides of the two square anchors of each stride, in pixels
ANCHOR_SIZES = ((16.0, 32.0), (64.0, 128.0), (256.0, 512.0))
ANCHORS = 2
#: what insightface subtracts from and divides uint8 RGB by
MEAN, STD = 127.5, 128.0


class Level:
    """Raw predictions at one stride: score logits [B, N], boxes [B, N, 4], landmarks [B, N, 10].

    N = height * width * 2 anchors; distances and offsets from the anchor's centre, in strides.
    """

    def __init__(self, scores: Tensor, boxes: Tensor, landmarks: Tensor) -> None:
        self.scores, self.boxes, self.landmarks = scores, boxes, landmarks


def _conv(inputs: int, outputs: int, stride: int = 1, kernel: int = 3, groups: int = 1):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class Separable(nn.Module):
    """Depthwise 5x5 and pointwise convolution, with a shortcut: a wide view for few weights."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = _conv(channels, channels, kernel=5, groups=channels)
        self.pointwise = nn.Sequential(
            nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.pointwise(self.depthwise(x)))


class Head(nn.Module):
    """Scores, boxes and landmarks of one level."""

    def __init__(self, channels: int, level: int) -> None:
        super().__init__()
        self.tower = nn.Sequential(Separable(channels), Separable(channels))
        self.out = nn.Conv2d(channels, ANCHORS * 15, 1)
        nn.init.constant_(self.out.bias[:ANCHORS], -4.0)  # type: ignore[index]
        unit = torch.tensor(ANCHOR_SIZES[level]).view(1, 1, 1, ANCHORS, 1) / STRIDES[level]
        self.register_buffer("unit", unit, persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, C, H, W] -> [B, H, W, 2, 1], [B, H, W, 2, 4], [B, H, W, 2, 10]."""
        maps = self.out(self.tower(x)).permute(0, 2, 3, 1)
        scores, boxes, points = maps.split((ANCHORS, ANCHORS * 4, ANCHORS * 10), -1)
        boxes = boxes.unflatten(-1, (ANCHORS, 4))
        points = points.unflatten(-1, (ANCHORS, 10))
        return scores.unsqueeze(-1), boxes * self.unit, points * self.unit


class Detector(nn.Module):
    """Pictures [B, 3, H, W], (x - 127.5) / 128 with x in 0..255; H and W multiples of 32."""

    def __init__(self, widths: tuple[int, ...] = (16, 24, 40, 64, 80), neck: int = 40) -> None:
        super().__init__()
        stem, c4, c8, c16, c32 = widths
        self.stem = nn.Sequential(_conv(3, stem, 2), _conv(stem, c4, 2), Separable(c4))
        self.stage8 = nn.Sequential(_conv(c4, c8, 2), Separable(c8), Separable(c8))
        self.stage16 = nn.Sequential(_conv(c8, c16, 2), Separable(c16), Separable(c16))
        self.stage32 = nn.Sequential(_conv(c16, c32, 2), *(Separable(c32) for _ in range(4)))
        self.lateral = nn.ModuleList(nn.Conv2d(c, neck, 1) for c in (c8, c16, c32))
        self.heads = nn.ModuleList(Head(neck, i) for i in range(len(STRIDES)))

    def forward(self, x: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Per stride: score logits, boxes, landmarks (see `Head`)."""
        m8 = self.stage8(self.stem(x))
        m16 = self.stage16(m8)
        m32 = self.stage32(m16)
        p8, p16, p32 = (layer(m) for layer, m in zip(self.lateral, (m8, m16, m32), strict=True))
        p16 = p16 + F.interpolate(p32, scale_factor=2.0, mode="nearest")
        p8 = p8 + F.interpolate(p16, scale_factor=2.0, mode="nearest")
        return [head(p) for head, p in zip(self.heads, (p8, p16, p32), strict=True)]

    def levels(self, x: Tensor) -> list[Level]:
        """The predictions as flat lists, for training."""
        flat = "b h w a d -> b (h w a) d"
        return [
            Level(rearrange(s, flat)[..., 0], rearrange(b, flat), rearrange(k, flat))
            for s, b, k in self(x)
        ]


class ExportedDetector(nn.Module):
    """The nine outputs that insightface's SCRFD expects: scores, boxes, landmarks of a picture."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        levels = self.detector(x)
        scores = [level[0].sigmoid().reshape(-1, 1) for level in levels]
        boxes = [level[1].reshape(-1, 4) for level in levels]
        points = [level[2].reshape(-1, 10) for level in levels]
        return (*scores, *boxes, *points)
