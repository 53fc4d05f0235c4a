"""What a layer lost, stated with the layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .operator import Matrix, dense, like

#: below this share of the energy, a loss computed by differences in float32 is too inexact
_CANCELLED = 1e-2


@dataclass(frozen=True, eq=False, slots=True)
class Certificate:
    """One layer of a result beside the exact one that its method stands for.

    rank: of the result; full_rank: of the exact one. energy: share of the squared norm kept by the
    truncation. error: |D - written| / |D| in the Frobenius norm, rounding to the result's number
    format included. norm: |D|. singular_values: of the exact layer, descending, as far as known.
    """

    rank: int
    full_rank: int
    energy: float
    error: float
    norm: float
    singular_values: tuple[float, ...]


def certify(
    exact_up: Tensor, exact_down: Tensor, up: Tensor, down: Tensor, norm: float, sigma: Tensor
) -> Certificate:
    """Certificate of up @ down against exact_up @ exact_down, without building either."""
    exact_norm = torch.tensor(norm, dtype=torch.float64)
    lost = lost_squared(exact_up, exact_down, up, down, exact_norm)
    return certified(up.shape[1], float(lost), norm, sigma)


def lost_squared(
    exact_up: Tensor, exact_down: Tensor, up: Tensor, down: Tensor, norm: Tensor
) -> Tensor:
    """|D - X|^2 [...] of products [..., out, R] [..., R, in], with norm = |D|.

    |D|^2 - 2 <D, X> + |X|^2 in the precision of the exact factors; in float64, relative errors
    below 1e-8 read as about 1e-8, which is what cancellation leaves.
    """
    up, down = up.to(exact_up), down.to(exact_down)
    shared = ((exact_up.mT @ up).double() * (exact_down @ down.mT).double()).sum((-2, -1))
    own = ((up.mT @ up).double() * (down @ down.mT).double()).sum((-2, -1))
    return (norm.square() - 2 * shared + own).clamp_min(0)


def certify_dense(
    exact: Matrix, up: Tensor, down: Tensor, norm: float, sigma: Tensor
) -> Certificate:
    """Certificate of up @ down against a matrix [out, in], built only where the error is small."""
    shared = ((exact.mT @ up.to(like(exact))).mT.double() * down.double()).sum()
    own = ((up.double().mT @ up.double()) * (down.double() @ down.double().mT)).sum()
    lost = float(norm**2 - 2 * shared + own)
    if lost < _CANCELLED * norm**2:
        lost = float((dense(exact).double() - up.double() @ down.double()).square().sum())
    return certified(up.shape[1], lost, norm, sigma)


def certified(rank: int, lost: float, norm: float, sigma: Tensor) -> Certificate:
    """Certificate of a known squared error `lost`; an empty sigma stands for an exact result."""
    if not len(sigma):  # nothing was left out, so nothing was decomposed
        return Certificate(rank, rank, 1.0, lost**0.5 / norm if norm else 0.0, norm, ())
    told = torch.tensor([lost, norm], dtype=torch.float64)[:, None].to(sigma.device)
    return certified_batch(rank, told[0], told[1], sigma[None])[0]


def certified_batch(rank: int, lost: Tensor, norm: Tensor, sigma: Tensor) -> list[Certificate]:
    """Certificates of N layers at one rank: lost [N], norm [N], sigma [N, K]."""
    least = torch.where(norm > 0, norm, 1.0)  # a layer of zeros has lost nothing
    errors = (lost.sqrt() / least).tolist()
    kept = sigma[:, :rank].double().square().sum(-1) / least.square()
    energies = torch.where(norm > 0, kept, 1.0).clamp_max(1).tolist()
    full_ranks = (sigma > 1e-9 * sigma.amax(-1, keepdim=True)).sum(-1).tolist()
    rows = zip(full_ranks, energies, errors, norm.tolist(), sigma.float().tolist(), strict=True)
    return [
        Certificate(rank, full, energy, error, size, tuple(values))
        for full, energy, error, size, values in rows
    ]
