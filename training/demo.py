"""Stage demo: a photo becomes a LoRA becomes portraits, for people whom no model has seen.

Writes sheet.png (photo, base model, average LoRA, predicted LoRA, trained LoRA), the photo, the
predicted LoRA of the first person as person.safetensors, and report.json.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from difflora_core.header import LoraHeader
from difflora_core.lora import Lora
from difflora_core.predictor import Predictor
from difflora_core.weights_file import write_lora

from .artifacts import artifact
from .base.painter import Painter
from .config import Config
from .evaluation.judges import Judges, to_pixels
from .evaluation.metrics import reference_similarity
from .evaluation.protocol import TRIGGER, draw_photos, personal
from .evaluation.sheet import save_png, save_sheet
from .loras.stage import lora_space
from .loras.teacher import train_loras
from .portraits import identities
from .run_folder import RunFolder

logger = logging.getLogger(__name__)

PEOPLE = 3
PROMPTS = (
    "a photo of a person, smiling, wearing a red shirt, at the beach",
    "a photo of a person, looking surprised, wearing a black suit, on a blue background",
)
REFERENCES = 6


def run(config: Config, folder: RunFolder) -> None:
    begin = time.monotonic()
    people = _People(config)
    predictions = [people.predict(person) for person in range(PEOPLE)]
    rows: dict[str, list[Lora] | None] = {
        "base": None,
        "average LoRA": [people.predictor.average()] * PEOPLE,
        "predicted": [lora for lora, _ in predictions],
        "trained": people.train(),
    }
    pictures = {label: people.paint(loras) for label, loras in rows.items()}
    photos = people.photos.repeat_interleave(len(PROMPTS), 0)
    titles = [
        f"person {i + 1}" if k == 0 else "" for i in range(PEOPLE) for k in range(len(PROMPTS))
    ]
    save_sheet(folder.path / "sheet.png", {"photo": photos, **pictures}, titles)
    save_png(folder.path / "photo.png", Image.fromarray(to_pixels(people.photos[0])))
    space = people.predictor.space.id
    header = LoraHeader(title="person", base="mini", trigger=TRIGGER, space_id=space)
    write_lora(predictions[0][0], folder.path / "person.safetensors", header, overwrite=True)
    report = {
        "seed": config.run.seed,
        "person_seeds": people.seeds.tolist(),
        "face_sim": people.likeness(pictures),
        "seconds": {
            "predict": [round(seconds, 3) for _, seconds in predictions],
            "train": [round(s, 1) for s in people.training_seconds],
            "all": round(time.monotonic() - begin, 1),
        },
        "prompts": [personal(prompt) for prompt in PROMPTS],
    }
    folder.write_text("report.json", json.dumps(report, indent=2) + "\n")
    _tell(folder.path, report)


class _People:
    """Held-out people of the run's seed, with what the demo does to them."""

    def __init__(self, config: Config) -> None:
        self.config, self.space = config, lora_space(config.loras)
        self.painter, self.judges = Painter.open(config), Judges.open(config)
        self.predictor = Predictor.open(artifact(config, "predictor"), self.painter.device)
        generator = torch.Generator().manual_seed(config.run.seed)
        self.seeds = torch.randint(1 << 40, (PEOPLE,), generator=generator)
        self.identity = identities(self.seeds, "test")
        self.photos = draw_photos(self.identity, 1, generator, self.painter.device)[:, 0].cpu()
        drawn = draw_photos(self.identity, REFERENCES, generator, self.painter.device)
        self.references = drawn.flatten(0, 1).cpu()
        self.training_seconds: list[float] = []

    def predict(self, person: int) -> tuple[Lora, float]:
        """The predicted LoRA, and the seconds that it took, photo encoding included."""
        begin = time.monotonic()
        features = self.judges.features(to_pixels(self.photos[person]))
        lora = self.predictor.predict(features, seed=self.config.run.seed).lora
        return lora, time.monotonic() - begin

    def train(self) -> list[Lora]:
        """A DreamBooth LoRA per person, one after the other."""
        loras = []
        for seed in self.seeds.tolist():
            begin = time.monotonic()
            few = train_loras(self.painter, self.space, self.config.loras, [seed], split="test")
            self.training_seconds.append(time.monotonic() - begin)
            loras += few
        return loras

    def paint(self, loras: list[Lora] | None) -> Tensor:
        """Every prompt for every person with its column's noise: [people * prompts, 3, S, S]."""
        prompts = [p if loras is None else personal(p) for _ in range(PEOPLE) for p in PROMPTS]
        seeds = [self.config.run.seed + k for k in range(len(prompts))]
        each = None if loras is None else [lora for lora in loras for _ in PROMPTS]
        return self.painter.paint(prompts, seeds, each)

    def likeness(self, pictures: Mapping[str, Tensor]) -> dict[str, float]:
        """As `face_sim` of evaluate: mean cosine to the person's pictures, no face counting 0."""
        known = self.judges.look(self.references).face.view(PEOPLE, REFERENCES, -1)
        scores = {}
        for label, painted in pictures.items():
            seen = self.judges.look(painted)
            faces = seen.face.view(PEOPLE, len(PROMPTS), -1)
            cosines = reference_similarity(faces, known, seen.found.view(PEOPLE, -1))
            scores[label] = round(cosines.mean().item(), 3)
        return scores


def _tell(place: Path, report: Mapping[str, Any]) -> None:
    logger.info("likeness (cosine, 1 = the same face): %s", report["face_sim"])
    logger.info("seconds: %s", report["seconds"])
    logger.info("look at %s", place / "sheet.png")
