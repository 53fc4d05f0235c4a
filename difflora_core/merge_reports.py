"""Reports of merging, resizing and comparing, for people: the same text in shell and nodes."""

from __future__ import annotations

from collections.abc import Mapping

WORST = 3
"""how many of the layers with the largest errors are named"""


def describe_merged(report: Mapping, name: str) -> str:
    """What went into a merge and what came out; `report` is `Merged.report`."""
    weights = [
        f"    {entry['title']:28.28s} weight {entry['weight']:+.4g}, norm {entry['norm']:.4f}"
        for entry in report["inputs"]
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
        *(f"    {entry['layer']}: {entry['error']:.2e}" for entry in report["worst"][:WORST]),
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


def describe_compared(report: Mapping) -> str:
    """How alike LoRAs are; `report` is `Comparison.report()`."""
    return "\n".join(report["titles"])
