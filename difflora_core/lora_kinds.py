"""Every kind of weight difference that a file can spell without the base weight, as two factors.

All of them are exact: a LoHa of ranks r and s is a matrix of rank r s, a LoKr one of the product of
its ranks, and a whole difference has itself and an identity. Shapes alone go through the same
functions as tensors on the "meta" device, so nothing is said twice about what fits what.

Letters: `o` out, `i` in, `r s` ranks, `kh kw` kernel, `n` = in * kh * kw.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from einops import einsum, rearrange
from torch import Tensor

Parts = Mapping[str, Tensor]


class Misfit(ValueError):
    """Shapes that do not make a matrix together."""


class Pair(NamedTuple):
    """A matrix as up [o, r] @ down [r, n]."""

    up: Tensor
    down: Tensor

    @property
    def rank(self) -> int:
        return self.up.shape[1]

    @property
    def sides(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    def matrix(self) -> Tensor:
        return self.up @ self.down


def exact_pair(family: str, parts: Parts) -> Pair:
    """The factors of a whole difference, without its scale; `family` is lora, loha, lokr or full.

    Factors of plain LoRAs and whole differences keep their number type; the rest is in float32, or
    in float64 if it was. Raises Misfit.
    """
    try:
        pair = _MAKERS[family](parts)
    except (RuntimeError, KeyError, IndexError) as error:  # of einops, torch and missing parts
        raise Misfit(str(error)) from error
    if pair.up.shape[1] != pair.down.shape[0]:
        raise Misfit(f"ranks {pair.up.shape[1]} and {pair.down.shape[0]}")
    return pair


def inner_told(family: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    """(in, kh, kw) where the shapes of the parts tell it; None where the weight has to."""
    if family == "lora":
        kernel = shapes.get("mid", shapes["down"])[2:]
        # two sides only: of a linear layer, or of a convolution whose kernel is laid flat
        return (shapes["down"][1], *kernel) if kernel else None
    if family == "full":
        return with_kernel(shapes["diff"][1:])
    if "hada_t1" in shapes:
        return (shapes["hada_w1_b"][1], *shapes["hada_t1"][2:])
    return None


def with_kernel(inner: tuple[int, ...]) -> tuple[int, ...]:
    """(in,) -> (in, 1, 1): a linear layer is a convolution with a kernel of one."""
    return (*inner, 1, 1) if len(inner) == 1 else tuple(inner)


def _lora(parts: Parts) -> Pair:
    """Linear and convolution alike; LoCon in Tucker form absorbs its middle, exactly."""
    up, down = parts["up"], parts["down"]
    if up.ndim not in (2, 4, 5) or down.ndim not in (2, 4, 5) or up.shape[2:].numel() > 1:
        raise Misfit("the factors are no matrices")
    if "mid" not in parts:
        return Pair(up.flatten(1), down.flatten(1))
    mid, down = parts["mid"], down.flatten(1)
    return Pair(up.flatten(1), _contracted(mid, down))


def _contracted(core: Tensor, down: Tensor) -> Tensor:
    """Core [r, s, kh, kw] with down [s, i] -> [r, n]."""
    if core.ndim != 4:
        raise Misfit("the core is no kernel")
    product = einsum(_wide(core), _wide(down), "r s kh kw, s i -> r i kh kw")
    return product.flatten(1)


def _full(parts: Parts) -> Pair:
    diff = parts["diff"]
    if diff.ndim < 2:
        raise Misfit("the difference is no matrix")
    return _with_identity(diff.flatten(1))


def _with_identity(matrix: Tensor) -> Pair:
    """A matrix as itself and an identity on its smaller side."""
    out, inner = matrix.shape
    identity = torch.eye(min(out, inner), dtype=matrix.dtype, device=matrix.device)
    return Pair(identity, matrix) if out <= inner else Pair(matrix, identity)


def _loha(parts: Parts) -> Pair:
    """(A1 B1) * (A2 B2) element by element: column by column products of the factors."""
    one, two = (_hada_side(parts, number) for number in "12")
    if one.sides != two.sides:
        raise Misfit("the two products differ in shape")
    if one.rank * two.rank > min(one.sides):
        return _with_identity(one.matrix() * two.matrix())
    up = einsum(one.up, two.up, "o r, o s -> o r s")
    down = einsum(one.down, two.down, "r n, s n -> r s n")
    return Pair(rearrange(up, "o r s -> o (r s)"), rearrange(down, "r s n -> (r s) n"))


def _hada_side(parts: Parts, number: str) -> Pair:
    a, b = _matrix(parts, f"hada_w{number}_a"), _matrix(parts, f"hada_w{number}_b")
    return _turned(a, b, parts.get(f"hada_t{number}"))


def _turned(a: Tensor, b: Tensor, core: Tensor | None) -> Pair:
    """a [o, r] with b [r, n]; with a core [r, s, kh, kw] it is a [r, o] and b [s, i]."""
    if core is None:
        return Pair(a, b)
    return Pair(a.T, _contracted(core, b))


def _lokr(parts: Parts) -> Pair:
    """kron(w1, w2): the Kronecker products of the factors of both."""
    one, two = _kron_side(parts, "1"), _kron_side(parts, "2")
    return Pair(_kron(one.up, two.up), _kron(one.down, two.down))


def _kron(one: Tensor, two: Tensor) -> Tensor:
    """As torch.kron, which fails on some transposed tensors."""
    return rearrange(einsum(one, two, "a b, c d -> a c b d"), "a c b d -> (a c) (b d)")


def _kron_side(parts: Parts, number: str) -> Pair:
    name = f"lokr_w{number}"
    if name in parts:
        if parts[name].ndim not in (2, 4):
            raise Misfit(f"{name} is no matrix")
        return _with_identity(_wide(parts[name]).flatten(1))
    core = parts.get("lokr_t2") if number == "2" else None
    pair = _turned(_matrix(parts, f"{name}_a"), _matrix(parts, f"{name}_b"), core)
    if pair.rank > min(pair.sides):
        pair = _with_identity(pair.matrix())
    return pair


def _matrix(parts: Parts, role: str) -> Tensor:
    if parts[role].ndim != 2:
        raise Misfit(f"{role} is no matrix")
    return _wide(parts[role])


def _wide(tensor: Tensor) -> Tensor:
    # torch promotes no type of 8 bits
    return tensor.to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)


_MAKERS = {"lora": _lora, "full": _full, "loha": _loha, "lokr": _lokr}
