"""What decides a training, kept beside its checkpoints: no other training goes on from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from difflora_core.config import to_dict
from difflora_core.errors import BadConfig
from difflora_core.tensor_file import TensorFile

from . import parallel
from .artifacts import artifact, artifacts_folder, sha256
from .config import Config
from .json_file import read_object
from .portraits import renderer_digest
from .run_folder import RunFolder

FILE = "trained_for.json"
_DIGITS = 12
#: how long and how fast it learns, where, how it is measured, and what follows: that may change
_FREE = (
    "only", "optim", "minutes", "compile", "parallel", "measured", "check_people", "end_to_end",
)  # fmt: skip


def settings(config: Config, *sections: str) -> dict[str, Any]:
    """Key of the configuration -> value, of sections without the tables inside; with the seed and
    the number of processes, each of which takes a batch.
    """
    values: dict[str, Any] = {"run.seed": config.run.seed, "processes": parallel.count()}
    for name in sections:
        section: Any = config
        for part in name.split("."):
            section = getattr(section, part)
        plain = to_dict(section).items()
        values |= {
            f"{name}.{key}": value
            for key, value in plain
            if key not in _FREE and not isinstance(value, dict)
        }
    return values


def inputs(config: Config, *names: str) -> dict[str, str]:
    """Artifacts that a training reads, by content. Errors: MissingArtifact, BadWeightsFile."""
    return {f"the artifact {n}": content(artifact(config, n)) for n in names}


def drawings() -> dict[str, str]:
    """What draws the pictures that a training sees: another renderer, another training."""
    return {"the renderer": renderer_digest()}


def content(path: Path) -> str:
    """First digits of a digest; of weights alone, since headers hold notes that decide nothing."""
    if path.suffix == ".safetensors":
        return TensorFile(path).weights_hash().removeprefix("0x")[:_DIGITS]
    return sha256(path)[:_DIGITS]


def start(config: Config, *names: str) -> dict[str, str]:
    """Artifacts that a training goes on from, by content.

    Those in the run's own folder are left out: they may be what this training has written there.
    """
    own = artifacts_folder(config)
    return inputs(config, *(n for n in names if artifact(config, n).parent != own))


def begin(folder: RunFolder, values: Mapping[str, Any]) -> None:
    """Refuse to go on from another training's checkpoints, or write the record of a new one.

    Errors: BadConfig.
    """
    check(folder, values)
    if parallel.rank() == 0 and not folder.has_checkpoints():  # nobody knows what older ones are of
        folder.write_text(FILE, json.dumps(dict(values), indent=2) + "\n")


def check(folder: RunFolder, values: Mapping[str, Any]) -> None:
    """Errors: BadConfig where the checkpoints of a folder are of another training."""
    path = folder.path / FILE
    if not folder.has_checkpoints() or not path.exists():
        return
    before = read_object(path)
    for key, value in values.items():
        if before.get(key, value) != value:
            raise BadConfig(
                f"{folder.name} was trained with {key} = {before[key]!r}, now it is {value!r}.",
                hint=f"Choose another run.root, or delete {folder.path} to train it anew.",
            )
