"""Test-only nodes: a capture of any value, photos, and faces without an InsightFace pack."""

from __future__ import annotations

from typing import Any

import torch
from mini_files import FakeAnalysis
from torch import Tensor


class AnyType(str):
    """A socket type that equals every other."""

    __hash__ = str.__hash__

    def __ne__(self, other: object) -> bool:
        return False


class Capture:
    """Keeps whatever arrives, under a name."""

    values: dict[str, Any] = {}  # noqa: RUF012  (ComfyUI makes a new instance at will)
    RETURN_TYPES = ()
    FUNCTION = "keep"
    OUTPUT_NODE = True
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"value": (AnyType("*"), {}), "name": ("STRING", {})}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types: dict[str, str]) -> bool:
        return True

    @classmethod
    def IS_CHANGED(cls, **_inputs: Any) -> float:
        return float("nan")  # never served from the cache

    def keep(self, value: Any, name: str) -> tuple[()]:
        self.values[name] = value
        return ()


class Photo:
    """A picture with none, one or two "faces" for FakeAnalysis, or a broken one."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "draw"
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"faces": ("STRING", {})}}

    def draw(self, faces: str) -> tuple[Tensor]:
        side = 32 if faces == "tiny" else 192
        picture = torch.rand(1, side, side, 3, generator=torch.Generator().manual_seed(1)) * 0.5
        if faces in ("one", "two"):
            picture[:, :, : side // 3, 0] = 1.0
        if faces == "two":
            picture[:, :, 2 * side // 3 :, 0] = 0.9
        if faces == "nan":
            picture[0, 5, 5, 0] = torch.nan
        if faces == "alpha":
            picture = torch.cat([picture, torch.ones_like(picture[..., :1])], -1)
            picture[:, :, : side // 3, 0] = 1.0
        return (picture,)


class Faces:
    """A face encoder that needs no files."""

    RETURN_TYPES = ("FACEANALYSIS",)
    FUNCTION = "open"
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    def open(self) -> tuple[FakeAnalysis]:
        return (FakeAnalysis(),)


class OldFaces(Faces):
    """The same under another pack's name for it."""

    RETURN_TYPES = ("INSIGHTFACE",)


NODES = {
    "TestCapture": Capture,
    "TestPhoto": Photo,
    "TestFaces": Faces,
    "TestOldFaces": OldFaces,
}
