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

from .certificate import Certificate, certified_batch, certify_dense, lost_squared
from .krylov import top_singular
from .operator import LowRank, Matrix, frobenius
from .operator import pays as product_pays
from .rules import RankRule

Truncated = tuple[Tensor, Tensor, Certificate]
"""(down [k, in], up [out, k], certificate)"""

#: smallest ratio of Cholesky pivots that counts as well conditioned, by precision of the Grams
_CONDITION = {torch.float64: 1e-5, torch.float32: 3e-2}
#: share of the squared norm that has to be lost for float32 Grams, good to 5e-7 of it, to give the
#: error to 1e-5
_COARSE = 0.025
#: largest share of the loss that rounding to the result's number format may have, unstated
_ROUNDING = 1e-5
#: from this share of the layer's smaller side on, a sum is built and treated as a dense matrix
_WIDE = 0.3
#: singular values below this share of the largest are noise of float64 Gram matrices
_NOISE = 1e-7


@dataclass(frozen=True, eq=False)
class Core:
    """Decomposed products [..., out, R] [..., R, in], one or a batch of them.

    sigma [..., K] descending; left [..., R, K] and right [..., R, K] combine the factors: up @ left
    has orthonormal columns, and the rows of right^T @ down have the lengths sigma.
    """

    up: Tensor
    down: Tensor
    sigma: Tensor
    left: Tensor
    right: Tensor

    def __getitem__(self, index: int | list[int]) -> Core:
        """Some of a batch."""
        if isinstance(index, list) and len(index) == len(self.sigma):
            return self  # all of them, as nearly always: nothing to copy
        return Core(*(value[index] for value in vars(self).values()))

    @property
    def norm(self) -> Tensor:
        """Frobenius norms [...] of the products."""
        return self.sigma.square().sum(-1).sqrt()

    @property
    def meaningful(self) -> Tensor:
        """Numbers [...] of singular values above the noise, at least 1."""
        return meaningful(self.sigma)

    def truncated(self, rank: int, dtype: torch.dtype) -> list[Truncated]:
        """Every product of a batch at one rank; both factors carry the root of sigma."""
        root = self.sigma[:, None, :rank].sqrt().clamp_min(1e-150)
        up = self.up @ (self.left[..., :rank] * root).to(self.up)
        down = (self.right[..., :rank] / root).mT.to(self.down) @ self.down
        up, down = up.to(dtype), down.to(dtype)
        lost = self.sigma[:, rank:].square().sum(-1)
        # both factors are rounded, by eps / sqrt(12) in the mean of all numbers
        rounding = torch.finfo(dtype).eps ** 2 / 6 * self.norm.square()
        if not bool((rounding < _ROUNDING * lost).all()):
            lost = lost_squared(self.up, self.down, up, down, self.norm)
        certificates = certified_batch(rank, lost, self.norm, self.sigma)
        return list(zip(down, up, certificates, strict=True))


def truncated(
    up: Tensor, down: Tensor, rules: Sequence[RankRule], dtype: torch.dtype
) -> list[Truncated]:
    """Products up [N, out, R] @ down [N, R, in], each limited by its rule.

    Gram matrices in float32 are several times as fast and good to 5e-7 of the squared norm. Where
    that is little beside what the rank drops anyway, they decide; else float64 does, and QR where
    the Grams are too close to singular. The first layer tells whether float32 is worth a try.
    """
    done: dict[int, Truncated] = {}
    for precision in (torch.float32, torch.float64):
        coarse = precision == torch.float32
        if coarse and not _ranks(*decompose(up[:1], down[:1], precision), rules, coarse):
            continue
        if not (rest := [i for i in range(len(up)) if i not in done]):
            break
        core, sound = decompose(_some(up, rest), _some(down, rest), precision)
        for rank, rows in _ranks(core, sound, [rules[i] for i in rest], coarse).items():
            results = core[rows].truncated(rank, dtype)
            done |= {rest[row]: result for row, result in zip(rows, results, strict=True)}
    for i in (i for i in range(len(up)) if i not in done):
        core = _by_qr(up[i : i + 1].double(), down[i : i + 1].double())
        (rank,) = _ranks(core, [True], [rules[i]], coarse=False)
        done[i] = core.truncated(rank, dtype)[0]
    return [done[i] for i in range(len(up))]


