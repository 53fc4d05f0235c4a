"""Face Mask: pictures -> masks of the faces in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..difflora_core.errors import NoFaceFound
from ..difflora_core.face import CHOICES, FaceEncoder, FoundFace, choose_face, face_previews
from ..difflora_core.mask_aware.face_masks import SHAPES, face_mask
from ..difflora_core.photos import Pixels
from . import host, sockets
from .encode import BY_NUMBER, face_choice
from .sockets import CATEGORY

ALL = "all"
EMPTY, WHOLE, ERROR = "empty mask", "whole picture", "error"


class FaceMask(io.ComfyNode):
    """IMAGE, FACEANALYSIS -> MASK, crops."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffLoRA_FaceMask",
            display_name="Face Mask",
            category=CATEGORY,
            description="Finds faces and covers them with a mask: for Mask-Aware Guidance, for "
            "inpainting, for whatever takes a mask.",
            inputs=[
                io.Image.Input("images", tooltip="The pictures to search."),
                sockets.face_encoder_input(
                    "From Load Face Encoder, or the InsightFace loader of another pack."
                ),
                *choice_inputs(),
                *shape_inputs(),
            ],
            outputs=[
                io.Mask.Output(display_name="mask", tooltip="White on the faces, one per picture."),
                io.Image.Output(
                    display_name="crops", tooltip="Every face that was found, with its number."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        images: Tensor,
        face_encoder: Any,
        face: str,
        face_number: int,
        no_face: str,
        shape: str,
        grow: float,
        feather: float,
    ) -> io.NodeOutput:
        pictures = host.to_pixels([images], "Picture")
        found = find_all(pictures, FaceEncoder.wrap(face_encoder))
        choice = ALL if face == ALL else face_choice(face, face_number)
        masks = []
        for number, faces in enumerate(found, start=1):
            boxes = boxes_of(faces, choice, number, must=no_face == ERROR)
            drawn = face_mask(images.shape[1:3], boxes, shape, grow, feather)
            masks.append(torch.ones_like(drawn) if not boxes and no_face == WHOLE else drawn)
        mask, crops = torch.stack(masks), crops_of(pictures, found)
        return io.NodeOutput(mask, crops, ui=ui.PreviewMask(mask, cls=cls))


def find_all(pictures: Sequence[Pixels], encoder: FaceEncoder) -> list[list[FoundFace]]:
    """The faces of each picture, from left to right."""
    step, found = host.progress(len(pictures)), []
    for number, picture in enumerate(pictures, start=1):
        found.append(encoder.find(picture))
        step(number, len(pictures))
    return found


def boxes_of(
    faces: Sequence[FoundFace], choice: str | int, number: int, *, must: bool
) -> list[list[float]]:
    """Boxes of the chosen faces of picture `number`. Errors: NoFaceFound where there `must` be."""
    try:
        chosen = faces if faces and choice == ALL else [choose_face(faces, choice)]
    except NoFaceFound as error:
        if must:
            raise NoFaceFound(f"Picture {number}: {error.message}", hint=error.hint) from error
        return []
    return [face.box.tolist() for face in chosen]


def crops_of(pictures: Sequence[Pixels], found: Sequence[Sequence[FoundFace]]) -> Tensor:
    """IMAGE of every face, numbered per picture; of the pictures where there is none at all."""
    pairs = zip(pictures, found, strict=True)
    crops = [crop for picture, faces in pairs for crop in face_previews(picture, faces)]
    return host.to_images(crops or pictures)


def choice_inputs() -> list[io.Input]:
    """Which faces."""
    return [
        io.Combo.Input(
            "face",
            options=[ALL, *CHOICES, BY_NUMBER],
            default=ALL,
            tooltip="Which faces to cover when a picture shows several.",
        ),
        io.Int.Input(
            "face_number",
            default=1,
            min=1,
            max=99,
            tooltip="For 'by number': 1 is the leftmost face. The numbers stand on the crops.",
        ),
        io.Combo.Input(
            "no_face",
            options=[EMPTY, WHOLE, ERROR],
            default=EMPTY,
            tooltip="What to give for a picture without such a face.",
        ),
    ]


def shape_inputs() -> list[io.Input]:
    """What a face is covered with."""
    return [
        io.Combo.Input(
            "shape", options=list(SHAPES), default=SHAPES[0], tooltip="What covers a face."
        ),
        io.Float.Input(
            "grow",
            default=0.0,
            min=-0.4,
            max=2.0,
            step=0.05,
            tooltip="Added on each side, as a share of the face's width and height. Leave it at 0 "
            "where Mask-Aware Guidance is to find the face by this mask alone.",
        ),
        io.Float.Input(
            "feather",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.05,
            tooltip="Width of the soft edge, as a share of half the face.",
        ),
    ]


NODES = [FaceMask]
