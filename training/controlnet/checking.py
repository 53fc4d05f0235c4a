"""Figures and pictures of a ControlNet while and after it trains, on people never trained on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..base.noise import NoiseSchedule
from ..base.painter import denoised
from ..base.pool import decode_latents
from ..config import Config
from ..drawing import generator_for
from ..evaluation.sheet import save_sheet
from ..portraits import sample_scenes
from ..run_folder import RunFolder
from .base_model import BaseModel
from .batches import PeopleBatch
from .control import Control, predict_noise
from .drawn_people import encoded
from .objective import MaskAware
from .people_stage import open_split
from .read_people import ReadPeople
from .repaint import PaintSettings, own_noise, paint

TIMESTEPS = (25, 75, 150, 300, 600)
"""Where the terms are measured."""
SHOWN = 6
"""Pictures on a sample sheet."""
_STREAM = 9_000_000


@dataclass(frozen=True)
class Checker:
    """Held-out pictures with fixed noise."""

    base: BaseModel
    config: Config
    batch: PeopleBatch
    loss: MaskAware
    """Measures with the weights of its objective left out."""

    @torch.no_grad()
    def figures(self, control: Control | None) -> dict[str, float]:
        """Epsilon error, and distances of faces and bodies of the one-step estimate, by t."""
        schedule, result = NoiseSchedule(self.base.device), {}
        for t in TIMESTEPS:
            sums: dict[str, list[Tensor]] = {}
            for rows in torch.arange(len(self.batch)).split(self.config.controlnet.batch):
                for name, values in self._terms(control, rows, t, schedule).items():
                    sums.setdefault(name, []).append(values)
            for name, parts in sums.items():
                if len(values := torch.cat(parts)):  # pictures may show no face at all
                    result[f"{name}_{t}"] = round(float(values.mean()), 5)
        return result

    def _terms(
        self, control: Control | None, rows: Tensor, t: int, schedule: NoiseSchedule
    ) -> dict[str, Tensor]:
        few = self.batch.rows(rows.to(self.base.device))
        noise = torch.stack([own_noise(1000 * row + t, few.latents.shape[1:]) for row in rows])
        noise = noise.to(few.latents)
        times = torch.full((len(few),), t, device=self.base.device)
        noisy = schedule.add_noise(few.latents, noise, times)
        context = self.base.encode(few.prompts)
        predicted = predict_noise(self.base, control, noisy, times, context).float()
        kept = schedule.alpha[times][:, None, None, None]
        terms = self.loss.compare(few, denoised(noisy, predicted, kept))
        shown = {name: term.value[term.present] for name, term in terms.items()}
        return {"epsilon": schedule.loss(predicted, noise, times), **shown}

    def save_samples(self, control: Control, folder: RunFolder, step: int) -> None:
        """A sheet of true pictures, repainted ones, and ones painted from noise."""
        few = self.batch.rows(torch.arange(min(SHOWN, len(self.batch)), device=self.base.device))
        lines = {"true": decode_latents(self.base.vae, few.latents).cpu()}
        for start in (self.config.controlnet.from_step, 1000):
            settings = paint_settings(self.config, start)
            for name, net in (("base", None), ("control", control)):
                painted = paint(self.base, net, few.prompts, few.latents, range(len(few)), settings)
                lines[f"{name} from {start}"] = painted.cpu()
        save_sheet(folder.samples() / f"step_{step:08d}.png", lines)


def paint_settings(config: Config, from_step: int) -> PaintSettings:
    """How evaluation and sample sheets paint."""
    settings = config.controlnet
    return PaintSettings(settings.paint_steps, settings.guidance, from_step)


def held_out(config: Config, base: BaseModel, count: int) -> PeopleBatch:
    """The same pictures for every variant: of the validation split, or newly drawn."""
    settings = config.controlnet
    if settings.data == "people":
        people = ReadPeople.open(open_split(config, "validation"), base, settings)
        pictures = people.index.pictures[:count]
        return people.collate([people.read(picture, None) for picture in pictures])
    generator = generator_for(config.run.seed, _STREAM)
    scenes = sample_scenes(count, generator, people="mixed", split="test", device=base.device)
    return encoded(base, scenes, settings, None).batch(torch.arange(count))
