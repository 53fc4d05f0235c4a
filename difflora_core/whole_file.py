"""Files are written to a temporary neighbour and renamed: a name never stands for half a file."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from .errors import DiffLoRAError

LEFT_BEHIND = ".*.????????.tmp"
"""Names of what a killed process leaves half-written, for `glob`."""


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to fill, which takes the place of `path` once the block has ended well.

    Missing folders are made. Whatever the block raises passes through, and nothing is left behind.
    Errors: OSError.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # renamed away, or the folder is none
            temporary.unlink()


@contextlib.contextmanager
def refusals(path: Path, kind: type[DiffLoRAError]) -> Iterator[None]:
    """What the disk refuses, in a sentence about `path`. Errors: `kind`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise kind(
            f"{path.name} could not be written: {reason}.",
            hint="Nothing was left behind. Check the free space and the rights of the folder.",
        ) from error
