"""`merge F... --out F`: several LoRAs to one, exactly or at a chosen rank, with what was lost."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import BadConfig
from ..merge_options import blocks_for, distinct, parse_sweep, weights_for
from ..merge_reports import describe_merged
from ..shell import check_free, open_input, progress_line
from . import resize

if TYPE_CHECKING:
    from ..merging import MergeInput, MergeSettings

METHODS = "average sum svd concat slerp ties dare della knots core_space tsv iso_c factor_average"


def add_parser(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser("merge", help="several LoRAs to one")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="LoRAs of one model")
    parser.add_argument(
        "--weights", nargs="+", type=float, default=[], metavar="W", help="one per file; default 1"
    )
    parser.add_argument("--method", default="average", help=f"one of: {METHODS}")
    parser.add_argument(
        "--weighting",
        default="given",
        help="norm_matched or equal_energy: correct the weights by the norms of the LoRAs",
    )
    totals = parser.add_mutually_exclusive_group()
    totals.add_argument("--total", type=float, help="scale the weights to this sum")
    totals.add_argument(
        "--sweep", metavar="FROM:TO:COUNT", help="one file per total weight, such as 0.5:1.5:5"
    )
    parser.add_argument(
        "--blocks",
        nargs="+",
        default=[],
        metavar="FACTORS",
        help='factors per block, one entry per LoRA: "unet.mid_block=0.5", a file, or - for none',
    )
    parser.add_argument("--density", type=float, default=0.5, help="share that ties etc. keep")
    parser.add_argument("--seed", type=int, default=0, help="of the methods that draw at random")
    resize.add_result_arguments(parser)
    return parser


def run(args: argparse.Namespace) -> dict:
    settings = _settings(args)
    totals = parse_sweep(args.sweep) if args.sweep else [args.total]
    paths = _swept(args.out, totals) if args.sweep else [args.out]
    for path in paths:
        check_free(path, args.overwrite)
    inputs = _inputs(args)
    reports = [
        _merge_to(path, inputs, replace(settings, total=total), args)
        for path, total in zip(paths, totals, strict=True)
    ]
    if not args.sweep:
        return reports[0]
    totalled = zip(totals, reports, strict=True)
    return {"sweep": [{"total": total, **report} for total, report in totalled]}


def describe(report: dict) -> str:
    entries = report.get("sweep", [report])
    return "\n".join(describe_merged(entry, entry["file"]) for entry in entries)


def _settings(args: argparse.Namespace) -> MergeSettings:
    from ..merging import MergeSettings

    return MergeSettings(
        method=args.method,
        rule=resize.rank_rule(args),
        weighting=args.weighting,
        density=args.density,
        seed=args.seed,
        dtype=resize.precision(args),
    )


def _inputs(args: argparse.Namespace) -> list[MergeInput]:
    from ..merging import MergeInput
    from ..weights_file import identified

    weights = weights_for(len(args.files), args.weights)
    blocks = blocks_for(len(args.files), [_typed_or_stored(text) for text in args.blocks])
    titles = distinct([path.stem for path in args.files])
    loras = [identified(open_input(path).lora, path) for path in args.files]
    return [MergeInput(*parts) for parts in zip(loras, titles, weights, blocks, strict=True)]


def _typed_or_stored(text: str) -> str:
    """Block factors as typed, or the content of the file of that name."""
    if "=" in text or not os.path.isfile(text):  # unlike Path.is_file, false for a long JSON
        return text
    try:
        return Path(text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadConfig(
            f"{text} cannot be read as text: {error}.", hint="Write the factors as UTF-8 text."
        ) from error


def _swept(out: Path, totals: Sequence[float]) -> list[Path]:
    """One name per total weight, with as many digits as tell them apart."""
    names = [[f"{total:.{digits}g}" for total in totals] for digits in range(3, 18)]
    apart = next(texts for texts in names if len(set(texts)) == len(totals))
    return [out.with_name(f"{out.stem}_{text}{out.suffix}") for text in apart]


def _merge_to(
    path: Path, inputs: Sequence[MergeInput], settings: MergeSettings, args: argparse.Namespace
) -> dict:
    from ..merging import merge, merge_header

    with progress_line(f"merging {path.name}") as progress:
        merged = merge(inputs, settings, progress)
    header = merge_header(inputs, merged, args.title or path.stem)
    return resize.write_result(merged, path, header, args)
