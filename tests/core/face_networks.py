"""Networks of the shapes that face recognisers have, with random weights, as ONNX files."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from difflora_core.recogniser import IResNet, IResNetConfig

R50, R100 = (3, 4, 14, 3), (3, 13, 30, 3)


def iresnet(layers: tuple[int, ...] = R50, width: int = 4) -> nn.Module:
    """ArcFace's network at a fraction of its width; width 64 is the real one."""
    widths = tuple(width * factor for factor in (1, 2, 4, 8))
    config = IResNetConfig(
        stem=width, stem_stride=1, widths=widths, layers=layers, embedding=8 * width
    )
    return settled(IResNet(config))


def block(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Module:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.PReLU(outputs))


class Depthwise(nn.Module):
    """MobileFaceNet's bottleneck (arcface_torch/mobilefacenet.py)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        middle = 2 * inputs
        self.residual = stride == 1 and inputs == outputs
        self.layers = nn.Sequential(
            block(inputs, middle, 1),
            block(middle, middle, 3, stride, middle),
            nn.Conv2d(middle, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


class MobileFaceNet(nn.Module):
    """As w600k_mbf: depthwise blocks, a 7x7 depthwise convolution instead of a mean."""

    def __init__(self) -> None:
        super().__init__()
        plan = [(8, 8, 2), (8, 8, 1), (8, 16, 2), (16, 16, 1), (16, 16, 2)]
        self.body = nn.Sequential(block(3, 8, 3, 2), *(Depthwise(*shape) for shape in plan))
        self.places = nn.Sequential(nn.Conv2d(16, 16, 7, groups=16, bias=False))
        self.fc = nn.Linear(16, 32, bias=False)
        self.norm = nn.BatchNorm1d(32)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.fc(self.places(self.body(x)).flatten(1)))


class SqueezeNet(nn.Module):
    """As IR-SE: channel attention, pooled shortcuts, `view`, an embedding of unit length."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 8, 3, 2)
        self.conv = nn.Conv2d(8, 8, 3, 2, 1, bias=False)
        self.down, self.up = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
        self.fc = nn.Linear(8 * 14 * 14, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.conv(x)
        y = y * self.up(self.down(F.adaptive_avg_pool2d(y, 1)).relu()).sigmoid()
        y = F.avg_pool2d(y + F.max_pool2d(x, 1, 2), 2)
        return F.normalize(self.fc(y.view(y.size(0), -1)))


BUILDERS: Mapping[str, Callable[[], nn.Module]] = {
    "r50": lambda: iresnet(R50),
    "r100": lambda: iresnet(R100),
    "mobile": lambda: settled(MobileFaceNet()),
    "squeeze": lambda: settled(SqueezeNet()),
}


def crops(count: int = 3) -> Tensor:
    """Pictures of noise, always the same."""
    return torch.rand(count, 3, 112, 112, generator=torch.Generator().manual_seed(1))


def exported(kind: str, folder: Path, **how: Any) -> Path:
    """One of BUILDERS as an ONNX file; see `export`."""
    torch.manual_seed(0)
    return export(BUILDERS[kind](), folder / f"{kind}.onnx", **how)


def settled(network: nn.Module) -> nn.Module:
    """Norms and slopes as after training, so that a mistake in them shows; frozen."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean = 0.3 * torch.randn(module.num_features)
            module.running_var = 0.5 + torch.rand(module.num_features)
            nn.init.normal_(module.weight, 0.8, 0.1)
            nn.init.normal_(module.bias, 0, 0.1)
        if isinstance(module, nn.PReLU):
            nn.init.uniform_(module.weight, -0.2, 0.6)
    return network.eval().requires_grad_(False)


def export(
    network: nn.Module, path: Path, *, opset: int = 13, folded: bool = True, batch: int = 0
) -> Path:
    """Write a network as ONNX. batch 0 leaves it free; folded: batch norms into convolutions."""
    mode = torch.onnx.TrainingMode.EVAL if folded else torch.onnx.TrainingMode.PRESERVE
    axes = {} if batch else {"input": {0: "batch"}, "embedding": {0: "batch"}}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # deprecated, but it needs no further package
        torch.onnx.export(
            network, (torch.rand(batch or 2, 3, 112, 112),), str(path), dynamo=False,
            input_names=["input"], output_names=["embedding"], dynamic_axes=axes,
            training=mode, opset_version=opset,
        )  # fmt: skip
    return path


MXNET = (("Sub", "shift", "_minusscalar0"), ("Mul", "factor", "_mulscalar0"))
"""As MXNet's exporter wrote files: they take 0..255, (x - 127.5) / 128 is in the graph."""


def with_own_normalisation(path: Path, first: Sequence[tuple[str, str, str]] = MXNET) -> Path:
    """A file that begins with these operations: kind, constant, name."""
    random = np.random.default_rng(0)
    weights = {
        "shift": np.array(127.5), "factor": np.array(1 / 128), "one": np.array(1.0),
        "w": random.normal(size=(4, 3, 3, 3)),
        "scale": np.ones(4), "bias": np.zeros(4), "mean": np.zeros(4), "variance": np.ones(4),
        "slope": random.normal(size=(4, 1, 1)), "fc": 0.1 * random.normal(size=(16, 4 * 28 * 28)),
        "fc_bias": random.normal(size=16),
    }  # fmt: skip
    node = helper.make_node
    values = ["data", *(f"x{k}" for k in range(len(first)))]
    nodes = [
        *(
            node(kind, [values[k], constant], [values[k + 1]], name)
            for k, (kind, constant, name) in enumerate(first)
        ),
        node("Conv", [values[-1], "w"], ["c"], strides=[4, 4], pads=[0, 0, 1, 1]),
        node("BatchNormalization", ["c", "scale", "bias", "mean", "variance"], ["b"]),
        node("PRelu", ["b", "slope"], ["p"]),
        node("Dropout", ["p"], ["d"]),
        node("Flatten", ["d"], ["f"]),
        node("Gemm", ["f", "fc", "fc_bias"], ["fc1"], transB=1),
    ]
    return write(path, nodes, weights)


def write(path: Path, nodes: list[Any], weights: dict[str, np.ndarray], **extra: Any) -> Path:
    """A graph from `data` [N, 3, 112, 112] to the output of the last node."""
    shape = extra.get("shape", ["N", 3, 112, 112])
    constants = [
        numpy_helper.from_array(
            value.astype(np.float32) if value.dtype == np.float64 else value, name
        )
        for name, value in weights.items()
    ]
    graph = helper.make_graph(
        nodes,
        "face",
        [helper.make_tensor_value_info("data", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)],
        constants,
    )
    opset = [helper.make_opsetid("", extra.get("opset", 11))]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=7), str(path))
    return path


def by_onnxruntime(path: Path, pictures: Tensor) -> Tensor:
    """The independent answer: the file's output for normalised pictures, one by one."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    rows = [np.asarray(session.run(None, {name: one[None].numpy()})[0]) for one in pictures]
    return torch.from_numpy(np.concatenate(rows))
