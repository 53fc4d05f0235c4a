"""One layer of all LoRAs that go into a merge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..lora import LoraLayer
from .rules import RankRule

Product = tuple[Tensor, Tensor]
"""(up [out, R], down [R, in])"""


@dataclass(frozen=True, eq=False)
class Stack:
    """The inputs that have one layer: ups [out, r_i], downs [r_i, in] (float32, scales folded in).

    weights: how strongly each counts here, signs included. Kernels are flattened to matrices.
    """

    name: str
    ups: tuple[Tensor, ...]
    downs: tuple[Tensor, ...]
    weights: tuple[float, ...]

    @classmethod
    def of(
        cls, layers: Sequence[LoraLayer], weights: Sequence[float], device: torch.device | str
    ) -> Stack:
        ups, downs = [], []
        for layer in layers:
            up = layer.up.to(device=device, dtype=torch.float32).flatten(1)
            # a scale can be far from 1; shared by both factors it leaves each in a usable range
            share = abs(layer.scale) ** 0.5
            ups.append(up * (share if layer.scale >= 0 else -share))
            downs.append(layer.down.to(device=device, dtype=torch.float32).flatten(1) * share)
        return cls(layers[0].name, tuple(ups), tuple(downs), tuple(weights))

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]; kernels count as one row per output channel."""
        return self.ups[0].shape[0], self.downs[0].shape[1]

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(up.shape[1] for up in self.ups)

    def weighted_sum(self, weights: Sequence[float] | None = None) -> Product:
        """sum_i w_i D_i, exactly, as one product of rank sum r_i."""
        weights = self.weights if weights is None else weights
        ups = [up * w for up, w in zip(self.ups, weights, strict=True)]
        return torch.cat(ups, 1), torch.cat(self.downs, 0)

    def deltas(self) -> Tensor:
        """All differences, unweighted, [T, out, in] float32: only for methods on single weights."""
        return torch.stack([up @ down for up, down in zip(self.ups, self.downs, strict=True)])

    def weight_tensor(self) -> Tensor:
        """[T, 1, 1] float32, beside `deltas`."""
        return torch.tensor(self.weights, device=self.ups[0].device)[:, None, None]


@dataclass(frozen=True)
class Options:
    """What methods may look at beside the layer."""

    density: float
    """share of entries that trimming and dropping keep"""
    seed: int
    rule: RankRule
