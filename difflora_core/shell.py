"""What the shell commands share: a line of progress, names in errors, free places for results."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from .errors import BadWeightsFile, DiffLoRAError

if TYPE_CHECKING:
    from .lora import LoraLayer
    from .lora_reading import LoraReading

BAR = 30
#: bytes of a file name, so that its temporary neighbour has room for a longer one
LONGEST_NAME = 230

Progress = Callable[[int, int], None]


@contextmanager
def progress_line(label: str, stream: TextIO | None = None) -> Iterator[Progress]:
    """A callback (done, in all) that redraws one line on stderr; the line is gone afterwards.

    Draws on a terminal only, and only when the percentage changes.
    """
    out = sys.stderr if stream is None else stream
    if not out.isatty():
        yield lambda _done, _in_all: None
        return
    drawn = ""

    def draw(done: int, in_all: int) -> None:
        nonlocal drawn
        text = _line(label, done, in_all)
        if text != drawn:
            out.write(f"\r{text}")
            out.flush()
            drawn = text

    try:
        yield draw
    finally:
        out.write("\r" + " " * len(drawn) + "\r")
        out.flush()


def _line(label: str, done: int, in_all: int) -> str:
    share = min(1.0, done / in_all) if in_all else 1.0
    return f"{label} [{'#' * round(share * BAR):.<{BAR}}] {share:4.0%}"


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Begin the sentence of a user error with the name of the file, where it is not in there."""
    try:
        yield
    except DiffLoRAError as error:
        if path.name in error.message:
            raise
        raise type(error)(f"{path.name}: {error.message}", hint=error.hint) from error


def open_input(path: Path) -> LoraReading:
    """A LoRA of any model whose layers are read when they are needed. Errors name the file."""
    from .lora import LazyLayers
    from .weights_file import open_lora

    with naming(path):
        reading = open_lora(path, lazy=True, any_model=True)

    def read(name: str) -> LoraLayer:
        with naming(path):
            return reading.lora.layers[name]

    layers = LazyLayers(reading.lora.outline, read)
    return replace(reading, lora=replace(reading.lora, layers=layers))


def check_free(path: Path, overwrite: bool, *suffixes: str) -> None:
    """Before any work: the file must be writable under that name; suffixes: .safetensors unless
    others are given. Errors: BadWeightsFile.
    """
    known = suffixes or (".safetensors",)
    if (path.suffix.lower() if suffixes else path.suffix) not in known:
        raise BadWeightsFile(f"{path.name} must end in {' or '.join(known)}.")
    _refuse_name(path)
    if os.path.exists(path) and not overwrite:  # unlike Path.exists, false where nobody may look
        raise BadWeightsFile(f"{path} exists already.", hint="Choose another name or --overwrite.")


def _refuse_name(path: Path) -> None:
    """Names that no disk or no header can hold. Errors: BadWeightsFile."""
    shown = path.name.encode(errors="replace").decode()
    if shown != path.name:
        raise BadWeightsFile(f"The file name {shown} is no valid text.", hint="Choose another one.")
    if len(path.name.encode()) > LONGEST_NAME:
        raise BadWeightsFile(f"The file name {shown[:20]}... is too long.", hint="Shorten it.")
    for parent in path.parents:
        if os.path.isfile(parent):
            raise BadWeightsFile(f"{parent} is a file, not a folder.", hint="Choose another place.")
