"""`compare F F...`: how alike LoRAs are, block by block, and how much they would disturb."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import BadConfig, BadWeightsFile
from ..merge_options import distinct
from ..merge_reports import describe_compared
from ..shell import open_input, progress_line

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
        _check_picture(args.picture, args.overwrite)
    loras = [open_input(path).lora for path in args.files]
    titles = distinct([path.stem for path in args.files])
    with progress_line("comparing") as progress:
        comparison = compare(loras, titles, progress)
    report = {"files": [path.name for path in args.files], **comparison.report()}
    if args.picture:
        args.picture.parent.mkdir(parents=True, exist_ok=True)
        heat_map(comparison).save(args.picture)
        report["picture"] = str(args.picture)
    return report


def describe(report: dict) -> str:
    return describe_compared(report)


def _check_picture(path: Path, overwrite: bool) -> None:
    if path.suffix.lower() not in PICTURES:
        raise BadWeightsFile(f"{path.name} is no name of a picture.", hint="Let it end in .png.")
    if path.exists() and not overwrite:
        raise BadWeightsFile(f"{path} exists already.", hint="Choose another name or --overwrite.")
