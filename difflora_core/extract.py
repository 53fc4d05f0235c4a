"""Weight differences to a LoRA file: layer by layer, resumable, with a certificate per layer.

Every layer is the best approximation of its rank (Eckart and Young 1936); no value is clamped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .errors import DiffLoRAError, LayoutMismatch
from .extract_parts import Part, PartStore, refuse_full_disk
from .extract_sources import Source
from .header import LoraHeader
from .key_names import module_table
from .lora import LayerOutline, LazyLayers, Lora, LoraLayer
from .merging import Certificate, RankRule, summary, truncate_dense
from .merging.rules import ranks_within, room
from .weights_file import write_lora

Progress = Callable[[int, int], None]
Certificates = Mapping[str, Certificate]

HEADROOM = 8
"""with a size limit, layers are kept up to this many times the rank that all could have"""
_MEGABYTE = 1_000_000


@dataclass(frozen=True)
class ExtractSettings:
    """How much of each layer is kept, and how it is stored."""

    rule: RankRule
    dtype: torch.dtype = torch.float16
    overwrite: bool = False
    title: str = ""

    def identity(self) -> list:
        """JSON values that change when a finished layer would."""
        return [vars(self.rule), str(self.dtype)]


def extract(
    source: Source, out: Path, settings: ExtractSettings, progress: Progress | None = None
) -> dict:
    """Write the differences of `source` to `out` as a LoRA; returns a report of JSON values.

    Finished layers lie in a folder beside `out` until it is written; a run that was stopped goes on
    from there. Raises DiffLoRAErrors for bad inputs, a full disk, and when nothing differs.
    """
    begin = time.perf_counter()
    layers, widths = list(source.layers), _widths(source)
    counted = _worth_a_place(source, settings)
    rule = _rule_of_parts(sum(widths[layer] for layer in counted), settings)
    offsets, warnings = source.offsets(), source.warnings()
    others = sum(offset.numel() for offset in offsets.values())
    if settings.rule.megabytes is not None:  # before hours of work
        least = sum(widths[layer] for layer in counted) + others
        room(settings.rule.megabytes, least, settings.dtype.itemsize)
    parts = PartStore(out)
    refuse_full_disk(out, _bytes_needed(source.base, counted, rule, settings), parts.size())
    parts.open([source.identity(), settings.identity()])
    resumed = sum(layer in parts for layer in layers)
    _finish(source, layers, parts, rule, settings.dtype, progress)
    certificates = _chosen(layers, parts, widths, settings, others)
    if not certificates and not offsets:
        parts.remove()
        raise LayoutMismatch(
            "Nothing differs in any layer that a LoRA can hold, so there is nothing to extract.",
            hint="The two inputs have the same weights.",
        )
    title = settings.title or out.stem
    header = {**source.metadata(), **LoraHeader(title=title, base=source.base).to_dict()}
    lora = Lora(_lazy(certificates, parts, source.base, settings.dtype), header, offsets)
    write_lora(lora, out, header, settings.overwrite, settings.dtype)
    parts.remove()
    return {
        "file": str(out),
        "bytes": out.stat().st_size,
        "base": source.base,
        "same": len(layers) - len(certificates),
        "offsets": len(offsets),
        "resumed": resumed,
        **summary(certificates),
        "warnings": warnings,
        "seconds": round(time.perf_counter() - begin, 3),
    }


def _widths(source: Source) -> dict[str, int]:
    """Values that one rank of each layer costs: out + in."""
    shapes = module_table(source.base).shapes
    return {name: shapes[name][0] + math.prod(shapes[name][1:]) for name in source.layers}


def _worth_a_place(source: Source, settings: ExtractSettings) -> list[str]:
    """Layers that room is kept for: under a size limit a look at all tells which differ."""
    if settings.rule.megabytes is None:
        return list(source.layers)
    return [layer for layer in source.layers if source.delta(layer) is not None]


def _rule_of_parts(width: int, settings: ExtractSettings) -> RankRule:
    """The rule for one layer at a time. A size is spread later, so each layer keeps more than that.

    With a size limit no layer gets more than HEADROOM times the rank that all could have; `width`:
    values that one rank of them all costs.
    """
    if settings.rule.megabytes is None:
        return settings.rule
    values = settings.rule.megabytes * _MEGABYTE / settings.dtype.itemsize
    return RankRule(rank=max(1, math.ceil(HEADROOM * values / max(1, width))))


def _bytes_needed(
    base: str, layers: Sequence[str], rule: RankRule, settings: ExtractSettings
) -> int:
    """Parts and result together, at most; 0 where the rule does not tell beforehand."""
    shapes, values = module_table(base).shapes, 0
    for name in layers:
        rows, columns = shapes[name][0], math.prod(shapes[name][1:])
        values += min(rule.rank or 0, rows, columns) * (rows + columns)
    part_bytes, megabytes = values * settings.dtype.itemsize, settings.rule.megabytes
    result = part_bytes if megabytes is None else int(megabytes * _MEGABYTE)
    return part_bytes + min(part_bytes, result)


def _finish(
    source: Source,
    layers: Sequence[str],
    parts: PartStore,
    rule: RankRule,
    dtype: torch.dtype,
    progress: Progress | None,
) -> None:
    """Every layer that is not there yet becomes a part."""
    for done, layer in enumerate(layers, 1):
        if layer not in parts:
            delta = _delta(source, layer, parts)
            part = None if delta is None else Part(*truncate_dense(delta, rule, dtype))
            parts.put(layer, part)
        if progress:
            progress(done, len(layers))


def _delta(source: Source, layer: str, parts: PartStore) -> Tensor | None:
    try:
        return source.delta(layer)
    except DiffLoRAError:  # other inputs are needed, and the parts are of no use for them
        parts.remove()
        raise


def _chosen(
    layers: Sequence[str],
    parts: PartStore,
    widths: Mapping[str, int],
    settings: ExtractSettings,
    others: int,
) -> dict[str, Certificate]:
    """Certificates of the layers that differ, with the ranks that they get beside `others`."""
    found = {layer: parts.certificate(layer) for layer in layers}
    kept = {layer: certificate for layer, certificate in found.items() if certificate}
    if settings.rule.megabytes is None or not kept:
        return kept
    spectra = {n: torch.tensor(c.singular_values[: c.rank]) for n, c in kept.items()}
    own = {name: widths[name] for name in kept}
    ranks = ranks_within(settings.rule.megabytes, spectra, own, settings.dtype.itemsize, others)
    return {name: _cut(certificate, ranks[name]) for name, certificate in kept.items()}


def _cut(certificate: Certificate, rank: int) -> Certificate:
    """The certificate of the first ranks of a part: what rounding costs is that of the whole."""
    norm = certificate.norm
    energies = [value**2 for value in certificate.singular_values[: certificate.rank]]
    dropped = sum(energies[rank:])
    error = math.sqrt(certificate.error**2 + dropped / norm**2)
    return replace(certificate, rank=rank, energy=sum(energies[:rank]) / norm**2, error=error)


def _lazy(
    certificates: Certificates, parts: PartStore, base: str, dtype: torch.dtype
) -> LazyLayers:
    """Layers that are read from their parts when the file is written."""
    shapes = module_table(base).shapes
    outline = {n: LayerOutline(c.rank, shapes[n], dtype) for n, c in certificates.items()}

    def layer(name: str) -> LoraLayer:
        part, rank = parts.get(name), certificates[name].rank
        shape = shapes[name]
        down = part.down[:rank].reshape(rank, *shape[1:])
        up = part.up[:, :rank].reshape(shape[0], rank, *(1,) * (len(shape) - 2))
        return LoraLayer(name, down, up)

    return LazyLayers(outline, layer)
