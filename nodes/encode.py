"""Photos -> features of a person, and features from and to files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io, ui
from torch import Tensor

from ..difflora_core.face import CHOICES, FaceEncoder, face_previews
from ..difflora_core.features import Features
from ..difflora_core.photo_weights import encode_weighted
from ..difflora_core.photos import Pixels
from . import host, sockets
from .sockets import CATEGORY

BY_NUMBER = "by number"


def face_choice_inputs() -> list[io.Input]:
    """Which face of a photo: the two widgets that several nodes share."""
    return [
        io.Combo.Input(
            "face",
            options=[*CHOICES, BY_NUMBER],
            default=CHOICES[0],
            tooltip="Which face to take when a photo shows several.",
        ),
        io.Int.Input(
            "face_number",
            default=1,
            min=1,
            max=99,
            tooltip="For 'by number': 1 is the leftmost face. The numbers stand on the crops that "
            "Encode Face Features shows.",
        ),
    ]


def face_choice(face: str, face_number: int) -> str | int:
    """What the two widgets mean to the core."""
    return face_number if face == BY_NUMBER else face


class EncodeFaceFeatures(io.ComfyNode):
    """IMAGE, FACEANALYSIS, image encoder -> DIFFLORA_FEATURES."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffLoRA_EncodeFaceFeatures",
            display_name="Encode Face Features",
            category=CATEGORY,
            description="Reads what makes a person recognisable out of one or several photos. "
            "Sharp photos that agree with each other count more.",
            is_input_list=True,
            inputs=[
                io.Image.Input("photos", tooltip="Photos of one person: a batch, or a list."),
                sockets.face_encoder_input(
                    "From Load Face Encoder, or the InsightFace loader of another pack.",
                    optional=True,
                ),
                sockets.ImageEncoder.Input(
                    "image_encoder", optional=True, tooltip="From Load Image Encoder."
                ),
                *face_choice_inputs(),
                io.String.Input(
                    "weights",
                    default="",
                    tooltip="Multiplies how much each photo counts by how clear its face is, such "
                    "as 1, 0.5. Missing ones are 1, and 0 leaves a photo out.",
                ),
            ],
            outputs=[
                sockets.Features.Output(
                    display_name="features", tooltip="The person, for Predict LoRA."
                ),
                io.Image.Output(
                    display_name="crops", tooltip="Every face that was found, with its number."
                ),
                io.String.Output(
                    display_name="report", tooltip="What became of each photo, as JSON."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        photos: list[Tensor],
        face: list[str],
        face_number: list[int],
        weights: list[str],
        face_encoder: list[Any] | None = None,
        image_encoder: list[Any] | None = None,
    ) -> io.NodeOutput:
        pixels = host.to_pixels(photos)
        faces = FaceEncoder.wrap(face_encoder[0]) if face_encoder else None
        images = host.on_device(image_encoder[0]) if image_encoder else None
        crops = previews(pixels, faces)
        counts = host.number_list(weights[0])
        choice = face_choice(face[0], face_number[0])
        features = encode_weighted(pixels, counts, faces, images, choice)
        report = json.dumps(features.report(), indent=1)
        return io.NodeOutput(features, crops, report, ui=ui.PreviewImage(crops, cls=cls))


def previews(photos: list[Pixels], encoder: FaceEncoder | None) -> Tensor:
    """IMAGE of every face, numbered per photo; without a face encoder, of the photos."""
    if encoder is None:
        return host.to_images(photos)
    crops: list[Pixels] = []
    step = host.progress(len(photos))
    for number, photo in enumerate(photos, start=1):
        crops += list(face_previews(photo, encoder.faces(photo)))
        step(number, len(photos))
    return host.to_images(crops or photos)


class SaveFaceFeatures(io.ComfyNode):
    """DIFFLORA_FEATURES -> a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffLoRA_SaveFaceFeatures",
            display_name="Save Face Features",
            category=CATEGORY,
            description="Writes features to output/difflora_faces, to use the person again without "
            "the photos. The file holds no picture.",
            is_output_node=True,
            inputs=[
                sockets.Features.Input("features", tooltip="From Encode Face Features."),
                io.String.Input(
                    "filename_prefix",
                    default="person",
                    tooltip="Name of the file; a number is added, nothing is overwritten.",
                ),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="Where the file was written.")],
        )

    @classmethod
    def execute(cls, features: Features, filename_prefix: str) -> io.NodeOutput:
        folder = folder_paths.get_folder_paths(host.FACES)[0]
        path = host.numbered_path(Path(folder), filename_prefix)
        features.save(path)
        return io.NodeOutput(str(path), ui=ui.PreviewText(f"saved {path.name}"))


class LoadFaceFeatures(io.ComfyNode):
    """A file -> DIFFLORA_FEATURES."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffLoRA_LoadFaceFeatures",
            display_name="Load Face Features",
            category=CATEGORY,
            description="Reads features that Save Face Features wrote to output/difflora_faces.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=folder_paths.get_filename_list(host.FACES),
                    tooltip="A file of features. Press R to refresh the list.",
                )
            ],
            outputs=[
                sockets.Features.Output(
                    display_name="features", tooltip="The person, for Predict LoRA."
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        return host.file_state(host.listed_path(host.FACES, file))

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        return io.NodeOutput(Features.load(host.listed_path(host.FACES, file)))


NODES = [EncodeFaceFeatures, SaveFaceFeatures, LoadFaceFeatures]
