"""Means and intervals over pictures and over trainings.

A row's interval is over pictures, its trainings averaged. Whether one loss beats another depends
on the training too, so gains are paired by seed and have Student's interval over seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..evaluation.summary import Figure, summarise

#: 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


class SeededFigure(Figure):
    """A figure with the mean of every training."""

    by_seed: list[float]


def row_figure(values: Tensor, seed: int) -> SeededFigure:
    """Values [S, N] of S trainings on N pictures, NaN where one does not count."""
    known = values[:, values.isfinite().all(0)]
    figure = summarise(known.T, seed)
    return {**figure, "by_seed": known.double().mean(1).tolist()}


def gain_figure(ours: Sequence[float], theirs: Sequence[float]) -> Figure | None:
    """Mean difference of trainings from equal seeds; None with fewer than two of them."""
    differences = torch.tensor(ours, dtype=torch.float64) - torch.tensor(theirs).double()
    count = len(differences)
    if count < 2:
        return None
    mean, error = float(differences.mean()), float(differences.std()) / count**0.5
    reach = error * (_STUDENT[count - 2] if count - 2 < len(_STUDENT) else 1.96)
    return {"mean": mean, "ci95": [mean - reach, mean + reach], "n": count}


def gains(
    rows: Mapping[str, Mapping[str, SeededFigure]], over: str
) -> dict[str, dict[str, Figure]]:
    """Every row's gain over the row `over`, by measure, where both have the same seeds."""
    found: dict[str, dict[str, Figure]] = {}
    for name, figures in rows.items():
        if name == over or over not in rows:
            continue
        pairs = {m: (f["by_seed"], rows[over][m]["by_seed"]) for m, f in figures.items()}
        compared = {m: gain_figure(*pair) for m, pair in pairs.items()
                    if len(pair[0]) == len(pair[1])}  # fmt: skip
        found[name] = {m: figure for m, figure in compared.items() if figure is not None}
    return {name: figures for name, figures in found.items() if figures}
