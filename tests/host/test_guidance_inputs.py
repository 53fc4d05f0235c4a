"""Whose face guides, by which recogniser; and what is said where an input does not fit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_host import Host, blocked
from guided_runs import latents, mask_of, refused, the_run
from mini_files import FACE_WIDTH
from prompts import MIDDLE, guidance, guided, node, unguided

from difflora_core.mini_world import MINI_FOLDER

MASK = mask_of(MIDDLE)


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"features": None}, "nobody to lead towards.*Connect features from"),
        ({"features": ["blind", 0]}, "features hold no face.*a reference picture"),
        ({"features": ["foreign", 0]}, "face encoder antelopev2; the one that guides is mini"),
        ({"features": None, "reference": ["nobody", 0]}, "No face was found in reference picture"),
        (
            {"features": None, "reference": ["nobody", 0], "face_encoder": None},
            "does not know which recogniser to follow.*Connect a face encoder",
        ),
        (
            {"features": ["foreign", 0], "face_encoder": None, "mask": ["mask", 0]},
            "The face pack 'antelopev2' is not in",
        ),
        ({"reference": ["no picture", 0]}, "There is no picture in the batch"),
        ({"start": 0.8, "end": 0.2}, "cannot run from 80% to 20% of the steps"),
        ({"face_encoder": ["nothing", 0]}, "is not an InsightFace analysis"),
    ],
)
def test_wrong_inputs_are_explained(host: Host, changes: dict[str, Any], sentence: str) -> None:
    boxes = [] if "reference" in changes else [MIDDLE]
    more = MASK | {
        "blind": node("TestPerson", encoder="image only", seed=0),
        "foreign": node("TestPerson", encoder="antelopev2", seed=0),
        "nobody": node("TestPhoto", faces="none"),
        "no picture": node("TestPhoto", faces="no picture"),
        "nothing": node("TestNoFaces"),
    }
    refused(host, guidance(boxes, **changes) | more, sentence)


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("nan", "makes pictures of numbers that are not finite"),
        ("empty", "The connected VAE is empty"),
        ("channels", "latents of this model have 4 channels; the connected VAE decodes 16"),
        ("video", "have 2 dimensions; those of this model have 2, those of the VAE 3"),
    ],
)
def test_wrong_autoencoders_are_explained(host: Host, how: str, sentence: str) -> None:
    wrong = {"wrong": node("TestWrongVae", vae=["mini", 2], how=how)}
    base = host.run(unguided())
    refused(host, guidance(vae=["wrong", 0]) | wrong, sentence)
    after = host.run(unguided())
    assert torch.equal(latents(after), latents(base))
    assert torch.equal(after["picture"], base["picture"])


@pytest.mark.usefixtures("world")
def test_features_and_a_mask_do_without_insightface(host: Host) -> None:
    with blocked("insightface", "onnxruntime"):
        values = host.run(guided(guidance(face_encoder=None, mask=["mask", 0]) | MASK))
        assert [step.faces for step in the_run(values).steps] == [1] * 4


@pytest.fixture
def pack(host: Host, shipped_world: Path) -> str:
    """A face pack of the user's own, unpacked into a folder in itself as antelopev2 is."""
    name = "renamed"
    folder = host.base / "models" / "insightface" / "models" / name / name
    if not folder.is_dir():
        shutil.copytree(MINI_FOLDER / "insightface" / "models" / "mini", folder)
    return name


def person(host: Host, pack: str, **changes: Any) -> dict[str, Any]:
    """Guidance by a pack towards the person of an example photo."""
    encode = {"face": "largest", "face_number": 1, "weights": ""}
    return (
        guidance(**changes)
        | MASK
        | {
            "photo": node("DiffLoRA_ExamplePhoto", person="person_1"),
            "pack": node("DiffLoRA_LoadFaceEncoder", pack=pack, provider="CPU"),
            "person": node(
                "DiffLoRA_EncodeFaceFeatures",
                photos=["photo", 0],
                face_encoder=["pack", 0],
                **encode,
            ),
        }
    )


def test_the_recogniser_of_any_pack_guides(host: Host, pack: str) -> None:
    """The same weights: once as the ONNX file of a pack, once as the network that ships."""
    settings: dict[str, Any] = {"face_encoder": None, "mask": ["mask", 0]}
    ours = host.run(guided(person(host, "mini", **settings), steps=2))
    theirs = host.run(guided(person(host, pack, **settings), steps=2))
    assert the_run(theirs).steps[0].similarity == pytest.approx(
        the_run(ours).steps[0].similarity, abs=2e-3
    )
    assert (latents(theirs) - latents(ours)).abs().max() < 0.02


def test_a_reference_picture_is_as_good_as_its_features(host: Host, pack: str) -> None:
    """Within the rounding of the ONNX file and of crops to 8 bits, which later steps enlarge."""
    settings: dict[str, Any] = {"face_encoder": ["pack", 0]}
    one = host.run(guided(person(host, pack, **settings), steps=8, side=128))
    settings |= {"features": None, "reference": ["photo", 0]}
    other = host.run(guided(person(host, pack, **settings), steps=8, side=128))
    pairs = zip(the_run(one).steps, the_run(other).steps, strict=True)
    known = [(a.similarity, b.similarity) for a, b in pairs if a.faces]
    assert len(known) > 2
    assert all(a == pytest.approx(b, abs=0.01) for a, b in known[:3])


def test_a_pack_without_a_recogniser_is_explained(host: Host, shipped_world: Path) -> None:
    folder = host.base / "models" / "insightface" / "models" / "antelopev2"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(MINI_FOLDER / "insightface" / "models" / "mini" / "det_mini.onnx", folder)
    more = guidance(face_encoder=None, mask=["mask", 0]) | MASK
    more["person"] = node("TestPerson", encoder="antelopev2", seed=0)
    try:
        refused(host, more, "None of the ONNX files in .* is a face recogniser")
    finally:
        shutil.rmtree(folder)


def test_features_of_another_training_are_refused_with_a_mask(host: Host, pack: str) -> None:
    more = guidance(face_encoder=None, mask=["mask", 0]) | MASK
    more["person"] = node("TestPerson", encoder=f"{pack}@another", seed=0)
    refused(host, more, f"come from the face encoder {pack}@another; the one that guides is {pack}")


def test_width_of_features_is_checked(host: Host, shipped_world: Path) -> None:
    """The stand-in's features are as long as the random world's recogniser, not as this one's."""
    refused(host, guidance(), f"have {FACE_WIDTH} numbers per face; the network that guides gives")
