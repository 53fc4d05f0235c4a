"""`extract --tuned CKPT --base CKPT --out F`: the difference of two checkpoints as a LoRA.

`extract --lora F --base CKPT --out F`: a LoRA of a kind that needs the base weights (DoRA, GLoRA,
OFT, BOFT, IA3) as a plain one.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import BadConfig
from ..shell import check_free, progress_line
from .resize import add_result_arguments, precision, rank_rule

if TYPE_CHECKING:
    from ..extract_sources import Source

DEFAULT_RANK = 64
WORST = 3


def add_parser(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "extract", help="the difference of two checkpoints, or a DoRA and its like, as a LoRA"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--tuned", type=Path, metavar="CKPT", help="the changed checkpoint")
    source.add_argument("--lora", type=Path, metavar="F", help="DoRA, GLoRA, OFT, BOFT or IA3")
    parser.add_argument(
        "--base", type=Path, required=True, metavar="CKPT", help="a file, or a diffusers folder"
    )
    parser.add_argument(
        "--text-encoders", action="store_true", help="with --tuned: the text encoders, too"
    )
    add_result_arguments(parser)
    parser.epilog = f"Without a limit the rank is {DEFAULT_RANK}. A stopped run goes on."
    return parser


def run(args: argparse.Namespace) -> dict:
    from ..extract import ExtractSettings, extract
    from ..merging import RankRule

    check_free(args.out, args.overwrite)
    rule = rank_rule(args)
    if rule.exact:
        rule = RankRule(rank=DEFAULT_RANK)
    settings = ExtractSettings(rule, precision(args), args.overwrite, args.title)
    source = _source(args)
    with progress_line(f"extracting {args.out.name}") as progress:
        return extract(source, args.out, settings, progress)


def describe(report: dict) -> str:
    ranks = ", ".join(f"{rank} ({count} layers)" for rank, count in report["ranks"].items())
    lines = [
        f"{report['file']}: a LoRA for {report['base']}, {report['bytes'] / 1e6:.1f} MB",
        f"  layers      {report['layers']}; {report['same']} do not differ",
        f"  offsets     {report['offsets']} biases and parameters of norms",
        f"  rank        {ranks}",
        f"  energy kept {report['energy']:.4%}",
        f"  error       {report['error']:.2e} of the norm {report['norm']:.4f}; the worst layers:",
        *(f"    {entry['layer']}: {entry['error']:.2e}" for entry in report["worst"][:WORST]),
        *(f"  warning: {warning}" for warning in report["warnings"]),
        f"  {report['seconds']:.1f} s, {report['resumed']} layers from an earlier run",
    ]
    return "\n".join(lines)


def _source(args: argparse.Namespace) -> Source:
    from ..extract_sources import CheckpointDifference, LoraOnCheckpoint

    if args.tuned:
        return CheckpointDifference.open(args.tuned, args.base, args.text_encoders)
    if args.text_encoders:
        raise BadConfig("--text-encoders goes with --tuned.", hint="A LoRA names its own layers.")
    return LoraOnCheckpoint.open(args.lora, args.base)
