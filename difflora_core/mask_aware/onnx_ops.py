"""The ONNX operations that face recognisers are made of, on torch tensors.

Each function takes a node's attributes and its inputs and returns the node's first output; inputs
that the file leaves out are None. Numbers that count or index (shapes, axes) stay on the CPU.
Meaning and defaults follow onnx/docs/Operators.md; every opset from 7 on is covered, so arguments
that moved from attributes to inputs over the years are looked for in both places.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .folding import affine

Attributes = Mapping[str, Any]
Operation = Callable[..., Tensor]


class Unsupported(ValueError):
    """A variant of a known operation that no face recogniser was seen to use."""


def _conv(a: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    x, pads = _padded(a, x)
    return F.conv2d(
        x, weight, bias, a.get("strides", 1), pads, a.get("dilations", 1), a.get("group", 1)
    )


def _padded(a: Attributes, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """The input and what is left to pad: rows and columns on both sides."""
    if a.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise Unsupported(f"auto_pad {a['auto_pad'].decode()}")
    top, left, bottom, right = a.get("pads", (0, 0, 0, 0))
    if (top, left) == (bottom, right):
        return x, (top, left)
    return F.pad(x, (left, right, top, bottom)), (0, 0)


def _symmetric(a: Attributes, x: Tensor) -> tuple[int, int]:
    """Padding of a pooling window, where padded zeros would change the result."""
    same, pads = _padded(a, x)
    if same is not x:
        raise Unsupported("pooling with more padding on one side")
    return pads


def _average_pool(a: Attributes, x: Tensor) -> Tensor:
    return F.avg_pool2d(
        x,
        a["kernel_shape"],
        a.get("strides", [1, 1]),
        _symmetric(a, x),
        bool(a.get("ceil_mode", 0)),
        bool(a.get("count_include_pad", 0)),
    )


def _max_pool(a: Attributes, x: Tensor) -> Tensor:
    return F.max_pool2d(
        x,
        a["kernel_shape"],
        a.get("strides", [1, 1]),
        _symmetric(a, x),
        a.get("dilations", [1, 1]),
        bool(a.get("ceil_mode", 0)),
    )


def _batch_norm(
    a: Attributes, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor
) -> Tensor:
    factor, shift = affine(mean, variance, scale, bias, a.get("epsilon", 1e-5))
    channels = (-1, *[1] * (x.ndim - 2))
    return torch.addcmul(shift.view(channels), x, factor.view(channels))


def _gemm(a: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    x = x.mT if a.get("transA", 0) else x
    product = a.get("alpha", 1.0) * (x @ (weight.mT if a.get("transB", 0) else weight))
    return product if bias is None else product + a.get("beta", 1.0) * bias


def _clip(
    a: Attributes, x: Tensor, low: Tensor | None = None, high: Tensor | None = None
) -> Tensor:
    lowest = a.get("min") if low is None else low.item()
    highest = a.get("max") if high is None else high.item()
    return x if lowest is None and highest is None else x.clamp(lowest, highest)


def _reshape(a: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    """A size of 0 keeps the size that the input has there."""
    sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(shape.tolist())]
    return x.reshape(sizes)


def _flatten(a: Attributes, x: Tensor) -> Tensor:
    axis = a.get("axis", 1)
    return x.reshape(math.prod(x.shape[:axis]), -1)


def _pad(
    a: Attributes, x: Tensor, pads: Tensor | None = None, value: Tensor | None = None
) -> Tensor:
    """Sizes are those before every axis, then those after; torch wants pairs, last axis first."""
    if a.get("mode", b"constant") != b"constant":
        raise Unsupported(f"padding by {a['mode'].decode()}")
    sizes = a["pads"] if pads is None else pads.tolist()
    pairs = reversed(list(zip(sizes[: x.ndim], sizes[x.ndim :], strict=True)))
    filler = a.get("value", 0.0) if value is None else value.item()
    return F.pad(x, [size for pair in pairs for size in pair], value=filler)


def _axes(a: Attributes, axes: Tensor | None) -> list[int]:
    return list(a.get("axes", ())) if axes is None else axes.tolist()


def _squeeze(a: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    chosen = _axes(a, axes)
    return x.squeeze(tuple(chosen)) if chosen else x.squeeze()


def _unsqueeze(a: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    chosen = _axes(a, axes)
    for axis in sorted(i % (x.ndim + len(chosen)) for i in chosen):
        x = x.unsqueeze(axis)
    return x


def _gather(a: Attributes, x: Tensor, index: Tensor) -> Tensor:
    axis = a.get("axis", 0) % x.ndim
    index = index.to(x.device) % x.shape[axis]
    picked = x.index_select(axis, index.reshape(-1))
    return picked.reshape((*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]))


def _slice(
    a: Attributes,
    x: Tensor,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    # before opset 10 limits and axes were attributes; axes may be left out: all from the first on
    first = a["starts"] if starts is None else starts.tolist()
    last = a["ends"] if ends is None else ends.tolist()
    chosen = _axes(a, axes) or range(len(first))
    if steps is not None and any(step != 1 for step in steps.tolist()):
        raise Unsupported("a slice with a step")
    for axis, start, end in zip(chosen, first, last, strict=True):
        index: list[slice] = [slice(None)] * x.ndim
        index[axis] = slice(int(start), int(end))
        x = x[tuple(index)]
    return x


def _reduction(reduce: Callable[..., Tensor]) -> Operation:
    def operation(a: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
        chosen = _axes(a, axes) or list(range(x.ndim))
        return reduce(x, dim=chosen, keepdim=bool(a.get("keepdims", 1)))

    return operation


def _cast(a: Attributes, x: Tensor) -> Tensor:
    """All arithmetic is in float32, whatever width of floats the file asks for."""
    return x.float() if a["to"] in FLOATS else x.long().cpu()


def _constant(a: Attributes) -> Tensor:
    if "value" in a:
        return a["value"]
    ((name, value),) = a.items()
    return torch.tensor(value, dtype=torch.float32 if "float" in name else torch.int64)


FLOATS = (1, 10, 11, 16)
"""float32, float16, float64, bfloat16 as TensorProto numbers them"""

OPERATIONS: Mapping[str, Operation] = {
    "Add": lambda a, x, y: x + y,
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": lambda a, *parts: torch.cat(parts, a["axis"]),
    "Constant": _constant,
    "Conv": _conv,
    "Div": lambda a, x, y: x / y if x.is_floating_point() else x // y,
    "Dropout": lambda a, x, *_: x,
    "Elu": lambda a, x: F.elu(x, a.get("alpha", 1.0)),
    "Expand": lambda a, x, shape: x * torch.ones(shape.tolist(), device=x.device, dtype=x.dtype),
    "Flatten": _flatten,
    "Gather": _gather,
    "Gemm": _gemm,
    "GlobalAveragePool": lambda a, x: x.mean((-2, -1), keepdim=True),
    "Identity": lambda a, x: x,
    "LeakyRelu": lambda a, x: F.leaky_relu(x, a.get("alpha", 0.01)),
    "MatMul": lambda a, x, y: x @ y,
    "MaxPool": _max_pool,
    "Mul": lambda a, x, y: x * y,
    "Neg": lambda a, x: -x,
    "PRelu": lambda a, x, slope: F.prelu(x, slope.flatten()),
    "Pad": _pad,
    "Pow": lambda a, x, y: x**y,
    "ReduceL2": _reduction(torch.linalg.vector_norm),
    "ReduceMean": _reduction(torch.mean),
    "ReduceSum": _reduction(torch.sum),
    "Relu": lambda a, x: x.relu(),
    "Reshape": _reshape,
    "Shape": lambda a, x: torch.tensor(x.shape[a.get("start", 0) : a.get("end")]),
    "Sigmoid": lambda a, x: x.sigmoid(),
    "Slice": _slice,
    "Sqrt": lambda a, x: x.sqrt(),
    "Squeeze": _squeeze,
    "Sub": lambda a, x, y: x - y,
    "Tanh": lambda a, x: x.tanh(),
    "Transpose": lambda a, x: x.permute(a.get("perm", tuple(reversed(range(x.ndim))))),
    "Unsqueeze": _unsqueeze,
}
