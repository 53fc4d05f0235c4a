"""A pool of drawn examples on the training device.

Drawing costs more than a step of these small networks, so each picture is used a few times, each
time with other damage. The pool is a ring: new pictures take the places of the oldest.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Examples = dict[str, Tensor]
"""Tensors [N, ...] by name; pictures are uint8 [N, 3, H, W]."""


class Pool:
    """Examples from `make(k)`, the k-th chunk, drawn on demand; it depends on k alone."""

    def __init__(self, make: Callable[[int], Examples], capacity: int, reuse: float) -> None:
        self.make, self.capacity, self.reuse = make, capacity, reuse
        self.store: Examples = {}
        self.made = self.used = self.chunks = 0

    def draw(self, count: int) -> Examples:
        """A random batch; pictures come as floats in 0..1."""
        while self.used >= self.reuse * self.made:
            self._grow()
        self.used += count
        size = min(self.made, self.capacity)
        device = next(iter(self.store.values())).device
        index = torch.randint(size, (count,), device=device)
        return {name: _as_float(values[index]) for name, values in self.store.items()}

    def position(self) -> dict[str, int]:
        """How far the pool has come, for a checkpoint."""
        return {"used": self.used, "chunks": self.chunks}

    def restore(self, position: dict[str, int]) -> None:
        """Draw again what lay in the ring at that position."""
        self.made = self.chunks = 0
        if position["chunks"]:
            self._grow()  # tells how many chunks the ring holds
            replaced = position["chunks"] - self.capacity // self.made
            if replaced > 0:
                self.made, self.chunks = replaced * self.made, replaced
        while self.chunks < position["chunks"]:
            self._grow()
        self.used = position["used"]

    def _grow(self) -> None:
        chunk = self.make(self.chunks)
        count = len(next(iter(chunk.values())))
        if not self.store:
            self.capacity = max(self.capacity // count, 1) * count
            self.store = {k: v.new_empty((self.capacity, *v.shape[1:])) for k, v in chunk.items()}
        start = self.made % self.capacity
        for name, values in chunk.items():
            self.store[name][start : start + count] = values
        self.made += count
        self.chunks += 1


def _as_float(values: Tensor) -> Tensor:
    return values.float() / 255 if values.dtype == torch.uint8 else values


def as_bytes(images: Tensor) -> Tensor:
    """Pictures in 0..1 to uint8, a quarter of the memory."""
    return (images * 255).round_().to(torch.uint8)
