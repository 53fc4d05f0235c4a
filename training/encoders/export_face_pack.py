"""Stage export-face-pack: the detector and the recogniser as an InsightFace pack (ONNX).

Needs no GPU. The recogniser's ONNX file and its torch twin hold the same fp16 weights, so they
agree up to float32 arithmetic; the difference is measured and stored in the manifest.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from difflora_core.face import TRAINING_FIELD
from difflora_core.recogniser import Recogniser
from difflora_core.whole_file import whole_file

from ..artifacts import artifact, artifacts_folder, read_artifact, read_manifest, record_artifact
from ..config import Config
from ..run_folder import RunFolder
from .detector_net import Detector, ExportedDetector
from .face_pack import DETECTOR_FILE, RECOGNISER_FILE, face_encoder_name

if TYPE_CHECKING:
    from onnx import ModelProto

_OPSET = 13
Axes = dict[str, dict[int, str]]
"""Input or output -> its free axes and their names."""
#: weights smaller than this are not worth a node of their own
_HALVED_FROM = 256


def run(config: Config, folder: RunFolder) -> None:
    """Write det_mini.onnx and rec_mini.onnx into the artifacts folder."""
    place = artifacts_folder(config)
    tensors, header = read_artifact(config, "detector")
    detector = Detector(tuple(header["widths"]))
    detector.load_state_dict(_single(tensors))
    error = export_detector(detector.eval(), place / DETECTOR_FILE)
    # the detector itself is not shipped, so what trained it is told with the file made of it
    training = read_manifest(place).get("detector.safetensors", {}).get("command", "")
    figures = {"training": training, "largest_difference": error} | header["figures"]
    record_artifact(config, DETECTOR_FILE, figures)
    recogniser = Recogniser.open(artifact(config, "recogniser"))
    _, _, training = face_encoder_name(config).partition("@")
    error = export_recogniser(recogniser, place / RECOGNISER_FILE, training)
    record_artifact(config, RECOGNISER_FILE, {"largest_difference": error})


def export_detector(detector: Detector, path: Path) -> float:
    """Write SCRFD's nine outputs with free height and width; returns the largest difference."""
    side = {2: "height", 3: "width"}
    names = [f"{kind}_{stride}" for kind in ("score", "bbox", "kps") for stride in (8, 16, 32)]
    axes = {"input": side} | {name: {0: f"anchors_{name}"} for name in names}
    example = torch.rand(1, 3, 128, 160) * 2 - 1
    return export(ExportedDetector(detector).eval(), example, path, names, axes)


def export_recogniser(recogniser: Recogniser, path: Path, training: str = "") -> float:
    """Write ArcFace's single output with a free batch size; returns the largest difference."""
    example = torch.rand(2, 3, 112, 112) * 2 - 1
    axes = {"input": {0: "batch"}, "embedding": {0: "batch"}}
    told = {TRAINING_FIELD: training} if training else {}
    return export(recogniser.network, example, path, ["embedding"], axes, told)


def export(
    network: nn.Module,
    example: Tensor,
    path: Path,
    names: list[str],
    axes: Axes,
    told: Mapping[str, str] | None = None,
) -> float:
    """Write a network as ONNX with fp16 weights; compare it with ONNX Runtime on `example`.

    told: metadata of the file. Errors: OSError.
    """
    import onnx

    with torch.no_grad(), warnings.catch_warnings(), TemporaryDirectory() as place:
        drafted = str(Path(place) / "draft.onnx")
        warnings.simplefilter("ignore")  # deprecated, but it needs no further package
        torch.onnx.export(
            network, (example,), drafted, dynamo=False, opset_version=_OPSET,
            input_names=["input"], output_names=names, dynamic_axes=axes,
            training=torch.onnx.TrainingMode.PRESERVE,  # folded norms would not be fp16 numbers
        )  # fmt: skip
        expected = network(example)
        model = onnx.load(drafted)
    halve_weights(model)
    onnx.helper.set_model_props(model, dict(told or {}))
    onnx.checker.check_model(model)
    content = model.SerializeToString()
    with whole_file(path) as file:
        file.write(content)
    return _difference(content, example, expected if isinstance(expected, tuple) else (expected,))


def halve_weights(model: ModelProto) -> None:
    """Store large weights that fp16 holds exactly as such, cast to float32 when loaded."""
    from onnx import TensorProto, helper, numpy_helper

    graph, casts = model.graph, []
    for weight in graph.initializer:
        values = numpy_helper.to_array(weight)
        if values.dtype != np.float32 or values.size < _HALVED_FROM:
            continue
        half = values.astype(np.float16)
        if not np.array_equal(half.astype(np.float32), values):
            continue
        name = weight.name
        weight.CopyFrom(numpy_helper.from_array(half, f"{name}_half"))
        casts.append(helper.make_node("Cast", [f"{name}_half"], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _difference(model: bytes, example: Tensor, expected: tuple[Tensor, ...]) -> float:
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    found = session.run(None, {"input": example.numpy()})
    pairs = zip(expected, found, strict=True)
    return max(float((a - torch.from_numpy(b)).abs().max()) for a, b in pairs)


def _single(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
