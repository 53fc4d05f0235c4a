"""Drawn portraits: ground truth agrees with pixels, prompts with scenes, seeds with people."""

from __future__ import annotations

import random
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

from training.portraits import (
    ATTRIBUTES,
    FACTORS,
    Scene,
    describe,
    identities,
    is_held_out,
    parse_prompt,
    render,
    renderer_digest,
    sample_scenes,
)
from training.portraits.anatomy import Pose, measure
from training.portraits.features import landmarks
from training.portraits.head import face_distance


def scenes(n: int, seed: int = 0, **options) -> Scene:
    return sample_scenes(n, torch.Generator().manual_seed(seed), **options)


def with_factor(some: Scene, **factors: float) -> Scene:
    who = some.identity.clone()
    for name, value in factors.items():
        who[..., FACTORS.index(name)] = value
    return replace(some, identity=who)


def test_pictures_do_not_depend_on_their_neighbours() -> None:
    some = scenes(20, people="mixed")
    together = render(some).images
    alone = torch.cat([render(some[i : i + 1]).images for i in range(20)])
    assert torch.allclose(together, alone, atol=1e-5)
    assert together.min() >= 0 and together.max() <= 1


def test_sizes_show_the_same_picture() -> None:
    some = scenes(4, fixed={"style": "photo"})
    small, large = render(some, 128), render(some, 256)
    reduced = torch.nn.functional.avg_pool2d(large.images, 2)
    assert (reduced - small.images).abs().mean() < 0.02
    assert torch.allclose(large.boxes, 2 * small.boxes)


def test_ground_truth_lies_where_the_face_is() -> None:
    drawn = render(scenes(64, people=2))
    x, y = drawn.landmarks.unbind(-1)
    left, top, right, bottom = (drawn.boxes[..., k, None] for k in range(4))
    inside = (x > left - 3) & (x < right + 3) & (y > top) & (y < bottom)
    assert inside.float().mean() > 0.99
    assert (x[..., 0] < x[..., 1]).all(), "the first eye is the one on the picture's left"
    assert not (drawn.masks[:, 0] & drawn.masks[:, 1]).any(), "people hide each other"


@pytest.mark.parametrize("style", [s for s in ATTRIBUTES["style"] if s != "photo"])
def test_every_style_leaves_eyes_open(style: str) -> None:
    """Light and dark around the eyes go together with those of the photo of the same scene."""
    drawn = render(scenes(24, fixed={"style": style, "accessory": "none"}))
    photo = render(scenes(24, fixed={"style": "photo", "accessory": "none"}))
    alike = []
    for i, eyes in enumerate(photo.landmarks[:, 0, :2].round().long().tolist()):
        for x, y in eyes:
            around = (i, slice(None), slice(max(y - 6, 0), y + 7), slice(max(x - 6, 0), x + 7))
            greys = [picture.images[around].mean(0).flatten() for picture in (photo, drawn)]
            alike.append(torch.corrcoef(torch.stack(greys))[0, 1])
    assert torch.stack(alike).mean() > 0.5


def test_lips_are_darker_than_dark_skin_without_colours() -> None:
    fixed = {"accessory": "none", "expression": "neutral", "pose": "front", "framing": "portrait"}
    some = scenes(12, fixed=fixed | {"style": "black and white"})
    drawn = render(with_factor(some, skin_tone=1.0, beard=0.0, lip_fullness=1.0))
    for picture, corners in zip(drawn.images, drawn.landmarks[:, 0, 3:], strict=True):
        x, y = corners.mean(0).round().int().tolist()
        lower_lip, chin = picture[0, y + 2, x], picture[0, y + 6, x]
        assert lower_lip < 0.75 * chin


