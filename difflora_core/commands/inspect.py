"""`inspect F`: what a LoRA file holds."""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..shell import naming, progress_line
from ..weights_file import open_lora

if TYPE_CHECKING:
    from torch import Tensor

    from ..lora import Lora


def add_parser(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser("inspect", help="layout, base, ranks, norms, header, warnings")
    parser.add_argument("file", type=Path, help="a LoRA as .safetensors")
    return parser


def run(args: argparse.Namespace) -> dict:
    """Layers are read one by one, so that a big file needs little memory."""
    with naming(args.file):
        reading = open_lora(args.file, lazy=True, any_model=True)
        lora, outlines = reading.lora, reading.lora.outline.values()
        norms = _norms(lora, args.file.name)
    still = sum(norm == 0 for norm in norms.values())
    unused = [f"{still} of {len(lora)} layers change nothing."] if still else []
    return {
        "file": args.file.name,
        "layout": reading.layout,
        "base": reading.base,
        "layers": len(lora),
        "parameters": _parameters(lora),
        "dtype": _count(str(outline.dtype).removeprefix("torch.") for outline in outlines),
        "ranks": _count(outline.rank for outline in outlines),
        "alphas": _count(f"{outline.alpha:g}" for outline in outlines),
        "offsets": {"count": len(lora.offsets), "norm": _size(lora.offsets)},
        "norms": _by_block(norms),
        "header": dict(lora.metadata),
        "warnings": [*reading.warnings, *unused],
    }


def describe(report: dict) -> str:
    lines = [
        f"{report['file']}: a LoRA for {report['base']}, {report['layout']} spelling",
        f"  layers      {report['layers']} with {report['parameters']:,} parameters"
        f" ({_spread(report['dtype'])})",
        f"  rank        {_spread(report['ranks'])}",
        f"  alpha       {_spread(report['alphas'])}",
    ]
    if report["offsets"]["count"]:
        lines.append(
            f"  offsets     {report['offsets']['count']} biases and weights of norms,"
            f" norm {report['offsets']['norm']:.4f}"
        )
    lines += ["  norm of the difference"]
    lines += [f"    {block:28s} {norm:10.4f}" for block, norm in report["norms"].items()]
    if report["header"]:
        lines += ["  header", *(f"    {k}: {v:.200}" for k, v in sorted(report["header"].items()))]
    lines += [f"  warning: {warning}" for warning in report["warnings"]]
    return "\n".join(lines)


def _norms(lora: Lora, name: str) -> dict[str, float]:
    """Frobenius norm of every layer's difference."""
    norms = {}
    with progress_line(f"reading {name}") as progress:
        for done, layer in enumerate(lora, start=1):
            norms[layer.name] = layer.norm()
            progress(done, len(lora))
    return norms


def _by_block(norms: Mapping[str, float]) -> dict[str, float]:
    """Norm of all differences in each block, in the model's order."""
    from ..merging import block_of

    squares: dict[str, float] = {}
    for name, norm in norms.items():
        block = block_of(name)
        squares[block] = squares.get(block, 0.0) + norm**2
    return {block: round(math.sqrt(square), 6) for block, square in squares.items()}


def _parameters(lora: Lora) -> int:
    factors = (
        outline.rank * (outline.weight_shape[0] + math.prod(outline.weight_shape[1:]))
        for outline in lora.outline.values()
    )
    return sum(factors) + sum(offset.numel() for offset in lora.offsets.values())


def _size(offsets: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(offset.double().square().sum()) for offset in offsets.values()))


def _count(values) -> dict[str, int]:
    return {str(value): count for value, count in Counter(values).most_common()}


def _spread(counts: Mapping[str, int]) -> str:
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{value} ({count} layers)" for value, count in counts.items())
