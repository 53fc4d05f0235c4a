"""Whom guidance leads towards: embeddings by the very network that gives the gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..errors import DiffLoRAError, LayoutMismatch, NoFaceFound
from ..features import Features
from ..photos import Pixels
from .networks import FaceNetwork
from .tracking import Finder


def reference_embeddings(
    network: FaceNetwork,
    encoder: str,
    features: Features | None,
    pictures: Sequence[Pixels] = (),
    finder: Finder | None = None,
) -> Tensor:
    """Unit embeddings [R, D], made outside inference mode: the person of the features first, if
    they hold a face, then every face of every picture, from left to right.

    Args:
        encoder: name of the face encoder whose recogniser `network` is.
        finder: finds the faces of `pictures`.
    Errors: LayoutMismatch for features of another encoder, NoFaceFound with the picture's number,
    DiffLoRAError without anybody.
    """
    check_person(features, bool(pictures))
    with torch.inference_mode(False), torch.no_grad():
        rows = []
        if features is not None and features.face is not None:
            rows.append(_of_features(network, encoder, features))
        for number, picture in enumerate(pictures, start=1):
            rows.append(_of_picture(network, picture, finder, number))
        return torch.cat(rows)


def check_person(features: Features | None, pictures: bool) -> None:
    """Errors: DiffLoRAError unless there is a face to lead towards, or a picture to find one in."""
    if features is not None and features.face is None and not pictures:
        raise DiffLoRAError(
            "These features hold no face, which guidance needs.",
            hint="Connect a face encoder to Encode Face Features, or a reference picture here.",
        )
    if features is None and not pictures:
        raise DiffLoRAError(
            "Guidance has nobody to lead towards.",
            hint="Connect features from Encode Face Features, or a reference picture.",
        )


def _of_features(network: FaceNetwork, encoder: str, features: Features) -> Tensor:
    """[1, D]"""
    face = features.fused_face()
    assert face is not None  # check_person has been asked
    if features.face_encoder and features.face_encoder != encoder:
        raise LayoutMismatch(
            f"These features come from the face encoder {features.face_encoder}; the one that "
            f"guides is {encoder}.",
            hint=f"Connect {features.face_encoder} here, or encode the photos with {encoder}.",
        )
    length = network(torch.zeros(0, 3, network.size, network.size)).embedding.shape[1]
    if len(face) != length:
        raise LayoutMismatch(
            f"These features have {len(face)} numbers per face; the network that guides gives "
            f"{length}.",
            hint=f"Encode the photos with the face encoder {encoder}.",
        )
    return F.normalize(face.detach().clone().float(), dim=-1)[None].cpu()


def _of_picture(
    network: FaceNetwork, picture: Pixels, finder: Finder | None, number: int
) -> Tensor:
    """[faces, D]"""
    if finder is None:
        raise DiffLoRAError(
            "The face in the reference picture has to be found first.",
            hint="Connect a face encoder.",
        )
    faces = finder(picture)
    if not faces:
        raise NoFaceFound(
            f"No face was found in reference picture {number}.",
            hint="Use a photo in which the face is large, sharp and turned to the camera.",
        )
    image = rearrange(torch.from_numpy(picture.copy()), "h w c -> 1 c h w").float() / 255
    points = torch.stack([torch.from_numpy(face.landmarks) for face in faces]).float()
    return network.embed(image.expand(len(points), -1, -1, -1), points).cpu()
