"""Values of LORA_MODEL sockets, ours or core's, as LoRAs of the core; never changed in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..difflora_core.errors import BadLoraFile, DiffLoRAError
from ..difflora_core.lora import Lora
from ..difflora_core.merge_options import distinct
from ..difflora_core.weights_file import lora_from_state_dict

PRECISIONS = {"fp16": torch.float16, "fp32": torch.float32, "bf16": torch.bfloat16}
"""choices of a widget"""
_TITLES = ("modelspec.title", "ss_output_name")


def opened(values: Sequence[Mapping[str, Tensor]]) -> list[Lora]:
    """LoRAs of any base model. Errors: BadLoraFile that says which of the sockets it was."""
    if not values:
        raise BadLoraFile("No LoRA is connected.", hint="Connect one to lora_1.")
    names = [f"LoRA {number}: " for number in range(1, len(values) + 1)]
    return [_opened(*pair) for pair in zip(values, names if len(names) > 1 else [""], strict=True)]


def _opened(value: Mapping[str, Tensor], name: str) -> Lora:
    # core's trainer gives trainable ones, on the GPU
    weights = {key: tensor.detach().cpu() for key, tensor in value.items()}
    try:
        return lora_from_state_dict(weights, getattr(value, "metadata", {}), any_model=True)
    except DiffLoRAError as error:
        raise type(error)(name + error.message, hint=error.hint) from error


def titles(loras: Sequence[Lora]) -> list[str]:
    """What reports and pictures call the LoRAs: their headers' titles, else their numbers."""
    found = []
    for number, lora in enumerate(loras, start=1):
        named = (lora.metadata.get(field, "") for field in _TITLES)
        found.append(next(filter(None, named), f"LoRA {number}"))
    return distinct(found)


def with_size(report: Mapping[str, Any], value: Mapping[str, Tensor]) -> dict[str, Any]:
    """A report with the bytes that the weights of a LORA_MODEL take."""
    return {**report, "bytes": sum(tensor.nbytes for tensor in value.values())}
