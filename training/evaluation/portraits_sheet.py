"""Stage paint-portraits: what the base model makes of held-out prompts, to be looked at."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Sequence
from dataclasses import replace

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from training.base.painter import Painter
from training.config import Config
from training.run_folder import RunFolder

from .protocol import draw_trial
from .sheet import MARGIN, to_image

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
    pictures = Painter.open(config).paint(
        trial.prompts, seeds, steps=settings.paint_steps, guidance=settings.guidance
    )
    path = folder.path / "portraits.png"
    captioned(pictures, trial.prompts).save(path)
    logger.info("%d portraits: %s", len(pictures), path)


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
