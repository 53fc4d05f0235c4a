"""Predictor bundles between the stages."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from difflora_core.errors import LayoutMismatch
from difflora_core.image_encoder import ImageEncoder
from difflora_core.predictor import Predictor
from difflora_core.predictor_config import EncoderInfo

from ..artifacts import artifact, artifacts_folder, command_line
from ..config import Config
from ..encoders.face_pack import face_encoder_name
from .conditions import PhotoEncoders

LICENCE = "Apache-2.0"


def save_bundle(config: Config, predictor: Predictor, name: str) -> Path:
    """Write `predictor` as artifact `name`."""
    path = artifacts_folder(config) / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    notes = {"command": command_line(), "seed": str(config.run.seed)}
    predictor.config = dataclasses.replace(
        predictor.config,
        name=config.predictor.name,
        face_encoder=EncoderInfo(face_encoder_name(config), LICENCE),
        image_encoder=EncoderInfo(image_encoder_name(config), LICENCE),
        notes=notes,
    )
    predictor.save(path, overwrite=True)
    return path


def open_bundle(config: Config, name: str) -> Predictor:
    """Artifact `name` on the run's device, ready to train on."""
    predictor = Predictor.open(artifact(config, name), config.run.torch_device())
    return predictor.train().requires_grad_(True)


def image_encoder_name(config: Config) -> str:
    """Of the image encoder that this run's predictors see photos through."""
    return ImageEncoder.open(artifact(config, "image_encoder")).config.name


def check_widths(predictor: Predictor, encoders: PhotoEncoders, what: str) -> None:
    """Errors: LayoutMismatch where `predictor` takes embeddings of another length."""
    mixer = predictor.config.mixer
    if (mixer.face_width, mixer.image_width) != encoders.widths:
        raise LayoutMismatch(
            f"{what} takes face and image embeddings of {mixer.face_width} and "
            f"{mixer.image_width} numbers; this run's encoders give {encoders.widths[0]} and "
            f"{encoders.widths[1]}.",
            hint="Train the predictor anew, from train-autoencoder on or with "
            "predictor.finetune.start=fresh.",
        )


def check_encoders(config: Config, predictor: Predictor, what: str) -> None:
    """Errors: LayoutMismatch where `predictor` has learnt from other encoders."""
    known = predictor.config
    for theirs, ours in (
        (known.face_encoder.name, face_encoder_name(config)),
        (known.image_encoder.name, image_encoder_name(config)),
    ):
        if theirs and theirs != ours:
            raise LayoutMismatch(
                f"{what} has learnt to read the {theirs}; this run's is the {ours}.",
                hint="Run train-dit again.",
            )
