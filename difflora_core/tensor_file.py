"""Tensors by key: a safetensors file that is read tensor by tensor, or a mapping in memory.

The header of a file is checked whole before anything is believed of it, so that no lie in it can
make a reader reserve memory or read past the end. Nothing is mapped: pages of a mapping stay
charged to the process, and a file that shrinks under a mapping kills it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import torch
from torch import Tensor

from .errors import BadWeightsFile

MAX_HEADER = 100_000_000
"""bytes; the limit of the format's own library"""
MAX_SIZE = 2**48
"""of all dimensions together, empty ones left out; more is a lie that torch cannot describe"""
MAX_DIMENSIONS = 16
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""number types by their name in a header"""


class TensorSource(Protocol):
    """Tensors by key whose shapes and types are known without reading them."""

    def __iter__(self) -> Iterator[str]: ...
    def __len__(self) -> int: ...
    def __contains__(self, key: object) -> bool: ...
    def shape(self, key: str) -> tuple[int, ...]: ...
    def dtype(self, key: str) -> torch.dtype: ...
    def tensor(self, key: str) -> Tensor: ...


class TensorsInMemory:
    """A mapping of tensors as a TensorSource."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, key: object) -> bool:
        return key in self._tensors

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._tensors[key].shape)

    def dtype(self, key: str) -> torch.dtype:
        return self._tensors[key].dtype

    def tensor(self, key: str) -> Tensor:
        return self._tensors[key]


def is_finite(tensor: Tensor) -> bool:
    """Whether no number of `tensor` is NaN or infinite.

    Either passes through a sum, the fastest question of all; only where large numbers add up to
    infinity are the extremes asked, through which NaN passes, too. `torch.isfinite` of every number
    takes ten times as long, and memory.
    """
    if not tensor.numel() or not tensor.is_floating_point():
        return True
    wide = tensor if tensor.dtype.itemsize > 1 else tensor.to(torch.float16)
    return math.isfinite(wide.sum().item()) or all(map(math.isfinite, _extremes(wide)))


def _extremes(tensor: Tensor) -> tuple[float, ...]:
    return tuple(extreme.item() for extreme in torch.aminmax(tensor))


@dataclass(frozen=True, slots=True)
class _Entry:
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class TensorFile:
    """A safetensors file (LoRA or checkpoint): header at once, each tensor when asked for.

    `metadata` holds the header fields. Raises BadWeightsFile, saying what is wrong, for anything
    but an intact file, and later when the file has changed under the reader.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        content, offset, state = _read_header(self.path)
        self.metadata = _checked_metadata(self.path, content.pop("__metadata__", {}))
        self._entries = _checked_entries(self.path, content, state[0] - offset)
        self._offset = offset
        self._state = state

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def shape(self, key: str) -> tuple[int, ...]:
        return self._entries[key].shape

    def dtype(self, key: str) -> torch.dtype:
        return self._entries[key].dtype

    def weights_hash(self) -> str:
        """SHA-256 of all bytes after the header, as modelspec defines it: `0x...`."""
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            file.seek(self._offset)
            while block := file.read(1 << 20):
                digest.update(block)
        return "0x" + digest.hexdigest()

    def tensor(self, key: str) -> Tensor:
        """Read one tensor, on the CPU, as it is stored."""
        entry = self._entries[key]
        content = torch.empty(entry.end - entry.start, dtype=torch.uint8)
        try:
            with self.path.open("rb", buffering=0) as file:
                self._refuse_changed(file)
                file.seek(self._offset + entry.start)
                _fill(file, content.numpy().data)
        except OSError as error:
            reason = error.strerror or str(error)
            raise BadWeightsFile(f"{self.path.name} cannot be read: {reason}.") from error
        return content.view(entry.dtype).view(entry.shape)

    def _refuse_changed(self, file: IO[bytes]) -> None:
        if _state(file) != self._state:
            raise BadWeightsFile(
                f"{self.path.name} has changed since it was opened.", hint="Open it again."
            )


def _fill(file: IO[bytes], content: memoryview) -> None:
    """Read until `content` is full: one read may stop early, at 2 GB at the latest."""
    while len(content):
        count = file.readinto(content)  # type: ignore[attr-defined]
        if not count:
            raise OSError("it ends too early")
        content = content[count:]


def _state(file: IO[bytes]) -> tuple[int, int]:
    """Size in bytes and time of the last change."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _read_header(path: Path) -> tuple[dict, int, tuple[int, int]]:
    """The header as JSON, where the weights begin, and the state of the file."""
    if not os.path.isfile(path):  # unlike Path.is_file, false for a name that no disk can hold
        kind = "is a folder, not a file" if os.path.isdir(path) else "does not exist"
        raise BadWeightsFile(f"{path} {kind}.")
    try:
        with path.open("rb") as file:
            state = _state(file)
            length = int.from_bytes(file.read(8), "little")
            if state[0] < 10 or length > min(MAX_HEADER, state[0] - 8):
                raise BadWeightsFile(
                    f"{path.name} is no safetensors file.", hint=_what(file, state[0])
                )
            content = _parsed(file.read(length))
    except OSError as error:
        raise BadWeightsFile(
            f"{path.name} could not be read: {error.strerror or error}.",
            hint="Check the rights of the file, and the disk.",
        ) from error
    except (ValueError, RecursionError) as error:
        raise _broken(path, str(error)) from error
    if not isinstance(content, dict):
        raise _broken(path, "it is no object")
    return content, 8 + length, state


