"""`compare F F...`: how alike LoRAs are, block by block, and how much they would disturb."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import BadConfig, BadImage
from ..merge_options import distinct
from ..merge_reports import describe_compared
from ..shell import check_free, open_input, progress_line

if TYPE_CHECKING:
    from PIL import Image

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def add_parser(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser("compare", help="how alike LoRAs are, block by block")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="LoRAs of one model")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="write the heat map too")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing picture")
    return parser


def run(args: argparse.Namespace) -> dict:
    from ..merging import compare, heat_map

    if len(args.files) < 2:
        raise BadConfig("One LoRA alone cannot be compared.", hint="Name two files or more.")
    if args.picture:
        check_free(args.picture, args.overwrite, *PICTURES)
    loras = [open_input(path).lora for path in args.files]
    titles = distinct([path.stem for path in args.files])
    with progress_line("comparing") as progress:
        comparison = compare(loras, titles, progress)
    report = {"files": [path.name for path in args.files], **comparison.report()}
    if args.picture:
        _save(heat_map(comparison), args.picture)
        report["picture"] = str(args.picture)
    return report


def describe(report: dict) -> str:
    return describe_compared(report)


def _save(picture: Image.Image, path: Path) -> None:
    """Whole or not at all. Errors: BadImage."""
    from PIL import Image

    from ..whole_file import refusals, whole_file

    try:
        with refusals(path, BadImage), whole_file(path) as file:
            picture.save(file, Image.registered_extensions()[path.suffix.lower()])
    except ValueError as error:  # such as a side of more pixels than the format allows
        raise BadImage(
            f"{path.name} could not be written: {picture.width}x{picture.height} pixels are too "
            f"many for {path.suffix}, or it takes no such picture.",
            hint="Choose .png.",
        ) from error
