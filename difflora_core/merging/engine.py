"""Merging LoRAs: layer by layer, limited in rank, with a certificate for each layer."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import BadConfig
from ..lora import Lora
from .average_distance import distance_to_average
from .certificate import Certificate
from .inputs import MergeInput, MergeSettings, check_blocks, check_shapes, common_base
from .job import Job, Progress
from .methods import METHODS
from .methods.factor_average import METHOD as FACTOR_AVERAGE
from .report import report
from .rules import RankRule
from .weighting import WEIGHTINGS, overall_weights


@dataclass(frozen=True, eq=False)
class Merged:
    """The result: a LoRA, what each of its layers lost, and a report of JSON values."""

    lora: Lora
    certificates: Mapping[str, Certificate]
    report: dict[str, Any]

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(self.report["warnings"])


def merge(
    inputs: Sequence[MergeInput],
    settings: MergeSettings | None = None,
    progress: Progress | None = None,
    device: torch.device | str = "cpu",
) -> Merged:
    """Merge LoRAs of one base model; a layer that a LoRA lacks counts as no change.

    LoRAs with lazy layers are read layer by layer, so memory stays near the size of the result.
    The result holds no header fields; `merge_header` makes them.
    Raises BadConfig for settings that make no sense, LayoutMismatch for LoRAs that do not fit each
    other, BadLoraFile for layers that hold no numbers.
    """
    begin = time.perf_counter()
    settings = settings or MergeSettings()
    _check_settings(inputs, settings)
    loras, titles = [entry.lora for entry in inputs], [entry.title for entry in inputs]
    common_base(loras, titles)
    check_shapes(loras, titles)
    check_blocks(inputs)
    job = Job(inputs, settings, device)
    found = {layer.name: (layer, certificate) for layer, certificate in job.results(progress)}
    layers = {name: found[name][0] for name in job.weights}
    certificates = {name: found[name][1] for name in job.weights}
    lora = replace(loras[0], layers=layers, metadata={}, offsets=job.offsets())
    from_average = (
        distance_to_average(job, layers) if settings.method == FACTOR_AVERAGE.name else None
    )
    facts = report(job, certificates, time.perf_counter() - begin, from_average)
    return Merged(lora, certificates, facts)


def resize(
    lora: Lora,
    rule: RankRule,
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
    title: str = "LoRA",
) -> Merged:
    """One LoRA at another rank: the best approximation in every layer."""
    settings = MergeSettings(method="sum", rule=rule, dtype=dtype)
    return merge([MergeInput(lora, title)], settings, progress)


def _check_settings(inputs: Sequence[MergeInput], settings: MergeSettings) -> None:
    method = METHODS.get(settings.method)
    if method is None:
        raise BadConfig(
            f"There is no method named {settings.method!r}.", hint=f"Known: {', '.join(METHODS)}."
        )
    if not inputs:
        raise BadConfig("Nothing to merge.", hint="Give at least one LoRA.")
    if method.inputs and len(inputs) != method.inputs:
        raise BadConfig(f"{method.name} takes {method.inputs} LoRAs, not {len(inputs)}.")
    if settings.weighting not in WEIGHTINGS:
        raise BadConfig(
            f"There is no weighting named {settings.weighting!r}.",
            hint=f"Known: {', '.join(WEIGHTINGS)}.",
        )
    if method.name == "concat" and not settings.rule.exact:
        raise BadConfig(
            "concat keeps all ranks, so it takes no limit.", hint="Use svd or sum with a limit."
        )
    if method.chooses_rank and settings.rule.megabytes is not None:
        raise BadConfig(
            f"{method.name} makes singular values equal, so a size cannot be spread by them.",
            hint="Limit it by a rank, an energy or an error.",
        )
    if not 0 < settings.density <= 1:
        raise BadConfig(
            f"A density of {settings.density} is impossible.", hint="Expected above 0, to 1."
        )
    overall_weights(inputs, settings)
