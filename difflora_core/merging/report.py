"""What a merge did, as JSON values, and the header fields of its file."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..header import HASH_FIELDS, LoraHeader
from ..key_names import detect_base
from .blocks import block_of
from .certificate import Certificate
from .inputs import MergeInput
from .job import Job
from .methods import METHODS
from .weighting import overall_weights

if TYPE_CHECKING:
    from .engine import Merged

_WORST = 5
_FACTOR_WARNING = (
    "factor_average is not the average of the LoRAs: it mixes factors of different LoRAs. This "
    "result differs from the exact average by {:.1%} of the average's norm. Use average."
)


def report(
    job: Job,
    certificates: Mapping[str, Certificate],
    seconds: float,
    from_average: float | None = None,
) -> dict[str, Any]:
    """Facts about a merge; errors are relative to the method's exact result.

    from_average: distance to the exact average, of a method that only sounds like it.
    """
    settings = job.settings
    weights = overall_weights(job.inputs, settings)
    return {
        "method": settings.method,
        "weighting": settings.weighting,
        "inputs": [
            {"title": entry.title, "weight": weight, "layers": len(held)}
            for entry, weight, held in zip(job.inputs, weights, job.held, strict=True)
        ],
        **summary(certificates),
        "blocks": _by_block(certificates),
        "certificates": {name: _certificate(c) for name, c in certificates.items()},
        **({} if from_average is None else {"error_to_average": from_average}),
        "warnings": [*_factor_warning(from_average), *_warnings(job)],
        "seconds": seconds,
    }


def merge_header(inputs: Sequence[MergeInput], merged: Merged, title: str) -> dict[str, str]:
    """Header fields of a merged file: base, triggers, inputs and the certificate of every layer."""
    triggers = [entry.lora.metadata.get("modelspec.trigger_phrase", "") for entry in inputs]
    facts = merged.report
    sources = [
        {"title": entry.title, "weight": given["weight"], **_identity(entry)}
        for entry, given in zip(inputs, facts["inputs"], strict=True)
    ]
    kept_facts = {key: facts[key] for key in ("method", "weighting", "energy", "error")}
    header = LoraHeader(
        title=title,
        base=None if merged.lora.naming else detect_base(merged.lora),
        trigger=", ".join(dict.fromkeys(filter(None, triggers))),
        merged_from=[entry.title for entry in inputs],
    )
    kept = _common(inputs) if merged.lora.naming else {}
    facts_fields = {
        "difflora.merge": json.dumps({**kept_facts, "inputs": sources}, ensure_ascii=False),
        "difflora.certificates": json.dumps(facts["certificates"]),
    }
    return kept | header.to_dict() | facts_fields


def _certificate(certificate: Certificate) -> dict[str, float]:
    figures = {"energy": certificate.energy, "error": certificate.error, "norm": certificate.norm}
    return {"rank": certificate.rank} | {k: float(f"{v:.6g}") for k, v in figures.items()}


def _identity(entry: MergeInput) -> dict[str, Any]:
    """Hash, trigger and block weights of an input, as far as there are any."""
    metadata = entry.lora.metadata
    found = next((metadata[name] for name in HASH_FIELDS if metadata.get(name)), "")
    facts = {
        "hash": found,
        "trigger": metadata.get("modelspec.trigger_phrase", ""),
        "blocks": dict(entry.blocks),
    }
    return {name: value for name, value in facts.items() if value}


def _common(inputs: Sequence[MergeInput]) -> dict[str, str]:
    """What headers of models unknown here say about the base, where all of them agree."""
    names = ("modelspec.architecture", "ss_base_model_version", "modelspec.implementation")
    first = inputs[0].lora.metadata
    return {
        name: first[name]
        for name in names
        if name in first and all(e.lora.metadata.get(name) == first[name] for e in inputs)
    }


def summary(certificates: Mapping[str, Certificate]) -> dict[str, Any]:
    """All layers together: their number, ranks, what was kept, and the largest errors."""
    worst = sorted(certificates, key=lambda name: certificates[name].error, reverse=True)[:_WORST]
    ranks = Counter(certificate.rank for certificate in certificates.values())
    return {
        "layers": len(certificates),
        "ranks": {str(rank): count for rank, count in ranks.most_common()},
        **_totals(certificates),
        "worst": [{"layer": name, "error": certificates[name].error} for name in worst],
    }


def _totals(certificates: Mapping[str, Certificate]) -> dict[str, float]:
    """Norm of everything, energy kept and relative error over all layers together."""
    squares = [c.norm**2 for c in certificates.values()]
    total = sum(squares)
    if not total:
        return {"norm": 0.0, "energy": 1.0, "error": 0.0}
    parts = list(zip(certificates.values(), squares, strict=True))
    return {
        "norm": math.sqrt(total),
        "energy": sum(c.energy * square for c, square in parts) / total,
        "error": math.sqrt(sum(c.error**2 * square for c, square in parts) / total),
    }


def _by_block(certificates: Mapping[str, Certificate]) -> dict[str, dict[str, float]]:
    blocks: dict[str, dict[str, Certificate]] = {}
    for name, certificate in certificates.items():
        blocks.setdefault(block_of(name), {})[name] = certificate
    return {block: _totals(part) for block, part in blocks.items()}


def _factor_warning(from_average: float | None) -> list[str]:
    return [] if from_average is None else [_FACTOR_WARNING.format(from_average)]


def _warnings(job: Job) -> list[str]:
    settings, method = job.settings, METHODS[job.settings.method]
    warnings = []
    if method.uses_density and settings.density == 1 and method.name in ("dare", "della"):
        warnings.append(f"{method.name} with density 1 drops nothing.")
    alone = [name for name in job.weights if sum(name in held for held in job.held) == 1]
    if len(job.inputs) > 1 and alone:
        warnings.append(
            f"{len(alone)} of {len(job.weights)} layers are in one LoRA only ({alone[0]}); the "
            "others count as no change there."
        )
    empty = sum(not any(weights) for weights in job.weights.values())
    if empty:
        warnings.append(f"{empty} layers have weight 0 in every LoRA.")
    return warnings
