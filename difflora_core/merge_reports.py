"""Reports of merging, resizing and comparing, for people: the same text in shell and nodes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import combinations

from .header import without_weight_facts

WORST = 3
"""how many of the layers with the largest errors are named"""
MOST_PAIRS = 10
"""how many pairs of LoRAs a text lists; more are unreadable"""


def describe_merged(report: Mapping, name: str) -> str:
    """What went into a merge and what came out; `report` is `Merged.report`."""
    weights = [
        f"    {entry['title']:28.28s} weight {entry['weight']:+.4g}" for entry in report["inputs"]
    ]
    head = f"{name}: {report['method']} of {_counted(len(weights), 'LoRA')}"
    return "\n".join([head, *weights, *_result(report)])


def describe_resized(report: Mapping, name: str) -> str:
    """What a smaller rank kept of a LoRA."""
    return "\n".join([f"{name}: resized", *_result(report)])


def _result(report: Mapping) -> list[str]:
    size = f", {report['bytes'] / 1e6:.2f} MB" if "bytes" in report else ""
    return [
        f"  layers      {report['layers']}{size}",
        f"  rank        {_ranks(report['ranks'])}",
        f"  norm        {report['norm']:.4f}",
        f"  energy kept {report['energy']:.4%}",
        f"  error       {report['error']:.2e} of the norm; the worst layers:",
        *(f"    {entry['error']:.2e}  {entry['layer']}" for entry in report["worst"][:WORST]),
        *(f"  warning: {warning}" for warning in report["warnings"]),
        f"  {report['seconds']:.1f} s",
    ]


def _ranks(ranks: Mapping[str, int]) -> str:
    if len(ranks) == 1:
        return str(next(iter(ranks)))
    counts = sorted((int(rank), count) for rank, count in ranks.items())
    return ", ".join(f"{rank} ({_counted(count, 'layer')})" for rank, count in counts)


def _counted(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def resize_header(metadata: Mapping[str, str], report: Mapping, title: str) -> dict[str, str]:
    """Header of a resized LoRA: that of the source, its hash, and what was kept, layer by layer."""
    facts = {
        "hash": metadata.get("modelspec.hash_sha256", ""),
        "title": metadata.get("modelspec.title", ""),
        "energy": report["energy"],
        "error": report["error"],
    }
    resized = {
        "difflora.resize": json.dumps(facts, ensure_ascii=False),
        "difflora.certificates": json.dumps(report["certificates"]),
        "modelspec.title": title,
    }
    return {**without_weight_facts(metadata), **resized}


def describe_compared(report: Mapping) -> str:
    """How alike LoRAs are; `report` is `Comparison.report()`."""
    titles = report["titles"]
    pairs = list(combinations(range(len(titles)), 2))
    lines = [f"{_counted(len(titles), 'LoRA')} compared"]
    lines += [
        f"  {number}  {title:40.40s} norm {_figure(norm, '.4f')}"
        for number, (title, norm) in enumerate(zip(titles, report["norms"], strict=True), start=1)
    ]
    for first, second in pairs[:MOST_PAIRS]:
        lines += [f"  {first + 1} and {second + 1}:{'':22s}cosine  overlap  interference"]
        parts = {"everything": report, **report["blocks"]}
        lines += [f"    {name:26.26s} {_pair(part, first, second)}" for name, part in parts.items()]
    if len(pairs) > MOST_PAIRS:
        lines.append(f"  {_counted(len(pairs) - MOST_PAIRS, 'more pair')} in the picture")
    return "\n".join(lines)


def _pair(part: Mapping, i: int, j: int) -> str:
    """Figures of a pair; of the two interferences the larger one."""
    both = [value for value in (part["interference"][i][j], part["interference"][j][i]) if value]
    cosine, overlap = _figure(part["cosine"][i][j], "+.3f"), _figure(part["overlap"][i][j], ".3f")
    return f"{cosine:>7s}  {overlap:>7s}  {_figure(max(both, default=0.0), '.3f'):>12s}"


def _figure(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
