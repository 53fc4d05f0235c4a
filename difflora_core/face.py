"""Faces by InsightFace: found at several sizes, numbered from left to right, embedded.

The only module that imports insightface, and only when an encoder is opened. Nothing is ever
downloaded: the packs are the user's own files (or the drawn-world pack that ships with us).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from .errors import DiffLoRAError, NoFaceFound
from .face_crop import numbered_crops, sharpness
from .face_detection import DETECTION_SIZES, detect
from .face_pack import check_path, find_pack, incomplete, named_with_training, unreadable
from .photos import Pixels

Choice = Literal["largest", "leftmost", "rightmost", "topmost", "center"] | int
"""Which face: by size or place, or by its number, counted from 1 at the left."""

CHOICES: tuple[str, ...] = ("largest", "leftmost", "rightmost", "topmost", "center")
#: where an analysis that we opened remembers its pack, whose files may lie in another-named folder
_NAME = "difflora_pack"
#: metadata field of a recogniser's ONNX file: which training of it this is
TRAINING_FIELD = "difflora.training"
#: of a face number; Python refuses to read thousands of them
_DIGITS = 9


@dataclass(frozen=True, kw_only=True)
class FoundFace:
    """Where one face of a picture is."""

    box: NDArray[np.float32]
    """x1, y1, x2, y2 in pixels; may reach beyond the picture."""
    landmarks: NDArray[np.float32]
    """[5, 2] in pixels: eye on the picture's left, other eye, nose, corners of the mouth."""
    score: float
    """The detector's confidence, 0..1."""
    picture: tuple[int, int]
    """Width and height of the picture in pixels."""

    @property
    def area(self) -> float:
        """Of the box, in square pixels."""
        return float((self.box[2] - self.box[0]) * (self.box[3] - self.box[1]))

    @property
    def centre(self) -> tuple[float, float]:
        """Of the box, in pixels."""
        x1, y1, x2, y2 = self.box.tolist()
        return (x1 + x2) / 2, (y1 + y2) / 2


@dataclass(frozen=True, kw_only=True)
class Face(FoundFace):
    """One face of a picture and what the recogniser makes of it."""

    embedding: NDArray[np.float32]
    """[D], as the recogniser gives it: its length says how clear the face is."""
    sharpness: float
    """Variance of the Laplacian of the aligned face; a blurred face has a low one."""

    @property
    def unit_embedding(self) -> NDArray[np.float32]:
        """The embedding at length 1; the cosine of two faces is the dot product of theirs."""
        return self.embedding / max(float(np.linalg.norm(self.embedding)), 1e-8)


AnyFace = TypeVar("AnyFace", bound=FoundFace)


@dataclass(frozen=True)
class FaceEncoder:
    """A detector and a recogniser from an InsightFace pack."""

    analysis: Any
    """insightface.app.FaceAnalysis, prepared."""
    name: str
    """The pack's name, PACK@TRAINING where its recogniser says which training of it this is;
    stored with the features it makes."""
    sizes: tuple[int, ...] = field(default=DETECTION_SIZES)
    """Detection sizes in the order in which they are tried."""

    @classmethod
    def open(
        cls,
        root: str | Path,
        name: str = "mini",
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ) -> FaceEncoder:
        """Open the pack `name`: root/models/name, root/name, or root itself if it is the pack.

        PACK@TRAINING lies under that name or under PACK; `name` of the result says which one it is.
        Packs that were unpacked into a folder of their own name inside (antelopev2) are accepted.
        Errors: BadWeightsFile when there is no usable pack, DiffLoRAError when insightface is
        missing or a provider is not available.
        """
        folder = find_pack(Path(root), name)
        analysis_class = _insightface().FaceAnalysis
        check_path(folder)
        _check_providers(providers)
        try:
            analysis = analysis_class(
                name=str(folder),
                allowed_modules=["detection", "recognition"],
                providers=list(providers),
            )
            analysis.prepare(ctx_id=-1 if list(providers) == ["CPUExecutionProvider"] else 0)
        except AssertionError as error:
            raise incomplete(folder, "a detector") from error
        except Exception as error:  # those of ONNX Runtime have no base class of their own
            raise unreadable(folder, error) from error
        if "recognition" not in analysis.models:
            raise incomplete(folder, "a recogniser")
        name = named_with_training(name, _training_of(analysis))
        setattr(analysis, _NAME, name)
        return cls(analysis, name)

    @classmethod
    def wrap(cls, analysis: Any, name: str = "") -> FaceEncoder:
        """Take the FaceAnalysis object that another node pack has loaded, or a holder of one.

        Errors: DiffLoRAError when it is something else or was loaded without a recogniser.
        """
        if isinstance(analysis, cls):
            return analysis
        for attribute in ("analysis", "face_analysis"):
            analysis = getattr(analysis, attribute, analysis)
        models = getattr(analysis, "models", None)
        if not isinstance(models, dict) or not hasattr(models.get("detection"), "detect"):
            raise DiffLoRAError(
                f"The connected {type(analysis).__name__} is not an InsightFace analysis.",
                hint="Use our Load Face Encoder, or a loader of InsightFace from another pack.",
            )
        if "recognition" not in models:
            raise DiffLoRAError(
                "The connected InsightFace analysis was loaded without its recogniser.",
                hint="Use our Load Face Encoder, which loads detector and recogniser.",
            )
        folder = Path(str(getattr(analysis, "model_dir", "") or "insightface"))
        name = name or getattr(analysis, _NAME, "")
        return cls(analysis, name or named_with_training(folder.name, _training_of(analysis)))

    def faces(self, image: Pixels) -> list[Face]:
        """Every face of a picture [H, W, 3], uint8 RGB, from left to right; empty if none."""
        return [self._describe(image, found) for found in self.find(image)]

    def find(self, image: Pixels) -> list[FoundFace]:
        """Where they are, which takes the detector only."""
        bgr = np.ascontiguousarray(image[..., ::-1])
        boxes, points = detect(self.analysis.models["detection"], bgr, self.sizes)
        size = (image.shape[1], image.shape[0])
        found = [
            FoundFace(box=box[:4], landmarks=five, score=float(box[4]), picture=size)
            for box, five in zip(boxes, points, strict=True)
        ]
        return sorted(found, key=lambda face: face.centre)

    def face(self, image: Pixels, choice: Choice = "largest") -> Face:
        """The chosen face of a picture. Errors: NoFaceFound."""
        return choose_face(self.faces(image), choice)

    def _describe(self, image: Pixels, found: FoundFace) -> Face:
        known = _insightface_common().Face(
            bbox=found.box, kps=found.landmarks, det_score=found.score
        )
        bgr = np.ascontiguousarray(image[..., ::-1])
        embedding = self.analysis.models["recognition"].get(bgr, known)
        return Face(
            **vars(found),
            embedding=np.asarray(embedding, np.float32).reshape(-1),
            sharpness=sharpness(image, found.landmarks),
        )


