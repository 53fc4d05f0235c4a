"""Likeness of pictures to a person, and the best of several pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..difflora_core.face import FaceEncoder
from ..difflora_core.measure import Likeness as Measured
from ..difflora_core.measure import best_first, measure
from ..difflora_core.recogniser import Recogniser
from . import host, sockets
from .sockets import CATEGORY

JUDGE_FILE = "metric_recogniser.safetensors"
DRAWN_PACK = "mini"


def _judge(encoder: FaceEncoder) -> Recogniser | None:
    """For drawn faces the recogniser that took no part in prediction; else the pack's own."""
    path = host.model_path(host.SHIPPED, JUDGE_FILE)
    if encoder.name.partition("@")[0] != DRAWN_PACK or not path.is_file():
        return None
    return host.on_device(host.hosted(lambda: Recogniser.open(path)))


def _line(found: Measured) -> str:
    if found.cosine is None:
        return f"{found.number}: no face"
    return f"{found.number}: {found.percent:.0f} % (cosine {found.cosine:.3f})"


def _report(found: Sequence[Measured]) -> str:
    mean = sum(likeness.percent for likeness in found) / len(found)
    return "\n".join([*map(_line, found), f"mean: {mean:.0f} %"])


def _taken(batches: Sequence[Tensor], places: Sequence[int]) -> Tensor:
    """One IMAGE of the pictures at `places`; those of other sizes get a black border."""
    pictures = [picture for batch in batches for picture in batch]
    taken = [pictures[place] for place in places]
    if len({picture.shape for picture in taken}) == 1:
        return torch.stack(taken)
    return host.to_images(host.to_pixels([picture[None] for picture in taken]))


class Likeness(io.ComfyNode):
    """IMAGE, photos, FACEANALYSIS -> the most similar pictures and their percentage."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffLoRA_Likeness",
            display_name="Likeness",
            category=CATEGORY,
            description="Says in percent how sure one can be that pictures show the person of the "
            "photos, and picks the most similar ones.",
            is_output_node=True,
            is_input_list=True,
            inputs=[
                io.Image.Input("pictures", tooltip="The pictures to judge: a batch, or a list."),
                io.Image.Input("photos", tooltip="Photos of the person: a batch, or a list."),
                sockets.face_encoder_input(
                    "From Load Face Encoder, or the InsightFace loader of another pack."
                ),
                io.Int.Input(
                    "keep",
                    default=1,
                    min=1,
                    max=64,
                    tooltip="How many of the most similar pictures to pass on.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="best", tooltip="The most similar pictures first."),
                io.Float.Output(
                    display_name="percent", tooltip="Likeness of the best picture, 0 to 100."
                ),
                io.String.Output(display_name="report", tooltip="The likeness of each picture."),
            ],
        )

    @classmethod
    def execute(
        cls,
        pictures: list[Tensor],
        photos: list[Tensor],
        face_encoder: list[Any],
        keep: list[int],
    ) -> io.NodeOutput:
        encoder = FaceEncoder.wrap(face_encoder[0])
        judged = host.to_pixels(pictures, "Picture")
        found = measure(
            judged,
            host.to_pixels(photos),
            encoder,
            _judge(encoder),
            host.progress(len(judged)),
        )
        ranking = best_first(found)
        best = _taken(pictures, [likeness.number - 1 for likeness in ranking[: keep[0]]])
        report = _report(found)
        return io.NodeOutput(best, ranking[0].percent, report, ui=ui.PreviewText(report))


NODES = [Likeness]
