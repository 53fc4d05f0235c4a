"""Recognisers' ONNX files as torch modules, against ONNX Runtime; broken files in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import helper
from torch import Tensor

from difflora_core.errors import BadWeightsFile
from difflora_core.mask_aware import FaceNetwork, open_face_network
from difflora_core.mini_world import MINI_FOLDER
from tests.core.face_networks import by_onnxruntime, crops, export, exported, iresnet, write

PACK = MINI_FOLDER / "insightface/models/mini"


def difference(network: FaceNetwork, path: Path, pictures: Tensor) -> float:
    expected = F.normalize(by_onnxruntime(path, pictures * 2 - 1), dim=-1)
    return float((network(pictures).embedding - expected).abs().max())


@pytest.mark.parametrize(
    ("kind", "batch", "folded"),
    [
        ("r50", 0, True),
        ("r50", 1, False),
        ("r100", 0, True),
        ("mobile", 0, False),
        ("mobile", 1, True),
        ("squeeze", 0, True),
        ("squeeze", 1, False),
    ],
)
def test_agrees_with_onnxruntime(tmp_path: Path, kind: str, batch: int, folded: bool) -> None:
    path = exported(kind, tmp_path, batch=batch, folded=folded)
    assert difference(open_face_network(path), path, crops()) < 2e-6


@pytest.mark.parametrize("opset", [9, 11, 14, 17, 18])
@pytest.mark.parametrize("kind", ["mobile", "squeeze"])
def test_opsets(tmp_path: Path, kind: str, opset: int) -> None:
    path = exported(kind, tmp_path, opset=opset)
    assert difference(open_face_network(path), path, crops()) < 2e-6


def test_a_file_in_half_precision(tmp_path: Path) -> None:
    """All arithmetic is in float32 all the same."""
    random = np.random.default_rng(0)
    weights = {
        "w": random.normal(size=(4, 3, 3, 3)).astype(np.float16),
        "fc": random.normal(size=(16, 4 * 28 * 28)).astype(np.float16),
    }
    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    nodes = [
        helper.make_node("Cast", ["data"], ["h"], to=half),
        helper.make_node("Conv", ["h", "w"], ["c"], strides=[4, 4], pads=[0, 0, 1, 1]),
        helper.make_node("Flatten", ["c"], ["f"]),
        helper.make_node("Gemm", ["f", "fc"], ["g"], transB=1),
        helper.make_node("Cast", ["g"], ["out"], to=single),
    ]
    path = write(tmp_path / "half.onnx", nodes, weights)
    network = open_face_network(path)
    assert difference(network, path, crops()) < 1e-3
    assert all(b.dtype == torch.float32 for b in network.buffers())


@pytest.mark.slow
def test_a_recogniser_of_real_size(tmp_path: Path) -> None:
    """43.6 million parameters, as w600k_r50.onnx."""
    torch.manual_seed(0)
    path = export(iresnet(width=64), tmp_path / "r50.onnx", opset=11)
    network = open_face_network(path)
    assert [tuple(tap.shape[1:]) for tap in network(crops(1)).taps] == [
        (64, 112, 112), (64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7)
    ]  # fmt: skip
    assert difference(network, path, crops(2)) < 2e-6


@pytest.mark.parametrize("folded", [True, False], ids=["folded", "unfolded"])
def test_maps_are_the_ends_of_the_stages(tmp_path: Path, folded: bool) -> None:
    torch.manual_seed(0)
    network = iresnet((1, 2, 1, 1))
    path = export(network, tmp_path / "r.onnx", folded=folded)
    outputs: list[Tensor] = []
    for name in ("prelu", "blocks.0", "blocks.2", "blocks.3", "bn2"):
        end = network.get_submodule(name)
        end.register_forward_hook(lambda *given: outputs.append(given[2]))
    network(crops(1) * 2 - 1)
    taps = open_face_network(path)(crops(1)).taps
    assert len(taps) == len(outputs) == 5
    for tap, output in zip(taps, outputs, strict=True):
        assert torch.allclose(tap, output, atol=1e-5)


@pytest.mark.parametrize("kind", ["r50", "mobile", "squeeze"])
def test_gradients_are_right_in_float64(tmp_path: Path, kind: str) -> None:
    trunk = open_face_network(exported(kind, tmp_path)).trunk.double()
    picture = crops(1).double() * 2 - 1
    random = torch.Generator().manual_seed(2)
    along = torch.randn(picture.shape, generator=random, dtype=torch.float64)

    def value(x: Tensor) -> Tensor:
        return F.normalize(list(trunk(x))[-1])[0, 0]

    leaf = picture.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(value(leaf), leaf)
    step = 1e-7
    slope = (value(picture + step * along) - value(picture - step * along)) / (2 * step)
    assert float((gradient * along).sum()) == pytest.approx(float(slope), rel=1e-4)


def broken(path: Path, change: Callable[[onnx.ModelProto], object]) -> Path:
    """The mini recogniser with one thing changed."""
    model = onnx.load(str(PACK / "rec_mini.onnx"))
    change(model)
    onnx.save(model, str(path))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(BadWeightsFile) as caught:
        open_face_network(path)
    assert caught.value.message.endswith(".") and caught.value.message.count(". ") == 0
    assert caught.value.hint
    return caught.value.message


@pytest.mark.parametrize("length", [0, 1000, 300_000])
def test_a_truncated_file(tmp_path: Path, length: int) -> None:
    path = tmp_path / "rec.onnx"
    path.write_bytes((PACK / "rec_mini.onnx").read_bytes()[:length])
    expected = "no intact ONNX file" if length else "holds no network"
    assert expected in refusal(path)


def test_a_web_page(tmp_path: Path) -> None:
    (tmp_path / "rec.onnx").write_text("<html>Log in</html>")
    assert "rec.onnx is no intact ONNX file" in refusal(tmp_path / "rec.onnx")


def test_no_file_and_no_known_kind_of_file(tmp_path: Path) -> None:
    with pytest.raises(BadWeightsFile, match="There is no file"):
        open_face_network(tmp_path / "rec.onnx")
    assert "expected a .safetensors or .onnx file" in refusal(tmp_path / "rec.pth")


def test_a_detector() -> None:
    assert "it has 1 inputs and 9 outputs" in refusal(PACK / "det_mini.onnx")


def test_an_unknown_operation(tmp_path: Path) -> None:
    def attention(model: onnx.ModelProto) -> None:
        model.graph.node[-1].op_type = "Attention"
        model.graph.node[-1].domain = "com.microsoft"

    message = refusal(broken(tmp_path / "r.onnx", attention))
    assert message == "r.onnx uses operations that are not known here: com.microsoft.Attention."


@pytest.mark.parametrize(
    ("shape", "found"),
    [(["N", 3, 192, 192], "any x 3 x 192 x 192"), ([1, 112, 112, 3], "1 x 112 x 112 x 3")],
)
def test_another_input_size(tmp_path: Path, shape: list[int | str], found: str) -> None:
    node = helper.make_node("GlobalAveragePool", ["data"], ["out"])
    path = write(tmp_path / "landmarks.onnx", [node], {}, shape=shape)
    expected = f"landmarks.onnx takes {found}, expected pictures of 3 x 112 x 112."
    assert refusal(path) == expected


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    def spoil(model: onnx.ModelProto) -> None:
        bias = next(one for one in model.graph.initializer if one.name == "fc.bias")
        bias.raw_data = np.full(128, np.nan, np.float32).tobytes()

    message = refusal(broken(tmp_path / "r.onnx", spoil))
    assert message == "r.onnx holds numbers that are not finite, in 'fc.bias'."


@pytest.mark.parametrize("left", [None, b"abc"], ids=["missing", "short"])
def test_weights_in_another_file(tmp_path: Path, left: bytes | None) -> None:
    path = tmp_path / "r.onnx"
    onnx.save(
        onnx.load(str(PACK / "rec_mini.onnx")), str(path), size_threshold=100,
        save_as_external_data=True, location="r.data",
    )  # fmt: skip
    whole = open_face_network(path)(crops()).embedding
    assert torch.equal(whole, open_face_network(PACK / "rec_mini.onnx")(crops()).embedding)
    (tmp_path / "r.data").unlink()
    if left is not None:
        (tmp_path / "r.data").write_bytes(left)
    expected = "r.onnx keeps its weights in another file, which is missing or too short."
    assert refusal(path) == expected


def test_a_tensor_that_nothing_makes(tmp_path: Path) -> None:
    def cut(model: onnx.ModelProto) -> None:
        del model.graph.initializer[3]

    assert "r.onnx lacks the tensor 'bn1.running_mean'" in refusal(broken(tmp_path / "r.onnx", cut))


def test_an_output_that_nothing_makes(tmp_path: Path) -> None:
    def rename(model: onnx.ModelProto) -> None:
        model.graph.node[-1].output[0] = "other"

    assert "never computes its output 'embedding'" in refusal(broken(tmp_path / "r.onnx", rename))


def test_shapes_that_do_not_fit(tmp_path: Path) -> None:
    weights = {"w": np.zeros((4, 5, 3, 3))}
    node = helper.make_node("Conv", ["data", "w"], ["out"])
    message = refusal(write(tmp_path / "r.onnx", [node], weights))
    assert message.startswith("r cannot be run: ")


def test_a_result_that_is_no_embedding(tmp_path: Path) -> None:
    node = helper.make_node("ReduceMean", ["data"], ["out"], axes=[1, 2, 3], keepdims=1)
    assert "gives 2 x 1 numbers for 2 crops" in refusal(write(tmp_path / "r.onnx", [node], {}))
