"""`bake --base CKPT --lora F... --out CKPT`: LoRAs into a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..merge_options import weights_for
from ..shell import check_free, naming, open_input, progress_line

if TYPE_CHECKING:
    from ..lora import Lora
    from ..lora_on_base import LoraOnBase


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
    opened = [_open(path) for path in args.lora]
    inputs = [
        BakeInput(lora, path.stem, weight)
        for (lora, _), path, weight in zip(opened, args.lora, weights, strict=True)
    ]
    with progress_line(f"writing {args.out.name}") as progress:
        report = bake(args.base, inputs, args.out, args.overwrite, progress)
    noticed = [warning for _, warnings in opened for warning in warnings]
    return {**report, "warnings": [*report["warnings"], *noticed]}


def _open(path: Path) -> tuple[Lora | LoraOnBase, list[str]]:
    """A LoRA of any kind, with warnings: DoRA and its like become differences on the base."""
    from ..lora_families import needs_base
    from ..lora_on_base import open_lora_needing_base
    from ..tensor_file import TensorFile

    with naming(path):
        if needs_base(TensorFile(path)):
            lora = reading = open_lora_needing_base(path)
        else:
            reading = open_input(path)
            lora = reading.lora
    return lora, [f"{path.name}: {warning}" for warning in reading.warnings]


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
