"""The best approximation of low rank (Eckart and Young 1936), from small matrices only.

A matrix D = up @ down [out, R] [R, in] is decomposed through its R x R Gram matrices
G = up^T up and H = down down^T in float64. With G = F F^T the matrix F^T H F has the squared
singular values of D, and with its eigenvectors u_k

    left singular vectors   up F^-T u_k        sigma_k v_k^T = (F u_k)^T down

This is the core of QR on both sides without the QR: singular values above 1e-8 of the largest are
exact to that level. Where G is too close to singular for a Cholesky factor (a LoRA merged with
itself, unused ranks), QR takes its place. Wide sums (R near the layer's own width) are built and
decomposed by block Krylov iteration instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .certificate import Certificate, certify, certify_dense
from .krylov import top_singular
from .rules import RankRule

#: smallest ratio of Cholesky pivots that counts as well conditioned
_CONDITION = 1e-5
#: from this share of the layer's smaller side on, a sum is built and treated as a dense matrix
_WIDE = 0.3


#: singular values below this share of the largest are noise of float64 Gram matrices
_NOISE = 1e-7


@dataclass(frozen=True, eq=False)
class Core:
    """A decomposed product: sigma [K] descending; left [R, K] and right [R, K] combine its factors.

    up @ left has orthonormal columns, and the rows of right^T @ down have the lengths sigma.
    """

    up: Tensor
    down: Tensor
    sigma: Tensor
    left: Tensor
    right: Tensor

    @property
    def norm(self) -> float:
        """Frobenius norm of the product."""
        return float(self.sigma.square().sum().sqrt())

    @property
    def meaningful(self) -> int:
        """Number of singular values above the noise, at least 1."""
        return meaningful(self.sigma)

    def truncated(self, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Certificate]:
        """(down [k, in], up [out, k], certificate); both factors carry the root of sigma."""
        rank = min(rank, self.meaningful)
        root = self.sigma[:rank].sqrt().clamp_min(1e-150)
        up = (self.up @ (self.left[:, :rank] * root)).to(dtype)
        down = ((self.right[:, :rank] / root).mT @ self.down).to(dtype)
        return down, up, certify(self.up, self.down, up, down, self.norm, self.sigma)


def decompose(products: Sequence[tuple[Tensor, Tensor]]) -> list[Core]:
    """Cores of products (up [out, R], down [R, in]) of one common shape."""
    up = torch.stack([u for u, _ in products]).double()
    down = torch.stack([d for _, d in products]).double()
    up, down = balanced(up, down)
    gram = up.mT @ up
    lower, info = torch.linalg.cholesky_ex(gram)
    pivots = lower.diagonal(dim1=-2, dim2=-1)
    sound = (info == 0) & (pivots.amin(-1) > _CONDITION * pivots.amax(-1))
    lower = torch.where(sound[:, None, None], lower, torch.eye(gram.shape[-1]).to(gram))
    squares, vectors = torch.linalg.eigh(lower.mT @ (down @ down.mT) @ lower)
    vectors, sigma = vectors.flip(-1), squares.clamp_min(0).sqrt().flip(-1)
    left = torch.linalg.solve_triangular(lower.mT, vectors, upper=True)
    right = lower @ vectors
    return [
        Core(up[i], down[i], sigma[i], left[i], right[i]) if ok else _by_qr(up[i], down[i])
        for i, ok in enumerate(sound.tolist())
    ]


def truncate_dense(
    delta: Tensor, rule: RankRule, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Certificate]:
    """(down [k, in], up [out, k], certificate) of a matrix [out, in] or a kernel [out, in, h, w].

    A kernel is treated as [out, in * h * w]; shape the factors with `as_layer`. Without a limit
    the result has full rank.
    """
    matrix = delta.flatten(1)
    norm = float(matrix.double().norm())
    u, sigma, vt = _limited(matrix, rule, norm)
    rank = min(rule.choose(sigma, norm), meaningful(sigma))
    root = sigma[:rank].sqrt()
    up, down = (u[:, :rank] * root).to(dtype), (root[:, None] * vt[:rank]).to(dtype)
    return down, up, certify_dense(matrix, up, down, norm, sigma)


def is_wide(out_features: int, in_features: int, ranks: int) -> bool:
    """Whether a sum of `ranks` rank-one terms is cheaper to build than to keep in factors."""
    return ranks > _WIDE * min(out_features, in_features)


def balanced(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with every column of up as long as its row of down.

    That is the best conditioning that costs nothing, and the safest form for 16-bit files.
    """
    columns, rows = up.norm(dim=-2), down.norm(dim=-1)
    live = (rows > 0) & (columns > 0)
    factor = torch.where(live, (rows / torch.where(live, columns, 1.0)).sqrt(), 0.0)
    inverse = torch.where(live, 1 / torch.where(live, factor, 1.0), 0.0)
    return up * factor.unsqueeze(-2), down * inverse.unsqueeze(-1)


def _by_qr(up: Tensor, down: Tensor) -> Core:
    """One product of any condition."""
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.mT)
    u, sigma, vt = torch.linalg.svd(r_up @ r_down.mT)
    count = len(sigma)
    same = torch.eye(count).to(up)
    left, right = q_up @ u[:, :count], q_down @ vt[:count].mT
    return Core(left, (right * sigma).mT, sigma, same, same)


def _limited(matrix: Tensor, rule: RankRule, norm: float) -> tuple[Tensor, Tensor, Tensor]:
    """As many singular values as the rule can ask for, looking at twice as many each time."""
    most = min(matrix.shape)
    if rule.rank is not None:
        return top_singular(matrix, min(rule.rank, most))
    count = most if rule.exact or rule.megabytes is not None else min(32, most)
    while True:
        u, sigma, vt = top_singular(matrix, count)
        if count == most or rule.choose(sigma, norm) < len(sigma):
            return u, sigma, vt
        count = min(4 * count, most)


def meaningful(sigma: Tensor) -> int:
    """Number of singular values (descending) above the noise of Gram matrices, at least 1."""
    return max(1, int((sigma > _NOISE * float(sigma.amax())).sum()))
