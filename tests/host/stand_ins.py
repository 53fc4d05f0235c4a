"""Test-only nodes: a capture of any value, photos, masks, broken VAEs, and faces without an
InsightFace pack."""

from __future__ import annotations

import copy
import json
from typing import Any

import torch
from mini_files import FACE_WIDTH, FakeAnalysis, FixedFaces
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
    """A picture with none, one or two "faces" for FakeAnalysis, a broken one, or no picture."""

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
        return (picture[:0] if faces == "no picture" else picture,)


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


class NoFaces(Faces):
    """Another object under the name of a face encoder."""

    def open(self) -> tuple[str]:  # type: ignore[override]
        return ("a detector of cats",)


class PlacedFaces:
    """A face encoder that finds faces where it is told to: a JSON list of boxes, in shares."""

    RETURN_TYPES = ("FACEANALYSIS",)
    FUNCTION = "open"
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"boxes": ("STRING", {})}}

    def open(self, boxes: str) -> tuple[FixedFaces]:
        return (FixedFaces(*json.loads(boxes)),)


class Person:
    """Features without any photo."""

    RETURN_TYPES = ("DIFFLORA_FEATURES",)
    FUNCTION = "make"
    CATEGORY = "test"
    features_type: Any = None
    """Features, as the pack inside ComfyUI knows them."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"encoder": ("STRING", {}), "seed": ("INT", {})}}

    def make(self, encoder: str, seed: int) -> tuple[Any]:
        row = torch.randn(1, FACE_WIDTH, generator=torch.Generator().manual_seed(seed))
        if encoder == "image only":
            return (self.features_type(None, row, torch.ones(1)),)
        return (self.features_type(row, None, torch.ones(1), encoder),)


class Rectangle:
    """A MASK that is white in one box, given in shares of its width and height."""

    RETURN_TYPES = ("MASK",)
    FUNCTION = "draw"
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        sides = {side: ("INT", {}) for side in ("width", "height", "batch")}
        return {"required": {**sides, "box": ("STRING", {})}}

    def draw(self, width: int, height: int, batch: int, box: str) -> tuple[Tensor]:
        mask = torch.zeros(batch, height, width)
        x1, y1, x2, y2 = json.loads(box)
        rows, columns = (round(y1 * height), round(y2 * height)), (x1 * width, x2 * width)
        mask[:, rows[0] : rows[1], round(columns[0]) : round(columns[1])] = 1
        return (mask,)


class WrongVae:
    """A VAE that cannot guide: NaN in its weights, nothing in it, or made for other latents."""

    RETURN_TYPES = ("VAE",)
    FUNCTION = "spoil"
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"vae": ("VAE",), "how": ("STRING", {})}}

    def spoil(self, vae: Any, how: str) -> tuple[Any]:
        wrong = copy.copy(vae)
        if how == "nan":
            wrong.first_stage_model = copy.deepcopy(vae.first_stage_model)
            next(wrong.first_stage_model.decoder.parameters()).view(-1)[3] = torch.nan
        elif how == "empty":
            wrong.first_stage_model = None
        elif how == "channels":
            wrong.latent_channels = 16
        else:
            wrong.latent_dim = 3
        return (wrong,)


class OtherModel:
    """A MODEL whose text encoder is twice as wide: as SD 2.1 beside SD 1.5."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "widen"
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",)}}

    def widen(self, model: Any) -> tuple[Any]:
        other = model.clone()
        other.model = copy.copy(model.model)
        other.model._modules = dict(model.model._modules)  # a shallow copy shares it
        other.model.diffusion_model = copy.deepcopy(model.model.diffusion_model)
        for name, layer in other.model.named_modules():
            if name.endswith("attn2.to_k"):
                wide = torch.cat([layer.weight, layer.weight], 1)
                layer.weight = torch.nn.Parameter(wide, requires_grad=False)
        return (other,)


NODES = {
    "TestCapture": Capture,
    "TestPhoto": Photo,
    "TestFaces": Faces,
    "TestOldFaces": OldFaces,
    "TestNoFaces": NoFaces,
    "TestPlacedFaces": PlacedFaces,
    "TestPerson": Person,
    "TestRectangle": Rectangle,
    "TestWrongVae": WrongVae,
    "TestOtherModel": OtherModel,
}
