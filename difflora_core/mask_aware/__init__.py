"""Losses on faces and people inside masks, and sampling that follows their gradient.

A face network (`open_face_network`) and a decoder see what an estimate shows; `losses` compares it
with what is wanted; `Guide` follows the gradient while sampling, training minimises `combine`.
"""

from .decoders import Decoder, FastDecoder, ModuleDecoder
from .guidance import GuidanceSettings, Guide
from .landmarks import LandmarkNetwork, open_landmark_network
from .losses import (
    PRESETS,
    Preset,
    Term,
    TermName,
    Weights,
    combine,
    face_distance,
    landmark_distance,
    masked_distance,
    mean_inside,
)
from .networks import FaceActivations, FaceNetwork, open_face_network
from .pairing import FlatFaces, assign
from .perceptual import Lpips, open_lpips
from .window import WINDOWS, SigmaWindow

__all__ = [
    "PRESETS",
    "WINDOWS",
    "Decoder",
    "FaceActivations",
    "FaceNetwork",
    "FastDecoder",
    "FlatFaces",
    "GuidanceSettings",
    "Guide",
    "LandmarkNetwork",
    "Lpips",
    "ModuleDecoder",
    "Preset",
    "SigmaWindow",
    "Term",
    "TermName",
    "Weights",
    "assign",
    "combine",
    "face_distance",
    "landmark_distance",
    "masked_distance",
    "mean_inside",
    "open_face_network",
    "open_landmark_network",
    "open_lpips",
]
