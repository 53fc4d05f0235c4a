"""The command from photo files to a LoRA file, with a tiny predictor and stand-ins for encoders."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import difflora_core.face
import difflora_core.image_encoder
from difflora_core.__main__ import main
from difflora_core.encode import _view, encode_photos
from difflora_core.errors import BadImage, DiffLoRAError, NoFaceFound
from difflora_core.face import Face
from difflora_core.lora_space import LoraSpace
from difflora_core.predictor import Predictor
from difflora_core.weights_file import read_lora, read_safetensors, write_safetensors

from .predictors import FACE, IMAGE, tiny_predictor


class FakeFaces:
    """As many faces as the first pixel says; each embedding depends on the face's number."""

    name = "pack"

    def faces(self, image: np.ndarray) -> list[Face]:
        return [self._face(image, k) for k in range(int(image[0, 0, 0]))]

    def _face(self, image: np.ndarray, k: int) -> Face:
        box = np.float32([10 + 40 * k, 10, 40 + 40 * k + 4 * k, 40])
        embedding = np.random.default_rng(k).standard_normal(FACE).astype(np.float32)
        return Face(
            box=box,
            landmarks=np.zeros((5, 2), np.float32),
            score=0.9,
            embedding=embedding,
            sharpness=100.0,
            picture=image.shape[1::-1],
        )


