"""The parts of the core that the nodes brought: mini world files, photo weights, likeness."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from difflora_core.encode import encode_photos
from difflora_core.errors import BadConfig, BadWeightsFile, NoFaceFound
from difflora_core.face import Face
from difflora_core.features import Features
from difflora_core.likeness import Calibration
from difflora_core.measure import ARCFACE, best_first, measure
from difflora_core.mini_world import TOKEN_TABLE, open_part
from difflora_core.photo_weights import encode_weighted
from difflora_core.weights_file import write_safetensors


def test_token_table_is_expanded_and_floats_are_single(tmp_path: Path) -> None:
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    index = torch.tensor([1, 0, 0, 1, 1], dtype=torch.int32)
    tensors = {"token_rows": rows.half(), "token_index": index, "norm.weight": rows[0].half()}
    write_safetensors(tmp_path / "t.safetensors", tensors, {"config": json.dumps({"width": 2})})
    part = open_part("t.safetensors", tmp_path)
    assert part.config == {"width": 2}
    assert torch.equal(part.tensors[TOKEN_TABLE], rows[[1, 0, 0, 1, 1]])
    assert set(part.tensors) == {TOKEN_TABLE, "norm.weight"}
    assert all(tensor.dtype == torch.float32 for tensor in part.tensors.values())


def test_file_without_config_is_refused(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "t.safetensors", {"a": torch.zeros(1)}, {})
    with pytest.raises(BadWeightsFile, match="no model config in its header"):
        open_part("t.safetensors", tmp_path)


class Who:
    """An encoder that sees the person whose number the picture's pixels have; nobody in 0."""

    name = "pack"

    def faces(self, picture: np.ndarray) -> list[Face]:
        who, sharpness = picture[0, 0, :2].tolist()
        box, points = np.float32([10, 10, 50, 50]), np.zeros((5, 2), np.float32)
        embedding = np.eye(4, dtype=np.float32)[who]
        face = Face(
            box=box,
            landmarks=points,
            score=1.0,
            embedding=embedding,
            sharpness=float(sharpness),
            picture=(64, 64),
        )
        return [face] if who else []


def photos_of(*people: int, sharpness: Sequence[int] = ()) -> list[np.ndarray]:
    pairs = zip(people, sharpness or [100] * len(people), strict=True)
    return [np.full((64, 64, 3), (who, sharp, 0), np.uint8) for who, sharp in pairs]


def weighted(photos: list[np.ndarray], weights: Sequence[float]) -> Features:
    encoder: Any = Who()
    return encode_weighted(photos, weights, encoder, None)


def test_weights_multiply_and_zero_leaves_out() -> None:
    changed = weighted(photos_of(1, 1, 1), [1.0, 0.0, 2.0])
    assert changed.weights.tolist() == pytest.approx([1 / 3, 2 / 3])
    assert [note.weight for note in changed.photos] == pytest.approx([1 / 3, 0, 2 / 3])
    assert [note.used for note in changed.photos] == [True, False, True]


def test_without_weights_quality_decides() -> None:
    photos, encoder = photos_of(1, 1, sharpness=[100, 25]), Who()
    plain = encode_photos(photos, encoder, None)  # type: ignore[arg-type]
    assert torch.equal(weighted(photos, []).weights, plain.weights)
    assert weighted(photos, []).photos == plain.photos


def test_a_photo_that_is_left_out_need_not_show_a_face() -> None:
    changed = weighted(photos_of(1, 0, 1), [1.0, 0.0])
    assert len(changed.weights) == 2 and [n.faces for n in changed.photos] == [1, 0, 1]
    with pytest.raises(NoFaceFound, match="photo 2"):
        weighted(photos_of(1, 0, 1), [1.0, 0.5])
    with pytest.raises(NoFaceFound, match="photo 3"):
        weighted(photos_of(1, 1, 0), [1.0, 0.0])


@pytest.mark.parametrize(
    ("weights", "used"),
    [([1.0, 0.0, 0.0], [0]), ([1.0, 1.0, 0.0], [0, 1]), ([], [1, 2]), ([1.0, 1e-60, 1.0], [0, 2])],
)
def test_photos_that_are_left_out_do_not_say_who_is_the_odd_one_out(
    weights: list[float], used: list[int]
) -> None:
    """The second and the third photo show somebody else."""
    changed = weighted(photos_of(1, 2, 2, sharpness=[100, 25, 100]), weights)
    assert float(changed.weights.sum()) == pytest.approx(1)
    assert [note.used for note in changed.photos] == [k in used for k in range(3)]
    assert [note.number for note in changed.photos] == [1, 2, 3]
    assert [note.number - 1 for note in changed.photos if note.weight > 0] == used
    if used == [0, 1]:
        assert float(changed.weights[0] / changed.weights[1]) == pytest.approx(2)


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ([1.0, 1.0, 1.0], "3 photo weights were given for 2 photos."),
        ([-1.0], "one of them negative, too large or no number"),
        ([math.nan, 1.0], "one of them negative, too large or no number"),
        ([math.inf], "one of them negative, too large or no number"),
        ([1e39], "one of them negative, too large or no number"),
        ([0.0, 0.0], "All photos have the weight 0."),
    ],
)
def test_impossible_weights_are_explained(weights: list[float], sentence: str) -> None:
    with pytest.raises(BadConfig, match=sentence):
        weighted(photos_of(1, 1), weights)


class OneFace:
    """An encoder that sees one face in every picture that is not black: its mean colour."""

    def faces(self, picture: np.ndarray) -> list[Any]:
        if not picture.any():
            return []
        colour = picture.reshape(-1, 3).mean(0).astype(np.float32)
        face = type("Face", (), {"area": 1.0, "unit_embedding": colour / np.linalg.norm(colour)})
        return [face]


def painted(*colours: tuple[int, int, int]) -> list[np.ndarray]:
    return [np.full((64, 64, 3), colour, np.uint8) for colour in colours]


def test_likeness_by_hand() -> None:
    pictures = painted((0, 255, 0), (0, 0, 0), (255, 0, 0))
    found = measure(pictures, painted((255, 0, 0)), OneFace())  # type: ignore[arg-type]
    assert [likeness.cosine for likeness in found] == [pytest.approx(0), None, pytest.approx(1)]
    assert found[1].percent == 0
    assert found[0].percent == pytest.approx(100 / (1 + np.exp(ARCFACE.slope * ARCFACE.centre)))
    assert [likeness.number for likeness in best_first(found)] == [3, 1, 2]


def test_more_photos_are_no_reason_for_more_likeness() -> None:
    """The same two photos twice, and the mean of what each says alone."""
    pictures, photos = painted((255, 100, 0)), painted((255, 0, 0), (0, 255, 0))

    def likeness(photos: list[np.ndarray]) -> float:
        (found,) = measure(pictures, photos, OneFace())  # type: ignore[arg-type]
        assert found.cosine is not None
        return found.cosine

    alone = [likeness([photo]) for photo in photos]
    assert likeness(photos) == pytest.approx(sum(alone) / 2)
    assert likeness(photos * 2) == pytest.approx(likeness(photos))


def test_half_way_means_fifty_percent() -> None:
    assert Calibration(0.4, 10, 0.7, 0.1, 0, 0.1).percent(0.4) == pytest.approx(50)


def test_photos_without_a_face_are_refused() -> None:
    with pytest.raises(NoFaceFound, match="in the photos to compare with"):
        measure(painted((1, 1, 1)), painted((0, 0, 0)), OneFace())  # type: ignore[arg-type]
