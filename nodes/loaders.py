"""Loaders: predictor, face encoder, image encoder."""

from __future__ import annotations

from pathlib import Path

from comfy_api.latest import io

from ..difflora_core.face import FaceEncoder
from ..difflora_core.face_pack import find_pack, pack_folders
from ..difflora_core.image_encoder import ImageEncoder
from ..difflora_core.predictor import Predictor
from . import host, sockets
from .sockets import CATEGORY

PREDICTOR_FILE, IMAGE_ENCODER_FILE = "predictor.safetensors", "image_encoder.safetensors"
PROVIDERS = {"CPU": "CPUExecutionProvider", "CUDA": "CUDAExecutionProvider"}
OWN_FORMAT = "from the file"
ARCHITECTURES = [OWN_FORMAT, "ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-H-14", "ViT-bigG-14"]


def face_pack_root(pack: str) -> Path:
    """The first of ComfyUI's folders that holds `models/PACK`. Errors: BadWeightsFile."""
    roots = host.insightface_roots()
    places = [(root, root / "models" / name) for name in pack_folders(pack) for root in roots]
    root = next((root for root, place in places if place.is_dir()), roots[-1])
    find_pack(root, pack)
    return root


def face_pack_state(pack: str) -> str:
    """Changes when a file of the pack does; for `fingerprint_inputs`."""
    folder = find_pack(face_pack_root(pack), pack)
    return "".join(host.file_state(path) for path in sorted(folder.glob("*.onnx")))


def encoders_state() -> str:
    """Changes when any file does that a predictor may name as an encoder."""
    folders = [root / "models" for root in host.insightface_roots()]
    packs = sorted(path for folder in folders for path in folder.glob("*/**/*.onnx"))
    images = [host.model_path(name, IMAGE_ENCODER_FILE) for name in host.model_files()]
    return "".join(map(host.file_state, [*packs, *images]))


def open_face_encoder(pack: str, provider: str = "CPU") -> FaceEncoder:
    """The face pack of that name, from the first of ComfyUI's folders that holds it."""
    return FaceEncoder.open(face_pack_root(pack), pack, (PROVIDERS[provider],))


class LoadPredictor(io.ComfyNode):
    """A predictor bundle -> DIFFLORA_PREDICTOR."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffLoRA_LoadPredictor",
            display_name="Load Predictor",
            category=CATEGORY,
            description="Loads the network that turns face features into a LoRA. "
            "Files lie in models/difflora.",
            inputs=[
                io.Combo.Input(
                    "predictor",
                    options=host.model_files(),
                    tooltip="A predictor file. It works with the base model it was trained for.",
                )
            ],
            outputs=[
                sockets.Predictor.Output(
                    display_name="predictor", tooltip="The predictor, for Predict LoRA."
                ),
                io.String.Output(
                    display_name="trigger",
                    tooltip='The words that call the person in a prompt, such as "sks person".',
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, predictor: str) -> str:
        return host.file_state(host.model_path(predictor, PREDICTOR_FILE))

    @classmethod
    def execute(cls, predictor: str) -> io.NodeOutput:
        path = host.model_path(predictor, PREDICTOR_FILE)
        patcher = host.hosted(lambda: Predictor.open(path))
        return io.NodeOutput(patcher, patcher.model.model.config.trigger)


class LoadFaceEncoder(io.ComfyNode):
    """An InsightFace pack -> FACEANALYSIS."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffLoRA_LoadFaceEncoder",
            display_name="Load Face Encoder",
            category=CATEGORY,
            description="Loads an InsightFace pack: it finds faces and recognises them. "
            "Packs lie in models/insightface/models; nothing is downloaded.",
            inputs=[
                io.Combo.Input(
                    "pack",
                    options=host.face_packs(),
                    tooltip="The pack that the predictor was trained with. 'mini' ships with "
                    "DiffLoRA and knows drawn faces only.",
                ),
                io.Combo.Input(
                    "provider",
                    options=list(PROVIDERS),
                    default="CPU",
                    tooltip="Where ONNX Runtime computes. CPU is fast enough and always there.",
                ),
            ],
            outputs=[
                sockets.FaceAnalysis.Output(
                    display_name="face_encoder",
                    tooltip="An InsightFace analysis, also for the nodes of other packs.",
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, pack: str, provider: str) -> str:
        return provider + face_pack_state(pack)

    @classmethod
    def execute(cls, pack: str, provider: str) -> io.NodeOutput:
        return io.NodeOutput(open_face_encoder(pack, provider).analysis)


class LoadImageEncoder(io.ComfyNode):
    """An OpenCLIP model -> DIFFLORA_IMAGE_ENCODER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffLoRA_LoadImageEncoder",
            display_name="Load Image Encoder",
            category=CATEGORY,
            description="Loads an OpenCLIP model that sees what a face recogniser ignores: hair, "
            "glasses, style. Files lie in models/difflora.",
            inputs=[
                io.Combo.Input(
                    "encoder",
                    options=host.model_files(),
                    tooltip="The image encoder that the predictor was trained with.",
                ),
                io.Combo.Input(
                    "architecture",
                    options=ARCHITECTURES,
                    default=OWN_FORMAT,
                    tooltip="For a plain OpenCLIP checkpoint: the name of its model. Files of "
                    "DiffLoRA say it themselves.",
                ),
            ],
            outputs=[
                sockets.ImageEncoder.Output(
                    display_name="image_encoder", tooltip="For Encode Face Features."
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, encoder: str, architecture: str) -> str:
        return architecture + host.file_state(host.model_path(encoder, IMAGE_ENCODER_FILE))

    @classmethod
    def execute(cls, encoder: str, architecture: str) -> io.NodeOutput:
        path = host.model_path(encoder, IMAGE_ENCODER_FILE)
        model = "" if architecture == OWN_FORMAT else architecture
        return io.NodeOutput(host.hosted(lambda: ImageEncoder.open(path, model)))


NODES = [LoadPredictor, LoadFaceEncoder, LoadImageEncoder]
