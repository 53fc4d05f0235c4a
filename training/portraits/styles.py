"""Five drawing styles, applied to the finished picture."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .canvas import Canvas, blur, wide
from .vocabulary import STYLES

_LUMA = (0.299, 0.587, 0.114)
#: a channel mixer with less than no red: lips are darker than any skin
_MIXER = (-0.35, 1.0, 0.35)


def apply_style(canvas: Canvas, style: Tensor, light: Tensor, texture: Tensor) -> None:
    """Restyle pictures in place: style [B] indexes the vocabulary."""
    painters = {
        "photo": _photo, "black and white": _black_and_white, "sketch": _sketch,
        "painting": _painting, "cartoon": _cartoon,
    }  # fmt: skip
    for i, name in enumerate(STYLES):
        index = (style == i).nonzero()[:, 0]
        if len(index):
            part = canvas.rows(index)
            part.image = painters[name](part, light[index], texture[index]).clamp(0, 1)
            canvas.put_rows(index, part)


def luminance(image: Tensor, mixer: tuple[float, ...] = _LUMA) -> Tensor:
    """[B, 3, H, W] -> [B, H, W]."""
    weights = torch.tensor(mixer, device=image.device)
    return (image * weights[:, None, None]).sum(1)


def monochrome(image: Tensor) -> Tensor:
    """Greys in which mouths are seen on dark skin, too: [B, 3, H, W] -> [B, H, W]."""
    return luminance(image, _MIXER).clamp(0, 1) ** 0.5


def _outline(grey: Tensor) -> Tensor:
    """Size of the step to the next pixel right and below, [B, H, W]: lines one pixel wide.

    Wider ones, of a Sobel filter, fill the eyes of small faces with black.
    """
    padded = F.pad(grey[:, None], (0, 1, 0, 1), mode="replicate")[:, 0]
    across = padded[:, :-1, 1:] - grey
    down = padded[:, 1:, :-1] - grey
    return (across * across + down * down).sqrt()


def _photo(c: Canvas, light: Tensor, texture: Tensor) -> Tensor:
    slope = 1 + 0.07 * (wide(light[:, 0]) * (c.x - 64) + wide(light[:, 1]) * (c.y - 64) * 0.6) / 64
    return c.image * slope.unsqueeze(1)


def _black_and_white(c: Canvas, light: Tensor, texture: Tensor) -> Tensor:
    grey = monochrome(_photo(c, light, texture))
    local = grey - blur(grey[:, None], 6)[:, 0]
    grey = grey + 0.5 * local  # hair parts from a background of its grey
    vignette = 1 - 0.25 * (((c.x - 64) ** 2 + (c.y - 64) ** 2) / 8192) ** 2
    return (grey * vignette)[:, None].expand(-1, 3, -1, -1)


def _sketch(c: Canvas, light: Tensor, texture: Tensor) -> Tensor:
    """Lighter than the photo, and darkest where it is darker than around: eyes, brows and mouth."""
    grey = monochrome(c.image)
    local = grey - blur(grey[:, None], 4)[:, 0]
    shade = 0.37 + 0.6 * grey + local - (0.25 - grey).clamp(min=0)  # sunglasses stay dark
    hatch = torch.sin((c.x + c.y) * 1.5 + 6.28 * wide(texture[:, 6]))
    tone = (0.97 - shade).clamp(0, 1) * (1 + 0.04 * hatch)
    line = (_outline(grey) * 1.2 - 0.08).clamp(0, 0.7)
    ink = (line * (1 - tone) + tone).clamp(0, 0.95)  # lines that add up would fill eyes with black
    paper = torch.tensor([0.97, 0.96, 0.92], device=grey.device)[:, None, None]
    return paper * (1 - ink[:, None]) + 0.06 * ink[:, None]


def _painting(c: Canvas, light: Tensor, texture: Tensor) -> Tensor:
    phase = 6.28 * wide(texture[:, 5])
    wave = torch.sin(c.x / 3.1 + torch.sin(c.y / 5.0) * 2 + phase)
    swirl = torch.sin(c.y / 2.7 + torch.sin(c.x / 6.0) * 2 + phase)
    n, _, height, width = c.image.shape
    across = (c.x / 64 - 1 + 0.005 * wave).expand(n, height, width)
    down = (c.y / 64 - 1 + 0.005 * swirl).expand(n, height, width)
    moved = F.grid_sample(
        c.image, torch.stack([across, down], -1), padding_mode="border", align_corners=False
    )
    grey = moved.mean(1, keepdim=True)
    rich = grey + (moved - grey) * 1.35
    strokes = torch.sin((c.x - c.y * 0.6) * 1.2 + 2 * wave + phase) * 0.03
    warm = torch.tensor([1.04, 1.0, 0.9], device=grey.device)[:, None, None]
    return (rich + strokes.unsqueeze(1)) * warm


def _cartoon(c: Canvas, light: Tensor, texture: Tensor) -> Tensor:
    grey = c.image.mean(1, keepdim=True)
    vivid = (grey + (c.image - grey) * 1.5) * 0.85 + 0.15
    # what is darker than around, not its edges: those would fill the whites of the eyes
    line = (luminance(blur(c.image, 4) - c.image) * 4 - 0.1).clamp(0, 0.6)
    return vivid * (1 - line[:, None])
