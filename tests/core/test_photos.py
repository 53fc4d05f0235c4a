"""Every kind of picture becomes uint8 RGB, or one clear sentence."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from difflora_core.errors import BadImage
from difflora_core.photos import load_photo

WIDTH, HEIGHT = 96, 72


@pytest.fixture
def picture() -> np.ndarray:
    """A smooth colour picture [72, 96, 3] with different colours in its corners."""
    x, y = np.meshgrid(np.linspace(0, 200, WIDTH), np.linspace(0, 200, HEIGHT))
    return np.stack([x, y, 255 - x], -1).astype(np.uint8)


def save(tmp_path: Path, image: Image.Image, name: str, **options: object) -> Path:
    path = tmp_path / name
    image.save(path, **options)
    return path


def test_plain_files_are_exact(tmp_path: Path, picture: np.ndarray) -> None:
    path = save(tmp_path, Image.fromarray(picture), "p.png")
    assert np.array_equal(load_photo(path), picture)
    assert np.array_equal(load_photo(str(path)), picture)
    assert np.array_equal(load_photo(Image.open(path)), picture)


def test_grey_becomes_three_equal_channels(tmp_path: Path, picture: np.ndarray) -> None:
    grey = picture[..., 0]
    path = save(tmp_path, Image.fromarray(grey), "grey.png")
    for source in (path, grey, grey[..., None]):
        assert np.array_equal(load_photo(source), np.repeat(grey[..., None], 3, -1))


def test_transparency_shows_white(tmp_path: Path, picture: np.ndarray) -> None:
    alpha = np.full((HEIGHT, WIDTH, 1), 255, np.uint8)
    alpha[:, : WIDTH // 2] = 0
    rgba = np.concatenate([picture, alpha], -1)
    loaded = load_photo(save(tmp_path, Image.fromarray(rgba), "alpha.png"))
    assert (loaded[:, : WIDTH // 2] == 255).all()
    assert np.array_equal(loaded[:, WIDTH // 2 :], picture[:, WIDTH // 2 :])
    assert np.array_equal(load_photo(rgba), loaded)


def test_palette_and_its_transparent_colour(tmp_path: Path) -> None:
    indices = np.zeros((80, 80), np.uint8)
    indices[:, 40:] = 1
    image = (
        Image.fromarray(indices, "P")
        if not hasattr(Image, "frombytes")
        else Image.new("P", (80, 80))
    )
    image.putdata(indices.flatten().tolist())
    image.putpalette([10, 20, 30, 200, 100, 50])
    loaded = load_photo(save(tmp_path, image, "p.png", transparency=0))
    assert (loaded[:, :40] == 255).all()
    assert (loaded[:, 40:] == (200, 100, 50)).all()


def test_cmyk(tmp_path: Path, picture: np.ndarray) -> None:
    cmyk = Image.fromarray(picture).convert("CMYK")
    loaded = load_photo(save(tmp_path, cmyk, "c.tif")).astype(int)
    assert np.abs(loaded - picture).max() <= 2


def test_sixteen_bits(tmp_path: Path) -> None:
    deep = np.tile(np.linspace(0, 65535, 100).astype(np.uint16), (80, 1))
    path = save(tmp_path, Image.fromarray(deep), "deep.png")
    for source in (path, deep):
        loaded = load_photo(source)
        assert np.abs(loaded[0, :, 0].astype(float) - deep[0] / 257.0).max() <= 0.5
        assert loaded.min() == 0 and loaded.max() == 255


@pytest.mark.parametrize("white", [200, 255, 1023, 4095, 16383, 65535])
def test_deep_grey_is_as_bright_as_its_bits_allow(tmp_path: Path, white: int) -> None:
    """As cameras write 10, 12 and 14 bits into 16."""
    deep = np.tile(np.linspace(0, white, 100).astype(np.uint16), (80, 1))
    loaded = load_photo(save(tmp_path, Image.fromarray(deep), "deep.png"))
    expected = deep[0] * 255.0 / max(white, 255)
    assert np.abs(loaded[0, :, 0].astype(float) - expected).max() <= 0.5


@pytest.mark.parametrize(("peak", "white"), [(0.5, 1), (1.02, 1), (1.4, 1), (200, 255)])
def test_grey_floats_may_overshoot_a_little(tmp_path: Path, peak: float, white: int) -> None:
    grey = np.full((80, 80), 0.5 * white, np.float32)
    grey[3, 4], grey[5, 6] = peak, -0.02 * white
    loaded = load_photo(save(tmp_path, Image.fromarray(grey), "float.tif"))[..., 0]
    assert loaded[0, 0] in (127, 128) and loaded[5, 6] == 0
    assert loaded[3, 4] == min(255, round(peak / white * 255))


def test_exif_rotation_is_applied(tmp_path: Path, picture: np.ndarray) -> None:
    image = Image.fromarray(picture)
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned a quarter clockwise to be seen upright
    loaded = load_photo(save(tmp_path, image, "turned.png", exif=exif))
    assert np.array_equal(loaded, np.rot90(picture, -1))


@pytest.mark.parametrize("turn", range(1, 9))
def test_every_exif_orientation_is_as_pillow_turns_it(
    tmp_path: Path, picture: np.ndarray, turn: int
) -> None:
    image = Image.fromarray(picture)
    image.getexif()[0x0112] = turn
    expected = np.asarray(ImageOps.exif_transpose(image))
    for name in ("turned.png", "turned.tif"):
        path = save(tmp_path, Image.fromarray(picture), name, exif=image.getexif())
        assert np.array_equal(load_photo(path), expected)


@pytest.mark.parametrize(
    "odd",
    [
        struct.pack("<HHI4s", 0x011B, 2, 3, b"72"),  # a resolution in letters
        struct.pack("<HHII", 0x010F, 5, 1, 0),  # a maker as a fraction
    ],
)
def test_a_rotated_photo_with_an_odd_tag_is_read(tmp_path: Path, odd: bytes) -> None:
    turned = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    tags = b"".join(sorted([turned, odd]))
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + tags + struct.pack("<I", 0)
    path = save(tmp_path, Image.new("RGB", (96, 80)), "odd.jpg", exif=exif)
    assert load_photo(path).shape == (96, 80, 3)


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    path = save(tmp_path, frames[0], "a.gif", save_all=True, append_images=frames[1:])
    assert (load_photo(path)[..., 0] > 250).all()


def test_float_arrays_and_tensors(picture: np.ndarray) -> None:
    values = picture / 255.0
    for source in (
        values,
        values.astype(np.float32),
        torch.tensor(values),
        torch.tensor(values)[None],
    ):
        assert np.array_equal(load_photo(source), picture)
    assert np.array_equal(load_photo(picture[..., 0] > 100)[..., 0], (picture[..., 0] > 100) * 255)


def bad_values() -> dict[str, tuple[object, str]]:
    broken = np.full((70, 70, 3), 0.5)
    broken[3, 4, 1] = np.nan
    return {
        "nan": (broken, "not numbers"),
        "infinite": (np.where(np.isnan(broken), np.inf, broken), "not numbers"),
        "float to 255": (np.full((70, 70, 3), 200.0), "expected 0..1"),
        "negative": (np.full((70, 70, 3), -4), "expected 0..1"),
        "channels first": (np.zeros((3, 70, 70)), "[height, width, 1, 3 or 4]"),
        "batch of two": (np.zeros((2, 70, 70, 3)), "[height, width, 1, 3 or 4]"),
        "text": (np.array("face"), "Cannot read a picture"),
        "nothing": (None, "Cannot read a picture"),
        "tiny": (np.zeros((40, 200, 3), np.uint8), "200x40 pixels; at least 64x64"),
        "empty": (np.zeros((0, 0, 3), np.uint8), "at least 64x64"),
    }


@pytest.mark.parametrize("case", bad_values())
def test_bad_values_are_one_sentence(case: str) -> None:
    source, words = bad_values()[case]
    with pytest.raises(BadImage) as error:
        load_photo(source)
    assert words in error.value.message
    assert "\n" not in str(error.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(BadImage, match="There is no picture at"):
        load_photo(tmp_path / "none.png")


def test_a_folder_is_no_picture(tmp_path: Path) -> None:
    with pytest.raises(BadImage, match="There is no picture at"):
        load_photo(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\xff\xd8\xff\xe0 nor this"])
def test_not_a_picture(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(content)
    with pytest.raises(BadImage, match=r"x\.jpg is (not a picture|damaged)"):
        load_photo(path)


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "bmp", "tif"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_truncated_files(tmp_path: Path, kind: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (90, 90, 3), np.uint8)
    path = save(tmp_path, Image.fromarray(noise), f"cut.{kind}")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(BadImage, match=rf"cut\.{kind} is (not a picture|damaged)") as error:
        load_photo(path)
    assert "\n" not in str(error.value)


def test_a_part_larger_than_the_memory_is_damage(tmp_path: Path) -> None:
    """Pillow reads the header of JPEG 2000 as long as the file says it is."""
    path = tmp_path / "p.jp2"
    start = struct.pack(">I4s4s", 12, b"jP  ", b"\r\n\x87\n")
    path.write_bytes(start + struct.pack(">I4sQ", 1, b"jp2h", 2**62) + bytes(99))
    with pytest.raises(BadImage, match=r"p\.jp2 is damaged: it asks for more memory than"):
        load_photo(path)


def test_huge_pictures_are_refused_before_they_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path, Image.new("1", (20000, 8000)), "huge.png")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("was decoded"))
    with pytest.raises(BadImage, match="more than 64 megapixels"):
        load_photo(path)


def test_decoders_that_fail_in_their_own_way_are_one_sentence(
    tmp_path: Path, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AVIF's decoder raises RuntimeError, that of DDS NotImplementedError."""
    path = save(tmp_path, Image.fromarray(picture), "p.png")
    for error in (RuntimeError("Failed to decode frame 0"), NotImplementedError("Unimplemented")):
        monkeypatch.setattr(Image.Image, "convert", _raising(error))
        with pytest.raises(BadImage, match=r"p\.png is damaged: "):
            load_photo(path)


def _raising(error: Exception) -> Callable[..., None]:
    def convert(*_: object, **__: object) -> None:
        raise error

    return convert


def test_sizes_are_refused_with_the_name_of_the_file(tmp_path: Path) -> None:
    path = save(tmp_path, Image.new("RGB", (32, 32)), "tiny.png")
    with pytest.raises(BadImage, match=r"tiny\.png is 32x32 pixels; at least 64x64"):
        load_photo(path)


def test_a_name_that_no_disk_can_hold_is_no_picture() -> None:
    with pytest.raises(BadImage, match="There is no picture at"):
        load_photo("x" * 300 + ".png")


def test_a_picture_that_nobody_may_read_is_not_called_damaged(
    tmp_path: Path, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path, Image.fromarray(picture), "p.png")
    monkeypatch.setattr(Image, "open", _raising(PermissionError(13, "Permission denied")))
    with pytest.raises(BadImage, match=r"p\.png could not be read: Permission denied") as error:
        load_photo(path)
    assert "rights" in error.value.hint
