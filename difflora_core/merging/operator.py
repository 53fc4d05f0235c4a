"""A matrix that is kept as a product of two, for methods that only multiply by it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: columns of a Gram matrix worked out at a time; half of them follow by symmetry
_BLOCK = 128


@dataclass(frozen=True, eq=False)
class LowRank:
    """up [out, R] @ down [R, in] with the few operations of a matrix that Krylov methods need."""

    up: Tensor
    down: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    @property
    def mT(self) -> LowRank:
        return LowRank(self.down.mT, self.up.mT)

    def __matmul__(self, columns: Tensor) -> Tensor:
        return self.up @ (self.down @ columns)

    def dense(self) -> Tensor:
        return self.up @ self.down


Matrix = Tensor | LowRank


def pays(out_features: int, in_features: int, ranks: int) -> bool:
    """Whether multiplying by the factors is as cheap as multiplying by the matrix."""
    return ranks * (out_features + in_features) <= out_features * in_features


def dense(matrix: Matrix) -> Tensor:
    return matrix.dense() if isinstance(matrix, LowRank) else matrix


def like(matrix: Matrix) -> Tensor:
    """A tensor of the matrix's device and number format."""
    return matrix.up if isinstance(matrix, LowRank) else matrix


def frobenius(matrix: Matrix) -> float:
    """Frobenius norm; products in the matrix's own precision, their sum in float64."""
    if isinstance(matrix, Tensor):
        return float(torch.linalg.vector_norm(matrix, dim=1).double().norm())
    up, down, squared = matrix.up, matrix.down, 0.0
    for start in range(0, up.shape[1], _BLOCK):
        here, rest = slice(start, start + _BLOCK), slice(start, None)
        shared = (up[:, here].mT @ up[:, rest]) * (down[here] @ down[rest].mT)
        own = shared[:, : shared.shape[0]]
        squared += float(2 * shared.sum(dtype=torch.float64) - own.sum(dtype=torch.float64))
    return max(squared, 0.0) ** 0.5
