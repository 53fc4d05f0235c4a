"""Landmark networks against InsightFace's own class, their gradients, and broken files."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from insightface.model_zoo.landmark import Landmark
from onnx import helper
from torch import Tensor

from difflora_core.errors import BadWeightsFile
from difflora_core.mask_aware import FlatFaces, LandmarkNetwork, open_landmark_network
from difflora_core.mini_world import MINI_FOLDER
from tests.core.face_networks import write

MINI = MINI_FOLDER / "landmarks.safetensors"
BOXES = torch.tensor([[30.0, 40, 110, 168], [4, -4, 60, 124], [90, 70, 190, 160]])
"""Around the first two a square is cut out pixel by pixel; the last one is resampled."""


def network_file(path: Path, points: int, first: list[Any] | None = None, **weights: Any) -> Path:
    """As 2d106det: 192 px to `points` points; `first` turns the picture "data" into "x"."""
    random = np.random.default_rng(0)
    node = helper.make_node
    nodes = [
        *(first or [node("Identity", ["data"], ["x"])]),
        node("Conv", ["x", "w"], ["c"], strides=[16, 16]),
        node("PRelu", ["c", "slope"], ["p"]),
        node("Flatten", ["p"], ["f"]),
        node("Gemm", ["f", "fc"], ["g"], transB=1),
        node("Tanh", ["g"], ["fc1"]),
    ]
    weights |= {
        "w": random.normal(size=(4, 3, 16, 16)) / 16, "slope": random.uniform(size=(4, 1, 1)),
        "fc": random.normal(size=(2 * points, 4 * 12 * 12)) / 96,
    }  # fmt: skip
    path = write(path, nodes, weights, shape=["N", 3, 192, 192])
    return path


def centred(path: Path) -> Path:
    return network_file(path, 106)


def with_own_mean(path: Path, name: str = "bn_data", before: int = 0) -> Path:
    """As MXNet's exporter wrote such files: bytes go in, the first operation normalises them."""
    node = helper.make_node
    values = ["data", *(f"d{k}" for k in range(before))]
    first = [node("Identity", [a], [b]) for a, b in pairwise(values)]
    names = [values[-1], "gamma", "beta", "mean", "variance"]
    first.append(node("BatchNormalization", names, ["x"], name))
    each = {"gamma": 1.0, "beta": 0.0, "mean": 127.5, "variance": 128.0**2}
    return network_file(path, 106, first, **{k: np.full(3, v) for k, v in each.items()})


@pytest.mark.parametrize("make", [centred, with_own_mean])
def test_points_are_those_of_insightface(tmp_path: Path, make: Any) -> None:
    path = make(tmp_path / "2d106det.onnx")
    pictures = np.random.default_rng(1).integers(0, 256, (2, 24, 28, 3)).astype(np.uint8)
    pictures = pictures.repeat(8, 1).repeat(8, 2)
    faces = faces_of(torch.tensor([0, 0, 1]), BOXES)
    theirs = Landmark(str(path))
    expected = []
    for picture, box in zip(faces.picture.tolist(), BOXES, strict=True):
        face = type("Face", (dict,), {"bbox": box.numpy()})()
        # it swaps the channels of what OpenCV read
        expected.append(theirs.get(np.ascontiguousarray(pictures[picture][..., ::-1]), face))
    tensors = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    found = open_landmark_network(path)(tensors, faces)
    assert found.shape == (3, 106, 2)
    away = (found - torch.from_numpy(np.stack(expected))).abs().amax((1, 2))
    assert away[:2].max() < 1e-3
    assert away[2] < 0.2, "where pixels are mixed, OpenCV rounds the colours to bytes"
    assert (open_landmark_network(path)(tensors.flip(1), faces) - found).abs().max() > 5


@pytest.mark.parametrize(("name", "before"), [("bn_data", 2), ("bn_data", 3), ("bn0", 0), ("", 0)])
def test_is_fed_as_insightface_feeds_it(tmp_path: Path, name: str, before: int) -> None:
    path = with_own_mean(tmp_path / "2d106det.onnx", name, before)
    theirs, ours = Landmark(str(path)), open_landmark_network(path)
    assert ours.scale == 255 / theirs.input_std
    assert ours.shift == -theirs.input_mean / theirs.input_std
    assert (ours.scale == 255) == (name == "bn_data" and before < 3)


def faces_of(picture: Tensor, boxes: Tensor) -> FlatFaces:
    return FlatFaces(picture, boxes, torch.zeros(len(boxes), 5, 2), 1 + int(picture.max()))


def test_gradients_reach_the_picture_inside_the_square_only() -> None:
    network = open_landmark_network(MINI)
    picture = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    leaf = picture.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        points = network(
            leaf, faces_of(torch.tensor([0]), torch.tensor([[40.0, 40.0, 80.0, 80.0]]))
        )
    assert points.dtype == torch.float32
    points.sum().backward()
    assert leaf.grad is not None and leaf.grad.isfinite().all()
    reached = leaf.grad.abs().amax((0, 1)) > 0
    assert reached[50:70, 50:70].all() and not reached[:28].any() and not reached[92:].any()


def test_nobody_has_no_points() -> None:
    network = open_landmark_network(MINI)
    nobody = FlatFaces.of([torch.zeros(0, 4)] * 2, [torch.zeros(0, 5, 2)] * 2)
    assert network(torch.rand(2, 3, 64, 64), nobody).shape == (0, 5, 2)


def test_points_move_with_the_face() -> None:
    """A picture shifted by some pixels, box and all, has its points shifted as far."""
    network = open_landmark_network(MINI)
    picture = torch.rand(1, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    box = torch.tensor([[40.0, 40.0, 90.0, 100.0]])
    here = network(picture, faces_of(torch.tensor([0]), box))
    moved = torch.roll(picture, (7, 12), (-2, -1))
    there = network(moved, faces_of(torch.tensor([0]), box + torch.tensor([12.0, 7, 12, 7])))
    assert torch.allclose(there, here + torch.tensor([12.0, 7.0]), atol=1e-3)


def refusal(path: Path) -> str:
    with pytest.raises(BadWeightsFile) as caught:
        open_landmark_network(path)
    assert caught.value.message.count(". ") == 0 and caught.value.hint
    return caught.value.message


def test_what_is_no_landmark_network_is_refused(tmp_path: Path) -> None:
    pack = MINI_FOLDER / "insightface/models/mini"
    assert "takes any x 3 x 112 x 112, expected pictures of 3 x 192 x 192" in refusal(
        pack / "rec_mini.onnx"
    )
    assert "is no landmark network" in refusal(pack / "det_mini.onnx")
    assert "expected a .safetensors or .onnx file" in refusal(tmp_path / "points.pth")
    node = helper.make_node
    shape = ["N", 3, 192, 192]
    odd = [node("GlobalAveragePool", ["data"], ["p"]), node("Flatten", ["p"], ["out"])]
    assert "cannot be run" in refusal(write(tmp_path / "odd.onnx", odd, {}, shape=shape))
    endless = [*odd, node("Mul", ["out", "k"], ["result"])]
    numbers = {"k": np.array([[np.inf, 1.0, 1.0]])}
    assert "not finite" in refusal(write(tmp_path / "inf.onnx", endless, numbers, shape=shape))


def test_a_network_without_rows_of_its_own_is_refused() -> None:
    class Mean(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((0, 2, 3))[None, :2]

    with pytest.raises(BadWeightsFile, match="no finite points for each of two faces"):
        LandmarkNetwork("mean", Mean(), 112)
