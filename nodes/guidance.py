"""Mask-Aware Guidance: a model whose samplers lead faces towards a person."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..difflora_core.features import Features
from ..difflora_core.mask_aware.guidance import GuidanceSettings
from ..difflora_core.mask_aware.references import check_person, reference_embeddings
from ..difflora_core.mask_aware.run_log import GuidanceLog
from ..difflora_core.mask_aware.window import WINDOWS
from . import host, sockets
from .guided_sampling import CUSTOM, SIGMA, TIMESTEP, GuidedSampling, WindowChoice
from .guiding_networks import decoders_state, fast_decoder, guiding_faces
from .loaders import encoders_state
from .sockets import CATEGORY, advanced

FAST, FULL = "fast, if there is one", "VAE"
DEFAULTS = GuidanceSettings()


class MaskAwareGuidance(io.ComfyNode):
    """MODEL, VAE, a person -> MODEL, DIFFLORA_GUIDANCE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffLoRA_MaskAwareGuidance",
            display_name="Mask-Aware Guidance",
            category=CATEGORY,
            description="Leads the faces of a picture towards a person while it is painted, "
            "without a LoRA and without training. A step changes faces only, and only inside the "
            "mask; the rest may follow a little in later steps.",
            inputs=[*link_inputs(), *strength_inputs(), *window_inputs(), *care_inputs()],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The guided model, for a KSampler."),
                sockets.Guidance.Output(
                    display_name="guidance", tooltip="What guidance does, for Guidance Report."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, decoder: str, **_inputs: Any) -> str:
        return encoders_state() + (decoders_state() if decoder == FAST else "")

    @classmethod
    def execute(
        cls,
        model: Any,
        vae: Any,
        strength: float,
        window: str,
        start: float,
        end: float,
        decoder: str,
        when_lost: str,
        iterations: int,
        smoothing: float,
        jitter: float,
        features: Features | None = None,
        reference: Tensor | None = None,
        face_encoder: Any = None,
        mask: Tensor | None = None,
    ) -> io.NodeOutput:
        check_person(features, reference is not None)
        faces = guiding_faces(face_encoder, features, mask)
        pictures = [] if reference is None else host.to_pixels([reference], "Reference picture")
        wanted = reference_embeddings(faces.network, faces.name, features, pictures, faces.finder)
        settings = GuidanceSettings(
            strength,
            iterations=iterations,
            smoothing=smoothing,
            jitter=jitter,
            when_lost=when_lost,
        )
        latents = model.get_model_object("latent_format")
        fast, decoder_name = fast_decoder(latents) if decoder == FAST else (None, "VAE")
        log, when = GuidanceLog(), WindowChoice(window, start, end)
        guided = GuidedSampling(
            faces.network,
            wanted,
            settings,
            when,
            vae,
            fast,
            decoder_name,
            faces.finder,
            to_mask(mask),
            log,
        )
        return io.NodeOutput(guided.applied(model), log)


def to_mask(mask: Tensor | None) -> Tensor | None:
    """A MASK of any form as [B, H, W] in 0..1."""
    if mask is None:
        return None
    return mask.float().reshape(-1, *mask.shape[-2:]).nan_to_num().clamp(0, 1)


def link_inputs() -> list[io.Input]:
    """The sockets."""
    return [
        io.Model.Input("model", tooltip="The model to guide; with or without LoRAs."),
        io.Vae.Input("vae", tooltip="Its VAE, to see the face while it is painted."),
        sockets.Features.Input(
            "features", optional=True, tooltip="The person, from Encode Face Features."
        ),
        io.Image.Input(
            "reference",
            optional=True,
            tooltip="Instead of features: a picture of the person. Every face in it is one to "
            "resemble; faces that are painted go to those they are most like.",
        ),
        sockets.face_encoder_input(
            "Finds the faces and judges them. Without one, the encoder that the features name.",
            optional=True,
        ),
        io.Mask.Input(
            "mask",
            optional=True,
            tooltip="Where faces may change. Without a face encoder it also says where they are: "
            "one separate area per face, from left to right.",
        ),
    ]


def strength_inputs() -> list[io.Input]:
    """How far."""
    return [
        io.Float.Input(
            "strength",
            default=DEFAULTS.strength,
            min=0.0,
            max=20.0,
            step=0.1,
            tooltip="Length of each step, in units of what CFG does; a part of it lasts. More "
            "resembles more, until it looks painted on.",
        )
    ]


def window_inputs() -> list[io.Input]:
    """When."""
    return [
        io.Combo.Input(
            "window",
            options=[*WINDOWS, CUSTOM, SIGMA, TIMESTEP],
            default="identity",
            tooltip="When to guide. identity: while the face takes shape, all but the run's start "
            "and end. detail: its end. paper: the last steps, t < 100, as published. custom, "
            "sigma, timestep: from start to end, below, as shares of the run, sigmas or timesteps "
            "of 1000.",
        ),
        advanced(
            io.Float.Input(
                "start",
                default=0.2,
                min=0.0,
                max=1000.0,
                step=0.01,
                tooltip="Where guidance starts. custom: share of the run, 0 to 1. sigma: the "
                "highest, such as 10. timestep: the highest of 1000, such as 400.",
            )
        ),
        advanced(
            io.Float.Input(
                "end",
                default=0.8,
                min=0.0,
                max=1000.0,
                step=0.01,
                tooltip="Where it ends. custom: share of the run. sigma and timestep: the lowest, "
                "0 for the end of the run.",
            )
        ),
    ]


def care_inputs() -> list[io.Input]:
    """How carefully."""
    return [
        io.Combo.Input(
            "decoder",
            options=[FAST, FULL],
            default=FAST,
            tooltip="What turns latents into the face that is judged: TAESD from models/vae_approx "
            "(.safetensors, not .pth) takes a fraction of the time and memory; the VAE sees more "
            "exactly.",
        ),
        io.Combo.Input(
            "when_lost",
            options=["hold", "skip", "error"],
            default=DEFAULTS.when_lost,
            tooltip="When a face is no longer found: hold goes on where it was, skip leaves the "
            "step alone, error stops.",
        ),
        advanced(
            io.Int.Input(
                "iterations",
                default=DEFAULTS.iterations,
                min=1,
                max=8,
                tooltip="Looks per step; together they go as far as one. Each takes its time, and "
                "fewer are less exact.",
            )
        ),
        advanced(
            io.Float.Input(
                "smoothing",
                default=DEFAULTS.smoothing,
                min=0.0,
                max=1.0,
                step=0.05,
                tooltip="Share of each step that is smoothed over the face: shape and colour "
                "rather than details that please the recogniser only.",
            )
        ),
        advanced(
            io.Float.Input(
                "jitter",
                default=DEFAULTS.jitter,
                min=0.0,
                max=0.5,
                step=0.05,
                tooltip="How much looks differ: each sees a face cropped closer by up to this "
                "share, every other one mirrored. 0 always sees it as it is, which is easier to "
                "please without likeness.",
            )
        ),
    ]


NODES = [MaskAwareGuidance]
