"""Reading and writing LoRA files and weights of our own: safetensors, never pickle."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import BadConfig, BadWeightsFile
from .header import (
    HASH_FIELDS,
    LoraHeader,
    base_fields,
    base_named_in,
    network_fields,
    of_a_copy,
)
from .key_names import detect_base
from .lora import Lora
from .lora_reading import LoraReading, read_lora_source, read_lora_tensors, take_layers
from .lora_writing import finite_tensors, outlines_of, tensors_of
from .tensor_file import TensorFile, TensorSource
from .tensor_writing import Header, write_safetensors, write_tensors

__all__ = [
    "TensorFile",
    "expecting",
    "header_json",
    "lora_from_state_dict",
    "lora_to_kohya",
    "open_lora",
    "read_lora",
    "read_safetensors",
    "write_lora",
    "write_safetensors",
]
log = logging.getLogger(__name__)
#: what comes up where a header describes a network of another kind, or one that cannot be built
_MISFITS = (
    ArithmeticError, AssertionError, AttributeError, BadConfig, LookupError, RuntimeError,
    TypeError, ValueError,
)  # fmt: skip


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (on the CPU) and header of a file. Raises BadWeightsFile, saying what is wrong."""
    file = TensorFile(path)
    return {key: file.tensor(key) for key in file}, file.metadata


def header_json(path: str | Path, header: Mapping[str, str], key: str, default: str = "") -> Any:
    """What a header keeps as JSON under `key`. Raises BadWeightsFile where it is damaged."""
    try:
        return json.loads(header.get(key, default))
    except (RecursionError, ValueError) as error:
        raise BadWeightsFile(
            f"The header of {Path(path).name} is damaged: its {key} breaks off or is no JSON.",
            hint="Get the file again from where it came from.",
        ) from error


@contextmanager
def expecting(path: str | Path, what: str, hint: str) -> Iterator[None]:
    """Around building `what` from a file's header. Raises BadWeightsFile where it is no such."""
    try:
        yield
    except _MISFITS as error:
        told = error.message if isinstance(error, BadConfig) else str(error)
        reason = (told.splitlines() or [type(error).__name__])[-1].strip().rstrip(".")
        message = f"{Path(path).name} is not {what}: {reason}."
        raise BadWeightsFile(message, hint=hint) from error


def open_lora(path: str | Path, *, lazy: bool = False, any_model: bool = False) -> LoraReading:
    """A LoRA file with its layout, base and warnings. Raises BadWeightsFile or BadLoraFile.

    `lazy` leaves the weights in the file until a layer is asked for (the file has to stay as it
    is); `any_model` takes LoRAs of models without a module table, too.
    """
    file = TensorFile(path)
    config = adapter_config(file.path, file)
    reading = read_lora_source(file, file.metadata, config, any_model=any_model)
    return reading if lazy else take_layers(reading)


def identified(lora: Lora, path: str | Path) -> Lora:
    """A LoRA with a hash of its file's weights among the header fields, worked out if need be."""
    if any(lora.metadata.get(field) for field in HASH_FIELDS):
        return lora
    found = {HASH_FIELDS[0]: TensorFile(path).weights_hash()}
    return replace(lora, metadata={**lora.metadata, **found})


def read_lora(path: str | Path, *, any_model: bool = False) -> Lora:
    """A LoRA file; what `open_lora` warns of is logged."""
    return _logged(open_lora(path, any_model=any_model), Path(path).name)


def lora_from_state_dict(
    tensors: Mapping[str, Tensor], metadata: Header | None = None, *, any_model: bool = False
) -> Lora:
    """A LoRA from tensors that are already in memory, in any spelling that files have."""
    return _logged(read_lora_tensors(tensors, metadata, any_model=any_model), "LoRA")


def lora_to_kohya(lora: Lora, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """kohya's keys: `.lora_down.weight`, `.lora_up.weight`, `.alpha` (float32) per layer.

    Also the value that travels on ComfyUI's LORA_MODEL socket. `dtype` None keeps the factors' own.
    LoRAs of models without a module table keep the spelling of their file, see `Naming`.
    """
    return dict(tensors_of(lora, dtype))


def write_lora(
    lora: Lora,
    path: str | Path,
    header: LoraHeader | Header,
    overwrite: bool = False,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write kohya's keys with a header, a hash of the weights included. Raises BadWeightsFile.

    What the header says of ranks, alphas and hashes is worked out anew, the base model is named
    where it names none, and fields with a path or a photo are left out. Layers are asked for one by
    one and let go once they are written.
    """
    fields = header.to_dict() if isinstance(header, LoraHeader) else dict(header)
    base = {} if base_named_in(fields) else base_fields(detect_base(lora))
    outline = lora.outline.values()
    network = network_fields([one.rank for one in outline], [one.alpha for one in outline])
    write_tensors(
        path,
        outlines_of(lora, dtype),
        finite_tensors(lora, dtype),
        base | of_a_copy(fields) | network,
        overwrite,
        hash_field="modelspec.hash_sha256",
    )


def peft_config(path: Path) -> Path:
    """Where PEFT keeps the configuration of a file."""
    return path.with_name("adapter_config.json")


def adapter_config(path: Path, tensors: TensorSource) -> dict | None:
    """PEFT's configuration beside its file: the only place where it keeps alpha."""
    beside = peft_config(path)
    if not beside.is_file() or not any(key.startswith("base_model.model.") for key in tensors):
        return None
    try:
        config = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadWeightsFile(f"{beside} cannot be read: {error}.") from error
    return config if isinstance(config, dict) else None


def _logged(reading: LoraReading, name: str) -> Lora:
    for warning in reading.warnings:
        log.warning("%s: %s", name, warning)
    return reading.lora
