"""The description of a predictor that travels in the header of its bundle."""

from __future__ import annotations

from dataclasses import dataclass, field

from .autoencoder.conv1d import Conv1dConfig
from .autoencoder.tokens import TokensConfig
from .diffusion import DiffusionConfig
from .dit import DitConfig
from .lora_space import LoraSpace
from .mif import MixerConfig


@dataclass(frozen=True)
class EncoderInfo:
    """Which encoder made the embeddings a predictor was trained on."""

    name: str = ""
    """as FaceEncoder and ImageEncoder report it"""
    licence: str = ""


@dataclass(frozen=True)
class SamplingConfig:
    """What `predict` uses unless told otherwise; calibrated after training."""

    steps: int = 4
    guidance: float = 1.0
    """1 = the condition alone, above 1 = away from the average person"""
    strength: float = 1.0
    """factor on the LoRA; regression shrinks a LoRA towards the mean, this gives it back"""


@dataclass(frozen=True)
class PredictorConfig:
    space: LoraSpace
    mixer: MixerConfig
    autoencoder: TokensConfig | Conv1dConfig = field(default_factory=TokensConfig)
    dit: DitConfig = field(default_factory=DitConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    face_encoder: EncoderInfo = field(default_factory=EncoderInfo)
    image_encoder: EncoderInfo = field(default_factory=EncoderInfo)
    name: str = "predictor"
    trigger: str = "sks person"
    """words that call the person in a prompt"""
    notes: dict[str, str] = field(default_factory=dict)
    """how the weights were made: command, seed, data"""
