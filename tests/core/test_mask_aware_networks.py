"""Face networks of every file: normalisation, maps, embeddings, and gradients to the picture."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from difflora_core.errors import BadWeightsFile
from difflora_core.mask_aware import FaceActivations, open_face_network
from difflora_core.mini_world import MINI_FOLDER
from difflora_core.recogniser import Recogniser
from difflora_core.weights_file import read_safetensors, write_safetensors
from tests.core.face_networks import crops, exported, with_own_normalisation

PACK = MINI_FOLDER / "insightface/models/mini"


def test_the_mini_recogniser_is_its_torch_twin_with_the_same_maps() -> None:
    ours, theirs = (
        open_face_network(path)(crops())
        for path in (MINI_FOLDER / "recogniser.safetensors", PACK / "rec_mini.onnx")
    )
    assert torch.allclose(ours.embedding, theirs.embedding, atol=1e-5)
    assert [tap.shape[-1] for tap in ours.taps] == [56, 28, 14, 7]
    for a, b in zip(ours.taps, theirs.taps, strict=True):
        assert torch.allclose(a, b, atol=1e-5 * float(b.abs().max()))


def seen_by_both(path: Path) -> tuple[FaceActivations, torch.Tensor]:
    """What we and InsightFace make of a crop of noise."""
    arcface = pytest.importorskip("insightface.model_zoo.arcface_onnx")
    levels = np.random.default_rng(0).integers(0, 256, (112, 112, 3), np.uint8)
    theirs = torch.from_numpy(arcface.ArcFaceONNX(str(path)).get_feat(levels[..., ::-1].copy()))
    ours = open_face_network(path)(torch.from_numpy(levels / 255).permute(2, 0, 1)[None].float())
    return ours, F.normalize(theirs)


@pytest.mark.parametrize("own", [True, False], ids=["in the graph", "outside"])
def test_normalises_as_insightface_does(tmp_path: Path, own: bool) -> None:
    path = tmp_path / "net.onnx"
    path = with_own_normalisation(path) if own else exported("mobile", tmp_path)
    ours, theirs = seen_by_both(path)
    assert torch.allclose(ours.embedding, theirs, atol=1e-5)
    # the normalised picture is no map of the network, nor is what pooling leaves
    assert [tap.shape[-1] for tap in ours.taps] == ([28] if own else [56, 28, 14, 7])


@pytest.mark.parametrize(
    "first",
    [
        (("Sub", "shift", "Sub_0"), ("Mul", "factor", "Mul_1")),
        (("Mul", "factor", "Mul_0"), ("Sub", "one", "Sub_1")),
        (("Sub", "shift", "/Sub"), ("Div", "shift", "/Div")),
        (("Sub", "shift", ""), ("Mul", "factor", "")),
        (("Sub", "shift", "Sub_0"), ("Div", "shift", "Div_1")),
        (*[("Mul", "one", f"Mul_{k}") for k in range(7)], ("Sub", "shift", "Sub_7")),
        (*[("Mul", "one", f"Mul_{k}") for k in range(8)], ("Sub", "shift", "Sub_8")),
    ],
)
def test_the_names_of_operations_decide_as_in_insightface(
    tmp_path: Path, first: tuple[tuple[str, str, str], ...]
) -> None:
    """Whatever the operations do, references were made by it."""
    path = with_own_normalisation(tmp_path / "net.onnx", first)
    ours, theirs = seen_by_both(path)
    assert torch.allclose(ours.embedding, theirs, atol=1e-5)


def test_one_normalisation_for_every_network_would_blind_some(tmp_path: Path) -> None:
    """As in the original code, which feeds -1..1 to a network that was trained on 0..255."""
    network = open_face_network(with_own_normalisation(tmp_path / "net.onnx"))
    *_, seen = network.trunk(crops(2) * 2 - 1)
    one, other = F.normalize(seen)
    assert float(one @ other) > 0.9999
    one, other = network(crops(2)).embedding
    assert float(one @ other) < 0.99


@pytest.mark.parametrize("kind", ["ours", "onnx"])
def test_opened_and_moved_in_inference_mode_it_still_has_gradients(
    tmp_path: Path, kind: str
) -> None:
    ours = MINI_FOLDER / "recogniser.safetensors"
    path = ours if kind == "ours" else exported("mobile", tmp_path)
    with torch.inference_mode():
        network = open_face_network(path)
        network.double().float()  # new tensors, as when moved to another device
        with torch.inference_mode(False), torch.enable_grad():
            pictures = crops().requires_grad_(True)
            network(pictures).embedding.sum().backward()
    assert pictures.grad is not None and pictures.grad.abs().sum() > 0


def test_no_faces(tmp_path: Path) -> None:
    network = open_face_network(exported("squeeze", tmp_path, batch=1))
    nothing = torch.zeros(0, 3, 112, 112, requires_grad=True)
    seen = network(nothing)
    assert seen.embedding.shape == (0, 16) and all(len(tap) == 0 for tap in seen.taps)
    seen.embedding.sum().backward()


def test_embed_is_insightfaces_from_the_picture_on() -> None:
    arcface = pytest.importorskip("insightface.model_zoo.arcface_onnx")
    path = PACK / "rec_mini.onnx"
    coarse = torch.rand(1, 3, 6, 8, generator=torch.Generator().manual_seed(3))
    smooth = F.interpolate(coarse, (120, 160), mode="bicubic").clamp(0, 1)
    levels = (smooth[0].permute(1, 2, 0) * 255).round().byte().numpy()
    points = np.array([[60, 50], [85, 48], [73, 63], [63, 77], [84, 76]], np.float32)
    face = SimpleNamespace(kps=points)
    theirs = arcface.ArcFaceONNX(str(path)).get(levels[..., ::-1].copy(), face)
    pixels = torch.from_numpy(levels / 255).permute(2, 0, 1)[None].float()
    ours = open_face_network(path).embed(pixels, torch.from_numpy(points)[None])[0]
    assert float(ours @ F.normalize(torch.from_numpy(theirs), dim=0)) > 0.999


def test_other_architectures_of_ours() -> None:
    path = MINI_FOLDER / "metric_recogniser.safetensors"
    network, plain = open_face_network(path), Recogniser.open(path)
    seen = network(crops())
    assert torch.equal(seen.embedding, F.normalize(plain(crops()), dim=-1))
    assert [tap.shape[-1] for tap in seen.taps] == [28, 14, 7]
    assert network.name == plain.config.name


def test_nothing_but_the_picture_has_a_gradient() -> None:
    network = open_face_network(MINI_FOLDER / "recogniser.safetensors")
    pictures = torch.rand(2, 3, 90, 90, requires_grad=True)
    points = torch.tensor([[30.0, 35], [60, 34], [45, 50], [33, 66], [58, 66]]).expand(2, 5, 2)
    embedding = network.train().embed(pictures, points)
    assert torch.allclose(embedding.norm(dim=-1), torch.ones(2))
    embedding[:, 0].sum().backward()
    assert pictures.grad is not None and pictures.grad.flatten(1).abs().sum(1).min() > 0
    assert not any(p.requires_grad for p in network.parameters())


def test_arithmetic_is_in_float32_within_autocast() -> None:
    network = open_face_network(MINI_FOLDER / "recogniser.safetensors")
    expected = network(crops())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network(crops()).embedding, expected.embedding)
        assert torch.equal(network(crops().half()).embedding, network(crops().half().float())[1])


def test_weights_of_ours_that_are_not_finite(tmp_path: Path) -> None:
    tensors, header = read_safetensors(MINI_FOLDER / "recogniser.safetensors")
    tensors["fc.bias"] = torch.full_like(tensors["fc.bias"], torch.nan)
    write_safetensors(tmp_path / "r.safetensors", tensors, header)
    with pytest.raises(BadWeightsFile, match="gives numbers that are not finite"):
        open_face_network(tmp_path / "r.safetensors")
