"""Prompts both ways: a scene in plain English, and what a prompt asks for."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from functools import cache

from .factors import INDEX
from .scene import Scene
from .vocabulary import (
    ACCESSORIES,
    ATTRIBUTES,
    BACKGROUNDS,
    CLOTHES,
    CLOTHES_COLOURS,
    EXPRESSIONS,
    FRAMINGS,
    HAIR_COLOURS,
    HAIR_LENGTHS,
    NUMBERS,
    POSES,
    POSITIONS,
    STYLES,
)

_PHRASES = {
    "style": STYLES,
    "background": BACKGROUNDS,
    "framing": FRAMINGS,
    "expression": EXPRESSIONS,
    "pose": POSES,
    "accessory": ACCESSORIES,
}


def describe(
    scene: Scene,
    rng: random.Random | None = None,
    *,
    subject: str = "a person",
    mention: float = 1.0,
    looks: float = 0.0,
) -> list[str]:
    """One prompt per picture.

    Args:
        rng: picks among phrases and what to mention; None gives canonical phrases.
        subject: what the person is called, as "sks person" in a personal prompt.
        mention: probability of saying each attribute that is not the default.
        looks: probability of mentioning the hair and beard of a person.
    """
    rows = _as_lists(scene)
    speaker = _Speaker(rng, subject, mention, looks)
    return [speaker.sentence({k: v[i] for k, v in rows.items()}) for i in range(len(scene))]


def _as_lists(scene: Scene) -> dict[str, list]:
    names = (*ATTRIBUTES, "present", "identity")
    return {name: getattr(scene, name).tolist() for name in names}


class _Speaker:
    """Turns one scene, given as plain numbers, into a sentence."""

    def __init__(
        self, rng: random.Random | None, subject: str, mention: float, looks: float
    ) -> None:
        self.rng, self.subject, self.mention, self.looks = rng, subject, mention, looks

    def sentence(self, row: dict) -> str:
        people = sum(row["present"])
        style = self._say("style", row["style"])
        who = self._one(row) if people == 1 else self._several(row, people)
        parts = [f"{style} {who}"]
        if people == 1:
            parts += self._maybe("framing", row["framing"])
        parts += self._maybe("background", row["background"])
        return ", ".join(parts)

    def _one(self, row: dict) -> str:
        parts = [self.subject + self._looks(row["identity"][0])]
        parts += self._maybe("expression", row["expression"][0])
        parts += self._maybe("pose", row["pose"][0])
        if self._spoken():
            parts.append("wearing " + _clothes(row, 0))
        parts += self._maybe("accessory", row["accessory"][0])
        return ", ".join(parts)

    def _several(self, row: dict, people: int) -> str:
        places = POSITIONS[people]
        parts = [f"{NUMBERS[people]} people"]
        for person in range(people):
            if self._spoken():
                detail = (
                    f"a person{self._looks(row['identity'][person])} in {_clothes(row, person)}"
                )
                parts.append(f"{detail} {places[person]}")
        return ", ".join(parts)

    def _looks(self, identity: Sequence[float]) -> str:
        if self.rng is None or self.rng.random() >= self.looks:
            return ""
        colour = HAIR_COLOURS[round(identity[INDEX["hair_colour"]] * (len(HAIR_COLOURS) - 1))]
        length = HAIR_LENGTHS[min(2, int(identity[INDEX["hair_length"]] * 3))]
        beard = " and a beard" if identity[INDEX["beard"]] > 0.75 else ""
        return f" with {length} {colour} hair{beard}"

    def _spoken(self) -> bool:
        return self.rng is None or self.rng.random() < self.mention

    def _maybe(self, attribute: str, index: int) -> list[str]:
        phrase = self._say(attribute, index)
        return [phrase] if phrase and self._spoken() else []

    def _say(self, attribute: str, index: int) -> str:
        phrases = _PHRASES[attribute][ATTRIBUTES[attribute][index]]
        if self.rng is None or self.rng.random() < 0.6:
            return phrases[0]
        return self.rng.choice(phrases)


def _clothes(row: dict, person: int) -> str:
    colour = CLOTHES_COLOURS[row["clothes_colour"][person]]
    garment = CLOTHES[tuple(CLOTHES)[row["clothes"][person]]][0]
    return f"{'an' if colour[0] in 'aeio' else 'a'} {colour} {garment}"


def parse_prompt(prompt: str) -> dict[str, int]:
    """What a prompt about one person asks for: attribute name -> index in the vocabulary.

    Attributes that the prompt does not mention are left out, so a picture is only checked for
    what was said. Phrases are found anywhere, so free wording around them does no harm.
    """
    text = f" {re.sub(r'[^a-z0-9-]+', ' ', prompt.lower())} "
    found = {}
    for attribute, phrases in _phrase_index().items():
        for phrase, index in phrases:
            if f" {phrase} " in text:
                found[attribute] = index
                break
    names = [phrases[0] for phrases in CLOTHES.values()]
    garment = re.search(rf" ({'|'.join(CLOTHES_COLOURS)}) ({'|'.join(names)}) ", text)
    if garment:
        found["clothes_colour"] = CLOTHES_COLOURS.index(garment[1])
        found["clothes"] = names.index(garment[2])
    return found


@cache
def _phrase_index() -> dict[str, list[tuple[str, int]]]:
    """Attribute -> its phrases with their indices, longest first."""
    index: dict[str, list[tuple[str, int]]] = {}
    for attribute, values in _PHRASES.items():
        pairs = [(p, i) for i, phrases in enumerate(values.values()) for p in phrases if p]
        index[attribute] = sorted(pairs, key=lambda pair: -len(pair[0]))
    return index