def _broken(path: Path, reason: str) -> BadWeightsFile:
    return BadWeightsFile(
        f"{path.name} has a broken header: {reason}.", hint="Get the file again, or save it again."
    )


def _what(file: IO[bytes], size: int) -> str:
    """What a file looks like that is no safetensors file."""
    file.seek(0)
    start = file.read(200).lstrip()
    if size == 0:
        return "It is empty."
    if start.startswith(b"version https://git-lfs"):
        return "It is a Git LFS pointer; download the file itself."
    if start[:1] == b"<":
        return "It is a web page; the download needs a login or another address."
    if start.startswith((b"PK", b"\x80")):
        return "It is a pickle (.ckpt, .pt), which can run code; convert it to safetensors."
    return "Its header does not fit its size: the download is incomplete, or it is another format."


def _parsed(header: bytes) -> object:
    """Raises ValueError for what is no JSON, repeats a key, or spells what is no text.

    A key that is there twice is lost in reading; written again, its quotes are missing. The rest is
    only looked for where it can be: a spelled-out character may be a quote, or half of one.
    """
    text = header.decode()  # UTF-8, as the format has it: json would guess at other encodings
    if "\\u" in text:
        return json.loads(text, object_pairs_hook=_without_doubles)
    content = json.loads(text)
    if text.count('"') != json.dumps(content, ensure_ascii=False).count('"'):
        raise ValueError("a key is there twice")
    return content


def _without_doubles(pairs: list[tuple[str, object]]) -> dict[str, object]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key is there twice")
    for text in (*content, *content.values()):
        if isinstance(text, str):
            text.encode()  # a lone surrogate, which JSON can spell, is no text
    return content


def _checked_metadata(path: Path, fields: object) -> dict[str, str]:
    if not isinstance(fields, dict) or not all(isinstance(v, str) for v in fields.values()):
        raise _broken(path, "its fields are no strings")
    return fields


def _checked_entries(path: Path, content: Mapping[str, object], size: int) -> dict[str, _Entry]:
    """Entries by key. They have to fill all `size` bytes of weights, without gap or overlap."""
    entries = {key: _checked_entry(path, key, entry) for key, entry in content.items()}
    needed = max((entry.end for entry in entries.values()), default=0)
    if size < needed:
        raise BadWeightsFile(
            f"{path.name} is truncated: {size} of {needed} bytes of weights are there.",
            hint="The download or copy is incomplete; get it again.",
        )
    end = 0
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != end:
            raise _broken(path, f"{key} begins at byte {entry.start}, expected {end}")
        end = entry.end
    if size > end:
        raise _broken(path, f"{size - end} bytes at the end belong to no tensor")
    return entries


def _checked_entry(path: Path, key: str, entry: object) -> _Entry:
    fields = entry if isinstance(entry, dict) else {}
    shape, offsets = _sizes(fields.get("shape")), _sizes(fields.get("data_offsets"))
    if shape is None or offsets is None or len(offsets) != 2:
        raise _broken(path, f"{key!r} has no proper shape and place")
    if not key.isprintable():  # it would break the sentences that name it
        raise _broken(path, f"{key!r} is no name")
    dtype = DTYPES.get(str(fields.get("dtype")))
    if dtype is None:
        raise BadWeightsFile(
            f"{path.name} cannot be read: {key} has the number type {fields.get('dtype')!r}.",
            hint=f"Known are {', '.join(DTYPES)}.",
        )
    count = math.prod(shape)
    if (count or math.prod(filter(None, shape))) > MAX_SIZE:
        raise _broken(path, f"{key} cannot have the shape {shape}")
    size = count * dtype.itemsize
    if offsets[1] - offsets[0] != size:
        raise _broken(path, f"{key} {shape} needs {size} bytes, but has {offsets[1] - offsets[0]}")
    return _Entry(dtype, tuple(shape), offsets[0], offsets[1])


def _sizes(values: object) -> list[int] | None:
    """`values` if it is a list of sizes."""
    if not isinstance(values, list) or len(values) > MAX_DIMENSIONS:
        return None
    return values if {*map(type, values)} <= {int} and min(values, default=0) >= 0 else None