def where_the_iris_is(some: Scene) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels that change with the colour of eyes [N, H, W], and the points of eyes [N, 2, 2]."""
    brown, blue = (render(with_factor(some, eye_colour=value)) for value in (0.0, 0.75))
    changed = (brown.images - blue.images).abs().sum(1) > 0.05
    return changed, brown.landmarks[:, 0, :2]


def test_eyes_show_their_colour() -> None:
    """Only the iris changes with the factor, and it does so at the eye landmarks."""
    fixed = {"style": "photo", "accessory": "none", "expression": "surprised"}
    changed, eyes = where_the_iris_is(scenes(8, fixed=fixed))
    for picture, points in zip(changed, eyes, strict=True):
        pixels = picture.nonzero().flip(-1) + 0.5
        assert len(pixels), "the colour of the eyes must be visible"
        assert torch.cdist(pixels, points).amin(1).max() < 9


@pytest.mark.parametrize("pose", ["left", "right"])
def test_hair_does_not_hide_an_eye_of_a_turned_head(pose: str) -> None:
    fixed = {"style": "photo", "accessory": "none", "expression": "neutral", "pose": pose}
    some = with_factor(scenes(48, fixed=fixed | {"framing": "portrait"}), eye_spacing=1.0)
    for picture, points in zip(*where_the_iris_is(some), strict=True):
        near = torch.cdist(picture.nonzero().flip(-1) + 0.5, points) < 7
        left, right = near.sum(0).tolist()
        assert min(left, right) > 0.5 * max(left, right)


@pytest.mark.parametrize("expression", ATTRIBUTES["expression"])
def test_mouths_stay_on_the_face_and_below_the_nose(expression: str) -> None:
    fixed = {"expression": expression}
    turned = [scenes(300, fixed=fixed | {"pose": side}) for side in ATTRIBUTES["pose"][1:3]]
    for some in turned:
        who, pose = measure(some.identity[:, 0]), Pose.of(some, 0)
        corners = landmarks(who, pose, some.expression[:, 0])[:, 3:]
        u, v = pose.head(corners[:, 0, 0, None, None], corners[:, 0, 1, None, None])
        far = pose.head(corners[:, 1, 0, None, None], corners[:, 1, 1, None, None])
        for place in ((u, v), far):
            assert (face_distance(*place, who, pose) < 0).all(), "a corner lies beyond the cheek"
        assert (who.mouth_y - who.eye_y - who.nose_length >= 6.4).all()


@pytest.mark.parametrize("style", ["photo", "black and white", "sketch", "cartoon"])
def test_white_hair_parts_from_a_white_wall(style: str) -> None:
    fixed = {"style": style, "background": "white", "accessory": "none", "pose": "front"}
    some = with_factor(scenes(8, fixed=fixed), hair_colour=1.0, hair_length=0.6)
    grey = render(some).images.mean(1)
    crown = grey[:, :40, 56:72].amin(1).mean(1)  # darkest on the way from the wall to the hair
    wall = grey[:, :4, 56:72].mean((1, 2))
    assert (crown < wall - 0.2).all()


FRONT = {"style": "photo", "pose": "front", "accessory": "none", "background": "green"}


def colours_at(some: Scene, u: float, v: float) -> torch.Tensor:
    """Of the pixel at (u, v), in half widths and half heights of the face: [B, 3]."""
    who, pose = measure(some.identity[:, 0]), Pose.of(some, 0)
    x, y = pose.to_picture(u * who.width[:, 0, 0], v * who.height[:, 0, 0])
    images = render(some).images
    return images[torch.arange(len(images)), :, y.round().long(), x.round().long()]


def test_hair_is_of_one_colour_above_and_below() -> None:
    looks = {"hair_colour": 0.75, "hair_length": 0.9, "hair_volume": 0.5, "beard": 0.0}
    some = with_factor(scenes(8, fixed=FRONT), **looks)
    above, below = colours_at(some, 0.55, -0.72), colours_at(some, 1.1, 0.7)
    assert (below.mean(1) > 0.65 * above.mean(1)).all()


def test_short_hair_does_not_go_on_along_the_jaw() -> None:
    looks = {"hair_colour": 0.0, "hair_length": 0.4, "hair_volume": 0.9, "beard": 0.0}
    some = with_factor(scenes(8, fixed=FRONT), **looks)
    for side in (-0.82, 0.82):
        assert (colours_at(some, side, 0.75).amax(1) > 0.3).all()  # the wall, and not black hair


def test_a_beard_covers_the_chin() -> None:
    looks = {"hair_colour": 0.0, "skin_tone": 0.0, "beard": 1.0, "face_length": 1.0}
    some = with_factor(scenes(8, fixed=FRONT | {"expression": "neutral"}), **looks)
    assert (colours_at(some, 0.0, 0.79).mean(1) < 0.4).all()


def test_absent_people_have_no_truth() -> None:
    drawn = render(scenes(64, people="mixed"))
    absent = ~drawn.present
    assert absent.any() and drawn.boxes[absent].isnan().all()
    assert not drawn.masks[absent].any()
    assert drawn.boxes[drawn.present].isfinite().all()


def test_identities_are_split_and_stable() -> None:
    seeds = torch.arange(1000)
    train, test = identities(seeds), identities(seeds, "test")
    assert torch.equal(train, identities(seeds)) and train.shape == (1000, len(FACTORS))
    assert train.min() >= 0 and train.max() < 1 and abs(train.mean() - 0.5) < 0.01
    assert torch.cdist(train, test).min() > 0.1
    correlation = torch.corrcoef(train.T) - torch.eye(len(FACTORS))
    assert correlation.abs().max() < 0.15
    with pytest.raises(ValueError, match="split"):
        identities(seeds, "validation")


def test_training_never_sees_held_out_combinations() -> None:
    train, test = scenes(500), scenes(500, split="test")
    assert not is_held_out(train.attributes()).any()
    assert is_held_out(test.attributes()).all()


def test_prompts_say_what_the_scene_shows() -> None:
    some = scenes(200, seed=3)
    for mention in (1.0, 0.5):
        prompts = describe(some, random.Random(0), mention=mention, looks=0.3)
        for i, prompt in enumerate(prompts):
            for name, value in parse_prompt(prompt).items():
                assert value == some.attributes()[name][i], (prompt, name)


def test_canonical_prompts_say_everything() -> None:
    some = scenes(100, seed=4)
    for i, prompt in enumerate(describe(some)):
        expected = {name: int(v[i]) for name, v in some.attributes().items()}
        silent = {"framing": 0, "accessory": 0}  # what goes without saying
        said = parse_prompt(prompt)
        assert {k: said.get(k, silent.get(k)) for k in expected} == expected, prompt


def test_every_value_can_be_asked_for_and_is_visible() -> None:
    """Changing one attribute changes the picture; so none is a word without a meaning."""
    base = scenes(4, seed=5, fixed={"style": "photo"})
    picture = render(base).images
    for name, values in ATTRIBUTES.items():
        for index in range(len(values)):
            field = getattr(base, name)
            if (field == index).all():
                continue
            if name in ("pose", "framing"):  # these act through the geometry
                fixed = {"style": "photo", name: values[index]}
                other = render(scenes(4, seed=5, fixed=fixed)).images
            else:
                changed = torch.full_like(field, index)
                other = render(replace(base, **{name: changed})).images
            assert (other - picture).abs().amax() > 0.1, (name, values[index])


def test_unknown_values_are_refused() -> None:
    with pytest.raises(ValueError, match="has no value"):
        scenes(1, fixed={"style": "fresco"})
    with pytest.raises(KeyError, match="no attribute"):
        scenes(1, fixed={"mood": "calm"})
    with pytest.raises(KeyError, match="no attribute"):
        scenes(1, weights={"mood": (1.0,)})
    with pytest.raises(ValueError, match="people"):
        scenes(1, people=4)


def test_a_renderer_is_known_by_its_code_not_its_comments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_module("training.portraits.render"), "__file__", tmp_path / "r.py")
    code = tmp_path / "eyes.py"
    code.write_text("SIZE = 3.0\n")
    before = renderer_digest()
    code.write_text("SIZE = (  # of an eye\n    3.0\n)\n")
    assert renderer_digest() == before
    code.write_text("SIZE = 3.5\n")
    assert renderer_digest() != before
