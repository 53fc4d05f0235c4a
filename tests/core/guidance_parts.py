"""A small decoder, a small face network and stand-ins for detectors, all seeded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from difflora_core.face import FoundFace
from difflora_core.face_crop import TEMPLATE, align
from difflora_core.mask_aware.decoders import FastDecoder
from difflora_core.mask_aware.guidance import GuidanceSettings, Guide
from difflora_core.mask_aware.networks import FaceActivations
from difflora_core.mask_aware.tracking import Finder
from difflora_core.mask_aware.window import SigmaWindow
from difflora_core.photos import Pixels

LATENTS = (4, 24, 24)


class TinyFaceNetwork(nn.Module):
    """Aligned crops to a unit embedding of eight numbers."""

    size = 112

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.convolution = nn.Conv2d(3, 8, 16, 16)
        self.linear = nn.Linear(8 * 7 * 7, 8)
        self.eval().requires_grad_(False)

    def forward(self, crops: Tensor) -> FaceActivations:
        maps = torch.tanh(self.convolution(crops))
        embedding = nn.functional.normalize(self.linear(maps.flatten(1)), dim=-1)
        return FaceActivations((maps,), embedding)


def tiny_decoder(upscale: int = 8) -> FastDecoder:
    """Of TAESD's shape with a view of a few latents."""
    torch.manual_seed(0)
    blocks = (1,) * (upscale.bit_length())
    return FastDecoder(4, 8, blocks).requires_grad_(False).eval()


def references(count: int, seed: int = 3) -> Tensor:
    """Unit embeddings [count, 8]."""
    generator = torch.Generator().manual_seed(seed)
    return nn.functional.normalize(torch.randn(count, 8, generator=generator), dim=-1)


def latents(batch: int = 1, seed: int = 5) -> Tensor:
    """[batch, 4, 24, 24]: pictures of 192 pixels."""
    return torch.randn(batch, *LATENTS, generator=torch.Generator().manual_seed(seed))


def face_at(x: float, y: float, side: float = 48.0) -> FoundFace:
    """An upright face whose aligned crop has its corner at x, y and the given side, in pixels."""
    points = np.array(TEMPLATE, np.float32) * (side / 112) + np.array([x, y], np.float32)
    box = np.array([x, y, x + side, y + side], np.float32)
    return FoundFace(box=box, landmarks=points, score=0.9, picture=(192, 192))


def always(*faces: FoundFace) -> Finder:
    """A detector that finds these faces in every picture."""
    return lambda picture: list(faces)


class Script:
    """A detector that finds another list of faces each time it is asked; counts the calls."""

    def __init__(self, answers: Sequence[Sequence[FoundFace]]) -> None:
        self.answers = answers
        self.calls = 0

    def __call__(self, picture: Pixels) -> list[FoundFace]:
        self.calls += 1
        return list(self.answers[min(self.calls, len(self.answers)) - 1])


ALWAYS = SigmaWindow(1e6)
FACE = face_at(64, 72)


def guide_of(
    settings: GuidanceSettings | None = None, *, wanted: Tensor | None = None, **parts: object
) -> Guide:
    """A guide that knows one face at FACE unless told otherwise, sees it as it is, and decodes all
    that it depends on."""
    chosen: dict = {"finder": always(FACE)} | parts
    settings = settings or GuidanceSettings(window=ALWAYS, margin=8, jitter=0)
    wanted = references(1) if wanted is None else wanted
    return Guide(tiny_decoder(), TinyFaceNetwork(), wanted, settings, **chosen)


def square_mask(batch: int = 1) -> Tensor:
    """Covers the upper left of FACE, in pixels; its edge cuts latents in half."""
    mask = torch.zeros(batch, 192, 192)
    mask[:, 60:100, 60:84] = 1
    return mask


def similarity(x0: Tensor, face: FoundFace = FACE, wanted: Tensor | None = None) -> Tensor:
    """Cosines [B, R] of the face of each picture to the references."""
    return seen(x0, face) @ (references(1) if wanted is None else wanted).T


def seen(x0: Tensor, face: FoundFace) -> Tensor:
    """What the network sees at the place of `face` in each picture."""
    points = torch.from_numpy(face.landmarks)[None].expand(len(x0), 5, 2)
    return TinyFaceNetwork()(align(tiny_decoder()(x0), points)).embedding


def direction_like(x0: Tensor, size: float = 0.05) -> Tensor:
    return size * torch.randn(x0.shape, generator=torch.Generator().manual_seed(9)).to(x0.dtype)
