"""Reading and writing safetensors: LoRA files and weights of our own. Never pickle.

Files are written to a temporary neighbour and renamed, so a name never stands for half a file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import BadWeightsFile
from .header import LoraHeader, network_fields
from .key_names import detect_base, kohya_name
from .lora import Lora
from .lora_reading import LoraReading, read_lora_tensors

log = logging.getLogger(__name__)

Header = Mapping[str, str]
MAX_HEADER = 100_000_000
"""bytes; the limit of the format's own library"""


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (on the CPU) and header of a file. Raises BadWeightsFile, saying what is wrong."""
    path = Path(path)
    check_safetensors(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, OSError, AttributeError) as error:
        raise BadWeightsFile(f"{path.name} cannot be read: {error}.") from error


def check_safetensors(path: Path) -> None:
    """Look at first bytes and header. Raises BadWeightsFile for anything but safetensors."""
    if not path.is_file():
        kind = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise BadWeightsFile(f"{path} {kind}.")
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 10 or length > min(MAX_HEADER, size - 8):
                file.seek(0)
                raise BadWeightsFile(f"{path.name} is no safetensors file.", hint=_what(file, size))
            header = json.loads(file.read(length), object_pairs_hook=_without_doubles)
    except (ValueError, OSError) as error:
        raise BadWeightsFile(f"{path.name} has a broken header: {error}.") from error
    _check_size(path, header, size - 8 - length)


def write_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Header, overwrite: bool = False
) -> None:
    """Write a file, all of it or nothing; missing folders are made.

    Raises BadWeightsFile when the file exists and `overwrite` is off, when its name does not end in
    .safetensors, and when the disk refuses it.
    """
    _write(Path(path), _serialise(tensors, metadata), overwrite)


def open_lora(path: str | Path) -> LoraReading:
    """A LoRA file with its layout, base and warnings. Raises BadWeightsFile or BadLoraFile."""
    path = Path(path)
    tensors, metadata = read_safetensors(path)
    return read_lora_tensors(tensors, metadata, _adapter_config(path, tensors))


def read_lora(path: str | Path) -> Lora:
    """A LoRA file; what `open_lora` warns of is logged."""
    return _logged(open_lora(path), Path(path).name)


def lora_from_state_dict(tensors: Mapping[str, Tensor], metadata: Header | None = None) -> Lora:
    """A LoRA from tensors that are already in memory, in any spelling that files have."""
    return _logged(read_lora_tensors(tensors, metadata), "LoRA")


def lora_to_kohya(lora: Lora, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """kohya's keys: `.lora_down.weight`, `.lora_up.weight`, `.alpha` (float32) per layer.

    Also the value that travels on ComfyUI's LORA_MODEL socket. `dtype` None keeps the factors' own.
    """
    base = detect_base(lora)
    tensors: dict[str, Tensor] = {}
    for layer in lora:
        name, up, alpha = kohya_name(layer.name, base), layer.up, layer.alpha
        if alpha <= 0:  # programs disagree on such alphas, so the scale goes into the factor
            up, alpha = up * layer.scale, float(layer.rank)
        tensors[f"{name}.lora_down.weight"] = layer.down.to(dtype or layer.down.dtype).contiguous()
        tensors[f"{name}.lora_up.weight"] = up.to(dtype or up.dtype).contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
    return tensors


def write_lora(
    lora: Lora,
    path: str | Path,
    header: LoraHeader | Header,
    overwrite: bool = False,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write kohya's keys with a header, a hash of the weights included. Raises BadWeightsFile."""
    tensors = {key: tensor.cpu() for key, tensor in lora_to_kohya(lora, dtype).items()}
    broken = [key for key, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise BadWeightsFile(
            f"{broken[0]} is not finite in {str(dtype).removeprefix('torch.')}.",
            hint="Values too big for 16 bits can be saved as float32."
            if dtype.itemsize < 4
            else "",
        )
    fields = header.to_dict() if isinstance(header, LoraHeader) else dict(header)
    network = network_fields(list(lora.ranks.values()), [layer.alpha for layer in lora])
    content = _serialise(tensors, network | fields, hash_field="modelspec.hash_sha256")
    _write(Path(path), content, overwrite)


def _logged(reading: LoraReading, name: str) -> Lora:
    for warning in reading.warnings:
        log.warning("%s: %s", name, warning)
    return reading.lora


def _adapter_config(path: Path, tensors: Mapping[str, Tensor]) -> dict | None:
    """PEFT's configuration beside its file: the only place where it keeps alpha."""
    beside = path.with_name("adapter_config.json")
    if not beside.is_file() or not any(key.startswith("base_model.model.") for key in tensors):
        return None
    try:
        config = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadWeightsFile(f"{beside} cannot be read: {error}.") from error
    return config if isinstance(config, dict) else None


def _what(file: IO[bytes], size: int) -> str:
    """What a file looks like that is no safetensors file."""
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


def _without_doubles(pairs: list[tuple[str, object]]) -> dict[str, object]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key is there twice")
    return content


def _check_size(path: Path, header: object, available: int) -> None:
    if not isinstance(header, dict):
        raise BadWeightsFile(f"{path.name} has a broken header: it is no object.")
    try:
        entries = [entry for name, entry in header.items() if name != "__metadata__"]
        needed = max((int(entry["data_offsets"][1]) for entry in entries), default=0)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise BadWeightsFile(f"{path.name} has a broken header: {error!r}.") from error
    if available < needed:
        raise BadWeightsFile(
            f"{path.name} is truncated: {available} of {needed} bytes of weights are there.",
            hint="The download or copy is incomplete; get it again.",
        )


def _serialise(
    tensors: Mapping[str, Tensor], metadata: Header, hash_field: str | None = None
) -> tuple[bytes, memoryview]:
    """Header and weights of a file; `hash_field` is set to the hash of the weights."""
    content = memoryview(safetensors.torch.save(dict(tensors)))
    length = int.from_bytes(content[:8], "little")
    header, weights = json.loads(bytes(content[8 : 8 + length])), content[8 + length :]
    fields = {str(name): str(value) for name, value in metadata.items()}
    if hash_field:
        fields[hash_field] = "0x" + hashlib.sha256(weights).hexdigest()
    text = json.dumps({"__metadata__": fields, **header}, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, weights


def _write(path: Path, content: tuple[bytes, memoryview], overwrite: bool) -> None:
    if path.suffix != ".safetensors":
        raise BadWeightsFile(f"{path.name} must end in .safetensors.")
    _refuse_existing(path, overwrite)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            for piece in content:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        _refuse_existing(path, overwrite)
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise BadWeightsFile(
            f"{path.name} could not be written: {reason}.",
            hint="Nothing was left behind. Check the free space and the rights of the folder.",
        ) from error
    finally:
        with contextlib.suppress(OSError):  # renamed away, or the folder is none
            temporary.unlink()


def _refuse_existing(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise BadWeightsFile(
            f"{path} exists already.", hint="Choose another name, or ask for it to be overwritten."
        )
