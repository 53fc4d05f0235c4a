"""Layers of all LoRAs that go into a merge, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..lora import LoraLayer
from .rules import RankRule

if TYPE_CHECKING:
    from collections.abc import Iterator

Product = tuple[Tensor, Tensor]
"""(up [..., out, R], down [..., R, in])"""


@dataclass(frozen=True, eq=False)
class Stack:
    """One layer of the inputs that have it: up [out, R], down [R, in] with R = sum of the ranks.

    Float32 with scales folded in, kernels flattened to matrices. weights: how strongly each input
    counts here, signs included; absent: the weights of the inputs that lack the layer, which
    count as if they held zeros.
    """

    name: str
    up: Tensor
    down: Tensor
    ranks: tuple[int, ...]
    weights: tuple[float, ...]
    absent: tuple[float, ...] = ()

    @classmethod
    def of(
        cls, layers: Sequence[LoraLayer], weights: Sequence[float], device: torch.device | str
    ) -> Stack:
        return next(Batch.of([layers], [weights], device).stacks())

    @property
    def ups(self) -> tuple[Tensor, ...]:
        """[out, r_i] of every input."""
        return self.up.split(self.ranks, 1)

    @property
    def downs(self) -> tuple[Tensor, ...]:
        """[r_i, in] of every input."""
        return self.down.split(self.ranks, 0)

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]; kernels count as one row per output channel."""
        return self.up.shape[0], self.down.shape[1]

    @property
    def is_zero(self) -> bool:
        """Whether no input changes anything here."""
        parts = zip(self.ups, self.downs, self.weights, strict=True)
        return not any(weight and up.any() and down.any() for up, down, weight in parts)

    def weighted_sum(self, weights: Sequence[float] | None = None) -> Product:
        """sum_i w_i D_i, exactly, as one product of rank sum r_i."""
        per_column = _per_column(self.weights if weights is None else weights, self.ranks)
        return self.up * torch.tensor(per_column, device=self.up.device), self.down

    def deltas(self) -> Tensor:
        """All differences, unweighted, [T, out, in] float32: only for methods on single weights."""
        return torch.stack([up @ down for up, down in zip(self.ups, self.downs, strict=True)])

    @property
    def mass(self) -> float:
        """Sum of the weights' magnitudes over all inputs."""
        return sum(map(abs, self.weights + self.absent))

    def weight_tensor(self) -> Tensor:
        """[T, 1, 1] float32, beside `deltas`."""
        return torch.tensor(self.weights, device=self.up.device)[:, None, None]


@dataclass(frozen=True, eq=False)
class Batch:
    """Stacks of equal shapes and ranks in one piece: up [N, out, R], down [N, R, in]."""

    names: tuple[str, ...]
    up: Tensor
    down: Tensor
    ranks: tuple[int, ...]
    weights: tuple[tuple[float, ...], ...]
    absent: tuple[tuple[float, ...], ...]

    @classmethod
    def of(
        cls,
        layers: Sequence[Sequence[LoraLayer]],
        weights: Sequence[Sequence[float]],
        device: torch.device | str,
        absent: Sequence[Sequence[float]] | None = None,
    ) -> Batch:
        """layers[n][i]: layer n of the i-th input that has it; absent[n]: weights of the others."""
        first = layers[0]
        ranks = tuple(layer.rank for layer in first)
        out, width = first[0].up.shape[0], first[0].down[0].numel()
        up = torch.empty(len(layers), out, sum(ranks), device=device)
        down = torch.empty(len(layers), sum(ranks), width, device=device)
        for n, inputs in enumerate(layers):
            parts = zip(inputs, up[n].split(ranks, 1), down[n].split(ranks, 0), strict=True)
            for layer, up_part, down_part in parts:
                _put(layer, up_part, down_part)
        names = tuple(inputs[0].name for inputs in layers)
        missing = tuple(map(tuple, absent or [()] * len(layers)))
        return cls(names, up, down, ranks, tuple(map(tuple, weights)), missing)

    def __len__(self) -> int:
        return len(self.names)

    def stacks(self) -> Iterator[Stack]:
        """The layers one by one, as views."""
        rows = zip(self.names, self.up, self.down, self.weights, self.absent, strict=True)
        return (Stack(name, up, down, self.ranks, *weights) for name, up, down, *weights in rows)

    def weighted_sums(self, weights: Sequence[Sequence[float]]) -> Product:
        """sum_i w_ni D_ni of every layer n, as products [N, out, R] [N, R, in]."""
        columns = torch.tensor([_per_column(row, self.ranks) for row in weights])
        return self.up * columns[:, None].to(self.up), self.down


@dataclass(frozen=True)
class Options:
    """What methods may look at beside the layer."""

    density: float
    """share of entries that trimming and dropping keep"""
    seed: int
    rule: RankRule


def _put(layer: LoraLayer, up: Tensor, down: Tensor) -> None:
    """Copy one layer's factors into their places, the scale shared between them.

    A scale can be far from 1; shared by both factors it leaves each in a usable range.
    """
    up.copy_(layer.up.flatten(1))
    down.copy_(layer.down.flatten(1))
    if layer.scale != 1:
        share = abs(layer.scale) ** 0.5
        up.mul_(share if layer.scale >= 0 else -share)
        down.mul_(share)


def _per_column(weights: Sequence[float], ranks: Sequence[int]) -> list[float]:
    return [w for w, rank in zip(weights, ranks, strict=True) for _ in range(rank)]
