"""Each ONNX operation, alone in a file, against ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from difflora_core.mask_aware.onnx_network import RECOGNISER, read_onnx
from difflora_core.mask_aware.onnx_ops import OPERATIONS
from tests.core.face_networks import by_onnxruntime, crops, write

numbers = np.random.default_rng(0)


class Case(NamedTuple):
    """One way to use an operation on the picture [N, 3, 112, 112]."""

    kind: str
    extra: tuple[np.ndarray | None, ...] = ()
    """Further inputs; None is left out."""
    attributes: Mapping[str, Any] = MappingProxyType({})
    opset: int = 13


def floats(*shape: int) -> np.ndarray:
    return numbers.normal(size=shape).astype(np.float32)


def whole(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def single(value: float) -> np.ndarray:
    return np.array(value, np.float32)


NORM = (floats(3), floats(3), floats(3), 1 + floats(3) ** 2)
POOL: dict[str, Any] = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}
TABLE = numpy_helper.from_array(floats(3, 1, 1), "table")
CASES = [
    Case("Add", (floats(3, 1, 1),)),
    Case("AveragePool", (), POOL),
    Case("AveragePool", (), POOL | {"count_include_pad": 1, "ceil_mode": 1}),
    Case("BatchNormalization", NORM, {"epsilon": 0.1}),
    Case("BatchNormalization", NORM, {"epsilon": 0.1}, opset=9),
    Case("Cast", (), {"to": TensorProto.FLOAT}),
    Case("Clip", (single(0.2), single(0.6))),
    Case("Clip", (None, single(0.6))),
    Case("Clip", (), {"min": 0.2, "max": 0.6}, opset=9),
    Case("Concat", (), {"axis": 1}),
    Case("Conv", (floats(4, 3, 3, 3), floats(4)), {"pads": [1, 1, 1, 1], "strides": [2, 2]}),
    Case("Conv", (floats(4, 3, 3, 3),), {"pads": [0, 1, 2, 0], "dilations": [2, 1]}),
    Case("Conv", (floats(6, 1, 5, 5),), {"group": 3, "auto_pad": "VALID"}),
    Case("Div", (floats(3, 1, 1),)),
    Case("Dropout"),
    Case("Elu", (), {"alpha": 0.7}),
    Case("Expand", (whole(2, 1, 3, 112, 112),)),
    Case("Flatten"),
    Case("Flatten", (), {"axis": 3}),
    Case("Gather", (whole(2, -3),), {"axis": 1}),
    Case("Gather", (np.array(1),), {"axis": -1}),
    Case("Gemm", (floats(5, 12544), floats(5)), {"transB": 1, "alpha": 0.5, "beta": 2.0}),
    Case("GlobalAveragePool"),
    Case("Identity"),
    Case("LeakyRelu", (), {"alpha": 0.3}),
    Case("MatMul", (floats(112, 4),)),
    Case("MaxPool", (), POOL),
    Case("MaxPool", (), {"kernel_shape": [1, 1], "strides": [2, 2]}),
    Case("Mul", (floats(3, 1, 1),)),
    Case("Neg"),
    Case("PRelu", (floats(3, 1, 1),)),
    Case("PRelu", (floats(1),)),
    Case("Pad", (whole(0, 0, 1, 2, 0, 1, 3, 0), single(0.4))),
    Case("Pad", (), {"pads": [0, 0, 1, 2, 0, 1, 3, 0], "value": 0.4}, opset=9),
    Case("Pow", (single(2.5),)),
    Case("ReduceL2", (), {"axes": [1], "keepdims": 0}),
    Case("ReduceL2", (whole(1),), opset=18),
    Case("ReduceMean", (), {"axes": [2, 3]}),
    Case("ReduceMean", (whole(-1),), {"keepdims": 0}, opset=18),
    Case("ReduceSum", (whole(1, 2),)),
    Case("ReduceSum", (), {"axes": [1, 2]}, opset=9),
    Case("Relu"),
    Case("Reshape", (whole(0, -1, 56),)),
    Case("Sigmoid"),
    Case("Slice", (whole(1, -40), whole(3, 9999), whole(1, 3))),
    Case("Slice", (whole(1), whole(3), whole(2), whole(1))),
    Case("Slice", (whole(0, 8), whole(1, 40))),
    Case("Slice", (), {"axes": [1, 3], "starts": [0, 8], "ends": [2, 40]}, opset=9),
    Case("Slice", (), {"starts": [0], "ends": [1]}, opset=9),
    Case("Sqrt"),
    Case("Squeeze", (whole(0),)),
    Case("Squeeze", (), {"axes": [0]}, opset=11),
    Case("Sub", (floats(3, 1, 1),)),
    Case("Tanh"),
    Case("Transpose", (), {"perm": [0, 2, 3, 1]}),
    Case("Transpose"),
    Case("Unsqueeze", (whole(1, -1),)),
    Case("Unsqueeze", (), {"axes": [0, 2]}, opset=11),
]


def graph_of(case: Case) -> tuple[list[Any], dict[str, np.ndarray]]:
    """Nodes and constants; signs and more than one part where the operation needs them."""
    names = [None if value is None else f"c{k}" for k, value in enumerate(case.extra)]
    constants = {n: np.asarray(v) for n, v in zip(names, case.extra, strict=True) if n is not None}
    constants["half"] = single(0.5)
    signed = "data" if case.kind in ("Sqrt", "Pow") else "signed"
    nodes = [helper.make_node("Sub", ["data", "half"], ["signed"])] if signed == "signed" else []
    inputs = [signed, *(n or "" for n in names)]
    if case.kind == "Concat":
        inputs = [signed, "data"]
    if case.kind == "Gemm":
        nodes.append(helper.make_node("Reshape", [signed, "rows"], ["matrix"]))
        constants["rows"], inputs[0] = whole(3, 12544), "matrix"
    nodes.append(helper.make_node(case.kind, inputs, ["out"], **case.attributes))
    return nodes, constants


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind}-{case.opset}")
def test_agrees_with_onnxruntime(tmp_path: Path, case: Case) -> None:
    nodes, constants = graph_of(case)
    path = write(tmp_path / "one.onnx", nodes, constants, opset=case.opset)
    *_, found = read_onnx(path, RECOGNISER)(crops(1))
    expected = by_onnxruntime(path, crops(1))
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_shapes_and_constants(tmp_path: Path) -> None:
    """What exporters make of `x.view(x.size(0), -1)`, and constants of every form."""
    node = helper.make_node
    nodes = [
        node("Constant", [], ["table"], value=TABLE),
        node("Constant", [], ["axis"], value_ints=[0]),
        node("Constant", [], ["rest"], value_ints=[-1]),
        node("Constant", [], ["first"], value_int=0),
        node("Constant", [], ["scale"], value_float=0.5),
        node("Mul", ["data", "scale"], ["scaled"]),
        node("Add", ["scaled", "table"], ["shifted"]),
        node("Shape", ["shifted"], ["shape"]),
        node("Gather", ["shape", "first"], ["count"]),
        node("Unsqueeze", ["count", "axis"], ["counts"]),
        node("Concat", ["counts", "rest"], ["wanted"], axis=0),
        node("Reshape", ["shifted", "wanted"], ["out"]),
    ]
    path = write(tmp_path / "view.onnx", nodes, {}, opset=13)
    *_, found = read_onnx(path, RECOGNISER)(crops(1))
    assert torch.allclose(found, by_onnxruntime(path, crops(1)))


@pytest.mark.parametrize("part", [{"start": 0, "end": 1}, {"start": -4, "end": -3}, {"end": 1}])
def test_a_part_of_a_shape(tmp_path: Path, part: dict[str, int]) -> None:
    """As exporters write `x.size(0)` since opset 15."""
    nodes = [
        helper.make_node("Shape", ["data"], ["count"], **part),
        helper.make_node("Concat", ["count", "rest"], ["wanted"], axis=0),
        helper.make_node("Reshape", ["data", "wanted"], ["out"]),
    ]
    path = write(tmp_path / "view.onnx", nodes, {"rest": whole(-1)}, opset=15)
    *_, found = read_onnx(path, RECOGNISER)(crops(1))
    assert torch.allclose(found, by_onnxruntime(path, crops(1)))


def test_every_operation_is_tested() -> None:
    assert OPERATIONS.keys() == {case.kind for case in CASES} | {"Constant", "Shape"}
