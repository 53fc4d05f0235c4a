"""Means of a training loop's losses between two lines of its log."""

from __future__ import annotations

import time

import torch
from torch import Tensor


class Meter:
    """Sums the losses on the device; asking for them is the only synchronisation."""

    def __init__(self, items_per_step: int) -> None:
        self.items_per_step = items_per_step
        self._reset()

    def add(self, losses: dict[str, Tensor]) -> None:
        for name, value in losses.items():
            total = self.totals.get(name)
            value = value.detach().float()
            self.totals[name] = value if total is None else total + value
        self.steps += 1

    def is_finite(self) -> bool:
        """Whether every loss since the last reading is finite."""
        return "loss" not in self.totals or bool(self.totals["loss"].isfinite())

    def read(self) -> dict[str, float]:
        names = list(self.totals)
        means = (torch.stack([self.totals[name] for name in names]) / self.steps).tolist()
        rate = self.steps * self.items_per_step / (time.monotonic() - self.start)
        self._reset()
        return dict(zip(names, means, strict=True)) | {"items_per_s": rate}

    def _reset(self) -> None:
        self.totals: dict[str, Tensor] = {}
        self.steps = 0
        self.start = time.monotonic()
