"""Faces cut out of pictures: 5-point alignment, square crops, numbered previews, sharpness.

Pure arrays and tensors, no detector. Landmarks are in pixels, in the order of InsightFace: the eye
on the picture's left, the other eye, nose, left corner of the mouth, right corner.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .photos import Pixels

#: where ArcFace expects the landmarks in its 112x112 crop (insightface/utils/face_align.py)
TEMPLATE = (
    (38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655),
    (70.7299, 92.2041),
)  # fmt: skip
TEMPLATE_SIZE = 112


def similarity(source: Tensor, target: Tensor) -> Tensor:
    """Least-squares similarity (turn, scale, shift; no reflection) from source to target points.

    Umeyama, 1991, in its closed form for the plane: with centred points as complex numbers the
    turn-and-scale is sum(conj(s) t) / sum(|s|^2).

    Args: source, target: [B, N, 2]. Returns: matrices [B, 2, 3]. Differentiable.
    """
    source, target = source.float(), target.float()
    source_mean, target_mean = source.mean(1, keepdim=True), target.mean(1, keepdim=True)
    s, t = source - source_mean, target - target_mean
    size = (s * s).sum((1, 2)).clamp(min=1e-8)
    real = (s * t).sum((1, 2)) / size
    imaginary = (s[..., 0] * t[..., 1] - s[..., 1] * t[..., 0]).sum(1) / size
    turn = torch.stack([real, -imaginary, imaginary, real], -1).view(-1, 2, 2)
    # no matrix product: autocast would round positions to 8 bits
    shift = target_mean[:, 0] - (turn * source_mean).sum(-1)
    return torch.cat([turn, shift[..., None]], -1)


def align(images: Tensor, landmarks: Tensor, size: int = TEMPLATE_SIZE) -> Tensor:
    """ArcFace's aligned crops, bilinear and black outside, as cv2.warpAffine makes them.

    Args: images [B, C, H, W], any range; landmarks [B, 5, 2] in pixels.
    Returns: [B, C, size, size]. Differentiable in the images and the landmarks.
    """
    template = torch.tensor(TEMPLATE, device=images.device) * (size / TEMPLATE_SIZE)
    # fitted towards the template and then inverted, as InsightFace does: a fit the other way round
    # minimises other distances and zooms in by up to a tenth where a face is unlike the template
    there = similarity(landmarks, template.expand(len(images), 5, 2))
    return warp(images, inverted(there), size)


def inverted(matrices: Tensor) -> Tensor:
    """Inverses of similarities [B, 2, 3], in the same form."""
    turn, shift = matrices[..., :2], matrices[..., 2]
    determinant = turn[:, 0, 0] * turn[:, 1, 1] - turn[:, 0, 1] * turn[:, 1, 0]
    back = turn.mT / determinant.clamp(min=1e-12)[:, None, None]
    return torch.cat([back, -(back * shift[:, None]).sum(-1, keepdim=True)], -1)


def warp(images: Tensor, back: Tensor, size: int) -> Tensor:
    """Sample square pictures; `back` [B, 2, 3] maps pixels of the result to pixels of `images`."""
    axis = torch.arange(size, device=images.device, dtype=torch.float32)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    turn, shift = back[:, None, None, :, :2].float(), back[:, None, None, :, 2].float()
    source = (turn * torch.stack([x, y], -1)[:, :, None]).sum(-1) + shift
    limits = torch.tensor([images.shape[-1], images.shape[-2]], device=images.device)
    grid = (source * 2 + 1) / limits - 1
    crops = F.grid_sample(images.float(), grid, padding_mode="zeros", align_corners=False)
    return crops.to(images.dtype)


def aligned_pixels(image: Pixels, landmarks: NDArray[np.float32]) -> Pixels:
    """ArcFace's crop of one uint8 picture: [112, 112, 3]."""
    tensor = rearrange(torch.from_numpy(np.array(image)).float(), "h w c -> 1 c h w")
    crop = align(tensor, torch.from_numpy(np.asarray(landmarks, np.float32))[None])
    return rearrange(crop.round().byte(), "1 c h w -> h w c").numpy()


def square_crop(image: Pixels, box: Sequence[float], margin: float = 0.5) -> Pixels:
    """A square around a box with `margin` of its longer side added on each side.

    The square is moved, then shrunk, to stay inside the picture.
    """
    height, width = image.shape[:2]
    x1, y1, x2, y2 = (float(v) for v in box)
    side = min(round(max(x2 - x1, y2 - y1) * (1 + 2 * margin)), width, height)
    side = max(side, 1)
    left = round(min(max((x1 + x2 - side) / 2, 0), width - side))
    top = round(min(max((y1 + y2 - side) / 2, 0), height - side))
    return image[top : top + side, left : left + side]


def numbered_crops(image: Pixels, boxes: Sequence[Sequence[float]], size: int = 160) -> Pixels:
    """Square crops with their number, from 1, in the corner: uint8 [N, size, size, 3]."""
    crops = np.zeros((len(boxes), size, size, 3), np.uint8)
    font = ImageFont.load_default(size // 6)
    for i, box in enumerate(boxes):
        crop = Image.fromarray(square_crop(image, box, 0.3)).resize((size, size))
        pen = ImageDraw.Draw(crop)
        area = pen.textbbox((size // 20, size // 24), str(i + 1), font=font)
        edge = size // 32
        pen.rectangle((area[0] - edge, area[1] - edge, area[2] + edge, area[3] + edge), "black")
        pen.text((size // 20, size // 24), str(i + 1), "white", font=font)
        crops[i] = np.asarray(crop)
    return crops


def sharpness(image: Pixels, landmarks: NDArray[np.float32]) -> float:
    """Variance of the Laplacian over the aligned grey face (0..255): higher is sharper."""
    luma = np.array([0.299, 0.587, 0.114], np.float32)
    grey = aligned_pixels(image, landmarks).astype(np.float32) @ luma
    centre = grey[1:-1, 1:-1]
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * centre
    return float(laplacian.var())
