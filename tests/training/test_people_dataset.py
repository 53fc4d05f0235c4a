"""The data set of people: masks, annotation files, the threshold, and what broken files say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from difflora_core.errors import BadConfig, DiffLoRAError
from tests.training.coco_files import change, files_in, overrides, polygons, write, write_split
from training.__main__ import main, open_run
from training.config import Config, load_config
from training.controlnet import people_stage
from training.controlnet.coco import BadAnnotations, survey
from training.controlnet.people import BadIndex, Index, read_index
from training.controlnet.segmentation import BadSegmentation, to_mask, to_runs

#: run lengths written by pycocotools 2.0.11
DISC = np.hypot(*(np.mgrid[:9, :12] - np.array([4, 5])[:, None, None])) < 3.6
DISC_COUNTS = "e0352N2O0001N2Ni0"
STRIPES = np.indices((900, 3)).sum(0) % 400 < 150
STRIPES_COUNTS = "0f4j700S30mL0S30mL0`N"


def built(tmp_path: Path, words: list[str]) -> tuple[Config, dict]:
    """Run the stage on two drawn splits of 24 and 8 pictures; its report."""
    for i, (name, count) in enumerate((("train", 24), ("validation", 8))):
        if not (tmp_path / name).exists():
            write_split(tmp_path / name, count, seed=i)
        words = [*words, *overrides(name, files_in(tmp_path / name))]
    file = tmp_path / "people.toml"
    file.write_text(f'[run]\nroot = "{tmp_path / "run"}"\ndevice = "cpu"\n')
    config = load_config(file, words)
    folder = open_run(config, "build-people-dataset")
    people_stage.run(config, folder)
    return config, json.loads((folder.path / "report.json").read_text())


def index(config: Config, split: str = "train") -> Index:
    return read_index(people_stage.index_path(config, split))


@pytest.mark.parametrize(("mask", "counts"), [(DISC, DISC_COUNTS), (STRIPES, STRIPES_COUNTS)])
def test_run_lengths_are_those_of_pycocotools(mask: np.ndarray, counts: str) -> None:
    runs = {"size": list(mask.shape), "counts": counts}
    assert to_runs(mask) == runs
    assert np.array_equal(to_mask(runs, *mask.shape), mask)


@pytest.mark.parametrize("value", [False, True])
def test_run_lengths_of_an_empty_and_a_full_mask(value: bool) -> None:
    mask = np.full((5, 3), value)
    assert np.array_equal(to_mask(to_runs(mask), 5, 3), mask)
    plain = {"size": [5, 3], "counts": [0, 15] if value else [15]}
    assert np.array_equal(to_mask(plain, 5, 3), mask)


def test_polygons_fill_the_pixels_inside() -> None:
    square = to_mask([[2, 1, 7, 1, 7, 4, 2, 4]], 6, 9)
    expected = np.zeros((6, 9), bool)
    expected[1:4, 2:7] = True
    assert np.array_equal(square, expected)
    again = to_mask(polygons(DISC), *DISC.shape)
    assert (again != DISC).sum() <= 0.05 * DISC.sum()


@pytest.mark.parametrize(
    ("segmentation", "expected"),
    [
        ([], "polygons or a table"),
        ("rle", "polygons or a table"),
        ([[1, 2, 3, 4]], "three pairs"),
        ([[1, 2, 3, 4, 5, float("nan")]], "three pairs"),
        ([[1, 2, 3, 4, 5, 6, 7]], "three pairs"),
        ({"size": [4, 5], "counts": [12]}, "size"),
        ({"size": [4, 3], "counts": [5]}, "cover 5 pixels"),
        ({"size": [4, 3], "counts": [13, -1]}, "whole numbers"),
        ({"size": [4, 3], "counts": "P"}, "middle of a number"),
        ({"size": [4, 3], "counts": "\n"}, "cannot stand"),
        ({"size": [4, 3]}, "whole numbers"),
    ],
)
def test_broken_masks_are_explained(segmentation: object, expected: str) -> None:
    with pytest.raises(BadSegmentation, match=expected):
        to_mask(segmentation, 4, 3)


def test_an_index_holds_what_was_drawn(tmp_path: Path) -> None:
    split = write_split(tmp_path / "train", 24, seed=0)
    config, report = built(tmp_path, ["people.count=24"])
    pictures = index(config).pictures
    assert [p.file for p in pictures] == [f"{i:012d}.png" for i in range(24)]
    assert report["train"]["people"] == split.drawn.present.sum() == report["train"]["faces"]
    for i, picture in enumerate(pictures):
        assert picture.captions == (split.prompts[i],)
        assert len(picture.people) == split.drawn.present[i].sum()
        for p, person in enumerate(picture.people):
            mask = split.drawn.masks[i, p].numpy()
            drawn = to_mask(person.mask, picture.height, picture.width)
            assert (drawn & mask).sum() > 0.97 * (drawn | mask).sum()
            assert person.face == pytest.approx(split.drawn.boxes[i, p].tolist(), abs=1e-3)
            landmarks = torch.tensor(person.landmarks)
            assert (landmarks - split.drawn.landmarks[i, p]).abs().max() < 1e-3
            columns = mask.any(0).nonzero()[0]
            assert (person.box[0], person.box[2]) == (columns[0], columns[-1] + 1)
        covered = split.drawn.masks[i].sum().item() / 128**2
        assert picture.coverage == pytest.approx(min(covered, 1.0))


def test_the_threshold_that_gives_a_wanted_number_is_found(tmp_path: Path) -> None:
    config, report = built(tmp_path, ["people.count=9"])
    chosen, everything = index(config).pictures, built(tmp_path, ["people.count=24"])[0]
    coverages = sorted(p.coverage for p in index(everything).pictures)
    assert len(chosen) == report["train"]["pictures"] == 9
    assert report["threshold"] == coverages[-9]
    assert min(p.coverage for p in chosen) == coverages[-9]
    share = sum(p.coverage >= coverages[-9] for p in index(everything, "validation").pictures)
    again, same = built(tmp_path, ["people.count=0", f"people.threshold={coverages[-9]}"])
    assert same["train"]["pictures"] == 9 and len(index(again).pictures) == 9
    assert share <= same["validation"]["pictures"] <= 8
    assert report["train"]["pictures_by_threshold"]["0.00"] == 24


@pytest.mark.parametrize(
    ("wanted", "threshold", "count"),
    [(1, 0.9, 1), (2, 0.9, 1), (3, 0.5, 4), (4, 0.5, 4), (6, 0.1, 6)],
)
def test_equal_coverages_pass_together(wanted: int, threshold: float, count: int) -> None:
    ascending = np.array([0.1, 0.1, 0.5, 0.5, 0.5, 0.9])
    chosen = people_stage.choose(ascending, wanted, 0.0)
    assert (chosen.threshold, chosen.count) == (threshold, count)


def test_too_many_pictures_wanted(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="asks for 25 pictures, only 24"):
        built(tmp_path, ["people.count=25"])


def test_files_have_to_be_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "people.toml"
    file.write_text(f'[run]\nroot = "{tmp_path}"\n')
    assert main(["build-people-dataset", "--config", str(file)]) == 2
    assert "people.train.instances" in caplog.text


def test_what_cannot_be_used_is_left_out_and_counted(tmp_path: Path) -> None:
    folder = tmp_path / "train"
    write_split(folder, 24, seed=0)
    change(folder / "instances.json", "annotations", 0, iscrowd=1)
    change(folder / "instances.json", "annotations", 1, area=0)
    change(folder / "instances.json", "annotations", 2, image_id=5)
    change(folder / "instances.json", "annotations", 3, category_id=3)
    change(folder / "wholebody.json", "annotations", 4, face_valid=False)
    change(folder / "wholebody.json", "annotations", 5, face_box=[0, 0, 0, 0])
    change(folder / "captions.json", "annotations", 9, caption="  ")
    files = files_in(folder)
    found = survey(Path(files.instances), Path(files.captions), Path(files.wholebody))
    assert found.left_out == {
        "crowds": 1, "people without area": 1, "people of unknown pictures": 1,
        "faces without box or points": 1, "pictures without a caption": 1,
    }  # fmt: skip
    people = [person for picture in found.pictures for person in picture.people]
    assert sum(person.face is None for person in people) == 2
    without = survey(Path(files.instances), Path(files.captions), None)
    assert all(p.face is None for picture in without.pictures for p in picture.people)


@pytest.mark.parametrize("polygons", [[], [[]], [[1, 2, 30, 40]], [[5], [1, 2, 30, 40]]])
def test_polygons_of_fewer_than_three_corners_are_no_area(
    tmp_path: Path, polygons: list[list[float]]
) -> None:
    write_split(tmp_path, 4, seed=0)
    files, good = files_in(tmp_path), [[1, 2, 30, 40, 5, 60]]
    change(tmp_path / "instances.json", "annotations", 0, segmentation=[*polygons, *good])
    change(tmp_path / "instances.json", "annotations", 1, segmentation=polygons)
    found = survey(Path(files.instances), Path(files.captions), None)
    assert found.left_out == {"people without area": 1}
    assert found.pictures[0].people[0].mask == good


@pytest.mark.parametrize(
    ("file", "change_of", "expected"),
    [
        ("instances.json", {"bbox": [1, 2, 3]}, "entry 7 needs 4 numbers under bbox"),
        ("instances.json", {"bbox": [1, 2, 3, "4"]}, "needs 4 numbers under bbox"),
        ("instances.json", {"area": "large"}, "entry 7 has area 'large'"),
        ("instances.json", {"image_id": None}, "entry 7 has image_id None"),
        ("instances.json", {"id": [7]}, r"has id \[7\]"),
        ("instances.json", {"category_id": [1]}, r"entry 7 has category_id \[1\]"),
        ("wholebody.json", {"face_kpts": [0.0] * 60}, "needs 204 numbers under face_kpts"),
        ("captions.json", {"caption": 3}, "has caption 3"),
        ("instances.json", {"segmentation": {"size": [9, 9], "counts": [81]}}, r"000\.png.*size"),
        ("instances.json", {"segmentation": [["a", 2]]}, r"000\.png.*three pairs of numbers"),
    ],
)
def test_broken_entries_are_named(
    tmp_path: Path, file: str, change_of: dict, expected: str
) -> None:
    write_split(tmp_path / "train", 4, seed=0)
    change(tmp_path / "train" / file, "annotations", 0, **change_of)
    with pytest.raises(DiffLoRAError, match=expected):
        built(tmp_path, ["people.count=0"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"images": [', "not JSON.*download"),
        ("[]", "no list 'images'"),
        ('{"images": [], "annotations": {}}', "no list 'annotations'"),
        ('{"images": [], "annotations": [], "categories": []}', "no category 'person'"),
        ('{"images": [{}], "annotations": [], "categories": [{"id": 1, "name": "person"}]}', "id"),
        ('{"images": [], "annotations": [], "categories": [{"id": [1], "name": "person"}]}', "id"),
    ],
)
def test_broken_files_are_explained(tmp_path: Path, text: str, expected: str) -> None:
    write_split(tmp_path, 2, seed=0)
    (tmp_path / "instances.json").write_text(text)
    with pytest.raises(BadAnnotations, match=expected):
        survey(tmp_path / "instances.json", tmp_path / "captions.json", None)


def test_missing_files_are_named(tmp_path: Path) -> None:
    write_split(tmp_path / "train", 4, seed=0)
    with pytest.raises(BadAnnotations, match="Cannot read"):
        survey(tmp_path / "absent.json", tmp_path / "absent.json", None)
    (tmp_path / "train/pictures/000000000002.png").unlink()
    with pytest.raises(DiffLoRAError, match=r"1 of 4 pictures.*000000000002\.png"):
        built(tmp_path, ["people.count=0"])


def test_pictures_that_cannot_be_used_are_left_out_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_split(tmp_path / "train", 6, seed=0)
    folder = tmp_path / "train/pictures"
    whole = (folder / "000000000001.png").read_bytes()
    (folder / "000000000001.png").write_bytes(whole[: len(whole) // 2])
    Image.new("RGB", (96, 128)).save(folder / "000000000002.png")
    (folder / "000000000004.png").write_text("no picture")
    config, report = built(tmp_path, ["people.count=0"])
    files = [f"{i:012d}.png" for i in (0, 3, 5)]
    assert [p.file for p in index(config).pictures] == files
    assert report["train"]["pictures"] == 3
    assert report["train"]["left_out"] == {"unreadable pictures": 2, "pictures of another size": 1}
    assert "3 pictures cannot be used" in caplog.text
    assert "000000000002.png is 96x128, its annotation says 128x128." in caplog.text


def test_pictures_of_other_annotations_are_refused(tmp_path: Path) -> None:
    write_split(tmp_path / "train", 2, seed=0)
    for file in (tmp_path / "train/pictures").iterdir():
        Image.new("RGB", (96, 128)).save(file)
    with pytest.raises(DiffLoRAError, match=r"None of the 2 pictures.*000\.png is 96x128"):
        built(tmp_path, ["people.count=0"])


def test_both_splits_are_written_or_none(tmp_path: Path) -> None:
    config, _ = built(tmp_path, ["people.count=24"])
    before = {split: index(config, split) for split in people_stage.SPLITS}
    for file in (tmp_path / "validation/pictures").iterdir():
        file.unlink()
    with pytest.raises(DiffLoRAError, match="pictures are not in"):
        built(tmp_path, ["people.count=4"])
    assert before == {split: index(config, split) for split in people_stage.SPLITS}


def test_a_split_without_people_is_refused(tmp_path: Path) -> None:
    write_split(tmp_path / "train", 2, seed=0)
    data = json.loads((tmp_path / "train/instances.json").read_text())
    write(tmp_path / "train/instances.json", data | {"annotations": []})
    with pytest.raises(DiffLoRAError, match="no captioned picture"):
        built(tmp_path, ["people.count=0"])


def test_a_threshold_that_nothing_passes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match=r"No train picture passes: people cover 0\.99 of none"):
        built(tmp_path, ["people.count=0", "people.threshold=0.99"])


@pytest.mark.parametrize("text", ["", "{}\n", '{"format": "other", "folder": ""}\n', "no json\n"])
def test_broken_indices_are_explained(tmp_path: Path, text: str) -> None:
    (tmp_path / "train.jsonl").write_text(text)
    with pytest.raises(BadIndex, match=r"train.jsonl is not an index.*build-people-dataset"):
        read_index(tmp_path / "train.jsonl")
