"""LoRA files -> LORA_MODEL and back."""

from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy_api.latest import io, ui
from torch import Tensor

from ..difflora_core.header import LoraHeader
from ..difflora_core.weights_file import identified, open_lora, peft_config, write_lora
from . import host, lora_models, sockets
from .lora_models import PRECISIONS
from .sockets import CATEGORY

PLACES = ["models/loras", "output/loras"]


class LoadLoraFile(io.ComfyNode):
    """A LoRA file -> LORA_MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffLoRA_LoadLoraFile",
            display_name="Load LoRA File",
            category=CATEGORY,
            description="Reads a LoRA file in any usual spelling of its keys (kohya, LyCORIS, "
            'diffusers, PEFT) and passes it on, for "Load LoRA Model" and the LoRA nodes of '
            "DiffLoRA.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=folder_paths.get_filename_list("loras"),
                    tooltip="A file from models/loras. Press R to refresh the list.",
                )
            ],
            outputs=[
                sockets.LoraModel.Output(display_name="lora", tooltip="The LoRA."),
                io.String.Output(
                    display_name="info", tooltip="Layout, base model, size, and any warnings."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        path = host.listed_path("loras", file)
        return host.file_state(path) + host.file_state(peft_config(path))  # alpha stands there

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        path = host.listed_path("loras", file)
        reading = open_lora(path, any_model=True)
        ranks = sorted(set(reading.lora.ranks.values()))
        info = [f"{reading.layout}, base {reading.base}, {len(reading.lora)} layers, rank {ranks}"]
        lora = host.LoraModel(reading.lora, identified(reading.lora, path).metadata)
        return io.NodeOutput(lora, "\n".join(info + list(reading.warnings)))


class SaveLora(io.ComfyNode):
    """LORA_MODEL -> a LoRA file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffLoRA_SaveLora",
            display_name="Save LoRA",
            category=CATEGORY,
            description="Writes a LoRA as a .safetensors file that every common program loads. "
            "The header says what it was made for; it holds no path and no photo.",
            is_output_node=True,
            inputs=[
                sockets.LoraModel.Input("lora", tooltip="From Predict LoRA, or any other node."),
                io.String.Input(
                    "filename_prefix",
                    default="difflora/person",
                    tooltip="Name of the file; a number is added, nothing is overwritten.",
                ),
                io.Combo.Input(
                    "folder",
                    options=PLACES,
                    default=PLACES[0],
                    tooltip="models/loras puts it into the list of Load LoRA (press R there).",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default="fp16",
                    tooltip="fp16 is what everybody uses; fp32 keeps every digit; bf16 is coarser.",
                ),
                io.String.Input(
                    "trigger",
                    default="",
                    tooltip="Trigger words for the header. Empty: those of the predictor.",
                ),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="Where the file was written.")],
        )

    @classmethod
    def execute(
        cls,
        lora: dict[str, Tensor],
        filename_prefix: str,
        folder: str,
        precision: str,
        trigger: str,
    ) -> io.NodeOutput:
        path = host.numbered_path(_place(folder), filename_prefix)
        (layers,) = lora_models.opened([lora])
        title = {"modelspec.title": path.stem.strip("_")}
        if trigger:
            title["modelspec.trigger_phrase"] = trigger
        header = {**LoraHeader(path.stem).to_dict(), **layers.metadata, **title}
        write_lora(layers, path, header, dtype=PRECISIONS[precision])
        return io.NodeOutput(str(path), ui=ui.PreviewText(f"saved {path.name}"))


def _place(folder: str) -> Path:
    if folder == PLACES[0]:
        return Path(folder_paths.get_folder_paths("loras")[0])
    return Path(folder_paths.get_output_directory()) / "loras"


NODES = [LoadLoraFile, SaveLora]
