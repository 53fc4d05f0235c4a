"""Features of a person -> LoRA."""

from __future__ import annotations

import json
from typing import Any

from comfy_api.latest import io

from ..difflora_core.features import Features
from ..difflora_core.header import LoraHeader
from ..difflora_core.predictor import Prediction, Predictor
from . import host, sockets
from .sockets import CATEGORY

AS_TRAINED = 0
"""Value of a widget that leaves a setting to the predictor's own calibration."""


def strength_input() -> io.Input:
    return io.Float.Input(
        "strength",
        default=1.0,
        min=-4.0,
        max=4.0,
        step=0.01,
        tooltip="How much of the person: 1 is the strength calibrated for the predictor, "
        "0 is nobody.",
    )


def seed_input() -> io.Input:
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=2**53 - 1,
        control_after_generate=True,
        tooltip="Seed of the prediction. Other seeds give other likenesses of the same person.",
    )


def predict(
    predictor: Any,
    features: Features,
    *,
    strength: float,
    seed: int,
    candidates: int = 1,
    steps: int = AS_TRAINED,
    guidance: float = AS_TRAINED,
) -> tuple[host.LoraModel, str]:
    """LORA_MODEL and report; `predictor` is the value of a DIFFLORA_PREDICTOR socket."""
    model: Predictor = host.on_device(predictor)
    prediction = model.predict(
        features,
        seed=seed,
        steps=steps or None,
        candidates=candidates,
        guidance=guidance or None,
        strength=strength * model.config.sampling.strength,
        progress=host.progress(steps or model.config.sampling.steps),
    )
    lora = host.LoraModel(prediction.lora, _header(prediction).to_dict())
    return lora, json.dumps(prediction.report, indent=1)


def _header(prediction: Prediction) -> LoraHeader:
    report = prediction.report
    return LoraHeader(
        title="person",
        base=report["base"],
        trigger=report["trigger"],
        space_id=report["space"],
        predictor_hash=report["predictor_hash"],
        strength=report["strength"],
        seed=report["seed"],
        description=f"Predicted from {len(report['photos'])} photos.",
    )


class PredictLora(io.ComfyNode):
    """DIFFLORA_PREDICTOR, DIFFLORA_FEATURES -> LORA_MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffLoRA_PredictLora",
            display_name="Predict LoRA",
            category=CATEGORY,
            description="Turns the features of a person into a LoRA, in seconds and without "
            'training. Connect the result to "Load LoRA Model" or Save LoRA.',
            inputs=[
                sockets.Predictor.Input("predictor", tooltip="From Load Predictor."),
                sockets.Features.Input("features", tooltip="From Encode Face Features."),
                strength_input(),
                seed_input(),
                io.Int.Input(
                    "candidates",
                    default=1,
                    min=1,
                    max=64,
                    tooltip="Predict so many LoRAs and keep the one nearest to their mean.",
                ),
                io.Int.Input(
                    "steps",
                    default=AS_TRAINED,
                    min=0,
                    max=50,
                    tooltip="Steps of the prediction; 0 takes the predictor's own number.",
                ),
                io.Float.Input(
                    "guidance",
                    default=AS_TRAINED,
                    min=0.0,
                    max=10.0,
                    step=0.1,
                    tooltip="Away from the average person, above 1; 0 takes the predictor's own.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The model that the LoRA is for: if it is another kind than the "
                    "predictor was trained for, this node says so. It is not changed.",
                ),
            ],
            outputs=[
                sockets.LoraModel.Output(
                    display_name="lora", tooltip='The LoRA, for "Load LoRA Model" or Save LoRA.'
                ),
                io.String.Output(
                    display_name="report", tooltip="How it was predicted and how long it took."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        predictor: Any,
        features: Features,
        strength: float,
        seed: int,
        candidates: int,
        steps: int,
        guidance: float,
        model: Any = None,
    ) -> io.NodeOutput:
        lora, report = predict(
            predictor,
            features,
            strength=strength,
            seed=seed,
            candidates=candidates,
            steps=steps,
            guidance=guidance,
        )
        if model is not None:
            host.check_fits(lora, model)
        return io.NodeOutput(lora, report)


NODES = [PredictLora]
