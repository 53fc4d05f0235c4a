"""cloneofsimo's first layout: `unet:<index>:up`, without layer names.

The index counts the linear layers that its `inject_trainable_lora` met: the attention layers, and
in later versions the first layer of each feed-forward network, in the order in which diffusers of
that time registered its modules: down blocks, up blocks, then the middle; in a transformer block
attention, feed-forward, cross-attention. The shapes of a file have to agree with that in every
layer, else it is refused (cloneofsimo/lora, lora_diffusion/lora.py).
"""

from __future__ import annotations

import re

from .errors import BadLoraFile
from .key_names import module_table
from .tensor_file import TensorSource

_KEY = re.compile(r"(unet|text_encoder):(\d+):(up|down)")
_BLOCKS = ("unet.down_blocks.", "unet.up_blocks.", "unet.mid_block.")
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_ENCODER = ("k_proj", "v_proj", "q_proj", "out_proj")


def names_by_index(source: TensorSource) -> dict[str, str]:
    """A kohya spelling for every index key; {} for files that have none. Raises BadLoraFile."""
    found = {key: match for key in source if (match := _KEY.fullmatch(key))}
    if not found:
        return {}
    counts = {
        part: 1 + max((int(m[2]) for m in found.values() if m[1] == part), default=-1)
        for part in ("unet", "text_encoder")
    }
    for base in ("sd15", "sd21"):
        for unet in (_unet_order(base, True), _unet_order(base, False)):
            orders = {"unet": unet, "text_encoder": _encoder_order(base)}
            if all(counts[part] in (0, len(order)) for part, order in orders.items()) and all(
                _agrees(base, orders[m[1]][int(m[2])], m[3], source.shape(key))
                for key, m in found.items()
            ):
                return {
                    key: f"{orders[m[1]][int(m[2])]}.lora_{m[3]}.weight" for key, m in found.items()
                }
    raise BadLoraFile(
        f"This file is a LoRA without layer names (key {next(iter(found))}, cloneofsimo's first "
        "layout), and its shapes are not those of the layers that it counts.",
        hint="Convert it with the program that made it.",
    )


def _unet_order(base: str, feed_forward: bool) -> list[str]:
    names = list(module_table(base).shapes)
    ends = [f".attn1.{end}" for end in _ATTENTION]
    ends += [".ff.net.0.proj"] * feed_forward + [f".attn2.{end}" for end in _ATTENTION]
    blocks = [name.removesuffix(".attn1.to_q") for name in names if name.endswith(".attn1.to_q")]
    ordered = sorted(
        blocks, key=lambda b: next(i for i, s in enumerate(_BLOCKS) if b.startswith(s))
    )
    return [block + end for block in ordered for end in ends]


def _encoder_order(base: str) -> list[str]:
    layers = [n for n in module_table(base).shapes if n.endswith(".self_attn.q_proj")]
    return [name.removesuffix("q_proj") + end for name in layers for end in _ENCODER]


def _agrees(base: str, name: str, role: str, shape: tuple[int, ...]) -> bool:
    weight = module_table(base).shapes[name]
    return len(shape) == 2 and (shape[0] == weight[0] if role == "up" else shape[1] == weight[1])
