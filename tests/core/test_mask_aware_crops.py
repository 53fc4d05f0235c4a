"""Latent windows, landmarks inside them, faces known by a mask alone."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from difflora_core.face_crop import TEMPLATE, align
from difflora_core.mask_aware.crops import (
    alike,
    box_masks,
    crop_boxes,
    face_windows,
    landmarks_of_boxes,
    latent_masks,
)
from difflora_core.mask_aware.decoders import FastDecoder
from tests.core.guidance_parts import face_at, latents, tiny_decoder

UPSCALE = 8


def test_windows_hold_box_and_margin_and_stay_inside() -> None:
    boxes = torch.tensor([[80.0, 64, 120, 110], [-9, -4, 30, 20], [150, 170, 210, 199]])
    windows = face_windows(torch.tensor([0, 1, 1]), boxes, (24, 24), UPSCALE, margin=2)
    assert (windows.top >= 0).all() and (windows.top + windows.height <= 24).all()
    assert (windows.left >= 0).all() and (windows.left + windows.width <= 24).all()
    for row, (x0, y0, x1, y1) in enumerate((boxes / UPSCALE).clamp(0, 24).tolist()):
        left, top = int(windows.left[row]), int(windows.top[row])
        assert left <= max(x0 - 2, 0) and left + windows.width >= min(x1 + 2, 24)
        assert top <= max(y0 - 2, 0) and top + windows.height >= min(y1 + 2, 24)


def test_a_face_wider_than_the_picture_is_the_picture() -> None:
    windows = face_windows(torch.tensor([0]), torch.tensor([[-50.0, -50, 500, 500]]), (6, 9), 8)
    assert (windows.height, windows.width, int(windows.top), int(windows.left)) == (6, 9, 0, 0)


def test_cut_and_add_back_are_each_others_inverse() -> None:
    maps = latents(2)
    boxes = torch.tensor([[80.0, 64, 120, 110], [20.0, 30, 60, 70]])
    windows = face_windows(torch.tensor([1, 0]), boxes, (24, 24), UPSCALE, margin=1)
    parts = windows.cut(maps)
    emptied = windows.add_back(maps, -parts)
    assert windows.cut(emptied).abs().max() == 0
    assert torch.equal(windows.add_back(emptied, parts), maps)
    top, left = int(windows.top[0]), int(windows.left[0])
    assert torch.equal(parts[0, :, 0, 0], maps[1, :, top, left])


def test_a_window_with_margin_decodes_as_the_whole_picture() -> None:
    """The aligned face is that of a full decode, and the nearer the wider the margin."""
    decoder, maps = tiny_decoder(), latents()
    points = torch.from_numpy(face_at(70, 80).landmarks)[None]
    whole = align(decoder(maps), points)
    errors = []
    for margin in (0, 2, 8):
        windows = face_windows(torch.tensor([0]), crop_boxes(points), (24, 24), UPSCALE, margin)
        crop = align(decoder(windows.cut(maps)), windows.shifted(points, UPSCALE))
        errors.append(float((crop - whole).abs().max()))
    assert errors[0] > 1e-3 > 1e-5 > errors[2]
    assert errors[0] > errors[1] >= errors[2]


def test_the_usual_margin_is_enough_for_a_fast_decoder() -> None:
    """Face and gradient at the real size of TAESD, beside those through the whole picture."""
    torch.manual_seed(0)
    decoder, maps = FastDecoder().requires_grad_(False), torch.randn(1, 4, 40, 40)
    points = torch.from_numpy(face_at(110, 100, 100).landmarks)[None]
    windows = face_windows(torch.tensor([0]), crop_boxes(points), (40, 40), decoder.upscale)
    assert windows.height < 30

    def seen(cut: bool) -> tuple[Tensor, Tensor]:
        leaf = maps.clone().requires_grad_(True)
        picture = decoder(windows.cut(leaf) if cut else leaf)
        face = align(picture, windows.shifted(points, decoder.upscale) if cut else points)
        wanted = torch.linspace(-1, 1, face.shape[-1])
        return face.detach(), torch.autograd.grad((face * wanted).square().sum(), leaf)[0]

    (near, towards), (whole, exact) = seen(cut=True), seen(cut=False)
    assert (near - whole).square().mean().sqrt() < 2e-3 * whole.std()
    inside = windows.cut(exact).flatten()
    assert torch.cosine_similarity(windows.cut(towards).flatten(), inside, 0) > 0.999


def test_crop_boxes_surround_the_aligned_crop() -> None:
    points = torch.from_numpy(np.stack([face_at(10, 20, 56).landmarks, face_at(90, 7).landmarks]))
    wanted = torch.tensor([[10.0, 20, 10 + 55.5, 20 + 55.5], [90, 7, 90 + 47.57, 7 + 47.57]])
    assert torch.allclose(crop_boxes(points), wanted, atol=0.02)


def test_points_of_a_box_lie_in_it_like_a_face() -> None:
    box = torch.tensor([[20.0, 30, 100, 130]])
    left, right, nose, mouth_left, mouth_right = landmarks_of_boxes(box)[0].tolist()
    assert 20 < left[0] < nose[0] < right[0] < 100 and 30 < left[1] < nose[1] < mouth_left[1] < 130
    assert left[0] < mouth_left[0] < mouth_right[0] < right[0]
    # a similarity of the template: all distances share one factor
    template = torch.pdist(torch.tensor(TEMPLATE))
    ratio = torch.pdist(landmarks_of_boxes(box)[0]) / template
    assert torch.allclose(ratio, ratio.mean().expand_as(ratio), rtol=1e-4)


def test_masks_in_latents() -> None:
    mask = box_masks(torch.tensor([[8.0, 0, 24, 12]]), (3, 4), UPSCALE)[0]
    assert mask.tolist() == [[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    assert box_masks(torch.tensor([[-50.0, -50, -10, -10]]), (3, 4), UPSCALE).sum() == 0
    pixels = torch.zeros(1, 24, 32)
    pixels[0, :8, :4] = 1
    assert latent_masks(pixels, (3, 4))[0, 0].tolist() == [0.5, 0, 0, 0]


def test_boxes_of_like_size_share_a_window() -> None:
    sides = torch.tensor([60.0, 300, 50, 250, 64, 62, 58])
    boxes = torch.stack([0 * sides, 0 * sides, sides, sides], 1)
    groups = [group.tolist() for group in alike(boxes, 4)]
    assert groups == [[1, 3], [0, 4, 5, 6], [2]]
    assert [group.tolist() for group in alike(boxes, 7, room=300.0**2)][:2] == [[1], [3]]
    assert alike(boxes[:0], 4) == []
