"""One merge at work: which layers, at which weights, in which batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..errors import BadLoraFile
from ..lora import LayerOutline, LoraLayer
from .blocks import block_of
from .certificate import Certificate, certify
from .inputs import MergeInput, MergeSettings, block_factor
from .methods import METHODS
from .rules import RankRule, ranks_within
from .stack import Options, Product, Stack
from .truncation import balanced, is_wide, truncate_dense, truncate_wide, truncated
from .weighting import layer_weights, overall_weights

Progress = Callable[[int, int], None]
"""(layers done, layers in all)"""
Result = tuple[LoraLayer, Certificate]
Factors = tuple[Tensor, Tensor, Certificate]
"""(down [k, in], up [out, k], certificate)"""

#: float64 values that one batch of equal layers may take
_BATCH = 4_000_000
_ALL = 1 << 30


@dataclass(frozen=True, eq=False)
class Job:
    """Inputs that fit each other, with settings that make sense."""

    inputs: Sequence[MergeInput]
    settings: MergeSettings
    device: torch.device | str = "cpu"

    @cached_property
    def weights(self) -> dict[str, list[float]]:
        """Weight of every input in every layer; the order of the layers is that of the result."""
        return layer_weights(self.inputs, self.settings, self.norms)

    @cached_property
    def norms(self) -> list[dict[str, float]] | None:
        """Norms of all layers of all inputs; None where the weighting does not ask for them."""
        if self.settings.weighting == "given":
            return None
        return [entry.lora.norms() for entry in self.inputs]

    @cached_property
    def held(self) -> list[Mapping[str, LayerOutline]]:
        """Outlines of the layers that every input has."""
        return [entry.lora.outline for entry in self.inputs]

    @cached_property
    def outlines(self) -> dict[str, LayerOutline]:
        """One outline per layer, for its shape."""
        return {name: outline for outlines in self.held for name, outline in outlines.items()}

    def results(self, progress: Progress | None) -> Iterator[Result]:
        """Every layer merged, in batches of equal shapes, so not in order."""
        done, total = 0, len(self.weights)
        ranks = self._ranks_within_size()
        for stacks in self._stacks():
            rules = [
                RankRule(rank=ranks[stack.name]) if ranks else self._rule(stack) for stack in stacks
            ]
            for stack, factors in zip(stacks, self._merged(stacks, rules), strict=True):
                yield self._layer(stack.name, *factors)
            done += len(stacks)
            if progress:
                progress(done, total)

    def offsets(self) -> dict[str, Tensor]:
        """Differences of biases and norms: always the weighted sum."""
        merged: dict[str, Tensor] = {}
        overall = overall_weights(self.inputs, self.settings)
        for entry, weight in zip(self.inputs, overall, strict=True):
            for name, offset in entry.lora.offsets.items():
                share = offset.float() * (weight * block_factor(entry.blocks, block_of(name)))
                if name in merged and merged[name].shape != share.shape:
                    raise BadLoraFile(f"{name} has different shapes in two of the LoRAs.")
                merged[name] = merged[name] + share if name in merged else share
        return {name: offset.to(self.settings.dtype) for name, offset in merged.items()}

    def _ranks_within_size(self) -> dict[str, int] | None:
        """Ranks of all layers for a limit of size, which needs all singular values first."""
        megabytes = self.settings.rule.megabytes
        if megabytes is None:
            return None
        spectra: dict[str, Tensor] = {}
        for stacks in self._stacks():
            merged = self._merged(stacks, [RankRule(rank=_ALL)] * len(stacks))
            for stack, (_, _, certificate) in zip(stacks, merged, strict=True):
                spectra[stack.name] = torch.tensor(certificate.singular_values)
        widths = {name: sum(_matrix_shape(self.outlines[name])) for name in spectra}
        return ranks_within(megabytes, spectra, widths, self.settings.dtype.itemsize)

    def _rule(self, stack: Stack) -> RankRule:
        """The limit of one layer; `svd` without one takes the largest rank of its inputs."""
        rule = self.settings.rule
        if self.settings.method == "svd" and rule.exact:
            return RankRule(rank=max(stack.ranks))
        return rule

    def _batches(self) -> Iterator[list[str]]:
        """Layers of equal shape and ranks together, as many as memory allows."""
        groups: dict[tuple[int, int, tuple[int, ...]], list[str]] = {}
        for name in self.weights:
            holders = [outlines[name] for outlines in self.held if name in outlines]
            ranks = tuple(outline.rank for outline in holders)
            groups.setdefault((*_matrix_shape(holders[0]), ranks), []).append(name)
        for (rows, columns, ranks), names in groups.items():
            size = max(1, _BATCH // ((rows + columns) * max(sum(ranks), 1)))
            yield from (names[i : i + size] for i in range(0, len(names), size))

    def _stacks(self) -> Iterator[list[Stack]]:
        """All batches, each read while the one before it is worked on."""
        with ThreadPoolExecutor(1) as reader:
            pending = None
            for names in self._batches():
                ready, pending = pending, reader.submit(self._read, names)
                if ready:
                    yield ready.result()
            if pending:
                yield pending.result()

    def _read(self, names: Sequence[str]) -> list[Stack]:
        return [self._stack(name) for name in names]

    def _stack(self, name: str) -> Stack:
        present = [i for i, outlines in enumerate(self.held) if name in outlines]
        layers = [self.inputs[i].lora.layers[name] for i in present]
        return Stack.of(layers, [self.weights[name][i] for i in present], self.device)

    def _merged(self, stacks: Sequence[Stack], rules: Sequence[RankRule]) -> Iterator[Factors]:
        method, dtype = METHODS[self.settings.method], self.settings.dtype
        options = Options(self.settings.density, self.settings.seed, self.settings.rule)
        exact = [method.merge(stack, options) for stack in stacks]
        if method.linear and not rules[0].exact:
            yield from limited([e for e in exact if isinstance(e, tuple)], rules, dtype)
            return
        for stack, result, rule in zip(stacks, exact, rules, strict=True):
            if isinstance(result, Tensor):
                rank = min(sum(stack.ranks), *stack.shape)
                yield truncate_dense(result, RankRule(rank=rank) if rule.exact else rule, dtype)
            elif rule.exact or method.chooses_rank:
                yield whole(result, dtype)
            else:
                yield from limited([result], [rule], dtype)

    def _layer(self, name: str, down: Tensor, up: Tensor, certificate: Certificate) -> Result:
        shape = self.outlines[name].weight_shape
        down = down.reshape(-1, *shape[1:]).cpu()
        up = up.reshape(shape[0], -1, *(1,) * (len(shape) - 2)).cpu()
        return LoraLayer(name, down.contiguous(), up.contiguous()), certificate


def limited(
    products: Sequence[Product], rules: Sequence[RankRule], dtype: torch.dtype
) -> Iterator[Factors]:
    """Products of one shape, each truncated by its rule."""
    up, down = products[0]
    rows, columns, ranks = up.shape[0], down.shape[1], up.shape[1]
    if is_wide(rows, columns, ranks):
        for (up, down), rule in zip(products, rules, strict=True):
            yield truncate_wide(up, down, rule, dtype)
        return
    yield from truncated(products, rules, dtype)


def whole(product: Product, dtype: torch.dtype) -> Factors:
    """A product with nothing left out; a rank above the layer's own is brought down to it."""
    up, down = product
    rank = min(up.shape[0], down.shape[1])
    if up.shape[1] > rank:
        return next(limited([product], [RankRule(rank=rank)], dtype))
    exact_up, exact_down = balanced(up.double(), down.double())
    up, down = exact_up.to(dtype), exact_down.to(dtype)
    squared = ((exact_up.mT @ exact_up) * (exact_down @ exact_down.mT)).sum()
    norm = float(squared.clamp_min(0).sqrt())
    return down, up, certify(exact_up, exact_down, up, down, norm, torch.zeros(0))


def _matrix_shape(outline: LayerOutline) -> tuple[int, int]:
    """[out, in * h * w]."""
    out, *inner = outline.weight_shape
    size = 1
    for width in inner:
        size *= width
    return out, size
