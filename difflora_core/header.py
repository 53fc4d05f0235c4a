"""Header fields of a LoRA file: what other programs read, and where our own LoRAs came from.

modelspec 1.0.0 (Stability-AI/ModelSpec) and the `ss_` fields of kohya's trainer. All values are
strings. Never a path and never a photo.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from . import __version__

# modelspec names the code base that a file's layer names follow.
_STABILITY = "https://github.com/Stability-AI/generative-models"


class BaseNames(NamedTuple):
    """What headers call one base model."""

    architecture: str
    ss_version: str
    implementation: str
    resolution: str


BASE_NAMES = {
    "sd15": BaseNames("stable-diffusion-v1", "sd_v1", "diffusers", "512x512"),
    "sd21": BaseNames("stable-diffusion-v2-768-v", "sd_v2", "diffusers", "768x768"),
    "sdxl": BaseNames("stable-diffusion-xl-v1-base", "sdxl_base_v1-0", _STABILITY, "1024x1024"),
    "mini": BaseNames("difflora-mini-v1", "difflora_mini", "diffusers", "128x128"),
}
# Beginnings of `ss_base_model_version` as kohya, ai-toolkit and OneTrainer write it.
_SS_BEGINNINGS = {
    "sdxl": "sdxl",
    "sd_v1": "sd15",
    "sd_1": "sd15",
    "sd_v2": "sd21",
    "sd_2": "sd21",
    "difflora_mini": "mini",
}

# What the writer of a file works out anew.
_FILE_FACTS = (
    "ss_network_dim", "ss_network_alpha", "ss_network_module", "ss_network_args", "sshs_",
    "modelspec.hash_sha256",
    "lora_adapter_metadata",  # diffusers' ranks and alphas, which it refuses beside kohya's
)  # fmt: skip
_CERTIFICATES = "difflora.certificates"

# A folder on somebody's disk, or a picture in text: /home/jane/..., C:\photos, data:image/png;...
_PRIVATE = re.compile(
    r"""(?<![\w/:.])/[\w.\-][\w.\- ]*/ | (?<!\w)[A-Za-z]:[\\/](?!/)
    | (?:^|["'\s])(?:(?:\\\\){1,2}|//)\w | file:/ | data:\w+/""",
    re.VERBOSE,
)

HASH_FIELDS = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
"""fields under which trainers keep a hash of the weights"""


@dataclass(frozen=True)
class LoraHeader:
    """Facts about one LoRA; `to_dict` spells them for the file."""

    title: str
    base: str | None = None
    trigger: str = ""
    merged_from: Sequence[str] = ()
    """titles of the LoRAs that went in"""
    space_id: str = ""
    predictor_hash: str = ""
    strength: float | None = None
    seed: int | None = None
    description: str = ""

    def to_dict(self) -> dict[str, str]:
        """Header fields as strings; empty facts are left out."""
        fields = {
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.title": self.title,
            "modelspec.description": self.description,
            "modelspec.trigger_phrase": self.trigger,
            "modelspec.merged_from": ", ".join(self.merged_from),
            **base_fields(self.base),
            "difflora.version": __version__,
            "difflora.space": self.space_id,
            "difflora.predictor": self.predictor_hash,
            "difflora.strength": "" if self.strength is None else f"{self.strength:g}",
            "difflora.seed": "" if self.seed is None else str(self.seed),
        }
        return {name: value for name, value in fields.items() if value}


def base_fields(base: str | None) -> dict[str, str]:
    """What a header says of the base model; nothing of one without a name here."""
    if base is None:
        return {}
    names = BASE_NAMES[base]
    return {
        "modelspec.architecture": f"{names.architecture}/lora",
        "modelspec.implementation": names.implementation,
        "modelspec.resolution": names.resolution,
        "ss_base_model_version": names.ss_version,
    }


def network_fields(ranks: Sequence[int], alphas: Sequence[float]) -> dict[str, str]:
    """kohya's fields for rank and alpha; "Dynamic" where layers differ, as its resizing writes."""
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": _one_or_dynamic(sorted(set(ranks))),
        "ss_network_alpha": _one_or_dynamic(sorted({float(f"{alpha:g}") for alpha in alphas})),
    }


def base_named_in(metadata: Mapping[str, str]) -> str | None:
    """The base model that a header claims, as a hint only: shapes decide."""
    architecture = metadata.get("modelspec.architecture", "").partition("/")[0]
    for base, names in BASE_NAMES.items():
        if architecture == names.architecture:
            return base
    version = metadata.get("ss_base_model_version", "")
    return next((b for start, b in _SS_BEGINNINGS.items() if version.startswith(start)), None)


def of_a_copy(metadata: Mapping[str, str]) -> dict[str, str]:
    """The fields that a copy of a file keeps: all but what is worked out anew when it is written,
    and what holds a photo or names folders on the disk of who trained it."""
    kept = {name: text for name, text in metadata.items() if not name.startswith(_FILE_FACTS)}
    return {name: text for name, text in kept.items() if not _PRIVATE.search(text)}


def without_weight_facts(metadata: Mapping[str, str]) -> dict[str, str]:
    """The fields of a copy that stay true when the weights change."""
    return {name: text for name, text in of_a_copy(metadata).items() if name != _CERTIFICATES}


def json_field(metadata: Mapping[str, str], name: str) -> dict:
    """A header field that holds a JSON object; {} where it is absent or is not one."""
    try:
        value = json.loads(metadata.get(name, "{}"))
    except (RecursionError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _one_or_dynamic(values: Sequence[float]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else "Dynamic"
