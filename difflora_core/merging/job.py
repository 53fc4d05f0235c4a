"""One merge at work: which layers, at which weights, in which batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import compress
from operator import not_

import torch
from torch import Tensor

from ..errors import BadLoraFile
from ..lora import LayerOutline, LoraLayer
from ..tensor_file import is_finite
from .blocks import block_of
from .certificate import Certificate, certify
from .inputs import MergeInput, MergeSettings, block_factor
from .methods import METHODS
from .rules import RankRule, ranks_within
from .stack import Batch, Options, Product
from .truncation import (
    Truncated,
    balanced,
    is_wide,
    truncate_dense,
    truncate_wide,
    truncated,
)
from .weighting import layer_weights, overall_weights

Progress = Callable[[int, int], None]
"""(layers done, layers in all)"""
Result = tuple[LoraLayer, Certificate]

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
        for batch in self.batches():
            rule = self._rule(batch)
            rules = [RankRule(rank=ranks[name]) if ranks else rule for name in batch.names]
            for name, factors in zip(batch.names, self._merged(batch, rules), strict=True):
                yield self._layer(name, *factors)
            done += len(batch)
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
        return {name: self._rounded(name, offset) for name, offset in merged.items()}

    def _ranks_within_size(self) -> dict[str, int] | None:
        """Ranks of all layers for a limit of size, which needs all singular values first."""
        megabytes = self.settings.rule.megabytes
        if megabytes is None:
            return None
        spectra: dict[str, Tensor] = {}
        for batch in self.batches():
            merged = self._merged(batch, [RankRule(rank=_ALL)] * len(batch))
            for name, (_, _, certificate) in zip(batch.names, merged, strict=True):
                spectra[name] = torch.tensor(certificate.singular_values)
        widths = {name: sum(_matrix_shape(self.outlines[name])) for name in spectra}
        sizes = {n: o.numel() for entry in self.inputs for n, o in entry.lora.offsets.items()}
        others = sum(sizes.values())
        return ranks_within(megabytes, spectra, widths, self.settings.dtype.itemsize, others)

    def _rule(self, batch: Batch) -> RankRule:
        """The limit of each layer; `svd` without one takes the largest rank of its inputs."""
        rule = self.settings.rule
        if self.settings.method == "svd" and rule.exact:
            return RankRule(rank=max(batch.ranks))
        return rule

    def _groups(self) -> Iterator[list[str]]:
        """Layers of equal shape and ranks together, as many as memory allows."""
        groups: dict[tuple[int, int, tuple[int, ...]], list[str]] = {}
        for name in self.weights:
            holders = [outlines[name] for outlines in self.held if name in outlines]
            ranks = tuple(outline.rank for outline in holders)
            groups.setdefault((*_matrix_shape(holders[0]), ranks), []).append(name)
        for (rows, columns, ranks), names in groups.items():
            size = max(1, _BATCH // ((rows + columns) * max(sum(ranks), 1)))
            yield from (names[i : i + size] for i in range(0, len(names), size))

    def batches(self) -> Iterator[Batch]:
        """All layers, each batch read while the one before it is worked on."""
        with ThreadPoolExecutor(1) as reader:
            pending = None
            for names in self._groups():
                ready, pending = pending, reader.submit(self._read, names)
                if ready:
                    yield ready.result()
            if pending:
                yield pending.result()

    def _read(self, names: Sequence[str]) -> Batch:
        layers, weights, absent = [], [], []
        for name in names:
            has = [name in outlines for outlines in self.held]
            holders = compress(self.inputs, has)
            layers.append([holder.lora.layers[name] for holder in holders])
            weights.append(list(compress(self.weights[name], has)))
            absent.append(list(compress(self.weights[name], map(not_, has))))
        return Batch.of(layers, weights, self.device, absent)

    def _merged(self, batch: Batch, rules: Sequence[RankRule]) -> Iterator[Truncated]:
        """One at a time: with all ranks kept, a batch of results can be a hundred times its LoRAs.

        Errors: BadLoraFile.
        """
        try:
            yield from self._merge(batch, rules)
        except torch.linalg.LinAlgError as error:  # squares of what is still finite are not
            raise BadLoraFile(
                "The LoRAs hold numbers that are too big to be merged.",
                hint="Smaller weights help, unless one of the files is damaged.",
            ) from error

    def _merge(self, batch: Batch, rules: Sequence[RankRule]) -> Iterator[Truncated]:
        method, dtype = METHODS[self.settings.method], self.settings.dtype
        if method.shares and not rules[0].exact:
            shares = [method.shares(stack) for stack in batch.stacks()]
            yield from limited(*batch.weighted_sums(shares), rules, dtype)
            return
        options = Options(self.settings.density, self.settings.seed, self.settings.rule)
        for stack, rule in zip(batch.stacks(), rules, strict=True):
            result = method.exact(stack, options)
            if isinstance(result, Tensor):
                rank = min(sum(stack.ranks), *stack.shape)
                yield truncate_dense(result, RankRule(rank=rank) if rule.exact else rule, dtype)
            elif rule.exact or method.chooses_rank:
                yield whole(result, dtype)
            else:
                yield from limited(result[0][None], result[1][None], [rule], dtype)

    def _layer(self, name: str, down: Tensor, up: Tensor, certificate: Certificate) -> Result:
        shape = self.outlines[name].weight_shape
        down = self._rounded(name, down).reshape(-1, *shape[1:]).cpu()
        up = self._rounded(name, up).reshape(shape[0], -1, *(1,) * (len(shape) - 2)).cpu()
        return LoraLayer(name, down.contiguous(), up.contiguous()), certificate

    def _rounded(self, name: str, result: Tensor) -> Tensor:
        """In the precision asked for. Errors: BadLoraFile where it does not fit."""
        rounded = result.to(self.settings.dtype)
        if is_finite(rounded):
            return rounded
        raise BadLoraFile(
            f"The result for {name} is not finite in "
            f"{str(self.settings.dtype).removeprefix('torch.')}.",
            hint="Smaller weights help; what is too big for 16 bits may fit into fp32.",
        )


def limited(
    up: Tensor, down: Tensor, rules: Sequence[RankRule], dtype: torch.dtype
) -> list[Truncated]:
    """Products up [N, out, R] @ down [N, R, in], each truncated by its rule."""
    if is_wide(up.shape[1], down.shape[2], up.shape[2]):
        products = zip(up, down, rules, strict=True)
        return [truncate_wide(u, d, rule, dtype) for u, d, rule in products]
    return truncated(up, down, rules, dtype)


def whole(product: Product, dtype: torch.dtype) -> Truncated:
    """A product with nothing left out; a rank above the layer's own is brought down to it."""
    up, down = product
    rank = min(up.shape[0], down.shape[1])
    if up.shape[1] > rank:
        return limited(up[None], down[None], [RankRule(rank=rank)], dtype)[0]
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
