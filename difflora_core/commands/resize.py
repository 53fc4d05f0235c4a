"""`resize F --rank N --out F`: a LoRA at a smaller rank, the best one that there is."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..merge_reports import describe_resized, resize_header
from ..shell import check_free, open_input, progress_line

if TYPE_CHECKING:
    import torch

    from ..merging import Merged, RankRule

PRECISIONS = ("fp16", "bf16", "fp32")


def add_parser(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser("resize", help="a LoRA at a smaller rank")
    parser.add_argument("file", type=Path, help="a LoRA as .safetensors")
    add_result_arguments(parser)
    return parser


def add_result_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that say how big the result is and where it goes; shared with `merge`."""
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--rank", type=int, help="the same rank for all layers")
    size.add_argument("--energy", type=float, help="least share of energy to keep, such as 0.99")
    size.add_argument("--error", type=float, help="largest relative error, such as 0.01")
    size.add_argument("--megabytes", type=float, help="of all weights, spread over the layers")
    parser.add_argument("--dtype", choices=PRECISIONS, default=PRECISIONS[0])
    parser.add_argument("--title", default="", help="for the header; default: the file's name")
    parser.add_argument("--out", type=Path, required=True, help="the LoRA to write, .safetensors")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")


def run(args: argparse.Namespace) -> dict:
    from ..merging import resize

    check_free(args.out, args.overwrite)
    lora = open_input(args.file).lora
    with progress_line(f"resizing {args.file.name}") as progress:
        merged = resize(lora, rank_rule(args), precision(args), progress)
    header = resize_header(lora.metadata, merged.report, args.title or args.out.stem)
    return write_result(merged, args.out, header, args)


def describe(report: dict) -> str:
    return describe_resized(report, report["file"])


def rank_rule(args: argparse.Namespace) -> RankRule:
    from ..merging import RankRule

    return RankRule(args.rank, args.energy, args.error, args.megabytes)


def precision(args: argparse.Namespace) -> torch.dtype:
    import torch

    types = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    return types[args.dtype]


def write_result(
    merged: Merged, path: Path, header: Mapping[str, str], args: argparse.Namespace
) -> dict:
    """Write a merged or resized LoRA; the report with the name of the file."""
    from ..weights_file import write_lora

    write_lora(merged.lora, path, header, args.overwrite, precision(args))
    return {"file": str(path), "bytes": path.stat().st_size, **merged.report}
