"""The first workflow runs as it is shipped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_host import Host
from prompts import node

TWIN = Path(__file__).parents[1] / "data" / "first_light_api.json"


@pytest.fixture
def first_light(host: Host, world: Path) -> dict[str, Any]:
    """The workflow; with faces that a colour stands for where no face pack is shipped."""
    prompt = json.loads(TWIN.read_text(encoding="utf-8"))
    if not (world / "insightface").is_dir():
        for key, entry in prompt.items():
            if entry["class_type"] == "DiffLoRA_LoadFaceEncoder":
                prompt[key] = node("TestFaces")
            if entry["class_type"] == "DiffLoRA_ExamplePhoto":
                prompt[key] = node("TestPhoto", faces="one")
    return prompt


def outputs(prompt: dict[str, Any], class_type: str) -> list[list[Any]]:
    return [[key, 0] for key, entry in prompt.items() if entry["class_type"] == class_type]


def test_first_light_runs(host: Host, first_light: dict[str, Any]) -> None:
    base, person = outputs(first_light, "VAEDecode")
    keep = {
        "keep_base": node("TestCapture", value=base, name="base"),
        "keep_person": node("TestCapture", value=person, name="person"),
    }
    values = host.run({**first_light, **keep})
    assert values["base"].shape == values["person"].shape == (4, 128, 128, 3)
    assert torch.isfinite(values["person"]).all()
    assert not torch.equal(values["base"], values["person"])
    saved = {path.name[:4] for path in (host.base / "output" / "difflora").glob("*.png")}
    assert saved == {"base", "pers"}


def test_example_photos_are_pictures(host: Host) -> None:
    example = host.module("nodes.example")
    assert len(example.people()) >= 4
    for person in example.people():
        (photo,) = example.ExamplePhoto.execute(person).args
        assert photo.shape == (1, 128, 128, 3) and photo.std() > 0.1
