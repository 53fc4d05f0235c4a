"""`bake --base CKPT --lora F... --out CKPT`: LoRAs into a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..merge_options import weights_for
from ..shell import check_free, open_input, progress_line


def add_parser(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser("bake", help="LoRAs into a checkpoint")
    parser.add_argument("--base", type=Path, required=True, help="a checkpoint as .safetensors")
    parser.add_argument(
        "--lora", type=Path, nargs="+", required=True, metavar="F", help="LoRAs as .safetensors"
    )
    parser.add_argument(
        "--weights", type=float, nargs="+", default=[], metavar="W", help="one per LoRA; default: 1"
    )
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    return parser


def run(args: argparse.Namespace) -> dict:
    from ..bake import BakeInput, bake

    check_free(args.out, args.overwrite)
    weights = weights_for(len(args.lora), args.weights)
    readings = [open_input(path) for path in args.lora]
    inputs = [
        BakeInput(reading.lora, path.stem, weight)
        for reading, path, weight in zip(readings, args.lora, weights, strict=True)
    ]
    with progress_line(f"writing {args.out.name}") as progress:
        report = bake(args.base, inputs, args.out, args.overwrite, progress)
    noticed = [
        f"{path.name}: {warning}"
        for reading, path in zip(readings, args.lora, strict=True)
        for warning in reading.warnings
    ]
    return {**report, "warnings": [*report["warnings"], *noticed]}


def describe(report: dict) -> str:
    return "\n".join(
        [
            f"{report['file']}: {report['base']} with {len(report['inputs'])} LoRAs baked in",
            *(f"  {entry['weight']:g} x {entry['title']}" for entry in report["inputs"]),
            f"  tensors     {report['changed']} of {report['tensors']} changed,"
            f" {report['bytes'] / 1e6:.1f} MB",
            *(f"  warning: {warning}" for warning in report["warnings"]),
            f"  {report['seconds']:.1f} s",
        ]
    )
