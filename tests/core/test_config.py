from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pytest

from difflora_core.config import from_dict, to_dict
from difflora_core.errors import BadConfig


@dataclass(frozen=True)
class Round:
    kind: Literal["round"] = "round"
    radius: float = 1.0


@dataclass(frozen=True)
class Square:
    kind: Literal["square"] = "square"
    side: int = 2


@dataclass(frozen=True)
class Drawing:
    title: str
    shape: Round | Square = field(default_factory=Round)
    sizes: tuple[int, ...] = ()
    places: tuple[tuple[str, float], ...] = ()
    colour: Literal["red", "green"] = "red"
    limit: float | None = None
    notes: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.sizes) > 3:
            raise ValueError(f"at most 3 sizes, found {len(self.sizes)}")


def test_round_trip_of_everything():
    drawing = Drawing("a", Square(side=3), (1, 2), (("x", 0.5),), "green", 2.0, {"n": 1})
    assert from_dict(Drawing, to_dict(drawing)) == drawing


def test_lists_become_tuples_and_integers_floats():
    drawing = from_dict(Drawing, {"title": "a", "sizes": [1], "limit": 3, "places": [["x", 1]]})
    assert drawing.sizes == (1,) and drawing.places == (("x", 1.0),)
    assert isinstance(drawing.limit, float)


@pytest.mark.parametrize(
    ("data", "message", "hint"),
    [
        ({"titel": "a"}, "Unknown key titel.", "Did you mean title?"),
        ({}, "title is missing.", ""),
        ({"title": 3}, "title must be str, found 3.", ""),
        ({"title": "a", "sizes": 3}, "sizes must be a list, found 3.", ""),
        ({"title": "a", "sizes": [1, True]}, "sizes[1] must be int, found True.", ""),
        ({"title": "a", "colour": "grean"}, "colour must be one of red, green", "mean green?"),
        ({"title": "a", "shape": {"kind": "rond"}}, "shape.kind must be one of", "mean round?"),
        (
            {"title": "a", "shape": {"kind": "round", "radios": 1}},
            "key shape.radios",
            "shape.radius",
        ),
        ({"title": "a", "notes": {"n": "x"}}, "notes.n must be int, found 'x'.", ""),
        ({"title": "a", "sizes": [1, 2, 3, 4]}, "at most 3 sizes, found 4", ""),
    ],
)
def test_errors_name_the_key_and_the_nearest(data, message, hint):
    with pytest.raises(BadConfig) as caught:
        from_dict(Drawing, data)
    assert message in caught.value.message
    assert hint in caught.value.hint
