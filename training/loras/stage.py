"""Stage train-identity-loras: one LoRA file per person, resumable person by person."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path

from difflora_core.errors import DiffLoRAError
from difflora_core.header import LoraHeader
from difflora_core.lora_space import LoraSpace
from difflora_core.weights_file import TensorFile, write_lora

from ..artifacts import BASE_PARTS, artifact, sha256
from ..base.painter import Painter
from ..config import Config
from ..loop import OutOfTime
from ..portraits import renderer_digest
from ..run_folder import RunFolder
from .config import LorasConfig
from .teacher import SUBJECT, train_loras

logger = logging.getLogger(__name__)
GROUP_ON_CUDA = 64
"""people trained together"""


def lora_space(config: LorasConfig) -> LoraSpace:
    """The space that the data set of a config lives in."""
    return LoraSpace.for_mini(config.rank, config.gauge)


def person_file(folder: RunFolder, seed: int) -> Path:
    return folder.path / "people" / f"{seed:08d}.safetensors"


def run(config: Config, folder: RunFolder) -> None:
    """Train whoever is missing. A file appears whole or not at all, so killing the stage at any
    moment loses the people in work and nothing else.

    Errors: OutOfTime when `run.max_minutes` are over first.
    """
    settings, space, deadline = config.loras, lora_space(config.loras), config.run.deadline()
    painter = Painter.open(config)
    (folder.path / "people").mkdir(exist_ok=True)
    wanted = range(settings.first, settings.first + settings.people)
    there = [seed for seed in wanted if person_file(folder, seed).exists()]
    how = recipe(config)
    refuse_other_recipes([person_file(folder, seed) for seed in there], how)
    missing = sorted(set(wanted) - set(there))
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
                description=how,
            )
            write_lora(lora, person_file(folder, seed), header, overwrite=True)
        done += len(seeds)
        rate = 3600 * done / (time.monotonic() - begin)
        logger.info("%d of %d people, %.0f LoRAs per hour", done, len(missing), rate)
        if done < len(missing) and time.monotonic() > deadline:
            raise OutOfTime(f"{len(missing) - done} people are left: the time was up")


def recipe(config: Config) -> str:
    """Everything that a person's LoRA depends on, in words for its header."""
    decisive = ("gauge", "rank", "steps", "pictures", "batch", "draws", "lr", "prior")
    settings = ", ".join(f"{name} {getattr(config.loras, name)}" for name in decisive)
    parts = "".join(sha256(artifact(config, name)) for name in BASE_PARTS)
    model = hashlib.sha256(parts.encode()).hexdigest()[:8]
    return f"{settings}, base model {model}, drawings {renderer_digest()}"


def refuse_other_recipes(files: list[Path], wanted: str) -> None:
    """Errors: DiffLoRAError where a folder already holds LoRAs that were trained otherwise."""
    for file in files:
        found = recipe_of(file)
        if found != wanted:
            raise DiffLoRAError(
                f"{file.name} was trained otherwise than this config asks for: "
                f"{found or 'by an earlier version'} instead of {wanted}.",
                hint=f"Choose another run.root, or empty the folder {file.parent.name} first.",
            )


def recipe_of(file: Path) -> str:
    """How the LoRA of a file was trained; empty where its header does not say."""
    return TensorFile(file).metadata.get("modelspec.description", "")


def groups(seeds: list[int], size: int) -> Iterator[list[int]]:
    for i in range(0, len(seeds), size):
        yield seeds[i : i + size]


def _default_group(painter: Painter) -> int:
    return GROUP_ON_CUDA if painter.device.type == "cuda" else 1
