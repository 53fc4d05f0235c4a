"""How strongly each LoRA counts in each layer, without looking at any data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ..errors import BadConfig
from .blocks import block_of
from .inputs import MergeInput, MergeSettings, block_factor
from .methods import METHODS

WEIGHTINGS = ("given", "norm_matched", "equal_energy")


def overall_weights(inputs: Sequence[MergeInput], settings: MergeSettings) -> list[float]:
    """One weight per input: ratios brought to a sum of 1, or strengths; then to `total`.

    Raises BadConfig when weights that add up to 0 or, without a total, to less shall be ratios, and
    for values that are no numbers.
    """
    weights = [entry.weight for entry in inputs]
    broken = [w for w in (*weights, settings.total or 0.0) if not math.isfinite(w)]
    if broken:
        raise BadConfig(f"A weight of {broken[0]} is impossible.", hint="Expected finite numbers.")
    total = settings.total
    if total is None and METHODS[settings.method].ratios:
        total = 1.0
    if total is None:
        return weights
    together = sum(weights)
    if abs(together) < 1e-9 * max(map(abs, weights), default=0.0) or together == 0:
        raise BadConfig(
            f"The weights {_listed(weights)} add up to 0, so they are no ratios.",
            hint="Use the method sum for a difference of LoRAs, and leave the total out.",
        )
    if together < 0 and settings.total is None:
        raise BadConfig(
            f"The weights {_listed(weights)} add up to less than 0, so as ratios they would change "
            "their signs.",
            hint="Use the method sum to take LoRAs away.",
        )
    return [w * total / together for w in weights]


def _listed(weights: Sequence[float]) -> str:
    return ", ".join(f"{w:g}" for w in weights)


def layer_weights(
    inputs: Sequence[MergeInput],
    settings: MergeSettings,
    norms: Sequence[Mapping[str, float]] | None,
) -> dict[str, list[float]]:
    """Weight of every input in every layer, by layer name.

    norms: of every layer of every input, which norm_matched and equal_energy need.
    """
    overall = overall_weights(inputs, settings)
    names = list(dict.fromkeys(name for entry in inputs for name in entry.lora.outline))
    scales = _scales(settings.weighting, norms, names)

    def weight(index: int, name: str) -> float:
        blocks = inputs[index].blocks
        factor = block_factor(blocks, block_of(name)) if blocks else 1.0
        return overall[index] * factor * (scales[index][name] if scales else 1.0)

    return {name: [weight(i, name) for i in range(len(inputs))] for name in names}


def _scales(
    weighting: str, norms: Sequence[Mapping[str, float]] | None, names: Sequence[str]
) -> list[dict[str, float]] | None:
    """Factor of every input in every layer that evens out norms; None: no such factors."""
    if weighting == "given" or norms is None:
        return None
    if weighting == "norm_matched":
        totals = [math.sqrt(sum(n * n for n in norm.values())) for norm in norms]
        return [dict.fromkeys(names, factor) for factor in _to_mean(totals)]
    scales: list[dict[str, float]] = [{} for _ in norms]
    for name in names:
        for scale, factor in zip(scales, _to_mean([n.get(name, 0.0) for n in norms]), strict=True):
            scale[name] = factor
    return scales


def _to_mean(norms: Sequence[float]) -> list[float]:
    """Factors that bring positive norms to their mean; 1 where there is nothing to scale."""
    live = [norm for norm in norms if norm > 0]
    mean = sum(live) / len(live) if live else 0.0
    return [mean / norm if norm > 0 else 1.0 for norm in norms]
