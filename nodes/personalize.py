"""The one box from photos to a personal model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sd
from comfy_api.latest import io
from torch import Tensor

from ..difflora_core.encode import encode_photos
from ..difflora_core.errors import BadWeightsFile
from ..difflora_core.face import FaceEncoder
from ..difflora_core.features import Features
from ..difflora_core.image_encoder import ImageEncoder
from ..difflora_core.predictor import Predictor
from . import host, loaders, sockets
from .encode import face_choice, face_choice_inputs
from .predict import predict, seed_input, strength_input
from .sockets import CATEGORY


def encode_for(
    predictor: Predictor, photos: list[Tensor], choice: str | int, face_encoder: Any = None
) -> Features:
    """Encode photos with the encoders that a predictor was trained with, found by their names."""
    pixels = host.to_pixels(photos)
    faces = (
        FaceEncoder.wrap(face_encoder)
        if face_encoder is not None
        else loaders.open_face_encoder(predictor.config.face_encoder.name or "mini")
    )
    path, model = _image_encoder(predictor)
    images = host.hosted(lambda: ImageEncoder.open(path, model))
    return encode_photos(pixels, faces, host.on_device(images), choice)


def _image_encoder(predictor: Predictor) -> tuple[Path, str]:
    """File and open_clip name of an image encoder: the shipped one, or models/difflora/NAME."""
    name = predictor.config.image_encoder.name
    if predictor.space.base == "mini":
        return host.model_path(host.SHIPPED, loaders.IMAGE_ENCODER_FILE), ""
    try:
        return host.listed_path(host.MODELS, f"{name}.safetensors"), name
    except BadWeightsFile as error:
        raise BadWeightsFile(
            f"The predictor needs the image encoder {name!r}, which is not in models/difflora.",
            hint=f"Put {name}.safetensors there, or use the nodes Load Image Encoder and "
            "Encode Face Features.",
        ) from error


class Personalize(io.ComfyNode):
    """MODEL, CLIP, photos -> MODEL, CLIP."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffLoRA_Personalize",
            display_name="Personalize",
            category=CATEGORY,
            description="Photos in, a model that knows the person out: encodes the photos, "
            "predicts the LoRA and applies it, all in one node.",
            is_input_list=True,
            inputs=[
                io.Model.Input("model", tooltip="The model that the predictor was trained for."),
                io.Clip.Input("clip", tooltip="Its text encoder."),
                io.Image.Input("photos", tooltip="Photos of one person: a batch, or a list."),
                io.Combo.Input(
                    "predictor",
                    options=host.model_files(),
                    tooltip="A predictor file from models/difflora.",
                ),
                strength_input(),
                seed_input(),
                *face_choice_inputs(),
                sockets.face_encoder_input(
                    "The face encoder that the predictor names, from another loader or on CUDA.",
                    optional=True,
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="MODEL", tooltip="The model with the person, for a KSampler."
                ),
                io.Clip.Output(
                    display_name="CLIP", tooltip="The text encoder, for CLIP Text Encode."
                ),
                sockets.LoraModel.Output(display_name="lora", tooltip="The LoRA, for Save LoRA."),
                io.String.Output(
                    display_name="report", tooltip="How it was predicted, trigger words included."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, predictor: list[str], **_inputs: Any) -> str:
        path = host.model_path(predictor[0], loaders.PREDICTOR_FILE)
        return host.file_state(path) + loaders.encoders_state()

    @classmethod
    def execute(
        cls,
        model: list[Any],
        clip: list[Any],
        photos: list[Tensor],
        predictor: list[str],
        strength: list[float],
        seed: list[int],
        face: list[str],
        face_number: list[int],
        face_encoder: list[Any] | None = None,
    ) -> io.NodeOutput:
        path = host.model_path(predictor[0], loaders.PREDICTOR_FILE)
        patcher = host.hosted(lambda: Predictor.open(path))
        choice = face_choice(face[0], face_number[0])
        faces = face_encoder[0] if face_encoder else None
        features = encode_for(patcher.model.model, photos, choice, faces)
        lora, report = predict(patcher, features, strength=strength[0], seed=seed[0])
        host.check_fits(lora, model[0])
        personal = comfy.sd.load_lora_for_models(model[0], clip[0], lora, 1.0, 1.0)
        return io.NodeOutput(*personal, lora, report)


NODES = [Personalize]
