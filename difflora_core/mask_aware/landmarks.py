"""Networks that read landmarks off faces, with gradients to the picture.

What the landmark term compares: where eyes and mouth of an estimate lie, and where they should.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import BadWeightsFile
from ..face_crop import TEMPLATE_SIZE, warp
from ..recogniser import Recogniser
from .networks import without_autocast
from .onnx_network import LANDMARKS, MISFITS, OnnxNetwork, read_onnx
from .pairing import FlatFaces

ROOM = 1.5
"""Side of the square that a network sees, in longer sides of the face's box (InsightFace's)."""


class Frame(NamedTuple):
    """Where N squares lie in their pictures, in pixels."""

    middle: Tensor
    """[N, 2]"""
    half: Tensor
    """[N], half their sides"""

    def pixels(self, points: Tensor) -> Tensor:
        """Points [N, K, 2] in -1..1 of the squares -> in pixels of the pictures."""
        return self.middle[:, None] + points * self.half[:, None, None]

    def inside(self, points: Tensor) -> Tensor:
        """The way back."""
        return (points - self.middle[:, None]) / self.half[:, None, None]


def cut_squares(pictures: Tensor, boxes: Tensor, side: int) -> tuple[Tensor, Frame]:
    """Upright squares [N, C, side, side] with room around boxes [N, 4], one in each picture."""
    frame = Frame(
        (boxes[:, :2] + boxes[:, 2:]) / 2,
        ROOM / 2 * (boxes[:, 2:] - boxes[:, :2]).amax(1).clamp(min=1.0),
    )
    turn = torch.diag_embed((2 * frame.half / side)[:, None].expand(-1, 2))
    corner = frame.middle - frame.half[:, None]
    return warp(pictures, torch.cat([turn, corner[..., None]], -1), side), frame


class LandmarkNetwork(nn.Module):
    """Upright squares around faces to points; frozen, in float32."""

    def __init__(self, name: str, trunk: nn.Module, side: int) -> None:
        """trunk: squares [N, 3, side, side] -> [N, 2 K] in -1..1 of the square, x before y. They
        come in -1..1 or, to a graph, as InsightFace feeds it: see `_feeding`.

        Errors: BadWeightsFile when it does not run or gives no points.
        """
        super().__init__()
        self.name, self.side = name, side
        self.scale, self.shift = _feeding(trunk)
        self.trunk = trunk.float().eval().requires_grad_(False)
        self.points = self._checked()

    def forward(self, pictures: Tensor, faces: FlatFaces) -> Tensor:
        """Points [N, K, 2] in pixels of the pictures [B, 3, H, W] (0..1). Differentiable."""
        if not len(faces):
            return pictures.new_zeros(0, self.points, 2)
        boxes = faces.boxes.to(pictures.device, torch.float32)
        squares, frame = cut_squares(pictures[faces.picture.to(pictures.device)], boxes, self.side)
        return frame.pixels(self._read(squares))

    def _read(self, squares: Tensor) -> Tensor:
        """[N, K, 2] in -1..1 of the squares (0..1)."""
        with without_autocast(squares.device.type):
            result = self.trunk(squares.float() * self.scale + self.shift)
            if isinstance(self.trunk, OnnxNetwork):
                *_, result = result
        return result.flatten(1).unflatten(1, (-1, 2))

    @torch.no_grad()
    def _checked(self) -> int:
        """How many points there are."""
        try:
            points = self._read(torch.full((2, 3, self.side, self.side), 0.5))
        except MISFITS as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise BadWeightsFile(
                f"{self.name} cannot be run on two faces: {reason}.", hint=LANDMARKS.hint
            ) from error
        if len(points) != 2 or not points.isfinite().all():
            raise BadWeightsFile(
                f"{self.name} gives no finite points for each of two faces.", hint=LANDMARKS.hint
            )
        return points.shape[1]


def _feeding(trunk: nn.Module) -> tuple[float, float]:
    """Factor and addend that turn 0..1 into what a network takes."""
    if not isinstance(trunk, OnnxNetwork):
        return 2.0, -1.0
    return (255.0, 0.0) if trunk.takes_bytes else (255 / 128, -127.5 / 128)


def open_landmark_network(path: str | Path) -> LandmarkNetwork:
    """A network of ours (.safetensors), or InsightFace's 2d106det and its like (.onnx).

    Ours is a file of the recogniser's form whose embedding is the points. Errors: BadWeightsFile,
    saying what is wrong; DiffLoRAError when the package onnx is missing.
    """
    path = Path(path)
    with torch.inference_mode(False):
        if path.suffix == ".safetensors":
            return LandmarkNetwork(path.stem, Recogniser.open(path).network, TEMPLATE_SIZE)
        if path.suffix == ".onnx":
            return LandmarkNetwork(path.stem, read_onnx(path, LANDMARKS), LANDMARKS.side)
    raise BadWeightsFile(
        f"{path.name} is no landmark network: expected a .safetensors or .onnx file.",
        hint=LANDMARKS.hint,
    )
