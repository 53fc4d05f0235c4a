"""Photos -> Features, by a face encoder, an image encoder, or both."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from .errors import BadImage, NoFaceFound
from .face import Choice, Face, FaceEncoder, choose_face
from .face_crop import square_crop
from .features import Features, PhotoNote, fuse
from .image_encoder import ImageEncoder
from .photos import Pixels


def encode_photos(
    photos: Sequence[Pixels],
    face_encoder: FaceEncoder | None,
    image_encoder: ImageEncoder | None,
    choice: Choice | str = "largest",
    numbers: Sequence[int] = (),
) -> Features:
    """Encode P photos [H, W, 3] uint8 RGB of one person and weigh them against each other.

    Without a face encoder nothing is detected and all photos weigh the same. The image encoder sees
    the middle square of the photo, or a square around the chosen face where the photo shows several
    people or the middle leaves out a part of the face.
    `numbers` are what the photos are called in messages and notes, 1 to P where none are given.
    Errors: NoFaceFound with the photo's number, BadImage without photos, DiffLoRAError without
    any encoder.
    """
    if not photos:
        raise BadImage("There is no photo to encode.", hint="Give at least one photo.")
    numbers = numbers or range(1, len(photos) + 1)
    found = [_faces(face_encoder, photo, n) for n, photo in zip(numbers, photos, strict=True)]
    chosen = [
        _chosen(faces, choice, number) if face_encoder else None
        for number, faces in zip(numbers, found, strict=True)
    ]
    views = [
        _view(photo, faces, face) for photo, faces, face in zip(photos, found, chosen, strict=True)
    ]
    faces = [face for face in chosen if face is not None]
    ones = torch.ones(len(photos))
    features = fuse(
        torch.from_numpy(np.stack([f.embedding for f in faces])) if faces else None,
        _embed(image_encoder, views) if image_encoder else None,
        torch.tensor([f.score for f in faces]) if faces else ones,
        torch.tensor([f.sharpness for f in faces]) if faces else ones,
        face_encoder=face_encoder.name if face_encoder else "",
        image_encoder=image_encoder.config.name if image_encoder else "",
    )
    notes = tuple(map(_which_face, numbers, features.photos, found, chosen))
    return dataclasses.replace(features, photos=notes)


def _faces(encoder: FaceEncoder | None, photo: Pixels, number: int) -> list[Face]:
    if encoder is None:
        return []
    faces = encoder.faces(photo)
    if not faces:
        raise NoFaceFound(
            f"No face was found in photo {number}.",
            hint="Use a photo in which the face is large, sharp and turned to the camera.",
        )
    return faces


def _chosen(faces: list[Face], choice: Choice | str, number: int) -> Face:
    try:
        return choose_face(faces, choice)
    except NoFaceFound as error:
        raise NoFaceFound(f"Photo {number}: {error.message}", hint=error.hint) from error


def _which_face(number: int, note: PhotoNote, faces: list[Face], chosen: Face | None) -> PhotoNote:
    note = dataclasses.replace(note, number=number)
    if chosen is None:
        return note
    place = 1 + next(i for i, face in enumerate(faces) if face is chosen)
    return dataclasses.replace(note, faces=len(faces), face=place)


def _view(photo: Pixels, faces: list[Face], chosen: Face | None) -> Pixels:
    """What the image encoder sees: the other people of a group photo would mislead it, and of a
    long photo it takes the middle, where nobody may be."""
    if chosen is None or (len(faces) < 2 and _in_the_middle(photo, chosen)):
        return photo
    return square_crop(photo, chosen.box.tolist())


def _in_the_middle(photo: Pixels, face: Face) -> bool:
    """Whether the photo's middle square holds all of the face that the photo shows."""
    height, width = photo.shape[:2]
    box = face.box.clip(0, [width, height, width, height])
    edges = np.array([width - min(height, width), height - min(height, width)]) / 2
    low, high = edges, np.array([width, height]) - edges
    return bool((box[:2] >= low).all() and (box[2:] <= high).all())


@torch.no_grad()
def _embed(encoder: ImageEncoder, photos: Sequence[Pixels]) -> Tensor:
    """[P, Ei] on the CPU; one photo at a time, since sizes differ."""
    device = encoder.get_buffer("mean").device
    return torch.cat([encoder.encode(_to_tensor(photo).to(device))[0].cpu() for photo in photos])


def _to_tensor(photo: Pixels) -> Tensor:
    """[1, 3, H, W] in 0..1"""
    return rearrange(torch.from_numpy(photo.copy()), "h w c -> 1 c h w").float() / 255
