"""Rows of the table: pictures of every person with every prompt, guided in one way or another."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from difflora_core.errors import BadConfig
from difflora_core.lora import Lora
from difflora_core.mask_aware.decoders import ModuleDecoder
from difflora_core.mask_aware.full_guidance import guide_through
from difflora_core.mask_aware.guidance import GuidanceSettings, Guide, GuideStep
from difflora_core.mask_aware.networks import FaceNetwork, open_face_network
from training.artifacts import artifact
from training.base.painter import Estimate
from training.base.pool import decode_latents
from training.base.side_path import Factors, stack_loras
from training.config import Config
from training.evaluation.rows import Bench, predicted

from .config import GuidanceConfig, read_window

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """How one row of the table is painted."""

    name: str
    settings: GuidanceSettings | None = None
    """None: without guidance."""
    through: bool = False
    """Whether the gradient runs through the denoiser."""
    personal: bool = False
    """Whether every person has the LoRA predicted from the photo."""


@dataclass(frozen=True)
class Painted:
    """A row's pictures and what guidance had to say while they were painted."""

    pictures: Tensor
    """[P, Q, 3, H, W] in 0..1, on the CPU."""
    steps: list[GuideStep]
    """Of all batches one after another."""
    seconds: float
    """Per picture."""


@dataclass(frozen=True)
class Studio:
    """What rows are painted with."""

    bench: Bench
    network: FaceNetwork
    references: Tensor
    """Embedding of each person's one photo, [P, D]; zeros, which guide nowhere, without a face."""
    loras: list[Lora] | None
    """Predicted from the same photos."""

    @classmethod
    def open(cls, config: Config, bench: Bench) -> Studio:
        """The network that guides is the one that predictors are conditioned on."""
        device = bench.painter.device
        network = open_face_network(artifact(config, "recogniser")).to(device)
        photos = bench.trial.photos
        landmarks, found = bench.judges.find_faces(photos)
        if not found.all():
            logger.warning("%d photos have no face that is found", int((~found).sum()))
        embeddings = network.embed(photos.to(device), landmarks.to(device)).nan_to_num()
        loras = None
        if "predicted" in config.guidance.modes:
            loras = list(predicted(bench).loras or [])
        return cls(bench, network, embeddings * found.to(device)[:, None], loras)


def rows(settings: GuidanceConfig) -> Iterator[Row]:
    """All rows of the table, the one that others are compared with first of its kind."""
    if not settings.windows or not settings.strengths:
        raise BadConfig("guidance.windows and guidance.strengths must not be empty.")
    kinds = {"full": "full", "predicted": "predicted+guided"}
    yield Row("base")
    if "guided" in settings.modes:
        for window in settings.windows:
            yield from _strengths("guided", window, settings)
    if "full" in settings.modes:
        for row in _strengths(kinds["full"], settings.windows[0], settings):
            yield replace(row, through=True)
    if "predicted" in settings.modes:
        yield Row("predicted", personal=True)
        for row in _strengths(kinds["predicted"], settings.windows[0], settings):
            yield replace(row, personal=True)


def paint(studio: Studio, row: Row) -> Painted:
    """Every person with every prompt; noise is the same in all rows."""
    bench, settings = studio.bench, studio.bench.config.eval
    people, count = bench.trial.noise_seeds.shape
    texts = bench.trial.personal_prompts() if row.personal else list(bench.trial.prompts)
    prompts, seeds = texts * people, bench.trial.noise_seeds.flatten().tolist()
    who = torch.arange(people).repeat_interleave(count)
    factors = _factors(studio, row)
    batch = settings.batch or (256 if bench.painter.device.type == "cuda" else 8)
    parts, steps, begin = [], [], time.perf_counter()
    for i in range(0, len(prompts), batch):
        few = slice(i, i + batch)
        guide = _guide(studio, row, who[few])
        latents = bench.painter.sample(
            prompts[few], seeds[few], _rows_of(factors, who[few]), settings.paint_steps,
            settings.guidance, None if guide is None else _steer(guide, row.through),
        )  # fmt: skip
        parts.append(decode_latents(bench.painter.vae, latents).cpu())
        steps += [] if guide is None else guide.log
    seconds = (time.perf_counter() - begin) / len(prompts)
    return Painted(torch.cat(parts).unflatten(0, (people, count)), steps, seconds)


def _strengths(kind: str, window: str, settings: GuidanceConfig) -> Iterator[Row]:
    for strength in settings.strengths:
        guidance = GuidanceSettings(
            strength,
            read_window(window),
            settings.iterations,
            settings.smoothing,
            settings.jitter,
        )
        yield Row(f"{kind}/{window}/{strength:g}", guidance)


def _guide(studio: Studio, row: Row, who: Tensor) -> Guide | None:
    """A fresh guide for one batch: every picture has its own person as the only reference."""
    if row.settings is None:
        return None
    vae = studio.bench.painter.vae
    decoder = ModuleDecoder(vae, lambda latents: latents / vae.config.scaling_factor)
    references = studio.references[who.to(studio.references.device)][:, None]
    finder = studio.bench.judges.face_encoder.find
    return Guide(decoder, studio.network, references, row.settings, finder)


def _steer(guide: Guide, through: bool):
    def steer(seen: Estimate) -> Tensor:
        if through:
            return guide_through(
                guide, seen.denoise, seen.noisy, seen.x0, seen.direction, seen.guidance, seen.sigma
            )
        return guide.guide(seen.x0, seen.direction, seen.guidance, seen.sigma)

    return steer


def _factors(studio: Studio, row: Row) -> Factors:
    return stack_loras(studio.loras or [], studio.bench.painter.device) if row.personal else {}


def _rows_of(factors: Factors, who: Tensor) -> Factors:
    return {n: (d[who.to(d.device)], u[who.to(u.device)]) for n, (d, u) in factors.items()}
