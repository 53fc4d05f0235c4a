"""What happens to pictures on their way to a network: blur, noise, JPEG, colour, resampling.

Batched, on any device, one strength per picture; randomness is torch's global one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def damage(images: Tensor, strength: float = 1.0) -> Tensor:
    """Pictures [B, 3, H, W] in 0..1 with random damage; about a third stays nearly clean."""
    with torch.autocast(images.device.type, enabled=False):
        return _damage(images, strength)


def _damage(images: Tensor, strength: float) -> Tensor:
    images = _some(images, 0.5, lambda part: blur(part, 2.0 * strength))
    images = _some(images, 0.3, lambda part: resample(part, 1 + strength))
    images = shift_colours(images, 0.12 * strength)
    images = _some(images, 0.3, lambda part: jpeg(part, 0.12 * strength))
    return _some(images, 0.3, lambda part: add_noise(part, 0.04 * strength)).clamp(0, 1)


def blur(images: Tensor, most: float) -> Tensor:
    """Gaussian blur with a standard deviation between 0 and `most` pixels."""
    radius = max(1, math.ceil(2 * most))
    axis = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    sigma = 0.2 + most * torch.rand(len(images), 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (axis / sigma) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)
    flat = rearrange(images, "b c h w -> 1 (b c) h w")
    flat = F.pad(flat, (radius,) * 4, mode="replicate")
    for shape in ((-1, 1, 1, 2 * radius + 1), (-1, 1, 2 * radius + 1, 1)):
        flat = F.conv2d(flat, kernel.view(shape), groups=flat.shape[1])
    return rearrange(flat, "1 (b c) h w -> b c h w", c=3)


def resample(images: Tensor, most: float) -> Tensor:
    """Shrink by a factor between 1 and `most` (one for the whole batch) and enlarge again."""
    factor = 1 + (most - 1) * float(torch.rand(()))
    size = [max(round(side / factor), 1) for side in images.shape[-2:]]
    small = F.interpolate(images, size, mode="bilinear", antialias=True)
    return F.interpolate(small, images.shape[-2:], mode="bilinear")


def shift_colours(images: Tensor, amount: float) -> Tensor:
    """Brightness, contrast, saturation and white balance, each by up to about `amount`."""

    def around_one(channels: int = 1) -> Tensor:
        draw = torch.rand(len(images), channels, 1, 1, device=images.device)
        return 1 + amount * (2 * draw - 1)

    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * around_one() ** 2
    mean = images.mean((1, 2, 3), keepdim=True)
    images = mean + (images - mean) * around_one()
    return (images * around_one() * (1 + 0.5 * (around_one(3) - 1))).clamp(0, 1)


def jpeg(images: Tensor, most: float) -> Tensor:
    """Rounding of 8x8 cosine coefficients, coarser at high frequencies, as JPEG does it."""
    height, width = images.shape[-2:]
    padded = F.pad(images, (0, -width % 8, 0, -height % 8), mode="replicate")
    blocks = rearrange(padded, "b c (y i) (x j) -> b c y x i j", i=8, j=8)
    basis = _cosines(images.device)
    coefficients = basis @ blocks @ basis.T
    frequency = torch.arange(8, device=images.device, dtype=images.dtype)
    step = 0.25 + (frequency[:, None] + frequency) / 4
    step = step * most * (_per_picture(images)[..., None, None] + 0.05)
    blocks = basis.T @ ((coefficients / step).round() * step) @ basis
    whole = rearrange(blocks, "b c y x i j -> b c (y i) (x j)")
    return whole[..., :height, :width].clamp(0, 1)


def add_noise(images: Tensor, most: float) -> Tensor:
    """Gaussian noise with a standard deviation between 0 and `most`."""
    return images + torch.randn_like(images) * (most * _per_picture(images))


def _cosines(device: torch.device) -> Tensor:
    """The orthonormal 8-point DCT-II as a matrix."""
    k = torch.arange(8, device=device, dtype=torch.float32)
    matrix = torch.cos((k + 0.5) * k[:, None] * (math.pi / 8)) / 2
    matrix[0] /= math.sqrt(2)
    return matrix


def _per_picture(images: Tensor) -> Tensor:
    return torch.rand(len(images), 1, 1, 1, device=images.device)


def _some(images: Tensor, share: float, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Change a random share of the pictures; the others cost nothing."""
    index = torch.randperm(len(images), device=images.device)[: max(round(share * len(images)), 1)]
    return images.index_copy(0, index, change(images[index]))
