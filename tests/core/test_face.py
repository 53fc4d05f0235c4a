"""Finding, numbering and choosing faces; packs that are missing, nested, packed or incomplete."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from difflora_core.errors import BadWeightsFile, DiffLoRAError, NoFaceFound
from difflora_core.face import CHOICES, Face, FaceEncoder, choose_face, face_previews
from difflora_core.face_pack import find_pack
from difflora_core.mini_world import MINI_FOLDER

POINTS = np.float32([[8, 10], [16, 10], [12, 14], [9, 18], [15, 18]])


class SquareDetector:
    """Finds white squares, but only those that take up less than half of the picture's side."""

    def __init__(self) -> None:
        self.tried: list[int] = []

    def detect(self, bgr: np.ndarray, input_size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        self.tried.append(input_size[0])
        boxes = [
            (*squares, 0.9)
            for squares in _squares(bgr)
            if squares[2] - squares[0] < 0.5 * max(bgr.shape[:2])
        ]
        points = [POINTS + np.float32(box[:2]) for box in boxes]
        return np.float32(boxes).reshape(-1, 5), np.float32(points).reshape(-1, 5, 2)


class MeanColour:
    """An "embedding": the picture's mean colour, blue first as insightface's pictures are."""

    def get(self, bgr: np.ndarray, face: object) -> np.ndarray:
        return bgr.reshape(-1, 3).mean(0)


def _squares(bgr: np.ndarray) -> list[tuple[int, int, int, int]]:
    rows = (bgr == 255).all(-1)
    columns = np.flatnonzero(rows.any(0))
    runs = np.split(columns, np.flatnonzero(np.diff(columns) > 1) + 1) if len(columns) else []
    found = []
    for run in runs:
        height = np.flatnonzero(rows[:, run[0]])
        found.append((int(run[0]), int(height[0]), int(run[-1]) + 1, int(height[-1]) + 1))
    return found


def encoder() -> FaceEncoder:
    models = {"detection": SquareDetector(), "recognition": MeanColour()}
    return FaceEncoder.wrap(SimpleNamespace(models=models, model_dir="/packs/squares"))


def picture(*squares: tuple[int, int, int], side: int = 128) -> np.ndarray:
    image = np.full((side, side, 3), (200, 100, 0), np.uint8)
    for x, y, size in squares:
        image[y : y + size, x : x + size] = 255
    return image


THREE = ((80, 60, 24), (10, 40, 30), (50, 10, 20))


def test_faces_are_numbered_from_left_to_right() -> None:
    faces = encoder().faces(picture(*THREE))
    assert [face.box[0] for face in faces] == [10, 50, 80]
    assert all(face.picture == (128, 128) for face in faces)
    assert faces[0].embedding[0] < faces[0].embedding[2]  # the recogniser was given BGR
    assert np.linalg.norm(faces[0].unit_embedding) == pytest.approx(1)


@pytest.mark.parametrize(
    "choice, left",
    [("largest", 10), ("leftmost", 10), ("rightmost", 80), ("topmost", 50), ("center", 80),
     (1, 10), (2, 50), (3, 80), ("3", 80)],
)  # fmt: skip
def test_choices(choice: str | int, left: int) -> None:
    assert choose_face(encoder().faces(picture(*THREE)), choice).box[0] == left  # type: ignore[arg-type]


def test_no_face() -> None:
    with pytest.raises(NoFaceFound, match="No face was found in the picture"):
        encoder().face(picture())


@pytest.mark.parametrize("number", [0, 4, -1])
def test_number_out_of_range_names_how_many_there_are(number: int) -> None:
    faces = encoder().faces(picture(*THREE))
    with pytest.raises(NoFaceFound, match=f"no face number {number}: 3 faces were found"):
        choose_face(faces, number)


def test_unknown_choice_lists_the_known() -> None:
    with pytest.raises(DiffLoRAError, match=", ".join(CHOICES)):
        choose_face(encoder().faces(picture(*THREE)), "prettiest")


def test_close_up_is_found_with_a_border() -> None:
    """The square fills three quarters of the picture, more than the detector can see."""
    found = encoder().faces(picture((16, 16, 96)))
    assert [face.box.tolist() for face in found] == [[16, 16, 112, 112]]
    assert np.allclose(found[0].landmarks, POINTS + 16)


def test_a_close_up_in_a_large_picture_takes_little_memory() -> None:
    """A border of half its longer side would make four pictures of it."""
    image = picture((500, 300, 2400), side=3000)
    finder, shapes = encoder(), []
    detector = finder.analysis.models["detection"]
    detect = detector.detect
    detector.detect = lambda bgr, **size: shapes.append(bgr.shape) or detect(bgr, **size)
    (face,) = finder.faces(image)
    assert np.allclose(face.box, [500, 300, 2900, 2700], atol=15)
    assert max(max(shape) for shape in shapes if shape != image.shape) <= 1280


def test_a_strip_too_thin_for_the_detector_is_never_given_to_it() -> None:
    """A real detector reduces it to no pixels at all, and fails."""
    finder, shapes = encoder(), []
    detector = finder.analysis.models["detection"]
    detect = detector.detect
    detector.detect = lambda bgr, **size: shapes.append(bgr.shape) or detect(bgr, **size)
    assert finder.faces(np.full((64, 40000, 3), 90, np.uint8)) == []
    assert shapes and all(max(shape) < 4 * min(shape[:2]) for shape in shapes)


def test_small_pictures_are_not_enlarged_much() -> None:
    small, large = encoder(), encoder()
    small.faces(picture())
    large.faces(picture(side=700))
    assert max(small.analysis.models["detection"].tried[:3]) <= 320
    assert large.analysis.models["detection"].tried[0] == 640


def test_previews_show_every_face() -> None:
    image = picture(*THREE)
    faces = encoder().faces(image)
    assert face_previews(image, faces, 96).shape == (3, 96, 96, 3)
    assert face_previews(image, [], 96).shape == (0, 96, 96, 3)


def test_other_packs_objects_are_taken() -> None:
    inner = encoder()
    assert inner.name == "squares"
    assert FaceEncoder.wrap(inner) is inner
    assert (
        FaceEncoder.wrap(SimpleNamespace(face_analysis=inner.analysis)).analysis is inner.analysis
    )
    with pytest.raises(DiffLoRAError, match="str is not an InsightFace analysis"):
        FaceEncoder.wrap("dlib")
    del inner.analysis.models["recognition"]
    with pytest.raises(DiffLoRAError, match="without its recogniser"):
        FaceEncoder.wrap(inner.analysis)


def pack(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_bytes(b"")
    return folder


def test_packs_are_found_where_others_keep_them(tmp_path: Path) -> None:
    plain = pack(tmp_path / "a" / "models" / "buffalo_l", "det.onnx")
    assert find_pack(tmp_path / "a", "buffalo_l") == plain
    assert find_pack(tmp_path / "a" / "models", "buffalo_l") == plain
    assert find_pack(plain, "buffalo_l") == plain
    nested = pack(tmp_path / "b" / "models" / "antelopev2" / "antelopev2", "scrfd.onnx")
    assert find_pack(tmp_path / "b", "antelopev2") == nested


def test_missing_packs_name_the_folder_and_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(BadWeightsFile, match="'antelopev2' is not in") as error:
        find_pack(tmp_path, "antelopev2")
    assert str(tmp_path / "models" / "antelopev2") in error.value.hint
    pack(tmp_path / "models", "antelopev2.zip")
    with pytest.raises(BadWeightsFile, match="still packed"):
        find_pack(tmp_path, "antelopev2")
    pack(tmp_path / "models" / "antelopev2", "readme.txt", "w.bin")
    with pytest.raises(
        BadWeightsFile, match=r"lacks any ONNX file; found there: readme\.txt, w\.bin"
    ):
        find_pack(tmp_path, "antelopev2")


def test_a_pack_keeps_its_name_in_a_folder_of_another(tmp_path: Path) -> None:
    shutil.copytree(MINI_FOLDER / "insightface/models/mini", tmp_path / "models/mini/release")
    opened = FaceEncoder.open(tmp_path)
    assert (opened.name, FaceEncoder.wrap(opened.analysis).name) == ("mini", "mini")


def test_a_pack_in_a_path_that_insightface_reads_as_a_pattern_is_refused(tmp_path: Path) -> None:
    shutil.copytree(MINI_FOLDER / "insightface/models/mini", tmp_path / "AI [new]/models/mini")
    with pytest.raises(BadWeightsFile, match=r"AI \[new\].* holds .*Rename the folder"):
        FaceEncoder.open(tmp_path / "AI [new]")


@pytest.mark.parametrize("content", [None, b"version https://git-lfs.github.com/spec/v1\noid"])
def test_damaged_packs_are_one_sentence(tmp_path: Path, content: bytes | None) -> None:
    folder = shutil.copytree(MINI_FOLDER / "insightface/models/mini", tmp_path / "models/mini")
    model = next(folder.glob("rec*.onnx"))
    model.write_bytes(content or model.read_bytes()[:3000])
    with pytest.raises(BadWeightsFile, match=r"mini cannot be read: .*download the pack again"):
        FaceEncoder.open(tmp_path)


def test_missing_insightface_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(tmp_path / "models" / "mini", "det.onnx")
    monkeypatch.setitem(sys.modules, "insightface.app", None)
    with pytest.raises(DiffLoRAError, match=r"pip install 'insightface>=1\.0\.1'"):
        FaceEncoder.open(tmp_path)


def test_a_face_is_plain_data() -> None:
    face = Face(
        box=np.float32([0, 0, 4, 2]),
        landmarks=POINTS,
        score=0.5,
        embedding=np.float32([3, 4]),
        sharpness=1.0,
        picture=(10, 10),
    )
    assert face.area == 8 and face.centre == (2, 1)
    assert face.unit_embedding.tolist() == pytest.approx([0.6, 0.8])
