"""The first workflow and the one of guidance run as they are shipped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_host import Host
from prompts import node

TWINS = Path(__file__).parents[1] / "data"


def twin(name: str) -> dict[str, Any]:
    return json.loads((TWINS / f"{name}_api.json").read_text(encoding="utf-8"))


@pytest.fixture
def first_light() -> dict[str, Any]:
    return twin("first_light")


def outputs(prompt: dict[str, Any], class_type: str, slot: int = 0) -> list[list[Any]]:
    return [[key, slot] for key, entry in prompt.items() if entry["class_type"] == class_type]


def keep(prompt: dict[str, Any], **links: list[Any]) -> dict[str, Any]:
    extra = {f"keep_{k}": node("TestCapture", value=v, name=k) for k, v in links.items()}
    return {**prompt, **extra}


def test_first_light_runs_on_random_weights(
    host: Host, world: Path, first_light: dict[str, Any]
) -> None:
    for key, entry in first_light.items():
        if entry["class_type"] == "DiffLoRA_LoadFaceEncoder":
            first_light[key] = node("TestFaces")
        if entry["class_type"] == "DiffLoRA_ExamplePhoto":
            first_light[key] = node("TestPhoto", faces="one")
    base, person = outputs(first_light, "VAEDecode")
    values = host.run(keep(first_light, base=base, person=person))
    assert values["base"].shape == values["person"].shape == (4, 128, 128, 3)
    assert torch.isfinite(values["person"]).all()
    assert not torch.equal(values["base"], values["person"])
    saved = {path.name[:4] for path in (host.base / "output" / "difflora").glob("*.png")}
    assert {"base", "pers"} <= saved


def test_first_light_draws_the_person(
    host: Host, shipped_world: Path, first_light: dict[str, Any]
) -> None:
    base, person = outputs(first_light, "DiffLoRA_Likeness", slot=2)
    crops = outputs(first_light, "DiffLoRA_EncodeFaceFeatures", slot=1)[0]
    values = host.run(keep(first_light, base=base, person=person, crops=crops))
    assert values["crops"].shape[0] == 1
    # over all four: the best of four strangers may well look like anybody
    assert mean_percent(values["person"]) > 50 > mean_percent(values["base"])


def test_guidance_makes_the_same_seed_resemble_the_person(host: Host, shipped_world: Path) -> None:
    prompt = twin("mask_aware_guidance")
    base, ours = outputs(prompt, "DiffLoRA_Likeness", slot=2)
    report = outputs(prompt, "DiffLoRA_GuidanceReport")[0][0]
    names = {"curve": [report, 1], "faces": [report, 2], "text": [report, 3]}
    values = host.run(keep(prompt, base=base, ours=ours, **names))
    assert mean_percent(values["ours"]) > mean_percent(values["base"]) + 10
    assert values["curve"].std() > 0.01 and values["faces"].std() > 0.1
    assert "15 guided steps, from sigma 8.08 to 0.47" in values["text"]
    saved = {path.name for path in (host.base / "output" / "difflora").glob("guided*.png")}
    assert len(saved) >= 4


def mean_percent(report: str) -> float:
    return float(report.rpartition("mean: ")[2].removesuffix(" %"))


def test_faces_of_a_group_are_numbered(host: Host, shipped_world: Path) -> None:
    names = host.module("nodes.example").people()[:2]
    photos = [node("DiffLoRA_ExamplePhoto", person=name) for name in names]
    prompt = {
        "one": photos[0],
        "two": photos[1],
        "group": node(
            "ImageStitch",
            image1=["one", 0],
            image2=["two", 0],
            direction="right",
            match_image_size=True,
            spacing_width=0,
            spacing_color="white",
        ),
        "faces": node("DiffLoRA_LoadFaceEncoder", pack="mini", provider="CPU"),
        "features": node(
            "DiffLoRA_EncodeFaceFeatures",
            photos=["group", 0],
            face_encoder=["faces", 0],
            face="by number",
            face_number=2,
            weights="",
        ),
    }
    values = host.run(keep(prompt, crops=["features", 1], features=["features", 0]))
    assert values["crops"].shape[0] == 2
    alone = {**prompt, "group": photos[1]}
    alone["features"]["inputs"] |= {"face_number": 1}
    single = host.run(keep(alone, features=["features", 0]))["features"]
    assert torch.cosine_similarity(single.face, values["features"].face).item() > 0.8


def test_example_photos_are_pictures(host: Host) -> None:
    example = host.module("nodes.example")
    assert len(example.people()) >= 4
    for person in example.people():
        (photo,) = example.ExamplePhoto.execute(person).args
        assert photo.shape == (1, 128, 128, 3) and photo.std() > 0.1
