"""Socket types: core's own where they exist, three of ours, and the shared name of face packs."""

from __future__ import annotations

from comfy_api.latest import io

CATEGORY = "DiffLoRA"

Predictor = io.Custom("DIFFLORA_PREDICTOR")
Features = io.Custom("DIFFLORA_FEATURES")
ImageEncoder = io.Custom("DIFFLORA_IMAGE_ENCODER")
# Core's "Load LoRA Model" takes this type: a state dict in kohya's names.
LoraModel = io.Custom("LORA_MODEL")
# Packs disagree on the name for insightface's FaceAnalysis; we put out the commonest one.
FaceAnalysis = io.Custom("FACEANALYSIS")
_FACE_TYPES = [FaceAnalysis, io.Custom("INSIGHTFACE"), io.Custom("ANALYSIS_MODELS")]


def face_encoder_input(tooltip: str, *, optional: bool = False) -> io.Input:
    """An input that takes the face analysis models of any pack."""
    return io.MultiType.Input("face_encoder", _FACE_TYPES, optional=optional, tooltip=tooltip)
