"""The words of the drawn world: what a prompt can ask for, and the phrases that say so.

Every attribute is a tuple of values; a value's index is what scenes and attribute heads store.
The first phrase of a value is the canonical one, the others are spoken now and then.
"""

from __future__ import annotations

STYLES: dict[str, tuple[str, ...]] = {
    "photo": ("a photo of", "a portrait photo of"),
    "black and white": ("a black and white photo of",),
    "sketch": ("a pencil sketch of", "a sketch of"),
    "painting": ("an oil painting of", "a painting of"),
    "cartoon": ("a cartoon of", "a cartoon drawing of"),
}
EXPRESSIONS: dict[str, tuple[str, ...]] = {
    "neutral": ("with a neutral expression",),
    "smiling": ("smiling", "with a smile"),
    "laughing": ("laughing", "laughing out loud"),
    "sad": ("looking sad", "with a sad face"),
    "angry": ("looking angry", "with an angry face"),
    "surprised": ("looking surprised", "with a surprised face"),
}
POSES: dict[str, tuple[str, ...]] = {
    "front": ("facing the camera",),
    "left": ("looking to the left", "turned to the left"),
    "right": ("looking to the right", "turned to the right"),
    "tilted": ("with a tilted head",),
}
FRAMINGS: dict[str, tuple[str, ...]] = {
    "portrait": ("",),
    "close-up": ("in close-up",),
    "distant": ("from a distance",),
}
PLAIN_COLOURS = ("red", "blue", "green", "yellow", "purple", "grey", "white")
PLACES: dict[str, tuple[str, ...]] = {
    "beach": ("at the beach", "on a beach"),
    "forest": ("in a forest", "in the woods"),
    "mountains": ("in the mountains",),
    "city": ("in a city at night",),
    "sunset": ("at sunset",),
    "snow": ("in the snow",),
    "library": ("in front of a bookshelf", "in a library"),
}
BACKGROUNDS: dict[str, tuple[str, ...]] = {
    **{c: (f"on a {c} background", f"in front of a {c} wall") for c in PLAIN_COLOURS},
    **PLACES,
}
CLOTHES: dict[str, tuple[str, ...]] = {
    "t-shirt": ("t-shirt",),
    "shirt": ("shirt",),
    "hoodie": ("hoodie",),
    "suit": ("suit",),
    "sweater": ("striped sweater",),
}
CLOTHES_COLOURS = ("red", "blue", "green", "yellow", "purple", "orange", "black", "white")
ACCESSORIES: dict[str, tuple[str, ...]] = {
    "none": ("",),
    "glasses": ("with glasses", "wearing glasses"),
    "sunglasses": ("with sunglasses", "wearing sunglasses"),
    "hat": ("with a hat", "wearing a hat"),
    "scarf": ("with a scarf", "wearing a scarf"),
    "headphones": ("with headphones", "wearing headphones"),
    "earrings": ("with earrings", "wearing earrings"),
}

#: attribute name -> value names, in index order; what a scene stores per person or per picture
PERSON_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "expression": tuple(EXPRESSIONS),
    "pose": tuple(POSES),
    "clothes": tuple(CLOTHES),
    "clothes_colour": CLOTHES_COLOURS,
    "accessory": tuple(ACCESSORIES),
}
PICTURE_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "style": tuple(STYLES),
    "background": tuple(BACKGROUNDS),
    "framing": tuple(FRAMINGS),
}
ATTRIBUTES: dict[str, tuple[str, ...]] = {**PICTURE_ATTRIBUTES, **PERSON_ATTRIBUTES}

#: sampling weights where values are not equally likely; the rest is uniform
WEIGHTS: dict[str, tuple[float, ...]] = {
    "style": (0.52, 0.12, 0.12, 0.12, 0.12),
    "framing": (0.7, 0.15, 0.15),
    "accessory": (0.4, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1),
    "expression": (0.2, 0.2, 0.15, 0.15, 0.15, 0.15),
    "pose": (0.4, 0.2, 0.2, 0.2),
}

HAIR_COLOURS = ("black", "brown", "red", "blonde", "grey")
HAIR_LENGTHS = ("short", "medium", "long")
NUMBERS = ("zero", "one", "two", "three")
POSITIONS: dict[int, tuple[str, ...]] = {
    2: ("on the left", "on the right"),
    3: ("on the left", "in the middle", "on the right"),
}
