"""The largest singular values of a matrix that is too wide for its Gram matrix to be cheap."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .operator import Matrix, dense, like

#: columns beyond the wanted ones in every block
_EXTRA = 4
#: the iteration ends when this share of the remaining energy, or less, is still to come
_GAIN = 5e-6
#: from this share of the smaller side on, a full decomposition is cheaper
_SHARE = 0.4

Singular = tuple[Tensor, Tensor, Tensor]
"""u [out, k], sigma [k] descending, vt [k, in]; float64"""


def top_singular(matrix: Matrix, rank: int, norm: float) -> Singular:
    """The `rank` largest singular values of a matrix [out, in] with their vectors.

    Randomised block Krylov iteration (Musco and Musco 2015, algorithm 2) with orthogonalised
    blocks; it goes on until the captured energy stands still, so a flat spectrum takes longer
    instead of giving a worse answer. Small matrices and large ranks are decomposed in full.
    norm: Frobenius norm of the matrix.
    """
    if matrix.shape[0] > matrix.shape[1]:
        u, sigma, vt = top_singular(matrix.mT, rank, norm)
        return vt.mT, sigma, u.mT
    return _krylov(matrix, rank, norm**2) or _full(dense(matrix), rank)


def _krylov(matrix: Matrix, rank: int, total: float) -> Singular | None:
    """None when the basis would outgrow its use."""
    width, most = rank + _EXTRA, int(_SHARE * matrix.shape[0])
    if 3 * width > most:
        return None
    space = _Krylov(matrix, most)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(matrix.shape[1], width, generator=generator).to(like(matrix))
    space.add(matrix @ noise)
    energies: list[float] = []
    while space.size + width <= most:
        space.add(matrix @ space.images[:, space.size - width : space.size])
        squares, vectors = torch.linalg.eigh(space.gram[: space.size, : space.size])
        energies.append(float(squares[-rank:].sum()))
        if _to_come(energies) <= _GAIN * (total - energies[-1]) + 1e-12 * total:
            return space.singular(squares.flip(-1)[:rank], vectors.flip(-1)[:, :rank])
    return None


def _to_come(energies: list[float]) -> float:
    """Energy that further blocks will add, if gains go on falling as they do (at least by half)."""
    if len(energies) < 3:
        return math.inf
    before, gain = energies[-2] - energies[-3], max(energies[-1] - energies[-2], 0.0)
    fall = min(gain / before, 0.5) if before > 0 else 0.5
    return gain * fall / (1 - fall)


class _Krylov:
    """An orthonormal basis [out, p], its images matrix^T basis [in, p] and their Gram matrix."""

    def __init__(self, matrix: Matrix, most: int) -> None:
        rows, columns = matrix.shape
        self.matrix, self.size = matrix, 0
        kind = like(matrix)
        self.basis, self.images = kind.new_empty(rows, most), kind.new_empty(columns, most)
        self.exact_images = kind.new_empty(columns, most, dtype=torch.float64)
        self.gram = kind.new_zeros(most, most, dtype=torch.float64)

    def add(self, block: Tensor) -> None:
        """Widen the basis by the part of a block [out, l] outside it."""
        old, new = slice(self.size), slice(self.size, self.size + block.shape[1])
        basis = self.basis[:, old]
        for _ in range(2 if self.size else 0):  # once is not enough in single precision
            block = block - basis @ (basis.mT @ block)
        block = self.basis[:, new] = _orthonormal(block)
        self.images[:, new] = self.matrix.mT @ block
        self.exact_images[:, new] = self.images[:, new]
        self.size = new.stop
        seen = self.exact_images[:, : self.size]
        self.gram[: self.size, new] = seen.mT @ seen[:, new]
        self.gram[new, : self.size] = self.gram[: self.size, new].mT

    def singular(self, squares: Tensor, top: Tensor) -> Singular:
        """Ritz values and vectors from eigenpairs of the Gram matrix (top [p, k])."""
        sigma = squares.clamp_min(0).sqrt()
        left = self.basis[:, : self.size].double() @ top
        return left, sigma, _rows((self.exact_images[:, : self.size] @ top).mT, sigma)


def _full(matrix: Tensor, rank: int) -> Singular:
    """By the Gram matrix of the smaller side, [out, out]."""
    matrix = matrix.double()
    squares, vectors = torch.linalg.eigh(matrix @ matrix.mT)
    u = vectors.flip(-1)[:, :rank]
    sigma = squares.flip(-1)[:rank].clamp_min(0).sqrt()
    return u, sigma, _rows(u.mT @ matrix, sigma)


def _orthonormal(block: Tensor) -> Tensor:
    """Cholesky QR: on a tall block several times as fast as Householder QR, the fallback."""
    lower, failed = torch.linalg.cholesky_ex(_gram(block))
    pivots = lower.diagonal()
    if bool(failed) or float(pivots.min()) < 1e-6 * float(pivots.max()):
        return torch.linalg.qr(block)[0]
    return torch.linalg.solve_triangular(lower.mT, block.double(), upper=True, left=False).to(block)


def _gram(columns: Tensor) -> Tensor:
    columns = columns.double()
    return columns.mT @ columns


def _rows(scaled: Tensor, sigma: Tensor) -> Tensor:
    """sigma v^T -> v^T; rows of a vanishing sigma stay what they are, nearly zero."""
    return scaled / torch.where(sigma > 0, sigma, 1.0).unsqueeze(1)
