"""Bases of a layer that do not depend on how its LoRAs were factored.

(B G, G^-1 A) is the same LoRA as (B, A), so a method that looks at entries has to look at entries
in a basis made from the differences D_i themselves: the eigenvectors of sum D_i D_i^T and of
sum D_i^T D_i. They are unique up to signs, and the methods here do not mind signs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .stack import Stack

#: squared singular values below this share of the largest are noise
_NOISE = 1e-12


def output_basis(stack: Stack) -> tuple[Tensor, Tensor]:
    """Left singular vectors [out, p] and singular values [p] of [D_1 ... D_T], float64."""
    parts = [
        up.double() @ _root(down.double()) for up, down in zip(stack.ups, stack.downs, strict=True)
    ]
    return _left_singular(torch.cat(parts, 1))


def input_basis(stack: Stack) -> tuple[Tensor, Tensor]:
    """Right singular vectors [in, q] and singular values [q] of the D_i on top of each other."""
    parts = [
        down.double().mT @ _root(up.double().mT)
        for up, down in zip(stack.ups, stack.downs, strict=True)
    ]
    return _left_singular(torch.cat(parts, 1))


def inverse_root(gram: Tensor) -> Tensor:
    """gram^(-1/2) of a symmetric positive matrix [R, R], zero where it is singular."""
    values, vectors = torch.linalg.eigh(gram)
    live = values > 1e-10 * values[-1]
    scale = torch.where(live, values.clamp_min(1e-300).rsqrt(), 0.0)
    return vectors * scale @ vectors.mT


def _root(rows: Tensor) -> Tensor:
    """C [r, r] with C C^T = rows rows^T; rows [r, n]."""
    values, vectors = torch.linalg.eigh(rows @ rows.mT)
    return vectors * values.clamp_min(0).sqrt()


def _left_singular(matrix: Tensor) -> tuple[Tensor, Tensor]:
    wide = matrix.shape[1] > matrix.shape[0]
    values, vectors = torch.linalg.eigh(matrix @ matrix.mT if wide else matrix.mT @ matrix)
    values, vectors = values.flip(0), vectors.flip(1)
    live = int((values > _NOISE * values[0]).sum())
    sigma, vectors = values[:live].sqrt(), vectors[:, :live]
    return (vectors if wide else matrix @ (vectors / sigma)), sigma
