"""The key layouts found in the wild, and an independent reading of their names."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from difflora_core.key_names import module_table
from tests.core.lora_samples import DATA

SUFFIX = re.compile(
    r"\.(lora_(down|up|mid)\.weight|lora(_linear_layer)?\.(down|up)\.weight"
    r"|lora_[AB](_\d+)?(\.\w+)?\.weight|lora_[AB]\.bias|alpha|diff|diff_b|w_norm|b_norm"
    r"|hada_\w+|lokr_\w+|dora_scale|magnitude|lora_magnitude_vector(\.weight)?|[ab][12]\.weight"
    r"|oft_blocks(\.\d+)?|oft_R\.weight|rescale|ia3_l|on_input|weight)$"
)


@cache
def packed(name: str) -> dict:
    return json.loads(gzip.decompress((DATA / f"{name}.json.gz").read_bytes()))


def layouts() -> dict[str, dict]:
    return packed("lora_layouts")["layouts"]


class ShapesOnly:
    """A TensorSource of shapes, whose tensors are made when they are asked for."""

    def __init__(self, shapes: dict[str, list[int]], seed: int = 0) -> None:
        self.shapes, self.seed, self.read = shapes, seed, 0

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __contains__(self, key: object) -> bool:
        return key in self.shapes

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.shapes[key])

    def dtype(self, key: str) -> torch.dtype:
        return torch.int64 if key.endswith("on_input") else torch.float32

    def tensor(self, key: str) -> Tensor:
        self.read += len(self.shapes[key]) > 1
        if not self.shapes[key]:
            return torch.tensor(key.endswith(("ff_net_2.on_input",)) if "on_input" in key else 2.0)
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(self.shapes[key], generator=generator) * 0.1


def expected_name(key: str, base: str) -> str | None:
    """Canonical name by search over the base's layers, spelled as each writer would; None: dead."""
    module = re.sub(r"\.processor\.to_(\w+)_lora\.(down|up)\.weight$", r".to_\1", key)
    module = re.sub(r"\.to_out$", ".to_out.0", module)
    dead = re.search(r"\.(\w+)_proj\.to_(\w+)_lora\.", module)
    if (dead and dead[1] != dead[2]) or key.startswith("bundle_emb."):
        return None
    module = SUFFIX.sub("", re.sub(r"\.to_\w+_lora\.(down|up)\.weight$", "", module))
    if module.startswith("lora_"):
        module = module.replace(".", "_")
    return name_by_spelling(base)[module]


@cache
def name_by_spelling(base: str) -> dict[str, str]:
    table = module_table(base)
    return {
        spelling: name
        for name in (*table.shapes, *table.norms)  # of the text encoders the second one wins
        for spelling in spellings_of(name, base)
    }


def spellings_of(name: str, base: str) -> set[str]:
    component, _, path = name.partition(".")
    if component == "unet":
        original = module_table(base).originals[name]
        dotted = {path, f"base_model.model.{path}", name, f"unet.{original}", original}
        dotted |= {f"lycoris_{path.replace('.', '_')}", f"diffusion_model.{original}"}
        flat = {path.replace(".", "_"), original.replace(".", "_")}
        return dotted | {f"{prefix}_unet_{p}" for p in flat for prefix in ("lora", "oft")}
    short = path.removeprefix("text_model.")
    flat, flat_short = path.replace(".", "_"), short.replace(".", "_")
    numbers = {"text_encoder": ("te", "te1"), "text_encoder_2": ("te2",)}[component]
    clip = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}[component]
    names = {f"lora_{number}_{f}" for number in numbers for f in (flat, flat_short)}
    names |= {f"{clip}.{path}", f"text_encoders.{clip}.transformer.{path}"}
    return names | {name, f"{component}.{short}", path, short}


def role_of(key: str) -> str:
    """The tensor of its layer that a key names; both spellings of a factor are one."""
    found = re.search(r"(?:\.|_)(down|up|mid)\.weight$", key) or SUFFIX.search(key)
    assert found, key
    role = re.sub(r"(_\d+)?(\.\w+)?\.weight$", "", found[1])
    return {"lora_A": "down", "lora_B": "up", "": "weight"}.get(role, role)


def with_shapes(keys: dict[str, list[int] | None], base: str) -> dict[str, list[int]]:
    """Shapes that an excerpt does not state, made up at rank 4 from the weight of its layer."""
    table = module_table(base)
    shapes = {}
    for key, shape in keys.items():
        if shape is None and key.endswith(".alpha"):
            shape = []
        if shape is None:
            name = expected_name(key, base)
            out, *inner = table.module_shape(name) if name else (1, 1)
            ones = [1] * (len(inner) - 1)
            made = {"down": [4, *inner], "up": [out, 4, *ones], "dora_scale": [out, 1, *ones]}
            shape = made.get(role_of(key), [out])
        shapes[key] = shape
    return shapes


def whole_layers(shapes: dict[str, list[int]], base: str) -> dict[str, list[int]]:
    """Excerpts end anywhere; keep the layers that are there whole."""
    roles: dict[str | None, set[str]] = {}
    for key in shapes:
        roles.setdefault(expected_name(key, base), set()).add(role_of_or_none(key))
    halves = {n for n, r in roles.items() if len({"down", "up"} & r) == 1 or r == {"alpha"}}
    return {key: s for key, s in shapes.items() if expected_name(key, base) not in halves}


def role_of_or_none(key: str) -> str:
    return "" if key.startswith("bundle_emb.") else role_of(key)
