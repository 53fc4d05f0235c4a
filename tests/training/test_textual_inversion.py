from __future__ import annotations

import torch

from training.base.config import TextConfig, UnetConfig, VaeConfig
from training.base.models import (
    build_compact_text,
    build_unet,
    build_vae,
    text_config,
    unet_config,
    vae_config,
)
from training.base.painter import Painter
from training.base.side_path import SidePath
from training.evaluation.textual_inversion import invert, replaced_word


def _painter() -> Painter:
    torch.manual_seed(0)
    text = TextConfig(width=32, layers=1, heads=2)
    unet = build_unet(unet_config(UnetConfig(channels=(32,)), text))
    vae = build_vae(vae_config(VaeConfig(channels=(32, 32, 32, 32))))
    vae.register_to_config(scaling_factor=1.0)
    parts = (vae, unet, build_compact_text(text_config(text)))
    for part in parts:
        part.requires_grad_(False).eval()
    return Painter(*parts, SidePath(unet))


def test_only_prompts_with_the_rare_word_change() -> None:
    painter = _painter()
    prompts = ["a photo of sks person", "a photo of a person", "sks", ""]
    before = painter.encode(prompts)
    with replaced_word(painter.text, torch.ones(2, 32)):
        inside = painter.encode(prompts)
    changed = [not torch.equal(a, b) for a, b in zip(before, inside, strict=True)]
    assert changed == [True, False, True, False]
    assert torch.equal(painter.encode(prompts), before)


def test_rows_of_a_batch_read_their_own_word() -> None:
    painter = _painter()
    words = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    with replaced_word(painter.text, words):
        both = painter.encode(["sks", "sks", "sks"])
    with replaced_word(painter.text, words[:1]):
        first = painter.encode(["sks"])
    assert torch.allclose(both[0], first[0], atol=1e-6)
    assert torch.allclose(both[2], both[0], atol=1e-6)
    assert not torch.allclose(both[1], both[0], atol=1e-3)


def test_inversion_learns_words_that_differ_between_people() -> None:
    painter = _painter()
    pictures = torch.stack([torch.zeros(1, 3, 128, 128), torch.ones(1, 3, 128, 128)])
    words = invert(painter, pictures, [["a photo of sks person"]] * 2, steps=2, seed=0).embeddings
    again = invert(painter, pictures, [["a photo of sks person"]] * 2, steps=2, seed=0).embeddings
    assert words.shape == (2, 32) and torch.equal(words, again)
    assert not torch.allclose(words[0], words[1], atol=1e-4)
