"""Stage train-identity-loras: one LoRA file per person, resumable person by person."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path

from difflora_core.header import LoraHeader
from difflora_core.lora_space import LoraSpace
from difflora_core.weights_file import write_lora

from ..base.painter import Painter
from ..config import Config
from ..run_folder import RunFolder
from .config import LorasConfig
from .teacher import SUBJECT, train_loras

logger = logging.getLogger(__name__)
GROUP_ON_CUDA = 64


def lora_space(config: LorasConfig) -> LoraSpace:
    """The space that the data set of a config lives in."""
    return LoraSpace.for_mini(config.rank, config.gauge)


def person_file(folder: RunFolder, seed: int) -> Path:
    return folder.path / "people" / f"{seed:08d}.safetensors"


def run(config: Config, folder: RunFolder) -> None:
    """Train whoever is missing. A file appears whole or not at all, so killing the stage at any
    moment loses the people in work and nothing else."""
    settings, space = config.loras, lora_space(config.loras)
    painter = Painter.open(config)
    (folder.path / "people").mkdir(exist_ok=True)
    wanted = range(settings.first, settings.first + settings.people)
    missing = [seed for seed in wanted if not person_file(folder, seed).exists()]
    logger.info("%d of %d LoRAs are there", len(wanted) - len(missing), len(wanted))
    begin, done = time.monotonic(), 0
    for seeds in groups(missing, settings.group or _default_group(painter)):
        for seed, lora in zip(seeds, train_loras(painter, space, settings, seeds), strict=True):
            header = LoraHeader(
                title=f"drawn person {seed}",
                base="mini",
                trigger=SUBJECT,
                space_id=space.id,
                seed=seed,
            )
            write_lora(lora, person_file(folder, seed), header, overwrite=True)
        done += len(seeds)
        rate = 3600 * done / (time.monotonic() - begin)
        logger.info("%d of %d people, %.0f LoRAs per hour", done, len(missing), rate)


def groups(seeds: list[int], size: int) -> Iterator[list[int]]:
    for i in range(0, len(seeds), size):
        yield seeds[i : i + size]


def _default_group(painter: Painter) -> int:
    return GROUP_ON_CUDA if painter.device.type == "cuda" else 1
