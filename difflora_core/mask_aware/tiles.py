"""Whole pictures from latents in the memory of one tile, for a look without gradients."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .decoders import Decoder

MARGIN = 8
"""Latents around a tile: all that a decoder of TAESD's shape can see from inside it."""
AROUND = 0.4
"""How far around a box to look, as a share of its longer side."""
MOST = 0.6
"""Share of a picture from which on all of it is decoded."""
TILE = 64
"""Latents per side of a tile: a picture of SD 1.5's size is one."""


@torch.no_grad()
def decode_in_tiles(decoder: Decoder, latents: Tensor, tile: int = TILE) -> Tensor:
    """[B, C, h, w] -> [B, 3, upscale h, upscale w], one picture and one tile at a time.

    Each tile is decoded with a margin that is thrown away. A decoder that looks no further than
    that gives the same picture; where norms and attention span a picture, tiles differ a little in
    tone, which no detector minds.
    """
    scale = decoder.upscale
    height, width = latents.shape[-2:]
    pictures = latents.new_zeros(len(latents), 3, scale * height, scale * width)
    for picture, one in zip(pictures, latents.split(1), strict=True):
        for top, bottom in _spans(height, tile):
            for left, right in _spans(width, tile):
                first, start = max(top - MARGIN, 0), max(left - MARGIN, 0)
                part = one[..., first : bottom + MARGIN, start : right + MARGIN]
                rows = slice(scale * (top - first), scale * (bottom - first))
                columns = slice(scale * (left - start), scale * (right - start))
                inside = slice(scale * top, scale * bottom), slice(scale * left, scale * right)
                picture[(slice(None), *inside)] = decoder(part)[0, :, rows, columns]
    return pictures


@torch.no_grad()
def decode_around(decoder: Decoder, latents: Tensor, box: Tensor) -> Tensor:
    """As `decode_in_tiles`, but what is not near a box [4] (x0, y0, x1, y1 in pixels) stays grey.

    A look at where a face was costs a fraction of a look at everything, unless the face is large.
    """
    scale, (height, width) = decoder.upscale, latents.shape[-2:]
    grown = (box[2:] - box[:2]).max() * AROUND
    left, top = ((box[:2] - grown) / scale).floor().int().clamp(min=0).tolist()
    right, bottom = ((box[2:] + grown) / scale).ceil().int().tolist()
    near = latents[..., top:bottom, left:right]
    if near.shape[-2] * near.shape[-1] > MOST * height * width or not near.numel():
        return decode_in_tiles(decoder, latents)
    pictures = latents.new_full((len(latents), 3, scale * height, scale * width), 0.5)
    rows, columns = slice(scale * top, scale * bottom), slice(scale * left, scale * right)
    pictures[..., rows, columns] = decode_in_tiles(decoder, near)
    return pictures


def _spans(length: int, tile: int) -> Iterator[tuple[int, int]]:
    """Parts of a side, alike to one latent, none longer than a tile."""
    count = -(-length // tile)
    for part in range(count):
        yield part * length // count, (part + 1) * length // count
