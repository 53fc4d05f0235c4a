"""Scenes: everything that a picture shows, as tensors, before anything is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from .factors import FACTORS
from .vocabulary import ATTRIBUTES, PERSON_ATTRIBUTES, PICTURE_ATTRIBUTES, WEIGHTS

MAX_PEOPLE = 3
#: head centres of one, two and three people, as fractions of the picture (x, y) and their scale
ARRANGEMENTS: dict[int, tuple[tuple[float, float, float], ...]] = {
    1: ((0.5, 0.47, 1.0),),
    2: ((0.29, 0.48, 0.66), (0.71, 0.48, 0.66)),
    3: ((0.185, 0.5, 0.46), (0.5, 0.47, 0.46), (0.815, 0.5, 0.46)),
}
#: scale of portrait, close-up and distance, of one person and of several
ZOOM = (1.2, 1.45, 1.0)
GROUP_ZOOM = (1.0, 1.1, 0.85)
#: one combination of prompt attributes in this many is never trained on
HELD_OUT_ONE_IN = 10


@dataclass(frozen=True)
class Scene:
    """A batch of B pictures with up to P people each.

    identity [B, P, 20] in 0..1; present [B, P] bool; expression, pose, clothes, clothes_colour,
    accessory [B, P] and style, background, framing [B] index `vocabulary.ATTRIBUTES`;
    position [B, P, 2] head centre as a fraction of the picture; scale [B, P] (1 = a portrait);
    tilt [B, P] radians; yaw [B, P] in -1..1 (negative looks to the picture's left);
    light [B, 2]; texture [B, 8] in 0..1, the phases of everything else that varies.
    """

    identity: Tensor
    present: Tensor
    expression: Tensor
    pose: Tensor
    clothes: Tensor
    clothes_colour: Tensor
    accessory: Tensor
    style: Tensor
    background: Tensor
    framing: Tensor
    position: Tensor
    scale: Tensor
    tilt: Tensor
    yaw: Tensor
    light: Tensor
    texture: Tensor

    def __len__(self) -> int:
        return self.style.shape[0]

    def __getitem__(self, index: Tensor | slice) -> Scene:
        return Scene(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def to(self, device: torch.device | str) -> Scene:
        return Scene(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def attributes(self, person: int = 0) -> dict[str, Tensor]:
        """Attribute name -> index [B], the person attributes being those of one person."""
        picture = {name: getattr(self, name) for name in PICTURE_ATTRIBUTES}
        return picture | {name: getattr(self, name)[:, person] for name in PERSON_ATTRIBUTES}


def sample_scenes(
    n: int,
    generator: torch.Generator,
    *,
    people: int | str = 1,
    identity: Tensor | None = None,
    fixed: Mapping[str, str | Tensor] | None = None,
    weights: Mapping[str, Sequence[float]] | None = None,
    split: str = "train",
    device: torch.device | str = "cpu",
) -> Scene:
    """Draw n scenes.

    Args:
        generator: on the CPU, so that a seed means the same scenes on every device.
        people: 1, 2, 3, or "mixed" (mostly one).
        identity: [n, P, 20]; drawn uniformly when absent.
        fixed: attribute name -> value name, or indices [n] (or [n, P]); the rest is drawn.
        weights: attribute name -> how likely its values are, in place of the vocabulary's WEIGHTS.
        split: "train" never draws a held-out combination of attributes, "test" only those; it says
            nothing where attributes are fixed.

    Raises:
        KeyError, ValueError: for an attribute or value that the vocabulary lacks.
    """
    drawn = _draw_attributes(n, generator, fixed or {}, {**WEIGHTS, **(weights or {})})
    if not fixed:
        drawn = _move_to_split(drawn, split)
    count = _people_counts(n, people, generator)
    slots = MAX_PEOPLE if isinstance(people, str) else people
    if identity is None:
        identity = torch.rand(n, slots, len(FACTORS), generator=generator)
    scene = Scene(
        identity=identity.cpu(),
        present=torch.arange(slots) < count[:, None],
        **{k: v[:, :slots] if k in PERSON_ATTRIBUTES else v for k, v in drawn.items()},
        **_geometry(n, slots, count, drawn, generator),
    )
    return scene.to(device)


def is_held_out(attributes: Mapping[str, Tensor]) -> Tensor:
    """Whether a combination of attributes is kept for testing: bool, shape of the attributes.

    A fixed arithmetic hash of what the prompts of one person can say.
    """
    code = torch.zeros_like(attributes["background"])
    for name in _HASHED:
        code = code * 31 + attributes[name]
    return (code * 2_654_435_761 >> 20) % HELD_OUT_ONE_IN == 0  # Knuth's multiplicative hash


_HASHED = ("style", "background", "expression", "pose", "clothes", "clothes_colour", "accessory")


def _draw_attributes(
    n: int,
    generator: torch.Generator,
    fixed: Mapping[str, str | Tensor],
    weights: Mapping[str, Sequence[float]],
) -> dict[str, Tensor]:
    for name in (*fixed, *weights):
        if name not in ATTRIBUTES:
            raise KeyError(f"no attribute {name!r}; the vocabulary has {sorted(ATTRIBUTES)}")
    drawn = {}
    for name, values in ATTRIBUTES.items():
        shape = (n, MAX_PEOPLE) if name in PERSON_ATTRIBUTES else (n,)
        likely = torch.tensor(weights.get(name, (1.0,) * len(values)))
        total = n * (MAX_PEOPLE if len(shape) == 2 else 1)
        index = torch.multinomial(likely, total, replacement=True, generator=generator)
        drawn[name] = index.view(shape)
        if name in fixed:
            drawn[name] = _fixed_index(name, fixed[name], shape)
    return drawn


def _fixed_index(name: str, value: str | Tensor, shape: tuple[int, ...]) -> Tensor:
    if isinstance(value, str):
        if value not in ATTRIBUTES[name]:
            raise ValueError(f"{name} has no value {value!r}; it has {ATTRIBUTES[name]}")
        return torch.full(shape, ATTRIBUTES[name].index(value))
    value = value.cpu().long()
    return (value[:, None] if value.dim() < len(shape) else value).expand(shape).clone()


def _move_to_split(drawn: dict[str, Tensor], split: str) -> dict[str, Tensor]:
    """Combinations on the wrong side get the next clothes colour, and the next background when
    all colours have been tried, until they are on the right one."""
    colours, backgrounds = len(ATTRIBUTES["clothes_colour"]), len(ATTRIBUTES["background"])
    for attempt in range(colours * backgrounds):
        first = {k: v[:, 0] if k in PERSON_ATTRIBUTES else v for k, v in drawn.items()}
        wrong = (is_held_out(first) != (split == "test")).long()
        if not wrong.any():
            break
        drawn["clothes_colour"] = (drawn["clothes_colour"] + wrong[:, None]) % colours
        if attempt % colours == colours - 1:
            drawn["background"] = (drawn["background"] + wrong) % backgrounds
    return drawn


def _people_counts(n: int, people: int | str, generator: torch.Generator) -> Tensor:
    if isinstance(people, str):
        weights = torch.tensor([0.84, 0.1, 0.06])
        return 1 + torch.multinomial(weights, n, replacement=True, generator=generator)
    if people not in ARRANGEMENTS:
        raise ValueError(f"people is {people}; expected 1, 2, 3 or 'mixed'")
    return torch.full((n,), people)


def _geometry(
    n: int, slots: int, count: Tensor, drawn: Mapping[str, Tensor], generator: torch.Generator
) -> dict[str, Tensor]:
    def uniform(*shape: int, low: float = -1.0) -> Tensor:
        return torch.rand(*shape, generator=generator) * (1 - low) + low

    table = torch.zeros(4, MAX_PEOPLE, 3)
    for people, places in ARRANGEMENTS.items():
        table[people, : len(places)] = torch.tensor(places)
    place = table[count][:, :slots]
    zooms = torch.tensor([ZOOM, GROUP_ZOOM])
    zoom = zooms[(count > 1).long(), drawn["framing"]][:, None]
    pose = drawn["pose"][:, :slots]
    turn = (pose == 2).float() - (pose == 1).float()
    lean = torch.sign(uniform(n, slots)) * (pose == 3)
    jitter = uniform(n, slots, 2) * torch.tensor([0.03, 0.025]) * place[..., 2:]
    lower = (zoom - 1) * 0.16
    shift = torch.stack([torch.zeros(n, slots), lower.expand(n, slots)], -1)
    return {
        "position": place[..., :2] + jitter + shift,
        "scale": place[..., 2] * zoom * (1 + 0.06 * uniform(n, slots)),
        "tilt": lean * (0.24 + 0.05 * uniform(n, slots)) + 0.03 * uniform(n, slots),
        "yaw": turn * (0.82 + 0.15 * uniform(n, slots)) + 0.1 * uniform(n, slots),
        "light": uniform(n, 2),
        "texture": uniform(n, 8, low=0.0),
    }


def with_identity(scene: Scene, identity: Tensor) -> Scene:
    """The same pictures of other people: identity [B, P, 20]."""
    return replace(scene, identity=identity.to(scene.identity.device))
