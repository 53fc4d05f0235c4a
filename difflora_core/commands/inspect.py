"""`inspect F`: what a LoRA file holds."""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from ..lora import Lora
from ..weights_file import open_lora


def add_parser(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser("inspect", help="layout, base, ranks, norms, header, warnings")
    parser.add_argument("file", type=Path, help="a LoRA as .safetensors")
    return parser


def run(args: argparse.Namespace) -> dict:
    reading = open_lora(args.file)
    lora = reading.lora
    return {
        "file": args.file.name,
        "layout": reading.layout,
        "base": reading.base,
        "layers": len(lora),
        "parameters": sum(layer.down.numel() + layer.up.numel() for layer in lora),
        "dtype": _count(str(layer.up.dtype).removeprefix("torch.") for layer in lora),
        "ranks": _count(layer.rank for layer in lora),
        "alphas": _count(f"{layer.alpha:g}" for layer in lora),
        "norms": norms_by_block(lora),
        "header": dict(lora.metadata),
        "warnings": list(reading.warnings),
    }


def norms_by_block(lora: Lora) -> dict[str, float]:
    """Frobenius norm of all differences in each block, in the model's order."""
    squares: dict[str, float] = {}
    for name, norm in lora.norms().items():
        block = _block(name)
        squares[block] = squares.get(block, 0.0) + norm**2
    return {block: round(math.sqrt(square), 6) for block, square in squares.items()}


def describe(report: dict) -> str:
    lines = [
        f"{report['file']}: a LoRA for {report['base']}, {report['layout']} spelling",
        f"  layers      {report['layers']} with {report['parameters']:,} parameters"
        f" ({_spread(report['dtype'])})",
        f"  rank        {_spread(report['ranks'])}",
        f"  alpha       {_spread(report['alphas'])}",
        "  norm of the difference",
        *(f"    {block:28s} {norm:10.4f}" for block, norm in report["norms"].items()),
    ]
    if report["header"]:
        lines += ["  header", *(f"    {k}: {v:.200}" for k, v in sorted(report["header"].items()))]
    lines += [f"  warning: {warning}" for warning in report["warnings"]]
    return "\n".join(lines)


def _block(name: str) -> str:
    """`unet.down_blocks.1`, `unet.mid_block`, `text_encoder`: the level at which people look."""
    component, block, number, *_ = name.split(".")
    if component != "unet":
        return component
    return f"{component}.{block}.{number}" if block.endswith("_blocks") else f"{component}.{block}"


def _count(values) -> dict[str, int]:
    return {str(value): count for value, count in Counter(values).most_common()}


def _spread(counts: Mapping[str, int]) -> str:
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{value} ({count} layers)" for value, count in counts.items())
