"""Writing safetensors tensor by tensor: no second copy of a file in memory, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, NamedTuple

import torch
from torch import Tensor

from .errors import BadWeightsFile
from .tensor_file import DTYPES
from .whole_file import refusals, whole_file

Header = Mapping[str, str]
ALIGNMENT = 8
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_NO_HASH = "0x" + "0" * 64


class TensorOutline(NamedTuple):
    """What a header has to say of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """bytes"""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def write_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Header, overwrite: bool = False
) -> None:
    """Write a file, all of it or nothing; missing folders are made.

    Raises BadWeightsFile when the file exists and `overwrite` is off, when its name does not end in
    .safetensors, and when the disk refuses it.
    """
    outlines = {key: TensorOutline(t.dtype, tuple(t.shape)) for key, t in tensors.items()}
    ordered = in_order(outlines)
    write_tensors(path, outlines, ((key, tensors[key]) for key in ordered), metadata, overwrite)


def in_order(outlines: Mapping[str, TensorOutline]) -> list[str]:
    """Keys in the order of a file: large numbers first, so that every tensor is aligned."""
    return sorted(outlines, key=lambda key: -outlines[key].dtype.itemsize)


def write_tensors(
    path: str | Path,
    outlines: Mapping[str, TensorOutline],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Header,
    overwrite: bool = False,
    hash_field: str | None = None,
) -> None:
    """As `write_safetensors`, of tensors that are made one by one, in the order of `in_order`.

    Each is written and let go before the next is asked for, so a file of any size needs the memory
    of its largest tensor. `hash_field` is set to the SHA-256 of all weights. What `tensors` raises
    passes through, and nothing is left behind. Raises ValueError when they do not agree with
    `outlines`.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise BadWeightsFile(f"{path.name} must end in .safetensors.")
    if "\0" in str(path):
        raise BadWeightsFile(f"{path.name!r} is no file name.", hint="Choose another name.")
    _refuse_existing(path, overwrite)
    fields = {_utf8(str(name)): _utf8(str(value)) for name, value in metadata.items()}
    with refusals(path, BadWeightsFile), whole_file(path) as file:
        fields |= {hash_field: _NO_HASH} if hash_field else {}
        file.write(_header(outlines, fields))
        digest = _write_weights(file, outlines, tensors)
        if hash_field:  # as long as the zeros in its place, so nothing moves
            file.seek(0)
            file.write(_header(outlines, fields | {hash_field: f"0x{digest}"}))
        _refuse_existing(path, overwrite)


def _utf8(text: str) -> str:
    """What a header can hold: a name of a file that is no UTF-8 has parts that it cannot."""
    return text.encode(errors="replace").decode()


def _header(outlines: Mapping[str, TensorOutline], fields: Header) -> bytes:
    """Length and JSON, padded so that the weights begin at a multiple of 8 bytes."""
    header: dict[str, object] = {"__metadata__": fields}
    end = 0
    for key in in_order(outlines):
        dtype, shape = outlines[key]
        start, end = end, end + outlines[key].size
        header[key] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _write_weights(
    file: IO[bytes],
    outlines: Mapping[str, TensorOutline],
    tensors: Iterable[tuple[str, Tensor]],
) -> str:
    """Write all tensors; the SHA-256 of what was written, as hexadecimal digits."""
    digest = hashlib.sha256()
    order = iter(in_order(outlines))
    for key, tensor in tensors:
        if next(order, None) != key or (tensor.dtype, tuple(tensor.shape)) != outlines[key]:
            raise ValueError(f"{key} is not what was announced")
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        file.write(content)
        digest.update(content)
    if (missing := next(order, None)) is not None:
        raise ValueError(f"{missing} was announced, but not given")
    return digest.hexdigest()


def _refuse_existing(path: Path, overwrite: bool) -> None:
    if os.path.exists(path) and not overwrite:  # unlike Path.exists, takes a name of any length
        raise BadWeightsFile(
            f"{path} exists already.", hint="Choose another name, or ask for it to be overwritten."
        )
