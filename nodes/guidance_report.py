"""Guidance Report: what guidance did while a sampler ran."""

from __future__ import annotations

import numpy as np
from comfy_api.latest import io, ui
from PIL import Image
from torch import Tensor

from ..difflora_core.mask_aware.pictures import crop_strip, loss_curve
from ..difflora_core.mask_aware.run_log import GuidanceLog, describe_runs
from . import host, sockets
from .sockets import CATEGORY


class GuidanceReport(io.ComfyNode):
    """DIFFLORA_GUIDANCE, IMAGE -> the same IMAGE, loss curve, faces, report."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffLoRA_GuidanceReport",
            display_name="Guidance Report",
            category=CATEGORY,
            description="Shows what Mask-Aware Guidance did while the pictures were painted: how "
            "the loss fell, the faces as the guiding network saw them, and what it took.",
            is_output_node=True,
            inputs=[
                sockets.Guidance.Input("guidance", tooltip="From Mask-Aware Guidance."),
                io.Image.Input(
                    "images",
                    tooltip="The decoded pictures of the guided model; they make the report wait "
                    "for the sampler.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The same pictures."),
                io.Image.Output(
                    display_name="curve", tooltip="The loss at each guided step: 1 - cosine."
                ),
                io.Image.Output(
                    display_name="faces",
                    tooltip="The faces before a guided step: up to twelve steps.",
                ),
                io.String.Output(
                    display_name="report", tooltip="All steps in numbers, with the time it took."
                ),
            ],
        )

    @classmethod
    def execute(cls, guidance: GuidanceLog, images: Tensor) -> io.NodeOutput:
        curve, faces = _image(loss_curve(guidance.runs)), _image(crop_strip(guidance.runs))
        report = describe_runs(guidance.runs)
        return io.NodeOutput(images, curve, faces, report, ui=ui.PreviewImage(curve, cls=cls))


def _image(picture: Image.Image) -> Tensor:
    return host.to_images([np.asarray(picture)])


NODES = [GuidanceReport]
