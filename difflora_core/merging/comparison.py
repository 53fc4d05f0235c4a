"""How two or more LoRAs relate, block by block, from small Gram matrices only.

With D_i = B_i A_i, <D_i, D_j> = <B_i^T B_j, A_i A_j^T> needs r x r matrices; the subspaces that a
LoRA writes to and reads from have orthonormal bases made of its own Gram matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import BadLoraFile
from ..lora import Lora
from .blocks import block_of
from .inputs import check_shapes, common_base
from .stack import Stack


@dataclass(frozen=True, eq=False)
class Comparison:
    """Figures per block [B, T, T] and over everything [T, T]; T LoRAs, float64.

    cosine: of the differences. overlap: mean squared cosine of the principal angles between the
    subspaces that two LoRAs write to and read from, 0 disjoint, 1 one inside the other.
    interference[i, j]: share of the energy of LoRA j that lies where LoRA i writes and reads, 0..1.
    norms [B, T]: Frobenius norms. NaN where a LoRA changes nothing in a block.
    """

    titles: tuple[str, ...]
    blocks: tuple[str, ...]
    norms: Tensor
    cosine: Tensor
    overlap: Tensor
    interference: Tensor
    total_norms: Tensor
    total_cosine: Tensor
    total_overlap: Tensor
    total_interference: Tensor

    def report(self) -> dict[str, Any]:
        """The same as JSON values; NaN becomes null."""
        per_block = zip(
            self.blocks, self.norms, self.cosine, self.overlap, self.interference, strict=True
        )
        return {
            "titles": list(self.titles),
            "norms": _json(self.total_norms),
            "cosine": _json(self.total_cosine),
            "overlap": _json(self.total_overlap),
            "interference": _json(self.total_interference),
            "blocks": {
                block: {
                    "norms": _json(norms),
                    "cosine": _json(cosine),
                    "overlap": _json(overlap),
                    "interference": _json(interference),
                }
                for block, norms, cosine, overlap, interference in per_block
            },
        }


@dataclass
class _Sums:
    """What adds up over the layers of a block: inner products, overlaps, energies inside."""

    inner: Tensor
    overlap: Tensor
    shared: Tensor
    inside: Tensor

    @classmethod
    def none(cls, count: int) -> _Sums:
        return cls(*(torch.zeros(count, count, dtype=torch.float64) for _ in range(4)))

    def __iadd__(self, other: _Sums) -> _Sums:
        for name, value in vars(other).items():
            getattr(self, name).add_(value)
        return self


def compare(
    loras: Sequence[Lora],
    titles: Sequence[str],
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Compare LoRAs of one base model; reads lazy ones layer by layer.

    Raises LayoutMismatch for LoRAs that do not fit each other, BadLoraFile for LoRAs without
    layers.
    """
    common_base(loras, titles)
    check_shapes(loras, titles)
    names = list(dict.fromkeys(name for lora in loras for name in lora.outline))
    if not names:
        raise BadLoraFile(
            "These LoRAs change biases and norms only.", hint="Compare LoRAs that change matrices."
        )
    sums: dict[str, _Sums] = {}
    for done, name in enumerate(names, start=1):
        block = sums.setdefault(block_of(name), _Sums.none(len(loras)))
        block += _layer_sums(loras, name)
        if progress:
            progress(done, len(names))
    return _finished(tuple(titles), sums)


def _layer_sums(loras: Sequence[Lora], name: str) -> _Sums:
    present = [i for i, lora in enumerate(loras) if name in lora.outline]
    stack = Stack.of([loras[i].layers[name] for i in present], [1.0] * len(present), "cpu")
    sums = _Sums.none(len(loras))
    ups, downs = [u.double() for u in stack.ups], [d.double().mT for d in stack.downs]
    write, read = (
        [_subspace(u, d) for u, d in zip(ups, downs, strict=True)],
        [_subspace(d, u) for u, d in zip(ups, downs, strict=True)],
    )
    for a, i in enumerate(present):
        for b, j in enumerate(present):
            sums.inner[i, j] = ((ups[a].mT @ ups[b]) * (downs[a].mT @ downs[b])).sum()
            if write[a].shape[1] and write[b].shape[1]:
                sums.overlap[i, j] = (_overlap(write[a], write[b]) + _overlap(read[a], read[b])) / 2
                sums.shared[i, j] = 1
            inside = (write[a].mT @ ups[b]) @ (downs[b].mT @ read[a])
            sums.inside[i, j] = inside.square().sum()
    return sums


def _subspace(factor: Tensor, other: Tensor) -> Tensor:
    """Orthonormal basis [n, k] of the column space of factor @ other^T."""
    gram = other.mT @ other
    values, vectors = torch.linalg.eigh(gram)
    spanning = factor @ (vectors * values.clamp_min(0).sqrt())
    spread, directions = torch.linalg.eigh(spanning.mT @ spanning)
    live = spread > 1e-10 * spread[-1].clamp_min(1e-300)
    return spanning @ (directions[:, live] / spread[live].sqrt())


def _overlap(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared cosine of the principal angles (Golub and Van Loan, section 6.4.3)."""
    return (a.mT @ b).square().sum() / min(a.shape[1], b.shape[1])


def _finished(titles: tuple[str, ...], sums: dict[str, _Sums]) -> Comparison:
    total = _Sums.none(len(titles))
    for part in sums.values():
        total += part
    blocks = [_figures(part) for part in sums.values()]
    norms, cosine, overlap, interference = (torch.stack(kind) for kind in zip(*blocks, strict=True))
    return Comparison(titles, tuple(sums), norms, cosine, overlap, interference, *_figures(total))


def _figures(sums: _Sums) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Norms [T], cosine, overlap and interference [T, T]."""
    energy = sums.inner.diagonal().clamp_min(0)
    norms = energy.sqrt()
    cosine = (sums.inner / norms.outer(norms)).clamp(-1, 1)
    return norms, cosine, sums.overlap / sums.shared, sums.inside / energy


def _json(values: Tensor) -> Any:
    if values.ndim:
        return [_json(part) for part in values]
    number = float(values)
    return round(number, 6) if math.isfinite(number) else None
