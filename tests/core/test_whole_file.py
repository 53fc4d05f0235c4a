"""Whole files: all of one or nothing, and nothing left beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from difflora_core.errors import BadImage
from difflora_core.whole_file import refusals, whole_file


def test_folders_are_made_and_only_the_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    with whole_file(path) as file:
        file.write(b"first")
        assert not path.exists()
    assert path.read_bytes() == b"first" and [*path.parent.iterdir()] == [path]


def test_a_failure_leaves_the_former_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_bytes(b"before")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"before" and [*tmp_path.iterdir()] == [path]


def test_what_the_disk_refuses_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    path = tmp_path / "file" / "picture.png"
    with (
        pytest.raises(
            BadImage, match=r"picture.png could not be written: (File exists|Not a directory)\."
        ),
        refusals(path, BadImage),
        whole_file(path),
    ):
        pass
