"""The face pack of a run: where it lies, and which training of the recogniser it holds."""

from __future__ import annotations

from difflora_core.errors import LayoutMismatch
from difflora_core.face import FaceEncoder

from ..artifacts import SHIPPED, artifact, sha256
from ..config import Config

NAME = "mini"
_FOLDER = f"insightface/models/{NAME}"
DETECTOR_FILE, RECOGNISER_FILE = f"{_FOLDER}/det_mini.onnx", f"{_FOLDER}/rec_mini.onnx"


def face_encoder_name(config: Config) -> str:
    """What FaceEncoder calls the pack of this run's recogniser: mini@ and the training it is."""
    own = sha256(artifact(config, "recogniser"))
    if own == sha256(SHIPPED / "recogniser.safetensors"):
        return FaceEncoder.open(SHIPPED / "insightface").name
    return f"{NAME}@{own[:8]}"


def open_face_encoder(config: Config) -> FaceEncoder:
    """The pack of this run, or the shipped one.

    Errors: LayoutMismatch where it holds another recogniser than the run.
    """
    encoder = FaceEncoder.open(artifact(config, DETECTOR_FILE).parents[2])
    wanted = face_encoder_name(config)
    if encoder.name != wanted:
        raise LayoutMismatch(
            f"The recogniser of this run is {wanted}, that of its face pack {encoder.name}.",
            hint="Run `python -m training export-face-pack --config ...` again.",
        )
    return encoder
