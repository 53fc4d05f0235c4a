"""The Markdown table of evaluate-controlnet."""

from __future__ import annotations

from collections.abc import Mapping

from ..evaluation.summary import Figure
from .intervals import SeededFigure

BETTER = {
    "face_sim": "up", "landmark_error": "down", "faces_found": "up", "expression": "up",
    "identity": "up", "body_distance": "down", "prompt_accuracy": "up", "fresh_fid": "down",
    "fresh_clip_t": "up", "fresh_prompt_accuracy": "up", "fresh_expression": "up",
    "fresh_faces_found": "up",
}  # fmt: skip
"""Measures in the order of the table, and the direction in which they are good."""


def markdown(
    rows: Mapping[str, Mapping[str, SeededFigure]], compared: Mapping[str, Mapping[str, Figure]]
) -> str:
    """Rows with intervals over pictures, then gains over the baseline with intervals over seeds."""
    parts = [_table("row", rows)]
    if compared:
        parts.append(_table("minus baseline", compared))
    return "\n".join(parts)


def _table(title: str, rows: Mapping[str, Mapping[str, Figure]]) -> str:
    columns = [name for name in BETTER if any(name in row for row in rows.values())]
    heads = [f"{name} ({BETTER[name]})" for name in columns]
    lines = [[title, *heads], ["---"] * (len(columns) + 1)]
    lines += [[name, *(_cell(figures.get(c)) for c in columns)] for name, figures in rows.items()]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return ""
    low, high = figure["ci95"]
    return f"{figure['mean']:.3g} [{low:.3g}, {high:.3g}]"
