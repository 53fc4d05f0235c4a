"""What people type to merge LoRAs: weights, factors per block, a sweep of total weights."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections import Counter
from collections.abc import Sequence

from .errors import BadConfig

MAX_SWEEP = 100
_NOTHING = ("", "-")


def weights_for(count: int, weights: Sequence[float]) -> list[float]:
    """One weight per LoRA; without any, all are 1. Errors: BadConfig."""
    if weights and len(weights) != count:
        raise BadConfig(
            f"{len(weights)} weights were given for {count} LoRAs.",
            hint="Give one weight for each, in the order of the LoRAs, or none at all.",
        )
    checked = [_number(f"weight of LoRA {i}", weight) for i, weight in enumerate(weights, 1)]
    return checked or [1.0] * count


def parse_blocks(text: str) -> dict[str, float]:
    """Factors per block from `unet.mid_block=0.5, text_encoder=0`, from lines, or from JSON.

    Empty or `-` means none. Whether the blocks exist is for the merge to judge. Errors: BadConfig.
    """
    text = text.strip()
    if text in _NOTHING:
        return {}
    pairs = _json_pairs(text) if text.startswith("{") else _typed_pairs(text)
    factors: dict[str, float] = {}
    for block, value in pairs:
        if block in factors:
            raise BadConfig(f"The block {block} is named twice.", hint="Name each block once.")
        factors[block] = _number(f"factor of {block}", value)
    return factors


def blocks_for(count: int, texts: Sequence[str]) -> list[dict[str, float]]:
    """Block factors of each LoRA; without any text, none. Errors: BadConfig."""
    if texts and len(texts) != count:
        raise BadConfig(
            f"Block factors were given for {len(texts)} of {count} LoRAs.",
            hint="Give one entry for each, in the order of the LoRAs; - means no factors.",
        )
    return [parse_blocks(text) for text in texts] or [{} for _ in range(count)]


def parse_sweep(text: str) -> list[float]:
    """Total weights from `FROM:TO:COUNT`, both ends included. Errors: BadConfig."""
    try:
        first, last, count = text.split(":")
        low, high, steps = float(first), float(last), int(count)
    except ValueError as error:
        raise BadConfig(
            f"{text!r} is no sweep.", hint="Write FROM:TO:COUNT, such as 0.5:1.5:5."
        ) from error
    if not 2 <= steps <= MAX_SWEEP or not -math.inf < low < high < math.inf:
        raise BadConfig(
            f"{text!r} is no sweep: it needs 2 to {MAX_SWEEP} weights, from less to more.",
            hint="For one total weight there is --total.",
        )
    totals = [low + (high - low) * step / (steps - 1) for step in range(steps)]
    if len(set(totals)) < steps:
        raise BadConfig(f"{text!r} is no sweep: its ends are too close to each other.")
    return totals


def distinct(titles: Sequence[str]) -> list[str]:
    """The titles; those that occur more than once get a number."""
    often = {title for title, count in Counter(titles).items() if count > 1}
    seen: Counter[str] = Counter()
    named = []
    for title in titles:
        seen[title] += 1
        named.append(f"{title} {seen[title]}" if title in often else title)
    return named


def _typed_pairs(text: str) -> list[tuple[str, str]]:
    pairs = []
    for entry in filter(None, (piece.strip() for piece in re.split(r"[,;\n]", text))):
        block, equals, value = entry.partition("=")
        if not equals:
            raise BadConfig(
                f"{entry!r} is no factor of a block.",
                hint="Write them like this: unet.mid_block=0.5, text_encoder=0",
            )
        pairs.append((block.strip(), value.strip()))
    return pairs


def _json_pairs(text: str) -> list[tuple[str, object]]:
    try:
        return json.loads(text, object_pairs_hook=list)
    except ValueError as error:
        raise BadConfig(f"The block factors are no JSON object: {error}.") from error


def _number(what: str, value: object) -> float:
    with contextlib.suppress(OverflowError, TypeError, ValueError):
        if math.isfinite(number := float(value)):  # type: ignore[arg-type]
            return number
    raise BadConfig(f"The {what} is no number: {value!r}.")
