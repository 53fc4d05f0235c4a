"""The suffixes of keys: which tensor of which layer a key names, and of which kind of network."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cache

from .errors import BadLoraFile

_SUFFIX = re.compile(
    r"""(?P<module>.+)(?:
        \.lora_(?P<kohya>down|up|mid)\.weight
      | \.lora(?:_linear_layer)?\.(?P<diffusers>down|up)\.weight
      | \.to_(?P<projection>q|k|v|out)_lora\.(?P<processor>down|up)\.weight
      | (?<=_lora\d)\.(?P<xlabs>down|up)\.weight
      | \.lora_(?P<peft>A|B)(?P<adapter>(?:_\d+)?(?:\.[^.]+)?)\.weight
      | \.lora_(?:B|up)(?:\.[^.]+)?\.(?P<bias>bias)
      | \.(?P<lycoris>hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2)(?:\.[^.]+)?
      | \.(?P<own>alpha|scale|diff|diff_b|w_norm|b_norm|bias_(?:indices|values|size))
      | \.(?P<magnitude>dora_scale|magnitude|lora_magnitude_vector)(?:\.[^.]+)*
      | \.(?P<glora>[ab][12])\.weight
      | \.(?P<turned>oft_blocks|oft_diag|rescale|on_input)
      | \.(?P<peft_turned>oft_R|ia3_l)(?:\.[^.]+)*
    )""",
    re.VERBOSE,
)
_STYLES = ("kohya", "diffusers", "xlabs", "lycoris")
_PEFT_ROLES = {"A": "down", "B": "up"}
# Text encoder projections of the oldest diffusers files carry four pairs each; one is alive.
_ENCODER_PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}
# Keys beside the layers that are no weight differences.
_BESIDE = re.compile(r"bundle_emb\.|_aux\.|<.*>$")

_ON_WEIGHTS = (
    (r"\.(dora_scale|magnitude|lora_magnitude_vector(\.\w+)*)$", "DoRA"),
    (r"\.(oft_blocks|oft_diag|oft_R|rescale)(\.|$)", "OFT or BOFT"),
    (r"\.(ia3_l|on_input)(\.|$)", "IA3"),
    (r"\.([ab][12]|bm)\.weight$", "GLoRA"),
)
_REFUSED = (
    (r"\.(q_layer|p_layer|lambda_layer|base_([qp]|lambda))(\.|$)", "T-LoRA", "on the timestep"),
    (
        r"\.set_weight$",
        "whole replaced weights",
        "on no weights of the model, so it cannot be added",
    ),
    (r"\.reshape_weight$", "reshaped weights", "on layers of another shape than the model has"),
    (r"\.bm\.weight$", "GLoRA with a middle matrix", "on a layout that is not known here"),
)
OFFSET_ROLES = ("diff_b", "w_norm", "b_norm", "bias", "bias_indices", "bias_values", "bias_size")
"""differences of biases and norms"""
MAGNITUDES = ("dora_scale", "magnitude")
"""the lengths of DoRA: dora_scale says its axis by its shape, the others are per output"""
FAMILIES = {
    "down": "lora", "up": "lora", "mid": "lora", "diff": "full",
    "hada_": "loha", "lokr_": "lokr", "oft_": "oft", "rescale": "oft",
    "a1": "glora", "a2": "glora", "b1": "glora", "b2": "glora",
    "ia3_": "ia3", "on_input": "ia3",
}  # fmt: skip
"""kind of weight difference by the beginning of a role"""
NEEDED = {
    "lora": [[("down",)], [("up",)]],
    "loha": [[(f"hada_w{n}_{side}",)] for n in "12" for side in "ab"],
    "lokr": [[(f"lokr_w{n}",), (f"lokr_w{n}_a", f"lokr_w{n}_b")] for n in "12"],
    "glora": [[(role,)] for role in ("a1", "a2", "b1", "b2")],
    "oft": [[("oft_blocks",), ("oft_R",)]],
    "ia3": [[("ia3_l",), ("ia3_weight", "on_input")]],
}
"""roles without which a layer is incomplete; any one way of each list will do"""
ON_WEIGHTS = ("glora", "oft", "ia3")
"""families that are functions of the base weight"""


@dataclass(frozen=True)
class Part:
    """One tensor of one layer, as a key names it."""

    module: str
    role: str
    """down, up, mid, alpha, scale, or the suffix itself: hada_w1_a, diff_b, dora_scale, ..."""
    style: str
    """kohya, diffusers, processor, peft, xlabs, lycoris; "" for what several use"""
    adapter: str = ""


def parse_part(key: str) -> Part | None:
    """Cut the suffix, from the right; None for a key that is no part of a known difference."""
    found = _SUFFIX.fullmatch(key)
    if not found:
        return None
    module = found["module"]
    if found["projection"]:
        return _processor_part(module, found["projection"], found["processor"])
    if found["peft"]:
        return Part(module, _PEFT_ROLES[found["peft"]], "peft", found["adapter"])
    for style in _STYLES:
        if found[style]:
            return Part(module, found[style], style)
    if found["magnitude"]:
        return Part(module, "dora_scale" if found["magnitude"] == "dora_scale" else "magnitude", "")
    role = next(found[n] for n in ("bias", "own", "glora", "turned", "peft_turned") if found[n])
    return Part(module, {"oft_diag": "oft_blocks"}.get(role, role), "")


def _processor_part(module: str, projection: str, role: str) -> Part | None:
    """The oldest diffusers spelling: `attn1.processor.to_out_lora` means `attn1.to_out.0`."""
    if module.endswith(".processor"):
        inner = "to_out.0" if projection == "out" else f"to_{projection}"
        return Part(f"{module.removesuffix('.processor')}.{inner}", role, "processor")
    alive = module.endswith(f".{_ENCODER_PROJECTIONS[projection]}")
    return Part(module, role, "processor") if alive else None


def parse_among(key: str, keys: Collection[str]) -> Part | None:
    """As `parse_part`; IA3 of LyCORIS calls its factor `.weight`, so its neighbours must tell."""
    part = parse_part(key)
    module = key.removesuffix(".weight")
    if part is None and module != key and f"{module}.on_input" in keys:
        return Part(module, "ia3_weight", "")
    return part


def family_of(roles: Iterable[str]) -> set[str]:
    """Kinds of weight difference that the tensors of a layer belong to; biases are of none."""
    return {family for role in roles if (family := _family(role))}


@cache
def _family(role: str) -> str:
    starts = (s for s in FAMILIES if (role.startswith(s) if s.endswith("_") else role == s))
    return FAMILIES[start] if (start := next(starts, "")) else ""


def is_beside(key: str) -> bool:
    """Embeddings, helper tensors and dead pairs, which a LoRA file may hold beside its layers."""
    if _BESIDE.match(key):
        return True
    found = _SUFFIX.fullmatch(key)
    return bool(found and found["projection"] and parse_part(key) is None)


def first_key(pattern: str, keys: str) -> str | None:
    """The first of `keys`, one per line, in which `pattern` is found.

    One search over all of them: files have thousands, and there are dozens of patterns.
    """
    found = re.search(pattern, keys, re.MULTILINE)
    if not found:
        return None
    end = keys.find("\n", found.end())
    return keys[keys.rfind("\n", 0, found.start()) + 1 : end if end >= 0 else len(keys)]


def refuse_unreadable(keys: str) -> None:
    """Raises BadLoraFile, naming the kind of network, for what is no difference of weights.

    `keys` are those of a file, one per line.
    """
    for pattern, family, reason in _REFUSED:
        found = first_key(pattern, keys)
        if found:
            raise BadLoraFile(
                f"This file holds {family} (key {found}), which is not supported.",
                hint=f"It depends {reason}; use a LoRA of another kind of the same subject.",
            )


def needs_base(keys: Iterable[str]) -> tuple[str, str] | None:
    """The kind of network and a key of it, where it is a function of the base model's weights."""
    text = "\n".join(keys)
    found = ((family, first_key(pattern, text)) for pattern, family in _ON_WEIGHTS)
    return next(((family, key) for family, key in found if key), None)


def refuse_without_base(keys: Iterable[str], *, can_extract: bool) -> None:
    """Raises BadLoraFile for kinds that mean nothing without the weights of the base model.

    can_extract: `extract` knows the base model, so it is what to do.
    """
    found = needs_base(keys)
    if found:
        raise BadLoraFile(
            f"This file holds {found[0]} (key {found[1]}), which is no sum of factors: what it "
            "adds depends on the weights of the base model.",
            hint="Make a plain LoRA of it first: python -m difflora_core extract --lora FILE "
            "--base CHECKPOINT --out F"
            if can_extract
            else "Use a plain LoRA of the same subject.",
        )
