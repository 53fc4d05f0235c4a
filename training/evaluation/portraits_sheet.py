"""Stage paint-portraits: what the base model makes of held-out prompts, to be looked at.

Beside it the renderer's pictures of the same prompts after the picture autoencoder: no base model
that paints through it can be cleaner.
"""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from training.base.painter import Painter
from training.base.pool import decode_latents, encode_images
from training.config import Config
from training.portraits import ATTRIBUTES, render, sample_scenes
from training.run_folder import RunFolder

from .protocol import draw_trial
from .sheet import MARGIN, save_png, to_image

logger = logging.getLogger(__name__)

COLUMNS = 8
SIDE = 192
"""Pixels per picture on the sheet: larger than painted, since eyes and mouths are small."""
LINE = 11
CAPTION_LINES = 3


def run(config: Config, folder: RunFolder) -> None:
    """Paint one picture per prompt of `evaluate` with the same settings, without any LoRA."""
    settings = replace(config.eval, fid_pictures=2)  # nothing is compared here
    trial = draw_trial(settings, config.run.torch_device())
    seeds = trial.noise_seeds[0].tolist()
    painter = Painter.open(config)
    painted = painter.paint(
        trial.prompts, seeds, steps=settings.paint_steps, guidance=settings.guidance
    )
    drawings = drawings_of(trial.wanted, settings.seed).to(painter.device)
    drawn = decode_latents(painter.vae, encode_images(painter.vae, drawings))
    for name, pictures in {"portraits": painted, "drawn": drawn}.items():
        path = save_png(folder.path / f"{name}.png", captioned(pictures, trial.prompts))
        logger.info("%d %s: %s", len(pictures), name, path)


def drawings_of(wanted: Sequence[Mapping[str, int]], seed: int) -> Tensor:
    """The renderer's picture of somebody for what each prompt asks, [N, 3, 128, 128] in 0..1."""
    pictures = []
    for number, asked in enumerate(wanted):
        fixed = {name: ATTRIBUTES[name][index] for name, index in asked.items()}
        generator = torch.Generator().manual_seed(1000 * seed + number)
        pictures.append(render(sample_scenes(1, generator, fixed=fixed)).images)
    return torch.cat(pictures)


def captioned(pictures: Tensor, captions: Sequence[str]) -> Image.Image:
    """Pictures [N, 3, H, W] in 0..1 in lines of eight, each with its caption below."""
    font = ImageFont.load_default(size=LINE - 1)
    high, wide = SIDE + CAPTION_LINES * LINE + MARGIN, SIDE + MARGIN
    lines = -(-len(pictures) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * wide, lines * high), "white")
    pen = ImageDraw.Draw(sheet)
    letters = int(SIDE / font.getlength("n"))
    for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        x, y = number % COLUMNS * wide, number // COLUMNS * high
        sheet.paste(to_image(picture).resize((SIDE, SIDE), Image.Resampling.LANCZOS), (x, y))
        words = textwrap.wrap(caption, letters, max_lines=CAPTION_LINES, placeholder="...")
        for row, text in enumerate(words):
            pen.text((x, y + SIDE + row * LINE), text, fill="black", font=font)
    return sheet
