"""The results as JSON (the format of the evaluate command) and as a Markdown table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .summary import Figure

Rows = dict[str, dict[str, Figure]]
"""Row name -> measure -> figure."""

COLUMNS = (
    "face_sim", "recovery", "above_average", "dino", "clip_i", "clip_t", "preference",
    "prompt_accuracy", "fid", "diversity", "nearest_distance", "seconds",
)  # fmt: skip
"""Measures in the order of the table; what a run lacks is left out."""


def results(protocol: Mapping[str, Any], rows: Rows) -> dict[str, Any]:
    """The machine-readable result."""
    return {"protocol": dict(protocol), "rows": rows}


def markdown(rows: Rows, order: Sequence[str] = COLUMNS) -> str:
    """A Markdown table, mean and 95 % interval per cell; measures in `order`, others left out."""
    columns = [name for name in order if any(name in row for row in rows.values())]
    lines = [_line(["row", *columns]), _line(["---"] * (len(columns) + 1))]
    for name, figures in rows.items():
        lines.append(_line([name, *(_cell(figures.get(column)) for column in columns)]))
    return "\n".join(lines) + "\n"


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return ""
    low, high = figure["ci95"]
    return f"{figure['mean']:.3g} [{low:.3g}, {high:.3g}]"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
