"""Socket types: core's own where they exist, four of ours, and the shared name of face packs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io

CATEGORY = "DiffLoRA"

Predictor = io.Custom("DIFFLORA_PREDICTOR")
Features = io.Custom("DIFFLORA_FEATURES")
ImageEncoder = io.Custom("DIFFLORA_IMAGE_ENCODER")
Guidance = io.Custom("DIFFLORA_GUIDANCE")
# Core's "Load LoRA Model" takes this type: a state dict in kohya's names.
LoraModel = io.Custom("LORA_MODEL")
# Packs disagree on the name for insightface's FaceAnalysis; we put out the commonest one.
FaceAnalysis = io.Custom("FACEANALYSIS")
_FACE_TYPES = [FaceAnalysis, io.Custom("INSIGHTFACE"), io.Custom("ANALYSIS_MODELS")]


def face_encoder_input(tooltip: str, *, optional: bool = False) -> io.Input:
    """An input that takes the face analysis models of any pack."""
    return io.MultiType.Input("face_encoder", _FACE_TYPES, optional=optional, tooltip=tooltip)


def advanced(widget: io.Input) -> io.Input:
    """The input, hidden until it is asked for by editors that can do so (ComfyUI 0.10 and newer).

    Set afterwards, since older versions refuse the argument.
    """
    widget.advanced = True
    return widget


_MOST_LORAS = 16
_LORA_NAMES = [f"lora_{number}" for number in range(1, _MOST_LORAS + 1)]


def lora_list_inputs(at_least: int, tooltip: str) -> list[io.Input]:
    """The input `loras`: a list of LORA_MODEL that grows with every one that is connected.

    ComfyUI before 0.4 has no growing inputs; there it is a row of sockets of the same names, so
    that a workflow fits both.
    """
    if not hasattr(io, "Autogrow"):
        return [
            LoraModel.Input(
                f"loras.{name}", display_name=name, tooltip=tooltip, optional=number > at_least
            )
            for number, name in enumerate(_LORA_NAMES, start=1)
        ]
    socket = LoraModel.Input("lora", tooltip=tooltip)
    template = io.Autogrow.TemplateNames(socket, names=_LORA_NAMES, min=at_least)
    return [io.Autogrow.Input("loras", template=template, tooltip=tooltip)]


def lora_list(loras: Mapping[str, Any] | None, sockets: Mapping[str, Any]) -> list[Any]:
    """What arrived on `lora_list_inputs`, in order; `sockets` are the single ones, by name."""
    single = {name.removeprefix("loras."): value for name, value in sockets.items()}
    arrived = {**(loras or {}), **single}
    return [arrived[name] for name in _LORA_NAMES if arrived.get(name) is not None]
