"""The rows of the table: how each way of personalising turns people into LoRAs (or words).

A row sees what its method may see: predicted rows the one photo, the teacher, textual inversion
and the refinement an album of captioned pictures of the person, the base model nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from difflora_core.features import Features
from difflora_core.lora import Lora
from difflora_core.predictor import Prediction, Predictor
from training.artifacts import MissingArtifact, artifact
from training.base.painter import Painter
from training.base.side_path import Factors, stack_loras
from training.config import Config
from training.loras.collect import read_set
from training.loras.stage import lora_space
from training.loras.teacher import fit_factors, photo_album, train_loras

from .audition import choose_candidates
from .judges import Judges, to_pixels
from .nearest import nearest_people
from .protocol import Trial, draw_album
from .textual_inversion import Words, invert

logger = logging.getLogger(__name__)

T = TypeVar("T")

GROUP = 64
"""People who train side by side."""


@dataclass(frozen=True)
class Bench:
    """What rows work with."""

    config: Config
    trial: Trial
    painter: Painter
    judges: Judges
    weights: Mapping[str, str]
    """File name -> digest of base model, judges and predictors, as they were when it was opened."""

    @property
    def seeds(self) -> list[int]:
        """Identity seeds of the people."""
        return self.trial.person_seeds.tolist()

    def features(self, person: int) -> Features:
        """What the encoders make of a person's photo; without a face, of the photo alone."""
        return self.judges.features(to_pixels(self.trial.photos[person]), f"of person {person}")

    def predictor(self, name: str = "predictor") -> Predictor:
        """A predictor by artifact name; `eval.predictor` takes the place of the default one."""
        chosen = self.config.eval.predictor if name == "predictor" else ""
        path = Path(chosen) if chosen else artifact(self.config, name)
        return Predictor.open(path, self.painter.device)


@dataclass(frozen=True)
class Personalised:
    """What a row hands to the painter."""

    loras: Sequence[Lora] | None = None
    """One per person; None: the model as it is."""
    words: Words | None = None
    """Learnt words, one per person."""
    trigger: bool = True
    """Whether prompts say "sks person" rather than "a person"."""
    seconds: Sequence[float] = ()
    """What each person's took; a share of the total where people train side by side."""


def base(bench: Bench) -> Personalised:
    """The base model, which knows nobody."""
    return Personalised(trigger=False, seconds=[0.0] * len(bench.seeds))


def average_lora(bench: Bench) -> Personalised:
    """The mean LoRA of the training set, which knows what people share and nobody in particular.

    Without the set at hand, the mean that the predictor's file holds: of the set that its
    autoencoder was trained on, which end-to-end training leaves as it is.
    """
    people = len(bench.seeds)
    try:
        loras = read_set(bench.config)
        average = loras.space.unpack(loras.vectors.mean(0))
    except MissingArtifact:
        average = bench.predictor().average()
    return Personalised([average] * people, seconds=[0.0] * people)


def nearest_lora(bench: Bench) -> Personalised:
    """The training LoRA of the person whose photo has the most similar face embedding."""
    loras = read_set(bench.config)
    features, seconds = _each(bench, bench.features)
    chosen = nearest_people(bench, _faces(features), loras.seeds)
    return Personalised([loras.space.unpack(loras.vectors[i]) for i in chosen], seconds=seconds)


def textual_inversion(bench: Bench) -> Personalised:
    """A learnt word per person, from as many pictures as the teacher has."""
    settings = bench.config.eval
    pictures, prompts = draw_album(
        bench.trial.identity, bench.config.loras.pictures, settings.seed, bench.painter.device
    )
    with _stopwatch(bench) as seconds:
        words = invert(bench.painter, pictures, prompts, settings.inversion_steps, settings.seed)
    return Personalised(words=words, seconds=seconds)


def teacher(bench: Bench) -> Personalised:
    """A DreamBooth LoRA per person: what the predictors learn to replace."""
    config = bench.config.loras
    space = lora_space(config)
    loras: list[Lora] = []
    with _stopwatch(bench) as seconds:
        for group in _groups(bench.seeds):
            loras += train_loras(bench.painter, space, config, group, split="test")
    return Personalised(loras, seconds=seconds)


def predicted_paper(bench: Bench) -> Personalised:
    """One photo through the predictor of preset `paper`."""
    return _predicted(bench, bench.predictor("predictor_paper"))


def predicted(bench: Bench) -> Personalised:
    """One photo through the default predictor (or `eval.predictor`)."""
    return _predicted(bench, bench.predictor())


def best_of_4(bench: Bench) -> Personalised:
    """Four candidates, each auditioned by a few pictures; the condition recogniser chooses."""
    predictor = bench.predictor()
    with _stopwatch(bench) as seconds:
        features = [bench.features(person) for person in range(len(bench.seeds))]
        candidates = [_predict(bench, predictor, person, 4).candidates for person in features]
        loras = choose_candidates(bench.painter, bench.judges, candidates, _faces(features))
    return Personalised(loras, seconds=seconds)


