"""A LoRA as the tensors of a file: kohya's keys, or those of the model that it is for."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .errors import BadWeightsFile
from .key_names import detect_base, kohya_name
from .lora import LayerOutline, Lora, LoraLayer
from .tensor_file import is_finite
from .tensor_writing import TensorOutline

_SUFFIXES = {
    "kohya": ("lora_down.weight", "lora_up.weight"),
    "diffusers": ("lora.down.weight", "lora.up.weight"),
    "peft": ("lora_A.weight", "lora_B.weight"),
    "xlabs": ("down.weight", "up.weight"),
}


class Spelling:
    """The keys of one LoRA: its layers as kohya's trainer names them, or as its own file did."""

    def __init__(self, lora: Lora) -> None:
        self._naming = lora.naming
        self._base = detect_base(lora)
        self.down, self.up = _SUFFIXES[lora.naming.suffix if lora.naming else "kohya"]
        self._norms = {n.removesuffix(".weight") for n in lora.offsets if n.endswith(".weight")}

    def module(self, name: str) -> str:
        return name if self._naming else kohya_name(name, self._base)

    def offset(self, parameter: str) -> str:
        """Key of a bias or of a norm's weight; core loads a `b_norm` only beside its `w_norm`."""
        name, _, kind = parameter.rpartition(".")
        if self._naming:
            return f"{name}.{'diff' if kind == 'weight' else 'diff_b'}"
        suffix = "w_norm" if kind == "weight" else "b_norm" if name in self._norms else "diff_b"
        return f"{self.module(name)}.{suffix}"

    def folds_scale(self, layer: LoraLayer | LayerOutline) -> bool:
        """Whether the scale goes into a factor.

        Programs disagree on an alpha of 0 and below, and beside the factors of diffusers, PEFT and
        XLabs there is no alpha.
        """
        return layer.alpha <= 0 or self.down != _SUFFIXES["kohya"][0]


def tensors_of(lora: Lora, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Keys and tensors one by one: alphas, offsets, then the factors layer by layer.

    Each layer of `lora` is asked for once. `dtype` None keeps the factors' own.
    """
    spelling = Spelling(lora)
    for name, outline in lora.outline.items():
        if spelling.down == _SUFFIXES["kohya"][0]:
            alpha = outline.rank if spelling.folds_scale(outline) else outline.alpha
            yield f"{spelling.module(name)}.alpha", torch.tensor(alpha, dtype=torch.float32)
    for parameter, offset in lora.offsets.items():
        yield spelling.offset(parameter), offset.to(dtype or offset.dtype).contiguous()
    for layer in lora:
        module, up = spelling.module(layer.name), layer.up
        if spelling.folds_scale(layer) and layer.scale != 1:
            up = (up.float() * layer.scale).to(up.dtype if dtype is None else dtype)
        yield f"{module}.{spelling.down}", layer.down.to(dtype or layer.down.dtype).contiguous()
        yield f"{module}.{spelling.up}", up.to(dtype or up.dtype).contiguous()


def outlines_of(lora: Lora, dtype: torch.dtype) -> dict[str, TensorOutline]:
    """What `tensors_of` will give, without asking for a layer."""
    spelling = Spelling(lora)
    outlines = {}
    for name in lora.outline:
        if spelling.down == _SUFFIXES["kohya"][0]:
            outlines[f"{spelling.module(name)}.alpha"] = TensorOutline(torch.float32, ())
    for parameter, offset in lora.offsets.items():
        outlines[spelling.offset(parameter)] = TensorOutline(dtype, tuple(offset.shape))
    for name, outline in lora.outline.items():
        module, (out, *inner) = spelling.module(name), outline.weight_shape
        ones = (1,) * (len(inner) - 1)
        outlines[f"{module}.{spelling.down}"] = TensorOutline(dtype, (outline.rank, *inner))
        outlines[f"{module}.{spelling.up}"] = TensorOutline(dtype, (out, outline.rank, *ones))
    return outlines


def finite_tensors(lora: Lora, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """As `tensors_of`. Raises BadWeightsFile where a number does not fit into `dtype`."""
    for key, tensor in tensors_of(lora, dtype):
        if not is_finite(tensor):
            raise BadWeightsFile(
                f"{key} is not finite in {str(dtype).removeprefix('torch.')}.",
                hint="Values too big for 16 bits can be saved as fp32."
                if dtype.itemsize < 4
                else "",
            )
        yield key, tensor
