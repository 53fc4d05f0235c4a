"""What decides a ControlNet's training: see `trained_for`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from difflora_core.config import to_dict

from .. import trained_for
from ..artifacts import BASE_PARTS
from ..config import Config
from .config import ObjectiveConfig
from .people_stage import index_path

_DATA = ("data", "resolution", "batch", "pool", "mention", "drop_prompt", "smallest_face")
#: term of the objective -> files that it looks through
_NETWORKS = {"face": "face_network", "landmark": "landmark_network", "body": "vgg"}
#: key of such a file -> the mini world's network that stands in for none
_OWN = {"face_network": "recogniser", "landmark_network": "landmarks"}


def decisive(config: Config, objective: ObjectiveConfig) -> dict[str, Any]:
    """Key of the configuration -> its value, for all that one training depends on.

    The people's index and the mini model count by content, other files by name; networks only where
    their term does. How long and how fast it learns is left out: that may change on the way.
    """
    settings = config.controlnet
    networks = [key for term, key in _NETWORKS.items() if getattr(objective, term) > 0]
    values: dict[str, Any] = {"run.seed": config.run.seed}
    values |= {f"controlnet.objective.{k}": value for k, value in to_dict(objective).items()}
    values |= {f"controlnet.{key}": getattr(settings, key) for key in _DATA}
    index = index_path(config, "train")
    if settings.data == "people" and index.exists():  # its absence is refused where it is read
        values["people"] = trained_for.content(index)
    if settings.data == "drawn":
        values |= trained_for.drawings()
    if not settings.model:
        own = [_OWN[key] for key in networks if key in _OWN and not getattr(settings, key)]
        values |= trained_for.inputs(config, *BASE_PARTS, *own)
    files = {key: _names(getattr(settings, key)) for key in ("model", *networks)}
    return values | {f"controlnet.{key}": names for key, names in files.items()}


def _names(paths: str | Sequence[str]) -> str | list[str]:
    return Path(paths).name if isinstance(paths, str) else [Path(path).name for path in paths]
