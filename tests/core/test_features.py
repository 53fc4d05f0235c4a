from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from difflora_core.errors import BadWeightsFile, DiffLoRAError, LayoutMismatch
from difflora_core.features import Features, fuse
from difflora_core.weights_file import read_safetensors, write_safetensors

PERSON = F.normalize(torch.randn(1, 64, generator=torch.Generator().manual_seed(0)), dim=-1)


def photos_of_one_person(count: int, seed: int = 1) -> torch.Tensor:
    noise = torch.randn(count, 64, generator=torch.Generator().manual_seed(seed)) / 16
    return (PERSON + noise) * 20


def fused(face, detection=None, sharpness=None, image=None) -> Features:
    ones = torch.ones(len(face))
    return fuse(
        face,
        image,
        ones if detection is None else detection,
        ones if sharpness is None else sharpness,
        face_encoder="pack",
        image_encoder="tower",
    )


def test_one_photo_is_taken_as_it_is():
    face = photos_of_one_person(1)
    features = fused(face)
    assert features.weights.tolist() == [1.0]
    torch.testing.assert_close(features.fused_face(), F.normalize(face[0], dim=0))
    assert features.fused_image() is None


def test_fusing_photos_comes_closer_to_the_person():
    features = fused(photos_of_one_person(8))
    face = features.fused_face()
    alone = F.normalize(photos_of_one_person(8), dim=-1) @ PERSON[0]
    assert float(face @ PERSON[0]) > float(alone.max())


def test_clear_photos_weigh_more():
    face = photos_of_one_person(2)
    features = fused(face, torch.tensor([0.9, 0.3]), torch.tensor([50.0, 200.0]))
    assert float(features.weights.sum()) == pytest.approx(1)
    assert float(features.weights[0] / features.weights[1]) == pytest.approx(
        0.9 / 0.3 / 2, rel=1e-4
    )


def test_another_person_is_left_out_and_named():
    stranger = torch.randn(1, 64, generator=torch.Generator().manual_seed(9)) * 20
    features = fused(torch.cat([photos_of_one_person(3), stranger]))
    assert features.weights[3] == 0
    assert [p.used for p in features.photos] == [True, True, True, False]
    assert "another person" in features.report()[3]["note"]
    clean = fused(photos_of_one_person(3)).fused_face()
    assert float(features.fused_face() @ clean) > 0.98


def test_two_disagreeing_photos_are_both_kept_and_named():
    face = torch.cat([photos_of_one_person(1), -photos_of_one_person(1, 2)])
    photos = fused(face).photos
    assert all(p.used and "another person" in p.note for p in photos)
    assert not any(p.note for p in fused(photos_of_one_person(2)).photos)


def test_saved_features_come_back(tmp_path):
    features = fused(photos_of_one_person(3), image=torch.randn(3, 32))
    path = tmp_path / "person.safetensors"
    features.save(path)
    loaded = Features.load(path)
    assert torch.equal(loaded.face, features.face) and torch.equal(loaded.image, features.image)
    assert torch.equal(loaded.weights, features.weights)
    assert loaded.photos == features.photos and loaded.face_encoder == "pack"
    assert str(tmp_path).encode() not in path.read_bytes()
    small = {"face": features.face.to(torch.float8_e4m3fn), "weights": features.weights}
    write_safetensors(tmp_path / "small.safetensors", small, {"format": "difflora-features"})
    assert Features.load(tmp_path / "small.safetensors").face.isfinite().all()
    with pytest.raises(BadWeightsFile, match="exists"):
        features.save(path)


def test_image_only_and_face_only():
    features = fused(photos_of_one_person(2), image=torch.randn(2, 32))
    assert features.without_face().fused_face() is None
    face_only = features.without_image()
    assert face_only.fused_image() is None
    with pytest.raises(DiffLoRAError, match="neither"):
        face_only.without_face()


def test_errors_say_what_is_wrong(tmp_path):
    face = photos_of_one_person(1)
    with pytest.raises(DiffLoRAError, match="not finite"):
        fused(face * float("nan"))
    with pytest.raises(LayoutMismatch, match="comes from pack; the predictor knows buffalo_l"):
        fused(face).check_encoders("buffalo_l", "tower")
    dataclasses.replace(fused(face), face_encoder="").check_encoders("buffalo_l", "tower")
    other = tmp_path / "other.safetensors"
    write_safetensors(other, {"x": torch.zeros(1)}, {})
    with pytest.raises(BadWeightsFile, match="holds no face features"):
        Features.load(other)


@pytest.mark.parametrize("damage", [{"weights": torch.ones(5) / 5}, {"face": torch.ones(16)}])
def test_features_that_do_not_belong_together(tmp_path, damage):
    path = tmp_path / "f.safetensors"
    fused(photos_of_one_person(2)).save(path)
    tensors, header = read_safetensors(path)
    write_safetensors(path, {**tensors, **damage}, header, overwrite=True)
    with pytest.raises(BadWeightsFile, match="do not belong together"):
        Features.load(path)
    write_safetensors(path, tensors, {**header, "photos": "[" * 100_000}, overwrite=True)
    with pytest.raises(BadWeightsFile, match=r"header of .* is damaged"):
        Features.load(path)
    write_safetensors(path, tensors, {**header, "photos": "5"}, overwrite=True)
    with pytest.raises(BadWeightsFile, match=r"photo notes of .* are no list"):
        Features.load(path)


@pytest.mark.parametrize(
    ("damage", "notes", "sentence"),
    [
        ({"weights": torch.tensor([0.5, torch.nan])}, None, "weights of the photos must"),
        ({"weights": torch.tensor([1.0, torch.inf])}, None, "weights of the photos must"),
        ({"weights": torch.tensor([2.0, -1.0])}, None, "weights of the photos must"),
        ({"weights": torch.zeros(2)}, None, "not all of them 0"),
        ({"face": torch.full((2, 64), torch.nan)}, None, "face embedding holds numbers"),
        ({}, '[{"size": 1}]', "Unknown key size"),
        ({}, f'[{{"number": 1, "weight": {10**400}}}]', "weight must be float"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, damage, notes, sentence):
    path = tmp_path / "f.safetensors"
    fused(photos_of_one_person(2)).save(path)
    tensors, header = read_safetensors(path)
    header |= {} if notes is None else {"photos": notes}
    write_safetensors(path, {**tensors, **damage}, header, overwrite=True)
    with pytest.raises(BadWeightsFile, match=rf"f\.safetensors is damaged: .*{sentence}"):
        Features.load(path)
