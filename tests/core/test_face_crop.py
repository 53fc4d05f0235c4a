"""Alignment against insightface's own, and its gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from difflora_core.face_crop import (
    TEMPLATE,
    align,
    aligned_pixels,
    numbered_crops,
    sharpness,
    similarity,
    square_crop,
)


def smooth_picture(height: int = 90, width: int = 130) -> np.ndarray:
    x, y = np.meshgrid(np.linspace(0, 6, width), np.linspace(0, 6, height))
    waves = [np.sin(x + y), np.cos(2 * x - y), np.sin(x * 1.5)]
    return np.round(127 + 120 * np.stack(waves, -1)).astype(np.uint8)


def turned_template(angle: float, scale: float, shift: tuple[float, float]) -> np.ndarray:
    points = np.array(TEMPLATE) - 56
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return (points @ turn.T + shift).astype(np.float32)


@pytest.mark.parametrize("angle", [-0.4, 0.0, 0.7])
def test_similarity_recovers_a_known_one(angle: float) -> None:
    template = torch.tensor(TEMPLATE)[None]
    points = torch.from_numpy(turned_template(angle, 0.6, (60, 40)))[None]
    matrix = similarity(template, points)
    moved = template @ matrix[:, :, :2].transpose(1, 2) + matrix[:, None, :, 2]
    assert torch.allclose(moved, points, atol=1e-4)


def test_similarity_is_least_squares_as_in_insightface() -> None:
    face_align = pytest.importorskip("insightface.utils.face_align")
    noise = np.random.default_rng(1).normal(0, 3, (5, 2)).astype(np.float32)
    points = turned_template(0.3, 0.5, (60, 40)) + noise
    ours = similarity(torch.from_numpy(points)[None], torch.tensor(TEMPLATE)[None])[0]
    theirs = face_align.estimate_norm(points)
    assert np.abs(ours.numpy() - theirs).max() < 1e-3


def test_align_agrees_with_insightface() -> None:
    face_align = pytest.importorskip("insightface.utils.face_align")
    picture, points = smooth_picture(), turned_template(0.25, 0.5, (70, 45))
    theirs = face_align.norm_crop(picture, points).astype(float)
    ours = aligned_pixels(picture, points).astype(float)
    assert np.abs(ours - theirs).mean() < 0.6
    assert np.abs(ours - theirs)[8:-8, 8:-8].max() <= 4  # cv2 rounds positions to 1/32 pixel


def test_gradients_reach_picture_and_landmarks() -> None:
    picture = torch.from_numpy(smooth_picture()).permute(2, 0, 1)[None].float() / 255
    points = torch.from_numpy(turned_template(0.1, 0.5, (60, 45)))[None]
    picture.requires_grad_()
    points.requires_grad_()
    align(picture, points).square().sum().backward()
    assert picture.grad is not None and picture.grad.abs().sum() > 0
    assert points.grad is not None and points.grad.abs().min() > 0


def test_square_crop_stays_inside() -> None:
    picture = smooth_picture(100, 140)
    assert square_crop(picture, (50, 30, 80, 60), 0.5).shape == (60, 60, 3)
    assert square_crop(picture, (-10, -20, 30, 40), 0.5).shape == (100, 100, 3)
    assert square_crop(picture, (120, 80, 160, 130), 0.1).shape[0] > 10


def test_numbered_crops_differ_by_their_number_only_in_the_corner() -> None:
    picture = smooth_picture()
    first, second = numbered_crops(picture, [(30, 30, 60, 60)] * 2, 160)
    assert (first != second).any()
    assert np.array_equal(first[60:], second[60:])


def test_sharpness_falls_with_blur() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (120, 120, 3), np.uint8)
    blurred = ((noise.astype(int) + np.roll(noise, 1, 0) + np.roll(noise, 1, 1)) // 3).astype(
        np.uint8
    )
    points = turned_template(0, 0.8, (60, 60))
    assert sharpness(noise, points) > 2 * sharpness(blurred, points)