def refined(bench: Bench) -> Personalised:
    """The predicted LoRA, trained on for a few steps on the teacher's pictures."""
    predictor = bench.predictor()
    config = replace(bench.config.loras, steps=bench.config.eval.refine_steps)
    loras: list[Lora] = []
    with _stopwatch(bench) as seconds:
        for start, group in zip(
            range(0, len(bench.seeds), GROUP), _groups(bench.seeds), strict=True
        ):
            own = range(start, start + len(group))
            before = [_predict(bench, predictor, bench.features(p), 1).lora for p in own]
            factors = _trainable(before, bench.painter.device, predictor.space.scale)
            identity = bench.trial.identity[start : start + len(group)]
            album = photo_album(bench.painter, identity, config.pictures, config.draws)
            loras += fit_factors(bench.painter, predictor.space, config, album, None, factors)
    return Personalised(loras, seconds=seconds)


ROWS: dict[str, Callable[[Bench], Personalised]] = {
    "base": base,
    "average_lora": average_lora,
    "nearest_lora": nearest_lora,
    "textual_inversion": textual_inversion,
    "teacher": teacher,
    "predicted_paper": predicted_paper,
    "predicted": predicted,
    "best_of_4": best_of_4,
    "refined": refined,
}
"""Row name -> method, in the order of the table."""


def paint_row(bench: Bench, row: Personalised) -> Tensor:
    """Every person with every prompt: [P, Q, 3, H, W] in 0..1 on the CPU."""
    settings, trial = bench.config.eval, bench.trial
    batch = settings.batch or (256 if bench.painter.device.type == "cuda" else 8)
    people, count = trial.noise_seeds.shape
    texts = trial.personal_prompts() if row.trigger else list(trial.prompts)
    prompts, seeds = texts * people, trial.noise_seeds.flatten().tolist()
    who = torch.arange(people).repeat_interleave(count)
    factors = stack_loras(row.loras, bench.painter.device) if row.loras else {}
    parts = []
    for i in range(0, len(prompts), batch):
        few = slice(i, i + batch)
        with _words(row, bench.painter, who[few]):
            parts.append(
                bench.painter.paint(
                    prompts[few],
                    seeds[few],
                    _rows_of(factors, who[few]),
                    settings.paint_steps,
                    settings.guidance,
                    batch=batch,
                )
            )
    return torch.cat(parts).unflatten(0, (people, count))


@contextmanager
def _words(row: Personalised, painter: Painter, who: Tensor) -> Iterator[None]:
    if row.words is None:
        yield
        return
    with row.words.using(painter, who):
        yield


def _rows_of(factors: Factors, who: Tensor) -> Factors | None:
    chosen = {n: (d[who.to(d.device)], u[who.to(u.device)]) for n, (d, u) in factors.items()}
    return chosen or None


def _predicted(bench: Bench, predictor: Predictor) -> Personalised:
    count = bench.config.eval.candidates
    _predict(bench, predictor, bench.features(0), count)  # kernels are chosen on the first call
    loras, seconds = _each(
        bench, lambda person: _predict(bench, predictor, bench.features(person), count).lora
    )
    return Personalised(loras, seconds=seconds)


def _predict(bench: Bench, predictor: Predictor, features: Features, count: int) -> Prediction:
    settings = bench.config.eval
    if settings.inputs == "face" and features.fused_face() is not None:
        features = features.without_image()
    elif settings.inputs == "image":
        features = features.without_face()
    return predictor.predict(
        features,
        seed=settings.seed,
        steps=settings.steps or None,
        candidates=count,
        strength=settings.strength or None,
    )


def _trainable(loras: Sequence[Lora], device: torch.device, scale: float) -> dict:
    """LoRAs as factors to train on: up matrices, and nothing else, take gradients."""
    factors = stack_loras(loras, device)
    return {
        name: (down.detach(), (up / scale).detach().requires_grad_(True))
        for name, (down, up) in factors.items()
    }


def _faces(features: Sequence[Features]) -> Tensor:
    """Face embeddings [P, D]; zeros, unlike anybody, where no face was found."""
    faces = [person.fused_face() for person in features]
    width = next((len(face) for face in faces if face is not None), 1)
    return torch.stack([torch.zeros(width) if face is None else face for face in faces])


def _groups(seeds: Sequence[int]) -> list[list[int]]:
    return [list(seeds[i : i + GROUP]) for i in range(0, len(seeds), GROUP)]


def _each(bench: Bench, make: Callable[[int], T]) -> tuple[list[T], list[float]]:
    """make(person) for everybody, and the seconds that each took."""
    made, seconds = [], []
    for person in range(len(bench.seeds)):
        begin = _now(bench)
        made.append(make(person))
        seconds.append(_now(bench) - begin)
    return made, seconds


@contextmanager
def _stopwatch(bench: Bench) -> Iterator[list[float]]:
    """Yields a list that afterwards holds everybody's equal share of the seconds."""
    shares: list[float] = []
    begin = _now(bench)
    yield shares
    people = len(bench.seeds)
    shares += [(_now(bench) - begin) / people] * people


def _now(bench: Bench) -> float:
    """Seconds, after the device has done its work."""
    if bench.painter.device.type == "cuda":
        torch.cuda.synchronize(bench.painter.device)
    return time.perf_counter()
