"""Keys of checkpoints <-> canonical parameter names (`unet....to_q.weight`, ...).

Known namings: original single files (ldm, sgm) with the text encoders that they carry, diffusers'
U-Nets, transformers' CLIP text models with and without their `text_model` level, and OpenCLIP's
text tower, which keeps query, key and value in one tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from .key_names import module_table

TEXT_COMPONENTS = ("text_encoder", "text_encoder_2")
_UNET_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "unet.", "")
_TEXT_PREFIXES = {
    "cond_stage_model.transformer.": "text_encoder",
    "cond_stage_model.model.": "text_encoder",
    "conditioner.embedders.0.transformer.": "text_encoder",
    "conditioner.embedders.0.model.": "text_encoder",
    "conditioner.embedders.1.model.": "text_encoder_2",
}
# OpenCLIP's names inside one block, and outside the blocks, to transformers'.
_OPEN_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+?)\.?(weight|bias|in_proj_\w+)")
_OPEN_INNER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_OPEN_OUTER = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection.weight": "text_projection.weight",
}


@dataclass(frozen=True)
class Slot:
    """Where one parameter lies in a file: a tensor, a third of one, or one on its side."""

    key: str
    third: int | None = None
    """0, 1, 2: query, key, value of a fused projection, stacked along the first axis"""
    transposed: bool = False

    def fits(self, stored: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape can hold the parameter at all."""
        if self.third is not None:
            return len(stored) > 0 and stored[0] % 3 == 0
        return len(stored) == 2 or not self.transposed

    def view(self, tensor: Tensor) -> Tensor:
        """The parameter as a view into the tensor of the file, so that writing to it works too."""
        if self.third is not None:
            tensor = tensor.chunk(3)[self.third]
        return tensor.T if self.transposed else tensor

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the parameter, from the shape of the tensor in the file."""
        if self.third is not None:
            stored = (stored[0] // 3, *stored[1:])
        return stored[::-1] if self.transposed else stored


@cache
def unet_modules(base: str) -> dict[str, str]:
    """Module names of the U-Net of `base`, original and diffusers', norms too -> canonical."""
    modules = {}
    for canonical, original in module_table(base).originals.items():
        modules[canonical.removeprefix("unet.")] = modules[original] = canonical
    return modules


def parameters(key: str, base: str, component: str | None = None) -> Iterator[tuple[str, Slot]]:
    """Canonical parameters that a key of a checkpoint of `base` holds: none, one or three.

    `component` is told by folders of diffusers and files of one model; None: the key tells it.
    """
    if component in TEXT_COMPONENTS:
        yield from _text_parameters(key, component, key)
        return
    for prefix, named in _TEXT_PREFIXES.items():
        if key.startswith(prefix):
            yield from _text_parameters(key, named, key[len(prefix) :])
            return
    prefix = next(p for p in _UNET_PREFIXES if key.startswith(p))
    module, _, role = key[len(prefix) :].rpartition(".")
    canonical = unet_modules(base).get(module)
    if canonical and role in ("weight", "bias"):
        yield f"{canonical}.{role}", Slot(key)


def _text_parameters(key: str, component: str, path: str) -> Iterator[tuple[str, Slot]]:
    found = _OPEN_BLOCK.fullmatch(path)
    if path == "text_projection":
        yield f"{component}.text_projection.weight", Slot(key, transposed=True)
    elif path in _OPEN_OUTER:
        yield f"{component}.{_OPEN_OUTER[path]}", Slot(key)
    elif found:
        yield from _block_parameters(key, f"{component}.text_model.encoder.layers.", found)
    elif path.endswith((".weight", ".bias")) and not path.startswith("transformer."):
        yield f"{component}.text_model.{path.removeprefix('text_model.')}", Slot(key)


def _block_parameters(key: str, layers: str, found: re.Match) -> Iterator[tuple[str, Slot]]:
    number, inner, role = found.groups()
    if role.startswith("in_proj_"):
        role = role.removeprefix("in_proj_")
        for third, letter in enumerate("qkv"):
            yield f"{layers}{number}.self_attn.{letter}_proj.{role}", Slot(key, third)
    elif inner in _OPEN_INNER:
        yield f"{layers}{number}.{_OPEN_INNER[inner]}.{role}", Slot(key)
