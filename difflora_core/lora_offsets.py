"""Differences of parameters that are no matrices: biases, and weights of norms."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .errors import BadLoraFile
from .key_names import ModuleTable
from .lora_families import OFFSET_ROLES
from .lora_groups import Group
from .lora_plans import read_parts
from .tensor_file import TensorSource

_SPARSE = ("bias_indices", "bias_values", "bias_size")


def is_norm(group: Group) -> bool:
    """Whether a layer's parts are those of a norm: differences of vectors."""
    return "w_norm" in group.keys or len(group.shapes.get("diff", (0, 0))) == 1


def read_offsets(
    name: str, group: Group, scale: float, table: ModuleTable | None, source: TensorSource
) -> dict[str, Tensor]:
    """Differences of the bias and of a norm's weight of the layer `name`, by parameter name.

    PEFT scales the bias of its second matrix as the matrix; all others are stored as they are.
    Raises BadLoraFile where the model has no such parameter, or the shape is another one.
    """
    roles = [*OFFSET_ROLES, *(["diff"] if is_norm(group) else [])]
    keys = {role: key for role, key in group.keys.items() if role in roles}
    if not keys:
        return {}
    parts = read_parts({r: k for r, k in keys.items() if r not in _SPARSE}, source)
    if any(role in keys for role in _SPARSE):
        parts["bias"] = _sparse_bias(name, keys, source)
    offsets: dict[str, Tensor] = {}
    for role, tensor in parts.items():
        kind = "weight" if role in ("w_norm", "diff") else "bias"
        _refuse_misfit(f"{name}.{kind}", keys.get(role, ""), tuple(tensor.shape), table)
        tensor = tensor * scale if role == "bias" else tensor
        before = offsets.get(f"{name}.{kind}")
        offsets[f"{name}.{kind}"] = tensor if before is None else before + tensor
    return offsets


def _refuse_misfit(
    parameter: str, key: str, shape: tuple[int, ...], table: ModuleTable | None
) -> None:
    if table is None:
        return
    name, _, kind = parameter.rpartition(".")
    expected = table.module_shape(name) if kind == "weight" else table.bias_shape(name)
    if expected is None:
        raise BadLoraFile(
            f"{key} changes a bias, but {name} has none.",
            hint="PEFT cannot merge such a LoRA either; train it without lora_bias.",
        )
    if shape != expected:
        raise BadLoraFile(
            f"{key} has the wrong shape: {list(shape)}.",
            hint=f"{parameter} has the shape {list(expected)} in the {table.base} model.",
        )


def _sparse_bias(name: str, keys: Mapping[str, str], source: TensorSource) -> Tensor:
    """The bias of old extractions of LyCORIS: indices [1, n], values [n], size [1]."""
    if any(role not in keys for role in _SPARSE):
        found = next(key for role, key in keys.items() if role in _SPARSE)
        raise BadLoraFile(f"The sparse bias of {name} is incomplete: {found} is there.")
    shape = source.shape(keys["bias_size"])
    if shape != (1,):
        raise BadLoraFile(
            f"{keys['bias_size']} corrects the whole weight of {name}, which is not supported.",
            hint="Such a correction has no low rank; extract the LoRA again without it.",
        )
    values = read_parts({"bias_values": keys["bias_values"]}, source)["bias_values"]
    indices = source.tensor(keys["bias_indices"]).flatten()
    size = int(source.tensor(keys["bias_size"]))
    inside = bool(((indices >= 0) & (indices < size)).all())
    if indices.shape != values.shape or indices.is_floating_point() or not inside:
        raise BadLoraFile(f"The sparse bias of {name} does not fit its size of {size}.")
    if size > 2**20:
        raise BadLoraFile(f"The sparse bias of {name} claims {size} values.")
    return torch.zeros(size, dtype=values.dtype).index_put_((indices.long(),), values)
