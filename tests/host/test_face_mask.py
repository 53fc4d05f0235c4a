"""Face Mask in a real ComfyUI."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfy_host import Host, PromptFailed
from prompts import kept, node

pytestmark = pytest.mark.usefixtures("world")

BOXES = "[[0.1, 0.1, 0.3, 0.5], [0.5, 0.2, 0.9, 0.8]]"


def masked(host: Host, boxes: str = BOXES, **changes: Any) -> dict[str, Any]:
    """The mask of a batch of two pictures of 192 pixels."""
    settings = {"face": "all", "face_number": 1, "no_face": "empty mask", "shape": "box"}
    prompt = {
        "one": node("TestPhoto", faces="one"),
        "two": node("TestPhoto", faces="two"),
        "both": node("ImageBatch", image1=["one", 0], image2=["two", 0]),
        "faces": node("TestPlacedFaces", boxes=boxes),
        "mask": node(
            "DiffLoRA_FaceMask",
            images=["both", 0],
            face_encoder=["faces", 0],
            **{**settings, "grow": 0.0, "feather": 0.0, **changes},
        ),
    }
    return host.run(kept(prompt, mask=["mask", 0], crops=["mask", 1]))


def corners(mask: torch.Tensor) -> list[int]:
    y, x = (mask > 0).nonzero(as_tuple=True)
    return [int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1]


def test_all_faces_of_every_picture(host: Host) -> None:
    values = masked(host)
    assert values["mask"].shape == (2, 192, 192) and values["crops"].shape == (4, 160, 160, 3)
    share = 0.2 * 0.4 + 0.4 * 0.6
    assert values["mask"].mean((1, 2)).tolist() == pytest.approx([share] * 2, abs=0.01)


@pytest.mark.parametrize(
    ("choice", "box"),
    [
        ({"face": "largest"}, [96, 38, 173, 154]),
        ({"face": "leftmost"}, [19, 19, 58, 96]),
        ({"face": "by number", "face_number": 2}, [96, 38, 173, 154]),
        ({"face": "leftmost", "grow": 0.25}, [10, 0, 67, 115]),
        ({"face": "leftmost", "shape": "oval"}, [19, 19, 58, 96]),
    ],
)
def test_one_face(host: Host, choice: dict[str, Any], box: list[int]) -> None:
    assert corners(masked(host, **choice)["mask"][0]) == pytest.approx(box, abs=1)


@pytest.mark.parametrize(("policy", "value"), [("empty mask", 0.0), ("whole picture", 1.0)])
def test_pictures_without_a_face(host: Host, policy: str, value: float) -> None:
    values = masked(host, "[]", no_face=policy)
    assert (values["mask"] == value).all() and values["mask"].shape == (2, 192, 192)
    assert values["crops"].shape == (2, 192, 192, 3)
    third = masked(host, face="by number", face_number=3, no_face=policy)
    assert (third["mask"] == value).all()


def test_missing_faces_can_be_an_error(host: Host) -> None:
    with pytest.raises(PromptFailed, match="Picture 1: No face was found"):
        masked(host, "[]", no_face="error")
    with pytest.raises(PromptFailed, match="Picture 1: There is no face number 3: 2 faces were"):
        masked(host, face="by number", face_number=3, no_face="error")
