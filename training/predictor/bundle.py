"""Predictor bundles between the stages."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from difflora_core.predictor import Predictor
from difflora_core.predictor_config import EncoderInfo

from ..artifacts import artifact, artifacts_folder, command_line
from ..config import Config

#: names that FaceEncoder and ImageEncoder report for the mini world
FACE_ENCODER = EncoderInfo("mini", "Apache-2.0")
LICENCE = "Apache-2.0"


def save_bundle(config: Config, predictor: Predictor, name: str) -> Path:
    """Write `predictor` as artifact `name`."""
    path = artifacts_folder(config) / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    notes = {"command": command_line(), "seed": str(config.run.seed)}
    predictor.config = dataclasses.replace(
        predictor.config,
        name=config.predictor.name,
        face_encoder=FACE_ENCODER,
        image_encoder=EncoderInfo("mini image encoder", LICENCE),
        notes=notes,
    )
    predictor.save(path, overwrite=True)
    return path


def open_bundle(config: Config, name: str) -> Predictor:
    """Artifact `name` on the run's device, ready to train on."""
    predictor = Predictor.open(artifact(config, name), config.run.torch_device())
    return predictor.train().requires_grad_(True)
