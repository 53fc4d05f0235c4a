"""Drawn photos of people that no training picture shows, so that a workflow runs as it is."""

from __future__ import annotations

from pathlib import Path

from comfy_api.latest import io

from ..difflora_core.photos import load_photo
from . import host
from .sockets import CATEGORY

PHOTOS = Path(__file__).parents[1] / "workflows" / "photos"


def people() -> list[str]:
    """Choices of the widget: the names of the pictures."""
    return sorted(path.stem for path in PHOTOS.glob("*.png"))


class ExamplePhoto(io.ComfyNode):
    """A drawn photo -> IMAGE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffLoRA_ExamplePhoto",
            display_name="Example Photo",
            category=CATEGORY,
            description="A drawn photo of a person that the mini model has never seen, to try the "
            "nodes with. Put Load Image in its place for a picture of your own.",
            inputs=[
                io.Combo.Input("person", options=people(), tooltip="Which of the drawn people.")
            ],
            outputs=[io.Image.Output(display_name="photo", tooltip="A picture of 128 x 128.")],
        )

    @classmethod
    def execute(cls, person: str) -> io.NodeOutput:
        return io.NodeOutput(host.to_images([load_photo(PHOTOS / f"{person}.png")]))


NODES = [ExamplePhoto]
