"""The files of the mini world: a text-to-image model small enough to travel with the code.

Every file is a `.safetensors` with the model's config as JSON under the header key "config".
U-Net and VAE use diffusers' names, the text encoder transformers' names; floats are stored in
half precision and opened in single precision.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import BadWeightsFile
from .weights_file import header_json, read_safetensors

MINI_FOLDER = Path(__file__).parent / "mini"
UNET, VAE, TEXT_ENCODER = "unet.safetensors", "vae.safetensors", "text_encoder.safetensors"
TOKEN_TABLE = "embeddings.token_embedding.weight"


class Part(NamedTuple):
    """One model of the mini world: float32 tensors by name, and the config to build it from."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]


def open_part(name: str, folder: Path = MINI_FOLDER) -> Part:
    """Open one file of the mini world; the token table of a text encoder comes expanded."""
    tensors, metadata = read_safetensors(folder / name)
    if "config" not in metadata:
        raise BadWeightsFile(
            f"{name} has no model config in its header, so it cannot be opened.",
            hint="Take the file that ships with DiffLoRA, or make it with `python -m training`.",
        )
    tensors = {key: _single(tensor) for key, tensor in tensors.items()}
    if "token_rows" in tensors:
        tensors = _expand_tokens(tensors)
    return Part(tensors, header_json(name, metadata, "config"))


def _single(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _expand_tokens(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replace the compact vocabulary by the whole table [tokens, width].

    `token_index` [tokens] says which of the few `token_rows` [rows, width] a token uses; all
    words outside the drawn world share one row.
    """
    rest = {key: value for key, value in tensors.items() if not key.startswith("token_")}
    table = tensors["token_rows"].index_select(0, tensors["token_index"].to(torch.int64))
    return {TOKEN_TABLE: table, **rest}
