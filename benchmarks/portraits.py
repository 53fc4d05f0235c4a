"""How fast the drawn world is drawn."""

from __future__ import annotations

import torch

from training.portraits import render, sample_scenes

from .measuring import Case, alternate, case, in_own_process

PICTURES = 128
ROUNDS = 3


def run() -> list[Case]:
    return [in_own_process(portraits)]


def portraits() -> Case:
    """One picture of 128 px with its boxes, masks and landmarks, scenes drawn in a batch."""

    def draw() -> None:
        render(sample_scenes(PICTURES, torch.Generator().manual_seed(0)))

    seconds = alternate({"ours": draw}, ROUNDS)["ours"] / PICTURES
    return case("portraits/one picture", {"ours": seconds}, per_second=round(1 / seconds))
