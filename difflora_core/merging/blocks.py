"""The blocks of a model, at the level at which people look."""

from __future__ import annotations

import re

_COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
_NUMBERED = re.compile(r"^(.*?[._]\d+)(?:[._]|$)")


def block_of(name: str) -> str:
    """`unet.down_blocks.1`, `unet.mid_block`, `text_encoder` of a layer or parameter name.

    Names of models without a module table are cut after their first number:
    `lora_unet_double_blocks_3`.
    """
    component, _, path = name.partition(".")
    if component == "unet":
        block, _, rest = path.partition(".")
        number = rest.partition(".")[0]
        return f"unet.{block}.{number}" if block.endswith("_blocks") else f"unet.{block}"
    if component in _COMPONENTS:
        return component
    found = _NUMBERED.match(name)
    return found[1] if found else name
