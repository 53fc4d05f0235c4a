"""What guidance looks through: a recogniser with gradients, a detector, a fast decoder."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import folder_paths
import torch
from torch import Tensor

from ..difflora_core.errors import BadWeightsFile, DiffLoRAError, LayoutMismatch
from ..difflora_core.face import FaceEncoder
from ..difflora_core.face_pack import find_pack, named_with_training
from ..difflora_core.features import Features
from ..difflora_core.mask_aware.decoders import FastDecoder
from ..difflora_core.mask_aware.networks import FaceNetwork, open_face_network
from ..difflora_core.mask_aware.tracking import Finder
from . import host, loaders
from .score import DRAWN_PACK

RECOGNISER_FILE = "recogniser.safetensors"
_FAST = "vae_approx"
"""ComfyUI's kind of models among which the fast decoders are"""


class GuidingFaces(NamedTuple):
    """What sees faces while a picture is painted."""

    name: str
    """The face encoder's."""
    network: FaceNetwork
    """Its recogniser, with gradients."""
    finder: Finder | None
    """Its detector; None where a mask says where faces are."""


def guiding_faces(
    face_encoder: Any, features: Features | None, mask: Tensor | None
) -> GuidingFaces:
    """From the connected face encoder, or from the one that the features name.

    With features and a mask nothing has to be found, so no detector is opened. Errors:
    DiffLoRAError, BadWeightsFile.
    """
    if face_encoder is not None:
        encoder = FaceEncoder.wrap(face_encoder)
        return GuidingFaces(encoder.name, open_network(recogniser_of(encoder)), encoder.find)
    name = features.face_encoder if features else ""
    if not name:
        raise DiffLoRAError(
            "Guidance does not know which recogniser to follow.",
            hint="Connect a face encoder, for example from Load Face Encoder.",
        )
    if mask is not None:
        network = network_of_pack(name)
        return GuidingFaces(named_with_training(name, network.training_name), network, None)
    return guiding_faces(loaders.open_face_encoder(name).analysis, features, mask)


def recogniser_of(encoder: FaceEncoder) -> Path:
    """The file of an encoder's recogniser that has gradients. Errors: DiffLoRAError."""
    if encoder.name == DRAWN_PACK:
        return host.model_path(host.SHIPPED, RECOGNISER_FILE)
    file = getattr(encoder.analysis.models["recognition"], "model_file", None)
    if file is None:
        raise DiffLoRAError(
            f"The connected {type(encoder.analysis).__name__} does not say which file its "
            "recogniser is in.",
            hint="Use our Load Face Encoder, or InsightFace's own FaceAnalysis.",
        )
    return Path(file)


def network_of_pack(name: str) -> FaceNetwork:
    """The recogniser of a face pack, told from its other networks by its form."""
    if name == DRAWN_PACK:
        return open_network(host.model_path(host.SHIPPED, RECOGNISER_FILE))
    folder = find_pack(loaders.face_pack_root(name), name)
    for path in sorted(folder.glob("*.onnx")):
        try:
            return open_network(path)
        except BadWeightsFile:  # a detector, or landmarks: packs hold several networks
            continue
    raise BadWeightsFile(
        f"None of the ONNX files in {folder} is a face recogniser.",
        hint="Unpack the face pack again, or connect a face encoder.",
    )


def open_network(path: Path) -> FaceNetwork:
    """A face network; the last one stays open, since big ones take seconds to read."""
    return _opened(path, host.file_state(path))


@lru_cache(maxsize=1)
def _opened(path: Path, state: str) -> FaceNetwork:
    return open_face_network(path)


def decoders_state() -> str:
    """Changes when a fast decoder comes or goes; for `fingerprint_inputs`."""
    names = [n for n in folder_paths.get_filename_list(_FAST) if n.endswith(".safetensors")]
    return "".join(host.file_state(host.listed_path(_FAST, name)) for name in sorted(names))


_UNREAD = ("taef2_decoder",)
"""Of another build than TAESD; neither are TAESDs read for latents that are scaled per channel"""


def fast_decoder(latents: Any) -> tuple[FastDecoder | None, str]:
    """TAESD for a model's latents from models/vae_approx, if it is there, and what reports call it.

    Only as safetensors: pickled files (.pth) are passed over. Errors: BadWeightsFile,
    LayoutMismatch.
    """
    name = latents.taesd_decoder_name
    path = folder_paths.get_full_path(_FAST, f"{name}.safetensors") if name else None
    if path is None:
        pickled = bool(name) and folder_paths.get_full_path(_FAST, f"{name}.pth")
        why = f" ({name}.pth is a pickle, which is not opened; save it as safetensors)"
        return None, f"VAE{why if pickled else ''}"
    if name in _UNREAD or getattr(latents, "latents_mean", None) is not None:
        return None, f"VAE ({name} is of a kind that is not read for this model)"
    # autograd refuses weights that were made in inference mode
    with torch.inference_mode(False):
        decoder = FastDecoder.open(path)
    if decoder.channels != latents.latent_channels:
        raise LayoutMismatch(
            f"{Path(path).name} takes latents of {decoder.channels} channels; this model's have "
            f"{latents.latent_channels}.",
            hint="Put the file that belongs to the model into models/vae_approx, or choose VAE.",
        )
    return decoder, "fast"
