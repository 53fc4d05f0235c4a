"""Settings of the stages train-autoencoder, train-dit and finetune-predictor."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from difflora_core.sampler import MAX_STEPS

from ..portraits.factors import SPLIT_SIZE
from ..run_config import OptimConfig, at_least, at_most


@dataclass(frozen=True)
class AutoencoderTraining:
    """LoRA autoencoder on the collected LoRAs."""

    batch: int = 256
    """LoRAs per step."""
    magnitude: float = 1.0
    """How much more large weights count: the weight-preserved loss; 0 = plain squared error."""
    delta: float = 1.0
    """Weight of the loss on delta W, direction and size per layer."""
    jitter: float = 0.05
    """Noise added to latents, in standard deviations, so that nearby latents decode alike."""
    mix: float = 0.5
    """Share of LoRAs replaced by a random blend of two: exact in the frozen gauge, free data; none
    are made in gauges that predict A."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(steps=4000, lr=1e-3, warmup=200, ema=0.998)
    )
    """Optimiser."""

    def __post_init__(self) -> None:
        at_least(1, self, "batch")
        at_least(0, self, "magnitude", "delta", "jitter", "mix")
        at_most(1, self, "mix")


@dataclass(frozen=True)
class DitTraining:
    """Denoiser and mixed image features on the autoencoder's latents."""

    batch: int = 256
    """LoRAs per step, each with a random photo of its person."""
    photos: int = 12
    """Photos per person to draw the condition from."""
    drop: float = 0.1
    """Share of samples without any condition, for classifier-free guidance."""
    drop_source: float = 0.1
    """Share of samples without the face, and as many without the image embedding."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(steps=6000, lr=1e-3, warmup=300, ema=0.999)
    )
    """Optimiser."""

    def __post_init__(self) -> None:
        at_least(1, self, "batch", "photos")
        at_least(0, self, "drop", "drop_source")
        at_most(1, self, "drop", "drop_source")


@dataclass(frozen=True)
class FinetuneTraining:
    """End to end: from a photo through the frozen U-Net to the denoising loss of other pictures."""

    start: Literal["dit", "artifact", "fresh"] = "dit"
    """From what train-dit has learnt, from the run's finished predictor (else the shipped one), or
    from nothing; the last two need no LoRA data set."""
    fresh_scale: float = 0.05
    """Unit of a fresh predictor's LoRA values, about the size that trained ones have."""
    people: int = 24_000
    """People drawn for this stage (of the training range, no LoRA needed)."""
    first: int = 100_000
    """Identity seed of the first one."""
    pictures: int = 8
    """Captioned pictures per person."""
    photos: int = 3
    """Photos per person to draw the condition from."""
    batch: int = 128
    """People per step."""
    per_person: int = 2
    """Pictures of each person per step."""
    rollout: int = 4
    """Sampling steps that the predictor is trained to take: some of them without gradient, the
    next one with."""
    drop_source: float = 0.1
    """Share of samples without the face, and as many without the image embedding."""
    min_snr: float = 5.0
    """Gamma of the min-SNR loss weight; 0 = plain epsilon loss."""
    minutes: float = 0.0
    """Time for the training: the number of steps is set from the measured speed, at most
    optim.steps; 0 = optim.steps."""
    shrink: float = 1e-4
    """Weight of the mean squared LoRA value, which keeps unused directions at zero."""
    face: float = 0.3
    """Share of the face term of the mask-aware loss, seen by the conditioning recogniser; what is
    left of 1 goes to the denoising loss."""
    face_last: int = 900
    """The face term counts at timesteps below, where the estimate of the picture shows a face."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(steps=6000, lr=5e-4, warmup=200, ema=0.999)
    )
    """Optimiser."""

    def __post_init__(self) -> None:
        at_least(1, self, "people", "pictures", "photos", "batch", "per_person", "rollout")
        at_least(0, self, "first", "fresh_scale", "drop_source", "min_snr", "minutes", "shrink")
        at_least(0, self, "face", "face_last")
        at_most(SPLIT_SIZE - self.people, self, "first")
        at_most(1, self, "drop_source", "face")
        at_most(MAX_STEPS, self, "rollout")


@dataclass(frozen=True)
class CalibrationConfig:
    """Choice of strength and steps on people set aside from the training range."""

    people: int = 24
    """People, none of whom any stage trains on."""
    first: int = 50_000_000
    """Identity seed of the first one."""
    prompts: int = 8
    """Pictures per person and setting; accuracy is no surer than a few dozen pictures allow."""
    strengths: tuple[float, ...] = (0.8, 0.9, 1.0, 1.25, 1.5, 1.75, 2.0)
    """Strengths to try."""
    lost_accuracy: float = 0.02
    """How much prompt accuracy a strength may cost against the base model."""

    def __post_init__(self) -> None:
        at_least(1, self, "people", "prompts")
        at_least(0, self, "first", "strengths")
        at_most(SPLIT_SIZE - self.people, self, "first")
        if not self.strengths:
            raise ValueError("strengths must name at least one")


@dataclass(frozen=True)
class PredictorTrainingConfig:
    """The predictor and its stages."""

    name: str = "predictor"
    """Name of its artifact; the steps on the way are NAME_autoencoder and NAME_dit."""
    preset: Literal["default", "paper"] = "default"
    """Architecture; see difflora_core/presets.py."""
    end_to_end: bool = True
    """Whether finetune-predictor follows; if not, train-dit writes the final artifact."""
    autoencoder: AutoencoderTraining = field(default_factory=AutoencoderTraining)
    """Stage train-autoencoder."""
    dit: DitTraining = field(default_factory=DitTraining)
    """Stage train-dit."""
    finetune: FinetuneTraining = field(default_factory=FinetuneTraining)
    """Stage finetune-predictor."""
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    """Last step of the final stage."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ValueError(f"name must be a plain file name, found {self.name!r}")