def choose_face(faces: Sequence[AnyFace], choice: Choice | str = "largest") -> AnyFace:
    """One of the faces of a picture: by size, place, or number (1 = leftmost; "2" works too).

    Places compare the centres of boxes; "center" is the face nearest to the picture's middle.
    Errors: NoFaceFound when there is none, or none of that number, naming how many there are.
    """
    if not faces:
        raise NoFaceFound(
            "No face was found in the picture.",
            hint="Use a photo in which the face is large, sharp and turned to the camera.",
        )
    if isinstance(choice, int) or str(choice).strip().isdecimal():
        return _numbered(faces, int(str(choice).strip()[:_DIGITS]))
    orders = {
        "largest": lambda face: -face.area,
        "leftmost": lambda face: face.centre[0],
        "rightmost": lambda face: -face.centre[0],
        "topmost": lambda face: face.centre[1],
        "center": _distance_from_middle,
    }
    if choice not in orders:
        raise DiffLoRAError(
            f"There is no face choice {choice!r}.",
            hint=f"Choose one of {', '.join(CHOICES)}, or a number.",
        )
    return min(faces, key=orders[choice])


def face_previews(image: Pixels, faces: Sequence[FoundFace], size: int = 160) -> Pixels:
    """Crops with the numbers that `choose_face` takes: uint8 [N, size, size, 3]."""
    return numbered_crops(image, [face.box.tolist() for face in faces], size)


def _training_of(analysis: Any) -> str:
    session = getattr(analysis.models["recognition"], "session", None)
    fields = session.get_modelmeta().custom_metadata_map if session is not None else {}
    return fields.get(TRAINING_FIELD, "")


def _numbered(faces: Sequence[AnyFace], number: int) -> AnyFace:
    if 1 <= number <= len(faces):
        return sorted(faces, key=lambda face: face.centre)[number - 1]
    found = "1 face was" if len(faces) == 1 else f"{len(faces)} faces were"
    raise NoFaceFound(
        f"There is no face number {number}: {found} found in the picture.",
        hint=f"Choose a number from 1 (leftmost) to {len(faces)}, or 'largest'.",
    )


def _distance_from_middle(face: FoundFace) -> float:
    width, height = face.picture
    return (face.centre[0] - width / 2) ** 2 + (face.centre[1] - height / 2) ** 2


def _check_providers(providers: Sequence[str]) -> None:
    available = import_module("onnxruntime").get_available_providers()
    missing = [name for name in providers if name not in available]
    if missing:
        raise DiffLoRAError(
            f"ONNX Runtime has no {missing[0]} here; it has {', '.join(available)}.",
            hint="Choose the CPU, or install the onnxruntime build for your GPU.",
        )


def _insightface() -> ModuleType:
    try:
        return import_module("insightface.app")
    except ImportError as error:
        raise DiffLoRAError(
            f"Reading faces needs the package insightface, which cannot be imported ({error}).",
            hint="Install it with: pip install 'insightface>=1.0.1' onnxruntime",
        ) from error


def _insightface_common() -> ModuleType:
    return import_module("insightface.app.common")
