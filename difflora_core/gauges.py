"""Factorisations of a low-rank product, and the seeded matrices that fix them."""

from __future__ import annotations

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor


def seeded_rows(rank: int, width: int, seed: int, tag: str) -> Tensor:
    """Row-orthonormal [rank, width] float32 from a hash of seed and tag.

    QR in float64 with the diagonal of R made positive, so that the result does not depend on the
    sign convention of the linear algebra library.
    """
    noise = _seeded_normal((width, rank), seed, tag)
    q, r = torch.linalg.qr(noise)
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0)
    return (q * signs).mT.contiguous().float()


def canonical_factors(
    down: Tensor, up: Tensor, rank: int, seed: int = 0, tag: str = ""
) -> tuple[Tensor, Tensor]:
    """The nearest (A = sqrt(S) V^T [rank, in], B = U sqrt(S) [out, rank]) to up @ down.

    QR of both factors first, so only an r x r matrix is decomposed. The sign of each pair makes
    the projection of the column of U onto a fixed random direction positive: unlike "largest
    entry positive" this does not flip when two entries of similar size change order.
    """
    qu, ru = torch.linalg.qr(up.double())
    qd, rd = torch.linalg.qr(down.double().mT)
    u, s, vt = torch.linalg.svd(ru @ rd.mT)
    direction = _seeded_normal((up.shape[0],), seed, "sign " + tag).to(up.device)
    left = qu @ u[:, :rank]
    signs = torch.where(direction @ left < 0, -1.0, 1.0)
    root = s[:rank].sqrt() * signs
    new_up, new_down = left * root, (root[:, None] * vt[:rank]) @ qd.mT
    missing = rank - new_up.shape[1]
    new_up = F.pad(new_up, (0, missing))
    return F.pad(new_down, (0, 0, 0, missing)).float(), new_up.float()


def product_energy(up: Tensor, down: Tensor) -> float:
    """||up @ down||_F^2 from the two r x r Gram matrices: no product of full size."""
    up, down = up.double(), down.double()
    return float(((up.mT @ up) * (down @ down.mT)).sum())


def _seeded_normal(shape: tuple[int, ...], seed: int, tag: str) -> Tensor:
    digest = hashlib.sha256(f"{seed}:{tag}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randn(shape, generator=generator, dtype=torch.float64)
