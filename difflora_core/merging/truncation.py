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

from .certificate import Certificate, certified, certify, certify_dense
from .krylov import top_singular
from .operator import LowRank, Matrix, frobenius
from .operator import pays as product_pays
from .rules import RankRule

#: smallest ratio of Cholesky pivots that counts as well conditioned, by precision of the Grams
_CONDITION = {torch.float64: 1e-5, torch.float32: 3e-2}
#: share of the squared norm that has to be lost for float32 Grams to be exact enough
_COARSE = 0.05
#: spacing of numbers below which rounding adds less than 1e-5 of an error that `_COARSE` allows
_FINE = 1e-3
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
    sound: bool = True
    """False: too close to singular for the Cholesky factor, so nothing here is to be used"""

    @property
    def norm(self) -> float:
        """Frobenius norm of the product."""
        return float(self.sigma.square().sum().sqrt())

    @property
    def meaningful(self) -> int:
        """Number of singular values above the noise, at least 1."""
        return meaningful(self.sigma)

    def lost(self, rank: int) -> float:
        """Share of the squared norm beyond the first `rank` singular values."""
        squares = self.sigma.square()
        return float(squares[rank:].sum() / squares.sum()) if self.norm else 0.0

    def truncated(self, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Certificate]:
        """(down [k, in], up [out, k], certificate); both factors carry the root of sigma."""
        rank = min(rank, self.meaningful)
        root = self.sigma[:rank].sqrt().clamp_min(1e-150)
        up = self.up @ (self.left[:, :rank] * root).to(self.up)
        down = (self.right[:, :rank] / root).mT.to(self.down) @ self.down
        up, down = up.to(dtype), down.to(dtype)
        lost = self.lost(rank)
        if lost > _COARSE and torch.finfo(dtype).eps < _FINE:  # rounding is nothing beside it
            return down, up, certified(rank, lost * self.norm**2, self.norm, self.sigma)
        return down, up, certify(self.up, self.down, up, down, self.norm, self.sigma)


def truncated(
    products: Sequence[tuple[Tensor, Tensor]], rules: Sequence[RankRule], dtype: torch.dtype
) -> list[tuple[Tensor, Tensor, Certificate]]:
    """Products of one shape, each limited by its rule: (down [k, in], up [out, k], certificate).

    Gram matrices in float32 are several times as fast and good to 1e-6 of the squared norm. Where
    that is little beside what the rank drops anyway, they decide; else float64 does.
    """
    done: dict[int, tuple[Tensor, Tensor, Certificate]] = {}
    for i, core in enumerate(decompose(products, torch.float32)):
        rank = rules[i].choose(core.sigma, core.norm)
        if core.sound and core.lost(rank) > _COARSE:
            done[i] = core.truncated(rank, dtype)
    rest = [i for i in range(len(products)) if i not in done]
    for i, core in zip(rest, decompose([products[i] for i in rest]), strict=True):
        done[i] = core.truncated(rules[i].choose(core.sigma, core.norm), dtype)
    return [done[i] for i in range(len(products))]


def decompose(
    products: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype = torch.float64
) -> list[Core]:
    """Cores of products (up [out, R], down [R, in]) of one common shape; dtype: of the Grams."""
    if not products:
        return []
    up = torch.stack([up.to(dtype) for up, _ in products])
    down = torch.stack([down.to(dtype) for _, down in products])
    gram, other = (up.mT @ up).double(), (down @ down.mT).double()
    even = _evening(gram.diagonal(dim1=1, dim2=2), other.diagonal(dim1=1, dim2=2))[:, :, None]
    gram, other = gram * even * even.mT, other / even / even.mT
    lower, failed = torch.linalg.cholesky_ex(gram)
    pivots = lower.diagonal(dim1=1, dim2=2)
    sound = (failed == 0) & (pivots.amin(1) > _CONDITION[dtype] * pivots.amax(1))
    lower = torch.where(sound[:, None, None], lower, torch.eye(gram.shape[-1]).to(gram))
    squares, vectors = torch.linalg.eigh(lower.mT @ other @ lower)
    vectors, sigma = vectors.flip(-1), squares.clamp_min(0).sqrt().flip(-1)
    left = even * torch.linalg.solve_triangular(lower.mT, vectors, upper=True)
    right = lower @ vectors / even
    return [
        Core(up[i], down[i], sigma[i], left[i], right[i], ok)
        if ok or dtype == torch.float32
        else _by_qr(up[i], down[i])
        for i, ok in enumerate(sound.tolist())
    ]


def truncate_dense(
    delta: Tensor, rule: RankRule, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Certificate]:
    """(down [k, in], up [out, k], certificate) of a matrix [out, in] or a kernel [out, in, h, w].

    A kernel is treated as [out, in * h * w]. Without a limit the result has full rank.
    """
    return _truncated(delta.flatten(1), rule, dtype)


def truncate_wide(
    up: Tensor, down: Tensor, rule: RankRule, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Certificate]:
    """The same for a product up [out, R] @ down [R, in] with an R near the size of the layer."""
    product = LowRank(up, down)
    pays = product_pays(*product.shape, up.shape[1])
    return _truncated(product if pays else product.dense(), rule, dtype)


def _truncated(
    matrix: Matrix, rule: RankRule, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Certificate]:
    norm = frobenius(matrix)
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
    even = _evening(up.square().sum(0), down.square().sum(1))
    return up * even, down / even[:, None]


def _evening(up: Tensor, down: Tensor) -> Tensor:
    """Factors for columns of up from squared lengths of both sides; 1 where one of them is 0."""
    live = (up > 0) & (down > 0)
    return torch.where(live, down / torch.where(live, up, 1.0), 1.0) ** 0.25


def _by_qr(up: Tensor, down: Tensor) -> Core:
    """One product of any condition."""
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.mT)
    u, sigma, vt = torch.linalg.svd(r_up @ r_down.mT)
    count = len(sigma)
    same = torch.eye(count).to(up)
    left, right = q_up @ u[:, :count], q_down @ vt[:count].mT
    return Core(left, (right * sigma).mT, sigma, same, same)


def _limited(matrix: Matrix, rule: RankRule, norm: float) -> tuple[Tensor, Tensor, Tensor]:
    """As many singular values as the rule can ask for, looking at twice as many each time."""
    most = min(matrix.shape)
    if rule.rank is not None:
        return top_singular(matrix, min(rule.rank, most), norm)
    count = most if rule.exact or rule.megabytes is not None else min(32, most)
    while True:
        u, sigma, vt = top_singular(matrix, count, norm)
        if count == most or rule.choose(sigma, norm) < len(sigma):
            return u, sigma, vt
        count = min(4 * count, most)


def meaningful(sigma: Tensor) -> int:
    """Number of singular values (descending) above the noise of Gram matrices, at least 1."""
    return max(1, int((sigma > _NOISE * float(sigma.amax())).sum()))