class FakeImages(nn.Module):
    """The embedding is made of the mean colour and the size of what it is shown."""

    config = SimpleNamespace(name="tower")

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))

    def encode(self, images: torch.Tensor):
        colour = images.mean((2, 3)).repeat(1, IMAGE // 3)
        return nn.functional.normalize(colour + images.shape[-1] / 100, dim=-1), images


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder with predictor.safetensors and pictures named after their number of faces."""
    monkeypatch.setattr(difflora_core.face.FaceEncoder, "open", lambda *a, **k: FakeFaces())
    monkeypatch.setattr(difflora_core.image_encoder.ImageEncoder, "open", lambda *a: FakeImages())
    tiny_predictor(space=LoraSpace.for_mini(rank=2)).save(tmp_path / "predictor.safetensors")
    for faces in range(3):
        Image.fromarray(photo(faces)).save(tmp_path / f"faces{faces}.png")
    return tmp_path


def photo(faces: int, size: int = 128) -> np.ndarray:
    return np.full((size, size, 3), faces, np.uint8)


def predict(world, capsys, *arguments: str) -> tuple[int, dict]:
    places = [str(world / a) if a.endswith(".png") else a for a in arguments]
    out = ["--out", str(world / "person.safetensors")] if "--out" not in arguments else []
    bundle = ["--predictor", str(world / "predictor.safetensors")]
    code = main(["predict", *places, *out, *bundle, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_photo_becomes_a_lora_file(world, capsys):
    code, report = predict(world, capsys, "faces1.png", "--seed", "7", "--strength", "1.5")
    assert code == 0
    assert (report["seed"], report["strength"], report["base"]) == (7, 1.5, "mini")
    assert set(report["seconds"]) == {"load", "encode", "predict"}
    lora = read_lora(world / "person.safetensors")
    assert len(lora) == 56 and set(lora.ranks.values()) == {2}
    header = read_safetensors(world / "person.safetensors")[1]
    assert header["difflora.seed"] == "7" and header["difflora.space"] == report["space"]
    assert "sks person" in header["modelspec.trigger_phrase"]
    assert not any(str(world) in value or "png" in value for value in header.values())


def test_same_seed_writes_the_same_file(world, capsys):
    files = []
    for name in ("a", "b"):
        out = world / name / "x.safetensors"
        assert predict(world, capsys, "faces1.png", "--out", str(out))[0] == 0
        files.append(out.read_bytes())
    assert files[0] == files[1]


def test_existing_file_is_kept_unless_told(world, capsys):
    predict(world, capsys, "faces1.png")
    before = (world / "person.safetensors").read_bytes()
    code, report = predict(world, capsys, "faces1.png", "--seed", "1")
    assert code == 2 and "exists already" in report["error"] and "--overwrite" in report["hint"]
    assert (world / "person.safetensors").read_bytes() == before
    assert predict(world, capsys, "faces1.png", "--seed", "1", "--overwrite")[0] == 0
    assert (world / "person.safetensors").read_bytes() != before


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("faces1.png", "faces0.png"), "No face was found in photo 2."),
        (("faces2.png", "--face", "3"), "no face number 3"),
        (("nowhere.png",), "no picture at"),
        (("faces1.png", "--steps", "0"), "steps must be 1 to 50"),
        (("faces1.png", "--crops", "crops.jpg"), "crops.jpg must end in .png"),
        (("faces1.png", "--crops", "FOLDER/faces1.png/crops.png"), "is a file, not a folder"),
        (("faces1.png", "faces2.png", "--face", "2"), "Photo 1: There is no face number 2"),
        (("faces1.png", "--face", "9" * 5000), "no face number 999999999"),
        (("faces1.png", "--crops", f"{'x' * 260}.png"), "is too long"),
        (("faces1.png", "--crops", "bad\udce9.png"), "is no valid text"),
        (("faces1.png", "--guidance", "1e39"), "guidance must be -100 to 100"),
        (("x" * 300 + ".png",), "no picture at"),
    ],
)
def test_user_errors_leave_nothing_behind(world, capsys, arguments, error):
    before = {p.name for p in world.iterdir()}
    arguments = [word.replace("FOLDER", str(world)) for word in arguments]
    code, report = predict(world, capsys, *arguments)
    assert code == 2 and error in report["error"]
    assert {p.name for p in world.iterdir()} == before


@pytest.mark.parametrize(("option", "name"), [("--crops", "me.png"), ("--out", "me.safetensors")])
def test_a_photo_is_never_written_over(world, capsys, option, name):
    place = world / name
    place.symlink_to(world / "faces1.png")
    before = (world / "faces1.png").read_bytes()
    code, report = predict(world, capsys, "faces1.png", option, str(place), "--overwrite")
    assert code == 2 and report["error"] == f"{place} is one of the photos."
    assert place.read_bytes() == before and not (world / "person.safetensors").exists()


def test_reports_say_which_face_was_taken(world, capsys):
    crops = world / "crops.png"
    code, report = predict(world, capsys, "faces2.png", "faces1.png", "--crops", str(crops))
    assert code == 0
    assert [(p["faces"], p["face"]) for p in report["photos"]] == [(2, 2), (1, 1)]
    width, height = Image.open(crops).size
    assert (width, height) == (2 * 160, 2 * 160)  # two faces above one, each 160 pixels wide


def test_a_number_that_is_not_there_still_leaves_the_numbered_faces(world, capsys):
    crops = world / "crops.png"
    code, report = predict(world, capsys, "faces2.png", "--face", "3", "--crops", str(crops))
    assert code == 2 and "no face number 3" in report["error"]
    assert Image.open(crops).size == (2 * 160, 160)


def test_strength_is_relative_to_the_calibrated_one(world, capsys):
    predictor = Predictor.open(world / "predictor.safetensors")
    sampling = dataclasses.replace(predictor.config.sampling, strength=1.5)
    predictor.config = dataclasses.replace(predictor.config, sampling=sampling)
    predictor.save(world / "predictor.safetensors", overwrite=True)
    assert predict(world, capsys, "faces1.png")[1]["strength"] == 1.5
    halved = predict(world, capsys, "faces1.png", "--strength", "0.5", "--overwrite")[1]
    assert halved["strength"] == 0.75


def test_a_predictor_with_a_broken_header_is_one_sentence(world, capsys):
    path = world / "predictor.safetensors"
    tensors, header = read_safetensors(path)
    write_safetensors(path, tensors, {**header, "config": header["config"][:-9]}, overwrite=True)
    code, report = predict(world, capsys, "faces1.png")
    assert code == 2 and "header of predictor.safetensors is damaged" in report["error"]
    assert not (world / "person.safetensors").exists()


def test_report_for_people_names_photos_and_trigger(world, capsys):
    bundle = ["--predictor", str(world / "predictor.safetensors"), "--candidates", "3"]
    photos = [str(world / "faces1.png"), str(world / "faces2.png")]
    assert main(["predict", *photos, "--out", str(world / "p.safetensors"), *bundle]) == 0
    text = capsys.readouterr().out
    assert "sks person" in text and "2: weight" in text and "candidates   3" in text


def test_the_chosen_face_decides():
    photos = [photo(2)]
    first, second = (encode_photos(photos, FakeFaces(), FakeImages(), c) for c in ("1", "2"))
    assert not torch.equal(first.face, second.face)
    assert torch.equal(encode_photos(photos, FakeFaces(), None, "largest").face, second.face)


def test_group_photos_are_cropped_for_the_image_encoder():
    alone, group = (encode_photos([photo(n)], FakeFaces(), FakeImages()) for n in (1, 2))
    assert not torch.equal(alone.image, group.image)


def test_either_encoder_may_be_missing():
    image_only = encode_photos([photo(0), photo(0, 256)], None, FakeImages())
    assert image_only.face is None and image_only.image.shape == (2, IMAGE)
    assert image_only.weights.tolist() == [0.5, 0.5]
    face_only = encode_photos([photo(1)], FakeFaces(), None)
    assert face_only.image is None and face_only.face_encoder == "pack"
    with pytest.raises(DiffLoRAError, match="neither"):
        encode_photos([photo(1)], None, None)
    with pytest.raises(BadImage, match="no photo"):
        encode_photos([], FakeFaces(), None)
    with pytest.raises(NoFaceFound, match="photo 1"):
        encode_photos([photo(0)], FakeFaces(), FakeImages())


@pytest.mark.parametrize(("box", "whole"), [((70, 10, 100, 50), True), ((2, 10, 40, 50), False)])
def test_in_a_long_photo_the_image_encoder_looks_where_the_face_is(box, whole):
    """Which takes the middle square."""
    long = photo(1, 160)[:60]
    face = dataclasses.replace(FakeFaces().faces(long)[0], box=np.float32(box))
    seen = _view(long, [face], face)
    assert (seen.shape == long.shape) is whole
    assert _view(long, [face, face], face).shape != long.shape
