"""The key suffixes of one layer: which tensors make it up, and of which kind of network.

A further family that can be written as plain low-rank factors needs one pattern and one function
here; the ones listed as refused are recognised, so that a file never loads in part without a word.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from einops import einsum
from torch import Tensor

from .errors import BadLoraFile
from .lora import LoraLayer

_PLAIN = re.compile(
    r"""(?P<module>.+)(?:
        \.lora_(?P<kohya>down|up|mid)\.weight
      | \.lora(?:_linear_layer)?\.(?P<diffusers>down|up)\.weight
      | \.to_(?P<projection>q|k|v|out)_lora\.(?P<processor>down|up)\.weight
      | \.lora_(?P<peft>A|B)(?P<adapter>(?:_\d+)?(?:\.[^.]+)?)\.weight
      | \.(?P<alpha>alpha)
    )""",
    re.VERBOSE,
)
_PEFT_ROLES = {"A": "down", "B": "up"}
# Text encoder projections of the oldest diffusers files carry four pairs each; one is alive.
_ENCODER_PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}
# Keys beside the layers that are no weight differences.
_BESIDE = re.compile(r"bundle_emb\.|_aux\.|<.*>$")

_NEEDS_BASE = "It can only be applied to the weights of its base model"
_REFUSED = (
    (r"\.(dora_scale|magnitude|lora_magnitude_vector(\.\w+)*)$", "DoRA", _NEEDS_BASE),
    (r"\.hada_(w|t)\d", "LoHa", "It is made of products of two low-rank matrices"),
    (r"\.lokr_(w|t)\d", "LoKr", "It is made of Kronecker products"),
    (r"\.(oft_blocks|oft_diag|oft_R|rescale)(\.|$)", "OFT or BOFT", _NEEDS_BASE),
    (r"\.(ia3_l|on_input)(\.|$)", "IA3", _NEEDS_BASE),
    (
        r"\.(q_layer|p_layer|lambda_layer|base_[qp]\w*)(\.|$)",
        "T-LoRA",
        "It depends on the timestep",
    ),
    (r"\.[ab][12]\.weight$", "GLoRA", _NEEDS_BASE),
    (
        r"\.(lora_(B|up)\.([^.]+\.)?bias|bias_(indices|values|size))$",
        "a LoRA with bias differences",
        "Biases have no low-rank factors",
    ),
    (
        r"\.(diff|diff_b|w_norm|b_norm|set_weight)$",
        "full weight differences",
        "They have no low-rank factors",
    ),
)


@dataclass(frozen=True)
class Part:
    """One tensor of one layer, as a key names it."""

    module: str
    role: str
    """down, up, mid, alpha"""
    style: str
    """kohya, diffusers, processor, peft; "" for alpha, which several use"""
    adapter: str = ""


def parse_part(key: str) -> Part | None:
    """Cut the suffix, from the right; None for a key that is no part of a plain LoRA."""
    found = _PLAIN.fullmatch(key)
    if not found:
        return None
    module = found["module"]
    if found["projection"]:
        return _processor_part(module, found["projection"], found["processor"])
    if found["peft"]:
        return Part(module, _PEFT_ROLES[found["peft"]], "peft", found["adapter"])
    for style in ("kohya", "diffusers"):
        if found[style]:
            return Part(module, found[style], style)
    return Part(module, "alpha", "")


def _processor_part(module: str, projection: str, role: str) -> Part | None:
    """The oldest diffusers spelling: `attn1.processor.to_out_lora` means `attn1.to_out.0`."""
    if module.endswith(".processor"):
        inner = "to_out.0" if projection == "out" else f"to_{projection}"
        return Part(f"{module.removesuffix('.processor')}.{inner}", role, "processor")
    alive = module.endswith(f".{_ENCODER_PROJECTIONS[projection]}")
    return Part(module, role, "processor") if alive else None


def is_beside(key: str) -> bool:
    """Embeddings, helper tensors and dead pairs, which a LoRA file may hold beside its layers."""
    if _BESIDE.match(key):
        return True
    found = _PLAIN.fullmatch(key)
    return bool(found and found["projection"] and parse_part(key) is None)


def refuse_other_families(keys: Iterable[str]) -> None:
    """Raises BadLoraFile, naming the kind of network, for what is no plain LoRA."""
    for pattern, family, reason in _REFUSED:
        found = [key for key in keys if re.search(pattern, key)]
        if found:
            raise BadLoraFile(
                f"This file holds {family} (key {found[0]}), which is not supported.",
                hint=f"{reason}; use a plain LoRA (or LoCon) of the same subject.",
            )


def build_layer(
    name: str, shape: tuple[int, ...], parts: Mapping[str, Tensor], scale: float
) -> LoraLayer:
    """One layer from its tensors; `shape` is that of the base model's weight.

    A 1x1 convolution and a linear layer are the same thing, and files mix their shapes, so factors
    take the form that the weight has.
    """
    down, up = parts["down"], parts["up"]
    if "mid" in parts:
        down = _absorb_mid(down, parts["mid"])
    rank, out = down.shape[0], up.shape[0]
    down = down.reshape(rank, *shape[1:])
    up = up.reshape(out, rank, *(1,) * (len(shape) - 2))
    return LoraLayer(name, down.contiguous(), up.contiguous(), scale)


def factor_shape(parts: Mapping[str, Tensor]) -> tuple[int, ...]:
    """[out, in] or [out, in, kh, kw] of the weight difference that the factors of a layer make."""
    down, up = parts["down"], parts["up"]
    kernel = parts["mid"].shape[2:] if "mid" in parts else down.shape[2:]
    return (up.shape[0], down.shape[1], *kernel)


def _absorb_mid(down: Tensor, mid: Tensor) -> Tensor:
    """LoCon in Tucker form (CP): up [out, r, 1, 1], mid [r, s, kh, kw], down [s, in, 1, 1].

    Contracting mid with down gives an ordinary down [r, in, kh, kw]: exact.
    """
    product = einsum(mid.float(), down.flatten(1).float(), "r s kh kw, s i -> r i kh kw")
    return product.to(torch.promote_types(down.dtype, mid.dtype))
