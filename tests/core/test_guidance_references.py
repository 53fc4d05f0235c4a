"""Whom guidance leads towards: the right embeddings, or one clear sentence."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from difflora_core.errors import DiffLoRAError, LayoutMismatch, NoFaceFound
from difflora_core.features import Features
from difflora_core.mask_aware.networks import FaceNetwork, open_face_network
from difflora_core.mask_aware.references import check_person, reference_embeddings
from difflora_core.photos import Pixels
from difflora_core.recogniser import IResNetConfig, Recogniser, RecogniserConfig
from tests.core.guidance_parts import always, face_at

WIDTH = 8


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> FaceNetwork:
    torch.manual_seed(0)
    shape = IResNetConfig(stem=4, widths=(4, 4, 4), embedding=WIDTH)
    file = tmp_path_factory.mktemp("network") / "tiny.safetensors"
    Recogniser(RecogniserConfig(shape)).save(file)
    return open_face_network(file)


def picture(seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (192, 192, 3), np.uint8)


def features(width: int = WIDTH, encoder: str = "tiny") -> Features:
    rows = torch.randn(3, width, generator=torch.Generator().manual_seed(2))
    return Features(rows, None, torch.tensor([0.5, 0.3, 0.2]), encoder)


def test_features_come_first_and_then_every_face_of_every_picture(network: FaceNetwork) -> None:
    finder = always(face_at(20, 30), face_at(100, 90))
    pictures = [picture(0), picture(1)]
    rows = reference_embeddings(network, "tiny", features(), pictures, finder)
    assert rows.shape == (5, WIDTH)
    assert torch.allclose(rows.norm(dim=-1), torch.ones(5))
    fused = features().fused_face()
    assert fused is not None and torch.allclose(rows[0], fused)
    image = torch.from_numpy(pictures[1]).movedim(-1, 0)[None].float() / 255
    points = torch.from_numpy(face_at(20, 30).landmarks)[None]
    assert torch.allclose(rows[3], network.embed(image, points)[0], atol=1e-6)


def test_rows_can_be_differentiated_with_inside_inference_mode(network: FaceNetwork) -> None:
    with torch.inference_mode():
        rows = reference_embeddings(network, "tiny", features(), [picture()], always(face_at(9, 9)))
    assert not rows.is_inference() and not rows.requires_grad


@pytest.mark.parametrize(
    ("wrong", "error", "sentence"),
    [
        (features(encoder="antelopev2"), LayoutMismatch, "come from the face encoder antelopev2"),
        (features(width=12), LayoutMismatch, "have 12 numbers per face.* gives 8"),
    ],
)
def test_features_of_another_network_are_refused(
    network: FaceNetwork, wrong: Features, error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        reference_embeddings(network, "tiny", wrong)


def test_features_of_an_unnamed_encoder_are_taken(network: FaceNetwork) -> None:
    assert reference_embeddings(network, "tiny", features(encoder="")).shape == (1, WIDTH)


def test_nobody_is_refused() -> None:
    with pytest.raises(DiffLoRAError, match="nobody to lead towards"):
        check_person(None, pictures=False)
    blind = Features(None, torch.randn(1, 4), torch.ones(1))
    with pytest.raises(DiffLoRAError, match="hold no face"):
        check_person(blind, pictures=False)
    check_person(None, pictures=True)


def test_features_without_a_face_leave_it_to_the_picture(network: FaceNetwork) -> None:
    blind, finder = Features(None, torch.randn(1, 4), torch.ones(1)), always(face_at(20, 30))
    rows = [
        reference_embeddings(network, "tiny", known, [picture()], finder) for known in (blind, None)
    ]
    assert torch.equal(rows[0], rows[1])


def test_pictures_need_a_finder_and_a_face(network: FaceNetwork) -> None:
    with pytest.raises(DiffLoRAError, match=r"has to be found first.*Connect a face encoder"):
        reference_embeddings(network, "tiny", None, [picture()])
    with pytest.raises(NoFaceFound, match="in reference picture 1"):
        reference_embeddings(network, "tiny", None, [picture()], always())
