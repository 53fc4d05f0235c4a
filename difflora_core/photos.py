"""Any picture a user may hand in -> uint8 RGB, or one clear sentence."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from .errors import BadImage

Pixels = NDArray[np.uint8]
"""A picture [H, W, 3], RGB, 0..255."""

MIN_SIDE = 64
"""Smallest side in pixels: below, a face has too few pixels to be recognised."""
MAX_PIXELS = 64_000_000
"""Largest picture; more is refused before it is decoded, since it may be an attack on memory."""
DAMAGE = (
    OSError, SyntaxError, ValueError, RuntimeError, struct.error, EOFError, MemoryError,
    TypeError, AttributeError,
)  # fmt: skip
"""What Pillow's decoders raise on broken files; the last two on odd tags of rotated TIFFs."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""EXIF orientation -> how to see the picture upright."""
_FULL_SCALES = (255, 1023, 4095, 16383, 65535)
"""White of 8, 10, 12, 14 and 16 bits: cameras leave the upper bits of 16 empty."""
_OVERSHOOT = 0.5
"""How far floats may leave 0..1; they are clipped. Bicubic enlarging leaves it by up to 0.45."""
_BACKDROP = 255
"""Transparent parts become white, as most viewers show them."""


def load_photo(source: Any) -> Pixels:
    """Read a picture from a path, a PIL image, a numpy array or a torch tensor.

    Arrays are [H, W], [H, W, C] or [1, H, W, C] with C in 1, 3, 4: uint8, uint16, bool, or floats
    in 0..1. Grey, palette, alpha, CMYK, 16-bit and EXIF-rotated files become plain RGB; of an
    animation the first frame is taken.

    Returns: uint8 [H, W, 3]. Errors: BadImage.
    """
    name = "The picture"
    if isinstance(source, (str, Path)):
        path = Path(source)
        pixels, name = _read_file(path), path.name
    elif isinstance(source, Image.Image):
        _check_size(source.width, source.height, name)
        pixels = _decode(source, name)
    else:
        pixels = _from_array(source)
    _check_size(pixels.shape[1], pixels.shape[0], name)
    return np.ascontiguousarray(pixels)


def _read_file(path: Path) -> Pixels:
    if not os.path.isfile(path):  # unlike Path.is_file, false for a name that no disk can hold
        raise BadImage(f"There is no picture at {path}.", hint="Check the path and its spelling.")
    name = path.name
    try:
        image = Image.open(path)
    except UnidentifiedImageError as error:
        raise BadImage(
            f"{name} is not a picture that can be read.", hint="Use a PNG, JPEG or WebP file."
        ) from error
    except Image.DecompressionBombError as error:
        raise _too_large(name) from error
    except DAMAGE as error:
        raise _damaged(name, error) from error
    with image:
        _check_size(image.width, image.height, name)
        return _decode(image, name)


def _decode(image: Image.Image, name: str) -> Pixels:
    try:
        image.load()
        return _to_rgb(upright(image))
    except DAMAGE as error:
        raise _damaged(name, error) from error


def upright(image: Image.Image) -> Image.Image:
    """A loaded picture, turned as its EXIF orientation says; what cannot be read turns nothing.

    Pillow's own `exif_transpose` writes all tags anew, which fails where another one is odd.
    """
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except DAMAGE:
        return image
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Pixels:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _from_array(_scale_deep(np.asarray(image)))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        return _flatten(np.asarray(image.convert("RGBA")))
    return np.asarray(image.convert("RGB"))


def _scale_deep(values: NDArray[Any]) -> NDArray[Any]:
    """Grey of 16 or 32 bits, or floats, to 0..1 by the least full scale that holds the values."""
    deep = values.astype(np.float64)
    if not np.isfinite(deep).all():
        return deep
    peak = deep.max(initial=0.0)
    scale = next((full for full in _FULL_SCALES if peak <= full), _FULL_SCALES[-1])
    if values.dtype.kind == "f" and peak <= 1 + _OVERSHOOT:
        scale = 1
    return np.clip(deep / scale, 0.0, 1.0)


def _from_array(source: Any) -> Pixels:
    values = _as_numpy(source)
    if values.ndim == 4 and values.shape[0] == 1:
        values = values[0]
    if values.ndim == 2:
        values = values[..., None]
    if values.ndim != 3 or values.shape[-1] not in (1, 3, 4):
        raise BadImage(
            f"A picture array must be [height, width, 1, 3 or 4], found {list(values.shape)}.",
            hint="Pass one picture at a time, channels last.",
        )
    pixels = _to_uint8(values)
    if pixels.shape[-1] == 4:
        return _flatten(pixels)
    return np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels


def _as_numpy(source: Any) -> NDArray[Any]:
    if hasattr(source, "detach"):
        source = source.detach().float().cpu() if source.is_floating_point() else source.cpu()
    values = np.asarray(source)
    if values.dtype.kind not in "bufi":
        raise BadImage(
            f"Cannot read a picture from {type(source).__name__}.",
            hint="Pass a path, a PIL image or an array.",
        )
    return values


def _to_uint8(values: NDArray[Any]) -> Pixels:
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.uint16:
        return np.round(values / 257.0).astype(np.uint8)
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * 255
    if not np.isfinite(values).all():
        raise BadImage(
            "The picture holds values that are not numbers (NaN or infinity).",
            hint="A black or broken decode upstream is the usual cause; try a full-precision VAE.",
        )
    lowest, highest = float(values.min(initial=0)), float(values.max(initial=0))
    if values.dtype.kind == "f" and lowest >= -_OVERSHOOT and highest <= 1 + _OVERSHOOT:
        return np.round(np.clip(values, 0.0, 1.0) * 255).astype(np.uint8)
    if values.dtype.kind in "iu" and lowest >= 0 and highest <= 255:
        return values.astype(np.uint8)
    raise BadImage(
        f"Picture values reach from {lowest:g} to {highest:g}; expected 0..1 as floats "
        "or 0..255 as integers."
    )


def _flatten(rgba: Pixels) -> Pixels:
    alpha = rgba[..., 3:].astype(np.float32) / 255
    return np.round(rgba[..., :3] * alpha + _BACKDROP * (1 - alpha)).astype(np.uint8)


def _check_size(width: int, height: int, name: str) -> None:
    if min(width, height) < MIN_SIDE:
        raise BadImage(
            f"{name} is {width}x{height} pixels; at least {MIN_SIDE}x{MIN_SIDE} are needed.",
            hint="Use a larger photo; enlarging a tiny one does not bring the face back.",
        )
    if width * height > MAX_PIXELS:
        raise _too_large(f"{name} ({width}x{height})")


def _damaged(name: str, error: Exception) -> BadImage:
    if isinstance(error, OSError) and error.strerror:  # the system's, not the decoder's
        return BadImage(
            f"{name} could not be read: {error.strerror}.",
            hint="Check the rights of the file, and the disk.",
        )
    detail = " ".join(str(error).split()).rstrip(".")
    if isinstance(error, MemoryError):  # which has no words of its own
        detail = "it asks for more memory than there is"
    return BadImage(f"{name} is damaged: {detail}.", hint="Save or copy the picture again.")


def _too_large(name: str) -> BadImage:
    return BadImage(
        f"{name} has more than {MAX_PIXELS // 1_000_000} megapixels.",
        hint="Shrink it first; 2000 pixels on the long side are plenty.",
    )
