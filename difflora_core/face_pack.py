"""InsightFace packs on disk: folders of ONNX files, found where others keep them."""

from __future__ import annotations

import glob
from pathlib import Path

from .errors import BadWeightsFile


def find_pack(root: Path, name: str) -> Path:
    """The folder that holds a pack's ONNX files. Errors: BadWeightsFile, naming what was found."""
    names = pack_folders(name)
    places = [place for n in names for place in (root / "models" / n, root / n)]
    places += [root] if root.name in names else []
    for place in places:
        for folder in (place, place / name, *_subfolders(place)):
            if any(folder.glob("*.onnx")):
                return folder
    present = next((p for p in places if p.is_dir()), None)
    if present is not None:
        raise incomplete(present, "any ONNX file")
    archive = next((p for p in (p.with_suffix(".zip") for p in places) if p.is_file()), None)
    hint = f"Put its .onnx files into {places[0]}."
    if archive is not None:
        hint = f"{archive} is still packed: unpack it into {places[0]}."
    raise BadWeightsFile(f"The face pack {name!r} is not in {root}.", hint=hint)


def pack_folders(name: str) -> list[str]:
    """Names of folders that may hold the pack `name`, the likeliest first."""
    return list(dict.fromkeys([name, name.partition("@")[0]]))


def named_with_training(name: str, training: str) -> str:
    """A pack's name with the training that its recogniser's file tells of, if it does."""
    pack = name.partition("@")[0]
    return f"{pack}@{training}" if training else pack


def check_path(folder: Path) -> None:
    """InsightFace searches the folder by a pattern that begins with its path, as it is.

    Errors: BadWeightsFile.
    """
    if glob.escape(str(folder)) != str(folder):
        raise BadWeightsFile(
            f"InsightFace finds no files in {folder}, since its path holds *, ?, [ or ].",
            hint="Rename the folder, or put the pack into another one.",
        )


def incomplete(folder: Path, missing: str) -> BadWeightsFile:
    """The error of a pack that lacks something, with what is there."""
    names = sorted(p.name for p in folder.iterdir())
    found = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing"
    return BadWeightsFile(
        f"The face pack in {folder} lacks {missing}; found there: {found}.",
        hint="A pack holds a detector and a recogniser as .onnx files; unpack it again.",
    )


def unreadable(folder: Path, error: Exception) -> BadWeightsFile:
    """The error of a pack that cannot be opened, with the first line of the reason."""
    reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    return BadWeightsFile(
        f"The face pack in {folder} cannot be read: {reason}.",
        hint="A file is damaged, or a Git LFS pointer in its place: download the pack again.",
    )


def _subfolders(place: Path) -> list[Path]:
    return sorted(p for p in place.iterdir() if p.is_dir()) if place.is_dir() else []
