"""Spellings of layer names <-> canonical names (diffusers module paths with their component).

Underscore names cannot be split back by rule (`to_out_0`, `proj_in`, `time_emb_proj` carry `_` of
their own), so every spelling is looked up in a table made from the module list of the base model,
`layouts/*.json`: once with diffusers block names, once with the original (ldm / sgm) ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

from .errors import LayoutMismatch
from .header import base_named_in
from .lora import Lora

LAYOUTS = Path(__file__).parent / "layouts"
BASES = ("sd15", "sdxl", "sd21", "mini")
"""Known base models; where shapes leave several open, the earlier one is taken."""

# What may stand before the layer name, and the component that it names (None: it does not say).
CONTAINERS: dict[str, str | None] = {
    "lora_unet_": "unet",
    "oft_unet_": "unet",
    "unet.": "unet",
    "diffusion_model.": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "text_encoder.": "text_encoder",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_h.transformer.": "text_encoder",
    "clip_l.": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "text_encoder_2.": "text_encoder_2",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "clip_g.": "text_encoder_2",
    "base_model.model.": None,
    "lycoris_": None,
}
_CONTAINER = re.compile("|".join(map(re.escape, CONTAINERS)))
KOHYA_PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}


@dataclass(frozen=True)
class Spelled:
    """A layer name as a file spells it: component (None: unknown) and the path with underscores."""

    component: str | None
    flat: str

    @classmethod
    @lru_cache(maxsize=2**13)
    def parse(cls, module: str) -> Spelled:
        """Strip known containers, repeatedly: `unet.unet.` and `unet.base_model.model.` occur."""
        component, rest = None, module
        while found := _CONTAINER.match(rest):
            component = CONTAINERS[found[0]] or component
            rest = rest[found.end() :]
        return cls(component, rest.replace(".", "_"))


WITHOUT_BIAS = (".to_q", ".to_k", ".to_v", ".text_projection")
"""ends of the names of layers that have no bias; all others have one"""


@dataclass(frozen=True)
class ModuleTable:
    """Linear and convolution layers of one base model, and its norms."""

    base: str
    shapes: Mapping[str, tuple[int, ...]]
    """canonical name -> weight shape, in the order of the model"""
    norms: Mapping[str, tuple[int, ...]]
    """canonical name of a norm -> shape of its weight, which is that of its bias, too"""
    originals: Mapping[str, str]
    """canonical name -> original (ldm / sgm) name, of the U-Net only"""
    spellings: Mapping[str, Mapping[str, str]]
    """component -> name with underscores, either block naming -> canonical name"""

    def find(self, spelled: Spelled) -> Iterator[str]:
        """Canonical names that a spelling may mean: several only where it names no component."""
        components = [spelled.component] if spelled.component else list(self.spellings)
        for component in components:
            known = self.spellings.get(component, {})
            name = known.get(spelled.flat) or known.get(spelled.flat.strip("_"))
            if name:
                yield name

    def module_shape(self, name: str) -> tuple[int, ...]:
        """Shape of the weight of a layer or norm."""
        return self.shapes.get(name) or self.norms[name]

    def bias_shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of the bias of a layer or norm; None where it has none."""
        if name.endswith(WITHOUT_BIAS):
            return None
        return self.module_shape(name)[:1]


@cache
def module_table(base: str) -> ModuleTable:
    """The table of `base`, one of BASES. Raises LayoutMismatch for any other name."""
    if base not in BASES:
        raise LayoutMismatch(
            f"There is no base model named {base!r}.", hint=f"Known are {', '.join(BASES)}."
        )
    content = json.loads((LAYOUTS / f"{base}.json").read_text(encoding="utf-8"))
    originals: dict[str, str] = {}
    spellings: dict[str, dict[str, str]] = {}
    shapes = _shapes(content["components"], originals, spellings)
    norms = _shapes(content["norms"], originals, spellings)
    return ModuleTable(base, shapes, norms, originals, spellings)


def _shapes(
    components: Mapping[str, list], originals: dict[str, str], spellings: dict[str, dict[str, str]]
) -> dict[str, tuple[int, ...]]:
    """Weight shapes by canonical name; the names are added to the other two."""
    shapes = {}
    for component, rows in components.items():
        known = spellings.setdefault(component, {})
        for name, original, shape in rows:
            canonical = f"{component}.{name}"
            shapes[canonical] = tuple(shape)
            # transformers 5.6 dropped the `text_model` level of CLIPTextModel: both are in use.
            names = [name, name.removeprefix("text_model.")]
            if original:
                originals[canonical] = original
                names.append(original)
            known.update({spelling.replace(".", "_"): canonical for spelling in names})
    return shapes


def detect_base(lora: Lora) -> str | None:
    """The base model that has all layers of `lora` with their shapes; None when there is none.

    Where several have them (self-attention layers only), the header decides, else the order of
    BASES. Reads no weights.
    """
    if lora.naming:
        return None
    fitting = [base for base in BASES if _fits(lora, module_table(base))]
    hint = base_named_in(lora.metadata)
    return hint if hint in fitting else next(iter(fitting), None)


def kohya_name(canonical: str, base: str | None) -> str:
    """The flat name that kohya's trainer writes: sgm block names for SDXL, diffusers' otherwise."""
    component, _, path = canonical.partition(".")
    prefix = KOHYA_PREFIXES[component]
    if base == "sdxl":
        prefix = prefix.replace("lora_te_", "lora_te1_")
        path = module_table(base).originals.get(canonical, path)
    return prefix + path.replace(".", "_")


def _fits(lora: Lora, table: ModuleTable) -> bool:
    layers = all(table.shapes.get(n) == layer.weight_shape for n, layer in lora.outline.items())
    return layers and all(_has_parameter(table, name) for name in lora.offsets)


def _has_parameter(table: ModuleTable, name: str) -> bool:
    module, _, kind = name.rpartition(".")
    known = module in table.shapes or module in table.norms
    return known and (kind == "weight" or table.bias_shape(module) is not None)