def decomposed(up: Tensor, down: Tensor) -> Core:
    """One product up [out, R] @ down [R, in] of any condition, in float64."""
    core, sound = decompose(up[None], down[None])
    return core[0] if sound[0] else _by_qr(up.double(), down.double())


def decompose(
    up: Tensor, down: Tensor, dtype: torch.dtype = torch.float64
) -> tuple[Core, list[bool]]:
    """Cores of products up [N, out, R] @ down [N, R, in]; dtype: of the Grams.

    Beside them, which are sound: the others are too close to singular for the Cholesky factor, and
    nothing of them is to be used.
    """
    up, down = up.to(dtype), down.to(dtype)
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
    return Core(up, down, sigma, left, lower @ vectors / even), sound.tolist()


def _ranks(
    core: Core, sound: Sequence[bool], rules: Sequence[RankRule], coarse: bool
) -> dict[int, list[int]]:
    """Rows of a batch by the rank that their rules choose; only those that are exact enough.

    coarse: from float32 Grams, which have to drop enough to be.
    """
    squares = core.sigma.square()
    total = squares.sum(-1, keepdim=True).clamp_min(1e-300)
    dropped = (1 - squares.cumsum(-1) / total).tolist()
    limits, norms = core.meaningful.tolist(), core.norm.tolist()
    ranks: dict[int, list[int]] = {}
    for row in (row for row, fine in enumerate(sound) if fine):
        rank = min(rules[row].choose(core.sigma[row], norms[row]), limits[row])
        # of nothing nothing is dropped, and float32 cannot divide by the least of sigma
        if not coarse or (norms[row] > 0 and dropped[row][rank - 1] > _COARSE):
            ranks.setdefault(rank, []).append(row)
    return ranks


def _some(values: Tensor, rows: list[int]) -> Tensor:
    return values if len(rows) == len(values) else values[rows]


def truncate_dense(delta: Tensor, rule: RankRule, dtype: torch.dtype = torch.float32) -> Truncated:
    """(down [k, in], up [out, k], certificate) of a matrix [out, in] or a kernel [out, in, h, w].

    A kernel is treated as [out, in * h * w]. Without a limit the result has full rank.
    """
    return _truncated(delta.flatten(1), rule, dtype)


def truncate_wide(
    up: Tensor, down: Tensor, rule: RankRule, dtype: torch.dtype = torch.float32
) -> Truncated:
    """The same for a product up [out, R] @ down [R, in] with an R near the size of the layer."""
    product = LowRank(up, down)
    pays = product_pays(*product.shape, up.shape[1])
    return _truncated(product if pays else product.dense(), rule, dtype)


def _truncated(matrix: Matrix, rule: RankRule, dtype: torch.dtype) -> Truncated:
    norm = frobenius(matrix)
    u, sigma, vt = _limited(matrix, rule, norm)
    rank = min(rule.choose(sigma, norm), int(meaningful(sigma)))
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
    """Products [..., out, R] [..., R, in] of any condition."""
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.mT)
    u, sigma, vt = torch.linalg.svd(r_up @ r_down.mT)
    count = sigma.shape[-1]
    same = torch.eye(count).to(up).expand(*sigma.shape, count)
    left, right = q_up @ u[..., :count], q_down @ vt[..., :count, :].mT
    return Core(left, (right * sigma[..., None, :]).mT, sigma, same, same)


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


def meaningful(sigma: Tensor) -> Tensor:
    """Numbers [...] of singular values [..., K] above the noise of Gram matrices, at least 1."""
    return (sigma > _NOISE * sigma.amax(-1, keepdim=True)).sum(-1).clamp_min(1)
