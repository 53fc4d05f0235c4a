"""Decoding in tiles: the same picture, in the memory of one tile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from difflora_core.mask_aware.decoders import Part
from difflora_core.mask_aware.tiles import decode_around, decode_in_tiles
from tests.core.guidance_parts import tiny_decoder


class Watched:
    """A decoder that notes what it was given."""

    def __init__(self) -> None:
        self.decoder, self.shapes = tiny_decoder(), []
        self.upscale = self.decoder.upscale

    def __call__(self, latents: Tensor, part: Part | None = None) -> Tensor:
        assert part is None and not torch.is_grad_enabled()
        self.shapes.append(tuple(latents.shape))
        return self.decoder(latents)


@pytest.mark.parametrize("size", [(24, 24), (25, 70), (41, 9)])
def test_tiles_join_without_a_seam(size: tuple[int, int]) -> None:
    watched = Watched()
    latents = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(0))
    pictures = decode_in_tiles(watched, latents, tile=24)
    with torch.no_grad():
        whole = tiny_decoder()(latents)
    assert pictures.shape == whole.shape
    assert (pictures - whole).abs().max() < 1e-5
    assert all(shape[0] == 1 and max(shape[2:]) <= 24 + 16 for shape in watched.shapes)


def test_a_small_picture_is_decoded_at_once() -> None:
    watched = Watched()
    decode_in_tiles(watched, torch.zeros(1, 4, 64, 48))
    assert watched.shapes == [(1, 4, 64, 48)]


def test_a_look_around_a_box_costs_its_part_and_shows_it() -> None:
    watched = Watched()
    latents = torch.randn(1, 4, 24, 30, generator=torch.Generator().manual_seed(0))
    pictures = decode_around(watched, latents, torch.tensor([40.0, 30.0, 90.0, 80.0]))
    assert watched.shapes == [(1, 4, 12, 12)] and pictures.shape == (1, 3, 192, 240)
    with torch.no_grad():
        part = tiny_decoder()(latents[..., 1:13, 2:14])
    assert torch.equal(pictures[..., 8:104, 16:112], part)
    pictures[..., 8:104, 16:112] = 0.5
    assert (pictures == 0.5).all()


@pytest.mark.parametrize("box", [[-50.0, -50.0, 200.0, 200.0], [500.0, 500.0, 600.0, 600.0]])
def test_a_look_around_a_large_face_or_outside_shows_everything(box: list[float]) -> None:
    latents = torch.randn(1, 4, 20, 20, generator=torch.Generator().manual_seed(0))
    pictures = decode_around(tiny_decoder(), latents, torch.tensor(box))
    assert torch.equal(pictures, decode_in_tiles(tiny_decoder(), latents))
